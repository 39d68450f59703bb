"""The finished children of a run, from sealed files and journals.

Decides: how the two are put together, and how one is rebuilt from the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lemonade_hpc import __version__
from lemonade_hpc.run import record, store
from lemonade_hpc.run.journal import Event
from lemonade_hpc.run.record import History
from lemonade_hpc.search.evolution import Problem

Row = dict[str, Any]
"""A child as the record states it when it was asked, with its `outcome`."""


def encode(run: Path, fixed: Problem, rows: list[Row]) -> bytes:
    """The bytes of a sealed file with these children."""
    expensive = [o.name for o in fixed.config.objectives if o.name not in fixed.cheap]
    attributes = {
        "run": record.read_identity(run)["run"],
        "code": __version__,
        "cheap": list(fixed.cheap),
        "expensive": expensive,
    }
    return store.encode(rows, attributes)


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


def from_journals(run: Path, fixed: Problem, first: int, last: int) -> list[Row]:
    """The children first..last-1 as the journals have them."""
    events: list[Event] = []
    record.load(run, fixed, events)
    asked = {child["number"]: child for event in events if event["event"] == "asked" for child in event["children"]}
    outcomes = {event["outcome"]["child"]: event["outcome"] for event in events if event["event"] == "committed"}
    return [asked[number] | {"outcome": outcomes[number]} for number in range(first, last)]
