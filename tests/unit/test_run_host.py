"""Slurm's commands for what runs inside an image: what the helper outside runs, refuses and writes down.

A real socket, real processes, and commands that note how they were called. `tests/cluster/` has a real Slurm.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import explain
from lemonade_hpc.run import chain, queue, site
from lemonade_hpc.run.host import helper, shim

NOTES_ITS_CALL = f"""#!{sys.executable} -IS
import json, os, sys
told = {{"words": sys.argv[1:], "cwd": os.getcwd(), "input": sys.stdin.read(), "env": dict(os.environ)}}
with open(__file__ + ".calls", "a") as calls:
    calls.write(json.dumps(told) + chr(10))
print("out of", os.path.basename(__file__))
print("err", file=sys.stderr)
sys.exit(int(os.environ.get("CODE", "0")))
"""
ID = "0123abcd"
NAME = f"lemonade-{ID}-coordinator"


class Outside:
    """A helper that serves a run folder, Slurm's commands, and the calls that these have had."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.run, self.folder = folder / "bin", folder / "the run", folder
        self.bin.mkdir()
        (self.run / "slurm").mkdir(parents=True)
        self.script = self.run / "slurm" / "coordinator.sbatch"
        self.script.write_text("#!/bin/bash\n")
        for name in (*helper.WORDS, "srun", "sh"):
            self.says(name, NOTES_ITS_CALL)
        self.log = self.run / "slurm" / "helper.log"
        self.helper = helper.Helper(str(self.run), str(self.log))

    def says(self, name: str, program: str) -> None:
        (self.bin / name).write_text(program)
        (self.bin / name).chmod(0o755)

    def send(self, content: bytes, *, close: bool = True) -> dict[str, Any]:
        """What is answered to a request."""
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(self.helper.path)
            asked.settimeout(20)
            asked.sendall(content)
            if close:
                asked.shutdown(socket.SHUT_WR)
            with asked.makefile("rb") as told:
                answer: dict[str, Any] = json.loads(told.read())
        return answer

    def ask(self, *command: Any, cwd: Any = None, text: Any = "") -> dict[str, Any]:
        request = {"command": list(command), "cwd": str(self.run) if cwd is None else cwd, "input": text}
        return self.send(json.dumps(request).encode() + b"\n")

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for path in self.bin.glob("*.calls") for line in path.read_text().splitlines()]

    def logged(self, count: int) -> list[dict[str, Any]]:
        """The lines of its log, once there are so many: they are written after the answer."""
        until = time.monotonic() + 20
        while True:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            if len(lines) >= count or time.monotonic() > until:
                return [json.loads(line) for line in lines]
            time.sleep(0.01)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    made = Outside(tmp_path)
    yield made
    made.helper.close()


# ---------------------------------------------------------------- what is run


