"""Routing of rows through an adapter with a quarantine, as a transform of one pass.

``route``: flagged rows train the quarantine alone, through a forward that is the same for all. ``absorb``: the
quarantine takes part for flagged rows alone, beside a kept part that is detached there (gradient routing: Cloud et al.
2024, arXiv 2410.04332; absorption in low-rank blocks: wassname, vGROUT).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gradsurgery.adapters.gates import Fill, Learn, See, Stop
from gradsurgery.adapters.graph import ticket
from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.probe import Probes
from gradsurgery.adapters.score import Score
from gradsurgery.anatomy.region import Region
from gradsurgery.errors import BatchError, PlanError
from gradsurgery.transforms.base import Effect, ForwardTransform, Traits, describe_where, require_where
from gradsurgery.transforms.engine.flags import expand_flags
from gradsurgery.transforms.engine.handlers import Handler
from gradsurgery.transforms.engine.program import Program
from gradsurgery.transforms.engine.rows import Rows, rows_of
from gradsurgery.transforms.engine.run import Run

Mode = Literal["route", "absorb"]


@dataclass(frozen=True, eq=False)
class Route(ForwardTransform):
    """Which rows teach which part of an adapter; made by `gs.methods.quarantine`, whose passes run it.

    Args:
        adapter: The adapter.
        mode: ``"route"`` or ``"absorb"``.
        where: Label column (or bool tensor) of the flagged rows; with a score those that it may (``None``: all).
        clean: ``"absorb"``: column of the rows for which the quarantine is off, by default all that are not flagged.
        score: Flags rows by their gradients.

    Raises:
        PlanError: an unknown mode, no gate at all, or ``clean`` where it means nothing.
        ArtefactError: the score's direction is of another adapter.
    """

    adapter: Handle
    mode: Mode
    where: str | Tensor | None = "flag"
    clean: str | None = None
    score: Score | None = None
    gate: dict[str, Decision] = field(default_factory=dict, repr=False)
    traits = Traits(linear=True, per_example=True, value_preserving=False)

    def __post_init__(self) -> None:
        if self.mode not in ("route", "absorb"):
            raise PlanError(f'quarantine: mode is "route", "absorb" or "erase", not {self.mode!r}.')
        require_where(self.where, "quarantine")
        if isinstance(self.where, Mapping):
            raise PlanError(
                "quarantine: where is one column or tensor; adapters do not tell encoder from decoder rows."
            )
        if self.where is None and self.score is None:
            raise PlanError("quarantine: nothing flags rows; give where=…, a label column, or score=….")
        if self.clean is not None and (self.mode != "absorb" or not isinstance(self.clean, str)):
            raise PlanError('quarantine: clean is the name of a column, for mode="absorb".')
        if self.score is not None:
            if not isinstance(self.score, Score):
                raise PlanError(f"quarantine: score is a gs.adapters.Score, not {type(self.score).__name__}.")
            check_direction(self.adapter, self.score)

    def effects(self) -> list[Effect]:
        raise PlanError(
            "a quarantine's routing runs in the passes of gs.methods.quarantine(…) alone; inside other passes and "
            "gs.applied use gs.mask(adapter.kept, where=…)."
        )

    def regions(self) -> Iterable[Region]:
        return (self.adapter.kept, self.adapter.quarantine)

    def describe(self) -> str:
        facts = [f"{self.mode}(kept, quarantine{describe_where(self.where)}"]
        facts += [f"clean={self.clean!r}"] if self.clean else []
        facts += [f"score={self.score.describe()}"] if self.score else []
        return ", ".join(facts) + ")"

    def program(self, path: str) -> Program:
        """What a module at ``path`` needs to know of labels."""
        return Program(path, () if self.where is None else (self.where,), {}, {})

    def handlers(self) -> dict[str, list[Handler]]:
        """What acts on the modules of the adapter's host, by path."""
        roles, found = self.adapter.roles, {}  # type: tuple[Any, dict[str, list[Handler]]]
        if self.mode == "absorb":
            for path in roles.kept_branches:
                found.setdefault(path, []).append(Stop(self, path))
            for path in roles.quarantine_branches:
                found.setdefault(path, []).append(Fill(self, path))
        if self.score is not None:
            modules = dict(self.adapter.host.named_modules())
            for path, layer in roles.probed.items():
                found.setdefault(path, []).append(See(self, path, layer, self.adapter.probe_output(modules[path])))
        for path, module in roles.kept.items():
            found.setdefault(path, []).append(Learn(self, path, module))
        return found

    def decision(self, run: Run) -> Decision:
        """The gates of the running pass; a new one where another pass runs than before."""
        if (held := self.gate.get("now")) is None or held.run is not run:
            held = self.gate["now"] = Decision(self, run)
        return held


