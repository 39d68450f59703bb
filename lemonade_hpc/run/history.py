"""What has happened in a run so far: events, folded one by one into everything that is known of it.

Decides: what an event is, and what it changes. Where events are kept is `journal.py`'s; `record.py` reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lemonade_hpc.run.journal import Event
from lemonade_hpc.search import evolution, morphisms, pareto
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search.evolution import Child, Drawn, Outcome, Problem

# ---------------------------------------------------------------- events


def child_to_json(child: Child) -> dict[str, Any]:
    """A child as the record states it."""
    return {
        "number": child.number,
        "parent": child.parent,
        "edits": morphisms.to_json(child.edits),
        "graph": graphs.to_json(child.graph),
        "digest": child.digest,
        "cheap": list(child.cheap),
        "generation": child.generation,
        "depth": child.depth,
    }


def child_from_json(data: dict[str, Any]) -> Child:
    """The inverse of `child_to_json`."""
    fields = dict(data) | {
        "edits": morphisms.from_json(data["edits"]),
        "graph": graphs.from_json(data["graph"]),
        "cheap": tuple(data["cheap"]),
    }
    return Child(**fields)


def asked(before: evolution.State, after: evolution.State, n: int, children: Iterable[Child]) -> Event:
    """The event of one `ask`, complete enough to repeat the decision and to do without repeating it."""
    drawn = after.redrawn
    return {
        "event": "asked",
        "ask": before.num_asks,
        "n": n,
        "redrawn": [drawn.no_edit, drawn.limit, drawn.duplicate],
        "children": [child_to_json(child) for child in children],
    }


def outcome_of(fixed: Problem, data: dict[str, Any]) -> Outcome:
    """What the search learns from an outcome as the worker reports it."""
    if "failure" in data:
        return Outcome(data["child"], (), data["failure"]["kind"])
    names = [o.name for o in fixed.config.objectives if o.name not in fixed.cheap]
    return Outcome(data["child"], tuple(data["objectives"][name] for name in names))


# ---------------------------------------------------------------- history


@dataclass
class Attempt:
    """One execution of a child by one worker."""

    id: str
    worker: str
    node: str | None = None
    lost: str | None = None
    """How it was lost (one of LOSSES), None while it may still report."""
    reason: str = ""
    """Why, in words."""
    done: float = 0.0
    """Share of the child's training, of 1, that its last checkpoint holds."""
    death: str | None = None
    """How its worker died under it, in a word or two, where that was nobody else's doing."""
    fell: set[str] | None = None
    """Then, who came to grief on the node at the same time: this child, and maybe others."""


LOSSES = ("crash", "walltime", "worker", "stopped")
"""How an attempt is lost: the trainer died; the worker's time was over; the worker is gone; it was taken back."""


NOT_STARTED = "not started"
"""How a worker ended that was on record to be started, and was not."""


@dataclass
class Worker:
    """A worker that was started and not given up."""

    launch: str
    """The first worker of its launch."""
    place: int
    """Its place in that launch, from 0."""
    gpus: int
    node: str | None = None
    """Where it runs, once it has been heard of."""


@dataclass
class Usage:
    """GPU-seconds, or seconds of workers where they have no GPU, of workers that have left."""

    spent: float = 0.0
    busy: float = 0.0
    """Those in which a child was trained."""
    wasted: float = 0.0
    """Those of `busy` that led to nothing: attempts lost, since their last checkpoint."""


