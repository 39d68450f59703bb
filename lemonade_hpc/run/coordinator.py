"""The coordinator: one loop that asks for children, hands them to workers, commits outcomes; it can die at any instant.

Decides: what is recorded before what is done. An event is durable before anyone else learns of it: children before
they are assigned, outcomes before weights are deleted. Starting, recovering and resuming are one path: read the record,
take the lease, adopt workers that live, go on. Knows nothing of torch; the algorithm is `search/evolution.py`.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from pathlib import Path
from typing import NoReturn

from lemonade_hpc import files
from lemonade_hpc.config import Config
from lemonade_hpc.run import budgets, chain, lease, leftovers, population
from lemonade_hpc.run import history as histories
from lemonade_hpc.run.backends import Backend
from lemonade_hpc.run.crew import Crew
from lemonade_hpc.run.crew import Observer as Observer
from lemonade_hpc.run.history import History
from lemonade_hpc.run.journal import Journal
from lemonade_hpc.run.ledger import Halted, Ledger
from lemonade_hpc.run.ledger import RunFailed as RunFailed
from lemonade_hpc.run.ledger import Stopped as Stopped
from lemonade_hpc.run.ledger import Superseded as Superseded
from lemonade_hpc.run.log import Message
from lemonade_hpc.search import evolution

BEAT_S = 2.0
MAX_AHEAD = 64
"""Most children that wait behind the one in training."""
SLICE_S = 0.5
"""How often one that waits looks whether it is to leave."""
FILL_S = 15.0
"""How long a coordinator that leaves may take to find work for the workers that go on."""
FILL_AHEAD = 20
"""Most children that a worker is given then, unless it ends more in a moment."""
ASK_S = 1.0
"""How long a turn may go on asking for children."""


class Coordinator:
    """One coordinator's life on a run whose lease it holds."""

    def __init__(
        self, run: Path, config: Config, history: History, journal: Journal, backend: Backend, observer: Observer
    ) -> None:
        self.run, self.config, self.history = run, config, history
        self.stop_signal: int | None = None
        self.why: str | None = None
        """Why it leaves a run that is not complete."""
        self.halted = False
        """Whether nobody may go on by himself after it."""
        self.failed = False
        """Whether it leaves because the run cannot go on: its workers have nothing to wait for."""
        self._ledger = Ledger(run, history, journal)
        self._crew = Crew(config.cluster, self._ledger, backend, observer)
        self._backend, self._observer = backend, observer
        self._poll_s = config.cluster.poll_s or 0.0
        self._stale_s = config.cluster.stale_s
        self._checked_at = time.monotonic()
        self._late: list[tuple[Message, files.Patience]] = []
        """Outcomes whose weights are not seen here yet."""
        self._arrived: dict[int, Message] = {}
        self._settled: list[Message] = []
        """Outcomes committed in this turn."""
        self._starved = False
        self._beat_at = 0.0

    def adopt(self) -> None:
        """Take over the workers of earlier coordinators, living or dead."""
        self._crew.adopt()

    def pardon(self) -> None:
        """Forget what was at fault before: somebody has started the run anew, and may have mended it."""
        for node in self.history.excluded:
            self._observer.note(f"node {node}, excluded before, may get workers again")
        if self.history.excluded or self.history.num_crashes:
            self._ledger.record({"event": "pardoned"})

    def search(self) -> None:
        """Run until the budget is spent; raises Stopped or RunFailed."""
        self._tidy()
        self._mend()
        while not self.history.state.complete:
            self._turn()
            if self.stop_signal is not None:
                self._leave(self.stop_signal)
            time.sleep(self._poll_s)
        self._complete()

    def _turn(self) -> None:
        """One pass over everything there is to do.

        The order is the protocol: what an assignment (`_dispatch`) or a deletion (`_delete`) rests on is durable first.
        """
        self._check_lease()
        self._crew.hear()
        committed = self._commit()
        self._crew.retire()
        self._go_on()
        self._ledger.write()
        if self.stop_signal is None:  # Slurm may take its time to answer
            self._backend.step()
        self._clean(self.history.release())
        self._seal()
        if committed or time.monotonic() - self._beat_at > BEAT_S:
            self._beat()

    def _go_on(self) -> None:
        """Ask for children and have them trained, unless that is done or the run is to be left."""
        if self.history.state.complete:
            return
        reason = self._reason_to_leave()
        if reason is None:
            ahead = self._ahead()
            self._ask(ahead)
            self._dispatch(ahead)
        elif self._crew.drain() and not (self._late or self._crew.outcomes):
            # What has arrived, and waits for one before it to be told, is in the workers' logs for whoever goes on.
            raise Halted(reason)

    def _reason_to_leave(self) -> str | None:
        if (self.run / files.stop_order(self._ledger.epoch)).stat().st_size:
            return chain.STOPPED
        cap = self.config.cluster.max_gpu_hours
        if cap is not None and self._crew.spent_s() >= 3600 * cap:
            return f"cluster.max_gpu_hours: {cap:g} GPU-hours are spent, as many as this run may; raise it to go on"
        return None

    def _check_lease(self) -> None:
        """Raise Superseded. One that was paused has perhaps been followed and does not see it yet: it waits."""
        if self._may_be_followed():
            self._beat()  # seen by one that waits to follow (`lease.settle`), or that one's epoch is seen here at last
            until = time.monotonic() + 2 * files.Patience(self._stale_s).bound_s + lease.QUIET_S
            while time.monotonic() < until:
                if self.stop_signal is not None:
                    raise Stopped(f"stopped by {signal.Signals(self.stop_signal).name}")
                time.sleep(SLICE_S)
        self._checked_at = time.monotonic()
        self._ledger.check()

    def _may_be_followed(self) -> bool:
        """Whether the last look is so long ago that another coordinator may have begun and not be seen here yet."""
        bound_s = files.Patience(self._stale_s).bound_s
        return bool(bound_s) and time.monotonic() - self._checked_at > bound_s

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        with open(self.run / files.heartbeat(self._ledger.epoch), "ab") as file:
            file.write(b".")
        self._observer.update(self.history, {handle.name: handle.doing for handle in self._crew.handles.values()})

    # ------------------------------------------------------------ outcomes

    def _take(self) -> None:
        """Keep what has been reported until it may be told; the first valid outcome of a child wins."""
        new = [(outcome, files.Patience(self._stale_s)) for outcome in self._crew.outcomes]
        waiting, self._late = self._late + new, []
        self._crew.outcomes.clear()
        for outcome, patience in waiting:
            number = outcome["child"]
            child = self.history.state.in_flight.get(number)
            if child is None or number in self._arrived:
                continue
            reason = None if outcome["digest"] == child.digest else f"it reported on network {outcome['digest']}"
            missing = self._missing(outcome)
            if reason is None and patience.waits(missing is None):  # another machine's file may be late here
                self._late.append((outcome, patience))
            elif reason or missing:
                wasted_s = outcome.get("wall_s", 0.0)
                self._crew.lose((number, outcome["attempt"]), "worker", f"{reason or missing}", wasted_s)
            else:
                self._crew.prospered()
                self._arrived[number] = outcome

    def _missing(self, outcome: Message) -> str | None:
        """What is not there of the weights that an outcome names."""
        if "weights" in outcome:
            path = self.run / outcome["weights"]["path"]
            if files.size(path) != outcome["weights"]["bytes"]:
                return f"{path} is missing or has the wrong size"
        return None

    def _commit(self) -> bool:
        """Tell the search what has arrived, in generational mode in the order of child numbers."""
        self._take()
        committed = False
        while self._arrived:
            number = evolution.next_to_tell(self.history.state)
            number = min(self._arrived) if number is None else number
            if number not in self._arrived:
                break
            outcome = self._arrived.pop(number)
            self._ledger.record({"event": "committed", "outcome": outcome})
            self._settled.append(outcome)
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
            self._ledger.write()
            raise RunFailed(
                f"no initial network is valid, so there is nothing to start from: {reasons}. Their outcomes are final: "
                f"mend the cause and give another --run folder"
            )

    # ------------------------------------------------------------ children to workers

    def _ask(self, ahead: int) -> None:
        """Ask for children, a generation at most at a time, until there are `ahead` for each worker that is wanted."""
        until, wanted = time.monotonic() + ASK_S, self.config.cluster.workers * ahead
        while not self._starved and (wanted > len(self.history.state.in_flight) or not self.history.state.num_asks):
            state = self.history.state
            slots = min(wanted - len(state.in_flight), self.config.search.accepted)
            after, children = evolution.ask(state, slots, self.history.seen.__contains__)
            if after is state:
                return
            self._ledger.record(histories.asked(state, after, slots, children))
            if not children:
                self._starved = True
                self._refuse_starved()
            if len(children) < slots or time.monotonic() > until:
                return

    def _refuse_starved(self) -> None:
        state = self.history.state
        if not state.in_flight:
            self._ledger.write()
            raise RunFailed(
                f"no new network was found within the limits ({state.redrawn}): widen objectives' max or min, "
                f"search.operators or search.max_edits"
            )

    def _dispatch(self, ahead: int) -> None:
        """Assign what waits to workers with room; start workers while there is work for them."""
        for failure in budgets.spent(self.history, self.config.cluster.retries):
            self._arrived.setdefault(failure["child"], failure)
        due = [number for number in sorted(self.history.state.in_flight) if number not in self._arrived]
        if due and self.stop_signal is None:
            self._crew.start(len(due))
        waiting = [n for n in due if all(one.lost is not None for one in self.history.attempts[n])]
        self._crew.hand_out(waiting, ahead)
        self._crew.level()

    def _leave(self, number: int) -> NoReturn:
        """Leave for a signal; for good where that is to be done anyway."""
        reason = self._reason_to_leave()
        if reason is not None:
            raise Halted(reason)
        self._fill()
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    def _fill(self) -> None:
        """Give workers that go on without a coordinator work for their time, until another coordinator has come."""
        if not self._backend.lasting:
            return
        deadline = time.monotonic() + FILL_S
        for ahead in range(self._ahead() + 1, self._worth_filling() + 1):
            if time.monotonic() > deadline or self.history.state.complete:
                break
            self._ask(ahead)
            self._dispatch(ahead)

    def _worth_filling(self) -> int:
        """How many children a worker may train in what its job's time limit allows."""
        return min(FILL_AHEAD, self._num_trained_in(60 * self.config.cluster.time_min))

    def _ahead(self) -> int:
        """Children a worker has at a time: one in training, and those that it ends before it is given more.

        Beyond two, all workers together have half as many as have been told: else a search of short children is blind.
        """
        seen = self.history.state.num_committed // (2 * self.config.cluster.workers)
        return min(1 + min(MAX_AHEAD, self._num_trained_in(2 * self._poll_s)), max(2, seen))

    def _num_trained_in(self, seconds: float) -> int:
        """How many children a worker trains in that time, rounded up; one as long as few have been trained."""
        num, wall_s = self.history.state.num_committed, self.history.wall_s
        return math.ceil(seconds * num / wall_s) if wall_s and num >= self.config.cluster.workers else 1

    # ------------------------------------------------------------ files

    def _tidy(self) -> None:
        """Remove what killed coordinators and workers may have left behind."""
        self._check_lease()
        self.history.release()
        useless = leftovers.half_made(self.run) + leftovers.beside_weights(self.run, self.history.results.values())
        for path in (*useless, *leftovers.jobs(self.run, self._launches())):
            files.remove(path)
        self._remove_replaced()
        self._delete(leftovers.unneeded(self.run, self.history))

    def _launches(self) -> set[str]:
        """Launches of workers that may live."""
        return {worker.launch for worker in self.history.workers.values()}

    def _remove_replaced(self) -> None:
        for path in leftovers.replaced(self.run, self.history, self._ledger.epoch):
            files.remove(path)

    def _clean(self, released: list[int]) -> None:
        """Delete weights that nobody needs any more, and of children just committed what is not their weights."""
        if self._settled:
            self._check_lease()  # a successor may have had these children trained by other attempts
        for path in leftovers.beside_weights(self.run, self._settled):
            files.remove(path)
        self._settled.clear()
        self._delete(released)

    def _delete(self, numbers: list[int]) -> None:
        """Delete the weights of children that nobody needs."""
        if self.config.storage.keep == "all" or not numbers:
            return
        self._check_lease()
        for number in numbers:
            files.remove(self.run / files.child_folder(number))

    def _mend(self) -> None:
        for event, note in population.mend(self.run, self.history, self._ledger.epoch):
            self._ledger.record(event)
            self._observer.note(note)
        self._ledger.write()

    def _seal(self) -> None:
        event = population.seal(self.run, self.history, self.config.storage.seal_every, self._ledger.epoch)
        if event is not None:
            self._ledger.record(event)
            self._ledger.write()

    def _complete(self) -> None:
        """Write the whole population to one file, and say so in the record."""
        self._refuse_empty()
        self._ledger.write()
        self._check_lease()
        self._ledger.record(population.complete(self.run, self.history, self._ledger.epoch))
        self._ledger.write()
        self._remove_replaced()
        for path in leftovers.beside_weights(self.run, self.history.results.values()):
            files.remove(path)
        self._beat()

    # ------------------------------------------------------------ the end

    @property
    def num_workers(self) -> int:
        """How many workers there are that it knows of."""
        return len(self._crew.handles)

    def close(self, *, orderly: bool = True) -> None:
        """Leave in good order: workers that end with this session are stopped, what they still report is committed.

        Not `orderly`: after an error that nobody expected the end is not recorded, so that it counts as a crash.

        That it has closed its journal is the last thing it says: from then on the run is free. What cannot be written
        any more (a full disk) is found again by the next coordinator. One that is here already, or may be and is not
        seen, has taken over the workers too: they are left alone.
        """
        with contextlib.suppress(Superseded):
            self._ledger.check()
            alone = not self._may_be_followed()
            if not self._backend.lasting or self.history.complete is not None or self.failed:
                self._crew.stop()
            with contextlib.suppress(OSError, RunFailed):
                self._commit()
                self._ledger.write()
            self._ledger.check()
            if alone:
                self._backend.close()
                for path in leftovers.jobs(self.run, self._launches()):
                    files.remove(path)
            if orderly:
                with contextlib.suppress(OSError):
                    self._ledger.record({"event": "closed", "why": self.why, "halted": self.halted})
                    self._ledger.write()
        self._crew.close()
        self._ledger.close()
