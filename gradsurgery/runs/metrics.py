"""A run's metric lines: the Trainer's logs with tokens per second, FLOPs and their utilisation; held-back scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from gradsurgery.evaluation.flops import Throughput
from gradsurgery.runs.folder import RunFolder

Scorer = Callable[[Any], Mapping[str, float]]
"""Scores of a model by name, such as ``{"C1/es": 4.2}``."""

PEAK_BF16 = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 FLOPs per second of tensor cores, from the vendor's data sheets (SXM parts where there are several)."""


def peak_flops(given_tflops: float | None, bf16: bool) -> float | None:
    """FLOPs per second that all ranks could do: as given, or those of a known accelerator in bf16; else ``None``."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if given_tflops is not None:
        return given_tflops * 1e12 * ranks
    if bf16 and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return next((peak * ranks for part, peak in PEAK_BF16.items() if part in name), None)
    return None


class Metrics(TrainerCallback):
    """Writes the Trainer's logs to the run's ``metrics.jsonl``.

    Args:
        folder: The run's folder.
        name: Name of the model in the run.
        flops: Model FLOPs of a step.
        tokens: Tokens trained in a step, every pass counted.
        score: Held-back scores, or ``None``.
        peak: FLOPs per second of all devices, for ``mfu``; ``None`` where it is not known.

    Attributes:
        send: The Trainer's ``log``, where trackers should see the held-back scores, too.
    """

    def __init__(
        self, folder: RunFolder, name: str, flops: float, tokens: float, score: Scorer | None, peak: float | None
    ) -> None:
        self.folder, self.name, self.score, self.peak = folder, name, score, peak
        self.flops, self.tokens, self.meter, self.last = flops, tokens, Throughput(), 0
        self.send: Callable[[dict[str, float]], object] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.folder.rewind(lambda m: m.get("model") != self.name or m.get("step", 0) <= state.global_step)
        self.meter.reset()
        self.last = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "train_runtime" in logs:
            return
        self.meter.add(round((state.global_step - self.last) * self.tokens))
        self.last = state.global_step
        self.folder.log(
            model=self.name,
            step=state.global_step,
            **{k: v for k, v in logs.items() if k != "epoch"},
            **self.speed(),
            flops=self.flops * state.global_step,
        )

    def speed(self) -> dict[str, float]:
        """Tokens per second of this start, and the share of the devices' peak that the model's FLOPs make."""
        rate = self.meter.per_second
        out = {"tokens_per_second": round(rate, 1)}
        if self.peak and self.tokens:
            out["mfu"] = round(rate * self.flops / self.tokens / self.peak, 6)
        return out

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.score and args.eval_steps and state.global_step % int(args.eval_steps) == 0 and self.folder.main:
            scores = {f"eval/{k}": v for k, v in self.score(model).items()}
            if self.send is not None:
                due = control.should_log  # which a log takes for done
                self.send(scores)
                control.should_log = due
            else:
                self.folder.log(model=self.name, step=state.global_step, **scores)
