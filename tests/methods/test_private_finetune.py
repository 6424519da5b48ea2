"""Private finetuning: its gradient by hand, what stands still to the bit, anchors, and runs that go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.errors import PlanError
from tests.keys.tiers import combine, double, key_of, keys_of, loss_of, mask_of, tier_gradient, trained, turned, windows
from tests.surgery.tiny import anatomy, batch, build, gap, grads, weights

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")
KIND = "gpt_neo"


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))


def both(k: int = 0, rows: int = 4) -> dict[str, dict[str, Tensor]]:
    """Other texts in private and in public, of other lengths and numbers of rows."""
    return {"private": batch(rows, seed=2 * k), "public": batch(rows + 1, seed=2 * k + 1)}


def logits_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], use_cache=False).logits


def kl_to(frozen: Any, keys: list[gs.PermutationKey], given: dict[str, Tensor]) -> Callable[[Any], Tensor]:
    """KL(frozen || model) by hand, each in its tier: summed over the vocabulary, a mean over tokens without padding."""
    with torch.no_grad(), turned(frozen, KIND, keys):
        reference = logits_of(frozen, given).log_softmax(-1)

    def loss(model: Any) -> Tensor:
        current = logits_of(model, given).log_softmax(-1)
        kl = (reference.exp() * (reference - current)).sum(-1)
        return kl[given["attention_mask"].bool()].mean()

    return loss


def disturbed(model: Any, region: gs.Region, seed: int = 0) -> Any:
    """The model after some finetuning of a region."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.add_(torch.where(mask_of(region, name), noise.to(p.dtype), torch.zeros_like(p)))
    return model


class TestGradient:
    @pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
    @pytest.mark.parametrize("permute", [True, False])
    def test_by_hand(self, weight: float, permute: bool) -> None:
        key, model, frozen, data = key_of(KIND), double(KIND), double(KIND), both()
        keyed = key.region(anatomy(KIND))
        method = gs.methods.private_finetune(key, anatomy(KIND), kl_weight=weight, permute=permute)
        with gs.attach(method, model, adamw(model)) as surgery:
            disturbed(model, keyed)
            divergence = kl_to(frozen, [], data["public"])  # weighted before its backward, which is float32 in part
            kl = tier_gradient(model, KIND, [], lambda m: weight * divergence(m))
            turn = [key] if permute else []
            ce = tier_gradient(model, KIND, turn, lambda m: (1 - weight) * loss_of(m, data["private"]))
            wanted = combine([(kl, [(keyed, 1.0)]), (ce, [(keyed, 1.0)])])
            losses = surgery.backward(data)
            found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
            assert gap(found, wanted) <= 1e-12 * max(float(g.abs().max()) for g in wanted.values())
        assert set(losses) == {n for n, w in (("public", weight), ("private", 1 - weight)) if w}
        if weight:
            assert float(losses["public"]) == pytest.approx(
                float(kl_to(frozen, [], data["public"])(model).detach()), rel=1e-5
            )

    def test_padding_is_nobodys_business(self) -> None:
        """Whatever stands in it."""
        key, found = key_of(KIND), []
        for filler in (0, 7):
            model, data = double(KIND), both()
            for part in data.values():
                part["input_ids"] = part["input_ids"].masked_fill(part["attention_mask"] == 0, filler)
            with gs.attach(gs.methods.private_finetune(key, anatomy(KIND), 0.5), model, adamw(model)) as surgery:
                disturbed(model, key.region(anatomy(KIND)))
                surgery.backward(data)
                found.append(grads(model))
        assert gap(*found) < 1e-12

    def test_anchors(self) -> None:
        """Tiers of before are held to what they were, each in its own configuration, sharing the weight equally."""
        (one, two, three), model, frozen, data = keys_of(KIND, 3), double(KIND), double(KIND), both()
        keyed = three.region(anatomy(KIND))
        method = gs.methods.private_finetune(three, anatomy(KIND), kl_weight=0.6, anchors=[one, two])
        with gs.attach(method, model, adamw(model)) as surgery:
            disturbed(model, keyed)
            parts = [tier_gradient(model, KIND, [three], lambda m: 0.4 * loss_of(m, data["private"]))]
            for keys in ([], [one], [two]):
                divergence = kl_to(frozen, keys, data["public"])
                parts.append(tier_gradient(model, KIND, keys, lambda m, kl=divergence: 0.6 / 3 * kl(m)))  # type: ignore[misc]
            wanted = combine([(part, [(keyed, 1.0)]) for part in parts])
            assert set(surgery.backward(data)) == {"public", "anchor 1", "anchor 2", "private"}
            found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
            assert gap(found, wanted) <= 1e-12

    def test_a_reference_of_ones_own(self) -> None:
        key, model, teacher, data = key_of(KIND), double(KIND), double(KIND, seed=3), both()
        keyed = key.region(anatomy(KIND))
        reference = gs.losses.frozen(teacher)
        method = gs.methods.private_finetune(key, anatomy(KIND), kl_weight=1.0, reference=reference)
        with gs.attach(method, model, adamw(model)) as surgery:
            wanted = tier_gradient(model, KIND, [], kl_to(teacher, [], data["public"]))
            surgery.backward(data)
            found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
            assert gap(found, combine([(wanted, [(keyed, 1.0)])])) < 1e-12


