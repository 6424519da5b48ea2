"""References that switch adapters off, or ask a second model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.errors import PlanError
from tests.losses.models import bits, build, disturb_, inputs, logits, same

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),  # PEFT 0.18, of models that tie nothing
]


def adapted(kind: str = "llama", **more: Any) -> tuple[Any, Any]:
    """A model with LoRA that does something, and the model without."""
    plain = build(kind, tied=kind == "gpt2").eval()
    target = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "down_proj"]
    options = {"r": 2, "target_modules": target, "fan_in_fan_out": kind == "gpt2", "lora_dropout": 0.3, **more}
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    return model, plain


def state(model: nn.Module) -> list[Any]:
    return [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()] + [m.training for m in model.modules()]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"use_dora": True}),
        ("gpt2", {"use_dora": True}),
        ("llama", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_adapters_off(kind: str, more: dict[str, Any]) -> None:
    model, plain = adapted(kind, **more)
    model.train()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)  # PEFT's switch would train it
    before, now = state(model), bits(model)
    reference = gs.losses.adapters_off()
    reference.take(model)
    assert torch.equal(reference(model, inputs()), logits(plain))
    assert not torch.equal(logits(model), logits(plain))
    assert state(model) == before
    assert same(bits(model), now)


def test_exceptions_switch_adapters_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    on = logits(model)
    before = state(model)
    with monkeypatch.context() as patch:
        patch.setattr(model.base_model.model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gs.losses.adapters_off()(model, inputs())
    assert state(model) == before
    assert torch.equal(logits(model), on)


def test_switched_off_before_stays_off() -> None:
    model, plain = adapted()
    with model.disable_adapter():
        gs.losses.adapters_off()(model, inputs())
        assert torch.equal(logits(model), logits(plain))


def test_adapters_of_transformers_itself() -> None:
    plain = build("llama").eval()
    model = copy.deepcopy(plain)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.equal(logits(model), logits(plain))
    assert torch.equal(gs.losses.adapters_off()(model, inputs()), logits(plain))
    assert not torch.equal(logits(model), logits(plain))


def test_prefixes_are_adapters() -> None:
    plain = build("llama").eval()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(copy.deepcopy(plain), config)
    assert torch.equal(gs.losses.adapters_off()(model, inputs()), logits(plain))
    assert model(**inputs()).logits.shape[1] == 10


def test_adapters_that_cannot_be_switched_off() -> None:
    reference = gs.losses.adapters_off()
    with pytest.raises(PlanError, match="no adapters"):
        reference.take(build("llama"))
    merged, _ = adapted()
    merged.merge_adapter()
    with pytest.raises(PlanError, match="unmerge_adapter"):
        reference(merged, inputs())
    biased = peft.get_peft_model(
        build("gpt2"), peft.LoraConfig(r=2, target_modules=["c_fc"], bias="all", fan_in_fan_out=True)
    )
    with pytest.raises(PlanError, match="biases"):
        reference.take(biased)


def test_as_a_reference_of_a_pass() -> None:
    model, _ = adapted()
    batch = {"input_ids": inputs()["input_ids"], "attention_mask": inputs()["attention_mask"]}
    p = gs.Pass("public", gs.losses.kl_divergence, refs={"reference": gs.losses.adapters_off()})
    with gs.attach(gs.Method(passes=[p]), model) as surgery:
        assert surgery.backward(batch)["public"] > 0
    trained = {n for n, q in model.named_parameters() if q.grad is not None}
    assert trained == {n for n, q in model.named_parameters() if q.requires_grad}


def test_frozen() -> None:
    teacher = build("gpt2").train()
    expected, student, now = logits(teacher), build("gpt2", seed=1), bits(teacher)
    reference = gs.losses.frozen(teacher)
    reference.take(student)
    assert torch.equal(reference(student, inputs()), expected)
    assert teacher.training
    assert same(bits(teacher), now)
    disturb_(student)
    assert torch.equal(reference(student, inputs()), expected)


def test_frozen_is_another_model() -> None:
    model = build("gpt2")
    for given in (model, torch.compile(model, backend="eager")):
        with pytest.raises(PlanError, match="shares weights"):
            gs.losses.frozen(given).take(model)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="takes a model"):
        gs.losses.frozen("gpt2")  # type: ignore[arg-type]
