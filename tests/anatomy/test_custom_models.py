"""Models outside transformers: the same engine and the same check, or a refusal that says why."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import PreTrainedConfig, PreTrainedModel

import gradsurgery as gs
from gradsurgery.errors import AnatomyError
from tests.anatomy import custom, custom_mixers, custom_vision
from tests.anatomy.custom import GPT, HEADS, HIDDEN, MLP, SIZE, VOCABULARY, WIDTH, Block, Perceptron
from tests.zoo.check import check

IDS = {"ids": torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))}
PIXELS = {"x": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))}
VECTORS = {"x": torch.randn(20, 6, generator=torch.Generator().manual_seed(0))}
Units = dict[tuple[str, int], int]
"""``(kind, units of a group) -> number of such groups``."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def randomised(model: nn.Module) -> nn.Module:
    """No bias is zero, no norm is one, no running statistic is at its start; in eval mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.6 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.add_(0.1 * torch.randn(module.num_features, generator=generator))
                module.running_var.mul_(0.6 + torch.rand(module.num_features, generator=generator))  # type: ignore[union-attr]
    return model.eval()


def first_tensor(output: Any) -> Tensor:
    if dataclasses.is_dataclass(output):
        output = vars(output)
    values = output.values() if isinstance(output, Mapping) else [output] if isinstance(output, Tensor) else output
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def units_of(anatomy: gs.Anatomy) -> Units:
    return dict(Counter((group.kind, len(group)) for group in anatomy.groups))


def verified(model: nn.Module, inputs: dict[str, Any], structural: Sequence[str] = ()) -> gs.Anatomy:
    """The anatomy of a model, checked on a copy in float64 with other inputs of the same kind."""
    anatomy = gs.dissect(model, inputs, structural)
    twin = randomised(copy.deepcopy(model).double())
    fed = {k: v.roll(1, -1).double() if v.is_floating_point() else v.roll(1, -1) for k, v in inputs.items()}
    run: Callable[[nn.Module], Tensor] = lambda m: first_tensor(m.train().eval()(**fed))  # noqa: E731
    assert not check(twin, run, anatomy.groups, anatomy.structural, tolerance=1e-8)
    return anatomy


def refused(model: nn.Module, inputs: dict[str, Any] | None, match: str) -> None:
    with pytest.raises(AnatomyError, match=match):
        gs.dissect(model, inputs)


def matrices_without_units(anatomy: gs.Anatomy, model: nn.Module) -> dict[str, str]:
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    return {name: why for name, why in anatomy.structural.items() if shapes[name] > 1}


def two(make: Callable[[], nn.Module] = Block) -> list[nn.Module]:
    return [make(), make()]


PLAIN: Units = {("head", HEADS): 2, ("neuron", HIDDEN): 2}
LANGUAGE: dict[str, tuple[Callable[[], nn.Module], Units]] = {
    "list": (lambda: GPT(*two()), PLAIN),
    "one block": (lambda: GPT(Block()), {("head", HEADS): 1, ("neuron", HIDDEN): 1}),
    "attributes": (lambda: custom.GPTOfAttributes(*two()), PLAIN),
    "sequential": (lambda: custom.GPTOfSequential(*two()), PLAIN),
    "one block in three places": (lambda: custom.Looped(Block()), {("head", HEADS): 1, ("neuron", HIDDEN): 1}),
    "one module in a list twice": (lambda: GPT(*[Block()] * 2), {("head", HEADS): 1, ("neuron", HIDDEN): 1}),
    "flash": (lambda: GPT(*two(lambda: Block(custom.SelfAttention(flash=True)))), PLAIN),
    "grouped queries": (lambda: GPT(*two(lambda: Block(custom.GroupedAttention()))), PLAIN | {("kv_group", 2): 2}),
    "einsum": (lambda: GPT(*two(lambda: Block(custom.EinsumAttention()))), PLAIN),
    "nn.MultiheadAttention": (lambda: GPT(*two(lambda: Block(custom.StockAttention()))), PLAIN),
    "packed gate": (lambda: GPT(*two(lambda: Block(mlp=custom.PackedGate()))), PLAIN),
    "named experts": (
        lambda: GPT(*two(lambda: Block(mlp=custom.NamedExperts()))),
        {("head", HEADS): 2, ("expert", 4): 2, ("neuron", HIDDEN): 8},
    ),
    "encoder": (custom.Encoder, PLAIN),
    "encoder, norm first": (lambda: custom.Encoder(norm_first=True, activation="gelu"), PLAIN),
    "encoder, no biases": (lambda: custom.Encoder(bias=False), PLAIN),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name: str) -> None:
    make, expected = LANGUAGE[name]
    model = make()
    anatomy = verified(model, IDS)
    assert units_of(anatomy) == expected
    outside = {"tokens.weight", "positions.weight", "head.weight"}
    assert matrices_without_units(anatomy, model).keys() <= outside


def test_layers_are_numbered_however_blocks_are_held() -> None:
    for held in (GPT, custom.GPTOfSequential):
        assert {group.layer for group in gs.dissect(held(*two()), IDS).groups} == {0, 1}
    anatomy = gs.dissect(custom.GPTOfAttributes(*two()), IDS)
    assert anatomy.heads.named("block1*").count == anatomy.heads.named("block2*").count == HEADS


def test_encoder_and_decoder() -> None:
    inputs = {"source": IDS["ids"], "target": IDS["ids"][:, :5].flip(0)}
    anatomy = verified(custom.Translator(), inputs)
    assert units_of(anatomy) == {("head", HEADS): 6, ("neuron", HIDDEN): 4}
    assert anatomy.heads.named("*decoder*multihead*").count == 2 * HEADS


def test_keys_and_values_of_another_width() -> None:
    anatomy = verified(GPT(*two(lambda: Block(custom.StockAttention(separate=True)))), IDS)
    assert units_of(anatomy) == PLAIN | {("latent", 12): 2}


def test_experts_that_all_compute() -> None:
    anatomy = verified(GPT(*two(lambda: Block(mlp=custom.DenseExperts()))), IDS)
    assert units_of(anatomy) == {("head", HEADS): 2, ("expert", 3): 2, ("neuron", 7): 6}


def test_states_that_decay_at_once() -> None:
    anatomy = verified(GPT(*two(lambda: Block(custom_mixers.Decay()))), IDS)
    assert units_of(anatomy) == PLAIN
    held = {str(f.name).rpartition("attn.")[2] for g in anatomy.groups if g.kind == "head" for f in g.footprints}
    assert held == {"q.weight", "k.weight", "v.weight", "a.weight", "a_log", "out.weight"}


def test_learned_queries() -> None:
    anatomy = verified(GPT(*two(lambda: Block(custom_mixers.Pooled()))), IDS)
    assert units_of(anatomy) == {("head", 3): 2, ("neuron", HIDDEN): 2}
    assert "blocks.0.attn.queries" in anatomy.heads[0, 0].parameters()


def test_what_writes_an_activation_inside_a_single_unit_is_its_own() -> None:
    anatomy = verified(GPT(*two(lambda: Block(custom_mixers.OneKey()))), IDS)
    assert units_of(anatomy)["kv_group", 1] == 2
    held = {str(f.name) for group in anatomy.groups if group.kind == "kv_group" for f in group.footprints}
    assert {"blocks.0.attn.depthwise.weight", "blocks.0.attn.depthwise.bias"} <= held
    assert not any("attn" in name for name in anatomy.structural)


def test_a_bias_that_softmax_ignores_follows_its_filters() -> None:
    assert units_of(verified(custom_mixers.LinearAttention(), PIXELS)) == {("latent", 100): 1, ("neuron", 100): 1}


def test_experts_that_a_table_assigns() -> None:
    model = custom_mixers.Hashed()
    for table in model.buffers():
        table.copy_(torch.rand(len(table), 4).argsort(-1)[:, :2])
    for loaded in (True, False):  # without a checkpoint every token has the first expert
        anatomy = verified(model, IDS) if loaded else gs.dissect(custom_mixers.Hashed(), IDS)
        assert units_of(anatomy) == {("expert", 4): 2, ("neuron", 7): 8}
        experts = [group for group in anatomy.groups if group.kind == "expert"]
        assert all(group.exchange_classes == (0, 1, 2, 3) for group in experts)
        assert {f.name for f in experts[0].footprints} == {f"blocks.0.{n}" for n in ("up", "down", "router.weight")}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_nets_are_refused(kind: type) -> None:
    refused(custom.Recurrent(kind), IDS, rf"rnn \({kind.__name__}\)")


def test_a_recurrent_part_can_be_left_out() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.up, self.down = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(self.rnn(x[None])[0]).tanh())

    refused(Mixed(), VECTORS, r"rnn \(GRU\)")
    anatomy = verified(Mixed(), VECTORS, structural=["rnn"])
    assert units_of(anatomy) == {("neuron", 12): 1}
    assert anatomy.structural["rnn.weight_hh_l0"] == "declared structural"


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Units]] = {
    "basic blocks": (
        lambda: custom_vision.ResNet(custom_vision.BasicBlock),
        {("neuron", 8): 2, ("neuron", 12): 2},
    ),
    "bottlenecks": (
        lambda: custom_vision.ResNet(custom_vision.Bottleneck),
        {("neuron", 8): 4, ("neuron", 12): 4},
    ),
    "vgg": (custom_vision.VGG, {("neuron", n): 1 for n in (7, 9, 11, 13, 15)}),
    "u-net": (custom_vision.UNet, {("neuron", n): 1 for n in (6, 7, 8, 9, 11)}),
    "mobilenet": (custom_vision.MobileNet, {("neuron", 20): 1, ("neuron", 16): 1, ("neuron", 6): 2}),
    "mixer": (custom_vision.Mixer, {("neuron", 14): 2, ("neuron", 18): 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_channels_are_neurons(name: str) -> None:
    make, expected = CONVOLUTIONS[name]
    assert units_of(verified(randomised(make()), PIXELS)) == expected


def test_grouped_channels() -> None:
    """Channels of a grouped convolution move inside their group of channels only."""
    anatomy = verified(randomised(custom_vision.ResNet(custom_vision.Bottleneck, groups=2)), PIXELS)
    before = [g for g in anatomy.groups if "layer1.0" in g.name and len(g) == 8]
    assert len(before) == 2
    assert all(g.exchange_classes == (0, 0, 0, 0, 1, 1, 1, 1) for g in before)


def test_a_bottleneck_s_channels_are_its_own() -> None:
    model = custom_vision.ResNet(custom_vision.BasicBlock)
    anatomy = gs.dissect(model, PIXELS)
    group = next(g for g in anatomy.groups if "layer1.0" in g.name)
    assert {f.name for f in group.footprints} >= {
        "layer1.0.conv1.weight",
        "layer1.0.bn1.weight",
        "layer1.0.bn1.bias",
        "layer1.0.bn1.running_mean",
        "layer1.0.bn1.running_var",
        "layer1.0.conv2.weight",
    }


def test_a_perceptron() -> None:
    model = nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 4))
    assert units_of(verified(model, {"input": VECTORS["x"]})) == {("neuron", 11): 1, ("neuron", 9): 1}


def _product(how: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Perceptron]:
    class Written(Perceptron):
        product = staticmethod(how)  # type: ignore[assignment]

    return Written


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda x, w: x @ w,
    "weight first": lambda x, w: (w.t() @ x.t()).t(),
    "F.linear of a transpose": lambda x, w: F.linear(x, w.t()),
    "mm": torch.mm,
    "addmm": lambda x, w: torch.addmm(x.new_zeros(1), x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=1),
    "inner": lambda x, w: torch.inner(x, w.t()),
    "einsum": lambda x, w: torch.einsum("bi,ij->bj", x, w),
    "einsum with a list": lambda x, w: torch.einsum("bi,ij->bj", [x, w]),
    "einsum by numbers": lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]),
    "bmm of an expanded weight": lambda x, w: torch.bmm(x[:, None], w.expand(len(x), *w.shape))[:, 0],
    "conv1d": lambda x, w: F.conv1d(x[:, :, None], w.t()[:, :, None])[:, :, 0],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_however_a_product_is_written(name: str) -> None:
    assert units_of(verified(_product(PRODUCTS[name])(), VECTORS)) == {("neuron", 11): 1}


class Product(torch.autograd.Function):
    """A product with a backward of its own, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return grad @ w.t(), x.t() @ grad


