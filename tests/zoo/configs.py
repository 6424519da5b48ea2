"""Small configs of any architecture: common sizes by field name, the rest by model type.

The shapes are odd and unequal on purpose, so that no two dimensions of a model are equal by chance, and every kind of
layer comes at least twice. Nothing here uses the library's own shrinking: what it finds is judged on these models.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from tests.zoo.fields import fields_of
from tests.zoo.older import field_names, older


@dataclass(frozen=True)
class Shape:
    """One set of sizes; ``hidden`` divides by ``heads``, ``heads`` by ``kv``, ``ssm_heads`` by ``ssm_groups``."""

    hidden: int
    heads: int
    kv: int
    head_dim: int
    widths: tuple[int, ...]
    experts: int
    ssm_heads: int
    ssm_groups: int
    vocabulary: int = 97
    biases: bool = False
    flip_tying: bool = False
    number: int = 0


SHAPES = (
    Shape(48, 6, 3, 10, (52, 44, 36, 28), 5, ssm_heads=6, ssm_groups=2),
    Shape(40, 5, 5, 12, (44, 60, 28, 36), 7, ssm_heads=5, ssm_groups=1, vocabulary=89, biases=True, number=1),
    Shape(64, 4, 1, 8, (36, 68, 44, 20), 4, ssm_heads=8, ssm_groups=4, vocabulary=101, flip_tying=True, number=2),
)
"""Grouped queries; one key per head with biases; one key for all heads, tying flipped."""


def _names(text: str) -> list[str]:
    return text.split()


_HIDDEN = _names("hidden_size d_model n_embd emb_dim embed_dim dim embedding_dim dim_model word_embed_proj_dim")
_HEADS = _names(
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_query_groups conf_num_attention_heads"
)
_WIDTHS = _names(
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff dim_ff d_inner n_inner feed_forward_size "
    "ffn_hidden_size hidden_dim mlp_dim intermediate_size_mlp dense_intermediate_size"
)
_NARROW = _names(
    "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size"
)
_TWO = _names("encoder_layers num_encoder_layers num_layers_per_stack num_global_layers conf_num_hidden_layers")
_THREE = _names("num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks depth")
_VOCABULARY = _names("vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input")
_SSM_HEADS = _names("mamba_n_heads mamba_num_heads n_mamba_heads")
_SSM_HEAD_SIZE = _names("mamba_d_head mamba_head_dim mamba_headdim")
_EXPERTS = _names("num_experts num_local_experts n_routed_experts moe_num_experts")
_CHOSEN = _names("num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k")
_GROUPS = _names("n_group num_expert_group")
_LENGTH = _names(
    "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length max_source_positions "
    "max_target_positions max_encoder_position_embeddings max_decoder_position_embeddings"
)
_WINDOW = _names(
    "sliding_window window_size sliding_window_size attention_chunk_size local_attention attention_window_size "
    "chunk_size mamba_chunk_size block_size"
)
_DENSE = _names("num_dense_layers first_k_dense_replace")
_LAYER_KINDS = re.compile(r"(layer_types|layers_block_type|indexer_types)$")
_SMALL = {
    **dict.fromkeys(_LENGTH, 64),
    **dict.fromkeys(_WINDOW, 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 5),
    **dict.fromkeys(_DENSE, 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **{"q_lora_rank": 14, "kv_lora_rank": 11, "o_lora_rank": 9, "mamba_dt_rank": 7, "time_step_rank": 7},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7, "d_kv": 6, "d_head": 6, "rotary_dim": 4},
    **{"linear_key_head_dim": 6, "linear_value_head_dim": 5, "linear_head_dim": 6, "linear_num_heads": 3},
    **{"linear_num_key_heads": 3, "linear_num_value_heads": 6, "hidden_size_per_layer_input": 9, "embedding_size": 20},
    **{"index_n_heads": 3, "index_head_dim": 8, "index_topk": 5, "image_size": 24, "patch_size": 8, "num_mel_bins": 12},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
}


def config_of(kind: str, seed: int = 0, causal: bool = False) -> Any:
    """The small config of model type ``kind`` in shape ``seed``, for a decoder if ``causal``."""
    import transformers

    shape = SHAPES[seed % len(SHAPES)]
    cls = transformers.CONFIG_MAPPING[kind]
    own = fields_of(kind, shape)
    for name, value in older(kind, shape).items():
        own[name] = own.get(name, {}) | value if isinstance(value, dict) else value
    if causal and "is_decoder" in field_names(cls):
        own = {"is_decoder": True} | own
    return small(cls, shape, own)


def small(cls: type, shape: Shape, own: dict[str, Any]) -> Any:
    """An instance of a config class with small sizes; ``own`` overrides, for sub-configs as nested dicts."""
    flat = {name: value for name, value in own.items() if not isinstance(value, dict)}
    values = vars(cls()) | flat
    known, widths, narrow = _sizes(shape), itertools.cycle(shape.widths), itertools.cycle((13, 18, 15))
    if "num_key_value_heads" in values:  # where the default is one per head, too
        values["num_key_value_heads"] = values["num_key_value_heads"] or shape.heads
    latent = bool(values.get("kv_lora_rank"))
    special = itertools.count(shape.vocabulary - 1, -1)
    made: dict[str, Any] = {}
    for name in field_names(cls):
        value = values.get(name)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            made[name] = small(type(value), shape, _choices(value) | own.get(name, {}))
        elif isinstance(value, bool):
            if (shape.biases and name.endswith("bias")) or (shape.flip_tying and name == "tie_word_embeddings"):
                made[name] = not value
        elif name.endswith(("token_id", "token_index")):
            made[name] = next(special) if isinstance(value, int) and value > 2 else value
            made[name] = 2 if isinstance(value, list) else made[name]
        elif isinstance(value, int) and value > 0:
            if name in _WIDTHS:
                made[name] = next(widths)
            elif name in _NARROW:
                made[name] = next(narrow)
            elif name in known:
                made[name] = known[name]
    if latent:
        made["num_key_value_heads"] = shape.heads
        made.pop("head_dim", None)
    made |= _router(values, shape) | _layers(values, own)
    return cls(**(made | {name: value for name, value in own.items() if name in flat or name not in made}))


def _choices(config: Any) -> dict[str, Any]:
    """What a composite model sets in a part of itself, other than sizes."""
    stock = vars(type(config)())
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, (bool, str)) and name in stock and value != stock[name] and not name.startswith("_")
    }


def _sizes(shape: Shape) -> dict[str, int]:
    return {
        **_SMALL,
        **dict.fromkeys(_HIDDEN, shape.hidden),
        **dict.fromkeys(_HEADS, shape.heads),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), shape.kv),
        **dict.fromkeys(_TWO, 2),
        **dict.fromkeys(_THREE, 3),
        **dict.fromkeys(_VOCABULARY, shape.vocabulary),
        **dict.fromkeys(_SSM_HEADS, shape.ssm_heads),
        **dict.fromkeys(_SSM_HEAD_SIZE, 2 * shape.hidden // shape.ssm_heads),
        **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), shape.ssm_groups),
        **{"head_dim": shape.head_dim, "mamba_d_ssm": 2 * shape.hidden},
    }


def _router(values: dict[str, Any], shape: Shape) -> dict[str, int]:
    """Experts and the groups a router may choose from."""
    found = {name: values.get(name) for name in (*_EXPERTS, *_CHOSEN, *_GROUPS, "topk_group")}
    groups = max([v for n, v in found.items() if n in _GROUPS and isinstance(v, int)], default=1)
    experts = shape.experts if groups == 1 else 8
    made = dict.fromkeys(_EXPERTS, experts) | dict.fromkeys(_CHOSEN, 2 if groups == 1 else 3)
    made |= dict.fromkeys(_GROUPS, 4) | {"topk_group": 2} if groups > 1 else {}
    return {n: made[n] for n, v in found.items() if isinstance(v, int) and v > 1 and n in made}


def _layers(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Every kind of layer twice: kinds of mixers alternate, kinds of MLPs come one after the other."""
    lists = {
        name: list(dict.fromkeys(value))
        for name, value in values.items()
        if isinstance(value, list) and _LAYER_KINDS.search(name) and not name.startswith("mtp")
    }
    dense = any(values.get(name) is not None for name in _DENSE)
    if not lists and not dense:
        return {}
    count = next((name for name in ("n_layer", "num_layers") if name in values), "num_hidden_layers")
    n = own.get(count) or max([4 if dense else 3, *(2 * len(kinds) for kinds in lists.values())])
    spread = {
        name: [kinds[i * len(kinds) // n if "mlp" in name else i % len(kinds)] for i in range(n)]
        for name, kinds in lists.items()
    }
    return {count: n} | {name: own.get(name, kinds) for name, kinds in spread.items()}
