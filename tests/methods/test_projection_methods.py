"""Methods of projected gradients are, step by step, the papers' algorithms on one flat fp64 vector.

Every case draws an architecture, what is frozen, the optimizer, the options, how a step is cut into micro-batches, and
the step after which the run is saved and resumed; `tests.methods.hand` is the oracle.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import gradsurgery as gs
from benchmarks.memory import allocated
from gradsurgery.errors import BatchError, PlanError, SlotError
from gradsurgery.surgery.checkpoint import load_state, save_state
from tests.methods.hand import (
    KINDS,
    Batch,
    Hand,
    batch,
    build,
    ce,
    clear_of,
    kl_to,
    move_clear_of,
    npo_to,
    rows_of,
)

STEPS = 3
FLOOR = 1e-6  # below that share of the gradient a reference is rounding
TOLERANCE = 1e-10
Options = dict[str, Any]

REMOVE = st.sampled_from(["both", "conflict", "agreement"])
SCOPE = st.sampled_from(["global", "module", "tensor", "row"])
WEIGHT = st.floats(0.1, 3)
POWER = st.sampled_from([0.25, 0.5, 1.0, 2.0])  # weights of passes
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
}


@dataclass(frozen=True)
class Case:
    """A method and its algorithm.

    Attributes:
        options: What is drawn.
        make: The method, from the model before training and the options.
        step: One step of the oracle on some micro-batches.
        streams: Sub-batches that every batch brings.
    """

    options: st.SearchStrategy[Options]
    make: Callable[[Any, Options], gs.Method]
    step: Callable[[Hand, list[Batch], Options], None]
    streams: tuple[str, ...] = ()


def frozen(model: Any) -> gs.losses.Frozen:
    return gs.losses.frozen(copy.deepcopy(model))


def rows(batches: list[Batch], column: str) -> list[Batch | None]:
    return [rows_of(b, column) for b in batches]


def make_opposed(model: Any, o: Options) -> gs.Method:
    more = {k: v for k, v in o.items() if k != "padding"}
    return gs.methods.opposed(frozen(model), kl=gs.losses.kl(padding=o["padding"]), **more)


def step_opposed(hand: Hand, batches: list[Batch], o: Options) -> None:
    own = batches if o["rows"] is None else rows(batches, o["rows"])
    g, u = hand.grad(ce, own), hand.grad(kl_to(hand.before, o["padding"]), own)
    plain = torch.zeros_like(g) if o["rows"] is None else hand.grad(ce, rows(batches, f"~{o['rows']}"))
    weights = {"keep": o["positive_weight"], "weight": o["unlearn_weight"], "scope": o["scope"], "floor": FLOOR}
    if o["at"] == "update":
        move_clear_of(hand, plain + g, [u], o["remove"], **weights)
    else:
        hand.apply(plain + clear_of(hand, g, [u], o["remove"], **weights))


def step_safegrad(hand: Hand, batches: list[Batch], o: Options) -> None:
    g, a = hand.grad(ce, batches), hand.grad(kl_to(hand.before), [b["alignment"] for b in batches])
    hand.apply(clear_of(hand, g, [a], o["remove"], o["scope"], floor=FLOOR) + o["alignment_weight"] * a)


def step_ogpsa(hand: Hand, batches: list[Batch], o: Options) -> None:
    if hand.step % o["every"] == 0:
        hand.memory = {name: hand.grad(ce, [b[name] for b in batches]) for name in o["references"]}
    vectors = list(hand.memory.values())
    hand.apply(clear_of(hand, hand.grad(ce, batches), vectors, o["remove"], o["scope"], floor=FLOOR))


def make_gru(model: Any, o: Options) -> gs.Method:
    more = {k: v for k, v in o.items() if k != "npo"}
    if o["npo"]:
        more |= {"forget_loss": gs.losses.npo(0.5), "reference": frozen(model)}
    return gs.methods.gru(**more)


def step_gru(hand: Hand, batches: list[Batch], o: Options) -> None:
    forget, retain = (
        [b[name] for b in batches] if o["by"] == "stream" else rows(batches, name) for name in ("forget", "retain")
    )
    g = hand.grad(npo_to(hand.before, 0.5), forget) if o["npo"] else -hand.grad(ce, forget)
    r = hand.grad(ce, retain)
    mean = o["decay"] * hand.memory["mean"] + (1 - o["decay"]) * r if hand.memory else r
    hand.memory["mean"] = mean
    clipped = clear_of(hand, g, [mean], o["remove"], o["scope"], max_cosine=o["max_cosine"] or 1.0, floor=FLOOR)
    hand.apply(clipped + o["retain_weight"] * r)


def make_ogd(model: Any, o: Options) -> gs.Method:
    memory = gs.estimators.gradient_memory(model, [batch(3, seed=77)], 3, of=o["of"], orthonormal=o["orthonormal"])
    return gs.methods.ogd(memory, scope=o["scope"], at=o["at"])


def step_ogd(hand: Hand, batches: list[Batch], o: Options) -> None:
    if not hand.memory:
        past = gs.estimators.gradient_memory(hand.before, [batch(3, seed=77)], 3, of=o["of"], orthonormal=False)
        hand.memory = {
            str(k): torch.cat([vector[name].reshape(-1) for name in hand.names])
            for k, vector in enumerate(past.vectors)
        }
        if o["orthonormal"]:
            q = torch.linalg.qr(torch.stack(list(hand.memory.values())).T)[0].T
            hand.memory = {str(k): v for k, v in enumerate(q)}
    vectors, g = list(hand.memory.values()), hand.grad(ce, batches)
    if o["at"] == "update":
        move_clear_of(hand, g, vectors, "both", scope=o["scope"], floor=FLOOR)
    else:
        hand.apply(clear_of(hand, g, vectors, scope=o["scope"], floor=FLOOR))


def step_pcgrad(hand: Hand, batches: list[Batch], o: Options) -> None:
    tasks = {"forget": 1.0, "~forget": o["weight"], "retain": 1.0}
    grads = [hand.grad(ce, rows(batches, column)) * w for column, w in list(tasks.items())[: o["tasks"]]]
    draws = random.Random(f"{o['seed']}/{hand.step}")
    total = torch.zeros_like(grads[0])
    for i, g in enumerate(grads):
        order = [j for j in range(len(grads)) if j != i]
        draws.shuffle(order)
        for j in order:
            g = clear_of(hand, g, [grads[j]], "conflict")
        total += g
    hand.apply(total)


def make_pcgrad(model: Any, o: Options) -> gs.Method:
    tasks: dict[str, Any] = {"one": "forget", "two": {"rows": "~forget", "weight": o["weight"]}, "three": "retain"}
    return gs.methods.pcgrad(dict(list(tasks.items())[: o["tasks"]]), seed=o["seed"])


def step_gradient_ascent(hand: Hand, batches: list[Batch], o: Options) -> None:
    forget, retain = (hand.grad(ce, rows(batches, column)) for column in ("forget", "retain"))
    hand.apply(o["retain_weight"] * retain - o["forget_weight"] * forget)


def step_npo(hand: Hand, batches: list[Batch], o: Options) -> None:
    retain_loss = kl_to(hand.before) if o["kl"] else ce
    forget = hand.grad(npo_to(hand.before, o["beta"]), [b["forget"] for b in batches])
    hand.apply(forget + o["retain_weight"] * hand.grad(retain_loss, [b["retain"] for b in batches]))


def make_npo(model: Any, o: Options) -> gs.Method:
    loss = gs.losses.kl_divergence if o["kl"] else gs.losses.causal_lm
    return gs.methods.npo(frozen(model), o["beta"], o["retain_weight"], by="stream", retain_loss=loss)


CASES: dict[str, Case] = {
    "opposed": Case(
        st.fixed_dictionaries(
            {
                "remove": REMOVE,
                "scope": SCOPE,
                "at": st.sampled_from(["gradient", "update"]),
                "positive_weight": WEIGHT,
                "unlearn_weight": WEIGHT,
                "rows": st.sampled_from([None, "forget"]),
                "padding": st.booleans(),
            }
        ),
        make_opposed,
        step_opposed,
    ),
    "safegrad": Case(
        st.fixed_dictionaries({"remove": REMOVE, "scope": SCOPE, "alignment_weight": st.sampled_from([0.0, 0.3])}),
        lambda model, o: gs.methods.safegrad(frozen(model), **o),
        step_safegrad,
        ("alignment",),
    ),
    "ogpsa": Case(
        st.fixed_dictionaries(
            {
                "every": st.integers(1, 3),
                "references": st.sampled_from([["general"], ["general", "code"]]),
                "scope": SCOPE,
                "remove": REMOVE,
            }
        ),
        lambda model, o: gs.methods.ogpsa(**o),
        step_ogpsa,
        ("general", "code"),
    ),
    "gru": Case(
        st.fixed_dictionaries(
            {
                "decay": st.sampled_from([0.0, 0.2, 0.9]),
                "max_cosine": st.sampled_from([None, 0.05, 0.5]),
                "npo": st.booleans(),
                "retain_weight": st.sampled_from([0.0, 0.7]),
                "by": st.sampled_from(["rows", "stream"]),
                "remove": REMOVE,
                "scope": st.sampled_from(["global", "tensor"]),
            }
        ),
        make_gru,
        step_gru,
        ("forget", "retain"),
    ),
    "ogd": Case(
        st.fixed_dictionaries(
            {
                "of": st.sampled_from(["loss", "label_logit"]),
                "orthonormal": st.booleans(),
                "scope": SCOPE,
                "at": st.sampled_from(["gradient", "update"]),
            }
        ),
        make_ogd,
        step_ogd,
    ),
    "pcgrad": Case(
        st.fixed_dictionaries({"tasks": st.sampled_from([2, 3]), "weight": POWER, "seed": st.integers(0, 9)}),
        make_pcgrad,
        step_pcgrad,
    ),
    "gradient_ascent": Case(
        st.fixed_dictionaries({"forget_weight": POWER, "retain_weight": st.sampled_from([0.0, 0.5])}),
        lambda model, o: gs.methods.gradient_ascent(**o),
        step_gradient_ascent,
    ),
    "npo": Case(
        st.fixed_dictionaries({"beta": st.floats(0.05, 2), "retain_weight": POWER, "kl": st.booleans()}),
        make_npo,
        step_npo,
        ("forget", "retain"),
    ),
}


def window(case: Case, parts: int, seed: int, by_stream: bool) -> list[Batch]:
    """The micro-batches of one step, with the sub-batches that the method reads."""
    out = []
    for k in range(parts):
        one = batch(3, seed=1000 * seed + k)
        if by_stream:
            named = {name: batch(2, seed=1000 * seed + 100 * i + k + 50) for i, name in enumerate(case.streams)}
            one = {**one, **named}
        out.append(one)
    return out


def resumed(surgery: gs.Surgery, optimizer: torch.optim.Optimizer, make: Any, kind: str) -> tuple[Any, Any, Any]:
    """Model, optimizer and surgery as a new process would have them, from what a checkpoint holds."""
    model: Any = copy.deepcopy(surgery.base)
    model.__dict__.pop("_gradsurgery", None)
    again = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with tempfile.TemporaryDirectory() as folder:
        save_state(surgery.state_dict(), folder)
        surgery.remove()
        other = gs.attach(make(), model, again)
        other.load_state_dict(load_state(folder))
    return model, again, other


@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_steps_are_the_algorithms(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    kind = data.draw(st.sampled_from(sorted(KINDS)), "architecture")
    held = data.draw(st.sampled_from(["none", "embeddings", "every third"]), "frozen")
    how = data.draw(st.sampled_from(sorted(OPTIMIZERS)), "optimizer")
    options = data.draw(case.options, "options")
    parts = data.draw(st.integers(1, 2), "micro-batches")
    seed = data.draw(st.integers(0, 99), "seed")
    resume_after = data.draw(st.sampled_from([None, 1, 2]), "resume after")

    start = build(kind, held)
    model: Any = copy.deepcopy(start)
    hand = Hand(start, OPTIMIZERS[how])
    method = case.make(start, options)
    optimizer = OPTIMIZERS[how]([p for p in model.parameters() if p.requires_grad])
    surgery = gs.attach(method, model, optimizer)
    by_stream = bool(case.streams) and options.get("by", "stream") == "stream"
    for step in range(STEPS):
        batches = window(case, parts, seed + step, by_stream)
        items = surgery.count_items(batches)
        for one in batches:
            surgery.backward(one, num_items=items)
        optimizer.step()
        optimizer.zero_grad()
        case.step(hand, batches, options)
        moved = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(moved, hand.flat(), rtol=0, atol=TOLERANCE)
        if resume_after == step + 1:
            model, optimizer, surgery = resumed(surgery, optimizer, lambda: case.make(start, options), how)
    surgery.remove()


def hand_written(teacher: Any, student: Any, batches: list[Batch], rates: dict[str, float]) -> None:
    """The script's loop as it stands: AdamW, one projection over everything, no test of the sign."""
    names = {id(p): n for n, p in student.named_parameters()}
    groups = [{"params": [p], "lr": rates[names[id(p)]]} for p in student.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    for one in batches:
        inputs = {"input_ids": one["input_ids"], "attention_mask": one["attention_mask"], "use_cache": False}
        outputs = student(**inputs)
        with torch.no_grad():
            told = teacher(**inputs).logits.softmax(-1)
        l_sft = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1]), one["labels"][:, 1:].reshape(-1)
        )
        l_kl = torch.nn.functional.kl_div(outputs.logits.log_softmax(-1), told, reduction="batchmean")
        g = torch.autograd.grad(l_sft, list(student.parameters()), retain_graph=True)
        u = torch.autograd.grad(l_kl, list(student.parameters()))
        uu = sum((x * x).sum() for x in u)
        gu = sum((x * y).sum() for x, y in zip(g, u, strict=True))
        s = gu / uu if uu > 1e-9 else 0.0
        for p, x, y in zip(student.parameters(), g, u, strict=True):
            p.grad = 1.0 * x - 1.0 * s * y
        optimizer.step()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_scripts_own_setting_is_one_call(kind: str) -> None:
    """KL over prompt and padding, both signs, one block, weights 1, rates by depth; then plainly at another rate."""
    start = build(kind)
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    groups = gs.parameter_groups(ours, lr=1e-3, weight_decay=0.01, no_decay=())
    by_id = {id(p): name for name, p in ours.named_parameters()}
    rates = {by_id[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert len(set(rates.values())) == 3  # two blocks: 0.25 (with the embeddings), 0.75, 1
    batches = [batch(4, seed) for seed in range(3)]
    for one in batches:
        one["labels"] = one["labels"].clone()
        one["labels"][:, :2] = -100  # the prompt
    optimizer = torch.optim.AdamW(groups)
    reference = gs.losses.frozen(start)
    with gs.attach(gs.methods.opposed(reference, kl=gs.losses.kl(padding=True)), ours, optimizer) as surgery:
        for k, one in enumerate(batches):
            losses = surgery.backward(one)
            assert (losses["kl"] == 0) == (k == 0)  # in the first step student and teacher are one model
            optimizer.step()
            optimizer.zero_grad()
    hand_written(start, theirs, batches, rates)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=TOLERANCE, msg=name)
    second = torch.optim.AdamW(gs.parameter_groups(ours, lr=2e-4, no_decay=()))  # stage two
    with gs.attach(gs.methods.plain(), ours, second) as surgery:
        assert set(surgery.backward(batches[0])) == {"plain"}


def test_the_sign_of_the_product_decides() -> None:
    """Once the student has left the teacher, finetuning goes on leaving it: only "conflict" and "both" hold it back."""
    start, losses = build("stablelm"), {}
    for remove in ("both", "conflict", "agreement", None):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        reference = gs.losses.frozen(start)
        method = gs.methods.plain() if remove is None else gs.methods.opposed(reference, remove=remove)  # type: ignore[arg-type]
        with gs.attach(method, model, optimizer) as surgery:
            for _ in range(12):
                surgery.backward(batch(4, seed=0))
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            losses[remove] = float(kl_to(start)(model, batch(4, seed=0))[0])
    assert losses["both"] < 0.8 * losses[None] and losses["conflict"] < 0.8 * losses[None]
    assert losses["agreement"] > 0.9 * losses[None]


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    x, y = (torch.cat([v.reshape(-1) for v in d.values()]) for d in (a, b))
    return float(x @ y / (x.norm() * y.norm()))


@pytest.mark.parametrize("method", ["opposed", "ogd"])
def test_an_adam_step_is_orthogonal_where_the_update_is_projected(method: str) -> None:
    start = build("gpt2")
    found = {}
    for at in ("gradient", "update"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        memory = gs.estimators.gradient_memory(start, [batch(1, 5)], 1)
        made = (
            gs.methods.opposed(gs.losses.frozen(start), at=at) if method == "opposed" else gs.methods.ogd(memory, at=at)
        )  # type: ignore[arg-type]
        with gs.attach(made, model, optimizer) as surgery:
            for step in range(4):
                surgery.backward(batch(4, seed=step))
                before = {n: p.detach().clone() for n, p in model.named_parameters()}
                surgery.finish()
                slot = surgery.slots["protect"] if method == "opposed" else memory.vectors[0]
                protected = {n: slot[n].clone() for n in before}
                optimizer.step()
                optimizer.zero_grad()
        found[at] = abs(cosine({n: p.detach() - before[n] for n, p in model.named_parameters()}, protected))
    assert found["update"] < 1e-12 < 1e-3 < found["gradient"]


BAD: list[tuple[str, Callable[[Any], Any]]] = [
    ("at is", lambda r: gs.methods.opposed(r, at="both")),  # type: ignore[arg-type]
    ("remove is one of", lambda r: gs.methods.opposed(r, remove="conflicts")),  # type: ignore[arg-type]
    ("scope is one of", lambda r: gs.methods.safegrad(r, scope="layer")),  # type: ignore[arg-type]
    ("alignment_weight", lambda r: gs.methods.safegrad(r, alignment_weight=-1.0)),
    ("several different ones", lambda r: gs.methods.ogpsa(references=[])),
    ("several different ones", lambda r: gs.methods.ogpsa(references=["a", "a"])),
    ("every", lambda r: gs.methods.ogpsa(every=0)),
    ("decay", lambda r: gs.methods.gru(decay=1.5)),
    ("max_cosine", lambda r: gs.methods.gru(max_cosine=0.0)),
    ("by is", lambda r: gs.methods.gru(by="batch")),  # type: ignore[arg-type]
    ("two tasks or more", lambda r: gs.methods.pcgrad({"one": "forget"})),
    ("options of a task", lambda r: gs.methods.pcgrad({"one": "forget", "two": {"row": "retain"}})),
    ("forget_weight is a positive", lambda r: gs.methods.gradient_ascent(0.0)),
    ("retain_weight", lambda r: gs.methods.gradient_ascent(1.0, float("nan"))),
    ("beta", lambda r: gs.methods.npo(r, beta=0.0)),
    ("retain_weight", lambda r: gs.methods.npo(r, retain_weight=True)),
]


@pytest.mark.parametrize(("message", "make"), BAD, ids=[str(k) for k in range(len(BAD))])
def test_bad_options(message: str, make: Callable[[Any], Any]) -> None:
    with pytest.raises(PlanError, match=message):
        make(gs.losses.frozen(build("stablelm")))


def test_a_cache_has_no_padding(tmp_path: Any) -> None:
    model = build("gpt2")
    reference = gs.losses.precompute(tmp_path / "cache", model, [batch(2, 0)])
    with pytest.raises(PlanError, match="padding"):
        gs.methods.opposed(reference, kl=gs.losses.kl(padding=True))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_references_are_interchangeable(kind: str, tmp_path: Any) -> None:
    """A second model, a snapshot of what trains, and stored log-probabilities are one reference."""
    start = build(kind)
    one = batch(3, 0)
    references: dict[str, Any] = {
        "frozen": lambda model: gs.losses.frozen(start),
        "snapshot": lambda model: gs.losses.snapshot(gs.region(model, "*")),
        "cached": lambda model: gs.losses.precompute(tmp_path / "cache", start, [one], dtype=torch.float64),
    }
    found = {}
    for name, make in references.items():
        model: Any = copy.deepcopy(start)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        with gs.attach(gs.methods.opposed(make(model), remove="conflict"), model, optimizer) as surgery:
            for _ in range(STEPS):
                surgery.backward(one)
                optimizer.step()
                optimizer.zero_grad()
        found[name] = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    for name in ("snapshot", "cached"):
        torch.testing.assert_close(found[name], found["frozen"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_references_logits_go_before_a_second_gradient(kind: str) -> None:
    """The divergence's backward comes first and lets go of them, though it keeps the graph for the other loss."""
    teacher, model = build(kind), build(kind, seed=1)
    given: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def reference(model: Any, inputs: Any) -> Tensor:
        logits = gs.losses.frozen(teacher)(model, inputs)
        given.append(weakref.ref(logits.untyped_storage()))
        return logits

    def backward(loss: Tensor, **options: Any) -> None:
        alive.append(given[0]() is not None)
        loss.backward(**options)
        alive.append(given[0]() is not None)

    with gs.attach(gs.methods.opposed(reference), model) as surgery:
        losses = surgery.backward(batch(3, 0), backward=backward)
    assert alive == [True, False, False, False] and list(losses) == ["sft", "kl"]


@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_step_takes_less_than_one_gradient_more_than_the_stock_step(scope: Any) -> None:
    """At its peak, of all allocations, where logits outweigh what one layer's backward takes; the reference model was
    there before."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=4096,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, teacher = GPTNeoForCausalLM(config), GPTNeoForCausalLM(config)
    ids = torch.randint(0, config.vocab_size, (2, 128))

    def stock() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    least = allocated(stock)
    with gs.attach(gs.methods.opposed(gs.losses.frozen(teacher), scope=scope), model) as surgery:

        def step() -> None:
            surgery.backward({"input_ids": ids, "labels": ids})
            surgery.finish()
            model.zero_grad()

        most = allocated(step)
    assert most - least <= sum(4 * p.numel() for p in model.parameters())


def test_a_loss_with_several_backwards_says_so() -> None:
    """What reads a reference in a second backward of its own keeps it where it declares that, and is refused else."""
    teacher, model = build("opt"), build("opt", seed=1)

    def twice(outputs: Any, batch: Any, refs: Any) -> Tensor:
        loss = gs.losses.kl_divergence(outputs, batch, refs)
        torch.autograd.grad(loss, outputs.logits, retain_graph=True)
        return loss

    method = gs.methods.opposed(gs.losses.frozen(teacher), kl=twice)
    with gs.attach(method, model) as surgery, pytest.raises(PlanError, match=r"loss\.backwards = 2"):
        surgery.backward(batch(3, 0))
    twice.backwards = 2  # type: ignore[attr-defined]
    found = []
    for loss in (twice, gs.losses.kl_divergence):
        model.zero_grad()
        with gs.attach(gs.methods.opposed(gs.losses.frozen(teacher), kl=loss), model) as surgery:
            surgery.backward(batch(3, 0))
            surgery.finish()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_another_vocabulary_is_named() -> None:
    student, teacher = build("gpt2"), build("gpt2", seed=1)
    teacher.resize_token_embeddings(29)
    with gs.attach(gs.methods.opposed(gs.losses.frozen(teacher)), student) as surgery:
        with pytest.raises(BatchError, match="29 words, the model of 23"):
            surgery.backward(batch(2, 0))
        assert all(p.grad is None for p in student.parameters())


def test_a_stale_reference_gradient_is_an_error() -> None:
    model = build("opt")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with gs.attach(gs.methods.ogpsa(every=2, from_stream=False), model, optimizer) as surgery:
        surgery.backward(batch(2, 0))
        with pytest.raises(SlotError, match="reference"):
            optimizer.step()
        optimizer.zero_grad()
        surgery.refresh("reference", [batch(2, 1), batch(3, 2)])
        for step in range(3):
            surgery.backward(batch(2, step))
            if step == 2:
                with pytest.raises(SlotError, match="reference"):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()


@settings(max_examples=3, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(CASES))
def test_methods_describe_themselves(name: str, data: st.DataObject) -> None:
    model = build("gpt2")
    method = CASES[name].make(model, data.draw(CASES[name].options))
    assert json.loads(json.dumps(method.describe())) == method.describe()
    assert all(f"pass {p.name!r}" in method.explain(model) for p in method.passes)


def test_divergence_over_padding() -> None:
    """Every position counts the same, attended or not; the option goes with no mask."""
    model, other, one = build("opt"), build("opt", seed=1), batch(3, 4)
    loss = gs.losses.kl(padding=True)
    out = model(input_ids=one["input_ids"], attention_mask=one["attention_mask"])
    with torch.no_grad():
        reference = other(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
    value, positions = kl_to(other, padding=True)(model, one)
    torch.testing.assert_close(loss(out, one, {"reference": reference}), value)
    assert loss.count(one, model) == positions == one["input_ids"].numel()
    assert loss.__name__ == "kl(padding=True)"
    with pytest.raises(PlanError, match="one of them"):
        gs.losses.kl(padding=True, mask="labels")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")  # PEFT 0.18, of models that tie nothing
def test_adapters_off_is_the_reference_of_adapters() -> None:
    peft = pytest.importorskip("peft")
    start = build("opt")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"])
    model = peft.get_peft_model(copy.deepcopy(start), config).double()
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    one = batch(3, 5)
    with gs.attach(gs.methods.opposed(gs.losses.adapters_off(), metrics="global"), model, optimizer) as surgery:
        for step in range(STEPS):
            losses = surgery.backward(one)
            assert (losses["kl"] > 0) == (step > 0)  # adapters start as nothing
            optimizer.step()
            optimizer.zero_grad()
        assert abs(surgery.metrics()["project/main/protect/cosine_after"]) < 1e-9
    with torch.no_grad(), model.disable_adapter():
        inputs = {"input_ids": one["input_ids"], "attention_mask": one["attention_mask"]}
        assert torch.equal(model(**inputs).logits, start(**inputs).logits)
