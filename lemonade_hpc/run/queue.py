"""What Slurm says of jobs: of a run's workers, and of coordinators.

Decides: which commands are asked, in what order, and how their answers are read. A job's name says which run and which
launch it belongs to. Each command may be missing or fail, and a failed query says nothing. Never decides what follows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lemonade_hpc.run import owner
from lemonade_hpc.run.host import helper

Place = tuple[str, int]
"""The first worker of a launch, and the index of a task of its array."""

Told = TypeVar("Told")

COORDINATOR = "coordinator"
"""Stands in a job's name where a worker's has its launch."""
IN_FULL = {"SLURM_BITSTR_LEN": "0"}
"""Else a list of tasks ends after 64 characters."""
LIST = ("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%j|%T|%r|%N")
CONFIG = ("scontrol", "show", "config")
QUERY_TIMEOUT_S = 20.0
PATIENT_S = 60.0
UNKNOWN_NODES = ("(null)", "None assigned")
ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
})  # fmt: skip
"""States that a job which is not requeued never leaves; any other, known or not, is a life."""
NO_TASK = "4294967294"
"""Stands for the index that tasks of an array have lost."""
TASKS = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
"""Indices of tasks that are told of together: "3", "3-5", "0-200:2"."""


def prefix(run_id: str) -> str:
    """How the names of all jobs of a run begin."""
    return f"lemonade-{run_id[:8]}-"


@dataclass(frozen=True)
class Job:
    """A job as Slurm shows it."""

    id: str
    state: str
    reason: str = ""
    """Why it waits."""
    node: str = ""
    """Where it runs, or ran."""


@dataclass(frozen=True)
class Answer:
    """What Slurm says of a run's jobs; `all`: one that is missing is not in the queue."""

    jobs: dict[Place, Job]
    all: bool


def jobs_of(run_id: str, wanted: Collection[Place] = ()) -> Answer | None:
    """Ask squeue, or scontrol where that fails, or sacct; None where nobody answers.

    sacct is asked too after `wanted` jobs that the queue has forgotten. It may not know yet of jobs just submitted.
    """
    began = time.monotonic()
    answer = ask(*LIST)
    if answer is not None:
        there = _named(run_id, wanted, (line.split("|") for line in answer.splitlines()))
    else:
        if time.monotonic() - began < QUERY_TIMEOUT_S:  # else the controller hangs, which would not answer this either
            answer = ask("scontrol", "show", "job", "--oneliner")
        there = _named(run_id, wanted, map(_told_by_scontrol, (answer or "").splitlines()))
    found = there[0] | there[1]
    if answer is None or not found.keys() >= set(wanted):
        name = ",".join(sorted({prefix(run_id) + launch for launch, _ in wanted}))
        past = ask("sacct", "-X", "-n", "-P", "-S", "now-30days", "--name", name, "-o", "JobID,JobName,State,NodeList")
        if answer is None and past is None:
            return None
        rows = [row for row in map(_told_by_sacct, (past or "").splitlines()) if _is_due(row, answer is not None)]
        known = _named(run_id, wanted, rows)
        found = known[0] | there[0] | known[1] | there[1]
    return Answer(found, answer is not None)


def queued(run_id: str) -> tuple[dict[Place, Job], list[Job]] | None:
    """What squeue alone says of a run: its workers' jobs, and its coordinators' that have not ended."""
    answer = ask(*LIST)
    if answer is None:
        return None
    rows = [row for row in (line.split("|") for line in answer.splitlines()) if len(row) == 5]
    together, alone = _named(run_id, (), rows)
    jobs = (Job(id, *rest) for id, name, *rest in rows if name == prefix(run_id) + COORDINATOR)
    return together | alone, [job for job in jobs if job.state not in ENDED]


def judge(who: dict[str, Any]) -> owner.Verdict:
    """Whether a coordinator lives: told by its process on this machine, else by its job."""
    verdict = owner.judge(who)
    if verdict != "unknown" or not who.get("slurm_job"):
        return verdict
    there, here = who.get("cluster"), os.environ.get("SLURM_CLUSTER_NAME") or settings().get("ClusterName")
    if there is None or here in (None, there):  # others may share the file system, and have jobs of the same numbers
        ended = job_has_ended(who["slurm_job"], mine=who.get("user") == os.getuid() and there == here is not None)
        known = here is not None or there is None  # else it may be an old job of another cluster that has ended
        verdict = "unknown" if ended is None else "alive" if not ended else "gone" if known else "unknown"
    return verdict


