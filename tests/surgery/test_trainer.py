"""``gs.SurgeryTrainer``: a stock Trainer's run with a method in it; every private name it leans on has a test here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, BatchError, PlanError
from gradsurgery.surgery import SurgeryTrainer
from tests.surgery.test_attach import traces
from tests.surgery.tiny import anatomy, batch, build, checkpointing, cut, gap, sgtm, weights

pytest.importorskip("accelerate")
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")

ROWS = 12


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    """Rows of a batch, without the first label: nothing predicts it, but Trainers before transformers 5.10 count it."""
    whole = batch(count)
    whole["labels"][:, 0] = -100
    return [{name: value[k] for name, value in whole.items()} for k in range(count)]


def arguments(directory: Path, **more: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "output_dir": str(directory),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return TrainingArguments(**{**fields, **more})


def ours(found: dict[str, Any]) -> dict[str, Any]:
    """What a surgery could have left; a stock Trainer leaves attributes and a patched forward of its own."""
    return {k: v for k, v in found.items() if k in ("keys", "names", "global", "acting") or k.endswith("/hooks")}


class InOrder(SurgeryTrainer):
    """Batches in the order of the rows, so that runs with and without accumulation see the same ones."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def by_hand(method: gs.Method, model: nn.Module, size: int = 4, steps: int = 3, clip: float = 1.0) -> list[float]:
    """The same run in a plain loop."""
    method = gs.Method(
        method.passes, (*method.gradient, gs.clip(clip)) if not method.gradient else method.gradient, method.update
    )
    decay = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decay], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    norms, whole = [], batch(ROWS)
    with gs.attach(method, model, optimizer) as surgery:
        for k in range(steps):
            start = k * size % ROWS
            surgery.backward(cut(whole, start, start + size))
            optimizer.step()
            optimizer.zero_grad()
            norms.append(surgery.metrics()["grad_norm"])
    return norms


@pytest.mark.parametrize("strategy", ["mask", "zero"])
def test_a_run_equals_the_plain_loop(tmp_path: Path, strategy: str) -> None:
    method = sgtm(strategy=strategy)
    method = gs.Method(method.passes, update=method.update)
    model, hand = build(), build()
    trainer = InOrder(model, arguments(tmp_path), train_dataset=rows(), method=method)
    before = traces(model)
    trainer.train()
    norms = by_hand(method, hand)
    assert gap(weights(model), weights(hand)) < 1e-6
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)  # the norm that was clipped, without frozen entries
    assert all(
        entry["loss"] == pytest.approx(entry["loss/sgtm"]) for entry in trainer.state.log_history if "loss" in entry
    )
    after = traces(model)
    assert ours(after) == ours(before)


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    found = []
    for size, steps in ((4, 1), (1, 4)):
        model = build()
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = InOrder(model, arguments(tmp_path, **more), train_dataset=rows(), method=sgtm())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((weights(model), losses))
    for held, losses in found[1:]:
        assert gap(held, found[0][0]) < 2e-6
        assert losses == pytest.approx(found[0][1], rel=1e-5)


def test_a_method_without_transforms_equals_the_stock_trainer(tmp_path: Path) -> None:
    class Stock(Trainer):
        _get_train_sampler = InOrder._get_train_sampler

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        """The stock loss, summed in blocks as ours: AdamW's first steps make much of another rounding."""
        counted = (labels[:, 1:] != -100).sum()
        return gs.losses.causal_lm(outputs, {"labels": labels}, {}) * counted / num_items_in_batch

    ours, stock = build(), build()
    more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    one = InOrder(ours, arguments(tmp_path, **more), train_dataset=rows(), method=gs.methods.plain())
    two = Stock(stock, arguments(tmp_path, **more), train_dataset=rows(), compute_loss_func=loss)
    one.train()
    two.train()
    assert gap(weights(ours), weights(stock)) < 1e-6
    for a, b in zip(one.state.log_history, two.state.log_history, strict=True):
        for key in ("loss", "grad_norm"):
            assert (key in a) == (key in b)
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-4)


def test_columns_survive_in_training_and_are_gone_in_evaluation(tmp_path: Path) -> None:
    data = [{**row, "note": torch.tensor(1)} for row in rows()]  # a column that nobody knows is dropped
    trainer = SurgeryTrainer(build(), arguments(tmp_path), train_dataset=data, eval_dataset=data, method=sgtm())
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] > 0
    assert trainer.predict(data).predictions.shape[:2] == (ROWS, 7)


