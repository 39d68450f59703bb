"""Figures of a run: the front as PNG and SVG.

Decides: what is drawn and how. Initial networks, dominated children and the front are told apart by colour and by shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen first

AXES = {"params": "parameters", "macs": "multiply-adds per image", "val_error": "validation error (%)"}


def front(children: Sequence[dict[str, Any]], cheap: str, title: str, paths: Sequence[Path]) -> None:
    """Error against one cheap objective on a log axis; `children` as `run.status.children` gives them."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    groups = {
        "dominated children": ([c for c in children if not c["front"]], {"c": "0.72", "s": 14, "marker": "o"}),
        "initial networks": ([c for c in children if c["initial"]], {"c": "#d95f02", "s": 60, "marker": "D"}),
        "Pareto front": ([c for c in children if c["front"]], {"c": "#1b6ca8", "s": 34, "marker": "o"}),
    }
    for name, (members, style) in groups.items():
        x = [c["objectives"][cheap] for c in members]
        y = [100 * c["objectives"]["val_error"] for c in members]
        axes.scatter(x, y, label=f"{name} ({len(members)})", linewidths=0, **style)
    staircase = sorted((c["objectives"][cheap], 100 * c["objectives"]["val_error"]) for c in children if c["front"])
    axes.step([x for x, _ in staircase], [y for _, y in staircase], where="post", color="#1b6ca8", linewidth=1)
    axes.set(xscale="log", xlabel=AXES[cheap], ylabel=AXES["val_error"], title=title)
    axes.set_ylim(bottom=0)
    axes.grid(True, which="both", alpha=0.25, linewidth=0.5)
    axes.legend(frameon=False)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
