"""Which units to dedicate: the last ones of every group, as SGTM does, by number or by share of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

from gradsurgery.anatomy import Anatomy, Units
from gradsurgery.errors import SelectionError


def forget_units(
    anatomy: Anatomy,
    heads: int = 0,
    neurons: int = 0,
    percent: float | None = None,
    layers: Sequence[int] | None = None,
) -> Units:
    """The last ``heads`` heads and ``neurons`` MLP neurons of every layer, or ``percent`` of both.

    Args:
        anatomy: Anatomy of the model.
        heads: Heads a layer.
        neurons: Neurons a group (in a mixture of experts: of every expert).
        percent: Instead of both numbers: share of each group's units, and so of its parameters, in percent; rounded
            down, at least one unit.
        layers: Absolute layer numbers; ``None`` for all.

    Raises:
        SelectionError: both or neither way given, more units than a group has, layers that do not exist.

    Example:
        >>> gs.methods.forget_units(anatomy, heads=1, neurons=16).text
        'heads[:, -1:] | neurons[:, -16:]'
    """
    if (percent is None) == (not heads and not neurons):
        raise SelectionError("forget_units takes numbers of heads and neurons, or percent: one of the two.")
    if percent is not None and not 0 < percent < 100:
        raise SelectionError(f"percent lies between 0 and 100, not at {percent}.")
    where = slice(None) if layers is None else list(layers)
    out: Units | None = None
    for kind, count in ((anatomy.heads, heads), (anatomy.neurons, neurons)):
        sizes = {len(group) for group, _ in kind.groups}
        if percent is not None:
            if len(sizes) > 1:
                raise SelectionError(
                    f"percent needs equal groups, these hold {sorted(sizes)} {kind.text}; give numbers."
                )
            count = max(int(max(sizes, default=0) * percent / 100), 1) if sizes else 0
        if not count:
            continue
        if not sizes or count >= min(sizes):
            have = f"groups of {min(sizes)}" if sizes else "none"
            raise SelectionError(f"{count} forget {kind.text} a layer leave nothing for the rest: there are {have}.")
        chosen = kind[where, slice(-count, None)]
        out = chosen if out is None else out | chosen
    assert out is not None
    return out
