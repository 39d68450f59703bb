"""What the benchmarks of the search ring share: interleaved rounds, ratios and one JSON document on standard output."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def arguments(description: str | None, rounds: int = 7) -> argparse.Namespace:
    """`--rounds` and `--small`, which CI uses."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds, at least 5")
    parser.add_argument("--small", action="store_true", help="less work in every round")
    given = parser.parse_args()
    if given.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {given.rounds}")
    return given


def seconds(action: Callable[[], object]) -> float:
    """CPU time of one call: other processes of the machine disturb it less than they disturb a clock."""
    began = time.process_time()
    action()
    return time.process_time() - began


def interleaved(sides: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds per unit of work, for each side and round: A B A B ..., so that all sides meet the same noise.

    A side is an action and the units of work it does. Each is called once before anything is measured.
    """
    for action, _ in sides.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (action, units) in sides.items():
            times[name].append(seconds(action) / units)
    return times


def compared(
    times: dict[str, list[float]], baseline: str, candidate: str, floor: float | None = None
) -> dict[str, Any]:
    """Both medians in microseconds, the median of the rounds' ratios and their spread."""
    ratios = [slow / fast for slow, fast in zip(times[baseline], times[candidate], strict=True)]
    found: dict[str, Any] = {
        "baseline": baseline,
        "candidate": candidate,
        "baseline_us": rounded(statistics.median(times[baseline]) * 1e6),
        "candidate_us": rounded(statistics.median(times[candidate]) * 1e6),
        "ratio": rounded(statistics.median(ratios)),
        "spread": [rounded(min(ratios)), rounded(max(ratios))],
    }
    return found if floor is None else {**found, "floor": floor, "floor_met": found["ratio"] >= floor}


def against_target(found: dict[str, Any], per_s: float) -> dict[str, Any]:
    """What `compared` has found, with the candidate's rate in units a second and the rate that was aimed at."""
    rate = 1e6 / found["candidate_us"]
    return found | {"per_s": round(rate), "target_per_s": per_s, "target_met": rate > per_s}


def rounded(value: float) -> float:
    """Three digits that count."""
    return float(f"{value:.3g}")


def report(
    name: str, given: argparse.Namespace, guard: dict[str, Any], results: Sequence[dict[str, Any]] | dict[str, Any]
) -> None:
    """Conclude one benchmark; raises AssertionError where the guard (name: whether it holds) does not hold."""
    parts = [results] if isinstance(results, dict) else results
    missed = [f"{part.get('candidate', name)}: the floor" for part in parts if part.get("floor_met") is False]
    document = {"benchmark": name, "rounds": given.rounds, "guard": guard, "results": results}
    broken = [what for what, holds in guard.items() if holds is False]
    conclude(document, missed, small=given.small)
    assert not broken, f"{name}: {', '.join(broken)} does not hold: the speeds above compare different things"


def conclude(document: dict[str, Any], missed: Sequence[str], *, small: bool) -> None:
    """Print a JSON document; exit code 1 where a floor is missed. A small run is too short to judge by: 0."""
    print(json.dumps(document, indent=1))
    if missed and not small:
        sys.exit(f"missed: {', '.join(missed)}")
