"""What a site gives on a real Slurm: nodes at fault, what it refuses, limits, clocks that are wrong.

Needs root and Slurm's daemons (`slurm.py`): `pytest tests/cluster -n0`. Accounts, limits and wckeys are enforced here,
and no array may have more than three tasks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from runs import (  # noqa: E402
    GATE,
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

from lemonade_hpc import data  # noqa: E402
from lemonade_hpc.config import Data  # noqa: E402
from slurm import NODES, PACKAGE, USER, Slurm  # noqa: E402

MAX_ARRAY = 3
MORE = """
AccountingStorageEnforce=limits,qos,wckeys
TrackWCKey=yes
JobAcctGatherParams=OverMemoryKill
JobAcctGatherFrequency=1
SelectTypeParameters=CR_Core_Memory
"""
SITE = {"max_array": MAX_ARRAY, "more": MORE}
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"


def hidden(slurm: Slurm, home: Path, command: str, timeout_s: float = 300) -> tuple[int, str]:
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


# ---------------------------------------------------------------- nodes at fault (12)


def test_nodes_that_fail_everything_are_excluded(slurm: Slurm, home: Path, expected: list[Any]) -> None:
    """On one no worker begins, on another none can train; the others wait, so that there is time to see it."""
    code = """
if trainer and node == "n3":
    sys.exit("libfoo.so: not found")
"""
    hole = 'if [ "$SLURMD_NODENAME" = n2 ]; then echo no scratch here >&2; exit 1; fi'
    settings(home, setup=[hook(home, code + GATE), hole])
    search = logged(slurm, home)
    for name in ("n2", "n3"):
        told(home, f"node {name} gets no worker any more")
    (home / "go").touch()
    ended(search)
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


HUNGRY = """
if trainer:
    from lemonade_hpc.learn import checkpoints
    due = checkpoints.Keeper._due
    def after_a_batch(keeper, moment):
        if keeper._folder.parent.name == "000009":
            held = bytearray(3 << 30)
            held[::4096] = bytes(len(held[::4096]))
            time.sleep(60)
        return due(keeper, moment)
    checkpoints.Keeper._due = after_a_batch
"""


def test_a_child_that_needs_more_memory_than_its_workers_have_fails_and_takes_nobody_with_it(
    slurm: Slurm, home: Path
) -> None:
    """Slurm ends the worker's job with it, time and again. (11)"""
    settings(home, setup=[hook(home, HUNGRY)], retries=1)
    code, _, err = lemonade(slurm, home, "search", "slurm.yaml", "--run", "run")
    assert code == 0, err
    shown = json.loads(lemonade(slurm, home, "status", "run", "--json")[1])
    assert shown["nodes_excluded"] == {} and [one["child"] for one in shown["failures"]] == [9]
    assert shown["failures"][0]["kind"] == "memory" and "raise cluster.mem_gb" in shown["failures"][0]["reason"]
    assert shown["workers_left"]["out of memory"] == 2 and len(shown["front"]) > 4, shown["workers_left"]


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