DISGUISES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contiguous transpose": lambda x, w: F.linear(x, w.t().contiguous()),
    "a vector at a time": lambda x, w: torch.stack([torch.mv(w.t(), row) for row in x]),
    "vmap": lambda x, w: torch.vmap(lambda row: row @ w)(x),
    "masked weight": lambda x, w: x @ (w * (torch.arange(w.numel()).view_as(w) % 5 > 0)),
    "sum of weights": lambda x, w: x @ (w + w.flip(0)),
    "chosen rows": lambda x, w: x @ w[torch.arange(len(w)).flip(0)],
    "autograd function": Product.apply,
    "multiply and sum": lambda x, w: (x.unsqueeze(-1) * w).sum(-2),
    "weight first": lambda x, w: (w * x.unsqueeze(-1)).sum(-2),
    "transposed": lambda x, w: (w.t() * x.unsqueeze(-2)).sum(-1),
    "a row at a time": lambda x, w: torch.stack([(row[:, None] * w).sum(0) for row in x]),
    "multiply": lambda x, w: torch.multiply(x.unsqueeze(-1), w).sum(-2),
    "addcmul": lambda x, w: torch.addcmul(x.new_zeros(1), x.unsqueeze(-1), w).sum(-2),
    "distance": lambda x, w: torch.cdist(x, w.t()),
}


