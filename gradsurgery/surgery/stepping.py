"""The gradient and update stages around an optimizer's step, by its own step hooks.

Order before the step: gradient transforms, frozen entries out of the gradient, clip, snapshots. Gradient transforms
know which entries are frozen in this step (``context.frozen``): a sum over entries that do not move is wrong for those
that do.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError
from gradsurgery.keys.step import StepUnder
from gradsurgery.surgery.method import Method
from gradsurgery.surgery.slots import Probe, Slots
from gradsurgery.tensors import gather, lay_out_gradients_, reshard, sum_over_shards
from gradsurgery.transforms.clip import Clip
from gradsurgery.transforms.engine.program import box_columns
from gradsurgery.transforms.freeze import Freeze
from gradsurgery.transforms.stages import StepContext, UpdateTransform


class Stepper:
    """Runs a method's gradient and update stages once per optimizer step.

    Args:
        method: Supplies both stages.
        model: The unwrapped model; parameters are looked up by name in each step, since sharding replaces them.
    """

    def __init__(self, method: Method, model: nn.Module) -> None:
        self.method, self.model = method, model
        space = ParameterSpace.of(model)
        self.states = [t.init(space) for t in method.gradient] + [t.init(space) for t in method.update]
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self.ran: set[str] = set()
        self.finished = False
        self.optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self.tracked: dict[str, Region] = {}
        self.enabled = True
        self.probe: Probe | None = None
        self.skipped = False
        self._held: dict[tuple[Freeze, ...], Region | None] = {}
        self._handles: list[RemovableHandle] = []
        self._restore: Callable[[], None] | None = None
        if method.gradient or method.update or any(p.when is not None for p in method.passes):
            refuse = weakref.WeakMethod(self._refuse_others)  # this hook is global: it must keep no model alive
            handle = register_optimizer_step_pre_hook(lambda o, *_: call(o) if (call := refuse()) else None)
            weakref.finalize(self, handle.remove).atexit = False
            self._handles.append(handle)
        self._context: StepContext | None = None
        self._entered: list[tuple[UpdateTransform, dict[str, Any]]] = []

    def bind(self, optimizer: Any, slots: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hook the step of an optimizer (wrappers that hold one as ``.optimizer`` are seen through)."""
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            inner = getattr(optimizer, "optimizer", None)
            if inner is None:
                raise PlanError(f"bind takes a torch optimizer, not {type(optimizer).__name__}.")
            optimizer = inner
        bound = self.optimizer() if self.optimizer is not None else None
        if bound is optimizer:
            return
        if bound is not None:
            raise PlanError("this surgery is bound to another optimizer; remove() it and attach again to change that.")
        if not self._holds(optimizer):
            raise PlanError("the optimizer holds no parameter of this model; build it after sharding, then bind it.")
        self.optimizer = weakref.ref(optimizer)
        self._handles += [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self.before_step(slots, args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self.after_step(slots)),
        ]
        self._restore = watch_zero_grad(optimizer, lambda: self.new_window(slots))
        for transform in self.method.update:
            transform.bound(optimizer)

    @property
    def bound(self) -> bool:
        return self.optimizer is not None and self.optimizer() is not None

    def _holds(self, optimizer: torch.optim.Optimizer) -> bool:
        mine = {id(p) for p in self.model.parameters()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def _refuse_others(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A step of this model's weights by an optimizer that was never bound would skip both stages silently."""
        bound = self.optimizer() if self.optimizer is not None else None
        if not self.enabled or bound is optimizer or not self._holds(optimizer):
            return
        scheduled = [f"schedule {p.when!r} of pass {p.name!r}" for p in self.method.passes if p.when is not None]
        names = ", ".join([*(t.describe() for t in (*self.method.gradient, *self.method.update)), *scheduled])
        if bound is None:
            raise PlanError(f"{names} act at the optimizer's step, and no optimizer is bound: surgery.bind(optimizer).")
        raise PlanError(
            f"{names} act at the step of the {type(bound).__name__} that is bound, and another optimizer "
            f"({type(optimizer).__name__}) steps this model as well; give all parameters to one optimizer, in groups."
        )

    def context(self, slots: Mapping[str, Mapping[str, Tensor]]) -> StepContext:
        optimizer = self.optimizer() if self.optimizer is not None else None
        ran = frozenset(self.ran)
        return StepContext.of(
            self.model,
            optimizer=optimizer,
            slots=slots,
            ran=ran,
            step=self.step,
            metrics=self.metrics,
            frozen=self._frozen(ran),
        )

    def _frozen(self, ran: frozenset[str]) -> Region | None:
        """What `gs.freeze` holds in a step in which these passes ran; the same object for the same set of them."""
        awake = tuple(t for t in self.method.update if isinstance(t, Freeze) and t.awake(ran))
        if awake not in self._held:
            regions = [t.region for t in awake]
            self._held[awake] = functools.reduce(operator.or_, regions) if regions else None
        return self._held[awake]

    def finish(self, slots: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The gradient stage, once per step."""
        if self.finished:
            return
        self.metrics.clear()  # what this step does not measure again is of another one
        if not self.enabled:
            return
        self.finished = True
        lay_out_gradients_(self.model.parameters())
        probe, self.probe = self.probe, None
        if probe is not None and isinstance(slots, Slots) and (factor := probe.factor()) != 1.0:
            slots.follow(factor)
        for name, region in self.tracked.items():
            self.metrics[f"grad_norm/{name}"] = region_norm(self.model, region)
        context = self.context(slots)
        gradient = list(zip(self.method.gradient, self.states, strict=False))
        for transform, state in gradient:
            if not isinstance(transform, Clip):
                transform.apply(context, state)
        for update, state in self._updates:
            update.prepare(context, state)
        for transform, state in gradient:
            if isinstance(transform, Clip):
                transform.apply(context, state)

    def before_step(
        self,
        slots: Mapping[str, Mapping[str, Tensor]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        closure = (kwargs or {}).get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is not None and self.enabled and (self.method.gradient or self.method.update):
            raise PlanError(
                "optimizer.step(closure) makes its gradients after both stages ran; call backward, then step()."
            )
        self.abandon()
        reshard(self.model)
        optimizer = self.optimizer() if self.optimizer is not None else None
        self.skipped = self.enabled and optimizer is not None and will_skip(optimizer)
        enabled, self.enabled = self.enabled, self.enabled and not self.skipped
        try:
            self._enter(slots)
        finally:
            self.enabled = enabled

    def _enter(self, slots: Mapping[str, Mapping[str, Tensor]]) -> None:
        optimizer = self.optimizer() if self.optimizer is not None else None
        if (
            optimizer is not None
            and self.enabled
            and not self.finished
            and (self.method.gradient or self.method.update)
        ):
            unscale(optimizer)
        self.finish(slots)
        self._context = self.context(slots)
        for transform, state in sorted(self._updates, key=lambda pair: -pair[0].outer):
            if not self.enabled and not isinstance(transform, StepUnder):  # moments lie where the key takes them
                transform.skip(state)
                continue
            try:
                transform.before_step(self._context, state)
            except BaseException:
                self.abandon()
                raise
            self._entered.append((transform, state))

    def after_step(self, slots: Any) -> None:
        self.abandon()
        self.step += not self.skipped
        self.new_window(slots)

    def abandon(self) -> None:
        """Leave the update stage, after a step or one that raised; who came last leaves first."""
        context, self._context = self._context, None
        while self._entered:
            transform, state = self._entered.pop()
            assert context is not None
            transform.after_step(context, state)

    @property
    def _updates(self) -> list[tuple[UpdateTransform, dict[str, Any]]]:
        return list(zip(self.method.update, self.states[len(self.method.gradient) :], strict=True))

    def new_window(self, slots: Any) -> None:
        """Forget the gradients of the step before."""
        self.finished, self.probe = False, None
        self.ran.clear()
        slots.next_window(self.step)

    def remove(self) -> None:
        try:
            self.abandon()
            for transform, state in self._updates:
                if isinstance(transform, StepUnder):
                    transform.close(self.context({}), state)
        finally:
            for handle in self._handles:
                handle.remove()
            if self._restore is not None:
                self._restore()
            self._handles, self.optimizer, self._restore = [], None, None


def will_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scaler has told a fused optimizer to leave everything as it is: its gradients hold inf or nan."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def unscale(optimizer: torch.optim.Optimizer) -> None:
    """Take a scaler's scale out of the gradients now: a fused optimizer would do it in its step, after both stages."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(scale.double().reciprocal().to(parameter.grad.device, torch.float32))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def watch_zero_grad(optimizer: torch.optim.Optimizer, then: Callable[[], None]) -> Callable[[], None]:
    """Call ``then`` after each ``zero_grad`` of this one optimizer (torch has no hook there); returns the way back."""
    plain, own, held = type(optimizer).zero_grad, optimizer.__dict__.get("zero_grad"), weakref.ref(optimizer)
    watching = True

    @functools.wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> None:
        if own is not None:
            own(*args, **kwargs)
        elif (mine := held()) is not None:
            plain(mine, *args, **kwargs)
        if watching:
            then()

    def restore() -> None:
        nonlocal watching
        watching = False
        mine = held()
        if mine is None or mine.__dict__.get("zero_grad") is not watched:
            return  # somebody wrapped it again; ours only passes on from now
        del mine.__dict__["zero_grad"]
        if own is not None:
            mine.__dict__["zero_grad"] = own

    optimizer.__dict__["zero_grad"] = watched
    return restore


def region_norm(model: nn.Module, region: Region) -> Tensor:
    """L2 norm of the gradient of a region, fp32."""
    total = torch.zeros(())
    for name, parameter in model.named_parameters():
        entries = region.entries.get(name)
        if entries is None or parameter.grad is None:
            continue
        boxes = [box_columns(box, entries.shape) for box in entries.boxes()]
        squares = sum((part.float().square().sum() for part in gather(parameter.grad, boxes)), torch.zeros(()))
        total = total + sum_over_shards(squares.to(parameter.grad.device), parameter.grad).to(total.device)
    return total.sqrt()
