"""The Slurm backend beneath a real Slurm: what it asks for, what answers mean, and how seldom it asks.

`tests/cluster/` runs it on a real one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemonade_hpc import config as configs
from lemonade_hpc.config import Cluster, ConfigError
from lemonade_hpc.run import queue as slurm_queue
from lemonade_hpc.run import request, session, slurm
from lemonade_hpc.run.backends import NotNow
from lemonade_hpc.run.coordinator import RunFailed

sys.path.insert(0, str(Path(__file__).parent))

import fake_slurm  # noqa: E402
import run_doubles as doubles  # noqa: E402
from fake_slurm import Answer, FakeSlurm, Job  # noqa: E402

HELLO = [{"say": "hello"}]


class Queue(FakeSlurm):
    """A fake Slurm that notes what it is asked, and can be told what it has in its queue."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, ...]] = []
        self.scripts: list[str] = []
        """What sbatch was given."""
        self.sinfo: str | None = None
        """What sinfo says, if not what these nodes are."""

    def answer(self, command: Sequence[str], stdin: str | None) -> Answer:
        self.asked.append(tuple(command))
        if command[0] == "sbatch":
            self.scripts.append(Path(command[-1]).read_text() if stdin is None else stdin)
        if command[0] == "sinfo" and self.sinfo is not None:
            return Answer(0, self.sinfo)
        return self.run(command, stdin)

    def shows(self, jobs: dict[str, tuple[str, str]], reason: str = "None") -> None:
        """Have nothing but these: name and state by id."""
        self.jobs = [
            Job(int(id.partition("_")[0]), int(id.partition("_")[2]) if "_" in id else None, {"job-name": name}, "",
                self.now, state, reason, node="n3", begun=True)
            for id, (name, state) in jobs.items()
        ]  # fmt: skip
        self._queue = list(self.jobs)

    def silent(self) -> None:
        """Have nobody answer any more."""
        self.controller = self.accounting = False

    def calls(self, name: str) -> list[tuple[str, ...]]:
        return [command for command in self.asked if command[0] == name]


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    fake_slurm.install(monkeypatch, made.answer)
    monkeypatch.setattr(slurm.time, "monotonic", lambda: made.now)
    return made


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


def cluster(**more: Any) -> Cluster:
    return Cluster(backend="slurm", **more)


def backend(run: Path, **more: Any) -> tuple[slurm.SlurmBackend, list[str]]:
    notes: list[str] = []
    return slurm.SlurmBackend(run, "0123456789abcdef", cluster(**more), notes.append), notes


def turns(one: slurm.SlurmBackend, queue: Queue, seconds: float) -> None:
    """Let time pass in steps of a second."""
    for _ in range(int(seconds)):
        queue.now += 1
        one.step()


# ---------------------------------------------------------------- what is asked for


def test_the_batch_script_says_what_the_settings_say(tmp_path: Path) -> None:
    settings = cluster(
        partition="gpu", account="lab", qos="long", constraint="a100", exclude="n7", gpus_per_worker=2,
        cpus_per_worker=3, mem_gb=1.5, time_min=90, setup=("module load cuda",),
        extra={"reservation": "course", "exclusive": True},
    )  # fmt: skip
    lines = request.script(settings, "some-name", tmp_path).splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]
    assert [o for o in options if not o.startswith(("output", "error", "open-mode", "signal"))] == [
        "account=lab", "constraint=a100", "cpus-per-task=3", "exclude=n7", "exclusive", "gres=gpu:2",
        "job-name=some-name", "mem=1536M", "no-requeue", "nodes=1", "partition=gpu", "qos=long", "reservation=course",
        "time=90",
    ]  # fmt: skip
    assert "module load cuda" in lines and "export OMP_NUM_THREADS=3" in lines
    assert [line for line in lines if line.startswith("srun ") and "--cpus-per-task=3" in line]


def test_what_is_not_set_is_not_asked_for(tmp_path: Path) -> None:
    text = request.script(cluster(gpus_per_worker=0), "some-name", tmp_path)
    for option in ("gres", "wckey", "partition", "account", "qos", "constraint", "exclude"):
        assert f"--{option}" not in text
    assert "--gres=gpu:h100:1" in request.script(cluster(gres="gpu:h100:1"), "some-name", tmp_path)


# ---------------------------------------------------------------- refusals


