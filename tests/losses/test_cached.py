"""`gs.losses.precompute` and `cached`: stored log-probabilities are those of a forward, files are whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, BatchError, DataError, PlanError
from gradsurgery.losses.references import store
from tests.losses.models import IDS, MASK, build, disturb_, inputs, logits

BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "forget": torch.tensor([True, False])}
NUMBERED = {**BATCH, "row": torch.tensor([7, 3])}


def reordered(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows in the other order, with more padding."""
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"].flip(0), (0, 2), value=9),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"].flip(0), (0, 2)),
    }


@pytest.mark.parametrize("shard_size", [1, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full(tmp_path: Path, shard_size: int, dtype: torch.dtype) -> None:
    model = build("llama")
    gs.losses.precompute(tmp_path / "cache", model, [BATCH], shard_size=shard_size, dtype=dtype)
    expected = logits(model).log_softmax(-1).to(dtype)
    disturb_(model)
    reference = gs.losses.cached(tmp_path / "cache")
    found = reference(model, inputs())
    assert isinstance(found, Tensor)
    assert torch.equal(found[MASK != 0], expected[MASK != 0])
    padded = reference(model, reordered(BATCH))
    assert isinstance(padded, Tensor)
    assert torch.equal(padded[0, :7], found[1])
    assert len(list((tmp_path / "cache").glob("shard-*"))) == (2 if shard_size == 1 else 1)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("k", [1, 8, 30])
def test_top_k(tmp_path: Path, k: int) -> None:
    model = build("gpt2")
    reference = gs.losses.precompute(tmp_path / "cache", model, [BATCH], top_k=k)
    exact = logits(model)
    out = model.eval()(**inputs())
    with torch.no_grad():
        out.logits.add_(torch.randn(out.logits.shape))
    loss = gs.losses.kl_divergence(out, BATCH, {"reference": reference(model, inputs())})
    top = gs.losses.kl_divergence(out, BATCH, {"reference": gs.losses.TopK.of(exact, k)})
    full = gs.losses.kl_divergence(out, BATCH, {"reference": exact})
    torch.testing.assert_close(loss, top)
    assert loss <= full * (1 + 1e-6)
    if k == 30:  # of 31 words: the rest is one word
        torch.testing.assert_close(loss, full, rtol=1e-5, atol=0)


def test_the_models_own_cache_is_no_divergence(tmp_path: Path) -> None:
    model = build("llama").eval()
    reference = gs.losses.precompute(tmp_path / "cache", model, [BATCH])
    p = gs.Pass("public", gs.losses.kl_divergence, refs={"reference": reference})
    with gs.attach(gs.Method(passes=[p]), model) as surgery:
        assert surgery.backward({k: v for k, v in BATCH.items() if k != "forget"})["public"] < 1e-6


def test_row_numbers(tmp_path: Path) -> None:
    model = build("llama")
    reference = gs.losses.precompute(tmp_path / "cache", model, [NUMBERED], ids="row")
    assert reference.columns == ("row",)
    other = {"input_ids": IDS.flip(0), "attention_mask": MASK.flip(0), "row": torch.tensor([3, 7])}
    found = reference(model, other)
    assert isinstance(found, Tensor)
    assert torch.equal(found.flip(0)[MASK != 0], logits(model).log_softmax(-1)[MASK != 0])
    with pytest.raises(BatchError, match=r"row 4 .* not among the 2 rows"):
        reference(model, {**other, "row": torch.tensor([3, 4])})
    with pytest.raises(BatchError, match="other tokens"):
        reference(model, {**other, "row": torch.tensor([7, 3])})
    with pytest.raises(BatchError, match="row numbers 'row'"):
        reference(model, inputs())


def test_rows_that_are_not_stored(tmp_path: Path) -> None:
    model = build("llama")
    reference = gs.losses.precompute(tmp_path / "cache", model, [BATCH, BATCH])
    assert reference.rows == 2
    with pytest.raises(BatchError, match="row 1 of this batch is not among the 2 rows"):
        reference(model, {**inputs(), "input_ids": IDS.index_fill(0, torch.tensor([1]), 4)})


def test_encoder_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).eval()
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    reference = gs.losses.precompute(tmp_path / "cache", model, [batch])
    out = model(**batch, use_cache=False)
    assert gs.losses.kl_divergence(out, batch, {"reference": reference(model, batch)}) < 1e-6
    with pytest.raises(BatchError, match="not among"):
        reference(model, {**batch, "labels": labels.clamp(max=6)})


def test_images_need_row_numbers(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="ids='…'"):
        store.row_hashes({"input_ids": IDS, "pixel_values": torch.zeros(2, 3)}, MASK != 0, False, numbered=False)
    assert len(store.row_hashes({"input_ids": IDS, "pixel_values": torch.zeros(2, 3)}, MASK != 0, False, True)) == 2


def test_of_another_model(tmp_path: Path) -> None:
    model = build("llama")
    gs.losses.precompute(tmp_path / "cache", model, [BATCH])
    other = build("gpt2")
    with pytest.raises(ArtefactError, match=r"was made with LlamaForCausalLM .* same_model=False"):
        gs.losses.cached(tmp_path / "cache").take(other)
    teacher = gs.losses.cached(tmp_path / "cache", same_model=False)
    assert teacher(other, inputs()).shape == (2, 7, 31)  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, at: int) -> None:
    whole, calls = store.save_file, iter(range(9))

    def save(tensors: Any, path: Path) -> None:
        if next(calls) == at:
            path.write_bytes(b"half")
            raise error
        whole(tensors, path)

    monkeypatch.setattr(store, "save_file", save)
    with pytest.raises(ArtefactError, match="nothing is left"):
        gs.losses.precompute(tmp_path / "cache", build("llama"), [BATCH], shard_size=1)
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_what_was_there(tmp_path: Path) -> None:
    model = build("llama")
    gs.losses.precompute(tmp_path / "cache", model, [BATCH])

    def batches() -> Any:
        yield BATCH
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gs.losses.precompute(tmp_path / "cache", model, batches(), overwrite=True, shard_size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert gs.losses.cached(tmp_path / "cache").rows == 2


@pytest.mark.parametrize("damage", ["index.json", "rows.safetensors", "shard-00000.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty"])
def test_damaged_files(tmp_path: Path, damage: str, how: str) -> None:
    model = build("llama")
    gs.losses.precompute(tmp_path / "cache", model, [BATCH])
    path = tmp_path / "cache" / damage
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 40 if how == "cut" else 0])
    with pytest.raises(ArtefactError, match=damage):
        gs.losses.cached(tmp_path / "cache")(model, inputs())


