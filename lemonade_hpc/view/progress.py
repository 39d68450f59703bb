"""How a running search shows its progress on standard error: a bar on a terminal, plain lines in a log file.

Decides: how often it speaks. Never writes to standard output.
"""

from __future__ import annotations

import contextlib
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lemonade_hpc.run import status
from lemonade_hpc.run.history import History

LINE_EVERY_S = 10.0
SPEED_OVER_S = 3600.0
"""The time left is reckoned from the children of the last hour: on large data one takes minutes."""


def _standing(history: History) -> str:
    """Write `front 9, error 1.4 to 12.0 %, gain +0.310`: in hypervolume, over the initial networks."""
    members = status.front(history)
    if not members:
        return "waiting for the initial networks"
    errors = [member["objectives"]["val_error"] for member in members]
    volume = status.hypervolumes(history)
    front, initial = volume["front"], volume["initial"]
    gain = "" if front is None or initial is None else f", gain {front - initial:+.3f}"
    return f"front {len(members)}, error {100 * min(errors):.1f} to {100 * max(errors):.1f} %{gain}"


class ProgressView:
    """An observer of the coordinator, as a context. Shows nothing before the first update."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._spoken_at = 0.0
        self._committed = -1

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, history: History, workers: dict[str, str]) -> None:
        """Show the standing: after every commit, and every few seconds."""
        with contextlib.suppress(OSError):  # a log on a full disk ends no search
            self._update(history)

    def _update(self, history: History) -> None:
        done = history.state.num_committed
        budget = history.state.num_initial + history.state.problem.config.search.children
        total = max(budget, history.state.num_asked)
        if self._console.is_terminal:
            self._draw(done, total, _standing(history))
            return
        now = time.monotonic()
        due = self._committed < 0 or now - self._spoken_at > LINE_EVERY_S or history.state.complete
        if done != self._committed and due:
            self._spoken_at, self._committed = now, done
            self._line(f"{done}/{total} children, {_standing(history)}")

    def note(self, text: str) -> None:
        """Show something that a person should read."""
        with contextlib.suppress(OSError):
            if self._console.is_terminal:
                self._console.print(text, style="yellow", markup=False)
            else:
                self._line(text)

    def _line(self, text: str) -> None:
        """Write one line of a log, unbroken, with the time of day."""
        self._console.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", markup=False, soft_wrap=True)

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            columns = (
                BarColumn(bar_width=8),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left  {task.description}", markup=False),
            )
            self._bar = Progress(*columns, console=self._console, speed_estimate_period=SPEED_OVER_S)
            self._task = self._bar.add_task(text, completed=done, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=text)
