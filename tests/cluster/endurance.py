"""Endurance on a real Slurm: kills by the hundred, how busy its workers are (C19), how often Slurm is called.

    python tests/cluster/endurance.py --record FILE            # in full, more than an hour
    python tests/cluster/endurance.py --record FILE --small    # as `.ci/run` does it

Kills are of submitted runs that train on digits: after each, what was committed must stay so, and each run must end by
itself with the front of the local backend, bit for bit. For the rest trainers sleep, for times spread 4 to 1, with all
settings of the cluster at their defaults. What was seen is appended to FILE, a line of JSON at a time; the same command
goes on after what stands there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "end_to_end")]

import harness  # noqa: E402
from runs import LEMONADE, config, front, lemonade, running, start  # noqa: E402

from lemonade_hpc import files  # noqa: E402
from lemonade_hpc.run import owner  # noqa: E402
from slurm import Slurm, cluster, end_in_good_order, wait_for  # noqa: E402

RUN_S = 1800.0
DOWN_S = 400.0
"""SlurmdTimeout is 20 s; a node counted as down after 32 to 42 s, where a coordinator's job was on it after 164 s."""
BUSY, OVER_BARRIER = 0.9, 1.15
"""What C19 must reach: share of time that workers train, and how much more than with a barrier between generations."""
BUSY_SMALL = 0.85
"""In two minutes the end, with fewer children left than workers, counts for more: 0.937 to 0.950 beside other work."""
STATUS_S, SBATCH_S = 60.0, 10.0
ONE_CALL_S = 5.0
"""squeue, scontrol and sacct within so long are one status call: the next is only asked where one does not answer."""
SLEEPERS = """
seed: {seed}
data: {{name: digits}}
objectives: [{{name: val_error}}, {{name: params, min: 100, max: 100000}}]
search: {{mode: {mode}, children: {children}, proposals: 50, accepted: 12}}
cluster:
  backend: slurm
  workers: 4
  device: cpu
  gpus_per_worker: 0
  mem_gb: 1
  coordinator_mem_gb: 1
  setup: ["export PYTHONPATH={sleepers}:$PYTHONPATH SLEEP_S={sleep_s}"]
"""
COUNTED = """#!/bin/bash
echo "$(date +%s.%N) {name} $*" >> {log}
exec {real} "$@"
"""


class Record:
    """What was seen, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, part: str, **seen: Any) -> None:
        line = {"part": part, "at": time.strftime("%Y-%m-%d %H:%M:%S"), **seen}
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def of(self, part: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["part"] == part]


def new_home(slurm: Slurm) -> Path:
    """A folder of the ordinary user's."""
    home = Path(tempfile.mkdtemp(prefix="endurance-", dir=slurm.user.pw_dir))
    os.chown(home, slurm.user.pw_uid, slurm.user.pw_gid)
    return home


def coordinators(slurm: Slurm) -> list[dict[str, str]]:
    """Jobs of a chain that wait or run."""
    return [job for job in running(slurm) if job["name"].endswith("-coordinator")]


# ---------------------------------------------------------------- kills


def kills(slurm: Slurm, record: Record, wanted: dict[str, int], children: int, *, anywhere: bool) -> None:
    """Submitted runs, one after another, until enough has been killed."""
    left = Counter(wanted) - Counter(line["hit"] for line in record.of("kill"))
    if not left.total():
        return
    home = new_home(slurm)
    for backend in ("local", "slurm"):
        (home / f"{backend}.yaml").write_text(config(backend, {"children": children}, coordinator_mem_gb=1))
    code, _, err = lemonade(slurm, home, "search", "local.yaml", "--run", "undisturbed", timeout_s=RUN_S)
    assert code == 0, err
    expected = front(slurm, home, "undisturbed")
    while left.total():
        number = len(record.of("run"))
        torment(slurm, home / f"run{number}", left, record, random.Random(number), anywhere=anywhere)
        assert front(slurm, home, f"run{number}") == expected, "the front differs from the undisturbed run's"


