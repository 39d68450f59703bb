"""What other machines write may be seen late: nothing is missing, damaged or gone before it must have been seen.

The bounds alone, with a clock that goes when told and files that come when told; `tests/cluster/test_stale.py` has real
searches behind a file system that is late.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemonade_hpc import config, files
from lemonade_hpc.learn import child
from lemonade_hpc.run import coordinator, lease, owner, record, session, status, verify, worker
from lemonade_hpc.run.log import LogReader, LogWriter, Message

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

STALE_S, BOUND_S = 60.0, 67.0
SETTINGS = doubles.config(cluster={"stale_s": STALE_S})


class Clock:
    """Goes when told, or when somebody sleeps; `then` is what happens at some time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept = 0.0
        self.then: dict[float, Callable[[], Any]] = {}

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return "today"

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        for at in [at for at in self.then if at <= self.now]:
            self.then.pop(at)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    doubles.install(monkeypatch)
    made = Clock()
    for module in (files, coordinator, lease, status, verify, worker, child):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(status, "LOOK_S", 5)
    return made


@pytest.fixture
def run(clock: Clock) -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


def test_what_is_wrong_is_late_until_it_must_have_been_seen(clock: Clock) -> None:
    patience = files.Patience(STALE_S)
    assert patience.waits(False)
    clock.now += BOUND_S - 1
    assert patience.waits(False)
    clock.now += 1
    assert not patience.waits(False)
    assert not patience.waits(True)
    assert patience.waits(False)  # another time
    for coherent in (0, None):
        assert not files.Patience(coherent).waits(False)


def test_nodes_of_a_cluster_may_see_files_late_and_one_machine_does_not() -> None:
    def resolved(**cluster: Any) -> float | None:
        return config.resolve(
            config.from_dict({"data": {"name": "digits"}, "cluster": cluster}, ""), (1, 8, 8)
        ).cluster.stale_s

    assert resolved(backend="slurm") == files.STALE_S and resolved(backend="local") is None
    assert resolved(backend="slurm", stale_s=0) == 0 and resolved(backend="local", stale_s=3) == 3


# ---------------------------------------------------------------- logs


def log(path: Path, *numbers: int) -> bytes:
    with LogWriter(path) as writer:
        writer.append([{"n": n, "text": "x" * 50} for n in numbers])
    return path.read_bytes()


def read(reader: LogReader) -> list[int]:
    return [message["n"] for message in reader.poll()]


