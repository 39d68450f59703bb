"""The worker's supervisor: follows its mailbox, keeps a trainer at work, reports. Imports no torch.

Decides: what a worker does with an assignment, a crash of its trainer, a signal, the end of its job's time, a
coordinator that is gone or has a successor. Never decides what is trained or whether a child is tried again: the
coordinator does. A worker follows the highest epoch; one that finds no mailbox of its own there was given up, and
leaves. One that must leave, by a signal, for its time or because it is told to, has its child saved first.

Coordinator to worker: `{"do": "train", ...task}`, `{"do": "revoke", child, attempt}` of one that has not begun, and
`{"do": "stop"}`. Worker to coordinator: `{"say": ...}` with hello, ready, alive, started, epoch, checkpoint,
outcome, returned, crashed, storage, unfit, bye, each with the seconds since its hello (`at`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lemonade_hpc import files
from lemonade_hpc.run import owner
from lemonade_hpc.run.log import LogReader, LogWriter, Message
from lemonade_hpc.run.trainers import SIGNALS, ProcessTrainer, Trainer

BEAT_S = 5.0
UNFIT, SIGNALLED, TIME_OVER, TOLD = "unfit", "signalled", "its time is nearly over", "stopped by the coordinator"
"""Why a worker leaves: it cannot start trainers; it was sent a signal; its job ends soon; it is told to."""
OTHER = "its coordinator is of another version or image now"
"""Another one: what it would train is not what that one has on record."""
ORPHAN_S = 60.0
"""A coordinator whose heartbeat stands still for this long is gone. Where files are seen late, four times `stale_s` is
added: the heartbeat is late, a successor looks on for twice as long before it begins, and is then seen late itself."""
ORPHAN_WAIT_S = 5.0
"""How long a worker of this machine that has nothing to do waits for a successor of a coordinator that is gone.

A job does not leave for that: its successor may be in the queue, and the job's place there is worth the wait."""
SPARE_S = 60.0
"""A child is to end, or to be saved, this long before the time limit of the worker's job."""
WORTH_S = 300.0
"""A child that would not end before that is begun all the same where there is this much time: it goes on elsewhere."""
LEAST_WAIT_S = 0.002
"""Time between two looks at its trainer, however fast that one reports."""
SAVE_S = 10.0
"""How long a worker that must leave waits for its child's checkpoint."""
OUTAGE_S, OUTAGE_POLL_S = 300.0, 1.0
"""How long a file system that fails is tried again, and how often: a failover takes minutes."""

Done = TypeVar("Done")


