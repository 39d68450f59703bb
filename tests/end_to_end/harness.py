"""Real runs of the command in processes of their own, and ways to hurt them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

COMMAND = [sys.executable, "-m", "lemonade_hpc.cli"]
DEADLINE_S = 240.0

SMALL: dict[str, Any] = {
    "seed": 3,
    "data": {"name": "digits"},
    "objectives": [{"name": "val_error"}, {"name": "params", "min": 300, "max": 20000}],
    "search": {"mode": "generational", "children": 12, "accepted": 4, "proposals": 8},
    "training": {"epochs": 1, "initial_epochs": 1, "distill_epochs": 1},
    "cluster": {"backend": "local", "workers": 2, "retries": 50},
}


def write_config(folder: Path, **changes: Any) -> Path:
    """SMALL with some sections' keys changed, as a YAML file."""
    merged = {key: value | changes.get(key, {}) if isinstance(value, dict) else changes.get(key, value)
              for key, value in SMALL.items()}  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merged))
    return path


def start(config: Path, run: Path, *more: str, supervisors: str = "") -> subprocess.Popen[str]:
    """The search command in a session of its own, so that a signal to its group is a Ctrl-C.

    `supervisors`: Python statements that every supervisor executes when its interpreter starts.
    """
    site = config.parent / "site" / "sitecustomize.py"
    site.parent.mkdir(exist_ok=True)
    site.write_text(f"import sys\nif 'submitit.core._submit' in sys.orig_argv:\n    {supervisors or 'pass'}\n")
    path = os.pathsep.join([str(site.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [*COMMAND, "search", str(config), "--run", str(run), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def search(config: Path, run: Path, *more: str) -> tuple[int, str, str]:
    """Run the search command to its end."""
    return finish(start(config, run, *more))


def command(*arguments: str) -> tuple[int, str, str]:
    """Any command to its end."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return done.returncode, done.stdout, done.stderr


def front(run: Path) -> list[tuple[int, str, tuple[float, ...], str]]:
    """What must be bit-identical between runs: numbers, networks, objectives, and the weights' checksums."""
    code, out, err = command("front", str(run), "--json")
    assert code == 0, err
    return [(m["id"], m["digest"], tuple(m["objectives"].values()), m["weights"]["sha256"]) for m in json.loads(out)]


def status(run: Path) -> dict[str, Any]:
    """The run's status as JSON."""
    code, out, err = command("status", str(run), "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def assert_sound(run: Path) -> None:
    """`verify` finds nothing wrong."""
    code, out, err = command("verify", str(run))
    assert code == 0, out + err


def processes(run: Path) -> dict[int, str]:
    """Live processes whose command line names the run folder, with that line; zombies do not count."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(run) in line and state != "Z":
            found[int(folder.name)] = line
    return found


def pids(run: Path, kind: str) -> list[int]:
    """Processes of a run: `coordinator`, `supervisor` (submitit's task) or `trainer`."""
    mark = {"coordinator": " search ", "supervisor": "submitit.core._submit", "trainer": "lemonade_hpc.learn.child"}[
        kind
    ]
    return sorted(pid for pid, line in processes(run).items() if mark in line)


def kill(pid: int, which: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; False if the process was gone already."""
    try:
        os.kill(pid, which)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Poll until the condition is true; its value. Fails, naming what was awaited."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds:g} s in vain for {what}")


def committed(run: Path) -> dict[int, str]:
    """Children with an outcome in the journals, and the attempts it is of."""
    return {number: outcome["attempt"] for number, outcome in outcomes(run).items()}


def outcomes(run: Path) -> dict[int, dict[str, Any]]:
    """Outcomes in the journals by child, read without the program's own code."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(run.glob("epochs/*/journal.log")):
        for line in path.read_text(errors="replace").split("\n")[:-1]:  # the last one is torn, or empty
            if '"event":"committed"' in line:
                outcome = json.loads(line.partition(" ")[2])["outcome"]
                assert outcome["child"] not in found, f"child {outcome['child']} is committed twice"
                found[outcome["child"]] = outcome
    return found


def num_committed(run: Path) -> int:
    """Outcomes in the journals."""
    return len(committed(run))


def assert_sound_now(run: Path, process: subprocess.Popen[str]) -> None:
    """`verify` finds nothing wrong in the middle of a run: its coordinator waits meanwhile."""
    kill(process.pid, signal.SIGSTOP)
    try:
        assert_sound(run)
    finally:
        kill(process.pid, signal.SIGCONT)


def wait_for_outcomes(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many outcomes are in the journal, or the run is over."""
    wait_for(lambda: num_committed(run) >= count or process.poll() is not None, f"{count} outcomes")


def assert_gone(run: Path, seconds: float = 40.0) -> None:
    """No process of the run is left."""
    wait_for(lambda: not processes(run), f"all processes of {run} to end; left are {processes(run)}", seconds)


def hurt(run: Path, kind: str, rng: random.Random) -> bool:
    """kill -9 a random process of this kind; False if there is none."""
    found = pids(run, kind)
    return bool(found) and kill(rng.choice(found))
