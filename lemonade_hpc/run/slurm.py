"""Workers as tasks of Slurm arrays, submitted through submitit.

Decides: what is asked of Slurm, when, and what its answers mean for a worker's life. A job's name says which run and
which launch it belongs to, so that a coordinator finds in the queue what another one submitted, also where that one
died around the call. A failed query says nothing; a job that is seen no more, or seen to have ended, counts as gone
once that is seen twice. Never decides whether a child is finished: only its outcome does. submitit submits, and is
asked nothing else.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lemonade_hpc import files
from lemonade_hpc.config import Cluster, ConfigError
from lemonade_hpc.run import worker
from lemonade_hpc.run.backends import LAST_BYTES, THREAD_LIMITS, Refused

Place = tuple[str, int]
"""The first worker of a launch, and the index of a task of its array."""

COMMANDS = ("sbatch", "squeue", "scancel", "srun")
QUERY_TIMEOUT_S = 60.0
SILENT_QUERIES = 2
"""A worker that has said nothing for as long as this many queries are apart is looked up."""
CONFIRMATIONS = 2
"""How often a job must be seen to have ended before its worker counts as gone."""
UNSEEN_S = 900.0
"""How long a job may be missing from the queue while nothing is heard of its worker."""
ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
})  # fmt: skip
"""States that a job which is not requeued never leaves; any other, known or not, is a life."""
TRANSIENT = ("timed out", "unable to contact", "connection refused", "temporarily", "try again", "maxsubmit")
"""What sbatch says, among other words, where the same call may succeed later."""
NODES_MAY_BE_DOWN = "requested node configuration is not available"
"""What `sbatch --test-only` says where sbatch itself would let the job wait, or refuse it in the same words."""


def check(cluster: Cluster) -> None:
    """Ask Slurm, without submitting, whether it would take such a worker. Raises ConfigError with what it says."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"cluster.backend: got slurm, but {', '.join(missing)} cannot be found here; go to a node where jobs are "
            f"submitted, or use backend: local"
        )
    text = script(cluster, "lemonade-check", Path("."))
    try:
        command = ("sbatch", "--test-only")
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return
    if done.returncode and not _may_pass(done.stderr) and NODES_MAY_BE_DOWN not in done.stderr.lower():
        raise ConfigError(
            f"cluster: Slurm refuses a worker as these settings describe it. It says: {done.stderr.strip()}"
        )


def _may_pass(said: str) -> bool:
    return any(words in said.lower() for words in TRANSIENT)


def script(cluster: Cluster, name: str, folder: Path) -> str:
    """The batch script of one worker."""
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**parameters(cluster, name))
    return str(executor._make_submission_file_text("true", "check"))


def parameters(cluster: Cluster, name: str) -> dict[str, Any]:
    """The arguments of submitit's executor: what is asked of Slurm for one worker."""
    cpus = cluster.cpus_per_worker
    gpus = f"gpu:{cluster.gpus_per_worker}" if cluster.gpus_per_worker else None
    return {
        "job_name": name,
        "time": cluster.time_min,
        "cpus_per_task": cpus,
        "srun_args": [f"--cpus-per-task={cpus}"],  # from Slurm 22.05 on srun does not inherit it
        "mem": f"{int(1024 * cluster.mem_gb)}M",
        "gres": cluster.gres or gpus,
        **{key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "exclude", "wckey")},
        "array_parallelism": cluster.max_array,
        "setup": [*(f"export {key}={cpus}" for key in THREAD_LIMITS), *cluster.setup],
        "additional_parameters": {"no-requeue": True, **cluster.extra},
    }


