"""Peak memory of a step, each in a process of its own (Linux).

python -m benchmarks.memory tiered    # one candidate of benchmarks.keys; prints bytes
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch


def peak(name: str, device: str) -> int:
    """Bytes that three steps of a candidate of ``benchmarks.keys`` take at most, model and optimizer included."""
    command = [sys.executable, "-m", "benchmarks.memory", name, device]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.strip().splitlines()[-1])


def main(name: str, device: str = "cpu") -> None:
    from benchmarks.keys import METHODS, step

    torch.set_num_threads(1)
    run = step(device, METHODS[name])
    for _ in range(3):
        run()
    if device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage keeps what the parent had
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
