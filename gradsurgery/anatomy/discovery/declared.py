"""Declared layouts: verified like everything that discovery finds, and put in the place of what they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from gradsurgery.anatomy.layouts import Layout
from gradsurgery.errors import AnatomyError

from .blocks import Survey
from .draft import Draft, Slot
from .names import config_of, is_under
from .namespace import Namespace
from .patterns import classes_at
from .placed import place
from .shrink import head_counts
from .trial import Trial
from .verify import Forward


@dataclass
class Declared:
    """Drafts of declared layouts in one model, verified, by the layout's number and the module's path."""

    model: nn.Module
    layouts: Sequence[Layout] = ()
    places: dict[tuple[int, str], list[Draft]] = field(default_factory=dict)

    @property
    def drafts(self) -> list[Draft]:
        return [draft for drafts in self.places.values() for draft in drafts]

    def explain(self, seen: Survey) -> None:
        """Let a survey know what is declared: what a pattern leaves out of a tensor is declared to be in no unit."""
        held = {name for draft in self.drafts for slot in draft.slots for name in _names(slot)}
        for findings in seen.findings.values():
            findings.claimed = {name: mask for name, mask in findings.claimed.items() if name not in held}

    def spared(self, drafts: list[Draft], experts: bool = True) -> list[Draft]:
        """The discovered drafts that no declaration overlaps; without ``experts``, experts stay in any case."""
        able = [d for d in drafts if experts or d.kind != "expert"]
        fallen = [d for d in able if any(overlap(d, own) for own in self.drafts)]
        fallen += [d for d in drafts if any(_is_kin(d, other) for other in fallen)]
        return [d for d in drafts if not any(d is other for other in fallen)]

    def like(self, model: nn.Module, sources: dict[str, str]) -> Declared:
        """The declarations at the shapes of ``model``, with the verdicts of its twin.

        Args:
            sources: Block of ``model`` -> its counterpart in the twin.

        Raises:
            AnatomyError: A module has no counterpart, or its patterns do not fit the real shapes.
        """
        space, found = Namespace(model), Declared(model, self.layouts)
        for number, layout in enumerate(self.layouts):
            for module in space.matches(layout):
                real = place(layout, module, space)
                block = max((b for b in sources if is_under(f"{module}.", b)), key=len, default="")
                source = sources.get(block, "") + module[len(block) :]
                twin = {d.kind: d for d in self.places.get((number, source), [])}
                if {d.kind for d in real} != twin.keys():
                    raise AnatomyError(f"layouts: {module} has no counterpart of the same make in its tiny twin.")
                judged = found.places[number, module] = []
                for draft in real:
                    pattern = twin[draft.kind]
                    self._require_scale(draft, pattern, config_of(model, module), config_of(self.model, source))
                    parent = judged[0] if draft.parent is not None else None
                    classes = classes_at(pattern, draft.count, draft.parent_units)
                    judged.append(replace(draft, classes=classes, closed=pattern.closed, parent=parent))
        return found

    @staticmethod
    def _require_scale(draft: Draft, twin: Draft, config: object, small: object) -> None:
        """Heads must grow from the twin to the model as a head count of the config does."""
        if draft.kind not in ("head", "kv_group") or draft.count == twin.count:
            return
        real, tiny = head_counts(config), head_counts(small)
        if not any(draft.count * tiny[name] == twin.count * real.get(name, 0) for name in tiny):
            raise AnatomyError(
                f"layouts: {draft.block} has {draft.count} {draft.kind}s, its tiny twin {twin.count}, and no head "
                "count of the config grows like that. Give sizes={'unit': …} as the name of a config field."
            )


def declare(layouts: Sequence[Layout], model: nn.Module, forward: Forward, twin: bool = False) -> Declared:
    """Lay declared units out in ``model``, a replica or a tiny twin, and verify them there.

    Raises:
        AnatomyError: A declaration fits no module, no tensor or no shape, or fails its tests; the message says which.
    """
    out = Declared(model, layouts)
    if not layouts:
        return out
    space = Namespace(model)
    for number, layout in enumerate([layouts] if isinstance(layouts, str | Layout) else layouts):
        if not isinstance(layout, Layout) or layout is layouts:
            raise AnatomyError(
                f"layouts={layouts!r} is no list of layouts; give layouts=[gs.Layout(kind, modules, …)]."
            )
        if twin and (fixed := [axis for axis, size in layout.sizes.items() if isinstance(size, int)]):
            raise AnatomyError(
                f"layouts: sizes={{{fixed[0]!r}: {layout.sizes[fixed[0]]}}} holds at one size only, and this model is "
                f"examined on a tiny twin. Name a config field (sizes={{{fixed[0]!r}: 'num_attention_heads'}}), or "
                "write a number that every size shares into the pattern: '(3 unit d) hidden'."
            )
        for module in space.matches(layout):
            out.places[number, module] = place(layout, module, space)
    _require_apart(out.drafts)
    judged = iter(Trial(model, forward).verified(out.drafts))
    out.places = {key: [next(judged) for _ in drafts] for key, drafts in out.places.items()}
    return out


def _require_apart(drafts: list[Draft]) -> None:
    for i, one in enumerate(drafts):
        for other in drafts[:i]:
            if not _is_kin(one, other) and overlap(one, other):
                raise AnatomyError(
                    f"layouts: the {one.kind}s declared for {one.block} and the {other.kind}s declared for "
                    f"{other.block} share entries; narrow one of the globs or patterns."
                )


def overlap(one: Draft, other: Draft) -> bool:
    """Whether units of two groups claim one entry in the same role; units inside experts may."""
    kinds = {one.kind, other.kind}
    if "expert" in kinds and kinds & {"neuron", "latent"}:
        return False
    theirs: dict[tuple[str, bool], list[Slot]] = {}
    for slot in other.slots:
        for name in _names(slot):
            theirs.setdefault((name, slot.role == "consumer"), []).append(slot)
    pairs = ((a, b) for a in one.slots for name in _names(a) for b in theirs.get((name, a.role == "consumer"), ()))
    return any(_meet(a, b) for a, b in pairs)


def _meet(a: Slot, b: Slot) -> bool:
    """Whether the slices of two slots of one tensor share an entry, taken dimension by dimension."""
    return all(np.intersect1d(a.index[dim], b.index[dim]).size for dim in a.index.keys() & b.index.keys())


def _is_kin(one: Draft, other: Draft) -> bool:
    """Whether one of two drafts is the KV group of the other."""
    return any(
        child.parent is not None and group.kind == "kv_group" and _same_place(child.parent, group)
        for child, group in ((one, other), (other, one))
    )


def _same_place(one: Draft, other: Draft) -> bool:
    return one.block == other.block and [s.name for s in one.slots] == [s.name for s in other.slots]


def _names(slot: Slot) -> Iterable[str]:
    return (slot.name,) if isinstance(slot.name, str) else slot.name
