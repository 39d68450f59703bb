"""C1: wall seconds per child of 5 epochs on digits: a warm worker against a fresh process per child.

The four initial networks and the 20 children of `children.json` (every tenth child of one digits search, kept so that
the list never changes). For each network in turn a fresh trainer process and the warm one train it, so that both see
the same noise. Floor 5x, target 10x on the list and 15x on the smallest. The guard: mean errors within 2 points. JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import conclude

from lemonade_hpc import config as configs
from lemonade_hpc.run import session
from lemonade_hpc.run.trainers import ProcessTrainer
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import spaces
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.ops import Signature

DIGITS = Signature((1, 8, 8), 10)
FLOOR, TARGET, TARGET_SMALLEST = 5.0, 10.0, 15.0
EPOCHS = 5
GUARD = 0.02


class Silent:
    """An observer that says nothing."""

    def update(self, history: Any, workers: dict[str, str]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def networks() -> list[Graph]:
    """The fixed list, smallest first."""
    stored = json.loads(Path(__file__).with_name("children.json").read_text())
    found = [*spaces.initial(DIGITS), *(graphs.from_json(item) for item in stored)]
    return sorted(found, key=lambda graph: graphs.params(graph, DIGITS))


def prepare(folder: Path) -> Path:
    """A run folder that trainers can be started on."""
    shipped = configs.to_dict(configs.load("digits"))
    changes = {
        "search": shipped["search"] | {"children": 0},
        "training": shipped["training"] | {"initial_epochs": 1},
        "cluster": {"backend": "inline"},
    }
    session.search(configs.from_dict(shipped | changes, "c1"), folder / "run", Silent())
    return folder / "run"


def train(trainer: ProcessTrainer, number: int, graph: Graph) -> float:
    """Send one child and wait for its outcome; its validation error."""
    task = {
        "child": number, "attempt": "c1", "digest": graphs.digest(graph), "graph": graphs.to_json(graph),
        "edits": [], "parent": None, "epochs": [0, EPOCHS],
    }  # fmt: skip
    trainer.send(task)
    while True:
        for message in trainer.poll():
            if "objectives" in message:
                return float(message["objectives"]["val_error"])
        assert trainer.died() is None, trainer.died()
        time.sleep(0.002)


def timed(trainer_of: Any, number: int, graph: Graph) -> tuple[float, float]:
    """Seconds and error of one child on a trainer that may have to be started first."""
    began = time.perf_counter()
    error = train(trainer_of(), number, graph)
    return time.perf_counter() - began, error


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="five networks of the list")
    arguments = parser.parse_args()
    chosen = networks()[:: 5 if arguments.small else 1]
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(Path(folder))
        log = Path(folder) / "trainer.log"
        warm = ProcessTrainer(run, 1, log)
        train(warm, 10**5, chosen[0])
        rows = []
        for number, graph in enumerate(chosen):
            started: list[ProcessTrainer] = []

            def start(started: list[ProcessTrainer] = started) -> ProcessTrainer:
                started.append(ProcessTrainer(run, 1, log))
                return started[0]

            fresh_s, fresh_error = timed(start, number, graph)
            started[0].kill()
            warm_s, warm_error = timed(lambda: warm, number, graph)
            row = {"params": graphs.params(graph, DIGITS), "fresh_s": fresh_s, "warm_s": warm_s}
            rows.append(row | {"fresh_error": fresh_error, "warm_error": warm_error})
        warm.kill()
    worse = statistics.mean(row["warm_error"] - row["fresh_error"] for row in rows)
    assert abs(worse) <= GUARD, f"warm and fresh workers differ by {worse:.3f} in error"
    ratios = [row["fresh_s"] / row["warm_s"] for row in rows]
    result = {
        "id": "C1",
        "networks": len(rows),
        "fresh_s": statistics.median(row["fresh_s"] for row in rows),
        "warm_s": statistics.median(row["warm_s"] for row in rows),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "warm_minus_fresh_error": worse,
        "ratio_smallest": ratios[0],
        "floor": FLOOR,
        "target": TARGET,
        "target_smallest": TARGET_SMALLEST,
        "rows": rows,
    }
    missed = [] if result["ratio"] >= FLOOR else ["the floor"]
    conclude(result, missed, small=arguments.small)


if __name__ == "__main__":
    main()
