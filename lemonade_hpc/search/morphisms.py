"""The paper's six operators on graphs.

Decides: where an edit is legal (`sites`), which is drawn (`draw`) and what graph it makes (`edited`). An edit is data:
stored, printed in lineages, replayed. What it means for the weights is in `plans.py`. Edits keep what `graph.validate`
promises, in every copy of a tie or in none.

Exact (network morphisms, the function is unchanged): insert, widen, add, concat. Approximate: remove, prune, separable.
Paper, section "Network operators". Concatenation and addition are the two forms of its operator 3, skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from lemonade_hpc.search.anatomy import EXACT, Anatomy, Edit, study
from lemonade_hpc.search.changes import Change, behind, carry_out, still_there
from lemonade_hpc.search.graph import Graph, GraphError, Node
from lemonade_hpc.search.ops import Add, BatchNorm, Concat, Conv, Depthwise, MaxPool, Op, ReLU, Shape, Signature
from lemonade_hpc.search.plans import NEW, Fresh, Plan, Resize, Select, plan, pruned, selects

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
MIN_CHANNELS = 4
"""Pruning leaves at least this many channels."""

CONV, BATCHNORM, RELU = lru_cache(maxsize=1000)(Conv), BatchNorm(), ReLU()
"""What edits insert: equal operators are one object, whose text, hash and facts are worked out once."""

Candidates = list[tuple[int, int]]
"""Ties and arguments of edits that may be legal."""

T = TypeVar("T")


class EditError(ValueError):
    """The edit is not legal on this graph: says which and where."""


# ---------------------------------------------------------------- which edits there are


def sites(anatomy: Anatomy, kind: str) -> list[Edit]:
    """Every legal edit of this kind, in a fixed order."""
    edits = (Edit(kind, site, arg) for site, arg in _RULES[kind].candidates(anatomy))
    return [edit for edit in edits if legal(anatomy, edit)]


def draw(anatomy: Anatomy, operators: Iterable[str], rng: np.random.Generator) -> Edit | None:
    """An edit, or None: operator uniform among those with a legal site, then its kind likewise, then its site."""
    for operator in _in_random_order(operators, rng):
        for kind in _in_random_order(KINDS[operator], rng):
            for site, arg in _in_random_order(_RULES[kind].candidates(anatomy), rng):
                edit = Edit(kind, site, arg)
                if legal(anatomy, edit):
                    return edit
    return None


def _in_random_order(items: Iterable[T], rng: np.random.Generator) -> Iterator[T]:
    """Shuffled as far as asked for: the first to pass a test is uniform among all that pass it."""
    left = list(items)
    while left:
        k = int(rng.random() * len(left))
        left[k], left[-1] = left[-1], left[k]
        yield left.pop()


def legal(anatomy: Anatomy, edit: Edit) -> bool:
    """Whether an edit may be applied."""
    rule, members = _RULES.get(edit.kind), anatomy.ties.get(edit.site)
    return rule is not None and members is not None and rule.legal(anatomy, members, edit.arg)


def edited(anatomy: Anatomy, edit: Edit) -> Anatomy:
    """The edited graph, studied at the cost of what changes; every copy of the tie is edited. Raises EditError."""
    if not legal(anatomy, edit):
        where = [node.id for node in anatomy.ties.get(edit.site, [])]
        raise EditError(f"{edit} is not legal here (nodes {where}); kinds of edit are {', '.join(_RULES)}")
    return _edited(anatomy, edit)


def mutate(anatomy: Anatomy, operators: Iterable[str], rng: np.random.Generator) -> tuple[Edit, Anatomy] | None:
    """A drawn edit and what it makes of the graph, or None: `draw` and `edited` in one."""
    edit = draw(anatomy, operators, rng)
    return None if edit is None else (edit, _edited(anatomy, edit))


def _edited(anatomy: Anatomy, edit: Edit) -> Anatomy:
    """`edited` for an edit that is known to be legal."""
    return carry_out(anatomy, _RULES[edit.kind].change(anatomy, anatomy.ties[edit.site], edit.arg))


# ---------------------------------------------------------------- insert


def _at(kind: type[Op], *args: int) -> Callable[[Anatomy], Candidates]:
    """Candidates: every tie of one kind of operator, with each argument."""
    return lambda anatomy: [(tie, arg) for tie in dict.fromkeys(n.tie for n in anatomy.of(kind)) for arg in args]


def _may_insert(anatomy: Anatomy, members: list[Node], kernel: int) -> bool:
    """Behind a ReLU of feature maps; its channels become one run, which an addition must not notice."""
    for node in members:
        if not isinstance(node.op, ReLU) or len(anatomy.shape(node.id)) != 3:
            return False
        if anatomy.mixes(node.id) and node.id in anatomy.feeds_add:
            return False
    return kernel in KERNELS


def _insert(anatomy: Anatomy, members: list[Node], kernel: int) -> Change:
    def block(node: Node) -> tuple[Op, ...]:
        return CONV(anatomy.shape(node.id)[0], kernel), BATCHNORM, RELU

    return behind(anatomy, ((node, (node.id,), block(node)) for node in members))


# ---------------------------------------------------------------- widen and prune


def _may_widen(anatomy: Anatomy, members: list[Node], factor: int) -> bool:
    return factor == WIDEN_FACTOR and _free(anatomy, members)


def _may_prune(anatomy: Anatomy, members: list[Node], divisor: int) -> bool:
    if divisor not in PRUNE_DIVISORS or not _free(anatomy, members):
        return False
    return all(pruned(anatomy.shape(node.id)[0], divisor) >= MIN_CHANNELS for node in members)


def _free(anatomy: Anatomy, members: list[Node]) -> bool:
    """Convolutions whose channels may change width: not the image's, and in every copy of the cell or in none."""
    if not all(isinstance(node.op, Conv) for node in members):
        return False
    groups = {anatomy.runs[node.id][0][0] for node in members}
    copies = (copy for group in groups for node in anatomy.writers[group] for copy in anatomy.ties[node.tie])
    image = anatomy.runs[anatomy.graph.nodes[0].id][0][0]
    return image not in groups and all(anatomy.runs[copy.id][0][0] in groups for copy in copies)


