"""What events add up to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.run import history as histories
from lemonade_hpc.run.history import History
from lemonade_hpc.search import pareto

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402


@pytest.mark.parametrize("mode", ["generational", "steady_state"])
def test_events_fold_to_what_ask_and_tell_do(mode: str) -> None:
    settings = doubles.config(search={"mode": mode})
    states, events = doubles.straight(settings, lambda number: number % 5 == 4)
    history = History(doubles.problem(settings))
    assert doubles.same(history.state, states[0])
    for event, state in zip(events, states[1:], strict=True):
        history.apply(json.loads(files.dumps(event)))
        assert doubles.same(history.state, state)
        assert history.attempts.keys() == state.in_flight.keys()
        parents = {child.parent for child in state.in_flight.values()} - {None}
        assert history.results.keys() >= set(state.members) | parents
        assert history.children.keys() == history.results.keys() | state.in_flight.keys()
    final = states[-1]
    assert history.results.keys() == set(final.members)
    assert len(history.failures) == final.num_failed > 0
    assert history.num_records == len(events)
    assert history.wall_s == 2.0 * final.num_committed
    assert sorted(history.release() + list(history.results)) == list(range(final.num_committed))
    assert history.release() == []


@pytest.mark.parametrize("mode", ["generational", "steady_state"])
@pytest.mark.parametrize("failed", [None, 1])
def test_the_first_front_is_of_the_initial_networks_alone(mode: str, failed: int | None) -> None:
    """In steady state children are asked, and told, before the last initial network has reported."""
    settings = doubles.config(search={"mode": mode})
    _, events = doubles.straight(settings, lambda number: number == failed)
    history = History(doubles.problem(settings))
    initial, early = pareto.Front.empty(2), 0
    for event in events:
        history.apply(event)
        told = event.get("outcome", {})
        if "objectives" in told and told["child"] < history.state.num_initial:
            cheap = events[0]["children"][told["child"]]["cheap"]
            initial = pareto.insert(initial, told["child"], (told["objectives"]["val_error"], *cheap))
        if any(number < history.state.num_initial for number in history.state.in_flight):
            early += told.get("child", 0) >= history.state.num_initial
            assert history.initial_front is None
    assert history.initial_front is not None and bool(early) == (mode == "steady_state")
    assert history.initial_front.numbers == initial.numbers != history.state.front.numbers
    assert history.initial_front.values.tolist() == initial.values.tolist()


def test_attempts_are_counted_by_how_they_were_lost() -> None:
    settings = doubles.config()
    _, events = doubles.straight(settings, lambda number: False)
    history = History(doubles.problem(settings))
    history.apply(events[0])
    history.apply({"event": "launched", "workers": ["w"], "gpus": 1})
    for attempt, kind in (("a1", "crash"), ("a2", "stopped"), ("a3", None)):
        history.apply({"event": "attempt", "child": 1, "attempt": attempt, "worker": "w"})
        if kind:
            told = {"kind": kind, "reason": "", "seconds": 1.5, "done": 0.0}
            history.apply({"event": "lost", "child": 1, "attempt": attempt, **told})
    assert [one.lost for one in history.attempts[1]] == ["crash", "stopped", None]
    assert history.num_lost == {"crash": 1, "walltime": 0, "worker": 0, "stopped": 1}
    assert history.usage.wasted == 3.0


def test_children_are_sealed_in_order_once_all_are_finished() -> None:
    settings = doubles.config(search={"mode": "steady_state"})
    _, events = doubles.straight(settings, lambda number: False)
    history = History(doubles.problem(settings))
    for event in events:
        history.apply(event)
        due = history.sealable(4)
        done = [number for number, row in history.unsealed.items() if "outcome" in row]
        assert (due is not None) == ({0, 1, 2, 3} <= set(done))
    assert history.sealable(4) == (0, 4)
    history.apply({"event": "sealed", "children": [0, 4], "file": "a", "sha256": "1"})
    assert history.sealable(4) == (4, 8) and min(history.unsealed) == 4
    assert history.sealable(1000) is None
    history.apply({"event": "sealed", "children": [0, 4], "file": "b", "sha256": "2"})  # written again
    assert [event["file"] for event in history.sealed] == ["b"]


def test_raising_the_budget_ends_completeness() -> None:
    settings = doubles.config()
    _, events = doubles.straight(settings, lambda number: False)
    history = History(doubles.problem(settings))
    for event in events[:-1]:
        history.apply(event)
    history.apply({"event": "complete"})
    assert history.complete is not None
    history.apply(histories.asked(history.state, history.state, 0, ()))
    assert history.complete is None


@pytest.mark.parametrize(
    "event",
    [
        {"event": "invented"},
        {"event": "committed", "outcome": {"child": 99, "failure": doubles.FAILURE}},
        {"event": "attempt", "child": 99, "attempt": "a", "worker": "w"},
        {"event": "committed", "outcome": {"child": 0, "objectives": {}}},
        {"no": "event"},
    ],
)
def test_an_event_that_cannot_follow_is_an_error(event: dict[str, Any]) -> None:
    settings = doubles.config()
    history = History(doubles.problem(settings))
    history.apply(doubles.straight(settings, lambda number: False)[1][0])
    with pytest.raises((ValueError, KeyError)):
        history.apply(event)


def test_a_child_and_its_json_are_the_same_thing() -> None:
    states, _ = doubles.straight(doubles.config(), lambda number: False)
    children = [child for state in states for child in state.in_flight.values()]
    assert any(len(child.edits) > 1 for child in children)
    for child in children:
        assert histories.child_from_json(json.loads(files.dumps(histories.child_to_json(child)))) == child


def test_a_coordinator_that_begins_counts_as_crashed_until_it_leaves_in_good_order() -> None:
    history = History(doubles.problem(doubles.config()))
    for crashes in (1, 2):
        history.begin()
        assert (history.num_crashes, history.closed, history.why_closed) == (crashes, False, None)
    history.apply({"event": "closed", "why": "enough"})
    assert (history.num_crashes, history.closed, history.why_closed) == (0, True, "enough")
    history.begin()
    assert (history.num_crashes, history.closed, history.why_closed) == (1, False, None)
