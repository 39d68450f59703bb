"""A soak: thousands of fake children on a fake Slurm with a virtual clock, under a seeded schedule of faults.

Coordinator, crew, Slurm backend, record, lease and workers are the real ones; beneath them nothing is: trainers that
take virtual time, a queue, nodes, a clock. Faults: coordinators killed at any write and around sbatch, or told to go;
workers killed, preempted, ended by their time limit; nodes that fail while their workers go on as zombies; a node that
fails everything; a Slurm that does not answer, times out though it has accepted, or knows no accounting; children that
always crash. After every turn it is checked that nothing is lost or counted twice; Slurm is never called too often; and
at the end, `verify`, and the front of the search without faults.

`python tests/end_to_end/soak.py [--children 2000] [--seed 0]`
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time as real_time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.run import coordinator, crew, lease, log, owner, record, session, slurm, worker
from lemonade_hpc.run.ledger import Stopped
from lemonade_hpc.run.log import Message

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import run_doubles as doubles  # noqa: E402

WORKERS, NODES = 12, 16
RATES = {  # per virtual second
    "kill the coordinator": 1 / 400, "tell the coordinator to leave": 1 / 900, "slurm is down": 1 / 900,
    "preempt": 1 / 120, "kill a worker": 1 / 300, "node fails": 1 / 600, "kill a trainer": 1 / 250,
}  # fmt: skip


class Killed(BaseException):
    """kill -9 of the coordinator."""


@dataclass
class Job:
    """A task of an array."""

    id: str
    name: str
    worker: str
    launched: float
    avoid: Sequence[str]
    state: str = "PENDING"
    node: str = ""
    process: worker.Worker | None = None
    ends: float = float("inf")
    fate: str = "TIMEOUT"
    """When it is killed, and what it is said to have died of."""


class Trainer:
    """Takes virtual time; a child goes on from where its last checkpoint was."""

    def __init__(self, world: World, node: str) -> None:
        self.world, self.node = world, node
        self.messages: list[Message] = [{"ready": "fake"}]
        self.task: Message | None = None
        self.began = 0.0
        self.death: str | None = None

    def send(self, task: Message) -> None:
        self.task, self.began = task, self.world.now

    @property
    def done(self) -> float:
        assert self.task is not None
        number = self.task["child"]
        return self.world.saved.get(number, 0.0) + (self.world.now - self.began) / self.world.seconds(number)

    def save(self) -> None:
        if self.task is None:
            return
        done = min(self.done, 0.99)
        self.world.saved[self.task["child"]], self.began = done, self.world.now
        told = {key: self.task[key] for key in ("child", "attempt")}
        self.messages.append(told | {"saved": {"done": done, "epochs": 0}})

    def wait(self, seconds: float) -> None:
        pass

    def poll(self) -> list[Message]:
        if self.task is not None and self.death is None:
            if self.task["child"] in self.world.poison or self.node in self.world.bad:
                self.death = "killed by SIGSEGV"
            elif self.done >= 1.0:
                self.messages.append(doubles.outcome(self.task, self.world.run))
                self.task = None
        messages, self.messages = self.messages, []
        return messages

    def died(self) -> str | None:
        return self.death

    def kill(self) -> None:
        self.task = None


class World:
    """Clock, nodes, queue, and who lives."""

    def __init__(self, run: Path, seed: int, num_children: int, *, faults: bool) -> None:
        self.run, self.faults = run, faults
        self.now = 1000.0
        self.chance = random.Random(seed)
        self.jobs: list[Job] = []
        self.processes: list[Job] = []
        """Those whose worker runs, in a job or as a zombie."""
        self.saved: dict[int, float] = {}
        self.poison = {number for number in range(20, num_children) if self.chance.random() < 0.004}
        self.bad = {"n3"} if faults else set()
        self.broken: dict[str, float] = {}
        self.down_until = self.now
        self.living: set[int] = set()
        self.pid = 0
        self.kill_in: int | None = None
        """Writes until the coordinator is killed."""
        self.calls: dict[str, list[float]] = {"status": [], "sbatch": []}
        self.happened: Counter[str] = Counter()
        self.coordinator: coordinator.Coordinator | None = None
        self.committed: dict[int, str] = {}
        self.hit: set[int] = set()
        """Children whose trainer was killed: none is hit twice, so that it stays within its budget."""

    def seconds(self, number: int) -> float:
        """How long a child trains: spread 4 to 1."""
        return 20.0 * 4 ** random.Random(number).random()

    # ------------------------------------------------------------ time

    def sleep(self, seconds: float) -> None:
        """The coordinator sleeps: a second of everything else."""
        self.advance(seconds)
        self.hurt()
        self.check()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        free = [f"n{k}" for k in range(NODES) if f"n{k}" not in self.broken]
        for node, until in list(self.broken.items()):
            if until < self.now:
                del self.broken[node]
        busy = {job.node for job in self.jobs if job.state == "RUNNING"}
        for job in self.jobs:
            if job.state == "PENDING" and self.now - job.launched > 5 and self.now > self.down_until:
                rooms = [node for node in free if node not in busy and node not in job.avoid]
                if rooms:
                    job.node, job.state = rooms[0], "RUNNING"
                    busy.add(job.node)
                    self.begin(job)
            if job.state == "RUNNING" and self.now > job.ends:
                self.end(job, job.fate)
        for job in list(self.processes):
            assert job.process is not None
            if not job.process.step():
                self.processes.remove(job)
                if job.state == "RUNNING":
                    job.state = "COMPLETED"

    def begin(self, job: Job) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURMD_NODENAME", job.node)
            job.process = worker.Worker(self.run, job.worker, lambda epoch: Trainer(self, job.node))
        self.processes.append(job)

    def end(self, job: Job, state: str) -> None:
        """The job is over; its process with it."""
        job.state = state
        if job in self.processes:
            self.processes.remove(job)

    # ------------------------------------------------------------ faults

    def hurt(self) -> None:
        if not self.faults:
            return
        for what, rate in RATES.items():
            if self.chance.random() < rate:
                self.happened[what] += 1
                self.cause(what)

    def cause(self, what: str) -> None:
        running = [job for job in self.jobs if job.state == "RUNNING"]
        if what == "kill the coordinator":
            self.kill_in = self.chance.randrange(6)
        elif what == "tell the coordinator to leave":
            assert self.coordinator is not None
            self.coordinator.stop_signal = 10
        elif what == "slurm is down":
            self.down_until = self.now + self.chance.uniform(10, 300)
        elif not running:
            return
        else:
            job = self.chance.choice(running)
            assert job.process is not None
            if what == "preempt":
                job.process.signalled = True
                job.ends, job.fate = self.now + 20, "PREEMPTED"
            elif what == "kill a worker":
                self.end(job, "FAILED")
            elif what == "node fails":
                job.state = "NODE_FAIL"  # its process goes on
                self.broken[job.node] = self.now + 120
            elif what == "kill a trainer" and isinstance(job.process._trainer, Trainer):
                if job.process._current is not None and job.process._current["child"] not in self.hit:
                    self.hit.add(job.process._current["child"])
                    job.process._trainer.death = "killed by SIGKILL"

    def write(self) -> None:
        """The coordinator is about to write, or has just written: it may be killed here."""
        if self.kill_in is not None:
            if self.kill_in == 0:
                self.kill_in = None
                raise Killed
            self.kill_in -= 1

    # ------------------------------------------------------------ Slurm

    def called(self, what: str, apart: float) -> None:
        calls = self.calls[what]
        assert not calls or self.now - calls[-1] >= apart - 1e-6, f"{what} after {self.now - calls[-1]:.1f} s"
        calls.append(self.now)

    def ask(self, *command: str) -> str | None:
        """squeue, scontrol, sacct, scancel."""
        name = command[0]
        if name == "squeue":
            self.called("status", 60)
        if self.now < self.down_until:
            return None if name != "sacct" or self.chance.random() < 0.5 else ""
        if command[:3] == ("scontrol", "show", "config"):
            return "MaxArraySize = 1001\n"
        if name == "scancel":
            for job in self.jobs:
                if job.id == command[1]:
                    self.end(job, "CANCELLED")
            return ""
        shown = self.jobs if name == "sacct" else self.jobs[-300:]
        return "".join(f"{job.id}|{job.name}|{job.state}|None\n" for job in shown)

    def executor(self, folder: Path) -> Any:
        """submitit's, as far as it is used."""
        from submitit.core.utils import FailedJobError

        made = SimpleNamespace(options={})

        def map_array(function: Any, runs: Sequence[str], names: Sequence[str]) -> list[Any]:
            self.called("sbatch", 10)
            self.write()
            lot = self.chance.random() if self.faults else 1.0
            if self.now < self.down_until and lot < 0.7:
                raise FailedJobError("sbatch: error: Unable to contact slurm controller")
            array = len(self.calls["sbatch"]) + 7000
            for k, name in enumerate(names):
                avoid = (made.options["exclude"] or "").split(",")
                self.jobs.append(Job(f"{array}_{k}", made.options["job_name"], name, self.now, avoid))
            self.write()
            if lot < 0.1:
                raise FailedJobError("sbatch: error: Socket timed out on send/recv operation")
            return [SimpleNamespace(job_id=f"{array}_{k}") for k in range(len(names))]

        made.update_parameters = made.options.update
        made.map_array = map_array
        return made

    # ------------------------------------------------------------ what must hold

    def check(self) -> None:
        made = self.coordinator
        assert made is not None
        for number, attempts in made.history.attempts.items():
            assert sum(one.lost is None for one in attempts) <= 1, f"child {number} is tried twice at once: {attempts}"
        for number, known in made.history.results.items():
            was = self.committed.setdefault(number, known["attempt"])
            assert was == known["attempt"], f"child {number} was committed by {was}, now by {known['attempt']}"
        needed = set(made.history.state.front.numbers)
        assert all((self.run / made.history.results[n]["weights"]["path"]).exists() for n in needed)


