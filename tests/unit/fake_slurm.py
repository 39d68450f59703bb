"""A Slurm in memory: its command line, as far as it is used here, nodes, a queue and a clock that is moved by hand.

Decides: when a job runs and on which node, how it ends, and what each command says of it, in the words of Slurm 22.05.
`tests/cluster/transcripts/` holds what a real one said; `test_fake_slurm.py` compares. Never decides what a job does:
`begins` and `ended` tell the caller. Simpler than a real one: a node takes one job, a cancelled one is over at once.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from submitit.core import utils

from lemonade_hpc.run import chain, queue, slurm

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "sinfo", "srun")
UID = 1000
MIN_JOB_AGE_S = 300.0
"""How long squeue shows a job that has ended."""
KNOWN = {"partition": {"main", "urgent"}, "account": {"lab"}, "qos": {"normal"}}
"""What a job may name; a kind that is not here has no members."""
NO_CONTROLLER = "Unable to contact slurm controller (connect failure)"
TIMED_OUT = "Socket timed out on send/recv operation"
NO_TASK = "4294967294"
NO_NODES = "Requested node configuration is not available"
LIMITED = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
REASONS = {"FAILED": "NonZeroExitCode", "NODE_FAIL": "NodeDown", "TIMEOUT": "TimeLimit"}
"""What squeue says of why, of a job that has ended."""
REFUSALS = {
    "partition": "Invalid partition name specified",
    "account": "Invalid account or account/partition combination specified",
    "qos": "Invalid qos specification",
    "wckey": "Invalid wckey specification",
    "constraint": "Invalid feature specification",
    "reservation": "Requested reservation is invalid",
}
OPTIONS = frozenset({
    "account", "array", "chdir", "constraint", "cpus-per-task", "dependency", "error", "exclude", "exclusive", "gres",
    "hold", "job-name", "mem", "no-requeue", "nodes", "ntasks", "open-mode", "output", "parsable", "partition", "qos",
    "reservation", "signal", "test-only", "time", "wckey",
})  # fmt: skip
"""Of sbatch."""
WITH_VALUE = frozenset({"-S", "-o", "-j", "--name"})
"""Options of sacct whose value is the next word."""
NO_DATABASE = (
    "sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to "
    "host:127.0.0.1:6819: Connection refused\n"
    "sacct: error: Sending PersistInit msg: Connection refused\n"
    "sacct: error: Problem talking to the database: Connection refused\n"
)


class Answer(NamedTuple):
    """What a command says."""

    code: int = 0
    out: str = ""
    err: str = ""


@dataclass(eq=False)
class Job:
    """A job, or a task of an array."""

    number: int
    task: int | None
    options: dict[str, str]
    script: str
    submitted: float
    state: str = "PENDING"
    reason: str = "None"
    node: str = ""
    ends: float = math.inf
    fate: str = "TIMEOUT"
    """When it is killed, and what it is then said to have died of."""
    ended: float = math.inf
    cancelled: bool = False
    begun: bool = False
    known_as: str = ""
    """Its index in an array and those of the tasks that waited with it, as accounting goes on to tell them."""
    rest: bool = False
    """Whether it was cancelled by name before it began: such tasks of an array have no index any more."""

    @property
    def id(self) -> str:
        return f"{self.number}" if self.task is None else f"{self.number}_{self.task}"

    @property
    def name(self) -> str:
        return self.options["job-name"]

    @property
    def throttle(self) -> str:
        """How many tasks of its array may run at once: "%4", or nothing."""
        return "".join(self.options.get("array", "").partition("%")[1:])


class FakeSlurm:
    """One cluster. `delay_s`: for how long a new job is not looked at."""

    def __init__(
        self,
        num_nodes: int = 4,
        *,
        max_array: int = 1001,
        delay_s: float = 0.0,
        begins: Callable[[Job], None] = lambda job: None,
        ended: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.nodes = [f"n{k}" for k in range(1, num_nodes + 1)]
        self.max_array, self.delay_s = max_array, delay_s
        self.begins, self.ended = begins, ended
        self.now = 1000.0
        self.controller = self.accounting = True
        """Whether slurmctld and slurmdbd answer."""
        self.available = True
        """Whether a node is up; if none is, sbatch takes a job, but `--test-only` does not."""
        self.mute = False
        """Whether sbatch's answer is lost on the way."""
        self.lag_s = 0.0
        """How old a job must be for accounting to know it."""
        self.limits: dict[str, int] = {}
        """How many jobs may be in the queue, by the name of the limit."""
        self.jobs: list[Job] = []
        self._queue: list[Job] = []
        """Those that squeue shows."""
        self._broken: dict[str, float] = {}
        self._next = 7001

    # ------------------------------------------------------------ what happens

    def advance(self, seconds: float) -> None:
        """Let time pass: jobs end at their limit, nodes come back, jobs start."""
        self.now += seconds
        self._queue = [job for job in self._queue if self.now - job.ended < MIN_JOB_AGE_S or job.ended == math.inf]
        for job in self.running():
            if self.now > job.ends:
                self.end(job, job.fate)
        if self.controller and self.available:
            self._schedule()

    def running(self) -> list[Job]:
        return [job for job in self._queue if job.state == "RUNNING"]

    def end(self, job: Job, state: str) -> None:
        """A job is over."""
        job.state, job.ended = state, self.now
        job.reason = REASONS.get(state, job.reason)
        self.ended(job)

    def preempt(self, job: Job, grace_s: float) -> None:
        """It has been sent a signal, and is killed later."""
        job.ends, job.fate = self.now + grace_s, "PREEMPTED"

    def fail_node(self, node: str, for_s: float) -> None:
        """A node is lost for a while; what ran there counts as failed, whether or not it runs on."""
        self._broken[node] = self.now + for_s
        for job in self.running():
            if job.node == node:
                self.end(job, "NODE_FAIL")

    def _schedule(self) -> None:
        taken = {job.node for job in self.running()}
        free = [node for node in self.nodes if node not in taken and self._broken.get(node, 0.0) < self.now]
        head: Job | None = None
        for job in [job for job in self._queue if job.state == "PENDING" and self.now - job.submitted >= self.delay_s]:
            fitting = [node for node in free if node not in _avoided(job.options)]
            if "hold" in job.options:
                job.reason = "JobHeldUser"
            elif not self._is_due(job):
                job.reason = "Dependency"
            elif job.throttle and self._num_running(job) >= int(job.throttle[1:]):
                job.reason = "JobArrayTaskLimit"
            elif fitting:
                free.remove(fitting[0])
                job.node, job.state, job.reason, job.begun = fitting[0], "RUNNING", "None", True
                job.ends = self.now + 60 * float(job.options.get("time", "inf"))
                self.begins(job)
            else:
                head = head or job
                job.reason = "Resources" if head.number == job.number else "Priority"
        for tasks in _unbegun(self._queue).values():
            if tasks[0].reason in ("Resources", "Priority"):
                for job in tasks:
                    job.known_as = job.known_as or _listed(tasks)

    def _is_due(self, job: Job) -> bool:
        """Of the jobs with one name and `singleton` one runs at a time, in the order of submission."""
        if job.options.get("dependency") != "singleton":
            return True
        rivals = [other for other in self._queue if other.name == job.name and other.state in ("RUNNING", "PENDING")]
        return rivals[0] is job

    def _num_running(self, job: Job) -> int:
        return sum(other.number == job.number for other in self.running())

    # ------------------------------------------------------------ commands

    def run(self, command: Sequence[str], stdin: str | None = None) -> Answer:
        """What a command line of Slurm's says."""
        options, words = _read(command[1:])
        if command[0] == "sbatch":
            return self._sbatch(options, words, stdin)
        if command[0] == "sacct":
            return self._sacct(options)
        if command[0] == "scancel":
            return self._scancel(options, words)
        if command[0] == "sinfo":
            return self._sinfo(options)
        return self._squeue(options) if command[0] == "squeue" else self._scontrol(words)

    def _sbatch(self, said: dict[str, str], words: list[str], stdin: str | None) -> Answer:
        text = Path(words[0]).read_text() if words else stdin or ""
        lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
        options = _read(word for line in lines for word in shlex.split(line))[0] | said
        options.setdefault("job-name", Path(words[0]).name if words else "sbatch")
        tasks = _tasks(options["array"]) if "array" in options else [None]
        if refused := _refused_before_it_is_sent(options) or self._refused(options, tasks):
            return refused
        number = self._next if "test-only" in options else self._enter(options, text, tasks)
        if self.mute:
            return Answer(1, "", f"{_failed(options)}: {TIMED_OUT}\n")
        if "test-only" in options:
            node = next(node for node in self.nodes if node not in _avoided(options))
            where = f"on nodes {node} in partition {options.get('partition', 'main')}"
            self._next += 1
            start = f"Job {number} to start at 2026-01-01T00:00:00 using 1 processors"
            return Answer(0, "", f"sbatch: {start} {where}\n")
        return Answer(0, f"{number}\n" if "parsable" in options else f"Submitted batch job {number}\n")

    def _enter(
        self, options: dict[str, str], text: str, tasks: Sequence[int | None], state: str = "PENDING", why: str = "None"
    ) -> int:
        number = self._next
        ended = math.inf if state == "PENDING" else self.now
        made = [Job(number, task, options, text, self.now, state, why, ended=ended) for task in tasks]
        self.jobs += made
        self._queue += made
        self._next += len(made)
        return number

    def _refused(self, options: dict[str, str], tasks: Sequence[int | None]) -> Answer | None:
        first, why = self._objection(options, tasks)
        if why == NO_NODES and "test-only" not in options:
            self._enter(options, "", [None], "FAILED", "BadConstraints")
        return Answer(1, "", f"{first}{_failed(options)}: {why}\n") if why else None

    def _objection(self, options: dict[str, str], tasks: Sequence[int | None]) -> tuple[str, str]:
        """What slurmctld says first, and why it refuses; both empty where it does not."""
        if not self.controller:
            return "", NO_CONTROLLER
        for key, words in REFUSALS.items():
            if key in options and options[key] not in KNOWN.get(key, ()):
                first = f"sbatch: error: invalid partition specified: {options[key]}\n" if key == "partition" else ""
                return first, words
        if tasks[-1] is not None and tasks[-1] >= self.max_array:
            return "", "Invalid job array specification"
        queued = sum(job.state in ("PENDING", "RUNNING") for job in self._queue)
        for name, most in self.limits.items():
            if queued + len(tasks) > most:
                return f"sbatch: error: {name}\n", LIMITED
        if not _avoided(options) <= set(self.nodes):
            return "", "Invalid node name specified"
        if not self.available and "test-only" in options:
            return "", NO_NODES
        num_gpus = int(options.get("gres", "gpu:1").rpartition(":")[2])
        return "", NO_NODES if num_gpus > 1 or _avoided(options) == set(self.nodes) else ""

    def _squeue(self, options: dict[str, str]) -> Answer:
        assert options.keys() <= {"me", "array", "noheader", "states", "name", "jobs", "format"}, options
        if not self.controller:
            return Answer(1, "", f"slurm_load_jobs error: {NO_CONTROLLER}\n")
        states = options.get("states", "PENDING,RUNNING,SUSPENDED,COMPLETING").split(",")
        shown = [job for job in self._queue if states == ["all"] or job.state in states]
        if "name" in options:
            shown = [job for job in shown if job.name in options["name"].split(",")]
        if "jobs" in options:
            wanted = options["jobs"]
            if all(str(job.number) != wanted.partition("_")[0] for job in self._queue):
                return Answer(1, "", "slurm_load_jobs error: Invalid job id specified\n")
            shown = [job for job in shown if wanted in (job.id, str(job.number))]
        lines = [
            _filled(options["format"], i=_id(job, index), j=job.name, T=job.state, r=job.reason, N=job.node)
            for index, job in _records(shown, each="array" in options)
        ]
        return Answer(0, "".join(lines))

    def _sinfo(self, options: dict[str, str]) -> Answer:
        assert options.keys() == {"all", "Node", "noheader", "format"}, options
        if not self.controller:
            return Answer(1, "", f"slurm_load_partitions: {NO_CONTROLLER}\n")
        rows = [(node, partition) for node in self.nodes for partition in ("main*", "urgent")]
        return Answer(0, "".join(_filled(options["format"], P=name, c="2", m="5000", G="gpu:1") for _, name in rows))

    def _scontrol(self, words: list[str]) -> Answer:
        what = {"config": "slurm_load_ctl_conf", "job": "slurm_load_jobs"}[words[1]]
        if not self.controller:
            return Answer(1, "", f"{what} error: {NO_CONTROLLER}\n")
        if words[1] == "config":
            return Answer(0, f"Configuration data as of now\nMaxArraySize            = {self.max_array}\n")
        lines = []
        for index, job in _records(self._queue):
            array = f" ArrayJobId={job.number} ArrayTaskId={index or NO_TASK}" if job.task is not None else ""
            told = f"JobName={job.name} UserId=lemonade({UID}) JobState={job.state} Reason={job.reason}"
            lines.append(f"JobId={job.number}{array} {told} NodeList={job.node}\n")
        return Answer(0, "".join(lines) or "No jobs in the system\n")

    def _sacct(self, options: dict[str, str]) -> Answer:
        assert options.keys() <= {"X", "n", "P", "S", "name", "j", "o"}, options
        if not self.accounting:
            return Answer(1, "", NO_DATABASE)
        shown = [job for job in self.jobs if self.now - job.submitted >= self.lag_s]
        if "name" in options:
            shown = [job for job in shown if job.name in options["name"].split(",")]
        if "j" in options:
            shown = [job for job in shown if options["j"] in (job.id, str(job.number))]
        rows = []
        for index, job in _records(shown):
            if index and not job.begun and not job.known_as:
                continue
            state = f"CANCELLED by {UID}" if job.cancelled else job.state
            id = _id(job, index if job.begun or job.rest else job.known_as)
            values = {"JobID": id, "JobName": job.name, "State": state, "NodeList": job.node or "None assigned"}
            rows.append("|".join(values[column] for column in options["o"].split(",")))
        return Answer(0, "".join(f"{row}\n" for row in rows))

    def _scancel(self, options: dict[str, str], words: list[str]) -> Answer:
        assert options.keys() <= {"me", "name", "state"} and bool(words) != bool(options), options
        if not self.controller:
            if options:
                return Answer(1, "", f"slurm_load_jobs error: {NO_CONTROLLER}\n")
            said = [f"scancel: error: Kill job error on job id {word}: {NO_CONTROLLER}\n" for word in words]
            return Answer(8, "", "".join(said))
        living = [job for job in self._queue if job.state in ("PENDING", "RUNNING")]
        chosen = [job for job in living if job.id in words or str(job.number) in words]
        if options:
            state = options.get("state")
            chosen = [job for job in living if job.name == options["name"] and state in (None, job.state)]
        for number, tasks in _unbegun(chosen).items():
            others_wait = len(tasks) < len(_unbegun(living)[number])
            for job in tasks:
                job.rest, job.known_as = bool(options), job.known_as or _listed(tasks)
                if others_wait:  # from then on nobody knows of it
                    self._queue.remove(job)
                    self.jobs.remove(job)
        for job in chosen:
            job.cancelled = True
            self.end(job, "CANCELLED")
        return Answer()


