"""Three steps of a method on every host that owns a part of the loop; all of them as the plain loop would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import GradsurgeryError
from gradsurgery.surgery import SurgeryTrainer
from tests.engines.equality import Cell, alone
from tests.engines.methods import CASES, STEPS, batches, optimizer_of
from tests.engines.ranks import full
from tests.surgery.tiny import gap

Weights = dict[str, Tensor]
Row = dict[str, Any]


def constant(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def loop(wrapped: Any, stepper: Any, method: gs.Method, backward: Callable[..., Any]) -> None:
    """The loop of those who write it themselves."""
    with gs.attach(method, wrapped, stepper) as surgery:
        for batch in batches(method):
            surgery.backward(batch, num_items=surgery.count_items([batch]), backward=backward)
            stepper.step()
            stepper.zero_grad()


def accelerate(name: str, directory: Path) -> Weights:
    from accelerate import Accelerator

    host, method = CASES[name].start()
    accelerator = Accelerator(cpu=True)
    wrapped, stepper = accelerator.prepare(host, optimizer_of(host))
    loop(wrapped, stepper, method, accelerator.backward)
    return full(host)


def fabric(name: str, directory: Path) -> Weights:
    from lightning_fabric import Fabric

    host, method = CASES[name].start()
    here = Fabric(accelerator="cpu", devices=1)
    wrapped, stepper = here.setup(host, optimizer_of(host))
    loop(wrapped, stepper, method, here.backward)
    return full(host)


def rows_of(batch: Any) -> list[Row]:
    """The rows of a batch and of its sub-batches."""
    each = {k: rows_of(v) if isinstance(v, dict) else list(v) for k, v in batch.items()}
    return [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]


def stacked(rows: list[Row]) -> dict[str, Any]:
    return {
        name: stacked([row[name] for row in rows])
        if isinstance(value, dict)
        else torch.stack([row[name] for row in rows])
        for name, value in rows[0].items()
    }


def arguments(directory: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "per_device_train_batch_size": rows,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


class InOrder(SurgeryTrainer):
    """Batches in the order of the rows."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def trainer(name: str, directory: Path, micro: int = 1) -> Weights:
    from transformers import TrainingArguments

    host, method = CASES[name].start()
    rows = [row for batch in batches(method) for row in rows_of(batch)]
    optimizer = optimizer_of(host)
    more = {"gradient_accumulation_steps": micro}
    InOrder(
        host,
        TrainingArguments(**arguments(directory, len(rows) // STEPS // micro), **more),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=stacked,
        optimizers=(optimizer, constant(optimizer)),
        method=method,
    ).train()
    return full(host)


def tokens(row: Row) -> Row:
    """A row as a data set holds it: lists without padding."""
    length = int(row["attention_mask"].sum())
    out: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out[name] = tokens(value)
        elif name in ("input_ids", "labels"):
            out[name] = value[:length].tolist()
        elif name != "attention_mask":
            out[name] = value.tolist()
    return out


def sft(name: str, directory: Path) -> Weights:
    from datasets import Dataset
    from trl import SFTConfig

    from gradsurgery.data import load_tokenizer
    from gradsurgery.integrations.trl_sft import SurgerySFTTrainer

    class Ordered(SurgerySFTTrainer):
        _get_train_sampler = InOrder._get_train_sampler

    host, method = CASES[name].start()
    rows = [row for batch in batches(method) for row in rows_of(batch)]
    optimizer = optimizer_of(host)
    Ordered(
        host,
        SFTConfig(
            **arguments(directory, len(rows) // STEPS), max_length=None, bf16=False, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list([tokens(row) for row in rows]),
        processing_class=load_tokenizer(),
        optimizers=(optimizer, constant(optimizer)),
        method=method,
    ).train()
    return full(host)


HOSTS: dict[str, Callable[[str, Path], Weights]] = {
    "accelerate": accelerate,
    "fabric": fabric,
    "trainer": trainer,
    "sft": sft,
}


def equal(host: str, name: str, directory: Path) -> Cell:
    """The largest difference of a weight from the plain loop's, or the sentence by which the method was refused."""
    try:
        return gap(HOSTS[host](name, directory), alone(name))
    except GradsurgeryError as error:
        return str(error)
