"""What measuring an inserted BatchNorm's statistics is worth in the first epochs of a child (lemonade.md, section 3).

Trains small parents, inserts a block behind each of their ReLUs, and trains every child twice from the same
seed: with the new BatchNorm's statistics measured, and with mean 0 and variance 1. Both children are the same function
in evaluation mode. Prints one JSON document: validation error before training and after each epoch, its median and
quartiles over children, and the paired differences measured - unit (negative: measuring helps).
`python tests/benchmarks/measured_bn.py [--data mnist5k] [--lr 0.01] [--epochs 3] [--seeds 3]`: about 10 minutes on one
core, on digits 1.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import torch

from lemonade_hpc import config, data
from lemonade_hpc.learn import training, transfer
from lemonade_hpc.learn.network import Weights, build
from lemonade_hpc.learn.training import Images
from lemonade_hpc.search import morphisms, spaces
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.morphisms import Edit
from lemonade_hpc.search.ops import Signature

PARENTS = (((12, 24, 48), False), ((16, 16, 32), False), ((24, 48, 48), True), ((32, 32, 64), True))
PARENT_EPOCHS = 15
PARENT_LR = 0.1
NUM_MEASURED = 256
ARMS = ("measured", "unit")


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--lr", type=float, default=0.01, help="of the children; the paper's is 0.01")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = data.load(config.Data(name=given.data))
    signature = Signature(found.shape, found.num_classes)
    train, validation = (training.place(found, part, torch.device("cpu")) for part in (found.train, found.validation))
    errors: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    moved: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number, (widths, separable) in enumerate(PARENTS):
        graph = spaces.plain(list(widths), separable, signature)
        weights = train_parent(graph, signature, train, number)
        sites = [edit for edit in morphisms.sites(morphisms.study(graph, signature), "insert") if edit.arg == 3]
        for seed in range(given.seeds):
            for edit in sites:
                for arm in ARMS:
                    child = Child(graph, weights, edit, signature, train, validation, arm)
                    moved[arm].append(child.moved)
                    errors[arm].append(child.curve(given.lr, given.epochs, (number, edit.site, seed)))
                print(f"{widths} at {edit.site}, seed {seed}", *(errors[arm][-1] for arm in ARMS), file=sys.stderr)
    print(json.dumps({"data": given.data, "lr": given.lr, **summary(errors, moved)}, indent=1))


def settings(train: Images) -> config.Training:
    """Crops shifted by a fourteenth of the side, no other augmentation: digits tolerate little."""
    return config.Training(pad=train.images.shape[2] // 14, flip=False, cutout=0, mixup=0.0, weight_decay=5e-4)


def train_parent(graph: Graph, signature: Signature, train: Images, seed: int) -> Weights:
    """Weights of a parent after a short training."""
    network = build(graph, signature, transfer.initial_weights(graph, signature, torch.Generator().manual_seed(seed)))
    network.to(memory_format=torch.channels_last)
    training.fit(network, train, settings(train), epochs=PARENT_EPOCHS, lr=PARENT_LR, stream=(seed,))
    return network.weights()


class Child:
    """A child by one insertion; `moved`: how far its first training batch's logits are from the parent's."""

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        edit: Edit,
        signature: Signature,
        train: Images,
        validation: Images,
        arm: str,
    ) -> None:
        batch = train.first(NUM_MEASURED) if arm == "measured" else None
        generator = torch.Generator().manual_seed(0)
        morphed = transfer.morph(graph, weights, [edit], signature, generator, images_BCHW=batch)
        self._network = build(morphed.graph, signature, morphed.weights).to(memory_format=torch.channels_last)
        self._train, self._validation = train, validation
        with torch.no_grad():
            x = train.first(64, skip=NUM_MEASURED)
            parent = build(graph, signature, weights).train()(x)
            child = build(morphed.graph, signature, morphed.weights).train()(x)
        self.moved = float((child - parent).abs().mean() / parent.std())

    def curve(self, lr: float, epochs: int, stream: tuple[int, ...]) -> list[float]:
        """Validation error before training and after each epoch."""
        errors = [training.error(self._network, self._validation)]

        def note(_: int) -> None:
            errors.append(training.error(self._network, self._validation))
            self._network.train()

        training.fit(
            self._network, self._train, settings(self._train), epochs=epochs, lr=lr, stream=stream, progress=note
        )
        return errors


def summary(errors: dict[str, list[list[float]]], moved: dict[str, list[float]]) -> dict[str, object]:
    """Percentages by epoch."""
    curves = {arm: 100 * np.array(values) for arm, values in errors.items()}
    difference = curves["measured"] - curves["unit"]
    count = len(difference)
    return {
        "children": count,
        "error_percent": {
            arm: [
                dict(zip(("q1", "median", "q3"), np.percentile(c, (25, 50, 75)).round(2).tolist(), strict=True))
                for c in curve.T
            ]
            for arm, curve in curves.items()
        },
        "measured_minus_unit": [
            {
                "median": round(float(np.median(column)), 3),
                "mean": round(float(column.mean()), 3),
                "standard_error": round(float(column.std(ddof=1) / count**0.5), 3),
                "better": int((column < 0).sum()),
                "worse": int((column > 0).sum()),
            }
            for column in difference.T
        ],
        "training_mode_logits_moved": {arm: round(float(np.median(values)), 4) for arm, values in moved.items()},
    }


if __name__ == "__main__":
    main()
