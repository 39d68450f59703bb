"""Every crash point: a search is stopped at each durable operation, and the same call must end as if nothing had been.

A kill is what it leaves on the disk. So one undisturbed search is photographed before, in the middle of and after
everything it does to the disk, and each picture is a run folder that is gone on with.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.run import crew, lease, status
from lemonade_hpc.run.coordinator import Stopped
from lemonade_hpc.run.log import LogWriter

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

SETTINGS = doubles.config(search={"children": 21, "accepted": 7}, storage={"seal_every": 15})
NUM = 21 + 3


ALL_OF = 60
"""As many pictures are taken of all that happens, before some are left out."""


def mailbox(name: str) -> bool:
    """Whether it is a picture of a worker's log."""
    return name.endswith(("done.log", "assigned.log"))


def behave(task: dict[str, Any]) -> str | None:
    """One child never works, so that failures, too, are crossed by crashes."""
    return "fail" if task["child"] == 7 else None


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.install(monkeypatch)
    monkeypatch.setattr(crew, "STOP_S", 0.02)
    monkeypatch.setattr(doubles, "PROGRESS", False)


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


@dataclass
class Camera:
    """Calls `point(name, folder in the middle of it)` at every durable operation that a search makes."""

    run: Path
    point: Callable[[str], None]
    half: Callable[[str, Callable[[Path], None]], None] = lambda name, make: None
    names: list[str] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        append, write, rename, remove = LogWriter.append_texts, files.write, os.rename, files.remove

        def append_texts(log: LogWriter, bodies: Sequence[str], *, durable: bool = True) -> None:
            before = log.path.stat().st_size
            self.point(f"before append to {log.path.name}")
            append(log, bodies, durable=durable)
            grown = log.path.stat().st_size - before
            if log.path.is_relative_to(self.run):
                where = log.path.relative_to(self.run)
                self.half(f"torn {log.path.name}", lambda copy: os.truncate(copy / where, before + grown // 2))
            self.point(f"after append to {log.path.name}")

        def written(path: Path, content: bytes, *, new: bool = False) -> None:
            where = path.relative_to(self.run)
            self.point(f"before {path.name}")
            self.half(
                f"half of {path.name}",
                lambda copy: [  # type: ignore[arg-type]
                    (copy / where).parent.mkdir(exist_ok=True),
                    (copy / where).with_name(f".tmp-{path.name}-1").write_bytes(content[: len(content) // 2]),
                ],
            )
            write(path, content, new=new)
            self.point(f"after {path.name}")

        def renamed(source: Path, target: Path) -> None:
            self.point("before the epoch")
            rename(source, target)
            self.point("after the epoch")

        def removed(path: Path) -> None:
            where = path.relative_to(self.run)
            self.point(f"before the removal of {path.name}")
            self.half(f"half the removal of {path.name}", lambda copy: half_removed(copy / where))
            remove(path)
            self.point(f"after the removal of {path.name}")

        patch.setattr(LogWriter, "append_texts", append_texts)
        patch.setattr(files, "write", written)
        patch.setattr(lease.os, "rename", renamed)
        patch.setattr(files, "remove", removed)


def half_removed(path: Path) -> None:
    """A folder of which one file is gone already."""
    for item in sorted(path.rglob("*")) if path.is_dir() else []:
        if item.is_file():
            item.unlink()
            return


def assert_as_if_nothing_had_been(run: Path, history: Any, front: Any, why: str, *, thoroughly: bool = True) -> None:
    assert doubles.front(history) == front, why
    if thoroughly:
        doubles.assert_sound(run)
    events = doubles.events(run, SETTINGS)
    outcomes = Counter(event["outcome"]["child"] for event in events if event["event"] == "committed")
    assert outcomes == Counter(range(NUM)), why
    assert {event["kind"] for event in events if event["event"] == "lost"} <= {"stopped", "worker"}, why
    kept = sorted(int(path.name) for path in (run / files.CHILDREN).glob("*/*"))
    assert kept == list(history.state.front.numbers), why
    assert list(run.rglob(".tmp-*")) == [], why
    assert [path.name for path in run.glob("population.*")] == [history.complete["file"]], why
    sealed = {str(path.relative_to(run)) for path in (run / files.STATE).iterdir()}
    assert sealed == {event["file"] for event in history.sealed}, why


def pictures(run: Path) -> Iterator[tuple[str, Path]]:
    """An undisturbed search in `run`; afterwards each picture's name and folder.

    None is taken twice. Of mailboxes, which see the same thing for every child, every fourth once all kinds were seen.
    """
    taken: list[tuple[str, Path]] = []
    last: list[Any] = []

    def half(name: str, make: Callable[[Path], None]) -> None:
        now = [(path, path.stat().st_mtime_ns) for path in sorted(run.rglob("*"))]
        if name.startswith(("before", "after")):
            if now == last:
                return
            last[:] = now
        number = len(taken)
        if not run.exists() or (mailbox(name) and number > ALL_OF and number % 4):
            taken.append((name, Path()))
            return
        copy = run.with_name(f"picture{len(taken)}")
        shutil.copytree(run, copy)
        make(copy)
        taken.append((name, copy))

    with pytest.MonkeyPatch.context() as patch:
        Camera(run, lambda name: half(name, lambda copy: None), half).install(patch)
        doubles.search(run, SETTINGS, behave)
    for name, copy in taken:
        if copy != Path():
            yield name, copy
            shutil.rmtree(copy)


def test_a_kill_at_any_durable_operation_changes_nothing(run: Path) -> None:
    front = doubles.front(doubles.search(run.with_name("undisturbed"), SETTINGS, behave))
    crossed = Counter[str]()
    for k, (name, copy) in enumerate(pictures(run)):
        thoroughly = k % 3 == 0 or not name.endswith((".log", ".copy"))
        if thoroughly and (copy / files.RUN).exists():
            status.status(copy)  # a reader may look at any time
        history = doubles.search(copy, SETTINGS, behave)
        assert_as_if_nothing_had_been(copy, history, front, name, thoroughly=thoroughly)
        crossed[name.rpartition(" ")[2] if name.endswith((".log", ".copy", ".json")) else name.partition(" ")[0]] += 1
    assert crossed["journal.log"] >= 30 and crossed["journal.copy"] >= 30
    assert crossed["done.log"] >= 30 and crossed["assigned.log"] >= 15
    assert crossed["run.json"] >= 2 and crossed["owner.json"] >= 2
    assert crossed["half"] >= 20  # of files, and of removals


def test_a_second_kill_during_the_recovery_changes_nothing_either(run: Path) -> None:
    """And a third, and a fourth: each picture of a recovery is recovered from in its turn."""
    front = doubles.front(doubles.search(run.with_name("undisturbed"), SETTINGS, behave))
    rng = random.Random(7)
    for chain in range(10):
        at = run.with_name(f"chain{chain}")
        for _ in range(4):
            shots = list(kept_pictures(at, rng))
            if not shots:  # it was complete already
                break
            shutil.rmtree(at, ignore_errors=True)
            shots[0].rename(at)
        history = doubles.search(at, SETTINGS, behave)
        assert_as_if_nothing_had_been(at, history, front, f"chain {chain}")


def kept_pictures(run: Path, rng: random.Random) -> Iterator[Path]:
    """One picture, taken at random, of what `search` does to a run folder."""
    number, chosen = 0, run.with_name(run.name + "-picture")

    def half(name: str, make: Callable[[Path], None]) -> None:
        nonlocal number
        number += 1
        if run.exists() and rng.random() < 1 / number:  # each is the last one taken with equal probability
            shutil.rmtree(chosen, ignore_errors=True)
            shutil.copytree(run, chosen)
            make(chosen)

    with pytest.MonkeyPatch.context() as patch:
        Camera(run, lambda name: half(name, lambda copy: None), half).install(patch)
        doubles.search(run, SETTINGS, behave)
    if chosen.exists():
        yield chosen


class Trouble:
    """An operation on the disk that fails at the k-th call, once or from then on."""

    def __init__(self, at: int, for_ever: bool, code: int) -> None:
        self.at, self.for_ever, self.code, self.calls = at, for_ever, code, 0

    def strike(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.for_ever and self.calls > self.at):
            raise OSError(self.code, os.strerror(self.code))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        write, fsync, written = os.write, os.fsync, files.write

        def short(handle: int, data: bytes) -> int:
            half = write(handle, data[: len(data) // 2])
            self.strike()
            return half + write(handle, data[half:])

        def forced(handle: int) -> None:
            self.strike()
            fsync(handle)

        def file(path: Path, content: bytes, *, new: bool = False) -> None:
            self.strike()
            written(path, content, new=new)

        patch.setattr(os, "write", short)
        patch.setattr(os, "fsync", forced)
        patch.setattr(files, "write", file)


@pytest.mark.parametrize("for_ever", [False, True])
def test_a_full_disk_at_any_moment_stops_the_run_and_the_same_call_goes_on(run: Path, for_ever: bool) -> None:
    """With all that a coordinator does when it is stopped: a disk that has room again at once is the harder case.

    Or one that is over quota, read-only, broken or stale, in turn.
    """
    codes = sorted(files.STORAGE_ERRORS)
    front = doubles.front(doubles.search(run.with_name("undisturbed"), SETTINGS, behave))
    stopped = 0
    for at in range(1 + for_ever, 10_000, 7):
        folder = run.with_name(f"full{at}")
        trouble = Trouble(at, for_ever, codes[at % len(codes)])
        with pytest.MonkeyPatch.context() as patch:
            trouble.install(patch)
            try:
                doubles.search(folder, SETTINGS, behave)
            except Stopped as error:
                assert os.strerror(trouble.code) in str(error)
                stopped += 1
        history = doubles.search(folder, SETTINGS, behave)
        assert_as_if_nothing_had_been(folder, history, front, f"operation {at}", thoroughly=at % 4 == 0)
        shutil.rmtree(folder)
        if trouble.calls < at:
            break
    assert stopped >= 30
