"""Files of sweeps: one YAML file names a recipe, what is fixed, a grid and seeds; every cell is a run of the recipe.

    recipe: recipes/sgtm_topics.py
    fixed: {train.steps: 600, models: [plain, data_filter, sgtm]}
    grid: {labels.undiscovered: [0.0, 0.01, 0.1, 0.4]}
    seeds: [0, 1, 2]

A list of grids runs the cells of each, so that what is the same in many settings is trained once:

    grid:
      - {labels.undiscovered: [0.0], models: [[plain, data_filter, sgtm]]}
      - {labels.undiscovered: [0.1, 0.4], models: [[data_filter, sgtm]]}

`gradsurgery.runs.sweep` runs them.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from gradsurgery.errors import DataError
from gradsurgery.runs.setup import digest

KEYS = ("recipe", "fixed", "grid", "seeds", "out", "title")
SET_BY_SWEEP = ("out", "name", "overwrite", "seed")


@dataclass(frozen=True)
class Sweep:
    """What a sweep runs.

    Attributes:
        recipe: Its file.
        fixed: Option -> value, the same in every cell.
        grids: Option -> values, each; cells are all combinations of one grid, grid after grid.
        seeds: Each cell is run once with each.
        out: Folder of the sweep: ``runs/``, ``logs/``, ``report.html``.
    """

    recipe: Path
    out: Path
    fixed: dict[str, Any] = field(default_factory=dict)
    grids: tuple[dict[str, list[Any]], ...] = ({},)
    seeds: tuple[int, ...] = (0,)
    title: str = "Sweep"

    def cells(self) -> list[Cell]:
        """All runs, seeds innermost."""
        settings = [
            dict(zip(grid, values, strict=True)) for grid in self.grids for values in itertools.product(*grid.values())
        ]
        return [Cell(self, setting, seed) for setting in settings for seed in self.seeds]

    def varied(self) -> set[str]:
        """Options that tell results apart: not ``models``, and not those that only one grid sets, to one value."""
        values: dict[str, set[str]] = {}
        for grid in self.grids:
            for key, of in grid.items():
                values.setdefault(key, set()).update(map(_text, of))
        return {
            key for key, of in values.items() if key != "models" and (len(of) > 1 or all(key in g for g in self.grids))
        }


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: a point of the grid, and a seed."""

    sweep: Sweep
    setting: dict[str, Any]
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        return {**self.sweep.fixed, **self.setting, "seed": self.seed}

    @property
    def point(self) -> dict[str, Any]:
        """The setting as results are grouped by it: see `Sweep.varied`."""
        varied = self.sweep.varied()
        return {key: value for key, value in self.setting.items() if key in varied}

    @property
    def name(self) -> str:
        words = "-".join(f"{key.rpartition('.')[2]}{_short(value)}" for key, value in self.point.items())
        return f"{words}-seed{self.seed}-{digest(self.options)}".lstrip("-")

    @property
    def path(self) -> Path:
        return self.sweep.out / "runs" / self.name

    def command(self, ranks: int = 1) -> list[str]:
        """What runs the cell."""
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        given = {**self.options, "out": str(self.sweep.out / "runs"), "name": self.name}
        return [*start, str(self.sweep.recipe), *(f"--{key}={_text(value)}" for key, value in given.items())]


