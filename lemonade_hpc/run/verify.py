"""Read a whole run back and check it: every checksum, every decision, every derived number.

Decides: what a sound run is. Reads only.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lemonade_hpc import files
from lemonade_hpc.run import budgets, journal, population, record, status
from lemonade_hpc.run import history as histories
from lemonade_hpc.run.history import Attempt, History
from lemonade_hpc.run.journal import Event
from lemonade_hpc.run.record import RecordError
from lemonade_hpc.search import evolution
from lemonade_hpc.search.evolution import Problem

LOOKS = 10
"""How often a run that goes on meanwhile is looked at again: weights that were missed may have left the front."""


def verify(run: Path) -> list[tuple[str, list[str]]]:
    """Each check's name and what it found wrong. Raises ConfigError or RecordError where nothing can be read."""
    late, looks = status.patience(run), 0
    while True:
        try:
            end, checks = _verify(run)
            faulty = any(faults for _, faults in checks)
        except RecordError:
            if not late.waits(False):
                raise
            faulty = True
        if late.waits(not faulty):
            time.sleep(status.LOOK_S)
            continue
        looks += 1
        if not faulty or looks == LOOKS or journal.read(run).end == end:
            return checks


def _verify(run: Path) -> tuple[tuple[int, str], list[tuple[str, list[str]]]]:
    """What one look at the run found, and where its record ended then."""
    events: list[Event] = []
    _, fixed = status.problem(run)
    loaded = record.load(run, fixed, events)
    history = loaded.history
    return (loaded.epoch, loaded.link), [
        ("the run is what it was started as", list(_identity(run, fixed, events))),
        ("journals intact in both copies", [*loaded.warnings, *loaded.late]),
        ("every decision repeats", list(_decisions(fixed, events))),
        ("attempts within their budgets", list(_attempts(events))),
        ("sealed files match the journals", list(_sealed(run, history, events))),
        ("weights of the front match their checksums", list(_weights(run, history))),
        ("front and hypervolume recompute", list(_front(history, events))),
    ]


def _identity(run: Path, fixed: Problem, events: list[Event]) -> Iterator[str]:
    """`run.json` is that of every epoch, and the reference point follows from it."""
    path = run / files.RUN
    found = files.sha256(path.read_bytes())
    others = [event["epoch"] for event in events if event["event"] == "epoch" and event["identity"] != found]
    if others:
        yield f"{path}: has changed since the coordinators of epochs {others} read it"
    majority_error = record.read_identity(run)["data"]["majority_error"]
    wanted = evolution.problem(fixed.config, fixed.signature, majority_error).reference
    if fixed.reference != wanted:
        yield f"{path}: the reference point is {fixed.reference}, by settings and data it is {wanted}"


def _decisions(fixed: Problem, events: list[Event]) -> Iterator[str]:
    """Ask again, with the same state, and compare with what was asked."""
    history = History(fixed)
    for event in events:
        if event["event"] == "epoch":
            search = fixed.config.search.model_copy(update={"children": event["children"]})
            config = fixed.config.model_copy(update={"search": search})
            history.state = replace(history.state, problem=replace(fixed, config=config))
            continue
        if event["event"] == "asked":
            after, children = evolution.ask(history.state, event["n"], history.seen.__contains__)
            if histories.asked(history.state, after, event["n"], children) != event:
                yield f"ask {event['ask']} now gives other children than {[c['number'] for c in event['children']]}"
        history.apply(event)


def _attempts(events: list[Event]) -> Iterator[str]:
    allowed = budgets.allowed(max((event["retries"] for event in events if event["event"] == "epoch"), default=0))
    attempts: dict[int, dict[str, Attempt]] = defaultdict(dict)
    finished: set[int] = set()
    for event in events:
        if event["event"] == "attempt":
            attempts[event["child"]][event["attempt"]] = Attempt(event["attempt"], event["worker"])
        elif event["event"] == "lost":
            one = attempts[event["child"]][event["attempt"]]
            one.lost, one.done = event["kind"], event["done"]
        elif event["event"] == "committed":
            finished.add(event["outcome"]["child"])
        elif event["event"] == "left" and event.get("blame"):
            for one in (one for child, given in attempts.items() if child not in finished for one in given.values()):
                if one.worker == event["worker"] and one.lost == "worker":
                    one.death = event["how"]
    for child, given in attempts.items():
        lost = [(str(budgets.kind(one)), one.done) for one in given.values() if one.lost is not None]
        for kind, count in budgets.charged(lost).items():
            if kind in allowed and count > 1 + allowed[kind]:
                yield f"child {child} lost {count} attempts to {kind}; allowed are {1 + allowed[kind]}"


def _sealed(run: Path, history: History, events: list[Event]) -> Iterator[str]:
    named = [*history.sealed, *([history.complete] if history.complete else [])]
    for event in named:
        reason = population.damage(run, event)
        if reason is not None:
            yield reason
            continue
        first, last = event.get("children", (0, history.state.num_committed))
        if population.read(run, event) != population.rebuilt(events, first, last):
            yield f"{run / event['file']}: differs from the journals"


def _weights(run: Path, history: History) -> Iterator[str]:
    for number in history.state.front.numbers:
        weights = history.results[number]["weights"]
        path = run / weights["path"]
        try:
            content = path.read_bytes()
        except OSError as error:
            yield f"{path}: cannot be read: {error}"
            continue
        if files.sha256(content) != weights["sha256"]:
            yield f"{path}: its SHA-256 is not the one in the record"


def _front(history: History, events: list[Event]) -> Iterator[str]:
    """The front is non-dominated, and dominates or equals every valid child; the run's last word agrees with it."""
    fixed, front = history.state.problem, history.state.front
    cheap = {c["number"]: tuple(c["cheap"]) for e in events if e["event"] == "asked" for c in e["children"]}
    told = [histories.outcome_of(fixed, event["outcome"]) for event in events if event["event"] == "committed"]
    vectors = {o.number: evolution.vector(fixed, cheap[o.number], o.expensive) for o in told if o.failure is None}
    for number, vector in vectors.items():
        as_good = (front.values <= np.array(vector)).all(axis=1)
        rivals = [n for n in np.array(front.numbers)[as_good].tolist() if n != number]
        if number in front.numbers and rivals:
            yield f"child {number} is on the front, though {rivals} are no worse"
        if number not in front.numbers and not rivals:
            yield f"child {number} is not on the front, though nobody there is as good"
    if history.complete is not None:
        volume = evolution.hypervolume(fixed, front.values)
        if [list(front.numbers), volume] != [history.complete["front"], history.complete["hypervolume"]]:
            yield f"front {list(front.numbers)} with hypervolume {volume}, recorded {history.complete}"