class Decision:
    """The gates of one forward and its backward.

    Attributes:
        scored: Flags by score, ``[batch]`` or ``[batch, token]``; ``None`` until `decide` has run.
        cosines: What they were made of, of the same shape.
        scoring: Whether the forward under way is there for the score.
        reading: Whether the backward under way is.
        given: The flags and the clean rows, where they are known by themselves.
        told: What metrics say of the flags, where ``given`` no longer holds them all.
        ticket: What a compiled graph asks by.
    """

    def __init__(self, route: Route, run: Run, given: tuple[Tensor, Tensor] | None = None) -> None:
        self.route, self.run, self.given = route, run, given
        self.scored: Tensor | None = None
        self.cosines: Tensor | None = None
        self.told: Tensor | None = None
        self.scoring = route.score is not None and given is None
        self.reading = False
        self.probes: Probes | None = None
        if self.scoring and route.score is not None:
            self.probes = Probes(route.score.grain, run.shape)
            self.probes.prepare(route.adapter.leaves())
        self.ticket = ticket(self)
        self._rows: dict[tuple[str, tuple[int, ...], torch.device], Rows] = {}

    def flags(self, program: Program, lead: tuple[int, ...]) -> Tensor:
        """The flagged rows of a module's input, bool ``lead``."""
        if self.given is not None:
            return expand_flags(self.given[0], lead, program.path)
        label = None
        if self.route.where is not None:
            label = expand_flags(self.run.all_flags(program, lead)[0], lead, program.path, self.run.shape)
        if self.route.score is None:
            assert label is not None
            return label
        if self.scored is None:
            raise PlanError(
                "the rows of this pass were never scored: call surgery.backward, or in a loop of your own "
                "gs.adapters.decide(surgery, loss) before loss.backward()."
            )
        scored = expand_flags(self.scored, lead, program.path, self.probes.shape if self.probes else None)
        return scored if label is None else label.to(scored.device) & scored

    def clean(self, program: Program, lead: tuple[int, ...]) -> Tensor:
        """The rows for which the quarantine is off."""
        if self.given is not None:
            return expand_flags(self.given[1], lead, program.path)
        if self.route.clean is None:
            return ~self.flags(program, lead)
        return expand_flags(self.run.flags(self.route.clean, program.path, lead), lead, program.path, self.run.shape)

    def gates(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Flagged and clean rows ``[batch, token]``."""
        program = self.route.program("the batch")
        return self.flags(program, lead), self.clean(program, lead)

    def taught(self, path: str, lead: tuple[int, ...]) -> Tensor:
        """The rows that teach the kept part, bool ``lead``; none in a backward that is there for the score."""
        if self.reading:
            return torch.zeros(lead, dtype=torch.bool)
        return ~self.flags(self.route.program(path), lead)

    def off(self, program: Program, lead: tuple[int, ...]) -> Tensor:
        """The rows that the quarantine adds nothing to, bool ``lead``: all while scores are taken."""
        return torch.ones(lead, dtype=torch.bool) if self.scoring else self.clean(program, lead)

    def learning(self, program: Program, lead: tuple[int, ...], device: torch.device) -> Rows:
        """The rows that teach the kept part; one synchronisation a pass."""
        key = ("learning", lead, device)
        if key not in self._rows:
            self._rows[key] = rows_of(~self.flags(program, lead).reshape(-1).cpu(), device)
        return self._rows[key]

    def quarantined(self, program: Program, lead: tuple[int, ...], device: torch.device) -> Rows:
        """The rows that the quarantine takes part in; none while scores are taken."""
        if self.scoring:
            return Rows(math.prod(lead), (0, 0))
        key = ("quarantined", lead, device)
        if key not in self._rows:
            self._rows[key] = rows_of(~self.clean(program, lead).reshape(-1).cpu(), device)
        return self._rows[key]

    def decide(self, loss: Tensor, batch: Mapping[str, Any], keep_graph: bool) -> None:
        """Read the gradients by example off a loss, and flag rows by them."""
        score = self.route.score
        assert score is not None and self.probes is not None
        if not loss.requires_grad:
            raise BatchError("the loss has no graph, so there is nothing to score; run the forward with gradients.")
        self.reading = True
        try:
            features = self.probes.gradients(loss, list(score.direction.axes), keep_graph)
        finally:
            self.reading = False
        flags, cosines, figures = score.judge(features, batch)
        assert self.probes.shape is not None
        shape = self.probes.shape if score.grain == "token" else flags.shape
        self.scored, self.cosines = flags.reshape(shape), cosines.reshape(shape)
        self.scoring = False
        self.probes.leaves.clear()
        own = self.route.adapter.figures
        own.clear()
        own.update({f"quarantine/{name}": value for name, value in figures.items()})
        own["quarantine/flagged"] = float(flags.float().mean())


def check_direction(adapter: Handle, score: Score) -> None:
    """Raise an ``ArtefactError`` unless the score's direction speaks of the adapter's coordinates."""
    direction = score.direction
    adapter.require_direction(direction.fingerprint, direction.coordinates, "quarantine: the score's direction")
