"""The coordinator as a chain of Slurm jobs: exactly one runs, and the next takes over when it ends, however it ends.

Decides: what such a job is, when a chain is begun, and when it is ended. The chain rests on Slurm's `singleton`: of the
jobs with one name and owner one runs at a time. Each job submits its successor before anything else
(`coordinator.sbatch`). A chain whose coordinators die one after another with nothing done ends itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lemonade_hpc import files
from lemonade_hpc.config import Cluster, Config, ConfigError, dump
from lemonade_hpc.run import container, queue, record
from lemonade_hpc.run.ledger import Halted, RunFailed
from lemonade_hpc.run.record import Loaded
from lemonade_hpc.run.slurm import may_pass

LINK = "LEMONADE_CHAIN"
"""Set in the environment of a coordinator that is such a job: to FIRST where a person has submitted it."""
FIRST = "first"
STOPPED = "stopped by `lemonade-hpc stop`"
TAKE_OVER = "take-over"
"""Likewise, where that person knows that the last coordinator is gone."""
MAX_CRASHES = 5
"""Coordinators in a row that may die with no child finished before the chain ends."""
LIVING = "PENDING,CONFIGURING,RUNNING,SUSPENDED"
"""Not COMPLETING: a job may be so for long, on a node that hangs, and does nothing any more."""
EARLY = "early"
"""Begins the name of a file of each job that has not begun yet, or never did: the script counts them."""
UNFIT = re.compile(r'["%\\\n]')
"""In names that a line of a batch script cannot have."""
TEMPLATE = Path(__file__).with_name("coordinator.sbatch")
PROGRAM = (sys.executable, "-P", "-m", "lemonade_hpc.cli")


def job_name(run_id: str) -> str:
    """The name that the jobs of one run's chain share; no worker has it."""
    return f"{queue.prefix(run_id)}{queue.COORDINATOR}"


def script(config: Config, run: Path, name: str) -> str:
    """The batch script of a coordinator of this run, whose folder it is to write to."""
    folder = (run / files.SLURM).resolve()
    for path in (str(Path.cwd()), str(folder)):
        if UNFIT.search(path):
            raise ConfigError(f'{path!r}: sbatch takes no folder with one of " % \\ or a line break in its name')
    arguments = ["search", str(folder / "config.yaml"), "--run", str(run.resolve())]
    inside = container.is_inside()
    command = container.coordinator(config, run, arguments) if inside else [*PROGRAM, *arguments]
    values = {
        "name": name,
        "cwd": str(Path.cwd()),
        "run": str(run.resolve()),
        "options": "\n".join(f"#SBATCH --{line}" for line in options(config.cluster)),
        "setup": "\n".join(config.cluster.setup),
        "script": shlex.quote(str(folder / TEMPLATE.name)),
        "early": shlex.quote(str(folder / EARLY)),
        "crashes": MAX_CRASHES,
        "command": shlex.join(command),
    }
    return container.filled(TEMPLATE.read_text(), values)


def options(cluster: Cluster) -> list[str]:
    """What the site is asked for, as sbatch's long options."""
    asked: dict[str, object] = {
        "cpus-per-task": None if "cpus-per-task" in cluster.skip else 1,
        "no-requeue": "no-requeue" not in cluster.skip,
        "time": cluster.coordinator_time_min,
        "mem": None if "mem" in cluster.skip else f"{int(1024 * cluster.coordinator_mem_gb)}M",
        "partition": cluster.coordinator_partition,
        "account": cluster.account,
        "wckey": cluster.wckey,
        "reservation": cluster.reservation,
        **cluster.coordinator_extra,
    }
    return [key if value is True else f"{key}={value}" for key, value in asked.items() if value not in (None, False)]


def begin(config: Config, run: Path, *, take_over: bool = False) -> str:
    """Submit a run's first coordinator; its job's id. Raises ConfigError with what Slurm says."""
    run_id = record.read_identity(run)["run"]
    name = job_name(run_id)
    there = queued(run_id)
    if there:
        raise ConfigError(f"{run}: has a coordinator in the queue already, job {', '.join(there)}")
    folder = run / files.SLURM
    files.make_folder(folder)
    for path in folder.glob(f"{EARLY}-*"):
        files.remove(path)
    files.write(folder / "config.yaml", dump(config))
    if container.is_inside():
        container.copy_helper(run)
    files.write(folder / TEMPLATE.name, script(config, run, name).encode())
    word = TAKE_OVER if take_over else FIRST
    command = ("sbatch", "--parsable", str((folder / TEMPLATE.name).resolve()), word)
    try:
        limit = queue.QUERY_TIMEOUT_S
        environ = queue.environment()
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=environ)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"sbatch does not answer; whether it has submitted {name} squeue will show") from None
    job = done.stdout.strip().partition(";")[0]
    if done.returncode:
        said, accepted = done.stderr.strip(), _jobs(run_id, f"--states={LIVING}")
        if not may_pass(said):
            raise ConfigError(f"cluster: Slurm refuses the coordinator's job. It says: {said}")
        if not accepted:
            raise ConfigError(f"Slurm does not take the coordinator's job now; try again later. It says: {said}")
        job = accepted[-1]
    return job


def queued(run_id: str) -> list[str]:
    """The jobs of a run's chain, at work or not yet; raises ConfigError where Slurm does not say."""
    answer = _jobs(run_id, f"--states={LIVING}")
    if answer is None:
        raise ConfigError(f"{queue.silence()}: whether a coordinator is in the queue is not known")
    return answer


def _jobs(run_id: str, *options: str) -> list[str] | None:
    answer = queue.ask("squeue", "--me", "--noheader", f"--name={job_name(run_id)}", *options, "--format=%i")
    return None if answer is None else answer.split()


def end(run_id: str) -> None:
    """Cancel the successor that waits: nobody is to go on by himself."""
    queue.ask("scancel", "--me", f"--name={job_name(run_id)}", "--state=PENDING")


def is_link() -> bool:
    """Whether this process is a coordinator of a chain."""
    return LINK in os.environ


def begun_by_a_person() -> bool:
    """Whether somebody has just started this coordinator, and may have mended what was wrong before."""
    return os.environ.get(LINK, FIRST) in (FIRST, TAKE_OVER)


def takes_over() -> bool:
    """Whether whoever submitted this coordinator knows that the last one is gone."""
    return os.environ.get(LINK) == TAKE_OVER


def has_begun(run: Path) -> None:
    """No series of coordinators that died before they began goes on after this one: remove their marks, and its own."""
    if is_link():
        with contextlib.suppress(OSError):
            for path in (run / files.SLURM).glob(f"{EARLY}-*"):
                files.remove(path)


def refuse_to_go_on(run: Path, loaded: Loaded, note: Callable[[str], None]) -> None:
    """Raise Halted where a chain's last coordinator left for good or was to, RunFailed where they die in a row."""
    history, order = loaded.history, run / files.stop_order(loaded.epoch)
    if begun_by_a_person():
        return
    if history.halted or files.size(order):
        end(record.read_identity(run)["run"])
        raise Halted(str(history.why_closed) if history.halted else STOPPED)
    if history.num_crashes:
        note(f"the last {history.num_crashes} coordinators were killed or lost, and no child was finished meanwhile")
    if history.num_crashes >= MAX_CRASHES:
        raise RunFailed(
            f"{history.num_crashes} coordinators in a row died with no child finished: see {files.SLURM}/*.log in the "
            f"run folder, mend the cause and submit again; `cancel` ends workers that are left"
        )
