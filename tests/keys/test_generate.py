"""Drawing keys: as large as asked for, across layers, disjoint, repeatable where asked; and how many there are."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradsurgery as gs
from gradsurgery.errors import SelectionError
from gradsurgery.keys import Dimensions
from tests.keys.cases import ARCHITECTURES, HALVES, Slot, slots, source
from tests.keys.tiers import key_of
from tests.surgery.tiny import anatomy as tiny_anatomy
from tests.transforms.cases import case

pytestmark = pytest.mark.filterwarnings("ignore::gradsurgery.errors.KeyWarning")
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def size(slot: Slot, consumers: bool | None = None) -> int:
    both = zip(slot.shape, slot.slices, slot.consumer, strict=True)
    return sum(math.prod(s) for s, (n, _), c in both if consumers in (None, c) and "score_correction" not in n)


def table(name: str) -> dict[tuple[str, int, int], Slot]:
    return {(s.kind, s.layer, s.index): s for s in slots(name)}


def swappable(name: str) -> int:
    return sum(size(s) for s in slots(name) if s.kind != "expert")


def layers_of(key: gs.PermutationKey) -> list[tuple[int, int]]:
    return [(a[0], b[0]) for swaps in key.lists.values() for a, b in swaps]


@each_architecture
@few
@given(data=st.data())
def test_as_large_as_asked_for(name: str, data: st.DataObject) -> None:
    """Both ends counted: no more than the fraction, and less than one more swap below it."""
    c = case(name)
    fraction = data.draw(st.floats(0.4 if name == "mamba2" else 0.05, 0.4 if name == "mamba2" else 0.25))
    ratio = data.draw(st.floats(0.0 if name != "mamba2" else 0.2, 0.3))
    options: dict[str, Any] = {"attention_ratio": ratio, "seed": data.draw(st.integers(0, 99))}
    key = gs.PermutationKey.generate(c.anatomy, fraction, **options)
    found, budget = key.region(c.anatomy).numel(), fraction * swappable(name)
    kind = "neuron" if any(s.kind == "neuron" for s in slots(name)) else "head"
    smallest = 2 * min(size(s) for s in slots(name) if s.kind == kind)
    assert budget - smallest < found <= budget
    assert all(a != b for a, b in layers_of(key))
    assert key.model == c.anatomy.fingerprint
    heads = sum(2 * size(table(name)["head", a[0], a[1]]) for a, _ in key.attn_heads)
    if kind == "neuron":
        assert heads <= ratio * budget


@each_architecture
def test_of_the_whole_model(name: str) -> None:
    c = case(name)
    fraction = 0.36 if name == "mamba2" else 0.1
    key = gs.PermutationKey.generate(c.anatomy, fraction, of="all", seed=1)
    total = sum(p.numel() for p in c.model.parameters())
    smallest = 2 * min(size(s) for s in slots(name))
    assert fraction * total - smallest < key.region(c.anatomy).numel() <= fraction * total


@pytest.mark.parametrize("name", ["gpt_neo", "llama", "mixtral", "t5"])
def test_several_keys_are_disjoint_and_of_one_size(name: str) -> None:
    c = case(name)
    keys = gs.PermutationKey.generate(c.anatomy, fraction=0.09, attention_ratio=0.1, count=4, seed=2)
    regions = [key.region(c.anatomy) for key in keys]
    assert all(not (a & b) for a, b in itertools.combinations(regions, 2))
    assert max(r.numel() for r in regions) - min(r.numel() for r in regions) < 2 * max(
        size(s) for s in slots(name) if s.kind == "neuron"
    )
    whole = gs.PermutationKey.compose(*keys)
    assert whole.region(c.anatomy) == regions[0] | regions[1] | regions[2] | regions[3]
    assert len(whole) == sum(map(len, keys))


@pytest.mark.parametrize(
    ("options", "list_"),
    [
        ({"attention": "output", "attention_ratio": 1.0}, "attn_out_heads"),
        ({"mlp": "up", "attention_ratio": 0.0}, "mlp_up_cols"),
        ({"mlp": "down", "attention_ratio": 0.0}, "mlp_down_cols"),
    ],
)
@pytest.mark.parametrize("name", ["gpt_neo", "llama", "gpt2", "mixtral"])
def test_half_unit_keys_touch_their_side_alone(name: str, options: Any, list_: str) -> None:
    c, model = case(name), case(name).copy()
    key = gs.PermutationKey.generate(c.anatomy, fraction=0.08, seed=3, **options)
    assert set(key.lists) == {list_}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    key.apply_(model, anatomy=c.anatomy)
    consumers, kind = HALVES[list_][1], HALVES[list_][0]
    sides = {n: c_ for s in slots(name) if s.kind == kind for (n, _), c_ in zip(s.slices, s.consumer, strict=True)}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(sides[n] == consumers for n in moved)


class TestDimensions:
    """A key for a model that is not there."""

    def model(self, kind: str, **fields: Any) -> Any:
        import transformers

        config = transformers.CONFIG_MAPPING[kind](**fields)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)

    @pytest.mark.slow
    @pytest.mark.parametrize("of", ["swappable", "all"])
    def test_64m(self, of: Any) -> None:
        """The originals' 64M."""
        import transformers

        types = [[["global", "local"], 6]]
        fields = {"hidden_size": 512, "num_layers": 12, "num_heads": 32, "intermediate_size": 2048}
        config = transformers.GPTNeoConfig(**fields, attention_types=types, max_position_embeddings=1024)
        model = transformers.GPTNeoForCausalLM(config)
        found = gs.dissect(model)
        total = sum(p.numel() for p in model.parameters())
        key = gs.PermutationKey.generate(found, fraction=0.2, of=of, seed=0)
        blind = gs.PermutationKey.generate(Dimensions(12, 32, 512, 2048, total=total), fraction=0.2, of=of, seed=0)
        assert {n: len(s) for n, s in key.lists.items()} == {n: len(s) for n, s in blind.lists.items()}
        assert key.region(found).numel() == blind.region(found).numel()
        if of == "swappable":  # 20% of 37,773,312; a swap of heads is 65,536 entries, one of neurons 2,050
            assert (len(key.attn_heads), len(key.mlp_cols)) == (28, 2790)

    @pytest.mark.parametrize(
        ("name", "more"), [("gpt_neo", {}), ("llama", {"num_kv_heads": 2, "gated": True, "mlp_bias": False})]
    )
    def test_sizes_are_those_of_the_anatomy(self, name: str, more: Any) -> None:
        found = tiny_anatomy(name)
        heads = {"gpt_neo": 3, "llama": 4}[name]
        blind = Dimensions(2, heads, 24, 20, **more)
        assert blind.entries("swappable") == (found.kv_groups | found.neurons).numel()
        for fraction, ratio in (
            (0.1, 0.0),
            (0.2, 0.25),
            (0.4, 1.0),
            {"gpt_neo": (0.5, 0.5), "llama": (0.56, 0.55)}[name],
        ):
            both = [
                gs.PermutationKey.generate(one, fraction=fraction, attention_ratio=ratio, seed=0)
                for one in (found, blind)
            ]
            assert len(both[0].attn_heads) == len(both[1].attn_heads)
            assert len(both[0].mlp_cols) == len(both[1].mlp_cols)
            both[1].validate(found)
            assert both[1].model is None

    def test_bad_dimensions(self) -> None:
        for fields, message in (
            ({"num_layers": 0}, "num_layers is a positive whole number"),
            ({"hidden_size": 2.0}, "hidden_size is a positive whole number"),
            ({"num_kv_heads": 5}, "do not share"),
        ):
            with pytest.raises(SelectionError, match=message):
                Dimensions(
                    **dict[str, Any]({"num_layers": 2, "num_heads": 4, "hidden_size": 8, "mlp_dim": 8, **fields})
                )
        with pytest.raises(SelectionError, match="needs Dimensions"):
            gs.PermutationKey.generate(Dimensions(2, 4, 8, 8), of="all")
        with pytest.raises(SelectionError, match="knows no experts"):
            gs.PermutationKey.generate(Dimensions(2, 4, 8, 8), expert_ratio=0.5)


