"""Tables for people: the front, the state of a run, the checks of `verify` and `doctor`.

Decides: how numbers are written, and what gives way in 80 columns. An error measured on few images has an interval, and
it is shown. Nothing printed is taken for markup: paths and error messages hold brackets too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lemonade_hpc.run.checks import FAIL, OK, WARN, Check
from lemonade_hpc.run.queue import ENDED
from lemonade_hpc.search.morphisms import Edit
from lemonade_hpc.search.morphisms import from_json as edits_from_json

HEADINGS = {
    "val_error": "validation error\n[95 %]",
    "test_error": "test error\n[95 %]",
    "params": "parameters",
    "macs": "multiply-\nadds",
}
Z_95 = 1.959963984540054
LOG_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """Give the 95 % interval of a share seen on `count` images (Wilson, 1927)."""
    spread = Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)  # exact where rounding would pass the share


def error_text(share: float, count: int) -> str:
    """Write `1.4 % [0.6, 3.3]`; with more than 1,000 images one more digit means something."""
    places = 1 if count <= 1000 else 2
    low, high = (f"{100 * bound:.{places}f}" for bound in wilson(share, count))
    return f"{100 * share:.{places}f} % [{low}, {high}]"


def count_text(value: float) -> str:
    """Write `26,274`, and from 10 million on `12.35 M` or `1.235 G`."""
    for factor, unit in ((1e9, "G"), (1e6, "M")):
        if value >= max(factor, 1e7):
            return f"{value / factor:#.4g} {unit}"
    return f"{value:,.0f}"


def value_text(name: str, value: float, count: int) -> str:
    """Write an objective's value; `count` images stand behind an error."""
    return error_text(value, count) if name.endswith("error") else count_text(value)


