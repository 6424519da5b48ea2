"""The baseline of private finetuning: low-rank adapters with as many entries as a key moves (Hu et al. 2021)."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradsurgery.errors import PlanError


def add_adapter(model: nn.Module, budget: int, alpha: float | None = None) -> Any:
    """The model with adapters on all linear layers of its blocks, of the largest rank that fits a budget of entries.

    Args:
        model: A Hugging Face model; its weights are frozen, in place.
        budget: Entries that may train.
        alpha: Scale of the adapters; by default twice the rank.

    Raises:
        PlanError: PEFT is not installed, or the budget is less than rank 1 takes.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise PlanError("LoRA baselines need PEFT: pip install peft.") from None

    def with_rank(base: Any, rank: int) -> Any:
        scale = alpha if alpha is not None else 2 * rank
        return get_peft_model(base, LoraConfig(r=rank, lora_alpha=scale, target_modules="all-linear"))  # type: ignore[arg-type]

    one = with_rank(model, 1)
    smallest = trained(one)
    if budget < smallest:
        raise PlanError(f"a budget of {budget:,} entries is less than adapters of rank 1 have ({smallest:,}).")
    return with_rank(one.unload(), budget // smallest)


def trained(model: nn.Module) -> int:
    """Entries that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merged(model: Any) -> Any:
    """The plain model with its adapters added to the weights: a stock checkpoint, and the base of a next stage."""
    out = model.merge_and_unload()
    for parameter in out.parameters():
        parameter.requires_grad_(True)
    return out