class History:
    """The events so far, folded: the search's state, and what the coordinator must know besides.

    Holds children in flight, on the front, and not sealed yet; not those long finished.
    """

    def __init__(self, fixed: Problem) -> None:
        self.state = evolution.start(fixed)
        self.seen: set[str] = set()
        self.attempts: dict[int, list[Attempt]] = {}
        """Attempts at children in flight."""
        self.results: dict[int, dict[str, Any]] = {}
        """Outcomes of children on the front and of parents of children in flight: their weights are kept."""
        self.children: dict[int, Child] = {}
        """The same children, and those in flight."""
        self.released: list[int] = []
        """Children whose weights nobody needs any more, since the last `release`."""
        self.unsealed: dict[int, dict[str, Any]] = {}
        """Children of no sealed file yet; with `outcome` once committed."""
        self.sealed: list[Event] = []
        self.failures: list[dict[str, Any]] = []
        """Outcomes of failed children."""
        self.workers: dict[str, Worker] = {}
        """Workers that were started and not given up."""
        self.unit = "worker-hours"
        """What the usage is counted in."""
        self.num_launched = 0
        """Workers started so far."""
        self.departures: Counter[str] = Counter()
        """How workers ended, and how many did so."""
        self.usage = Usage()
        self.num_lost = dict.fromkeys(LOSSES, 0)
        self.strikes: dict[str, list[set[str]]] = {}
        """By node: children that came to grief there, and workers that could not work there, since the last child that
        was trained there: those that did so at the same time, and these one after another."""
        self.own_fault: set[str] = set()
        """Children that came to grief on several nodes, not only together with others: no node is at fault."""
        self.last_fault: str | None = None
        """Why the last worker came to grief, since the last child that was trained."""
        self.fruitful: set[str] = set()
        """Nodes where a child has been trained."""
        self.excluded: dict[str, str] = {}
        """Nodes that get no worker, and why."""
        self.wall_s = 0.0
        """Seconds that committed attempts took."""
        self.num_records = 0
        self.num_crashes = 0
        """Coordinators in a row, up to the last one, that ended in no good order and saw no child finished."""
        self.closed = False
        """Whether the last coordinator has left in good order."""
        self.why_closed: str | None = None
        """Why the last coordinator left a run that was not complete, if it did in good order."""
        self.halted = False
        """Whether that was for good, until somebody starts the run anew."""
        self.initial_front: pareto.Front | None = None
        """The front of the initial networks alone, once all have reported; children may have been faster than some."""
        self._initial = self.state.front
        self.complete: Event | None = None

    def begin(self) -> None:
        """Another coordinator has begun: it counts as a crash until it closes in good order."""
        self.num_crashes, self.closed, self.why_closed, self.halted = self.num_crashes + 1, False, None, False

    def apply(self, event: Event) -> None:
        """One more event; raises ValueError for one that cannot follow."""
        kind = event["event"]
        if kind == "asked":
            self._asked(event)
        elif kind == "launched":
            first = event["workers"][0]
            self.num_launched += len(event["workers"])
            self.unit = "GPU-hours" if event["gpus"] else self.unit
            self.workers |= {name: Worker(first, k, event["gpus"]) for k, name in enumerate(event["workers"])}
        elif kind == "joined":
            self.workers[event["worker"]].node = event["node"]
        elif kind == "left":
            self._left(event)
        elif kind == "excluded":
            self.excluded[event["node"]] = event["reason"]
        elif kind == "pardoned":
            self.excluded.clear()
            self.strikes.clear()
            self.own_fault.clear()
            self.num_crashes = 0
        elif kind == "attempt":
            node = self.workers[event["worker"]].node
            self.attempts[event["child"]].append(Attempt(event["attempt"], event["worker"], node))
        elif kind == "lost":
            self._lost(event)
        elif kind == "committed":
            self._committed(event["outcome"])
        elif kind == "sealed":
            self.sealed = [one for one in self.sealed if one["children"] != event["children"]] + [event]
            for number in range(*event["children"]):
                self.unsealed.pop(number, None)
        elif kind == "complete":
            self.complete = event
        elif kind == "closed":
            self.num_crashes, self.closed = 0, True
            self.why_closed, self.halted = event.get("why"), event.get("halted", False)
        else:
            raise ValueError(f"unknown event {kind!r}")
        self.num_records += 1

    def _asked(self, event: Event) -> None:
        children = tuple(child_from_json(data) for data in event["children"])
        self.state = evolution.take(self.state, children, Drawn(*event["redrawn"]))
        self.complete = None
        for child, data in zip(children, event["children"], strict=True):
            self.seen.add(child.digest)
            self.attempts[child.number] = []
            self.children[child.number] = child
            self.unsealed[child.number] = dict(data)

    def _left(self, event: Event) -> None:
        worker = self.workers.pop(event["worker"])
        if event["how"] == NOT_STARTED:
            self.num_launched -= 1
            return
        self.departures[event["how"]] += 1
        self.usage.spent += event["lived_s"] * max(worker.gpus, 1)
        self.usage.busy += event["busy_s"] * max(worker.gpus, 1)
        node = worker.node or event.get("node")
        if event["fault"]:
            self.last_fault = event["fault"]
            died = self._died_under(event["worker"], event["how"]) if event.get("blame") else {}
            struck = set(died) or {f"worker {event['worker']}"}
            if node is not None:
                struck = self._strike(node, struck, again=not event.get("together"))
            for attempt in died.values():
                attempt.fell = struck
            for number in self.attempts:
                self._forgive(number)

    def _strike(self, node: str, struck: set[str], *, again: bool) -> set[str]:
        """Somebody came to grief on a node: another time, or together with who did last. All who did then."""
        events = self.strikes.setdefault(node, [])
        if again or not events:
            events.append(set())
        events[-1] |= struck
        return events[-1]

    def _died_under(self, worker: str, how: str) -> dict[str, Attempt]:
        """Charge the children that a worker was training when it died: they may be the cause."""
        died = {}
        for number, attempts in self.attempts.items():
            for one in attempts:
                if one.worker == worker and one.lost == "worker":
                    one.death = how
                    died[f"child {number}"] = one
        return died

    def _lost(self, event: Event) -> None:
        self.num_lost[event["kind"]] += 1
        attempts = self.attempts.get(event["child"], [])
        for attempt in attempts:
            if attempt.id == event["attempt"]:
                attempt.lost, attempt.reason, attempt.done = event["kind"], event["reason"], event["done"]
                worker = self.workers.get(attempt.worker)
                self.usage.wasted += event["seconds"] * max(worker.gpus if worker else 0, 1)
                if attempt.lost == "crash" and attempt.node is not None:
                    self._strike(attempt.node, {f"child {event['child']}"}, again=True)
        self._forgive(event["child"])

    def _forgive(self, number: int) -> None:
        """Nodes are not at fault where a child came to grief on several: it is itself."""
        attempts = self.attempts.get(number, [])
        if len({one.node for one in attempts if one.lost == "crash" or (one.fell and len(one.fell) == 1)}) > 1:
            self.own_fault.add(f"child {number}")

    def _committed(self, outcome: dict[str, Any]) -> None:
        self.num_crashes = 0
        number, told = outcome["child"], outcome_of(self.state.problem, outcome)
        self.state = evolution.tell(self.state, told)
        if number < self.state.num_initial:
            self._initial_told(told)
        for attempt in self.attempts.pop(number):
            if attempt.id == outcome["attempt"] and "failure" not in outcome and attempt.node is not None:
                self.last_fault = None
                self.fruitful.add(attempt.node)
                self.strikes.pop(attempt.node, None)
        self.wall_s += outcome.get("wall_s", 0.0)
        self.unsealed[number]["outcome"] = outcome
        if "failure" in outcome:
            self.failures.append(outcome)
        self.results[number] = outcome
        needed = set(self.state.front.numbers) | {c.parent for c in self.state.in_flight.values()}
        for gone in self.results.keys() - needed:
            del self.results[gone]
            self.released.append(gone)
        self.children = {n: c for n, c in self.children.items() if n in self.results or n in self.state.in_flight}

    def _initial_told(self, told: Outcome) -> None:
        if told.failure is None:
            vector = evolution.vector(self.state.problem, self.children[told.number].cheap, told.expensive)
            self._initial = pareto.insert(self._initial, told.number, vector)
        if not any(number < self.state.num_initial for number in self.state.in_flight):
            self.initial_front = self._initial

    def reporters(self) -> list[str]:
        """Workers whose logs may hold what is not on record yet: those, and any that left with an outcome not told."""
        attempts = (one for given in self.attempts.values() for one in given)
        return sorted({*self.workers, *(one.worker for one in attempts if one.lost is None)})

    def release(self) -> list[int]:
        """Children whose weights may be deleted; each is returned once."""
        released, self.released = self.released, []
        return released

    def sealable(self, count: int) -> tuple[int, int] | None:
        """The first `count` unsealed children, as (first, past the last), if all of them are finished."""
        if len(self.unsealed) < count:
            return None
        first = min(self.unsealed, default=0)
        numbers = range(first, first + count)
        return (first, first + count) if all("outcome" in self.unsealed.get(n, {}) for n in numbers) else None


def task(history: History, number: int, attempt: str) -> Event:
    """What a worker must know to train a child in flight."""
    child, training = history.children[number], history.state.problem.config.training
    parent = None
    if child.parent is not None:
        weights = history.results[child.parent]["weights"]
        parent = {"graph": graphs.to_json(history.children[child.parent].graph), "weights": weights}
    return {
        "do": "train",
        "kind": "child",
        "attempt": attempt,
        "child": number,
        "parent": parent,
        "epochs": [0, training.initial_epochs if parent is None else training.epochs],
        **{key: value for key, value in child_to_json(child).items() if key in ("graph", "edits", "digest")},
    }