class TestRandomness:
    def test_seeds(self) -> None:
        c = case("gpt_neo")
        one, again, other = (gs.PermutationKey.generate(c.anatomy, seed=s) for s in (7, 7, 8))
        assert one == again and hash(one) == hash(again) and one.fingerprint == again.fingerprint
        assert one != other and one.fingerprint != other.fingerprint

    def test_without_a_seed_every_key_is_new(self) -> None:
        torch.manual_seed(0)
        one = gs.PermutationKey.generate(case("gpt_neo").anatomy)
        torch.manual_seed(0)
        assert one != gs.PermutationKey.generate(case("gpt_neo").anatomy)

    def test_passphrases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from gradsurgery.keys import passphrase

        monkeypatch.setitem(passphrase.COST, "n", 2**10)
        draw = gs.PermutationKey.generate
        one, again = (draw(case("gpt_neo").anatomy, passphrase="correct horse") for _ in range(2))
        assert one == again
        assert one != draw(case("gpt_neo").anatomy, passphrase="correct horse ")
        llama, qwen = (draw(case(n).anatomy, passphrase="correct horse") for n in ("llama", "qwen3"))
        assert llama.lists != qwen.lists, "one passphrase gives each model a key of its own"

    def test_a_passphrase_is_slow_and_stable(self) -> None:
        """What a passphrase gives is a promise to everybody who wrote one down."""
        from gradsurgery.keys import passphrase

        assert passphrase.COST["n"] * passphrase.COST["r"] * 128 >= 2**27
        found = passphrase.PassphraseRandom("correct horse", "model")
        assert [found.randrange(1000) for _ in range(5)] == [753, 184, 928, 977, 746]

    def test_bad_sources(self) -> None:
        draw, found = gs.PermutationKey.generate, case("gpt_neo").anatomy
        for options, message in (
            ({"seed": 1, "passphrase": "a"}, "not from both"),
            ({"seed": 1.5}, "seed is a whole number"),
            ({"seed": True}, "seed is a whole number"),
            ({"passphrase": ""}, "non-empty text"),
            ({"passphrase": 5}, "non-empty text"),
        ):
            with pytest.raises(SelectionError, match=message):
                draw(found, **options)

    def test_every_slot_and_pair_of_layers_is_drawn_alike(self) -> None:
        """Over many keys, each neuron is as likely as any other, and so is each pair of layers."""
        found = case("gpt_neo").anatomy
        counts: dict[Any, int] = {}
        between: dict[Any, int] = {}
        for seed in range(400):
            key = gs.PermutationKey.generate(found, fraction=0.1, attention_ratio=0.0, seed=seed)
            for a, b in key.mlp_cols:
                between[tuple(sorted((a[0], b[0])))] = between.get(tuple(sorted((a[0], b[0]))), 0) + 1
                for slot in (a, b):
                    counts[slot] = counts.get(slot, 0) + 1
        assert len(counts) == 156
        mean = sum(counts.values()) / 156
        assert sum((n - mean) ** 2 for n in counts.values()) / mean < 156 + 5 * math.sqrt(2 * 156)
        pairs = sum(between.values()) / 3
        assert set(between) == {(0, 1), (0, 2), (1, 2)}
        assert sum((n - pairs) ** 2 for n in between.values()) / pairs < 15


