"""The paper's six operators on graphs, and what each means for the weights.

Decides: where an edit is legal (`sites`), what graph it makes (`apply`), and how every weight of the child follows from
the parent's (`plan`). An edit is data: stored, printed in lineages, replayed. A plan is data too, of a closed set of
rules (`Resize`, `Fresh`, and batch statistics to `measure`); only `learn/transfer.py` opens weights.

Exact (network morphisms, the function is unchanged): insert, widen, add, concat. Approximate: remove, prune, separable.
Paper, section "Network operators". Concatenation and addition are the two forms of its operator 3, skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lemonade_hpc.search.graph import Graph, GraphError, Node, Run, channel_runs, infer, readers
from lemonade_hpc.search.ops import Add, BatchNorm, Concat, Conv, Depthwise, Facts, MaxPool, Op, ReLU, Shape, Signature

EXACT = frozenset({"insert", "widen", "add", "concat"})
KINDS = {
    "insert": ("insert",),
    "widen": ("widen",),
    "skip": ("add", "concat"),
    "remove": ("remove",),
    "prune": ("prune",),
    "separable": ("separable",),
}
"""The paper's six operators, and the kinds of edit that each may draw."""

KERNELS = (3, 5)
WIDEN_FACTOR = 2
PRUNE_DIVISORS = (2, 4)
MAX_REDRAWS = 50
MIN_CHANNELS = 4
"""Pruning leaves at least this many channels."""

NEW = -1
"""In an index: an entry that no entry of the parent stands for."""


class EditError(ValueError):
    """The edit is not legal on this graph: says which and why."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One application of an operator: its kind, the tie it is applied to, and kernel, factor, divisor or second tie."""

    kind: str
    site: int
    arg: int = 0


@dataclass(frozen=True)
class Anatomy:
    """A graph with all that edits ask about it, computed once: see `study`."""

    graph: Graph
    facts: Mapping[int, Facts]
    runs: Mapping[int, tuple[Run, ...]]
    by_id: Mapping[int, Node]
    readers: Mapping[int, list[Node]]
    ties: Mapping[int, list[int]]
    feeds_add: frozenset[int]
    """Nodes whose channels reach an addition unmixed: their division into runs must not change."""

    def shape(self, id_: int) -> Shape:
        """Output shape of a node, per image."""
        return self.facts[id_].shape


def study(graph: Graph, signature: Signature) -> Anatomy:
    """Everything that edits ask about a graph; raises GraphError or ops.ShapeError for an invalid one."""
    known = infer(graph, signature)
    ties: dict[int, list[int]] = {}
    for node in graph.nodes:
        ties.setdefault(node.tie, []).append(node.id)
    feeds: set[int] = set()
    for node in reversed(graph.nodes):
        if isinstance(node.op, Add) or (node.op.channelwise and node.id in feeds):
            feeds.update(node.inputs)
    runs = channel_runs(graph, {id_: fact.shape for id_, fact in known.items()})
    return Anatomy(graph, known, runs, graph.by_id, readers(graph), ties, frozenset(feeds))


# ---------------------------------------------------------------- where an edit is legal


def sites(anatomy: Anatomy, kind: str) -> list[Edit]:
    """Every legal edit of this kind, in a fixed order."""
    legal, args = _LEGAL[kind]
    return [
        Edit(kind, tie, arg)
        for tie, members in anatomy.ties.items()
        for arg in args(anatomy, tie)
        if all(legal(anatomy, id_, other) for id_, other in _pairs(anatomy, kind, members, arg))
    ]


def draw(anatomy: Anatomy, operators: Iterable[str], rng: np.random.Generator) -> Edit | None:
    """An edit: operator uniform, then its kind, then its site uniform among the legal ones.

    An operator without a legal site is drawn again, MAX_REDRAWS times at most; None if that never finds one.
    """
    names = list(operators)
    for _ in range(1 + MAX_REDRAWS):
        kinds = KINDS[names[rng.integers(len(names))]]
        found = [edits for edits in (sites(anatomy, kind) for kind in kinds) if edits]
        if found:
            chosen = found[rng.integers(len(found))]
            return chosen[rng.integers(len(chosen))]
    return None