def torment(slurm: Slurm, run: Path, left: Counter[str], record: Record, rng: random.Random, *, anywhere: bool) -> None:
    """One submitted run to its end, hurt again and again on the way; `anywhere`: also on a coordinator's node."""
    began = time.monotonic()
    code, out, err = lemonade(slurm, run.parent, "submit", "slurm.yaml", "--run", run.name)
    assert code == 0, out + err
    kept: dict[int, str] = {}
    grown_from, down = 0, None

    def hit(kind: str, **seen: Any) -> None:
        left[kind] -= 1
        at = round(time.monotonic() - began, 1)
        record.add("kill", hit=kind, run=run.name, second=at, committed=len(kept), **seen)

    while coordinators(slurm):
        assert time.monotonic() - began < RUN_S, f"{run} does not come to an end"
        time.sleep(rng.uniform(0.5, 3.0))
        before, kept = kept, harness.committed(run)
        assert before.items() <= kept.items(), f"{run}: outcomes that were committed are gone or others"
        if down is not None and down.down(slurm):
            down.restart(slurm, record)
            down = None
        if left["slurmd"] > 0 and down is None:
            if down := kill_slurmd(slurm, rng, anywhere=anywhere):
                hit("slurmd", node=down.node)
            continue
        kind = next((one for one in ("worker", "coordinator") if left[one] > 0 and rng.random() < 0.5), None)
        if kind == "worker" and harness.hurt(run, "supervisor", rng):
            hit("worker")
        elif kind == "coordinator" and len(kept) > grown_from and (epoch := kill_coordinator(run)):
            grown_from = len(kept)
            hit("coordinator", epoch=epoch)
    if down is not None:
        wait_for(f"{down.node} is given up", lambda: down.over(slurm), DOWN_S)
        down.restart(slurm, record)
    logs = "".join(path.read_text()[-2000:] for path in sorted((run / files.SLURM).glob("*.log")))
    told = json.loads(lemonade(slurm, run.parent, "status", run.name, "--json")[1])
    assert told["state"] == "complete", f"{told['state']}\n{logs}"
    assert not told["failures"], told["failures"]
    wait_for("no job is left", slurm.idle)
    harness.assert_gone(run)
    keys = ("attempts_lost", "workers_left", "nodes_excluded", "usage")
    record.add(
        "run", run=run.name, seconds=round(time.monotonic() - began, 1), children=len(harness.committed(run)),
        coordinators=len(files.epochs(run)), **{key: told[key] for key in keys},
    )  # fmt: skip


def kill_coordinator(run: Path) -> int | None:
    """kill -9 of the process that holds the run, if one does; its epoch."""
    numbers = files.epochs(run)
    try:
        who = json.loads((run / files.owner(numbers[-1])).read_text())["owner"]
    except (IndexError, OSError):
        return None
    if owner.judge(who) != "alive":
        return None
    os.kill(who["pid"], signal.SIGKILL)
    return numbers[-1]


@dataclass
class Down:
    """A node whose slurmd was killed: what Slurm makes of it."""

    node: str
    jobs: set[str]
    began: float

    def down(self, slurm: Slurm) -> bool:
        """Whether Slurm has given the node up, with the jobs that ran there."""
        return self._state(slurm) == "down"

    def over(self, slurm: Slurm) -> bool:
        """Whether the node counts as down, or has nothing left: started sooner, its jobs would complete for minutes."""
        state = self._state(slurm)
        if state not in ("down", "idle", "drained"):
            raise RuntimeError(slurm.run("scontrol", "show", "node", self.node))
        return True

    def restart(self, slurm: Slurm, record: Record) -> None:
        """Put it on record what has become of the jobs that ran there, and start its slurmd again."""
        jobs = {job["name"].rpartition("-")[2]: job["state"] for job in slurm.jobs() if job["id"] in self.jobs}
        state, after_s = self._state(slurm), round(time.monotonic() - self.began, 1)
        record.add("node", node=self.node, state=state, after_s=after_s, jobs=jobs)
        slurm.start_node(self.node)
        if state == "drained":
            slurm.run("scontrol", "update", f"NodeName={self.node}", "State=RESUME", root=True)
        wait_for(f"{self.node} is back", lambda: self._state(slurm) in ("idle", "mixed", "allocated"), DOWN_S)
        slurm.run("scontrol", "reconfigure", root=True)  # 22.05 may go on to count its GPU as taken

    def _state(self, slurm: Slurm) -> str:
        return slurm.run("sinfo", "-h", "-n", self.node, "-p", "main", "-o", "%T").strip().rstrip("*")


