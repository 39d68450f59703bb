"""The density against scipy where that is defined, and both ways of drawing against their definitions."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, gaussian_kde

from lemonade_hpc.search import density
from lemonade_hpc.search.density import BANDWIDTH_FLOOR, Array

SEEDS = st.integers(0, 2**32 - 1)


def kernel_deviations(data: Array) -> Array:
    """Standard deviations of scipy's kernel along its main directions."""
    return np.sqrt(np.linalg.eigvalsh(gaussian_kde(data.T, "silverman").covariance))


@given(SEEDS, st.integers(1, 4), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_the_density_is_scipys_where_no_direction_is_below_the_floor(seed: int, dims: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(dims + 2 + more, dims)) @ rng.normal(size=(dims, dims)) + rng.normal(size=dims) * 5
    points = np.concatenate([data[:5], rng.normal(size=(int(rng.choice([0, 20, 600])), dims)) * 4])
    assume(kernel_deviations(data).min() > BANDWIDTH_FLOOR)
    expected = gaussian_kde(data.T, "silverman").logpdf(points.T)
    np.testing.assert_allclose(density.log_density(data, points), expected, rtol=1e-7, atol=1e-7)


def test_a_density_has_a_volume_of_one_even_on_the_floor() -> None:
    """Summed on a grid: two equal points, whose kernel is as wide as the floor, and collinear ones."""
    step = BANDWIDTH_FLOOR / 4
    axis = np.arange(-1, 1, step)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    for data in (np.zeros((2, 2)), np.array([[-0.1, -0.1], [0.0, 0.0], [0.1, 0.1]])):
        assert np.exp(density.log_density(data, grid)).sum() * step**2 == pytest.approx(1, abs=1e-6)


DEGENERATE = {
    "one point": [[3.0, 4.0]],
    "two points": [[3.0, 4.0], [5.0, 4.0]],
    "equal points": [[3.0, 4.0]] * 7,
    "collinear points": [[k, 2 * k + 1] for k in range(5)],
    "one far away": [[3.0, 4.0]] * 9 + [[9.0, 9.0]],
    "one dimension": [[3.0]],
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_the_density_never_raises(name: str) -> None:
    data = np.array(DEGENERATE[name])
    far = np.full((1, data.shape[1]), 1e3)
    values = density.log_density(data, np.concatenate([data, far]))
    assert np.isfinite(values).all() and values[-1] < values[:-1].min()
    weights = density.inverse_density(data, data)
    assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1) and (weights >= 0).all()
    if name == "equal points":
        np.testing.assert_allclose(weights, 1 / len(data))
    if name == "one far away":
        assert weights[9] == pytest.approx(9 * weights[0], rel=1e-3)


def test_inputs_stay_as_they_are() -> None:
    data, points = np.random.default_rng(0).normal(size=(2, 9, 2))
    before = data.copy(), points.copy()
    density.inverse_density(data, points)
    weights = density.inverse_density(data, data)
    given = weights.copy()
    density.draw_with_replacement(weights, 5, np.random.default_rng(0))
    density.draw_without_replacement(weights, 5, np.random.default_rng(0))
    assert [a.tobytes() for a in (data, points, weights)] == [a.tobytes() for a in (*before, given)]


def test_drawing_with_replacement_is_proportional_to_one_over_density() -> None:
    rng = np.random.default_rng(2)
    data = rng.normal(size=(12, 2))
    wanted = 1 / gaussian_kde(data.T, "silverman")(data.T)
    count = 40_000
    drawn = density.draw_with_replacement(density.inverse_density(data, data), count, rng)
    frequencies = np.bincount(drawn, minlength=12)
    assert chisquare(frequencies, count * wanted / wanted.sum()).pvalue > 0.01
    assert chisquare(frequencies, np.full(12, count / 12)).pvalue < 1e-9  # the check can fail


def in_turn(probabilities: list[float], count: int) -> dict[frozenset[int], float]:
    """Probability of each set by the sequential definition: one after another, in proportion to what is left."""
    found: dict[frozenset[int], float] = {}
    for order in permutations(range(len(probabilities)), count):
        chance, left = 1.0, 1.0
        for k in order:
            chance *= probabilities[k] / left
            left -= probabilities[k]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + chance
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_drawing_without_replacement_is_drawing_in_turn(count: int) -> None:
    probabilities = [0.05, 0.1, 0.15, 0.3, 0.4]
    rng = np.random.default_rng(count)
    trials = 20_000
    seen: dict[frozenset[int], int] = {}
    for _ in range(trials):
        drawn = density.draw_without_replacement(np.array(probabilities), count, rng).tolist()
        assert drawn == sorted(set(drawn)) and len(drawn) == count
        seen[frozenset(drawn)] = seen.get(frozenset(drawn), 0) + 1
    expected = in_turn(probabilities, count)
    assert sum(expected.values()) == pytest.approx(1)
    assert chisquare([seen.get(s, 0) for s in expected], [trials * p for p in expected.values()]).pvalue > 0.01


def test_drawing_without_replacement_draws_no_more_than_there_are_and_survives_zeros() -> None:
    rng = np.random.default_rng(0)
    assert density.draw_without_replacement(np.full(3, 1 / 3), 9, rng).tolist() == [0, 1, 2]
    for _ in range(50):
        assert 1 in density.draw_without_replacement(np.array([0.0, 1.0, 0.0]), 2, rng)
