"""What can be said of a run by reading it: its front, its children, its workers, its failures.

Decides: the content of `front --json` and `status --json`. Reads only; needs no lease and disturbs nobody.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lemonade_hpc import files
from lemonade_hpc.config import from_dict
from lemonade_hpc.run import lease, owner, population, record
from lemonade_hpc.run.log import LogReader
from lemonade_hpc.run.record import History, Loaded, RecordError
from lemonade_hpc.search import evolution, morphisms
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search.evolution import Problem

NUM_FAILURES = 10
LOOK_S = 0.5
"""Time between looks at what may be late."""


def read(run: Path) -> tuple[dict[str, Any], Problem, Loaded]:
    """A run's identity, its problem with the newest settings, and its record. Raises ConfigError or RecordError.

    What another machine writes may be seen late here, one file later than another: what is wrong is looked at again.
    """
    late = patience(run)
    while True:
        try:
            content, fixed = problem(run)
            loaded = record.load(run, fixed)
            if not late.waits(not loaded.warnings):
                return content, fixed, loaded
        except RecordError:
            if not late.waits(False):
                raise
        time.sleep(LOOK_S)


def patience(run: Path) -> files.Patience:
    """For how long what is wrong with a run may only be late here. Raises ConfigError."""
    return files.Patience(record.read_identity(run)["config"]["cluster"].get("stale_s"))


def problem(run: Path) -> tuple[dict[str, Any], Problem]:
    """A run's identity, and its problem with the newest settings. Raises ConfigError or RecordError."""
    content, config = record.read_identity(run), None
    numbers = files.epochs(run)
    if numbers:
        owned = lease.read_owner(run, numbers[-1])
        config = from_dict(owned["config"], str(run / files.owner(numbers[-1])))
    return content, record.problem_of(run, content, config)


def front(history: History) -> list[dict[str, Any]]:
    """The members of the front, ordered by the first cheap objective."""
    fixed = history.state.problem
    names = [objective.name for objective in fixed.config.objectives]
    members = []
    for number, values in zip(history.state.front.numbers, history.state.front.values.tolist(), strict=True):
        child, outcome = history.children[number], history.results[number]
        members.append(
            {
                "id": number,
                "digest": child.digest,
                "parent": child.parent,
                "edits": morphisms.to_json(child.edits),
                "generation": child.generation,
                "depth": child.depth,
                "objectives": {n: int(v) if n in fixed.cheap else v for n, v in zip(names, values, strict=True)},
                "receipt": outcome["receipt"],
                "weights": outcome["weights"],
                "network": graphs.describe(child.graph),
            }
        )
    return sorted(members, key=lambda member: (member["objectives"][fixed.cheap[0]], member["id"]))


def status(run: Path) -> dict[str, Any]:
    """Everything `status` shows."""
    content, fixed, loaded = read(run)
    history = loaded.history
    state = history.state
    attempts = [a for given in history.attempts.values() for a in given if a.lost is None]
    return {
        "run": content["run"],
        "state": _life(run, history),
        "warnings": list(loaded.warnings),
        "data": {
            "name": content["config"]["data"]["name"],
            **{key: content["data"][key] for key in ("num_train", "num_validation", "num_test")},
        },
        "children": {
            "budget": fixed.config.search.children,
            "asked": state.num_asked,
            "initial": state.num_initial,
            "committed": state.num_committed,
            "failed": state.num_failed,
            "in_flight": len(state.in_flight),
        },
        "proposals_redrawn": vars(state.redrawn),
        "attempts_lost": dict(history.num_lost),
        "training_s": round(history.wall_s, 1),
        "hypervolume": hypervolumes(history),
        "front": front(history),
        "workers": [_worker(run, name) for name in sorted({attempt.worker for attempt in attempts})],
        "failures": [{"child": o["child"], **o["failure"]} for o in history.failures[-NUM_FAILURES:]],
    }


def children(history: History, run: Path) -> list[dict[str, Any]]:
    """Every valid child's number, objectives, and whether it is initial or on the front: what a figure shows."""
    fixed = history.state.problem
    names = [objective.name for objective in fixed.config.objectives]
    on_front = set(history.state.front.numbers)
    found = []
    for row in population.finished(run, history):
        outcome = record.outcome_of(fixed, row["outcome"])
        if outcome.failure is None:
            values = evolution.vector(fixed, tuple(row["cheap"]), outcome.expensive)
            number = row["number"]
            kind = {"initial": row["parent"] is None, "front": number in on_front}
            found.append({"id": number, "objectives": dict(zip(names, values, strict=True)), **kind})
    return found


def hypervolumes(history: History) -> dict[str, float | None]:
    """Of the front, and of the initial networks' front once all of those have reported."""
    fixed, initial = history.state.problem, history.initial_front
    return {
        "front": evolution.hypervolume(fixed, history.state.front.values),
        "initial": None if initial is None else evolution.hypervolume(fixed, initial.values),
    }


def _life(run: Path, history: History) -> str:
    """`complete`, `failed: why`, `running: by whom`, or `stopped`."""
    numbers, state = files.epochs(run), history.state
    if state.complete and history.complete is not None:
        return "complete"
    if state.num_asks and not state.members and not state.in_flight:
        return "failed: no initial network is valid; start again in another folder"
    if not numbers:
        return "not started"
    who = lease.read_owner(run, numbers[-1])["owner"]
    verdict = owner.judge(who)
    if verdict == "alive":
        return f"running: {owner.describe(who)}"
    return "stopped" if verdict == "gone" else f"unknown: last held by {owner.describe(who)}"


def _worker(run: Path, name: str) -> dict[str, Any]:
    """A worker's last words."""
    doing, host, device = "starting", None, None
    for message in LogReader(run / files.done_log(name)).poll():
        if message["say"] == "hello":
            host = message["host"]
        elif message["say"] == "ready":
            device = message["device"]
        elif message["say"] == "started":
            doing = f"child {message['child']}"
        elif message["say"] == "epoch":
            doing = f"child {message['child']}, epoch {message['epoch']}"
        elif message["say"] in ("outcome", "crashed"):
            doing = "idle"
        elif message["say"] == "bye":
            doing = f"left: {message['reason']}"
    return {"name": name, "host": host, "device": device, "doing": doing}
