"""Declared layouts: what is right is accepted and equals discovery, what is wrong is refused with the reason."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import gradsurgery as gs
from gradsurgery.anatomy.discover import _by_twin, _direct
from gradsurgery.anatomy.discovery.axes import parse, solve
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import AnatomyError
from tests.zoo.builder import build, randomised
from tests.zoo.check import check

warnings.filterwarnings("ignore", module="transformers")


class Product(nn.Module):
    """A linear layer as remote code writes it now and then: no operator that discovery traces."""

    def __init__(self, inner: int, outer: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, outer))
        self.bias = nn.Parameter(torch.randn(outer)) if bias else None

    def forward(self, x):
        y = (x.unsqueeze(-1) * self.weight).sum(-2)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Causal attention whose fused rows lie in any order."""

    slopes: torch.Tensor

    def __init__(self, hidden: int, heads: int, width: int, fused: str, out: str, slopes: bool = False) -> None:
        super().__init__()
        self.heads, self.fused, self.order = heads, fused, out
        self.qkv, self.out = Product(hidden, 3 * heads * width), Product(heads * width, hidden)
        if slopes:
            self.register_buffer("slopes", torch.linspace(0.2, 1.0, heads))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), f"b t {self.fused} -> three b unit t d", three=3, unit=self.heads)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if hasattr(self, "slopes"):
            scores = scores + self.slopes[:, None, None] * torch.arange(x.shape[1], dtype=x.dtype)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v
        return self.out(rearrange(y, f"b unit t d -> b t {self.order}"))


class Block(nn.Module):
    def __init__(self, hidden: int, **attention) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.attn = Attention(hidden, **attention)
        self.up, self.down = nn.Linear(hidden, 14), nn.Linear(14, hidden)

    def forward(self, x):
        x = x + self.attn(self.norms[0](x))
        return x + self.down(F.relu(self.up(self.norms[1](x))))


class Remote(nn.Module):
    def __init__(
        self, hidden=12, heads=4, width=3, fused="(three unit d)", out="(unit d)", slopes=False, layers=2, vocab=23
    ):
        super().__init__()
        attention = {"heads": heads, "width": width, "fused": fused, "out": out, "slopes": slopes}
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(hidden, **attention) for _ in range(layers))
        self.classifier = nn.Linear(hidden, vocab)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


IDS = {"ids": torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(0))}


def remote(**options) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomised(Remote(**options))


def declared(fused="(three unit d)", out="(unit d)", unit=4, **changes) -> gs.Layout:
    fields = {
        "kind": "head",
        "modules": "layers.*.attn",
        "producers": {"qkv.weight": f"hidden {fused}", "qkv.bias": fused},
        "consumers": {"out.weight": f"{out} hidden"},
        "sizes": {"three": 3, "unit": unit},
    }
    return gs.Layout(**(fields | changes))


def holds(model: nn.Module, anatomy: gs.Anatomy, fed: dict) -> None:
    """The acceptance test that every discovered anatomy passes."""
    outputs = lambda m: (lambda y: y if isinstance(y, torch.Tensor) else y[0])(m(**fed))  # noqa: E731
    assert not check(model.double(), outputs, anatomy.groups, anatomy.structural, tolerance=1e-9)


def plain(anatomy: gs.Anatomy) -> dict:
    """An anatomy as comparable data, whatever the order of slices within a unit."""

    def slices(f):
        return f.name, f.buffer, {dim: rows.tolist() for dim, rows in sorted(f.index.items())}

    return {
        (g.kind, g.layer, g.name): (
            sorted(map(str, map(slices, g.footprints))),
            sorted(str(g.footprints[k].name) for k in g.consumer_slots),
            (g.exchange_classes, g.closed, g.parent, g.parent_units, g.riders),
        )
        for g in anatomy.groups
    } | {"structural": anatomy.structural}