class Both(nn.Module):
    """What everybody understands, and beside it what is tested."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Perceptron(), other])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) + self.layers[1](x)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", DISGUISES)
def test_a_product_in_disguise_is_no_silent_skip(name: str, alone: bool) -> None:
    """Understood or refused, also where other layers have units."""
    hidden = _product(DISGUISES[name])()
    model = hidden if alone else Both(hidden)
    try:
        anatomy = verified(model, VECTORS)
    except AnatomyError as error:
        assert re.search(r"Written|Batched" if alone else r"layers\.1|Batched", str(error))
    else:
        assert not matrices_without_units(anatomy, model)


def test_three_factors_in_one_einsum() -> None:
    """A low-rank product without a nonlinearity: its ranks, or a refusal, never nothing."""

    class LowRank(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,ir,ro->bo", x, self.up, self.down)

    try:
        anatomy = verified(LowRank(), VECTORS)
    except AnatomyError as error:
        assert "LowRank" in str(error)
    else:
        assert units_of(anatomy) == {("latent", 11): 1}


def test_a_bilinear_layer() -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.down = nn.Linear(6, 11), nn.Bilinear(11, 11, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).tanh()
            return self.down(self.mix(y, y).tanh())

    try:
        anatomy = verified(Bilinear(), VECTORS)
    except AnatomyError as error:
        assert "mix" in str(error)
    else:
        assert units_of(anatomy) == {("neuron", 11): 1, ("neuron", 9): 1}


class Reparametrised(nn.Module):
    """A perceptron whose linears are changed by ``change``."""

    def __init__(self, change: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.up, self.down = change(nn.Linear(6, 11)), change(nn.Linear(11, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of all": lambda m: parametrizations.weight_norm(m, dim=None),  # type: ignore[arg-type]
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda m: prune.random_unstructured(m, "weight", 0.3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_reparametrised_weights_are_right_or_refused(name: str) -> None:
    torch.manual_seed(0)
    model = Reparametrised(CHANGES[name])
    try:
        anatomy = verified(model, VECTORS)
    except AnatomyError as error:
        assert "up" in str(error) or "Reparametrised" in str(error)
    else:
        assert units_of(anatomy) == {("neuron", 11): 1}
        assert not matrices_without_units(anatomy, model)


def test_training_mode_with_dropout() -> None:
    quiet = GPT(*two())
    model = GPT(*two(lambda: Block(custom.SelfAttention(dropout=0.5), MLP(dropout=0.5))))
    model.load_state_dict(quiet.state_dict())
    state = torch.get_rng_state()
    anatomy = gs.dissect(model.train(), IDS)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert units_of(anatomy) == units_of(gs.dissect(quiet.eval(), IDS)) == PLAIN


def test_dropout_that_does_not_ask_for_the_mode() -> None:
    """Monte Carlo dropout: two forwards differ, so nothing can be verified, and the message says so."""

    class Noisy(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(torch.tanh(x @ self.up), 0.5, training=True) @ self.down

    try:
        assert units_of(gs.dissect(Noisy(), VECTORS)) == {("neuron", 11): 1}
    except AnatomyError as error:
        assert "random" in str(error) or "differ" in str(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = GPT(*two()).to(dtype)
    anatomy = gs.dissect(model, IDS)
    assert units_of(anatomy) == PLAIN
    assert {p.dtype for p in model.parameters()} == {dtype}
    pixels = {"x": PIXELS["x"].to(dtype)}
    assert units_of(gs.dissect(custom_vision.Mixer().to(dtype), pixels)) == CONVOLUTIONS["mixer"][1]


def test_a_forward_that_casts() -> None:
    """Hand-written mixed precision, float32 weights used in bfloat16."""

    class Casting(Perceptron):
        def product(self, x: Tensor, w: Tensor) -> Tensor:
            return (x.bfloat16() @ w.to(torch.bfloat16)).float()

    assert units_of(gs.dissect(Casting(), VECTORS)) == {("neuron", 11): 1}


def test_frozen_parameters() -> None:
    model = GPT(*two())
    for parameter in [*model.blocks[0].parameters(), model.tokens.weight]:
        parameter.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    assert units_of(gs.dissect(model, IDS)) == PLAIN
    assert flags == [p.requires_grad for p in model.parameters()]
    assert units_of(gs.dissect(model.requires_grad_(False), IDS)) == PLAIN


class Conditioned(nn.Module):
    """A mask and a scale are required; what is nested in ``extras`` too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MLP(), MLP()])

    def forward(self, x: Tensor, keep: Tensor, scale: float, *, extras: dict[str, Any]) -> Tensor:
        for block, shift in zip(self.blocks, extras["shifts"], strict=True):
            x = x + block(x + shift) * keep[:, None] * scale
        return x


