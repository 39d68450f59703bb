"""The workers of a run: started, heard, taken over from an earlier coordinator, given up.

Decides: how many workers there are, when one counts as gone, and what that costs the children it had; when a series of
them ends the run is `misfortunes.py`'s. What an outcome means is the coordinator's; how a worker is started,
seen and ended is the backend's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Protocol

from lemonade_hpc import files
from lemonade_hpc.config import Cluster
from lemonade_hpc.run import budgets, worker
from lemonade_hpc.run import history as histories
from lemonade_hpc.run.backends import CANCELLED, DIED, FATE, Backend, NotNow, Refused
from lemonade_hpc.run.handle import Key, WorkerHandle
from lemonade_hpc.run.history import History
from lemonade_hpc.run.journal import Event
from lemonade_hpc.run.ledger import Halted, Ledger, NoRoom, RunFailed
from lemonade_hpc.run.log import Message
from lemonade_hpc.run.misfortunes import Misfortunes

STOP_S = 3.0
"""How long workers may take to leave when they are stopped."""
ELSEWHERE_S = 600.0
"""How long a child that crashed waits for a worker on another node that may never start."""
LISTEN_S, MOST_GHOSTS = 30.0, 50
"""How often workers that were given up are listened to, and how many of them."""


class Observer(Protocol):
    """Who is told how it goes: a progress bar, or lines in a log."""

    def update(self, history: History, workers: dict[str, str]) -> None:
        """After every commit, and now and then; `workers` says in words what each does."""

    def note(self, text: str) -> None:
        """Something a person should read."""


class Crew:
    """All workers that one coordinator has to do with."""

    def __init__(self, cluster: Cluster, ledger: Ledger, backend: Backend, observer: Observer) -> None:
        self.handles: dict[str, WorkerHandle] = {}
        self.outcomes: list[Message] = []
        """Reported, and not taken by the coordinator yet."""
        self._cluster, self._ledger, self._backend, self._observer = cluster, ledger, backend, observer
        self._run = ledger.run
        self._poll_s = cluster.poll_s or 0.0
        self._adopted: frozenset[str] = frozenset()
        self._lived: set[str] = set()
        """Workers that have said something in this coordinator's life."""
        self._gone: dict[str, tuple[WorkerHandle, bool]] = {}
        """Workers that have gone in a way not known yet, and whether they left children behind."""
        self._ghosts: list[WorkerHandle] = []
        """Workers that were given up without a last word: they may live all the same."""
        self._listened_at = 0.0
        self._waits_since: dict[int, float] = {}
        """Since when children that crashed wait for another node."""
        self._num_named = self._num_cancelled = 0
        self._misfortunes = Misfortunes(ledger.run, cluster, elsewhere=backend.excludes)

    # ------------------------------------------------------------ reports

    def hear(self) -> None:
        """Read what all workers report."""
        for handle in list(self.handles.values()):
            before = handle.lived_s
            self._hear(handle)
            if handle.lived_s > before:
                self._lived.add(handle.name)
        if time.monotonic() - self._listened_at >= LISTEN_S:
            self._listened_at = time.monotonic()
            self._listen()

    def _listen(self) -> None:
        """Hear whether workers that were given up live: the first outcome of a child counts, whoever's it is."""
        for ghost in self._ghosts:
            for outcome in (message["outcome"] for message in ghost.hear() if message["say"] == "outcome"):
                if outcome["child"] in self._ledger.history.state.in_flight:
                    self.outcomes.append(outcome)
                else:
                    late = "comes too late and is ignored"
                    self._observer.note(f"child {outcome['child']}: an outcome by {ghost.name}, long given up, {late}")
        self._ghosts = [one for one in self._ghosts if one.said_bye is None and one.damaged is None][-MOST_GHOSTS:]

    def _hear(self, handle: WorkerHandle, *, last_words: bool = False) -> None:
        """Read a worker's reports; `last_words`: only what it says of children, not its troubles."""
        full: str | None = None
        messages = handle.hear()
        self._backend.heard(handle.name, messages)
        self._join(handle)
        for message in messages:
            say = message["say"]
            if say == "outcome":
                handle.tasks.pop((message["outcome"]["child"], message["outcome"]["attempt"]), None)
                self.outcomes.append(message["outcome"])
            elif say == "crashed":
                self._lose(handle, (message["child"], message["attempt"]), "crash", message["reason"])
            elif say == "returned":
                key = (message["child"], message["attempt"])
                kind, reason = ("walltime", worker.TIME_OVER) if key in handle.started else ("stopped", "taken back")
                self._lose(handle, key, kind, reason)
            elif say == "storage" and not last_words:
                full = message["reason"]
        if handle.damaged is not None:
            self._observer.note(
                f"worker {handle.name}: a damaged message in {handle.damaged}; its children go elsewhere"
            )
            self._end(handle, "damaged log")
        elif handle.vanished:
            self._observer.note(
                f"worker {handle.name}: {files.done_log(handle.name)} has vanished; another one is started"
            )
            self._end(handle, "its log has vanished")
        if full is not None:
            raise NoRoom(f"worker {handle.name} cannot write: {full}")

    def _join(self, handle: WorkerHandle) -> None:
        self._misfortunes.heard_any |= handle.present
        known = self._ledger.history.workers.get(handle.name)
        if known is not None and known.node is None and handle.node is not None:
            self._ledger.record({"event": "joined", "worker": handle.name, "node": handle.node})

    def prospered(self) -> None:
        """A child was trained: workers that end from here on are no series any more."""
        self._misfortunes.count = 0

    # ------------------------------------------------------------ losses

    def lose(self, key: Key, kind: str, reason: str, seconds: float = 0.0, done: float = 0.0) -> None:
        """An attempt will not report, or not to any use, after `seconds` of training that are lost with it."""
        number, attempt = key
        if any(one.id == attempt and one.lost is None for one in self._ledger.history.attempts.get(number, [])):
            event = {"event": "lost", "child": number, "attempt": attempt, "kind": kind, "reason": reason}
            self._ledger.record(event | {"seconds": round(seconds, 3), "done": done})

    def _lose(self, handle: WorkerHandle, key: Key, kind: str, reason: str) -> None:
        handle.tasks.pop(key, None)
        self.lose(key, kind, reason, handle.unsaved_s(key), handle.done.get(key, 0.0))

    def retire(self) -> None:
        """Take back the children of workers that have left or died, and exclude nodes that are at fault."""
        for handle in list(self.handles.values()):
            alive = self._backend.alive(handle.name)
            late = handle.last_words.waits(alive)
            if handle.said_bye is None and (alive or late):
                continue
            self._hear(handle, last_words=handle.said_bye is not None)
            if handle.name in self.handles:
                if handle.name in self._ledger.history.workers:  # else it is on record how it ended
                    self._gone[handle.name] = (handle, bool(handle.tasks))
                self._release(handle)
        for handle, abandoned in list(self._gone.values()):
            self._explain(handle, abandoned)
        if self._backend.excludes:
            self._exclude()

    def _release(self, handle: WorkerHandle) -> None:
        """What a worker had goes elsewhere, and should it still live, it is to leave."""
        for key in list(handle.tasks):
            kind = "stopped"
            if key in handle.started and handle.said_bye == worker.TIME_OVER:
                kind = "walltime"
            elif key in handle.started and not handle.stopped and handle.said_bye in (None, worker.SIGNALLED):
                kind = "worker"
            self._lose(handle, key, kind, f"worker {handle.name} is gone")
        handle.stop()
        handle.close()
        del self.handles[handle.name]

    def _explain(self, handle: WorkerHandle, abandoned: bool) -> None:
        """Put it on record how a worker ended, once that can be told."""
        name, bye = handle.name, handle.said_bye
        how = self._backend.ended(name) if bye in (None, worker.SIGNALLED) else bye
        if how is None:
            return
        del self._gone[name]
        if bye is None and how != histories.NOT_STARTED:
            self._ghosts.append(handle)
        fault = None
        if bye is None and how not in FATE | {histories.NOT_STARTED}:
            output = self._backend.last_output(name)
            self._misfortunes.heard_any |= bool(output)
            how = budgets.OUT_OF_MEMORY if budgets.TOO_MUCH.search(output) else how
            fault = f"worker {name} {how}" + (f": {output}" if output else "")
        elif bye == worker.UNFIT:
            fault = f"worker {name} cannot start training: {handle.trouble}"
        elif (
            bye not in (None, worker.TIME_OVER, worker.TOLD, worker.OTHER)
            and abandoned
            and (bye != worker.SIGNALLED or how == DIED)
        ):
            fault = f"worker {name} left its children: {bye}"
        # One that an earlier coordinator had may have died with that one, of the same cause: no child is to blame.
        self._part(handle, how, fault, blame=how != DIED or name not in self._adopted - self._lived)
        if how == histories.NOT_STARTED:
            self._ledger.write()
            self._unmake([name])
        if how == CANCELLED and (name not in self._adopted - self._lived or self._backend.seen(name)):
            self._num_cancelled += 1
            self._observer.note(f"worker {name} was cancelled from outside: no other is started in its place")
        elif how in FATE:
            self._observer.note(f"worker {name}: {how}")
        if fault is not None:
            self._misfortune(name, fault)

    def _part(self, handle: WorkerHandle, how: str, fault: str | None = None, *, blame: bool = False) -> None:
        if handle.name in self._ledger.history.workers:
            rest: Event = {"lived_s": round(handle.lived_s, 3), "busy_s": round(handle.busy_s, 3)}
            if fault is not None and handle.node is None:
                rest |= {"node": self._backend.node(handle.name)}
            if fault is not None and self._misfortunes.fell_together(handle):
                rest |= {"together": True}
            if fault is not None and blame:
                rest |= {"blame": True}
            self._ledger.record({"event": "left", "worker": handle.name, "how": how, "fault": fault, **rest})

    def _end(self, handle: WorkerHandle, how: str) -> None:
        """End a worker at once."""
        self._backend.kill(handle.name)
        self._release(handle)
        self._part(handle, how)

    def _misfortune(self, name: str, reason: str) -> None:
        """Count own workers that end without an outcome in between; too many in a row end the run.

        Adopted ones do not count: they may have died with the coordinator before, however many it had.
        """
        self._observer.note(reason)
        series = self._misfortunes
        if series.add(reason, counts=name not in self._adopted):
            self._ledger.write()
            raise RunFailed(f"{series.count} workers in a row ended and no child was trained meanwhile{series.why()}")

    def _exclude(self) -> None:
        history = self._ledger.history
        for node, reason in list(budgets.bad_nodes(history)):
            self._ledger.record({"event": "excluded", "node": node, "reason": reason})
            self._observer.note(f"node {node} gets no worker any more: {reason}")
        for handle in [one for one in self.handles.values() if one.node in history.excluded]:
            self._end(handle, "on an excluded node")

    # ------------------------------------------------------------ work

    def hand_out(self, numbers: list[int], ahead: int) -> None:
        """Give these children to workers that have been heard of, at most `ahead` each; on record before it is done.

        A child that crashed on a node is tried on others, as long as there are any.
        """
        history, chosen = self._ledger.history, defaultdict[WorkerHandle, list[Key]](list)
        known = history.workers  # one whose end is on record may have an outcome to tell, and takes no child any more
        for number in numbers:
            nodes = self._nodes_for(number)
            present = [one for one in self.handles.values() if one.present and one.node in nodes and one.name in known]
            handle = min(present, key=lambda one: len(one.tasks), default=None)
            if handle is None or len(handle.tasks) >= ahead:
                continue
            key = (number, f"e{self._ledger.epoch}a{len(history.attempts[number]) + 1}")
            handle.tasks[key] = histories.task(history, *key)
            self._ledger.record({"event": "attempt", "child": number, "attempt": key[1], "worker": handle.name})
            chosen[handle].append(key)
        self._ledger.write()
        for handle, keys in chosen.items():
            handle.assign(keys)

    def _nodes_for(self, number: int) -> set[str | None]:
        """Where a child may be tried next; None stands for wherever a worker will be that waits for a machine."""
        nodes = {handle.node for handle in self.handles.values()}
        attempts = self._ledger.history.attempts[number]
        crashed = {one.node for one in attempts if one.lost == "crash" or one.death is not None}
        others = nodes - crashed
        if others == {None} and len(nodes) > 1:
            now = time.monotonic()
            return others if now - self._waits_since.setdefault(number, now) < ELSEWHERE_S else nodes
        return others or nodes

    def level(self) -> None:
        """Ask for children that wait behind another back, one for each worker that has none and may try it."""
        present = [handle for handle in self.handles.values() if handle.present]
        idle = {handle.node for handle in present if not handle.tasks}
        free = sum((not handle.tasks) - handle.recalling for handle in present)
        for handle in present:
            if free > 0 and handle.recall(but=1, only=lambda number: bool(idle & self._nodes_for(number))):
                free -= 1

    # ------------------------------------------------------------ beginnings

    def start(self, children: int) -> None:
        """Start workers up to the number wanted, one for each child at most; it is on record before it is done."""
        count = min(self._wanted(), children) - len(self.handles) - len(self._gone)
        count = min(count, self._backend.room()) if count > 0 else 0
        if count <= 0:
            return
        epoch = self._ledger.epoch
        names = [f"e{epoch}w{self._num_named + k:02d}" for k in range(count)]
        self._num_named += count
        for name in names:
            for path in (files.assigned_log(epoch, name), files.done_log(name)):
                files.make_folder((self._run / path).parent)
                files.write(self._run / path, b"")
        self._ledger.record({"event": "launched", "workers": names, "gpus": self._backend.gpus})
        self._ledger.write()
        self.handles |= {name: WorkerHandle(self._run, epoch, name, self._cluster.stale_s) for name in names}
        excluded = self._ledger.history.excluded
        try:
            self._backend.launch(names, excluded.keys())
        except Refused as error:
            self._not_started(names)
            without = "".join(f"; excluded is {node}: {reason}" for node, reason in excluded.items())
            raise RunFailed(f"no worker can be started: {error}{without}{self._misfortunes.why()}") from error
        except NotNow as error:
            self._observer.note(str(error))
            self._not_started(names)

    def _not_started(self, names: list[str]) -> None:
        """Take back that these workers were to be started."""
        for name in names:
            self._end(self.handles[name], histories.NOT_STARTED)
        self._ledger.write()
        self._unmake(names)

    def _unmake(self, names: list[str]) -> None:
        """Remove the folders of workers that never were."""
        for name in names:
            for path in (files.assigned_log(self._ledger.epoch, name), files.done_log(name)):
                files.remove((self._run / path).parent)

    def _wanted(self) -> int:
        """How many workers there may be now; raises Halted where there can be none any more."""
        wanted, cap = self._cluster.workers - self._num_cancelled, self._cluster.max_workers
        left = wanted if cap is None else cap - self._ledger.history.num_launched + len(self.handles)
        if min(wanted, left) <= 0 and not self.handles and not self._gone:
            raise Halted(
                f"every worker was cancelled ({self._num_cancelled})"
                if wanted <= 0
                else f"cluster.max_workers: {cap} workers have been started, as many as this run may; raise it to go on"
            )
        return min(wanted, left)

    def adopt(self) -> None:
        """Take over the workers of earlier coordinators, living or dead.

        What they have reported counts; the living get their children again, those of the dead go back to the pool.
        """
        history = self._ledger.history
        epoch, stale_s = self._ledger.epoch, self._cluster.stale_s
        self._adopted, now = frozenset(history.reporters()), time.monotonic()
        self.handles = {name: WorkerHandle(self._run, epoch, name, stale_s) for name in sorted(self._adopted)}
        for name, known in history.workers.items():
            self._backend.adopt(name, known.launch, known.place)
        for number in sorted(history.state.in_flight):
            for attempt in history.attempts[number]:
                if attempt.lost is None:
                    key = (number, attempt.id)
                    handle = self.handles[attempt.worker]
                    handle.tasks[key] = histories.task(history, *key)
        for handle in list(self.handles.values()):
            if handle.tasks:
                handle.assign(handle.tasks)
            self._hear(handle, last_words=True)
            if handle.heard_s is not None:  # what all of them said before is heard one after another
                handle.heard_s = now, now

    # ------------------------------------------------------------ ends

    def spent_s(self) -> float:
        """GPU-seconds of all workers so far, or seconds where they have no GPU."""
        history = self._ledger.history
        living = [*self.handles.values(), *(handle for handle, _ in self._gone.values())]
        known = ((one, history.workers[one.name]) for one in living if one.name in history.workers)
        return history.usage.spent + sum(one.lived_s * max(worker.gpus, 1) for one, worker in known)

    def drain(self) -> bool:
        """Have workers end what they train and leave, and those that have not begun at once; True once all have."""
        for handle in list(self.handles.values()):
            if not handle.present:
                self._end(handle, "not needed any more")
            elif not handle.tasks:
                handle.stop()
            else:
                while handle.recall(but=0):
                    pass
        return not self.handles

    def stop(self) -> None:
        """Have all workers leave, children in training saved, and end those that take longer than STOP_S."""
        for handle in self.handles.values():
            handle.stop()
        deadline = time.monotonic() + STOP_S
        while self.handles and time.monotonic() < deadline:
            self._backend.step()
            for handle in list(self.handles.values()):
                self._hear(handle, last_words=True)
                if handle.name in self.handles and (
                    handle.said_bye is not None or not self._backend.alive(handle.name)
                ):
                    self._release(handle)
                    self._part(handle, handle.said_bye or DIED)
            time.sleep(self._poll_s)
        if not self._ledger.superseded():
            for handle in list(self.handles.values()):
                self._end(handle, "killed")

    def close(self) -> None:
        """Let go of what is left of them: they go on."""
        for handle in self.handles.values():
            handle.close()
