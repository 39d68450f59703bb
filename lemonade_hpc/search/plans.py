"""What an edit means for the weights.

Decides: how every weight of the child follows from the parent's (`plan`). A plan is data, of a closed set of rules
(`Resize`, `Fresh`, and batch statistics to measure); a choice that needs weights is asked for (`selects`) and
answered by `learn/transfer.py`, which alone opens them. Paper, section "Network operators".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lemonade_hpc.search.anatomy import EXACT, Anatomy, Edit
from lemonade_hpc.search.graph import Node
from lemonade_hpc.search.ops import BatchNorm, Concat, Conv, Shape

NEW = -1
"""In an index: an entry that no entry of the parent stands for."""


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
    for node in anatomy.ties[edit.site]:
        group, width = anatomy.runs[node.id][0]
        names = tuple(f"{writer.id}.weight" for writer in anatomy.writers[group])
        chosen[group] = Select(group, names, pruned(width, edit.arg))
    return tuple(chosen.values())


def pruned(width: int, divisor: int) -> int:
    """Channels left when 1/divisor of them goes, at least one."""
    return width - max(1, width // divisor)


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