class SlurmBackend:
    """The workers of a run on a cluster. `run_id` tells its jobs from those of other runs."""

    lasting = True

    def __init__(self, run: Path, run_id: str, cluster: Cluster, note: Callable[[str], None]) -> None:
        self._run, self._cluster, self._note = run.resolve(), cluster, note
        self._run_id = run_id
        self._places: dict[str, Place] = {}
        self._heard_at: dict[str, float] = {}
        self._ended: dict[str, int] = {}
        """How many queries in a row saw a worker's job to have ended, or not at all."""
        self._jobs: dict[Place, str] = {}
        self._queried_at = self._submitted_at = -math.inf

    def room(self) -> int:
        """How many workers may be started now."""
        waited = time.monotonic() - self._submitted_at
        return self._cluster.max_array if waited >= self._cluster.submit_s else 0

    def launch(self, names: Sequence[str]) -> None:
        """Submit one array. Raises Refused; an error that may pass leaves the workers to be found, or given up."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        self._places |= {name: (names[0], place) for place, name in enumerate(names)}
        self._submitted_at = time.monotonic()
        executor = SlurmExecutor(folder=self._folder(names[0]))
        executor.update_parameters(**parameters(self._cluster, _prefix(self._run_id) + names[0]))
        try:
            jobs = executor.map_array(worker.serve, [str(self._run)] * len(names), names)
        except FailedJobError as error:
            if not _may_pass(str(error)):
                raise Refused(str(error)) from error
            self._note(f"sbatch failed, which may pass: {error}")
        else:
            self._jobs |= {(names[0], place): job.job_id for place, job in enumerate(jobs)}

    def adopt(self, name: str, launch: str, place: int) -> None:  # noqa: D102
        self._places[name] = (launch, place)

    def heard(self, name: str, messages: Sequence[dict[str, Any]]) -> None:  # noqa: D102
        if messages:
            self._heard_at[name] = time.monotonic()

    def alive(self, name: str) -> bool:
        """Whether it has spoken lately, or its job has not been seen to have ended."""
        return name in self._places and (not self._silent(name) or self._ended.get(name, 0) < CONFIRMATIONS)

    def _silent(self, name: str, since_s: float | None = None) -> bool:
        limit = SILENT_QUERIES * self._cluster.status_s if since_s is None else since_s
        return time.monotonic() - self._heard_at.get(name, -math.inf) > limit

    def kill(self, name: str) -> None:
        """Cancel its job, if it is known."""
        job = self._jobs.get(self._places.get(name, ("", 0)))
        if job is not None:
            ask("scancel", job)

    def last_output(self, name: str) -> str:  # noqa: D102
        launch, place = self._places[name]
        job = self._jobs.get((launch, place), "unknown")
        logs = sorted(self._folder(launch).glob(f"{job}_*_log.err"))
        return logs[-1].read_bytes()[-LAST_BYTES:].decode(errors="replace").strip() if logs else ""

    def step(self) -> None:
        """Ask for the state of jobs, now and then, while there is a worker of which nothing is heard."""
        now = time.monotonic()
        silent = [name for name in self._places if self._silent(name) and self._ended.get(name, 0) < CONFIRMATIONS]
        if silent and now - self._queried_at >= self._cluster.status_s:
            self._queried_at = now
            jobs = jobs_of(self._run_id)
            if jobs is not None:
                self._jobs |= {place: job for place, (job, _) in jobs.items()}
                for name in silent:
                    place = self._places[name]
                    self._judge(name, jobs[place][1] if place in jobs else None)

    def _judge(self, name: str, state: str | None) -> None:
        """What one answer says of one worker."""
        if state is None and name in self._heard_at and not self._silent(name, UNSEEN_S):
            return  # it was at work: Slurm may have forgotten a job that still writes its last words
        if state is None or state in ENDED:
            self._ended[name] = self._ended.get(name, 0) + 1
            return
        self._ended[name] = 0
        if name not in self._heard_at:
            self._deliver(name)

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


def _prefix(run_id: str) -> str:
    return f"lemonade-{run_id[:8]}-"


def jobs_of(run_id: str) -> dict[Place, tuple[str, str]] | None:
    """Id and state of every job of a run that Slurm shows; None where it gives no answer."""
    answer = ask("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%j|%T")
    if answer is None:
        return None
    found: dict[Place, tuple[str, str]] = {}
    for line in answer.splitlines():
        job, name, state = line.split("|")
        if name.startswith(_prefix(run_id)):
            found[name.removeprefix(_prefix(run_id)), int(job.partition("_")[2] or 0)] = (job, state)
    return found


def ask(*command: str) -> str | None:
    """What a command of Slurm's says; None where it fails or does not answer in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