def kill_slurmd(slurm: Slurm, rng: random.Random, *, anywhere: bool) -> Down | None:
    """kill -9 of the slurmd of a node that works."""
    busy = [job for job in running(slurm) if job["state"] == "RUNNING"]
    spared = () if anywhere else {job["node"] for job in coordinators(slurm)}
    busy = [job for job in busy if job["node"] not in spared]
    if not busy:
        return None
    node = rng.choice(busy)["node"]
    slurm.stop(node, signal.SIGKILL)
    return Down(node, {job["id"] for job in busy if job["node"] == node}, time.monotonic())


# ---------------------------------------------------------------- how busy


def sleepers(home: Path, name: str, **values: Any) -> None:
    """A configuration whose trainers sleep."""
    text = SLEEPERS.format(sleepers=HERE / "sleepers", **values)
    (home / f"{name}.yaml").write_text(text)


def busy(slurm: Slurm, record: Record, seconds: float, sleep_s: float = 3.0) -> None:
    """C19: the share of their time that workers train; beside it, at the same time, with a barrier."""
    if record.of("busy"):
        return
    home = new_home(slurm)
    mean_s = sleep_s * 3.0 / 1.386  # of 4 ** u, u even in [0, 1): 3 / ln 4
    children = round(4 * seconds / mean_s)
    modes = ("steady_state", "generational")
    for mode in modes:
        sleepers(home, mode, mode=mode, children=children, sleep_s=sleep_s, seed=0)
    searches = [start(slurm, home, *LEMONADE, "search", f"{mode}.yaml", "--run", mode) for mode in modes]
    for search in searches:
        _, err = search.communicate(timeout=3 * seconds + 300)
        assert search.returncode == 0, err
    wait_for("no job is left", slurm.idle)
    found = {mode: shares(slurm, home / mode) for mode in modes}
    ratio = found["steady_state"]["busy"] / found["generational"]["busy"]
    record.add("busy", children=children, sleep_s=[sleep_s, 4 * sleep_s], ratio=round(ratio, 3), **found)
    assert found["steady_state"]["busy"] >= (BUSY if seconds >= 600 else BUSY_SMALL), (
        f"C19: workers were busy {found['steady_state']['busy']:.1%} of their time"
    )
    assert ratio >= OVER_BARRIER, f"C19: {ratio:.2f} times what it is with a barrier"


def shares(slurm: Slurm, run: Path) -> dict[str, float]:
    """What part of their workers' time they trained: once their trainers are ready, and of what Slurm accounts for."""
    trained, lived = 0.0, 0.0
    for log in run.glob(f"{files.WORKERS}/*/done.log"):
        said = [json.loads(line.partition(" ")[2]) for line in log.read_text().splitlines()]
        began = next(message["at"] for message in said if message["say"] == "ready")
        trained += sum(message["outcome"]["wall_s"] for message in said if message["say"] == "outcome")
        lived += said[-1]["at"] - began
    run_id = json.loads((run / files.RUN).read_text())["run"][:8]
    told = slurm.run("sacct", "-X", "-n", "-P", "-o", "JobName,ElapsedRaw").splitlines()
    allocated = sum(int(line.partition("|")[2]) for line in told if run_id in line)
    return {"busy": round(trained / lived, 4), "of_allocated": round(trained / allocated, 4), "allocated_s": allocated}


