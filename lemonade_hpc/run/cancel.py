"""End a run from outside: its coordinator, and the jobs of its workers.

Decides: in which order, so that nobody starts a worker again. Loses nothing but the children in training: the same
search command goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from lemonade_hpc import files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import lease, owner, record

LEAVE_S = 60.0
"""How long a coordinator may take to leave in good order."""
POLL_S = 0.1


def cancel(run: Path) -> list[str]:
    """End whatever works on a run; what was ended, in words.

    Raises ConfigError where its coordinator runs on another machine, or Slurm does not answer.
    """
    run_id = record.read_identity(run)["run"]
    numbers = files.epochs(run)
    if not numbers:
        return []
    owned = lease.read_owner(run, numbers[-1])
    done = _end_coordinator(run, owned["owner"])
    if owned["config"]["cluster"]["backend"] == "slurm":
        done += _cancel_jobs(run_id)
    return done


def _end_coordinator(run: Path, who: dict[str, object]) -> list[str]:
    verdict = owner.judge(who)
    if verdict == "unknown":
        raise ConfigError(
            f"{run}: its coordinator is {owner.describe(who)}, which cannot be reached from here; end it there first, "
            f"else it would start workers again"
        )
    if verdict == "gone":
        return []
    pid = who["pid"]
    assert isinstance(pid, int)
    for which in (signal.SIGTERM, signal.SIGKILL):
        if owner.judge(who) != "alive":
            break  # its pid may be another process's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, which)
        deadline = time.monotonic() + LEAVE_S
        while owner.judge(who) == "alive" and time.monotonic() < deadline:
            time.sleep(POLL_S)
    return [f"coordinator ({owner.describe(who)})"]


def _cancel_jobs(run_id: str) -> list[str]:
    from lemonade_hpc.run import slurm

    answer = slurm.jobs_of(run_id)
    if answer is None or not answer.all:
        raise ConfigError("squeue does not answer: whether workers are left is not known; try again later")
    living = sorted(job for job, state in answer.jobs.values() if state not in slurm.ENDED)
    if living and slurm.ask("scancel", *living) is None:
        raise ConfigError(f"scancel failed for the jobs {', '.join(living)}; try again later")
    return [f"job {job}" for job in living]
