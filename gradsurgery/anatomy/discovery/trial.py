"""The tests that a declaration must pass: coupling proves what belongs to a unit, a user's word does not.

Besides the swap test, a declared unit must be complete (nothing outside it acts through its consumers alone), its
consumers must read what its producers have made, and its kind must be the right one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from gradsurgery.errors import AnatomyError

from .draft import Draft, Slot
from .influence import Influence
from .moves import permute_, restored
from .replica import learned
from .verify import Forward, Judge, consumers, disjoint
from .wide import Wide


class Trial:
    """Tests of declared drafts on one replica.

    Args:
        model: The replica, or a tiny twin.
        forward: Its outputs for fixed inputs.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self.tensors = {name: tensor for name, tensor, _ in learned(model)}
        self.influence = Influence(forward, self.tensors)

        def under(scatter: bool) -> Forward:
            def run() -> list[Tensor]:
                with Wide(scatter):
                    return forward()

            return run

        self.judge, self.routed = Judge(under(True), self.tensors), Judge(under(False), self.tensors)

    def verified(self, drafts: list[Draft]) -> list[Draft]:
        """The drafts with their exchange classes, closed or not; a KV group stands before its heads.

        Raises:
            AnatomyError: A draft fails.
        """
        drafts = [replace(d, classes=d.parent_units or (0,) * d.count) for d in drafts]
        for draft in drafts:
            self._require_form(draft)
            self._require_roles(draft)
        plain = [d for d in drafts if d.kind != "expert"]  # where an expert is zero its router still draws tokens
        passed = dict(zip(plain, self.judge.exchange(plain), strict=True))
        passed |= {d: self.routed.exchange([d])[0] for d in drafts if d.kind == "expert"}
        closed = dict(zip(plain, self.judge.closed(plain), strict=True))
        for draft in plain:
            if not passed[draft] and not closed[draft]:
                self._refuse_swap(draft)
        self._require_complete(drafts)
        out: list[Draft] = []
        for draft in drafts:
            parent = out[-1] if draft.parent is not None else None
            classes = draft.classes if passed[draft] else self._classes(draft)
            out.append(replace(draft, classes=classes, closed=closed.get(draft, False), parent=parent))
        return out

    def _judge(self, draft: Draft) -> Judge:
        return self.routed if draft.kind == "expert" else self.judge

    def _classes(self, draft: Draft) -> tuple[int, ...]:
        """Heads may depend on their position, each for itself; other units must be interchangeable with some."""
        classes = self._judge(draft).classes(draft)
        if draft.kind not in ("head", "kv_group") and len(set(classes)) == draft.count:
            self._refuse_swap(draft)
        return classes

    def _require_form(self, draft: Draft) -> None:
        lines = {slot: math.prod(rows.shape[1] for rows in slot.index.values()) for slot in draft.slots}
        if not disjoint(draft):
            _refuse(draft, "units overlap, two of them claim one entry")
        if draft.kind not in ("head", "kv_group") and draft.count > 1 and (width := min(lines.values())) > 1:
            _refuse(draft, f"every unit has {width} lines or more in each tensor; {draft.kind}s have one somewhere")
        single = [lines[s] == 1 and isinstance(s.name, str) and self.tensors[s.name].ndim < 3 for s in consumers(draft)]
        if draft.kind in ("head", "expert") and all(single):
            _refuse(draft, f"every unit is one column of its consumers; {draft.kind}s have several, neurons one")

    def _require_roles(self, draft: Draft) -> None:
        order = sorted(draft.slots, key=lambda s: self.influence.first.get(_name(s), -1))
        if draft.kind != "expert" and order[-1].role != "consumer":  # experts may have output biases of their own
            _refuse(draft, f"the forward uses {_name(order[-1])} after all consumers, so it cannot make what they read")
        if order[0].role == "consumer":
            _refuse(draft, f"the forward uses its consumer {_name(order[0])} before anything that it could read")
        if not self.judge.heard(draft):
            _refuse(draft, f"the output does not hear its consumers {', '.join(map(_name, consumers(draft)))}")
        if len(consumers(draft)) > 1:
            for slot in consumers(draft):
                if self.influence.silenced(draft, slot):
                    _refuse(draft, f"{_name(slot)} acts through the other consumers only, so it is a producer")

    def _require_complete(self, drafts: list[Draft]) -> None:
        """Nothing undeclared may act through one unit alone: all groups at once, then one by one."""
        many = [d for d in drafts if d.count > 1]
        if not many or not self.influence.lost(many):
            return
        for draft in many:
            for name, mask in self.influence.lost([draft]).items():
                if self.influence.hidden(draft, name, mask):
                    unit, shape = int(self.influence.loudest(draft)), list(mask.shape)
                    _refuse(
                        draft,
                        f"{int(mask.sum())} entries of {name} {shape} act through unit {unit} alone, and no pattern "
                        "gives them to it",
                    )

    def _refuse_swap(self, draft: Draft) -> NoReturn:
        judge = self._judge(draft)
        with torch.no_grad(), restored(self.tensors, draft.slots):
            permute_(self.tensors, draft.slots, judge.shuffle(draft))
            change = judge.difference(judge.forward())
        _refuse(
            draft,
            f"permuting the units changes the output by {change:.1e} of its size, and zero consumers do not hide them. "
            "Check the order of the axes, their sizes, and whether a tensor is missing",
        )


def _refuse(draft: Draft, why: str) -> NoReturn:
    raise AnatomyError(f"layouts: the {draft.count} {draft.kind}s declared for {draft.block or 'the model'}: {why}.")


def _name(slot: Slot) -> str:
    return slot.name if isinstance(slot.name, str) else slot.name[0]
