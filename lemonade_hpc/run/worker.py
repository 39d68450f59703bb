"""The worker's supervisor: follows its mailbox, keeps a trainer at work, reports. Imports no torch.

Decides: what a worker does with an assignment, a crash of its trainer, a signal, a coordinator that is gone or has a
successor. Never decides what is trained or whether a child is tried again: that is the coordinator's. A worker follows
the highest epoch; one that finds no mailbox of its own there was given up, and leaves.

Coordinator to worker: `{"do": "train", ...task}`, `{"do": "revoke", child, attempt}` of one that has not begun, and
`{"do": "stop"}` at once. Worker to coordinator: `{"say": ...}` with hello, ready, alive, started, epoch, outcome,
returned, crashed, storage, unfit, bye.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from lemonade_hpc import files
from lemonade_hpc.run import owner
from lemonade_hpc.run.log import LogReader, LogWriter, Message

TRAINER = ("-m", "lemonade_hpc.learn.child")
"""What a trainer process runs."""
BEAT_S = 5.0
UNFIT = "unfit"
"""Why a worker leaves that cannot start trainers."""
ORPHAN_S = 60.0
"""A coordinator whose heartbeat stands still for this long is gone. Where files are seen late, four times `stale_s` is
added: the heartbeat is late, a successor looks on for twice as long before it begins, and is then seen late itself."""
ORPHAN_WAIT_S = 5.0
"""How long a worker that has finished its work waits for a successor of a coordinator that is gone."""
SPARE_S = 60.0
"""A child is to end this long before the time limit of the worker's job."""
LOG_CAP = 2**20
TAIL = 3000
"""Bytes of trainer output that are kept on file, and that a report of a crash quotes."""
CHUNK = 2**16
CHUNKS = 16
"""How much of a trainer's output is read in one go: one that never stops writing must not keep its supervisor busy."""


class Trainer(Protocol):
    """What trains children one after another: a process of its own, or this one (`inline`)."""

    def send(self, task: Message) -> None:
        """Start on a task."""

    def poll(self) -> list[Message]:
        """What it has reported since the last poll."""

    def died(self) -> str | None:
        """How it ended, with the tail of its output; None while it lives."""

    def kill(self) -> None:
        """End it at once."""


class ProcessTrainer:
    """`learn/child.py` in its own process, which leaves when this one does: its standard input closes."""

    def __init__(self, run: Path, epoch: int, log: Path) -> None:
        command = [sys.executable, *TRAINER, str(run), str(run / files.owner(epoch))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self._log = log
        self._tail = b""
        self._rest = b""
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    def send(self, task: Message) -> None:  # noqa: D102
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `died` will tell
            self._process.stdin.write((json.dumps(task) + "\n").encode())
            self._process.stdin.flush()

    def poll(self) -> list[Message]:  # noqa: D102
        self._keep(_drain(self._process.stderr))
        *lines, self._rest = (self._rest + _drain(self._process.stdout)).split(b"\n")
        messages = []
        for line in lines:
            message = _message(line)
            if message is None:  # something printed it before `learn/child.py` could turn such output away
                self._keep(line + b"\n")
            else:
                messages.append(message)
        return messages

    def died(self) -> str | None:  # noqa: D102
        code = self._process.poll()
        if code is None:
            return None
        self._keep(_drain(self._process.stderr))
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}\n{self._tail.decode(errors='replace')}".strip()

    def kill(self) -> None:  # noqa: D102
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # a task that it did not read any more
                stream.close()

    def _keep(self, output: bytes) -> None:
        """Append to the log up to its cap, and remember the tail."""
        if not output:
            return
        self._tail = (self._tail + output)[-TAIL:]
        with open(self._log, "ab") as file:
            file.write(output[: max(0, LOG_CAP - file.tell())])


