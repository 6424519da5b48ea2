"""Removal of units from the weights: zeroed for good, or replaced by noise.

``theta[units] <- 0`` or ``~ N(0, std(the rest)^2)`` (SGTM's ablation of the forget units: arXiv 2512.05648, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gradsurgery.anatomy.entries import Entries
from gradsurgery.anatomy.region import Region
from gradsurgery.anatomy.space import ParameterSpace, require_same_space, require_unpacked, unwrap
from gradsurgery.anatomy.units import Units, require_units
from gradsurgery.errors import PlanError
from gradsurgery.tensors import Box, Indices, fill_, gather, is_sharded, local_part, put_, settle, sum_over_shards
from gradsurgery.transforms.engine.program import box_columns

Reinit = Literal["zero", "normal"]
CHUNK = 1 << 22
"""Entries that are looked at or drawn at once."""


@torch.no_grad()
def ablate_(model: nn.Module, units: Units, reinit: Reinit = "zero", generator: torch.Generator | None = None) -> None:
    """Remove ``units`` from the weights of ``model``, in place.

    Consumers and producers are overwritten; where a full-width norm or a router couples the units (``units.closed`` is
    false), their consumers alone, so that the others feel nothing. With ``"zero"`` the forward then is that of
    ``gs.zero(units)``. Shapes, names and the config stay, so ``save_pretrained`` and plain ``AutoModel`` loading work.
    An optimizer's moments are the caller's affair: with stale ones, the next step moves ablated entries again.

    Args:
        model: The model the units are of; sharded parameters are welcome. Tied weights are written once.
        units: Units of its anatomy. Output biases that ride along in ``anatomy.rest`` belong to no unit and stay.
        reinit: ``"zero"``, or ``"normal"``: draws of N(0, std of the remaining entries of the same tensor); of the
            tensor as it was where nothing remains.
        generator: Where the draws come from. They depend on it alone, not on device or number of ranks.

    Raises:
        SelectionError: a plain region, no units, or units of another model.
        PlanError: an unknown ``reinit``, or a tensor that is quantised or not floating point.

    Example:
        >>> gs.ablate_(model, anatomy.neurons[:, -16:])
    """
    if reinit not in get_args(Reinit):
        raise PlanError(f'ablate_ takes reinit="zero" or "normal", not {reinit!r}.')
    units = require_units(units, "ablate_")
    model = unwrap(model)
    space = ParameterSpace.of(model)
    require_same_space(units.space, space, f"ablate_: {units.text or 'the selection'}")
    settle(model)
    parameters = dict(model.named_parameters())
    region = removed_by(units)
    require_unpacked(space, region.entries, "ablate_")
    for name in region.entries:
        if not parameters[name].is_floating_point():
            raise PlanError(
                f"{name} is {parameters[name].dtype}: ablate_ writes floating-point weights; dequantise first."
            )
    boxes = {n: [box_columns(box, part.shape) for box in part.boxes()] for n, part in region.entries.items()}
    if reinit == "zero":
        for name, found in boxes.items():
            fill_(parameters[name], found, 0.0)
    else:
        stds = {name: _std_of_rest(parameters[name], part) for name, part in region.entries.items()}
        draws = torch.Generator().manual_seed(_seed(generator, parameters))
        for name, found in boxes.items():
            for box in found:
                _draw_(parameters[name], box, stds[name], draws)
    settle(model)


def removed_by(units: Units) -> Region:
    """What ``ablate_`` overwrites: closed units whole, of others the consumers."""
    closed = {}
    for g, bits in units.chosen.items():
        group = units.anatomy.groups[g]
        if group.closed and (group.parent is None or units.anatomy.parent_of(group).closed):
            closed[g] = bits
    return Region(units.space, Units(units.anatomy, closed).entries) | units.consumers


def _chunks(box: Box) -> Iterator[Box]:
    """A box as boxes of at most `CHUNK` entries (or one index of its first dimension)."""
    if not box:
        yield box
        return
    first, *rest = box
    row = 1
    for indices in rest:
        row *= len(indices)
    step = max(CHUNK // max(row, 1), 1)
    for start in range(0, len(first), step):
        yield Indices(first.indices[start : start + step], first.size), *rest


def _std_of_rest(parameter: Tensor, removed: Entries) -> float:
    """Standard deviation of the entries that are not removed, over all shards, in fp64 and two passes."""
    rest = Entries.full(removed.shape) if removed.whole else ~removed
    boxes = [chunk for box in rest.boxes() for chunk in _chunks(box_columns(box, rest.shape))]
    count = rest.numel()

    def total(power: int, centre: float) -> float:
        local, inside = local_part(parameter, boxes)
        out = torch.zeros((), dtype=torch.float64, device=local.device)
        for box in inside:
            (part,) = gather(local, [box])
            out += (part.double() - centre).pow(power).sum()
        return float(sum_over_shards(out, parameter))

    mean = total(1, 0.0) / count
    return (total(2, mean) / max(count - 1, 1)) ** 0.5


def _seed(generator: torch.Generator | None, parameters: dict[str, nn.Parameter]) -> int:
    """A seed from the caller's generator; the first rank's where ranks hold parts of one model."""
    device = generator.device if generator is not None else torch.device("cpu")
    seed = torch.randint(2**62, (1,), generator=generator, device=device)
    sharded = next((p for p in parameters.values() if is_sharded(p)), None)
    if sharded is not None:
        seed = seed.to(sharded.device)
        torch.distributed.broadcast(seed, 0)
    return int(seed)


def _draw_(parameter: Tensor, box: Box, std: float, draws: torch.Generator) -> None:
    """Every rank draws the whole box, on the CPU and piece by piece, and keeps its part."""
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    for chunk in _chunks(box):
        values = torch.randn([len(i) for i in chunk], generator=draws, dtype=wide) * std
        local, inside = local_part(parameter, [chunk])
        for part in inside:
            mine = values
            if local is not parameter:
                mine = _shard_of(parameter, chunk, values)
            put_(local, [part], [mine.to(local.device, local.dtype)])


def _shard_of(parameter: Tensor, box: Box, values: Tensor) -> Tensor:
    """The part of a box's values that lies in this rank's shard."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    for dim, (indices, start, size) in enumerate(zip(box, offset, shape, strict=True)):
        inside = (indices.indices >= start) & (indices.indices < start + size)
        values = values.index_select(dim, inside.nonzero().flatten())
    return values
