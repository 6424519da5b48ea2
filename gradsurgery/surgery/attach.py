"""``gs.attach``: run a method on a model and its optimizer; the handle that does is a `Surgery`."""

from __future__ import annotations

import torch
from torch import nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import PlanError
from gradsurgery.surgery.hosts import check_host
from gradsurgery.surgery.method import Method, references_of
from gradsurgery.surgery.surgery import Surgery, attached_to, hold


def attach(method: Method, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Surgery:
    """Put a method's hooks on a model and on its optimizer's step.

    The model's class, parameters and ``state_dict`` stay as they are; ``surgery.remove()`` takes everything off again.
    Until then the surgery lives as long as the model, also where nobody keeps the handle.

    Args:
        method: What to do.
        model: The model, possibly in DDP, ``fully_shard`` or ``torch.compile``.
        optimizer: The optimizer that steps it, or ``None`` to ``surgery.bind(optimizer)`` later.

    Raises:
        PlanError: a method that does not fit the model or host (DeepSpeed steps inside backward), or a model that a
            surgery is attached to already.
        SelectionError: regions of another model, or regions in which nothing trains.

    Example:
        >>> method = gs.Method([gs.Pass("sgtm", under=[gs.mask(anatomy.neurons[:, :16], where="forget")])])
        >>> surgery = gs.attach(method, model, torch.optim.AdamW(model.parameters()))
        >>> losses = surgery.backward({**batch, "forget": torch.tensor([True, False])})
        >>> surgery.remove()
    """
    if not isinstance(method, Method):
        raise PlanError(f"attach takes a gs.Method first, not {type(method).__name__}.")
    check_host(model, method.slots)
    if optimizer is not None and "deepspeed" in type(optimizer).__module__.lower():
        raise PlanError("a DeepSpeed optimizer steps inside backward; use FSDP2 (fully_shard) or DDP instead.")
    base = unwrap(model)
    if attached_to(base) is not None:
        raise PlanError(f"a surgery is attached to this {type(base).__name__} already; call its remove() first.")
    surgery = Surgery(method, model)
    try:
        if optimizer is not None:
            surgery.bind(optimizer)
        for reference in references_of(method).values():
            if hasattr(reference, "take"):
                reference.take(base)
    except BaseException:
        surgery.remove()
        raise
    hold(surgery)
    return surgery
