"""Dummy inputs: random tokens, pixels or audio, enough of them that every part of a model has something to say."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.adapters import base_of
from gradsurgery.errors import AnatomyError

BATCH, LENGTH = 2, 9


def dummy_inputs(model: nn.Module, batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> dict[str, Any]:
    """Random inputs for a Hugging Face model, from its main input's name and its config.

    Raises:
        AnatomyError: It is not known what the model eats.
    """
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise AnatomyError(
            f"{type(model).__name__} has no Hugging Face config, so its inputs are unknown: pass "
            "gs.dissect(model, inputs)."
        )
    accepted = inspect.signature(base_of(model).forward).parameters
    generic = main == "inputs"  # a name for whatever the class eats
    if generic:
        main = next((name for name in ("pixel_values", "input_ids") if name in accepted), main)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
    noise = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    rows = batch * (getattr(config, "num_codebooks", None) or 1)
    ordinary = _ordinary_tokens(config)
    tokens = lambda: ordinary[torch.randint(len(ordinary), (rows, length), generator=generator)]  # noqa: E731
    if main == "pixel_values":
        made: dict[str, Any] = _images(config, accepted, noise, batch, video=not generic)
        if "input_ids" in accepted and len(ordinary) > 1:
            made["input_ids"] = tokens()
    elif main == "input_features":
        made = {main: noise(*_feature_shape(config, batch))}
    elif main == "input_values":
        made = {main: noise(batch, 800)}
    else:
        made = {main: tokens()}
        spread = getattr(config, "audio_length_per_tok", None)
        if spread and "input_features" in accepted:  # tokens and sound side by side
            made["input_features"] = noise(rows, _feature_shape(config, rows)[1], length * spread)
    if "decoder_input_ids" in accepted and _is_encoder_decoder(config):
        made["decoder_input_ids"] = tokens()
    if "encoder_hidden_states" in accepted and _reads_an_encoder(config):
        made["encoder_hidden_states"] = noise(batch, length + 1, _encoder_width(config))
    elif "encoder_outputs" in accepted and _reads_an_encoder(config):
        made["encoder_outputs"] = (noise(batch, length + 1, _encoder_width(config)),)
    if "entity_ids" in accepted:
        made["entity_ids"] = torch.randint(3, config.entity_vocab_size, (rows, 3), generator=generator)
        made["entity_position_ids"] = torch.randint(length, (rows, 3, 2), generator=generator)
        made["entity_attention_mask"] = torch.ones(rows, 3, dtype=torch.long)
    if "global_attention_mask" in accepted:
        made["global_attention_mask"] = torch.zeros(rows, length, dtype=torch.long)
        made["global_attention_mask"][:, ::5] = 1
    if "lang_ids" in accepted:  # adapters of every language
        made["lang_ids"] = torch.arange(rows) % len(getattr(config, "languages", [0]))
    if "use_cache" in accepted:
        made["use_cache"] = False
    return made


def widen_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The user's inputs on the CPU, in float64."""
    return {
        name: (value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu())
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def text_config(config: Any) -> Any:
    getter = getattr(config, "get_text_config", None)
    return getter() if getter is not None else config


def _is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def _vocabulary(config: Any) -> int:
    for source in (text_config(config), config):
        for field in ("vocab_size", "num_embeddings", "n_vocab", "vocabulary_size"):
            size = getattr(source, field, None)
            if isinstance(size, int) and size > 4:
                return size
    return 5


def _ordinary_tokens(config: Any) -> Tensor:
    """Token ids that stand for nothing special: no padding, no place of an image."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    special = {
        token
        for part in parts
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index", "token_ids"))
        for token in (value if isinstance(value, (list, tuple)) else [value])
    }
    vocabulary = _vocabulary(config)
    return torch.tensor([t for t in range(3, vocabulary - 1) if t not in special] or list(range(vocabulary)))


def _reads_an_encoder(config: Any) -> bool:
    """Whether a decoder that stands alone has cross attention: set, or the decoder half of a pair."""
    cross = getattr(config, "add_cross_attention", None)
    halves = any(hasattr(config, name) for name in ("decoder_attention_heads", "num_decoder_attention_heads"))
    return not _is_encoder_decoder(config) and (halves if cross is None else bool(cross))


def _encoder_width(config: Any) -> int:
    return getattr(config, "cross_attention_hidden_size", None) or text_config(config).hidden_size


def _images(
    config: Any, accepted: Mapping[str, Any], noise: Callable[..., Tensor], batch: int, video: bool
) -> dict[str, Any]:
    source = getattr(config, "vision_config", config)
    size = getattr(source, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(source, "num_channels", None) or getattr(source, "in_channels", None) or 3
    if "spatial_shapes" in accepted:  # patches already cut, of images of any size
        side = math.isqrt(source.num_patches)
        shapes = torch.tensor([[side, side]] * batch)
        patches = noise(batch, side * side, channels * source.patch_size**2)
        seen = torch.ones(batch, side * side, dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": seen, "spatial_shapes": shapes}
    frames = getattr(source, "num_frames", None) if video else None
    shape = (batch, frames, channels, height, width) if frames else (batch, channels, height, width)
    return {"pixel_values": noise(*shape)}


def _feature_shape(config: Any, batch: int) -> tuple[int, ...]:
    source = getattr(config, "audio_config", config)
    bins = getattr(source, "num_mel_bins", None) or getattr(source, "input_feat_per_channel", None) or 80
    frames = 2 * (getattr(source, "max_source_positions", None) or 30)
    return (batch, bins, frames)
