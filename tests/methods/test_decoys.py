"""Decoys: partial keys that are held to what they opened before a private finetune."""

from __future__ import annotations

import pytest
import torch

import gradsurgery as gs
from gradsurgery.errors import PlanError
from tests.keys.tiers import combine, double, key_of, loss_of, tier_gradient
from tests.methods.test_private_finetune import KIND, adamw, both, disturbed, kl_to
from tests.surgery.tiny import anatomy, gap

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")


@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_gradient_by_hand(fraction: float) -> None:
    key, model, frozen, data = key_of(KIND), double(KIND), double(KIND), both()
    keyed = key.region(anatomy(KIND))
    method = gs.methods.private_finetune(
        key, anatomy(KIND), kl_weight=0.2, decoys=3, decoy_weight=0.4, decoy_fraction=fraction
    )
    optimizer = adamw(model)
    with gs.attach(method, model, optimizer) as surgery:
        disturbed(model, keyed)
        losses = surgery.backward(data)
        found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    (ran,) = [name for name in losses if name.startswith("decoy")]
    part = key.subset(fraction, seed=int(ran.split()[1]) - 1)
    for p in model.parameters():
        p.grad = None
    public, decoy = kl_to(frozen, [], data["public"]), kl_to(frozen, [part], data["private"])
    parts = [
        tier_gradient(model, KIND, [], lambda m: 0.2 * public(m)),
        tier_gradient(model, KIND, [key], lambda m: 0.8 * loss_of(m, data["private"])),
        tier_gradient(model, KIND, [part], lambda m: 0.4 * decoy(m)),
    ]
    wanted = combine([(gradient, [(keyed, 1.0)]) for gradient in parts])
    assert gap(found, wanted) <= 1e-12 * max(float(g.abs().max()) for g in wanted.values())


def test_one_snapshot_serves_all_and_is_saved_once() -> None:
    key, model = key_of(KIND), double(KIND)
    method = gs.methods.private_finetune(key, anatomy(KIND), decoys=4)
    with gs.attach(method, model, adamw(model)) as surgery:
        kept = surgery.state_dict()["references"]
        assert sum(v.numel() for values in kept.values() for v in values.values()) == key.region(anatomy(KIND)).numel()


@pytest.mark.parametrize("options", [{"decoys": -1}, {"decoys": 1.5}, {"decoys": 2, "decoy_fraction": 1.0}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="decoy"):
        gs.methods.private_finetune(key_of(KIND), anatomy(KIND), **options)  # type: ignore[arg-type]
