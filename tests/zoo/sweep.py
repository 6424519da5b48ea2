"""The full zoo, one command: dissect and check every architecture of transformers, each in a process of its own.

python -m tests.zoo.sweep --page docs/architectures.md   # all four mappings
python -m tests.zoo.sweep --only 'causal/llama|image' --out /tmp/some.json
python -m tests.zoo.sweep --seed 1             # another shape of each: head counts, biases, tying
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.zoo.page import page_of

MAPPINGS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "image": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
}

MEMORY = 9 * 2**30
"""Bytes of address space an architecture may take."""


def names() -> list[str]:
    """``mapping/model type`` of every architecture."""
    from transformers.models.auto import modeling_auto

    return [f"{mapping}/{kind}" for mapping, (_, table) in MAPPINGS.items() for kind in getattr(modeling_auto, table)]


def examine(name: str, seed: int = 0) -> dict[str, Any]:
    """Build, dissect and check one architecture.

    Returns:
        ``status`` (``right``, ``wrong``, ``refused``, ``not built``), ``units``, ``structural``, ``seconds``, ``why``.
    """
    import torch

    import gradsurgery as gs
    from gradsurgery.errors import AnatomyError
    from tests.zoo.builder import NOT_BUILT, runnable
    from tests.zoo.check import check

    torch.set_num_threads(1)
    mapping, kind = name.split("/")
    try:
        model, run, tolerance = runnable(kind, MAPPINGS[mapping][0], seed)
    except Exception as error:
        why = NOT_BUILT.get(kind, f"{type(error).__name__}: {error}")
        return {"status": "not built", "why": why, "trace": traceback.format_exc()}
    start = time.perf_counter()
    try:
        anatomy = gs.dissect(model)
    except AnatomyError as error:
        return {"status": "refused", "why": str(error), "seconds": time.perf_counter() - start}
    found: dict[str, Any] = {"seconds": time.perf_counter() - start, "units": {}}
    for group in anatomy.groups:
        row = found["units"].setdefault(group.kind, {"groups": 0, "units": 0, "exchangeable": 0, "open": 0})
        sizes = Counter(group.exchange_classes)
        row["groups"] += 1
        row["units"] += len(group)
        row["exchangeable"] += sum(n for n in sizes.values() if n > 1)
        row["open"] += 0 if group.closed else 1
    found["structural"] = dict(anatomy.structural)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["dead"] = [n for n, p in model.named_parameters() if anatomy.structural.get(n) == "unused"]
    problems = check(model, run, anatomy.groups, anatomy.structural, tolerance)
    return {**found, "status": "wrong" if problems else "right", "why": "; ".join(problems)}


def _work(name: str, seed: int, channel: Any) -> None:
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as null:
        sys.stdout = sys.stderr = null
        try:
            channel.send(examine(name, seed))
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            channel.send({"status": "error", "why": why, "trace": traceback.format_exc()})


def sweep(
    chosen: list[str], jobs: int = 2, timeout: float = 180.0, out: Path | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Examine every name, ``jobs`` at a time; what takes longer than ``timeout`` seconds is stopped and says so.

    With ``out``, results are written after every architecture, so that a stopped sweep loses nothing.
    """
    import transformers

    transformers.LlamaForCausalLM  # noqa: B018  loads what all models share: the children inherit it

    context = multiprocessing.get_context("fork")
    waiting = list(reversed(chosen))
    running: dict[str, tuple[Any, Any, float]] = {}
    found: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(chosen), unit="model") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(name, seed, send), daemon=True)
                process.start()
                send.close()
                running[name] = process, receive, time.perf_counter()
            for name, (process, receive, begun) in list(running.items()):
                late = time.perf_counter() - begun > timeout
                if not (late or receive.poll(0.02) or not process.is_alive()):
                    continue
                why = f"no answer in {timeout:.0f} s" if late else f"the process died ({process.exitcode})"
                found[name] = {"status": "error", "why": why}
                with suppress(EOFError):
                    if receive.poll(0):
                        found[name] = receive.recv()
                process.kill()
                process.join()
                found[name]["wall"] = time.perf_counter() - begun
                del running[name]
                bar.update()
                if out is not None:
                    out.write_text(json.dumps({n: found[n] for n in chosen if n in found}, indent=1))
                if found[name]["status"] != "right":
                    bar.write(f"{name:40s} {found[name]['status']:10s} {found[name]['why'][:150]}")
    return {name: found[name] for name in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression over 'mapping/model type'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds an architecture may take")
    parser.add_argument("--seed", type=int, default=0, help="the shape: see SHAPES in tests/zoo/configs.py")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--page", type=Path, help="where to write the results as a page")
    options = parser.parse_args()
    chosen = [name for name in names() if re.search(options.only, name)]
    results = sweep(chosen, options.jobs, options.timeout, options.out, options.seed)
    if options.page:
        options.page.write_text(page_of(results, options.seed, options.jobs))
    for mapping in MAPPINGS:
        counts = Counter(r["status"] for n, r in results.items() if n.startswith(mapping + "/"))
        if counts:
            print(f"{mapping:8s} {sum(counts.values()):4d}  " + "  ".join(f"{k} {v}" for k, v in counts.most_common()))
    seconds = sorted(r["seconds"] for r in results.values() if "seconds" in r)
    if seconds:
        print(f"seconds to dissect: median {seconds[len(seconds) // 2]:.2f}, worst {seconds[-1]:.1f}")


if __name__ == "__main__":
    main()
