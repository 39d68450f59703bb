"""What an edit is, and a graph with everything that edits ask about it.

Decides: nothing. Each answer is worked out when first asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lemonade_hpc.search.graph import Graph, Node, Run, channel_runs, infer, readers
from lemonade_hpc.search.ops import Add, Concat, Conv, Facts, Op, ReLU, Shape, Signature

EXACT = frozenset({"insert", "widen", "add", "concat"})
"""Kinds of edit that leave the function unchanged (network morphisms)."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One application of an operator: its kind, the tie it is applied to, and kernel, factor, divisor or second tie."""

    kind: str
    site: int
    arg: int = 0


@dataclass(frozen=True)
class Anatomy:
    """A graph on a signature, with all that edits ask about it: see `study`."""

    graph: Graph
    signature: Signature
    facts: Mapping[int, Facts]

    def shape(self, id_: int) -> Shape:
        """Output shape of a node, per image."""
        return self.facts[id_].shape

    def sizes(self, id_: int) -> list[int]:
        """Widths of the runs of a node's channels."""
        return [size for _, size in self.runs[id_]]

    def of(self, kind: type[Op]) -> list[Node]:
        """The nodes of one kind of operator, in topological order."""
        return self.kinds.get(kind, [])

    @cached_property
    def by_id(self) -> Mapping[int, Node]:
        """Nodes by their id."""
        return self.graph.by_id

    @cached_property
    def position(self) -> Mapping[int, int]:
        """Each node's place in the topological order."""
        return {node.id: k for k, node in enumerate(self.graph.nodes)}

    @cached_property
    def kinds(self) -> Mapping[type[Op], list[Node]]:
        """The nodes by their kind of operator."""
        found: dict[type[Op], list[Node]] = {}
        for node in self.graph.nodes:
            found.setdefault(type(node.op), []).append(node)
        return found

    @cached_property
    def ties(self) -> Mapping[int, list[Node]]:
        """For each tie the nodes that share it, one in every copy of the cell."""
        found: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            found.setdefault(node.tie, []).append(node)
        return found

    @cached_property
    def readers(self) -> Mapping[int, list[Node]]:
        """For each node's id, the nodes that read it."""
        return readers(self.graph)

    @cached_property
    def runs(self) -> Mapping[int, tuple[Run, ...]]:
        """`graph.channel_runs`; raises GraphError where an addition's operands are not divided alike."""
        return channel_runs(self.graph, {id_: fact.shape for id_, fact in self.facts.items()})

    @cached_property
    def writers(self) -> Mapping[int, list[Node]]:
        """For each channel group the convolutions that write it, in topological order."""
        found: dict[int, list[Node]] = {}
        for node in self.of(Conv):
            found.setdefault(self.runs[node.id][0][0], []).append(node)
        return found

    @cached_property
    def num_blocks(self) -> Mapping[Shape, int]:
        """For each height and width, how many ReLUs there are: the blocks between two poolings end in one each."""
        return Counter([self.shape(node.id)[1:] for node in self.of(ReLU)])

    def mixes(self, id_: int) -> bool:
        """Whether a node's channels come from more than one run."""
        while (node := self.by_id[id_]).op.channelwise:
            if isinstance(node.op, Concat):
                return True
            id_ = node.inputs[0]
        return False

    @cached_property
    def feeds_add(self) -> frozenset[int]:
        """Nodes whose channels reach an addition unmixed: their division into runs must not change."""
        found: set[int] = set()
        waiting = [source for node in self.of(Add) for source in node.inputs]
        while waiting:
            id_ = waiting.pop()
            if id_ not in found:
                found.add(id_)
                node = self.by_id[id_]
                waiting.extend(node.inputs if node.op.channelwise else ())
        return frozenset(found)


def study(graph: Graph, signature: Signature) -> Anatomy:
    """A graph's anatomy; raises ops.ShapeError for an invalid one."""
    return Anatomy(graph, signature, infer(graph, signature))
