"""The worker's supervisor: assignments, crashes, timeouts, signals, coordinators that go and come."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.run import lease, owner, session, trainers, worker
from lemonade_hpc.run.log import LogReader, LogWriter, Message
from lemonade_hpc.run.trainers import ProcessTrainer
from lemonade_hpc.run.worker import Worker

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

SETTINGS = doubles.config(cluster={"idle_exit_min": 1.0, "child_timeout_min": 2.0})
NAME = "e1w00"


class Clock:
    """A clock that goes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Desk:
    """A run folder with one worker, seen from the coordinator's side."""

    def __init__(self, run: Path, clock: Clock) -> None:
        self.run, self.clock = run, clock
        self.words: dict[int, str] = {}
        """What goes wrong with a child."""
        self.trainers: list[doubles.FakeTrainer] = []
        session._prepare(SETTINGS, doubles.images(), run)
        (run / files.done_log(NAME)).parent.mkdir(parents=True)
        self.open_epoch()
        self.worker = Worker(run, NAME, self._start_trainer, outage_s=worker.OUTAGE_S)
        self._reader = LogReader(run / files.done_log(NAME))

    def _start_trainer(self, epoch: int) -> doubles.FakeTrainer:
        self.trainers.append(doubles.FakeTrainer(self.run, lambda task: self.words.get(task["child"])))
        return self.trainers[-1]

    def open_epoch(self, *, with_mailbox: bool = True, image: str | None = None) -> None:
        loaded = doubles.load(self.run, SETTINGS)
        workers = (NAME,) if with_mailbox else ()
        journal = lease.open_epoch(self.run, SETTINGS, loaded, workers, take_over=True, image=image)
        journal.close()
        if with_mailbox:
            self.mailbox = LogWriter(self.run / files.assigned_log(journal.epoch, NAME))

    def send(self, *messages: Message) -> None:
        self.mailbox.append(messages)

    def steps(self, count: int = 2) -> bool:
        return all(self.worker.step() for _ in range(count))  # none after the one that leaves

    def wait(self, seconds: float) -> bool:
        self.clock.now += seconds
        return self.worker.step()

    def heard(self, *kinds: str) -> list[Message]:
        """New reports, of some kinds or all."""
        told = [message for message in self._reader.poll() if not kinds or message["say"] in kinds]
        self.at = [message.pop("at") for message in told]
        return told

    def said(self) -> list[str]:
        return [message["say"] for message in self.heard()]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    made = Desk(tmp_path / "run", clock)
    yield made
    made.mailbox.close()


def task(child: int, attempt: str = "e1a1") -> Message:
    return {"do": "train", "child": child, "attempt": attempt, "digest": f"{child:032x}", "parent": None}


# ---------------------------------------------------------------- assignments


def test_a_child_is_trained_and_reported(desk: Desk) -> None:
    assert desk.steps() and desk.trainers == []  # none is started before there is work
    desk.send(task(0))
    assert desk.steps()
    hello, started, ready, epoch, outcome = desk.heard()
    assert hello["say"] == "hello" and owner.judge(hello) == "alive"
    assert started == {"say": "started", "child": 0, "attempt": "e1a1"}
    assert ready == {"say": "ready", "device": "fake"}
    assert epoch == {"say": "epoch", "child": 0, "epoch": 1}
    assert outcome["outcome"]["objectives"]["val_error"] == doubles.error_of(f"{0:032x}")
    assert (desk.run / outcome["outcome"]["weights"]["path"]).exists()


def test_one_trainer_trains_one_child_after_another(desk: Desk) -> None:
    desk.send(task(0), task(1), task(2))
    assert desk.steps(4)
    assert [message["outcome"]["child"] for message in desk.heard("outcome")] == [0, 1, 2]
    assert len(desk.trainers) == 1


def test_an_attempt_sent_again_is_not_trained_again(desk: Desk) -> None:
    desk.send(task(0), task(0))
    desk.steps(3)
    desk.send(task(0), task(0, "e1a2"))
    desk.steps(3)
    assert [message["outcome"]["attempt"] for message in desk.heard("outcome")] == ["e1a1", "e1a2"]


def test_a_queued_child_that_is_revoked_is_returned_and_not_trained(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0), task(1), task(2))
    desk.steps()
    desk.send({"do": "revoke", "child": 1, "attempt": "e1a1"})
    desk.steps()
    assert desk.heard("returned") == [{"say": "returned", "child": 1, "attempt": "e1a1"}]
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    desk.steps(3)
    assert [message["outcome"]["child"] for message in desk.heard("outcome")] == [0, 2]


def test_a_child_in_training_that_is_revoked_stays(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    desk.send({"do": "revoke", "child": 0, "attempt": "e1a1"})
    desk.steps()
    assert desk.heard("returned") == [] and not desk.trainers[0].killed
    assert desk.worker._current == task(0)


def test_a_revocation_of_another_attempt_changes_nothing(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0), task(1))
    desk.steps()
    desk.send({"do": "revoke", "child": 0, "attempt": "e1a9"}, {"do": "revoke", "child": 1, "attempt": "e1a9"})
    desk.steps()
    assert desk.heard("returned") == []
    assert len(desk.worker._queue) == 1


