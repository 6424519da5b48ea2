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
from gradsurgery.tensors.dots import (
    Difference,
    aligned,
    all_reduce_,
    in_boxes_only,
    inner_products,
    local_of,
    pieces,
    replicated,
    row_products,
    shards_of,
    subtract_,
    subtract_rows_,
)
from gradsurgery.tensors.exchange import Exchange
from gradsurgery.tensors.lines import Lines, LineSwap
from gradsurgery.tensors.parallel import (
    added_after,
    is_laid_out,
    is_tensor_parallel,
    lay_out_gradients_,
    returns_whole,
)
from gradsurgery.tensors.settle import reshard, settle, unreduced

__all__ = [
    "Box",
    "Difference",
    "Exchange",
    "Indices",
    "LineSwap",
    "Lines",
    "added_after",
    "aligned",
    "all_reduce_",
    "fill_",
    "gather",
    "in_boxes_only",
    "inner_products",
    "is_laid_out",
    "is_sharded",
    "is_tensor_parallel",
    "lay_out_gradients_",
    "local_of",
    "local_part",
    "pieces",
    "put_",
    "replicated",
    "reshard",
    "returns_whole",
    "row_products",
    "scale_",
    "settle",
    "shards_of",
    "subtract_",
    "subtract_rows_",
    "sum_over_shards",
    "unreduced",
]
