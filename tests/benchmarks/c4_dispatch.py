"""C4: children a second that take no time, by workers, against one task of a Slurm array for each.

On the Slurm of `tests/cluster`, four nodes of two CPUs on one host. The rival is what people write by hand: submitit's
`map_array`, a task for each child, eight at a time; from sbatch until the last has ended. Ours is a search with eight
workers whose trainers answer at once, all settings of the cluster at their defaults; from the first commits to the
last, asking for children and committing them included. Floor 30x, target more than 500 a second. The guard: every
child is committed once, and every task has left its result. Needs root and Slurm's daemons. Prints JSON.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from common import against_target, arguments, compared, report

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("cluster", "end_to_end")]

import harness  # noqa: E402
from runs import LEMONADE, running, start  # noqa: E402

from slurm import Slurm, cluster, wait_for  # noqa: E402

FLOOR, TARGET_PER_S = 30.0, 500.0
FIRST = 50
"""Commits before the clock starts: until then workers are started, and nothing is known of how long children take."""
CONFIG = """
data: {{name: digits}}
objectives: [{{name: val_error}}, {{name: params, min: 100, max: 100000}}]
search: {{children: {children}, proposals: 20, accepted: 10}}
cluster:
  {{backend: slurm, workers: 8, device: cpu, gpus_per_worker: 0, mem_gb: 1,
    setup: ["export PYTHONPATH={sleepers}:$PYTHONPATH SLEEP_S=0"]}}
"""
ARRAY = """
import sys, submitit
executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(time=10, mem="500M", srun_args=["--cpus-per-task=1"])
executor.map_array(abs, range(int(sys.argv[2])))
"""


def by_array(slurm: Slurm, home: Path, count: int) -> tuple[float, bool]:
    """Seconds for each of so many tasks, and whether all have left a result."""
    began = time.perf_counter()
    submit = start(slurm, home, sys.executable, "-c", ARRAY, str(home / "array"), str(count))
    _, err = submit.communicate()
    assert submit.returncode == 0, err
    wait_for("all tasks have ended", lambda: not running(slurm), 600)
    seconds = time.perf_counter() - began
    return seconds / count, len(list((home / "array").glob("*_result.pkl"))) == count


def by_workers(slurm: Slurm, home: Path, count: int) -> tuple[float, bool]:
    """Seconds for each of so many children, and whether all are committed."""
    sleepers = Path(__file__).parents[1] / "cluster" / "sleepers"
    (home / "config.yaml").write_text(CONFIG.format(children=count, sleepers=sleepers))
    search = start(slurm, home, *LEMONADE, "search", "config.yaml", "--run", "run")
    wait_for("children are committed", lambda: harness.num_committed(home / "run") >= FIRST)
    began, first = time.perf_counter(), harness.num_committed(home / "run")
    wait_for("all are", lambda: harness.num_committed(home / "run") >= count, 600)
    seconds, last = time.perf_counter() - began, harness.num_committed(home / "run")
    _, err = search.communicate(timeout=60)
    assert search.returncode == 0, err
    wait_for("all workers have left", lambda: not running(slurm))
    return seconds / (last - first), last >= count


def main() -> None:
    """Measure both in turn."""
    given = arguments(__doc__, rounds=5)
    tasks, children = (8, 500) if given.small else (40, 4000)
    times: dict[str, list[float]] = {"a task each": [], "workers": []}
    complete = True
    with cluster() as slurm:
        for _ in range(1 if given.small else given.rounds):
            home = Path(tempfile.mkdtemp(prefix="c4-", dir=slurm.user.pw_dir))
            os.chown(home, slurm.user.pw_uid, slurm.user.pw_gid)
            sides = {"a task each": by_array(slurm, home, tasks), "workers": by_workers(slurm, home, children)}
            for name, (seconds, whole) in sides.items():
                times[name].append(seconds)
                complete = complete and whole
    found = compared(times, "a task each", "workers", FLOOR)
    report("C4", given, {"nothing is missing": complete}, against_target(found, TARGET_PER_S))


if __name__ == "__main__":
    main()
