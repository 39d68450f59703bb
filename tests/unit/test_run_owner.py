"""Who lives: this process, a dead one, a zombie, a recycled pid, another boot, host, name space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lemonade_hpc.run import owner


def test_this_process_is_alive() -> None:
    who = owner.identity()
    assert who["pid"] == os.getpid()
    assert owner.judge(who) == "alive"


def test_another_process_lives_and_dies_and_is_no_more_alive_as_a_zombie() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    who = owner.identity(process.pid)
    assert owner.judge(who) == "alive"
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped yet
    assert owner.judge(who) == "gone"
    assert owner.identity(process.pid)["started"] is None
    process.wait()
    assert owner.judge(who) == "gone"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "alive"),
        ({"started": 1}, "gone"),  # the pid was given to another process since
        ({"started": None}, "gone"),
        ({"boot": "another boot"}, "gone"),
        ({"host": "elsewhere"}, "unknown"),
        ({"host": "elsewhere", "boot": "another boot"}, "unknown"),
        ({"pid_space": 1}, "unknown"),
        ({"pid_space": 1, "boot": "another boot"}, "gone"),
        ({"pid": 2**22 + 1}, "gone"),
    ],
)
def test_verdicts(change: dict[str, object], verdict: str) -> None:
    assert owner.judge(owner.identity() | change) == verdict


def test_another_users_process_that_proc_hides_is_not_called_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    who = owner.identity()
    monkeypatch.setattr(owner, "_started", lambda pid: None)
    assert owner.judge(who) == "gone"

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", forbidden)
    assert owner.judge(who) == "unknown"


def test_a_process_whose_start_is_hidden_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hidepid=1`: the folder of another user's process is there, its files may not be read."""
    who = owner.identity() | {"pid": 1}

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    read_text = Path.read_text

    def read(path: Path) -> str:
        if str(path) == "/proc/1/stat":
            raise PermissionError(1, "Operation not permitted")
        return read_text(path)

    monkeypatch.setattr(os, "kill", forbidden)
    monkeypatch.setattr(Path, "read_text", read)
    assert owner.judge(who) == "unknown"


def test_a_name_with_brackets_and_spaces_does_not_confuse(tmp_path: object) -> None:
    """The name of a program may hold any character, a closing bracket too."""
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'a) R 1 2', 0, 0, 0); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        who = owner.identity(process.pid)
        assert who["started"] >= owner.identity()["started"]
        assert owner.judge(who) == "alive"
        process.stdin.close()


def test_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    who = owner.identity() | {"host": "node7", "pid": 12}
    assert owner.describe(who) == "process 12 on node7, Slurm job 42"
    assert owner.describe(who | {"slurm_job": None}) == "process 12 on node7"