def test_evaluation_inside_training_runs_plain(tmp_path: Path) -> None:
    model = build()
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
            seen.append(metrics["eval_loss"])

    more = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": ROWS}
    trainer = SurgeryTrainer(
        model,
        arguments(tmp_path, **more),
        train_dataset=rows(),
        eval_dataset=rows(),
        method=sgtm(),
        callbacks=[Watch()],
    )
    trainer.train()
    whole = batch(ROWS)
    with torch.no_grad():
        model.eval()
        plain = model(**{k: whole[k] for k in ("input_ids", "attention_mask", "labels")}).loss
    assert seen == [pytest.approx(float(plain), rel=1e-5)]


def test_the_callers_arguments_stay_and_a_clip_in_the_method_wins(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_grad_norm=0.3)
    trainer = SurgeryTrainer(build(), args, train_dataset=rows(), method=gs.methods.plain())
    assert args.max_grad_norm == 0.3
    assert trainer.args.max_grad_norm == 0.0
    assert [t.max_norm for t in trainer.method.gradient] == [0.3]  # type: ignore[attr-defined]
    trainer = SurgeryTrainer(build(), args, train_dataset=rows(), method=sgtm())
    assert [t.max_norm for t in trainer.method.gradient] == [0.7]  # type: ignore[attr-defined]
    trainer = SurgeryTrainer(
        build(), arguments(tmp_path, max_grad_norm=0), train_dataset=rows(), method=gs.methods.plain()
    )
    assert trainer.method.gradient == ()
    trainer.train()
    if hasattr(Trainer, "_get_grad_norm"):  # the Trainer's own; before transformers 5.3, it logs only what it clips
        assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_checkpoints_are_stock_and_resume_exactly(tmp_path: Path) -> None:
    once = gs.sample_one(seed=1)
    (p,) = sgtm().passes
    forget, others = gs.Pass("a", under=p.under, when=once), gs.Pass("b", weight=0.5, when=once)
    method = gs.Method([forget, others], [gs.clip(0.7)], sgtm().update)
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = build()
    trainer = InOrder(whole, arguments(tmp_path / "whole", **more), train_dataset=rows(), method=method)
    trainer.train()
    stored = tmp_path / "whole" / "checkpoint-4"
    state = json.loads((stored / "surgery.json").read_text())
    assert (state["step"], state["version"]) == (4, gs.__version__)
    loaded = AutoModelForCausalLM.from_pretrained(stored)
    assert set(loaded.state_dict()) == set(whole.state_dict())
    resumed = build(seed=5)
    again = InOrder(resumed, arguments(tmp_path / "whole", **more), train_dataset=rows(), method=method)
    again.train(resume_from_checkpoint=str(stored))
    assert gap(weights(whole), weights(resumed)) == 0.0
    names = [sorted(k for k in entry if k.startswith("loss/")) for entry in trainer.state.log_history]
    assert [sorted(k for k in entry if k.startswith("loss/")) for entry in again.state.log_history] == names
    other = InOrder(build(), arguments(tmp_path / "whole", **more), train_dataset=rows(), method=sgtm())
    with pytest.raises(ArtefactError, match="another method"):
        other.train(resume_from_checkpoint=str(stored))
    assert other.surgery is None
    (stored / "surgery.json").unlink()  # a stock checkpoint: schedules go on at its step
    stock = InOrder(build(seed=5), arguments(tmp_path / "whole", **more), train_dataset=rows(), method=method)
    stock.train(resume_from_checkpoint=str(stored))
    assert gap(weights(whole), weights(stock.model)) == 0.0