# ---------------------------------------------------------------- between two looks at the mailbox


def test_children_follow_one_another_without_a_look_at_the_mailbox(desk: Desk) -> None:
    desk.words[1] = "crash"
    desk.send(task(0), task(1), task(2))
    desk.steps(1)
    desk.send(task(3))
    before = desk.clock.now
    desk.worker.poll_s = 1.0
    desk.worker.wait()
    assert desk.clock.now == pytest.approx(before + 1.0)
    found = desk.heard("outcome", "crashed")
    assert [(one["say"], one.get("outcome", one)["child"]) for one in found] == [
        ("outcome", 0), ("crashed", 1), ("outcome", 2),
    ]  # fmt: skip


def test_a_worker_without_a_trainer_waits_in_one_go(desk: Desk) -> None:
    before, desk.worker.poll_s = desk.clock.now, 1.0
    desk.worker.wait()
    assert desk.clock.now == before + 1.0 and desk.said() == ["hello"]


def test_a_child_that_takes_too_long_is_ended_also_while_the_worker_waits(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps(1)
    desk.worker.poll_s = 121.0
    desk.worker.wait()
    (outcome,) = desk.heard("outcome")
    assert outcome["outcome"]["failure"]["kind"] == "timeout"


def test_a_worker_that_must_leave_waits_no_longer_than_until_its_child_is_saved(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.steps()
    desk.worker.caught.append(signal.SIGTERM)
    assert desk.worker.step() and desk.trainers[0].num_saves == 1
    desk.trainers[0].messages.append(saved(0))
    before, desk.worker.poll_s = desk.clock.now, 30.0
    desk.worker.wait()
    assert desk.clock.now < before + 0.1 and not desk.worker.step()


def test_a_trainer_that_cannot_start_ends_the_wait_and_is_told_of_once(desk: Desk) -> None:
    desk.words[0] = "unfit"
    desk.send(task(0))
    desk.steps(1)
    before, desk.worker.poll_s = desk.clock.now, 1.0
    desk.worker.wait()
    assert desk.clock.now < before + 0.1
    assert not desk.worker.step() and desk.said() == ["hello", "started", "unfit", "bye"]


# ---------------------------------------------------------------- trainers in trouble


def test_a_crash_is_reported_with_the_last_words_and_the_next_child_gets_a_new_trainer(desk: Desk) -> None:
    desk.words[0] = "crash"
    desk.send(task(0), task(1))
    assert desk.steps(4)
    crashed, outcome = desk.heard("crashed", "outcome")
    reason = "killed by SIGSEGV\nlast words"
    assert crashed == {"say": "crashed", "child": 0, "attempt": "e1a1", "reason": reason}
    assert outcome["outcome"]["child"] == 1
    assert len(desk.trainers) == 2


def test_an_outcome_followed_by_death_is_an_outcome(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    desk.trainers[0].death = "exit code 1"
    assert desk.steps()
    assert [message["say"] for message in desk.heard("outcome", "crashed", "unfit", "bye")] == ["outcome"]
    desk.send(task(1))
    desk.steps()
    assert len(desk.trainers) == 2


def test_a_worker_whose_trainer_cannot_start_is_unfit_and_leaves(desk: Desk) -> None:
    desk.words[0] = "unfit"
    desk.send(task(0))
    assert not desk.steps()
    unfit, bye = desk.heard("unfit", "crashed", "outcome", "bye")
    assert unfit == {"say": "unfit", "reason": "exit code 1\nno GPU here"}
    assert bye["say"] == "bye"


def test_a_child_that_takes_too_long_fails(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0), task(1))
    assert desk.steps() and desk.wait(119)
    assert not desk.trainers[0].killed
    assert desk.wait(2) and desk.trainers[0].killed
    assert desk.steps()
    first, second = (message["outcome"] for message in desk.heard("outcome"))
    assert (
        first["failure"]["kind"] == "timeout" and "cluster.child_timeout_min = 2 minutes" in first["failure"]["reason"]
    )
    assert (first["child"], first["attempt"], first["digest"]) == (0, "e1a1", f"{0:032x}")
    assert second["child"] == 1 and "failure" not in second


def test_a_childs_time_may_be_days(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,500 minutes are a day and an hour, not an hour."""
    monkeypatch.setitem(globals(), "SETTINGS", doubles.config(cluster={"child_timeout_min": 1500.0}))
    desk.open_epoch()
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.steps() and desk.wait(1500 * 60 - 1)
    assert not desk.trainers[0].killed
    assert desk.wait(2) and desk.trainers[0].killed


def test_each_child_has_its_own_time(desk: Desk) -> None:
    desk.send(task(0))
    desk.steps()
    desk.clock.now += 100
    desk.words[1] = "hang"
    desk.send(task(1))
    assert desk.steps() and desk.wait(100)
    assert not desk.trainers[0].killed


def test_storage_trouble_is_reported_and_the_child_may_be_sent_again(desk: Desk) -> None:
    desk.words[0] = "storage"
    desk.send(task(0))
    assert desk.steps()
    (message,) = desk.heard("storage", "outcome", "crashed")
    assert message == {"say": "storage", "reason": "child 0: No space left on device"}
    desk.words.clear()
    desk.send(task(0))
    assert desk.steps()
    assert desk.heard("outcome")[0]["outcome"]["child"] == 0


# ---------------------------------------------------------------- leaving


def bye(desk: Desk) -> str:
    (message,) = desk.heard("bye")
    return str(message["reason"])


def test_stop_has_the_child_saved_first_and_begins_no_other(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0), task(1))
    desk.steps()
    desk.send({"do": "stop"}, task(2))
    assert desk.worker.step() and desk.trainers[0].num_saves == 1
    desk.trainers[0].messages.append(saved(0))
    assert not desk.worker.step() and desk.trainers[0].killed
    said = desk.heard("started", "checkpoint", "returned", "bye")
    assert [one["say"] for one in said] == ["started", "checkpoint", "bye"]
    assert said[-1]["reason"] == "stopped by the coordinator"


def test_stop_ends_a_worker_at_once_that_has_nothing_to_save(desk: Desk) -> None:
    desk.send({"do": "stop"}, task(0))
    assert not desk.worker.step() and bye(desk) == "stopped by the coordinator"


def test_a_worker_whose_time_is_nearly_over_gives_back_what_it_cannot_finish(desk: Desk) -> None:
    """Its first child took 300 s: with 299 s to go it does not begin another."""
    desk.words[0] = "hang"
    desk.worker._ends_at = desk.clock.now + 599
    desk.send(task(0), task(1), task(2))
    desk.steps()
    desk.clock.now += 300
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    assert not desk.steps(3)
    assert [message["outcome"]["child"] for message in desk.heard("outcome")] == [0]
    desk._reader = LogReader(desk.run / files.done_log(NAME))
    assert [message["child"] for message in desk.heard("returned")] == [1, 2]
    desk._reader = LogReader(desk.run / files.done_log(NAME))
    assert bye(desk) == "its time is nearly over"


def test_only_workers_of_slurm_have_a_time_limit(desk: Desk) -> None:
    assert desk.worker._ends_at == math.inf
    owned = desk.run / files.owner(1)
    content = json.loads(owned.read_text())
    content["config"]["cluster"] |= {"backend": "slurm", "time_min": 10}
    owned.write_text(json.dumps(content))
    again = Worker(desk.run, NAME, desk._start_trainer)
    assert again._ends_at == desk.clock.now + 600 - worker.SPARE_S


def saved(child: int, done: float = 0.5) -> Message:
    return {"child": child, "attempt": "e1a1", "saved": {"done": done, "epochs": 1.5}}


def last_words(desk: Desk) -> list[Message]:
    """What it said of children, and why it left."""
    return desk.heard("checkpoint", "returned", "outcome", "crashed", "bye")


def test_checkpoints_are_reported(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    desk.trainers[0].messages.append(saved(0, 0.25))
    assert desk.steps()
    expected = {"say": "checkpoint", "child": 0, "attempt": "e1a1", "done": 0.25, "epochs": 1.5}
    assert last_words(desk) == [expected] and desk.trainers[0].num_saves == 0


def test_a_signal_ends_a_worker_without_a_child_at_once(desk: Desk) -> None:
    desk.send(task(0))
    desk.steps(3)
    desk.send(task(1))
    desk.worker.caught.append(signal.SIGUSR2)
    assert not desk.worker.step()
    assert bye(desk) == "signalled" and desk.trainers[0].killed and desk.trainers[0].num_saves == 0


def test_a_signal_has_the_child_saved_first(desk: Desk) -> None:
    """A second signal changes nothing; no other child is begun; the worker goes on hearing and saying that it lives."""
    desk.words[0] = "hang"
    desk.send(task(0), task(1))
    desk.steps()
    desk.worker.caught.append(signal.SIGUSR2)
    assert desk.worker.step() and desk.worker.step() and desk.wait(5)
    desk.worker.caught.append(signal.SIGUSR2)
    assert desk.wait(4.9) and desk.trainers[0].num_saves == 1 and not desk.trainers[0].killed
    assert desk.heard("alive")
    desk.trainers[0].messages.append(saved(0))
    assert not desk.worker.step()
    desk._reader = LogReader(desk.run / files.done_log(NAME))
    assert [message["say"] for message in last_words(desk)] == ["checkpoint", "bye"]
    assert desk.trainers[0].killed and len(desk.trainers) == 1


def test_a_checkpoint_that_does_not_come_is_not_waited_for(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    desk.trainers[0].messages.append(saved(0))
    desk.steps()
    desk.worker.caught.append(signal.SIGUSR2)
    assert desk.worker.step() and desk.wait(worker.SAVE_S - 0.1)  # the one that was taken before is not the one
    assert not desk.wait(0.2)
    assert bye(desk) == "signalled" and desk.trainers[0].killed


def test_an_outcome_that_comes_instead_of_a_checkpoint_is_reported(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0), task(1))
    desk.steps()
    desk.worker.caught.append(signal.SIGUSR2)
    assert desk.worker.step()
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    assert not desk.worker.step()
    assert [message["say"] for message in last_words(desk)] == ["outcome", "bye"]


def test_a_trainer_that_is_not_ready_has_nothing_to_save(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.worker.step()
    assert desk.trainers and not desk.worker._ready
    desk.worker.caught.append(signal.SIGUSR2)
    desk.trainers[0].messages.clear()
    assert not desk.worker.step()
    assert desk.trainers[0].num_saves == 0


def test_who_waits_for_a_checkpoint_waits_no_longer_when_told_to_stop(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    desk.worker.caught.append(signal.SIGUSR2)
    assert desk.worker.step()
    desk.clock.now += worker.SAVE_S - 1
    desk.send({"do": "stop"})
    assert desk.worker.step() and desk.trainers[0].num_saves == 1
    desk.clock.now += 1
    assert not desk.worker.step() and bye(desk) == "signalled"


def test_a_child_that_its_time_does_not_suffice_for_is_saved_and_given_back(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.worker._ends_at = desk.clock.now + 100
    desk.send(task(0), task(1))
    assert desk.steps() and desk.wait(99) and desk.trainers[0].num_saves == 0
    assert desk.wait(1) and desk.trainers[0].num_saves == 1
    desk.worker.caught.append(signal.SIGUSR2)  # as Slurm does at about that time
    assert desk.wait(1) and desk.trainers[0].num_saves == 1
    desk.trainers[0].messages.append(saved(0))
    assert not desk.worker.step()
    words = last_words(desk)
    assert [message["say"] for message in words] == ["checkpoint", "returned", "returned", "bye"]
    assert [message["child"] for message in words[1:3]] == [0, 1]
    assert words[-1]["reason"] == "its time is nearly over" and desk.trainers[0].killed


def test_a_child_that_cannot_be_saved_in_time_is_not_given_back(desk: Desk) -> None:
    """It would go from worker to worker for ever."""
    desk.words[0] = "hang"
    desk.worker._ends_at = desk.clock.now + 100
    desk.send(task(0), task(1))
    assert desk.steps() and desk.wait(100) and not desk.wait(worker.SAVE_S)
    assert [message.get("child") for message in last_words(desk)] == [1, None]


def test_a_long_child_is_begun_where_it_gets_far_enough_to_be_worth_it(desk: Desk) -> None:
    """The first one took 1,000 s; another that will be saved half-way is begun with 300 s to go, not with 299."""
    desk.words.update({0: "hang", 1: "hang"})
    desk.worker._timeout_s = 1e9
    desk.worker._ends_at = desk.clock.now + 1000 + worker.WORTH_S
    desk.send(task(0), task(1))
    desk.steps()
    desk.clock.now += 1000
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    assert desk.steps() and desk.worker._current == task(1)
    desk.trainers[0].messages.append(doubles.outcome(task(1), desk.run))
    desk.clock.now += 1
    desk.send(task(2))
    assert not desk.steps(3)
    assert [message["child"] for message in last_words(desk) if message["say"] == "returned"] == [2]


def test_a_worker_without_work_leaves(desk: Desk) -> None:
    desk.send(task(0))
    desk.steps(3)
    assert desk.wait(59)
    assert not desk.wait(1)
    assert bye(desk) == "idle"


def test_a_worker_at_work_is_not_idle(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    assert desk.wait(100)
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    assert desk.wait(1) and desk.wait(58)
    assert not desk.wait(2)


def test_a_damaged_mailbox_makes_it_leave(desk: Desk) -> None:
    """What it did not read, it cannot do; the coordinator sends it to another."""
    path = desk.run / files.assigned_log(1, NAME)
    desk.send(task(0), task(1))
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(bytes(content))
    assert not desk.worker.step()
    assert bye(desk) == "its mailbox is damaged"


def test_it_says_that_it_lives(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    desk.heard()
    for _ in range(3):
        assert desk.wait(5)
    assert desk.wait(4)
    assert desk.said() == ["alive"] * 3


# ---------------------------------------------------------------- coordinators go and come


def test_a_new_coordinator_is_followed(desk: Desk) -> None:
    """What it does not send again is dropped, what is in training goes on and is not trained twice."""
    desk.words[0] = "hang"
    desk.send(task(0), task(1), task(2))
    desk.steps()
    old = desk.mailbox
    desk.open_epoch()
    desk.send(task(0), task(2), task(3))
    old.append([{"do": "stop"}])  # a coordinator that is superseded is not obeyed
    old.close()
    assert desk.steps()
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    assert desk.steps(4)
    assert [message["outcome"]["child"] for message in desk.heard("outcome")] == [0, 2, 3]
    assert len(desk.trainers) == 1


def test_a_new_coordinator_without_a_mailbox_for_it_has_given_it_up(desk: Desk) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    desk.steps()
    desk.open_epoch(with_mailbox=False)
    assert not desk.worker.step()
    assert bye(desk) == "given up by a later coordinator" and desk.trainers[0].killed


def test_a_run_folder_that_is_gone_makes_it_leave(desk: Desk) -> None:
    (desk.run / files.EPOCHS).rename(desk.run / "elsewhere")
    assert not desk.worker.step()


@pytest.mark.parametrize("verdict", ["alive", "gone"])
def test_it_leaves_a_coordinator_that_is_gone_once_its_work_is_done(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, verdict: str
) -> None:
    monkeypatch.setattr(owner, "judge", lambda who: verdict)
    desk.words[0] = "hang"
    desk.send(task(0), task(1))
    assert desk.steps() and desk.wait(60)
    desk.trainers[0].messages.append(doubles.outcome(task(0), desk.run))
    assert desk.steps(4)
    assert len(desk.heard("outcome")) == 2
    assert desk.wait(4.9)  # its successor may come
    assert desk.wait(0.2) == (verdict == "alive")
    assert verdict == "alive" or bye(desk) == "the coordinator is gone"


def test_where_the_coordinator_cannot_be_seen_its_heartbeat_tells(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "judge", lambda who: "unknown")
    monkeypatch.setattr(desk.worker, "_idle_exit_s", 1e9)
    for _ in range(10):
        assert desk.wait(30)
        with open(desk.run / files.heartbeat(1), "ab") as file:
            file.write(b".")
    assert desk.wait(30) and desk.wait(30) and desk.wait(30)
    assert not desk.wait(1)
    assert bye(desk) == "the coordinator is gone"


def test_a_new_coordinators_heartbeat_is_not_mistaken_for_the_old_ones(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "judge", lambda who: "unknown")
    monkeypatch.setattr(desk.worker, "_idle_exit_s", 1e9)
    assert desk.wait(10) and desk.wait(50)
    desk.mailbox.close()
    desk.open_epoch()
    monkeypatch.setattr(desk.worker, "_idle_exit_s", 1e9)
    assert desk.wait(0)
    monkeypatch.setattr(desk.worker, "_idle_exit_s", 1e9)
    assert desk.wait(59)  # both stand at zero beats


# ---------------------------------------------------------------- trainer processes


def standin(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Trainer processes run `code` in place of `learn/child.py`."""
    monkeypatch.setattr(trainers, "TRAINER", ("-c", "import json, os, sys, time\n" + code))


def until(condition: Callable[[], Any]) -> Any:
    """What `condition` gives once it gives something; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError("nothing came")


ECHO = """
print("a library says hello", file=sys.stderr)
print(json.dumps({"ready": sys.argv[2]}), flush=True)
for line in sys.stdin:
    print(json.dumps({"child": json.loads(line)["child"], "objectives": {}}), flush=True)
"""


def test_a_trainer_process_answers_and_leaves_with_its_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin(monkeypatch, ECHO)
    trainer = ProcessTrainer(tmp_path, 7, tmp_path / "log")
    assert until(trainer.poll) == [{"ready": str(tmp_path / files.owner(7))}]
    trainer.send(task(3))
    assert until(trainer.poll) == [{"child": 3, "objectives": {}}]
    assert trainer.died() is None
    assert os.getsid(trainer._process.pid) != os.getsid(0)
    assert trainer._process.stdin is not None
    trainer._process.stdin.close()  # as when the supervisor is killed
    assert until(trainer.died) == "exit code 0\na library says hello"
    assert (tmp_path / "log").read_text() == "a library says hello\n"
    trainer.kill()


def test_a_trainer_is_waited_for_until_it_reports_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin(monkeypatch, ECHO)
    trainer = ProcessTrainer(tmp_path, 7, tmp_path / "log")

    def heard() -> list[Any]:
        trainer.wait(1e6)  # a report may come in two parts
        return trainer.poll()

    assert until(heard) == [{"ready": str(tmp_path / files.owner(7))}]
    trainer.wait(0.001)
    assert trainer.poll() == []
    trainer.send(task(3))
    assert until(heard) == [{"child": 3, "objectives": {}}]
    trainer.kill()


def test_a_trainer_process_that_dies_tells_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin(monkeypatch, "print('Traceback: \\xff', file=sys.stderr); sys.exit(7)")
    trainer = ProcessTrainer(tmp_path, 1, tmp_path / "log")
    reason = until(trainer.died)
    assert reason.startswith("exit code 7\nTraceback: ")
    trainer.send(task(1))  # nobody reads it: `died` has told
    assert trainer.poll() == []
    trainer.kill()


def test_a_trainer_is_heard_and_its_last_words_known_where_its_log_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin(monkeypatch, "print('a warning', file=sys.stderr, flush=True); print('{\"ready\": 1}'); sys.exit(7)")
    trainer = ProcessTrainer(tmp_path, 1, Path("/dev/full"))
    assert until(trainer.poll) == [{"ready": 1}]
    assert until(trainer.died) == "exit code 7\na warning"
    trainer.kill()


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_trainer_process_killed_by_a_signal_tells_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    standin(monkeypatch, "import signal; print('hm', file=sys.stderr, flush=True); signal.pause()")
    trainer = ProcessTrainer(tmp_path, 1, tmp_path / "log")
    until(lambda: trainer.poll() or (tmp_path / "log").exists())
    trainer._process.send_signal(getattr(signal, name))
    assert until(trainer.died) == f"killed by {name}\nhm"
    trainer.kill()


def test_a_large_task_reaches_a_trainer_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin(monkeypatch, "print(json.dumps({'length': len(sys.stdin.readline())}), flush=True); sys.stdin.read()")
    trainer = ProcessTrainer(tmp_path, 1, tmp_path / "log")
    large = task(1) | {"graph": "x" * 300_000}
    trainer.send(large)
    assert until(trainer.poll) == [{"length": len(json.dumps(large)) + 1}]
    trainer.kill()
    assert trainer._process.returncode == -signal.SIGKILL


def test_what_is_printed_among_the_messages_goes_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin(
        monkeypatch,
        "print('Welcome to the cluster!\\n3\\n{\"ready\": \"cpu\"}\\n', end='{torn', flush=True); sys.stdin.read()",
    )
    trainer = ProcessTrainer(tmp_path, 1, tmp_path / "log")
    assert until(trainer.poll) == [{"ready": "cpu"}]
    assert (tmp_path / "log").read_text() == "Welcome to the cluster!\n3\n"
    trainer.kill()


def test_a_trainer_that_floods_its_log_holds_nobody_up_and_is_capped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "LOG_CAP", 300_000)
    standin(monkeypatch, "block = b'0123456789' * 10000\nwhile True: os.write(2, block)")
    trainer = ProcessTrainer(tmp_path, 1, tmp_path / "log")

    def full() -> bool:
        started = time.monotonic()
        trainer.poll()
        assert time.monotonic() - started < 5
        assert len(trainer._tail) <= trainers.TAIL
        return (tmp_path / "log").exists() and (tmp_path / "log").stat().st_size >= 300_000

    until(full)
    for _ in range(20):
        trainer.poll()
    assert (tmp_path / "log").stat().st_size == 300_000
    trainer.kill()


def test_one_reading_of_a_flood_is_bounded() -> None:
    class Flood:
        def read(self, size: int) -> bytes:
            return b"x" * size

    assert len(trainers._drain(Flood())) == trainers.CHUNK * trainers.CHUNKS


def test_serve_is_a_workers_whole_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: a task, a signal, goodbye."""
    standin(monkeypatch, ECHO)
    desk = Desk(tmp_path / "run", Clock())
    desk.worker._done.close()
    (desk.run / files.done_log(NAME)).unlink()
    desk.send(task(0))
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if desk.heard("outcome"):
            for which in handled:  # one or five are the same
                os.kill(os.getpid(), which)
        time.sleep(0.001)

    class Time:
        monotonic, sleep = staticmethod(time.monotonic), staticmethod(nap)

    monkeypatch.setattr(worker, "time", Time)
    monkeypatch.setattr(os, "setsid", lambda: None)
    desk._reader = LogReader(desk.run / files.done_log(NAME))
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {which: signal.getsignal(which) for which in handled}
    try:
        worker.serve(str(desk.run), NAME, {"CUDA_VISIBLE_DEVICES": "1"})
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        assert all(signal.getsignal(which) != before[which] for which in handled)
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    assert bye(desk) == "signalled" and max(naps) <= 0.02
    desk.mailbox.close()


@pytest.mark.parametrize("which", trainers.SIGNALS)
def test_a_signal_that_comes_before_the_worker_is_made_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: signal.Signals
) -> None:
    desk = Desk(tmp_path / "run", Clock())
    desk.worker._done.close()
    (desk.run / files.done_log(NAME)).unlink()
    desk.send(task(0))
    monkeypatch.setattr(os, "setsid", lambda: os.kill(os.getpid(), which))  # any place before Worker() will do
    desk._reader = LogReader(desk.run / files.done_log(NAME))
    before = {signum: signal.getsignal(signum) for signum in trainers.SIGNALS}
    try:
        worker.serve(str(desk.run), NAME)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert [message["say"] for message in desk.heard()] == ["hello", "bye"]
    desk.mailbox.close()


def test_a_signal_to_a_child_of_the_supervisor_is_not_the_supervisors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork has the handler too."""
    before = {signum: signal.getsignal(signum) for signum in trainers.SIGNALS}
    try:
        caught = worker._catch_signals()
        with monkeypatch.context() as patch:
            mine = os.getpid()
            patch.setattr(os, "getpid", lambda: mine + 1)
            signal.raise_signal(signal.SIGTERM)
        assert caught == []
        signal.raise_signal(signal.SIGUSR1)
        assert caught == [signal.SIGUSR1]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_a_trainer_process_is_deaf_to_signals_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals all processes of a job; this process hears them as before."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    standin(
        monkeypatch,
        "print('{}', flush=True)\nfor line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)",
    )
    trainer = ProcessTrainer(tmp_path, 1, tmp_path / "log")
    assert until(trainer.poll) == [{}]
    for which in trainers.SIGNALS:
        trainer._process.send_signal(which)
    trainer.save()
    assert until(trainer.poll) == [{"got": {"do": "save"}}]
    assert trainer.died() is None
    trainer.kill()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


# ---------------------------------------------------------------- a job that begins anew


def test_a_worker_whose_job_begins_anew_leaves_without_a_word(desk: Desk) -> None:
    """It would train all it was ever given again, and write over weights that are on record."""
    desk.send(task(0), task(1))
    desk.steps(3)
    before = (desk.run / files.done_log(NAME)).read_bytes()
    assert desk.heard("outcome")
    again = Worker(desk.run, NAME, desk._start_trainer)
    assert not again.step()
    assert len(desk.trainers) == 1 and (desk.run / files.done_log(NAME)).read_bytes() == before


@pytest.mark.parametrize("what", ["code", "image"])
def test_a_worker_leaves_a_coordinator_of_another_version_or_whose_workers_are_in_another_image(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It would train children otherwise than that one has on record."""
    desk.send(task(0))
    assert desk.steps()
    desk.open_epoch()
    assert desk.steps(2)
    if what == "code":
        monkeypatch.setattr(lease, "__version__", "9.9")
    desk.words[1] = "hang"
    desk.send(task(1))
    assert desk.steps()
    desk.open_epoch(image="0123" if what == "image" else None)
    assert desk.steps(2) and desk.trainers[0].num_saves == 1  # its child goes on elsewhere
    desk.trainers[0].messages.append(saved(1))
    assert not desk.steps(2) and desk.heard("bye")[0]["reason"] == worker.OTHER


@pytest.mark.parametrize("where", ["the log", "the list of epochs", "the mailbox"])
def test_a_worker_outlives_a_file_system_that_is_away(desk: Desk, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.steps()
    back_at = desk.clock.now + 60
    owner, name = {"the log": (os, "write"), "the list of epochs": (files, "epochs"),
                   "the mailbox": (worker.LogReader, "poll")}[where]  # fmt: skip
    if where == "the log":  # not even what was written of a line can be taken back meanwhile
        cut = os.ftruncate
        monkeypatch.setattr(os, "ftruncate", lambda file, size: away() if desk.clock.now < back_at else cut(file, size))
    real = getattr(owner, name)

    def away(*args: Any, **options: Any) -> Any:
        if desk.clock.now < back_at:
            if name == "write" and args:
                real(args[0], args[1][:40])
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **options)

    monkeypatch.setattr(owner, name, away)
    desk.clock.now += worker.BEAT_S
    assert desk.steps() and desk.clock.now >= back_at and not desk.trainers[0].killed
    assert desk.heard("alive") and not desk._reader.num_damaged
    back_at = desk.clock.now + worker.OUTAGE_S + 100
    desk.clock.now += worker.BEAT_S
    with pytest.raises(OSError, match="Input/output error"):
        desk.steps()


@pytest.mark.parametrize("number", sorted(files.STORAGE_ERRORS))
def test_any_trouble_of_a_file_system_is_waited_for(desk: Desk, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    back_at, real = desk.clock.now + 30, files.epochs

    def away(run: Path) -> list[int]:
        if desk.clock.now < back_at:
            raise OSError(number, os.strerror(number))
        return real(run)

    monkeypatch.setattr(files, "epochs", away)
    assert desk.steps() and desk.clock.now >= back_at


@pytest.mark.parametrize("what", ["started", "epoch", "alive"])
def test_what_a_worker_waits_for_a_file_system_is_no_time_of_its_childs(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    desk.words[0] = "hang"
    real, back_at = LogWriter.append, list[float]()

    def away(log: LogWriter, messages: list[Message], **options: Any) -> None:
        if messages[0]["say"] == what and not back_at:
            back_at.append(desk.clock.now + 200)
        if back_at and desk.clock.now < back_at[0]:
            desk.clock.now += 30  # a soft mount tells late
            raise OSError(errno.EIO, "Input/output error")
        real(log, messages, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LogWriter, "append", lambda log, messages, **options: away(log, list(messages), **options))
        patch.setattr(desk, "mailbox", SimpleNamespace(append=partial(real, desk.mailbox)))
        desk.send(task(0))
        assert desk.steps(1)
        desk.trainers[0].messages.append({"child": 0, "attempt": "e1a1", "epoch": 1})
        desk.clock.now += worker.BEAT_S
        assert desk.steps(3) and desk.clock.now >= back_at[0] and not desk.heard("outcome")
    assert desk.wait(100) and not desk.heard("outcome")
    assert desk.wait(30) and desk.heard("outcome")[0]["outcome"]["failure"]["kind"] == "timeout"


def test_what_a_report_waits_for_is_not_taken_for_its_childs_length(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the longest so far it is judged whether another child is begun near the end of the worker's time."""
    append, back_at = LogWriter.append, desk.clock.now + 40

    def away(log: LogWriter, messages: Any, **options: Any) -> None:
        if messages[0].get("say") == "outcome" and desk.clock.now < back_at:
            raise OSError(errno.EIO, "Input/output error")
        append(log, messages, **options)

    monkeypatch.setattr(LogWriter, "append", away)
    desk.send(task(0))
    assert desk.steps() and desk.heard("outcome") and desk.clock.now >= back_at
    assert desk.worker._longest_s < 10


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), "signalled"])
def test_what_will_not_pass_is_not_waited_for(desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """Another error, or a worker that must leave before long."""

    def away(run: Path) -> Any:
        raise OSError(errno.EIO, "away") if error == "signalled" else error

    monkeypatch.setattr(files, "epochs", away)
    if error == "signalled":
        desk.worker.caught.append(signal.SIGTERM)
    before = desk.clock.now
    with pytest.raises(OSError, match="away|gone"):
        desk.worker.step()
    assert desk.clock.now == before


def test_an_owner_or_a_trainer_that_cannot_be_read_or_started_now_is_waited_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_at = desk.clock.now + 100

    def when_back(real: Any) -> Any:
        def do(*args: Any) -> Any:
            if desk.clock.now < back_at:
                raise OSError(errno.ESTALE, "Stale file handle")
            return real(*args)

        return do

    monkeypatch.setattr(desk.worker, "_start_trainer", when_back(desk.worker._start_trainer))
    desk.worker._timeout_s = 60
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.steps(3) and desk.clock.now >= back_at and len(desk.trainers) == 1
    assert not desk.heard("outcome")  # its time begins when it does
    back_at = desk.clock.now + 100
    desk.open_epoch()
    read = Path.read_text
    away = when_back(read)
    monkeypatch.setattr(Path, "read_text", lambda path: (away if path.name == "owner.json" else read)(path))
    with pytest.raises(OSError, match="Stale"):
        worker._owner(desk.run, 1)
    assert desk.steps() and desk.clock.now >= back_at and not desk.heard("bye")
    back_at = desk.clock.now + 100
    (desk.run / files.done_log("late")).parent.mkdir()
    (desk.run / files.assigned_log(2, "late")).parent.mkdir()
    (desk.run / files.assigned_log(2, "late")).touch()
    assert Worker(desk.run, "late", desk._start_trainer, outage_s=worker.OUTAGE_S)._epoch == 2
    assert desk.clock.now >= back_at


def test_a_signal_is_known_where_a_worker_waits(desk: Desk) -> None:
    """There it spends its time, and there its trainer dies of the same signal."""
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.steps()
    wait = desk.trainers[0].wait

    def struck(seconds: float) -> None:
        desk.worker.caught.append(signal.SIGTERM)
        desk.trainers[0].death = "killed by SIGBUS"
        wait(seconds)

    desk.trainers[0].wait = struck  # type: ignore[method-assign]
    desk.worker.wait()
    assert not desk.steps(3)
    assert [message["say"] for message in desk.heard() if message["say"] in ("crashed", "unfit", "bye")] == ["bye"]


@pytest.mark.parametrize("ready", [True, False])
def test_a_trainer_that_dies_with_the_signal_to_its_worker_is_at_no_fault(desk: Desk, ready: bool) -> None:
    """Slurm sends it to the process that has mounted the image too, and then what is not in memory cannot be read."""
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.steps()
    if not ready:
        desk.worker._ready = False
    desk.worker.caught.append(signal.SIGUSR2)
    desk.trainers[0].death = "killed by SIGBUS"
    assert not desk.steps(3)
    said = desk.heard()
    assert [message["say"] for message in said if message["say"] in ("crashed", "unfit", "bye")] == ["bye"]
    assert said[-1]["reason"] == worker.SIGNALLED and len(desk.trainers) == 1


def test_time_in_which_the_worker_was_stopped_is_no_time_of_its_childs(desk: Desk) -> None:
    """As by `scontrol suspend`: the process is sent SIGCONT when it goes on."""
    desk.words[0] = "hang"
    desk.send(task(0))
    assert desk.steps() and desk.wait(60)
    desk.clock.now += 3600
    desk.worker.continued.append(signal.SIGCONT)
    assert desk.wait(50) and not desk.trainers[0].killed
    assert desk.wait(50) and not desk.trainers[0].killed
    assert desk.wait(15) and desk.trainers[0].killed
