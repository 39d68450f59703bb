"""A short soak; `tests/end_to_end/soak.py` does 2,000 children."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "end_to_end")]

import run_doubles as doubles  # noqa: E402
import soak  # noqa: E402


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


@pytest.mark.parametrize("seed", range(3))
def test_faults_lose_nothing_and_change_no_front(run: Path, seed: int) -> None:
    hurt = soak.soak(run, 120, seed)
    assert hurt.coordinator is not None and sum(hurt.happened.values()) > 5
    whole = soak.soak(run.with_name("whole"), 120, seed, faults=False)
    assert whole.coordinator is not None and not whole.happened
    assert doubles.front(hurt.coordinator.history) == doubles.front(whole.coordinator.history)


def test_the_soak_sees_calls_that_come_too_often(run: Path) -> None:
    world = soak.World(run, 0, 1, faults=False)
    world.called("sbatch", 10)
    world.slurm.now += 9.9
    with pytest.raises(AssertionError, match=r"sbatch after 9\.9 s"):
        world.called("sbatch", 10)
