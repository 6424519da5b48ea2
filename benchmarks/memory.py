"""Peak memory of a step, each in a process of its own (Linux).

python -m benchmarks.memory tiered    # one candidate of benchmarks.keys; prints bytes
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak(name: str, device: str, module: str = "benchmarks.keys") -> int:
    """Bytes that three steps of a candidate of a module take at most, model and optimizer included."""
    command = [sys.executable, "-m", "benchmarks.memory", name, device, module]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.strip().splitlines()[-1])


def allocated(run: Callable[[], None]) -> int:
    """Bytes that a run holds at most above what was there before: every allocation counted, whatever the heap keeps."""
    run()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main(name: str, device: str = "cpu", module: str = "benchmarks.keys") -> None:
    candidates: Any = importlib.import_module(module)
    torch.set_num_threads(1)
    run = candidates.step(device, candidates.METHODS[name])
    for _ in range(3):
        run()
    if device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage keeps what the parent had
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
