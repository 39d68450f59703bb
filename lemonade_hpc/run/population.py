"""The finished children of a run, in sealed files and in the journals.

Decides: which files hold the population (the layout inside is `store.py`'s), when they are written, and how one is
rebuilt from the journals. A file bears the epoch that wrote it in its name, so that none has two writers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lemonade_hpc import __version__, files
from lemonade_hpc.run import record, store
from lemonade_hpc.run.history import History
from lemonade_hpc.run.journal import Event
from lemonade_hpc.search import evolution
from lemonade_hpc.search.evolution import Problem

Row = dict[str, Any]
"""A child as the record states it when it was asked, with its `outcome`."""


def finished(run: Path, history: History) -> list[Row]:
    """Every finished child, by number. Raises StoreError for a damaged sealed file."""
    rows = [row for event in history.sealed for row in read(run, event)]
    rows += [row for row in history.unsealed.values() if "outcome" in row]
    return sorted(rows, key=lambda row: row["number"])


def read(run: Path, event: Event) -> list[Row]:
    """The children in the file that an event names by `file` and `sha256`. Raises StoreError."""
    return store.read(run / event["file"], event["sha256"]).children


def damage(run: Path, event: Event) -> str | None:
    """What is wrong with the file that an event names by `file` and `sha256`; None if nothing."""
    try:
        read(run, event)
    except store.StoreError as error:
        return str(error)
    return None


def rebuilt(events: list[Event], first: int, last: int) -> list[Row]:
    """The children first..last-1 as the journals have them."""
    asked = {child["number"]: child for event in events if event["event"] == "asked" for child in event["children"]}
    outcomes = {event["outcome"]["child"]: event["outcome"] for event in events if event["event"] == "committed"}
    return [asked[number] | {"outcome": outcomes[number]} for number in range(first, last)]


# ---------------------------------------------------------------- writing: each returns what is to be recorded


def seal(run: Path, history: History, count: int, epoch: int) -> Event | None:
    """Write the first `count` unsealed children to an immutable file, once all of them are finished."""
    due = history.sealable(count)
    if due is None:
        return None
    rows = [history.unsealed[number] for number in range(*due)]
    return {"event": "sealed", "children": list(due), **_store(run, history, _sealed(due, epoch), rows)}


def mend(run: Path, history: History, epoch: int) -> Iterator[tuple[Event, str]]:
    """Write sealed files again that are damaged or gone, from the journals; each event with the reason."""
    events: list[Event] = []
    for event in list(history.sealed):
        reason = damage(run, event)
        if reason is not None:
            if not events:
                record.load(run, history.state.problem, events)
            first, last = event["children"]
            path = _sealed((first, last), epoch)
            stored = _store(run, history, path, rebuilt(events, first, last))
            yield event | stored, f"{reason}. It was rebuilt from the journals as {path}"


def complete(run: Path, history: History, epoch: int) -> Event:
    """Write the whole population to one file. Raises StoreError for a damaged sealed file."""
    state = history.state
    stored = _store(run, history, Path(f"population.e{epoch}.h5"), finished(run, history))
    volume = evolution.hypervolume(state.problem, state.front.values)
    return {"event": "complete", "front": list(state.front.numbers), "hypervolume": volume, **stored}


def _sealed(children: tuple[int, int], epoch: int) -> Path:
    first, last = children
    return files.STATE / f"children-{first:06d}-{last - 1:06d}.e{epoch}.h5"


def _store(run: Path, history: History, path: Path, rows: list[Row]) -> dict[str, Any]:
    """Write a file of children; its path and checksum for the record."""
    content = _encode(run, history.state.problem, rows)
    files.make_folder((run / path).parent)
    files.write(run / path, content)
    return {"file": str(path), "sha256": files.sha256(content)}


def _encode(run: Path, fixed: Problem, rows: list[Row]) -> bytes:
    attributes = {
        "run": record.read_identity(run)["run"],
        "code": __version__,
        "cheap": list(fixed.cheap),
        "expensive": [o.name for o in fixed.config.objectives if o.name not in fixed.cheap],
    }
    return store.encode(rows, attributes)