def _owner(run: Path, epoch: int) -> Message | None:
    """Who holds an epoch, and its configuration; None if that is not seen here. Raises OSError."""
    try:
        owned: Message = json.loads((run / files.owner(epoch)).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return owned


def _key(message: Message) -> tuple[int, str]:
    return message["child"], message["attempt"]


class Worker:
    """One worker: `step` until it returns False. `start_trainer(epoch)` is called when the first task arrives.

    `caught`: the signals that its process has got so far; grows. `outage_s`: how long a file system that fails is tried
    again.
    """

    def __init__(
        self, run: Path, name: str, start_trainer: Callable[[int], Trainer], caught: list[int] | None = None,
        outage_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.run, self.name, self._outage_s = run, name, outage_s
        self.caught = [] if caught is None else caught
        self.continued: list[int] = []
        """One for each time that its process was stopped and goes on; cleared when that is taken into account."""
        self._leaving: str | None = None
        """Why, once it must."""
        self._leave_by = math.inf
        self._saved = False
        """Whether its child was saved since."""
        self._start_trainer = start_trainer
        self._trainer: Trainer | None = None
        self._ready = self._unfit = False
        """Whether its trainer has said that it is ready; whether one has died before it did."""
        self._done = LogWriter(run / files.done_log(name))
        self._requeued = not self._done.empty
        """Whether its job has begun anew: a log has one writer, so it leaves without a word."""
        self._epoch = 0
        self._made_of: tuple[Any, Any] = (None, None)
        """The version and the image of its first coordinator, and so its own."""
        self._assigned = LogReader(Path())
        self._queue: deque[Message] = deque()
        self._known: set[tuple[int, str]] = set()
        self._current: Message | None = None
        self._deadline = 0.0
        self._began_at = self._idle_since = self._beat_at = self._pulse_at = self._attended_at = time.monotonic()
        self._pulse = -1
        who = owner.identity()
        node = os.environ.get("SLURMD_NODENAME", who["host"])
        if not self._requeued:
            self._say("hello", gpu=os.environ.get("CUDA_VISIBLE_DEVICES"), node=node, **who)
        self._ends_at, self._longest_s = math.inf, 0.0
        self._late, self.poll_s = files.Patience(files.STALE_S), 1.0
        self._through_outages(self._follow)

    @property
    def signalled(self) -> bool:
        """Whether its process has got a signal."""
        return bool(self.caught)

    def step(self) -> bool:
        """Do what there is to do without waiting; False once the worker has left."""
        if self._requeued:
            return False
        if not self._through_outages(self._follow):
            return self._leave("given up by a later coordinator")
        if not self._epoch:
            return not self.signalled or self._leave(SIGNALLED)
        for message in self._through_outages(self._assigned.poll):
            self._obey(message)
        if self._assigned.num_damaged:
            return self._leave("its mailbox is damaged")
        if not self._unfit:
            self._attend()
        if self._unfit:
            return self._leave(UNFIT)
        now = time.monotonic()
        if self.signalled:
            self._must_leave(SIGNALLED, now)
        elif now >= self._ends_at or (self._current is None and self._out_of_time(now)):
            self._must_leave(TIME_OVER, now)
        if self._leaving is not None and (self._current is None or self._saved or now >= self._leave_by):
            return self._part(self._leaving)
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self._say("alive")
        if self._current or self._queue:
            self._idle_since = now
            return True
        if self._ends_at == math.inf and now - self._idle_since > ORPHAN_WAIT_S and self._orphaned(now):
            return self._leave("the coordinator is gone")
        return now - self._idle_since < self._idle_exit_s or self._leave("idle")

    def wait(self) -> None:
        """Wait for `poll_s`; a trainer that has something to say is heard at once, and goes on with the next child.

        The mailbox is left alone meanwhile: it may be far away.
        """
        until = time.monotonic() + self.poll_s
        while not (self._unfit or self._saved) and (left := until - time.monotonic()) > 0:
            if self._trainer is None:
                time.sleep(left)
            else:
                time.sleep(min(LEAST_WAIT_S, left))
                self._trainer.wait(left)
                self._attend()

    # ------------------------------------------------------------ the coordinator

    def _follow(self) -> bool:
        """Turn to the highest epoch; False if it has no mailbox for this worker, not even late."""
        epoch = max(files.epochs(self.run), default=0)
        if epoch == self._epoch:
            self._late.waits(True)
            return True
        path = self.run / files.assigned_log(epoch, self.name)
        owned = _owner(self.run, epoch) if files.size(path) is not None else None
        if owned is None:
            return self._late.waits(False)
        if self._epoch and (owned.get("code"), owned.get("image")) != self._made_of:
            self._must_leave(OTHER, time.monotonic())  # it is not what that coordinator has its children trained by
            return True
        self._made_of = owned.get("code"), owned.get("image")
        for task in self._queue:  # the new coordinator sends again what it wants done
            self._known.discard(_key(task))
        self._queue.clear()
        self._pulse, self._idle_since = -1, time.monotonic()
        self._owner = owned["owner"]
        cluster = owned["config"]["cluster"]
        self._stale_s = cluster.get("stale_s")
        self._late, self._assigned = files.Patience(self._stale_s), LogReader(path, self._stale_s)
        self._idle_exit_s, self._timeout_s = cluster["idle_exit_min"] * 60, cluster["child_timeout_min"] * 60
        self.poll_s = cluster["poll_s"]
        if not self._epoch and cluster["backend"] == "slurm":
            self._ends_at = self._began_at + cluster["time_min"] * 60 - SPARE_S
        self._epoch = epoch
        return True

    def _orphaned(self, now: float) -> bool:
        """Whether the coordinator is gone: its process, where that can be told, else its heartbeat."""
        verdict = owner.judge(self._owner)
        if verdict != "unknown":
            return verdict == "gone"
        pulse = os.stat(self.run / files.heartbeat(self._epoch)).st_size
        if pulse != self._pulse:
            self._pulse, self._pulse_at = pulse, now
        return now - self._pulse_at > ORPHAN_S + 4 * (self._stale_s or 0)

    def _obey(self, message: Message) -> None:
        if message["do"] == "train":
            if _key(message) not in self._known:
                self._known.add(_key(message))
                self._queue.append(message)
        elif message["do"] == "revoke":
            for task in [task for task in self._queue if _key(task) == _key(message)]:
                self._queue.remove(task)
                self._return(task)
        elif message["do"] == "stop":
            self._must_leave(TOLD, time.monotonic())

    def _return(self, task: Message) -> None:
        self._say("returned", durable=True, child=task["child"], attempt=task["attempt"])

    def _out_of_time(self, now: float) -> bool:
        """Whether a child begun now would be in vain: it would not end, nor get far enough to be worth its checkpoint.

        How long a child takes is judged by the longest so far.
        """
        return now + min(self._longest_s, WORTH_S) > self._ends_at

    def _must_leave(self, reason: str, now: float) -> None:
        """Have the child in training saved, for so long at most, then leave; once begun, further reasons are none."""
        if self._leaving is not None:
            return
        self._leaving, self._leave_by = reason, now
        if self._current is not None and self._trainer is not None and self._ready:
            self._leave_by = now + SAVE_S
            self._trainer.save()

    def _part(self, reason: str) -> bool:
        """Leave, and where time is the reason, give back what may go on elsewhere.

        A child that could not be saved is not among it: it would only come back from the next worker in the same way.
        """
        if reason == TIME_OVER:
            saved = [self._current] if self._current is not None and self._saved else []
            for task in (*saved, *self._queue):
                self._return(task)
        return self._leave(reason)

    # ------------------------------------------------------------ the trainer

    def _forgive_pause(self) -> None:
        """Time in which this process was stopped, and its trainer with it (`scontrol suspend`), is not the child's."""
        now = time.monotonic()
        if self.continued:
            self.continued.clear()
            self._deadline += now - self._attended_at
            self._idle_since += now - self._attended_at
        self._attended_at = now

    def _attend(self) -> None:
        """Hear the trainer, notice its death, start the next task."""
        self._forgive_pause()
        if self._trainer is not None:
            for message in self._trainer.poll():
                self._hear(message)
            reason = self._trainer.died()
            if reason is not None:
                for message in self._trainer.poll():
                    self._hear(message)
                if self.signalled:  # what ended it is the signal's doing: it may also have hit the image's file system
                    self._drop_trainer()
                    return
                if not self._ready:
                    self._say("unfit", reason=reason)
                    self._unfit = True
                    return
                self._bury(reason)
            elif self._current and time.monotonic() > self._deadline:
                self._fail("timeout", f"longer than cluster.child_timeout_min = {self._timeout_s / 60:g} minutes")
        if self._may_begin():
            if self._trainer is None:
                self._ready = False
                self._trainer = self._through_outages(lambda: self._start_trainer(self._epoch))
            self._current = self._queue.popleft()
            self._say("started", child=self._current["child"], attempt=self._current["attempt"])
            self._started_at = time.monotonic()
            self._deadline = self._started_at + self._timeout_s
            self._trainer.send(self._current)

    def _may_begin(self) -> bool:
        leaving = self.signalled or self._leaving is not None
        return bool(self._current is None and self._queue and not leaving and not self._out_of_time(time.monotonic()))

    def _hear(self, message: Message) -> None:
        if "ready" in message:
            self._ready = True
            self._say("ready", device=message["ready"])
        elif "epoch" in message:
            self._say("epoch", **message)
        elif "saved" in message:
            self._say("checkpoint", child=message["child"], attempt=message["attempt"], **message["saved"])
            self._saved = self._leaving is not None
        elif "storage" in message:
            self._say("storage", reason=message["storage"])
            if self._current is not None:  # whoever wants it again sends it again
                self._known.discard(_key(self._current))
                self._current = None
        else:
            self._longest_s = max(self._longest_s, time.monotonic() - self._started_at)
            self._say("outcome", durable=True, outcome=message)
            self._current = None

    def _bury(self, reason: str) -> None:
        """The trainer has died: say what became of its child."""
        current = self._current
        self._drop_trainer()
        if current is not None:
            self._say("crashed", durable=True, child=current["child"], attempt=current["attempt"], reason=reason)

    def _fail(self, kind: str, reason: str) -> None:
        """End the current child as its own failure."""
        assert self._current is not None
        task = {key: self._current[key] for key in ("child", "attempt", "digest")}
        self._drop_trainer()
        self._say("outcome", durable=True, outcome=task | {"failure": {"kind": kind, "reason": reason}})

    def _drop_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.kill()
        self._trainer = self._current = None

    # ------------------------------------------------------------ reports

    def _say(self, what: str, *, durable: bool = False, **rest: Any) -> None:
        at = round(time.monotonic() - self._began_at, 3)
        self._through_outages(lambda: self._done.append([{"say": what, "at": at, **rest}], durable=durable))

    def _through_outages(self, do: Callable[[], Done]) -> Done:
        """Do it, again and again for a while where the file system fails: a worker's place is worth the wait.

        That is no time of its child's, which may wait for the same.
        """
        began, failed = time.monotonic(), False
        while True:
            try:
                done = do()
                break
            except OSError as error:
                over = time.monotonic() - began >= self._outage_s
                if error.errno not in files.OUTAGES or self.signalled or over:
                    raise
            failed = True
            time.sleep(OUTAGE_POLL_S)
        if failed:
            self._deadline += time.monotonic() - began
        return done

    def _leave(self, reason: str) -> bool:
        self._drop_trainer()
        self._say("bye", durable=True, reason=reason)
        self._done.close()
        return False


def serve(run: str, name: str, environment: Mapping[str, str | None] | None = None) -> None:
    """A worker's whole life, in its own process and session; what submitit calls.

    `environment`: variables that its trainers are to see, None those that they are not. Signals are heard from the
    first line on: what follows may wait for a slow file system.
    """
    caught = _catch_signals()
    for key, value in (environment or {}).items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    with contextlib.suppress(PermissionError):  # already the leader of its session
        os.setsid()
    folder = Path(run)
    log = folder / files.WORKERS / name / "trainer.log"
    worker = Worker(folder, name, lambda epoch: ProcessTrainer(folder, epoch, log), caught, OUTAGE_S)
    signal.signal(signal.SIGCONT, lambda number, frame: worker.continued.append(number))
    while worker.step():
        worker.wait()


def _catch_signals() -> list[int]:
    """Remember the signals that this process, and no child of it, gets from now on."""
    caught: list[int] = []
    supervisor = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() == supervisor:
            caught.append(number)

    for which in SIGNALS:
        signal.signal(which, note)
    return caught
