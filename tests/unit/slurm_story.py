"""A story that is played on a Slurm, real or fake, by the program's own functions; what is said in it is a transcript.

Decides: what happens, and what of an answer may differ from one time to the next. `tests/cluster/transcripts/` holds
what a real one said; `test_fake_slurm.py` plays it on the fake, `tests/cluster/test_transcript.py` on a real one again.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import fake_slurm
import pytest
import run_doubles as doubles
from fake_slurm import Answer

from lemonade_hpc import files
from lemonade_hpc.config import Config, ConfigError
from lemonade_hpc.run import chain, queue, record, request, session, site, slurm
from lemonade_hpc.run.backends import NotNow, Refused

TRANSCRIPT = Path(__file__).parents[1] / "cluster" / "transcripts" / "slurm-22.05.json"
QUEUE = ("squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %j %T %r")
FIRST_JOB, MAX_ARRAY, NO_JOB = 7001, 10, "7999"
"""Ids of jobs have four digits and begin with a 7."""
READ = ("JobId", "ArrayJobId", "ArrayTaskId", "JobName", "JobState", "Reason", "NodeList")
"""What is compared of `scontrol show job`: what the program reads, and of an array not the ids of its tasks."""
ASKED_ELSEWHERE = ("chdir", "error", "output", "job-name")
"""Options with paths or ids in them, which are not compared."""
REFUSED: tuple[dict[str, Any], ...] = (
    {"partition": "nosuch"}, {"account": "nosuch"}, {"qos": "nosuch"}, {"wckey": "nosuch"}, {"constraint": "nosuch"},
    {"reservation": "nosuch"}, {"gres": "nosuch:1"}, {"gpus_per_worker": 7}, {"exclude": "nosuch"},
    {"exclude": "n1,n2,n3,n4"}, {"extra": {"nosuch": "1"}},
)  # fmt: skip


class Stage(Protocol):
    """A Slurm of four nodes with a GPU each."""

    def run(self, command: Sequence[str], stdin: str | None = None) -> Answer:
        """What a command says to an ordinary user."""

    def wait(self) -> None:
        """Let some time pass."""

    def happens(self, what: str) -> None:
        """`slurmctld ends`, `slurmctld starts`, the same of slurmdbd; `n3 ends`; or
        `AssocMaxSubmitJobLimit 2`, instead of any other; or `limits end`."""


class Story:
    """What has been told so far."""

    def __init__(self, stage: Stage, run: Path) -> None:
        self.stage, self.run = stage, run
        self.lines: list[dict[str, Any]] = []
        self.mute: tuple[str, ...] = ()
        """Commands that fail, whatever is the matter with Slurm."""
        session._prepare(self.settings(), doubles.images(), run)
        self.id = record.read_identity(run)["run"]

    # ------------------------------------------------------------ how it is told

    def answer(self, command: Sequence[str], stdin: str | None) -> Answer:
        if command[0] in self.mute:
            return Answer(1)
        said = self.stage.run(command, stdin)
        scripts = [word for word in command[1:] if not word.startswith("-")] if command[0] == "sbatch" else []
        text = Path(scripts[0]).read_text() if scripts and stdin is None else stdin or ""
        options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
        asked = [o for o in options if o.removeprefix("--").partition("=")[0] not in ASKED_ELSEWHERE]
        line = {"command": shlex.join(command), "options": asked, "code": said.code}
        self.lines.append(line | {"out": said.out.splitlines(), "err": said.err.splitlines()})
        return said

    def ask(self, what: str, program: Callable[[], object], mute: tuple[str, ...] = ()) -> Any:
        """Have the program do something; what it concludes."""
        self.lines.append({"program": what + "".join(f", {name} fails" for name in mute)})
        self.mute = mute
        try:
            concluded = program()
        except (ConfigError, NotNow, Refused) as error:
            concluded = type(error).__name__
        self.mute = ()
        self.lines.append({"concludes": _told(concluded)})
        return concluded

    def happens(self, what: str) -> None:
        self.lines.append({"happens": what})
        self.stage.happens(what)

    def until(self, test: Callable[[str], bool], *command: str) -> None:
        """Wait until a command, by default squeue, says what passes a test."""
        for _ in range(300):
            if test(said := self.stage.run(command or QUEUE).out):
                return
            self.stage.wait()
        raise AssertionError(f"not within 300 turns; last seen: {said}")

    def until_seen(self, *patterns: str) -> None:
        self.until(lambda said: all(re.search(pattern, said) for pattern in patterns))

    # ------------------------------------------------------------ what the program does

    def settings(self, **more: Any) -> Config:
        base = {"backend": "slurm", "workers": 4, "cpus_per_worker": 1, "mem_gb": 0.1, "max_array": 20, "time_min": 10}
        coordinator = {"coordinator_time_min": 10, "coordinator_mem_gb": 0.1, "coordinator_extra": {"gres": "gpu:1"}}
        setup = ["exec sleep 300"]  # not a child of the shell's: killed first, it would let the script go on
        return doubles.config(cluster=base | coordinator | {"setup": setup} | more)

    def check(self, **more: Any) -> None:
        self.ask(f"check {json.dumps(more)}", lambda: slurm.check(self.settings(**more).cluster))

    def launch(self, names: Sequence[str], **more: Any) -> slurm.SlurmBackend:
        notes: list[str] = []
        made = slurm.SlurmBackend(self.run, self.id, self.settings(**more).cluster, notes.append)

        def act() -> str:
            made.launch(names, [])
            return "it may pass" if notes else "submitted"

        self.ask(f"launch {' '.join(names)} {json.dumps(more)}", act)
        return made

    def jobs(self, launch: str, num_tasks: int, mute: tuple[str, ...] = ()) -> queue.Answer | None:
        wanted = [(launch, place) for place in range(num_tasks)]
        found: queue.Answer | None = self.ask(
            f"jobs_of {launch} 0-{num_tasks - 1}", lambda: queue.jobs_of(self.id, wanted), mute
        )
        return found

    def accounting(self, launch: str, test: Callable[[str], bool]) -> None:
        """Wait until accounting has caught up."""
        name = f"{queue.prefix(self.id)}{launch}"
        self.until(test, "sacct", "-X", "-n", "-P", "-S", "now-30days", "--name", name, "-o", "JobID,JobName,State")


def _end(backend: slurm.SlurmBackend, name: str) -> None:
    backend.kill(name)
    backend.close()


def _told(concluded: object) -> object:
    """A conclusion as JSON."""
    if isinstance(concluded, queue.Answer):
        jobs = [f"{key[0]} {key[1]}: {job.id} {job.state} {job.reason}" for key, job in concluded.jobs.items()]
        return {"all": concluded.all, "jobs": sorted(jobs)}
    return concluded


# ---------------------------------------------------------------- the story


def play(stage: Stage, run: Path) -> list[dict[str, Any]]:
    """The whole of it, in normal form."""
    story = Story(stage, run)
    with pytest.MonkeyPatch.context() as patch:
        fake_slurm.install(patch, story.answer)
        patch.chdir(run)
        _questions(story)
        _an_array(story)
        _a_chain(story)
        _ends(story)
        _limits(story)
        _outages(story)
    return _normal(story)


def _questions(story: Story) -> None:
    story.ask("site limit", queue.max_array_size)
    story.jobs("w0", 1)
    story.jobs("w0", 1, ("squeue",))
    story.check()
    for more in REFUSED:
        story.check(**more)
    story.launch(["w0", "w1"], account="nosuch")
    story.launch(["w0", "w1"], partition="nosuch")
    story.launch([f"w{k}" for k in range(MAX_ARRAY + 1)])
    story.launch(["nowhere"], exclude="n1,n2,n3,n4")
    story.jobs("nowhere", 1)


def _an_array(story: Story) -> None:
    """Six tasks on four nodes; a running one and a waiting one are cancelled, then the rest."""
    made = story.launch([f"w{k}" for k in range(6)])
    story.until(lambda said: said.count("-w0 RUNNING") == 4 and said.count("-w0 PENDING Resources") == 2)
    story.accounting("w0", lambda said: said.count("RUNNING") == 4 and said.count("PENDING") == 1)
    story.jobs("w0", 6)
    story.jobs("w0", 6, ("squeue",))
    story.jobs("w0", 6, ("squeue", "scontrol"))
    story.ask("kill w1", lambda: _end(made, "w1"))
    story.until_seen(r"_1 \S+-w0 CANCELLED", r"_4 \S+-w0 RUNNING")
    story.jobs("w0", 6, ("squeue",))
    story.ask("kill w5", lambda: _end(made, "w5"))
    story.accounting("w0", lambda said: said.count("RUNNING") == 4 and said.count("CANCELLED") == 2)
    story.jobs("w0", 6)
    story.jobs("w0", 6, ("squeue",))
    story.jobs("w0", 6, ("squeue", "scontrol"))
    story.ask("kill w0", lambda: _end(made, "w0"))
    story.until(lambda said: said.count("-w0 CANCELLED") == 3)
    story.launch([f"x{k}" for k in range(6)])
    story.until(lambda said: said.count("-x0 RUNNING") == 1 and said.count("-x0 PENDING Resources") == 5)
    story.accounting("x0", lambda said: "_0|" in said and "PENDING" in said)
    array = re.findall(r"(\d+)_\d \S+-x0 ", story.stage.run(QUEUE).out)[0]
    story.ask("cancel a task that waits with others", lambda: queue.ask("scancel", f"{array}_3"))
    story.jobs("x0", 6, ("squeue",))
    story.ask("cancel the array", lambda: queue.ask("scancel", array))
    story.accounting("x0", lambda said: "RUNNING" not in said and said.count("CANCELLED") == 2)
    story.until_seen(r"_0 \S+-x0 CANCELLED")
    for mute in ((), ("squeue",), ("squeue", "scontrol")):
        story.jobs("x0", 6, mute)
    story.launch([f"v{k}" for k in range(3)])
    story.until(lambda said: said.count("-v0 RUNNING") == 1 and said.count("-v0 PENDING Resources") == 2)
    name = f"{queue.prefix(story.id)}v0"
    story.ask("cancel by name", lambda: queue.ask("scancel", "--me", f"--name={name}"))
    story.accounting("v0", lambda said: "RUNNING" not in said and said.count("CANCELLED") == 2)
    story.until_seen(r"_0 \S+-v0 CANCELLED")
    for mute in ((), ("squeue",), ("squeue", "scontrol")):
        story.jobs("v0", 3, mute)


def _a_chain(story: Story) -> None:
    """The coordinator's job, its successor as its script submits it, and their ends."""
    first = story.ask("chain.begin", lambda: chain.begin(story.settings(), story.run))
    story.until_seen(rf"{first} \S+ RUNNING")
    story.ask("chain.begin again", lambda: chain.begin(story.settings(), story.run))
    script = (story.run / files.SLURM / chain.TEMPLATE.name).read_text()
    look, submit, cancel = (
        re.findall(pattern, script)[0]
        for pattern in (r"\$\((squeue [^)]*)\)", r"(sbatch \S+) \|\|", r"(scancel .*) ;;")
    )
    story.ask("the script looks for a successor", lambda: queue.ask(*shlex.split(look)))
    story.ask("the script submits one", lambda: queue.ask(*shlex.split(submit)))
    story.until_seen(r"-coordinator PENDING Dependency")
    story.ask("the script looks again", lambda: queue.ask(*shlex.split(look)))
    _, second = story.ask("chain.queued", lambda: sorted(chain.queued(story.id)))
    story.ask("whether the first has ended", lambda: queue.job_has_ended(first, mine=False))
    story.ask("whether the second has ended", lambda: queue.job_has_ended(second, mine=False))
    story.ask("the script cancels it", lambda: queue.ask(*shlex.split(cancel)))
    story.ask("chain.end", lambda: chain.end(story.id))
    story.ask("whether the second has ended", lambda: queue.job_has_ended(second, mine=False))
    story.ask("chain.queued", lambda: sorted(chain.queued(story.id)))
    story.ask("cancel the first", lambda: queue.ask("scancel", first))
    story.until_seen(rf"{first} \S+ CANCELLED")
    story.ask("whether an unknown one has ended", lambda: queue.job_has_ended(NO_JOB, mine=False))
    story.ask("cancel an unknown one", lambda: queue.ask("scancel", NO_JOB))