def _read(words: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Options without their dashes, and the other words."""
    options, rest = {}, []
    left = iter(words)
    for word in left:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            options[key.lstrip("-")] = next(left) if key in WITH_VALUE and not equals else value
        else:
            rest.append(word)
    return options, rest


def _refused_before_it_is_sent(options: dict[str, str]) -> Answer | None:
    """What sbatch itself has against a job."""
    unknown = [f"--{key}={value}".rstrip("=") for key, value in options.items() if key not in OPTIONS]
    if unknown:
        more = 'Try "sbatch --help" for more information'
        return Answer(255, "", f"sbatch: unrecognized option '{unknown[0]}'\n{more}\n")
    if not options.get("gres", "gpu").startswith("gpu"):
        return Answer(1, "", "sbatch: error: Invalid generic resource (gres) specification\n")
    return None


def _failed(options: dict[str, str]) -> str:
    return "allocation failure" if "test-only" in options else "sbatch: error: Batch job submission failed"


def _avoided(options: dict[str, str]) -> set[str]:
    return {node for node in options.get("exclude", "").split(",") if node}


def _tasks(array: str) -> list[int | None]:
    """The indices that `--array=0-3%2` names."""
    first, _, last = array.partition("%")[0].partition("-")
    return list(range(int(first), int(last or first) + 1))


def _ranges(tasks: Sequence[int]) -> str:
    """As Slurm writes indices: "0-2,5"."""
    starts = [b for a, b in pairwise([-2, *tasks]) if b != a + 1]
    ends = [a for a, b in pairwise([*tasks, math.inf]) if b != a + 1]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _listed(tasks: Sequence[Job]) -> str:
    """The indices of tasks of one array: "3-5%4"."""
    return _ranges([job.task for job in tasks if job.task is not None]) + tasks[0].throttle * (len(tasks) > 1)


def _unbegun(jobs: Iterable[Job]) -> dict[int, list[Job]]:
    """The tasks of arrays that have not begun, by the array."""
    found: dict[int, list[Job]] = {}
    for job in jobs:
        if job.task is not None and not job.begun:
            found.setdefault(job.number, []).append(job)
    return found


def _records(jobs: Sequence[Job], *, each: bool = False) -> Iterator[tuple[str, Job]]:
    """What Slurm has of jobs, with its index in an array: of tasks that have not begun one for all, "3-5%4"."""
    for job in jobs:
        if job.task is None or job.begun or (each and not job.rest):
            yield "" if job.task is None else f"{job.task}", job
    for tasks in _unbegun(jobs).values():
        if tasks[0].rest or not each:
            yield "" if tasks[0].rest else _listed(tasks), tasks[0]


def _id(job: Job, index: str) -> str:
    if not index:
        return f"{job.number}"
    return f"{job.number}_{index}" if index.isdigit() else f"{job.number}_[{index}]"


def _filled(pattern: str, **values: str) -> str:
    """One line in the format that was asked for."""
    return re.sub("%(.)", lambda found: values[found[1]], pattern) + "\n"


def install(patch: pytest.MonkeyPatch, answer: Callable[[Sequence[str], str | None], Answer]) -> None:
    """Have each command of Slurm's that the program or submitit calls in this process answered by a function."""
    which = shutil.which

    def run(command: Sequence[str], *, input: str | None = None, **more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, *answer(command, input))

    def call(function: utils.CommandFunction) -> str:
        code, out, err = answer(function.command, None)
        if code:
            raise utils.FailedJobError(err.strip())
        return out.strip()

    for module in (queue, slurm, chain):
        patch.setattr(module, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    patch.setattr(utils.CommandFunction, "__call__", call)
    patch.setattr(shutil, "which", lambda name, *more: name if name in COMMANDS else which(name, *more))
