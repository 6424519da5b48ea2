"""The anatomy of a plain transformer of given dimensions, so that a key drawn without a model can be described."""

from __future__ import annotations

import argparse

import numpy as np

from gradsurgery.anatomy import Anatomy, UnitGroup
from gradsurgery.anatomy.groups import Footprint
from gradsurgery.anatomy.space import ParameterSpace
from gradsurgery.errors import PlanError
from gradsurgery.keys import Dimensions

REQUIRED = ("layers", "heads", "hidden", "mlp_dim")
MORE = ("kv_heads", "head_dim", "parameters", "gated", "no_mlp_bias", "attention_bias")


def dimensions_of(options: argparse.Namespace) -> Dimensions | None:
    """The dimensions that the options give; ``None`` where they name a model.

    Raises:
        PlanError: neither, both, or not all of them.
    """
    given = [name for name in REQUIRED + MORE if getattr(options, name) not in (None, False)]
    if options.model is not None:
        if given:
            raise PlanError(f"key new takes MODEL or dimensions, not both: {options.model} and {_flags(given)}.")
        return None
    if missing := [name for name in REQUIRED if name not in given]:
        raise PlanError(f"key new needs MODEL, or its dimensions: {_flags(missing)} missing.")
    if options.of == "all" and options.parameters is None:
        raise PlanError("--of all needs --parameters, the number of entries of the whole model.")
    return Dimensions(
        options.layers,
        options.heads,
        options.hidden,
        options.mlp_dim,
        num_kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        gated=options.gated,
        mlp_bias=not options.no_mlp_bias,
        attention_bias=options.attention_bias,
        total=options.parameters,
    )


def anatomy_of_dimensions(dimensions: Dimensions) -> Anatomy:
    """Heads (KV groups with their heads) and neurons of each layer; what ``total`` says is more lies in one rest.

    Raises:
        PlanError: ``total`` is less than the units have.
    """
    d = dimensions
    width = d.head_dim or d.hidden_size // d.num_heads
    heads = {name: n * width for name, n in (("q", d.num_heads), ("k", d.groups), ("v", d.groups))}
    neurons = dict.fromkeys(("up", "gate") if d.gated else ("up",), d.mlp_dim)
    shapes: dict[str, tuple[int, ...]] = {}
    groups: list[UnitGroup] = []
    for layer in range(d.num_layers):
        for kind, count, makers, bias, reader in (
            ("head", d.groups, heads, d.attention_bias, "o"),
            ("neuron", d.mlp_dim, neurons, d.mlp_bias, "down"),
        ):
            parts = []
            for name, rows in makers.items():
                index = {0: np.arange(rows).reshape(count, -1)}
                shapes[f"layers.{layer}.{name}.weight"] = (rows, d.hidden_size)
                parts.append(Footprint(f"layers.{layer}.{name}.weight", index))
                if bias:
                    shapes[f"layers.{layer}.{name}.bias"] = (rows,)
                    parts.append(Footprint(f"layers.{layer}.{name}.bias", index))
            columns = next(iter(makers.values()))
            shapes[f"layers.{layer}.{reader}.weight"] = (d.hidden_size, columns)
            index = {1: np.arange(columns).reshape(count, -1)}
            parts.append(Footprint(f"layers.{layer}.{reader}.weight", index))
            name = f"layers.{layer}.{kind}s"
            groups.append(UnitGroup(kind, name, layer, tuple(parts), (len(parts) - 1,), (0,) * count, True))
    space = ParameterSpace("a model of these dimensions", shapes, {})
    if d.total is not None:
        if (rest := d.total - space.numel()) < 0:
            raise PlanError(
                f"--parameters {d.total:,} is less than the {space.numel():,} entries of heads and neurons."
            )
        shapes.update({"rest": (rest,)} if rest else {})
    return Anatomy(space, groups)


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
