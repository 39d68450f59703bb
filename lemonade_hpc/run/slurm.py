"""Workers as tasks of Slurm arrays, submitted through submitit.

Decides: when Slurm is asked, and what its answers (`queue.py`) mean for a worker's life. A coordinator finds in the
queue what another one submitted, also where that one died around the call. A failed query says nothing; a job that is
seen no more, or seen to have ended, counts as gone once that is seen twice. Never decides whether a child is finished:
only its outcome does. submitit submits, and is asked nothing else.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lemonade_hpc import files
from lemonade_hpc.config import Cluster, ConfigError
from lemonade_hpc.run import queue, site, worker
from lemonade_hpc.run.backends import CANCELLED, DIED, LAST_BYTES, REQUEUED, NotNow, Refused
from lemonade_hpc.run.history import NOT_STARTED
from lemonade_hpc.run.request import gpus_of, parameters, script

COMMANDS = ("sbatch", "squeue", "scancel", "srun")
SILENT_QUERIES = 2
"""A worker that has said nothing for as long as this many queries are apart is looked up."""
CONFIRMATIONS = 2
"""How often a job must be seen to have ended before its worker counts as gone."""
UNSEEN_S = 900.0
"""How long a job may be missing from the queue while nothing is heard of its worker."""
AGAIN = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
"""States of a job that has not begun. Of a worker that was heard of they say that its job is to begin anew: a worker
lives once, so it is over."""
ENDING, ENDING_S = "COMPLETING", 600.0
"""A state that lasts where a node hangs, and for how long it counts as a life."""
ENDS = {
    "BOOT_FAIL": "node failure", "CANCELLED": CANCELLED, "COMPLETED": "completed", "DEADLINE": "time limit",
    "NODE_FAIL": "node failure",
    "OUT_OF_MEMORY": "out of memory", "PREEMPTED": "preempted", "TIMEOUT": "time limit", ENDING: "hung at its end",
}  # fmt: skip
"""What a state says of how a worker ended."""
STUCK = re.compile(
    r"Invalid|NotAllowed|BadConstraints|NeverSatisfied|JobHeld|PartitionConfig|Partition\w+Limit|Max\w+PerJob|PerLimit|Grp(?!\w*Run)\w*Min"
)
"""In reasons for which a job waits until somebody changes something."""
TRANSIENT = ("timed out", "unable to contact", "connection refused", "temporarily", "try again", "inactive or drain")
"""What sbatch says, among other words, where the same call may succeed later, or has succeeded."""
CROWDED = re.compile(r"\w*(Max|Grp)SubmitJob\w+")
"""What it says, among other words, where its user, account or QOS has as many jobs in the queue as it may."""
RETRY_S = 600.0
"""Longest time between submissions that fail."""
CROWDED_S = 3600.0
"""How often it is told that this is still so."""
NODES_MAY_BE_DOWN = "requested node configuration is not available"
"""What `sbatch --test-only` says where sbatch itself would let the job wait, or refuse it in the same words."""


def check_commands() -> None:
    """Raises ConfigError where Slurm's commands are not at hand."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"cluster.backend: got slurm, but {', '.join(missing)} cannot be found here; go to a node where jobs are "
            f"submitted (from inside an image: start it by the helper, see slurm/README.md), or use backend: local"
        )


def check(cluster: Cluster) -> None:
    """Ask Slurm, without submitting, whether it would take such a worker. Raises ConfigError with what it says."""
    check_commands()
    text = script(cluster, "lemonade-check", Path("."))
    said = check_script(text, "a worker as these settings describe it")
    if said is not None and NODES_MAY_BE_DOWN in said.lower():
        unmet = site.unmet(cluster, queue.ask(*site.QUESTION) or "")
        if unmet is not None:
            raise ConfigError(f"{unmet}. Slurm says: {said}")


