"""Stored gradients are those of single examples, orthonormal by Gram-Schmidt, and survive a file."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, DataError, PlanError, SelectionError
from gradsurgery.estimators import artefacts
from tests.methods import hand

MODELS = {(kind, frozen): hand.build(kind, frozen) for kind in hand.KINDS for frozen in ("none", "every third")}


def flat(model: Any, vector: dict[str, Tensor]) -> Tensor:
    parts = [vector.get(name, torch.zeros_like(p)).reshape(-1) for name, p in model.named_parameters()]
    return torch.cat(parts)


def gradients(model: Any, batches: list[hand.Batch], of: str) -> list[Tensor]:
    """Of one example after the other, over all parameters; frozen ones are zero."""
    out = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            targets = one["labels"][:, 1:]
            if not (targets != -100).any():
                continue
            if of == "loss":
                value, _ = hand.ce(model, one)
            else:
                picked = hand.logits(model, one)[:, :-1].gather(-1, targets.clamp(min=0)[..., None])[..., 0]
                value = picked[targets != -100].mean()
            grads = dict(zip(map(id, parameters), torch.autograd.grad(value, parameters), strict=True))
            out.append(torch.cat([grads.get(id(p), torch.zeros_like(p)).reshape(-1) for p in model.parameters()]))
    return out


@settings(max_examples=20, deadline=None)
@given(
    case=st.sampled_from(sorted(MODELS)),
    of=st.sampled_from(["loss", "label_logit"]),
    orthonormal=st.booleans(),
    count=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_vectors_are_the_gradients_of_single_examples(case: Any, of: Any, orthonormal: bool, count: int, seed: int):
    model, batches = MODELS[case], [hand.batch(3, seed), hand.batch(2, seed + 1)]
    memory = gs.estimators.gradient_memory(model, batches, count, of=of, orthonormal=orthonormal)
    expected = torch.stack(gradients(model, batches, of)[:count])
    found = torch.stack([flat(model, vector) for vector in memory.vectors])
    if orthonormal:
        q, r = torch.linalg.qr(expected.T)
        expected = (q * r.diagonal().sign()).T
        torch.testing.assert_close(found @ found.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_model_stays_as_it_is() -> None:
    model = hand.build("stablelm", "embeddings")
    batch = hand.batch(2, 0)
    hand.ce(model, batch)[0].backward()
    before = {n: (p.detach().clone(), p.grad, p.requires_grad) for n, p in model.named_parameters()}
    held = {n: g.clone() for n, (_, g, _) in before.items() if g is not None}
    gs.estimators.gradient_memory(model, [batch], 2)
    assert model.training
    for name, p in model.named_parameters():
        weights, grad, trains = before[name]
        assert torch.equal(p, weights) and p.grad is grad and p.requires_grad is trains
        assert grad is None or torch.equal(grad, held[name])


@pytest.mark.parametrize("kind", sorted(hand.KINDS))
def test_regions_keep_their_entries_alone(kind: str) -> None:
    model = hand.build(kind)
    anatomy = gs.dissect(model)
    region = anatomy.heads[0, :1] | anatomy.neurons[1, ::3]
    batch = hand.batch(3, 1)
    cut = gs.estimators.gradient_memory(model, [batch], 2, region=region, orthonormal=False)
    whole = gs.estimators.gradient_memory(model, [batch], 2, orthonormal=False)
    for mine, all_of_it in zip(cut.vectors, whole.vectors, strict=True):
        assert set(mine) == set(region.parameters())
        for name, part in mine.items():
            inside = region.of(name).mask()
            assert torch.equal(part[inside], all_of_it[name][inside]) and not part[~inside].any()
    assert cut.region == region.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_kept_in_fp32(dtype: torch.dtype) -> None:
    model = hand.build("gpt2").to(dtype)
    memory = gs.estimators.gradient_memory(model, [hand.batch(6, 3)], 6)
    found = torch.stack([flat(model, vector) for vector in memory.vectors])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found @ found.T, torch.eye(6), rtol=0, atol=1e-6)


def test_dependent_examples_add_no_direction() -> None:
    model, batch = MODELS["opt", "none"], hand.batch(2, 4)
    twice = {k: torch.cat([v, v]) for k, v in batch.items()}
    assert len(gs.estimators.gradient_memory(model, [twice], 4)) == 2
    assert len(gs.estimators.gradient_memory(model, [twice], 4, orthonormal=False)) == 4


def test_memories_grow_task_by_task() -> None:
    model, first, second = MODELS["stablelm", "none"], hand.batch(2, 5), hand.batch(2, 6)
    memory = gs.estimators.gradient_memory(model, [first], 2)
    grown = gs.estimators.gradient_memory(model, [second], 2, extend=memory)
    at_once = gs.estimators.gradient_memory(model, [first, second], 4)
    assert len(memory) == 2 and len(grown) == 4
    for mine, theirs in zip(grown.vectors, at_once.vectors, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(PlanError, match="orthonormal=True there, False here"):
        gs.estimators.gradient_memory(model, [second], 2, extend=memory, orthonormal=False)
    with pytest.raises(PlanError, match="made for StableLmForCausalLM, used with GPT2LMHeadModel"):
        gs.estimators.gradient_memory(MODELS["gpt2", "none"], [second], 2, extend=memory)


def test_examples_without_labels_are_passed_over() -> None:
    model, batch = MODELS["stablelm", "none"], hand.batch(3, 7)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = -100
    assert len(gs.estimators.gradient_memory(model, [batch], 2)) == 2
    with pytest.raises(DataError, match="3 gradients were asked for, and 2 examples"):
        gs.estimators.gradient_memory(model, [batch], 3)


def test_refusals() -> None:
    model, batch = MODELS["stablelm", "none"], hand.batch(2, 8)
    for options in ({"count": 0}, {"count": 1.5}, {"count": True}, {"count": 1, "of": "logits"}):
        with pytest.raises(PlanError, match="gradient_memory"):
            gs.estimators.gradient_memory(model, [batch], **options)
    with pytest.raises(DataError, match="0 examples"):
        gs.estimators.gradient_memory(model, [], 1)
    with pytest.raises(SelectionError, match="another model"):
        gs.estimators.gradient_memory(model, [batch], 1, region=gs.region(MODELS["gpt2", "none"], "*.bias"))
    frozen = hand.build("opt", "embeddings")
    with pytest.raises(SelectionError, match="trains"):
        gs.estimators.gradient_memory(frozen, [batch], 1, region=gs.region(frozen, "model.decoder.embed_tokens.weight"))


@pytest.mark.parametrize("kind", sorted(hand.KINDS))
def test_files(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind, "every third"]
    memory = gs.estimators.gradient_memory(model, [hand.batch(3, 9)], 3, of="label_logit")
    memory.save(tmp_path / "memory.safetensors")
    loaded = gs.estimators.GradientMemory.load(tmp_path / "memory.safetensors", copy.deepcopy(model))
    assert len(loaded) == 3 and (loaded.of, loaded.orthonormal) == ("label_logit", True)
    for mine, theirs in zip(loaded.vectors, memory.vectors, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert repr(loaded) == repr(memory)
    assert [path.name for path in tmp_path.iterdir()] == ["memory.safetensors"]


def test_files_of_another_model_say_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    gs.estimators.gradient_memory(MODELS["stablelm", "none"], [hand.batch(2, 0)], 1).save(path)
    with pytest.raises(ArtefactError, match="made for StableLmForCausalLM, used with GPT2LMHeadModel"):
        gs.estimators.GradientMemory.load(path, MODELS["gpt2", "none"])
    wider = hand.build("stablelm")
    wider.resize_token_embeddings(29)
    with pytest.raises(ArtefactError, match=r"embed_tokens.weight is \[23, 16\] there and \[29, 16\] here"):
        gs.estimators.GradientMemory.load(path, wider)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    model = MODELS["stablelm", "none"]
    gs.estimators.gradient_memory(model, [hand.batch(2, 0)], 2).save(path)
    whole = path.read_bytes()
    with pytest.raises(ArtefactError, match="does not exist"):
        gs.estimators.GradientMemory.load(tmp_path / "other", model)
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtefactError, match="truncated"):
            gs.estimators.GradientMemory.load(path, model)
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    about = json.loads(header["__metadata__"]["gradsurgery"])
    for change, message in (
        ({"format": 9}, "pip install --upgrade"),
        ({"kind": "a basis"}, "holds a basis; expected a gradient memory"),
        ({"count": 3}, "damaged"),
        ({"count": 1}, "damaged"),
    ):
        header["__metadata__"]["gradsurgery"] = json.dumps({**about, **change})
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
        with pytest.raises(ArtefactError, match=message):
            gs.estimators.GradientMemory.load(path, model)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = gs.estimators.gradient_memory(MODELS["stablelm", "none"], [hand.batch(2, 0)], 1)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefacts, "save_file", full)
    with pytest.raises(ArtefactError, match="nothing is left"):
        memory.save(tmp_path / "memory.safetensors")
    assert not list(tmp_path.iterdir())
