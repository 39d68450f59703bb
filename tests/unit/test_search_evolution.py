"""LEMONADE's two functions: what they promise, in both modes, and how near they come to a front that is known."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from lemonade_hpc import config
from lemonade_hpc.search import density, evolution, morphisms, spaces
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search.evolution import Child, Outcome, Parents, Problem, State
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.ops import Add, Concat, Conv, Signature

SIGNATURE = Signature((1, 8, 8), 10)
NAMES = ("val_error", "params")
Error = Callable[[Child], float]


def problem(objectives: tuple[Any, ...] = NAMES, seed: int = 0, **search: Any) -> Problem:
    settings = {"proposals": 12, "accepted": 4, "children": 100} | search
    given = {
        "seed": seed,
        "data": {"name": "digits"},
        "objectives": [o if isinstance(o, dict) else {"name": o} for o in objectives],
        "search": settings,
    }
    return evolution.problem(config.from_dict(given, "test"), SIGNATURE, 0.9)


def noisy(child: Child) -> float:
    """Falls with size, and is otherwise as good as random: many networks enter the front."""
    luck = int(hashlib.sha256(child.digest.encode()).hexdigest()[:8], 16) / 16**8
    return float(1.2 - 0.2 * np.log10(child.cheap[0]) + 0.1 * luck)


def never(digest: str) -> bool:
    return False


def tell_all(state: State, error: Error = noisy) -> State:
    for number in sorted(state.in_flight):
        state = evolution.tell(state, Outcome(number, (error(state.in_flight[number]),)))
    return state


def search(fixed: Problem, asks: int, n: int = 4, error: Error = noisy) -> tuple[State, list[Child]]:
    """The state after so many asks, all told, and every child in order."""
    state, children, seen = evolution.start(fixed), list[Child](), set[str]()
    for _ in range(asks):
        state, new = evolution.ask(state, n, seen.__contains__)
        children += new
        seen.update(child.digest for child in new)
        state = tell_all(state, error)
    return state, children


def contents(state: State) -> tuple[Any, ...]:
    """Everything in a state, by value."""
    values = state.front.values.copy().tolist()
    counters = (state.num_initial, state.num_asked, state.num_asks, state.num_committed, state.num_failed)
    return (state.front.numbers, values, dict(state.members), dict(state.in_flight), counters, state.redrawn)


# ---------------------------------------------------------------- children


@pytest.mark.parametrize("mode", ["steady_state", "generational"])
def test_children_are_what_they_say(mode: str) -> None:
    """Number, digest, cheap objectives, edits, generation (children asked before it) and depth (length of lineage)."""
    state, children = search(problem(("val_error", "macs", "params"), mode=mode), asks=8, n=3)
    assert [child.number for child in children] == list(range(len(children)))
    known = dict(enumerate(children))
    initial = [child for child in children if child.parent is None]
    assert tuple(child.graph for child in initial) == spaces.initial(SIGNATURE)
    for child in children:
        facts = graphs.validate(child.graph, SIGNATURE)
        assert child.digest == graphs.digest(child.graph)
        assert child.cheap == (sum(f.macs for f in facts.values()), sum(f.num_params for f in facts.values()))
        lineage, ancestor = 0, child
        while ancestor.parent is not None:
            assert ancestor.parent < ancestor.number
            lineage, ancestor = lineage + 1, known[ancestor.parent]
        assert child.depth == lineage
        if child.parent is None:
            assert (child.generation, child.edits) == (0, ())
        else:
            assert child.generation == 1 + (child.number - len(initial)) // 4
            assert 1 <= len(child.edits) <= 3
            assert morphisms.replay(known[child.parent].graph, child.edits, SIGNATURE) == child.graph
    assert {child.generation for child in children} == set(range(children[-1].generation + 1))
    assert state.num_asked == len(children) and state.num_asks == 8


def test_values_are_frozen() -> None:
    state, children = search(problem(), asks=2)
    for value, name in (
        (state, "front"),
        (children[0], "number"),
        (state.problem, "config"),
        (Outcome(0, ()), "failure"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)


def test_the_same_seed_gives_the_same_children_and_another_other_ones() -> None:
    runs = [search(problem(seed=seed), asks=5)[1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0][:4] == runs[2][:4]  # the initial networks
    assert not {c.digest for c in runs[0][4:8]} == {c.digest for c in runs[2][4:8]}


def test_ask_and_tell_leave_the_state_as_it_was() -> None:
    state, _ = search(problem(), asks=4)
    before = contents(state)
    first, children = evolution.ask(state, 3, never)
    again, same = evolution.ask(state, 3, never)
    assert children == same and contents(first) == contents(again) and contents(state) == before
    middle = contents(first)
    told = evolution.tell(first, Outcome(children[1].number, (0.01,)))
    assert contents(first) == middle != contents(told)
    assert children[1].number in told.front.numbers and children[1].number not in told.in_flight


def test_a_replay_repeats_an_ask_without_deciding_again() -> None:
    state = evolution.start(problem())
    for _ in range(4):
        after, children = evolution.ask(state, 3, never)
        assert contents(evolution.take(state, children, after.redrawn)) == contents(after)
        state = tell_all(after)


def test_the_state_holds_no_history() -> None:
    state, children = search(problem(children=400), asks=60, n=6)
    assert len(children) == 4 + 59 * 6 and not state.in_flight
    assert tuple(state.members) == state.front.numbers == tuple(c.number for c in state.parents.children)
    assert len(state.members) < len(children) / 3
    for child, anatomy in zip(state.parents.children, state.parents.anatomies, strict=True):
        assert anatomy.graph is child.graph and anatomy.facts == graphs.infer(child.graph, SIGNATURE)


# ---------------------------------------------------------------- when, and how many


def test_the_first_ask_gives_the_initial_networks_whatever_n() -> None:
    for n in (0, 1, 100):
        state, children = evolution.ask(evolution.start(problem()), n, lambda digest: True)
        assert len(children) == 4 == state.num_initial and state.in_flight == {c.number: c for c in children}


def test_steady_state_proposes_after_the_first_valid_network_and_tells_in_any_order() -> None:
    state, _ = evolution.ask(evolution.start(problem()), 9, never)
    assert evolution.next_to_tell(state) is None
    for outcome in (None, Outcome(2, (), "diverged"), Outcome(3, (0.5,))):
        if outcome is not None:
            state = evolution.tell(state, outcome)
        after, children = evolution.ask(state, 2, never)
        if state.members:
            assert len(children) == 2 and {c.parent for c in children} == {3}
        else:
            assert children == () and after is state


def test_a_generation_waits_for_all_is_asked_at_once_and_told_in_order() -> None:
    state, _ = evolution.ask(evolution.start(problem(mode="generational")), 1, never)
    for number in range(4):
        after, children = evolution.ask(state, 9, never)
        assert children == () and after is state
        assert evolution.next_to_tell(state) == number
        if number < 3:
            with pytest.raises(ValueError, match=f"child 3 is told before child {number}; a generation has an order"):
                evolution.tell(state, Outcome(3, (0.5,)))
        state = evolution.tell(state, Outcome(number, (0.5,)))
    assert evolution.next_to_tell(state) is None
    state, children = evolution.ask(state, 1, never)
    assert len(children) == 4 and evolution.next_to_tell(state) == 4


def test_nobody_is_asked_where_no_initial_network_is_valid() -> None:
    for mode in ("steady_state", "generational"):
        state, children = evolution.ask(evolution.start(problem(mode=mode)), 1, never)
        for child in children:
            state = evolution.tell(state, Outcome(child.number, (), "out of memory"))
        after, more = evolution.ask(state, 5, never)
        assert more == () and after is state and state.num_failed == 4 and not state.complete


@pytest.mark.parametrize("mode", ["steady_state", "generational"])
def test_the_budget_counts_children_after_the_initial_ones_failed_ones_too(mode: str) -> None:
    state, total = evolution.start(problem(mode=mode, children=7)), 0
    assert state.budget_left == 7 and not state.complete
    for _ in range(4):
        state, children = evolution.ask(state, 5, never)
        assert not state.complete or not children
        total += len(children)
        for child in children:
            outcome = Outcome(child.number, (), "lost") if child.number % 2 else Outcome(child.number, (0.5,))
            state = evolution.tell(state, outcome)
    assert total == 4 + 7 and state.complete and state.budget_left == 0 and state.num_failed == 5
    raised = replace(state, problem=problem(mode=mode, children=9))
    assert not raised.complete
    raised, children = evolution.ask(raised, 5, never)
    assert [child.number for child in children] == [11, 12]


def test_a_budget_of_nothing_is_complete_once_the_initial_networks_are_told() -> None:
    state, _ = evolution.ask(evolution.start(problem(children=0)), 5, never)
    assert not state.complete
    state = tell_all(state)
    assert state.complete and evolution.ask(state, 5, never) == (state, ())


# ---------------------------------------------------------------- who


def test_no_network_is_asked_twice() -> None:
    state, children = search(problem(("val_error", {"name": "params", "max": 1600.0})), asks=25)
    assert len(children) > 90 and state.redrawn.duplicate > 0
    assert len({child.digest for child in children}) == len(children)


def test_what_was_seen_is_drawn_again_and_counted() -> None:
    state, _ = search(problem(), asks=3)
    asked: list[str] = []

    def seen(digest: str) -> bool:
        asked.append(digest)
        return len(asked) % 2 == 1

    after, children = evolution.ask(state, 4, seen)
    refused = set(asked[::2])
    assert len(children) == 4 and not refused & {child.digest for child in children}
    assert after.redrawn.duplicate - state.redrawn.duplicate >= len(asked[::2]) > 0


def test_where_nothing_new_is_found_nobody_is_asked_and_the_reason_is_counted() -> None:
    cases: list[tuple[dict[str, Any], Callable[[str], bool], str]] = [
        ({"operators": ["remove"]}, never, "no_edit"),
        ({}, lambda digest: True, "duplicate"),
    ]
    for settings, seen, reason in cases:
        state, _ = search(problem(**settings), asks=1)
        after, children = evolution.ask(state, 4, seen)
        assert children == () and after.num_asks == state.num_asks + 1 and after.num_asked == state.num_asked
        assert getattr(after.redrawn, reason) == 12 * (1 + evolution.MAX_REDRAWS)
        assert sum((after.redrawn.no_edit, after.redrawn.limit, after.redrawn.duplicate)) == getattr(
            after.redrawn, reason
        )


def test_hard_limits_are_kept() -> None:
    limits = ({"name": "params", "min": 1000.0, "max": 3000.0}, {"name": "macs", "max": 60000.0})
    state, children = search(problem(("val_error", *limits)), asks=12)
    assert len(children) > 30 and state.redrawn.limit > 0
    assert all(1000 <= params <= 3000 and macs <= 60000 for params, macs in (child.cheap for child in children))


@pytest.mark.parametrize(
    "objectives", [("val_error", "params"), ("val_error", "macs"), ("macs", "val_error", "params")]
)
def test_no_network_is_smaller_than_the_spaces_smallest(objectives: tuple[str, ...]) -> None:
    """Also where parameters are no objective; only a `min` of its own takes the floor away."""
    least = spaces.min_params(SIGNATURE)
    fixed = problem(objectives, operators=["prune", "separable"])
    _, children = search(fixed, asks=12, error=lambda child: 1e-4 * child.cheap[0])
    sizes = [graphs.params(child.graph, SIGNATURE) for child in children]
    assert least <= min(sizes) < 1.5 * least
    lower = problem(("val_error", {"name": "params", "min": 0.0}), operators=["prune", "separable"])
    _, children = search(lower, asks=12, error=lambda child: 1e-4 * child.cheap[0])
    assert min(child.cheap[0] for child in children) < least


def test_limits_are_the_settings_and_the_spaces_floor() -> None:
    inf = float("inf")
    cases: list[tuple[tuple[Any, ...], dict[str, tuple[float, float]]]] = [
        (("val_error", "params"), {"params": (312, inf)}),
        (("val_error", {"name": "params", "min": 20.0, "max": 9e3}), {"params": (20, 9e3)}),
        (("val_error", {"name": "macs", "min": 500.0}), {"macs": (500, inf), "params": (312, inf)}),
        (("val_error", {"name": "params", "max": 9e3}, "macs"), {"params": (312, 9e3), "macs": (0, inf)}),
    ]
    for objectives, limits in cases:
        assert problem(objectives).limits == limits


def test_limits_that_no_initial_network_satisfies_are_an_error() -> None:
    says = (
        r"no initial network satisfies params in \[312, 400\]; they have params \d+; params \d+; params \d+; params \d+"
        r" \(312 parameters are the least on images of this size, unless params has a min\)"
    )
    with pytest.raises(ValueError, match=says):
        problem(("val_error", {"name": "params", "max": 400.0}))


def test_only_initial_networks_within_the_limits_are_asked() -> None:
    sizes = [graphs.params(graph, SIGNATURE) for graph in spaces.initial(SIGNATURE)]
    most = sorted(sizes)[1]
    _, children = evolution.ask(
        evolution.start(problem(("val_error", {"name": "params", "max": float(most)}))), 1, never
    )
    assert [child.cheap for child in children] == [(size,) for size in sizes if size <= most]
    assert [child.number for child in children] == [0, 1]


# ---------------------------------------------------------------- sampling


def with_search(state: State, **settings: Any) -> State:
    """The same state, searched on with other settings."""
    changed = state.problem.config.search.model_copy(update=settings)
    fixed = replace(state.problem, config=state.problem.config.model_copy(update={"search": changed}))
    return replace(state, problem=fixed)


def crowded(state: State) -> State:
    """Parents of which fifteen are said to be of one size and the last of another."""
    child, anatomy = state.parents.children[0], state.parents.anatomies[0]
    children = tuple(replace(child, number=k, cheap=(1000.0 if k < 15 else 9000.0,)) for k in range(16))
    return replace(state, parents=Parents(children, (anatomy,) * 16))


def test_parents_are_weighed_by_inverse_density_of_the_log_of_their_sizes() -> None:
    state, _ = search(problem(), asks=10)
    sizes = np.log10([[child.cheap[0]] for child in state.members.values()])
    np.testing.assert_allclose(state.parents.weights, density.inverse_density(sizes, sizes))


@pytest.mark.parametrize(("sampling", "share"), [("density", 1 / 2), ("uniform", 1 / 16)])
def test_the_lone_parent_is_drawn_as_often_as_the_sampling_says(sampling: str, share: float) -> None:
    state, _ = search(problem(proposals=60, accepted=60), asks=1)
    state = with_search(crowded(state), sampling=sampling)
    parents: Counter[int | None] = Counter()
    for k in range(10):
        parents.update(child.parent for child in evolution.ask(replace(state, num_asks=100 + k), 60, never)[1])
    assert parents.total() == 600
    assert chisquare([parents[15], 600 - parents[15]], [600 * share, 600 * (1 - share)]).pvalue > 0.01


@pytest.mark.parametrize(
    ("child_density", "count_in_flight"), [("proposals", True), ("proposals", False), ("front", True), ("front", False)]
)
def test_the_second_density_is_fitted_on_what_the_settings_say(
    child_density: str, count_in_flight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = search(problem(), asks=4)
    state, flying = evolution.ask(state, 5, never)
    state = with_search(state, child_density=child_density, count_in_flight=count_in_flight)
    calls: list[tuple[int, int]] = []

    def spy(data: density.Array, points: density.Array) -> density.Array:
        calls.append((len(data), len(points)))
        return inverse_density(data, points)

    inverse_density = density.inverse_density
    monkeypatch.setattr(density, "inverse_density", spy)
    assert len(state.parents.weights) == len(state.members)
    calls.clear()
    assert len(evolution.ask(state, 3, never)[1]) == 3
    fitted = {"proposals": 12, "front": len(state.members)}[child_density] + (len(flying) if count_in_flight else 0)
    assert calls == [(fitted, 12)]
    calls.clear()
    assert len(evolution.ask(with_search(state, sampling="uniform"), 3, never)[1]) == 3
    assert calls == []


def test_children_in_flight_keep_others_away_from_their_sizes() -> None:
    """With a hundred in flight at one size, whoever is accepted is farther from it than where they do not count."""
    state, _ = search(problem(proposals=60, accepted=8), asks=2)
    model = next(iter(state.members.values()))
    flying = {10_000 + k: replace(model, number=10_000 + k) for k in range(100)}
    state = replace(state, in_flight=flying)
    far = {}
    for counted in (True, False):
        variant = with_search(state, count_in_flight=counted)
        asked = [evolution.ask(replace(variant, num_asks=50 + k), 8, never)[1] for k in range(20)]
        far[counted] = np.mean([abs(np.log10(c.cheap[0] / model.cheap[0])) for new in asked for c in new])
    assert far[True] > 1.2 * far[False]


# ---------------------------------------------------------------- outcomes


def test_a_failed_child_never_enters_the_front() -> None:
    state, children = evolution.ask(evolution.start(problem()), 1, never)
    state = evolution.tell(state, Outcome(0, (), "diverged"))
    state = evolution.tell(state, Outcome(1, (0.0,), "reported, then lost its weights"))
    assert (state.front.numbers, dict(state.members), state.num_failed, state.num_committed) == ((), {}, 2, 2)
    state = evolution.tell(state, Outcome(2, (0.5,)))
    assert state.front.numbers == (2,) and state.members == {2: children[2]} and state.num_failed == 2


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Outcome(9, (0.5,)), "child 9 is not in flight"),
        (Outcome(0, (0.5, 0.5)), "expected values of val_error, params, got cheap .* and expensive \\(0.5, 0.5\\)"),
        (Outcome(0, ()), "expected values of val_error, params"),
        (Outcome(0, (float("nan"),)), "child 0: expected 2 finite objectives"),
    ],
)
def test_outcomes_that_cannot_be_are_refused(outcome: Outcome, says: str) -> None:
    state, _ = evolution.ask(evolution.start(problem()), 1, never)
    with pytest.raises(ValueError, match=says):
        evolution.tell(state, outcome)


def test_an_outcome_is_told_once() -> None:
    state = evolution.tell(evolution.ask(evolution.start(problem()), 1, never)[0], Outcome(0, (0.5,)))
    with pytest.raises(ValueError, match="child 0 is not in flight"):
        evolution.tell(state, Outcome(0, (0.4,)))


def test_the_front_does_not_depend_on_the_order_of_outcomes() -> None:
    state, _ = search(problem(), asks=5)
    state, children = evolution.ask(state, 12, never)
    fronts = []
    for seed in range(6):
        told = state
        for k in np.random.default_rng(seed).permutation(len(children)):
            told = evolution.tell(told, Outcome(children[k].number, (round(noisy(children[k]), 2),)))
        fronts.append((told.front.numbers, told.front.values.tolist(), list(told.members)))
    assert all(front == fronts[0] for front in fronts)


def test_vectors_follow_the_configurations_order() -> None:
    fixed = problem(("macs", "val_error", "params"))
    assert evolution.vector(fixed, (7, 8), (0.25,)) == (7.0, 0.25, 8.0)
    state = tell_all(evolution.ask(evolution.start(fixed), 1, never)[0])
    for number, row in zip(state.front.numbers, state.front.values, strict=True):
        assert (row[0], row[2]) == state.members[number].cheap


# ---------------------------------------------------------------- hypervolume


def test_the_reference_is_guessing_and_max_or_four_times_the_largest_initial_network() -> None:
    largest = max(graphs.params(graph, SIGNATURE) for graph in spaces.initial(SIGNATURE))
    assert problem().reference == pytest.approx((0.9, np.log10(4 * largest)))
    fixed = problem(({"name": "params", "max": 1e5}, "val_error"))
    assert fixed.reference == pytest.approx((5.0, 0.9))


def test_the_hypervolume_is_error_times_decades() -> None:
    fixed = problem(({"name": "params", "max": 1e5}, "val_error"))
    assert evolution.hypervolume(fixed, np.empty((0, 2))) == 0.0
    assert evolution.hypervolume(fixed, np.array([[1e4, 0.4]])) == pytest.approx(0.5)
    assert evolution.hypervolume(fixed, np.array([[1e4, 0.4], [1e3, 0.8]])) == pytest.approx(0.5 + 0.1)
    assert evolution.hypervolume(fixed, np.array([[1e6, 0.1], [1e3, 0.95]])) == 0.0


# ---------------------------------------------------------------- a front that is known


def best_error(params: Any) -> Any:
    """The least error attainable with so many parameters: 0.9 at 300, halved by every fourfold."""
    return 0.9 * (np.asarray(params, dtype=float) / 300) ** -0.5


def handicap(graph: Graph) -> float:
    """What an architecture adds to the least error: nothing for six convolutions or more, of 3x3, with two skips."""
    convs = [node.op for node in graph.nodes if isinstance(node.op, Conv)]
    skips = sum(isinstance(node.op, (Add, Concat)) for node in graph.nodes)
    shallow = max(0, 6 - len(convs)) / 6
    return 0.3 * shallow + 0.2 * np.mean([op.kernel == 5 for op in convs]) + 0.1 * max(0, 2 - skips)


def known(child: Child) -> float:
    """As an error over 1,000 validation images is: a multiple of 1/1000, rounded up."""
    return float(np.ceil(1000 * (best_error(child.cheap[0]) + handicap(child.graph))) / 1000)


def distance(state: State) -> float:
    """Mean excess over the least error attainable, over sizes evenly spaced in log from 1,500 to 50,000 parameters."""
    sizes = np.geomspace(1500, 50_000, 60)
    values = state.front.values
    return float(np.mean([values[values[:, 1] <= size, 0].min(initial=0.9) - best_error(size) for size in sizes]))


@pytest.mark.parametrize("mode", ["steady_state", "generational"])
def test_the_search_comes_near_a_front_that_is_known(mode: str) -> None:
    """2,000 children without training: 0.4 above the least error at first, 0.003 in the end, and never a step back."""
    limits = ("val_error", {"name": "params", "max": 1e5})
    fixed = problem(limits, mode=mode, proposals=50, accepted=20, children=2000)
    state, seen, volumes, distances = evolution.start(fixed), set[str](), [0.0], list[float]()
    while not state.complete:
        state, children = evolution.ask(state, 20, seen.__contains__)
        seen.update(child.digest for child in children)
        state = tell_all(state, known)
        volumes.append(evolution.hypervolume(fixed, state.front.values))
        distances.append(distance(state))
    assert state.num_committed == 2004 == len(seen)
    assert all(before <= after for before, after in pairwise(volumes))
    assert 0.3 < distances[0] < 0.5 and 0 <= distances[-1] < 0.003
