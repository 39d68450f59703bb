"""A soak: thousands of fake children on a fake Slurm with a virtual clock, under a seeded schedule of faults.

Coordinator, crew, Slurm backend, submitit, record, lease and workers are the real ones; beneath them nothing is:
trainers that take virtual time, and `fake_slurm.py`, which answers command lines. Faults: coordinators killed at any
write and around sbatch, or told to go; workers killed, preempted, ended by their time limit; nodes that fail while
their workers go on as zombies; a node that fails everything; a Slurm that does not answer, times out though it has
accepted, or knows no accounting; children that always crash. After every turn it is checked that nothing is lost or
counted twice; Slurm is never called too often; and at the end, `verify`, and the front of the search without faults.

`python tests/end_to_end/soak.py [--children 2000] [--seed 0]`
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import time as real_time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from submitit.core import utils

from lemonade_hpc import files
from lemonade_hpc.run import coordinator, crew, lease, log, owner, record, session, slurm, worker
from lemonade_hpc.run.ledger import Stopped
from lemonade_hpc.run.log import Message

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import fake_slurm  # noqa: E402
import run_doubles as doubles  # noqa: E402
from fake_slurm import Answer, FakeSlurm, Job  # noqa: E402

WORKERS, NODES = 12, 16
RATES = {  # per virtual second
    "kill the coordinator": 1 / 400, "tell the coordinator to leave": 1 / 900, "slurm is down": 1 / 900,
    "preempt": 1 / 120, "kill a worker": 1 / 300, "node fails": 1 / 600, "kill a trainer": 1 / 250,
}  # fmt: skip


class Killed(BaseException):
    """kill -9 of the coordinator."""


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
        self.chance = random.Random(seed)
        self.slurm = FakeSlurm(NODES, delay_s=5.0, begins=self.begin, ended=self.end)
        self.waiting: list[tuple[Job, float]] = []
        """Tasks that have begun and look for their pickle, and until when."""
        self.processes: dict[Job, worker.Worker] = {}
        """The workers that run, in a job or as a zombie."""
        self.saved: dict[int, float] = {}
        self.poison = {number for number in range(20, num_children) if self.chance.random() < 0.004}
        self.bad = {"n3"} if faults else set()
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

    @property
    def now(self) -> float:
        return self.slurm.now

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
        self.slurm.controller = self.now + seconds > self.down_until
        self.slurm.advance(seconds)
        for job, until in list(self.waiting):
            self.look_for_task(job, until)
        for job, process in list(self.processes.items()):
            if not process.step():
                del self.processes[job]
                if job.state == "RUNNING":
                    self.slurm.end(job, "COMPLETED")

    def begin(self, job: Job) -> None:
        """A job starts: submitit's, which looks for its pickle for a minute."""
        self.waiting.append((job, self.now + 60))

    def look_for_task(self, job: Job, until: float) -> None:
        path = utils.JobPaths(Path(job.options["output"]).parent, job_id=job.id).submitted_pickle
        if path.exists():
            self.waiting.remove((job, until))
            run, name = utils.DelayedSubmission.load(path).args
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SLURMD_NODENAME", job.node)
                self.processes[job] = worker.Worker(Path(run), name, lambda epoch: Trainer(self, job.node))
        elif self.now > until:
            self.slurm.end(job, "FAILED")

    def end(self, job: Job) -> None:
        """A job is over; its process with it, but not where its node is lost."""
        self.waiting = [(other, until) for other, until in self.waiting if other is not job]
        if job.state != "NODE_FAIL":
            self.processes.pop(job, None)

    # ------------------------------------------------------------ faults

    def hurt(self) -> None:
        if not self.faults:
            return
        for what, rate in RATES.items():
            if self.chance.random() < rate:
                self.happened[what] += 1
                self.cause(what)

    def cause(self, what: str) -> None:
        running = [job for job in self.slurm.running() if job in self.processes]
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
            process = self.processes[job]
            if what == "preempt":
                process.caught.append(signal.SIGUSR2)
                self.slurm.preempt(job, grace_s=20)
            elif what == "kill a worker":
                self.slurm.end(job, "FAILED")
            elif what == "node fails":
                self.slurm.fail_node(job.node, for_s=120)
            elif what == "kill a trainer" and isinstance(process._trainer, Trainer):
                if process._current is not None and process._current["child"] not in self.hit:
                    self.hit.add(process._current["child"])
                    process._trainer.death = "killed by SIGKILL"

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

    def answer(self, command: Sequence[str], stdin: str | None) -> Answer:
        """What the program is told, if at all."""
        if command[0] == "squeue" or (command[0] in ("scontrol", "sacct") and self.calls["status"][-1:] != [self.now]):
            self.called("status", 60)  # the others follow it, in the same call
        down = self.now < self.down_until
        if command[0] != "sbatch":
            self.slurm.accounting = not down or self.chance.random() < 0.5
            self.slurm.lag_s = float("inf") if down else 0.0
            return self.slurm.run(command, stdin)
        self.called("sbatch", 10)
        self.write()
        lot = self.chance.random() if self.faults else 1.0
        self.slurm.controller, self.slurm.mute = not down or lot >= 0.7, lot < 0.1
        answer = self.slurm.run(command, stdin)
        self.slurm.controller = not down
        self.write()
        return answer

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
        fake_slurm.install(patch, world.answer)
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
        world.run,
        record.read_identity(world.run)["run"],
        settings.cluster,
        lambda text: None,
        at_once=journal.epoch == 1,
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
        assert "requeued" not in world.coordinator.history.departures, "no job is put back into the queue"
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
