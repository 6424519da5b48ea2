"""One rank of ``SurgeryTrainer`` under DDP: accumulation on two ranks against one batch in one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

import gradsurgery as gs
from gradsurgery.surgery import SurgeryTrainer
from tests.ranks import joined
from tests.surgery.tiny import batch, build, cut, gap, sgtm, weights

ROWS, STEPS = 16, 2


def rows() -> list[dict[str, Any]]:
    """Row ``2 k + r`` goes to rank ``r``: the whole batch of a step in the order that one process sees."""
    whole = batch(ROWS)
    return [{name: value[k] for name, value in whole.items()} for k in range(ROWS)]


def alone(model: torch.nn.Module) -> tuple[list[float], list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses, norms = [], []
    with gs.attach(sgtm(), model, optimizer) as surgery:
        for k in range(STEPS):
            losses.append(float(surgery.backward(cut(batch(ROWS), 8 * k, 8 * k + 8))["sgtm"]))
            optimizer.step()
            optimizer.zero_grad()
            norms.append(surgery.metrics()["grad_norm"])
    return losses, norms


class InOrder(SurgeryTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def main(directory: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    rank = dist.get_rank()
    one, many = build(), build()
    losses, norms = alone(one)
    args = TrainingArguments(
        output_dir=str(Path(directory, "out")),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="steps",
        save_steps=STEPS,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(many, args, train_dataset=rows(), method=sgtm())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    if rank == 0:
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert Path(directory, "out", f"checkpoint-{STEPS}", "surgery.json").exists()
        result = {
            "gap": gap(weights(one), weights(many)),
            "loss": [losses, [entry["loss"] for entry in logged]],
            "norm": [norms, [entry["grad_norm"] for entry in logged]],
        }
        Path(directory, "result.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[1])
