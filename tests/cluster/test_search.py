"""Searches on a real Slurm of four nodes: the front of the local backend, whatever happens to jobs and coordinators.

Needs root and Slurm's daemons (`slurm.py`): `pytest tests/cluster -n0`.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from runs import (  # noqa: E402
    GATE,
    begun,
    config,
    ended,
    finished,
    hook,
    lemonade,
    running,
    settings,
    sound,
    start,
)

from slurm import USER, Slurm, wait_for  # noqa: E402

KILL_BEFORE_THE_TASKS_ARE_NAMED = """
import os, signal, sys
from submitit.core.utils import JobPaths
from lemonade_hpc import cli
JobPaths.move_temporary_file = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


def test_the_front_is_that_of_the_local_backend_bit_for_bit(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    names = finished(slurm, home, expected)
    assert len(names) == 1 and names[0].endswith("-e1w00")  # one array of four
    jobs = [job for job in slurm.jobs() if job["name"] == names[0]]
    assert {job["node"] for job in jobs} == {"n1", "n2", "n3", "n4"} and {job["user"] for job in jobs} == {USER}
    assert not list((home / "run").rglob("*.pkl"))


def test_a_coordinator_that_is_killed_is_followed_by_one_that_adopts_its_workers(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    first = begun(slurm, home)
    first.kill()
    first.communicate()
    assert len(finished(slurm, home, expected)) == 1


def test_a_coordinator_that_is_told_to_stop_leaves_its_workers_at_work(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    first = begun(slurm, home)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 3 and "Nothing is lost. To go on:" in err
    assert len([job for job in running(slurm) if job["state"] == "RUNNING"]) == 4
    assert len(finished(slurm, home, expected)) == 1


def test_a_coordinator_that_is_killed_around_sbatch_submits_nothing_twice(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    """The array is accepted, but its tasks have not got their names, for which submitit waits a minute."""
    command = (sys.executable, "-c", KILL_BEFORE_THE_TASKS_ARE_NAMED, "search", "slurm.yaml", "--run", "run")
    first = start(slurm, home, *command)
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL and len(running(slurm)) == 4
    assert len(finished(slurm, home, expected)) == 1


def test_a_run_is_cancelled_as_a_whole_and_goes_on(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    settings(home, setup=[hook(home, GATE)])
    search = begun(slurm, home)
    code, out, err = lemonade(slurm, home, "cancel", "run")
    (home / "go").touch()
    assert (code, err) == (0, "") and out.startswith("ended: coordinator (process ") and out.count("job ") == 4
    search.communicate(timeout=60)
    assert search.returncode == 3
    wait_for("no job is left", slurm.idle)
    assert lemonade(slurm, home, "cancel", "run") == (0, "nothing was running\n", "")
    assert len(finished(slurm, home, expected)) > 1


def test_a_worker_that_is_cancelled_gives_its_children_back(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    search = begun(slurm, home)
    job = running(slurm)[0]["id"]
    slurm.run("scancel", job)
    ended(search)
    assert len(finished(slurm, home, expected)) == 1  # no worker was started in its place
    assert [one["state"] for one in slurm.jobs() if one["id"] == job] == ["CANCELLED"]


def test_when_the_whole_array_is_cancelled_the_run_stops_and_goes_on(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    search = begun(slurm, home)
    slurm.run("scancel", running(slurm)[0]["id"].partition("_")[0])
    _, err = search.communicate(timeout=60)
    assert search.returncode == 3 and "every worker was cancelled (4)" in err, err
    arrays = Counter(name.rpartition("-e")[2][0] for name in finished(slurm, home, expected))
    assert arrays["1"] == 1 and set(arrays) == {"1", "2"}  # the second one's may be two, one for each generation


def test_a_slurmctld_that_is_down_disturbs_nobody(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    search = begun(slurm, home)
    slurm.stop("slurmctld")
    ended(search)
    slurm.start_controller()
    assert finished(slurm, home, expected)


def test_a_slurmdbd_that_is_down_disturbs_nobody(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    slurm.stop("slurmdbd")
    assert finished(slurm, home, expected)
    slurm.start_accounting()


def test_a_worker_whose_slurmd_is_killed_goes_on(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    search = begun(slurm, home)
    slurm.stop("n1", signal.SIGKILL)
    ended(search)
    slurm.start_node("n1")
    assert finished(slurm, home, expected)
    wait_for("the node is back", lambda: "idle 4" in slurm.run("sinfo", "-h", "-p", "main", "-o", "%T %D"))


def test_a_worker_that_is_suspended_for_a_while_is_waited_for(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    search = begun(slurm, home)
    job = running(slurm)[0]["id"]
    slurm.run("scontrol", "suspend", job, root=True)
    wait_for("it is suspended", lambda: any(j["state"] == "SUSPENDED" for j in slurm.jobs()))
    assert search.poll() is None
    slurm.run("scontrol", "resume", job, root=True)
    ended(search)
    assert len(finished(slurm, home, expected)) == 1


def test_workers_that_are_preempted_come_back_when_there_is_room(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    """All four nodes are taken from it for a while: Slurm sends SIGTERM, and ends jobs that may not be requeued."""
    search = begun(slurm, home)
    slurm.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 3", "--output=/dev/null")
    ended(search)
    assert len(finished(slurm, home, expected)) > 1
    left = sound(slurm, home)["workers_left"]
    assert left.get("completed", 0) + left.get("preempted", 0) == 4, left  # they left in good order, or had to


def test_a_partition_that_does_not_exist_is_refused_in_slurms_words(slurm: Slurm, home: Path) -> None:
    (home / "wrong.yaml").write_text(config("slurm", partition="nosuch"))
    code, out, err = lemonade(slurm, home, "search", "wrong.yaml", "--run", "wrong")
    assert (code, out) == (2, "")
    assert "cluster: Slurm refuses a worker as these settings describe it" in err and "nosuch" in err
    assert not (home / "wrong").exists()
