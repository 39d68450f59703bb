"""The graph of a network: nodes in topological order, validity, shapes, channel groups, digest, JSON.

Decides: what a network is, and when two are the same one. Holds no weight, no image shape and no number of classes
(those are the `Signature` beside it), so one graph can be judged on several data sets. Every question about a graph
is one loop over its nodes. Graphs are immutable; `morphisms.py` makes new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lemonade_hpc.search.ops import Concat, Conv, Depthwise, Facts, Input, Linear, Op, Shape, Signature, facts
from lemonade_hpc.search.ops import from_json as op_from_json
from lemonade_hpc.search.ops import to_json as op_to_json

Run = tuple[int, int]
"""Channels that change width together: (group, how many). A feature map is a tuple of runs, in channel order."""


class GraphError(ValueError):
    """Not a valid graph: says which node and why."""


@dataclass(frozen=True, slots=True)
class Node:
    """An operator and the ids of its inputs. Nodes with equal `tie` are one cell node's copies and change together."""

    id: int
    op: Op
    inputs: tuple[int, ...]
    tie: int


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in topological order, the image first, the logits last. `next_id` is the first id never used so far.

    Ids are never reused along a lineage, so a weight is called "{id}.{param}" for ever.
    """

    nodes: tuple[Node, ...]
    next_id: int

    @property
    def by_id(self) -> dict[int, Node]:
        """Nodes by their id."""
        return {node.id: node for node in self.nodes}


def readers(graph: Graph) -> dict[int, list[Node]]:
    """For each node's id, the nodes that read it, in topological order; no node reads another twice."""
    found: dict[int, list[Node]] = {node.id: [] for node in graph.nodes}
    for node in graph.nodes:
        for source in node.inputs:
            found[source].append(node)
    return found


def infer(graph: Graph, signature: Signature) -> dict[int, Facts]:
    """Shape, weights, parameters and multiply-adds of every node; raises ops.ShapeError."""
    known: dict[int, Facts] = {}
    for node in graph.nodes:
        known[node.id] = facts(node.op, signature, *(known[source].shape for source in node.inputs))
    return known


def params(graph: Graph, signature: Signature) -> int:
    """Number of trainable parameters."""
    return sum(fact.num_params for fact in infer(graph, signature).values())


def macs(graph: Graph, signature: Signature) -> int:
    """Multiply-adds per image."""
    return sum(fact.macs for fact in infer(graph, signature).values())


def channel_runs(graph: Graph, shapes: dict[int, Shape]) -> dict[int, tuple[Run, ...]]:
    """For each node, its channels as runs of groups that must keep equal widths.

    A convolution opens a group, an addition unites its operands' groups, a concatenation puts runs side by side.
    A group is named by the lowest node id among its members; the image's is 0's, and never changes width.
    Raises GraphError where an addition's operands are not divided alike.
    """
    root: dict[int, int] = {}

    def find(group: int) -> int:
        while group in root:
            group = root[group]
        return group

    runs: dict[int, tuple[Run, ...]] = {}
    for node in graph.nodes:
        if not node.op.channelwise:
            runs[node.id] = ((node.id, shapes[node.id][0]),)
        elif len(node.inputs) == 1:
            runs[node.id] = runs[node.inputs[0]]
        elif isinstance(node.op, Concat):
            runs[node.id] = runs[node.inputs[0]] + runs[node.inputs[1]]
        else:
            first, second = (runs[source] for source in node.inputs)
            if [size for _, size in first] != [size for _, size in second]:
                raise GraphError(f"node {node.id}: an addition of channels divided differently")
            for (a, _), (b, _) in zip(first, second, strict=True):
                low, high = sorted((find(a), find(b)))
                if low != high:
                    root[high] = low
            runs[node.id] = first
    if not root:
        return runs
    final = {value: tuple([(find(group), size) for group, size in value]) for value in set(runs.values())}
    return {id_: final[value] for id_, value in runs.items()}


MAX_SIDE, MAX_PARAMS = 2**20, 2**34
"""More than that no device holds: a graph that asks for it was not made by this program."""