def test_extra_inputs() -> None:
    x = torch.randn(8, WIDTH)
    extras = {"shifts": [torch.randn(WIDTH), torch.randn(8, WIDTH)]}
    inputs = {"x": x, "keep": torch.arange(8) % 3 > 0, "scale": 0.5, "extras": extras}
    assert units_of(gs.dissect(Conditioned(), inputs)) == {("neuron", HIDDEN): 2}
    assert extras["shifts"][0].dtype == torch.float32


@dataclasses.dataclass
class Answer:
    """What a forward may return."""

    loss: Tensor | None
    logits: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (y, None),
    "loss first": lambda y: (None, y),
    "list": lambda y: [y],
    "dict": lambda y: {"loss": None, "logits": y},
    "dataclass": lambda y: Answer(None, y),
    "nested": lambda y: {"predictions": {"logits": [y]}},
    "scalar": lambda y: y.square().mean(),
    "half": lambda y: y.to(torch.float16),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_whatever_a_forward_returns(name: str) -> None:
    class Returning(Perceptron):
        def forward(self, x: Tensor) -> Any:
            return OUTPUTS[name](Perceptron.forward(self, x))

    assert units_of(gs.dissect(Returning(), VECTORS)) == {("neuron", 11): 1}


def test_integer_outputs_are_refused() -> None:
    class Choosing(Perceptron):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x).argmax(-1)

    refused(Choosing(), VECTORS, "Choosing returns Tensor without a floating-point tensor")