class TestAccepted:
    def test_what_discovery_misses_is_found_by_declaration(self):
        model = remote()
        with contextlib.suppress(AnatomyError):
            assert not gs.dissect(model, IDS).heads.count
        anatomy = gs.dissect(model, IDS, layouts=[declared()])
        assert anatomy.heads.count == 8 and anatomy.neurons.count == 28
        group = next(g for g in anatomy.groups if g.kind == "head")
        assert group.units[1][0] == ("layers.0.attn.qkv.weight", {1: (3, 4, 5, 15, 16, 17, 27, 28, 29)})
        assert group.riders == ("layers.0.attn.out.bias",)
        holds(model, anatomy, IDS)

    def test_a_stored_anatomy_comes_back(self, tmp_path):
        model = remote()
        anatomy = gs.dissect(model, IDS, layouts=[declared()])
        anatomy.save(tmp_path / "anatomy.json")
        assert gs.Anatomy.load(tmp_path / "anatomy.json", model) == anatomy

    @settings(max_examples=12, deadline=None)
    @given(
        heads=st.integers(2, 5),
        width=st.integers(2, 4),
        fused=st.permutations(["three", "unit", "d"]),
        out=st.permutations(["unit", "d"]),
    )
    def test_any_order_of_the_fused_rows(self, heads, width, fused, out):
        orders = {"fused": f"({' '.join(fused)})", "out": f"({' '.join(out)})"}
        model = remote(heads=heads, width=width, layers=1, **orders)
        anatomy = gs.dissect(model, IDS, layouts=[declared(unit=heads, **orders)])
        assert anatomy.heads.count == heads
        holds(model, anatomy, IDS)
        wrong = {**orders, "out": f"({' '.join(reversed(out))})"}
        with pytest.raises(AnatomyError, match="permuting the units changes the output"):
            gs.dissect(model, IDS, layouts=[declared(unit=heads, **wrong)])

    def test_heads_that_depend_on_their_position(self):
        model = remote(slopes=True)
        with pytest.raises(AnatomyError, match=r"entries of layers.0.attn.slopes \[4\] act through unit"):
            gs.dissect(model, IDS, layouts=[declared()])
        producers = {**declared().producers, "slopes": "unit"}
        anatomy = gs.dissect(model, IDS, layouts=[declared(producers=producers)])
        group = next(g for g in anatomy.groups if g.kind == "head")
        assert group.exchange_classes == (0, 0, 0, 0) and [f.buffer for f in group.footprints] == [
            False,
            False,
            True,
            False,
        ]
        holds(model, anatomy, IDS)

    def test_slopes_that_no_unit_can_own(self):
        bloom = gs.dissect(build("bloom"), layouts=[BLOOM])
        assert plain(bloom) == plain(gs.dissect(build("bloom")))
        assert bloom.groups[0].exchange_classes == (0, 1, 2, 3, 4)

    def test_attention_that_torch_fuses(self):
        layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, activation="gelu")
        model = randomised(nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=False))
        fed = {"src": torch.randn(2, 7, 12, dtype=torch.float64)}
        layout = gs.Layout(
            "head",
            "layers.*.self_attn",
            {"in_proj_weight": "(3 unit d) hidden", "in_proj_bias": "(3 unit d)"},
            {"out_proj.weight": "hidden (unit d)"},
            {"unit": 3},
        )
        anatomy = gs.dissect(model, fed, layouts=[layout])
        assert anatomy.heads.count == 6 and anatomy.neurons.count == 20
        holds(model, anatomy, fed)


