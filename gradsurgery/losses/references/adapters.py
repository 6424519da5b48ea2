"""A model without its adapters as the reference: PEFT's, and those that transformers loads itself. Imports no PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.losses.references.base import Reference, forward_logits


class AdaptersOff(Reference):
    """The logits of the model with every adapter switched off; made by `adapters_off`."""

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        with without_adapters(model):
            return forward_logits(model, inputs)

    def take(self, model: nn.Module) -> None:
        """Check that the model has adapters that can be switched off.

        Raises:
            PlanError: it has none, or they are merged, or train biases of the base.
        """
        _adapter_layers(unwrap(model))

    def describe(self) -> str:
        return "adapters_off()"


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block no adapter takes part; which ones did, and what trains, comes back after it.

    PEFT's own switch turns every adapter on again and lets it train, whatever it was before.
    """
    base = unwrap(model)
    layers = _adapter_layers(base)
    switched = [(layer, layer._disable_adapters) for layer in layers]
    try:
        with ExitStack() as stack:
            if _prompt_learning(base):
                stack.enter_context(base.disable_adapter())  # type: ignore[operator]
            for layer in layers:
                layer._disable_adapters = True
            yield
    finally:
        for layer, disabled in switched:
            layer._disable_adapters = disabled


def _prompt_learning(base: nn.Module) -> bool:
    configs = getattr(base, "peft_config", None)
    return isinstance(configs, dict) and any(getattr(c, "is_prompt_learning", False) for c in configs.values())


def _adapter_layers(base: nn.Module) -> list[Any]:
    layers: list[Any] = [module for module in base.modules() if hasattr(module, "_disable_adapters")]
    if not layers and not _prompt_learning(base):
        raise PlanError(
            f"adapters_off: {type(base).__name__} has no adapters to switch off. Add them before gs.attach, or use "
            f"gs.losses.snapshot(region) for the weights that train."
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise PlanError(
            "adapters_off: adapters are merged into the base weights; call model.unmerge_adapter() before gs.attach."
        )
    configs = getattr(base, "peft_config", None)
    for name, config in (configs if isinstance(configs, dict) else {}).items():
        bias = getattr(config, "bias", "none")
        if bias not in ("none", None, False):
            raise PlanError(
                f"adapters_off: adapter {name!r} also trains biases of the base model (bias={bias!r}), which stay as "
                f"they are when it is switched off. Use bias='none', or gs.losses.snapshot(region) with those biases."
            )
    return layers


def adapters_off() -> AdaptersOff:
    """The model with its adapters switched off as the reference: no copy of anything.

    The reference is the base as it is at the time: weights of the base that train as well belong into a `snapshot`.

    Raises:
        PlanError: when it is used, on a model without adapters, with merged ones, or with trained biases of the base.

    Example:
        >>> reference = gs.losses.adapters_off()
        >>> reference(model, batch)
        Traceback (most recent call last):
        gradsurgery.errors.PlanError: adapters_off: LlamaForCausalLM has no adapters to switch off. ...
    """
    return AdaptersOff()
