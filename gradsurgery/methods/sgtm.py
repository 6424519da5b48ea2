"""Selective gradient masking (SGTM): forget data updates dedicated parameters alone, which are removed afterwards.

Shilov et al. 2025, "Beyond Data Filtering", arXiv 2512.05648, section 3; gradient routing: Cloud et al. 2024, arXiv
2410.04332.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gradsurgery.anatomy import Anatomy, Region, Units
from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.units import require_units
from gradsurgery.errors import PlanError
from gradsurgery.losses import causal_lm
from gradsurgery.surgery import Method, Pass
from gradsurgery.surgery.passes import Loss
from gradsurgery.transforms import ForwardTransform, detach, mask, zero

Joint = Literal["mlp_projection", "attention_projection", "attention"]
STRATEGIES = ("mask", "detach", "zero")
PROJECTIONS = {"mlp_projection": "neuron", "attention_projection": "head"}


def sgtm(
    anatomy: Anatomy,
    forget: Region,
    strategy: Literal["mask", "detach", "zero"] = "mask",
    embeddings: Literal["joint", "retain"] = "joint",
    norms: Literal["joint", "retain"] = "joint",
    joint: Sequence[Joint] = (),
    loss: Loss = causal_lm,
) -> Method:
    """One pass in which rows labelled ``forget`` train the forget units, rows labelled ``retain`` run without them.

    On forget rows the other units of the forget units' layers receive no gradient (``"mask"``), or have their
    activations detached (``"detach"``, gradient routing) or zeroed (``"zero"``, activation masking); with the latter
    two the consumers' output biases still learn. On retain rows the forget units are zero. Rows with neither label
    train everything; layers without forget units are joint. A row with both labels gets both: it runs without the
    forget units and sends the others nothing, so that it trains the joint parts alone.

    Args:
        anatomy: Anatomy of the model.
        forget: Units dedicated to the forget data.
        strategy: What happens to the other units on forget rows.
        embeddings: ``"retain"``: forget rows do not train token and position embeddings (nor an output head tied to
        them). norms: ``"retain"``: forget rows do not train the norms of the layers that hold forget units.
        joint: Parts that forget rows train nonetheless: output projections of MLP or attention (the originals'
            ``no_mlp_proj``, ``no_attn_proj``; with ``"mask"`` alone), or all of attention.
        loss: Loss of the pass.

    Raises:
        SelectionError: ``forget`` is no set of units, or leaves no others.
        PlanError: an option that does not exist, or joint projections with a strategy that acts on activations.

    Example:
        >>> method = gs.methods.sgtm(anatomy, anatomy.heads[:, -1:] | anatomy.neurons[:, -16:], embeddings="retain")
        >>> print(method.explain(model).splitlines()[0])
        pass 'sgtm': loss causal_lm, into main; one forward, 1 backward
    """
    for name, value, options in (
        ("strategy", strategy, STRATEGIES),
        ("embeddings", embeddings, ("joint", "retain")),
        ("norms", norms, ("joint", "retain")),
    ):
        if value not in options:
            raise PlanError(f"sgtm: {name} is one of {', '.join(options)}, not {value!r}.")
    check_joint(joint, strategy)
    units = require_units(forget, "sgtm: forget")
    if "attention" in joint:
        units = require_units(units - anatomy.heads, "sgtm with joint attention: forget")
    rest = anatomy.rest(units)
    under: list[ForwardTransform] = []
    if strategy == "mask":
        under.append(mask(without_projections(rest, joint), where="forget"))
    else:
        under.append((detach if strategy == "detach" else zero)(rest, where="forget"))
    protected: Region | None = None
    if embeddings == "retain":
        protected = anatomy.structure("embedding")
    if norms == "retain":
        blocks = block_norms(anatomy, units)
        protected = blocks if protected is None else protected | blocks
    if protected is not None:
        under.append(mask(protected, where="forget"))
    return Method([Pass("sgtm", loss, under=[*under, zero(units, where="retain")])])


def check_joint(joint: Sequence[str], strategy: str) -> None:
    names = (*PROJECTIONS, "attention")
    if isinstance(joint, str) or (unknown := [part for part in joint if part not in names]):
        given = joint if isinstance(joint, str) else ", ".join(map(str, unknown))
        raise PlanError(f"sgtm: joint is a list of {', '.join(names)}, not {given!r}.")
    if strategy != "mask" and (parts := [part for part in joint if part in PROJECTIONS]):
        raise PlanError(
            f"sgtm: joint {', '.join(parts)} needs strategy='mask': with {strategy!r} the projections read activations "
            f"that are cut off."
        )


def without_projections(rest: Units, joint: Sequence[str]) -> Region:
    """The rest without the output projections that stay joint (columns and biases)."""
    out: Region = rest
    for part in set(joint) & set(PROJECTIONS):
        names = {
            name
            for group, _ in rest.groups
            if group.kind == PROJECTIONS[part]
            for name in (*(slot[0] for slot in group.consumers[0]), *group.riders)
        }
        shapes = {rest.space.canonical(n): rest.space.shapes[rest.space.canonical(n)] for n in names}
        out = Region.__sub__(_plain(out), Region(rest.space, {n: Entries.full(s) for n, s in shapes.items()}))
    return out


def block_norms(anatomy: Anatomy, units: Units) -> Region:
    """The norms inside the layers that hold some of the units."""
    blocks = set()
    for group, _ in units.groups:
        parts = group.name.split(".")
        numbered = [i for i, part in enumerate(parts) if part == str(group.layer)]
        blocks.add(".".join(parts[: numbered[0] + 1]) + "." if numbered else group.name)
    norms = anatomy.structure("norm")
    kept = {name: part for name, part in norms.entries.items() if any(name.startswith(b) for b in blocks)}
    return Region(anatomy.space, kept, f"norms of the layers of {units.text}")


def _plain(region: Region) -> Region:
    """A region without its memory of units, so that set algebra is about entries."""
    return Region(region.space, region.entries, region.text)
