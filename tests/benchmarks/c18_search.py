"""C18: hypervolume gained over the initial networks at equal epochs: with inheritance, without, and random search.

Digits, the shipped search on the inline backend with half its children, several seeds. Every arm starts from the
initial networks, trained alike, and spends the same number of epochs on children (distillation counted). Floor: on
every seed, inheritance gains at least 1.3 times what the same search gains from fresh weights. Prints JSON.

Random search makes a network by 1 to 12 random edits of a random initial one and trains it from fresh weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import conclude

from lemonade_hpc import config as configs
from lemonade_hpc import data as data_sets
from lemonade_hpc.learn import child as trainer
from lemonade_hpc.run import session, status
from lemonade_hpc.run.population import finished
from lemonade_hpc.search import evolution, morphisms, objectives, pareto, spaces
from lemonade_hpc.search import graph as graphs

FLOOR = 1.3
MAX_RANDOM_EDITS = 12


class Silent:
    """An observer that says nothing."""

    def update(self, history: Any, workers: dict[str, str]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def settings(seed: int, children: int, inheritance: bool) -> configs.Config:
    """The shipped digits search, one worker in this process."""
    shipped = configs.to_dict(configs.load("digits"))
    changes = {
        "seed": seed,
        "search": shipped["search"] | {"children": children, "inheritance": inheritance},
        "cluster": {"backend": "inline", "workers": 1},
    }
    return configs.from_dict(shipped | changes, "c18")


def evolve(seed: int, children: int, inheritance: bool) -> dict[str, Any]:
    """One arm by the search itself; gain, epochs spent on children, and the best error."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = settings(seed, children, inheritance)
        history = session.search(config, run, Silent())
        training = history.state.problem.config.training
        epochs = 0
        for row in finished(run, history):
            receipt = row["outcome"].get("receipt")
            if row["parent"] is not None:
                distilled = receipt is not None and not receipt["exact"]
                epochs += training.epochs + (training.distill_epochs if distilled else 0)
        volume = status.hypervolumes(history)
        best = min(member["objectives"]["val_error"] for member in status.front(history))
        return {"gain": volume["front"] - volume["initial"], "epochs": epochs, "best_error": best}


def random_search(seed: int, epochs: int) -> dict[str, Any]:
    """The third arm: random networks within the limits, from fresh weights."""
    config = settings(seed, 0, False)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        history = session.search(config, run, Silent())
        fixed = history.state.problem
        front, before = history.state.front, status.hypervolumes(history)["front"]
        lab = trainer.open_lab(run, run / "epochs/000001/owner.json")
        rng = np.random.default_rng([seed, 99])
        count = ceil(epochs / fixed.config.training.epochs)
        for number in range(10, 10 + count):
            graph = random_graph(fixed, rng)
            task = {
                "child": number, "attempt": "a1", "digest": graphs.digest(graph), "graph": graphs.to_json(graph),
                "edits": [], "parent": None, "epochs": [0, fixed.config.training.epochs],
            }  # fmt: skip
            outcome = trainer.train_child(lab, task)
            if "objectives" in outcome:
                cheap = objectives.measure(fixed.cheap, graphs.infer(graph, fixed.signature))
                values = evolution.vector(fixed, cheap, (outcome["objectives"]["val_error"],))
                front = pareto.insert(front, number, values)
        gain = evolution.hypervolume(fixed, front.values) - before
        return {
            "gain": gain,
            "epochs": count * fixed.config.training.epochs,
            "best_error": float(front.values[:, 0].min()),
        }


def random_graph(fixed: evolution.Problem, rng: np.random.Generator) -> graphs.Graph:
    """A network within the limits, by random edits of a random initial one."""
    initial = spaces.initial(fixed.signature)
    while True:
        graph = initial[rng.integers(len(initial))]
        for _ in range(rng.integers(1, MAX_RANDOM_EDITS + 1)):
            anatomy = morphisms.study(graph, fixed.signature)
            edit = morphisms.draw(anatomy, fixed.config.search.operators, rng)
            graph = graph if edit is None else morphisms.edited(anatomy, edit).graph
        size = graphs.params(graph, fixed.signature)
        limits = next(o for o in fixed.config.cheap if o.name == "params")
        if (limits.min or 0) <= size <= (limits.max or np.inf):
            return graph


def compare(seed: int, children: int) -> dict[str, Any]:
    """All three arms at equal epochs, one after another."""
    began = time.monotonic()
    arms = {"inheritance": evolve(seed, children, True)}
    epochs = arms["inheritance"]["epochs"]
    per_child = configs.resolve(
        settings(seed, 0, True), data_sets.load(configs.Data(name="digits")).shape
    ).training.epochs
    arms["from_scratch"] = evolve(seed, ceil(epochs / per_child), False)
    arms["random_search"] = random_search(seed, epochs)
    ratio = arms["inheritance"]["gain"] / arms["from_scratch"]["gain"]
    return {"seed": seed, "arms": arms, "ratio": ratio, "wall_s": round(time.monotonic() - began, 1)}


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--children", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="one seed, 20 children")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, children = (1, 20) if arguments.small else (arguments.seeds, arguments.children)
    runs = [compare(seed, children) for seed in range(seeds)]
    gains = {
        arm: {
            "median": statistics.median(run["arms"][arm]["gain"] for run in runs),
            "range": [f([run["arms"][arm]["gain"] for run in runs]) for f in (min, max)],
        }
        for arm in runs[0]["arms"]
    }
    ratios = [run["ratio"] for run in runs]
    result = {
        "id": "C18",
        "children": children,
        "gain": gains,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "floor": FLOOR,
        "runs": runs,
    }
    conclude(result, [] if min(ratios) >= FLOOR else ["the floor"], small=arguments.small)


if __name__ == "__main__":
    main()
