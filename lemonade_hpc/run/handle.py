"""One worker as the coordinator sees it: its mailbox, what it has reported, the children it has.

Decides: what a report says of the worker itself. What follows from it is the coordinator's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lemonade_hpc import files
from lemonade_hpc.run.log import LogReader, LogWriter, Message

Key = tuple[int, str]
"""A child's number and the id of an attempt at it."""


class WorkerHandle:
    """A worker's two logs, which exist, and what is known of it; without an `epoch`, only what it reports."""

    def __init__(self, run: Path, epoch: int | None, name: str, stale_s: float | None = None) -> None:
        self.name = name
        self.tasks: dict[Key, Message] = {}
        """What it was given and has not reported on."""
        self.started: set[Key] = set()
        self._recalled: set[Key] = set()
        self.done: dict[Key, float] = {}
        """Share of each child's training that its last checkpoint holds."""
        self.lived_s = self._busy_s = 0.0
        self._current: Key | None = None
        self._began_s = 0.0
        self._saved_s: dict[Key, float] = {}
        """When each child was begun or, later, a checkpoint of it made, in its worker's seconds."""
        self._ended_s: dict[Key, float] = {}
        self.node: str | None = None
        self.device: str | None = None
        self.trouble = ""
        """Why it cannot start training."""
        self.stopped = False
        """Whether it was told to leave."""
        self.present = False
        """Whether it has been heard of: one that still waits for a machine may do so for hours."""
        self.heard_s: tuple[float, float] | None = None
        """When it was heard first and last, by the coordinator's clock."""
        self.doing = "starting"
        """In words, for people."""
        self.said_bye: str | None = None
        """Why it left."""
        self.last_words = files.Patience(stale_s)
        """How long to wait for them once it has died."""
        self._mailbox = None if epoch is None else LogWriter(run / files.assigned_log(epoch, name))
        self._reader = LogReader(run / files.done_log(name), stale_s)

    @property
    def damaged(self) -> Path | None:
        """Its log, where a report in it is damaged: what it said cannot be known."""
        return self._reader.path if self._reader.num_damaged else None

    @property
    def vanished(self) -> bool:
        """Whether its log is gone: what it says cannot be heard any more."""
        return self._reader.vanished

    def assign(self, keys: Iterable[Key]) -> None:
        """Send it some of its tasks. Raises OSError."""
        assert self._mailbox is not None
        self._mailbox.append([self.tasks[key] for key in keys])

    @property
    def recalling(self) -> int:
        """How many children it has been asked for back and may still return."""
        return len(self._recalled & self.tasks.keys() - self.started)

    def recall(self, *, but: int, only: Callable[[int], bool] = lambda number: True) -> bool:
        """Ask for a child of `only` those back that has not begun, the last one first.

        False if it has none to give, or no more than `but` so many.
        """
        waiting = [key for key in self.tasks if key not in self.started | self._recalled and only(key[0])]
        if len(self.tasks) <= but or not waiting:
            return False
        child, attempt = waiting[-1]
        self._recalled.add(waiting[-1])
        self.tell({"do": "revoke", "child": child, "attempt": attempt})
        return True

    def tell(self, message: Message) -> None:
        """Send what may be lost: with a full disk, a worker finds out by itself."""
        assert self._mailbox is not None
        with contextlib.suppress(OSError):
            self._mailbox.append([message])

    def stop(self) -> None:
        """Tell it to leave, once it has saved the child that it has in training."""
        if not self.stopped:
            self.stopped = True
            self.tell({"do": "stop"})

    def hear(self) -> list[Message]:
        """New reports, in order."""
        messages = self._reader.poll()
        if messages:
            self.present, now = True, time.monotonic()
            self.heard_s = (self.heard_s[0] if self.heard_s else now, now)
        for message in messages:
            self._note(message)
        return messages

    def _note(self, message: Message) -> None:
        """What a report says of the worker itself."""
        say, self.lived_s = message["say"], message.get("at", self.lived_s)
        if say == "hello":
            self.node = message["node"]
        elif say == "ready":
            self.device = message["device"]
            self.doing = f"ready on {self.device}"
        elif say == "started":
            self._current = (message["child"], message["attempt"])
            self.started.add(self._current)
            self._began_s = self._saved_s[self._current] = self.lived_s
            self.doing = f"child {message['child']}"
        elif say == "epoch":
            self.doing = f"child {message['child']}, epoch {message['epoch']}"
        elif say == "checkpoint":
            key = (message["child"], message["attempt"])
            self.done[key], self._saved_s[key] = message["done"], self.lived_s
        elif say in ("outcome", "crashed", "storage"):
            if self._current is not None:
                self._busy_s += self.lived_s - self._began_s
                self._ended_s[self._current] = self.lived_s
            self._current = None
            self.doing = "idle"
        elif say == "unfit":
            self.trouble = message["reason"]
        elif say == "bye":
            self.said_bye = message["reason"]
            self.doing = f"left: {self.said_bye}"

    @property
    def busy_s(self) -> float:
        """Seconds in which it has trained."""
        return self._busy_s + (self.lived_s - self._began_s if self._current else 0.0)

    def unsaved_s(self, key: Key) -> float:
        """Seconds of training that are lost with this child now."""
        return self._ended_s.get(key, self.lived_s) - self._saved_s[key] if key in self._saved_s else 0.0

    def close(self) -> None:
        """Close its mailbox."""
        if self._mailbox is not None:
            self._mailbox.close()