@contextlib.contextmanager
def installed(world: World) -> Iterator[None]:
    """The world beneath the program."""
    clock = SimpleNamespace(monotonic=lambda: world.now, sleep=world.sleep)
    real_append = log.LogWriter.append_texts

    def append(self: log.LogWriter, bodies: Sequence[str], *, durable: bool = True) -> None:
        mine = "epochs" in self.path.parts
        if mine:
            world.write()
        real_append(self, bodies, durable=durable)
        if mine:
            world.write()

    def identity(pid: int | None = None) -> dict[str, Any]:
        world.pid += 1
        world.living.add(world.pid)
        return {"host": "here", "pid": world.pid, "slurm_job": None}

    with pytest.MonkeyPatch.context() as patch:
        doubles.install(patch)
        for module in (coordinator, crew, slurm, worker):
            patch.setattr(module, "time", clock)
        patch.setattr(owner, "identity", identity)
        patch.setattr(owner, "judge", lambda who: "alive" if who["pid"] in world.living else "gone")
        patch.setattr(slurm, "ask", world.ask)
        patch.setattr("submitit.SlurmExecutor", world.executor)
        patch.setattr(slurm.SlurmBackend, "_deliver", lambda self, name: None)
        patch.setattr(slurm.SlurmBackend, "last_output", lambda self, name: "")
        patch.setattr(log.LogWriter, "append_texts", append)
        yield