def check_script(text: str, what: str) -> str | None:
    """Ask Slurm, without submitting, whether it would take such a job; what it says where that may pass.

    Raises ConfigError with what it says where it never would.
    """
    said = refusal(text)
    if said is not None and not may_pass(said) and not CROWDED.search(said) and NODES_MAY_BE_DOWN not in said.lower():
        raise ConfigError(f"cluster: Slurm refuses {what}. It says: {said}\n`doctor` says which setting")
    return said


def refusal(text: str, *options: str) -> str | None:
    """Why Slurm would not take such a job now; None where it would, or does not answer."""
    return tested(text, *options) or None


def tested(text: str, *options: str) -> str | None:
    """Why Slurm would not take such a job now, empty where it would; None where it does not answer."""
    command = ("sbatch", "--test-only", *options)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=queue.QUERY_TIMEOUT_S, check=False,
            env=queue.environment(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""


def may_pass(said: str) -> bool:
    """Whether the same call of sbatch may succeed later, or has succeeded."""
    return any(words in said.lower() for words in TRANSIENT)


@contextmanager
def _outside_a_job() -> Iterator[None]:
    """For submitit, which has sbatch see this process's own environment."""
    before = dict(os.environ)
    for key in before.keys() - queue.environment().keys():
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(before)


class SlurmBackend:
    """The workers of a run on a cluster. `run_id` tells its jobs from those of other runs.

    `at_once`: whether Slurm may be called at once; a successor's predecessor may have called it a moment ago. `start`:
    asked before every launch for the shell words that are Python for a worker, by default this process's; may raise
    Refused.
    """

    lasting = excludes = True

    def __init__(
        self, run: Path, run_id: str, cluster: Cluster, note: Callable[[str], None], *, at_once: bool = True,
        start: Callable[[], str] | None = None,
    ) -> None:  # fmt: skip
        self._run, self._cluster, self._note = run.resolve(), cluster, note
        self._run_id, self._start = run_id, start
        self.gpus = gpus_of(cluster)
        self._places: dict[str, queue.Place] = {}
        self._heard_at: dict[str, float] = {}
        self._seen: set[str] = set()
        """Workers whose jobs were seen to wait for their turn."""
        self._ended: dict[str, int] = {}
        """How many queries in a row saw a worker's job to have ended, or not at all."""
        self._last_state: dict[str, str] = {}
        self._ending_since: dict[str, float] = {}
        self._nodes: dict[str, str] = {}
        self._max_array: int | None = None
        """MaxArraySize, once Slurm has told it."""
        self._fits: int | None = None
        """The largest array that may be taken, once one was refused for the number of jobs; None: any."""
        self._crowded_at = -math.inf
        """When it was last told that there is no room."""
        self._proven = 0
        """The array that would have been taken when last tried; 0: none was tried."""
        self._num_failures = 0
        """Submissions in a row that failed in a way that may pass."""
        self._doubtful: set[str] = set()
        """Workers of such ones, which Slurm may have accepted."""
        self._doomed: list[str] = []
        """Jobs to be cancelled."""
        self._stuck: set[str] = set()
        """Reasons to wait that have been told."""
        self._unexplained: set[str] = set()
        """Workers that are gone, and how is asked."""
        self._jobs: dict[queue.Place, str] = {}
        self._queried_at = self._submitted_at = -math.inf if at_once else time.monotonic()

    def room(self) -> int:
        """How many workers may be started now: as many as the site and the settings take in one array.

        To ask what the site takes is a status call.
        """
        now = time.monotonic()
        if now - self._submitted_at < self._between_s():
            return 0
        if self._max_array is None:
            if now - self._queried_at < self._cluster.status_s:
                return 0
            self._queried_at, self._max_array = now, queue.max_array_size()
        most = min(self._cluster.max_array, self._max_array or self._cluster.max_array)
        if self._num_failures:
            return 1  # to see whether they go on
        return most if self._fits is None else self._room_left(min(most, self._fits))

    def _between_s(self) -> float:
        """How long to wait after a submission: longer and longer while they fail."""
        return max(self._cluster.submit_s, min(self._cluster.submit_s * 2.0**self._num_failures, RETRY_S))

    def _room_left(self, size: int) -> int:
        """How many more jobs Slurm takes of this user, who had too many: tried without submitting, now and then."""
        if self._proven:
            proven, self._proven = self._proven, 0
            return proven
        if time.monotonic() - self._submitted_at >= self._cluster.status_s:
            self._submitted_at = time.monotonic()
            said = refusal(script(self._cluster, "lemonade-check", Path(".")), f"--array=0-{size - 1}") or ""
            if CROWDED.search(said):
                self._fits = max(1, size // 2)
                if time.monotonic() - self._crowded_at >= CROWDED_S:
                    self._crowded_at = time.monotonic()
                    self._note(f"sbatch still takes no {size} more jobs at once: {said}")
            else:
                self._proven = size
        return 0

    def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
        """Submit one array. Raises Refused, or NotNow where the queue holds as many jobs as its user may have.

        Any other error that may pass leaves the workers to be found, or given up.
        """
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        python = self._start() if self._start else None
        self._places |= {name: (names[0], place) for place, name in enumerate(names)}
        self._submitted_at = time.monotonic()
        executor = SlurmExecutor(folder=self._folder(names[0]), python=python)
        executor.update_parameters(**parameters(self._cluster, queue.prefix(self._run_id) + names[0], avoid))
        try:
            with _outside_a_job():
                jobs = executor.map_array(worker.serve, [str(self._run)] * len(names), names)
        except FailedJobError as error:
            if CROWDED.search(str(error)):
                self._fits, self._crowded_at = max(1, len(names) // 2), time.monotonic()
                self._num_failures = 0
                for name in names:
                    del self._places[name]
                raise NotNow(f"sbatch takes no {len(names)} more jobs now, so fewer workers run: {error}") from error
            if not may_pass(str(error)):
                raise Refused(str(error)) from error
            self._num_failures += 1
            self._doubtful.update(names)
            self._note(f"sbatch failed, which may pass; the next one is in {self._between_s():.0f} s at least: {error}")
        else:
            self._num_failures = 0
            self._fits = None if self._fits is None or self._fits >= self._cluster.workers else 2 * self._fits
            self._jobs |= {(names[0], place): job.job_id for place, job in enumerate(jobs)}

    def adopt(self, name: str, launch: str, place: int) -> None:  # noqa: D102
        self._places[name] = (launch, place)

    def heard(self, name: str, messages: Sequence[dict[str, Any]]) -> None:
        """Its reports. With the first, what was seen of its job before is out of date."""
        if messages:
            if name not in self._heard_at:
                self._last_state.pop(name, None)
            self._heard_at[name] = time.monotonic()

    def alive(self, name: str) -> bool:
        """Whether it has spoken lately, or its job has not been seen to have ended."""
        return name in self._places and (not self._silent(name) or self._ended.get(name, 0) < CONFIRMATIONS)

    def seen(self, name: str) -> bool:  # noqa: D102
        return name in self._seen

    def _silent(self, name: str, since_s: float | None = None) -> bool:
        limit = SILENT_QUERIES * self._cluster.status_s if since_s is None else since_s
        return time.monotonic() - self._heard_at.get(name, -math.inf) > limit

    def ended(self, name: str) -> str | None:
        """How its job ended, once Slurm has been asked."""
        state, seen = self._last_state.get(name), self._ended.get(name, 0)
        if state in AGAIN and name in self._heard_at:
            self._unexplained.discard(name)
            self.kill(name)
            return REQUEUED
        if state in queue.ENDED or seen >= CONFIRMATIONS or name not in self._places:  # the last: it left long ago
            self._unexplained.discard(name)
            if state is None and name in self._doubtful - self._heard_at.keys():
                return NOT_STARTED
            return ENDS.get(state or "", DIED)
        self._unexplained.add(name)
        return None

    def kill(self, name: str) -> None:
        """Have its job cancelled, if it is known, with others in the next step."""
        job = self._jobs.get(self._places.get(name, ("", 0)))
        if job is not None:
            self._doomed.append(job)

    def _cancel(self) -> None:
        if self._doomed:
            queue.ask("scancel", *self._doomed)
            self._doomed.clear()

    def node(self, name: str) -> str | None:  # noqa: D102
        return self._nodes.get(name)

    def last_output(self, name: str) -> str:  # noqa: D102
        launch, place = self._places[name]
        job = self._jobs.get((launch, place), "unknown")
        logs = sorted(self._folder(launch).glob(f"{job}_*_log.err"))
        return logs[-1].read_bytes()[-LAST_BYTES:].decode(errors="replace").strip() if logs else ""

    def step(self) -> None:
        """Cancel what is to be, or ask for the state of jobs, now and then, while a worker is not heard of."""
        if self._doomed:
            self._cancel()
            return
        now = time.monotonic()
        asked = [name for name in self._places if self._silent(name) and self._ended.get(name, 0) < CONFIRMATIONS]
        asked += self._unexplained - set(asked)
        if asked and now - self._queried_at >= self._cluster.status_s:
            self._queried_at = now
            answer = queue.jobs_of(self._run_id, {self._places[name] for name in asked})
            if answer is not None:
                self._jobs |= {place: job.id for place, job in answer.jobs.items()}
                for name in asked:
                    job = answer.jobs.get(self._places[name])
                    if job is not None or answer.all:
                        self._judge(name, job.state if job else None)
                    if job is not None:
                        self._tell_if_stuck(job)
                        self._nodes |= {name: job.node} if job.node else {}

    def _tell_if_stuck(self, job: queue.Job) -> None:
        """Say it where a job waits for what will not come by itself."""
        if job.state == "PENDING" and job.reason not in (*self._stuck, "") and STUCK.search(job.reason):
            self._stuck.add(job.reason)
            self._note(f"job {job.id} waits for a reason that does not pass by itself: {job.reason}")

    def _judge(self, name: str, state: str | None) -> None:
        """What one answer says of one worker."""
        if (
            state is None
            and name in self._heard_at
            and name not in self._unexplained
            and not self._silent(name, UNSEEN_S)
        ):
            return  # it was at work: Slurm may have forgotten a job that still writes its last words
        if state is not None and not (self._last_state.get(name) in AGAIN and name in self._heard_at):
            self._last_state[name] = state
        if state != ENDING:
            self._ending_since.pop(name, None)
        again = state in AGAIN and name in self._heard_at
        if again or state is None or state in queue.ENDED or (state == ENDING and self._hangs(name)):
            self._ended[name] = self._ended.get(name, 0) + 1
            return
        self._ended[name] = 0
        if state == "PENDING":
            self._seen.add(name)
        if name not in self._heard_at:
            self._deliver(name)

    def _hangs(self, name: str) -> bool:
        """Whether a job that is ending has been doing so for too long."""
        return time.monotonic() - self._ending_since.setdefault(name, time.monotonic()) >= ENDING_S

    def _deliver(self, name: str) -> None:
        """Put a worker's task where submitit looks for it, in case its submitter died before it did so."""
        from submitit.core.utils import DelayedSubmission, JobPaths

        launch, _ = self._places[name]
        path = JobPaths(self._folder(launch), job_id=self._jobs[self._places[name]]).submitted_pickle
        if not path.exists():
            files.make_folder(path.parent)
            DelayedSubmission(worker.serve, str(self._run), name).dump(path)

    def _folder(self, launch: str) -> Path:
        return self._run / files.WORKERS / launch / "job"

    def close(self) -> None:
        """Leave the workers as they are: they are told to stop by their mailboxes, if at all."""
        self._cancel()
