"""Workers that come to grief: which of them are one event, when a series of them ends the run, and what is told then.

Decides that for one coordinator's life. What it costs a child or a node is on record, and `budgets.py`'s.
"""

from __future__ import annotations

from pathlib import Path

from lemonade_hpc.config import Cluster
from lemonade_hpc.run import budgets
from lemonade_hpc.run.handle import WorkerHandle

PER_WORKER = 3
"""Workers in a row that may end without any outcome, per worker wanted, before the run stops."""
TOGETHER_S = 60.0
"""Workers of one node whose last words are no further apart may have fallen of one cause; `stale_s` is added."""
MORE_THAN_UNDER_ONE = 3
"""So many more than may end under one child they may be in any case: that one is to be given up before."""


class Misfortunes:
    """Those in a row, with no child trained in between. `elsewhere`: whether workers are on other machines."""

    def __init__(self, run: Path, cluster: Cluster, *, elsewhere: bool) -> None:
        under_one = max(budgets.MAX_DEATHS, cluster.retries) + MORE_THAN_UNDER_ONE
        self._run, self._elsewhere = run, elsewhere
        self._most = max(PER_WORKER * cluster.workers, under_one)
        self._fell: dict[str, list[float]] = {}
        """By node: when the last words were heard of the first worker of each event there."""
        self._together_s = TOGETHER_S + (cluster.stale_s or 0.0)
        self._last = ""
        self.count = 0
        self.heard_any = False
        """Whether anything that a worker wrote has ever come to the run folder."""

    def fell_together(self, handle: WorkerHandle) -> bool:
        """Whether it was at work on its node when another one came to grief there, and did so itself soon: one event.

        It may be a file system that was away, and no fault of the node's.
        """
        if handle.node is None or handle.heard_s is None:
            return False
        first, last = handle.heard_s
        events = self._fell.setdefault(handle.node, [])
        if any(first <= one and abs(last - one) <= self._together_s for one in events):
            return True
        events.append(last)
        return False

    def add(self, reason: str, *, counts: bool) -> bool:
        """One more; True where they are too many. Some do not count, and are told of all the same."""
        self._last = reason
        self.count += counts
        return self.count > self._most

    def why(self) -> str:
        """What the last worker that came to grief did so of, and what that may mean; empty where none did."""
        if not self._last:
            return ""
        unheard = f". None has ever been heard of: can the nodes see and write {self._run.resolve()}?"
        return f". The last: {self._last}{'' if self.heard_any or not self._elsewhere else unheard}"
