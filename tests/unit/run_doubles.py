"""Doubles beneath the run ring: a data set of a few images, trainers that answer at once, a backend that can be hurt.

Imported by the tests of `run/`; never imports torch. What stands on top (worker, coordinator, session, record) is real.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lemonade_hpc import config as configs
from lemonade_hpc import files
from lemonade_hpc.config import Config
from lemonade_hpc.data import DataSet, Part
from lemonade_hpc.run import backends, coordinator, crew, lease, owner, record, session, worker
from lemonade_hpc.run import history as histories
from lemonade_hpc.run.history import History
from lemonade_hpc.run.log import Message
from lemonade_hpc.search import evolution
from lemonade_hpc.search.evolution import Child, Outcome, Problem, State
from lemonade_hpc.search.ops import Signature

BASE: dict[str, Any] = {
    "seed": 3,
    "data": {"name": "digits"},
    "objectives": [{"name": "val_error"}, {"name": "params", "min": 300, "max": 20000}],
    "search": {"mode": "generational", "children": 18, "accepted": 6, "proposals": 8},
    "cluster": {"backend": "inline", "workers": 2},
    "storage": {"seal_every": 10},
}
PROGRESS = True
"""Whether trainers report epochs."""
FAILURE = {"kind": "Diverged", "reason": "the loss is not a number"}

Behave = Callable[[Message], str | None]
"""What goes wrong with a task: None, or one of FakeTrainer's words."""


def config(**changes: dict[str, Any] | int) -> Config:
    """BASE with some keys changed, and the defaults that follow the data."""
    merged = {k: v | changes.get(k, {}) if isinstance(v, dict) else changes.get(k, v) for k, v in BASE.items()}
    return configs.resolve(configs.from_dict(merged, "test"), (1, 8, 8))


def images(seed: int = 0) -> DataSet:
    """Thirty images of 8x8 pixels in ten classes."""
    rng = np.random.default_rng(seed)
    part = Part(rng.integers(0, 255, (10, 1, 8, 8)).astype(np.uint8), np.arange(10))
    return DataSet("digits", part, part, part, 10, f"checksum {seed}")


def problem(settings: Config) -> Problem:
    """The fixed part of a search on `images`."""
    return evolution.problem(settings, Signature((1, 8, 8), 10), 0.9)


def error_of(digest: str) -> float:
    """A synthetic error in [0.05, 0.9), fixed for a network."""
    return round(0.05 + 0.85 * (zlib.crc32(digest.encode()) % 10007) / 10007, 4)


def outcome(task: Message, run: Path) -> Message:
    """What a trainer reports of a child that went well, its weights on file."""
    path = files.attempt_folder(task["child"], task["attempt"]) / "weights.safetensors"
    files.make_folder((run / path).parent)
    content = f"weights of {task['digest']}".encode()
    files.write(run / path, content)
    return {
        **{key: task[key] for key in ("child", "attempt", "digest")},
        "objectives": {"val_error": error_of(task["digest"])},
        "receipt": None if task["parent"] is None else {"exact": True, "relative_difference": 1e-9},
        "weights": {"path": str(path), "sha256": files.sha256(content), "bytes": len(content)},
        "wall_s": 0.5,
        "device": "fake",
    }


class FakeTrainer:
    """Answers at once. Words: fail, crash, hang, long (saves when asked), storage, unfit (dies before it is ready)."""

    def __init__(self, run: Path, behave: Behave = lambda task: None) -> None:
        self.run, self.behave = run, behave
        self.messages: list[Message] = [{"ready": "fake"}]
        self.death: str | None = None
        self.killed = False
        self.num_saves = 0
        self.long: Message | None = None

    def send(self, task: Message) -> None:
        word = self.behave(task)
        self.long = task if word == "long" else None
        if task["parent"] is not None and not (self.run / task["parent"]["weights"]["path"]).exists():
            word = "crash"
        if word == "unfit":
            self.messages, self.death = [], "exit code 1\nno GPU here"
        elif word == "crash":
            self.death = "killed by SIGSEGV\nlast words"
        elif word == "storage":
            self.messages.append({"storage": f"child {task['child']}: No space left on device"})
        elif word == "fail":
            self.messages.append({key: task[key] for key in ("child", "attempt", "digest")} | {"failure": FAILURE})
        elif word not in ("hang", "long"):
            self.messages += [{"child": task["child"], "epoch": 1}] * PROGRESS + [outcome(task, self.run)]

    def save(self) -> None:
        self.num_saves += 1
        if self.long is not None:
            key = {name: self.long[name] for name in ("child", "attempt")}
            self.messages.append(key | {"saved": {"done": 0.5, "epochs": 1.0}})

    def wait(self, seconds: float) -> None:
        pass

    def poll(self) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages

    def died(self) -> str | None:
        return self.death

    def kill(self) -> None:
        self.killed = True


