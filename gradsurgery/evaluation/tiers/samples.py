"""What the tiers write: the same prompts, continued in C1 and under each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradsurgery.anatomy import Anatomy
from gradsurgery.evaluation.generation import continuations
from gradsurgery.evaluation.tiers.scores import bar, tier, tier_keys
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
    rows = [{"prompt": prompt} for prompt in prompts]
    keys = tier_keys(key)
    sampling: dict[str, Any] = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p, "seed": seed}
    with bar(len(keys) * len(rows), "samples", progress) as done:
        for name, one in keys.items():
            with tier(model, one, anatomy):
                texts = continuations(model, tokenizer, prompts, max_new_tokens, 1, **sampling, done=done.update)
            for row, text in zip(rows, texts, strict=True):
                row[name] = text
    return rows
