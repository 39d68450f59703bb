"""How a running search shows its progress on standard error: a bar on a terminal, plain lines in a log file.

Decides: how often it speaks. Never writes to standard output.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lemonade_hpc.run import status
from lemonade_hpc.run.record import History

LINE_EVERY_S = 10.0


def _standing(history: History) -> str:
    """`front 9, error 1.4 % to 12.0 %, hypervolume 1.45 (+0.31)`."""
    members = status.front(history)
    if not members:
        return "waiting for the initial networks"
    errors = [member["objectives"]["val_error"] for member in members]
    volume = status.hypervolumes(history)
    gain = f" ({volume['front'] - volume['initial']:+.3f})" if volume["front"] and volume["initial"] else ""
    return f"front {len(members)}, error {100 * min(errors):.1f} to {100 * max(errors):.1f} %, hypervolume {volume['front']:.3f}{gain}"


class ProgressView:
    """An observer of the coordinator, as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._spoken_at = 0.0
        self._committed = -1
        if console.is_terminal:
            columns = (
                BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
            )  # fmt: skip
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("starting workers", total=None)

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, history: History, workers: dict[str, str]) -> None:
        """After every commit, and every few seconds."""
        state = history.state
        total = state.num_initial + state.problem.config.search.children
        if self._bar is not None:
            self._bar.update(self._task, completed=state.num_committed, total=total, description=_standing(history))
            return
        now = time.monotonic()
        finished = state.num_committed == total
        if state.num_committed != self._committed and (now - self._spoken_at > LINE_EVERY_S or finished):
            self._spoken_at, self._committed = now, state.num_committed
            self._console.print(f"{state.num_committed}/{total} children, {_standing(history)}")

    def note(self, text: str) -> None:
        """Something a person should read."""
        self._console.print(text, style="yellow")
