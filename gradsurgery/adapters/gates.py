"""What routing does to single modules of an adapter: hooks of the surgery's engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurgery.adapters import graph
from gradsurgery.adapters.parts import Diagonal
from gradsurgery.adapters.rows import GainsFromRows, LinearFromRows, StopRows
from gradsurgery.transforms.engine.handlers import Handler
from gradsurgery.transforms.engine.rows import Rows
from gradsurgery.transforms.engine.run import Run

if TYPE_CHECKING:
    from gradsurgery.adapters.route import Decision, Route


class Gated(Handler):
    """Which rows is asked at run time; inside a compiled graph they are masks of all rows (`adapters.graph`)."""

    def __init__(self, route: Route, path: str) -> None:
        super().__init__(None, route.program(path))  # type: ignore[arg-type]
        self.route = route

    def begin(self, run: Run) -> None:
        self.route.decision(run)  # a graph finds it made

    def before(self, module: Any, call: Any, run: Run) -> Any:
        return self.enter(module, call, self._decision(run))

    def after(self, module: Any, output: Any, run: Run) -> Any:
        return self.act(module, output, self._decision(run))

    def _decision(self, run: Run) -> Decision:
        if torch.compiler.is_compiling():  # which run it is of would be a guard of the graph
            return self.route.gate["now"]
        return self.route.decision(run)

    def enter(self, module: Any, call: Any, decision: Decision) -> Any:
        return call

    def act(self, module: Any, output: Tensor, decision: Decision) -> Tensor:
        raise NotImplementedError


class Learn(Gated):
    """Weights of the kept part learn from the rows that are not flagged: the module runs on nothing, this instead."""

    def __init__(self, route: Route, path: str, module: Any) -> None:
        super().__init__(route, path)
        self.inputs: list[Tensor] = []

    def enter(self, module: Any, call: Any, decision: Decision) -> Any:
        (x, *rest), kwargs = call
        self.inputs.append(x)
        return (x.reshape(-1, x.shape[-1])[:0], *rest), kwargs

    def act(self, module: Any, output: Tensor, decision: Decision) -> Tensor:
        x = self.inputs.pop()
        lead = tuple(x.shape[:-1])
        gains = isinstance(module, Diagonal)
        weight: Any = module.gains() if gains else module.weight
        if torch.is_autocast_enabled(x.device.type):
            x, weight = x.to(output.dtype), weight.to(output.dtype)
        x_NI = x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            path = self.program.path
            if self.route.score is not None and decision.given is None:
                y = graph.learned_later(x_NI, weight, decision.ticket, path, lead)
            else:
                y = graph.learned(x_NI, weight, decision.taught(path, lead).reshape(-1).to(x.device))
            return y.reshape(*lead, y.shape[-1])

        def which() -> Rows | None:
            return None if decision.reading else decision.learning(self.program, lead, x.device)

        if not decision.scoring:
            which()  # labels that do not fit are an error before the backward
        step: Any = GainsFromRows if gains else LinearFromRows
        y = step.apply(x_NI, weight, which)
        return y.reshape(*lead, y.shape[-1])

    def reset(self, module: Any) -> None:
        self.inputs.clear()


class Stop(Gated):
    """Flagged rows send nothing back through the kept part: stopped where it is narrowest, at its bottleneck."""

    def enter(self, module: Any, call: Any, decision: Decision) -> Any:
        if decision.scoring:
            return call

        def stop(x: Tensor) -> Tensor:
            flagged = decision.flags(self.program, tuple(x.shape[:-1])).to(x.device)
            return StopRows.apply(x, flagged)  # type: ignore[no-any-return, no-untyped-call]

        if hasattr(module, "stop"):
            module.stop = stop
            return call
        (x, *rest), kwargs = call
        return (stop(x), *rest), kwargs

    def act(self, module: Any, output: Tensor, decision: Decision) -> Tensor:
        self.reset(module)
        return output

    def reset(self, module: Any) -> None:
        if hasattr(module, "stop"):
            module.stop = None


class Fill(Gated):
    """The quarantine runs on the rows that need it, and adds nothing to others; to none while scores are taken."""

    def __init__(self, route: Route, path: str) -> None:
        super().__init__(route, path)
        self.held: list[tuple[tuple[int, ...], Any]] = []

    def enter(self, module: Any, call: Any, decision: Decision) -> Any:
        (x, *rest), kwargs = call
        lead = tuple(x.shape[:-1])
        if torch.compiler.is_compiling():
            off = decision.off(self.program, lead).to(x.device).unsqueeze(-1)
            self.held.append((lead, off))
            return (x.masked_fill(off, 0.0), *rest), kwargs
        rows = decision.quarantined(self.program, lead, x.device)
        self.held.append((lead, rows))
        return (rows.take(x.reshape(-1, x.shape[-1])), *rest), kwargs

    def act(self, module: Any, output: Tensor, decision: Decision) -> Tensor:
        lead, rows = self.held.pop()
        if torch.compiler.is_compiling():
            return output.masked_fill(rows, 0.0)
        if not rows.all:
            index = rows.index
            if index is None:
                assert rows.span is not None
                index = torch.arange(*rows.span, device=output.device)
            output = output.new_zeros(rows.count, output.shape[-1]).index_copy_(0, index, output)
        return output.reshape(*lead, output.shape[-1])

    def reset(self, module: Any) -> None:
        self.held.clear()


class See(Gated):
    """Gradients by example are read off the kept part's coordinates."""

    def __init__(self, route: Route, path: str, layer: str, on_output: bool) -> None:
        super().__init__(route, path)
        self.layer, self.on_output = layer, on_output

    def enter(self, module: Any, call: Any, decision: Decision) -> Any:
        if not self.on_output and decision.probes is not None and self.watches(decision):
            probes = decision.probes
            module.probe = lambda h: probes(self.layer, h)
        return call

    def act(self, module: Any, output: Tensor, decision: Decision) -> Tensor:
        if not self.on_output:
            module.probe = None
            return output
        if decision.probes is None or not self.watches(decision):
            return output
        return output + decision.probes(self.layer, output)

    def watches(self, decision: Decision) -> bool:
        """In the forward that is scored, and where checkpointing computes it again: the graph must be the same."""
        return decision.scoring or self.route.mode == "route"

    def reset(self, module: Any) -> None:
        if not self.on_output:
            module.probe = None
