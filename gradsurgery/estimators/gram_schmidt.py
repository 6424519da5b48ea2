"""Gram-Schmidt on gradients that lie by parameter, sharded or not, and are never concatenated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradsurgery.tensors.dots import all_reduce_, inner_products, local_of, pieces, shards_of, subtract_

Vector = dict[str, Tensor]
DEPENDENT = 1e-5
"""A gradient that shrinks below this share when the others are taken out of it adds no direction (fp32)."""


def orthonormalise_(vector: Vector, others: Sequence[Vector]) -> bool:
    """Make a gradient orthogonal to orthonormal others, and of norm 1; False where nothing is left of it."""
    before = math.sqrt(inner(vector, vector))
    for _ in range(2):  # once leaves rounding of the size of what was taken out
        for other in others:
            share = inner(vector, other)
            for name in vector.keys() & other.keys():
                subtract_(local_of(vector[name]), [local_of(other[name])], [share])
    if (after := math.sqrt(inner(vector, vector))) <= DEPENDENT * before:
        return False
    for part in vector.values():
        part.div_(after)
    return True


def inner(a: Vector, b: Vector) -> float:
    """``<a, b>`` over the parameters that both name, summed over all shards."""
    totals: dict[Any, Tensor] = {}
    for name in sorted(a.keys() & b.keys()):  # in one order on all ranks
        found = inner_products([pieces(a[name])[0], pieces(b[name])[0]])[0, 1]
        where = shards_of(a[name])
        totals[where] = totals[where] + found if where in totals else found.clone()
    return sum(float(all_reduce_(total, *where)) for where, total in totals.items())