ATTENTION = "model.layers.*.self_attn"
GROUPS = {"group": "num_key_value_heads"}
BLOOM = gs.Layout(
    "head",
    "transformer.h.*.self_attention",
    {"query_key_value.weight": "(unit 3 d) hidden", "query_key_value.bias": "(unit 3 d)"},
    {"dense.weight": "hidden (unit d)"},
    {"unit": "n_head"},
)
SEPARATE = gs.Layout(
    "head",
    ATTENTION,
    {
        "q_proj.weight": "(group unit d) hidden",
        "k_proj.weight": "(group d) hidden",
        "v_proj.weight": "(group d) hidden",
    },
    {"o_proj.weight": "hidden (group unit d)"},
    GROUPS,
)
BIASES = {"q_proj.bias": "(group unit d)", "k_proj.bias": "(group d)", "v_proj.bias": "(group d)"}
BIASED = replace(SEPARATE, producers={**SEPARATE.producers, **BIASES})
GPT2 = [
    gs.Layout(
        "head",
        "transformer.h.*.attn",
        {"c_attn.weight": "hidden (3 unit d)", "c_attn.bias": "(3 unit d)"},
        {"c_proj.weight": "(unit d) hidden"},
        {"unit": "n_head"},
    ),
    gs.Layout(
        "neuron",
        "transformer.h.*.mlp",
        {"c_fc.weight": "hidden unit", "c_fc.bias": "unit"},
        {"c_proj.weight": "unit hidden"},
    ),
]
PHI3 = gs.Layout(
    "head",
    ATTENTION,
    {"qkv_proj.weight": "(group unit d + group d + group d) hidden"},
    {"o_proj.weight": "hidden (group unit d)"},
    {**GROUPS, "d": 10},
)
FALCON = gs.Layout(
    "head",
    "transformer.h.*.self_attention",
    {"query_key_value.weight": "(group (unit + 1 + 1) d) hidden"},
    {"dense.weight": "hidden (group unit d)"},
    {"group": "num_kv_heads", "d": "head_dim"},
)
EXPERTS = "model.layers.*.mlp"
MIXTRAL = [
    gs.Layout(
        "expert",
        EXPERTS,
        {"experts.gate_up_proj": "unit ...", "gate.weight": "unit hidden"},
        {"experts.down_proj": "unit ..."},
    ),
    gs.Layout(
        "neuron",
        EXPERTS,
        {"experts.gate_up_proj": "expert (2 unit) hidden"},
        {"experts.down_proj": "expert hidden unit"},
    ),
]


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("llama", [SEPARATE]),
        ("llama_mha", [BIASED]),
        ("gemma3_mqa", [SEPARATE]),
        ("gpt2", GPT2),
        ("phi3", [PHI3]),
        ("falcon_new", [FALCON]),
        ("falcon_old", [replace(FALCON, sizes={"group": 1, "d": "head_dim"})]),
        ("mixtral", MIXTRAL),
        ("mixtral", MIXTRAL[:1]),
        ("mixtral", MIXTRAL[1:]),
    ],
)
def test_a_declaration_equals_discovery(name, layouts):
    model = build(name)
    assert plain(gs.dissect(model, layouts=layouts)) == plain(gs.dissect(model))


class Experts(nn.Module):
    """A mixture whose experts are elements of a list."""

    def __init__(self, hidden: int = 12, count: int = 4, inner: int = 5) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": Product(hidden, inner), "down": Product(inner, hidden, bias=False)})
            for _ in range(count)
        )

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        expert: Any
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            y = y + share * expert["down"](torch.tanh(expert["up"](x)))
        return y


def mixture() -> Any:
    model = remote()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in model.layers:
            layer.up, layer.down = Experts(), nn.Identity()
    return randomised(model)


def test_experts_that_are_elements_of_a_list():
    model = mixture()
    members = gs.Layout(
        "neuron",
        "layers.*.up.experts.*",
        {"up.weight": "hidden unit", "up.bias": "unit"},
        {"down.weight": "unit hidden"},
    )
    experts = gs.Layout(
        "expert",
        "layers.*.up",
        {"experts.{unit}.up.weight": "...", "experts.{unit}.up.bias": "...", "router.weight": "unit hidden"},
        {"experts.{unit}.down.weight": "..."},
    )
    anatomy = gs.dissect(model, IDS, layouts=[declared(), members, experts])
    assert (anatomy.experts.count, anatomy.neurons.count) == (8, 40)
    group = next(g for g in anatomy.groups if g.kind == "expert")
    assert group.units[2][0] == ("layers.0.up.experts.2.up.weight", {}) and not group.closed
    holds(model, anatomy, IDS)
    routerless = replace(experts, producers={k: v for k, v in experts.producers.items() if "router" not in k})
    with pytest.raises(AnatomyError, match=r"4 experts declared for layers\.0\.up: .*(router.weight|permuting)"):
        gs.dissect(model, IDS, layouts=[declared(), members, routerless])


