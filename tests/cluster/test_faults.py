"""What befalls jobs and children on a real Slurm: requeue, hold, time limits, preemption at bad moments, crashes.

Needs root and Slurm's daemons (`slurm.py`): `pytest tests/cluster -n0`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from runs import (  # noqa: E402
    LEMONADE,
    begun,
    ended,
    events,
    finished,
    front,
    hook,
    lemonade,
    logged,
    running,
    settings,
    sound,
    start,
    told,
)

from slurm import NODES, PACKAGE, Slurm, wait_for  # noqa: E402

# ---------------------------------------------------------------- jobs that are touched (7, 9)


STUCK = """
if trainer:
    from lemonade_hpc.learn import checkpoints
    due = checkpoints.Keeper._due
    def after_a_batch(keeper, moment):
        if keeper._folder.parent.name == "000010" and once("stuck"):
            (home / "stuck").write_text("{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}".format(**os.environ))
            time.sleep(1000)
        return due(keeper, moment)
    checkpoints.Keeper._due = after_a_batch
"""


def test_workers_that_are_requeued_or_ended_for_their_time_give_their_children_back(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    """A worker lives once: its job, which would begin anew, is cancelled. Slurm looks at times every half a minute."""
    settings(home, setup=[hook(home, STUCK)])
    search = begun(slurm, home)
    stuck = wait_for("a child is stuck", lambda: (home / "stuck").read_text())
    requeued = next(job["id"] for job in running(slurm) if job["id"] != stuck)
    with pytest.raises(RuntimeError, match="presently disabled"):
        slurm.run("scontrol", "requeue", requeued)
    slurm.run("scontrol", "update", f"JobId={requeued}", "Requeue=1", root=True)
    slurm.run("scontrol", "requeue", requeued)
    slurm.run("scontrol", "update", f"JobId={stuck}", "EndTime=now", root=True)
    ended(search)
    assert finished(slurm, home, expected)
    left = sound(slurm, home)["workers_left"]
    assert left["requeued"] == left["time limit"] == 1
    states = {job["id"]: job["state"] for job in slurm.jobs()}
    assert (states[requeued], states[stuck]) == ("CANCELLED", "TIMEOUT")


def test_a_job_that_waits_for_what_does_not_come_by_itself_is_told(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    """A partition that takes no job as long as that, and a job that is held."""
    slurm.run("scontrol", "update", "PartitionName=main", "MaxTime=5", root=True)
    search = logged(slurm, home)
    try:
        told(home, "waits for a reason that does not pass by itself: Partition")
        slurm.run("scontrol", "hold", *(job["id"] for job in running(slurm)))
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "MaxTime=INFINITE", root=True)
    told(home, "waits for a reason that does not pass by itself: JobHeldUser")
    slurm.run("scontrol", "release", *(job["id"] for job in running(slurm)))
    ended(search)
    assert finished(slurm, home, expected)
    assert sound(slurm, home)["attempts_lost"]["worker"] == 0


CHILDREN = """
if supervisor:
    from lemonade_hpc.run import worker
    worker.SPARE_S = 100.0  # of the two minutes that a job has at least
if trainer:
    from lemonade_hpc.learn import checkpoints
    from lemonade_hpc.learn.training import Diverged
    due = checkpoints.Keeper._due
    def after_a_batch(keeper, moment):
        child, local = keeper._folder.parent.name, not node
        if child in ("000005", "000007") and local:
            raise Diverged("what the others are compared with")
        if child == "000005":
            time.sleep(1000)  # and hears no wish for a checkpoint
        if child == "000006" and not local:
            time.sleep(1)
        if child == "000007":
            os.kill(os.getpid(), 11)
        if child == "000008":
            print(100_000 * "flood", file=sys.stderr)
        return due(keeper, moment)
    checkpoints.Keeper._due = after_a_batch
