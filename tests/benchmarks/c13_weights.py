"""C13: handing about 4 MB of weights from parent to child: safetensors against torch.save and torch.load.

A real network of a million parameters, in files that the page cache holds. Every round runs each way once, in turn, so
that all see the same noise. `load` and `save` compare the formats alone; `hand-over` is what the trainer does: read,
verify the sha256, parse. Floor: load 3 times faster; target: below 2 ms. The guard: every way gives back the same
weights, bit for bit. JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import conclude
from safetensors.torch import load, load_file, save_file

from lemonade_hpc.learn import transfer
from lemonade_hpc.learn.network import Weights
from lemonade_hpc.search import morphisms, spaces
from lemonade_hpc.search.morphisms import Edit
from lemonade_hpc.search.ops import Signature

FLOOR, TARGET_MS = 3.0, 2.0
CIFAR = Signature((3, 32, 32), 10)
EDITS = (Edit("insert", 3, 3), Edit("insert", 11, 3))


def network_weights() -> Weights:
    """Weights of the largest initial network with two blocks inserted: 1.0 M parameters."""
    graph = morphisms.replay(spaces.plain([64, 128, 256], False, CIFAR), EDITS, CIFAR)
    return transfer.initial_weights(graph, CIFAR, torch.Generator().manual_seed(0))


def read_verified(path: Path, sha256: str) -> Weights:
    """What `learn.child` does with a parent's file."""
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256
    return load(content)


def milliseconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="the same: it takes seconds")
    parser.add_argument("--rounds", type=int, default=51)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.set_num_threads(1)
    weights = network_weights()
    with tempfile.TemporaryDirectory() as folder:
        torchs, ours = Path(folder) / "weights.pt", Path(folder) / "weights.safetensors"
        torch.save(weights, torchs)
        save_file(weights, ours)
        sha256 = hashlib.sha256(ours.read_bytes()).hexdigest()
        ways: dict[str, Callable[[], object]] = {
            "torch.load": lambda: torch.load(torchs, weights_only=True),
            "load": lambda: load_file(ours),
            "hand-over": lambda: read_verified(ours, sha256),
            "torch.save": lambda: torch.save(weights, torchs),
            "save": lambda: save_file(weights, ours),
        }
        for name in ("torch.load", "load", "hand-over"):
            given = ways[name]()
            assert isinstance(given, dict) and given.keys() == weights.keys()
            assert all(torch.equal(given[key], value) for key, value in weights.items())
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(milliseconds(way))
        size = ours.stat().st_size
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = sorted(a / b for a, b in zip(times["torch.load"], times["load"], strict=True))
    report = {
        "id": "C13",
        "bytes": size,
        "tensors": len(weights),
        "rounds": rounds,
        "median_ms": {name: round(value, 3) for name, value in medians.items()},
        "load_ratio": round(medians["torch.load"] / medians["load"], 2),
        "load_ratio_quartiles": [round(ratios[rounds // 4], 2), round(ratios[3 * rounds // 4], 2)],
        "hand_over_ratio": round(medians["torch.load"] / medians["hand-over"], 2),
        "save_ratio": round(medians["torch.save"] / medians["save"], 2),
        "floor": FLOOR,
        "target_ms": TARGET_MS,
        "target_met": medians["load"] < TARGET_MS,
    }
    missed = [] if report["load_ratio"] >= FLOOR else ["the floor"]
    conclude(report, missed, small=arguments.small)


if __name__ == "__main__":
    main()
