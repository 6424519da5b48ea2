"""A loss that scores the rows of its pass before they are routed."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.adapters.route import Decision, Route
from gradsurgery.anatomy.adapters import base_of
from gradsurgery.errors import PlanError
from gradsurgery.losses.references.base import model_inputs


class Scored:
    """A loss whose gradients by example flag rows, and then itself.

    Under ``"route"`` the routed backward goes through the same graph. Under ``"absorb"`` the forward that is scored has
    no quarantine: the examples that need one run once more, and their logits take the places of the first ones. All of
    them do where checkpointing would compute the first forward again under the second one's gates, and where outputs
    hold more than logits.
    """

    backwards = 2  # through one forward: for the score, and for the gradient
    collective = True  # ranks gather scores, so that one that fails before leaves the others there

    def __init__(self, loss: Any, route: Route) -> None:
        self.loss, self.route = loss, route
        self.columns = (*getattr(loss, "columns", ()), *((route.score.rollout,) if route.score is not None else ()))
        self.__name__ = getattr(loss, "__name__", type(loss).__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loss"], name)  # count, takes_labels

    def __call__(self, outputs: Any, batch: Mapping[str, Any], refs: Mapping[str, Any]) -> Tensor:
        value = self.loss(outputs, batch, refs)
        decision = self.route.gate.get("now")
        if decision is None or not decision.scoring:
            raise PlanError("the forward of this loss ran without its routing, so its rows cannot be scored.")
        if self.route.mode == "route":
            decision.decide(value, batch, keep_graph=True)
            return value
        host = self.route.adapter.host
        inputs = model_inputs(base_of(self.route.adapter.model), batch, bool(getattr(self.loss, "takes_labels", False)))
        some = has_only_logits(outputs) and not checkpointed(host)
        decision.decide(value, batch, keep_graph=some)
        with torch.enable_grad():
            if not some:
                return self.loss(host(**inputs), batch, refs)
            outputs["logits"] = self._mixed(outputs["logits"], inputs, decision)
            return self.loss(outputs, batch, refs)

    def _mixed(self, logits_BTV: Tensor, inputs: Mapping[str, Any], decision: Decision) -> Tensor:
        """The logits of the first forward, and of a second one for the examples that the quarantine takes part in."""
        flagged_BT, clean_BT = (found.to(logits_BTV.device) for found in decision.gates(tuple(logits_BTV.shape[:2])))
        decision.told = flagged_BT
        again_B = (flagged_BT | ~clean_BT).any(1)
        index = again_B.nonzero().flatten()
        chosen = (
            index if len(index) else torch.zeros(1, dtype=torch.long, device=index.device)
        )  # equal graphs on all ranks
        size = len(logits_BTV)
        cut = {
            name: value[chosen.to(value.device)]
            if isinstance(value, Tensor) and value.dim() and len(value) == size
            else value
            for name, value in inputs.items()
        }
        decision.given = again_B[:, None].expand_as(flagged_BT), clean_BT  # to the first graph they are nobody's
        self.route.gate["now"] = Decision(self.route, decision.run, (flagged_BT[chosen], clean_BT[chosen]))
        try:
            second = self.route.adapter.host(**cut)["logits"]
        finally:
            self.route.gate["now"] = decision
        return logits_BTV.index_copy(0, index, second[: len(index)])


def has_only_logits(outputs: Any) -> bool:
    """Whether logits are all that a loss can read."""
    if not isinstance(outputs, MutableMapping):
        return False
    return isinstance(outputs.get("logits"), Tensor) and outputs["logits"].dim() == 3 and len(outputs) == 1


def checkpointed(host: nn.Module) -> bool:
    """Whether a module of the host drops its activations and computes them again in the backward."""
    return any(getattr(module, "gradient_checkpointing", False) and module.training for module in host.modules())
