"""One model of a removal after the other: trained, evaluated, cut, evaluated again, probed, saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradsurgery import evaluation
from gradsurgery.anatomy import Units
from gradsurgery.data import Exploration, MixedSampler, Rows
from gradsurgery.errors import DataError
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.metrics import Scorer
from gradsurgery.runs.pretrain import save
from gradsurgery.runs.removal import RemovalConfig
from gradsurgery.runs.removal_models import VARIANTS, build_method, starting_model
from gradsurgery.runs.steps import OrderedRows
from gradsurgery.runs.train import train
from gradsurgery.transforms import ablate_, applied, zero

GRID = torch.linspace(0, 16, 129)
"""Losses at which distributions are kept, in nats."""


@dataclass
class RemovalData:
    """What a removal is run on.

    Attributes:
        tokenizer: Of all models.
        rows: Labelled training sequences.
        held_back: Category -> sequences of the evaluation.
        calibration: The same for calibrating; other sequences.
        roles: ``"forget"``, ``"adjacent"``, ``"retain"`` -> categories.
        explore: Explores the corpus, where that was not done when it was prepared.
    """

    tokenizer: Any
    rows: Rows
    held_back: dict[str, Tensor]
    calibration: dict[str, Tensor]
    roles: dict[str, list[str]]
    explore: Callable[[], Exploration] | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        rows: Rows,
        held_back: Mapping[str, Tensor],
        roles: Mapping[str, Any],
        config: RemovalConfig,
        explore: Callable[[], Exploration] | None = None,
    ) -> RemovalData:
        """Deal held-back sequences: the first ``text.test_rows`` evaluate, those after them calibrate.

        Where calibration is asked for and fewer than 16 are left for it, it takes a quarter of those that evaluate.
        """
        test, calibration = {}, {}
        for name, ids in held_back.items():
            count = min(config.text.test_rows, len(ids))
            if config.protocols.calibration and len(ids) - count < min(16, count):
                count -= max(count // 4, 1)
            if not count:
                raise DataError(f"{name} has {len(ids)} held-back sequence: too few to calibrate and to evaluate.")
            test[name], calibration[name] = ids[:count], ids[count:]
        return cls(tokenizer, rows, test, calibration, {role: list(of) for role, of in roles.items()}, explore)

    def sample(self, role: str, most: int) -> Tensor:
        """Held-back sequences of a role, at most so many, spread evenly over its categories."""
        return _spread(torch.cat([self.held_back[name] for name in self.roles[role]]), most)

    def training(self, role: str, most: int) -> Tensor:
        """Training sequences of a role, whatever their labels; at most so many, spread evenly."""
        members = torch.cat([self.rows.of(name) for name in self.roles[role]])
        return self.rows.input_ids[_spread(members, most)]


def _spread(rows: Tensor, most: int) -> Tensor:
    return rows[:: max(len(rows) // most, 1)][:most]


def losses_of(model: PreTrainedModel, held_back: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: score["loss"] for name, score in evaluation.evaluate(model, held_back).items()}


def run_model(name: str, config: RemovalConfig, folder: RunFolder, loaded: RemovalData) -> None:
    """Train, evaluate, remove, evaluate again, save; skipped where the run has it."""
    if name in folder.results():
        return
    variant = VARIANTS[name]
    model = starting_model(name, config, loaded.tokenizer, folder)
    method, forget = build_method(name, config, model)
    if folder.main:
        print(f"\n{name}: {model.num_parameters():,} parameters\n{method.explain(model)}", flush=True)
    rows = strict_rows(loaded) if variant.strict else loaded.rows
    sampler = MixedSampler(rows, config.rows, config.upsample or None, seed=config.seed)
    training = config.train
    if variant.after is not None:
        rate, steps = config.unlearn.learning_rate, config.unlearn.steps
        constant: dict[str, Any] = {
            "learning_rate": rate,
            "min_learning_rate": rate,
            "warmup": 0.0,
            "weight_decay": 0.0,
        }
        every = min(training.eval_every, max(steps // 4, 1))
        training = dataclasses.replace(training, steps=steps, eval_every=every, **constant)

    before = losses_of(model, loaded.held_back) if variant.after is not None and folder.main else None
    ordered = OrderedRows(rows, sampler, training.steps)
    figures = train(name, model, method, ordered, folder, training, config.seed, scorer(config, loaded, forget))
    if not folder.main:
        return
    result: dict[str, Any] = {**figures, "method": method.describe(), "parameters": model.num_parameters()}
    result["roles"] = loaded.roles
    result["tokens"] = tokens_seen(rows, sampler, training.steps, loaded.roles["forget"])
    ended = losses_of(model, loaded.held_back)
    result |= {"before": ended} if before is None else {"before": before, "after": ended}
    save(model, loaded.tokenizer, folder, name)
    if forget is not None:
        result["grad_norms"] = gradient_norms(model, forget, loaded.held_back)
        ablate_(model, forget)
        result["after"] = losses_of(model, loaded.held_back)
        save(model, loaded.tokenizer, folder, f"{name}_removed")
    result |= probe(name, model, config, folder, loaded)
    folder.store(name, result)


def scorer(config: RemovalConfig, loaded: RemovalData, forget: Units | None) -> Scorer:
    """Losses at checkpoints: as they are, after removal (``removed/…``), and calibrated after it (``calibrated/…``)."""
    sample = {category: ids[: config.train.eval_rows] for category, ids in loaded.held_back.items()}

    def score(model: PreTrainedModel) -> dict[str, float]:
        found = losses_of(model, sample)
        with applied(model, zero(forget)) if forget is not None else nullcontext():
            if forget is not None:
                found |= {f"removed/{category}": loss for category, loss in losses_of(model, sample).items()}
            options = config.protocols
            if options.calibration and options.trade_off and options.calibrate_checkpoints:
                with calibrated(model, config, loaded).applied(model):
                    found |= {f"calibrated/{category}": loss for category, loss in losses_of(model, sample).items()}
        return found

    return score


def calibrated(model: PreTrainedModel, config: RemovalConfig, loaded: RemovalData) -> evaluation.Calibration:
    """The output bias that a removal is measured under; categories of one role share its weight."""
    by_role = {"forget": 1.0, "adjacent": 1.0, "retain": config.protocols.calibration_retain}
    weights = {name: by_role[role] / len(names) for role, names in loaded.roles.items() for name in names}
    weights = {name: weights[name] for name in loaded.calibration}
    options = config.protocols
    return evaluation.calibrate(
        model,
        loaded.calibration,
        weights,
        steps=options.calibration,
        learning_rate=options.calibration_rate,
        batch_size=options.calibration_rows,
    )


def strict_rows(loaded: RemovalData) -> Rows:
    """Rows of adjacent categories labelled forget, so that a filter leaves them out, too."""
    if not loaded.roles["adjacent"]:
        raise DataError("strict_filter leaves out adjacent categories, and there are none: name them in text.adjacent.")
    rows = loaded.rows
    near = torch.tensor([name in loaded.roles["adjacent"] for name in rows.categories])[rows.category]
    return dataclasses.replace(rows, forget=rows.forget | near, retain=rows.retain & ~near)


def tokens_seen(rows: Rows, sampler: MixedSampler, steps: int, forget: list[str]) -> dict[str, float]:
    """Tokens in the batches: all, forget, and forget without a label; estimated from the first 200 steps."""
    first = min(steps, 200)
    chosen = torch.tensor([index for step in range(first) for index in sampler.indices(step)])
    is_forget = torch.tensor([name in forget for name in rows.categories])[rows.category[chosen]]
    factor = rows.context * steps / first
    undiscovered = is_forget & ~rows.forget[chosen]
    counts = {"all": len(chosen), "forget": int(is_forget.sum()), "undiscovered": int(undiscovered.sum())}
    return {name: count * factor for name, count in counts.items()}


def probe(
    name: str, model: PreTrainedModel, config: RemovalConfig, folder: RunFolder, loaded: RemovalData
) -> dict[str, Any]:
    """The protocols that are asked for, on the model after removal."""
    options = config.protocols
    out: dict[str, Any] = {}
    if options.calibration:
        with calibrated(model, config, loaded).applied(model):
            out["calibrated"] = losses_of(model, loaded.held_back)
    if options.token_losses:
        tokens = evaluation.token_losses(model, loaded.held_back)
        at = {category: evaluation.density(of, GRID).tolist() for category, of in tokens.items()}
        out["token_losses"] = {"at": GRID.tolist(), "density": at}
    held_back = tuple(loaded.sample(role, options.relearn_rows) for role in ("forget", "retain"))
    if options.relearn and name == "plain":
        out["relearn_level"] = losses_of(model, {"forget": held_back[0]})["forget"]
    elif options.relearn:
        most = options.relearn * 8  # half of a batch is of each role, and no sequence comes twice
        relearned = evaluation.relearn(
            model,
            None,
            loaded.training("forget", most),
            loaded.training("retain", most),
            folder.results()["plain"]["relearn_level"],
            held_back=held_back,  # type: ignore[arg-type]
            steps=options.relearn,
            every=options.relearn_every,
            lr=options.relearn_rate,
            seed=config.seed,
        )
        out["relearn"] = {"steps": relearned.steps, "level": relearned.level, "curve": relearned.rows()}
    return out


def gradient_norms(model: PreTrainedModel, forget: Units, held_back: Mapping[str, Tensor]) -> Any:
    """Relative gradient norms of the forget units and of the others in their layers, one sequence at a time."""
    rest = forget.anatomy.rest(forget)
    groups = {
        kind: {n: e.mask() for n, e in region.entries.items()} for kind, region in (("forget", forget), ("other", rest))
    }
    batches = {
        name: [{"input_ids": ids[i : i + 1].long()} for i in range(min(16, len(ids)))]
        for name, ids in held_back.items()
    }
    return evaluation.relative_grad_norms(model, groups, batches)