def seconds_text(seconds: float) -> str:
    """Write `95 s`, `12 min` or `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def gain_text(volume: Mapping[str, float | None]) -> str:
    """Write what the search has gained over its initial networks, once all of those are trained."""
    front, initial = volume["front"], volume["initial"]
    if front is None or initial is None:
        return "hypervolume: the initial networks are not all trained yet"
    share = f" ({100 * (front - initial) / initial:+.0f} %)" if initial else ""
    return f"hypervolume {front:.3f}, initial networks {initial:.3f}: gain {front - initial:+.3f}{share}"


def lineage(edits: Sequence[Sequence[Any]]) -> str:
    """Write `insert 5x5, widen x2`: what made a child of its parent."""
    return ", ".join(_edit_text(edit) for edit in edits_from_json(edits)) or "initial"


def _edit_text(edit: Edit) -> str:
    return {
        "insert": f"insert {edit.arg}x{edit.arg}",
        "widen": f"widen x{edit.arg}",
        "add": "skip (add)",
        "concat": "skip (concat)",
        "prune": f"prune 1/{edit.arg}",
    }.get(edit.kind, edit.kind)


def front_table(
    members: Sequence[dict[str, Any]],
    num_validation: int,
    test: Mapping[int, float] | None = None,
    num_test: int = 0,
) -> RenderableType:
    """Show the front, one line a member.

    Parent and edits come last; edits are cut short where the terminal is narrow. `test`, errors on `num_test` images by
    child, takes their place.
    """
    if not members:
        return Text("The front is empty: no network has been trained yet.")
    table = Table(
        title=f"Pareto front, {len(members)} member{'s' * (len(members) > 1)}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    names = list(members[0]["objectives"])
    headings = ["child", *(HEADINGS.get(name, name) for name in names)]
    headings += ["parent"] if test is None else [HEADINGS["test_error"]]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    if test is None:
        table.add_column("last edits")  # the one column that may shrink; its cells are cut, not wrapped
    for member in members:
        cells: list[RenderableType] = [str(member["id"])]
        cells += [value_text(name, member["objectives"][name], num_validation) for name in names]
        if test is None:
            cells.append("-" if member["parent"] is None else str(member["parent"]))
            cells.append(Text(lineage(member["edits"]), no_wrap=True, overflow="ellipsis"))
        else:
            cells.append(error_text(test[member["id"]], num_test))
        table.add_row(*cells)
    return table


def summary(data: Mapping[str, Any]) -> str:
    """Write three lines on a run, `run.status.status` as given: data, children and hypervolume."""
    children, images = data["children"], data["data"]
    total = max(children["budget"] + children["initial"], children["asked"])
    training = sum(str(worker["doing"]).startswith("child ") for worker in data["workers"])
    asked, open_ = children["in_flight"], ""
    if asked and data["state"].startswith("running"):
        open_ = f", {min(training, asked)} in training, {max(asked - training, 0)} asked and waiting"
    elif asked:
        open_ = f", {asked} asked and not done"
    return (
        f"{images['name']}: {images['num_train']:,} images to train on, {images['num_validation']:,} for validation, "
        f"{images['num_test']:,} for test\n{children['committed']} of {total} children done "
        f"({children['initial']} initial), {children['failed']} failed{open_}; "
        f"{seconds_text(data['training_s'])} of training\n{gain_text(data['hypervolume'])}"
    )


LOSSES = {"crash": "crash", "walltime": "time limit", "worker": "worker gone", "stopped": "taken back"}
"""Kinds of lost attempts, in words."""


def usage_text(usage: Mapping[str, Any]) -> str:
    """`GPU-hours: 12.3 spent, 0.4 of them wasted, 1.1 idle`."""
    spent, wasted, idle = (f"{usage[key]:.3g}" for key in ("spent", "wasted", "idle"))
    return f"{usage['unit']}: {spent} spent, {wasted} of them wasted on attempts that were lost, {idle} idle"


def _life_text(data: Mapping[str, Any]) -> str:
    """Whether it runs, why not, and how it goes on."""
    state, jobs = data["state"], data["coordinators"] or []
    if state == "complete" or state.startswith("failed"):
        return str(state)
    waiting = [f"job {job['id']} ({job['reason']})" for job in jobs if job["state"] == "PENDING"]
    if state.startswith("running"):
        if data["stopping"]:
            return f"{state}, which ends what is in training and stops"
        lonely = "\nno successor is in the queue: once the coordinator's job has ended, submit again"
        return str(state) + (lonely if jobs and not waiting else "")
    why = f": {data['why_closed']}" if state == "stopped" and data["why_closed"] else ""
    begun = [job["id"] for job in jobs if job["state"] == "RUNNING"]
    if begun:
        follows = f"; a coordinator is beginning: job {begun[0]}"
    elif waiting:
        follows = f"; a coordinator waits in the queue: {', '.join(waiting)}"
    else:
        follows = "; the same command goes on" if state == "stopped" else ""
    if data["log"] and (not why or data["log_is_newer"]):
        ends = f"\nit ends: {data['log_ends']}" if data["log_ends"] else "; it is empty: sacct may know more"
        follows += f"\nthe last log of a submitted coordinator: {data['log']}{ends}"
    elif data["job_name"] and data["coordinators"] == [] and not why:
        follows += (
            f"\nits coordinator has left the queue and no log: do the nodes see this folder?"
            f"\nmore may be known to: sacct -X --name={data['job_name']}"
        )
    return f"{state}{why}{follows}"


def _doing_text(worker: Mapping[str, Any], *, asked: bool = False) -> str:
    """What a worker does, or has come to, as far as is known; `asked`: one without a job is not in the queue."""
    job = worker["job"]
    if job is None and asked:
        return "not in the queue"
    if job and job["state"] == "PENDING":
        return f"in the queue ({job['reason']})"
    return f"ended ({job['state']})" if job and job["state"] in ENDED else str(worker["doing"])


def status_view(data: Mapping[str, Any], num_validation: int) -> RenderableType:
    """Show all of `run.status.status` on a terminal."""
    parts: list[RenderableType] = [Text(_life_text(data), style="bold"), Text(summary(data))]
    lost = {kind: count for kind, count in data["attempts_lost"].items() if count and kind != "stopped"}
    if lost:
        parts.append(Text("attempts lost: " + ", ".join(f"{LOSSES[kind]} {count}" for kind, count in lost.items())))
    if data["workers_left"]:
        parts.append(Text("workers left: " + ", ".join(f"{how} {n}" for how, n in data["workers_left"].items())))
    if data["last_fault"]:
        parts.append(Text(f"since the last child that was trained: {data['last_fault']}", style="red"))
    parts.append(Text(usage_text(data["usage"])))
    parts += [Text(f"node {node} is excluded: {why}", style="yellow") for node, why in data["nodes_excluded"].items()]
    parts += [Text(f"warning: {text}", style="yellow") for text in data["warnings"]]
    asked = data["coordinators"] is not None
    unseen = Counter(_doing_text(worker, asked=asked) for worker in data["workers"] if worker["node"] is None)
    parts += [Text(f"workers not at work yet: {count} {what}") for what, count in unseen.items()]
    for worker in sorted((one for one in data["workers"] if one["node"]), key=lambda one: (one["node"], one["name"])):
        device = f" ({worker['device']})" if worker["device"] else ""
        parts.append(Text(f"worker {worker['name']} on {worker['node']}{device}: {_doing_text(worker)}"))
    failures = data["failures"]
    if len(failures) < data["children"]["failed"]:
        parts.append(Text(f"the last {len(failures)} of {data['children']['failed']} failed children:", style="red"))
    for failure in failures:
        parts.append(Text(f"child {failure['child']} failed ({failure['kind']}): {failure['reason']}", style="red"))
    return Group(*parts, Text(""), front_table(data["front"], num_validation))


def checks_table(checks: Sequence[tuple[str, list[str]]]) -> Table:
    """Show one line per check of `verify`, with what it found."""
    table = Table(show_header=False, box=None)
    for name, faults in checks:
        table.add_row(Text("ok", style="green") if not faults else Text("FAULT", style="red"), name)
        for fault in faults:
            table.add_row("", fault)
    return table


STYLES = {OK: "green", WARN: "yellow", FAIL: "red"}


def doctor_table(checks: Sequence[Check]) -> Table:
    """Show one line per check of `doctor`, and beneath it what to do where it is not ok."""
    table = Table(show_header=False, box=None)
    for check in checks:
        table.add_row(Text(check.state, style=STYLES[check.state]), check.name, check.seen)
        if check.fix:
            table.add_row("", "", f"fix: {check.fix}")
    return table


class _Stream(Console):
    """A console that falls silent once nobody reads it: a log's reader that ends must not end a search."""

    def on_broken_pipe(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def console(*, stderr: bool = False) -> Console:
    """Open a stream for tables, wide enough in a file that no line is broken; brackets and colons stay as they are."""
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    made = _Stream(**plain)
    return made if made.is_terminal else _Stream(**plain, width=LOG_WIDTH)
