"""Blocks: the parts of a model that the residual stream runs past, and inside which units live.

A block is an element of a list of modules. Not every list holds blocks: adapters of a shared layer and the stages of a
bottleneck hand their results to the module around them. Such lists are *inner*, and their elements belong to the block
around them.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from torch import nn

from .coupling import Reach, gradients
from .names import canonical_of, is_under
from .node import cotangent
from .trace import Trace

Inner = frozenset[str]
"""Canonical paths of lists whose elements are no blocks of their own."""


def block_of(model: nn.Module, inner: Inner = frozenset()) -> dict[str, str]:
    """Innermost list element that holds each parameter and buffer (``""``: none).

    An element with one matrix holds no unit, for that takes one matrix that writes and one that reads: it belongs to
    the block around it (the factors of a PEFT adapter lie in ``ModuleDict``s of their own).
    """
    lists = {path for path, module in model.named_modules() if is_list(module) and canonical_of(path) not in inner}
    parameters = list(model.named_parameters(remove_duplicate=False))
    elements = {
        name: _elements(name, lists) for name in [n for n, _ in parameters] + [n for n, _ in model.named_buffers()]
    }
    matrices = Counter(path for name, p in parameters if p.ndim > 1 for path in elements[name])
    return {name: next((p for p in paths if matrices[p] > 1), "") for name, paths in elements.items()}


def _elements(name: str, lists: set[str]) -> list[str]:
    """Elements of containers that hold a parameter, innermost first."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 2, -1, -1) if ".".join(parts[:i]) in lists]


def is_list(module: nn.Module) -> bool:
    """A list or dict of modules, or a sequence of modules that have parts of their own."""
    if isinstance(module, nn.Sequential):
        return any(next(part.children(), None) is not None for part in module)
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def inner_lists(trace: Trace, reach: Reach, blocks: dict[str, str]) -> Inner:
    """Lists whose elements hand what they write to one other element, or to the module around the list.

    What writes the residual stream is heard by all that follows, by the end of the model too.
    """
    lists: dict[str, set[str]] = defaultdict(set)
    whole = _whole(trace, blocks)
    for name in reach.leaks:
        if blocks[name] not in whole and name not in reach.ends:
            lists[canonical_of(blocks[name].rpartition(".")[0])].add(name)
    if not lists:
        return frozenset()
    heard: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    wanted = {name: trace.tensors[name] for names in lists.values() for name in names}
    for node in trace.nodes.values():
        readers = tuple(read.name for read in node.reads)
        for name, gradient in gradients([(node.tensor, cotangent(node.tensor))], wanted).items():
            if bool((gradient != 0).any()):
                heard[name].add(readers)
    return frozenset(path for path, names in lists.items() if _hands_on(names, heard, blocks))


def _whole(trace: Trace, blocks: dict[str, str]) -> set[str]:
    """Elements that may hold a layer of their own: more than two matrices, unless all are filters of images."""
    matrices: dict[str, list[int]] = defaultdict(list)
    for name, tensor in trace.tensors.items():
        if tensor.ndim > 1:
            matrices[blocks[name]].append(tensor.ndim)
    return {""} | {block for block, ndims in matrices.items() if len(ndims) > 2 and min(ndims) < 4}


def _hands_on(names: set[str], heard: dict[str, set[tuple[str, ...]]], blocks: dict[str, str]) -> bool:
    """Whether what the elements of a list write is read in one place each, next to the list; or else farther away."""
    handed = False
    for name in names:
        around = blocks[name].rpartition(".")[0].rpartition(".")[0]
        if not all(is_under(reader, around) for readers in heard[name] for reader in readers):
            continue
        if len({blocks[reader] for readers in heard[name] for reader in readers}) > 1:
            return False
        handed = True
    return handed