class TestLimits:
    def test_everything_pairs_where_it_can(self) -> None:
        """At fraction 1.0 every slot is taken, across layers."""
        found = tiny_anatomy("gpt_neo")  # two layers alike
        for seed in range(5):
            key = gs.PermutationKey.generate(found, fraction=1.0, attention_ratio=2304 * 2 / 6568, seed=seed)
            assert key.region(found) == found.heads | found.neurons
            assert all(a != b for a, b in layers_of(key))

    @pytest.mark.parametrize("name", ["gpt_neo", "llama", "opt"])
    def test_three_layers_pair_up_to_the_last_slot(self, name: str) -> None:
        """Odd counts leave one slot at most."""
        found = case(name).anatomy
        neurons = found.neurons.numel()
        share = neurons / (found.kv_groups | found.neurons).numel()
        for seed in range(10):
            key = gs.PermutationKey.generate(found, fraction=share, attention_ratio=0.0, seed=seed)
            assert key.region(found).numel() == neurons
            assert all(a != b for a, b in layers_of(key))

    def test_more_than_there_is(self) -> None:
        found = case("gpt_neo").anatomy
        with pytest.raises(SelectionError, match=r"attn_heads: the budget of .* needs more swaps than the model has"):
            gs.PermutationKey.generate(found, fraction=0.9, attention_ratio=1.0)
        with pytest.raises(SelectionError, match=r"mlp_cols: .* Lower fraction"):
            gs.PermutationKey.generate(found, fraction=0.5, count=3)
        with pytest.raises(SelectionError, match="less than one swap"):
            gs.PermutationKey.generate(found, fraction=0.0)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fraction": 1.1}, "fraction is a number from 0 to 1"),
            ({"fraction": -0.1}, "fraction is a number from 0 to 1"),
            ({"fraction": True}, "fraction is a number from 0 to 1"),
            ({"fraction": "0.2"}, "fraction is a number from 0 to 1"),
            ({"fraction": float("nan")}, "fraction is a number from 0 to 1"),
            ({"attention_ratio": 2}, "attention_ratio is a number from 0 to 1"),
            ({"attention_ratio": 0.8, "expert_ratio": 0.5}, "more than the whole"),
            ({"of": "some"}, "of is one of"),
            ({"pairing": "same_layer"}, "pairing is one of"),
            ({"attention": "half"}, "attention is one of"),
            ({"mlp": "both"}, "mlp is one of"),
            ({"count": 0}, "count is a positive whole number"),
            ({"count": 1.0}, "count is a positive whole number"),
            ({"expert_ratio": 0.3}, "has no experts"),
        ],
    )
    def test_options(self, options: Any, message: str) -> None:
        with pytest.raises(SelectionError, match=message):
            gs.PermutationKey.generate(case("gpt_neo").anatomy, **options)

    def test_experts(self) -> None:
        """Whole experts, and neurons of the others alone."""
        c = case("mixtral")
        key = gs.PermutationKey.generate(c.anatomy, fraction=0.3, expert_ratio=0.5, seed=0)
        assert key.experts and key.mlp_cols
        taken = {tuple(slot) for swap in key.experts for slot in swap}
        inside = {(layer, index // 13) for swap in key.mlp_cols for layer, index in swap}
        assert not taken & inside
        assert key.region(c.anatomy).numel() <= 0.3 * swappable("mixtral")


class TestEntropy:
    """Against counting every key of a tiny model."""

    def keys(self, m: int, layers: int, between: dict[tuple[int, int], int]) -> list[Any]:
        """Every key of ``layers`` places of ``m`` slots with so many swaps between each pair of places."""
        free = [(layer, i) for layer in range(layers) for i in range(m)]
        pairs = [(a, b) for k, a in enumerate(free) for b in free[k + 1 :]]
        out = []

        def grow(start: int, left: dict[tuple[int, int], int], chosen: list[Any], used: set[Any]) -> None:
            if not any(left.values()):
                out.append(tuple(chosen))
                return
            for k in range(start, len(pairs)):
                a, b = pairs[k]
                at = (a[0], b[0])
                if left.get(at) and a not in used and b not in used:
                    grow(k + 1, {**left, at: left[at] - 1}, [*chosen, pairs[k]], used | {a, b})

        grow(0, between, [], set())
        return out

    def bits(self, swaps: Any, functional: bool = False, list_: str = "mlp_cols") -> float:
        key = gs.PermutationKey(**dict[str, Any]({list_: swaps}))
        return key.entropy_bits(self.anatomy, functional)

    @property
    def anatomy(self) -> gs.Anatomy:
        return _three_layers()

    @pytest.mark.parametrize(
        "between",
        [
            {(0, 1): 1},
            {(0, 1): 2},
            {(0, 1): 3},
            {(0, 1): 1, (1, 2): 1},
            {(0, 1): 2, (0, 2): 1},
            {(0, 1): 1, (0, 2): 1, (1, 2): 1},
            {(0, 0): 1},
            {(0, 0): 2, (1, 2): 1},
            {(0, 0): 1, (0, 1): 1},
        ],
    )
    def test_counts_of_keys(self, between: dict[tuple[int, int], int]) -> None:
        every = self.keys(4, 3, between)
        assert self.bits(every[0]) == pytest.approx(math.log2(len(every)), abs=1e-9)
        assert self.bits(every[-1]) == pytest.approx(math.log2(len(every)), abs=1e-9)
        halves = self.bits(every[0], list_="mlp_up_cols")
        assert halves == pytest.approx(math.log2(len(every)), abs=1e-9)

    @pytest.mark.parametrize(
        "between", [{(0, 1): 1}, {(0, 1): 2}, {(0, 1): 2, (0, 2): 1}, {(0, 0): 1}, {(0, 0): 1, (1, 2): 2}]
    )
    def test_counts_of_functions(self, between: dict[tuple[int, int], int]) -> None:
        """Keys that put the same neurons into the same layers compute the same."""
        every = self.keys(4, 3, between)
        functions = set()
        for key in every:
            held = {layer: {(layer, i) for i in range(4)} for layer in range(3)}
            for a, b in key:
                if a[0] != b[0]:
                    held[a[0]] ^= {a, b}
                    held[b[0]] ^= {a, b}
            functions.add(tuple(frozenset(held[layer]) for layer in range(3)))
        assert self.bits(every[0], functional=True) == pytest.approx(math.log2(len(functions)), abs=1e-9)

    def test_of_a_real_key(self) -> None:
        c = case("gpt_neo")
        key = gs.PermutationKey.generate(c.anatomy, fraction=0.2, seed=0)
        assert key.entropy_bits(c.anatomy) > key.entropy_bits(c.anatomy, functional=True) > 30
        lists = [gs.PermutationKey(attn_heads=key.attn_heads), gs.PermutationKey(mlp_cols=key.mlp_cols)]
        assert key.entropy_bits(c.anatomy) == pytest.approx(sum(k.entropy_bits(c.anatomy) for k in lists if len(k)))


def _three_layers() -> gs.Anatomy:
    import transformers

    if "anatomy" not in _CACHE:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=4, num_hidden_layers=3, num_attention_heads=2
        )
        _CACHE["anatomy"] = gs.dissect(transformers.LlamaForCausalLM(config))
    return _CACHE["anatomy"]


_CACHE: dict[str, gs.Anatomy] = {}


class TestAlgebra:
    def test_equality_is_of_what_a_key_does(self) -> None:
        key = gs.PermutationKey(mlp_cols=[[[0, 3], [1, 5]], [[0, 9], [1, 2]]])
        other = gs.PermutationKey(mlp_cols=(((1, 2), (0, 9)), ((0, 3), (1, 5))), model="somewhere else")
        assert key == other and hash(key) == hash(other) and key.fingerprint == other.fingerprint
        assert {key: 1}[other] == 1
        assert key != gs.PermutationKey(mlp_up_cols=key.mlp_cols)
        assert key != gs.PermutationKey(mlp_cols=key.mlp_cols[:1])
        assert key != "key" and key != 3
        assert len(key) == 2

    def test_nothing_shown_gives_the_swaps_away(self) -> None:
        key = gs.PermutationKey(mlp_cols=[[[0, 31], [1, 52]]], attn_heads=[[[0, 71], [1, 61]]])
        for text in (repr(key), str(key), f"{key}", key.describe()):
            assert not re.search(r"\b(31|52|71|61)\b", text)
            assert key.fingerprint in text

    @few
    @given(data=st.data())
    def test_composition_is_one_after_the_other(self, data: st.DataObject) -> None:
        c, model = case("llama"), case("llama").copy()
        keys = gs.PermutationKey.generate(c.anatomy, fraction=0.1, count=3, seed=data.draw(st.integers(0, 99)))
        order = data.draw(st.permutations(keys))
        _, whole = source("llama", gs.PermutationKey.compose(*order), model)
        steps = torch.arange(whole.numel())
        for key in keys:
            steps = steps[source("llama", key, model)[1]]
        assert torch.equal(whole, steps)

    def test_compositions_that_make_no_sense(self) -> None:
        one = key_of("gpt_neo")
        with pytest.raises(SelectionError, match="both move"):
            gs.PermutationKey.compose(one, one.subset(0.5, seed=0))
        halves = gs.PermutationKey(mlp_up_cols=one.mlp_cols), gs.PermutationKey(mlp_down_cols=one.mlp_cols)
        assert len(gs.PermutationKey.compose(*halves)) == 2 * len(one.mlp_cols)
        with pytest.raises(gs.errors.ArtefactError, match="different models"):
            gs.PermutationKey.compose(
                gs.PermutationKey(mlp_cols=[[[0, 0], [1, 0]]], model="a"),
                gs.PermutationKey(mlp_cols=[[[0, 1], [1, 1]]], model="b"),
            )
        assert gs.PermutationKey.compose(one) == one

    @few
    @given(st.floats(0, 1), st.integers(0, 99))
    def test_subsets(self, fraction: float, seed: int) -> None:
        key = gs.PermutationKey.generate(case("gpt_neo").anatomy, fraction=0.25, seed=1)
        part = key.subset(fraction, seed)
        assert len(part) == round(fraction * len(key))
        assert all(set(part.lists[n]) <= set(key.lists[n]) for n in part.lists)
        assert part == key.subset(fraction, seed) and part.model == key.model
        assert key.subset(1.0) == key

    def test_subsets_without_a_seed_differ(self) -> None:
        key = gs.PermutationKey.generate(case("gpt_neo").anatomy, fraction=0.25, seed=1)
        assert key.subset(0.5) != key.subset(0.5)
        for fraction in (1.5, -1, True, "half"):
            with pytest.raises(SelectionError, match="fraction is a number from 0 to 1"):
                key.subset(fraction)  # type: ignore[arg-type]

    def test_for_any_model(self) -> None:
        key = key_of("gpt_neo")
        free = key.for_any_model()
        assert free == key and free.model is None and key.model is not None
        assert dataclasses.replace(free, model="x").model == "x"
