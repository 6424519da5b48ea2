"""Wide activations in a handful of backward passes: coded cotangents.

Scale every column of the cotangent by a code that is equal inside a *tile* and different between tiles. A line that is
written into one tile only receives exactly its code times its plain gradient; nothing else does. Tiles tried are all
contiguous and all strided ones, so log-many passes decode neurons, heads and KV groups of any width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .node import Node, cotangent

_TOLERANCE = 1e-7
_FAINT = 1e-8
"""Gradients below this share of their tensor's largest are rounding."""
_CHUNK = 12


def decode(
    node: Node, tensors: dict[str, Tensor], private: dict[str, Tensor], plain: dict[str, Tensor]
) -> dict[str, list[np.ndarray]] | None:
    """``name -> per dim, bool [columns, coordinates]``, or ``None`` where the tiles do not explain some line."""
    count = node.columns
    ids, z = node.column_ids(), cotangent(node.tensor)
    found = {name: [np.zeros((count, size), dtype=bool) for size in t.shape] for name, t in tensors.items()}
    masked = {name: plain[name] * private[name] for name in tensors}
    samples = [0, count - 1, count // 2, count // 3]
    probes = [_grad(node.tensor, tensors, torch.where(ids == c, z, 0.0 * z)) for c in samples]
    open_: dict[tuple[str, int], np.ndarray] = {}
    loud: dict[tuple[str, int], np.ndarray] = {}
    for name, tensor in tensors.items():
        for dim in range(tensor.ndim):
            touched = torch.stack([_rows(p[name] * private[name], dim).abs().amax(1) > 0 for p in probes]).all(0)
            alive = _rows(masked[name], dim).abs().amax(1) > 0
            found[name][dim][:, (alive & touched).numpy()] = True  # from end to end and in between: every column
            open_[name, dim] = (alive & ~touched).numpy()
            scale = _rows(masked[name], dim).abs().amax(1)
            loud[name, dim] = (scale >= _FAINT * scale.max()).numpy()
    for tiles, code, coded in _coded(node.tensor, tensors, z, ids, _tilings(count)):
        if not any((rows & loud[place]).any() for place, rows in open_.items()):
            break
        for (name, dim), rows in open_.items():
            left = np.flatnonzero(rows)
            if not len(left):
                continue
            some = torch.from_numpy(left)
            tile = _match(
                _rows(masked[name].index_select(dim, some), dim),
                _rows((coded[name] * private[name]).index_select(dim, some), dim),
                code,
            )
            hits = left[tile >= 0]
            found[name][dim][:, hits] = tiles[:, None] == tile[tile >= 0][None]
            rows[hits] = False
    for (name, dim), rows in open_.items():
        _complete(found[name][dim], rows, rows & ~loud[name, dim])
        if rows.any():
            others = [d for d in range(tensors[name].ndim) if d != dim]
            if not any(_local(found[name][d]) for d in others):
                return None
            found[name][dim][:, rows] = True  # mixed along this dimension because another one tells units apart
    return found


def _coded(
    x: Tensor, tensors: dict[str, Tensor], z: Tensor, ids: Tensor, tilings: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, Tensor, dict[str, Tensor]]]:
    """Every tiling with its code and the gradients that it makes; the first alone, for it explains neurons."""
    codes = [torch.from_numpy(1 + np.random.default_rng(t.max() + 1).random(t.max() + 1)) for t in tilings]
    batched = True
    for start, stop in [(0, 1), *((s, s + _CHUNK) for s in range(1, len(tilings), _CHUNK))]:
        chosen = range(start, min(stop, len(tilings)))
        seeds = torch.stack([z * codes[i][tilings[i]][ids] for i in chosen])
        grads, batched = backward(x, list(tensors.values()), seeds, batched)
        for place, i in enumerate(chosen):
            pairs = zip(tensors.items(), grads, strict=True)
            yield (
                tilings[i],
                codes[i],
                {name: torch.zeros_like(t) if g is None else torch.nan_to_num(g[place]) for (name, t), g in pairs},
            )


def backward(x: Tensor, tensors: list[Tensor], seeds: Tensor, batched: bool) -> tuple[list[Tensor | None], bool]:
    """Gradients for a stack of cotangents, batched where torch can."""
    if batched and len(seeds) > 1:
        try:
            grads = torch.autograd.grad(x, tensors, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True)
            return list(grads), True
        except RuntimeError:
            batched = False  # some backward formulas know no batching
    each = [torch.autograd.grad(x, tensors, seed, retain_graph=True, allow_unused=True) for seed in seeds]
    return [None if grads[0] is None else torch.stack(grads) for grads in zip(*each, strict=True)], batched


def _complete(hits: np.ndarray, rows: np.ndarray, faint: np.ndarray) -> None:
    """Give lines whose gradient all but vanishes the columns of their neighbours, where these agree."""
    if not faint.any() or (rows & ~faint).any():
        return
    sure = np.flatnonzero(~rows)
    for line in np.flatnonzero(faint):
        before, after = sure[sure < line], sure[sure > line]
        near = [hits[:, i] for i in (*before[-1:], *after[:1])]
        if near and all(np.array_equal(near[0], other) for other in near):
            hits[:, line], rows[line] = near[0], False


def _local(hits: np.ndarray) -> bool:
    return bool((hits.any(0) & ~hits.all(0)).any())


def _grad(x: Tensor, tensors: dict[str, Tensor], seed: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(x, list(tensors.values()), seed, retain_graph=True, allow_unused=True)
    pairs = zip(tensors.items(), grads, strict=True)
    return {name: torch.zeros_like(t) if g is None else torch.nan_to_num(g) for (name, t), g in pairs}


def _rows(grad: Tensor, dim: int) -> Tensor:
    return grad.movedim(dim, 0).reshape(grad.shape[dim], -1)


def _tilings(count: int) -> list[np.ndarray]:
    """Tile number of every column: singles first, then growing contiguous tiles, then strided ones."""
    columns = np.arange(count)
    divisors = [d for d in range(1, count) if count % d == 0]
    return [columns // d for d in divisors] + [columns % d for d in reversed(divisors) if d > 1]


def _match(plain: Tensor, coded: Tensor, code: Tensor) -> np.ndarray:
    """Per line the tile whose code explains it, -1 where none does."""
    scale = plain.abs().amax(1)
    norm = (plain * plain).sum(1).clamp_min(1e-300)
    ratio = (plain * coded).sum(1) / norm
    residual = (coded - ratio[:, None] * plain).abs().amax(1) / scale.clamp_min(1e-300)
    ordered, order = code.sort()
    place = (
        torch.searchsorted(ordered, ratio).clamp(1, len(code) - 1) if len(code) > 1 else torch.zeros_like(ratio).long()
    )
    lower = (place - 1).clamp_min(0)
    nearest = torch.where((ordered[place] - ratio).abs() < (ordered[lower] - ratio).abs(), place, lower)
    off = (ordered[nearest] - ratio).abs()
    good = (residual < _TOLERANCE) & (off < _TOLERANCE) & (scale > 0)
    return torch.where(good, order[nearest], torch.full_like(place, -1)).numpy()
