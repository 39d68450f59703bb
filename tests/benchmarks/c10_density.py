"""C10: density of 1,000 candidates against 300 members in 2 dimensions: ours against scipy, one call per candidate.

Also against one scipy call for all. Floor 15 times faster than one by one, target below 1 ms. The guard: log densities
differ by less than 1e-9. JSON.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy: one thread on both sides

import numpy as np
from common import arguments, compared, interleaved, report
from scipy.stats import gaussian_kde

from lemonade_hpc.search import density

FLOOR, TARGET_US = 15.0, 1000.0


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__)
    rng = np.random.default_rng(0)
    members, candidates = rng.normal(size=(300, 2)), 1.5 * rng.normal(size=(1000, 2))
    kernels = gaussian_kde(members.T, "silverman")
    few = candidates[:100] if given.small else candidates
    difference = np.abs(density.log_density(members, candidates) - kernels.logpdf(candidates.T)).max()
    times = interleaved(
        {
            "scipy, one by one": (lambda: [kernels(candidate) for candidate in few], len(few)),
            "scipy, one call": (lambda: kernels(candidates.T), len(candidates)),
            "ours": (lambda: [density.log_density(members, candidates) for _ in range(5)], 5 * len(candidates)),
        },
        given.rounds,
    )
    thousand = {name: [1000 * second for second in seconds] for name, seconds in times.items()}
    results = [compared(thousand, "scipy, one by one", "ours", FLOOR), compared(thousand, "scipy, one call", "ours")]
    results[0] |= {"target_us": TARGET_US, "target_met": results[0]["candidate_us"] < TARGET_US}
    report("C10", given, {"log densities differ by less than 1e-9": bool(difference < 1e-9)}, results)


if __name__ == "__main__":
    main()
