"""Tables for people: the front, the state of a run, the checks of `verify`.

Decides: how numbers are written. An error measured on few images has an interval, and it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lemonade_hpc.search.morphisms import Edit
from lemonade_hpc.search.morphisms import from_json as edits_from_json

HEADINGS = {"val_error": "validation error [95 %]", "params": "parameters", "macs": "multiply-adds"}
Z_95 = 1.959964


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share seen on `count` images (Wilson, 1927)."""
    spread = Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def error_text(share: float, count: int) -> str:
    """`1.4 % [0.6, 3.3]`."""
    low, high = wilson(share, count)
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def value_text(name: str, value: float, count: int) -> str:
    """An objective's value as people read it; `count` images stand behind an error."""
    return error_text(value, count) if name.endswith("error") else f"{value:,.0f}"


def lineage(edits: Sequence[Sequence[Any]]) -> str:
    """`insert 5x5, widen x2`: what a child's last edits did."""
    words = {
        "insert": lambda edit: f"insert {edit.arg}x{edit.arg}",
        "widen": lambda edit: f"widen x{edit.arg}",
        "add": lambda edit: "skip (add)",
        "concat": lambda edit: "skip (concat)",
        "prune": lambda edit: f"prune 1/{edit.arg}",
    }
    return ", ".join(_say(words, edit) for edit in edits_from_json(edits)) or "initial"


def _say(words: Mapping[str, Any], edit: Edit) -> str:
    return str(words[edit.kind](edit)) if edit.kind in words else edit.kind


def front_table(members: Sequence[dict[str, Any]], num_validation: int, test: Mapping[int, str] | None = None) -> Table:
    """The front, one member a line; `test` adds test errors by child."""
    table = Table(title=f"Pareto front, {len(members)} members", title_justify="left", header_style="bold")
    names = list(members[0]["objectives"]) if members else []
    table.add_column("child", justify="right")
    for name in names:
        table.add_column(HEADINGS.get(name, name), justify="right")
    if test is not None:
        table.add_column("test error [95 %]", justify="right")
    table.add_column("parent", justify="right")
    table.add_column("last edits")
    for member in members:
        cells = [value_text(name, member["objectives"][name], num_validation) for name in names]
        extra = [test[member["id"]]] if test is not None else []
        parent = "-" if member["parent"] is None else str(member["parent"])
        table.add_row(str(member["id"]), *cells, *extra, parent, lineage(member["edits"]))
    return table


def summary(data: Mapping[str, Any]) -> str:
    """Two lines on a run: children and hypervolume."""
    children, volume = data["children"], data["hypervolume"]
    lines = [
        f"{children['committed']} of {children['budget'] + children['initial']} children done "
        f"({children['initial']} initial), {children['failed']} failed, {children['in_flight']} in flight; "
        f"{data['training_s']:.0f} s of training"
    ]
    if volume["initial"]:
        gain = volume["front"] - volume["initial"]
        lines.append(
            f"hypervolume {volume['front']:.3f}, initial networks {volume['initial']:.3f}: "
            f"gain {gain:+.3f} ({gain / volume['initial']:+.0%})"
        )
    return "\n".join(lines)


def status_view(data: Mapping[str, Any], num_validation: int) -> RenderableType:
    """Everything `status` shows on a terminal."""
    parts: list[RenderableType] = [Text(data["state"], style="bold"), Text(summary(data))]
    lost = {kind: count for kind, count in data["attempts_lost"].items() if count}
    if lost:
        parts.append(Text("attempts lost: " + ", ".join(f"{kind} {count}" for kind, count in lost.items())))
    parts += [Text(f"warning: {text}", style="yellow") for text in data["warnings"]]
    for worker in data["workers"]:
        parts.append(Text(f"worker {worker['name']} on {worker['host']} ({worker['device']}): {worker['doing']}"))
    for failure in data["failures"]:
        parts.append(Text(f"child {failure['child']} failed ({failure['kind']}): {failure['reason']}", style="red"))
    parts.append(front_table(data["front"], num_validation))
    return Group(*parts)


def checks_table(checks: Sequence[tuple[str, list[str]]]) -> Table:
    """One line per check of `verify`, with what it found."""
    table = Table(show_header=False, box=None)
    for name, faults in checks:
        table.add_row(Text("ok", style="green") if not faults else Text("FAULT", style="red"), name)
        for fault in faults:
            table.add_row("", fault)
    return table


def console(*, stderr: bool = False) -> Console:
    """Where tables go; wide enough in a log file that no line is broken."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=160)
