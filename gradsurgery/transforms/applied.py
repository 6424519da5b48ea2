"""``gs.applied``: forward transforms and keys around a forward and backward of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.transforms.base import ForwardTransform
from gradsurgery.transforms.engine.hooks import Switchboard
from gradsurgery.transforms.engine.plan import ForwardPlan
from gradsurgery.transforms.engine.run import Run
from gradsurgery.transforms.stages import WeightTransform


@contextmanager
def applied(
    model: nn.Module, *transforms: ForwardTransform | WeightTransform, columns: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Run the forwards (and their backwards) inside the block under some forward transforms, and keys.

    Everything is as before when the block ends, also by an exception. A compiled model is compiled anew in every block;
    `gs.attach` compiles once.

    Args:
        model: Any module, class unchanged.
        transforms: ``gs.mask``, ``gs.scale``, ``gs.detach``, ``gs.zero``, and keys, which take gradients along.
        columns: The label columns that ``where="name"`` speaks of; ``where=<tensor>`` needs none.

    Raises:
        SelectionError, PlanError: a region that does not fit, transforms that act on the same module already (all
            before anything is changed); a module that was not called.
        BatchError: flags that do not fit the batch.
        KeyStateError: a key that is applied already.

    Example:
        >>> with gs.applied(model, gs.zero(anatomy.heads[:, -1:])):
        ...     without = model(**batch).loss
        >>> bool(without != model(**batch).loss)
        True
    """
    for transform in transforms:
        if not isinstance(transform, (ForwardTransform, WeightTransform)):
            raise PlanError(f"gs.applied takes forward transforms, and {transform!r} is none; put it into a gs.Method.")
    base = unwrap(model)
    swaps = [t for t in transforms if isinstance(t, WeightTransform)]
    for swap in swaps:
        swap.check(base)
    plan = ForwardPlan(model, [t for t in transforms if isinstance(t, ForwardTransform)])
    run = Run(columns)
    board = Switchboard(model, [plan])
    try:
        with ExitStack() as stack:
            for swap in swaps:
                stack.enter_context(swap.during(base, {}))
            stack.enter_context(board.on(plan, run))
            yield
            board.check_called(model)
    finally:
        board.remove()
