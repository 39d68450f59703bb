"""C11: inserting 5,000 points into a front, one after another, in 2 and 3 dimensions, against moocore's full filter.

`all again` filters every point seen so far at each insertion; `front again` filters only the front and the new point.
Times are per insertion. Floor 10 times faster than all again; targets below 1 us (2-d) and 10 us (3-d). The guard: the
front is moocore's of all points. JSON.
"""

from __future__ import annotations

import moocore
import numpy as np
from common import arguments, compared, interleaved, report

from lemonade_hpc.search import pareto

FLOOR = 10.0
TARGETS_US = {2: 1.0, 3: 10.0}


def cloud(dims: int, count: int) -> pareto.Array:
    """Points a little outside a sphere: fronts of about 200 of 5,000 points in 2 dimensions, 1,100 in 3."""
    rng = np.random.default_rng(dims)
    points = rng.uniform(size=(count, dims))
    points *= (1 + rng.exponential(0.1, size=(count, 1))) / np.linalg.norm(points, axis=1, keepdims=True)
    return points


def ours(points: list[list[float]]) -> pareto.Front:
    """One insertion after another."""
    front = pareto.Front.empty(len(points[0]))
    for number, point in enumerate(points):
        front = pareto.insert(front, number, point)
    return front


def all_again(points: pareto.Array, every: int) -> None:
    """A filter of all points so far, at every k-th insertion."""
    for k in range(every, len(points) + 1, every):
        moocore.is_nondominated(points[:k], keep_weakly=False)


def front_again(points: pareto.Array) -> pareto.Array:
    """A filter of the front and the new point at each insertion."""
    front = points[:0]
    for k in range(len(points)):
        both = np.concatenate([front, points[k : k + 1]])
        front = both[moocore.is_nondominated(both, keep_weakly=False)]
    return front


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__)
    count, every = 5000, 100 if given.small else 20
    results, guard = [], {}
    for dims in (2, 3):
        points = cloud(dims, count)
        listed = points.tolist()
        expected = np.flatnonzero(moocore.is_nondominated(points, keep_weakly=False)).tolist()
        guard[f"{dims}-d: the front is moocore's"] = list(ours(listed).numbers) == expected
        times = interleaved(
            {
                "all again": (lambda p=points: all_again(p, every), count // every),
                "front again": (lambda p=points: front_again(p), count),
                "ours": (lambda p=listed: ours(p), count),
            },
            given.rounds,
        )
        first = compared(times, "all again", "ours", FLOOR)
        target = {"target_us": TARGETS_US[dims], "target_met": first["candidate_us"] < TARGETS_US[dims]}
        results += [
            {"dims": dims, "on_the_front": len(expected), **first, **target},
            {"dims": dims, "on_the_front": len(expected), **compared(times, "front again", "ours")},
        ]
    report("C11", given, guard, results)


if __name__ == "__main__":
    main()
