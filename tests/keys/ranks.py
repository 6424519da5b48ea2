"""What every rank of a distributed test of keys runs: on its rows, against one process on the whole batch.

Started as ``python -m tests.keys.ranks <host> <kind> <directory>``, once a rank; rank 0 writes ``result.json``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.errors import KeyStateError, PlanError
from tests.engines.ranks import full, host_of
from tests.keys.cases import slow_
from tests.keys.tiers import double, key_of, slots_in
from tests.ranks import joined
from tests.surgery.tiny import anatomy, batch, cut, gap

ROWS, STEPS = 8, 3


def optimizer_of(model: Any, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def share_of(host: str, data: dict[str, Tensor], micro: int) -> list[dict[str, Tensor]]:
    ranks, rank = (1, 0) if host == "one" else (dist.get_world_size(), dist.get_rank())
    each = ROWS // ranks
    mine = cut(data, rank * each, (rank + 1) * each)
    return [cut(mine, k * each // micro, (k + 1) * each // micro) for k in range(micro)]


def batches(method: str, k: int) -> Any:
    if method == "finetune":
        return {"private": batch(ROWS, seed=2 * k), "public": batch(ROWS, seed=2 * k + 1)}
    return batch(ROWS, seed=k)


def method_of(name: str, kind: str) -> gs.Method:
    key, found = key_of(kind), anatomy(kind)
    if name == "plain":
        return gs.methods.plain()
    if name == "finetune":
        return gs.methods.private_finetune(key, found, kl_weight=0.3, l2=0.1)
    return gs.methods.tiered(key, found, step_in=name, every=1)  # type: ignore[arg-type]


def train(name: str, kind: str, host: str, micro: int = 1, optimizer: str = "sgd") -> dict[str, Tensor]:
    """Weights after three steps."""
    model = double(kind)
    views = {"gradient_as_bucket_view": True}
    wrapped = nn.parallel.DistributedDataParallel(model, **views) if host == "ddp views" else host_of(model, host)  # type: ignore[arg-type]
    stepper = optimizer_of(model, optimizer)
    with gs.attach(method_of(name, kind), wrapped, stepper) as surgery:
        for k in range(STEPS):
            data = batches(name, k)
            if name == "finetune":
                streams = {s: share_of(host, d, micro) for s, d in data.items()}
                parts: list[Any] = [{s: streams[s][m] for s in streams} for m in range(micro)]
            else:
                parts = share_of(host, data, micro)
            items = surgery.count_items(parts, average=host != "one")
            for m, part in enumerate(parts):
                last = m + 1 == micro
                if host == "fsdp2":
                    model.set_requires_gradient_sync(last)  # what a host asks for that accumulates
                with wrapped.no_sync() if host == "ddp" and not last else contextlib.nullcontext():
                    surgery.backward(part, num_items=items)
            stepper.step()
            stepper.zero_grad()
    return full(model)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}


def there_and_back(kind: str, host: str) -> dict[str, Any]:
    """Weights, gradients and moments under a key, against the slow way on the whole tensors."""
    model, key = double(kind), key_of(kind)
    wrapped = host_of(model, host)
    optimizer = optimizer_of(model, "adamw")
    data = share_of(host, batch(ROWS), 1)[0]
    inputs = {"input_ids": data["input_ids"], "use_cache": False}
    for _ in range(2):
        wrapped(**inputs).logits.square().sum().backward()
        optimizer.step()

    def found() -> dict[str, Tensor]:
        out = {f"{n}": p for n, p in model.named_parameters()}
        out |= {f"{n}/grad": p.grad for n, p in model.named_parameters()}
        out |= {
            f"{n}/{m}": optimizer.state[p][m] for n, p in model.named_parameters() for m in ("exp_avg", "exp_avg_sq")
        }
        return whole(out)

    before = found()
    wanted = {n: t.clone() for n, t in before.items()}
    for suffix in ("", "/grad", "/exp_avg", "/exp_avg_sq"):
        named = {n: wanted[f"{n}{suffix}"] for n, _ in model.named_parameters()}
        slow_(named, slots_in(kind), key)
    key.apply_(wrapped, optimizer=optimizer)
    there = found()
    saved: list[int] = []
    for save in (model.state_dict, wrapped.state_dict):
        with contextlib.suppress(KeyStateError):
            saved.append(len(save()))
    key.unapply_(wrapped, optimizer=optimizer)
    return {"there": gap(there, wanted), "back": gap(found(), before), "moved": gap(before, wanted), "saving": saved}


def gathered(kind: str, host: str) -> float:
    """C2 after a forward without a backward, which leaves weights gathered: the outputs, against one process."""
    data = {"input_ids": batch(ROWS)["input_ids"], "use_cache": False}
    key, outputs = key_of(kind), []
    for place in (host, "one"):
        model = double(kind)
        wrapped = host_of(model, place)
        before = wrapped(**data).logits.detach()
        key.apply_(wrapped)
        keyed = wrapped(**data).logits.detach()
        key.unapply_(wrapped)
        after = wrapped(**data).logits.detach()
        outputs.append({"before": before, "keyed": keyed, "after": after})
        assert torch.equal(before, after) and not torch.equal(before, keyed)
    return gap(*outputs)


def unreduced(kind: str) -> str:
    """Gradients that FSDP keeps to itself cannot follow: refused, and nothing has moved."""
    model, key = double(kind), key_of(kind)
    wrapped = host_of(model, "fsdp2")
    before = full(model)
    model.set_requires_gradient_sync(False)
    wrapped(input_ids=batch(ROWS)["input_ids"], use_cache=False).logits.sum().backward()
    try:
        key.apply_(wrapped)
    except PlanError as error:
        assert gap(full(model), before) == 0.0
        model.set_requires_gradient_sync(True)
        wrapped(input_ids=batch(ROWS)["input_ids"], use_cache=False).logits.sum().backward()
        key.apply_(wrapped)
        return str(error)
    return "moved"


def main(host: str, kind: str, directory: str) -> None:
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    results["swap"] = there_and_back(kind, host)
    results["gathered"] = gathered(kind, host)
    one = {name: train(name, kind, "one") for name in ("plain", "C1", "C2", "finetune")}
    results["stock"] = gap(train("plain", kind, host), one["plain"])
    for name in ("C1", "C2", "finetune"):
        results[f"{name}"] = gap(train(name, kind, host), one[name])
        results[f"{name} in parts"] = gap(train(name, kind, host, micro=2), one[name])
    adamw = [train(name, kind, host, optimizer="adamw") for name in ("C1", "C2")]
    if host == "fsdp2":
        results["unreduced"] = unreduced(kind)
    else:
        results["C1 in views"] = gap(train("C1", kind, "ddp views"), one["C1"])
    results["both ways to step"] = gap(*adamw)
    if dist.get_rank() == 0:
        Path(directory, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with joined(sys.argv[-1]):
        main(sys.argv[1], sys.argv[2], sys.argv[3])
