"""How a program ends: the sentence, and nothing left running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradsurgery as gs
from gradsurgery.runs import ending_in_a_sentence

THREADS = """
import os, sys, torch
from torch import distributed as dist
from gradsurgery.runs import ending_in_a_sentence

def threads():
    return len(os.listdir("/proc/self/task"))

def work():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    model.itself = [model]  # as a Trainer's callbacks know their Trainer
    dist.all_gather_object([None], "a row")

torch.set_num_threads(1)
before = threads()
with ending_in_a_sentence():
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
    work()
    assert threads() > before
assert not dist.is_initialized() and threads() == before, (before, threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list a process's threads")
def test_the_groups_threads_end_with_the_block(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(tmp_path / "store")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("raised", "said"),
    [(gs.errors.DataError("the file is empty."), "DataError: the file is empty."), (KeyboardInterrupt(), "again")],
)
def test_one_sentence_and_status_1(raised: BaseException, said: str) -> None:
    with pytest.raises(SystemExit, match=said), ending_in_a_sentence("start it again."):
        raise raised


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), ending_in_a_sentence():
        _ = 1 / 0
