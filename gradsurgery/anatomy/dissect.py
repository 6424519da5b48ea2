"""``gs.dissect``: the units of any Hugging Face model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradsurgery.anatomy.adapters import base_of
from gradsurgery.anatomy.anatomy import Anatomy
from gradsurgery.anatomy.discover import discover
from gradsurgery.anatomy.layouts import Layout
from gradsurgery.anatomy.space import ParameterSpace, unwrap
from gradsurgery.errors import AnatomyError


def dissect(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    structural: Sequence[str] = (),
    layouts: Sequence[Layout] = (),
) -> Anatomy:
    """Find the heads, KV groups, neurons and experts of ``model``, whatever its class.

    The gradient of one consumer column reaches exactly the producer rows of its unit; every group found is then
    verified by swapping and ablating units of a randomised copy. Costs about the same for 135M and 70B parameters,
    also on the ``meta`` device: large models are examined on a tiny twin. The model is not changed.

    Args:
        model: A Hugging Face model or any module. DDP and compiled wrappers are seen through; under ``fully_shard``
            every rank calls this and gets the same. Of a PEFT model, the units hold the adapter's rows and columns, and
            its ranks are ``anatomy.latents``, whether it is active or not. Of a quantised model (bitsandbytes,
            torchao), units and shapes are those before packing, and ``anatomy.permutable`` says what may be moved.
        inputs: Keyword arguments of one forward, for models whose forward needs more than token ids or pixels.
        structural: Parameters or modules (globs) that may stay without units where discovery cannot explain them;
            without this, what it cannot explain is an error.
        layouts: Units declared by hand (see ``gs.Layout``), for modules that discovery cannot read. They are verified
            like discovered ones and replace those they overlap.

    Returns:
        The model's anatomy, indexable as ``anatomy.heads[layers, units]``.

    Raises:
        AnatomyError: a layout that cannot be explained, or a declared one that fails; the message names the module.

    Example:
        >>> anatomy = gs.dissect(model)
        >>> forget = anatomy.heads[:, -1:] | anatomy.neurons[:, -16:]
        >>> forget.count
        34
    """
    model = unwrap(model)
    _require_parameters(model, inputs)
    space = ParameterSpace.of(model)
    _require_readable(model, space)
    try:
        with _neutral():
            found = discover(model, inputs, structural, layouts)
    except AnatomyError:
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise AnatomyError(
            f"{type(model).__name__} could not be taken apart ({type(error).__name__}: {first}). Declare its units: "
            "gs.dissect(model, layouts=[gs.Layout(…)]), or name the modules that may stay without: structural=[…]."
        ) from error
    return Anatomy(space, found.groups, found.structural, found.seconds)


def _require_parameters(model: nn.Module, inputs: object) -> None:
    """Raise for models without parameters, or without shapes yet, and inputs that are no keyword arguments."""
    if inputs is not None and not isinstance(inputs, Mapping):
        raise AnatomyError(
            f"inputs are the keyword arguments of one forward, {{name: value}}, not a {type(inputs).__name__}."
        )
    parameters = list(model.named_parameters())
    if not parameters:
        raise AnatomyError(f"{type(model).__name__} has no parameters, and so no units.")
    lazy = next((name for name, p in parameters if isinstance(p, nn.parameter.UninitializedParameter)), None)
    if lazy is not None:
        raise AnatomyError(f"{lazy} is lazy and not initialized: run one forward of the model before dissecting it.")


def _require_readable(model: nn.Module, space: ParameterSpace) -> None:
    """Raise where parameters are not there under their names and shapes."""
    base: Any = base_of(model)
    scripted = next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise AnatomyError(
            f"{scripted or type(model).__name__} is a scripted module (torch.jit), whose products cannot be seen. "
            "Dissect the model before it is scripted."
        )
    if getattr(base, "is_quantized", False) and not space.quantised:
        method = getattr(base, "quantization_method", None)
        raise AnatomyError(
            f"{type(base).__name__} is quantised ({getattr(method, 'value', method)}), in a format that keeps no "
            "weights as parameters. Dissect the model before it is quantised, or dequantised; units of bitsandbytes "
            "and torchao models can be found as they are."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise AnatomyError(
            "FullyShardedDataParallel (FSDP1) keeps weights in flat parameters without units. Use fully_shard (FSDP2), "
            "or dissect the model before it is wrapped."
        )
    if any(hasattr(parameter, "ds_id") and not parameter.numel() for parameter in model.parameters()):
        raise AnatomyError(
            "DeepSpeed ZeRO-3 has taken the weights apart. Dissect the model before, or use FSDP2 (fully_shard)."
        )
    weights = dict(base.named_parameters(remove_duplicate=False))
    for one, other in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        if one in weights and other in weights and weights[one] is not weights[other] and weights[one].is_meta:
            raise AnatomyError(
                f"The config of {type(base).__name__} ties {one} to {other}, and they are not tied: transformers 5.0 "
                "leaves that out where models are built on the meta device. Call model.tie_weights() first."
            )


@contextlib.contextmanager
def _neutral() -> Iterator[None]:
    """Whatever the caller is in the middle of: autocast, inference mode, another default device or dtype."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, before)
        yield
