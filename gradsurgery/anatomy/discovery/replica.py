"""A private, randomised float64 copy of a model, on which discovery may do what it likes.

Default initialisation (zero biases, unit norms, weights of size 0.02) lets wrong swaps pass, so every weight is moved.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.adapters import activate_adapters
from gradsurgery.errors import AnatomyError

from .build import same_again
from .plain import is_plain, plain_copy
from .tables import fill_tables

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def replica(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy of ``model`` on the CPU: float64, eval mode, no hooks, eager kernels, every weight randomised.

    Sharded weights are gathered and packed ones unpacked; a model on ``meta`` is built anew from its config.

    Raises:
        AnatomyError: The model cannot be copied or built.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return prepare(same_again(model), seed)
    memo = {id(t): t.detach().clone() for m in model.modules() for t in vars(m).values() if _is_computed(t)}
    try:
        twin = copy.deepcopy(model, memo) if is_plain(model) else plain_copy(model)
    except RuntimeError as error:
        raise AnatomyError(
            f"{type(model).__name__} keeps tensors of an earlier forward and cannot be copied; dissect it before its "
            f"first forward ({error})."
        ) from error
    return prepare(twin, seed)


def _is_computed(value: object) -> bool:
    """A tensor that a forward left behind with its graph, such as a recurrent state; ``deepcopy`` refuses those."""
    return isinstance(value, Tensor) and not value.is_leaf


def prepare(twin: nn.Module, seed: int = 0) -> nn.Module:
    """Make ``twin`` (changed in place) fit for probing."""
    activate_adapters(twin)
    for module in twin.modules():
        for hooks in _HOOKS:
            held = getattr(module, hooks, {})
            for key in [k for k, hook in held.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
                held.pop(key)  # those of torch make the weight (weight norm, pruning)
        if "_old_forward" in vars(module):  # accelerate's dispatch, which moves inputs and weights about
            module.__dict__["forward"] = module._old_forward
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):  # compiled layer by layer
            module.__dict__["forward"] = inner
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    nn.Module.to(twin, "cpu")  # not the instance's own, which accelerate binds to the model that was copied
    nn.Module.double(twin).train().eval()
    prefer_eager(twin)
    randomise(twin, seed)
    fill_tables(twin, seed)
    for _, tensor, _ in learned(twin):
        tensor.requires_grad_(True)
    return twin


def prefer_eager(model: nn.Module) -> None:
    """Plain kernels everywhere: they are views of the parameters and have second-order and batched gradients."""
    setter = getattr(model, "set_attn_implementation", None)
    if setter is not None:
        with contextlib.suppress(Exception):  # some classes know one implementation only and refuse
            setter("eager")
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"
        if getattr(config, "use_cache", None):
            config.use_cache = False


def learned(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """``(name, tensor, is_buffer)`` of every floating parameter and persistent floating buffer, tied ones once."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            yield name, parameter, False
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer, True


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Move every learned tensor: same mean, a spread that is never negligible, no two entries alike.

    Buffers stay near their mean and above it, since some of them are variances.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    filters = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    for _, tensor, is_buffer in learned(model):
        values = torch.nan_to_num(tensor.detach(), nan=0.0, posinf=0.0, neginf=0.0)
        spread = float(values.std()) if values.numel() > 1 else 0.0
        fan_in = tensor.shape[-1] if tensor.ndim > 1 else 10
        if id(tensor) in filters:
            fan_in = tensor[0].numel()
        elif tensor.ndim > 2:
            fan_in = max(fan_in, tensor.shape[1])
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        if is_buffer:
            mean = float(values.mean())  # evened out, so that no correction bias starves an expert
            tensor.copy_(mean + noise.abs() * 0.1 * max(abs(mean), 0.5))
        elif id(tensor) in tables:
            tensor.copy_(noise)
        elif tensor.ndim > 1:
            tensor.copy_(values.mean() + noise * min(max(spread, 0.8 / fan_in**0.5), 1.0))
        else:
            tensor.copy_(values + noise * 0.3)
