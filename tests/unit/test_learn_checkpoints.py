"""Checkpoints: a child that was interrupted anywhere ends with the same bits, and rubbish is passed over."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from lemonade_hpc import files
from lemonade_hpc.learn import checkpoints, child, training
from lemonade_hpc.learn.checkpoints import Keeper, Policy, Work
from lemonade_hpc.learn.child import Lab, Line
from lemonade_hpc.learn.network import build
from lemonade_hpc.learn.training import Moment
from lemonade_hpc.search.morphisms import Edit

sys.path.insert(0, str(Path(__file__).parent))

import test_learn_child as children  # noqa: E402

Task = dict[str, Any]
N = 3
"""Batches of an epoch."""


class Killed(Exception):  # noqa: N818
    """The trainer's end, right after a checkpoint."""


class After(threading.Event):
    """Somebody wants a checkpoint after so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def is_set(self) -> bool:
        self.left -= 1
        return self.left == 0


class Bench:
    """A lab with a trained parent, and the children made of it."""

    def __init__(self, folder: Path) -> None:
        drawn = {"pad": 1, "flip": True, "cutout": 2, "mixup": 0.5}  # each batch from the epoch's generator
        run, owner = children.make_run(folder, training={"distill_epochs": 2, "batch_size": 400, **drawn})
        self.lab = child.open_lab(run, owner)
        assert training.batches_of(self.lab.train, self.lab.config.training) == N
        self.root = children.task_of(children.GRAPH, 0, 4)
        self.parent = child.train_child(self.lab, self.root)
        search = self.lab.config.search.model_copy(update={"inheritance": False})
        self.orphan_lab = replace(self.lab, config=self.lab.config.model_copy(update={"search": search}))

    def task(self, kind: str) -> tuple[Lab, Task]:
        exact, approximate = children.EXACT, children.APPROXIMATE
        if kind == "initial":
            return self.lab, children.task_of(children.GRAPH, 100, 2)
        if kind == "exact":
            return self.lab, children.child_of(self.root, self.parent, 101, exact, epochs=2)
        if kind == "approximate":
            return self.lab, children.child_of(self.root, self.parent, 102, (*exact, *approximate), epochs=2)
        return self.orphan_lab, children.child_of(self.root, self.parent, 103, approximate, epochs=2)

    def undisturbed(self, kind: str) -> Task:
        lab, task = self.task(kind)
        self.forget(task)
        outcome = child.train_child(lab, task | {"attempt": "undisturbed"})
        self.forget(task)
        return outcome

    def forget(self, task: Task) -> None:
        """Remove all that was written of a child."""
        shutil.rmtree(self.lab.run / files.child_folder(task["child"]), ignore_errors=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    mode, threads = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    yield Bench(tmp_path_factory.mktemp("run"))
    torch.set_deterministic_debug_mode(mode)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> Callable[[str], Task]:
    """The outcome of a child that nobody interrupted."""
    known: dict[str, Task] = {}
    return lambda kind: known[kind] if kind in known else known.setdefault(kind, bench.undisturbed(kind))


def interrupt(lab: Lab, task: Task, batches: int, attempt: str = "e1a1") -> dict[str, float]:
    """Train until so many batches of this attempt are done, save, die; what was reported of the checkpoint."""
    said: list[dict[str, float]] = []

    def saved(progress: dict[str, float]) -> None:
        said.append(progress)
        raise Killed

    with pytest.raises(Killed):
        child.train_child(lab, task | {"attempt": attempt}, Line(saved=saved, wanted=After(batches)))
    return said[0]


def numbers(outcome: Task) -> Task:
    """What must not depend on interruptions."""
    kept = {key: outcome[key] for key in ("child", "digest", "objectives", "receipt")}
    return kept | {key: outcome["weights"][key] for key in ("sha256", "bytes")}


def stored(lab: Lab, task: Task, attempt: str = "e1a1") -> list[Path]:
    folder = lab.run / files.attempt_folder(task["child"], attempt)
    return sorted(path for path in folder.glob("*") if path.name != "weights.safetensors")


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        ("initial", [1]),
        ("initial", [N]),
        ("initial", [N + 2]),
        ("initial", [2 * N]),
        ("initial", [1, 1, 1, 2]),
        ("exact", [2]),
        ("exact", [N]),
        ("exact", [2, N, 1]),
        ("approximate", [1]),
        ("approximate", [N]),
        ("approximate", [N + 1]),
        ("approximate", [2 * N]),
        ("approximate", [2 * N + 2]),
        ("approximate", [4 * N]),
        ("approximate", [2, 1, N, N, 2]),
        ("afresh", [1]),
        ("afresh", [N, 1]),
    ],
)
def test_an_interrupted_child_ends_with_the_same_bits(
    bench: Bench, undisturbed: Callable[[str], Task], kind: str, stops: Sequence[int]
) -> None:
    expected = undisturbed(kind)
    lab, task = bench.task(kind)
    bench.forget(task)
    total = N * (4 if kind == "approximate" else 2)
    for k, batches in enumerate(stops):
        said = interrupt(lab, task, batches, f"e1a{k + 1}")
        done = sum(stops[: k + 1])
        assert said == {"done": done / total, "epochs": pytest.approx(done / N, abs=1e-3)}
    epochs: list[int] = []
    outcome = child.train_child(lab, task | {"attempt": "e1a9"}, Line(epoch=epochs.append))
    assert outcome["resumed"] == sum(stops) / total
    assert numbers(outcome) == numbers(expected)
    assert "resumed" not in expected
    first = max(0, sum(stops) - (total - 2 * N)) // N
    assert epochs == [1, 2][first:]  # those that were done are not done again
    assert json.loads(files.dumps(outcome)) == outcome


def test_taking_checkpoints_changes_no_number(bench: Bench, undisturbed: Callable[[str], Task]) -> None:
    lab, task = bench.task("approximate")
    bench.forget(task)
    said: list[dict[str, float]] = []
    outcome = child.train_child(with_policy(lab, checkpoint_epochs=1), task, Line(saved=said.append))
    assert numbers(outcome) == numbers(undisturbed("approximate")) and "resumed" not in outcome
    assert [progress["done"] for progress in said] == [0.25, 0.5, 0.75, 1.0]


def test_another_layout_goes_on_in_that_layout(bench: Bench) -> None:
    lab, task = bench.task("initial")
    bench.forget(task)
    fast = replace(lab, layout=torch.channels_last)
    interrupt(fast, task, N + 1)
    found = checkpoints.find(lab.run / files.child_folder(100), child._key(fast, task))
    assert found is not None
    begun = child._go_on(fast, task, found)
    for parameter, momentum in zip(begun.network.parameters(), begun.moment.momenta, strict=True):
        assert momentum is not None and momentum.stride() == parameter.stride()


def test_the_losses_so_far_go_on_too(bench: Bench) -> None:
    lab, task = bench.task("initial")
    totals = []
    for batches in (N + 1, N + 2, 2 * N):
        bench.forget(task)
        interrupt(lab, task, batches)
        found = checkpoints.find(lab.run / files.child_folder(100), child._key(lab, task))
        assert found is not None and (found.moment.epoch, found.moment.batch) == divmod(batches, N)
        totals.append(found.moment.total)
    assert totals[0] is not None and totals[1] is not None and 0 < totals[0] < totals[1] and totals[2] is None


def test_the_time_of_earlier_attempts_counts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, task = bench.task("initial")
    bench.forget(task)
    monkeypatch.setattr(checkpoints, "time", Clock(step=1000.0))
    interrupt(lab, task, N)
    monkeypatch.undo()
    assert child.train_child(lab, task)["wall_s"] > 1000


def test_a_child_that_diverges_after_a_checkpoint_fails_all_the_same(bench: Bench) -> None:
    lab, task = bench.task("initial")
    settings = lab.config.training.model_copy(update={"initial_lr": 1e30})
    wild = replace(lab, config=lab.config.model_copy(update={"training": settings}))
    bench.forget(task)
    interrupt(wild, task, 2)
    outcome = child.train_child(wild, task)
    assert outcome["failure"]["kind"] == "Diverged" and outcome["resumed"] > 0
    bench.forget(task)
    assert child.train_child(wild, task)["failure"] == outcome["failure"]


# ---------------------------------------------------------------- the parent


def test_the_parent_is_needed_only_while_it_teaches(bench: Bench, undisturbed: Callable[[str], Task]) -> None:
    lab, task = bench.task("approximate")
    path = lab.run / bench.parent["weights"]["path"]
    content = path.read_bytes()
    expected = undisturbed("approximate")
    for batches, kind in ((2 * N - 1, "ParentDamaged"), (2 * N, None), (2 * N + 1, None)):
        bench.forget(task)
        interrupt(lab, task, batches)
        path.unlink()
        try:
            outcome = child.train_child(lab, task)
        finally:
            path.write_bytes(content)
        if kind is None:
            assert numbers(outcome) == numbers(expected)
        else:
            assert outcome["failure"]["kind"] == kind


# ---------------------------------------------------------------- when


class Clock:
    """A clock that goes on by a step whenever it is read."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 500.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def with_policy(lab: Lab, **changed: Any) -> Lab:
    cluster = lab.config.cluster.model_copy(update=changed)
    return replace(lab, config=lab.config.model_copy(update={"cluster": cluster}))


