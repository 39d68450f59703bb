"""One worker as the coordinator sees it: its mailbox, what it has reported, the children it has.

Decides: what a report says of the worker itself. What follows from it is the coordinator's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from lemonade_hpc import files
from lemonade_hpc.run.log import LogReader, LogWriter, Message

Key = tuple[int, str]
"""A child's number and the id of an attempt at it."""


class WorkerHandle:
    """A worker's two logs, which exist, and what is known of it."""

    def __init__(self, run: Path, epoch: int, name: str, stale_s: float | None = None) -> None:
        self.name = name
        self.tasks: dict[Key, Message] = {}
        """What it was given and has not reported on."""
        self.started: set[Key] = set()
        self._recalled: set[Key] = set()
        self.present = False
        """Whether it has been heard of: one that still waits for a machine may do so for hours."""
        self.doing = "starting"
        """In words, for people."""
        self.said_bye: str | None = None
        """Why it left."""
        self.last_words = files.Patience(stale_s)
        """How long to wait for them once it has died."""
        self._mailbox = LogWriter(run / files.assigned_log(epoch, name))
        self._reader = LogReader(run / files.done_log(name), stale_s)

    @property
    def damaged(self) -> Path | None:
        """Its log, where a report in it is damaged: what it said cannot be known."""
        return self._reader.path if self._reader.num_damaged else None

    def assign(self, key: Key) -> None:
        """Send it one of its tasks. Raises OSError."""
        self._mailbox.append([self.tasks[key]])

    @property
    def recalling(self) -> int:
        """How many children it has been asked for back and may still return."""
        return len(self._recalled & self.tasks.keys() - self.started)

    def recall(self) -> bool:
        """Ask for a child back that waits behind another, the last one first; False if it has none to give."""
        waiting = [key for key in self.tasks if key not in self.started and key not in self._recalled]
        if len(self.tasks) < 2 or not waiting:
            return False
        child, attempt = waiting[-1]
        self._recalled.add(waiting[-1])
        self.tell({"do": "revoke", "child": child, "attempt": attempt})
        return True

    def tell(self, message: Message) -> None:
        """Send what may be lost: with a full disk, a worker finds out by itself."""
        with contextlib.suppress(OSError):
            self._mailbox.append([message])

    def hear(self) -> list[Message]:
        """New reports, in order."""
        messages = self._reader.poll()
        self.present |= bool(messages)
        for message in messages:
            say = message["say"]
            if say == "ready":
                self.doing = f"ready on {message['device']}"
            elif say == "started":
                self.started.add((message["child"], message["attempt"]))
                self.doing = f"child {message['child']}"
            elif say == "epoch":
                self.doing = f"child {message['child']}, epoch {message['epoch']}"
            elif say in ("outcome", "crashed"):
                self.doing = "idle"
            elif say == "bye":
                self.said_bye = message["reason"]
        return messages

    def close(self) -> None:
        """Close its mailbox."""
        self._mailbox.close()
