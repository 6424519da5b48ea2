"""Module hooks, installed once and switched by state: the model's class, names and parameters stay untouched."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.transforms.engine.handlers import SwapHandler
from gradsurgery.transforms.engine.plan import ForwardPlan
from gradsurgery.transforms.engine.run import Run


def is_compiled(model: nn.Module) -> bool:
    """Whether calls of the model, or of a part of it, go through ``torch.compile`` (calls are not counted there)."""
    inside = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return inside or any(hasattr(module, "_orig_mod") for module in model.modules())


#: the board whose plan acts on a module right now; two at once would hand each other empty slices
_acting: weakref.WeakKeyDictionary[nn.Module, Switchboard] = weakref.WeakKeyDictionary()


class Switchboard:
    """The hooks of some plans on one model, and which plan is on.

    Args:
        model: The model, possibly wrapped by DDP or ``torch.compile``.
        plans: Every plan that will ever be switched on: hooks added after a compiled call would be ignored.
    """

    def __init__(self, model: nn.Module, plans: Iterable[ForwardPlan]) -> None:
        base, plans = unwrap(model), list(plans)
        self.plan: ForwardPlan | None = None
        self.run: Run = Run()
        self.called: set[str] = set()
        self._handles: list[RemovableHandle] = []
        modules = dict(base.named_modules())
        self._modules = {path: modules[path] for plan in plans for path in plan.handlers}
        for path, module in self._modules.items():
            hook = _Hook(self, path)
            self._handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            # first of the forward hooks: FSDP2's own hook takes the gathered weight away; always called where
            # parameters are swapped, since recomputations of gradient checkpointing leave a forward by an exception
            swaps = any(isinstance(handler, SwapHandler) for plan in plans for handler in plan.handlers.get(path, ()))
            self._handles.append(module.register_forward_hook(hook.after, prepend=True, always_call=swaps))
        if self._modules and is_compiled(model):
            torch.compiler.reset()  # graphs of earlier calls know nothing of hooks, and nothing guards them

    @contextmanager
    def on(self, plan: ForwardPlan, run: Run) -> Iterator[None]:
        """Switch a plan on for the forwards (and recomputed forwards) inside the block.

        Raises:
            PlanError: transforms of another ``gs.applied`` or surgery act on one of its modules at this moment.
        """
        held = {path: _acting.get(self._modules[path]) for path in plan.handlers}
        for path, other in held.items():
            if other is not None and other is not self:
                raise PlanError(
                    f"other transforms act on {path or 'the model'} already (a gs.applied block or a surgery around "
                    f"this one). Give all of them to one gs.applied or one gs.Pass."
                )
        before = self.plan, self.run, self.called
        self.plan, self.run, self.called = plan, run, set()
        run.tokens_first = plan.tokens_first
        for path in plan.handlers:
            _acting[self._modules[path]] = self
        try:
            for handlers in plan.handlers.values():
                for handler in handlers:
                    handler.begin(run)
            yield
        finally:
            for path, handlers in plan.handlers.items():
                for handler in handlers:
                    handler.reset(self._modules[path])
                if held[path] is None:
                    _acting.pop(self._modules[path], None)
            self.plan, self.run, self.called = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Forwards inside the block run plain, also within a block that switched a plan on."""
        before, self.plan = self.plan, None
        try:
            yield
        finally:
            self.plan = before

    def check_called(self, host: nn.Module) -> None:
        """Raise if a module of the plan that is on was never called: its parent reads its weight some other way.

        ``host`` is what was called; calls inside ``torch.compile`` are not counted.
        """
        if self.plan is None or self.called.issuperset(self.plan.handlers) or is_compiled(host):
            return
        if not self.called:
            raise PlanError(
                f"no forward of the model ran under these transforms (or none that calls "
                f"{next(iter(self.plan.handlers))}), so they did nothing."
            )
        for path in self.plan.handlers:
            parent = path.rsplit(".", 1)[0]
            conditional = ".experts." in path  # experts of a module list that no token chose
            if path not in self.called and not conditional and not self._tied_to_called(path):
                name = type(self._modules[path]).__name__
                raise PlanError(
                    f"{path} ({name}) was not called in this forward, so its hooks did nothing: "
                    f"{parent or 'the model'} reads its weight by other means. Leave it out of the "
                    f"region with gs.region(…, exclude={path!r})."
                )

    def _tied_to_called(self, path: str) -> bool:
        """Whether called modules hold all its parameters: T5's ``shared`` is read as ``encoder.embed_tokens``."""
        read = {id(p) for called in self.called for p in self._modules[called].parameters(recurse=False)}
        return all(id(p) in read for p in self._modules[path].parameters(recurse=False))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Hook:
    def __init__(self, board: Switchboard, path: str) -> None:
        self.board, self.path = board, path

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self.board.plan
        if plan is None or self.path not in plan.handlers:
            return None
        if not torch.compiler.is_compiling():
            self.board.called.add(self.path)
        call = (args, kwargs)
        for handler in plan.handlers[self.path]:
            call = handler.before(module, call, self.board.run)
        return call

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        plan = self.board.plan
        if plan is None or self.path not in plan.handlers:
            return None
        for handler in reversed(plan.handlers[self.path]):
            output = handler.after(module, output, self.board.run)
        return output
