"""The bias is the one a rebuilt model would be given, found by the same steps, and nothing else moves."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradsurgery.errors import DataError
from gradsurgery.evaluation import calibrate, calibration, evaluate
from tests.surgery.tiny import VOCABULARY, build, weights

ROWS = {"forget": torch.randint(3, 30, (6, 8)), "retain": torch.randint(20, VOCABULARY, (9, 8))}
WEIGHTS = {"forget": 1.0, "retain": 3.0}


def rebuilt(model: nn.Module, rows: dict[str, Tensor], steps: int, size: int) -> Tensor:
    """The original procedure: a copy with a bias in its output layer, which alone trains."""
    copied: Any = copy.deepcopy(model).eval().requires_grad_(False)
    start = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(42)) * 0.1
    copied.lm_head.bias = nn.Parameter(start)
    optimizer = torch.optim.AdamW([copied.lm_head.bias], lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps - 1)
    for step in range(steps):
        optimizer.zero_grad()
        for name, ids in rows.items():
            batch = torch.stack([ids[(step * size + k) % len(ids)] for k in range(size)])
            logits = copied(input_ids=batch, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            (WEIGHTS[name] * loss).backward()
        optimizer.step()
        schedule.step()
    return copied.lm_head.bias.detach()


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])  # gpt_neo's output layer is tied to its embeddings
def test_equals_a_rebuilt_model_and_leaves_everything_as_it_was(kind):
    model = build(kind)
    next(model.parameters()).requires_grad_(False)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    found = calibrate(model, ROWS, WEIGHTS, steps=7, batch_size=4)
    torch.testing.assert_close(found.bias, rebuilt(model, ROWS, 7, 4), rtol=1e-4, atol=1e-6)
    assert found.temperature == 1.0
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert flags == [p.requires_grad for p in model.parameters()] and model.training
    assert all(p.grad is None for p in model.parameters())
    plain = evaluate(model, ROWS)
    with found.applied(model):
        assert evaluate(model, ROWS) != plain
    assert evaluate(model, ROWS) == plain


@pytest.mark.parametrize("kind", ["llama", "gpt_neo"])
def test_kept_activations_change_nothing(kind, monkeypatch):
    """The model runs once for each sequence, however many steps; without room for that in every step."""
    model, runs = build(kind), []
    rows = {"forget": ROWS["forget"].clone(), "retain": ROWS["retain"]}
    rows["forget"][:2, 5:] = -1
    model.register_forward_pre_hook(lambda _, args, kwargs: runs.append(len(kwargs["input_ids"])), with_kwargs=True)
    kept = calibrate(model, rows, WEIGHTS, steps=30, batch_size=4, temperature=True)
    assert sum(runs) == 6 + 9
    monkeypatch.setattr(calibration, "CACHE", 100)
    again = calibrate(model, rows, WEIGHTS, steps=30, batch_size=4, temperature=True)
    assert sum(runs) > 30 * 8
    torch.testing.assert_close(kept.bias, again.bias, rtol=1e-4, atol=1e-5)
    assert kept.temperature == pytest.approx(again.temperature, rel=1e-4)
    assert kept.objective == pytest.approx(again.objective, rel=1e-4)


def test_logits_that_the_model_changes_are_not_kept():
    """Capped logits: the bias is added before the cap, as the output layer's own would be."""
    model = build("llama")
    layer = model.lm_head
    stock: Any = type(model)

    class Capped(stock):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 2 * torch.tanh(out.logits / 2)
            return out

    model.__class__ = Capped
    found = calibrate(model, ROWS, WEIGHTS, steps=7, batch_size=4)
    torch.testing.assert_close(found.bias, rebuilt(model, ROWS, 7, 4), rtol=1e-4, atol=1e-6)
    assert not layer._forward_hooks


def test_finds_the_optimum_where_it_is_known():
    """Logits 0 everywhere: the best bias of one category are the log-frequencies of its next tokens."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids = torch.tensor([[5, 5, 5, 6, 6, 7, 7, 7, 7]])
    found = calibrate(model, {"a": ids}, {"a": 1.0}, steps=300, learning_rate=0.2)
    frequencies = torch.zeros(VOCABULARY).index_add_(0, ids[0, 1:], torch.ones(8)) / 8
    torch.testing.assert_close(found.bias.softmax(0), frequencies, atol=1e-2, rtol=0)
    assert found.objective[1] == pytest.approx(torch.special.entr(frequencies).sum().item(), abs=1e-2)


def test_the_temperature_is_found_again():
    """A model whose logits are three times too large, on text that it wrote itself."""
    model, generator = build("llama").eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
        ids = torch.randint(3, VOCABULARY, (64, 1), generator=generator)
        for _ in range(11):
            ids = torch.cat(
                [ids, model(input_ids=ids).logits[:, -1].softmax(-1).multinomial(1, generator=generator)], 1
            )
        model.lm_head.weight.mul_(3)
    found = calibrate(
        model, {"a": ids}, {"a": 1.0}, steps=150, learning_rate=0.03, batch_size=64, temperature=True, bias_std=0.0
    )
    assert found.temperature == pytest.approx(3.0, rel=0.15)
    assert found.objective[1] < found.objective[0]


@pytest.mark.parametrize(
    ("rows", "given", "options", "said"),
    [
        (ROWS, {"forget": 1.0}, {}, "one weight for each category"),
        ({}, {}, {}, "one weight"),
        ({"a": torch.zeros(0, 4)}, {"a": 1.0}, {}, "nothing to predict"),
        (ROWS, {"forget": 0.0, "retain": 0.0}, {}, "not all of them 0"),
        (ROWS, {"forget": 1.0, "retain": -1.0}, {}, "from 0"),
        (ROWS, WEIGHTS, {"steps": 0}, "steps=0"),
    ],
)
def test_refusals(rows, given, options, said):
    with pytest.raises(DataError, match=said):
        calibrate(build("llama"), rows, given, **options)


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(DataError, match="no output layer"):
        calibrate(nn.Linear(2, 2), ROWS, WEIGHTS)
