"""What can be said of a run by reading it: its front, its children, its workers, its failures.

Decides: the content of `front --json` and `status --json`. Reads only; needs no lease and disturbs nobody.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lemonade_hpc import files
from lemonade_hpc.config import from_dict
from lemonade_hpc.run import chain, lease, owner, population, queue, record
from lemonade_hpc.run import history as histories
from lemonade_hpc.run.handle import WorkerHandle
from lemonade_hpc.run.history import History
from lemonade_hpc.run.record import Loaded, RecordError
from lemonade_hpc.search import evolution, morphisms
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search.evolution import Problem

Judge = Callable[[dict[str, Any]], owner.Verdict]
Look = Callable[[str], tuple[dict[queue.Place, queue.Job], list[queue.Job]] | None]
SUBMITTED = "Submitted batch job"
"""What sbatch says in a coordinator's log of its successor: no news."""
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


def status(run: Path, judge: Judge = queue.judge, look: Look = queue.queued) -> dict[str, Any]:
    """Everything `status` shows; `judge` tells whether a coordinator lives, `look` what of a run is in the queue."""
    content, fixed, loaded = read(run)
    history = loaded.history
    state = history.state
    numbers = files.epochs(run)
    who = lease.read_owner(run, numbers[-1])["owner"] if numbers else {}
    jobs, coordinators = _queued(run, content, fixed, history, look) or ({}, None)
    life = _life(history, who, judge, {job.id for job in coordinators or []})
    running = life.startswith("running")
    others = [vars(job) for job in coordinators or [] if running or job.id != who.get("slurm_job")]
    workers = [_worker(run, name, jobs.get((one.launch, one.place))) for name, one in sorted(history.workers.items())]
    logs = sorted((run / files.SLURM).glob("coordinator-*.log"), key=_job)
    return {
        "run": content["run"],
        "state": life,
        "why_closed": history.why_closed if history.complete is None else None,
        "stopping": running and (run / files.stop_order(numbers[-1])).stat().st_size > 0,
        "coordinators": None if coordinators is None else others,
        "job_name": chain.job_name(content["run"]) if (run / files.SLURM / chain.TEMPLATE.name).exists() else None,
        "log": str(logs[-1]) if logs else None,
        "log_is_newer": bool(logs) and _is_news(run, logs[-1], numbers),
        "log_ends": _last_line(logs[-1]) if logs else None,
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
        "workers_left": dict(history.departures),
        "last_fault": history.last_fault,
        "nodes_excluded": dict(history.excluded),
        "usage": _usage(history, workers),
        "training_s": round(history.wall_s, 1),
        "hypervolume": hypervolumes(history),
        "front": front(history),
        "workers": workers,
        "failures": [{"child": o["child"], **o["failure"]} for o in history.failures[-NUM_FAILURES:]],
    }


def _job(log: Path) -> float:
    """The number of the job of a coordinator's log, which grows."""
    number = log.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else -math.inf


def _is_news(run: Path, log: Path, numbers: list[int]) -> bool:
    """Whether a log is that of a coordinator which came after the last one on record, and did not get so far."""
    if numbers and log.stat().st_mtime_ns <= (run / files.owner(numbers[-1])).stat().st_mtime_ns:
        return False
    known = (lease.read_owner(run, number)["owner"].get("slurm_job") for number in reversed(numbers))
    return log.stem.rpartition("-")[2] not in known


def _last_line(log: Path) -> str:
    """What a log ends with, of its last kilobytes."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines()
    told = [line.strip() for line in lines if not line.startswith(SUBMITTED)]
    return told[-1] if told else ""


def children(history: History, run: Path) -> list[dict[str, Any]]:
    """Every valid child's number, objectives, and whether it is initial or on the front: what a figure shows."""
    fixed = history.state.problem
    names = [objective.name for objective in fixed.config.objectives]
    on_front = set(history.state.front.numbers)
    found = []
    for row in population.finished(run, history):
        outcome = histories.outcome_of(fixed, row["outcome"])
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


def _queued(
    run: Path, content: dict[str, Any], fixed: Problem, history: History, look: Look
) -> tuple[dict[queue.Place, queue.Job], list[queue.Job]] | None:
    """What of a run is in the queue; None where it has nothing to look for there, or nobody answers."""
    on_slurm = fixed.config.cluster.backend == "slurm" or (run / files.SLURM).exists()
    return look(content["run"]) if on_slurm and history.complete is None else None


def _life(history: History, who: dict[str, Any], judge: Judge, jobs: Collection[str]) -> str:
    """`complete`, `failed: why`, `running: by whom`, or `stopped`.

    `who`: the last owner, if there was one. `jobs`: coordinators' that are in the queue.
    """
    state = history.state
    if state.complete and history.complete is not None:
        return "complete"
    if state.num_asks and not state.members and not state.in_flight:
        return "failed: no initial network is valid; start again in another folder"
    if not who:
        return "not started"
    if history.closed:
        return "stopped"
    listed = who.get("slurm_job") in jobs and owner.judge(who) != "gone"
    verdict = "alive" if listed else judge(who)
    if verdict == "alive":
        return f"running: {owner.describe(who)}"
    return "stopped" if verdict == "gone" else f"unknown: last held by {owner.describe(who)}"


def _usage(history: History, workers: list[dict[str, Any]]) -> dict[str, Any]:
    """Hours of GPUs (of workers, where those have none) of all workers so far."""
    weights = [max(history.workers[worker["name"]].gpus, 1) for worker in workers]
    spent = history.usage.spent + sum(k * one["lived_s"] for k, one in zip(weights, workers, strict=True))
    busy = history.usage.busy + sum(k * one["busy_s"] for k, one in zip(weights, workers, strict=True))
    hours = {"spent": spent, "wasted": history.usage.wasted, "idle": max(spent - busy, 0.0)}
    return {"unit": history.unit, **{name: round(seconds / 3600, 4) for name, seconds in hours.items()}}


def _worker(run: Path, name: str, job: queue.Job | None) -> dict[str, Any]:
    """What a worker has said of itself, and the queue of its job."""
    worker = WorkerHandle(run, None, name)
    worker.hear()
    return {
        "name": name,
        "node": worker.node,
        "job": vars(job) if job else None,
        "device": worker.device,
        "doing": worker.doing,
        "lived_s": worker.lived_s,
        "busy_s": round(worker.busy_s, 3),
    }
