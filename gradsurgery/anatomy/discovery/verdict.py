"""What to make of the swap tests: accept, find true classes, join, or drop."""

from __future__ import annotations

from dataclasses import replace

from .crossing import twice
from .draft import Draft, Slot
from .names import canonical_of
from .structure import partly_held
from .verify import Judge, consumers, disjoint, producers


def judged(drafts: list[Draft], judge: Judge) -> list[Draft]:
    """The drafts that hold, with their exchange classes and whether they are closed.

    Heads that cannot be exchanged but are closed depend on their position (ALiBi slopes, relative biases): each is
    alone in its class, or with those it can be swapped with. Channels under a group norm can be exchanged inside their
    norm group only. Heads that are neither are joined into their group.
    """
    sound = [c for d in drafts if d.slots and disjoint(c := uncrossed(d, judge))]
    guessed = [replace(d, classes=d.parent_units or (0,) * d.count) for d in sound]
    accepted: dict[int, Draft] = {}
    for kinds in (("kv_group",), ("head", "neuron", "latent")):
        chosen = [i for i, d in enumerate(guessed) if d.kind in kinds]
        chosen.sort(key=lambda i: (guessed[i].kind, canonical_of(str(guessed[i].slots[0].name))))  # alike fail together
        passed = judge.exchange([guessed[i] for i in chosen])
        closed = judge.closed([guessed[i] for i in chosen])
        for i, exchangeable, shut in zip(chosen, passed, closed, strict=True):
            draft = replace(guessed[i], closed=shut)
            if draft.crossed:
                draft = replace(draft, classes=tuple(range(draft.count)))
            elif not exchangeable:
                classes = judge.classes(draft)
                if len(set(classes)) == draft.count and (not shut or draft.kind in ("neuron", "latent")):
                    continue
                draft = replace(draft, classes=classes)
            if judge.heard(draft):
                accepted[i] = draft
    fallen = [draft for i, draft in enumerate(guessed) if i not in accepted]
    return _filled(_consistent([accepted.get(i) for i in range(len(guessed))], guessed), fallen, judge)


def _filled(drafts: list[Draft], fallen: list[Draft], judge: Judge) -> list[Draft]:
    """Give a single unit what writes an activation inside it: columns that only its own weights read are its own."""
    shapes = {name: tuple(tensor.shape) for name, tensor in judge.tensors.items()}
    held = {slot.name for draft in drafts for slot in draft.slots}
    full: dict[int, Draft] = {}
    for draft in [d for d in drafts if d.count == 1]:
        whole = {slot.name for slot in producers(draft) if not slot.index}
        inside = [f for f in fallen if consumers(f) and whole.issuperset(s.name for s in consumers(f))]
        names = {str(slot.name) for f in inside for slot in producers(f)} - held - partly_held(shapes, inside).keys()
        if names:
            larger = replace(draft, slots=(*draft.slots, *(Slot(name, {}) for name in sorted(names))))
            full[id(draft)] = replace(larger, closed=judge.closed([larger])[0])
    kept = [full.get(id(draft), draft) for draft in drafts]
    return [replace(d, parent=full[id(d.parent)]) if id(d.parent) in full else d for d in kept]


def uncrossed(draft: Draft, judge: Judge) -> Draft:
    """A draft without the columns through which its units read each other.

    A square weight inside a group (a gate computed from all heads' values) gives every unit a row and columns that
    cross the other units' rows. Moved together they pass the swap test, which says that the units are right; but no
    unit can hold both without holding what is another's, so the columns stay out and no two units are exchangeable.
    """
    pairs = twice(list(draft.slots))
    if not pairs or draft.count < 2 or not judge.exchange([replace(draft, classes=None)])[0]:
        return draft
    kept = tuple(s for s in draft.slots if str(s.name) not in pairs or s.role != "consumer")
    return replace(draft, slots=kept, crossed=True)


def _consistent(accepted: list[Draft | None], guessed: list[Draft]) -> list[Draft]:
    """Let heads point at the judged version of their group; a group whose heads fell takes their place."""
    kept = []
    for i, draft in enumerate(accepted):
        if draft is None:
            continue
        if draft.kind == "kv_group":
            heads = accepted[i + 1] if i + 1 < len(accepted) else None
            if heads is None or heads.kind != "head":
                kept.append(replace(draft, kind="head"))
                continue
        if draft.parent is not None and accepted[i - 1] is None:
            draft = replace(draft, parent=None, parent_units=None)
        kept.append(draft)
    return kept
