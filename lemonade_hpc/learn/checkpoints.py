"""Checkpoints of a child in training, from which another attempt goes on to the same bits.

Decides: what of a training is kept, in which form, when, how many of them, and which one is gone on from. A checkpoint
is a safetensors file, JSON in its metadata, that carries its order and the start of its SHA-256 in its name. It is
believed only if both fit and its work is the work at hand: whatever else lies in the folder is passed over. Knows
nothing of how a child is trained (`child.py`, `training.py`).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lemonade_hpc import files
from lemonade_hpc.learn import training
from lemonade_hpc.learn.network import Network, Weights
from lemonade_hpc.learn.training import Moment

FORMAT = 1
"""Changes whenever an older checkpoint could not be gone on from to the same bits."""
KEPT = 2
"""Checkpoints of an attempt: should the newest be damaged, the one before is not."""
KEY = "checkpoint"
NAME = re.compile(r"checkpoint-([0-9]{6,})-([0-9a-f]{16})\.safetensors")
DISTIL, TRAIN = 0, 1
"""The phases of a child's training, in order."""
WEIGHT, MOMENTUM, TOTAL = "weight ", "momentum ", "total"
"""How tensors are called in the file: the first two are followed by a parameter's name."""


@dataclass(frozen=True)
class Work:
    """What a child's training is, and how much of it there is: the same in every attempt.

    `key`: all that the child's numbers depend on, as one text. `affected`: the nodes to distil, none where there is
    nothing to. `epochs`: of distillation, and of training. `receipt`: what the morphism did, where there was one.
    """

    key: str
    affected: frozenset[int]
    epochs: tuple[int, int]
    num_batches: int
    receipt: dict[str, Any] | None

    def batches(self, phase: int, moment: Moment) -> int:
        """How many batches are done, over both phases."""
        return (phase * self.epochs[DISTIL] + moment.epoch) * self.num_batches + moment.batch

    def done(self, phase: int, moment: Moment) -> float:
        """The share of the work that is done, from 0 to 1."""
        return self.batches(phase, moment) / max(1, sum(self.epochs) * self.num_batches)


@dataclass(frozen=True)
class Checkpoint:
    """Where to go on. `moment` has no generator where its epoch begins anew; tensors are on the CPU."""

    work: Work
    phase: int
    moment: Moment
    weights: Weights
    momenta: Weights
    wall_s: float

    def resumed(self, network: Network, only: frozenset[int] | None) -> Moment:
        """The moment for `fit` of this network, its momenta laid out like the parameters that they belong to."""
        momenta = [
            torch.empty_like(parameter.detach()).copy_(self.momenta[name]) if name in self.momenta else None
            for name, parameter in training.trained(network, only).items()
        ]
        device, total = next(network.parameters()).device, self.moment.total
        total = None if total is None else total.to(device)
        return Moment(self.moment.epoch, self.moment.batch, momenta, total, self.moment.rng)


@dataclass(frozen=True)
class Policy:
    """When checkpoints are taken: after so many seconds, and after every so many epochs; 0: not so."""

    every_s: float
    every_epochs: int


