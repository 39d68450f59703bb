"""The fake Slurm says what a real one said: `tests/cluster/transcripts/`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_slurm  # noqa: E402
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
        elif change == "ends":
            self.fail_node(who, 3600.0)
        else:
            self.limits = {} if who == "limits" else {who: int(change)}


def test_it_says_what_a_real_one_said(run: Path) -> None:
    expected = json.loads(slurm_story.TRANSCRIPT.read_text())
    for told, line in zip(slurm_story.play(FakeStage(), run), expected, strict=True):
        assert told == line


def test_a_word_that_differs_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_slurm, "NO_CONTROLLER", "Unable to contact the controller")
    with pytest.raises(AssertionError, match="Unable to contact"):
        test_it_says_what_a_real_one_said(run)


def test_a_command_line_that_no_transcript_has_is_refused() -> None:
    for command in ("squeue --user=me", "sacct --starttime=now", "scancel --signal=TERM 7001"):
        with pytest.raises(AssertionError):
            FakeSlurm().run(command.split())


# ---------------------------------------------------------------- what takes too long for a transcript


def submitted(fake: FakeSlurm, *options: str) -> Job:
    script = "".join(f"#SBATCH --{option}\n" for option in options)
    assert fake.run(("sbatch",), script).code == 0
    fake.advance(1.0)
    return fake.jobs[-1]


def seen(fake: FakeSlurm) -> list[str]:
    return fake.run(("squeue", "--me", "--states=all", "--format=%T %r")).out.splitlines()


def test_a_job_ends_at_its_limit_and_is_forgotten_later() -> None:
    fake = FakeSlurm()
    submitted(fake, "time=2")
    fake.advance(119.0)
    assert seen(fake) == ["RUNNING None"]
    fake.advance(2.0)
    assert seen(fake) == ["TIMEOUT TimeLimit"]
    fake.advance(300.0)
    assert seen(fake) == [] and "TIMEOUT" in fake.run(("sacct", "-X", "-n", "-P", "-j", "7001", "-o", "State")).out


def test_a_preempted_job_has_its_grace() -> None:
    fake = FakeSlurm()
    fake.preempt(submitted(fake, "time=10"), grace_s=20.0)
    fake.advance(20.0)
    assert seen(fake) == ["RUNNING None"]
    fake.advance(1.0)
    assert seen(fake) == ["PREEMPTED None"]


def test_a_lost_node_comes_back() -> None:
    fake = FakeSlurm(num_nodes=1)
    fake.fail_node(submitted(fake, "time=10").node, for_s=100.0)
    submitted(fake, "time=10")
    assert seen(fake) == ["NODE_FAIL NodeDown", "PENDING Resources"]
    fake.advance(100.0)
    assert seen(fake) == ["NODE_FAIL NodeDown", "RUNNING None"]


def test_accounting_lags_and_an_answer_is_lost() -> None:
    fake = FakeSlurm()
    fake.lag_s, fake.mute = 10.0, True
    code, _, said = fake.run(("sbatch",), "#!/bin/sh\n")
    assert code == 1 and said.endswith(": Socket timed out on send/recv operation\n") and len(fake.jobs) == 1
    ask = ("sacct", "-X", "-n", "-P", "-j", "7001", "-o", "State")
    assert fake.run(ask).out == ""
    fake.advance(10.0)
    assert fake.run(ask).out == "RUNNING\n"


def test_a_job_that_begins_tells_the_caller_and_so_does_its_end() -> None:
    told: list[str] = []
    fake = FakeSlurm(delay_s=5.0, begins=lambda job: told.append(job.node), ended=lambda job: told.append(job.state))
    submitted(fake, "exclude=n1,n2")
    assert told == []
    fake.advance(4.0)
    fake.run(("scancel", "7001"))
    assert told == ["n3", "CANCELLED"]
