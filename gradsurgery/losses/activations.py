"""Losses over what a module inside the model returns, found by its name: a recorder that is also a reference.

refs={"activations": gs.losses.activations("model.layers.7")}                   what this pass's own forward returns
refs={"reference": gs.losses.activations("model.layers.7", of=snapshot(…))}     what the reference returns there
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import BatchError, PlanError, SelectionError
from gradsurgery.losses.positions import count_positions, is_encoder_decoder, mask_of
from gradsurgery.losses.references.base import Reference
from gradsurgery.losses.references.frozen import Frozen
from gradsurgery.tensors import is_tensor_parallel, returns_whole


class Recorded:
    """What a module returns in the forward that follows, with its graph; ``value`` is there after that forward."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.value: Tensor | None = None


class Activations(Reference):
    """The output of a module by name; made by `activations`."""

    def __init__(self, module: str, of: Reference | None = None) -> None:
        self.module, self.of = module, of
        self.columns = getattr(of, "columns", ())

    def take(self, model: nn.Module) -> None:
        """Check that the model has the module; the inner reference takes what it needs.

        Raises:
            SelectionError: no module of that name.
            PlanError: one that may return a part of its features on each rank of a tensor-parallel model.
        """
        module = module_of(model, self.module)
        if is_tensor_parallel(unwrap(model)) and not returns_whole(module):
            raise PlanError(
                f"activations({self.module!r}): each rank of a tensor-parallel model may have a part of them alone; "
                f"name a block, or a whole attention or MLP, which add up over ranks what they return."
            )
        if self.of is not None and hasattr(self.of, "take"):
            self.of.take(model)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Recorded | Tensor:
        """Evaluate the inner reference and return what the module returned, or record the forward to come.

        Raises:
            PlanError: the module runs inside of a compiled call, which sees no hook that comes later.
        """
        require_eager(model, self.module)
        if self.of is None:
            recorded = Recorded(self.module)
            handle = self._record(model, weakref.ref(recorded), with_graph=True)
            weakref.finalize(recorded, handle.remove)  # the pass drops its references, also on an exception
            return recorded
        recorded = Recorded(self.module)
        host = self.of.model if isinstance(self.of, Frozen) else model
        handle = self._record(host, weakref.ref(recorded), with_graph=False)
        try:
            self.of(model, inputs)
        finally:
            handle.remove()
        return value_of(recorded, self.module).detach()

    def state_dict(self) -> dict[str, Tensor]:
        return self.of.state_dict() if self.of is not None else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.of is not None:
            self.of.load_state_dict(state)

    def describe(self) -> str:
        return f"activations({self.module!r}{f', of={self.of.describe()}' if self.of is not None else ''})"

    def _record(self, model: nn.Module, recorded: weakref.ref[Recorded], with_graph: bool) -> Any:
        def hook(module: nn.Module, args: object, output: Any) -> None:
            kept = recorded()
            # references run without a graph, on this module too; recomputed forwards come when nobody listens
            if kept is not None and kept.value is None and torch.is_grad_enabled() == with_graph:
                kept.value = first_tensor(output)

        return module_of(model, self.module).register_forward_hook(hook)


def activations(module: str, of: Reference | None = None) -> Activations:
    """What a module returns, for losses over activations: ``refs`` of a pass.

    Args:
        module: Name as in ``model.named_modules()``, e.g. a block, ``"model.layers.7"``. Of a tuple its first tensor
            counts; of several calls in one forward the first.
        of: ``gs.losses.snapshot(region)``, ``frozen(model)`` or ``adapters_off()``, whose activations are wanted;
            ``None``: those of the pass's own forward, with their graph.

    Raises:
        SelectionError: (when a surgery is attached) no module of that name.
        BatchError: (when it is used) the module was not called, or returns no tensor.
        PlanError: (when it is used) the module is compiled, or a part of what is.

    Example:
        >>> here, before = gs.losses.activations("model.layers.0"), gs.losses.snapshot(anatomy.neurons[:1, :16])
        >>> refs = {"activations": here, "reference": gs.losses.activations("model.layers.0", of=before)}
        >>> surgery = gs.attach(gs.Method([gs.Pass("hold", gs.losses.activation_mse, refs=refs)]), model)
        >>> surgery.backward(batch)["hold"].item()                     # nothing has moved yet
        0.0
        >>> surgery.remove()
    """
    return Activations(module, of)


