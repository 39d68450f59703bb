"""What befalls jobs on a real Slurm: requeue, hold, time limits, preemption at bad moments, nodes at fault, refusals.

Needs root and Slurm's daemons (`slurm.py`): `pytest tests/cluster -n0`. Accounts, limits and wckeys are enforced here,
and no array may have more than three tasks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from runs import LEMONADE, begun, config, ended, finished, front, lemonade, running, start  # noqa: E402

from lemonade_hpc import data  # noqa: E402
from lemonade_hpc.config import Data  # noqa: E402
from lemonade_hpc.run import budgets, record, status  # noqa: E402
from slurm import NODES, PACKAGE, USER, Slurm, cluster, wait_for  # noqa: E402

MAX_ARRAY = 3
ENFORCED = "AccountingStorageEnforce=limits,qos,wckeys\nTrackWCKey=yes"
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with cluster(MAX_ARRAY, ENFORCED) as made:
        yield made


def settings(home: Path, name: str = "slurm.yaml", **cluster: Any) -> dict[str, Any]:
    """The configuration of all runs here with other keys of `cluster`, written to a file."""
    content: dict[str, Any] = yaml.safe_load(config("slurm", **cluster))
    (home / name).write_text(yaml.safe_dump(content))
    return content


def hook(home: Path, code: str) -> str:
    """A line of `cluster.setup` that has every Python run this code first, in a trainer (`trainer` holds) or not."""
    folder = home / "hook"
    folder.mkdir(exist_ok=True)
    lines = (
        "import os, sys, time",
        "from pathlib import Path",
        f"home, node = Path({str(home)!r}), os.environ.get('SLURMD_NODENAME', '')",
        "trainer, supervisor = 'lemonade_hpc.learn.child' in sys.orig_argv, 'submitit.core._submit' in sys.orig_argv",
        "def once(name):",
        "    try:",
        "        (home / name).touch(exist_ok=False)",
        "    except FileExistsError:",
        "        return False",
        "    return True",
        code,
    )
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return f"export PYTHONPATH={folder}:$PYTHONPATH"


def events(home: Path) -> list[dict[str, Any]]:
    """What is on record."""
    found: list[dict[str, Any]] = []
    record.load(home / "run", status.problem(home / "run")[1], found)
    return found


def sound(slurm: Slurm, home: Path) -> dict[str, Any]:
    """No child failed or was committed twice, none was lost more often than it may; the status."""
    told = events(home)
    committed = [event["outcome"] for event in told if event["event"] == "committed"]
    assert len(committed) == len({outcome["child"] for outcome in committed}) == 24 + 4
    assert not [outcome for outcome in committed if "failure" in outcome]
    lost = Counter((event["child"], event["kind"]) for event in told if event["event"] == "lost")
    allowed = budgets.allowed(retries=2)
    assert all(count <= allowed.get(kind, 9) for (_, kind), count in lost.items()), lost
    shown: dict[str, Any] = json.loads(lemonade(slurm, home, "status", "run", "--json")[1])
    assert shown["state"] == "complete"
    return shown


def logged(slurm: Slurm, home: Path) -> subprocess.Popen[str]:
    """A search whose log is the file `log`."""
    command = (*LEMONADE, "search", "slurm.yaml", "--run", "run")
    return start(slurm, home, "bash", "-c", 'exec "$@" 2>log', "bash", *command)


def told(home: Path, text: str) -> None:
    wait_for(f"it is told: {text}", lambda: text in " ".join((home / "log").read_text().split()))


def hidden(slurm: Slurm, home: Path, command: str, timeout_s: float = 150) -> tuple[int, str]:
    """A command with `hidden` in the home being a folder that no node sees; its exit code, and what it said."""
    user = slurm.user
    line = (
        f"mount -t tmpfs -o mode=0755,uid={user.pw_uid} none {home}/hidden && cd {home} && cp *.npz hidden && "
        f"exec setpriv --reuid={user.pw_uid} --regid={user.pw_gid} --clear-groups {command}"
    )
    done = subprocess.run(
        ("unshare", "--mount", "--propagation=private", "bash", "-c", line), capture_output=True, text=True,
        env=slurm.environment(), check=False, timeout=timeout_s,
    )  # fmt: skip
    return done.returncode, " ".join(done.stderr.split())


# ---------------------------------------------------------------- jobs that are touched (7, 9)


SLOW = """
if trainer:
    from lemonade_hpc.learn import checkpoints
    due = checkpoints.Keeper._due
    checkpoints.Keeper._due = lambda keeper, moment: time.sleep({}) or due(keeper, moment)
