"""`cancel`: the coordinator before its workers, and only what can be reached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import cancel, owner, queue, status

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

IGNORES_SIGTERM = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run whose coordinator was killed."""
    judge = owner.judge
    doubles.install(monkeypatch)
    with doubles.folder() as made:
        coordinator = doubles.start(made, doubles.config(), doubles.FakeBackend(made))
        coordinator._ledger.close()
        monkeypatch.setattr(owner, "judge", judge)
        held_by(made, {"started": 1})
        yield made


def held_by(run: Path, who: dict[str, Any], backend: str = "local") -> None:
    path = run / files.owner(1)
    content = json.loads(path.read_text())
    content["owner"] |= who
    content["config"]["cluster"]["backend"] = backend
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("program", ["import time; print('ready', flush=True); time.sleep(60)", IGNORES_SIGTERM])
def test_a_coordinator_is_told_to_leave_and_ended_if_it_does_not(
    run: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(cancel, "LEAVE_S", 0.5 if program is IGNORES_SIGTERM else 20.0)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    held_by(run, owner.identity(process.pid))
    monkeypatch.setattr(cancel.time, "sleep", lambda seconds: process.poll())  # reaps it
    kill, sent = os.kill, list[int]()
    monkeypatch.setattr(cancel.os, "kill", lambda pid, which: (sent.append(which), kill(pid, which)))
    (ended,) = cancel.cancel(run)
    assert ended.startswith(f"coordinator (process {process.pid} on ")
    assert process.wait(10) == -(signal.SIGKILL if program is IGNORES_SIGTERM else signal.SIGTERM)
    assert [which for which in sent if which] == [signal.SIGTERM, signal.SIGKILL][
        : 1 + (program is IGNORES_SIGTERM)
    ]  # none to a pid that is free
    process.stdout.close()


def test_where_nothing_runs_nothing_is_ended(run: Path) -> None:
    assert cancel.cancel(run) == []


def test_a_coordinator_elsewhere_must_be_ended_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "ask", lambda *command: pytest.fail("no job may be cancelled before the coordinator"))
    held_by(run, {"host": "elsewhere"}, "slurm")
    with pytest.raises(ConfigError, match=r"its coordinator is process \d+ on elsewhere, which cannot be reached"):
        cancel.cancel(run)


def test_a_coordinator_elsewhere_that_has_left_in_good_order_is_in_nobodys_way(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles.start(run, doubles.config(), doubles.FakeBackend(run)).close()
    path = run / files.owner(2)
    path.write_text(path.read_text().replace(owner.identity()["host"], "elsewhere"))
    assert cancel.cancel(run) == [] and "no coordinator is at work" in cancel.stop(run)
    assert status.status(run)["state"] == "stopped"


def test_the_jobs_of_this_run_that_have_not_ended_are_cancelled(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"lemonade-{json.loads((run / files.RUN).read_text())['run'][:8]}-e1w00"
    asked = []

    def ask(*command: str) -> str:
        asked.append(command)
        return f"7_0|{name}|RUNNING\n7_1|{name}|COMPLETED\n7_2|{name}|PENDING\n8|lemonade-other|RUNNING\n"

    monkeypatch.setattr(queue, "ask", ask)
    held_by(run, {}, "slurm")
    assert cancel.cancel(run) == ["job 7_0", "job 7_2"]
    assert asked[0][:2] == ("squeue", "--me") and asked[1:] == [("scancel", "7_0", "7_2")]


@pytest.mark.parametrize("silent", ["squeue", "scancel"])
def test_a_slurm_that_does_not_answer_is_told(run: Path, monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    name = f"lemonade-{json.loads((run / files.RUN).read_text())['run'][:8]}-e1w00"
    answers = {"squeue": f"7|{name}|RUNNING\n", "scancel": ""}
    monkeypatch.setattr(queue, "ask", lambda command, *rest: None if command == silent else answers.get(command))
    held_by(run, {}, "slurm")
    with pytest.raises(ConfigError, match=f"{silent} .*try again later"):
        cancel.cancel(run)
    assert os.path.exists(run)
