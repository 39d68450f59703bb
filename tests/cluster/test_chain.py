"""The coordinator as a chain of jobs on a real Slurm of four nodes: followed, stopped, cancelled.

Needs root and Slurm's daemons (`slurm.py`): `pytest tests/cluster -n0`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from runs import GATE, front, hook, lemonade, settings  # noqa: E402

from slurm import Slurm, wait_for  # noqa: E402


def submit(slurm: Slurm, home: Path) -> str:
    code, out, err = lemonade(slurm, home, "submit", "slurm.yaml", "--run", "run")
    assert (code, err) == (0, "") and out.startswith("submitted job ")
    return out.split()[2].rstrip(";")


def coordinators(slurm: Slurm, *states: str) -> list[dict[str, str]]:
    """Jobs of chains, the oldest first."""
    jobs = [job for job in slurm.jobs() if job["name"].endswith("-coordinator") and job["state"] in states]
    return sorted(jobs, key=lambda job: int(job["id"]))


def at_work(home: Path, children: int) -> None:
    wait_for("children are trained", lambda: len(list((home / "run/children").glob("*/*"))) >= children, 120)


def chain_is_over(slurm: Slurm) -> None:
    def over() -> bool:
        if left := coordinators(slurm, "RUNNING", "PENDING", "COMPLETING"):
            raise RuntimeError(f"left are {left}")
        return True

    wait_for("the chain is over", over, 300)


def complete(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    """The chain brings the run to its end by itself, and ends."""
    chain_is_over(slurm)
    logs = "".join(path.read_text() for path in sorted((home / "run/slurm").glob("*.log")))
    assert json.loads(lemonade(slurm, home, "status", "run", "--json")[1])["state"] == "complete", logs
    assert front(slurm, home, "run") == expected
    wait_for("no job is left", slurm.idle)


def test_what_would_be_submitted_is_shown_and_nothing_written(slurm: Slurm, home: Path) -> None:
    code, out, err = lemonade(slurm, home, "submit", "slurm.yaml", "--run", "run", "--print")
    assert (code, err) == (0, "") and not (home / "run").exists()
    assert "#SBATCH --dependency=singleton" in out and "#SBATCH --job-name=lemonade-xxxxxxxx-e1w00" in out


def test_a_submitted_run_completes_and_cancels_the_successor(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    """Its workers ask for memory in another way than it does: srun would refuse to inherit that."""
    memory = {"skip": ["mem"], "extra": {"mem-per-cpu": "500M"}, "coordinator_extra": {"mem": "600M"}}
    settings(home, setup=[hook(home, GATE)], **memory)
    job = submit(slurm, home)
    at_work(home, 1)
    assert [one["id"] for one in coordinators(slurm, "RUNNING")] == [job]
    assert len(coordinators(slurm, "PENDING")) == 1
    code, _, err = lemonade(slurm, home, "submit", "slurm.yaml", "--run", "run")
    (home / "go").touch()
    assert code == 2 and ("in the queue already" in err or "which is running" in err)
    complete(slurm, home, expected)
    assert "Pareto front" in (home / f"run/slurm/coordinator-{job}.log").read_text()


def test_a_coordinator_that_is_killed_or_cancelled_is_followed_by_the_next(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    """kill -9 of its process, then scancel of its job: neither ends the run."""
    settings(home, setup=[hook(home, GATE)])
    submit(slurm, home)
    at_work(home, 6)
    os.kill(json.loads((home / "run/epochs/000001/owner.json").read_text())["owner"]["pid"], signal.SIGKILL)
    wait_for("the next is at work", lambda: (home / "run/epochs/000002").exists(), 60)
    (second,) = coordinators(slurm, "RUNNING")
    slurm.run("scancel", second["id"])
    (home / "go").touch()
    complete(slurm, home, expected)
    assert (home / "run/epochs/000003").exists()
    assert "stopped by SIG" in (home / f"run/slurm/coordinator-{second['id']}.log").read_text()


def test_a_run_that_is_told_to_stop_ends_what_it_trains_and_its_chain(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    settings(home, setup=[hook(home, GATE)])
    submit(slurm, home)
    at_work(home, 6)
    code, out, err = lemonade(slurm, home, "stop", "run")
    (home / "go").touch()
    assert (code, err) == (0, "") and "is cancelled; told process " in out, out
    chain_is_over(slurm)
    wait_for("no job is left", slurm.idle)
    told = json.loads(lemonade(slurm, home, "status", "run", "--json")[1])
    assert told["state"] == "stopped" and told["children"]["committed"] < 28 and told["attempts_lost"]["worker"] == 0
    submit(slurm, home)
    complete(slurm, home, expected)


def test_a_submitted_run_is_cancelled_as_a_whole(slurm: Slurm, home: Path) -> None:
    submit(slurm, home)
    at_work(home, 2)
    code, out, err = lemonade(slurm, home, "cancel", "run")
    assert (code, err) == (0, "") and "coordinator" in out
    wait_for("no job is left", slurm.idle)