"""


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
    assert len(finished(slurm, home, expected)) > 2
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


# ---------------------------------------------------------------- nodes at fault (12)


def test_nodes_that_fail_everything_are_excluded(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    """On one no worker begins, on another none can train; the others are slow, so that there is time to see it."""
    code = """
if trainer and node == "n3":
    sys.exit("libfoo.so: not found")
"""
    hole = 'if [ "$SLURMD_NODENAME" = n2 ]; then echo no scratch here >&2; exit 1; fi'
    settings(home, setup=[hook(home, code + SLOW.format(0.05)), hole])
    finished(slurm, home, expected)
    assert sound(slurm, home)["nodes_excluded"].keys() == {"n2", "n3"}
    code, out, _ = lemonade(slurm, home, "status", "run")
    assert code == 0 and "node n2 is excluded" in out and "node n3 is excluded" in out


def test_where_all_nodes_fail_everything_the_run_ends_and_says_why(slurm: Slurm, home: Path) -> None:
    settings(home, setup=["echo no such module >&2", "exit 1"])
    code, _, err = lemonade(slurm, home, "search", "slurm.yaml", "--run", "run")
    said = " ".join(err.split()).rpartition("error: ")[2]
    assert code == 1 and said.endswith("no such module"), err


def test_where_the_nodes_do_not_see_the_run_folder_that_is_asked_after(slurm: Slurm, home: Path) -> None:
    (home / "hidden").mkdir()
    (home / "any.npz").touch()
    code, err = hidden(slurm, home, f"{' '.join(LEMONADE)} search slurm.yaml --run hidden/run")
    assert code == 1 and f"can the nodes see and write {home}/hidden/run?" in err, err


def test_data_that_the_nodes_do_not_see_are_named_and_the_run_goes_on_with_them(slurm: Slurm, home: Path) -> None:
    (home / "hidden").mkdir()
    digits = data.load(Data(name="digits")).train
    import numpy as np

    np.savez(home / "digits.npz", x=np.moveaxis(digits.images, 1, 3), y=digits.labels)
    content = settings(home, workers=2)
    content["search"]["children"] = 2
    for name, root in (("wrong", home / "hidden/digits.npz"), ("right", home / "digits.npz")):
        content["data"] = {"name": "npz", "root": str(root)}
        (home / f"{name}.yaml").write_text(yaml.safe_dump(content))
    code, err = hidden(slurm, home, f"{' '.join(LEMONADE)} search wrong.yaml --run run")
    assert code == 1 and f"data.root: got '{home}/hidden/digits.npz', not a file" in err, err
    assert "So it is on n" in err and "put it on the file system that all nodes share, and give data.root there" in err
    code, _, err = lemonade(slurm, home, "search", "right.yaml", "--run", "run")
    assert code == 0 and front(slurm, home, "run"), err


# ---------------------------------------------------------------- refusals (16)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"account": "nosuch"}, "It says: allocation failure: Invalid account"),
        ({"qos": "nosuch"}, "It says: allocation failure: Invalid qos"),
        ({"wckey": "nosuch"}, "It says: allocation failure: Invalid wckey"),
        ({"constraint": "nosuch"}, "It says: allocation failure: Invalid feature"),
        ({"gres": "fpga:1"}, "It says: sbatch: error: Invalid generic resource"),
        ({"gres": "gpu:nosuch:1"},
         "cluster.gres: got gpu:nosuch:1, which no node of the default partition has; there are: gpu:1. Slurm says: "),
        ({"mem_gb": 900}, "cluster.mem_gb: got 900 GB, which no node of the default partition has; the largest"),
    ],
)  # fmt: skip
def test_what_slurm_would_refuse_is_told_and_nothing_written(
    slurm: Slurm, home: Path, given: dict[str, Any], said: str
) -> None:
    settings(home, **given)
    code, out, err = lemonade(slurm, home, "search", "slurm.yaml", "--run", "run")
    assert (code, out) == (2, "") and said in err, err
    assert not (home / "run").exists() and not running(slurm)


def test_a_coordinator_that_slurm_would_refuse_is_told_and_nothing_written(slurm: Slurm, home: Path) -> None:
    settings(home, coordinator_partition="nosuch")
    code, out, err = lemonade(slurm, home, "submit", "slurm.yaml", "--run", "run")
    assert (code, out) == (2, "") and "Slurm refuses the coordinator's job. It says: " in err and "nosuch" in err, err
    assert not (home / "run").exists() and not running(slurm)


def test_a_full_queue_means_fewer_workers(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    slurm.run("sacctmgr", "-i", "modify", "user", USER, "set", "maxsubmitjobs=2", root=True)
    try:
        search = logged(slurm, home)
        ended(search)
    finally:
        slurm.run("sacctmgr", "-i", "modify", "user", USER, "set", "maxsubmitjobs=-1", root=True)
    told(home, "so fewer workers run: sbatch: error: AssocMaxSubmitJobLimit")
    names = finished(slurm, home, expected)
    launched = [event["workers"] for event in events(home) if event["event"] == "launched"]
    left = {event["worker"]: event["how"] for event in events(home) if event["event"] == "left"}
    assert [len(names) for names in launched] == [3, 1, 1] and {left[name] for name in launched[0]} == {"not started"}
    assert len([job for job in slurm.jobs() if job["name"] in names]) == 2
    assert "not started" not in sound(slurm, home)["workers_left"]


# ---------------------------------------------------------------- clocks (17)


CLOCK = """
import select  # libfaketime 0.9.10 has clock_nanosleep fail where the monotonic clock is left alone
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
if trainer:
    (home / f"clock-{node}").write_text(str(time.time()))