def keeper_of(folder: Path, policy: Policy, **more: Any) -> tuple[Keeper, Callable[[Moment], None]]:
    network = build(
        children.GRAPH, children.SIGNATURE,
        child.transfer.initial_weights(children.GRAPH, children.SIGNATURE, child.seeded(1)),
    )  # fmt: skip
    keeper = Keeper(folder, policy, Work("key", frozenset(), (0, 9), N, None), **more)
    return keeper, keeper.watch(checkpoints.TRAIN, network, None)


def moment(epoch: int, batch: int) -> Moment:
    return Moment(epoch, batch, (), torch.zeros(()), np.random.default_rng(0) if batch else None)


def test_a_checkpoint_is_due_after_some_minutes_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(checkpoints, "time", clock)
    said: list[dict[str, float]] = []
    _, watch = keeper_of(tmp_path, Policy(600.0, 0), report=said.append)
    for now, taken in ((599, 0), (600, 1), (601, 1), (1199, 1), (1200, 2), (5000, 3), (5001, 3)):
        clock.now = 500.0 + now
        watch(moment(0, 1))
        assert len(said) == taken


def test_the_time_that_writing_takes_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, write = Clock(), files.write
    monkeypatch.setattr(checkpoints, "time", clock)

    def slow(path: Path, content: bytes) -> None:
        write(path, content)
        clock.now += 1000

    monkeypatch.setattr(files, "write", slow)
    said: list[dict[str, float]] = []
    _, watch = keeper_of(tmp_path, Policy(600.0, 0), report=said.append)
    clock.now += 600
    watch(moment(0, 1))
    watch(moment(0, 2))
    assert len(said) == 1


