"""End a run from outside: at once, or once the children in training are done.

Decides: in which order, so that nobody starts a worker again: those who would go on first, then the coordinator, then
the workers. Nothing finished is lost; the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from lemonade_hpc import files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import chain, lease, owner, queue, record

LEAVE_S = 60.0
"""How long a coordinator may take to leave in good order."""
POLL_S = 0.1
POLL_JOB_S = 2.0


def stop(run: Path) -> str:
    """Have the coordinator end what is in training and leave; what follows, in words. Raises ConfigError."""
    ended = "".join(f"{what} is cancelled; " for what in _end_chain(run, record.read_identity(run)["run"]))
    numbers = files.epochs(run)
    owned = lease.read_owner(run, numbers[-1]) if numbers else None
    if owned is None or lease.judge(run, owned["owner"]) == "gone":
        return f"{ended}no coordinator is at work; workers, if any, end what they have and leave"
    with open(run / files.stop_order(numbers[-1]), "ab") as file:
        file.write(b".")
    return f"told {owner.describe(owned['owner'])}: it ends what is in training, then stops; `status` shows how it goes"


def cancel(run: Path) -> list[str]:
    """End whatever works on a run; what was ended, in words.

    Raises ConfigError where its coordinator runs on another machine, or Slurm does not answer.
    """
    run_id = record.read_identity(run)["run"]
    numbers = files.epochs(run)
    if not numbers:
        return _end_chain(run, run_id)
    owned = lease.read_owner(run, numbers[-1])
    who, on_slurm = owned["owner"], owned["config"]["cluster"]["backend"] == "slurm"
    verdict = lease.judge(run, who)
    if verdict == "unknown":
        raise ConfigError(
            f"{run}: its coordinator is {owner.describe(who)}, which cannot be reached from here; end it there first, "
            f"else it would start workers again"
        )
    waited = _end_chain(run, run_id)
    done = (_end_coordinator(who) if verdict == "alive" else []) + waited
    return done + _cancel_jobs(run_id) if on_slurm else done


def _end_chain(run: Path, run_id: str) -> list[str]:
    """Cancel a coordinator that waits in the queue, if the run was ever submitted: nobody is to go on by himself."""
    if not (run / files.SLURM).exists():
        return []
    waiting = chain.waiting(run_id)
    chain.end(run_id)
    return [f"job {job} (a coordinator that waited)" for job in waiting]


def _end_coordinator(who: dict[str, Any]) -> list[str]:
    if owner.judge(who) == "unknown":
        _end_job(who["slurm_job"])
        return [f"coordinator ({owner.describe(who)})"]
    for which in (signal.SIGTERM, signal.SIGKILL):
        if owner.judge(who) != "alive":
            break  # its pid may be another process's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(who["pid"], which)
        deadline = time.monotonic() + LEAVE_S
        while owner.judge(who) == "alive" and time.monotonic() < deadline:
            time.sleep(POLL_S)
    return [f"coordinator ({owner.describe(who)})"]


def _end_job(job: str) -> None:
    """Cancel a coordinator's job and wait until it is over."""
    if queue.ask("scancel", job) is None:
        raise ConfigError(f"scancel failed for job {job}; try again later")
    deadline = time.monotonic() + LEAVE_S
    while not queue.job_has_ended(job):
        if time.monotonic() > deadline:
            raise ConfigError(f"job {job} does not end; try again later")
        time.sleep(POLL_JOB_S)


def _cancel_jobs(run_id: str) -> list[str]:
    answer = queue.jobs_of(run_id)
    if answer is None or not answer.all:
        raise ConfigError("squeue does not answer: whether workers are left is not known; try again later")
    living = sorted(job.id for job in answer.jobs.values() if job.state not in queue.ENDED)
    if living and queue.ask("scancel", *living) is None:
        raise ConfigError(f"scancel failed for the jobs {', '.join(living)}; try again later")
    return [f"job {job}" for job in living]
