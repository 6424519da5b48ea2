"""``gs.applied``: forward transforms around a forward and backward of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from gradsurgery.errors import PlanError
from gradsurgery.transforms.base import ForwardTransform
from gradsurgery.transforms.engine.hooks import Switchboard
from gradsurgery.transforms.engine.plan import ForwardPlan
from gradsurgery.transforms.engine.run import Run


@contextmanager
def applied(
    model: nn.Module, *transforms: ForwardTransform, columns: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Run the forwards (and their backwards) inside the block under some forward transforms.

    Everything is as before when the block ends, also by an exception. A compiled model is compiled anew in every block;
    `gs.attach` compiles once.

    Args:
        model: Any module, class unchanged.
        transforms: ``gs.mask``, ``gs.scale``, ``gs.detach``, ``gs.zero``.
        columns: The label columns that ``where="name"`` speaks of; ``where=<tensor>`` needs none.

    Raises:
        SelectionError, PlanError: a region that does not fit, transforms that act on the same module already (all
            before anything is changed); a module that was not called.
        BatchError: flags that do not fit the batch.

    Example:
        >>> with gs.applied(model, gs.zero(anatomy.heads[:, -1:])):
        ...     without = model(**batch).loss
        >>> bool(without != model(**batch).loss)
        True
    """
    for transform in transforms:
        if not isinstance(transform, ForwardTransform):
            raise PlanError(f"gs.applied takes forward transforms, and {transform!r} is none; put it into a gs.Method.")
    plan = ForwardPlan(model, transforms)
    run = Run(columns)
    board = Switchboard(model, [plan])
    try:
        with board.on(plan, run):
            yield
            board.check_called(model)
    finally:
        board.remove()
