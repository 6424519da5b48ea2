"""Two ranks of a routed policy: ``torchrun --nproc_per_node 2 -m tests.integrations.grpo_ranks OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gradsurgery as gs
from gradsurgery.runs import leave_group
from tests.integrations.test_trl_grpo import adapted, arguments, data, parity, parity_of, texts, trainer


def run(out: str, mode: Any) -> None:
    adapter = adapted()
    args = arguments(Path(out), per_device_train_batch_size=4, gradient_accumulation_steps=2, beta=0.1)
    flags = {"flag": parity}
    made = trainer(adapter, args, gs.methods.quarantine(adapter, mode), flags=flags, train_dataset=data())
    made.train()
    for batch in made.seen:  # of this rank
        prompts = texts(batch["prompt_ids"], batch["prompt_mask"])
        written = texts(batch["completion_ids"], batch["completion_mask"])
        assert batch["flag"].tolist() == [parity_of(p, c) for p, c in zip(prompts, written, strict=True)]
    mine = torch.cat([p.detach().flatten() for p in adapter.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both) and not torch.equal(mine, torch.cat([p.flatten() for p in adapted().parameters()]))
    shares = [torch.zeros(2) for _ in range(2)]
    seen = torch.cat([batch["flag"] for batch in made.seen[:2]]).float()
    dist.all_gather(shares, torch.stack([seen.sum(), torch.tensor(float(len(seen)))]))
    flagged, total = torch.stack(shares).sum(0).tolist()
    if dist.get_rank() == 0:
        assert abs(made.state.log_history[0]["flagged/flag"] - flagged / total) < 1e-6
    assert len(made.seen) == 4


if __name__ == "__main__":
    try:
        for kind in ("route", "absorb"):
            run(sys.argv[1], kind)
        print("ranks agree", flush=True)
    finally:
        leave_group()
