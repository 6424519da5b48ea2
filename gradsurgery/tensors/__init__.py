"""Sharding-aware work on parts of tensors: plain tensors and DTensors through one set of operations."""

from gradsurgery.tensors.boxes import (
    Box,
    Indices,
    fill_,
    gather,
    is_sharded,
    local_part,
    put_,
    scale_,
    sum_over_shards,
)
from gradsurgery.tensors.exchange import Exchange
from gradsurgery.tensors.lines import Lines, LineSwap
from gradsurgery.tensors.settle import settle, unreduced

__all__ = [
    "Box",
    "Exchange",
    "Indices",
    "LineSwap",
    "Lines",
    "fill_",
    "gather",
    "is_sharded",
    "local_part",
    "put_",
    "scale_",
    "settle",
    "sum_over_shards",
    "unreduced",
]
