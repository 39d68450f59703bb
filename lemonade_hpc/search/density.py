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
    a, b = ((x - mean) @ (directions / deviations) for x in (points, data))
    # -|a - b|^2 / 2 = (a . b - |b|^2 / 2) - |a|^2 / 2, the first part as one matrix product
    exponent = np.column_stack([a, np.ones(len(a))]) @ np.column_stack([b, -(b**2).sum(axis=1) / 2]).T
    top = exponent.max(axis=1)
    exponent -= top[:, None]
    kernels = np.exp(exponent, out=exponent).sum(axis=1)
    volume = count * np.prod(deviations) * (2 * np.pi) ** (dims / 2)
    result: Array = top - (a**2).sum(axis=1) / 2 + np.log(kernels / volume)
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
