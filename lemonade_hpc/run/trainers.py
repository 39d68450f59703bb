"""Trainers as a worker's supervisor sees them: a process that trains children, or this process in its place.

Decides: how a trainer is started, spoken to, heard and ended, and how much of its output is kept. Never decides what
follows from what it says (`worker.py`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from lemonade_hpc import files
from lemonade_hpc.run.log import Message

TRAINER = ("-P", "-m", "lemonade_hpc.learn.child")
"""What a trainer process runs; nothing is imported from the working folder (-P), whatever lies there."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Those that ask a worker to leave. Slurm sends some of them to all processes of a job."""
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

    def save(self) -> None:
        """Take a checkpoint of the child in training, soon."""

    def wait(self, seconds: float) -> None:
        """Wait until it reports something, so long at most."""

    def poll(self) -> list[Message]:
        """What it has reported since the last poll."""

    def died(self) -> str | None:
        """How it ended, with the tail of its output; None while it lives."""

    def kill(self) -> None:
        """End it at once."""


class ProcessTrainer:
    """`learn/child.py` in its own process, which leaves when this one does: its standard input closes.

    It is deaf to the signals that ask a worker to leave: those reach it too, and it has a checkpoint to take.
    """

    def __init__(self, run: Path, epoch: int, log: Path) -> None:
        command = [sys.executable, *TRAINER, str(run), str(run / files.owner(epoch))]
        pipe = subprocess.PIPE
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # children inherit the mask, not the handlers
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
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

    def save(self) -> None:  # noqa: D102
        self.send({"do": "save"})

    def wait(self, seconds: float) -> None:  # noqa: D102
        assert self._process.stdout is not None
        select.select([self._process.stdout], [], [], seconds)

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
        with contextlib.suppress(OSError), open(self._log, "ab") as file:  # a full disk, say: the tail is told anyway
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


class InlineTrainer:
    """`learn/child.py` inside this process, which waits for it: for tests and debugging."""

    def __init__(self, run: Path, epoch: int) -> None:
        self._child = importlib.import_module("lemonade_hpc.learn.child")
        self._lab = self._child.open_lab(run, run / files.owner(epoch))
        self._messages: list[Message] = [{"ready": self._lab.device.type}]

    def send(self, task: Message) -> None:  # noqa: D102
        self._messages.append(self._child.train_child(self._lab, task))

    def save(self) -> None:
        """No child is in training when this can be asked."""

    def wait(self, seconds: float) -> None:
        """It reports at once."""

    def poll(self) -> list[Message]:  # noqa: D102
        messages, self._messages = self._messages, []
        return messages

    def died(self) -> str | None:  # noqa: D102
        return None

    def kill(self) -> None:  # noqa: D102
        pass
