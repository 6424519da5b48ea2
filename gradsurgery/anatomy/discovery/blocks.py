"""One block after another: couple, cluster, group."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from .composite import opaque
from .coupling import Lines, Reach, gradients, lines_into, reach_of
from .draft import Draft, Findings
from .group import Biases, Cluster, claimed, clusters_of, drafts_of
from .linearity import is_linear
from .node import Node, cotangent
from .partition import Inner, block_of, inner_lists
from .trace import DISGUISED, Trace

SPARSE = "reached in part"
"""Much of the tensor meets none of the inputs: a table by distance, say, of which they show the first rows."""


@dataclass
class Survey:
    """What one traced forward says about a model."""

    trace: Trace
    blocks: dict[str, str]
    reach: Reach
    inner: Inner = frozenset()
    findings: dict[str, Findings] = field(default_factory=dict)
    known: dict[tuple, list[Lines]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    """Tensors that no gradient of the output reaches."""

    @property
    def drafts(self) -> list[Draft]:
        return [draft for found in self.findings.values() for draft in found.drafts]


def survey(model, trace: Trace, outputs: list[Tensor]) -> Survey:  # type: ignore[no-untyped-def]
    """Couple every block of a traced model."""
    for name in opaque([*outputs, *(node.tensor for node in trace.nodes.values())], trace.tensors):
        trace.uses[name].add(DISGUISED)
    blocks = block_of(model)
    reach = reach_of(trace, outputs, blocks)
    inner: Inner = frozenset()
    while more := inner_lists(trace, reach, blocks):
        inner |= more
        blocks = block_of(model, inner)
        reach = reach_of(trace, outputs, blocks)
    seen = Survey(trace, blocks, reach, inner)
    biases = biases_of(trace)
    readers: dict[str, list[Node]] = {}
    for node in trace.nodes.values():
        for block in dict.fromkeys(blocks[read.name] for read in node.reads):
            readers.setdefault(block, []).append(node)
    if len(readers) > 1:
        readers.pop("", None)  # stems and classifiers
    for block, nodes in readers.items():
        seen.findings[block] = couple(seen, block, nodes, biases)
    return seen


def couple(seen: Survey, block: str, nodes: list[Node], biases: Biases) -> Findings:
    """Units of one block, unverified."""
    tensors = {name: t for name, t in seen.trace.tensors.items() if seen.blocks[name] == block}
    private = {name: mask for name in tensors if (mask := seen.reach.private(name)) is not None}
    weights = {read.name for node in seen.trace.nodes.values() for read in node.reads}
    named = frozenset(read.bias for node in seen.trace.nodes.values() for read in node.reads if read.bias is not None)
    for node in nodes:
        node.biases = named
    lines = [lines_into(node, block, tensors, private, seen.known) for node in nodes]
    forget_lone_restrictions(lines)
    sparse = frozenset(name for name in tensors if name in weights and seen.reach.sparse(name))
    sparse |= {bias for name in sparse for bias, _ in biases.get(name, ())}
    found_sparse = dict.fromkeys(sparse, SPARSE)
    found = Findings(structural=found_sparse)
    clusters = clusters_of(nodes, lines)
    for cluster in clusters:
        written = {line.name for part in cluster.lines for line in part if line.name in weights}
        if not written:
            continue  # a norm's gains write the columns of the residual stream
        elsewhere = {name for other in clusters if other is not cluster for name in _local(other)}
        drafts = drafts_of(cluster, block, biases, weights, elsewhere, sparse)
        if not drafts:
            continue
        if drafts[0].kind == "neuron" and any(slot.name in seen.trace.embedded for slot in drafts[0].slots):
            found.structural.update((name, "residual stream") for name in _local(cluster) if name in private)
            continue
        if all(is_linear(node.tensor) for node in cluster.nodes):
            drafts = [replace(draft, kind="latent") for draft in drafts if draft.parent is None]
            if not any(_writes_out(seen, read.name) for node in cluster.nodes for read in node.reads):
                found.structural.update((name, "latent") for name in _local(cluster) if name in private)
                found.drafts.extend(drafts)
                continue
        if drafts[0].kind == "neuron" and any(_foreign(seen, node, block) for node in cluster.nodes):
            found.structural.update((name, "joined with other inputs") for name in _local(cluster) if name in private)
            continue
        found.drafts.extend(drafts)
        own, common = claimed(cluster, weights)
        found.claimed |= {name: mask for name, mask in own.items() if name not in elsewhere}
        found.common |= common - elsewhere
    return found


def forget_lone_restrictions(lines: list[list[Lines]]) -> None:
    """A tensor that every reader touches at the same places is only touched there because the inputs are short."""
    places: dict[tuple[str, int], set] = {}
    for found in lines:
        for line in found:
            for dim in range(len(line.shape)):
                touched = line.touched.get(dim)
                places.setdefault((line.name, dim), set()).add(None if touched is None else tuple(touched))
    for found in lines:
        for line in found:
            for dim in list(line.touched):
                if len(places[line.name, dim]) == 1:
                    del line.touched[dim]


def biases_of(trace: Trace) -> Biases:
    """Weight -> its bias and the dimension that the bias runs along; a norm's gain -> what it shifts by."""
    found = {gain: [(name, 0) for name in names] for gain, names in trace.shifts.items()}
    for node in trace.nodes.values():
        for read in node.reads:
            shape = tuple(read.parameter.shape)
            flat = len(shape) == 2 and tuple(read.view.shape) in (shape, shape[::-1])
            if read.bias is None or not (flat or (read.filters and tuple(read.view.shape) == shape)):
                continue
            columns = next(iter(read.index), None) if flat else read.column_dims[0]
            if columns is not None and trace.tensors[read.bias].shape == (shape[1 - columns],):
                found[read.name] = [(read.bias, 1 - columns)]
    return found


def _writes_out(seen: Survey, name: str) -> bool:
    return name in seen.reach.leaks and bool(seen.reach.leaks[name].any())


def _foreign(seen: Survey, node: Node, block: str) -> bool:
    """Whether tensors outside the block write this activation: its columns are then no units of this block alone."""
    elsewhere = {n: t for n, t in seen.trace.tensors.items() if seen.blocks[n] != block}
    return any(bool((g != 0).any()) for g in gradients([(node.tensor, cotangent(node.tensor))], elsewhere).values())


def _local(cluster: Cluster) -> set[str]:
    return {line.name for lines in cluster.lines for line in lines if not line.dense.all()}
