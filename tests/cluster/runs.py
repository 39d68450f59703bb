"""Searches on the Slurm of the tests, as its ordinary user has them: how they are started, followed and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lemonade_hpc.run import budgets, record, status
from slurm import Slurm, wait_for

LEMONADE = (sys.executable, "-m", "lemonade_hpc.cli")
CONFIG: dict[str, Any] = {
    "data": {"name": "digits"},
    "objectives": [{"name": "val_error"}, {"name": "params", "min": 100, "max": 30000}],
    "search": {"mode": "generational", "children": 24, "proposals": 20, "accepted": 8},
    "training": {"initial_epochs": 3, "epochs": 1},
    "cluster": {
        "workers": 4, "device": "cpu", "gpus_per_worker": 1, "mem_gb": 1, "time_min": 10, "status_s": 1, "submit_s": 1,
        "poll_s": 0.1, "stale_s": 0,
    },
}  # fmt: skip


GATE = """
if trainer:
    from lemonade_hpc.learn import checkpoints
    due = checkpoints.Keeper._due
    def gated(keeper, moment):
        while int(keeper._folder.parent.name) >= 12 and node and not (home / "go").exists():
            time.sleep(0.05)
        return due(keeper, moment)
    checkpoints.Keeper._due = gated
"""
"""Of a `hook`: no child of the second generation is trained before there is a file `go`, however slow all else is."""


def config(backend: str, search: dict[str, Any] | None = None, **cluster: Any) -> str:
    """CONFIG for a backend with some keys changed, as YAML."""
    changes = {
        "search": CONFIG["search"] | (search or {}),
        "cluster": CONFIG["cluster"] | cluster | {"backend": backend},
    }
    return yaml.safe_dump(CONFIG | changes)


def start(slurm: Slurm, home: Path, *command: str) -> subprocess.Popen[str]:
    """A process of the ordinary user's."""
    return subprocess.Popen(
        command, cwd=home, env=slurm.environment() | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, user=slurm.user.pw_uid, group=slurm.user.pw_gid,
    )  # fmt: skip


def lemonade(slurm: Slurm, home: Path, *arguments: str, timeout_s: float = 300) -> tuple[int, str, str]:
    """A command: its exit code and what it said."""
    process = start(slurm, home, *LEMONADE, *arguments)
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def front(slurm: Slurm, home: Path, run: str) -> list[Any]:
    """What must be equal: numbers, networks, objectives, and every bit of the weights."""
    assert lemonade(slurm, home, "verify", run)[0] == 0
    members = json.loads(lemonade(slurm, home, "front", run, "--json")[1])
    return [(m["id"], m["digest"], m["objectives"], m["weights"]["sha256"]) for m in members]


def running(slurm: Slurm) -> list[dict[str, str]]:
    return [job for job in slurm.jobs() if job["state"] in ("RUNNING", "PENDING", "COMPLETING")]


def finished(slurm: Slurm, home: Path, expected: list[Any]) -> list[str]:
    """Go on with the run until it is complete and right; the names of all its jobs."""
    code, _, err = lemonade(slurm, home, "search", "slurm.yaml", "--run", "run")
    assert code == 0, err
    assert front(slurm, home, "run") == expected
    wait_for("no job is left", slurm.idle)
    run_id = json.loads((home / "run/run.json").read_text())["run"][:8]
    return sorted({job["name"] for job in slurm.jobs() if run_id in job["name"]})


def begun(slurm: Slurm, home: Path) -> subprocess.Popen[str]:
    """A search in the middle of its work, on four nodes."""
    search = start(slurm, home, *LEMONADE, "search", "slurm.yaml", "--run", "run")
    wait_for("children are trained", lambda: len(list((home / "run/children").glob("*/*"))) > 4)
    return search


def ended(search: subprocess.Popen[str]) -> None:
    """Wait for a search to complete."""
    _, err = search.communicate(timeout=300)
    assert search.returncode == 0, err


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