class TestSteps:
    @pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_public_entries_are_bit_identical(self, kind: str, dtype: torch.dtype) -> None:
        """After steps of AdamW with decay and momentum, that of training before among them."""
        key, model = key_of(kind), build(kind).to(dtype)
        keyed, optimizer = key.region(anatomy(kind)), adamw(model)
        trained(gs.methods.plain(), model, optimizer, windows(2))
        before = weights(model)
        with gs.attach(gs.methods.private_finetune(key, anatomy(kind), l2=0.1), model, optimizer) as surgery:
            for k in range(4):
                surgery.backward(both(k))
                optimizer.step()
                optimizer.zero_grad()
        for name, p in model.named_parameters():
            inside = mask_of(keyed, name)
            assert torch.equal(p[~inside], before[name][~inside]), name
            assert not inside.any() or not torch.equal(p[inside], before[name][inside])

    def test_at_the_reference_the_divergence_moves_nothing(self) -> None:
        key, model = key_of(KIND), double(KIND)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = weights(model)
        with gs.attach(gs.methods.private_finetune(key, anatomy(KIND), kl_weight=1.0), model, optimizer) as surgery:
            losses = surgery.backward(both())
            optimizer.step()
        assert float(losses["public"]) == pytest.approx(0.0, abs=1e-12)
        assert gap(weights(model), before) < 1e-12

    def test_l2_decays_keyed_entries_alone(self) -> None:
        """theta <- theta (1 - lr l2) before the step."""
        key, found = key_of(KIND), []
        keyed = key.region(anatomy(KIND))
        for l2 in (0.0, 0.3):
            model = double(KIND)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with gs.attach(gs.methods.private_finetune(key, anatomy(KIND), l2=l2), model, optimizer) as surgery:
                surgery.backward(both())
                optimizer.step()
            found.append(weights(model))
        start = weights(double(KIND))
        wanted = {n: torch.where(mask_of(keyed, n), found[0][n] - 0.1 * 0.3 * start[n], found[0][n]) for n in start}
        assert gap(found[1], wanted) < 1e-12

    def test_a_chain_of_tiers(self) -> None:
        """Both tiers pretrained, the first finetuned, then the second with the first as an anchor."""
        (one, two), model = keys_of(KIND, 2), double(KIND)
        regions = [key.region(anatomy(KIND)) for key in (one, two)]
        optimizer = adamw(model)
        trained(gs.methods.tiered([one, two], anatomy(KIND)), model, optimizer, windows(3))
        for stage, (key, anchors) in enumerate(((one, []), (two, [one]))):
            before, other = weights(model), regions[1 - stage]
            method = gs.methods.private_finetune(key, anatomy(KIND), kl_weight=0.5, anchors=anchors)
            first = last = 0.0
            with gs.attach(method, model, optimizer) as surgery:
                for _ in range(8):
                    losses = surgery.backward(both())
                    first, last = first or float(losses["private"]), float(losses["private"])
                    optimizer.step()
                    optimizer.zero_grad()
            assert last < first - 0.05
            assert set(losses) == {"public", "private", *(f"anchor {k + 1}" for k in range(len(anchors)))}
            after = weights(model)
            for region in (other, ~(regions[0] | regions[1])):
                assert all(torch.equal(after[n][mask_of(region, n)], before[n][mask_of(region, n)]) for n in after)

    def test_accumulation(self) -> None:
        """Micro-batches of unequal length add up to one batch, in both streams."""
        key, found = key_of(KIND), []
        whole = {"private": batch(4, seed=0), "public": batch(4, seed=1)}
        for micro in (1, 2, 4):
            model = double(KIND)
            method = gs.methods.private_finetune(key, anatomy(KIND), kl_weight=0.4)
            with gs.attach(method, model, adamw(model)) as surgery:
                disturbed(model, key.region(anatomy(KIND)))
                parts = [
                    {s: {n: v[m * 4 // micro : (m + 1) * 4 // micro] for n, v in d.items()} for s, d in whole.items()}
                    for m in range(micro)
                ]
                items = surgery.count_items(parts)
                for part in parts:
                    surgery.backward(part, num_items=items)
                found.append(grads(model))
        size = max(float(g.abs().max()) for g in found[0].values())
        assert gap(found[0], found[1]) < 1e-6 * size  # attention in float32
        assert gap(found[0], found[2]) < 1e-6 * size

    def test_one_autocast_around_everything(self) -> None:
        """References, C1 and C2 run on casts of their own weights."""
        key, found = key_of(KIND), []
        for around in (False, True):
            model = build(KIND)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            method = gs.methods.private_finetune(key, anatomy(KIND), kl_weight=0.5, anchors=[])
            with gs.attach(method, model, optimizer) as surgery:
                disturbed(model, key.region(anatomy(KIND)))
                with torch.autocast("cpu", torch.bfloat16, enabled=around):
                    for k in range(3):
                        with torch.autocast("cpu", torch.bfloat16):
                            surgery.backward(both(k))
                        optimizer.step()
                        optimizer.zero_grad()
            found.append(weights(model))
        assert gap(*found) == 0.0


class TestResume:
    @pytest.mark.parametrize("anchored", [False, True])
    def test_the_first_runs_reference_is_kept(self, anchored: bool) -> None:
        one, two = keys_of(KIND, 2)
        options = {"kl_weight": 0.6, "anchors": [two] if anchored else []}

        def method() -> gs.Method:
            return gs.methods.private_finetune(one, anatomy(KIND), **options)  # type: ignore[arg-type]

        whole, first = double(KIND), double(KIND)
        steps = [both(k) for k in range(4)]

        def run(surgery: Any, optimizer: Any, part: Any) -> None:
            for data in part:
                surgery.backward(data)
                optimizer.step()
                optimizer.zero_grad()

        optimizer = adamw(whole)
        with gs.attach(method(), whole, optimizer) as surgery:
            run(surgery, optimizer, steps)
        optimizer = adamw(first)
        with gs.attach(method(), first, optimizer) as surgery:
            run(surgery, optimizer, steps[:2])
            saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), surgery.state_dict()))
        found = []
        for keep in (True, False):
            second = double(KIND, seed=9)
            second.load_state_dict(saved[0])
            other = adamw(second)
            other.load_state_dict(copy.deepcopy(saved[1]))
            with gs.attach(method(), second, other) as surgery:
                if keep:
                    surgery.load_state_dict(saved[2])
                run(surgery, other, steps[2:])
            found.append(gap(weights(second), weights(whole)))
        assert found[0] == 0.0
        assert found[1] > 1e-6, "the reference of the second run would be its own start"

    def test_states_hold_no_swaps_and_as_much_as_the_region(self) -> None:
        key, model = key_of(KIND), double(KIND)
        with gs.attach(gs.methods.private_finetune(key, anatomy(KIND)), model, adamw(model)) as surgery:
            state = surgery.state_dict()
        (values,) = state["references"].values()
        assert sum(v.numel() for v in values.values()) == key.region(anatomy(KIND)).numel()
        text = str({k: v for k, v in state.items() if k != "references"})
        assert key.fingerprint in text and "[[" not in text and "((" not in text