# ---------------------------------------------------------------- how many calls


def calls(slurm: Slurm, record: Record, minutes: float, sleep_s: float = 20.0) -> None:
    """How often a submitted run calls Slurm, while its coordinator and its workers are killed again and again."""
    if record.of("calls"):
        return
    home, rng = new_home(slurm), random.Random(0)
    log, run = home / "calls.log", home / "run"
    path = count_commands(home / "bin", log)
    sleepers(home, "config", mode="steady_state", children=100_000, sleep_s=sleep_s, seed=0)
    submit = start(slurm, home, "env", f"PATH={path}", *LEMONADE, "submit", "config.yaml", "--run", "run")
    out, err = submit.communicate(timeout=60)
    assert submit.returncode == 0, out + err
    began, submitted = time.monotonic(), time.time()
    killed: Counter[str] = Counter()
    while time.monotonic() - began < 60 * minutes:
        time.sleep(rng.uniform(20, 160))
        killed["coordinator"] += kill_coordinator(run) is not None
        killed["worker"] += killed["coordinator"] % 3 == 0 and harness.hurt(run, "supervisor", rng)
    minutes = (time.monotonic() - began) / 60
    code, out, err = lemonade(slurm, home, "stop", "run")
    assert code == 0, out + err
    wait_for(
        "the chain is over", lambda: not coordinators(slurm), 600
    )  # a worker that was killed is missed after minutes
    made = [line.split(maxsplit=2) for line in log.read_text().splitlines()]
    times = [(float(at), name) for at, name, *_ in made if float(at) > submitted]
    status = rounds([at for at, name in times if name in ("squeue", "scontrol", "sacct")])
    submissions = [at for at, name in times if name == "sbatch"]
    gaps = [round(b - a, 1) for a, b in zip(status, status[1:], strict=False)]
    most = max(sum(at <= other < at + 60 for other in submissions) for at in submissions)
    record.add(
        "calls", minutes=round(minutes, 1), killed=killed, coordinators=len(files.epochs(run)),
        children=len(harness.committed(run)), commands=Counter(name for _, name in times), status_calls=len(status),
        shortest_between_status_calls_s=min(gaps, default=None), most_sbatch_in_a_minute=most,
    )  # fmt: skip
    assert min(gaps, default=STATUS_S) >= STATUS_S - 1, f"status calls {min(gaps)} s apart"
    assert most <= 60 / SBATCH_S, f"{most} sbatch in a minute"


def count_commands(folder: Path, log: Path) -> str:
    """Make commands that note that they are called; the PATH on which they come first."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "sacct", "scancel"):
        (folder / name).write_text(COUNTED.format(name=name, log=log, real=shutil.which(name)))
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def rounds(times: list[float]) -> list[float]:
    """When status calls began, each of one query or several."""
    found: list[float] = []
    for at in sorted(times):
        if not found or at - found[-1] > ONE_CALL_S:
            found.append(at)
    return found


def main(arguments: Sequence[str]) -> None:
    """Do what is not on record yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", default="kills,busy,calls")
    given = parser.parse_args(arguments)
    parts = given.parts.split(",")
    record = Record(given.record)
    end_in_good_order()
    with cluster() as slurm:
        version = re.sub(r"\s+", " ", slurm.run("sinfo", "--version")).strip()
        record.add("start", slurm=version, small=given.small, parts=parts)
        if "busy" in parts:
            busy(slurm, record, 120 if given.small else 600)
        if "kills" in parts:
            wanted = (
                {"coordinator": 10, "worker": 5, "slurmd": 1}
                if given.small
                else {"coordinator": 100, "worker": 20, "slurmd": 5}
            )
            kills(slurm, record, wanted, 90 if given.small else 150, anywhere=not given.small)
        if "calls" in parts and not given.small:
            calls(slurm, record, 30)


if __name__ == "__main__":
    main(sys.argv[1:])
