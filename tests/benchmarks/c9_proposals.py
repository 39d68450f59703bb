"""C9: proposals per second (edit, objectives, digest) for graphs of 9, 18 and 144 nodes, against the meta device.

The baseline is what one would write with torch alone: build the child's module on the meta device, run it once for its
shapes, count its parameters. Parameters are not initialised and the forward pass runs outside the device context: the
fastest way known to us. The candidate makes the child from an edit and scores it, given the studied parent; `drawn`
draws the edit too. Floor 100 times faster, target 200. The guard: both count the same parameters. JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from common import arguments, compared, interleaved, report
from torch import nn

from lemonade_hpc.learn.network import Network
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import morphisms, objectives
from lemonade_hpc.search.graph import Graph, chain
from lemonade_hpc.search.morphisms import Anatomy, Edit
from lemonade_hpc.search.ops import BatchNorm, Conv, GlobalPool, Input, Linear, Op, ReLU, Signature

FLOOR = 100.0
SIGNATURE = Signature((1, 8, 8), 10)
BLOCKS = {9: 2, 18: 5, 144: 47}
"""Nodes of a plain network, and its blocks."""


def plain(blocks: int) -> Graph:
    """Image, blocks of 16 channels, mean, classifier."""
    body: list[Op] = [op for _ in range(blocks) for op in (Conv(16, 3), BatchNorm(), ReLU())]
    return chain([Input(), *body, GlobalPool(), Linear()])


@contextmanager
def uninitialised() -> Iterator[None]:
    """Modules are built without drawing their weights."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
    kept = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = lambda self: None
    try:
        yield
    finally:
        for kind, method in zip(kinds, kept, strict=True):
            kind.reset_parameters = method


def by_torch(graph: Graph) -> int:
    """Parameters of a network, its shapes checked, on the meta device."""
    with torch.device("meta"), uninitialised():
        network = Network(graph, SIGNATURE).eval()
        image = torch.empty(1, *SIGNATURE.image)
    with torch.no_grad():
        assert network(image).shape == (1, SIGNATURE.num_classes)
    return sum(value.numel() for value in network.parameters())


def scored(anatomy: Anatomy) -> tuple[float, float]:
    """Objectives and digest of a child, as `evolution.ask` takes them; parameters and multiply-adds."""
    graphs.digest(anatomy.graph)
    params, macs = objectives.measure(("params", "macs"), anatomy.facts)
    return params, macs


def edited(parent: Anatomy, edit: Edit) -> tuple[float, float]:
    """One proposal whose edit is given."""
    return scored(morphisms.edited(parent, edit))


def drawn(parent: Anatomy, rng: np.random.Generator) -> tuple[float, float]:
    """One proposal."""
    made = morphisms.mutate(parent, morphisms.KINDS, rng)
    assert made is not None
    return scored(made[1])


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__)
    torch.set_num_threads(1)
    results, guard = [], {}
    for nodes, blocks in BLOCKS.items():
        parent = morphisms.study(plain(blocks), SIGNATURE)
        assert len(parent.graph.nodes) == nodes
        rng = np.random.default_rng(nodes)
        edits = [edit for _ in range(40) if (edit := morphisms.draw(parent, morphisms.KINDS, rng))]
        children = [morphisms.edited(parent, edit).graph for edit in edits[: 3 if given.small else 10]]
        guard[f"{nodes} nodes: equal parameters"] = all(
            by_torch(child) == edited(parent, edit)[0] for child, edit in zip(children, edits, strict=False)
        )
        times = interleaved(
            {
                "meta device": (lambda children=children: [by_torch(child) for child in children], len(children)),
                "edited": (lambda p=parent, es=edits: [edited(p, edit) for edit in es * 10], 10 * len(edits)),
                "drawn": (lambda p=parent, r=rng: [drawn(p, r) for _ in range(400)], 400),
            },
            given.rounds,
        )
        results += [{"nodes": nodes, **compared(times, "meta device", side, FLOOR)} for side in ("edited", "drawn")]
    report("C9", given, guard, results)


if __name__ == "__main__":
    main()