@pytest.mark.parametrize(("every", "taken"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_a_checkpoint_is_due_after_some_epochs(tmp_path: Path, every: int, taken: list[int]) -> None:
    said: list[dict[str, float]] = []
    _, watch = keeper_of(tmp_path, Policy(0.0, every), report=said.append)
    for epoch in range(4):
        for batch in range(1, N):
            watch(moment(epoch, batch))
        watch(moment(epoch + 1, 0))
    assert [progress["epochs"] for progress in said] == taken


def test_the_configuration_decides(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def policy(**changed: Any) -> Policy:
        return child._policy(with_policy(bench.lab, **changed))

    assert policy() == Policy(600.0, 0)
    assert policy(checkpoint_min=0.0, checkpoint_epochs=2) == Policy(0.0, 2)
    lab, task = bench.task("initial")
    bench.forget(task)
    monkeypatch.setattr(checkpoints, "time", Clock(step=10.0))
    said: list[dict[str, float]] = []
    child.train_child(with_policy(lab, checkpoint_min=0.5), task, Line(saved=said.append))
    assert len(said) == 2  # the clock is read twice to begin with, once a batch, and twice for a checkpoint


def test_nothing_is_read_from_the_device_where_no_checkpoint_is_due(tmp_path: Path) -> None:
    class Poison:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    _, watch = keeper_of(tmp_path, Policy(600.0, 0))
    watch(Moment(0, 1, (Poison(),), Poison(), Poison()))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_one_wish_gives_one_checkpoint(tmp_path: Path) -> None:
    wanted, said = threading.Event(), list[dict[str, float]]()
    _, watch = keeper_of(tmp_path, Policy(0.0, 0), report=said.append, wanted=wanted)
    watch(moment(0, 1))
    wanted.set()
    watch(moment(0, 2))
    watch(moment(1, 0))
    assert [progress["epochs"] for progress in said] == [pytest.approx(2 / N, abs=1e-3)]


# ---------------------------------------------------------------- files


def test_the_two_newest_are_kept_and_their_names_tell_order_and_content(bench: Bench) -> None:
    lab, task = bench.task("initial")
    bench.forget(task)
    folder = lab.run / files.attempt_folder(task["child"], "e1a1")
    folder.mkdir(parents=True)
    (folder / "checkpoint-notes.txt").write_text("mine")
    child.train_child(with_policy(lab, checkpoint_epochs=1), task | {"epochs": [0, 5]})
    names = [path.name for path in stored(lab, task)]
    assert names[2:] == ["checkpoint-notes.txt"]
    assert [name[:18] for name in names[:2]] == ["checkpoint-000004-", "checkpoint-000005-"]
    for name in names[:2]:
        assert name[18:] == f"{files.sha256((folder / name).read_bytes())[:16]}.safetensors"


def test_a_full_disk_is_reported_as_such(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, task = bench.task("initial")
    bench.forget(task)
    with monkeypatch.context() as patch:

        def refuse(path: Path, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        patch.setattr(files, "write", refuse)
        outcome = child.train_child(with_policy(lab, checkpoint_epochs=1), task)
    assert outcome.keys() == {"storage"} and outcome["storage"].endswith("No space left on device")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("harm", [Path.unlink, flip, truncate, empty, make_folder, dangle])
def test_a_damaged_newest_one_is_passed_over(
    bench: Bench, undisturbed: Callable[[str], Task], harm: Callable[[Path], None]
) -> None:
    lab, task = bench.task("exact")
    bench.forget(task)
    interrupt(lab, task, 1)
    interrupt(lab, task, 1)
    first, second = stored(lab, task)
    harm(second)
    outcome = child.train_child(lab, task | {"attempt": "e1a2"})
    assert outcome["resumed"] == 1 / (2 * N)
    assert numbers(outcome) == numbers(undisturbed("exact"))


def test_one_that_vanishes_while_it_is_read_is_passed_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, task = bench.task("exact")
    bench.forget(task)
    interrupt(lab, task, 1)
    interrupt(lab, task, 1)
    second, read = stored(lab, task)[1], Path.read_bytes

    def gone(path: Path) -> bytes:
        if path == second:
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", gone)
    assert child.train_child(lab, task | {"attempt": "e1a2"})["resumed"] == 1 / (2 * N)


def test_rubbish_in_the_folder_is_passed_over(bench: Bench, undisturbed: Callable[[str], Task]) -> None:
    """All of it with the right checksum in its name."""
    lab, task = bench.task("exact")
    bench.forget(task)
    folder = lab.run / files.attempt_folder(task["child"], "e1a1")
    folder.mkdir(parents=True)
    some = {"weight 1.weight": torch.zeros(3)}
    about = {"key": child._key(lab, task)}
    contents = [b"", b"x" * 100, b"\xff" * 8, save(some), save(some, {"checkpoint": "{"}),
                save(some, {"checkpoint": "[]"}), save(some, {"checkpoint": "null"}),
                save(some, {"checkpoint": files.dumps(about)}),
                save(some, {"checkpoint": files.dumps({**about, "rng": 7})}),
                b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b"null"]  # fmt: skip
    for k, content in enumerate(contents):
        (folder / f"checkpoint-{k:06d}-{files.sha256(content)[:16]}.safetensors").write_bytes(content)
    (folder / ".tmp-checkpoint-000001-torn").write_bytes(b"x")
    (folder.parent / "checkpoint-000001-0123456789abcdef.safetensors").write_bytes(b"no attempt's")
    outcome = child.train_child(lab, task)
    assert "resumed" not in outcome and numbers(outcome) == numbers(undisturbed("exact"))


def test_a_folder_that_cannot_be_listed_holds_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, pattern: str) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr(Path, "glob", refuse)
    assert checkpoints.find(tmp_path, "key") is None


@pytest.mark.parametrize(
    "changed", [{"digest": "0" * 32}, {"epochs": [0, 3]}, {"edits": [["widen", 1, 4]]}, {"graph": {}}, {"parent": {}}]
)
def test_a_checkpoint_of_other_work_is_none(bench: Bench, changed: Task) -> None:
    lab, task = bench.task("exact")
    bench.forget(task)
    interrupt(lab, task, 1)
    folder = lab.run / files.child_folder(task["child"])
    assert checkpoints.find(folder, child._key(lab, task)) is not None
    assert checkpoints.find(folder, child._key(lab, task | changed)) is None


def test_settings_that_change_numbers_make_other_work(bench: Bench) -> None:
    lab, task = bench.task("exact")
    keys = {child._key(lab, task), child._key(bench.orphan_lab, task)}
    for section, changed in (
        ("training", {"lr": 0.3}),
        ("training", {"batch_size": 8}),
        ("search", {"prune_by": "random"}),
    ):
        other = getattr(lab.config, section).model_copy(update=changed)
        keys.add(child._key(replace(lab, config=lab.config.model_copy(update={section: other})), task))
    keys.add(child._key(replace(lab, config=lab.config.model_copy(update={"seed": 4})), task))
    assert len(keys) == 6
    assert child._key(with_policy(lab, workers=9), task) == child._key(lab, task | {"attempt": "e7a7"})


def test_of_many_attempts_the_furthest_counts(bench: Bench) -> None:
    """Not the newest: a later attempt may have begun anew where this one's checkpoint could not be read."""
    lab, task = bench.task("approximate")
    bench.forget(task)
    interrupt(lab, task, 2 * N + 1, "e1a1")
    hidden = lab.run / "hidden"
    first = lab.run / files.attempt_folder(task["child"], "e1a1")
    first.rename(hidden)
    interrupt(lab, task, 2 * N - 1, "e1a2")
    hidden.rename(first)
    assert child.train_child(lab, task | {"attempt": "e1a3"})["resumed"] == (2 * N + 1) / (4 * N)


# ---------------------------------------------------------------- the process


def test_a_trainer_saves_when_told_and_another_goes_on(bench: Bench) -> None:
    run, owner = bench.lab.run, bench.lab.run / files.owner(1)
    task = children.child_of(bench.root, bench.parent, 110, (Edit("widen", 1, 2),), epochs=60)
    with children.Trainer(run, owner) as trainer:
        trainer.send({"do": "save"})  # of nothing
        assert "ready" in trainer.read()
        trainer.send(task)
        while trainer.read() != {"child": 110, "epoch": 3}:
            pass
        trainer.send({"do": "save"})
        said = trainer.read()
        while "epoch" in said:
            said = trainer.read()
        assert (said["child"], said["attempt"]) == (110, "e1a1") and 0 < said["saved"]["done"] < 1
        trainer.process.kill()
    outcome = child.train_child(bench.lab, task | {"attempt": "e1a2"})
    assert outcome["resumed"] == said["saved"]["done"]
    bench.forget(task)
    expected = child.train_child(bench.lab, task | {"attempt": "e1a3"})
    assert "resumed" not in expected and numbers(outcome) == numbers(expected)