"""


def test_clocks_that_are_an_hour_apart_disturb_nobody_and_arrays_are_no_larger_than_the_site_takes(
    slurm: Slurm, home: Path, expected: list[Any]
) -> None:
    """One node an hour ahead, one behind, and the coordinator that takes over behind them all. (16, 17)"""
    lines = [
        f"case $SLURMD_NODENAME in n1) export LD_PRELOAD={FAKETIME} FAKETIME=+1h;; n2) export LD_PRELOAD={FAKETIME} "
        f"FAKETIME=-1h;; esac; export FAKETIME_DONT_FAKE_MONOTONIC=1",
        hook(home, CLOCK),
    ]
    settings(home, setup=lines)
    first = begun(slurm, home)
    first.kill()
    first.communicate()
    shift = (f"LD_PRELOAD={FAKETIME}", "FAKETIME=-2h", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    hooked = f"PYTHONPATH={home}/hook:{PACKAGE}"
    ended(start(slurm, home, "env", *shift, hooked, *LEMONADE, "search", "slurm.yaml", "--run", "run"))
    assert finished(slurm, home, expected)
    sizes = [len(event["workers"]) for event in events(home) if event["event"] == "launched"]
    assert sizes == [MAX_ARRAY, 4 - MAX_ARRAY]
    shown = sound(slurm, home)
    assert not any(shown["attempts_lost"][kind] for kind in ("crash", "walltime", "worker"))
    clocks = {node: float((home / f"clock-{node}").read_text()) for node in NODES}
    assert 3000 < clocks["n1"] - clocks["n3"] < 4200 and 3000 < clocks["n4"] - clocks["n2"] < 4200
