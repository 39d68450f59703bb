"""The front against its definition and moocore; the hypervolume against pygmo and boxes summed by hand."""

from __future__ import annotations

from itertools import product

import moocore
import numpy as np
import pygmo
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemonade_hpc.search import pareto
from lemonade_hpc.search.pareto import Array, Front

DIMS = st.integers(2, 4)
SEEDS = st.integers(0, 2**32 - 1)


def front_of(values: Array, order: list[int]) -> Front:
    front = Front.empty(values.shape[1])
    for number in order:
        front = pareto.insert(front, number, values[number].tolist())
    return front


def by_definition(values: Array) -> list[int]:
    """Numbers of those that no other dominates and no lower-numbered one equals."""
    return [
        k
        for k, x in enumerate(values)
        if not any((y <= x).all() and (y < x).any() for y in values) and not any((y == x).all() for y in values[:k])
    ]


@st.composite
def points(draw: st.DrawFn) -> Array:
    """Few different values, so that ties and duplicates are ordinary."""
    dims, count = draw(DIMS), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(SEEDS))
    return rng.integers(0, draw(st.sampled_from([2, 4, 50])), size=(count, dims)).astype(float)


@given(points(), SEEDS)
@settings(max_examples=200, deadline=None)
def test_the_front_is_by_definition_and_in_any_order(values: Array, seed: int) -> None:
    wanted = by_definition(values)
    for order in (list(range(len(values))), np.random.default_rng(seed).permutation(len(values)).tolist()):
        front = front_of(values, order)
        assert list(front.numbers) == wanted
        np.testing.assert_array_equal(front.values, values[wanted])
    assert wanted == np.flatnonzero(moocore.is_nondominated(values, keep_weakly=False)).tolist()


def test_of_equal_vectors_the_lowest_number_stays() -> None:
    for order in ([7, 3, 5], [3, 5, 7], [5, 7, 3]):
        front = Front.empty(2)
        for number in order:
            front = pareto.insert(front, number, (1.0, 2.0))
        assert front.numbers == (3,)


def test_a_vector_that_does_not_enter_leaves_the_same_object() -> None:
    front = pareto.insert(Front.empty(2), 1, (1.0, 2.0))
    assert pareto.insert(front, 2, (1.0, 2.0)) is front
    assert pareto.insert(front, 2, (1.0, 2.1)) is front
    assert pareto.insert(front, 0, (1.0, 2.1)) is front
    assert pareto.insert(front, 0, (1.0, 2.0)) is not front


@pytest.mark.parametrize("value", [(1.0, float("nan")), (1.0, float("inf")), (1.0,), (1.0, 2.0, 3.0), ()])
def test_what_is_no_vector_of_finite_objectives_is_refused(value: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="child 4: expected 2 finite objectives"):
        pareto.insert(pareto.insert(Front.empty(2), 1, (1.0, 2.0)), 4, value)


def test_a_front_cannot_be_written_to_and_is_not() -> None:
    rng = np.random.default_rng(0)
    front, before = Front.empty(3), []
    for number, value in enumerate(rng.uniform(size=(200, 3))):
        value.flags.writeable = False
        before.append((front, front.numbers, front.values.copy()))
        front = pareto.insert(front, number, value)
        with pytest.raises(ValueError, match="read-only"):
            front.values[:] = 0.0
    for old, numbers, values in before:
        assert old.numbers == numbers
        np.testing.assert_array_equal(old.values, values)
    pareto.hypervolume(front.values, (1.0, 1.0, 1.0))


# ---------------------------------------------------------------- hypervolume


@given(DIMS, st.integers(0, 25), SEEDS)
@settings(max_examples=80, deadline=None)
def test_the_hypervolume_is_pygmos(dims: int, count: int, seed: int) -> None:
    """Points beyond the reference count nothing; pygmo refuses them, so they are left out of its set."""
    values = np.random.default_rng(seed).uniform(0, 1.3, size=(count, dims))
    inside = values[(values < 1).all(axis=1)]
    expected = pygmo.hypervolume(inside).compute([1.0] * dims) if len(inside) else 0.0
    assert pareto.hypervolume(values, [1.0] * dims) == pytest.approx(expected, abs=1e-12)


@given(DIMS, st.integers(1, 8), SEEDS)
@settings(max_examples=40, deadline=None)
def test_the_hypervolume_is_the_number_of_unit_boxes(dims: int, count: int, seed: int) -> None:
    """Whole-numbered points up to 5: every unit box is dominated or not."""
    values = np.random.default_rng(seed).integers(0, 6, size=(count, dims)).astype(float)
    boxes = sum(any((value <= box).all() for value in values) for box in product(range(5), repeat=dims))
    assert pareto.hypervolume(values, [5.0] * dims) == pytest.approx(boxes)


def test_the_hypervolume_of_a_staircase_in_closed_form() -> None:
    """k steps below the diagonal of the unit square: (k - 1) / (2 k)."""
    for k in (2, 3, 10, 100):
        steps = np.array([[i / k, 1 - i / k] for i in range(1, k)])
        assert pareto.hypervolume(steps, (1.0, 1.0)) == pytest.approx((k - 1) / (2 * k))


def test_the_hypervolume_of_nobody_and_on_the_edge_is_zero() -> None:
    assert pareto.hypervolume(np.empty((0, 2)), (1.0, 1.0)) == 0.0
    assert pareto.hypervolume(np.array([[1.0, 0.0]]), (1.0, 1.0)) == 0.0
    assert pareto.hypervolume(np.array([[2.0, -5.0]]), (1.0, 1.0)) == 0.0
