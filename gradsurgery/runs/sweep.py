"""Running sweeps: cells one after the other or several at once, skipped where they are done.

Results are the run folders' own: a cell whose results are there is skipped, one that was cut off is resumed by its
recipe, and a sweep that was killed goes on by the same command.
"""

from __future__ import annotations

import fcntl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import yaml

from gradsurgery.errors import ArtefactError, DataError
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.sweep_file import Cell, Sweep, read_sweep
from gradsurgery.version import __version__

__all__ = ["Cell", "Sweep", "finished", "read_sweep", "run_sweep"]


def finished(cell: Cell) -> bool:
    """Whether a cell's run has the results of all its models.

    Raises:
        ArtefactError: the run was begun by another version, or by a sweep with other options.
    """
    stored = cell.path / "config.yaml"
    if not stored.is_file():
        return False
    config = yaml.safe_load(stored.read_text(encoding="utf-8")) or {}
    version = config.get("gradsurgery")
    if version != __version__:
        raise ArtefactError(
            f"{cell.path} was begun with gradsurgery {version}, this is {__version__}, and results of both would stand "
            f"in one table: delete {cell.sweep.out}, choose another out, or go on with that version."
        )
    results = RunFolder(cell.path, {}, main=False).results()
    return bool(config.get("models")) and set(config["models"]) <= set(results)


def run_sweep(sweep: Sweep, processes: int = 1, ranks: int = 1, say: Callable[[str], None] = print) -> list[Cell]:
    """Run what is missing, and say what is done and how long the rest may take.

    Args:
        sweep: See `read_sweep`.
        processes: Runs at the same time.
        ranks: Processes of one run, over ``torch.distributed.run``.
        say: Takes each line of progress.

    Returns:
        The cells, all of them finished.

    Raises:
        DataError: a run failed; the message has its last line and its log. The others are run nevertheless.
        ArtefactError: runs of another version.
    """
    if processes < 1 or ranks < 1:
        raise DataError(f"processes={processes} and ranks={ranks} are numbers from 1.")
    cells = sweep.cells()
    waiting = [cell for cell in cells if not finished(cell)]
    say(f"{len(cells)} runs, {len(cells) - len(waiting)} done before")
    failed: list[tuple[Cell, str]] = []
    started = time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        running: dict[Future[str | None], Cell] = {pool.submit(_run, cell, ranks): cell for cell in waiting}
        try:
            for done, (cell, error) in enumerate(_as_completed(running), 1):
                left = (time.monotonic() - started) / done * (len(waiting) - done)
                state = "failed" if error else "done"
                say(f"{len(cells) - len(waiting) + done}/{len(cells)} {cell.name} {state}, about {_minutes(left)} left")
                failed += [(cell, error)] if error else []
        except BaseException:
            for future in running:
                future.cancel()
            raise
    if failed:
        cell, error = failed[0]
        raise DataError(
            f"{len(failed)} of {len(waiting)} runs failed; {cell.name}: {error} (log: "
            f"{sweep.out / 'logs' / cell.name}.log). The same command tries them again."
        )
    return cells


def _as_completed(running: Mapping[Future[str | None], Cell]) -> Iterator[tuple[Cell, str | None]]:
    left = set(running)
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        for future in done:
            yield running[future], future.result()


def _run(cell: Cell, ranks: int) -> str | None:
    """Run a cell; the last line of its output if it failed.

    The run holds a lock for as long as it lives, also when this process is killed: a second sweep waits for it.
    """
    log = cell.sweep.out / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if finished(cell):
            return None
        file.truncate(0)
        status = subprocess.run(
            cell.command(ranks), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False
        ).returncode
    if status == 0 and finished(cell):
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {status}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
