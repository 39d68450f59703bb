"""A search of 100,000 children without training, against a front that is known: seconds, distance, and flatness.

The error of a network is the least attainable with its parameters (0.9 at 300, halved by every fourfold) plus what its
architecture adds: nothing for six convolutions or more, of 3x3, with two skips. It is a multiple of 1/1000, rounded up,
as on 1,000 validation images. `distance` is the mean excess of the front over the least error, over sizes from 1,500 to
50,000 parameters. The first and the last tenth tell whether cost is flat: CPU time per child, memory of the process
(the algorithm keeps no history; the digests seen, kept by its caller, are given apart), and `fifty_children_ms`, C15:
CPU time of 50 asks of one child, 20 proposals each, and their outcomes. Floors: 100,000 children in 120 s of CPU, a
distance of at most 0.002, the last tenth at most 1.25 times the first. JSON.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy

import argparse
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
from common import conclude

from lemonade_hpc import config
from lemonade_hpc.search import evolution
from lemonade_hpc.search.evolution import Outcome, State
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.ops import Add, Concat, Conv, Signature

SIZES = np.geomspace(1500, 50_000, 60)
MAX_S, MAX_DISTANCE, FLAT = 120.0, 0.002, 1.25


def best_error(params: Any) -> Any:
    """The least error attainable with so many parameters."""
    return 0.9 * (np.asarray(params, dtype=float) / 300) ** -0.5


def handicap(graph: Graph) -> float:
    """What an architecture adds to it."""
    convs = [node.op for node in graph.nodes if isinstance(node.op, Conv)]
    skips = sum(isinstance(node.op, (Add, Concat)) for node in graph.nodes)
    shallow = max(0, 6 - len(convs)) / 6
    return 0.3 * shallow + 0.2 * sum(op.kernel == 5 for op in convs) / len(convs) + 0.1 * max(0, 2 - skips)


def error(graph: Graph, params: float) -> float:
    """What training would have told."""
    return float(np.ceil(1000 * (best_error(params) + handicap(graph))) / 1000)


def distance(state: State) -> float:
    """Mean excess of the front over the least error attainable."""
    values = state.front.values
    return float(np.mean([values[values[:, 1] <= size, 0].min(initial=0.9) - best_error(size) for size in SIZES]))


def resident_mb() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def fifty_children_ms(state: State, max_edits: int) -> float:
    """C15: the median of five times 50 asks of one child, 1,000 proposals together, and 50 outcomes; `state` stays."""
    search = state.problem.config.search.model_copy(
        update={"mode": "steady_state", "proposals": 20, "accepted": 1, "children": 10**9, "max_edits": max_edits}
    )
    fixed = replace(state.problem, config=state.problem.config.model_copy(update={"search": search}))
    state, seen, times = replace(state, problem=fixed), set[str](), list[float]()
    for _ in range(5):
        began = time.process_time()
        for _ in range(50):
            state, new = evolution.ask(state, 1, seen.__contains__)
            for child in new:
                seen.add(child.digest)
                state = evolution.tell(state, Outcome(child.number, (error(child.graph, child.cheap[0]),)))
        times.append(1e3 * (time.process_time() - began))
    return round(statistics.median(times), 1)


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
    total, last = 0.0, time.process_time()
    while not state.complete:
        state, new = evolution.ask(state, 20, lambda digest: bytes.fromhex(digest) in seen)
        seen.update(bytes.fromhex(child.digest) for child in new)
        for child in new:
            state = evolution.tell(state, Outcome(child.number, (error(child.graph, child.cheap[0]),)))
        if state.num_committed >= (len(tenths) + 1) * children / 10:
            used = time.process_time() - last
            tenths.append(
                {
                    "cpu_ms_per_child": round(1e3 * used / (children / 10), 3),
                    "resident_mb": round(resident_mb(), 1),
                    "digests_mb": round((sys.getsizeof(seen) + sum(map(sys.getsizeof, seen))) / 2**20, 1),
                    "front": len(state.members),
                    "fifty_children_ms": fifty_children_ms(state, 3),
                    "fifty_children_1.5_edits_ms": fifty_children_ms(state, 2),
                }
            )
            total, last = total + used, time.process_time()
    first, end = tenths[0], tenths[-1]
    result = {
        "benchmark": "training-free search",
        "children": state.num_committed,
        "cpu_s": round(total, 1),
        "distance": round(distance(state), 5),
        "hypervolume": round(evolution.hypervolume(fixed, state.front.values), 5),
        "mean_nodes": round(float(np.mean([len(c.graph.nodes) for c in state.members.values()])), 1),
        "first_tenth": first,
        "last_tenth": end,
    }
    floors = {
        "children in time": total < MAX_S,
        "distance": distance(state) <= MAX_DISTANCE,
        "flat in time": end["cpu_ms_per_child"] <= FLAT * first["cpu_ms_per_child"],
        "flat in memory": end["resident_mb"] - end["digests_mb"] <= FLAT * (first["resident_mb"] - first["digests_mb"]),
    }
    conclude(result, [name for name, met in floors.items() if not met], small=given.small)


if __name__ == "__main__":
    main()
