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


class Hangs(Exception):  # noqa: N818
    """A job that was cancelled is still ending: its node may hang."""


def stop(run: Path) -> str:
    """Have the coordinator end what is in training and leave; what follows, in words. Raises ConfigError."""
    run_id = record.read_identity(run)["run"]
    owned, done = _owned(run), list[str]()
    if owned is not None and lease.judge(run, owned["owner"]) != "gone":
        with open(run / files.stop_order(files.epochs(run)[-1]), "ab") as file:
            file.write(b".")
        with contextlib.suppress(ConfigError):  # where Slurm does not answer: a successor leaves by itself
            done = _end_chain(run, run_id, sparing=owned["owner"].get("slurm_job"))
        who = owner.describe(owned["owner"])
        what = f"told {who}: it ends what is in training, then stops; `status` shows how it goes"
    else:
        done = _end_chain(run, run_id)
        if owned is not None and owned["config"]["cluster"]["backend"] == "slurm":
            done += _cancel_jobs(run_id, "PENDING")
        what = (
            "no coordinator is at work; workers, if any, end what they have, and leave when they have waited for "
            "cluster.idle_exit_min; `cancel` ends them at once"
        )
    return "".join(f"{job} is cancelled; " for job in done) + what


def cancel(run: Path) -> list[str]:
    """End whatever works on a run; what was ended, in words.

    Raises ConfigError where its coordinator runs on another machine, Slurm does not answer, or something does not end.
    """
    run_id = record.read_identity(run)["run"]
    owned = _owned(run)
    if owned is None:
        return _end_chain(run, run_id)
    who, on_slurm = owned["owner"], owned["config"]["cluster"]["backend"] == "slurm"
    verdict = lease.judge(run, who)
    if verdict == "unknown":
        raise ConfigError(
            f"{run}: its coordinator is {owner.describe(who)}, which cannot be reached from here; end it there first, "
            f"else it would start workers again"
        )
    done = _end_chain(run, run_id, sparing=who.get("slurm_job") if verdict == "alive" else None)
    stays = None
    if verdict == "alive":
        try:
            done = _end_coordinator(who) + done
        except Hangs as error:
            stays = error
        done += _end_chain(run, run_id, sparing=who["slurm_job"] if stays else None)
    done += _cancel_jobs(run_id) if on_slurm else []
    if stays is not None:
        raise ConfigError("; ".join([*done, str(stays)])) from stays
    return done


def _owned(run: Path) -> dict[str, Any] | None:
    """Who holds the newest epoch, and with which configuration."""
    numbers = files.epochs(run)
    return lease.read_owner(run, numbers[-1]) if numbers else None


def _end_chain(run: Path, run_id: str, sparing: str | None = None) -> list[str]:
    """Cancel the coordinators of a submitted run that wait, or have not begun yet: nobody is to go on by himself.

    One that has just been started may submit its successor, so that is looked at until nothing is left but the job
    `sparing`, that of the coordinator at work. Raises ConfigError where Slurm does not answer.
    """
    if not (run / files.SLURM).exists():
        return []
    ended: list[str] = []
    deadline = time.monotonic() + LEAVE_S
    while left := [job for job in chain.queued(run_id) if job != sparing]:
        if time.monotonic() > deadline:
            raise ConfigError(f"job {', '.join(left)}, a coordinator, does not end; try again later")
        new = [job for job in left if job not in ended]
        if new and queue.ask("scancel", *new) is None:
            raise ConfigError(f"scancel failed for job {', '.join(new)}, a coordinator; try again later")
        ended += new
        time.sleep(POLL_JOB_S)
    return [f"job {job} (a coordinator in the queue)" for job in ended]


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
    """Cancel a coordinator's job and wait until it is over; raises Hangs."""
    if queue.ask("scancel", job) is None:
        raise ConfigError(f"scancel failed for job {job}; try again later")
    deadline = time.monotonic() + LEAVE_S
    while not queue.job_has_ended(job, mine=True):
        if time.monotonic() > deadline:
            raise Hangs(
                f"job {job}, the coordinator, is cancelled and has not ended yet; if it stays so (squeue says "
                f"COMPLETING: its node hangs), search or submit with --take-over goes on without it"
            )
        time.sleep(POLL_JOB_S)


def _cancel_jobs(run_id: str, state: str | None = None) -> list[str]:
    """Cancel the jobs of a run's workers, or those that are in one state."""
    answer = queue.jobs_of(run_id)
    if answer is None or not answer.all:
        raise ConfigError(f"{queue.silence()}: whether workers are left is not known")
    workers = [job for (launch, _), job in answer.jobs.items() if launch != queue.COORDINATOR]
    living = sorted(job.id for job in workers if job.state not in queue.ENDED and state in (None, job.state))
    if living and queue.ask("scancel", *living) is None:
        raise ConfigError(f"scancel failed for the jobs {', '.join(living)}; try again later")
    return [f"job {job}" for job in living]