def test_an_index_that_says_something_else(tmp_path: Path) -> None:
    model = build("llama")
    gs.losses.precompute(tmp_path / "cache", model, [BATCH])
    index = tmp_path / "cache" / "index.json"
    about = json.loads(index.read_text())
    for change in ({"format": "x"}, {"rows": 3}, {"vocabulary": None}):
        index.write_text(json.dumps({**about, **change}))
        with pytest.raises(ArtefactError, match="precompute again"):
            gs.losses.cached(tmp_path / "cache")
    index.write_text(json.dumps({**about, "vocabulary": 30, "top_k": 4}))
    with pytest.raises(ArtefactError, match="damaged"):
        gs.losses.cached(tmp_path / "cache")(model, inputs())


def test_what_is_there_stays(tmp_path: Path) -> None:
    model = build("llama")
    (tmp_path / "thesis").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ArtefactError, match="exists"):
            gs.losses.precompute(tmp_path / "thesis", model, [BATCH], overwrite=overwrite)
    gs.losses.precompute(tmp_path / "cache", model, [BATCH])
    with pytest.raises(ArtefactError, match="overwrite=True"):
        gs.losses.precompute(tmp_path / "cache", model, [BATCH])
    gs.losses.precompute(tmp_path / "cache", model, [reordered(BATCH)], overwrite=True)
    shutil.rmtree(tmp_path / "cache")


def test_refusals(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(DataError, match="no rows"):
        gs.losses.precompute(tmp_path / "cache", model, [])
    with pytest.raises(DataError, match="twice"):
        gs.losses.precompute(tmp_path / "cache", model, [{**BATCH, "row": torch.tensor([3, 3])}], ids="row")
    for options in ({"top_k": 0}, {"top_k": 31}, {"temperature": 0.0}, {"dtype": torch.int32}):
        with pytest.raises(PlanError, match="precompute"):
            gs.losses.precompute(tmp_path / "cache", model, [BATCH], **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