def test_control_flow_that_depends_on_data() -> None:
    """Layers are left out when little changes, and a loop runs until a sum is reached."""

    class Adaptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([MLP(), MLP(), MLP()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                if x.abs().mean().item() > 1e-3:
                    x = x + block(x)
            while x.abs().max() > 10:
                x = x / 2
            return x

    assert units_of(gs.dissect(Adaptive(), {"x": torch.randn(8, WIDTH)})) == {("neuron", HIDDEN): 3}


def test_a_branch_that_is_not_taken() -> None:
    """The second block never runs: its weights are no units, and the anatomy says so."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([MLP(), MLP()])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.blocks[int(bool(x.mean() > 1e6))](x)

    anatomy = gs.dissect(Branching(), {"x": torch.randn(8, WIDTH)})
    assert units_of(anatomy) == {("neuron", HIDDEN): 1}
    assert anatomy.structural["blocks.1.up.weight"] == "unused"


@pytest.mark.parametrize(
    ("model", "inputs", "match"),
    [
        (GPT(Block()), None, r"GPT has no Hugging Face config.*gs\.dissect\(model, inputs\)"),
        (GPT(Block()), {}, r"GPT.*inputs"),
        (GPT(Block()), {"tokens": IDS["ids"]}, r"GPT.*tokens"),
        (GPT(Block()), {"ids": IDS["ids"] + VOCABULARY}, r"GPT.*forward"),
        (GPT(Block()), IDS["ids"], r"inputs"),
        (nn.Identity(), VECTORS, r"Identity"),
        (nn.ReLU(), {"input": VECTORS["x"]}, r"ReLU"),
        (nn.Linear(6, 4), {"input": VECTORS["x"]}, r"Linear shows no units"),
        (nn.Embedding(6, 4), {"input": torch.arange(6)}, r"Embedding shows no units"),
        (nn.ModuleList([nn.Linear(6, 4)]), VECTORS, r"ModuleList"),
        (nn.Sequential(nn.LazyLinear(7), nn.ReLU(), nn.LazyLinear(4)), {"input": VECTORS["x"]}, r"Lazy|initialized"),
    ],
)
def test_what_cannot_be_dissected(model: nn.Module, inputs: Any, match: str) -> None:
    refused(model, inputs, match)


def test_on_meta() -> None:
    """There are shapes but no way to make weights, since no config builds the class."""
    with torch.device("meta"):
        model = GPT(*two())
    try:
        anatomy = gs.dissect(model, IDS)
    except AnatomyError as error:
        assert "meta" in str(error)
    else:
        assert units_of(anatomy) == PLAIN


def test_tied_weights() -> None:
    model = GPT(*two())
    model.head.weight = model.tokens.weight
    assert units_of(verified(model, IDS)) == PLAIN
    shared = GPT(*two())
    shared.blocks[1].mlp = shared.blocks[0].mlp
    anatomy = verified(shared, IDS)
    assert units_of(anatomy) == {("head", HEADS): 2, ("neuron", HIDDEN): 1}


def test_a_weight_that_is_tied_inside_its_block() -> None:
    """An autoencoder with one matrix: column j of it writes and reads neuron j."""

    class Mirror(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(11, 6)), nn.Parameter(torch.randn(11))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias).tanh() @ self.weight

    try:
        anatomy = verified(Mirror(), VECTORS)
    except AnatomyError as error:
        assert "Mirror" in str(error)
    else:
        assert units_of(anatomy) == {("neuron", 11): 1}


def test_weights_that_another_net_makes() -> None:
    """A hypernetwork: its product is no parameter, so its layers are refused or their own neurons alone."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.code = nn.Linear(5, 66), nn.Parameter(torch.randn(5))
            self.down = nn.Linear(11, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(F.linear(x, self.make(self.code).view(11, 6))))

    try:
        anatomy = verified(Hyper(), VECTORS)
    except AnatomyError as error:
        assert "make" in str(error) or "Hyper" in str(error)
    else:
        assert units_of(anatomy) == {("neuron", 11): 1}


def test_few_tokens_hide_nothing() -> None:
    """One token attends to itself only: queries and keys do nothing, and that is no reason to file them away."""
    try:
        anatomy = gs.dissect(GPT(*two()), {"ids": IDS["ids"][:1, :1]})
    except AnatomyError as error:
        assert "inputs" in str(error)
    else:
        assert units_of(anatomy) == PLAIN
        qkv = next(
            f for g in anatomy.groups if g.kind == "head" for f in g.footprints if str(f.name).endswith("qkv.weight")
        )
        assert qkv.index[0].shape == (HEADS, 3 * SIZE)


def test_a_copy_is_dissected_not_the_model() -> None:
    model = randomised(GPT(*two())).train()
    before = copy.deepcopy(model.state_dict())
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    fed = {"ids": IDS["ids"].clone()}
    gs.dissect(model, fed)
    handle.remove()
    assert not seen
    assert torch.equal(fed["ids"], IDS["ids"])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_inside_other_contexts() -> None:
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            anatomy = gs.dissect(GPT(*two()), IDS)
        assert units_of(anatomy) == PLAIN


def test_the_same_again() -> None:
    model = GPT(*two())
    one, other = (gs.dissect(model, IDS) for _ in range(2))
    for a, b in itertools.zip_longest(one.groups, other.groups):
        assert (a.kind, a.name, a.exchange_classes) == (b.kind, b.name, b.exchange_classes)


def test_a_hand_written_vit() -> None:
    """A class token, learned positions and patches, all raw parameters and convolutions."""

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.head = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Linear(WIDTH, 5)
            self.cls, self.positions = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 10, WIDTH))
            self.blocks, self.norm = nn.Sequential(*two()), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.cls.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], dim=1)
            return self.head(self.norm(self.blocks(x + self.positions))[:, 0])

    model = ViT()
    anatomy = verified(model, PIXELS)
    assert units_of(anatomy) == PLAIN
    assert {n.partition(".")[0] for n in matrices_without_units(anatomy, model)} <= {
        "patch",
        "head",
        "cls",
        "positions",
    }


