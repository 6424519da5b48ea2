"""What a policy with a quarantine needs of its host: its adapter, a reference without it, metrics by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradsurgery.adapters import Kinds
from gradsurgery.adapters.handle import Handle
from gradsurgery.adapters.route import Route
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.evaluation.by_kind import mean_by_kind
from gradsurgery.losses.references.base import evaluating
from gradsurgery.surgery import Method


class Reference:
    """The policy before its adapter learned anything: called as TRL calls a reference model."""

    def __init__(self, model: nn.Module, adapter: Handle) -> None:
        self.model, self.adapter = model, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self.model), self.adapter.without("kept", "quarantine"):
            return self.model(*args, **kwargs)


@torch.no_grad()
def tell_apart(route: Route, kinds: Kinds, inputs: Mapping[str, Any]) -> None:
    """Leave what each kind of rollout had in it among the adapter's figures, as a pass with kinds does.

    Log-probabilities are those of rollouts as they were generated, without the quarantine.
    """
    decision = route.gate["now"]
    tokens = inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
    found = {"flagged": decision.gates((len(inputs["prompt_ids"]), tokens))[0]}
    if decision.cosines is not None:
        found["score"] = decision.cosines
    if (logps := inputs.get("old_per_token_logps")) is not None:
        found["log_probability"] = logps.masked_fill(inputs["completion_mask"] == 0, torch.nan)
    figures = route.adapter.figures
    for stale in [name for name in figures if name.count("/") == 2]:
        del figures[stale]
    for what, of in found.items():
        for kind, mean in mean_by_kind(of, inputs[kinds.column].to(of.device), kinds.names).items():
            figures[f"quarantine/{what}/{kind}"] = mean


def adapter_of(method: Method, model: nn.Module) -> Handle | None:
    """The adapter that a method routes through, or that a host holds."""
    for transform in method.passes[0].under:
        if isinstance(transform, Route):
            return transform.adapter
    for stage in (*method.gradient, *method.update):
        if isinstance(found := getattr(stage, "adapter", None), Handle):
            return found
    held = getattr(unwrap(model), "adapter", None)
    return held if isinstance(held, Handle) else None


def check_policy(args: Any, method: Method, adapter: Handle | None) -> None:
    if adapter is None:
        return
    if args.use_vllm:
        raise PlanError(
            "vLLM generates with weights of its own, which know nothing of this adapter's parts; set use_vllm=False."
        )
    if args.sync_ref_model:
        raise PlanError("sync_ref_model has no model to copy into: the reference is the policy without its adapter.")
    head: Any = getattr(adapter.model, "get_output_embeddings", lambda: None)()
    modules = dict(adapter.model.named_modules())
    if on_head := [path for path in adapter.coordinates if head is not None and modules.get(path) is head]:
        raise PlanError(
            f"GRPOTrainer reads the weight of {on_head[0]} and never calls it, so that an adapter there would not act; "
            f'add the adapter to others, such as modules="all-linear", which leaves it out.'
        )
    route = next((t for t in method.passes[0].under if isinstance(t, Route)), None)
    if route and route.score and route.mode == "absorb" and args.use_adaptive_entropy:
        raise PlanError("a score under absorb takes two forwards a step, which use_adaptive_entropy would count twice.")
