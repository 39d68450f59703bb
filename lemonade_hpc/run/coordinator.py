"""The coordinator: one loop that asks for children, hands them to workers, commits outcomes; it can die at any instant.

Decides: what is recorded before what is done. An event is durable before anyone else learns of it: children before
they are assigned, outcomes before weights are deleted. Starting, recovering and resuming are one path: read the record,
take the lease, adopt workers that live, go on. Knows nothing of torch; the algorithm is `search/evolution.py`.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Protocol

from lemonade_hpc import files
from lemonade_hpc.config import Config
from lemonade_hpc.run import budgets, lease, leftovers, population, record, worker
from lemonade_hpc.run.backends import Backend, Refused
from lemonade_hpc.run.handle import Key, WorkerHandle
from lemonade_hpc.run.journal import Event, Journal
from lemonade_hpc.run.log import Message
from lemonade_hpc.run.record import Attempt, History
from lemonade_hpc.search import evolution

BEAT_S = 2.0
ASSIGNED_AHEAD = 2
"""Children a worker has at a time: one in training, the next one waiting."""
STOP_S = 3.0
"""How long workers may take to leave when they are stopped."""
MISFORTUNES_PER_WORKER = 3
"""Workers in a row that may end without any outcome, per worker wanted, before the run stops."""


class RunFailed(RuntimeError):  # noqa: N818
    """The run cannot go on: says why and what to do. Exit code 1."""


class Stopped(RuntimeError):  # noqa: N818
    """Stopped before complete; the same command goes on. Exit code 3."""


class Superseded(Stopped):
    """Another coordinator has the run now, or the run folder is gone."""


class Observer(Protocol):
    """Who is told how it goes: a progress bar, or lines in a log."""

    def update(self, history: History, workers: dict[str, str]) -> None:
        """After every commit, and now and then; `workers` says in words what each does."""

    def note(self, text: str) -> None:
        """Something a person should read."""


class Coordinator:
    """One coordinator's life on a run whose lease it holds."""

    def __init__(
        self, run: Path, config: Config, history: History, journal: Journal, backend: Backend, observer: Observer
    ) -> None:
        self.run, self.config, self.history = run, config, history
        self.stop_signal: int | None = None
        self._journal, self._backend, self._observer = journal, backend, observer
        self._poll_s = config.cluster.poll_s or 0.0
        self._stale_s = config.cluster.stale_s
        self._late: list[tuple[WorkerHandle, Message, files.Patience]] = []
        """Outcomes whose weights are not seen here yet."""
        self._checked_at = time.monotonic()
        self._handles: dict[str, WorkerHandle] = {}
        self._adopted: frozenset[str] = frozenset()
        self._unwritten: list[Event] = []
        self._arrived: dict[int, Message] = {}
        self._num_named = self._misfortunes = 0
        self._starved = False
        self._beat_at = 0.0

    def search(self) -> None:
        """Run until the budget is spent; raises Stopped or RunFailed."""
        self._tidy()
        self._mend()
        while not self.history.state.complete:
            self._turn()
            if self.stop_signal is not None:
                raise Stopped(f"stopped by {signal.Signals(self.stop_signal).name}")
            time.sleep(self._poll_s)
        self._complete()

    def _turn(self) -> None:
        """One pass over everything there is to do.

        The order is the protocol: what an assignment (`_dispatch`) or a deletion (`_delete`) rests on is durable first.
        """
        self._check_lease()
        for handle in list(self._handles.values()):
            self._hear(handle)
        self._look_again()
        committed = self._commit()
        self._retire()
        self._ask()
        self._dispatch()
        self._write()
        self._backend.step()
        self._delete(self.history.release())
        self._seal()
        if committed or time.monotonic() - self._beat_at > BEAT_S:
            self._beat()

    # ------------------------------------------------------------ record

    def _record(self, event: Event) -> None:
        self.history.apply(event)
        self._unwritten.append(event)

    def _write(self) -> None:
        """Make all events so far durable."""
        if self._unwritten:
            self._journal.append(self._unwritten)
            self._unwritten = []

    def _check_lease(self) -> None:
        if self._superseded():
            raise Superseded(f"{self.run} has another coordinator now, or is gone; this one has changed nothing since")

    def _superseded(self) -> bool:
        """Whether there is a later epoch. One that was paused may have been followed and not see it yet: it waits."""
        bound_s = files.Patience(self._stale_s).bound_s
        if bound_s and time.monotonic() - self._checked_at > bound_s:
            self._beat()  # seen by one that waits to follow (`lease.settle`), or that one's epoch is seen here at last
            time.sleep(2 * bound_s + lease.QUIET_S)
        self._checked_at = time.monotonic()
        return max(files.epochs(self.run), default=0) != self._journal.epoch

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        with open(self.run / files.heartbeat(self._journal.epoch), "ab") as file:
            file.write(b".")
        self._observer.update(self.history, {handle.name: handle.doing for handle in self._handles.values()})

    # ------------------------------------------------------------ workers' reports

    def _hear(self, handle: WorkerHandle, *, last_words: bool = False) -> None:
        """Read a worker's reports; `last_words`: only what it says of children, not its troubles."""
        full: str | None = None
        unfit: list[str] = []
        messages = handle.hear()
        self._backend.heard(handle.name, messages)
        for message in messages:
            say = message["say"]
            if say == "outcome":
                self._arrive(handle, message["outcome"])
            elif say == "crashed":
                self._lose(handle, (message["child"], message["attempt"]), "crash", message["reason"])
            elif say == "returned":
                self._lose(handle, (message["child"], message["attempt"]), "stopped", "another worker was idle")
            elif say == "storage" and not last_words:
                full = message["reason"]
            elif say == "unfit" and not last_words:
                unfit.append(f"worker {handle.name} cannot start training: {message['reason']}")
        if handle.damaged is not None:
            self._observer.note(
                f"worker {handle.name}: a damaged message in {handle.damaged}; its children go elsewhere"
            )
            self._backend.kill(handle.name)
            self._dismiss(handle)
        for reason in unfit:
            self._misfortune(handle, reason)
        if full is not None:
            raise Stopped(f"worker {handle.name} cannot write: {full}")

    def _arrive(self, handle: WorkerHandle, outcome: Message) -> None:
        """An outcome: kept until it may be told; the first valid one of a child wins, any later one is ignored."""
        number = outcome["child"]
        handle.tasks.pop((number, outcome["attempt"]), None)
        child = self.history.state.in_flight.get(number)
        if child is None or number in self._arrived:
            return
        if outcome["digest"] != child.digest:
            self._lose(handle, (number, outcome["attempt"]), "worker", f"it reported on network {outcome['digest']}")
            return
        self._late.append((handle, outcome, files.Patience(self._stale_s)))
        self._look_again()

    def _look_again(self) -> None:
        """Accept outcomes whose weights are there; those of another machine may be late here."""
        late, self._late = self._late, []
        for handle, outcome, patience in late:
            number = outcome["child"]
            fine = "weights" not in outcome or self._stored(outcome["weights"])
            if number not in self.history.state.in_flight or number in self._arrived:
                continue
            if patience.waits(fine):
                self._late.append((handle, outcome, patience))
            elif fine:
                self._misfortunes = 0
                self._arrived[number] = outcome
            else:
                path = self.run / outcome["weights"]["path"]
                self._lose(handle, (number, outcome["attempt"]), "worker", f"{path} is missing or has the wrong size")

    def _stored(self, weights: Message) -> bool:
        path = self.run / weights["path"]
        return bool(path.exists() and path.stat().st_size == weights["bytes"])

    def _commit(self) -> bool:
        """Tell the search what has arrived, in generational mode in the order of child numbers."""
        committed = False
        while self._arrived:
            number = evolution.next_to_tell(self.history.state)
            number = min(self._arrived) if number is None else number
            if number not in self._arrived:
                break
            outcome = self._arrived.pop(number)
            self._record({"event": "committed", "outcome": outcome})
            if "failure" in outcome:
                self._observer.note(
                    f"child {number} failed: {outcome['failure']['kind']}: {outcome['failure']['reason']}"
                )
            committed, self._starved = True, False
        self._refuse_empty()
        return committed

    def _refuse_empty(self) -> None:
        state = self.history.state
        if state.num_asks and not state.members and not state.in_flight:
            reasons = "; ".join(f"child {o['child']}: {o['failure']['reason']}" for o in self.history.failures)
            self._write()
            raise RunFailed(
                f"no initial network is valid, so there is nothing to start from: {reasons}. Their outcomes are final: "
                f"mend the cause and give another --run folder"
            )

    # ------------------------------------------------------------ losses

    def _lose(self, handle: WorkerHandle, key: Key, kind: str, reason: str) -> None:
        """An attempt will not report."""
        number, attempt = key
        handle.tasks.pop(key, None)
        if any(one.id == attempt and one.lost is None for one in self._attempts(number)):
            self._record({"event": "lost", "child": number, "attempt": attempt, "kind": kind, "reason": reason})

    def _retire(self) -> None:
        """Take back the children of workers that have left or died."""
        for handle in list(self._handles.values()):
            alive = self._backend.alive(handle.name)
            late = handle.last_words.waits(alive)
            if handle.said_bye is None and (alive or late):
                continue
            self._hear(handle, last_words=handle.said_bye is not None)
            if handle.name in self._handles:
                if handle.said_bye is None:
                    output = self._backend.last_output(handle.name)
                    self._misfortune(handle, f"worker {handle.name} died" + (f": {output}" if output else ""))
                elif handle.tasks and handle.said_bye != worker.UNFIT:  # that one has been counted
                    self._misfortune(handle, f"worker {handle.name} left its children: {handle.said_bye}")
                self._dismiss(handle)

    def _dismiss(self, handle: WorkerHandle) -> None:
        """Give a worker up: what it had goes elsewhere, and should it still live, it is to leave."""
        for key in list(handle.tasks):
            started = key in handle.started and handle.said_bye is None
            self._lose(handle, key, "worker" if started else "stopped", f"worker {handle.name} is gone")
        handle.tell({"do": "stop"})
        handle.close()
        del self._handles[handle.name]
        self._record({"event": "left", "worker": handle.name})

    def _misfortune(self, handle: WorkerHandle, reason: str) -> None:
        """Count own workers that end without an outcome in between; too many in a row end the run.

        Adopted ones do not count: they may have died with the coordinator before, however many it had.
        """
        self._observer.note(reason)
        self._misfortunes += handle.name not in self._adopted
        if self._misfortunes > MISFORTUNES_PER_WORKER * self.config.cluster.workers:
            self._write()
            raise RunFailed(
                f"{self._misfortunes} workers in a row ended and no child was trained meanwhile. The last: {reason}"
            )

    # ------------------------------------------------------------ children to workers

    def _ask(self) -> None:
        state = self.history.state
        slots = self.config.cluster.workers * ASSIGNED_AHEAD - len(state.in_flight)
        if self._starved or (slots <= 0 and state.num_asks):
            return
        after, children = evolution.ask(state, slots, self.history.seen.__contains__)
        if after is state:
            return
        self._record(record.asked(state, after, slots, children))
        if not children:
            self._starved = True
            if not state.in_flight:
                self._write()
                raise RunFailed(
                    f"no new network was found within the limits ({after.redrawn}): widen objectives' max or min, "
                    f"search.operators or search.max_edits"
                )

    def _dispatch(self) -> None:
        """Assign what waits to workers with room; start workers while there is work for them."""
        for failure in budgets.spent(self.history, self.config.cluster.retries):
            self._arrived.setdefault(failure["child"], failure)
        due = [number for number in sorted(self.history.state.in_flight) if number not in self._arrived]
        self._start_workers(len(due))
        waiting = [number for number in due if not self._running(number)]
        present = [handle for handle in self._handles.values() if handle.present]
        chosen: list[tuple[WorkerHandle, Key]] = []
        for number in waiting:
            handle = min(present, key=lambda one: len(one.tasks), default=None)
            if handle is None or len(handle.tasks) >= ASSIGNED_AHEAD:
                break
            key = (number, f"e{self._journal.epoch}a{len(self.history.attempts[number]) + 1}")
            handle.tasks[key] = record.task(self.history, *key)
            self._record({"event": "attempt", "child": number, "attempt": key[1], "worker": handle.name})
            chosen.append((handle, key))
        self._write()
        for handle, key in chosen:
            handle.assign(key)
        if not waiting:
            self._level(present)

    def _level(self, present: list[WorkerHandle]) -> None:
        """Ask for children that wait behind another back, one for each worker that has none."""
        idle = sum((not handle.tasks) - handle.recalling for handle in present)
        for handle in present:
            if idle > 0 and handle.recall():
                idle -= 1

    def _running(self, number: int) -> Attempt | None:
        """The attempt at a child that may still report."""
        return next((one for one in self._attempts(number) if one.lost is None), None)

    def _attempts(self, number: int) -> list[Attempt]:
        return self.history.attempts.get(number, [])

    def _start_workers(self, children: int) -> None:
        """Start workers up to the number wanted, one for each child at most; it is on record before it is done."""
        count = min(self.config.cluster.workers, children) - len(self._handles)
        count = min(count, self._backend.room()) if count > 0 else 0
        if not count:
            return
        names = [f"e{self._journal.epoch}w{self._num_named + k:02d}" for k in range(count)]
        self._num_named += count
        for name in names:
            for path in (files.assigned_log(self._journal.epoch, name), files.done_log(name)):
                files.make_folder((self.run / path).parent)
                files.write(self.run / path, b"")
        self._record({"event": "launched", "workers": names})
        self._write()
        self._handles |= {name: self._handle(name) for name in names}
        try:
            self._backend.launch(names)
        except Refused as error:
            raise RunFailed(f"no worker can be started: {error}") from error

    def _handle(self, name: str) -> WorkerHandle:
        return WorkerHandle(self.run, self._journal.epoch, name, self._stale_s)

    def adopt(self) -> None:
        """Take over the workers of earlier coordinators, living or dead.

        What they have reported counts; the living get their children again, those of the dead go back to the pool.
        """
        self._adopted = frozenset(self.history.reporters())
        self._handles = {name: self._handle(name) for name in sorted(self._adopted)}
        for name, (launch, place) in self.history.workers.items():
            self._backend.adopt(name, launch, place)
        for number in sorted(self.history.state.in_flight):
            attempt = self._running(number)
            if attempt is not None:
                key = (number, attempt.id)
                handle = self._handles[attempt.worker]
                handle.tasks[key] = record.task(self.history, *key)
                handle.assign(key)
        for handle in list(self._handles.values()):
            self._hear(handle, last_words=True)

    # ------------------------------------------------------------ files

    def _tidy(self) -> None:
        """Remove what killed coordinators and workers may have left behind."""
        self._check_lease()
        self.history.release()
        useless = leftovers.half_made(self.run) + leftovers.lost_attempts(self.run, self.history)
        for path in (*useless, *leftovers.jobs(self.run, self._launches())):
            files.remove(path)
        self._remove_replaced()
        self._delete(leftovers.unneeded(self.run, self.history))

    def _launches(self) -> set[str]:
        """Launches of workers that may live."""
        return {launch for launch, _ in self.history.workers.values()}

    def _remove_replaced(self) -> None:
        for path in leftovers.replaced(self.run, self.history, self._journal.epoch):
            files.remove(path)

    def _delete(self, numbers: list[int]) -> None:
        """Delete the weights of children that nobody needs."""
        if self.config.storage.keep == "all" or not numbers:
            return
        self._check_lease()
        for number in numbers:
            files.remove(self.run / files.child_folder(number))

    def _mend(self) -> None:
        for event, note in population.mend(self.run, self.history, self._journal.epoch):
            self._record(event)
            self._observer.note(note)
        self._write()

    def _seal(self) -> None:
        event = population.seal(self.run, self.history, self.config.storage.seal_every, self._journal.epoch)
        if event is not None:
            self._record(event)
            self._write()

    def _complete(self) -> None:
        """Write the whole population to one file, and say so in the record."""
        self._refuse_empty()
        self._write()
        self._check_lease()
        self._record(population.complete(self.run, self.history, self._journal.epoch))
        self._write()
        self._remove_replaced()
        for path in leftovers.lost_attempts(self.run, self.history):
            files.remove(path)
        self._beat()

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop all workers; commit what they still report, end those that do not leave in time.

        What cannot be written any more (a full disk) is found again by the next coordinator. One that is here already
        has taken over the workers too: they are left alone.
        """
        if not self._superseded():
            if not self._backend.lasting or self.history.complete is not None:
                self._stop_workers()
            with contextlib.suppress(OSError, RunFailed):
                self._commit()
                self._write()
        if not self._superseded():
            self._backend.close()
            for path in leftovers.jobs(self.run, self._launches()):
                files.remove(path)
        for handle in self._handles.values():
            handle.close()
        self._journal.close()

    def _stop_workers(self) -> None:
        for handle in self._handles.values():
            handle.tell({"do": "stop"})
        deadline = time.monotonic() + STOP_S
        while self._handles and time.monotonic() < deadline:
            self._backend.step()
            for handle in list(self._handles.values()):
                self._hear(handle, last_words=True)
                if handle.name in self._handles and (
                    handle.said_bye is not None or not self._backend.alive(handle.name)
                ):
                    self._dismiss(handle)
            time.sleep(self._poll_s)
        if self._superseded():
            return
        for handle in list(self._handles.values()):
            self._backend.kill(handle.name)
            self._dismiss(handle)