def _drain(stream: Any) -> bytes:
    """What can be read without waiting."""
    parts = []
    for _ in range(CHUNKS):
        part = stream.read(CHUNK)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def _message(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _owner(run: Path, epoch: int) -> Message | None:
    """Who holds an epoch, and its configuration; None if that is not seen here."""
    try:
        owned: Message = json.loads((run / files.owner(epoch)).read_text())
    except (OSError, ValueError):
        return None
    return owned


def _key(message: Message) -> tuple[int, str]:
    return message["child"], message["attempt"]


class InlineTrainer:
    """`learn/child.py` inside this process, which waits for it: for tests and debugging."""

    def __init__(self, run: Path, epoch: int) -> None:
        self._child = importlib.import_module("lemonade_hpc.learn.child")
        self._lab = self._child.open_lab(run, run / files.owner(epoch))
        self._messages: list[Message] = [{"ready": self._lab.device.type}]

    def send(self, task: Message) -> None:  # noqa: D102
        self._messages.append(self._child.train_child(self._lab, task))

    def poll(self) -> list[Message]:  # noqa: D102
        messages, self._messages = self._messages, []
        return messages

    def died(self) -> str | None:  # noqa: D102
        return None

    def kill(self) -> None:  # noqa: D102
        pass


class Worker:
    """One worker: `step` until it returns False. `start_trainer(epoch)` is called when the first task arrives."""

    def __init__(self, run: Path, name: str, start_trainer: Callable[[int], Trainer]) -> None:
        self.run, self.name = run, name
        self.signalled = False
        self._start_trainer = start_trainer
        self._trainer: Trainer | None = None
        self._ready = False
        self._done = LogWriter(run / files.done_log(name))
        self._epoch = 0
        self._assigned = LogReader(Path())
        self._queue: deque[Message] = deque()
        self._known: set[tuple[int, str]] = set()
        self._current: Message | None = None
        self._deadline = 0.0
        self._began_at = self._idle_since = self._beat_at = self._pulse_at = time.monotonic()
        self._pulse = -1
        self._say("hello", gpu=os.environ.get("CUDA_VISIBLE_DEVICES"), **owner.identity())
        self._ends_at, self._longest_s = math.inf, 0.0
        self._late, self.poll_s = files.Patience(files.STALE_S), 1.0
        self._follow()

    def step(self) -> bool:
        """Do what there is to do without waiting; False once the worker has left."""
        if self.signalled:
            return self._leave("signalled")
        if not self._follow():
            return self._leave("given up by a later coordinator")
        if not self._epoch:
            return True
        for message in self._assigned.poll():
            if not self._obey(message):
                return self._leave("stopped by the coordinator")
        if self._assigned.num_damaged:
            return self._leave("its mailbox is damaged")
        if not self._attend():
            return self._leave(UNFIT)
        now = time.monotonic()
        if self._current is None and self._out_of_time(now):
            for task in self._queue:
                self._return(task)
            return self._leave("its time is nearly over")
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self._say("alive")
        if self._current or self._queue:
            self._idle_since = now
            return True
        if now - self._idle_since > ORPHAN_WAIT_S and self._orphaned(now):
            return self._leave("the coordinator is gone")
        return now - self._idle_since < self._idle_exit_s or self._leave("idle")

    # ------------------------------------------------------------ the coordinator

    def _follow(self) -> bool:
        """Turn to the highest epoch; False if it has no mailbox for this worker, not even late."""
        epoch = max(files.epochs(self.run), default=0)
        if epoch == self._epoch:
            self._late.waits(True)
            return True
        path = self.run / files.assigned_log(epoch, self.name)
        owned = _owner(self.run, epoch) if path.exists() else None
        if owned is None:
            return self._late.waits(False)
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

    def _obey(self, message: Message) -> bool:
        """Carry out one message; False for `stop`."""
        if message["do"] == "train":
            if _key(message) not in self._known:
                self._known.add(_key(message))
                self._queue.append(message)
        elif message["do"] == "revoke":
            for task in [task for task in self._queue if _key(task) == _key(message)]:
                self._queue.remove(task)
                self._return(task)
        return bool(message["do"] != "stop")

    def _return(self, task: Message) -> None:
        self._say("returned", durable=True, child=task["child"], attempt=task["attempt"])

    def _out_of_time(self, now: float) -> bool:
        """Whether a child as long as the longest so far would not end before the job does."""
        return now + self._longest_s > self._ends_at

    # ------------------------------------------------------------ the trainer

    def _attend(self) -> bool:
        """Hear the trainer, notice its death, start the next task; False if trainers cannot start here."""
        if self._trainer is not None:
            for message in self._trainer.poll():
                self._hear(message)
            reason = self._trainer.died()
            if reason is not None:
                for message in self._trainer.poll():
                    self._hear(message)
                if not self._ready:
                    self._say("unfit", reason=reason)
                    return False
                self._bury(reason)
            elif self._current and time.monotonic() > self._deadline:
                self._fail("timeout", f"longer than cluster.child_timeout_min = {self._timeout_s / 60:g} minutes")
        if self._current is None and self._queue and not self._out_of_time(time.monotonic()):
            self._started_at = time.monotonic()
            self._current = self._queue.popleft()
            self._deadline = time.monotonic() + self._timeout_s
            if self._trainer is None:
                self._ready = False
                self._trainer = self._start_trainer(self._epoch)
            self._say("started", child=self._current["child"], attempt=self._current["attempt"])
            self._trainer.send(self._current)
        return True

    def _hear(self, message: Message) -> None:
        if "ready" in message:
            self._ready = True
            self._say("ready", device=message["ready"])
        elif "epoch" in message:
            self._say("epoch", **message)
        elif "storage" in message:
            self._say("storage", reason=message["storage"])
            if self._current is not None:  # whoever wants it again sends it again
                self._known.discard(_key(self._current))
                self._current = None
        else:
            self._say("outcome", durable=True, outcome=message)
            self._longest_s = max(self._longest_s, time.monotonic() - self._started_at)
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
        self._done.append([{"say": what, **rest}], durable=durable)

    def _leave(self, reason: str) -> bool:
        self._drop_trainer()
        self._say("bye", durable=True, reason=reason)
        self._done.close()
        return False


def serve(run: str, name: str, environment: Mapping[str, str | None] | None = None) -> None:
    """A worker's whole life, in its own process and session; what submitit calls.

    `environment`: variables that its trainers are to see, None those that they are not.
    """
    for key, value in (environment or {}).items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    with contextlib.suppress(PermissionError):  # already the leader of its session
        os.setsid()
    folder = Path(run)
    log = folder / files.WORKERS / name / "trainer.log"
    worker = Worker(folder, name, lambda epoch: ProcessTrainer(folder, epoch, log))

    def stop(number: int, frame: FrameType | None) -> None:
        worker.signalled = True

    for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(which, stop)
    while worker.step():
        time.sleep(worker.poll_s)