def _ends(story: Story) -> None:
    """A job that waits for somebody, one that fails and one that completes; a limit of an array; a lost node."""
    held = story.launch(["held"], extra={"hold": True})
    story.launch(["fails"], setup=["exit 3"])
    story.launch(["completes"], setup=["exit 0"])
    story.until_seen(r"-held PENDING JobHeldUser", r"-fails FAILED", r"-completes COMPLETED")
    story.accounting("fails", lambda said: "FAILED" in said)
    for launch in ("held", "fails", "completes"):
        story.jobs(launch, 1)
    story.jobs("held", 1, ("squeue",))
    story.launch(["u0", "u1"], max_array=1)
    story.until_seen(r"-u0 RUNNING", r"-u0 PENDING JobArrayTaskLimit")
    story.jobs("u0", 2)
    story.happens("n3 ends")
    story.until_seen(r"-w0 NODE_FAIL")
    story.jobs("w0", 6)
    story.ask("kill held", lambda: _end(held, "held"))
    story.until_seen(r"-held CANCELLED")
    story.jobs("held", 1)


def _limits(story: Story) -> None:
    script = request.script(story.settings().cluster, "check", story.run)
    for name in ("AssocMaxSubmitJobLimit", "AssocGrpSubmitJobsLimit", "MaxSubmitJobsPerAccount"):
        story.happens(f"{name} 6")
        story.check()
        story.launch([f"y{k}" for k in range(5)])
        story.ask("whether two fit", lambda: (slurm.refusal(script, "--array=0-1") or "").partition("\n")[0])
        story.ask("whether five fit", lambda: (slurm.refusal(script, "--array=0-4") or "").partition("\n")[0])
    story.happens("limits end")
    story.ask("check of a coordinator", lambda: slurm.check_script(_coordinator(story), "it"))


