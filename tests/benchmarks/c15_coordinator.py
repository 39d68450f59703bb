"""C15: CPU time of the whole coordinator for 50 children and 1,000 proposals, and whether it grows with history.

A real coordinator on a real run folder asks one child at a time from 20 proposals; its workers answer at once with the
errors of `training_free.py`'s problem, and their time is taken off. That benchmark measures the algorithm alone, up to
10^5 children. Floor: less than 300 ms,
target 100 ms; flat: the last size costs at most 1.5 times the first. Prints JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from common import conclude
from training_free import error

from lemonade_hpc.run.log import Message
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search.ops import Signature

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import run_doubles as doubles

WINDOW = 50
FLOOR_MS, TARGET_MS, FLAT = 300.0, 100.0, 1.5


class Timed(doubles.FakeBackend):
    """Workers that answer at once, and know how much CPU time that took."""

    spent = 0.0

    def step(self) -> None:
        """Let the workers work."""
        began = time.process_time()
        super().step()
        self.spent += time.process_time() - began


def outcome(task: Message, run: Path, told: Callable[[Message, Path], Message] = doubles.outcome) -> Message:
    """What a trainer reports, with an error that follows size and architecture."""
    graph = graphs.from_json(task["graph"])
    size = graphs.params(graph, Signature((1, 8, 8), 10))
    return told(task, run) | {"objectives": {"val_error": error(graph, size)}}


def measure(sizes: list[int], windows: int) -> dict[int, dict[str, float]]:
    """At each size of history, CPU milliseconds per 50 children: the median of some windows, and their range."""
    search = {"mode": "steady_state", "children": sizes[-1] + WINDOW * (windows + 1), "proposals": 20, "accepted": 10}
    settings = doubles.config(search=search, storage={"seal_every": 1000})
    doubles.PROGRESS = False
    found: dict[int, dict[str, float]] = {}
    with doubles.folder() as run, pytest.MonkeyPatch.context() as patch:
        doubles.install(patch)
        patch.setattr(doubles, "outcome", outcome)
        backend = Timed(run)
        made = doubles.start(run, settings, backend)
        for size in sizes:
            while made.history.state.num_committed < size:
                made._turn()
            times = []
            for _ in range(windows):
                until = made.history.state.num_committed + WINDOW
                began, before = time.process_time(), backend.spent
                while made.history.state.num_committed < until:
                    made._turn()
                times.append(1000 * (time.process_time() - began - (backend.spent - before)))
            found[size] = {"median_ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times)}
        made.close()
    return found


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000], help="children before each measurement")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="200 and 600 children")
    given = parser.parse_args()
    sizes = [200, 600] if given.small else given.sizes
    found = measure(sizes, given.windows)
    growth = found[sizes[-1]]["median_ms"] / found[sizes[0]]["median_ms"]
    worst = max(entry["median_ms"] for entry in found.values())
    result = {
        "id": "C15",
        "sizes": found,
        "growth": growth,
        "floor_ms": FLOOR_MS,
        "target_ms": TARGET_MS,
        "target_met": worst < TARGET_MS,
    }
    missed = [name for name, met in {"the floor": worst < FLOOR_MS, "flat": growth <= FLAT}.items() if not met]
    conclude(result, missed, small=given.small)


if __name__ == "__main__":
    main()
