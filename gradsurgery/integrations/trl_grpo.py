"""Group-relative policy optimisation by a method: TRL's ``GRPOTrainer`` with flags that follow their rollouts.

Overrides ``training_step``, ``compute_loss``, ``prediction_step``, ``log`` and ``train``. One more has no public name:
``_generate_and_score_completions`` is the only place where a column can join the rollouts before they are shuffled and
cut into micro-batches.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.adapters import Kinds, decide
from gradsurgery.adapters.route import Route
from gradsurgery.errors import PlanError
from gradsurgery.integrations.trl_flags import Detector, RolloutFlags
from gradsurgery.integrations.trl_policy import Reference, adapter_of, check_policy, tell_apart
from gradsurgery.surgery import Method
from gradsurgery.surgery.passes import require_plain
from gradsurgery.surgery.runner import require_finite
from gradsurgery.surgery.trainer import SurgeryTrainer

try:
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("gradsurgery.integrations.trl_grpo needs TRL: pip install 'gradsurgery[trl]'") from error


class SurgeryGRPOTrainer(SurgeryTrainer, GRPOTrainer):
    """A ``GRPOTrainer`` whose policy is trained under the transforms of a method's one pass.

    Rollouts, rewards, advantages and loss are TRL's. Label columns of the method are bool ``[rollouts]``; they follow
    their rollouts through shuffling, micro-batches (``steps_per_generation``) and reuse (``num_iterations``). With a
    quarantine rollouts are generated without it, rows that are scored are flagged before their backward, and the
    reference of ``beta`` is the model without its adapter (no copy).

    With a quarantine, what trains is another policy than what generated. The loss therefore has importance weights,
    clipped as TRL does it, also where TRL would take them for 1: without them rollouts that the quarantine makes
    improbable push both parts apart until the policy collapses.

    ``max_grad_norm`` becomes a ``gs.clip`` at the end of the gradient stage where the method has stages; checkpoints
    have a ``surgery.json``. Rollouts whose reward is ``None`` or nan teach nothing and count in no mean.

    Args:
        model: The policy; ``adapter.host`` where it has an adapter.
        reward_funcs: As for ``GRPOTrainer``. One that calls ``log_extra(column, flags)`` fills that label column.
        args: A ``GRPOConfig``.
        *more: As for ``GRPOTrainer``.
        method: One pass; its own loss stays unused.
        flags: By label column a function of the rollouts, called as reward functions are, or the name of a column of
            the data set. Columns left out come from reward functions or the data set's column of the same name; so
            does the column of `gs.adapters.Kinds`.
        **kwargs: As for ``GRPOTrainer``.

    Raises:
        PlanError: a method that means more than transforms of one pass; an adapter that the host would pass by (vLLM,
            an adapter on the output embeddings, ``sync_ref_model``), or a host that `SurgeryTrainer` refuses.
        BatchError: while training: flags that nobody gave or that do not fit, rewards that are infinite or all nan.

    Example:
        >>> trainer = SurgeryGRPOTrainer(adapter.host, reward, args, train_dataset=prompts,
        ...     method=gs.methods.quarantine(adapter, where="hack"), flags={"hack": detector})  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    num_iterations: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *more: Any,
        method: Method,
        flags: Mapping[str, Detector | str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(method, Method):
            raise PlanError(f"SurgeryGRPOTrainer takes method=gs.Method(…), not {type(method).__name__}.")
        if len(method.passes) != 1:
            raise PlanError(f"a policy is trained in one pass; this method has {len(method.passes)}.")
        require_plain(method.passes[0], "GRPOTrainer", "surgery.backward in a loop of your own")
        self._adapter = None if isinstance(model, str) else adapter_of(method, model)
        args = GRPOConfig("grpo") if args is None else copy.copy(args)
        check_policy(args, method, self._adapter)
        self._kinds: Kinds | None = getattr(method.passes[0], "kinds", None)
        self.flags = RolloutFlags(method.columns, flags, () if self._kinds is None else (self._kinds.column,))
        self._pass = contextlib.ExitStack()
        beta, norm = args.beta, args.max_grad_norm
        if self._adapter is not None:
            args.beta = 0.0  # no copy of the model: it is its own reference
        if reward_funcs is not None:
            reward_funcs = self.flags.heard(reward_funcs)
        super().__init__(model, reward_funcs, args, *more, method=method, **kwargs)
        if not method.gradient and not method.update:
            self.method, self.args.max_grad_norm = method, norm
        if self._adapter is not None and beta:
            self.args.beta = self.beta = beta
            self.ref_model = Reference(self.model, self._adapter)

    @property
    def _off_policy(self) -> bool:
        """Whether what generates is another policy than what is trained."""
        return self._adapter is not None and self._route is not None

    @property
    def _route(self) -> Route | None:
        return next((t for t in self.method.passes[0].under if isinstance(t, Route)), None)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        return super(SurgeryTrainer, self).get_batch_samples(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return super(SurgeryTrainer, self).prediction_step(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As ``GRPOTrainer.training_step``; hooks are on from this micro-batch's forward to the end of its backward."""
        assert self.surgery is not None
        self.surgery.model = model
        try:
            return super(SurgeryTrainer, self).training_step(model, inputs, num_items_in_batch)
        finally:
            self._pass.close()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As ``GRPOTrainer.compute_loss``, under the method's pass; evaluated without a quarantine."""

        def loss_of() -> Tensor:
            return super(SurgeryTrainer, self).compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

        if self.surgery is None or not self.model.training:
            with self._without_quarantine():
                return loss_of()
        columns = {name: inputs[name] for name in (*self.flags.columns, *self._numbers)}
        columns["input_ids"] = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        self._pass.close()
        self._pass.enter_context(self.surgery.running("train", columns))
        loss = loss_of()
        self.surgery._board.check_called(self.surgery.model)
        require_finite("GRPO", loss)
        route = self._route
        if route is not None and route.score is not None:
            decide(self.surgery, loss, columns)
            if route.mode == "absorb":
                loss = loss_of()  # the forward that was scored had no quarantine
        if route is not None and self._kinds is not None:
            tell_apart(route, self._kinds, inputs)
        return loss

    @property
    def _numbers(self) -> tuple[str, ...]:
        """The column that numbers rollouts, where a score asks for it."""
        route = self._route
        return (route.score.rollout,) if route and route.score and route.score.by == "rollout" else ()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.flags.new_batch()
        iterations = self.num_iterations
        if self._off_policy:  # TRL takes log-probabilities of rollouts where these are used in a later step
            self.num_iterations = self.args.gradient_accumulation_steps + 1
        try:
            with self._without_quarantine():
                out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self.num_iterations = iterations
        if self._off_policy and "old_per_token_logps" not in out:
            raise PlanError("this version of TRL keeps no log-probabilities of rollouts, without which routing drifts.")
        if not self.model.training:
            return out
        if self.accelerator.num_processes == 1 and len(self.flags.rewards) == len(self.reward_funcs):
            self.flags.require_rewards()
        device = out["completion_ids"].device
        found = self.flags.tensors(inputs, device)
        for name in self._numbers:
            found[name] = torch.arange(len(out["completion_ids"]), device=device)
        if taken := set(found) & set(out):
            raise PlanError(f"label column {taken.pop()!r} has the name of something of GRPOTrainer's own; rename it.")
        return {**out, **found}

    @contextlib.contextmanager
    def _without_quarantine(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.surgery is not None:
                stack.enter_context(self.surgery.running("generate"))
            if self._adapter is not None:
                stack.enter_context(self._adapter.without("quarantine"))
            yield

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.flags.shares(lambda x: self.accelerator.reduce(x.to(self.args.device), "sum")))
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super(SurgeryTrainer, self)._set_signature_columns_if_needed()