def _coordinator(story: Story) -> str:
    return chain.script(story.settings(), story.run, chain.job_name(story.id))


def _outages(story: Story) -> None:
    story.happens("slurmdbd ends")
    story.jobs("w0", 6, ("squeue", "scontrol"))
    story.ask("whether one of mine that is unknown has ended", lambda: queue.job_has_ended(NO_JOB, mine=True))
    story.happens("slurmdbd starts")
    story.happens("slurmctld ends")
    story.ask("site limit", queue.max_array_size)
    story.ask("what nodes there are", lambda: queue.ask(*site.QUESTION))
    story.jobs("fails", 1)
    story.check()
    story.launch(["z0", "z1"])
    story.ask("chain.queued", lambda: sorted(chain.queued(story.id)))
    story.ask("chain.begin", lambda: chain.begin(story.settings(), story.run))
    story.ask("chain.end", lambda: chain.end(story.id))
    story.ask("cancel one", lambda: queue.ask("scancel", NO_JOB))


# ---------------------------------------------------------------- what may differ


def _normal(story: Story) -> list[dict[str, Any]]:
    """Ids, times and places by words."""
    for line in story.lines:
        if "command" in line:
            line["out"] = sorted(_compared(line["command"], line["out"]))
    text = json.dumps(story.lines)
    for pattern, word in (
        (re.escape(str(story.run.resolve())), "RUN"), (re.escape(str(story.run)), "RUN"),
        (re.escape(queue.prefix(story.id)), "lemonade-ID-"), (r"file_[0-9a-f]{32}", "file_UUID"),
        (r"CANCELLED by \d+", "CANCELLED by UID"), (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "TIME"),
        (r"on nodes n\d", "on nodes NODE"), (r"host:[\d.]+:\d+", "host:HOST:PORT"),
    ):  # fmt: skip
        text = re.sub(pattern, word, text)
    labels: dict[str, str] = {NO_JOB: "NOJOB"}
    text = re.sub(r"(?<![\d.])7\d{3}(?!\d)", lambda m: labels.setdefault(m[0], f"JOB{len(labels)}"), text)
    normal: list[dict[str, Any]] = json.loads(text)
    return normal


def _compared(command: str, lines: list[str]) -> list[str]:
    """The part of an answer that the program reads."""
    if command == "scontrol show config":
        return [line for line in lines if line.startswith("MaxArraySize")]
    if not command.startswith("scontrol"):
        return lines
    rows = []
    for line in lines:
        fields = dict(part.partition("=")[::2] for part in line.split() if part.partition("=")[0] in READ)
        if "ArrayJobId" in fields:
            del fields["JobId"]
        rows.append(" ".join(f"{key}={value}" for key, value in fields.items()) or line)
    return rows
