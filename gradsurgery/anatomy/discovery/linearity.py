"""Whether an activation is linear in the weights that write it: then its columns are a latent, not neurons.

The rank of an adapter, the compressed queries, keys and values of latent attention and any other factor of a low-rank
product are linear in what writes them, norms with constant statistics included. Neurons, gated or not, are not.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_LINEAR = re.compile(
    r"^(Add|Sub|Neg|Mul|Div|Mm|Bmm|Addmm|Addbmm|Baddbmm|Linear|Convolution|ConvolutionOverrideable|View|Reshape|Alias"
    r"|UnsafeView|ViewAsReal|ViewAsComplex|T|Transpose|Permute|Movedim|Expand|Slice|Select|Split|SplitWithSizes|Unbind"
    r"|Chunk|Unfold|Cat|Stack|Squeeze|Unsqueeze|Clone|ToCopy|Copy|CopySlices|AsStrided|Repeat|Roll|Flip|Index"
    r"|IndexSelect|IndexAdd|IndexPut|Gather|Scatter|ScatterAdd|Sum|Mean|ConstantPadNd|NanToNum|Einsum|Identity"
    r"|AccumulateGrad)(Backward\d*)?$"
)
_PRODUCTS = re.compile(r"^(Mul|Mm|Bmm|Addmm|Baddbmm|Linear|Convolution|Div)Backward\d*$")


def is_linear(activation: Tensor) -> bool:
    """Whether every path from a matrix to ``activation`` is linear in it; gains and biases count as constants."""
    matrices: dict[Any, bool] = {}
    order: list[Any] = []
    stack = [(activation.grad_fn, False)]
    while stack:  # children first, without recursion: graphs may be deep
        node, done = stack.pop()
        if node is None or (not done and node in matrices):
            continue
        if done:
            order.append(node)
            continue
        matrices[node] = getattr(getattr(node, "variable", None), "ndim", 0) > 1
        stack.append((node, True))
        stack.extend((child, False) for child, _ in node.next_functions)
    for node in order:
        reached = [matrices.get(child, False) for child, _ in node.next_functions]
        matrices[node] = matrices[node] or any(reached)
        kind = node.name()
        if any(reached) and not _LINEAR.match(kind):
            return False
        if sum(reached) > 1 and _PRODUCTS.match(kind) and not kind.startswith("Addmm"):
            return False
    return True
