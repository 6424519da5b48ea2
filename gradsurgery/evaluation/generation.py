"""What a model writes after some prompts: in batches, padded on the left, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.space import unwrap
from gradsurgery.errors import DataError
from gradsurgery.evaluation.modes import evaluating


def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 40,
    batch_size: int = 32,
    *,
    do_sample: bool = False,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    done: Callable[[int], object] | None = None,
) -> list[str]:
    """The text that follows each prompt, up to the end-of-text token; the prompt itself is left out.

    Args:
        model: A Hugging Face causal language model; its modes are left as they were.
        tokenizer: Its tokenizer.
        prompts: Texts, to which no special token is added, or token ids as `gradsurgery.data.ChatFormat.prompt` gives.
        max_new_tokens: Length of a continuation.
        batch_size: Prompts of about the same length that are continued together.
        do_sample: Sample, instead of taking the most likely token.
        temperature, top_p: Of the sampling.
        seed: Of the sampling, set anew for each batch. The generators of torch are left as they were.
        done: Called with the number of prompts of each batch that is done.

    Raises:
        DataError: an empty prompt, or a model that does not generate.

    Example:
        >>> from gradsurgery.data import load_tokenizer
        >>> from gradsurgery.evaluation import continuations
        >>> continuations(model, load_tokenizer(), [[1, 2, 3]], max_new_tokens=0)
        ['']
    """
    base: Any = unwrap(model)
    if not hasattr(base, "generate"):
        raise DataError(f"{type(base).__name__} has no generate(); this needs a Hugging Face causal language model.")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is no number of prompts: give 1 or more.")
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    if empty := [k for k, prompt in enumerate(ids) if not prompt]:
        raise DataError(f"prompt {empty[0]} is empty; give some text, if only the end-of-text token.")
    if max_new_tokens < 1:
        return [""] * len(ids)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
    if do_sample:
        options |= {"temperature": temperature, "top_p": top_p}
    options["pad_token_id"] = pad = _pad(tokenizer)
    device = next(base.parameters()).device
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))  # as little padding as can be
    out = [""] * len(ids)
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(base):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            given = _left_padded([ids[k] for k in chosen], pad)
            torch.manual_seed(seed)
            written = base.generate(**{name: column.to(device) for name, column in given.items()}, **options)
            new = written[:, given["input_ids"].shape[1] :]
            for k, row in zip(chosen, new, strict=True):
                out[k] = tokenizer.decode(row, skip_special_tokens=True)
            if done is not None:
                done(len(chosen))
    return out


def _ids(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt)


def _pad(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if pad is None else int(pad)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, ``[prompts, longest]``: the last column holds each prompt's last token."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