@dataclass(frozen=True)
class ActivationLoss:
    """Mean squared distance of recorded activations from a target; mean over the positions with ``attention_mask``.

    Args:
        target: ``target(activations, refs) -> Tensor`` that broadcasts to them.
        name: How plans call the loss.
        activations: Name of the recorder in ``refs``.
    """

    target: Callable[[Tensor, Mapping[str, Any]], Tensor]
    name: str
    activations: str = "activations"

    @property
    def __name__(self) -> str:
        return self.name

    def count(self, batch: Mapping[str, Any], model: nn.Module | None = None) -> int | Tensor:
        """Positions that the loss is a mean over."""
        return count_positions(batch, None, model)

    def __call__(self, outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
        if self.activations not in refs:
            raise BatchError(
                f"{self.name} needs refs={{{self.activations!r}: gs.losses.activations(module)}}; given are "
                f"{', '.join(refs) or 'none'}."
            )
        found = value_of(refs[self.activations], self.activations)
        found = found if found.dtype == torch.float64 else found.float()
        target = self.target(found, refs).detach().to(found)
        if target.dim() > 1 and target.shape != found.shape:
            raise BatchError(f"{self.name}: activations {list(found.shape)}, the target {list(target.shape)}.")
        distance = (found - target).square().mean(-1)
        mask = mask_of(batch, None, is_encoder_decoder(batch, outputs=outputs))
        if mask is None:
            return distance.mean() + _reaching_all(outputs, distance)
        if mask.shape != distance.shape:
            raise BatchError(
                f"{self.name}: activations at positions {list(distance.shape)}, attention_mask {list(mask.shape)}."
            )
        mask = mask.to(distance.device)
        mean = distance.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
        return mean + _reaching_all(outputs, distance)


def _reaching_all(outputs: Any, distance: Tensor) -> Tensor:
    """Zero, with a graph to every parameter where there are ranks: DDP waits for all that the outputs depend on."""
    logits = getattr(outputs, "logits", None)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1 or not isinstance(logits, Tensor):
        return distance.new_zeros(())
    return logits[:0].sum().to(distance)  # of nothing, since 0 * inf is nan


def _reference(found: Tensor, refs: Mapping[str, Any]) -> Tensor:
    if "reference" not in refs:
        raise BatchError("activation_mse needs refs={'reference': gs.losses.activations(module, of=…)}.")
    return value_of(refs["reference"], "reference")


activation_mse = ActivationLoss(_reference, "activation_mse")
"""Mean squared error between ``refs["activations"]`` and ``refs["reference"]``."""


def value_of(given: Any, name: str) -> Tensor:
    """Activations, recorded or given.

    Raises:
        BatchError: the module was not called, or what is given are no activations.
    """
    value = given.value if isinstance(given, Recorded) else given
    if isinstance(value, Tensor):
        return value
    if isinstance(given, Recorded):
        raise BatchError(
            f"{given.module} was not called with a graph in this forward, so that nothing was recorded; reentrant "
            f"checkpointing hides it: use use_reentrant=False."
        )
    raise BatchError(f"{name} takes activations, gs.losses.activations(module), not {type(given).__name__}.")


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first tensor of what it returns."""
    parts = output if isinstance(output, tuple | list) else getattr(output, "to_tuple", lambda: (output,))()
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise BatchError(f"a recorded module returned {type(output).__name__} without a tensor.")


def require_eager(model: nn.Module, name: str) -> None:
    """Raise a `PlanError` where the module is called by compiled code: the model, a wrapper or a module around it."""
    base, around = unwrap(model), [model]
    while around[-1] is not base:
        inner = getattr(around[-1], "_orig_mod", None)
        around.append(inner if isinstance(inner, nn.Module) else around[-1].module)  # type: ignore[arg-type]
    modules, parts = dict(base.named_modules()), name.split(".")
    around += [modules[path] for k in range(1, len(parts) + 1) if (path := ".".join(parts[:k])) in modules]
    if any("_orig_mod" in m._modules or getattr(m, "_compiled_call_impl", None) is not None for m in around):
        raise PlanError(
            f"activations({name!r}): {type(base).__name__} calls it inside of compiled code, where it cannot be "
            f"recorded; leave the model, or the blocks up to this one, uncompiled."
        )


def module_of(model: nn.Module, name: str) -> nn.Module:
    """A module by its name.

    Raises:
        SelectionError: there is none; the message has the nearest names.
    """
    modules = dict(unwrap(model).named_modules())
    if name not in modules or not name:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        raise SelectionError(
            f"{type(unwrap(model)).__name__} has no module {name!r}; near names: {', '.join(near) or 'none'}."
        )
    return modules[name]