"""


def test_children_that_need_more_time_than_a_worker_has_or_crash_or_flood_their_log(slurm: Slurm, home: Path) -> None:
    """Of eight in one generation, one is never ready and one always crashes; one takes the time of several workers."""
    setup = hook(home, CHILDREN)
    content = settings(home, time_min=2, retries=0, setup=[setup])
    for backend in ("local", "slurm"):
        content["search"]["children"], content["cluster"]["backend"] = 16, backend
        (home / f"{backend}.yaml").write_text(yaml.safe_dump(content))
    path = f"PYTHONPATH={home}/hook:{PACKAGE}"
    local = start(slurm, home, "env", path, *LEMONADE, "search", "local.yaml", "--run", "local")
    ended(local)
    expected = front(slurm, home, "local")
    finished(slurm, home, expected)
    shown = json.loads(lemonade(slurm, home, "status", "run", "--json")[1])
    failures = {failure["child"]: failure for failure in shown["failures"]}
    assert {child: failure["kind"] for child, failure in failures.items()} == {5: "walltime", 7: "crash"}
    assert failures[5]["reason"].startswith("1 attempt ended so") and "raise cluster.time_min" in failures[5]["reason"]
    assert failures[7]["reason"].startswith("1 attempt ended so") and "SIGSEGV" in failures[7]["reason"]
    lost = [event for event in events(home) if event["event"] == "lost"]
    done = [event["done"] for event in lost if (event["child"], event["kind"]) == (6, "walltime")]
    assert 0 < len(done) < 9 and done == sorted(set(done))
    given = Counter(event["child"] for event in events(home) if event["event"] == "attempt")
    assert max(given.values()) < 9, given
    (outcome,) = [e["outcome"] for e in events(home) if e["event"] == "committed" and e["outcome"]["child"] == 6]
    assert outcome["resumed"] == pytest.approx(done[-1])
    logs = [path.stat().st_size for path in home.glob("run/workers/*/trainer.log")]
    assert max(logs) == 2**20  # of 9 MB


# ---------------------------------------------------------------- preemption (8)


def preempted(
    slurm: Slurm, home: Path, expected: list[Any], search: subprocess.Popen[str], moment: str
) -> dict[str, Any]:
    """Take all four nodes away for a moment when something happens on each; the status at the end."""
    wait_for(f"{moment} on every node", lambda: len(list(home.glob(f"{moment}-*"))) == len(NODES))
    slurm.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    ended(search)
    assert len(finished(slurm, home, expected)) > 1
    shown = sound(slurm, home)
    assert shown["nodes_excluded"] == {} and shown["attempts_lost"]["crash"] == 0
    return shown


def test_preemption_while_workers_and_trainers_are_being_imported(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    wait = "if (supervisor if node in ('n1', 'n2') else trainer) and once(f'import-{node}'):\n    time.sleep(60)"
    settings(home, setup=[hook(home, wait)])
    search = start(slurm, home, *LEMONADE, "search", "slurm.yaml", "--run", "run")
    shown = preempted(slurm, home, expected, search, "import")
    ended_early = {how: n for how, n in shown["workers_left"].items() if how != "stopped by the coordinator"}
    assert sum(ended_early.values()) == len(NODES) and not ended_early.keys() & {"unfit", "cancelled"}, ended_early


HALF_A_CHECKPOINT = """
if trainer:
    from lemonade_hpc import files
    write = files.write
    def slowly(path, content, **options):
        if path.name.startswith("checkpoint-") and once(f"write-{node}"):
            path.with_name(f"{files.TEMPORARY}{path.name}-{os.getpid()}").write_bytes(content[:1000])
            time.sleep(4)
        write(path, content, **options)
    files.write = slowly
"""


def test_preemption_while_checkpoints_are_being_written(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    """They are made whole in the time that is left, and gone on from."""
    settings(home, setup=[hook(home, HALF_A_CHECKPOINT)], checkpoint_epochs=1)
    search = start(slurm, home, *LEMONADE, "search", "slurm.yaml", "--run", "run")
    preempted(slurm, home, expected, search, "write")
    outcomes = [event["outcome"] for event in events(home) if event["event"] == "committed"]
    assert [outcome["child"] for outcome in outcomes if outcome.get("resumed", 0) > 0]
    assert not list((home / "run").rglob("*checkpoint-*"))
