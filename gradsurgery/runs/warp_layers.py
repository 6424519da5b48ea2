"""Which weights a run of WaRP speaks of: layers by name or number, projections by what they are called anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import nn

import gradsurgery as gs
from gradsurgery.errors import PlanError, SelectionError

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "attn_q": ("q_proj", "query", "q_lin", "q"),
    "attn_k": ("k_proj", "key", "k_lin", "k"),
    "attn_v": ("v_proj", "value", "v_lin", "v"),
    "attn_o": ("o_proj", "out_proj", "out_lin", "o", "attn.c_proj", "attention.dense"),
    "ffn_up": ("up_proj", "c_fc", "fc1", "wi", "wi_1", "dense_h_to_4h"),
    "ffn_gate": ("gate_proj", "wi_0"),
    "ffn_down": ("down_proj", "mlp.c_proj", "fc2", "wo", "dense_4h_to_h"),
}
"""The names that transformers' models give to one projection."""

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def layer_numbers(layers: str, count: int) -> range:
    """The blocks that a word or a range means: of 32, early is 0-10, middle 11-21, late 22-31, last 31.

    Args:
        layers: all, early, middle, late, last, a number, or a range with both its ends.
        count: Blocks of the model.

    Raises:
        PlanError: no such word, blocks that are not there, or none.

    Example:
        >>> from gradsurgery.runs.warp_layers import layer_numbers
        >>> layer_numbers("middle", 32), layer_numbers("30-31", 32)
        (range(11, 22), range(30, 32))
    """
    first, second = math.ceil(count / 3), math.ceil(2 * count / 3)
    words = {
        "all": range(count),
        "early": range(first),
        "middle": range(first, second),
        "late": range(second, count),
        "last": range(count - 1, count),
    }
    if layers in words:
        found = words[layers]
    elif match := _RANGE.fullmatch(layers.strip()):
        begin, end = int(match[1]), int(match[2] or match[1])
        found = range(begin, end + 1)
    else:
        raise PlanError(f"layers is {', '.join(words)}, a number or a range such as 0-5, not {layers!r}.")
    if not len(found) or found[-1] >= count:
        raise PlanError(f"layers={layers!r} names no blocks of this model, which has {count}: 0-{count - 1}.")
    return found


def weights_of(model: nn.Module, layers: str, projections: Sequence[str]) -> list[str]:
    """The names of the chosen weights.

    Args:
        model: The model.
        layers: As in `layer_numbers`.
        projections: Keys of ``PROJECTIONS``, or names as `gs.region` takes them.

    Raises:
        PlanError: layers that are not there.
        SelectionError: a projection that this model does not have.
    """
    linear = gs.estimators.identity_basis(model).sites
    blocks = {name: found[0] for name in linear if (found := [int(p) for p in name.split(".") if p.isdecimal()])}
    if not blocks:
        raise SelectionError(f"{type(model).__name__} has no numbered blocks to choose layers of.")
    wanted = layer_numbers(layers, max(blocks.values()) + 1)
    chosen: set[str] = set()
    for projection in projections:
        if projection in PROJECTIONS:
            ends = tuple(f".{end}.weight" for end in PROJECTIONS[projection])
            mine = {name for name in linear if name.endswith(ends)}
        else:
            mine = set(gs.region(model, projection).parameters()) & set(linear)
        if not mine:
            kinds = sorted({".".join(p for p in name.split(".")[-3:-1] if not p.isdecimal()) for name in linear})
            raise SelectionError(
                f"{type(model).__name__} has no {projection!r}; its linear layers are {', '.join(kinds)}."
            )
        chosen |= mine
    names = [name for name in linear if name in chosen and blocks.get(name) in wanted]
    if not names:
        raise SelectionError(f"layers {layers!r} of this model have none of {', '.join(projections)}.")
    return names