class Patient(Generic[Told]):
    """A question to Slurm for somebody who asks again and again: what was said holds for a minute."""

    def __init__(self, question: Callable[[Any], Told]) -> None:
        self._question = question
        self._said: dict[str, tuple[float, Told]] = {}

    def __call__(self, about: Any) -> Told:
        """What was said of it less than a minute ago, or is said now."""
        said = self._said.get(repr(about))
        if said is None or time.monotonic() - said[0] >= PATIENT_S:
            said = self._said[repr(about)] = (time.monotonic(), self._question(about))
        return said[1]


def job_has_ended(job: str, *, mine: bool) -> bool | None:
    """Whether one job, which was running once, is over; None where nobody says.

    `mine`: it is this user's, on this cluster, so that it is over where the queue is told without it: it was in there.
    """
    answer = ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
    if not answer:
        answer = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    states = (answer or "").split()
    if states:
        return states[0] in ENDED
    listed = ask(*LIST) if mine else None
    return None if listed is None else job not in (line.partition("|")[0] for line in listed.splitlines())


def _told_by_scontrol(line: str) -> Sequence[str]:
    """Id, name, state, reason and node of a job in one line of `key=value`."""
    said = dict(part.partition("=")[::2] for part in line.split())
    array, task = said.get("ArrayJobId", said.get("JobId", "")), said.get("ArrayTaskId")
    rest = (said.get(key, "") for key in ("JobName", "JobState", "Reason", "NodeList"))
    return (array if task in (None, NO_TASK) else f"{array}_{task}", *rest)


def _told_by_sacct(line: str) -> Sequence[str]:
    """The same, of a line of id, name, state and node."""
    id_, name, state, node = (line.split("|") + 4 * [""])[:4]
    return (id_, name, state, "", node)


def _is_due(row: Sequence[str], unqueued: bool) -> bool:
    """Whether accounting can be believed: of tasks together it is late, so only of ended ones that left the queue."""
    return "[" not in row[0] or (unqueued and row[2].partition(" ")[0] in ENDED)


def settings() -> dict[str, str]:
    """Slurm's own configuration, as far as it is told."""
    told = ask(*CONFIG) or ""
    return dict(re.findall(r"^(\w+)[ \t]*=[ \t]*(.*?)[ \t]*$", told, re.MULTILINE))


def number(told: str | None) -> int | None:
    """The number that a setting begins with, as in "300 sec"."""
    found = re.match(r"\d+", told or "")
    return int(found[0]) if found else None


def max_array_size() -> int | None:
    """MaxArraySize, the first index that no task may have; None where it is not told."""
    return number(settings().get("MaxArraySize"))


def _named(
    run_id: str, wanted: Collection[Place], rows: Iterable[Sequence[str]]
) -> tuple[dict[Place, Job], dict[Place, Job]]:
    """The jobs of a run's workers that rows of id, name, state, reason and node tell of together, and one by one.

    Tasks that wait, or were cancelled while they did, are told of together, and accounting goes on to do so when some
    have begun: what is said of one by itself counts more. Those that were cancelled by name have lost their indices:
    what has none is said of every place that is `wanted`. Other rows are passed over.
    """
    alone: dict[Place, Job] = {}
    together: dict[Place, Job] = {}
    for row in rows:
        if len(row) >= 3 and row[1].startswith(prefix(run_id)) and row[2]:
            launch, (number, _, tasks) = row[1].removeprefix(prefix(run_id)), row[0].partition("_")
            found = alone if tasks.isdigit() else together
            for task in _tasks(tasks) if tasks else {0, *(place for one, place in wanted if one == launch)}:
                id = f"{number}_{task}" if tasks or task else number
                reason, node = (*row[3:5], "", "")[:2]
                found[launch, task] = Job(id, row[2].split()[0], reason, "" if node in UNKNOWN_NODES else node)
    return together, alone


def _tasks(said: str) -> Iterator[int]:
    """The indices in "3", "[3-5,8%4]" or "0-200:2"."""
    for part in said.strip("[]").partition("%")[0].split(","):
        if found := TASKS.fullmatch(part):
            yield from range(int(found[1]), int(found[2] or found[1]) + 1, int(found[3] or 1))


def environment() -> dict[str, str]:
    """What Slurm's commands are to see: not the job that this process may be in."""
    return helper.outside_a_job(os.environ)


def silence() -> str:
    """Why squeue has not answered, and what to do, in words."""
    if shutil.which("squeue") is None:
        return "squeue cannot be found here; go where jobs are submitted (from inside an image: start it by the helper)"
    return "squeue does not answer; try again later"


def ask(*command: str) -> str | None:
    """What a command of Slurm's says, lists of tasks in full; None where it fails or does not answer in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False, env=environment() | IN_FULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
