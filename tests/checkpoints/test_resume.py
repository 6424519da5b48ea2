"""A resumed run is the run that was never interrupted, for every method; what does not fit is refused unchanged."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradsurgery as gs
from gradsurgery.checkpoints import manifest
from gradsurgery.checkpoints.random_state import random_state, set_random_state
from tests.checkpoints.loop import Run, whole
from tests.engines.methods import CASES

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    first = Run(name)
    first.steps(0, 1)
    first.save(tmp_path, extra={"seen": 8})
    first.steps(1, 2)
    path = first.save(tmp_path, extra={"seen": 16})
    first.end()
    assert path == gs.latest_checkpoint(tmp_path) and path.name == "step-00000002"
    second = Run(name, resumed=True)
    assert second.load(tmp_path) == {"seen": 16}
    assert second.surgery.step == 2
    second.steps(2, 3)
    found, expected = second.end(), whole(name)
    for key, value in expected.items():
        # a held coordinate is looked at anew, which rounds
        exact = not name.startswith(("warp", "gpm", "actsvd", "original"))
        assert torch.equal(found[key], value) if exact else torch.allclose(found[key], value, rtol=0, atol=1e-12), key


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.NAdam])
def test_every_optimizers_state(kind: Any, tmp_path: Path) -> None:
    def run() -> Any:
        run = Run("sgtm, mask")
        run.surgery.remove()
        run.optimizer = kind([p for p in run.host.parameters() if p.requires_grad], lr=1e-3)
        run.scheduler = torch.optim.lr_scheduler.LinearLR(run.optimizer, 0.5, 1.0, total_iters=3)
        run.surgery = gs.attach(run.method, run.host, run.optimizer)
        return run

    first, second, uninterrupted = run(), run(), run()
    first.steps(0, 2)
    first.save(tmp_path)
    second.load(tmp_path)
    second.steps(2, 3)
    uninterrupted.steps(0, 3)
    found, expected = second.end(), uninterrupted.end()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [
        {(n, k): v for n, p in r.host.named_parameters() for k, v in r.optimizer.state.get(p, {}).items()}
        for r in (second, uninterrupted)
    ]
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        assert type(value) is type(states[0][key])
        if isinstance(value, torch.Tensor):
            assert value.dtype == states[0][key].dtype and torch.equal(value, states[0][key])


def test_moments_that_lie_in_c2_say_so_after_a_resume(tmp_path: Path) -> None:
    first = Run("tiered, in C2")
    first.steps(0, 2)
    first.save(tmp_path)
    before = [g.get("gradsurgery_keys") for g in first.optimizer.param_groups]
    second = Run("tiered, in C2", resumed=True)
    second.load(tmp_path)
    assert [g.get("gradsurgery_keys") for g in second.optimizer.param_groups] == before != [None]


def test_random_states_go_on_and_new_ranks_draw_their_own() -> None:
    state = random_state()
    json.loads(json.dumps(state))
    drawn = [torch.rand(3).tolist(), random.random(), np.random.rand()]
    set_random_state(state)
    assert drawn == [torch.rand(3).tolist(), random.random(), np.random.rand()]
    seen = []
    for fork in range(4):
        set_random_state(state, fork)
        seen.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert len(set(seen)) == 4
    set_random_state(state)


def test_keep_and_a_step_that_is_saved_twice(tmp_path: Path) -> None:
    run = Run("plain")
    for step in range(3):
        run.steps(step, step + 1)
        run.save(tmp_path, keep=2)
    assert [p.name for p in manifest.steps_in(tmp_path)] == ["step-00000002", "step-00000003"]
    with pytest.raises(gs.errors.ArtefactError, match="there already: step 3"):
        run.save(tmp_path)
    assert len(manifest.steps_in(tmp_path)) == 2
    with pytest.raises(gs.errors.PlanError, match="keep=0"):
        run.save(tmp_path, keep=0)
    run.steps(0, 1)
    (tmp_path / ".step-00000009.part").mkdir()  # of a run that was killed while it saved
    with pytest.raises(gs.errors.PlanError, match="is nothing that JSON holds"):
        run.save(tmp_path, extra=object())
    run.save(tmp_path, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("broken", ["save_state", "write_json", "os.replace", "flush", "dcp.save"])
def test_a_save_that_fails_leaves_nothing_half_done(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("sgtm, mask")
    run.steps(0, 1)
    run.save(tmp_path)
    run.steps(1, 2)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"gradsurgery.checkpoints.save.{broken}", fail)
        with pytest.raises(gs.errors.ArtefactError, match="No space left"):
            run.save(tmp_path)
    saved = ["step-00000001", "step-00000002"] if broken == "flush" else ["step-00000001"]  # renamed, it is whole
    assert sorted(p.name for p in tmp_path.iterdir()) == saved
    if broken != "flush":
        run.save(tmp_path)
    assert Run("sgtm, mask", resumed=True).load(tmp_path) is None


def test_gradients_that_wait_and_keyed_models_are_refused(tmp_path: Path) -> None:
    run = Run("sgtm, mask")
    run.surgery.backward(batch_of(run))
    with pytest.raises(gs.errors.PlanError, match=r"after optimizer.step\(\)"):
        run.save(tmp_path)
    run.optimizer.step()
    run.save(tmp_path)
    key = gs.PermutationKey.generate(gs.dissect(run.host), fraction=0.1, seed=0)
    with key.applied(run.host):
        with pytest.raises(gs.errors.KeyStateError, match="needs the model in C1"):
            run.save(tmp_path)
        with pytest.raises(gs.errors.KeyStateError, match="needs the model in C1"):
            run.load(tmp_path)


def batch_of(run: Run) -> Any:
    from tests.engines.methods import batches

    return batches(run.method)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run("gru")
        run.steps(0, 2)
        return run.save(tmp_path_factory.mktemp("saved"))


MISFITS: dict[str, tuple[Any, str]] = {
    "no folder": (lambda path: Path("nowhere"), "holds no whole checkpoint"),
    "another method": ("sgtm, mask", "saved with another method"),
    "another model": ("sgtm, zero", "is of a model"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_changes_nothing(what: str, saved: Path) -> None:
    given, message = MISFITS[what]
    run = Run(given if isinstance(given, str) else "gru")
    run.steps(0, 1)
    before = {n: p.detach().clone() for n, p in run.host.named_parameters()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in run.optimizer.state.items()}
    drawn = torch.get_rng_state()
    with pytest.raises(gs.errors.ArtefactError, match=message):
        run.load(saved if isinstance(given, str) else given(saved))
    assert all(torch.equal(before[n], p) for n, p in run.host.named_parameters())
    assert all(torch.equal(v, run.optimizer.state[p][k]) for p, s in moments.items() for k, v in s.items())
    assert torch.equal(drawn, torch.get_rng_state()) and run.surgery.step == 1


@pytest.mark.parametrize("how", ["cut off", "missing"])
def test_a_damaged_file_is_named_and_nothing_changes(how: str, tmp_path: Path) -> None:
    run = Run("gru")
    run.steps(0, 2)
    path = run.save(tmp_path)
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name != "checkpoint.json"]
    assert {"surgery.json", "surgery.safetensors", "random-00000.json"} < {p.name for p in files}
    before = {n: p.detach().clone() for n, p in run.host.named_parameters()}
    for file in files:
        held = file.read_bytes()
        file.write_bytes(held[: len(held) // 2]) if how == "cut off" else file.unlink()
        with pytest.raises(gs.errors.ArtefactError, match=rf"{file.name} (is missing|has [\d,]+ bytes)"):
            run.load(tmp_path)
        file.write_bytes(held)
    assert all(torch.equal(before[n], p) for n, p in run.host.named_parameters())
    run.load(tmp_path)


def test_what_is_written_is_no_pickle_and_holds_no_key(tmp_path: Path) -> None:
    run = Run("tiered")
    run.steps(0, 1)
    path = run.save(tmp_path)
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    (tier,) = [p for p in run.method.passes if p.weight_transforms]
    (key,) = tier.weight_transforms
    swap = [list(slot) for slot in key.mlp_cols[0]]  # type: ignore[attr-defined]
    for file in path.rglob("*.json"):
        assert swap not in parts(json.loads(file.read_text())) and "attn_heads" not in file.read_text()
    assert swap in parts(json.loads(json.dumps({"mlp_cols": key.mlp_cols})))  # type: ignore[attr-defined]


def parts(data: Any) -> list[Any]:
    """Every value in some JSON."""
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else []
    return [data, *(part for value in inner for part in parts(value))]


def test_another_optimizer_or_other_companions_are_refused(saved: Path) -> None:
    run = Run("gru")
    with pytest.raises(gs.errors.ArtefactError, match=r"keeps \['scheduler'\] besides"):
        gs.load_checkpoint(saved, run.surgery)
    run.surgery.remove()
    sgd = torch.optim.SGD(run.host.parameters(), lr=0.1)
    surgery = gs.attach(run.method, run.host, sgd)
    with pytest.raises(gs.errors.ArtefactError, match="saved with AdamW, here SGD"):
        gs.load_checkpoint(saved, surgery, scheduler=run.scheduler)
    surgery.remove()