def _pairs(anatomy: Anatomy, kind: str, members: list[int], arg: int) -> list[tuple[int, int]]:
    """Each member of the edited tie, with its partner in the same copy (skips) or the edit's number."""
    if kind not in KINDS["skip"]:
        return [(id_, arg) for id_ in members]
    others = anatomy.ties.get(arg, [])
    return list(zip(members, others, strict=True)) if len(members) == len(others) else [(members[0], members[0])]


def _after_relu(anatomy: Anatomy, id_: int, _: int) -> bool:
    return isinstance(anatomy.by_id[id_].op, ReLU)


def _free_conv(anatomy: Anatomy, id_: int, _: int) -> bool:
    """A convolution whose width is not bound to the image's channels."""
    image = anatomy.graph.nodes[0].id
    return isinstance(anatomy.by_id[id_].op, Conv) and anatomy.runs[id_][0][0] != anatomy.runs[image][0][0]


def _prunable(anatomy: Anatomy, id_: int, divisor: int) -> bool:
    return _free_conv(anatomy, id_, divisor) and _pruned(anatomy.shape(id_)[0], divisor) >= MIN_CHANNELS


def _pruned(width: int, divisor: int) -> int:
    """Channels left when 1/divisor of them goes, at least one."""
    return width - max(1, width // divisor)


def _full_conv(anatomy: Anatomy, id_: int, _: int) -> bool:
    op = anatomy.by_id[id_].op
    return isinstance(op, Conv) and op.kernel > 1


def _can_skip(anatomy: Anatomy, x: int, y: int) -> bool:
    """A skip from the earlier layer y to x: both of one size, not joined already."""
    if not isinstance(anatomy.by_id[x].op, ReLU) or not isinstance(anatomy.by_id[y].op, ReLU | MaxPool) or x == y:
        return False
    if anatomy.shape(x)[1:] != anatomy.shape(y)[1:] or not _precedes(anatomy, y, x):
        return False
    return not any(set(reader.inputs) >= {x, y} for reader in anatomy.readers[x])


def _precedes(anatomy: Anatomy, y: int, x: int) -> bool:
    order = {node.id: i for i, node in enumerate(anatomy.graph.nodes)}
    return order[y] < order[x]


def _can_add(anatomy: Anatomy, x: int, y: int) -> bool:
    return _can_skip(anatomy, x, y) and _sizes(anatomy, x) == _sizes(anatomy, y)


def _can_concat(anatomy: Anatomy, x: int, y: int) -> bool:
    return _can_skip(anatomy, x, y) and x not in anatomy.feeds_add


def _sizes(anatomy: Anatomy, id_: int) -> list[int]:
    return [size for _, size in anatomy.runs[id_]]


def _removable(anatomy: Anatomy, id_: int, _: int) -> bool:
    """A skip, or a block that is not its stage's last and whose readers can take its input instead."""
    node = anatomy.by_id[id_]
    if isinstance(node.op, Add | Concat):
        source = node.inputs[0]
    else:
        block = _block(anatomy, node)
        if not block:
            return False
        source = block[0].inputs[0]
        stage = [n for n in anatomy.graph.nodes if isinstance(n.op, ReLU) and anatomy.shape(n.id)[1:] == anatomy.shape(id_)[1:]]
        if len(stage) < 2:
            return False
    if any(source in reader.inputs for reader in anatomy.readers[id_] if reader.id != id_):
        return False
    return id_ not in anatomy.feeds_add or _sizes(anatomy, id_) == _sizes(anatomy, source)


def _block(anatomy: Anatomy, end: Node) -> list[Node]:
    """The nodes of the Conv-BN-ReLU or separable block that ends here, first to last; empty if it is none."""
    if not isinstance(end.op, ReLU):
        return []
    block = [end]
    for wanted in (BatchNorm, Conv, Depthwise):
        node = anatomy.by_id[block[0].inputs[0]]
        alone = len(anatomy.readers[node.id]) == 1
        if isinstance(node.op, wanted) and alone:
            block.insert(0, node)
        elif wanted is not Depthwise:
            return []
    return block


Legal = Callable[[Anatomy, int, int], bool]
Args = Callable[[Anatomy, int], Iterable[int]]


def _fixed(*values: int) -> Args:
    return lambda anatomy, tie: values


def _earlier(anatomy: Anatomy, tie: int) -> Iterable[int]:
    """Ties that may be the far end of a skip to this one."""
    if not isinstance(anatomy.by_id[anatomy.ties[tie][0]].op, ReLU):
        return ()
    return (t for t, ids in anatomy.ties.items() if isinstance(anatomy.by_id[ids[0]].op, ReLU | MaxPool))


_LEGAL: dict[str, tuple[Legal, Args]] = {
    "insert": (_after_relu, _fixed(*KERNELS)),
    "widen": (_free_conv, _fixed(WIDEN_FACTOR)),
    "add": (_can_add, _earlier),
    "concat": (_can_concat, _earlier),
    "remove": (_removable, _fixed(0)),
    "prune": (_prunable, _fixed(*PRUNE_DIVISORS)),
    "separable": (_full_conv, _fixed(0)),
}


# ---------------------------------------------------------------- what graph an edit makes


def apply(anatomy: Anatomy, edit: Edit) -> Graph:
    """The edited graph; raises EditError where the edit is not legal. Applied to every copy of the tie or to none."""
    members = anatomy.ties.get(edit.site, [])
    if edit.kind not in _LEGAL or not members:
        raise EditError(f"{edit}: no such operator or site; operators are {', '.join(_LEGAL)}")
    legal, _ = _LEGAL[edit.kind]
    change = _Change(anatomy.graph)
    for id_, arg in _pairs(anatomy, edit.kind, members, edit.arg):
        if not legal(anatomy, id_, arg):
            raise EditError(f"{edit}: not legal at node {id_}")
        _EDITS[edit.kind](anatomy, change, anatomy.by_id[id_], arg)
    return change.graph()


class _Change:
    """A change of a graph being collected: nodes to add, drop, re-point or give another operator."""

    def __init__(self, graph: Graph) -> None:
        self.before = graph
        self.next_id = graph.next_id
        self.added: dict[int, list[Node]] = {}
        self.dropped: set[int] = set()
        self.stand_in: dict[int, int] = {}
        self.ops: dict[int, Op] = {}
        self.ties: list[int] = []

    def add(self, after: int, copy: int, *steps: tuple[Op, tuple[int, ...]]) -> int:
        """Put nodes behind `after`, the k-th reading the k-th of `steps`' inputs and its forerunner; the last id."""
        nodes = self.added.setdefault(after, [])
        for k, (op, inputs) in enumerate(steps):
            if copy == 0:
                self.ties.append(self.next_id)
            sources = inputs if inputs else (self.next_id - 1,)
            nodes.append(Node(self.next_id, op, sources, self.ties[k]))
            self.next_id += 1
        return self.next_id - 1

    def graph(self) -> Graph:
        """The changed graph."""
        nodes: list[Node] = []
        for node in self.before.nodes:
            if node.id not in self.dropped:
                inputs = tuple(self.stand_in.get(source, source) for source in node.inputs)
                op = self.ops.get(node.id, node.op)
                same = inputs == node.inputs and op is node.op
                nodes.append(node if same else Node(node.id, op, inputs, node.tie))
            nodes.extend(self.added.get(node.id, ()))
        return Graph(tuple(nodes), self.next_id)


def _copy(anatomy: Anatomy, node: Node) -> int:
    """Which copy of its tie a node is."""
    return anatomy.ties[node.tie].index(node.id)


def _insert(anatomy: Anatomy, change: _Change, node: Node, kernel: int) -> None:
    conv = Conv(anatomy.shape(node.id)[0], kernel)
    last = change.add(node.id, _copy(anatomy, node), (conv, (node.id,)), (BatchNorm(), ()), (ReLU(), ()))
    change.stand_in[node.id] = last


def _resize(width: Callable[[int, int], int]) -> Callable[[Anatomy, _Change, Node, int], None]:
    def edit(anatomy: Anatomy, change: _Change, node: Node, arg: int) -> None:
        for writer in writers(anatomy, anatomy.runs[node.id][0][0]):
            change.ops[writer.id] = Conv(width(writer.op.channels, arg), writer.op.kernel)  # type: ignore[attr-defined]

    return edit


def _skip(op: Op) -> Callable[[Anatomy, _Change, Node, int], None]:
    def edit(anatomy: Anatomy, change: _Change, node: Node, other: int) -> None:
        change.stand_in[node.id] = change.add(node.id, _copy(anatomy, node), (op, (node.id, other)))

    return edit


def _remove(anatomy: Anatomy, change: _Change, node: Node, _: int) -> None:
    block = _block(anatomy, node) or [node]
    change.dropped.update(n.id for n in block)
    change.stand_in[node.id] = block[0].inputs[0]


def _separable(anatomy: Anatomy, change: _Change, node: Node, _: int) -> None:
    op = node.op
    assert isinstance(op, Conv)
    steps = ((Depthwise(op.kernel), node.inputs), (Conv(op.channels, 1), ()))
    change.stand_in[node.id] = change.add(node.id, _copy(anatomy, node), *steps)
    change.dropped.add(node.id)


_EDITS: dict[str, Callable[[Anatomy, _Change, Node, int], None]] = {
    "insert": _insert,
    "widen": _resize(lambda width, factor: width * factor),
    "add": _skip(Add()),
    "concat": _skip(Concat()),
    "remove": _remove,
    "prune": _resize(_pruned),
    "separable": _separable,
}


def writers(anatomy: Anatomy, group: int) -> list[Node]:
    """The convolutions that write a channel group, in topological order."""
    return [n for n in anatomy.graph.nodes if isinstance(n.op, Conv) and anatomy.runs[n.id][0][0] == group]


# ---------------------------------------------------------------- what it means for the weights


@dataclass(frozen=True)
class Resize:
    """Entries of one axis of a weight: `index[k]` is the parent's entry, NEW a fresh one started by `fill`."""

    axis: int
    index: tuple[int, ...]
    fill: str


@dataclass(frozen=True)
class Fresh:
    """A weight without a counterpart in the parent, started by `fill`: zero, one, fan_in or identity."""

    fill: str
    shape: Shape


@dataclass(frozen=True)
class Select:
    """A choice that needs weights: the `count` filters of a group to keep, by norm over all its writers' weights."""

    group: int
    writers: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Plan:
    """How a child's weights follow from its parent's, for one edit. Weights not named are plain copies."""

    exact: bool
    rules: Mapping[str, tuple[Resize | Fresh, ...]]
    dropped: frozenset[str]
    measure: tuple[int, ...]
    """Inserted BatchNorms whose statistics are those of their input."""
    affected: frozenset[int]
    """Nodes that an approximate edit has disturbed: distillation trains them first (paper, section 3)."""


def selects(anatomy: Anatomy, edit: Edit) -> tuple[Select, ...]:
    """The choices of filters that this edit needs: one per pruned channel group, none for other edits."""
    if edit.kind != "prune":
        return ()
    chosen: dict[int, Select] = {}
    for id_ in anatomy.ties[edit.site]:
        group, width = anatomy.runs[id_][0]
        names = tuple(f"{node.id}.weight" for node in writers(anatomy, group))
        chosen[group] = Select(group, names, _pruned(width, edit.arg))
    return tuple(chosen.values())


def plan(before: Anatomy, edit: Edit, after: Anatomy, kept: Mapping[int, tuple[int, ...]] | None = None) -> Plan:
    """The plan of one edit; `kept` answers `selects`: for each group, the filters that stay, ascending."""
    exact = edit.kind in EXACT
    rules: dict[str, tuple[Resize | Fresh, ...]] = {}
    out: dict[int, tuple[int, ...]] = {}
    dirty: set[int] = set()
    for node in after.graph.nodes:
        old = before.by_id.get(node.id)
        facts = after.facts[node.id]
        if old is None:
            for param in facts.params:
                fill = "identity" if edit.kind == "insert" and isinstance(node.op, Conv) else param.fill
                rules[f"{node.id}.{param.name}"] = (Fresh(fill, param.shape),)
            dirty.add(node.id)
            continue
        read = [_read(before, after, out, p, q) for p, q in zip(node.inputs, old.inputs, strict=True)]
        out[node.id] = _own(before, after, node, read, kept or {})
        if node.inputs != old.inputs or any(p in dirty and after.by_id[p].op.channelwise for p in node.inputs):
            dirty.add(node.id)
        index = {"o": out[node.id], "c": out[node.id], "i": read[0] if read else ()}
        for param in facts.params:
            steps = tuple(
                Resize(axis, index[role], "zero" if exact and role == "i" else param.fill)
                for axis, role in enumerate(param.roles)
                if role != "." and not _is_identity(index[role], _old_width(before, old, role))
            )
            if steps:
                rules[f"{node.id}.{param.name}"] = steps
                dirty.add(node.id)
    gone = (node for node in before.graph.nodes if node.id not in after.by_id)
    dropped = frozenset(f"{node.id}.{param.name}" for node in gone for param in before.facts[node.id].params)
    new_bn = (n.id for n in after.graph.nodes if n.id not in before.by_id and isinstance(n.op, BatchNorm))
    affected = () if exact else (id_ for id_ in dirty if after.facts[id_].params)
    return Plan(exact, rules, dropped, tuple(new_bn), frozenset(affected))


def _read(before: Anatomy, after: Anatomy, out: Mapping[int, tuple[int, ...]], now: int, then: int) -> tuple[int, ...]:
    """For each channel a node reads now, the channel it read there before; a stand-in keeps the overlap."""
    if now == then:
        return out[now]
    return _overlap(before.shape(then)[0], after.shape(now)[0])


def _own(
    before: Anatomy, after: Anatomy, node: Node, read: list[tuple[int, ...]], kept: Mapping[int, tuple[int, ...]]
) -> tuple[int, ...]:
    """For each channel a node puts out now, the channel it put out before."""
    if isinstance(node.op, Concat):
        offset = before.shape(before.by_id[node.id].inputs[0])[0]
        return read[0] + tuple(k + offset if k != NEW else NEW for k in read[1])
    if node.op.channelwise:
        return read[0]
    group = before.runs[node.id][0][0]
    if group in kept:
        return kept[group]
    return _overlap(before.shape(node.id)[0], after.shape(node.id)[0])


def _overlap(then: int, now: int) -> tuple[int, ...]:
    return tuple(k if k < then else NEW for k in range(now))


def _is_identity(index: tuple[int, ...], width: int) -> bool:
    return index == tuple(range(width))


def _old_width(before: Anatomy, node: Node, role: str) -> int:
    return before.shape(node.inputs[0] if role == "i" else node.id)[0]


# ---------------------------------------------------------------- JSON


def to_json(edits: Iterable[Edit]) -> list[list[Any]]:
    """`[["widen", 7, 2], ...]`."""
    return [[edit.kind, edit.site, edit.arg] for edit in edits]


def from_json(data: Iterable[Iterable[Any]]) -> tuple[Edit, ...]:
    """The inverse of `to_json`; legality is checked by `apply`."""
    return tuple(Edit(*item) for item in data)


def replay(graph: Graph, edits: Iterable[Edit], signature: Signature) -> Graph:
    """The graph after all edits; raises EditError, GraphError or ops.ShapeError."""
    for edit in edits:
        graph = apply(study(graph, signature), edit)
    return graph


__all__ = [
    "EXACT", "KINDS", "NEW", "Anatomy", "Edit", "EditError", "Fresh", "GraphError", "Plan", "Resize", "Select",
    "apply", "draw", "from_json", "plan", "replay", "selects", "sites", "study", "to_json", "writers",
]  # fmt: skip
