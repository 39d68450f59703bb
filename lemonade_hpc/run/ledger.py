"""The record as its one writer holds it: events are applied at once and made durable together.

Decides: when a coordinator's life is over because another one has begun. The ends of such a life are named here.
"""

from __future__ import annotations

from pathlib import Path

from lemonade_hpc import files
from lemonade_hpc.run.history import History
from lemonade_hpc.run.journal import Event, Journal


class RunFailed(RuntimeError):  # noqa: N818
    """The run cannot go on: says why and what to do. Exit code 1."""


class Stopped(RuntimeError):  # noqa: N818
    """Stopped before complete; the same command goes on. Exit code 3."""


class Halted(Stopped):
    """Stopped because somebody wanted it, or a limit of the whole run is reached: no successor may go on by itself."""


class NoRoom(Stopped):
    """Stopped because nothing can be written: a full disk, or one that fails."""


class Superseded(Stopped):
    """Another coordinator has the run now, or the run folder is gone."""


class Ledger:
    """The history of a run whose lease is held, and the journal that it is written to."""

    def __init__(self, run: Path, history: History, journal: Journal) -> None:
        self.run, self.history, self.epoch = run, history, journal.epoch
        self._journal = journal
        self._unwritten: list[Event] = []

    def record(self, event: Event) -> None:
        """Apply an event; it is durable after the next `write`."""
        self.history.apply(event)
        self._unwritten.append(event)

    def write(self) -> None:
        """Make all events so far durable."""
        if self._unwritten:
            self._journal.append(self._unwritten)
            self._unwritten = []

    def superseded(self) -> bool:
        """Whether another coordinator has begun, or the run folder is gone."""
        return max(files.epochs(self.run), default=0) != self.epoch

    def check(self) -> None:
        """Raise Superseded where that is so."""
        if self.superseded():
            raise Superseded(f"{self.run} has another coordinator now, or is gone; this one has changed nothing since")

    def close(self) -> None:
        """Close the journal; what is not written yet is lost, as with a crash."""
        self._journal.close()
