"""A child's weights from its parent's: carrying out the plans of `search/morphisms.py`.

Decides: how a fresh weight starts, which filters a pruning keeps, what statistics an inserted BatchNorm gets. The
only place that turns one network's weights into another's. A weight that a plan forgets is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from lemonade_hpc.learn.network import Weights, build
from lemonade_hpc.search import morphisms
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.morphisms import NEW, Anatomy, Edit, Fresh, Plan, Resize, Select
from lemonade_hpc.search.ops import BN_EPS, Shape, Signature


class TransferError(RuntimeError):
    """A plan does not account for a weight: a defect of ours, never of the user."""


@dataclass(frozen=True)
class Morphed:
    """A child before its training: graph, weights, whether every edit was exact, and what happened on the way."""

    graph: Graph
    weights: Weights
    exact: bool
    affected: frozenset[int]
    """Nodes that approximate edits have disturbed."""
    kept: tuple[tuple[int, tuple[int, ...]], ...]
    """For each pruned channel group, the filters that stayed."""


def fresh(fill: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Make a new weight: zero, one, identity (a convolution that copies its input), or fan_in.

    fan_in is a normal distribution of variance 2 / fan-in (He et al., 2015). Always drawn in float64 on the CPU, so
    that the numbers depend on nothing but the generator.
    """
    if fill == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if fill == "one":
        return torch.ones(shape, dtype=torch.float64)
    if fill == "identity":
        weight = torch.zeros(shape, dtype=torch.float64)
        torch.nn.init.dirac_(weight)
        return weight
    if fill == "fan_in":
        deviation = sqrt(2 / prod(shape[1:]))
        return torch.randn(shape, dtype=torch.float64, generator=generator) * deviation
    raise TransferError(f"unknown fill {fill!r}")


def initial_weights(graph: Graph, signature: Signature, generator: torch.Generator) -> Weights:
    """Float32 weights of a network without a parent."""
    anatomy = morphisms.study(graph, signature)
    return {
        f"{node.id}.{param.name}": fresh(param.fill, param.shape, generator).float()
        for node in graph.nodes
        for param in anatomy.facts[node.id].params
    }


def transfer(weights: Weights, plan: Plan, after: Anatomy, generator: torch.Generator) -> Weights:
    """Make the child's weights by one plan, in the parent's dtype and device; raises TransferError.

    Inserted BatchNorms get mean 0 and variance 1 and the scale that makes them the identity; see `measure`.
    """
    like = next(iter(weights.values()))
    child: Weights = {}
    for node in after.graph.nodes:
        for param in after.facts[node.id].params:
            name = f"{node.id}.{param.name}"
            value = weights.get(name)
            for rule in plan.rules.get(name, ()):
                if isinstance(rule, Fresh):
                    value = fresh(rule.fill, rule.shape, generator).to(like)
                else:
                    value = _resize(name, value, rule, generator)
            if value is None or tuple(value.shape) != param.shape:
                given = None if value is None else tuple(value.shape)
                raise TransferError(f"weight {name}: the plan gives {given}, the network needs {param.shape}")
            child[name] = value.clone()
    if forgotten := weights.keys() - child.keys() - plan.dropped:
        raise TransferError(f"weights {sorted(forgotten)} of the parent are neither used nor dropped by the plan")
    if plan.exact:
        for id_ in plan.measure:
            child[f"{id_}.weight"].fill_(sqrt(1 + BN_EPS))
    return child


def _resize(name: str, value: Tensor | None, rule: Resize, generator: torch.Generator) -> Tensor:
    """Reorder, shorten or lengthen one axis; new entries start as a fresh weight of the whole new shape would."""
    if value is None:
        raise TransferError(f"weight {name}: to be resized, but the parent has none")
    index = torch.tensor(rule.index, device=value.device)
    old = index != NEW
    result = value.index_select(rule.axis, index.clamp(min=0))
    if not bool(old.all()):
        new = fresh(rule.fill, tuple(result.shape), generator).to(value)
        shape = [-1 if axis == rule.axis else 1 for axis in range(value.dim())]
        result = torch.where(old.reshape(shape), result, new)
    return result


def resolve(
    weights: Weights, selects: Sequence[Select], prune_by: str, generator: torch.Generator
) -> dict[int, tuple[int, ...]]:
    """For each pruned group, the filters that stay, ascending: largest L1 norm, or any where `prune_by` is random.

    Norms are summed in float64 over all convolutions that write the group; of equal ones the lowest index stays.
    """
    kept = {}
    for select in selects:
        each = [weights[name].cpu().double().abs().flatten(1).sum(dim=1) for name in select.writers]
        norms = torch.stack(each).sum(dim=0)
        if prune_by == "random":
            norms = torch.rand(len(norms), generator=generator)
        order = torch.argsort(norms, descending=True, stable=True)[: select.count]
        kept[select.group] = tuple(sorted(order.tolist()))
    return kept


def measure(weights: Weights, plan: Plan, after: Anatomy, signature: Signature, images_BCHW: Tensor) -> None:
    """Give inserted BatchNorms, in place, the statistics of their input on these images: still the identity.

    weight = sqrt(var + eps), bias = mean: the paper sets scale and offset from batch statistics, so that the network
    stays what it was in training mode too.
    """
    network = build(after.graph, signature, weights)
    with torch.no_grad():
        found = network.inputs_of(images_BCHW.to(next(iter(weights.values())).dtype), plan.measure)
    for id_, x_BCHW in found.items():
        mean = x_BCHW.mean(dim=(0, 2, 3))
        var = x_BCHW.var(dim=(0, 2, 3), correction=0)
        values = {"running_mean": mean, "running_var": var, "weight": (var + BN_EPS).sqrt(), "bias": mean}
        for name, value in values.items():
            weights[f"{id_}.{name}"].copy_(value)


def morph(
    graph: Graph,
    weights: Weights,
    edits: Sequence[Edit],
    signature: Signature,
    generator: torch.Generator,
    *,
    images_BCHW: Tensor | None = None,
    prune_by: str = "l1",
) -> Morphed:
    """All edits, one after another, on graph and weights.

    `images_BCHW`: normalised images that inserted BatchNorms are measured on; None leaves them at mean 0, variance 1.
    Raises EditError for an illegal edit, TransferError for a plan that forgets a weight.
    """
    before = morphisms.study(graph, signature)
    exact, affected, chosen = True, set[int](), list[tuple[int, tuple[int, ...]]]()
    for edit in edits:
        after = morphisms.edited(before, edit)
        kept: Mapping[int, tuple[int, ...]] = resolve(weights, morphisms.selects(before, edit), prune_by, generator)
        plan = morphisms.plan(before, edit, after, kept)
        weights = transfer(weights, plan, after, generator)
        if edit.kind == "insert" and images_BCHW is not None:
            measure(weights, plan, after, signature, images_BCHW)
        exact = exact and plan.exact
        affected |= plan.affected
        chosen += kept.items()
        before = after
    alive = affected & before.by_id.keys()
    return Morphed(before.graph, weights, exact, frozenset(alive), tuple(chosen))