class Keeper:
    """Takes the checkpoints of one attempt at a child. Changes: knows when it took the last one.

    `due` is asked between any two batches, and reads no tensor. `wanted` is set by whoever wants one at once. `report`
    is told of each one, once it is durable.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        work: Work,
        *,
        report: Callable[[dict[str, float]], None] | None = None,
        wanted: threading.Event | None = None,
        before_s: float = 0.0,
    ) -> None:
        self._folder, self._policy, self._work = folder, policy, work
        self._report, self._wanted = report, wanted or threading.Event()
        self._last = self._started = time.monotonic()
        self._before_s = before_s

    def watch(self, phase: int, network: Network, only: frozenset[int] | None) -> Callable[[Moment], None]:
        """What `fit` is to call after every batch of a phase, in which `only` these nodes are trained."""

        def after(moment: Moment) -> None:
            if self._due(moment):
                self._take(phase, moment, network, only)

        return after

    def _due(self, moment: Moment) -> bool:
        every_s, every_epochs = self._policy.every_s, self._policy.every_epochs
        return (
            self._wanted.is_set()
            or (every_s > 0 and time.monotonic() - self._last >= every_s)
            or (every_epochs > 0 and moment.batch == 0 and moment.epoch % every_epochs == 0)
        )

    def _take(self, phase: int, moment: Moment, network: Network, only: frozenset[int] | None) -> None:
        """Write a checkpoint and remove those that it makes superfluous. Raises OSError."""
        self._wanted.clear()
        wall_s = self._before_s + time.monotonic() - self._started
        content = encode(self._work, phase, moment, network, only, wall_s)
        files.make_folder(self._folder)
        mine = sorted(_named(self._folder), key=_number)
        number = 1 + (_number(mine[-1]) if mine else 0)
        files.write(self._folder / f"checkpoint-{number:06d}-{files.sha256(content)[:16]}.safetensors", content)
        for path in mine[: len(mine) + 1 - KEPT]:
            files.remove(path)
        self._last = time.monotonic()  # what writing takes is not counted: there is always training in between
        if self._report is not None:
            epochs = self._work.batches(phase, moment) / self._work.num_batches
            self._report({"done": self._work.done(phase, moment), "epochs": round(epochs, 4)})


def encode(
    work: Work, phase: int, moment: Moment, network: Network, only: frozenset[int] | None, wall_s: float
) -> bytes:
    """The bytes of a checkpoint. The end of distillation is the beginning of training, which needs no momenta."""
    if phase == DISTIL and moment.epoch == work.epochs[DISTIL]:
        phase, moment = TRAIN, Moment()
    begun = moment.rng is not None
    about = {
        "key": work.key,
        "affected": sorted(work.affected),
        "epochs": work.epochs,
        "num_batches": work.num_batches,
        "receipt": work.receipt,
        "phase": phase,
        "epoch": moment.epoch,
        "batch": moment.batch,
        "rng": moment.rng.bit_generator.state if moment.rng is not None else None,
        "wall_s": round(wall_s, 3),
    }
    tensors = {WEIGHT + name: value for name, value in network.state_dict().items()}
    names = training.trained(network, only)
    tensors |= {MOMENTUM + n: m for n, m in zip(names, moment.momenta, strict=False) if m is not None}
    if begun and moment.total is not None:
        tensors[TOTAL] = moment.total
    # Always one key: safetensors writes several in any order.
    return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {KEY: files.dumps(about)})


def decode(content: bytes) -> Checkpoint:
    """Read a checkpoint. Raises SafetensorError, ValueError, KeyError or TypeError for anything else."""
    length = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
    tensors = load(content)
    rng = None
    if about["rng"] is not None:
        rng = np.random.default_rng()
        rng.bit_generator.state = about["rng"]
    first, second = about["epochs"]
    work = Work(about["key"], frozenset(about["affected"]), (first, second), about["num_batches"], about["receipt"])
    weights, momenta = (
        {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in (WEIGHT, MOMENTUM)
    )
    moment = Moment(about["epoch"], about["batch"], total=tensors.get(TOTAL), rng=rng)
    return Checkpoint(work, about["phase"], moment, weights, momenta, about["wall_s"])


def find(folder: Path, key: str) -> Checkpoint | None:
    """The checkpoint in any of a child's attempts that is furthest on with this work; None if there is none.

    One that is damaged, or goes away meanwhile, is no checkpoint.
    """
    best: tuple[int, Checkpoint] | None = None
    for path in _named(folder, "*/*"):
        found = _read(path, key)
        if found is not None:
            done = found.work.batches(found.phase, found.moment)
            if best is None or done > best[0]:
                best = done, found
    return best[1] if best else None


def _read(path: Path, key: str) -> Checkpoint | None:
    match = NAME.fullmatch(path.name)
    assert match is not None
    try:
        content = path.read_bytes()
        if not files.sha256(content).startswith(match[2]):
            return None
        found = decode(content)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.work.key == key else None


def _named(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """What is called like a checkpoint; a folder that is gone holds none."""
    try:
        yield from [path for path in folder.glob(pattern) if NAME.fullmatch(path.name)]
    except OSError:
        return


def _number(path: Path) -> int:
    return int(path.name.split("-")[1])
