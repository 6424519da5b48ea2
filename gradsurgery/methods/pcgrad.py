"""PCGrad: several tasks, each projected off those it conflicts with (Yu et al. 2020, arXiv 2001.06782)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradsurgery.errors import PlanError
from gradsurgery.surgery import Method, Pass
from gradsurgery.transforms import PCGrad, aggregate

OPTIONS = ("loss", "rows", "stream", "weight", "under", "refs")


def pcgrad(tasks: Mapping[str, str | Mapping[str, Any]], seed: int = 0) -> Method:
    """The sum of the tasks' gradients, each of them first projected off every other that it conflicts with.

    For each task i, over the others j in random order: ``g_i <- g_i - min(0, <g_i, g_j>) / <g_j, g_j> * g_j``, with
    ``g_j`` as it was. The order is drawn from the seed and the step, equal on all ranks. A task without rows in a batch
    has the gradient 0 and conflicts with none; one row runs all the same, so that every rank builds the same graph.

    Args:
        tasks: By name a bool column of the task's rows, or options of its pass: ``loss``, ``rows``, ``stream``,
            ``weight``, ``under``, ``refs``. One gradient is kept a task.
        seed: Of the order.

    Raises:
        PlanError: fewer than two tasks, or options that do not exist.

    Example:
        >>> method = gs.methods.pcgrad({"maths": "maths", "prose": {"rows": "~maths"}})
        >>> surgery = gs.attach(method, model, torch.optim.AdamW(model.parameters()))
        >>> sorted(surgery.backward({**batch, "maths": torch.tensor([True, False])}))
        ['maths', 'prose']
        >>> surgery.remove()
    """
    if not isinstance(tasks, Mapping) or len(tasks) < 2:
        raise PlanError("pcgrad takes two tasks or more: {name: column} or {name: {'stream': …, 'loss': …}}.")
    passes: list[Pass] = []
    slots: list[str] = []
    for name, given in tasks.items():
        options = {"rows": given} if isinstance(given, str) else dict(given)
        if unknown := set(options) - set(OPTIONS):
            have = ", ".join(map(str, unknown))
            raise PlanError(f"pcgrad: task {name!r} has {have}; the options of a task are {', '.join(OPTIONS)}.")
        slots.append(name if passes else "main")  # the first lies where the sum will: one gradient less
        passes.append(Pass(name, into=slots[-1], **options))
    return Method(passes, gradient=[aggregate(PCGrad(seed), slots=slots)])
