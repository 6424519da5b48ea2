"""Every method on every host ends where the plain loop does, to the last bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import BatchError, PlanError, SelectionError
from tests.engines.equality import TOLERANCE, alone
from tests.engines.methods import CASES, batches, optimizer_of, share
from tests.engines.ranks import full
from tests.integrations.hosts import HOSTS, equal, loop, trainer
from tests.surgery.tiny import batch, build, gap, sgtm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

NEEDS = {"accelerate": "accelerate", "fabric": "lightning_fabric", "trainer": "accelerate", "sft": "trl"}
QUICK = {"accelerate", "fabric"}  # a Trainer takes a second to build


def forget_accelerate() -> None:
    """Accelerate keeps its precision and where its data loaders are for the whole process."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def cells() -> list[Any]:
    return [
        pytest.param(host, name, marks=() if host in QUICK or case.quick else pytest.mark.slow)
        for host in HOSTS
        for name, case in CASES.items()
    ]


@pytest.mark.parametrize(("host", "name"), cells())
def test_a_host_is_the_plain_loop(host: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[host])
    found = equal(host, name, tmp_path)
    assert isinstance(found, float) and found <= TOLERANCE[host], found


@pytest.mark.parametrize("name", ["gru", "private_finetune"])
def test_micro_batches_of_a_trainer_are_one_batch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    assert gap(trainer(name, tmp_path, micro=2), alone(name)) <= 1e-12


@pytest.mark.parametrize("name", ["tiered", "opposed"])
def test_accelerate_and_fabric_in_bf16_are_autocast_by_hand(name: str) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning_fabric")
    from accelerate import Accelerator
    from lightning_fabric import Fabric

    found = []
    forget_accelerate()  # one precision a process otherwise
    for kind in ("hand", "accelerate", "fabric"):
        host, method = CASES[name].start(torch.float32)
        optimizer = optimizer_of(host)
        if kind == "hand":
            with torch.autocast("cpu", torch.bfloat16):
                loop(host, optimizer, method, torch.Tensor.backward)
        elif kind == "accelerate":
            accelerator = Accelerator(cpu=True, mixed_precision="bf16")
            wrapped, stepper = accelerator.prepare(host, optimizer)
            loop(wrapped, stepper, method, accelerator.backward)
        else:
            fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
            wrapped, stepper = fabric.setup(host, optimizer)
            loop(wrapped, stepper, method, fabric.backward)
        found.append(full(host))
    forget_accelerate()
    assert gap(found[0], found[1]) <= 1e-6 and gap(found[0], found[2]) <= 1e-6


def test_accelerates_own_accumulation_and_num_items_are_one_too_many() -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    forget_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build()
    wrapped, stepper = accelerator.prepare(model, optimizer_of(model))
    with gs.attach(gs.methods.plain(), wrapped, stepper) as surgery:
        with pytest.raises(PlanError, match="divides each by gradient_accumulation_steps=2 again"):
            surgery.backward(batch(), num_items=10, backward=accelerator.backward)
        assert all(p.grad is None for p in model.parameters())


def test_accelerates_own_accumulation_averages_micro_batches() -> None:
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    forget_accelerate()
    host, method = CASES["opposed"].start()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, stepper = accelerator.prepare(host, optimizer_of(host))
    with gs.attach(method, wrapped, stepper) as surgery:
        for whole in batches(method):
            for k in range(2):
                with accelerator.accumulate(wrapped):
                    surgery.backward(share(whole, k, 2), backward=accelerator.backward)
                    stepper.step()
                    stepper.zero_grad()
        assert surgery.step == 3
    other, method = CASES["opposed"].start()
    optimizer = optimizer_of(other)
    with gs.attach(method, other, optimizer) as surgery:
        for whole in batches(method):
            for k in range(2):
                surgery.backward(share(whole, k, 2), backward=lambda loss, **more: (loss / 2).backward(**more))
            optimizer.step()
            optimizer.zero_grad()
    assert gap(full(host), full(other)) <= 1e-12


class TestSFT:
    """What the data preparation of TRL's trainer would lose."""

    @pytest.fixture(autouse=True)
    def _needs_trl(self) -> None:
        pytest.importorskip("trl")

    def build(self, directory: Path, rows: list[dict[str, Any]], method: gs.Method, **more: Any) -> Any:
        from datasets import Dataset
        from trl import SFTConfig

        from gradsurgery.data import load_tokenizer
        from gradsurgery.integrations.trl_sft import SurgerySFTTrainer

        args = SFTConfig(str(directory), use_cpu=True, bf16=False, max_steps=1, report_to=[], **more)
        model = build(vocab_size=len(load_tokenizer()))
        return SurgerySFTTrainer(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(), method=method
        )

    @pytest.mark.parametrize("option", ["packing", "padding_free"])
    def test_packing_is_refused_where_columns_would_be_lost(self, option: str, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match=f"{option}=True puts several rows into one and drops forget, retain"):
            self.build(tmp_path, [{"text": "one"}], sgtm(), **{option: True})

    def test_another_loss_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match="loss_type='dft' is not called"):
            self.build(tmp_path, [{"text": "one"}], gs.methods.plain(), loss_type="dft")

    def test_text_is_tokenised_and_token_flags_are_padded(self, tmp_path: Path) -> None:
        found: list[Any] = []

        def loss(outputs: Any, rows: Any, refs: Any) -> torch.Tensor:
            found.append(rows)
            return gs.losses.causal_lm(outputs, rows, refs)

        rows = [
            {"text": "one two three", "forget": True, "retain": False},
            {"text": "one", "forget": False, "retain": True},
        ]
        method = gs.methods.sgtm(*self.parts(), loss=loss)
        trainer = self.build(tmp_path, rows, method, per_device_train_batch_size=2)
        batch = next(iter(trainer.get_train_dataloader()))
        assert sorted(batch["forget"].tolist()) == [False, True] and batch["forget"].dtype == torch.bool
        trainer.train()
        assert found and found[0]["labels"].shape == found[0]["input_ids"].shape
        from gradsurgery.integrations.trl_sft import flags

        assert flags([[True], [True, True]]).tolist() == [[True, False], [True, True]]

    def test_a_missing_column_is_named(self, tmp_path: Path) -> None:
        trainer = self.build(tmp_path, [{"text": "one", "forget": True}], gs.methods.sgtm(*self.parts()))
        with pytest.raises(BatchError, match="no column 'retain'"):
            trainer.train()

    def test_a_method_of_another_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SelectionError, match="another model"):
            self.build(tmp_path, [{"text": "one", "forget": True, "retain": True}], sgtm("gpt_neo"))

    def parts(self) -> tuple[gs.Anatomy, gs.Units]:
        from gradsurgery.data import load_tokenizer
        from tests.surgery.tiny import anatomy, forget_of

        size = len(load_tokenizer())
        return anatomy(vocab_size=size), forget_of(vocab_size=size)
