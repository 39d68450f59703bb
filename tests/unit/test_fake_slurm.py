"""The fake Slurm says what a real one said: `tests/cluster/transcripts/`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402
import slurm_story  # noqa: E402
from fake_slurm import FakeSlurm, Job  # noqa: E402


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


class FakeStage(FakeSlurm):
    """A stage whose time is not real."""

    def __init__(self) -> None:
        super().__init__(max_array=slurm_story.MAX_ARRAY, begins=self.act)

    def act(self, job: Job) -> None:
        for line, state in (("exit 3", "FAILED"), ("exit 0", "COMPLETED")):
            if line in job.script.splitlines():
                self.end(job, state)

    def wait(self) -> None:
        self.advance(1.0)

    def happens(self, what: str) -> None:
        who, change = what.split()
        if who == "slurmctld":
            self.controller = change == "starts"
        elif who == "slurmdbd":
            self.accounting = change == "starts"
        else:
            self.limits = {who: int(change)}


def test_it_says_what_a_real_one_said(run: Path) -> None:
    expected = json.loads(slurm_story.TRANSCRIPT.read_text())
    for told, line in zip(slurm_story.play(FakeStage(), run), expected, strict=True):
        assert told == line
