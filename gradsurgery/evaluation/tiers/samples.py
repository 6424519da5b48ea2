"""What the tiers write: the same prompts, continued in C1 and under each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import DataError
from gradsurgery.evaluation.tiers.scores import bar, evaluating, tier, tier_keys
from gradsurgery.keys import PermutationKey


def sample_tiers(
    model: nn.Module,
    key: PermutationKey | Mapping[str, PermutationKey],
    anatomy: Anatomy,
    prompts: Sequence[str],
    tokenizer: Any,
    max_new_tokens: int = 40,
    do_sample: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    progress: bool | None = None,
) -> list[dict[str, str]]:
    """``[{"prompt": …, "C1": continuation, "C2": continuation}, …]``: rows for `gradsurgery.evaluation.table`.

    Args:
        model: A Hugging Face causal language model in C1; it is in C1 afterwards, also on an exception.
        key: The key of C2, or several by name.
        anatomy: The model's anatomy.
        prompts: Texts; none may be empty.
        tokenizer: A Hugging Face tokenizer.
        max_new_tokens: Length of each continuation.
        do_sample: Sample, instead of taking the most likely token.
        temperature, top_p: Of the sampling.
        seed: Of the sampling; the same for each prompt and tier. The generators of torch are left as they were.
        progress: Show a bar; by default where stderr is a terminal.

    Raises:
        KeyStateError: the model is keyed.
        DataError: an empty prompt, or a model that does not generate.
    """
    base: Any = unwrap(model)
    if not hasattr(base, "generate"):
        raise DataError(f"{type(base).__name__} has no generate(); samples need a Hugging Face causal language model.")
    if empty := [k for k, prompt in enumerate(prompts) if not prompt]:
        raise DataError(f"prompt {empty[0]} is empty; give some text, if only the end-of-text token.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
    if do_sample:
        options |= {"temperature": temperature, "top_p": top_p}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(base.parameters()).device
    rows = [{"prompt": prompt} for prompt in prompts]
    keys = tier_keys(key)
    forked = [device] if device.type == "cuda" else []
    with bar(len(keys) * len(rows), "samples", progress) as done, torch.random.fork_rng(forked), evaluating(base):
        for name, one in keys.items():
            with tier(model, one, anatomy):
                for row in rows:
                    torch.manual_seed(seed)
                    ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
                    given = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids, device=device)}
                    out = base.generate(**given, pad_token_id=pad, **options)[0, ids.shape[1] :]
                    row[name] = tokenizer.decode(out, skip_special_tokens=True)
                    done.update()
    return rows
