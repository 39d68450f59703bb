"""Append-only logs of checked lines: the journal and the mailboxes.

Decides: the format of a line, `<link> <JSON>`, where the link is the start of the SHA-256 of the previous link and the
JSON text: each line vouches for all before it, and a line missing in one copy is known again in another. A log has
exactly one writer, ever, and exists before its reader starts. Nothing is trusted that does not check.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lemonade_hpc.files import Patience, dumps, sync

LINK_LENGTH = 16
START = "0" * LINK_LENGTH

Message = dict[str, Any]


def link(previous: str, body: str) -> str:
    """16 hex digits that stand for a line and everything before it."""
    return hashlib.sha256((previous + body).encode()).hexdigest()[:LINK_LENGTH]


class LogWriter:
    """Appends messages to a log. On a write error the log is cut back to its last whole line and OSError raised."""

    def __init__(self, path: Path, previous: str = START) -> None:
        self.path = path
        self.previous = previous
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size
        self._torn = False
        """Whether more may be in the file than was written whole."""

    @property
    def empty(self) -> bool:
        """Whether nobody has written to it."""
        return self._size == 0

    def append(self, messages: Iterable[Message], *, durable: bool = True) -> None:
        """Write messages in one go, fsynced if durable. Raises OSError, the log as before."""
        self.append_texts([dumps(message) for message in messages], durable=durable)

    def append_texts(self, bodies: Sequence[str], *, durable: bool = True) -> None:
        """`append` of messages that are JSON texts already."""
        previous, text = self.previous, []
        for body in bodies:
            previous = link(previous, body)
            text.append(f"{previous} {body}\n")
        content = "".join(text).encode()
        try:
            if self._torn:
                os.ftruncate(self._file, self._size)
            self._torn, written = True, 0
            while written < len(content):
                written += os.write(self._file, content[written:])
            if durable:
                sync(self._file)
        except OSError as error:
            error.filename = str(self.path)
            with contextlib.suppress(OSError):  # a read-only file system: the torn line fails its check
                os.ftruncate(self._file, self._size)
                self._torn = False
            raise
        self._torn = False
        self._size += len(content)
        self.previous = previous

    def close(self) -> None:
        """Close the file; the log stays."""
        os.close(self._file)

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def parse(content: bytes, previous: str = START) -> tuple[list[tuple[str, str, str | None]], bytes]:
    """Each whole line of a log as (link before it, its link, its JSON text or None if damaged), and the torn rest."""
    *whole, rest = content.split(b"\n")
    lines: list[tuple[str, str, str | None]] = []
    for raw in whole:
        stated, _, body = raw.decode(errors="replace").partition(" ")
        lines.append((previous, stated, body if link(previous, body) == stated else None))
        previous = stated
    return lines, rest


def walk(copies: Iterable[bytes]) -> list[tuple[str, str]]:
    """The longest intact sequence of (link, JSON text) that the copies of one log hold together.

    A flipped bit, a lost line or a cut in one copy is bridged by the other: any line follows the link before it.
    """
    follow: dict[str, tuple[str, str]] = {}
    for content in copies:
        for before, stated, body in parse(content)[0]:
            if body is not None:
                follow[before] = (stated, body)
    found: list[tuple[str, str]] = []
    at = START
    while at in follow:
        found.append(follow[at])
        at = follow[at][0]
    return found


class LogReader:
    """Follows a log that another process appends to, re-opened at every poll: whole, checked messages only.

    Where the other one is on another machine, whose files are seen up to `stale_s` late, a log may end before what was
    read of it already, and a line may be damaged for a while: zeros stand where only its size is known.
    """

    def __init__(self, path: Path, stale_s: float | None = None) -> None:
        self.path = path
        self.num_damaged = 0
        self.vanished = False
        """Whether the log, which existed before its reader, is gone and has been so for longer than it may be late."""
        self._absence = Patience(stale_s)
        self._patience = Patience(stale_s)
        self._offset = 0
        self._previous = START

    def poll(self) -> list[Message]:
        """New messages since the last poll, in order. A damaged line is counted and passed over."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            self.vanished = not self._absence.waits(False)
            return []
        self._absence.waits(True)
        lines, rest = parse(content, self._previous)
        sound = next((k for k, (_, _, body) in enumerate(lines) if body is None), len(lines))
        if self._patience.waits(sound == len(lines)):
            *whole, rest = content.split(b"\n", sound)
            lines = lines[:sound]
        self._offset += len(content) - len(rest)
        if lines:
            self._previous = lines[-1][1]
        bodies = [body for _, _, body in lines if body is not None]
        self.num_damaged += len(lines) - len(bodies)
        return [json.loads(body) for body in bodies]
