"""A search of 100,000 children without training, against a front that is known: seconds, distance, and flatness.

The error of a network is the least attainable with its parameters (0.9 at 300, halved by every fourfold) plus what its
architecture adds: nothing for six convolutions or more, of 3x3, with two skips. It is a multiple of 1/1000, rounded up,
as on 1,000 validation images. `distance` is the mean excess of the front over the least error, over sizes from 1,500 to
50,000 parameters. CPU time per child and the memory of the state are given for the first and the last tenth: the
algorithm keeps no history, its caller keeps the digests seen. Floor: 100,000 children in 120 s. JSON.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy

import argparse
import json
import time
from typing import Any

import numpy as np

from lemonade_hpc import config
from lemonade_hpc.search import evolution
from lemonade_hpc.search.evolution import Child, Outcome, State
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.ops import Add, Concat, Conv, Signature

SIZES = np.geomspace(1500, 50_000, 60)


def best_error(params: Any) -> Any:
    """The least error attainable with so many parameters."""
    return 0.9 * (np.asarray(params, dtype=float) / 300) ** -0.5


def handicap(graph: Graph) -> float:
    """What an architecture adds to it."""
    convs = [node.op for node in graph.nodes if isinstance(node.op, Conv)]
    skips = sum(isinstance(node.op, (Add, Concat)) for node in graph.nodes)
    shallow = max(0, 6 - len(convs)) / 6
    return 0.3 * shallow + 0.2 * sum(op.kernel == 5 for op in convs) / len(convs) + 0.1 * max(0, 2 - skips)


def error(child: Child) -> float:
    """What training would have told."""
    return float(np.ceil(1000 * (best_error(child.cheap[0]) + handicap(child.graph))) / 1000)


def distance(state: State) -> float:
    """Mean excess of the front over the least error attainable."""
    values = state.front.values
    return float(np.mean([values[values[:, 1] <= size, 0].min(initial=0.9) - best_error(size) for size in SIZES]))


def resident_mb() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="10,000 children")
    parser.add_argument("--mode", choices=("steady_state", "generational"), default="steady_state")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    children = 10_000 if given.small else 100_000
    settings = {
        "seed": given.seed,
        "data": {"name": "digits"},
        "objectives": [{"name": "val_error"}, {"name": "params", "max": 1e5}],
        "search": {"mode": given.mode, "proposals": 50, "accepted": 20, "children": children},
    }
    fixed = evolution.problem(config.from_dict(settings, "training_free"), Signature((1, 8, 8), 10), 0.9)
    state, seen = evolution.start(fixed), set[bytes]()
    tenths: list[dict[str, float]] = []
    began = last = time.process_time()
    wall = time.perf_counter()
    while not state.complete:
        state, new = evolution.ask(state, 20, lambda digest: bytes.fromhex(digest) in seen)
        seen.update(bytes.fromhex(child.digest) for child in new)
        for child in new:
            state = evolution.tell(state, Outcome(child.number, (error(child),)))
        if state.num_committed >= (len(tenths) + 1) * children / 10:
            now = time.process_time()
            members = len(state.members)
            cpu_ms = 1e3 * (now - last) / (children / 10)
            tenths.append(
                {"cpu_ms_per_child": round(cpu_ms, 3), "resident_mb": round(resident_mb(), 1), "front": members}
            )
            last = now
    print(
        json.dumps(
            {
                "benchmark": "training-free search",
                "children": state.num_committed,
                "cpu_s": round(time.process_time() - began, 1),
                "wall_s": round(time.perf_counter() - wall, 1),
                "distance": round(distance(state), 5),
                "hypervolume": round(evolution.hypervolume(fixed, state.front.values), 5),
                "mean_nodes": round(float(np.mean([len(c.graph.nodes) for c in state.members.values()])), 1),
                "first_tenth": tenths[0],
                "last_tenth": tenths[-1],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