def test_save_model_after_training_keeps_the_record(tmp_path: Path) -> None:
    trainer = SurgeryTrainer(build(), arguments(tmp_path), train_dataset=rows(), method=sgtm())
    trainer.save_model(str(tmp_path / "before"))
    assert not (tmp_path / "before" / "surgery.json").exists()
    trainer.train()
    trainer.save_model(str(tmp_path / "after"))
    assert json.loads((tmp_path / "after" / "surgery.json").read_text())["step"] == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_training_takes_the_surgery_off(tmp_path: Path, error: type[BaseException]) -> None:
    class Burst(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise error("burst")

    model = build()
    before = traces(model)
    trainer = SurgeryTrainer(model, arguments(tmp_path), train_dataset=rows(), method=sgtm(), callbacks=[Burst()])
    with pytest.raises(error, match="burst"):
        trainer.train()
    assert trainer.surgery is None
    after = traces(model)
    assert ours(after) == ours(before)
    trainer.pop_callback(Burst)
    trainer.train()  # and again


def test_missing_columns_are_a_clear_error(tmp_path: Path) -> None:
    data = [{k: v for k, v in row.items() if k != "retain"} for row in rows()]
    trainer = SurgeryTrainer(build(), arguments(tmp_path), train_dataset=data, method=sgtm())
    with pytest.raises(BatchError, match="needs the label column 'retain'"):
        trainer.train()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]}, "inside backward"),
    ],
)
def test_hosts_that_would_be_silently_wrong_are_refused(tmp_path: Path, more: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        SurgeryTrainer(build(), arguments(tmp_path, **more), train_dataset=rows(), method=sgtm())


def test_a_loss_function_of_the_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="compute_loss_func"):
        SurgeryTrainer(build(), arguments(tmp_path), train_dataset=rows(), method=sgtm(), compute_loss_func=len)
    with pytest.raises(PlanError, match="takes method="):
        SurgeryTrainer(build(), arguments(tmp_path), train_dataset=rows(), method="sgtm")  # type: ignore[arg-type]
    with pytest.raises(gs.errors.SelectionError, match="another model"):
        SurgeryTrainer(build("gpt_neo"), arguments(tmp_path), train_dataset=rows(), method=sgtm())


def test_streams_and_several_passes(tmp_path: Path) -> None:
    forget = anatomy().neurons[:, -6:]
    method = gs.Method(
        [
            gs.Pass("public", stream="public", under=[gs.mask(forget)], weight=0.4),
            gs.Pass("private", stream="private", under=[gs.mask(~forget)], weight=0.6),
        ]
    )
    whole = batch(ROWS)
    inputs = {k: whole[k] for k in ("input_ids", "attention_mask", "labels")}
    data = [{s: {k: v[i] for k, v in inputs.items()} for s in ("public", "private")} for i in range(ROWS)]

    def collate(found: list[dict[str, dict[str, torch.Tensor]]]) -> dict[str, dict[str, torch.Tensor]]:
        return {s: {k: torch.stack([row[s][k] for row in found]) for k in inputs} for s in found[0]}

    found = []
    for size, steps in ((4, 1), (1, 4)):
        model = build()
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = InOrder(model, arguments(tmp_path, **more), train_dataset=data, data_collator=collate, method=method)
        trainer.train()
        assert {"loss/public", "loss/private"} <= set(trainer.state.log_history[0])
        found.append(weights(model))
    assert gap(*found) < 2e-6


@pytest.mark.parametrize(
    "more", [{"bf16": True}, {checkpointing(): True}, {"optim": "adafactor"}, {"optim": "adamw_torch_fused"}]
)
def test_engines_of_the_trainer(tmp_path: Path, more: dict[str, Any]) -> None:
    model = build()
    before = weights(model)
    trainer = SurgeryTrainer(model, arguments(tmp_path, **more), train_dataset=rows(), method=sgtm())
    trainer.train()
    (frozen,) = sgtm().update
    for name, p in model.named_parameters():
        held = frozen.region.of(name).mask()  # type: ignore[attr-defined]
        assert torch.equal(p[held], before[name][held])
        assert held.all() or not torch.equal(p, before[name])
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_compiled_by_the_trainer_equals_eager_also_after_an_evaluation(tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build()
        more = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = InOrder(model, arguments(tmp_path, **more), train_dataset=rows(), eval_dataset=rows(4), method=sgtm())
        if compiled:
            trainer.evaluate()  # hooks that came after this compiled call would be ignored
        trainer.train()
        found.append(weights(model))
    torch._dynamo.reset()
    assert gap(*found) < 2e-6


def test_the_trainer_is_imported_on_first_use_alone() -> None:
    code = (
        "import sys, gradsurgery.surgery as s\n"
        "assert 'transformers.trainer' not in sys.modules\n"
        "assert s.SurgeryTrainer and 'transformers.trainer' in sys.modules\n"
        "import importlib.util as u\n"
        "real, u.find_spec = u.find_spec, lambda n, *a: None if n == 'accelerate' else real(n, *a)\n"
        "try: s.SurgeryCallback\n"
        "except ImportError as e: assert 'gradsurgery[recipes]' in str(e)\n"
        "else: raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_private_names_of_the_trainer_still_exist() -> None:
    for name in ("_set_signature_columns_if_needed", "_prepare_inputs"):
        assert callable(getattr(Trainer, name))