def _resize(width: Callable[[int, int], int]) -> Callable[[Anatomy, list[Node], int], Change]:
    """Change the width of all convolutions that write the members' channel groups."""

    def change(anatomy: Anatomy, members: list[Node], arg: int) -> Change:
        ops: dict[int, Op] = {}
        for node in members:
            for writer in anatomy.writers[anatomy.runs[node.id][0][0]]:
                assert isinstance(writer.op, Conv)
                ops[writer.id] = CONV(width(writer.op.channels, arg), writer.op.kernel)
        return Change(ops, {}, (), {})

    return change


# ---------------------------------------------------------------- skip: add and concat


def _layers(same: slice) -> Callable[[Anatomy], Candidates]:
    """Candidates: a ReLU and an earlier ReLU or pooling, equal in this part of their shapes."""

    def candidates(anatomy: Anatomy) -> Candidates:
        found: list[tuple[int, int]] = []
        earlier: dict[Shape, list[int]] = {}
        for node in anatomy.graph.nodes:
            if isinstance(node.op, (ReLU, MaxPool)):
                others = earlier.setdefault(anatomy.facts[node.id].shape[same], [])
                if isinstance(node.op, ReLU):
                    found += [(node.tie, other) for other in others]
                others.append(node.tie)
        return list(dict.fromkeys(found))

    return candidates


def _copies(anatomy: Anatomy, members: list[Node], arg: int) -> list[tuple[Node, Node]]:
    """Each member with the node of the other tie in the same copy of the cell; empty where there is none."""
    others = anatomy.ties.get(arg, [])
    return list(zip(members, others, strict=True)) if len(members) == len(others) else []


def _may_skip(anatomy: Anatomy, x: Node, y: Node) -> bool:
    """From a layer to an earlier one of the same height and width, not joined already."""
    if not isinstance(x.op, ReLU) or not isinstance(y.op, (ReLU, MaxPool)):
        return False
    if anatomy.position[y.id] >= anatomy.position[x.id] or anatomy.shape(x.id)[1:] != anatomy.shape(y.id)[1:]:
        return False
    return all([y.id not in reader.inputs for reader in anatomy.readers[x.id]])


def _may_add(anatomy: Anatomy, members: list[Node], arg: int) -> bool:
    pairs = _copies(anatomy, members, arg)
    for x, y in pairs:
        if anatomy.shape(x.id) != anatomy.shape(y.id) or not _may_skip(anatomy, x, y):
            return False
        if anatomy.sizes(x.id) != anatomy.sizes(y.id):
            return False
    return bool(pairs)


def _may_concat(anatomy: Anatomy, members: list[Node], arg: int) -> bool:
    pairs = _copies(anatomy, members, arg)
    for x, y in pairs:
        if x.id in anatomy.feeds_add or not _may_skip(anatomy, x, y):
            return False
    return bool(pairs)


def _skip(op: Op) -> Callable[[Anatomy, list[Node], int], Change]:
    """Join each member with its partner; the member's readers read the result."""

    def change(anatomy: Anatomy, members: list[Node], arg: int) -> Change:
        return behind(anatomy, ((x, (x.id, y.id), (op,)) for x, y in _copies(anatomy, members, arg)))

    return change


# ---------------------------------------------------------------- remove


def _ends(anatomy: Anatomy) -> Candidates:
    """Candidates: skips, and ReLUs that may end a block."""
    return [site for kind in (ReLU, Add, Concat) for site in _at(kind, 0)(anatomy)]


