"""Dominance, the Pareto front and its hypervolume.

Decides: which networks stay (paper, section 3: the population is every non-dominated network found so far) and how a
front is scored. All objectives are minimised. Of equal vectors the lowest child number stays, so that the front
does not depend on the order in which children finish.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import compress
from math import isfinite
from operator import and_, or_

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
    vector = tuple(map(float, value))
    if len(vector) != front.values.shape[1] or not all(map(isfinite, vector)):
        raise ValueError(f"child {number}: expected {front.values.shape[1]} finite objectives, got {list(value)}")
    columns = list(zip(front.values.T, vector, strict=True))
    no_worse = reduce(and_, (column <= limit for column, limit in columns))
    if no_worse.any():
        rival = int(no_worse.argmax())
        if number > front.numbers[rival] or tuple(front.values[rival].tolist()) != vector:
            return front
    keep = reduce(or_, (column < limit for column, limit in columns))
    numbers = tuple(compress(front.numbers, keep.tolist()))
    at = bisect(numbers, number)
    values = np.empty((len(numbers) + 1, len(vector)), order="F")
    for k, (column, limit) in enumerate(columns):
        stays = column[keep]
        values[:at, k], values[at, k], values[at + 1 :, k] = stays[:at], limit, stays[at:]
    return Front((*numbers[:at], number, *numbers[at:]), _frozen(values))


def hypervolume(values: Array, reference: Sequence[float]) -> float:
    """Volume dominated by `values` (n, d) up to `reference` (d,); points beyond it count nothing."""
    if not len(values):
        return 0.0
    return float(moocore.hypervolume(np.ascontiguousarray(values), ref=np.asarray(reference, dtype=np.float64)))