def test_a_refusal_is_told_before_anything_is_written(run: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.data_sets, "load", lambda data: doubles.images())
    settings = doubles.config(cluster={"backend": "slurm", "partition": "nosuch"})
    with pytest.raises(
        ConfigError, match=r"cluster: Slurm refuses a worker .*It says: .*invalid partition specified: nosuch\n"
    ):
        session.search(settings, run, doubles.Notes())
    assert not run.exists()
    assert "--partition=nosuch" in queue.scripts[0]


LIMITS = (
    "AssocMaxSubmitJobLimit", "AssocGrpSubmitJobsLimit", "QOSMaxSubmitJobPerUserLimit", "QOSGrpSubmitJobsLimit",
    "MaxSubmitJobsPerAccount",
)  # fmt: skip


@pytest.mark.parametrize(
    "trouble",
    [{"mute": True}, {"controller": False}, {"available": False}, *({"limits": {name: 0}} for name in LIMITS)],
)
def test_a_slurm_that_cannot_say_just_now_is_no_refusal(queue: Queue, trouble: dict[str, Any]) -> None:
    vars(queue).update(trouble)
    slurm.check(cluster(mem_gb=4))
    assert queue.calls("sbatch") == [("sbatch", "--test-only")]
    assert queue.run(("sbatch", "--test-only"), queue.scripts[0]).code == 1


@pytest.mark.parametrize("gone", slurm.COMMANDS)
def test_a_missing_command_is_named(queue: Queue, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None if name == gone else name)
    with pytest.raises(ConfigError, match=rf"got slurm, but {gone} cannot be found here"):
        slurm.check(cluster())


