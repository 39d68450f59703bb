"""Kernel density of the cheap objectives, and sampling where it is low.

Decides: the bandwidth and its floor, and how inverse-density sampling is done. Paper, Algorithm 1: parents and
accepted children are both drawn with probability proportional to 1 / density. Gaussian kernels with Silverman's factor,
as `scipy.stats.gaussian_kde`, but it never raises: one point, equal points and collinear points are ordinary in the
first generations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BANDWIDTH_FLOOR = 0.02
"""Least standard deviation of a kernel along any direction, in decades: about 5 % of a value."""

ROWS = 128
"""Points whose density is worked out at a time."""


def log_density(data: Array, points: Array) -> Array:
    """Natural log of the density that `data` (n, d) has at `points` (m, d); shape (m,).

    Equals gaussian_kde(data.T, "silverman").logpdf(points.T) wherever no direction falls below the floor.
    """
    count, dims = data.shape
    factor = (count * (dims + 2) / 4) ** (-1 / (dims + 4))
    mean = data.mean(axis=0)
    covariance = (data - mean).T @ (data - mean) / max(1, count - 1) * factor**2
    variances, directions = np.linalg.eigh(covariance)
    deviations = np.sqrt(np.maximum(variances, BANDWIDTH_FLOOR**2))
    whitened = (points - mean) @ (directions / deviations), (data - mean) @ (directions / deviations)
    volume = np.log(count) + np.log(deviations).sum() + dims / 2 * np.log(2 * np.pi)
    result: Array = _log_kernels(*whitened) - volume
    return result


def _log_kernels(a: Array, b: Array) -> Array:
    """For each row of `a` (m, d), the log of its sum over `b` (n, d) of exp(-|a - b|^2 / 2); memory of ROWS x n."""
    # -|a - b|^2 / 2 = (a . b - |b|^2 / 2) - |a|^2 / 2, the first part as one matrix product
    left = np.column_stack([a, np.ones(len(a))])
    right = np.column_stack([b, -(b**2).sum(axis=1) / 2]).T
    result: Array = -(a**2).sum(axis=1) / 2
    for k in range(0, len(a), ROWS):
        exponent = left[k : k + ROWS] @ right
        top = exponent.max(axis=1)
        exponent -= top[:, None]
        result[k : k + ROWS] += top + np.log(np.exp(exponent, out=exponent).sum(axis=1))
    return result


def inverse_density(data: Array, points: Array) -> Array:
    """Probabilities proportional to 1 / density, over `points`; shape (m,), sum 1."""
    weight = -log_density(data, points)
    scaled = np.exp(weight - weight.max())
    result: Array = scaled / scaled.sum()
    return result


def draw_with_replacement(probabilities: Array, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` indices, independent of one another."""
    return rng.choice(len(probabilities), size=count, p=probabilities)


def draw_without_replacement(probabilities: Array, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`count` different indices, drawn one after another in proportion to what is left; ascending.

    By the largest perturbed logarithms (the Gumbel top-k identity), so that probabilities of 0 cannot make it fail.
    """
    with np.errstate(divide="ignore"):
        keys = np.log(probabilities) + rng.gumbel(size=len(probabilities))
    best = np.argsort(-keys, kind="stable")[:count]
    return np.sort(best)