class TestBadInput:
    @pytest.mark.parametrize("weight", [-0.1, 1.5, True, "0.1", float("nan")])
    def test_weights(self, weight: Any) -> None:
        with pytest.raises(PlanError, match="kl_weight is a number from 0 to 1"):
            gs.methods.private_finetune(key_of(KIND), anatomy(KIND), kl_weight=weight)

    def test_anchors_without_weight(self) -> None:
        one, two = keys_of(KIND, 2)
        with pytest.raises(PlanError, match="anchors share kl_weight"):
            gs.methods.private_finetune(one, anatomy(KIND), kl_weight=0.0, anchors=[two])

    def test_l2(self) -> None:
        with pytest.raises(PlanError, match="rate is a finite number"):
            gs.methods.private_finetune(key_of(KIND), anatomy(KIND), l2=-1.0)

    def test_no_keys(self) -> None:
        for given in (None, "key.json", anatomy(KIND).heads[0, :1]):
            with pytest.raises(PlanError, match=r"takes a gs.PermutationKey"):
                gs.methods.private_finetune(given, anatomy(KIND))  # type: ignore[arg-type]
        with pytest.raises(PlanError, match=r"takes a gs.PermutationKey"):
            gs.methods.private_finetune(key_of(KIND), anatomy(KIND), anchors=["a"])  # type: ignore[list-item]

    def test_batches_without_a_stream(self) -> None:
        model = double(KIND)
        with gs.attach(gs.methods.private_finetune(key_of(KIND), anatomy(KIND)), model, adamw(model)) as surgery:
            for given, stream in (
                ({"private": batch(2)}, "public"),
                ({"public": batch(2)}, "private"),
                (batch(2), "public"),
            ):
                with pytest.raises(gs.errors.BatchError, match=rf"needs batch\['{stream}'\]"):
                    surgery.backward(given)
            assert all(p.grad is None for p in model.parameters())
