"""A tiny twin's config: every size small, every ratio that layouts depend on kept.

Here, in ``sizes`` and in ``depth`` names are read, and they are config fields, not modules: all head counts are scaled
by one common factor, experts keep their router groups, one layer of every kind stays. What the result gives is checked
against the real model afterwards, so a field that is not understood costs an error, never a wrong answer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .depth import Kinds, chosen_layers, is_staged, keep_layers, stages_of
from .sizes import HEADS, HIDDEN, Sizes

_TOKEN = re.compile(r"(token_id|token_index|_token_ids?)$")
_VOCABULARY = re.compile(r"(^vocab_size|^.*_vocab_size|vocab_size_per_layer_input|_hash_byte_group_vocab)$")
_FOLLOWS = re.compile(r"(hidden|size|dim|channels|width|features)")
TOKENS = 131


def shrunken(config: Any, step: int = 0, kinds: Sequence[Kinds] = ()) -> Any:
    """A copy of a Hugging Face config with small sizes, sub-configs included.

    Args:
        step: 0 for the smallest twin, 1 for one with more heads and other widths, 2 for one with all its heads.
        kinds: Per list of modules of the real model, what each element holds; one layer of every kind stays.
    """
    small = copy.deepcopy(config)
    widths: dict[int, set[int]] = {}
    _note_widths(small, step, widths)
    known = {real: max(own) for real, own in widths.items() if all(max(own) % size == 0 for size in own)}
    _shrink(small, step, kinds, known)
    _follow(small, known)
    return small


def like_layers(config: Any, kinds: Sequence[Kinds]) -> dict[tuple[int, int], list[int]]:
    """Layers before and after shrinking -> for each before, the number afterwards of the one that is like it."""
    found: dict[tuple[int, int], list[int]] = {}
    for part in parts_of(config):
        found |= like_layers(part, kinds)
    fields = _fields(config)
    if not is_staged(fields):
        chosen = chosen_layers(fields, _overrides(config), kinds)
        found |= {(len(own.like), len(own.kept)): own.like for own in chosen.values()}
    return found


def head_counts(config: Any) -> dict[str, int]:
    """Fields of a config that count heads or groups of heads; those of stages by their number."""
    found = {}
    for source in (config, *_loose_parts(config)):
        for name, value in vars(source).items():
            if HEADS.search(name):
                found.update({f"{name}{place}": count for place, count in _counts(value)})
    return found


def _counts(value: Any, place: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        yield place, value
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _counts(part, f"{place}.{i}")


def parts_of(config: Any) -> list[Any]:
    """The configs inside a config."""
    return [v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]


def _loose_parts(config: Any) -> list[Any]:
    """Configs that speak of a part of every layer and have no width of their own, nor parts that have."""
    own = lambda part: any(HIDDEN.search(name) for name in _fields(part))  # noqa: E731
    return [part for part in parts_of(config) if not own(part) and not parts_of(part)]


def _fields(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _note_widths(config: Any, step: int, widths: dict[int, set[int]]) -> None:
    """What the widths of parts that have heads become: parts of one width keep one."""
    for part in parts_of(config):
        _note_widths(part, step, widths)
    sizes = Sizes(_fields(config), list(_overrides(config).values()), step)
    for value in sizes.hidden if sizes.main_heads() else ():
        widths.setdefault(value, set()).add(sizes.of_hidden(value))


def _shrink(config: Any, step: int, kinds: Sequence[Kinds], known: dict[int, int]) -> None:
    loose = _loose_parts(config)
    for part in parts_of(config):
        if part not in loose:
            _shrink(part, step, kinds, known)
    overrides, fields = _overrides(config), _fields(config)
    sizes = Sizes(fields, [*overrides.values(), *map(_fields, loose)], step, known)
    for part in loose:
        for name, value in _fields(part).items():
            object.__setattr__(part, name, mapped(value, sizes.rule(name)))
    changes = {name: mapped(value, sizes.rule(name)) for name, value in fields.items()}
    changes |= sizes.per_head(changes) | sizes.recurrent(changes)
    changes |= _vocabulary(fields)
    changes |= stages_of(fields, step)
    if not is_staged(fields):
        layers = chosen_layers(fields, overrides, kinds)
        changes |= keep_layers(fields, changes, layers)
        kept = next((own.kept for own in layers.values()), [])
        overrides = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}
    for name, value in changes.items():
        if value is not fields.get(name):
            object.__setattr__(config, name, value)
    if overrides:
        small = {layer: {n: mapped(v, sizes.rule(n)) for n, v in own.items()} for layer, own in overrides.items()}
        config._heterogeneity_spec.per_layer_overrides = small


def mapped(value: Any, rule: Callable[[int], int] | None) -> Any:
    """A number, or the numbers of a list, under a rule."""
    if rule is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value > 0:
        return rule(value)
    if isinstance(value, (list, tuple)) and any(isinstance(v, (int, list, tuple)) for v in value):
        return type(value)(mapped(v, rule) for v in value)
    return value


def _overrides(config: Any) -> dict[int, dict[str, Any]]:
    """What single layers of a heterogeneous config have for themselves."""
    spec = vars(config).get("_heterogeneity_spec")
    return getattr(spec, "per_layer_overrides", None) or {}


def _follow(config: Any, known: dict[int, int]) -> None:
    """Sizes that speak of another part's width follow it."""
    for part in parts_of(config):
        _follow(part, known)
    for name, value in _fields(config).items():
        if _FOLLOWS.search(name) and type(value) is int and value >= 128 and value in known:
            object.__setattr__(config, name, known[value])


def _vocabulary(fields: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {
        name: min(value, TOKENS) for name, value in fields.items() if _VOCABULARY.search(name) and type(value) is int
    }
    spare = TOKENS - 2
    for name, value in fields.items():
        if _TOKEN.search(name) and isinstance(value, int) and value >= TOKENS:
            changes[name], spare = spare, spare - 1
        elif _TOKEN.search(name) and isinstance(value, list):
            changes[name] = [v if v < TOKENS else 1 for v in value]
    return changes
