"""A run's folder: its resolved configuration, metrics, plots, checkpoints; resumed or refused, never overwritten."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gradsurgery.errors import ArtefactError
from gradsurgery.files import read_json, write_json, write_text
from gradsurgery.version import __version__


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``results.json``, ``models/``, ``plots/``, ``report.html``.

    Opening an existing folder continues it if its configuration is the same, and refuses it otherwise.

    Args:
        path: The folder.
        config: The resolved configuration, plain data.
        overwrite: Delete what another configuration left there.
        main: False on ranks other than 0, which read but never write.

    Raises:
        ArtefactError: the folder holds a run of another configuration, or something else.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any], overwrite: bool = False, main: bool = True) -> None:
        self.path, self.main = Path(path), main
        self.config = json.loads(json.dumps(config))
        if not main:
            return
        stored = self.path / "config.yaml"
        if overwrite and stored.is_file():
            shutil.rmtree(self.path)
        if stored.is_file():
            before = yaml.safe_load(stored.read_text(encoding="utf-8")) or {}
            before.pop("gradsurgery", None)
            if before != self.config:
                name = next(k for k in {**before, **self.config} if before.get(k) != self.config.get(k))
                raise ArtefactError(
                    f"{self.path} holds a run with {name}={before.get(name)!r}, not {self.config.get(name)!r}; "
                    f"choose another name, or pass overwrite to delete it."
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ArtefactError(f"{self.path} exists and is no run of this library; choose another name.")
        else:
            write_text(stored, yaml.safe_dump({**self.config, "gradsurgery": __version__}, sort_keys=False))

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All metric lines; a last line cut off by a kill is left out."""
        out = []
        if (self / "metrics.jsonl").is_file():
            for line in (self / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    out.append(json.loads(line))
        return out

    def log(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self.main:
            with open(self / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop metric lines of steps that will be done again after a resume."""
        if self.main and (self / "metrics.jsonl").is_file():
            write_text(self / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.metrics if keep(m)))

    @contextlib.contextmanager
    def whole_folder(self, name: str) -> Iterator[Path]:
        """A folder that appears under ``name`` only when the block ends without an exception."""
        final, beside = self / name, self / f".{name.replace('/', '_')}.part"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def results(self) -> dict[str, Any]:
        """What finished parts of the run stored, by name."""
        path = self / "results.json"
        return read_json(path, "the results of this run") if path.is_file() else {}

    def store(self, name: str, result: Any) -> None:
        """Keep the result of one part, so that a resumed run does not do it again; its checkpoints go."""
        if self.main:
            write_json(self / "results.json", {**self.results(), name: result})
            shutil.rmtree(self / "checkpoints" / name, ignore_errors=True)
            with contextlib.suppress(OSError):  # gone with its last model
                (self / "checkpoints").rmdir()