class FakeBackend:
    """Real workers with fake trainers, in this process. `seed` shuffles who works when; `die` is a kill -9."""

    lasting = excludes = False
    gpus = 0

    def __init__(self, run: Path, behave: Behave = lambda task: None, seed: int | None = None) -> None:
        self.run, self.behave = run, behave
        self.workers: dict[str, worker.Worker] = {}
        self.killed: list[str] = []
        self.closed = False
        self._rng = None if seed is None else random.Random(seed)

    def room(self) -> int:
        return 100

    def seen(self, name: str) -> bool:
        return False

    def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
        for name in names:
            self.workers[name] = worker.Worker(
                self.run, name, lambda epoch: FakeTrainer(self.run, lambda t: self.behave(t))
            )

    def adopt(self, name: str, launch: str, place: int) -> None:
        pass

    def heard(self, name: str, messages: Sequence[Message]) -> None:
        pass

    def alive(self, name: str) -> bool:
        return name in self.workers

    def ended(self, name: str) -> str | None:
        return "died"

    def node(self, name: str) -> str | None:
        return None

    def last_output(self, name: str) -> str:
        return "the last that it wrote"

    def kill(self, name: str) -> None:
        self.killed.append(name)
        self.die(name)

    def die(self, name: str) -> None:
        self.workers.pop(name, None)

    def step(self) -> None:
        names = list(self.workers)
        if self._rng is not None:
            names = self._rng.sample(names, self._rng.randint(0, len(names)))
        for name in names:
            if name in self.workers and not self.workers[name].step():
                self.workers.pop(name, None)

    def close(self) -> None:
        self.closed = True


class Notes:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.doing: list[dict[str, str]] = []

    def update(self, history: History, workers: dict[str, str]) -> None:
        self.doing.append(workers)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def about(self, text: str) -> list[str]:
        """The notes that contain a text."""
        return [note for note in self.notes if text in note]


def search(
    run: Path,
    settings: Config,
    behave: Behave = lambda task: None,
    *,
    backend: backends.Backend | None = None,
    notes: Notes | None = None,
    take_over: bool = False,
) -> History:
    """`session.search` with fake trainers, or with the given backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_backend", lambda run, config, image, observer: backend or FakeBackend(run, behave))
        return session.search(settings, run, notes or Notes(), take_over=take_over)


def start(
    run: Path, settings: Config, backend: backends.Backend, notes: Notes | None = None
) -> coordinator.Coordinator:
    """A coordinator that holds the lease of `run`, to be driven by hand."""
    fixed = session._prepare(settings, images(), run)
    loaded = record.load(run, fixed)
    journal = lease.open_epoch(run, settings, loaded, loaded.history.reporters(), take_over=True)
    made = coordinator.Coordinator(run, settings, loaded.history, journal, backend, notes or Notes())
    made.adopt()
    return made


def load(run: Path, settings: Config) -> record.Loaded:
    """The record of a run."""
    return record.load(run, problem(settings))


def events(run: Path, settings: Config, kind: str | None = None) -> list[dict[str, Any]]:
    """Its events in effect, of one kind or all."""
    found: list[dict[str, Any]] = []
    record.load(run, problem(settings), found)
    return [event for event in found if kind in (None, event["event"])]


def front(history: History) -> list[tuple[int, str, tuple[float, ...]]]:
    """What must be equal between runs: numbers, networks, objective values."""
    state = history.state
    rows = zip(state.front.numbers, state.front.values.tolist(), strict=True)
    return [(number, state.members[number].digest, tuple(values)) for number, values in rows]


def assert_sound(run: Path) -> None:
    """`verify` finds nothing."""
    from lemonade_hpc.run.verify import verify

    assert [(name, faults) for name, faults in verify(run) if faults] == []


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def copy(run: Path, to: Path) -> Path:
    """A copy of a run folder that can be hurt."""
    shutil.copytree(run, to)
    return to


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A run folder to be, in memory where there is room: these tests make many small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        yield Path(made) / "run"


def install(patch: pytest.MonkeyPatch) -> None:
    """No waiting, a data set at hand, and every earlier coordinator counts as gone (it was this process).

    Nothing is forced to the disk: what is on it after a crash of this process is the same.
    """
    patch.setattr(os, "fsync", lambda handle: None)
    for module in (coordinator, crew):
        patch.setattr(module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None))
    patch.setattr(session.data_sets, "load", lambda data: images())
    patch.setattr(owner, "judge", lambda who: "gone")
    patch.setattr(owner, "is_own", lambda who: False)


def reported(child: Child, failed: bool = False) -> dict[str, Any]:
    """As a worker would report it."""
    told: dict[str, Any] = {"child": child.number, "attempt": "e1a1", "digest": child.digest, "wall_s": 2.0}
    if failed:
        return told | {"failure": FAILURE}
    return told | {"objectives": {"val_error": error_of(child.digest)}, "weights": {}, "receipt": None}


def straight(settings: Config, failed: Callable[[int], bool]) -> tuple[list[State], list[dict[str, Any]]]:
    """A search in memory with ask and tell alone: every state, and the events that led there."""
    state, seen, rng = evolution.start(problem(settings)), set[str](), random.Random(1)
    states, events = [state], []
    while not state.complete:
        after, children = evolution.ask(state, 3, seen.__contains__)
        if after is not state:
            events.append(histories.asked(state, after, 3, children))
            seen |= {child.digest for child in children}
        else:
            number = evolution.next_to_tell(state)
            number = rng.choice(sorted(state.in_flight)) if number is None else number
            told = reported(state.in_flight[number], failed(number))
            expensive = () if failed(number) else (told["objectives"]["val_error"],)
            reason = "Diverged" if failed(number) else None
            after = evolution.tell(state, Outcome(number, expensive, reason))
            events.append({"event": "committed", "outcome": told})
        state = after
        states.append(state)
    return states, events


def same(a: State, b: State) -> bool:
    fronts = a.front.numbers == b.front.numbers and (a.front.values == b.front.values).all()
    numbers = ("num_initial", "num_asked", "num_asks", "num_committed", "num_failed", "redrawn", "members", "in_flight")
    return bool(fronts) and all(getattr(a, name) == getattr(b, name) for name in numbers)
