"""Figures of a run: the front as PNG and SVG.

Decides: what is drawn and how. Initial networks, dominated children and the front are told apart by shape and by shade,
so also in grey print. The axes are those of the hypervolume, error against decades of a cheap objective: the area
between the dashed line and the front is what was gained. The same run gives the same bytes; an SVG's text stays text.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lemonade_hpc import files
from lemonade_hpc.view.tables import wilson

AXES = {"params": "parameters", "macs": "multiply-adds per image", "val_error": "validation error (%)"}
FRONT, INTERVAL, INITIAL, OTHERS = "#12507b", "#8db4cf", "#d95f02", "0.7"
HEADROOM = 1.25
"""The error axis ends this far above the worst error of the front and the initial networks."""

Members = Sequence[dict[str, Any]]


def front(
    children: Members, cheap: Sequence[str], num_validation: int, title: str, subtitle: str, paths: Sequence[Path]
) -> None:
    """Draw error against each cheap objective, side by side; `children` as `run.status.children` gives them.

    The kind of each file follows its suffix. Raises OSError.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lemonade", "legend.fontsize": 9}):
        figure = Figure(figsize=(7.2 if len(cheap) == 1 else 5.6 * len(cheap), 4.8), layout="constrained")
        panels = figure.subplots(1, len(cheap), sharey=True, squeeze=False)[0]
        for name, axes in zip(cheap, panels, strict=True):
            _panel(axes, children, name, num_validation, staircase=len(cheap) == 1)
        panels[0].set_ylabel(AXES["val_error"])
        panels[-1].legend(loc="upper right")
        figure.suptitle(f"{title}\n{subtitle}", fontsize=11)
        for path in paths:
            kind = path.suffix.removeprefix(".")
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, buffer.getvalue())


def _panel(axes: Axes, children: Members, cheap: str, num_validation: int, *, staircase: bool) -> None:
    """Draw one cheap objective. With several, the front is no staircase in any one panel, and none is drawn."""
    best = [c for c in children if c["front"]]
    initial = [c for c in children if c["initial"]]
    others = [c for c in children if not c["front"] and not c["initial"]]
    axes.set(xscale="log", xlabel=AXES[cheap])
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if not children:
        axes.text(0.5, 0.5, "no trained network yet", transform=axes.transAxes, ha="center")
    left, right = _reach([c["objectives"][cheap] for c in children])
    top = min(100.0, HEADROOM * max((_error(c) for c in [*best, *initial]), default=100.0)) or 1.0
    hidden = sum(_error(c) > top for c in others)
    axes.set(xlim=(left, right), ylim=(0, top))
    _label_decades(axes, right / left)

    beyond = f", {hidden} of them above" if hidden else ""
    x, y = _points(others, cheap)
    axes.scatter(x, y, s=12, marker="x", c=OTHERS, linewidths=0.8, label=f"dominated children ({len(others)}{beyond})")
    if staircase:
        axes.plot(*_stairs(initial, cheap, top, right), color=INITIAL, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(*_stairs(best, cheap, top, right), color=FRONT, linewidth=1.2)
    x, y = _points(initial, cheap)
    axes.scatter(
        x, y, s=64, marker="D", facecolors="white", edgecolors=INITIAL, linewidths=1.6, zorder=3,
        label=f"initial networks ({len(initial)})",
    )  # fmt: skip
    x, y = _points(best, cheap)
    axes.errorbar(
        x, y, yerr=_intervals(y, num_validation), fmt="o", markersize=5, color=FRONT, ecolor=INTERVAL, elinewidth=1.8,
        zorder=4, label=f"Pareto front ({len(best)}), 95 % interval",
    )  # fmt: skip


def _error(child: dict[str, Any]) -> float:
    return 100 * float(child["objectives"]["val_error"])


def _points(members: Members, cheap: str) -> tuple[list[float], list[float]]:
    """Return values and errors in per cent, by value."""
    pairs = sorted((c["objectives"][cheap], _error(c)) for c in members)
    return [x for x, _ in pairs], [y for _, y in pairs]


def _stairs(members: Members, cheap: str, top: float, right: float) -> tuple[list[float], list[float]]:
    """Follow the edge of what the members dominate, from the axes' top to their right end."""
    xs, ys, lowest = list[float](), list[float](), top
    for x, y in zip(*_points(members, cheap), strict=True):
        if y < lowest:
            xs, ys, lowest = [*xs, x, x], [*ys, lowest, y], y
    return ([*xs, right], [*ys, lowest]) if xs else ([], [])


def _intervals(errors: Sequence[float], count: int) -> list[list[float]]:
    """Return the lengths of the error bars below and above, in per cent."""
    bounds = [(error, *wilson(error / 100, count)) for error in errors]
    return [[error - 100 * low for error, low, _ in bounds], [100 * high - error for error, _, high in bounds]]


def _reach(values: Sequence[float]) -> tuple[float, float]:
    """Choose the ends of a log axis: around all values, with some margin, and at least a factor of 4 apart."""
    low, high = min(values, default=1e4) / 1.15, max(values, default=1e4) * 1.15
    widen = max(1.0, (4 * low / high) ** 0.5)
    return low / widen, high * widen


def _label_decades(axes: Axes, ratio: float) -> None:
    """Write `500`, `1 k`, `20 k`, `3 M` at 1, 2 and 5 of each decade, at 1 only where there are many."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 3e3 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g}"