UP = {"up.weight": "unit hidden", "up.bias": "unit"}
NEURONS = gs.Layout("neuron", "layers.*", UP, {"down.weight": "hidden unit"})
WRONG: dict[str, tuple[Any, str]] = {
    "another order": (declared("(unit three d)"), "permuting the units changes the output"),
    "another order of the bias": (
        declared(producers={"qkv.weight": "hidden (three unit d)", "qkv.bias": "(unit three d)"}),
        "permuting the units changes the output",
    ),
    "half heads": (declared(unit=6), "permuting the units changes the output"),
    "no divisor": (declared(unit=5), r"36 entries do not divide into \(three unit d\) with three=3, unit=5"),
    "no bias": (declared(producers={"qkv.weight": "hidden (three unit d)"}), "qkv.bias runs along .* no pattern"),
    "no values": (
        declared("(2 unit d + rest)", sizes={"unit": 4, "d": 3}),
        r"entries of layers.0.attn.qkv.(weight|bias) .* act through unit \d alone",
    ),
    "values only": (
        declared("(rest + unit d)", sizes={"unit": 4, "d": 3}),
        r"entries of layers.0.attn.qkv.(weight|bias) .* act through unit \d alone",
    ),
    "roles reversed": (
        declared(producers={"out.weight": "(unit d) hidden"}, consumers={"qkv.weight": "hidden (three unit d)"}),
        "uses layers.0.attn.out.weight after all consumers",
    ),
    "the first tensor as a consumer": (
        replace(NEURONS, producers={"up.bias": "unit"}, consumers={"up.weight": "unit hidden", **NEURONS.consumers}),
        "its consumer layers.0.up.weight before anything",
    ),
    "a producer among the consumers": (
        replace(NEURONS, producers={"up.weight": "unit hidden"}, consumers={"up.bias": "unit", **NEURONS.consumers}),
        "up.bias acts through the other consumers only",
    ),
    "heads as neurons": (declared(kind="neuron"), "neurons have one somewhere"),
    "heads as experts": (declared(kind="expert"), "experts have one somewhere"),
    "neurons as heads": (replace(NEURONS, kind="head"), "one column of its consumers"),
    "no size": (declared(sizes={"three": 3}), r"the sizes of d, unit do not follow .*sizes=\{'unit': …\}"),
    "a field without a config": (declared(sizes={"unit": "num_attention_heads", "three": 3}), "there is no config"),
    "no such module": (
        declared(modules="blocks.*.attn"),
        r"no module of Remote matches 'blocks.\*.attn'.*near: layers",
    ),
    "no such parameter": (
        declared(consumers={"o.weight": "(unit d) hidden"}),
        "no floating parameter .*'layers.0.attn.o.weight'",
    ),
    "other dimensions": (declared(consumers={"out.weight": "(unit d)"}), r"the shape \[12, 10\]; .* 1 dimensions"),
    "unheard": (
        gs.Layout("neuron", "layers.*", {"spare.weight": "unit hidden"}, {"extra.weight": "hidden unit"}),
        "does not hear its consumers layers.0.extra.weight|uses layers.0.spare",
    ),
    "two that overlap": ([declared(), declared(modules="layers.0.attn", unit=2)], "layers.0.attn and .* share entries"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_the_reason(name):
    layouts, message = WRONG[name]
    model = remote(hidden=10)
    if name == "unheard":
        for layer in model.layers:
            layer.spare, layer.extra = nn.Linear(10, 6, bias=False), nn.Linear(6, 10, bias=False)
    with pytest.raises(AnatomyError, match=message):
        gs.dissect(model, IDS, layouts=layouts if isinstance(layouts, list) else [layouts])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "kv_group"}, "axis `group`"),
    "nothing read": ({"consumers": {}}, "one is missing"),
    "both roles": ({"consumers": {"qkv.weight": "hidden (three unit d)"}}, "producer and as consumer"),
    "no unit": ({"consumers": {"out.weight": "d hidden"}}, "must count units once"),
    "no group": ({"producers": {"q.weight": "(group unit d) hidden"}}, "lacks the axis `group`"),
    "group of neurons": (
        {"kind": "neuron", "producers": {"q": "(group unit)"}, "consumers": {"o": "(group unit)"}},
        "kind 'head'",
    ),
    "unknown axis": ({"sizes": {"heads": 4}}, "no pattern has this axis"),
    "no size": ({"sizes": {"unit": 0}}, "a positive number"),
    "parenthesis": ({"consumers": {"out.weight": "(unit d hidden"}}, "is no pattern"),
    "twice": ({"consumers": {"out.weight": "(unit unit) hidden"}}, "'unit' stands twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_layout_that_contradicts_itself_is_refused_at_once(name):
    changes, message = BAD[name]
    with pytest.raises(AnatomyError, match=message):
        declared(**changes)


@pytest.mark.parametrize("given", [["head"], "head", declared()])
def test_what_is_no_list_of_layouts(given):
    with pytest.raises(AnatomyError, match="is no list of layouts"):
        gs.dissect(remote(), IDS, layouts=given)


class RemoteConfig(PretrainedConfig):
    model_type = "remote"

    def __init__(self, hidden_size=48, num_attention_heads=8, num_hidden_layers=4, vocab_size=23, **rest):
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.num_hidden_layers, self.vocab_size = num_hidden_layers, vocab_size
        super().__init__(**rest)


class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config):
        super().__init__(config)
        heads = config.num_attention_heads
        sizes = {"layers": config.num_hidden_layers, "vocab": config.vocab_size}
        self.body = Remote(config.hidden_size, heads, config.hidden_size // heads, **sizes)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids):
        return {"logits": self.body(input_ids)}


HUB = declared("(3 unit d)", modules="body.layers.*.attn", sizes={"unit": "num_attention_heads"})


class TestLarge:
    def test_remote_code_on_meta(self):
        with torch.device("meta"):
            model = RemoteModel(RemoteConfig(hidden_size=960, num_attention_heads=32, num_hidden_layers=6))
        anatomy = gs.dissect(model, layouts=[HUB])
        assert anatomy.heads.count == 6 * 32
        last = next(g for g in anatomy.groups if g.kind == "head" and g.layer == 5)
        assert last.units[31][-1] == ("body.layers.5.attn.out.weight", {0: tuple(range(930, 960))})

    def test_a_twin_tells_what_the_model_itself_does(self):
        model = randomised(RemoteModel(RemoteConfig()))
        itself, twin = _direct(model, None, (), [HUB]), _by_twin(model, (), [HUB])
        space = ParameterSpace.of(model)
        assert plain(gs.Anatomy(space, *itself)) == plain(gs.Anatomy(space, *twin))

    def test_numbers_mean_nothing_on_a_twin(self):
        with torch.device("meta"):
            model = RemoteModel(RemoteConfig(hidden_size=960, num_attention_heads=32))
        with pytest.raises(AnatomyError, match=r"sizes=\{'unit': 32\} holds at one size only.*'num_attention_heads'"):
            gs.dissect(model, layouts=[replace(HUB, sizes={"unit": 32})])

    def test_numbers_of_one_size_hidden_in_a_pattern(self):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](num_hidden_layers=3, head_dim=32))
        wide = {
            "q_proj.weight": "(unit 8) hidden",
            "k_proj.weight": "(unit 8) hidden",
            "v_proj.weight": "(unit 8) hidden",
        }
        layout = gs.Layout("head", ATTENTION, wide, {"o_proj.weight": "hidden (unit 8)"})
        grows = r"128 heads, its tiny twin \d+, and no head count .* grows like that"
        with pytest.raises(AnatomyError, match=rf"{grows}|permuting the units changes the output"):
            gs.dissect(model, layouts=[layout])

    def test_numbers_are_right_where_the_model_itself_is_examined(self):
        model = randomised(RemoteModel(RemoteConfig(vocab_size=40_000, num_hidden_layers=1)))
        assert sum(p.numel() for p in model.parameters()) > 3_000_000
        assert gs.dissect(model, layouts=[replace(HUB, sizes={"unit": 8})]).heads.count == 8

    @pytest.mark.parametrize(
        ("kind", "layouts"),
        [("llama", [SEPARATE]), ("mixtral", [SEPARATE, *MIXTRAL]), ("mixtral", MIXTRAL[:1]), ("mixtral", MIXTRAL[1:])],
    )
    def test_declared_on_meta_equals_discovered_on_meta(self, kind, layouts):
        fields = {"hidden_size": 512, "intermediate_size": 640, "num_attention_heads": 16, "num_key_value_heads": 4}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](num_hidden_layers=5, **fields))
        assert plain(gs.dissect(model, layouts=layouts)) == plain(gs.dissect(model))


class TestPatterns:
    def test_sums_and_nesting(self):
        parts = parse("(group (unit + 1 + 1) d) hidden").dims[0]
        assert parts is not None
        sizes = solve([(parts, 40, "here")], {"group": 2, "d": 4})
        assert sizes == {"group": 2, "d": 4, "unit": 3}
        assert parts.labels("group", sizes).tolist() == [0] * 20 + [1] * 20
        assert parts.labels("unit", sizes)[:20].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 8

    @given(st.permutations(["unit", "a", "b"]), st.lists(st.integers(1, 4), min_size=3, max_size=3))
    def test_labels_are_those_of_einops(self, order, numbers):
        sizes = dict(zip(["unit", "a", "b"], numbers, strict=True))
        text = f"({' '.join(order)})"
        parts = parse(text).dims[0]
        assert parts is not None
        labels = parts.labels("unit", sizes)
        grid = np.broadcast_to(np.arange(sizes["unit"])[:, None, None], numbers)
        assert labels.tolist() == rearrange(grid, f"unit a b -> {text}").tolist()