def read_sweep(path: str | Path, out: str | Path | None = None) -> Sweep:
    """Read and check a sweep's file.

    Args:
        path: The YAML file; ``recipe`` is relative to the working directory or to the file.
        out: Folder of the sweep instead of the file's ``out``, by default ``runs/sweeps/NAME``.

    Raises:
        DataError: not a sweep, keys or options that do not exist (the nearest is named), empty lists, options twice.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give the YAML file of a sweep.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML in UTF-8 ({str(error).splitlines()[0]}).") from error
    if not isinstance(given, dict) or "recipe" not in given:
        raise DataError(f"{path} is no sweep: it needs recipe, and fixed, grid or seeds.")
    for key in given:
        if key not in KEYS:
            raise DataError(f"{path}: a sweep has no {key!r}; did you mean {_near(key, KEYS)}?")
    recipe = next((p for p in (Path(given["recipe"]), path.parent / given["recipe"]) if p.is_file()), None)
    if recipe is None:
        raise DataError(f"{path}: the recipe {given['recipe']} is no file.")
    config = load_recipe(recipe).Config()
    known = _options(config)
    fixed, grids = _flat(path, given.get("fixed") or {}, known), given.get("grid") or {}
    grids = grids if isinstance(grids, list) else [grids]
    seeds = given.get("seeds", [0])
    if not all(isinstance(g, dict) and all(isinstance(v, list) and v for v in g.values()) for g in grids):
        raise DataError(f"{path}: grid takes options with a list of values each, none of them empty.")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise DataError(f"{path}: seeds is a list of whole numbers, not {seeds!r}.")
    for grid in grids:
        _check_options(path, recipe, known, fixed, grid)
    folder = Path(out or given.get("out") or Path("runs/sweeps") / path.stem)
    sweep = Sweep(recipe, folder, fixed, tuple(grids), tuple(seeds), given.get("title") or path.stem)
    _require_distinct(path, sweep.cells(), getattr(config, "models", []))
    return sweep


def load_recipe(path: Path) -> ModuleType:
    """A recipe's module, by its file."""
    name = f"recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if not is_dataclass(getattr(module, "Config", None)):
        raise DataError(f"{path} is no recipe: it has no dataclass Config.")
    return module


def _require_distinct(path: Path, cells: list[Cell], models: list[str]) -> None:
    """Raise where two cells are one run, or would be one result although they have other options."""
    if len({_text(cell.options) for cell in cells}) < len(cells):
        raise DataError(f"{path}: a seed or a value of the grid is there twice, and would be one run.")
    for a, b in itertools.combinations(cells, 2):
        if (a.point, a.seed) == (b.point, b.seed):
            shared = set(a.options.get("models", models)) & set(b.options.get("models", models))
            other = sorted(k for k in {*a.options, *b.options} - {"models"} if a.options.get(k) != b.options.get(k))
            if shared and other:
                raise DataError(
                    f"{path}: two grids train {', '.join(sorted(shared))} with and without {', '.join(other)}, and "
                    f"would be one result: give {other[0]} in every grid."
                )


def _check_options(
    path: Path, recipe: Path, known: Mapping[str, bool], fixed: Mapping[str, Any], grid: Mapping[str, Any]
) -> None:
    for key in (*fixed, *grid):
        if key in SET_BY_SWEEP:
            instead = "seeds: […]" if key == "seed" else "the sweep's out"
            raise DataError(f"{path}: {key} is set by the sweep; use {instead}.")
        parents = (key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1))
        if key not in known and not any(known.get(parent) for parent in parents):
            raise DataError(f"{path}: {recipe.name} has no option {key!r}; did you mean {_near(key, known)}?")
    if twice := set(fixed) & set(grid):
        raise DataError(f"{path}: {', '.join(sorted(twice))} is both fixed and in the grid.")


def _options(config: Any, prefix: str = "") -> dict[str, bool]:
    """Every option by its dotted name, and whether it is a mapping, whose keys are free."""
    out: dict[str, bool] = {}
    for part in fields(config):
        value, name = getattr(config, part.name), f"{prefix}{part.name}"
        if is_dataclass(value):
            out.update(_options(value, f"{name}."))
        else:
            out[name] = isinstance(value, dict)
    return out


def _flat(path: Path, given: Any, known: Mapping[str, bool], prefix: str = "") -> dict[str, Any]:
    """Nested options with dotted names; a mapping that is an option by itself stays one."""
    if not isinstance(given, dict):
        raise DataError(f"{path}: fixed takes options with their values, not {given!r}.")
    out: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and name not in known
        out |= _flat(path, value, known, f"{name}.") if nested else {name: value}
    return out


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    text = "".join(c for c in _text(value) if c.isalnum() or c in ".-")
    return text[:16]


def _near(key: str, known: Any) -> str:
    return ", ".join(difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.3) or sorted(known)[:8])