def test_a_log_whose_size_is_newer_than_its_content_is_read_once_that_has_come(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "log"
    whole = log(path, 1, 2, 3, 4)
    one = len(whole) // 4
    reader = LogReader(path, STALE_S)
    path.write_bytes(whole[: one + 20] + bytes(2 * one) + whole[3 * one + 20 :])  # pages arrive out of order
    assert read(reader) == [1]
    clock.now += BOUND_S - 1
    assert read(reader) == [] and reader.num_damaged == 0
    path.write_bytes(whole[:one] + bytes(3 * one))
    assert read(reader) == []
    path.write_bytes(whole)
    assert read(reader) == [2, 3, 4] and reader.num_damaged == 0


def test_a_line_that_stays_damaged_is_counted_and_passed_over(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "log"
    whole = log(path, 1, 2, 3)
    path.write_bytes(whole.replace(b'"n":2', b'"n":7'))
    reader = LogReader(path, STALE_S)
    assert read(reader) == [1] and reader.num_damaged == 0
    clock.now += BOUND_S
    assert read(reader) == [3] and reader.num_damaged == 1


def test_a_log_that_is_seen_shorter_than_before_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = log(path, 1, 2, 3)
    reader = LogReader(path, STALE_S)
    assert read(reader) == [1, 2, 3]
    path.write_bytes(whole[: len(whole) // 2])
    assert read(reader) == []
    path.unlink()
    assert read(reader) == []
    path.write_bytes(whole)
    assert read(reader) == [] and reader.num_damaged == 0


def test_a_log_of_which_the_server_says_that_it_is_stale_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    log(path, 1)
    reader = LogReader(path)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda *arguments: (_ for _ in ()).throw(OSError(116, "Stale file handle")))
        assert read(reader) == []
    assert read(reader) == [1]


# ---------------------------------------------------------------- workers


def worker_of(run: Path, name: str) -> worker.Worker:
    files.make_folder((run / files.done_log(name)).parent)
    return worker.Worker(run, name, lambda epoch: doubles.FakeTrainer(run))


def open_epoch(run: Path, *workers: str) -> None:
    lease.open_epoch(run, SETTINGS, doubles.load(run, SETTINGS), workers, take_over=True).close()


def farewell(run: Path, name: str) -> str:
    return str(LogReader(run / files.done_log(name)).poll()[-1].get("reason"))


@pytest.fixture
def begun(run: Path) -> Path:
    """A run with an epoch, in which e1w00 has a mailbox."""
    session._prepare(SETTINGS, doubles.images(), run)
    open_epoch(run, "e1w00")
    return run


def test_an_epoch_without_a_mailbox_for_a_worker_may_only_be_late(
    begun: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "judge", lambda who: "alive")
    made = worker_of(begun, "e1w00")
    assert made.step()
    open_epoch(begun, "e1w00")
    folder = (begun / files.assigned_log(2, "e1w00")).parent
    folder.rename(begun / "unseen")
    clock.now += 100
    assert made.step() and made._epoch == 1
    clock.now += BOUND_S - 1
    assert made.step()
    (begun / "unseen").rename(folder)
    assert made.step() and made._epoch == 2
    open_epoch(begun)
    assert made.step()
    third = (begun / files.epoch_folder(3)).rename(begun / "unseen")  # one that found its predecessor at work
    clock.now += BOUND_S
    assert made.step() and made._epoch == 2
    third.rename(begun / files.epoch_folder(3))
    assert made.step()
    clock.now += BOUND_S
    assert not made.step()
    assert farewell(begun, "e1w00") == "given up by a later coordinator"


def hurt(path: Path) -> bytes:
    """Zeros in place of a log's content; what was there."""
    content = path.read_bytes()
    path.write_bytes(bytes(len(content) - 1) + b"\n")
    return content


def test_a_mailbox_of_which_only_the_size_is_seen_is_no_damaged_one(begun: Path, clock: Clock) -> None:
    made = worker_of(begun, "e1w00")
    path = begun / files.assigned_log(1, "e1w00")
    with LogWriter(path) as mailbox:
        mailbox.append([{"do": "stop"}])
    content = hurt(path)
    assert made.step()
    path.write_bytes(content)
    assert not made.step() and farewell(begun, "e1w00") == "stopped by the coordinator"


def test_an_epoch_whose_owner_cannot_be_read_yet_is_late(begun: Path, clock: Clock) -> None:
    made = worker_of(begun, "e1w00")
    open_epoch(begun, "e1w00")
    path = begun / files.owner(2)
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    assert made.step() and made._epoch == 1
    path.write_bytes(content)
    assert made.step() and made._epoch == 2


def test_a_worker_may_come_before_its_coordinator_is_seen(begun: Path, clock: Clock) -> None:
    made = worker_of(begun, "e2w00")  # its node lists the first epoch only
    assert made.step() and made.step()
    clock.now += BOUND_S - 1
    assert made.step()
    open_epoch(begun, "e2w00")
    with LogWriter(begun / files.assigned_log(2, "e2w00")) as mailbox:
        mailbox.append([{"do": "stop"}])
    assert not made.step() and farewell(begun, "e2w00") == "stopped by the coordinator"
    made = worker_of(begun, "e3w00")
    assert made.step()
    clock.now += BOUND_S
    assert not made.step()


def test_a_heartbeat_that_is_seen_late_is_one(begun: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "judge", lambda who: "unknown")
    made = worker_of(begun, "e1w00")
    made._idle_exit_s = 1e9
    for size in range(5):
        (begun / files.heartbeat(1)).write_bytes(bytes(size))
        assert made.step()
        clock.now += 4 * STALE_S + worker.ORPHAN_S - 1
        assert made.step()
    clock.now += 2
    assert not made.step() and farewell(begun, "e1w00") == "the coordinator is gone"


# ---------------------------------------------------------------- the coordinator


def running(run: Path) -> tuple[coordinator.Coordinator, doubles.FakeBackend, Message]:
    """A coordinator with one worker, and the first task that it was given."""
    settings = doubles.config(cluster={"stale_s": STALE_S, "workers": 1})
    backend = doubles.FakeBackend(run, lambda task: "long")
    made = doubles.start(run, settings, backend)
    for _ in range(3):
        made._turn()
    (handle,) = made._crew.handles.values()
    return made, backend, next(iter(handle.tasks.values()))


def report(backend: doubles.FakeBackend, outcome: Message) -> None:
    (one,) = backend.workers.values()
    one._say("outcome", outcome=outcome)


def losses(made: coordinator.Coordinator) -> int:
    return sum(made.history.num_lost.values())


@pytest.mark.parametrize("comes", [True, False])
def test_an_outcome_waits_for_its_weights(run: Path, clock: Clock, comes: bool) -> None:
    made, backend, task = running(run)
    outcome = doubles.outcome(task, run)
    path = run / outcome["weights"]["path"]
    path.rename(run / "unseen")
    report(backend, outcome)
    made._turn()
    for _ in range(33):
        clock.now += 2
        made._turn()
    assert made.history.state.num_committed == losses(made) == 0
    if comes:
        (run / "unseen").rename(path)
    clock.now += 2
    made._turn()
    assert (made.history.state.num_committed, losses(made)) == ((1, 0) if comes else (0, 1))
    made.close()


@pytest.mark.parametrize("spoke", [True, False])
def test_the_last_words_of_a_worker_that_has_died_are_waited_for(run: Path, clock: Clock, spoke: bool) -> None:
    made, backend, task = running(run)
    log = run / files.done_log(next(iter(made._crew.handles)))
    before = log.read_bytes()
    report(backend, doubles.outcome(task, run))
    after = log.read_bytes()
    log.write_bytes(before)  # as it is seen
    backend.workers.clear()
    for _ in range(33):
        made._turn()
        clock.now += 2
    assert len(made._crew.handles) == 1 and losses(made) == 0
    if spoke:
        log.write_bytes(after)
    clock.now += 2
    made._turn()
    assert made.history.state.num_committed == spoke
    assert (task["child"] in made.history.attempts) == (not spoke)
    made.close()


def test_reports_of_which_only_the_size_is_seen_are_no_damaged_ones(run: Path, clock: Clock) -> None:
    made, backend, task = running(run)
    handle = next(iter(made._crew.handles.values()))
    path = run / files.done_log(handle.name)
    before = path.read_bytes()
    report(backend, doubles.outcome(task, run))
    after = path.read_bytes()
    path.write_bytes(before + bytes(len(after) - len(before) - 1) + b"\n")
    made._turn()
    assert handle.damaged is None and backend.killed == []
    path.write_bytes(after)
    made._turn()
    assert made.history.state.num_committed == 1
    made.close()


def test_one_that_was_paused_waits_until_it_must_see_its_successor(run: Path, clock: Clock) -> None:
    made, _, _ = running(run)
    beats = (run / files.heartbeat(1)).stat().st_size
    clock.now += BOUND_S - 1
    made._turn()
    assert clock.slept == 0
    unseen = run / files.EPOCHS / "000002"
    clock.now += BOUND_S + 1
    clock.then[clock.now + BOUND_S] = lambda: unseen.mkdir()
    with pytest.raises(coordinator.Superseded):
        made._turn()
    assert clock.slept > 2 * BOUND_S
    assert (run / files.heartbeat(1)).stat().st_size == beats + 2  # of which one before it slept
    made.close()


@pytest.mark.parametrize("paused", [False, True])
def test_one_that_was_paused_and_is_to_leave_does_so_at_once_and_touches_nothing(
    run: Path, clock: Clock, paused: bool
) -> None:
    """It has no time to look for a successor that may have begun and is not seen here yet."""
    made, backend, _ = running(run)
    backend.lasting = True
    job = run / files.WORKERS / "another" / "job"
    job.mkdir(parents=True)
    clock.now += BOUND_S + paused
    made.close()
    assert clock.slept == 0 and backend.closed == (not paused) and job.exists() == paused
    assert doubles.events(run, SETTINGS)[-1]["event"] == "closed"


# ---------------------------------------------------------------- the trainer


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_a_parents_weights_that_are_late_are_waited_for(run: Path, clock: Clock, fault: str) -> None:
    import torch
    from safetensors.torch import save

    content = save({"w": torch.ones(2)})
    path = run / "weights"
    path.parent.mkdir()
    stored = {"path": "weights", "sha256": files.sha256(content), "bytes": len(content)}
    lab: Any = SimpleNamespace(run=run, config=SETTINGS, device=torch.device("cpu"))
    if fault == "damaged":
        path.write_bytes(bytes(len(content)))
    clock.then[clock.now + STALE_S] = lambda: path.write_bytes(content)
    assert child._read(lab, stored)["w"].tolist() == [1, 1]
    assert clock.slept >= STALE_S
    path.unlink() if fault == "gone" else path.write_bytes(bytes(len(content)))
    with pytest.raises(child.ParentDamaged, match="is gone" if fault == "gone" else "damaged or replaced"):
        child._read(lab, stored)
    assert clock.slept >= STALE_S + BOUND_S


# ---------------------------------------------------------------- successors


@pytest.fixture
def left(run: Path) -> Path:
    """A run whose coordinator was killed, with some commits, on another machine."""
    made, _, _ = running(run)
    made._ledger.close()
    move_owner(run)
    return run


def move_owner(run: Path) -> None:
    path = run / files.owner(1)
    who = json.loads(path.read_text())
    who["owner"]["host"] = "elsewhere"
    path.write_text(json.dumps(who))


def settle(run: Path, stale_s: float | None = STALE_S, *, take_over: bool = True, calm_s: float = 0.0) -> list[str]:
    notes: list[str] = []
    lease.settle(run, stale_s, notes.append, take_over=take_over, calm_s=calm_s)
    return notes


@pytest.mark.parametrize("stale_s", [STALE_S, None])
def test_a_successor_on_another_machine_waits_until_it_must_see_all(
    left: Path, clock: Clock, stale_s: float | None
) -> None:
    path = left / files.journals(1)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: whole[:-1].rindex(b"\n") + 1])
    clock.then[clock.now + STALE_S] = lambda: path.write_bytes(whole)
    (note,) = settle(left, stale_s)
    assert "on another machine" in note and path.read_bytes() == whole
    assert clock.slept > STALE_S + 2 * BOUND_S


def test_what_a_predecessor_elsewhere_has_committed_is_never_void(left: Path, clock: Clock) -> None:
    """Both copies of its journal are seen late."""
    settings = doubles.config(cluster={"stale_s": STALE_S})
    paths = [left / path for path in files.journals(1)]
    whole = [path.read_bytes() for path in paths]
    before = doubles.events(left, settings)

    def show(contents: list[bytes]) -> None:
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)

    show([content[: content[:-1].rindex(b"\n") + 1] for content in whole])
    clock.then[clock.now + STALE_S] = lambda: show(whole)
    assert doubles.search(left, settings, take_over=True).state.complete
    assert doubles.events(left, settings)[: len(before)] == before
    doubles.assert_sound(left)


