"""A change of a graph, as data, and carrying it out.

Decides: nothing. `morphisms.py` says what changes; this file makes the new graph of it and hands out new ids and ties.
What a change leaves alone is taken over, so that scoring a child costs what has changed and not what there is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lemonade_hpc.search.anatomy import Anatomy
from lemonade_hpc.search.graph import Graph, Node
from lemonade_hpc.search.ops import Facts, Op, facts


@dataclass(frozen=True)
class Change:
    """What an edit changes: operators, nodes put behind others, nodes dropped, nodes whose readers read another."""

    ops: Mapping[int, Op]
    added: Mapping[int, list[Node]]
    dropped: Collection[int]
    moved: Mapping[int, int]


def carry_out(anatomy: Anatomy, change: Change) -> Anatomy:
    """The changed graph; nodes that do not change are the same objects, and are not judged again."""
    changed = {*change.ops, *[reader.id for id_ in change.moved for reader in anatomy.readers[id_]]}
    moved, gone = change.moved, dict[int, int]()
    if change.dropped:
        moved = {id_: still_there(change, stand_in) for id_, stand_in in moved.items()}
        gone = {id_: stand_in for id_, stand_in in moved.items() if id_ in change.dropped}
    places = sorted([anatomy.position[id_] for id_ in {*changed, *change.added, *change.dropped}])
    nodes: list[Node] = []
    next_id, done = anatomy.graph.next_id, 0
    for at in places:
        node = anatomy.graph.nodes[at]
        nodes += anatomy.graph.nodes[done:at]
        done = at + 1
        if node.id in changed and node.id not in change.dropped:
            inputs = tuple([moved.get(source, source) for source in node.inputs])
            nodes.append(Node(node.id, change.ops.get(node.id, node.op), inputs, node.tie))
        elif node.id not in change.dropped:
            nodes.append(node)
        for new in change.added.get(node.id, ()):
            inputs = tuple([gone.get(source, source) for source in new.inputs])
            nodes.append(Node(new.id, new.op, inputs, new.tie) if gone else new)
            next_id += 1
    nodes += anatomy.graph.nodes[done:]
    known = _judged(anatomy, nodes, places[0], changed)
    for id_ in change.dropped:
        del known[id_]
    return Anatomy(Graph(tuple(nodes), next_id), anatomy.signature, known)


def _judged(anatomy: Anatomy, nodes: list[Node], first: int, changed: set[int]) -> dict[int, Facts]:
    """Facts of the nodes; only of new ones, changed ones, and readers of another shape than before asked again.

    No node before the `first` place is one of these. Facts of dropped nodes are left in.
    """
    known = dict(anatomy.facts)
    stale = set(changed)
    for node in nodes[first:]:
        old = known.get(node.id)
        if old is None or node.id in stale:
            known[node.id] = new = facts(node.op, anatomy.signature, *[known[source].shape for source in node.inputs])
            if old is not None and old.shape != new.shape:
                stale.update([reader.id for reader in anatomy.readers[node.id]])
    return known


def still_there(change: Change, id_: int) -> int:
    """The node itself, or where it was dropped (in another copy of the cell, say) what its readers read now."""
    while id_ in change.dropped:
        id_ = change.moved[id_]
    return id_


def behind(anatomy: Anatomy, chains: Iterable[tuple[Node, tuple[int, ...], tuple[Op, ...]]]) -> Change:
    """Behind each node a chain of new ones, the first with the given inputs; the node's readers read the last.

    The k-th new nodes of all chains share a tie: that of the first one's id.
    """
    first = id_ = anatomy.graph.next_id
    added: dict[int, list[Node]] = {}
    moved: dict[int, int] = {}
    for node, inputs, ops in chains:
        new = added[node.id] = []
        for k, op in enumerate(ops):
            new.append(Node(id_, op, inputs, first + k))
            inputs, id_ = (id_,), id_ + 1
        moved[node.id] = id_ - 1
    return Change({}, added, (), moved)