def test_a_refused_submission_ends_the_run_in_slurms_words(
    run: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles.install(monkeypatch)
    settings = doubles.config(cluster={"backend": "slurm", "workers": 4, "account": "nosuch"})
    session._prepare(settings, doubles.images(), run)
    made = doubles.start(run, settings, backend(run, workers=4, account="nosuch")[0])
    with pytest.raises(RunFailed, match=r"no worker can be started: .*Invalid account or account/partition"):
        made.search()
    made.close()


def test_a_partition_that_is_drained_refuses_nobody_for_good(
    run: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "sbatch: error: Batch job submission failed: Required partition not available (inactive or drain)"
    monkeypatch.setattr(queue, "run", lambda command, stdin: Answer(1, "", said))
    slurm.check(cluster())
    one, notes = backend(run)
    one.launch(["w0"], [])
    assert len(notes) == 1 and "inactive or drain" in notes[0]


def test_submissions_that_fail_in_a_way_that_may_pass_are_tried_less_and_less_often_and_start_nobody(
    run: Path, queue: Queue
) -> None:
    one, _ = backend(run, submit_s=10)
    waits = []
    for k in range(8):
        queue.controller = True
        assert one.room() > 0
        queue.controller = False
        one.launch([f"w{k}"], [])
        queue.controller = True
        began = queue.now
        while not (room := one.room()):
            queue.now += 5
        waits.append(queue.now - began)
        assert room == 1  # to see whether they go on
    assert waits == [20, 40, 80, 160, 320, 600, 600, 600]
    turns(one, queue, 130)
    assert not one.alive("w0") and one.ended("w0") == "not started"
    one.launch(["w9"], [])
    assert not one._between_s() > 10
    queue.shows({})
    turns(one, queue, 300)
    assert one.ended("w9") == "died"  # this one was accepted


def test_what_is_submitted_does_not_see_the_job_that_its_coordinator_is_in(
    run: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its srun would take that job's memory, tasks and binding for options."""
    own = {"SLURM_MEM_PER_NODE": "4096", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "7"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "a", "HOME": "/home/x", "SBATCH_ACCOUNT": "lab"}
    for key, value in (own | kept).items():
        monkeypatch.setenv(key, value)
    answer, seen = queue.answer, dict[str, str]()
    fake_slurm.install(monkeypatch, lambda command, stdin: seen.update(os.environ) or answer(command, stdin))  # type: ignore[func-returns-value]
    one, _ = backend(run)
    one.launch(["w0"], [])
    assert kept.items() <= seen.items() and not own.keys() & seen.keys()
    assert own.items() <= os.environ.items()
    asked: list[dict[str, str]] = []
    monkeypatch.setattr(slurm.subprocess, "run", lambda *words, env, **more: asked.append(env) or Answer(0))
    monkeypatch.setattr(slurm_queue, "subprocess", slurm.subprocess)
    with contextlib.suppress(AttributeError):
        slurm.refusal("#!/bin/sh")
    with contextlib.suppress(AttributeError):
        slurm_queue.ask("squeue")
    assert len(asked) == 2 and not any(own.keys() & env.keys() for env in asked)


def test_an_sbatch_that_cannot_be_run_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.refusal("#!/bin/bash") is None


# ---------------------------------------------------------------- launches


def test_a_launch_is_one_call_and_the_next_waits(run: Path, queue: Queue) -> None:
    one, _ = backend(run, max_array=3)
    assert one.room() == 3
    one.launch(["w0", "w1", "w2"], [])
    assert len(queue.calls("sbatch")) == 1
    queue.now += 9
    assert one.room() == 0
    queue.now += 1
    assert one.room() == 3
    assert "--array=0-2%3" in queue.scripts[0] and "--job-name=lemonade-01234567-w0" in queue.scripts[0]
    assert len(list((run / "workers/w0/job").glob(f"{queue.jobs[0].number}_*_submitted.pkl"))) == 3


def test_a_submission_that_timed_out_though_it_was_accepted_is_found_and_given_its_tasks(
    run: Path, queue: Queue
) -> None:
    queue.mute = True
    one, notes = backend(run)
    one.launch(["w0", "w1"], [])
    assert len(notes) == 1 and "Socket timed out" in notes[0]
    turns(one, queue, 300)
    assert one.alive("w0") and one.alive("w1")
    written = sorted(path.name for path in (run / "workers/w0/job").glob("*_submitted.pkl"))
    assert written == [f"{job.id}_submitted.pkl" for job in queue.jobs] and len(written) == 2


def test_a_submission_that_timed_out_and_was_not_accepted_is_given_up(run: Path, queue: Queue) -> None:
    queue.mute = True
    one, _ = backend(run)
    one.launch(["w0"], [])
    queue.shows({})
    turns(one, queue, 59)
    assert one.alive("w0")  # seen missing once
    turns(one, queue, 62)
    assert not one.alive("w0")


def test_what_another_coordinator_submitted_is_found_by_name(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    one.adopt("w1", "w0", 1)
    queue.shows({"5_1": ("lemonade-01234567-w0", "RUNNING"), "5_0": ("lemonade-01234567-w0", "FAILED")})
    turns(one, queue, 200)
    assert one.alive("w1")
    one.kill("w1")
    one.kill("w1")
    turns(one, queue, 2)
    assert queue.calls("scancel") == [("scancel", "5_1", "5_1")]  # at once, however many


def test_an_array_is_no_larger_than_the_site_takes(run: Path, queue: Queue) -> None:
    queue.max_array = 10
    one, _ = backend(run)
    assert one.room() == 10 and one.room() == 10
    assert len(queue.asked) == 1
    queue.silent()
    assert backend(run, max_array=7)[0].room() == 7
    other, _ = backend(run, max_array=20)
    assert other.room() == 20  # nobody answered, which is no answer
    queue.controller = True
    queue.now += 60
    assert other.room() == 10


def test_a_reason_to_wait_that_does_not_pass_is_told_once(run: Path, queue: Queue) -> None:
    one, notes = backend(run)
    one.adopt("w0", "w0", 0)
    for reason in (
        "Resources",
        "Priority",
        "ReqNodeNotAvail, UnavailableNodes:n1",
        "PartitionTimeLimit",
        "JobHeldUser",
        "AssocGrpCPUMinutesLimit",
        "QOSGrpGRESMinutes",
    ):
        queue.shows({"5": ("lemonade-01234567-w0", "PENDING")}, reason)
        turns(one, queue, 200)
    assert notes == [
        f"job 5 waits for a reason that does not pass by itself: {reason}"
        for reason in ("PartitionTimeLimit", "JobHeldUser", "AssocGrpCPUMinutesLimit", "QOSGrpGRESMinutes")
    ]


# ---------------------------------------------------------------- sources


ONELINE = (
    "JobId=78 ArrayJobId=77 ArrayTaskId=3 JobName=lemonade-01234567-w0 JobState=RUNNING Reason=None NodeList=n2\n"
    "JobId=77 ArrayJobId=77 ArrayTaskId=4,6-7%3 JobName=lemonade-01234567-w0 JobState=PENDING Reason=Resources\n"
    "JobId=79 JobName=lemonade-01234567-w9 JobState=PENDING Reason=Priority NodeList=(null)\nrubbish\n\n"
)


def answers(monkeypatch: pytest.MonkeyPatch, **said: str | None) -> list[str]:
    """Have each command of Slurm say this, or fail."""
    asked: list[str] = []

    def ask(*command: str) -> str | None:
        asked.append(command[0])
        return said.get(command[0])

    monkeypatch.setattr(slurm_queue, "ask", ask)
    return asked


def test_scontrol_answers_where_squeue_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, scontrol=ONELINE)
    answer = slurm_queue.jobs_of("0123456789")
    assert answer is not None and answer.all and asked == ["squeue", "scontrol"]
    assert answer.jobs == {
        ("w0", 3): slurm_queue.Job("77_3", "RUNNING", "None", "n2"),
        ("w9", 0): slurm_queue.Job("79", "PENDING", "Priority"),
        **{("w0", place): slurm_queue.Job(f"77_{place}", "PENDING", "Resources") for place in (4, 6, 7)},
    }  # fmt: skip


def test_a_controller_that_hangs_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that must leave is to hear of that within a minute."""
    asked, now = answers(monkeypatch), [0.0]
    ask = slurm_queue.ask

    def slowly(*command: str) -> str | None:
        now[0] += slurm_queue.QUERY_TIMEOUT_S
        return ask(*command)

    monkeypatch.setattr(slurm_queue, "ask", slowly)
    monkeypatch.setattr(slurm_queue, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert slurm_queue.jobs_of("0123456789") is None and asked == ["squeue", "sacct"]


def test_sacct_knows_what_the_queue_has_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what it does not know may be too young for it."""
    past = "77_3|lemonade-01234567-w0|CANCELLED by 1000|n1\n77_4|lemonade-01234567-w0|NODE_FAIL|n2\ngarbage\n"
    answers(monkeypatch, squeue="77_3|lemonade-01234567-w0|RUNNING|None\n", sacct=past)
    answer = slurm_queue.jobs_of("0123456789", [("w0", 3), ("w0", 4)])
    assert answer is not None and answer.all
    assert {place: job.state for place, job in answer.jobs.items()} == {("w0", 3): "RUNNING", ("w0", 4): "NODE_FAIL"}
    assert answer.jobs["w0", 4].node == "n2"
    answers(monkeypatch, sacct=past)
    answer = slurm_queue.jobs_of("0123456789", [("w0", 3)])
    assert answer is not None and not answer.all and answer.jobs["w0", 3].state == "CANCELLED"


def test_tasks_that_were_cancelled_together_are_known_and_one_that_had_begun_counts_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accounting lists it twice."""
    past = "77_3|lemonade-01234567-w0|RUNNING\n77_[2-4,8-12:2%5]|lemonade-01234567-w0|CANCELLED by 1000\n"
    for said in (past, "\n".join(past.splitlines()[::-1])):
        answers(monkeypatch, squeue="", sacct=said)
        answer = slurm_queue.jobs_of("0123456789", [("w0", 3)])
        assert answer is not None
        states = {place: job.state for (_, place), job in answer.jobs.items()}
        assert states == {3: "RUNNING"} | dict.fromkeys((2, 4, 8, 10, 12), "CANCELLED")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("squeue", "77|lemonade-01234567-w0|CANCELLED|Resources\n77_0|lemonade-01234567-w0|RUNNING|None\n"),
        (
            "scontrol",
            "JobId=78 ArrayJobId=77 ArrayTaskId=0 JobName=lemonade-01234567-w0 JobState=RUNNING Reason=None\n"
            "JobId=77 ArrayJobId=77 ArrayTaskId=4294967294 JobName=lemonade-01234567-w0 JobState=CANCELLED Reason=x\n",
        ),
        ("sacct", "77_0|lemonade-01234567-w0|RUNNING\n77|lemonade-01234567-w0|CANCELLED by 1000\n"),
    ],
)
def test_tasks_that_were_cancelled_by_name_before_they_began_are_known_without_their_index(
    monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    answers(monkeypatch, **{command: said})
    answer = slurm_queue.jobs_of("0123456789", [("w0", 0), ("w0", 2), ("w9", 1)])
    assert answer is not None
    found = {place: (job.id, job.state) for place, job in answer.jobs.items()}
    assert found == {("w0", 0): ("77_0", "RUNNING"), ("w0", 2): ("77_2", "CANCELLED")}


@pytest.mark.parametrize(
    ("squeue", "state", "known"),
    [("", "PENDING", {3}), ("", "CANCELLED by 1000", {2, 3}), (None, "PENDING", {3}), (None, "CANCELLED by 1000", {3})],
)
def test_what_accounting_says_of_tasks_together_is_late(
    monkeypatch: pytest.MonkeyPatch, squeue: str | None, state: str, known: set[int]
) -> None:
    """The second may run by now, or have been cancelled by itself, which nobody knows any more."""
    past = f"77_[2,4]|lemonade-01234567-w0|{state}|None assigned\n77_3|lemonade-01234567-w0|FAILED|n1\n"
    answers(monkeypatch, squeue=squeue, sacct=past.replace("[2,4]", "[2]"))
    answer = slurm_queue.jobs_of("0123456789", [("w0", 2), ("w0", 3)])
    assert answer is not None and {place for _, place in answer.jobs} == known


def test_lists_of_tasks_are_asked_for_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho $SLURM_BITSTR_LEN\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm_queue.ask("scontrol", "show", "job") == "0\n"


def test_where_nobody_answers_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch)
    assert slurm_queue.jobs_of("0123456789", [("w0", 3)]) is None and asked == ["squeue", "scontrol", "sacct"]


def test_a_job_that_only_sacct_might_know_is_not_given_up(run: Path, queue: Queue, monkeypatch: Any) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    answers(monkeypatch, sacct="")
    turns(one, queue, 5000)
    assert one.alive("w0")


@pytest.mark.parametrize(
    ("state", "how"),
    [("PREEMPTED", "preempted"), ("NODE_FAIL", "node failure"), ("TIMEOUT", "time limit"), ("CANCELLED", "cancelled"),
     ("OUT_OF_MEMORY", "out of memory"), ("FAILED", "died"), ("COMPLETED", "completed")],
)  # fmt: skip
def test_how_a_worker_ended_is_asked_of_slurm(run: Path, queue: Queue, state: str, how: str) -> None:
    """It has said that it leaves, so one look at its job's end is enough."""
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    one.heard("w0", HELLO)
    queue.shows({"5": ("lemonade-01234567-w0", "COMPLETING")})
    assert one.ended("w0") is None
    turns(one, queue, 61)
    assert one.ended("w0") is None
    queue.shows({"5": ("lemonade-01234567-w0", state)})
    turns(one, queue, 61)
    assert one.ended("w0") == how
    queue.asked.clear()
    one.heard("w0", HELLO)
    turns(one, queue, 100)
    assert queue.asked == []


def test_a_successor_waits_before_its_first_calls(run: Path, queue: Queue) -> None:
    """The coordinator before may have called a moment ago."""
    one = slurm.SlurmBackend(run, "0123456789abcdef", cluster(), [].append, at_once=False)
    one.adopt("w0", "w0", 0)
    assert one.room() == 0
    turns(one, queue, 59)
    assert queue.asked == [] and one.room() == 0
    queue.now += 1
    assert one.room() > 0 and queue.asked == [("scontrol", "show", "config")]
    turns(one, queue, 59)
    assert len(queue.asked) == 1
    turns(one, queue, 1)
    assert len(queue.calls("squeue")) == 1


@pytest.mark.parametrize(
    ("gres", "expected"),
    [(None, 3), ("gpu:2", 2), ("gpu:a100:4", 4), ("gpu:a100", 1), ("gpu", 1), ("shard:8", 0), ("mps:1,gpu:h100:2", 2)],
)
def test_gpus_are_counted_from_what_is_asked_for(gres: str | None, expected: int) -> None:
    assert request.gpus_of(cluster(gpus_per_worker=3, gres=gres)) == expected


def test_options_that_a_site_does_not_take_are_left_out(tmp_path: Path) -> None:
    text = request.script(cluster(skip=("mem", "gres", "cpus-per-task", "no-requeue")), "some-name", tmp_path)
    for option in ("mem", "gres", "cpus-per-task", "no-requeue"):
        assert f"--{option}" not in text
    with pytest.raises(ConfigError, match=r"cluster.skip"):
        configs.from_dict({"data": {"name": "digits"}, "cluster": {"skip": ["time"]}}, "test")


def test_reservation_and_nodes_to_avoid_are_asked_for(tmp_path: Path) -> None:
    settings = cluster(reservation="course", exclude="n7")
    assert request.parameters(settings, "x", ["n9", "n3"])["exclude"] == "n7,n3,n9"
    assert "#SBATCH --reservation=course" in request.script(settings, "some-name", tmp_path)


# ---------------------------------------------------------------- lives


@pytest.mark.parametrize("state", sorted(slurm_queue.ENDED))
def test_a_job_that_has_ended_counts_as_gone_once_that_is_seen_twice(run: Path, queue: Queue, state: str) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.shows({"5": ("lemonade-01234567-w0", state)})
    turns(one, queue, 30)
    assert one.alive("w0")
    turns(one, queue, 60)
    assert not one.alive("w0")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "SOMETHING_NEW"])
def test_any_other_state_is_a_life(run: Path, queue: Queue, state: str) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.shows({"5": ("lemonade-01234567-w0", state)})
    turns(one, queue, 2000)
    assert one.alive("w0")


def test_a_job_that_ended_once_and_began_anew_has_as_long_to_end_again(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    for state, seconds in (("COMPLETING", 120), ("RUNNING", 2000), ("COMPLETING", 300)):
        queue.shows({"5": ("lemonade-01234567-w0", state)})
        turns(one, queue, seconds)
        assert one.alive("w0")


@pytest.mark.parametrize("goodbye", [True, False])
def test_a_job_that_does_not_come_to_its_end_is_waited_for_so_long(run: Path, queue: Queue, goodbye: bool) -> None:
    """Its node hangs: neither the worker's place nor its child are to wait for somebody to mend that."""
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.shows({"5": ("lemonade-01234567-w0", "COMPLETING")})
    if goodbye:
        assert one.ended("w0") is None
    turns(one, queue, 590)
    assert one.alive("w0") and (not goodbye or one.ended("w0") is None)
    turns(one, queue, 200)
    assert not one.alive("w0") and one.ended("w0") == "hung at its end"


def test_a_failed_query_is_not_no_job(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.silent()
    turns(one, queue, 5000)
    assert one.alive("w0")


def test_a_worker_that_speaks_is_alive_whatever_slurm_says(run: Path, queue: Queue) -> None:
    """With its slurmd killed, its node counts as failed, and it goes on."""
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.shows({"5": ("lemonade-01234567-w0", "NODE_FAIL")})
    for _ in range(100):
        one.heard("w0", HELLO)
        turns(one, queue, 5)
    assert one.alive("w0") and queue.asked == []
    turns(one, queue, 300)
    assert not one.alive("w0")


def test_one_that_was_at_work_may_be_missing_for_a_while(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    one.heard("w0", HELLO)
    turns(one, queue, 800)
    assert one.alive("w0")
    turns(one, queue, 300)
    assert not one.alive("w0")


def test_slurm_is_asked_once_a_minute_at_most_and_never_while_all_speak(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    names = [f"w{k}" for k in range(50)]
    for k, name in enumerate(names):
        one.adopt(name, "w0", k)
    queue.shows({f"5_{k}": ("lemonade-01234567-w0", "PENDING") for k in range(50)})
    turns(one, queue, 3600)
    assert len(queue.calls("squeue")) == 60
    for _ in range(600):
        for name in names:
            one.heard(name, HELLO)
        turns(one, queue, 1)
    assert len(queue.calls("squeue")) == 60


def test_nobody_asks_after_those_that_are_known_to_be_gone(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    turns(one, queue, 600)
    assert len(queue.calls("squeue")) == 2 and not one.alive("w0")


@pytest.mark.parametrize(("state", "seen"), [("PENDING", True), ("RUNNING", False), ("COMPLETING", False)])
def test_a_job_that_waited_is_known_to_have_been_cancelled_since(
    run: Path, queue: Queue, state: str, seen: bool
) -> None:
    """One that is seen to end may have been cancelled before there was this coordinator."""
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.shows({"5": ("lemonade-01234567-w0", state)})
    turns(one, queue, 70)
    queue.shows({"5": ("lemonade-01234567-w0", "CANCELLED")})
    turns(one, queue, 200)
    assert (one.ended("w0"), one.seen("w0")) == ("cancelled", seen)


def test_jobs_of_others_are_not_ours(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.shows({"5": ("lemonade-other000-w0", "RUNNING"), "6": ("my job", "RUNNING")})
    turns(one, queue, 200)
    assert not one.alive("w0")


def test_settings_of_slurm_have_defaults_that_a_site_takes() -> None:
    settings = configs.from_dict({"data": {"name": "digits"}, "cluster": {"backend": "slurm"}}, "test").cluster
    assert (settings.time_min, settings.gpus, settings.wckey) == (240, 1, None)


def test_a_worker_that_is_to_use_the_cpu_asks_for_no_gpu() -> None:
    for more, expected in ({"device": "cpu"}, 0), ({"device": "cpu", "gpus_per_worker": 2}, 2), ({"device": "cuda"}, 1):
        asked = request.parameters(cluster(**more), "w").get("gres")
        assert (request.gpus_of(cluster(**more)), asked) == (expected, f"gpu:{expected}" if expected else None)


# ---------------------------------------------------------------- what a site cannot give

NOT_AVAILABLE = "allocation failure: Requested node configuration is not available"
PARTITIONS = {"main", "fat", "cpu", "fat,cpu", "hidden"}
NODES = "main*|2|5000|gpu:a100:1(S:0)\nmain*|4|9000|gpu:a100:2,shard:8\nfat|64|900000|gpu:h100:4\ncpu|8|8000|(null)\n"


def site_of(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of many kinds of nodes, none of which is up."""
    monkeypatch.setitem(fake_slurm.KNOWN, "partition", PARTITIONS)
    queue.sinfo, queue.available = NODES, False


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gres": "gpu:nosuch:1"},
         "cluster.gres: got gpu:nosuch:1, which no node of the default partition has; there are: gpu:a100:1"),
        ({"gres": "gpu:a100:3"}, "cluster.gres: got gpu:a100:3"),
        ({"gpus_per_worker": 5, "partition": "fat"},
         "cluster.gpus_per_worker: got 5, which no node of partition fat has; there are: gpu:h100:4"),
        ({"partition": "cpu"}, "cluster.gpus_per_worker: got 1, which no node of partition cpu has; there are: none"),
        ({"cpus_per_worker": 5}, "cluster.cpus_per_worker: got 5, .* the largest has 4"),
        ({"mem_gb": 9}, "cluster.mem_gb: got 9 GB, .* the largest has 8.789 GB"),
    ],
)  # fmt: skip
def test_what_no_node_has_is_refused_by_its_key(
    queue: Queue, settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_of(queue, monkeypatch)
    with pytest.raises(ConfigError, match=f"^{said}.*. Slurm says: {NOT_AVAILABLE}$"):
        slurm.check(cluster(**({"mem_gb": 4} | settings)))


@pytest.mark.parametrize(
    "settings",
    [{"gres": "gpu:a100:2"}, {"gres": "gpu:2,shard:8"}, {"gpus_per_worker": 4, "partition": "fat,cpu"},
     {"gpus_per_worker": 9, "cpus_per_worker": 99, "mem_gb": 999, "skip": ("gres", "cpus-per-task", "mem")},
     {"gres": "gpu:nosuch", "partition": "hidden"}, {"partition": "cpu", "device": "cpu"}],
)  # fmt: skip
def test_where_some_node_may_do_slurm_is_waited_for(
    queue: Queue, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes that have it may be down; of a partition that is not shown nothing is known."""
    site_of(queue, monkeypatch)
    slurm.check(cluster(**({"mem_gb": 4} | settings)))
    assert ("sinfo", "--all", "--Node", "--noheader", "--format=%P|%c|%m|%G") in queue.asked


LIMIT = {"AssocMaxSubmitJobLimit": 0}


def test_where_the_queue_is_full_fewer_are_submitted_and_tried_seldom(run: Path, queue: Queue) -> None:
    queue.limits = LIMIT
    one, notes = backend(run, workers=8)
    names = [f"w{k}" for k in range(8)]
    with pytest.raises(NotNow, match=r"takes no 8 more jobs now, so fewer workers run: .*AssocMaxSubmitJobLimit"):
        one.launch(names, [])
    assert not one.alive("w0")
    asked = []
    for _ in range(300):
        queue.now += 1
        asked.append(one.room())
    assert not any(asked)
    tried = [" ".join(command[1:]) for command in queue.calls("sbatch")[1:]]
    assert tried == ["--test-only --array=0-3", "--test-only --array=0-1", *3 * ["--test-only --array=0-0"]]
    assert notes == []
    queue.now += slurm.CROWDED_S
    assert one.room() == 0 and len(notes) == 1 and "still takes no 1 more jobs" in notes[0] and "AssocMax" in notes[0]
    queue.limits = {}
    for size in (1, 2, 4, 8):
        queue.now += 60
        assert one.room() == 0  # tried
        queue.now += 10
        assert one.room() == size
        one.launch([f"{size}x{k}" for k in range(size)], [])
    queue.now += 10
    assert one.room() == 1000  # as if it had never been full


def test_where_the_queue_was_full_arrays_still_are_no_larger_than_the_site_takes(run: Path, queue: Queue) -> None:
    queue.max_array = 3
    one, _ = backend(run, workers=40)
    assert one.room() == 3
    queue.limits = LIMIT
    with pytest.raises(NotNow):
        one.launch(["a", "b", "c"], [])
    queue.limits = {}
    for size in (1, 2, 3, 3):
        queue.now += 60
        assert one.room() == 0
        queue.now += 10
        assert one.room() == size
        one.launch([f"{queue.now:.0f}x{k}" for k in range(size)], [])


def test_a_run_whose_user_may_have_no_more_jobs_waits_and_goes_on(
    run: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not submitted is no worker: not of those that the run may have, and nobody's misfortune."""
    doubles.install(monkeypatch)
    settings = doubles.config(cluster={"backend": "slurm", "workers": 4, "max_workers": 3})
    session._prepare(settings, doubles.images(), run)
    queue.limits = LIMIT
    notes = doubles.Notes()
    made = doubles.start(run, settings, backend(run, workers=4)[0], notes)
    for _ in range(1000):
        queue.now += 1
        made._turn()
    assert made.history.num_launched == 0 and not made.history.departures and made._crew.handles == {}
    assert len(notes.about("fewer workers run")) == 1
    queue.limits = {}
    seen = []
    for _ in range(200):
        queue.now += 1
        made._turn()
        seen.append(made.history.num_launched)
    assert sorted(set(seen)) == [0, 1, 3]  # one, and two more: all that it may have
    made._ledger.close()
    assert doubles.load(run, settings).history.num_launched == 3


def test_a_reason_of_a_partition_that_does_not_take_such_a_job_is_told() -> None:
    for reason in ("PartitionConfig", "PartitionTimeLimit", "AssocMaxWallDurationPerJobLimit", "BadConstraints"):
        assert slurm.STUCK.search(reason), reason
    for reason in ("Priority", "Resources", "AssocMaxJobsLimit", "PartitionDown", "BeginTime"):
        assert not slurm.STUCK.search(reason), reason


# ---------------------------------------------------------------- jobs that begin anew


@pytest.mark.parametrize("state", sorted(slurm.AGAIN))
@pytest.mark.parametrize("bye", [True, False])
def test_a_worker_whose_job_is_requeued_is_over_and_the_job_is_cancelled(
    run: Path, queue: Queue, state: str, bye: bool
) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    one.heard("w0", HELLO)
    queue.shows({"5": ("lemonade-01234567-w0", state)})
    if bye:
        assert one.ended("w0") is None
    turns(one, queue, 61 if bye else 200)
    assert one.alive("w0") == bye  # one that said goodbye may have spoken a moment ago
    assert one.ended("w0") == "requeued"
    queue.shows({"5": ("lemonade-01234567-w0", "COMPLETED")})  # its second life, which is short
    turns(one, queue, 200)
    assert one.ended("w0") == "requeued"
    assert ("scancel", "5") in queue.asked


def test_a_worker_that_waited_and_then_was_cancelled_was_not_requeued(run: Path, queue: Queue) -> None:
    """That it waited was seen before its first word."""
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    queue.shows({"5": ("lemonade-01234567-w0", "PENDING")})
    turns(one, queue, 61)
    one.heard("w0", HELLO)
    queue.shows({"5": ("lemonade-01234567-w0", "CANCELLED")})
    assert one.ended("w0") is None
    turns(one, queue, 61)
    assert one.ended("w0") == "cancelled" and queue.calls("scancel") == []


def test_what_accounting_knows_of_one_task_counts_more_than_what_the_queue_says_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that were cancelled by name have lost their indices; one of them had failed long before."""
    name = "lemonade-01234567-w0"
    answers(
        monkeypatch,
        squeue=f"77|{name}|CANCELLED|None|\n",
        sacct=f"77_0|{name}|NODE_FAIL|n3\n77_1|{name}|CANCELLED by 1000|None assigned\n",
    )
    found = slurm_queue.jobs_of("0123456789", [("w0", 0), ("w0", 1), ("w0", 2), ("w7", 0)])
    assert found is not None
    assert [found.jobs["w0", k].state for k in range(3)] == ["NODE_FAIL", "CANCELLED", "CANCELLED"]


def test_where_a_worker_ran_that_was_never_heard_of_is_known(run: Path, queue: Queue) -> None:
    one, _ = backend(run)
    one.adopt("w0", "w0", 0)
    assert one.node("w0") is None
    queue.shows({"5": ("lemonade-01234567-w0", "FAILED")})
    turns(one, queue, 61)
    assert one.node("w0") == "n3"
