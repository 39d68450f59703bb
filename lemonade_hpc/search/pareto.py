"""Dominance, the Pareto front and its hypervolume.

Decides: which networks stay (paper, section 3: the population is every non-dominated network found so far) and how a
front is scored. All objectives are minimised. Of equal vectors the lowest child number stays, so that the front
does not depend on the order in which children finish.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Front:
    """Mutually non-dominated vectors `values` (n, d) of the children `numbers`, ascending by number."""

    numbers: tuple[int, ...]
    values: Array

    @staticmethod
    def empty(dims: int) -> Front:
        """A front of nobody, in `dims` objectives."""
        return Front((), _frozen(np.empty((0, dims))))


def _frozen(values: Array) -> Array:
    values.flags.writeable = False
    return values


def insert(front: Front, number: int, value: Sequence[float]) -> Front:
    """The front with one more vector judged; the same object when the vector does not enter.

    Raises ValueError for a value that is not finite or of the wrong length.
    """
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape != front.values.shape[1:] or not np.isfinite(vector).all():
        raise ValueError(f"child {number}: expected {front.values.shape[1]} finite objectives, got {list(value)}")
    no_worse = (front.values <= vector).all(axis=1)
    if no_worse.any():
        rival = int(no_worse.argmax())
        if number > front.numbers[rival] or (front.values[rival] != vector).any():
            return front
    keep = (front.values < vector).any(axis=1)
    if keep.all():
        numbers, values = front.numbers, front.values
    else:
        numbers = tuple(n for n, stays in zip(front.numbers, keep, strict=True) if stays)
        values = front.values[keep]
    at = bisect(numbers, number)
    merged = np.empty((len(numbers) + 1, len(vector)))
    merged[:at], merged[at], merged[at + 1 :] = values[:at], vector, values[at:]
    return Front((*numbers[:at], number, *numbers[at:]), _frozen(merged))


def hypervolume(values: Array, reference: Sequence[float]) -> float:
    """Volume dominated by `values` (n, d) up to `reference` (d,); points beyond it count nothing."""
    if not len(values):
        return 0.0
    return float(moocore.hypervolume(np.ascontiguousarray(values), ref=np.asarray(reference, dtype=np.float64)))
