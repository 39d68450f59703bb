"""The journals of a run: one for each epoch, written twice, so that damage to one copy is bridged by the other.

Decides: which recorded lines are in effect. An epoch is one coordinator's life; the first line of its journal says
after which line of the epoch before it continues. Lines that a superseded coordinator still writes stand behind that
point, and are void. Knows nothing of what an event means.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemonade_hpc import files
from lemonade_hpc.run.log import LogWriter, parse, walk

Event = dict[str, Any]
Lines = list[tuple[str, str]]
"""Intact lines as (link, JSON text)."""


class RecordError(RuntimeError):
    """The record is damaged beyond repair: says where and what is lost. Exit code 1."""


@dataclass(frozen=True)
class Journals:
    """What the journals of a run say together, oldest epoch first, and what was damaged."""

    epochs: list[tuple[int, Lines]]
    warnings: list[str]
    mended: dict[Path, bytes]
    """Copies that lack lines, as they should be; `lease.open_epoch` puts them back."""
    late: list[str]
    """First copies that end early: cut, or on another machine's file system and seen late."""

    @property
    def end(self) -> tuple[int, str]:
        """The last epoch and the link of its last line; (0, "") of a run without any."""
        return (self.epochs[-1][0], self.epochs[-1][1][-1][0]) if self.epochs else (0, "")


def read(run: Path, newest: int | None = None) -> Journals:
    """Read all epochs that count, or those up to `newest`; raises RecordError for what both copies have lost."""
    found = Journals([], [], {}, [])
    newest = wanted = max(files.epochs(run), default=0) if newest is None else newest
    until: str | None = None
    while wanted:
        folder = run / files.epoch_folder(wanted)
        copies = _copies(run, wanted)
        lines = walk(copies.values())
        if until is not None:
            links = [link for link, _ in lines]
            if until not in links:
                raise RecordError(
                    f"{folder}: both copies of the journal are damaged after line {len(lines)}; a later coordinator "
                    f"has seen more. What was recorded in between is lost."
                )
            lines = lines[: links.index(until) + 1]
        if not lines:
            raise RecordError(f"{folder}: both copies of the journal have lost their first line")
        if until is None and _more(copies, lines):
            raise RecordError(
                f"{folder}: both copies of the journal are damaged at line {len(lines) + 1}, and more was recorded "
                f"after it. What that line said is lost, and without it nothing after it holds. Nothing was changed; "
                f"put back one copy from a backup"
            )
        _compare(found, copies, lines, newest=wanted == newest)
        found.epochs.insert(0, (wanted, lines))
        before = json.loads(lines[0][1])["continues"]
        wanted, until = (before["epoch"], before["link"]) if before else (0, None)
    return found


def _copies(run: Path, epoch: int) -> dict[Path, bytes]:
    """Both copies of an epoch's journal. The one that is written last is read first: a living writer is no damage."""
    paths = [run / path for path in files.journals(epoch)]
    contents = {path: path.read_bytes() if files.size(path) else b"" for path in reversed(paths)}
    return {path: contents[path] for path in paths}


def _more(copies: dict[Path, bytes], lines: Lines) -> bool:
    """Whether the copies held more than can be read: sound lines behind a gap, or another whole line in both.

    A crash leaves neither: nothing is written behind a line that is not whole, and nothing follows from a line that is
    not in both.
    """
    known = {link for link, _ in lines}
    behind = any(body is not None and link not in known for c in copies.values() for _, link, body in parse(c)[0])
    return behind or all(content.count(b"\n") > len(lines) for content in copies.values())


def _compare(found: Journals, copies: dict[Path, bytes], lines: Lines, *, newest: bool) -> None:
    """Note which copies lack lines.

    A second copy short of its end is what a crash leaves, or a writer at work: no warning. A first one may be late.
    """
    for k, (path, content) in enumerate(copies.items()):
        own = len(walk([content]))
        if own >= len(lines):
            continue
        found.mended[path] = "".join(f"{link} {body}\n" for link, body in lines).encode()
        short = newest and content.count(b"\n") == own
        if not (short and k == 1):
            (found.late if short else found.warnings).append(
                f"{path}: damaged after line {own}; {len(lines) - own} lines were read from the other copy"
            )


class Journal:
    """The two copies of one epoch's journal, written one after the other."""

    def __init__(self, run: Path, epoch: int, link: str) -> None:
        self.epoch = epoch
        self._writers = [LogWriter(run / path, link) for path in files.journals(epoch)]
        self._error: OSError | None = None

    def append(self, events: list[Event]) -> None:
        """Make events durable in both copies.

        Raises OSError, and from then on always: the copies may differ, and only reading them again tells what counts.
        """
        if self._error is not None:
            raise self._error
        bodies = [files.dumps(event) for event in events]
        try:
            for writer in self._writers:
                writer.append_texts(bodies)
        except OSError as error:
            self._error = error
            raise

    def close(self) -> None:
        """Close both files."""
        for writer in self._writers:
            writer.close()
