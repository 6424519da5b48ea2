"""Lists of modules inside a block that are longer in a real model than in its tiny twin: an adapter for each use of it.

Where the last two elements of the twin's list play the same part, so do the further ones of the real list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .draft import Draft, Slot
from .names import Shapes, is_under, lengths_of


def lengthened(drafts: list[Draft], small: Shapes, large: Shapes, lists: Iterable[str]) -> tuple[list[Draft], Shapes]:
    """The drafts and shapes of a twin's block with as many elements in each list as the real block has.

    Args:
        drafts: Under the real block's name.
        small: Shapes of the twin's block under the real block's name.
        large: Shapes of the real model.
        lists: Paths of the lists in the block.
    """
    ours, theirs = lengths_of(small), lengths_of(large)
    for path in lists:
        count, wanted = ours.get(path, 0), theirs.get(path, 0)
        if count > 1 and wanted > count and _alike(drafts, f"{path}.{count - 2}", f"{path}.{count - 1}"):
            drafts, small = _grown(drafts, small, f"{path}.{count - 1}", [f"{path}.{k}" for k in range(count, wanted)])
    return drafts, small


def _alike(drafts: list[Draft], one: str, other: str) -> bool:
    """Whether two elements hold the same kinds of units and the same slots of shared ones."""

    def parts(element: str) -> list[tuple]:
        found = []
        for draft in drafts:
            own = sorted((str(s.name)[len(element) :], s.role, sorted(s.index)) for s in _own(draft, element))
            if own:
                found.append((draft.kind, draft.count, own, len(own) == len(draft.slots)))
        return sorted(found)

    return bool(parts(one)) and parts(one) == parts(other)


def _own(draft: Draft, element: str) -> list[Slot]:
    return [slot for slot in draft.slots if isinstance(slot.name, str) and is_under(slot.name, element)]


def _grown(drafts: list[Draft], small: Shapes, last: str, further: list[str]) -> tuple[list[Draft], Shapes]:
    found: list[Draft] = []
    changed: dict[int, Draft] = {}
    for draft in drafts:
        own = _own(draft, last)
        if draft.parent is not None:
            draft = replace(draft, parent=changed.get(id(draft.parent), draft.parent))
        if own and len(own) == len(draft.slots):
            found.extend([draft, *(draft.renamed(last, element) for element in further)])
            continue
        new = [replace(slot, name=element + str(slot.name)[len(last) :]) for element in further for slot in own]
        larger = replace(draft, slots=(*draft.slots, *new))
        changed[id(draft)] = larger
        found.append(larger)
    more = {e + name[len(last) :]: shape for e in further for name, shape in small.items() if is_under(name, last)}
    return found, small | more
