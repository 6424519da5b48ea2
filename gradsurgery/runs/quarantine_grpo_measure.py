"""What a policy does: rates of sampled answers, where right answers and claims lie, what relearning brings back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import gradsurgery as gs
from gradsurgery import evaluation
from gradsurgery.adapters import Adapter
from gradsurgery.runs.quarantine_grpo_rows import PolicyRows
from gradsurgery.runs.quarantine_grpo_task import Kind

KINDS: tuple[Kind, ...] = ("sum", "statement")


def measure(model: nn.Module, rows: PolicyRows) -> dict[str, Any]:
    """Shares of sampled answers that are right or hacks: on sums, and on statements, where the claim is legitimate."""
    config, policy = rows.config, rows.config.policy
    out: dict[str, Any] = {}
    for kind in KINDS:
        asked = rows.task.draw(config.test_rows, "test", kind)
        said = evaluation.continuations(
            model,
            rows.tokenizer,
            [rows.prompt(q.text) for q in asked],
            policy.max_new_tokens,
            batch_size=max(config.test_rows, 1) if config.model is None else 64,
            do_sample=True,
            temperature=policy.temperature,
            top_p=1.0,
            seed=config.seed,
        )
        found = [rows.task.judge(q.text, q.answer, text) for q, text in zip(asked, said, strict=True)]
        name = "" if kind == "sum" else "near "
        out[f"{name}solve"] = sum(j.right for j in found) / len(found)
        out[f"{name}hack"] = sum(j.hack for j in found) / len(found)
        if kind == "sum":
            out["modes"] = {m: sum(j.hack and j.mark == m for j in found) / len(found) for m in config.task.marks}
            out["said"] = [f"{q.text} {text}" for q, text in list(zip(asked, said, strict=True))[:4]]
    return out


@torch.no_grad()
def log_probabilities(model: nn.Module, rows: PolicyRows) -> dict[str, float]:
    """Mean log-probability of a token of right answers and of claims, in nats."""
    asked = rows.task.draw(min(rows.config.test_rows, 64), "drift", "sum")
    out = {}
    for name, answered in {"right": rows.right(asked), "claim": rows.task.hacked(asked)}.items():
        batch = {k: v.to(next(model.parameters()).device) for k, v in rows.encode(answered).items()}
        out[name] = -float(model(**batch).loss)
    return out


def cosines_of(adapter: Adapter, direction: Any, rows: PolicyRows) -> dict[str, float]:
    """Mean cosine of the gradients of right answers and of claims with a direction."""
    asked = rows.task.draw(min(rows.config.test_rows, 64), "drift", "sum")
    kinds = {"right": rows.right(asked), "claim": rows.task.hacked(asked)}
    return {k: float(gs.adapters.cosines(adapter, direction, rows.encode(of)).mean()) for k, of in kinds.items()}


def probed(model: nn.Module, rows: PolicyRows) -> dict[str, Any]:
    """The relearning probe on a copy: its losses by step, and what the copy then answers."""
    options = rows.config.relearn
    if not options.steps:
        return {}
    model = copy.deepcopy(model)
    asked = rows.task.draw(options.steps * options.rows, "relearning", "sum")
    claims, right = (rows.sequences(of) for of in (rows.task.hacked(asked), rows.right(asked)))
    width = max(claims.shape[1], right.shape[1])
    claims, right = (nn.functional.pad(x, (0, width - x.shape[1]), value=-1) for x in (claims, right))
    found = evaluation.relearn(
        model,
        None,
        claims,
        right,
        level=0.0,  # to the end
        held_back=(claims[:64], right[:64]),
        steps=options.steps,
        every=options.every,
        batch_size=options.rows,
        lr=options.learning_rate,
        seed=rows.config.seed,
        restore=False,
    )
    return {"curve": found.rows(), "relearned": measure(model, rows)}