def test_a_coordinator_that_is_alive_elsewhere_is_not_followed(left: Path, clock: Clock) -> None:
    def beat() -> None:
        with open(left / files.heartbeat(1), "ab") as file:
            file.write(b".")
        clock.then[clock.now + STALE_S] = beat

    clock.then[clock.now] = beat
    before = files.epochs(left)
    with pytest.raises(lease.Held, match="its coordinator is at work"):
        doubles.search(left, SETTINGS, take_over=True)
    assert files.epochs(left) == before and clock.slept < 3 * BOUND_S


def test_a_predecessor_is_not_waited_for_where_there_is_no_need(
    left: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(lease.Held, match="cannot be told from here"):
        patch.setattr(lease.queue, "judge", lambda who: "unknown")
        settle(left, take_over=False)
    assert clock.slept == 0
    assert settle(left, 0) != [] and clock.slept < 10  # a coherent file system: two beats
    clock.slept = 0
    path = left / files.owner(1)
    path.write_text(path.read_text().replace("elsewhere", owner.identity()["host"]))
    assert settle(left) == []
    assert doubles.search(left, SETTINGS).state.complete
    for epoch in files.epochs(left):
        owned = left / files.owner(epoch)
        owned.write_text(owned.read_text().replace(f'"{owner.identity()["host"]}"', '"elsewhere"'))
    clock.slept = 0
    assert settle(left) == [] and clock.slept == 0
    assert settle(left.with_name("none")) == []


def test_a_successor_asks_slurm_nothing_for_as_long_as_its_predecessor_would_have_waited(
    left: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease.queue, "judge", lambda who: pytest.fail("Slurm was asked"))
    assert len(settle(left, 0, take_over=False, calm_s=60)) == 1 and 60 <= clock.slept < 70
    clock.slept = 0
    assert len(settle(left, take_over=False, calm_s=60)) == 1 and clock.slept >= 2 * BOUND_S


def test_a_coordinator_elsewhere_that_left_in_good_order_is_followed_without_asking(
    run: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = doubles.start(run, SETTINGS, doubles.FakeBackend(run))
    made._turn()
    made.close()
    move_owner(run)
    monkeypatch.setattr(lease.queue, "judge", lambda who: pytest.fail("Slurm was asked"))
    assert doubles.search(run, SETTINGS).state.complete and clock.slept < BOUND_S
    doubles.assert_sound(run)


def test_a_record_that_is_lost_is_told_as_such_once_it_cannot_be_late(
    left: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease.queue, "judge", lambda who: "gone")
    for path in files.journals(1):
        (left / path).write_bytes(b"?" + (left / path).read_bytes()[1:])
    with pytest.raises(record.RecordError, match="both copies of the journal have lost their first line"):
        doubles.search(left, SETTINGS)
    assert clock.slept >= 2 * BOUND_S


def test_a_predecessor_of_which_nothing_can_be_read_yet_is_waited_for(left: Path, clock: Clock) -> None:
    folder = left / files.epoch_folder(1)
    unseen = folder.rename(left / "unseen")
    folder.mkdir()

    def show() -> None:
        folder.rmdir()
        unseen.rename(folder)

    clock.then[clock.now + STALE_S] = show
    assert doubles.search(left, SETTINGS, take_over=True).state.complete
    assert clock.slept > STALE_S
    doubles.assert_sound(left)


# ---------------------------------------------------------------- readers


@pytest.fixture
def done(run: Path) -> Path:
    doubles.search(run, SETTINGS)
    return run


def faults(run: Path) -> str:
    return str([faults for _, faults in verify.verify(run) if faults])


def late(clock: Clock, path: Path, content: bytes | None) -> None:
    """A file that is seen so for now, and as it is after a while."""
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    clock.then[clock.now + STALE_S] = lambda: path.write_bytes(whole)


def test_a_first_copy_that_ends_early_is_no_damage_before_it_stays_so(done: Path, clock: Clock) -> None:
    path = done / files.journals(1)[0]
    whole = path.read_bytes()
    short = whole[: whole[:-1].rindex(b"\n") + 1]
    late(clock, path, short)
    before = clock.slept
    assert status.status(done)["warnings"] == [] and clock.slept == before
    doubles.assert_sound(done)
    assert clock.slept >= STALE_S
    path.write_bytes(short)
    assert "damaged after line" in faults(done)


def test_a_hole_in_one_copy_is_no_damage_before_it_stays_so(done: Path, clock: Clock) -> None:
    path = done / files.journals(1)[0]
    late(clock, path, path.read_bytes()[:500] + bytes(600) + path.read_bytes()[1100:])
    assert status.status(done)["warnings"] == []


@pytest.mark.parametrize("seen", ["zeros", "nothing"])
def test_a_record_that_cannot_be_read_yet_is_read_later(done: Path, clock: Clock, seen: str) -> None:
    for path in files.journals(1):
        content = (done / path).read_bytes()
        late(clock, done / path, None if seen == "nothing" else bytes(len(content) - 1) + b"\n")
        clock.then = {at + k: then for k, (at, then) in enumerate(clock.then.items())}
    assert status.status(done)["state"] == "complete"
    assert clock.slept >= STALE_S


def test_an_owner_or_weights_that_are_not_seen_yet_are_no_fault(done: Path, clock: Clock) -> None:
    late(clock, done / files.owner(1), None)
    doubles.assert_sound(done)
    number = status.read(done)[2].history.state.front.numbers[0]
    (path,) = (done / files.child_folder(number)).glob("*/*")
    late(clock, path, None)
    doubles.assert_sound(done)
    path.unlink()
    assert "cannot be read" in faults(done)


def test_a_record_that_stays_unreadable_is_an_error(done: Path, clock: Clock) -> None:
    (done / files.owner(1)).unlink()
    for look in (status.status, verify.verify):
        before = clock.slept
        with pytest.raises(record.RecordError):
            look(done)
        assert clock.slept - before == pytest.approx(BOUND_S, abs=6)