def test_a_command_is_run_as_it_stands_and_its_answer_is_told(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/some.conf")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    answer = outside.ask("sbatch", "--parsable", str(outside.script), "first")
    assert answer == {"code": 3, "out": "out of sbatch\n", "err": "err\n"}
    (call,) = outside.calls()
    assert call["words"] == ["--parsable", str(outside.script), "first"]
    assert (call["cwd"], call["input"]) == (str(outside.run), "")
    assert call["env"]["SLURM_CONF"] == "/etc/some.conf" and call["env"]["SLURM_BITSTR_LEN"] == "0"
    assert "SLURM_MEM_PER_NODE" not in call["env"]  # of the job that the helper is in
    (line,) = outside.logged(1)
    assert line["command"][0] == "sbatch" and line["code"] == 3 and "refused" not in line


def test_a_script_may_come_by_standard_input_to_be_judged(outside: Outside) -> None:
    assert outside.ask("sbatch", "--test-only", "--array=0-3", text="#!/bin/sh\ntrue\n")["code"] == 0
    assert outside.calls()[0]["input"] == "#!/bin/sh\ntrue\n"


COMMANDS = (
    queue.LIST,
    site.QUESTION,
    ("squeue", "--noheader", "--states=all", "--jobs=77", "--format=%T"),
    ("squeue", "--me", "--noheader", f"--name={NAME}", "--states=PENDING", "--format=%i"),
    ("scontrol", "show", "job", "--oneliner"),
    ("scontrol", "show", "config"),
    ("sacct", "-X", "-n", "-P", "-S", "now-30days", "--name", f"{NAME},lemonade-{ID}-e1w00", "-o", "JobID,State"),
    ("sacct", "-X", "-n", "-P", "-j", "77", "-o", "State"),
    ("scancel", "77_3", "78"),
    ("scancel", "--me", f"--name={NAME}", "--state=PENDING"),
    ("sbatch", "--test-only"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_the_program_asks_is_granted(outside: Outside, command: tuple[str, ...]) -> None:
    assert outside.ask(*command)["code"] == 0 and outside.calls()[0]["words"] == list(command[1:])


def test_every_beginning_of_a_chain_is_granted(outside: Outside) -> None:
    for word in (chain.FIRST, chain.TAKE_OVER):
        assert outside.ask("sbatch", "--parsable", str(outside.script), word)["code"] == 0


def test_a_command_that_is_not_there_or_takes_too_long_is_told(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(outside.bin))
    (outside.bin / "sinfo").unlink()
    assert outside.ask(*site.QUESTION) == {
        "code": helper.NOT_FOUND, "out": "", "err": "sinfo: No such file or directory\n"
    }  # fmt: skip
    outside.says("squeue", "#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(helper, "OTHERS_S", 0.2)
    answer = outside.ask(*queue.LIST)
    assert (answer["code"], answer["err"]) == (helper.TIMED_OUT, "squeue: timed out after 0.2 s\n")


def test_a_script_is_run_by_its_real_name_wherever_it_was_asked_from(outside: Outside) -> None:
    (outside.run / "link.sbatch").symlink_to(outside.script)
    assert outside.ask("sbatch", str(outside.run / "link.sbatch"), cwd="/")["code"] == 0
    assert outside.calls()[0]["words"] == [str(outside.script.resolve())]


def test_a_command_that_submits_nothing_may_submit_nothing(tmp_path: Path, outside: Outside) -> None:
    """`status`, `cancel` and the like have no scripts of their own."""
    with pytest.raises(helper.Refused, match="is not the whole path of a file in a run folder"):
        helper.granted({"command": ["sbatch", str(outside.script)], "cwd": "/", "input": ""}, None)


def test_a_site_may_have_put_a_script_around_a_command(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is ended for its time is the one within."""
    outside.says("squeue", "#!/bin/sh\n/bin/sleep 60\necho never\n")
    monkeypatch.setattr(helper, "OTHERS_S", 0.2)
    began = time.monotonic()
    assert outside.ask(*queue.LIST)["code"] == helper.TIMED_OUT and time.monotonic() - began < 20


def test_a_working_directory_that_is_not_outside_is_none(outside: Outside) -> None:
    assert outside.ask(*queue.LIST, cwd="/opt/lemonade/nowhere")["code"] == 0
    assert outside.calls()[0]["cwd"] == str(outside.run)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("sh", "-c", "true"), "sh: allowed are sacct, sacctmgr, sbatch"),
        (("srun", "true"), "srun: allowed are"),
        (("/bin/sbatch", "--test-only"), "/bin/sbatch: allowed are"),
        (("sbatch", "--wrap=true", "--parsable"), "sbatch: without --test-only, its last word is a script"),
        (("sbatch", "--wrap=true", "SCRIPT"), "'--wrap=true' is not among the words"),
        (("sbatch", "--export=ALL", "SCRIPT"), "'--export=ALL' is not among"),
        (("sbatch",), "its last word is a script"),
        (("sbatch", "SCRIPT", "more"), "more is not the whole path of a file"),
        (("sbatch", "/etc/passwd"), "sbatch: /etc/passwd is not the whole path of a file in "),
        (("sbatch", "OUTSIDE"), "is not the whole path of a file in "),
        (("sbatch", "LINK"), "is not the whole path of a file in "),
        (("sbatch", "slurm/coordinator.sbatch"), "is not the whole path of a file in "),
        (("sbatch", "RUN/../outside.sh"), "is not the whole path of a file in "),
        (("sbatch", "RUN/slurm"), "slurm is not a file"),
        (("sbatch", "RUN/nothing"), "nothing is not a file"),
        (("squeue", "--me", "--format=%i\n--all"), "a character that cannot be printed"),
        (("scancel", "--me\n--user=root"), "a character that cannot be printed"),
        (("scancel", "--user=root", f"--name={NAME}"), "'--user=root' is not among"),
        (("scancel", "--name=somebody-elses"), "is not among"),
        (("scancel", "-w", "n1"), "jobs are named, one by one or by --name"),
        (("scancel", "--me"), "jobs are named, one by one or by --name"),
        (("scancel", "--me", "--state=PENDING"), "jobs are named"),
        (("scancel",), "jobs are named"),
        (("scontrol", "update", "JobId=7", "Priority=9"), "'update' is not among"),
        (("scontrol", "shutdown"), "'shutdown' is not among"),
        (("squeue", "--user=root"), "is not among"),
        (("sacct", "-f", "/etc/passwd"), "is not among"),
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_is_refused_and_nothing_run(
    outside: Outside, command: tuple[str, ...], why: str
) -> None:
    (outside.folder / "outside.sh").write_text("#!/bin/sh\n")
    (outside.run / "link.sh").symlink_to(outside.folder / "outside.sh")
    names = {
        "SCRIPT": str(outside.script), "OUTSIDE": str(outside.folder / "outside.sh"),
        "LINK": str(outside.run / "link.sh"),
    }  # fmt: skip
    words = [names.get(word, word.replace("RUN", str(outside.run))) for word in command]
    answer = outside.ask(*words)
    assert answer["code"] == helper.REFUSED and answer["out"] == ""
    said = answer["err"].replace(str(outside.script), "SCRIPT")
    assert said.startswith("lemonade-hpc: the helper outside the image refuses this: ") and re.search(why, said), said
    assert outside.calls() == []
    (line,) = outside.logged(1)
    assert line["refused"] in answer["err"] and line["command"] == words


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"null\n", b"[]\n", b"{}\n", b'"sbatch"\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n",
     b'{"command": "sbatch", "cwd": "/", "input": ""}\n', b'{"command": [], "cwd": "/", "input": ""}\n',
     b'{"command": [["sbatch"]], "cwd": "/", "input": ""}\n', b'{"command": ["squeue"], "cwd": 1, "input": ""}\n',
     b'{"command": ["squeue", "\\u0000"], "cwd": "/", "input": ""}\n',
     b'{"command": ["squeue", "\\ud800"], "cwd": "/", "input": ""}\n',
     b'{"command": {"a": 1}, "cwd": [], "input": []}\n'],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_request_is_refused(outside: Outside, content: bytes) -> None:
    assert outside.send(content)["code"] == helper.REFUSED
    assert "refused" in outside.logged(1)[0] and outside.calls() == []
    assert outside.ask(*queue.LIST)["code"] == 0


def test_a_message_that_is_too_large_is_refused(outside: Outside) -> None:
    large = json.dumps({"command": ["sbatch", "--test-only"], "cwd": "/", "input": "x" * helper.MOST_BYTES}).encode()
    with contextlib.suppress(ConnectionError):  # it does not read what is beyond
        assert outside.send(large + b"\n")["code"] == helper.REFUSED
    assert f"at most {helper.MOST_BYTES} bytes" in outside.logged(1)[0]["refused"] and outside.calls() == []
    assert outside.ask(*queue.LIST)["code"] == 0


def test_who_does_not_end_a_request_holds_up_nobody_else(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "READ_S", 0.5)
    slow = [socket.socket(socket.AF_UNIX) for _ in range(helper.CONNECTIONS + 4)]
    for one in slow:
        one.connect(outside.helper.path)
        one.sendall(b'{"command"')
    assert outside.ask(*queue.LIST)["code"] == 0  # as soon as the first ones are given up
    told = outside.logged(len(slow) + 1)
    assert len([line for line in told if "no whole request within 0.5 s" in line.get("refused", "")]) == len(slow)
    for one in slow:
        one.close()


def test_who_does_not_read_the_answer_holds_up_nobody_else(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "READ_S", 3.0)
    outside.says("squeue", "#!/bin/bash\nhead -c 3000000 /dev/zero | tr '\\0' x\n")
    request = json.dumps({"command": list(queue.LIST), "cwd": "/", "input": ""}).encode() + b"\n"
    deaf = [socket.socket(socket.AF_UNIX) for _ in range(helper.CONNECTIONS)]
    for one in deaf:
        one.connect(outside.helper.path)
        one.sendall(request)
    assert len(outside.ask(*queue.LIST)["out"]) == 3_000_000
    for one in deaf:
        one.close()


def test_a_user_with_too_many_processes_is_answered_later(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    real = helper.threading.Thread

    def refuse(*words: Any, **options: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helper.threading, "Thread", refuse)
    with contextlib.suppress(ConnectionError, ValueError):
        outside.ask(*queue.LIST)
    monkeypatch.setattr(helper.threading, "Thread", real)
    assert outside.ask(*queue.LIST)["code"] == 0


def test_whatever_goes_wrong_is_answered_and_written_down(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: Any) -> Any:
        raise UnicodeEncodeError("ascii", "\xfc", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr(helper, "_run", fail)
    answer = outside.ask(*queue.LIST)
    assert answer["code"] == helper.REFUSED and "the helper outside the image failed: UnicodeEnc" in answer["err"]
    assert "UnicodeEncodeError" in outside.logged(1)[0]["refused"]


def test_who_leaves_before_the_answer_does_no_harm(outside: Outside) -> None:
    outside.says("squeue", "#!/bin/bash\nsleep 0.3; head -c 3000000 /dev/zero | tr '\\0' x\n")
    request = {"command": list(queue.LIST), "cwd": "/", "input": ""}
    with socket.socket(socket.AF_UNIX) as asked:
        asked.connect(outside.helper.path)
        asked.sendall(json.dumps(request).encode() + b"\n")
    assert outside.logged(1)[0]["refused"] == "Broken pipe" or "refused" in outside.logged(1)[0]
    assert len(outside.ask(*queue.LIST)["out"]) == 3_000_000


def test_ten_thousand_random_messages_crash_nothing_and_are_all_written_down(outside: Outside) -> None:
    rng = random.Random(4)
    whole = json.dumps({"command": ["squeue", "--me"], "cwd": "/", "input": ""}).encode() + b"\n"
    for k in range(10_000):
        if k % 2:
            content = rng.randbytes(rng.randrange(200))
        else:  # one that was fine, hurt somewhere
            place = rng.randrange(len(whole))
            content = whole[:place] + rng.randbytes(rng.randrange(1, 4)) + whole[place + rng.randrange(3) :]
        with contextlib.suppress(ConnectionError):  # it has ended its line early
            answer = outside.send(content)
            assert answer["code"] in (0, helper.REFUSED), (content, answer)
    assert len(outside.logged(10_000)) == 10_000
    assert outside.ask(*queue.LIST)["code"] == 0


def test_only_its_owner_can_open_the_socket_and_the_peer_is_looked_at(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stat.S_IMODE(os.stat(outside.helper.folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(outside.helper.path).st_mode) == 0o600
    here = os.getuid()
    monkeypatch.setattr(helper.os, "getuid", lambda: here + 1)
    with contextlib.suppress(ConnectionError):  # it reads nothing of what is said
        assert outside.ask(*queue.LIST)["code"] == helper.REFUSED
    assert outside.calls() == []
    assert outside.logged(1)[0]["refused"] == f"user {here} is not the one whose helper this is"


def test_a_log_that_cannot_be_written_yet_keeps_nobody_from_asking(outside: Outside) -> None:
    """`submit` asks before there is a run folder; a disk may be full."""
    shutil.rmtree(outside.run)
    assert outside.ask(*site.QUESTION, cwd="/")["code"] == 0
    (outside.run / "slurm").mkdir(parents=True)
    outside.log.mkdir()
    assert outside.ask(*site.QUESTION, cwd="/")["code"] == 0
    outside.log.rmdir()
    assert outside.ask(*site.QUESTION, cwd="/")["code"] == 0
    assert [line["command"][0] for line in outside.logged(3)] == ["sinfo"] * 3


def test_what_was_asked_where_there_is_no_run_folder_is_written_down_all_the_same(
    outside: Outside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`doctor`, or `submit --print`: in a file of the user's own, which is no link."""
    shutil.rmtree(outside.run)
    monkeypatch.setattr(helper, "ELSEWHERE", str(tmp_path / "log-{}"))
    outside.ask(*site.QUESTION, cwd="/")
    outside.ask("scancel", "x" * 100_000, cwd="/")
    until = time.monotonic() + 10
    while len(outside.helper._lines) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    outside.helper.close()
    lines = [json.loads(line) for line in (tmp_path / f"log-{os.getuid()}").read_text().splitlines()]
    assert sorted(line["code"] for line in lines) == [0, helper.REFUSED]  # each is written once it is answered
    assert max(len(str(line["command"])) for line in lines) < 2 * helper.MOST_NOTED
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    outside.helper._lines = ["a line\n"]
    outside.helper._write(str(tmp_path / "link"))
    assert not (tmp_path / "elsewhere").exists() and outside.helper._lines


def test_a_helper_that_is_closed_leaves_nothing(outside: Outside) -> None:
    outside.helper.close()
    assert not os.path.exists(outside.helper.folder)
    with pytest.raises(FileNotFoundError):
        outside.ask(*queue.LIST)


# ---------------------------------------------------------------- the shim inside


def shimmed(
    outside: Outside, name: str, *words: str, text: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    """A command of Slurm's as what is inside has it."""
    path = outside.folder / "shims" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable} -IS\n{Path(shim.__file__).read_text()}")
    path.chmod(0o755)
    environment = {shim.SOCKET: outside.helper.path} | environ
    return subprocess.run(
        [path, *words], input=text, capture_output=True, text=True, check=False, cwd=outside.run, env=environment
    )


def test_a_shim_says_what_the_command_outside_says(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE", "5")
    done = shimmed(outside, "squeue", *queue.LIST[1:])
    assert (done.returncode, done.stdout, done.stderr) == (5, "out of squeue\n", "err\n")
    done = shimmed(outside, "sbatch", "--test-only", text="#!/bin/sh\n")
    assert done.returncode == 5 and [call["input"] for call in outside.calls() if call["input"]] == ["#!/bin/sh\n"]
    assert {call["cwd"] for call in outside.calls()} == {str(outside.run)}
    done = shimmed(outside, "srun", "true")
    assert done.returncode == helper.REFUSED and "srun: allowed are" in done.stderr


def test_a_shim_without_a_helper_says_so(outside: Outside) -> None:
    done = shimmed(outside, "squeue", LEMONADE_SOCKET="/nowhere")
    assert done.returncode == shim.NO_HELPER and "squeue: nothing outside the image answers" in done.stderr


# ---------------------------------------------------------------- the command that is started inside

PASSES_ON = f"""#!{sys.executable} -IS
import os, signal, sys, time
heard = []
for which in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(which, lambda number, frame: heard.append(number))
open({{ready!r}}, "w").close()
until = time.monotonic() + 30
while not heard and time.monotonic() < until:
    time.sleep(0.01)
sys.exit(heard[0])
"""


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_reach_what_runs_inside_and_its_exit_code_is_the_helpers(
    outside: Outside, tmp_path: Path, which: signal.Signals
) -> None:
    ready, image = tmp_path / "ready", tmp_path / "lemonade.sif"
    image.touch()
    outside.says("apptainer", PASSES_ON.format(ready=str(ready)))
    command = (sys.executable, helper.__file__, "--image", str(image), "status", str(outside.run))
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        until = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(which)
        assert process.wait(20) == which


def test_the_environment_inside_is_what_is_named() -> None:
    poisoned = {
        "PYTHONPATH": "/broken", "HOME": "/nowhere", "LD_PRELOAD": "/broken.so", "BASH_ENV": "/broken.sh",
        "SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2", "PATH": os.environ["PATH"],
        "APPTAINERENV_PYTHONPATH": "/broken", "SINGULARITYENV_LD_PRELOAD": "/broken.so", "APPTAINERENV_TERM": "x",
    }  # fmt: skip
    assert not any(key.startswith("SINGULARITYENV_") for key in helper.environment(poisoned))
    passed = {k: v for k, v in helper.environment(poisoned).items() if k.startswith("APPTAINERENV_")}
    assert passed == {
        "APPTAINERENV_SLURM_JOB_ID": "7", "APPTAINERENV_CUDA_VISIBLE_DEVICES": "1", "APPTAINERENV_OMP_NUM_THREADS": "2"
    }  # fmt: skip


def test_folders_are_bound_once_by_their_own_names() -> None:
    assert helper.outermost(["/a/b", "/a/bc", "/a/b/c/d", "/a/b/", "/x y"]) == ["/a/b", "/a/bc", "/x y"]
    assert helper.inside("/i.sif", ["/a b"], nv=True) == [
        "apptainer", "--quiet", "exec", "--cleanenv", "--no-home", "--no-eval", "--nv", "--mount",
        'type=bind,"src=/a b","dst=/a b"', "/i.sif",
    ]  # fmt: skip


def test_what_a_link_leads_to_is_bound_too(tmp_path: Path) -> None:
    """`~/scratch` is one on many a cluster; names may have any character."""
    real, home = tmp_path / 'lr=0.1,bs=64: "a"', tmp_path / "home"
    (real / "my").mkdir(parents=True)
    home.mkdir()
    (home / "scratch").symlink_to(real)
    words = helper.inside("/i.sif", [str(home), str(home / "scratch" / "my")], nv=False)
    mounts = [next(csv.reader([word])) for word in words if word.startswith("type=")]
    assert mounts == [["type=bind", f"src={path}", f"dst={path}"] for path in sorted([str(home), str(real / "my")])]
    assert helper.existing(str(home / "scratch" / "new" / "run")) == str(home / "scratch")


def test_modules_beside_the_helper_or_on_pythonpath_are_not_imported(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "path"):
        folder.mkdir(exist_ok=True)
        (folder / "json.py").write_text("raise ImportError('not this one')\n")
        (folder / "argparse.py").write_text("raise ImportError('not this one')\n")
    shutil.copy(helper.__file__, tmp_path / "lemonade-hpc")
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "path")}
    command = [sys.executable, "lemonade-hpc", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Run lemonade-hpc in its image, from outside." in done.stdout, done.stderr


def test_the_data_of_a_run_are_seen_by_test(tmp_path: Path) -> None:
    assert helper._first(["test", "--root", "/data", "my"]) == helper._first(["test", "my", "--root=/data"]) == "my"


def test_without_apptainer_or_an_image_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert helper.main(helper._parse(["status", "run"])) == 2
    assert "error: apptainer cannot be found here; it may be a module" in capsys.readouterr().err
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    assert helper.main(helper._parse(["status", "run"])) == 2
    said = capsys.readouterr().err
    assert "lemonade.sif: No such file or directory; copy the image (.sif) there, or name another: --image" in said
    (tmp_path / "apptainer").write_text("#!/bin/sh\nexit 255\n")
    (tmp_path / "lemonade.sif").touch()
    assert helper.main(helper._parse(["status", "run"])) == 255
    assert "could not start the image; doctor may say why" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "mode", "called"),
    [("lemonade-hpc", 0o755, "python3 lemonade-hpc"), ("./lemonade-hpc", 0o755, "./lemonade-hpc"),
     ("./lemonade-hpc", 0o644, "python3 ./lemonade-hpc"), ("a b/lemonade-hpc", 0o755, "'a b/lemonade-hpc'")],
)  # fmt: skip
def test_what_is_inside_tells_people_to_call_the_helper_as_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, mode: int, called: str
) -> None:
    """Also in the log of a job that follows from it."""
    monkeypatch.chdir(tmp_path)
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).touch(mode)
    Path(path).chmod(mode)
    monkeypatch.setattr(sys, "argv", [path, "status"])
    assert helper._called(helper._parse(["status"])) == called
    more = ["--image", "/x y.sif", "--bind", "/d"]
    assert helper._called(helper._parse([*more, "status"])) == f"{called} --image '/x y.sif' --bind /d"
    monkeypatch.setenv(helper.AS, called)
    assert (
        helper.environment(os.environ)["APPTAINERENV_LEMONADE_AS"]
        == called
        == helper.outside_a_job(os.environ)[helper.AS]
    )
    assert explain.command("stop", "my run") == f"{called} stop 'my run'"


def test_what_the_helper_was_called_is_told_inside_and_so_is_its_version(
    outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lemonade.sif").touch()
    outside.says("apptainer", '#!/bin/sh\necho "$APPTAINERENV_LEMONADE_AS|$*"\n')
    command = [sys.executable, helper.__file__, "--image", "lemonade.sif", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    called, _, words = done.stdout.strip().partition("|")
    assert (
        called == f"{helper.__file__} --image lemonade.sif"
        or called == f"python3 {helper.__file__} --image lemonade.sif"
    )
    assert words.endswith("lemonade-hpc --version")


@pytest.mark.parametrize(("number", "code"), [(errno.ENOENT, 2), (errno.EACCES, 2), (errno.EIO, 3), (errno.ESTALE, 3)])
def test_an_image_that_cannot_be_read_now_ends_no_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(helper.shutil, "which", lambda name: name)

    def away(path: str, mode: str = "r") -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(helper, "open", away, raising=False)
    assert helper.main(helper._parse(["status", "run"])) == code
    said = capsys.readouterr().err
    assert os.strerror(number) in said and ("try again later" in said) == (code == 3)


def test_a_folder_by_another_name_is_known_inside_by_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's PWD may lead through a link, which is not there inside: Apptainer starts where PWD says."""
    (tmp_path / "real").mkdir()
    (tmp_path / "scratch").symlink_to("real")
    monkeypatch.chdir(tmp_path / "scratch")
    monkeypatch.setenv("PWD", str(tmp_path / "scratch"))
    assert helper.environment(os.environ)["PWD"] == str(tmp_path / "real")


def test_what_is_asked_of_slurm_is_what_the_helper_knows() -> None:
    """Every command line of the transcript that the program was recorded with."""
    transcript = json.loads((Path(__file__).parents[1] / "cluster/transcripts/slurm-22.05.json").read_text())
    lines = {line["command"] for line in transcript if "command" in line}
    assert len(lines) > 10
    names = {name.partition(" ")[0] for name in lines}
    assert names <= helper.WORDS.keys()