def test_dense_connections() -> None:
    """Every layer reads all earlier ones through a concatenation: each one's channels have several readers."""

    class DenseNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3 + 5 * i, 5, 3, padding=1) for i in range(3)])
            self.out = nn.Conv2d(18, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.cat([x, layer(x).relu()], dim=1)
            return self.out(x)

    assert units_of(verified(DenseNet(), PIXELS)) == {("neuron", 5): 3}


def test_experts_in_a_parameter_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(WIDTH, 3)
            self.up = nn.ParameterList([torch.randn(WIDTH, 7) * 0.2 for _ in range(3)])
            self.down = nn.ParameterList([torch.randn(7, WIDTH) * 0.2 for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            gates = self.router(x).softmax(-1)
            return sum(
                (F.silu(x @ up) @ down) * gates[..., i, None]
                for i, (up, down) in enumerate(zip(self.up, self.down, strict=True))
            )

    anatomy = verified(GPT(*two(lambda: Block(mlp=Listed()))), IDS)
    assert units_of(anatomy) == {("head", HEADS): 2, ("neuron", 7): 6}  # experts are stacked tensors or modules
    assert {n for n in anatomy.structural if "router.weight" in n} == {f"blocks.{i}.mlp.router.weight" for i in (0, 1)}


def test_wrapped_in_data_parallel() -> None:
    model = GPT(*two())
    anatomy = gs.dissect(nn.DataParallel(model), IDS)
    assert units_of(anatomy) == PLAIN
    assert "blocks.0.attn.qkv.weight" in anatomy.space.shapes


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_right_or_refused() -> None:
    """The products of a scripted module run below Python, where nothing sees them."""
    model = Both(torch.jit.script(Perceptron()))
    try:
        anatomy = gs.dissect(model, VECTORS)
    except AnatomyError as error:
        assert "layers.1" in str(error)
    else:
        assert units_of(anatomy) == {("neuron", 11): 2}


class HouseConfig(PreTrainedConfig):
    """A config as remote code has it: its own names for everything."""

    model_type = "house"

    def __init__(self, tokens: int = VOCABULARY, depth: int = 2, mlp_ratio: float = 1.4, **kwargs: Any) -> None:
        self.tokens, self.depth, self.mlp_ratio = tokens, depth, mlp_ratio
        super().__init__(**kwargs)


class HouseModel(PreTrainedModel):
    """A model of remote code, whose forward wants more than token ids."""

    config_class = HouseConfig

    def __init__(self, config: HouseConfig) -> None:
        super().__init__(config)
        self.embed, self.head = nn.Embedding(config.tokens, WIDTH), nn.Linear(WIDTH, config.tokens)
        self.stack = nn.ModuleList([Block() for _ in range(config.depth)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As the layers do themselves."""

    def forward(self, input_ids: Tensor, speed: Tensor, **kwargs: Any) -> Any:
        x = self.embed(input_ids) * speed[:, None, None]
        for block in self.stack:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("tokens", [VOCABULARY, 90_000])
def test_remote_code(tokens: int) -> None:
    """Also where it is large enough for a twin, which its config has no names for."""
    model = HouseModel(HouseConfig(tokens))
    anatomy = gs.dissect(model, {"input_ids": IDS["ids"], "speed": torch.randn(3)})
    assert units_of(anatomy) == PLAIN
    refused(model, None, r"HouseModel.*inputs")
