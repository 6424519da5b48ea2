"""Adapters: nothing until they learn, exactly their matrices afterwards, gone without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import gradsurgery as gs
from gradsurgery.adapters.places import places_of
from gradsurgery.errors import ArtefactError, GradsurgeryError, PlanError, SelectionError
from tests.adapters.tiny import MODELS, adapted, batch, clear, grads, logits, model_of, options, size, stir

QUICK = settings(max_examples=8, deadline=None)


@pytest.mark.parametrize("name", MODELS)
@QUICK
@given(options(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_an_adapter_is_nothing_until_it_is_trained(name: str, chosen: dict[str, Any], dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    before, frozen = logits(model), list(model.parameters())[:2]
    for p in frozen:
        p.requires_grad_(False)
    trains = [p.requires_grad for p in model.parameters()]
    names, kind = list(model.state_dict()), type(model)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    state = torch.random.get_rng_state()
    adapter = gs.adapters.add(model, **chosen)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(model), before) and torch.equal(logits(adapter.host), before)
    assert list(model.state_dict()) == names and type(model) is kind
    assert not any(p.requires_grad for p in model.parameters())
    adapter.remove()
    assert torch.equal(logits(model), before) and [p.requires_grad for p in model.parameters()] == trains
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
@QUICK
@given(options())
def test_every_tensor_of_both_parts_learns_at_once(name: str, chosen: dict[str, Any]) -> None:
    adapter = gs.adapters.add(model_of(name), **chosen)
    adapter.host(**batch()).loss.backward()
    for part in ("kept", "quarantine"):
        assert all(bool(g.any()) for g in grads(adapter, part).values())
    trained = {id(p) for p in adapter.parameters() if p.requires_grad}
    both = {**adapter.parameters_of("kept"), **adapter.parameters_of("quarantine")}
    assert trained == {id(p) for p in both.values()}
    assert adapter.kept.numel() + adapter.quarantine.numel() == sum(p.numel() for p in both.values())


def matrices(adapter: Any, part: str) -> dict[str, torch.Tensor]:
    """What a part adds to each weight, from its parameters, the slow way."""
    out = {}
    for (path, _), own in zip(adapter.coordinates.items(), adapter.parts.values(), strict=True):
        branch = getattr(own, part)
        if hasattr(branch, "down0"):
            a, b = branch.down0 + branch.down.weight, branch.up0 + branch.up.weight
            out[path] = (b @ a - branch.up0 @ branch.down0).detach() * branch.scale
        else:
            gains = branch.weight if branch.axes is None else branch.axes.T @ branch.weight
            out[path] = (own.left @ torch.diag(gains) @ own.right).detach()
    return out


def with_weights(model: Any, changes: list[dict[str, torch.Tensor]]) -> Any:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for place in places_of(model, "all-linear"):
            for change in changes:
                place.weight_OI.add_(change[place.path])
    return model


@pytest.mark.parametrize("name", MODELS)
@QUICK
@given(options())
def test_it_adds_its_matrices_to_the_weights(name: str, chosen: dict[str, Any]) -> None:
    plain = model_of(name, torch.float64)
    adapter = adapted(name, torch.float64, **chosen)
    kept, quarantined = matrices(adapter, "kept"), matrices(adapter, "quarantine")
    tolerance = 1e-9 * float(logits(plain).abs().max()) if name != "mixtral" else 1e-4  # experts round in fp32
    expected = logits(with_weights(plain, [kept, quarantined]))
    assert (logits(adapter.model) - expected).abs().max() <= tolerance
    assert (expected - logits(plain)).abs().max() > 1e-3
    with adapter.without("quarantine"):
        alone = logits(adapter.model)
        assert (alone - logits(with_weights(plain, [kept]))).abs().max() <= tolerance
    with adapter.without("kept"):
        assert (logits(adapter.model) - logits(with_weights(plain, [quarantined]))).abs().max() <= tolerance
    with adapter.without("kept", "quarantine"):
        assert torch.equal(logits(adapter.model), logits(plain))
    adapter.ablate_()
    assert torch.equal(logits(adapter.model), alone)
    adapter.fold_()
    assert (logits(adapter.model) - alone).abs().max() <= tolerance
    adapter.remove()
    assert (logits(adapter.model) - alone).abs().max() <= tolerance


@pytest.mark.parametrize("name", MODELS)
@QUICK
@given(options())
def test_ablation_brings_the_first_function_back(name: str, chosen: dict[str, Any]) -> None:
    adapter = gs.adapters.add(model_of(name), **chosen)
    before = logits(adapter.model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    with gs.attach(gs.methods.quarantine(adapter), adapter.host, optimizer) as surgery:
        for seed in range(2):
            surgery.backward({**batch(seed=seed), "flag": torch.ones(5, dtype=torch.bool)})
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(logits(adapter.model), before)
    adapter.ablate_(optimizer=optimizer)
    assert torch.equal(logits(adapter.model), before)
    assert not any(p in optimizer.state for p in adapter.parameters_of("quarantine").values())
    assert all(not bool(p.any()) for p in adapter.parameters_of("kept").values())  # flagged rows never reached it


@pytest.mark.parametrize("kind", ["lora", "svd"])
def test_other_ways_to_ablate(kind: str) -> None:
    adapter = adapted("llama", kind=kind, rank=8)
    with adapter.without("quarantine"):
        alone = logits(adapter.model)
    adapter.ablate_("normal", torch.Generator().manual_seed(1))
    kept, drawn = adapter.parameters_of("kept"), adapter.parameters_of("quarantine")
    for name, p in drawn.items():
        other = kept[adapter.counterpart(name)].detach()
        assert 0.3 < float(p.detach().square().mean().sqrt() / other.square().mean().sqrt()) < 2.0
        assert not torch.equal(p, other)
    adapter.ablate_("zero")
    assert torch.equal(logits(adapter.model), alone)
    adapter.host(**batch()).loss.backward()
    assert size(grads(adapter, "quarantine")) == 0 < size(grads(adapter, "kept"))
    with pytest.raises(PlanError, match="reinit"):
        adapter.ablate_("nothing")  # type: ignore[arg-type]


def test_weight_decay_goes_towards_the_first_function() -> None:
    adapter = adapted("llama", rank=4)
    with adapter.without("kept", "quarantine"):
        before = logits(adapter.model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1.0, weight_decay=0.9)
    for _ in range(40):
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    assert torch.allclose(logits(adapter.model), before, atol=1e-5)


def test_transforms_reach_the_parts_as_regions() -> None:
    adapter = adapted("gpt_neo", rank=3)
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    frozen = {name: p.detach().clone() for name, p in adapter.parameters_of("kept").items()}
    decays = gs.decay_to(adapter.quarantine, adapter.initial(), rate=0.5)
    method = gs.Method(
        [gs.Pass("all", under=[gs.scale(adapter.quarantine, 2.0)])], update=[gs.freeze(adapter.kept), decays]
    )
    with gs.attach(method, adapter.host, optimizer) as surgery:
        surgery.backward(batch())
        optimizer.step()
    assert all(torch.equal(p, frozen[name]) for name, p in adapter.parameters_of("kept").items())
    clear(adapter)
    with gs.applied(adapter.host, gs.mask(adapter.kept, where=torch.tensor([True] * 5))):
        adapter.host(**batch()).loss.backward()
    assert size(grads(adapter, "kept")) == 0 < size(grads(adapter, "quarantine"))


@QUICK
@given(options())
def test_capacity_is_reported(chosen: dict[str, Any]) -> None:
    adapter = gs.adapters.add(model_of(), **chosen)
    found = adapter.describe()
    assert found["kept"] == adapter.kept.numel() and found["quarantine"] == adapter.quarantine.numel()
    assert found["capacity"]["parameters"] == adapter.quarantine.numel() / adapter.kept.numel()
    changes = {}
    for part in ("kept", "quarantine"):  # the Frobenius norm of a change by random signs, drawn
        for p in adapter.parameters_of(part).values():  # type: ignore[arg-type]
            p.detach().copy_(1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).sign())
        changes[part] = sum(float(m.square().sum()) for m in matrices(adapter, part).values()) ** 0.5
    drawn = changes["quarantine"] / changes["kept"]
    assert found["capacity"]["frobenius"] == pytest.approx(drawn, rel=0.3)
    groups = [
        {"params": list(adapter.parameters_of(part).values()), "lr": lr}
        for part, lr in (("kept", 0.1), ("quarantine", 0.2))
    ]  # type: ignore[arg-type]
    rated = adapter.describe(torch.optim.SGD(groups))["capacity"]["learning_rate"]
    assert rated == pytest.approx(2 * found["capacity"]["frobenius"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@QUICK
@given(options())
def test_files(name: str, tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    adapter = adapted(name, **chosen)
    expected = logits(adapter.model)
    adapter.save(path)
    adapter.remove()
    plain = logits(adapter.model)
    again = gs.adapters.load(path, adapter.model)
    assert torch.equal(logits(adapter.model), expected) and again.fingerprint == adapter.fingerprint
    again.ablate_()
    again.remove()
    assert torch.equal(logits(adapter.model), plain)
    with pytest.raises(ArtefactError, match="another model"):
        gs.adapters.load(path, model_of("gpt_neo"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match="truncated"):
        gs.adapters.load(path, adapter.model)


def test_axes_of_a_direction_are_reserved(tmp_path: Path) -> None:
    first = adapted("llama", torch.float64, kind="svd", rank=10)
    generator = torch.Generator().manual_seed(0)
    axes = {
        path: torch.linalg.qr(torch.randn(n, 2, generator=generator, dtype=torch.float64))[0].T
        for path, n in first.coordinates.items()
    }
    first.remove()
    second = stir(gs.adapters.add(first.model, kind="svd", rank=10, reserved=axes))
    for (path, own), part in zip(axes.items(), second.parts.values(), strict=True):
        kept, quarantined = part.kept, part.quarantine  # type: ignore[union-attr]
        assert (own @ kept.gains()).abs().max() < 1e-12  # type: ignore[union-attr, operator]
        inside = own.T @ (own @ quarantined.gains())  # type: ignore[union-attr, operator]
        assert torch.allclose(inside, quarantined.gains()), path  # type: ignore[union-attr, operator]
        assert kept.weight.numel() + quarantined.weight.numel() == 10  # type: ignore[union-attr, operator]
    expected = logits(second.model)
    second.save(tmp_path / "a.safetensors")
    second.remove()
    gs.adapters.load(tmp_path / "a.safetensors", second.model)
    assert torch.equal(logits(second.model), expected)


class FourBit(nn.Linear):
    """Looks like a packed layer of bitsandbytes."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, bias=False)
        self.real = of.weight.detach()
        packed = nn.Parameter(torch.zeros(of.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        shape = tuple(of.weight.shape)
        state = {"quant_type": "nf4", "shape": shape, "blocksize": 2, "nested": False}
        packed.quant_state = type("State", (), state)()  # type: ignore[attr-defined]
        self.weight = packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.real)


def test_a_quantised_base() -> None:
    model = model_of()
    expected = logits(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj = FourBit(layer.self_attn.q_proj)
    for given_kind in ("svd",):
        with pytest.raises(PlanError, match=r"quantised \(nf4\)"):
            gs.adapters.add(model, "q_proj", kind=given_kind)  # type: ignore[arg-type]
    adapter = gs.adapters.add(model, "q_proj", rank=4)
    assert torch.equal(logits(model), expected)
    stir(adapter)
    adapter.host(**batch()).loss.backward()
    assert size(grads(adapter, "kept")) > 0
    with pytest.raises(PlanError, match="quantised"):
        adapter.fold_()


BAD: list[tuple[dict[str, Any], type[GradsurgeryError], str]] = [
    ({"rank": 31}, PlanError, "more than model.layers.0.self_attn.k_proj has"),
    ({"rank": 4, "quarantine_rank": 31}, PlanError, "quarantine_rank=31"),
    ({"rank": 0}, PlanError, "positive"),
    ({"rank": True}, PlanError, "positive"),
    ({"rank": 4, "alpha": -1.0}, PlanError, "alpha"),
    ({"rank": 4, "kind": "dora"}, PlanError, "kind"),
    ({"kind": "svd", "alpha": 1.0}, PlanError, "alpha"),
    ({"rank": 4, "reserved": True}, PlanError, "singular"),
    ({"kind": "svd", "reserved": True}, PlanError, "quarantine_rank"),
    ({"kind": "svd", "rank": 4, "quarantine_rank": 4, "reserved": True}, PlanError, "nothing"),
    ({"kind": "svd", "rank": 4, "quarantine_rank": 5}, PlanError, "quarantine_rank=5"),
    ({"kind": "svd", "reserved": 3}, PlanError, "reserved"),
    ({"kind": "svd", "rank": 4, "reserved": {"elsewhere": torch.eye(4)[:1]}}, SelectionError, "no axes"),
    ({"rank": 4, "seed": 0.5}, PlanError, "seed"),
    ({"modules": "no_such_layer"}, SelectionError, "matches no parameter"),
    ({"modules": "embed_tokens"}, SelectionError, "Embedding"),
    ({"modules": "norm"}, SelectionError, "names no"),
]


@pytest.mark.parametrize(("chosen", "error", "message"), BAD)
def test_bad_input_changes_nothing(chosen: dict[str, Any], error: type[GradsurgeryError], message: str) -> None:
    model = model_of()
    with pytest.raises(error, match=message):
        gs.adapters.add(model, **chosen)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_copies_and_checkpoints_are_stock(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    adapter: Any = adapted("llama", rank=4)
    twin = copy.deepcopy(adapter.model)
    expected = logits(adapter.model)
    assert torch.equal(logits(twin), expected) and list(twin.state_dict()) == list(adapter.model.state_dict())
    adapter.ablate_()
    assert not torch.equal(logits(adapter.model), expected) and torch.equal(logits(twin), expected)
    adapter.model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in adapter.model.state_dict().items() if name in found)
    assert set(found) <= set(adapter.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_a_hosts_state_is_written_once_and_read_whole(name: str, tmp_path: Path) -> None:
    """Tied weights stand in it under one name, as safetensors want it; the names left out come back with it."""
    adapter, other = adapted(name, rank=3), adapted(name, rank=3, seed=1)
    state = adapter.host.state_dict()
    storages = [value.data_ptr() for value in state.values()]
    assert len(set(storages)) == len(storages)
    save_file(state, tmp_path / "host.safetensors")
    with torch.no_grad():
        for parameter in other.host.parameters():
            parameter.zero_()
    other.host.load_state_dict(load_file(tmp_path / "host.safetensors"))
    assert torch.equal(logits(adapter.model), logits(other.model))
    tied = model_of(name).config.tie_word_embeddings
    assert tied == (len(state) < len(dict(adapter.host.named_parameters(remove_duplicate=False))))


def test_it_compiles() -> None:
    adapter = adapted("llama", rank=4)
    expected = logits(adapter.model)
    compiled: Any = torch.compile(adapter.host, backend="aot_eager", fullgraph=True)
    assert torch.allclose(logits(compiled), expected, atol=1e-5)
    with adapter.without("quarantine"):
        assert torch.allclose(logits(compiled), logits(adapter.model), atol=1e-5)
        assert not torch.allclose(logits(compiled), expected, atol=1e-5)


def test_one_adapter_a_layer() -> None:
    adapter = adapted("llama", modules="q_proj")
    with pytest.raises(PlanError, match="already"):
        gs.adapters.add(adapter.model, "all-linear", rank=2)
    with pytest.raises(PlanError, match="without takes"):
        adapter.without("nothing").__enter__()
    adapter.remove()
    gs.adapters.add(adapter.model, "all-linear", rank=2)