def live(world: World, settings: Any) -> bool:
    """One coordinator's life; True once the run is complete."""
    fixed = session._prepare(settings, doubles.images(), world.run)
    loaded = record.load(world.run, fixed)
    assert all(
        loaded.history.results.get(number, {}).get("attempt", attempt) == attempt
        for number, attempt in world.committed.items()
    )
    journal = lease.open_epoch(world.run, settings, loaded, loaded.history.reporters(), take_over=False)
    pid = world.pid
    backend = slurm.SlurmBackend(
        world.run, record.read_identity(world.run)["run"], settings.cluster, lambda text: None, first=journal.epoch == 1
    )
    made = coordinator.Coordinator(world.run, settings, loaded.history, journal, backend, doubles.Notes())
    world.coordinator = made
    try:
        with contextlib.suppress(Stopped):
            made.adopt()
            made.search()
        made.close()
    except Killed:
        made._crew.close()
        made._ledger.close()
    finally:
        world.kill_in = None
        world.living.discard(pid)
    return made.history.complete is not None


def soak(run: Path, num_children: int, seed: int, *, faults: bool = True) -> World:
    """Run one to its end."""
    settings = doubles.config(
        seed=seed,
        search={"mode": "generational", "children": num_children, "accepted": 60, "proposals": 120},
        cluster={"backend": "slurm", "workers": WORKERS, "time_min": 60, "poll_s": 1.0, "stale_s": 0.0},
        storage={"seal_every": 500},
    )
    world = World(run, seed, num_children, faults=faults)
    with installed(world):
        while not live(world, settings):
            assert world.now < 1000 + 100 * num_children, "it does not come to an end"
            for _ in range(world.chance.randrange(1, 90)):
                world.advance(1.0)  # nobody coordinates
        assert world.coordinator is not None
        failed = {outcome["child"] for outcome in world.coordinator.history.failures}
        assert failed == {n for n in world.poison if n < num_children + 3}, "only children that always crash may fail"
        doubles.assert_sound(run)
        lost = [event for event in doubles.events(run, settings, "lost") if event["kind"] == "crash"]
        assert max(Counter(event["child"] for event in lost).values(), default=0) <= 1 + settings.cluster.retries
    return world


def main() -> None:
    """Read the arguments, soak with and without faults, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--children", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    fronts = []
    for faults in (True, False):
        began = real_time.monotonic()
        with doubles.folder() as run:
            world = soak(run, given.children, given.seed, faults=faults)
            assert world.coordinator is not None
            history = world.coordinator.history
            fronts.append(doubles.front(history))
            lost = {kind: count for kind, count in history.num_lost.items() if count}
            calls = {what: len(times) for what, times in world.calls.items()}
            print(
                f"faults {faults}: {history.state.num_committed} children, {len(history.failures)} failed; "
                f"{max(files.epochs(run))} coordinators; {history.num_launched} workers {dict(history.departures)}; "
                f"attempts lost {lost}; excluded {list(history.excluded)}; happened {dict(world.happened)}; "
                f"calls {calls} in {world.now - 1000:.0f} virtual s; "
                f"{real_time.monotonic() - began:.1f} s"
            )
    if fronts[0] != fronts[1]:
        sys.exit("the front with faults is not that without")


if __name__ == "__main__":
    main()
