"""Supervised finetuning by a method: TRL's ``SFTTrainer``, whose data preparation keeps what the method reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.errors import BatchError, PlanError
from gradsurgery.surgery import Method
from gradsurgery.surgery.trainer import SurgeryTrainer

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("gradsurgery.integrations.trl_sft needs TRL: pip install 'gradsurgery[trl]'") from error

Row = Mapping[str, Any]


class SurgerySFTTrainer(SurgeryTrainer, SFTTrainer):
    """An ``SFTTrainer`` that trains by a method.

    Tokenising, chat templates, completion masks, truncation and activation offloading are TRL's; losses are the passes'
    own, so that training logs them, and token accuracy in evaluation alone. The data set brings the method's label
    columns, a bool a row (or a list of bools, one a token), and for every stream a column of rows that are tokenised:
    ``{"input_ids": […], "labels": […]}``.

    Args:
        model: As for ``SFTTrainer``; ``adapter.host`` where it has an adapter.
        args: An ``SFTConfig``.
        *more: As for ``SFTTrainer``.
        method: What to do.
        **kwargs: As for ``SFTTrainer``.

    Raises:
        PlanError: packing or ``padding_free`` with label columns or streams, which TRL drops there; a ``loss_type`` or
            a router loss, which passes do not compute; a host that `SurgeryTrainer` refuses.
        BatchError: while training: a data set without a column that the method reads.

    Example:
        >>> trainer = SurgerySFTTrainer(model, SFTConfig("out"), train_dataset=rows, method=method)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, model: Any, args: Any = None, *more: Any, method: Method, **kwargs: Any) -> None:
        if isinstance(method, Method):
            check(SFTConfig() if args is None else args, method)
        super().__init__(model, args, *more, method=method, **kwargs)
        if self.aux_loss_enabled:
            raise PlanError("passes do not compute the router's loss: set model.config.output_router_logits=False.")
        if wanted := (*sorted(method.columns), *streams_of(method)):
            rows: Any = self.data_collator
            self.data_collator: Any = Collator(rows, method, wanted)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.maybe_activation_offload_context:
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, dict(inputs), *args, **kwargs)


class Collator:
    """Another collator's batches, with label columns and sub-batches beside them.

    Args:
        rows: What makes a batch of rows.
        method: Names the columns.
        wanted: The columns that the other one does not know.
    """

    def __init__(self, rows: Callable[[Sequence[Row]], Any], method: Method, wanted: Sequence[str]) -> None:
        self.rows, self.wanted, self.streams = rows, wanted, streams_of(method)

    def __call__(self, examples: Sequence[Row]) -> dict[str, Any]:
        for name in self.wanted:
            if any(name not in example for example in examples):
                have = ", ".join(examples[0])
                raise BatchError(f"the data set has no column {name!r}, which the method reads; it has {have}.")
        return self._batch(examples)

    def _batch(self, examples: Sequence[Row]) -> dict[str, Any]:
        own = [name for name in self.wanted if name in examples[0]]
        batch: dict[str, Any] = dict(self.rows([without(example, own) for example in examples]))
        for name in own:
            values = [example[name] for example in examples]
            batch[name] = self._batch(values) if name in self.streams else flags(values)
        return batch


def without(example: Row, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in example.items() if name not in names}


def flags(values: Sequence[Any]) -> Tensor:
    """``[batch]``, or ``[batch, token]`` where every row has a list of its own; no flag on what pads it."""
    rows = [torch.as_tensor(value) for value in values]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)


def streams_of(method: Method) -> tuple[str, ...]:
    return tuple(sorted({p.stream for p in method.passes if p.stream}))


def check(args: Any, method: Method) -> None:
    """Raise where TRL would drop what the method reads, or compute a loss that passes do not."""
    for option in ("packing", "padding_free"):
        if getattr(args, option, False) and (wanted := [*sorted(method.columns), *streams_of(method)]):
            raise PlanError(
                f"{option}=True puts several rows into one and drops {', '.join(wanted)}, which the method reads: set "
                f"it to False."
            )
    if getattr(args, "loss_type", "nll") != "nll":
        raise PlanError(f"loss_type={args.loss_type!r} is not called; give the loss to gs.Pass(loss=…).")
