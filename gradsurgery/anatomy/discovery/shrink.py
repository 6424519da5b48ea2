"""A tiny twin's config: every size small, every ratio that layouts depend on kept.

The only place that reads names, and they are config fields, not modules: all head counts are divided by one common
factor, experts keep their router groups, one layer of every kind stays. What the result gives is checked against the
real model afterwards, so a field that is not understood costs an error, never a wrong answer.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

HEAD_SIZE = 8
_WIDTHS = (44, 52, 28, 36, 60, 20, 68, 76, 84, 92)

_LAYERS = re.compile(r"^(num_(hidden_|encoder_|decoder_|text_)?layers|n_layers?|(en|de)coder_layers|num_blocks)$")
_HEADS = re.compile(r"heads$|query_groups$|(^|_)(n|num)_head$|^(mamba_)?n_?groups$")
_HEAD_SIZE = re.compile(r"^(?!num_|n_).*(head_dim|d_head|headdim|head_size|d_kv|kv_channels|dim_head|rotary_dim)$")
_HIDDEN = re.compile(
    r"^(hidden_size|d_model|n_embd|model_dim|dim_model|emb_dim|embed_dim|word_embed_proj_dim|d_embed|dim|embedding_size|lru_width|attention_hidden_size)$"
)
_WIDTH = re.compile(
    r"^(?!num_|inner_group).*(intermediate|inner|ffn|feed_forward|d_ff$|dff|dim_ff|n_inner|mlp_hidden|mlp_dim|^hidden_dim$)"
)
_EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|n_experts)$")
_CHOSEN = re.compile(r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k)$")
_RANK = re.compile(r"(lora_rank|dt_rank|time_step_rank|_rank)$")
_STATE = re.compile(r"(d_state|state_size)$")
_LENGTH = re.compile(
    r"(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions|max_seq_len|context_length)$"
)
_WINDOW = re.compile(r"(sliding_window|window_size|chunk_size|attention_window)$")
_PERIOD = re.compile(r"(period|offset|interval|every_n|freq|sparse_step|pattern|dense_replace)")
_TOKEN = re.compile(r"(token_id|token_index|_token_ids?)$")


def shrunken(config: Any, step: int = 0) -> Any:
    """A copy of a Hugging Face config with small sizes, sub-configs included.

    Args:
        step: 0 for the smallest twin, 1 for one with more heads and other widths, 2 for one with all its heads.
    """
    small = copy.deepcopy(config)
    _shrink(small, step)
    return small


def head_counts(config: Any) -> dict[str, int]:
    """Fields of a config that count heads or groups of heads."""
    return dict(_integers(config, _HEADS))


def head_factor(config: Any, step: int = 0) -> int:
    """What all head counts of ``config`` are divided by in its twin."""
    if step == 2:
        return 1
    counts = [v for _, v in _integers(config, _HEADS) if v > 1]
    if not counts:
        return 1
    common = math.gcd(*counts)
    floor = 2 if len(set(counts)) > 1 else 4
    factors = [f for f in range(1, common + 1) if common % f == 0 and min(counts) // f >= floor] or [1]
    return factors[-2] if step == 1 and len(factors) > 1 else factors[-1]


def _shrink(config: Any, step: int) -> None:
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            _shrink(value, step)
    factor = head_factor(config, step)
    changes: dict[str, Any] = {}
    for name, value in _integers(config, _HEADS):
        changes[name] = value // factor if value > 1 else value
    heads = max([v for n, v in changes.items() if "kv" not in n and "mamba" not in n and "linear" not in n], default=4)
    hidden = heads * HEAD_SIZE * (2 if heads < 3 or step == 1 else 1)
    for name, _ in _integers(config, _HIDDEN):
        changes[name] = hidden
    sizes = dict(_integers(config, _HEAD_SIZE))
    unit = math.gcd(*sizes.values()) // (4 if len(set(sizes.values())) > 1 else HEAD_SIZE) if sizes else 1
    for name, value in sizes.items():
        changes[name] = HEAD_SIZE // 2 if name == "rotary_dim" else max(2, value // max(unit, 1))
    _recurrent(config, changes, hidden)
    widths = iter([w + 12 * step for w in _WIDTHS] * 3)
    for name, value in vars(config).items():
        if isinstance(value, list) and _WIDTH.search(name) and all(isinstance(v, int) for v in value):
            changes[name] = [next(widths)] * len(value)
    for name, _ in _integers(config, _WIDTH):
        changes[name] = next(widths)
    for name, value in _integers(config, _RANK):
        changes[name] = min(value, 12 if "kv" in name else 20)
    for name, value in _integers(config, _STATE):
        changes[name] = min(value, 6)
    _experts(config, changes)
    for name, value in _integers(config, _LENGTH):
        changes[name] = min(value, 64)
    for name, value in _integers(config, _WINDOW):
        changes[name] = min(value, 4)
    _vocabulary(config, changes)
    _layers(config, changes)
    _images(config, changes)
    for name, value in changes.items():
        object.__setattr__(config, name, value)


def _integers(config: Any, pattern: re.Pattern) -> list[tuple[str, int]]:
    return [
        (name, value)
        for name, value in vars(config).items()
        if pattern.search(name) and isinstance(value, int) and not isinstance(value, bool) and value > 0
    ]


def _recurrent(config: Any, changes: dict[str, Any], hidden: int) -> None:
    """State-space heads times their size must stay the expanded width."""
    fields = vars(config)
    expand = next((v for n, v in fields.items() if n in ("expand", "mamba_expand") and isinstance(v, (int, float))), 2)
    for size in ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim"):
        if size not in fields or (size == "head_dim" and "state_size" not in fields):
            continue
        own = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
        count = next((changes[n] for n in own if n in changes), None)
        if count and fields.get("mamba_d_ssm"):
            changes["mamba_d_ssm"] = count * HEAD_SIZE
            changes[size] = HEAD_SIZE
        elif count:
            changes[size] = max(1, int(expand * hidden) // count)


def _experts(config: Any, changes: dict[str, Any]) -> None:
    for name, value in _integers(config, re.compile("zero_expert_num")):
        changes[name] = min(value, 2)
    groups = max([v for n, v in vars(config).items() if n in ("n_group", "num_expert_group") and v] or [1])
    for name, value in _integers(config, _EXPERTS):
        small = groups * 2 if groups > 1 else 6
        if value > small:
            changes[name] = small
            for chosen, count in _integers(config, _CHOSEN):
                changes[chosen] = min(count, 3)


def _vocabulary(config: Any, changes: dict[str, Any]) -> None:
    size = 131
    for name, value in _integers(config, re.compile(r"(^vocab_size|^.*_vocab_size|vocab_size_per_layer_input)$")):
        changes[name] = min(value, size)
    spare = size - 2
    for name, value in vars(config).items():
        if _TOKEN.search(name) and isinstance(value, int) and value >= size:
            changes[name], spare = spare, spare - 1
        elif _TOKEN.search(name) and isinstance(value, list):
            changes[name] = [v if v < size else 1 for v in value]


def _layers(config: Any, changes: dict[str, Any]) -> None:
    """Keep the first layer of every kind, in order, and at least two layers."""
    counts = dict(_integers(config, _LAYERS))
    for name, count in counts.items():
        lists = {
            n: v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == count and count > 2
        }
        kinds: dict[tuple, int] = {}
        for layer in range(count):
            kinds.setdefault(tuple(str(v[layer]) for v in lists.values()), layer)
        chosen = sorted(kinds.values()) if lists and len(kinds) < count else []
        period = [v for n, v in vars(config).items() if _PERIOD.search(n) and isinstance(v, int) and v < count]
        keep = min(count, max([2, len(chosen), *(min(p, 8) + 1 for p in period)]))
        if lists:
            spare = [layer for layer in range(count) if layer not in chosen]
            chosen = sorted(chosen + spare[: keep - len(chosen)])
            for field, values in lists.items():
                changes[field] = type(values)(values[layer] for layer in chosen)
        if "dense_replace" in " ".join(vars(config)):
            for field in vars(config):
                if "dense_replace" in field and isinstance(getattr(config, field), int):
                    changes[field] = min(getattr(config, field), 1)
            keep = max(2, min(keep, 3)) if not lists else keep
        changes[name] = keep


def _images(config: Any, changes: dict[str, Any]) -> None:
    patch = getattr(config, "patch_size", None)
    size = getattr(config, "image_size", None)
    if isinstance(size, int) and isinstance(patch, int):
        changes["image_size"], changes["patch_size"] = 24, 8
    elif isinstance(size, int) and size > 64:
        changes["image_size"] = 64