def _block(anatomy: Anatomy, end: Node) -> list[Node]:
    """A skip, or the nodes of the Conv-BN-ReLU or separable block that ends here, last to first; empty for others."""
    if isinstance(end.op, (Add, Concat)):
        return [end]
    if not isinstance(end.op, ReLU):
        return []
    block = [end]
    for wanted in (BatchNorm, Conv, Depthwise):
        node = anatomy.by_id[block[-1].inputs[0]]
        if isinstance(node.op, wanted) and len(anatomy.readers[node.id]) == 1:
            block.append(node)
        elif wanted is not Depthwise:
            return []
    return block


def _may_remove(anatomy: Anatomy, members: list[Node], arg: int) -> bool:
    """Blocks or skips whose readers can read their input instead; every stage keeps a block."""
    sizes = [anatomy.shape(node.id)[1:] for node in members if isinstance(node.op, ReLU)]
    if arg or any([anatomy.num_blocks[size] <= sizes.count(size) for size in sizes]):
        return False
    blocks = [_block(anatomy, node) for node in members]
    if not all(blocks):
        return False
    change = _without(blocks)
    for node in members:
        stand_in = still_there(change, node.id)
        if node.id in anatomy.feeds_add and anatomy.sizes(node.id) != anatomy.sizes(stand_in):
            return False
        for reader in anatomy.readers[node.id]:
            if len({still_there(change, source) for source in reader.inputs}) < len(reader.inputs):
                return False
        for other in node.inputs[1:]:
            if all([reader.id in change.dropped for reader in anatomy.readers[other]]):
                return False
    return True


def _remove(anatomy: Anatomy, members: list[Node], _: int) -> Change:
    return _without([_block(anatomy, node) for node in members])


def _without(blocks: list[list[Node]]) -> Change:
    moved = {block[0].id: block[-1].inputs[0] for block in blocks}
    return Change({}, {}, {node.id for block in blocks for node in block}, moved)


# ---------------------------------------------------------------- separable


def _may_separate(anatomy: Anatomy, members: list[Node], arg: int) -> bool:
    return not arg and all(isinstance(node.op, Conv) and node.op.kernel > 1 for node in members)


def _separate(anatomy: Anatomy, members: list[Node], _: int) -> Change:
    def pair(op: Op) -> tuple[Op, ...]:
        assert isinstance(op, Conv)
        return Depthwise(op.kernel), CONV(op.channels, 1)

    made = behind(anatomy, ((node, node.inputs, pair(node.op)) for node in members))
    return replace(made, dropped={node.id for node in members})


@dataclass(frozen=True)
class _Rule:
    """One kind of edit: where it may be legal, whether it is, what it changes."""

    candidates: Callable[[Anatomy], Candidates]
    legal: Callable[[Anatomy, list[Node], int], bool]
    change: Callable[[Anatomy, list[Node], int], Change]


_RULES = {
    "insert": _Rule(_at(ReLU, *KERNELS), _may_insert, _insert),
    "widen": _Rule(_at(Conv, WIDEN_FACTOR), _may_widen, _resize(lambda width, factor: width * factor)),
    "add": _Rule(_layers(slice(None)), _may_add, _skip(Add())),
    "concat": _Rule(_layers(slice(1, None)), _may_concat, _skip(Concat())),
    "remove": _Rule(_ends, _may_remove, _remove),
    "prune": _Rule(_at(Conv, *PRUNE_DIVISORS), _may_prune, _resize(pruned)),
    "separable": _Rule(_at(Conv, 0), _may_separate, _separate),
}


# ---------------------------------------------------------------- JSON


def to_json(edits: Iterable[Edit]) -> list[list[Any]]:
    """`[["widen", 7, 2], ...]`."""
    return [[edit.kind, edit.site, edit.arg] for edit in edits]


def from_json(data: Iterable[Iterable[Any]]) -> tuple[Edit, ...]:
    """The inverse of `to_json`; legality is checked by `edited`. Raises ValueError for what is no list of edits."""
    return tuple(map(_edit, data if isinstance(data, (list, tuple)) else [data]))


def _edit(item: Any) -> Edit:
    if not isinstance(item, (list, tuple)) or len(item) != 3:
        raise ValueError(f"got {item!r}; an edit is a list of kind, site and argument")
    kind, site, arg = item
    if not isinstance(kind, str) or kind not in _RULES or type(site) is not int or type(arg) is not int:
        raise ValueError(f"got {item!r}; expected a kind of {', '.join(_RULES)}, and site and argument as integers")
    return Edit(kind, site, arg)


def replay(graph: Graph, edits: Iterable[Edit], signature: Signature) -> Graph:
    """The graph after all edits; raises EditError, GraphError or ops.ShapeError."""
    anatomy = study(graph, signature)
    for edit in edits:
        anatomy = edited(anatomy, edit)
    return anatomy.graph


__all__ = [
    "EXACT", "KINDS", "NEW", "Anatomy", "Edit", "EditError", "Fresh", "GraphError", "Plan", "Resize", "Select",
    "draw", "edited", "from_json", "legal", "mutate", "plan", "replay", "selects", "sites", "study", "to_json",
]  # fmt: skip