def validate(graph: Graph, signature: Signature) -> dict[int, Facts]:
    """Check everything a graph promises; return `infer`'s result.

    Raises GraphError: order, arity, ids, ties, a node nobody reads, first or last node, additions; ops.ShapeError:
    shapes.
    """
    if not graph.nodes or not isinstance(graph.nodes[0].op, Input) or not isinstance(graph.nodes[-1].op, Linear):
        raise GraphError("the first node must be the image and the last the classifier")
    seen: set[int] = set()
    read: set[int] = set()
    for node in graph.nodes:
        if node.id in seen or node.id >= graph.next_id or node.id < 0:
            raise GraphError(f"node {node.id}: the id is used twice, negative or not below next_id {graph.next_id}")
        if len(node.inputs) != node.op.arity:
            raise GraphError(f"node {node.id}: {node.op.name} takes {node.op.arity} inputs, got {len(node.inputs)}")
        if len(set(node.inputs)) != len(node.inputs):
            raise GraphError(f"node {node.id}: reads node {node.inputs[0]} twice")
        if missing := set(node.inputs) - seen:
            raise GraphError(f"node {node.id}: reads {sorted(missing)}, not defined before it")
        if node is not graph.nodes[0] and isinstance(node.op, Input):
            raise GraphError(f"node {node.id}: a second image")
        seen.add(node.id)
        read.update(node.inputs)
    if unread := seen - read - {graph.nodes[-1].id}:
        raise GraphError(f"nodes {sorted(unread)} are read by nobody")
    kinds: dict[int, set[str]] = {}
    for node in graph.nodes:
        if not 0 <= node.tie < graph.next_id:
            raise GraphError(f"node {node.id}: its tie {node.tie} is negative or not below next_id {graph.next_id}")
        kinds.setdefault(node.tie, set()).add(node.op.name)
    for tie, names in kinds.items():
        if len(names) > 1:
            raise GraphError(f"nodes of tie {tie} are of different operators: {', '.join(sorted(names))}")
    known = infer(graph, signature)
    for id_, fact in known.items():
        if max(fact.shape) > MAX_SIDE or fact.num_params > MAX_PARAMS:
            raise GraphError(
                f"node {id_}: shape {fact.shape}, {fact.num_params} parameters; "
                f"at most {MAX_SIDE} a side and {MAX_PARAMS} parameters a node are allowed"
            )
    channel_runs(graph, {id_: fact.shape for id_, fact in known.items()})
    return known


def digest(graph: Graph) -> str:
    """32 hex digits that two graphs share iff they are the same network, each node's inputs in the same order.

    Taken over the operators and then the inputs of the nodes, numbered as `from_output` leaves them: ids, ties and
    the order of storage are left out.
    """
    nodes = from_output(graph)
    number = {node.id: k for k, node in enumerate(nodes)}
    words = [node.op.text for node in nodes]
    words += [str(number[source]) for node in nodes for source in node.inputs]
    return hashlib.blake2b(";".join(words).encode(), digest_size=16).hexdigest()


def from_output(graph: Graph) -> Sequence[Node]:
    """The nodes as a depth-first walk from the output leaves them, each node's inputs first and in their order.

    Where every node's first input is the node stored before it (a main path with skips, as edits keep it), that is
    the order of storage: the walk goes down the first inputs to the image, and finds all others done on its way back.
    """
    nodes = graph.nodes
    if [node.id for node in nodes[:-1]] == [node.inputs[0] for node in nodes[1:]]:
        return nodes
    by_id = graph.by_id
    done: dict[int, Node] = {}
    stack = [nodes[-1].id]
    while stack:
        node = by_id[stack[-1]]
        waiting = next((source for source in node.inputs if source not in done), None)
        if waiting is None:
            done[node.id] = node
            stack.pop()
        else:
            stack.append(waiting)
    return tuple(done.values())


def to_json(graph: Graph) -> dict[str, Any]:
    """A plain structure: `{"next_id": 9, "nodes": [[id, op, inputs, tie], ...]}`."""
    nodes = [[node.id, op_to_json(node.op), list(node.inputs), node.tie] for node in graph.nodes]
    return {"next_id": graph.next_id, "nodes": nodes}


def from_json(data: dict[str, Any]) -> Graph:
    """The inverse of `to_json`; raises ValueError. Check the result with `validate`."""
    try:
        nodes = tuple(Node(id_, op_from_json(op), tuple(inputs), tie) for id_, op, inputs, tie in data["nodes"])
        next_id = data["next_id"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a graph as `to_json` writes it: {error!r}") from error
    if not all(type(k) is int for k in (next_id, *(k for n in nodes for k in (n.id, n.tie, *n.inputs)))):
        raise ValueError("not a graph as `to_json` writes it: ids, inputs, ties and next_id are whole numbers")
    return Graph(nodes, next_id)


def chain(ops: Iterable[Op]) -> Graph:
    """A graph in which each operator reads the one before it; every node its own tie."""
    nodes = tuple(Node(i, op, (i - 1,) if i else (), i) for i, op in enumerate(ops))
    return Graph(nodes, len(nodes))


def describe(graph: Graph) -> str:
    """One line for people: `conv3x3(16)-bn-relu pool ... linear`, in topological order."""
    short = {"batchnorm": "bn", "maxpool": "pool", "globalpool": "gap", "depthwise": "dw"}
    words = []
    for node in graph.nodes:
        name = short.get(node.op.name, node.op.name)
        if isinstance(node.op, (Conv, Depthwise)):
            name += f"{node.op.kernel}x{node.op.kernel}"
        if isinstance(node.op, Conv):
            name += f"({node.op.channels})"
        words.append(name)
    return " ".join(words)
