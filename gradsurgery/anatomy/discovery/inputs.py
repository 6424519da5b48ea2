"""Dummy inputs: random tokens, pixels or audio, enough of them that every part of a model has something to say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
    accepted = inspect.signature(model.forward).parameters
    vocabulary = _vocabulary(config)
    tokens = lambda: torch.randint(3, vocabulary - 1, (batch, length), generator=generator)  # noqa: E731
    if main == "pixel_values":
        made: dict[str, Any] = {main: torch.randn(_image_shape(config, batch), generator=generator).double()}
        if "input_ids" in accepted and vocabulary > 4:
            made["input_ids"] = tokens()
    elif main == "input_features":
        made = {main: torch.randn(_feature_shape(config, batch), generator=generator).double()}
    elif main == "input_values":
        made = {main: torch.randn(batch, 800, generator=generator).double()}
    else:
        made = {main: tokens()}
    if "decoder_input_ids" in accepted and _is_encoder_decoder(config):
        made["decoder_input_ids"] = tokens()
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


def _image_shape(config: Any, batch: int) -> tuple[int, ...]:
    source = getattr(config, "vision_config", config)
    size = getattr(source, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(source, "num_channels", None) or getattr(source, "in_channels", None) or 3
    frames = getattr(source, "num_frames", None)
    return (batch, frames, channels, height, width) if frames else (batch, channels, height, width)


def _feature_shape(config: Any, batch: int) -> tuple[int, ...]:
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 80
    frames = 2 * (getattr(config, "max_source_positions", None) or 30)
    return (batch, bins, frames)
