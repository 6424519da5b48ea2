"""Keys of a run: drawn once, kept apart from it, never drawn again for a run that has one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.runs.keys import DrawConfig, draw_keys, kept_keys, key_paths
from tests.surgery.tiny import build

DRAW = DrawConfig(fraction=0.3, attention_ratio=0.0)


@pytest.fixture(scope="module")
def anatomy() -> gs.Anatomy:
    return gs.dissect(build())


def test_a_key_is_drawn_once_and_found_again(tmp_path: Path, anatomy: gs.Anatomy) -> None:
    paths, run = key_paths(tmp_path / "keys", "run", 1), tmp_path / "runs/run"
    (first,) = kept_keys(DRAW, anatomy, None, paths, run)
    assert paths == [tmp_path / "keys/run.json"] and stat.S_IMODE(paths[0].stat().st_mode) == 0o600
    assert (tmp_path / "keys/.gitignore").read_text() == "*\n"
    (again,) = kept_keys(DRAW, anatomy, None, paths, run)
    assert again == first
    (other,) = kept_keys(DRAW, anatomy, None, key_paths(tmp_path / "keys", "other", 1), run)
    assert other != first


def test_a_run_without_its_key_is_refused_unless_it_is_to_be_deleted(tmp_path: Path, anatomy: gs.Anatomy) -> None:
    paths, run = key_paths(tmp_path / "keys", "run", 1), tmp_path / "runs/run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ArtefactError, match="put it back"):
        kept_keys(DRAW, anatomy, None, paths, run)
    assert not paths[0].exists()
    assert kept_keys(DRAW, anatomy, None, paths, run, overwrite=True) and paths[0].exists()


def test_keys_do_not_lie_in_the_runs_folder(tmp_path: Path, anatomy: gs.Anatomy) -> None:
    run = tmp_path / "runs/run"
    with pytest.raises(PlanError, match="outside"):
        kept_keys(DRAW, anatomy, None, key_paths(run / "keys", "run", 1), run)


def test_several_keys_are_disjoint_and_a_seed_repeats_them(tmp_path: Path, anatomy: gs.Anatomy) -> None:
    several = DrawConfig(fraction=0.15, attention_ratio=0.0, count=2)
    paths = key_paths(tmp_path / "keys", "run", 2)
    assert [path.name for path in paths] == ["run-1.json", "run-2.json"]
    keys = kept_keys(several, anatomy, 3, paths, tmp_path / "runs/run")
    assert len(gs.PermutationKey.compose(*keys)) == sum(map(len, keys))
    assert keys == draw_keys(several, anatomy, 3)
