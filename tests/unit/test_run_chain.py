"""The coordinator as a chain of jobs, beneath a real Slurm: scripts, refusals, ends. `tests/cluster/` has real ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemonade_hpc import cli, files
from lemonade_hpc import config as configs
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import cancel, chain, container, lease, owner, queue, record, session, slurm, status
from lemonade_hpc.run.coordinator import RunFailed, Stopped
from lemonade_hpc.run.ledger import Halted

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

JUDGE, IS_OWN = owner.judge, owner.is_own
COMMAND = """#!/bin/bash
echo "$(basename $0) $@" >> "$(dirname $0)/calls"
[ "$(basename $0)" = scancel ] && rm -f "$(dirname $0)/squeue.says"
[ -f "$0.fails" ] && { cat "$0.fails" >&2; exit 1; }
[ -f "$0.says" ] && cat "$0.says"
exit 0
"""


class Commands:
    """Slurm's commands as scripts that note their calls and say what they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in slurm.COMMANDS + ("sacct", "scontrol"):
            (folder / name).write_text(COMMAND)
            (folder / name).chmod(0o755)
        self.say("sbatch", "4711\n")

    def say(self, name: str, text: str) -> None:
        (self.folder / f"{name}.says").write_text(text)

    def fail(self, name: str, text: str = "slurm_load_jobs error: Unable to contact slurm controller\n") -> None:
        (self.folder / f"{name}.fails").write_text(text)

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ")]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv(chain.LINK, raising=False)
    doubles.install(monkeypatch)
    return Commands(tmp_path / "bin")


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


def settings(**cluster: Any) -> Any:
    return doubles.config(cluster={"backend": "slurm", "workers": 2, **cluster})


# ---------------------------------------------------------------- submission


def test_a_submission_writes_the_script_and_the_settings_and_calls_sbatch_once(run: Path, commands: Commands) -> None:
    chosen = settings(coordinator_partition="cpu", account="lab", coordinator_extra={"qos": "long", "exclusive": False})
    assert session.submit(chosen, run) == "4711"
    name = f"lemonade-{record.read_identity(run)['run'][:8]}-coordinator"
    script = (run / "slurm/coordinator.sbatch").read_text()
    lines = script.splitlines()
    assert f"#SBATCH --job-name={name}" in lines and "#SBATCH --dependency=singleton" in lines
    assert [line for line in lines if line.startswith("#SBATCH --") and line.split("--")[1].split("=")[0] in
            ("time", "mem", "partition", "account", "qos", "exclusive")] == [
        "#SBATCH --time=1440", "#SBATCH --mem=4096M", "#SBATCH --partition=cpu", "#SBATCH --account=lab",
        "#SBATCH --qos=long",
    ]  # fmt: skip
    assert "@" not in script.replace("USR1@90", "")
    assert subprocess.run(["bash", "-n", str(run / "slurm/coordinator.sbatch")], check=False).returncode == 0
    assert configs.load(str(run / "slurm/config.yaml")) == chosen
    assert len([call for call in commands.calls("sbatch") if "--test-only" not in call]) == 1


def test_what_is_shown_is_what_is_submitted_and_nothing_is_written(run: Path, commands: Commands) -> None:
    shown, worker = session.submission(settings(), run)
    assert not run.exists() and commands.calls("sbatch") == []
    session.submit(settings(), run)
    known = record.read_identity(run)["run"][:8]
    assert shown.replace("xxxxxxxx", known) == (run / "slurm/coordinator.sbatch").read_text()
    assert "#SBATCH --job-name=lemonade-xxxxxxxx-e1w00" in worker
    assert session.submission(settings(), run)[0] == (run / "slurm/coordinator.sbatch").read_text()


def test_a_folder_that_may_be_on_a_disk_of_this_machine_is_told(
    run: Path, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stale_s, told in ((60, True), (0, False)):
        (tmp_path / "my.yaml").write_bytes(configs.dump(settings(stale_s=stale_s)))
        with pytest.raises(SystemExit) as ended:
            cli.main(["submit", str(tmp_path / "my.yaml"), "--run", str(run.with_name(f"run{stale_s}"))])
        said = capsys.readouterr()
        assert ended.value.code == 0 and said.out.startswith("submitted job 4711; its log: ")
        assert ("it may be a disk that only this machine sees; choose a folder" in said.err) == told


def test_only_a_search_on_slurm_can_be_submitted(run: Path, commands: Commands) -> None:
    for ask in (session.submit, session.submission):
        with pytest.raises(ConfigError, match="cluster.backend: got inline; what is submitted needs slurm"):
            ask(doubles.config(), run)
    assert not run.exists()


def test_slurms_refusal_is_told_in_its_words(run: Path, commands: Commands) -> None:
    session._prepare(settings(), doubles.images(), run)
    commands.fail("sbatch", "sbatch: error: QOSMaxSubmitJobPerUserLimit\n")
    with pytest.raises(ConfigError, match="refuses the coordinator's job. It says: .*QOSMaxSubmitJobPerUserLimit"):
        chain.begin(settings(), run)


def test_a_coordinator_that_slurm_would_refuse_is_told_before_anything_is_written(
    run: Path, commands: Commands
) -> None:
    fails = 'grep -q "partition=nosuch" && { echo "sbatch: error: invalid partition specified: nosuch" >&2; exit 1; }'
    (commands.folder / "sbatch").write_text(f"#!/bin/bash\n{fails}\nexit 0\n")
    with pytest.raises(
        ConfigError,
        match="refuses the coordinator's job. It says: .*invalid partition.*: nosuch\n`doctor`",
    ):
        session.submit(settings(coordinator_partition="nosuch"), run)
    assert not run.exists()


def test_a_second_submission_is_refused(run: Path, commands: Commands) -> None:
    session.submit(settings(), run)
    commands.say("squeue", "4711\n")
    with pytest.raises(ConfigError, match="has a coordinator in the queue already, job 4711"):
        session.submit(settings(), run)
    commands.fail("squeue")
    with pytest.raises(ConfigError, match="whether a coordinator is in the queue is not known"):
        session.submit(settings(), run)


def test_a_run_that_somebody_works_on_is_not_submitted(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles.start(run, settings(), doubles.FakeBackend(run))
    monkeypatch.setattr(lease.queue, "judge", lambda who: "alive")
    with pytest.raises(lease.Held, match="which is running"):
        session.submit(settings(), run)


def test_an_sbatch_that_does_not_answer_is_told(run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    session._prepare(settings(), doubles.images(), run)
    (commands.folder / "sbatch").write_text("#!/bin/bash\nexec sleep 60\n")
    monkeypatch.setattr(queue, "QUERY_TIMEOUT_S", 3.0)  # squeue answers in that
    with pytest.raises(ConfigError, match="sbatch does not answer; whether it has submitted lemonade-"):
        chain.begin(settings(), run)


# ---------------------------------------------------------------- the job's script


def script_of(run: Path, coordinator: str) -> str:
    """The job's script, with another command for its coordinator, and hardly a wait."""
    script = (run / "slurm/coordinator.sbatch").read_text().replace("sleep 60", "sleep 0.1")
    start = script.index(sys.executable)
    return script.replace(script[start : script.index(" &\n", start)], coordinator)


@pytest.mark.parametrize(
    ("code", "cancelled"), [(0, True), (1, True), (2, True), (127, True), (3, False), (137, False), (139, False)]
)
def test_a_job_submits_its_successor_and_cancels_it_only_at_an_end(
    tmp_path: Path, run: Path, commands: Commands, code: int, cancelled: bool
) -> None:
    session.submit(settings(), run)
    (commands.folder / "calls").unlink()
    changed = script_of(run, f"bash -c 'rm {run}/slurm/early-*; exit {code}'")
    done = subprocess.run(["bash", "-c", changed], capture_output=True, check=False)
    assert done.returncode == code
    assert [call.partition(" ")[2] for call in commands.calls("sbatch")] == [str(run / "slurm/coordinator.sbatch")]
    assert bool(commands.calls("scancel")) == cancelled


@pytest.mark.parametrize(("setup", "code"), [("set -e", 0), ("set -e", 1), ("set -u", 0), ("set -eu", 137)])
def test_what_the_setup_sets_ends_no_job_of_the_script(run: Path, commands: Commands, setup: str, code: int) -> None:
    """With `set -e`, chains of complete and failed runs went on for ever; with `set -u` none began."""
    session.submit(settings(setup=[setup]), run)
    (commands.folder / "calls").unlink()
    changed = script_of(run, f"bash -c 'exit {code}'")
    done = subprocess.run(["bash", "-c", changed], capture_output=True, check=False)
    assert done.returncode == code
    assert len(commands.calls("sbatch")) == 1 and len(commands.calls("scancel")) == (code != 137)
    failing = changed.replace("set -e", "set -e\nfalse").replace("set -u", "set -u\necho $NOTHING")
    if code == 0:
        assert subprocess.run(["bash", "-c", failing], capture_output=True, check=False).returncode
        assert len(commands.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("words", "restarts", "said"),
    [([chain.FIRST], "", "first"), ([], "", "next"), ([chain.FIRST], "1", "next"), ([chain.TAKE_OVER], "2", "next"),
     ([chain.FIRST], "1 early", "first"), ([chain.TAKE_OVER], "1 early", "take-over")],
)  # fmt: skip
def test_a_job_knows_whether_a_person_has_submitted_it(
    run: Path, commands: Commands, words: list[str], restarts: str, said: str
) -> None:
    """A job that begins anew, requeued, is one that goes on, unless it was ended before it had begun."""
    session.submit(settings(), run)
    restarts, _, early = restarts.partition(" ")
    if early:
        (run / files.SLURM / "early-7").touch()
    assert commands.calls("sbatch")[-1].endswith("coordinator.sbatch first")
    changed = script_of(run, f"env | sed -n 's/^{chain.LINK}=//p'")
    environ = os.environ | {"SLURM_JOB_ID": "7"} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    command = ["bash", "-c", changed, "name", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert said in done.stdout.split()


@pytest.mark.parametrize(
    ("restarts", "refused", "queued", "calls"),
    [("", False, "", ["sbatch"]), ("1", False, "4712\n", ["squeue"]), ("1", False, "", ["squeue", "sbatch"]),
     ("", True, "4712\n", ["sbatch", "squeue"]), ("", True, "", ["sbatch", "squeue", "sbatch", "squeue", "sbatch"])],
)  # fmt: skip
def test_a_job_submits_its_successor_until_there_is_one(
    run: Path, commands: Commands, restarts: str, refused: bool, queued: str, calls: list[str]
) -> None:
    """It may have one if it was requeued, or if sbatch has timed out; otherwise Slurm is not asked."""
    session.submit(settings(), run)
    (commands.folder / "calls").unlink()
    commands.say("squeue", queued)
    if refused:
        commands.fail("sbatch", "sbatch: error: Socket timed out on send/recv operation\n")
    made_at_least = len(calls) + (refused and not queued)
    wait = f"until [ $(grep -c . {commands.folder}/calls) -ge {made_at_least} ]; do sleep 0.05; done; sleep 0.3"
    changed = script_of(run, f"bash -c '{wait}'")
    environment = os.environ | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    done = subprocess.run(["bash", "-c", changed], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
    made = [call.split()[0] for call in (commands.folder / "calls").read_text().splitlines()]
    assert made[: len(calls)] == calls and made.count("scancel") == 1  # a call that was under way may end after it
    assert (len(made) == len(calls) + 1) == (not refused or bool(queued))  # else it is tried again and again


def test_signals_reach_the_coordinator_and_the_job_waits_for_it(run: Path, commands: Commands) -> None:
    """Twice, as Slurm does; its exit code is the job's, which starts no other, though this one had not begun."""
    session.submit(settings(), run)
    script = (run / "slurm/coordinator.sbatch").read_text().replace("sleep 60", "sleep 0.1")
    start = script.index(sys.executable)
    program = "import signal, sys, time; n = []; signal.signal(signal.SIGUSR1, lambda *a: n.append(1)); print('up')"
    program += "\nwhile not n: time.sleep(0.01)\ntime.sleep(0.5); sys.exit(3)"
    changed = script.replace(script[start : script.index(" &\n", start)], f'{sys.executable} -u -c "{program}"')
    environ = os.environ | {"SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", "-c", changed], stdout=subprocess.PIPE, text=True, env=environ) as job:
        assert job.stdout is not None
        while job.stdout.readline().strip() != "up":
            pass
        job.send_signal(10)
        job.send_signal(15)
        assert job.wait(20) == 3


@pytest.mark.parametrize("word", [chain.FIRST, chain.TAKE_OVER])
def test_a_job_whose_image_cannot_be_read_tries_again_and_knows_what_a_person_said(
    run: Path, commands: Commands, word: str
) -> None:
    """Nor does it count as one that has died early meanwhile, nor does it submit another successor."""
    session.submit(settings(), run)
    (commands.folder / "calls").unlink()
    text = script_of(run, f"bash -c 'echo $LEMONADE_CHAIN; [ -e {run}/three ] || exit 3'")
    look = f"sleep 0.1 && ls {run}/slurm && {{ [ ! -e {run}/two ] || touch {run}/three; }} && touch {run}/two"
    assert text.count("sleep 0.10") == 1
    text = text.replace("sleep 0.10", f"{{ {look}; }}")
    environ = os.environ | {"SLURM_JOB_ID": "7"}
    command = ["bash", "-c", text, "name", word]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ, timeout=60)
    assert done.stdout.split().count(word) == 3 and "early" not in done.stdout
    assert (run / "slurm/early-7").exists()  # what is started last has it to remove
    assert len(commands.calls("sbatch")) == len(commands.calls("scancel")) == 1


@pytest.mark.parametrize("which", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_waits_for_its_image_hears_a_signal_at_once(
    run: Path, commands: Commands, which: signal.Signals
) -> None:
    """It leaves what is left of its time to its successor."""
    session.submit(settings(), run)
    text = script_of(run, "bash -c 'echo up; exit 3'").replace("sleep 0.10", "sleep 60")
    environ = os.environ | {"SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, text=True, env=environ) as job:
        assert job.stdout is not None
        while job.stdout.readline().strip() != "up":
            pass
        while (run / "slurm/early-7").exists():
            time.sleep(0.01)
        deadline = time.monotonic() + 30
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)  # the wait itself begins a moment later
            job.send_signal(which)
        assert job.poll() == 3
        assert job.stdout.read().split().count("up") == 0
    assert not commands.calls("scancel")


def test_a_job_whose_mark_cannot_be_made_is_not_started_anew(run: Path, commands: Commands) -> None:
    """Whether its coordinator had begun, and was told to stop, say, is not known; its successor follows later."""
    session.submit(settings(), run)
    text = script_of(run, "bash -c 'echo up; exit 3'").replace("sleep 0.1 ", "echo waits ")
    text = text.replace(f"mine={run}/slurm/early", "mine=/nowhere/early")
    assert "/nowhere" in text and "echo waits" in text
    environ = os.environ | {"SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, env=environ, timeout=60)
    assert done.returncode == 3 and done.stdout.split().count("up") == done.stdout.split().count("waits") == 1


# ---------------------------------------------------------------- ends

CAPPED = doubles.config(cluster={"max_workers": 1})


def dying(run: Path) -> doubles.FakeBackend:
    """Workers that die as soon as they have begun."""
    backend = doubles.FakeBackend(run, lambda task: "long")
    step = backend.step

    def step_and_die() -> None:
        step()
        backend.workers.clear()

    backend.step = step_and_die  # type: ignore[method-assign]
    return backend


def test_a_link_that_stops_for_good_cancels_its_successor(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not one that is told to leave, and not a search that is no job."""
    backend = dying(run)
    with pytest.raises(Halted):
        doubles.search(run, CAPPED, backend=backend)
    assert commands.calls("scancel") == []
    monkeypatch.setenv(chain.LINK, "1")
    with pytest.raises(Halted):
        doubles.search(run, CAPPED, backend=backend)
    name = f"lemonade-{record.read_identity(run)['run'][:8]}-coordinator"
    assert commands.calls("scancel") == [f"scancel --me --name={name} --state=PENDING"]
    assert record.read_identity(run)["run"]


def test_a_run_that_has_failed_does_not_go_on_by_itself(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where its successor could not be cancelled: that would start as many workers again."""
    monkeypatch.setenv(chain.LINK, "next")
    with pytest.raises(RunFailed, match="workers in a row ended"):
        doubles.search(run, settings(stale_s=0), backend=dying(run))
    launched = doubles.load(run, settings(stale_s=0)).history.num_launched
    assert commands.calls("scancel") and status.status(run)["why_closed"].startswith("9 workers in a row")
    with pytest.raises(Halted, match="9 workers in a row ended"):
        doubles.search(run, settings(stale_s=0), backend=dying(run))
    assert doubles.load(run, settings(stale_s=0)).history.num_launched == launched
    monkeypatch.setenv(chain.LINK, chain.FIRST)
    assert doubles.search(run, settings(stale_s=0), backend=doubles.FakeBackend(run)).state.complete


def killed(run: Path, times: int) -> None:
    for _ in range(times):
        doubles.start(run, doubles.config(), doubles.FakeBackend(run))._ledger.close()


def test_a_chain_whose_coordinators_die_again_and_again_ends(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(run, chain.MAX_CRASHES)
    monkeypatch.setenv(chain.LINK, "1")
    with pytest.raises(RunFailed, match=r"5 coordinators in a row died with no child finished: see slurm/\*.log"):
        doubles.search(run, doubles.config())
    other = doubles.copy(run, run.with_name("other"))
    monkeypatch.setenv(chain.LINK, chain.FIRST)  # a person has submitted it again
    assert doubles.load(other, doubles.config()).history.num_crashes == chain.MAX_CRASHES
    assert doubles.search(other, doubles.config()).state.complete
    monkeypatch.delenv(chain.LINK)
    assert doubles.search(run, doubles.config()).state.complete  # a person goes on


def test_what_a_person_starts_anew_has_as_many_chances_as_a_new_run(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(run, chain.MAX_CRASHES)
    made = doubles.start(run, doubles.config(), doubles.FakeBackend(run))
    made.pardon()
    made._ledger.write()
    made._ledger.close()
    assert doubles.load(run, doubles.config()).history.num_crashes == 0
    monkeypatch.setenv(chain.LINK, "next")
    killed(run, chain.MAX_CRASHES - 1)
    assert doubles.search(run, doubles.config()).state.complete


def test_a_successor_does_not_ask_whether_slurm_takes_workers(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition may be drained for an hour: workers that live go on, and their coordinator must too."""
    doubles.search(run, settings(), backend=doubles.FakeBackend(run))
    more = doubles.config(search={"children": 24}, cluster={"backend": "slurm", "workers": 2})
    commands.fail("sbatch", "sbatch: error: Batch job submission failed: Invalid account\n")
    with pytest.raises(ConfigError, match="Invalid account"):
        doubles.search(run, more, backend=doubles.FakeBackend(run))
    monkeypatch.setenv(chain.LINK, "next")
    assert doubles.search(run, more, backend=doubles.FakeBackend(run)).state.complete


def test_a_child_that_was_finished_or_an_end_in_good_order_breaks_the_series(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(chain.LINK, "1")
    killed(run, chain.MAX_CRASHES - 1)
    made = doubles.start(run, doubles.config(), doubles.FakeBackend(run))
    while made.history.state.num_committed < 1:
        made._turn()
    made._ledger.close()
    assert doubles.load(run, doubles.config()).history.num_crashes == 0
    killed(run, chain.MAX_CRASHES - 1)
    doubles.start(run, doubles.config(), doubles.FakeBackend(run)).close()
    assert doubles.load(run, doubles.config()).history.num_crashes == 0
    notes = doubles.Notes()
    killed(run, 2)
    assert doubles.search(run, doubles.config(), notes=notes).state.complete
    assert len(notes.about("the last 2 coordinators were killed or lost")) == 1


def test_a_link_waits_for_a_coordinator_that_still_lives(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm has given up its node, say, and it does not know yet."""
    killed(run, 1)
    monkeypatch.setenv(chain.LINK, "1")
    waits: list[float] = []
    monkeypatch.setattr(session, "time", type("Clock", (), {"sleep": staticmethod(waits.append)}))
    monkeypatch.setattr(lease.queue, "judge", lambda who: "alive" if len(waits) < 3 else "gone")
    notes = doubles.Notes()
    assert doubles.search(run, doubles.config(), notes=notes).state.complete
    assert waits == [session.HELD_S] * 3 and len(notes.about("Waiting for that")) == 1


def test_a_chain_whose_coordinators_end_before_they_begin_ends(run: Path, commands: Commands) -> None:
    """Out of memory while they read the data, say, or while numpy is imported: no record tells of them."""
    session.submit(settings(setup=["set -f"]), run)

    def job(number: int, command: str) -> subprocess.CompletedProcess[str]:
        text = script_of(run, command)
        environ = os.environ | {"SLURM_JOB_ID": str(number)}
        return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, env=environ)

    for number in range(chain.MAX_CRASHES):
        assert job(number, "bash -c 'kill -9 $$'").returncode == 137
    submitted = len(commands.calls("sbatch"))
    done = job(99, "true")
    assert done.returncode == 1 and "the last 6 coordinators, with this one, ended before they had begun" in done.stderr
    assert len(commands.calls("sbatch")) == submitted
    session.submit(settings(setup=["set -f"]), run)  # mended
    began = len(commands.calls("sbatch"))
    assert job(100, "true").returncode == 0 and len(commands.calls("sbatch")) == began + 1


def test_a_coordinator_that_is_killed_before_the_record_counts_it_has_not_begun(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory while it reads a long record, say; once it has an epoch, the record counts."""
    session.submit(settings(), run)
    (run / "slurm" / "early-7").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(chain.LINK, "next")
    seen: list[bool] = []
    for where, name in ((record, "load"), (lease, "open_epoch"), (session.Coordinator, "adopt")):
        real = getattr(where, name)

        def spy(*args: Any, real: Any = real, **options: Any) -> Any:
            seen.append((run / "slurm" / "early-7").exists())
            return real(*args, **options)

        monkeypatch.setattr(where, name, spy)
    assert doubles.search(run, settings(), backend=doubles.FakeBackend(run)).state.complete
    assert seen == [True, True, False]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENOTCONN])
@pytest.mark.parametrize("what", ["run.json", "journal.log", "config.yaml", "data", "image"])
def test_a_link_that_begins_while_the_file_system_is_away_ends_no_chain(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    backend = doubles.FakeBackend(run)
    made = doubles.start(run, settings(), backend)
    made._turn()
    made.close()
    session._to_submit(settings())
    files.make_folder(run / files.SLURM)
    (run / "slurm" / "config.yaml").write_bytes(configs.dump(settings()))
    monkeypatch.setenv(chain.LINK, "next")
    (run / "slurm" / "early-7").touch()
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "time", SimpleNamespace(sleep=wait))
    error = OSError(number, os.strerror(number), what)

    def failing(real: Any) -> Any:
        def read(path: Path, *args: Any, **options: Any) -> Any:
            if path.name == what:
                raise error
            return real(path, *args, **options)

        return read

    for name in ("read_text", "read_bytes"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))

    def away(*args: Any) -> Any:
        raise error

    if what == "data":
        monkeypatch.setattr(session.data_sets, "load", away)
    if what == "image":
        monkeypatch.setenv(container.AROUND, str(run.parent / "an.sif"))
        (run.parent / "an.sif").touch()
        monkeypatch.setattr(container, "_digest", away)
    with pytest.raises(SystemExit) as ended:
        cli.main(["search", str(run / "slurm/config.yaml"), "--run", str(run)])
    assert ended.value.code == cli.STOPPED and waits == [session.ROOM_S] * 3
    assert not (run / "slurm" / "early-7").exists()


def test_a_link_that_waits_for_the_file_system_knows_what_a_person_said(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run was halted: who does not know that somebody has mended it would end the chain."""
    with pytest.raises(Halted):
        doubles.search(run, CAPPED, backend=dying(run))
    monkeypatch.setenv(chain.LINK, chain.FIRST)
    waits: list[float] = []
    monkeypatch.setattr(session, "time", SimpleNamespace(sleep=waits.append))
    load = record.load

    def away(*args: Any) -> Any:
        if len(waits) < 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return load(*args)

    monkeypatch.setattr(record, "load", away)
    notes = doubles.Notes()
    assert doubles.search(run, settings(), backend=doubles.FakeBackend(run), notes=notes).state.complete
    assert waits == [session.ROOM_S] * 2 and len(notes.about("Stale file handle. To be tried again in 10 minutes")) == 2


@pytest.mark.parametrize("word", ["next", chain.FIRST, chain.TAKE_OVER])
@pytest.mark.parametrize("where", ["lease", "backend", "mark"])
def test_a_link_whose_file_system_fails_once_it_has_the_lease_waits_for_no_coordinator_that_is_itself(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, word: str, where: str
) -> None:
    monkeypatch.setenv(chain.LINK, word)
    monkeypatch.setattr(owner, "judge", JUDGE)
    monkeypatch.setattr(owner, "is_own", IS_OWN)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        assert len(waits) < 5, "it waits for itself"

    monkeypatch.setattr(session, "time", SimpleNamespace(sleep=wait))
    failed: list[str] = []

    def once(real: Any) -> Any:
        def do(*args: Any) -> Any:
            if (run / files.epoch_folder(1)).exists() and not failed:
                failed.append(where)
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        return do

    backend = doubles.FakeBackend(run)
    monkeypatch.setattr(session, "_backend", lambda *args: backend)
    owner_of, name = {"lease": (files, "sync_folder"), "backend": (session, "_backend"), "mark": (files, "remove")}[
        where
    ]
    monkeypatch.setattr(owner_of, name, once(getattr(owner_of, name)))
    (run / files.SLURM).mkdir(parents=True)
    session._prepare(configs.resolve(doubles.config(), doubles.images().shape), doubles.images(), run.with_name("made"))
    run.with_name("made").joinpath(files.RUN).rename(run / files.RUN)
    (run / "slurm" / "early-7").touch()
    if where == "mark" or word == chain.TAKE_OVER:  # the one goes on, the other is known to have come to an end
        assert session.search(doubles.config(), run, doubles.Notes()).state.complete
    else:
        with pytest.raises(Stopped, match="the file system failed when it had just begun"):
            session.search(doubles.config(), run, doubles.Notes())
    assert failed == [where] and waits == [session.ROOM_S] * (where != "mark")
    assert not (run / "slurm" / "early-7").exists()


def test_a_coordinator_that_leaves_in_words_has_begun(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were killed before it are no series any more that goes on."""
    session.submit(settings(), run)
    for number in (7, 8):
        (run / "slurm" / f"early-{number}").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv(chain.LINK, "next")
    monkeypatch.setattr(session, "time", SimpleNamespace(sleep=lambda seconds: None))
    with pytest.raises(Stopped, match="cannot write"):
        doubles.search(run, settings(), lambda task: "storage")
    assert [path.name for path in (run / "slurm").glob("early-*")] == []


def test_a_coordinator_that_waits_or_must_not_go_on_has_begun(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.submit(settings(), run)
    killed(run, 1)
    monkeypatch.setenv(chain.LINK, "next")
    mark, seen = run / "slurm" / "early-7", list[bool]()
    monkeypatch.setattr(session, "time", SimpleNamespace(sleep=lambda seconds: seen.append(mark.exists())))
    monkeypatch.setattr(lease.queue, "judge", lambda who: "alive" if not seen else "gone")
    mark.touch()
    with pytest.raises(Halted):
        doubles.search(run, CAPPED, backend=dying(run))
    assert seen == [False]
    mark.touch()
    with pytest.raises(Halted):  # as the one before it was
        doubles.search(run, CAPPED, backend=dying(run))
    assert not mark.exists()


@pytest.mark.parametrize("link", [True, False])
def test_a_link_that_cannot_write_leaves_late(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, link: bool
) -> None:
    """Its successor begins at once, and would find the same."""
    if link:
        monkeypatch.setenv(chain.LINK, "next")
    waits: list[float] = []
    monkeypatch.setattr(session, "time", SimpleNamespace(sleep=waits.append))
    notes = doubles.Notes()
    with pytest.raises(Stopped, match="cannot write: .*No space left on device"):
        doubles.search(run, settings(), lambda task: "storage", notes=notes)
    assert waits == [session.ROOM_S] * link and len(notes.about("To be tried again in 10 minutes")) == link


# ---------------------------------------------------------------- whether a job's coordinator lives


@pytest.mark.parametrize(
    ("squeue", "sacct", "verdict"),
    [
        ("RUNNING\n", "", "alive"),
        ("PENDING\n", "", "alive"),
        ("TIMEOUT\n", "", "gone"),
        ("NODE_FAIL\n", "", "gone"),
        (None, "COMPLETED\n", "gone"),
        (None, "CANCELLED by 1000\n", "gone"),
        (None, "RUNNING\n", "alive"),
        (None, None, "unknown"),
        ("", "", "unknown"),
    ],
)
def test_slurm_tells_of_a_coordinator_on_another_node(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, squeue: str | None, sacct: str | None, verdict: str
) -> None:
    monkeypatch.setattr(queue.owner, "judge", lambda who: "unknown")
    for name, said in (("squeue", squeue), ("sacct", sacct)):
        commands.fail(name) if said is None else commands.say(name, said)
    assert queue.judge({"slurm_job": "77"}) == verdict
    assert queue.judge({"slurm_job": None}) == "unknown"


@pytest.mark.parametrize(
    ("listed", "mine", "verdict"),
    [("78|x|RUNNING|None|n1\n", True, "gone"), ("78|x|RUNNING|None|n1\n", False, "unknown"), ("", True, "gone"),
     ("77|x|RUNNING|None|n1\n", True, "alive"), (None, True, "unknown")],
)  # fmt: skip
def test_a_job_of_ones_own_that_nobody_has_an_account_of_is_over_once_the_queue_is_without_it(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, mine: bool, verdict: str
) -> None:
    """Slurm has forgotten it, and there is no accounting: a successor that waited long is to take over all the same."""
    monkeypatch.setattr(queue.owner, "judge", lambda who: "unknown")
    monkeypatch.setattr(queue, "ask", lambda *command: listed if command == queue.LIST else None)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "a")
    who = {"slurm_job": "77", "user": os.getuid() + (not mine), "cluster": "a"}
    assert queue.judge(who) == verdict
    if verdict == "gone":  # and not where clusters share a file system: that may be anybody's job
        assert queue.judge(who | {"cluster": "b"}) == queue.judge(who | {"cluster": None}) == "unknown"
        monkeypatch.delenv("SLURM_CLUSTER_NAME")
        said = {queue.LIST: listed, queue.CONFIG: "ClusterName             = a\n"}
        monkeypatch.setattr(queue, "ask", lambda *command: said.get(command))
        assert queue.judge(who) == "gone" and queue.judge(who | {"cluster": "b"}) == "unknown"
        monkeypatch.setattr(queue, "ask", lambda *command: said.get(command, "RUNNING\n"))
        assert queue.judge(who) == "alive" and queue.judge(who | {"cluster": "b"}) == "unknown"
        monkeypatch.setattr(queue, "ask", lambda *command: None if command[0] == "scontrol" else "RUNNING\n")
        assert queue.judge(who) == "alive"  # where this is, is not known, and most sites have but one cluster
        monkeypatch.setattr(queue, "ask", lambda *command: None if command[0] == "scontrol" else "COMPLETED\n")
        assert queue.judge(who) == "unknown" and queue.judge(who | {"cluster": None}) == "gone"


def test_where_there_is_no_squeue_it_is_said_where_there_is_one(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside an image that was not started by its helper, it never answers."""
    session.submit(settings(), run)
    commands.fail("squeue")
    with pytest.raises(ConfigError, match="squeue does not answer; try again later: whether a coordinator is"):
        cancel.cancel(run)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"squeue cannot be found here; .*start it by the helper"):
        cancel.cancel(run)


def test_what_is_known_of_the_process_needs_no_slurm(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("alive", "gone"):
        monkeypatch.setattr(queue.owner, "judge", lambda who, known=known: known)
        assert queue.judge({"slurm_job": "77"}) == known
    assert commands.calls("squeue") == []


def test_who_asks_again_and_again_asks_slurm_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], iter(["alive", "gone"])
    monkeypatch.setattr(queue, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    patient = queue.Patient(lambda who: next(said))
    for now[0] in (0.0, 2.0, 59.0):
        assert patient({"pid": 1}) == "alive"
    now[0] = 61.0
    assert patient({"pid": 1}) == "gone"


@pytest.mark.parametrize("end", [cancel.stop, cancel.cancel])
def test_a_coordinator_that_has_only_waited_is_cancelled_too(run: Path, commands: Commands, end: Any) -> None:
    session.submit(settings(), run)
    commands.say("squeue", "4711\n")
    said = end(run)
    assert "job 4711 (a coordinator in the queue)" in (said if isinstance(said, str) else said[0])
    assert commands.calls("scancel") == ["scancel 4711"]


@pytest.mark.parametrize("end", [cancel.stop, cancel.cancel])
@pytest.mark.parametrize("begun", [False, True])
def test_a_coordinator_that_has_been_started_and_not_begun_is_cancelled_with_those_that_follow(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, end: Any, begun: bool
) -> None:
    """It reads the data, or waits for late files, and has just submitted its successor."""
    session.submit(settings(), run)
    if begun:
        doubles.start(run, settings(), doubles.FakeBackend(run))._ledger.close()
    left, asked = [["4711"], ["4711", "4712"], ["4712"], []], list[tuple[str, ...]]()
    name = chain.job_name(record.read_identity(run)["run"])

    def ask(*command: str) -> str:
        asked.append(command)
        if command[0] == "squeue" and f"--name={name}" in command:
            return "\n".join(left.pop(0) if left else [])
        return f"4711|{name}|RUNNING|None|n1\n4712|{name}|CANCELLED|None|\n"  # are no workers

    monkeypatch.setattr(queue, "ask", ask)
    monkeypatch.setattr(cancel, "POLL_JOB_S", 0.0)
    said = str(end(run))
    assert "job 4711 (a coordinator in the queue)" in said and "job 4712 (a coordinator in the queue)" in said
    assert [command for command in asked if command[0] == "scancel"] == [("scancel", "4711"), ("scancel", "4712")]


def test_stop_without_a_coordinator_cancels_workers_that_wait(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubles.start(run, settings(), doubles.FakeBackend(run))._ledger.close()
    name = f"lemonade-{record.read_identity(run)['run'][:8]}-e1w00"
    commands.say("squeue", f"7_0|{name}|RUNNING|None|n1\n7_1|{name}|PENDING|Priority|\n")
    assert cancel.stop(run).startswith("job 7_1 is cancelled; no coordinator is at work")
    assert commands.calls("scancel") == ["scancel 7_1"]


def test_a_stop_that_slurm_does_not_hear_of_stops_the_coordinator_at_work(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.submit(settings(), run)
    doubles.start(run, settings(), doubles.FakeBackend(run))._ledger.close()
    monkeypatch.setattr(cancel.queue, "judge", lambda who: "alive")
    commands.fail("squeue")
    assert cancel.stop(run).startswith("told process ") and (run / files.stop_order(1)).read_bytes()


def test_what_sbatch_says_of_a_coordinators_job(run: Path, commands: Commands) -> None:
    commands.fail("sbatch", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n")
    with pytest.raises(ConfigError, match="Slurm does not take the coordinator's job now; try again later. It says: "):
        session.submit(settings(), run)
    squeue = commands.folder / "squeue"
    squeue.write_text('#!/bin/bash\n[ -e "$0.asked" ] && echo 4713; touch "$0.asked"\n')  # it was accepted
    assert session.submit(settings(), run) == "4713"
    squeue.write_text("#!/bin/bash\n")
    commands.fail("sbatch", "sbatch: error: Batch job submission failed: Invalid account\n")
    with pytest.raises(ConfigError, match="Slurm refuses the coordinator's job. It says: .*Invalid account"):
        chain.begin(settings(), run)


def test_a_run_with_nothing_left_to_do_is_not_submitted(run: Path, commands: Commands) -> None:
    """The job would wait in the queue for hours to say so."""
    doubles.search(run, settings(stale_s=0), backend=doubles.FakeBackend(run))
    with pytest.raises(ConfigError, match="is complete, 21 children; raise search.children to go on"):
        session.submit(settings(stale_s=0), run)
    more = doubles.config(search={"children": 24}, cluster={"backend": "slurm", "workers": 2, "stale_s": 0})
    assert session.submit(more, run) == "4711"
    failed = run.with_name("failed")
    with pytest.raises(RunFailed):
        doubles.search(failed, settings(stale_s=0), backend=doubles.FakeBackend(failed, lambda task: "fail"))
    with pytest.raises(ConfigError, match="no initial network is valid; mend the cause and give another --run folder"):
        session.submit(settings(stale_s=0), failed)
    with pytest.raises(ConfigError, match="no initial network is valid"):  # as `doctor` tells
        session.check_run(configs.resolve(settings(stale_s=0), doubles.images().shape), doubles.images(), failed)


@pytest.mark.parametrize("name", ['a"b', "50%", "a\\b", "a\nb"])
def test_a_folder_that_no_batch_script_can_name_is_refused(run: Path, commands: Commands, name: str) -> None:
    with pytest.raises(ConfigError, match="sbatch takes no folder with one of"):
        session.submit(settings(), run / name)
    assert not (run / name).exists()


def test_a_link_leaves_where_its_predecessor_was_told_to_stop_and_could_not_say_so(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed while it drained."""
    doubles.start(run, settings(stale_s=0), doubles.FakeBackend(run))._ledger.close()
    (run / files.stop_order(1)).write_bytes(b".")
    with monkeypatch.context() as patch:
        patch.setenv(chain.LINK, "next")
        with pytest.raises(Halted, match="stopped by `lemonade-hpc stop`"):
            doubles.search(run, settings(stale_s=0))
    assert commands.calls("scancel")[-1].endswith("--state=PENDING")
    assert doubles.search(run, settings(stale_s=0), backend=doubles.FakeBackend(run)).state.complete


def test_a_submission_takes_over_where_a_person_says_so(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its coordinator was a search on another machine that has crashed."""
    doubles.start(run, settings(stale_s=0), doubles.FakeBackend(run))._ledger.close()
    monkeypatch.setattr(owner, "judge", lambda who: "unknown")
    with pytest.raises(ConfigError, match="add --take-over"):
        session.submit(settings(stale_s=0), run)
    session.submit(settings(stale_s=0), run, take_over=True)
    assert commands.calls("sbatch")[-1].endswith("coordinator.sbatch take-over")
    monkeypatch.setenv(chain.LINK, "take-over")
    assert chain.begun_by_a_person()
    assert doubles.search(run, settings(stale_s=0)).state.complete


def test_directives_that_a_site_does_not_take_are_left_out_of_a_coordinators_script_too(
    run: Path, commands: Commands
) -> None:
    skipped = settings(skip=["cpus-per-task", "mem", "no-requeue"], coordinator_extra={"mem-per-cpu": "2G"})
    script = session.submission(skipped, run)[0]
    options = [line.partition(" --")[2] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "mem-per-cpu=2G" in options and not {"mem=4096M", "cpus-per-task=1", "no-requeue"} & set(options)
    options = [line.partition(" --")[2] for line in session.submission(settings(), run)[0].splitlines()]
    assert {"mem=4096M", "cpus-per-task=1", "no-requeue"} <= set(options)


def test_scripts_cannot_be_shown_where_slurm_is_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.install(monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch, squeue, scancel, srun cannot be found here"):
        session.submission(settings(), run)


def test_the_last_words_of_a_coordinator_that_was_taken_over_are_no_news(run: Path) -> None:
    """It may have said them later than its successor, of a terminal, began."""
    for epoch, job in ((1, "8"), (2, None)):
        (run / files.epoch_folder(epoch)).mkdir(parents=True)
        (run / files.owner(epoch)).write_text(json.dumps({"owner": {"slurm_job": job}}))
    began_s = (run / files.owner(2)).stat().st_mtime
    for job, news in (("8", False), ("9", True)):
        log = run / f"coordinator-{job}.log"
        log.touch()
        os.utime(log, (began_s, began_s + 1))
        assert status._is_news(run, log, [1, 2]) == news


def test_the_status_shows_what_waits_in_the_queue_of_a_run_that_is_not_complete(run: Path, commands: Commands) -> None:
    with pytest.raises(Halted):
        doubles.search(run, settings(max_workers=1, stale_s=0), backend=dying(run))
    id = record.read_identity(run)["run"]
    (run / files.SLURM).mkdir()
    log = run / files.SLURM / "coordinator-8.log"
    log.write_text("module: not found\nSubmitted batch job 9\n")
    name = chain.job_name(id)
    commands.say("squeue", f"9|{name}|PENDING|Dependency|\n8|{name}|FAILED|NonZeroExitCode|n1\n7|x|RUNNING|None|n2\n")
    told = status.status(run, lambda who: "gone")
    assert told["coordinators"] == [{"id": "9", "state": "PENDING", "reason": "Dependency", "node": ""}]
    assert told["log"] == str(log) and told["log_ends"] == "module: not found" and told["job_name"] is None
    owned = json.loads((run / files.owner(1)).read_text())
    for job, later_s, newer in (("7", 1, True), ("8", 1, False), ("10", -1, False), (None, 1, True), (None, -1, False)):
        (run / files.owner(1)).write_text(json.dumps(owned | {"owner": owned["owner"] | {"slurm_job": job}}))
        began_s = (run / files.owner(1)).stat().st_mtime
        os.utime(log, (began_s, began_s + later_s))
        assert status.status(run, lambda who: "gone")["log_is_newer"] == newer
    (run / files.EPOCHS).rename(run / "away")  # a first one that never began
    assert status.status(run, lambda who: "gone")["log_is_newer"]
    (run / "away").rename(run / files.EPOCHS)
    (run / files.SLURM / "coordinator.sbatch").touch()
    assert status.status(run, lambda who: "gone")["job_name"] == name
    commands.fail("squeue")
    assert status.status(run, lambda who: "gone")["coordinators"] is None


def test_a_coordinator_whose_job_is_in_the_queue_lives_and_is_no_other_once_it_has_left(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm is asked once, and lines that are none are passed over."""
    monkeypatch.setattr(queue.owner, "judge", lambda who: "unknown")
    made = doubles.start(run, settings(), doubles.FakeBackend(run))
    path = run / files.owner(1)
    who = json.loads(path.read_text())
    who["owner"] |= {"host": "elsewhere", "slurm_job": "8"}
    path.write_text(json.dumps(who))
    name = chain.job_name(record.read_identity(run)["run"])
    commands.say("squeue", f"Welcome!\n\n8|{name}|RUNNING|None|n1\n9|{name}|PENDING|Dependency|\n")
    told = status.status(run)
    assert told["state"].startswith("running: ") and [job["id"] for job in told["coordinators"]] == ["8", "9"]
    assert len(commands.calls("squeue")) == 1 and not told["stopping"]
    (run / files.stop_order(1)).write_bytes(b".")
    assert status.status(run)["stopping"]
    made.close()
    told = status.status(run)
    assert told["state"] == "stopped" and [job["id"] for job in told["coordinators"]] == ["9"] and not told["stopping"]


def test_a_run_that_was_local_and_is_submitted_is_looked_for_in_the_queue(run: Path, commands: Commands) -> None:
    doubles.start(run, doubles.config(), doubles.FakeBackend(run)).close()
    session.submit(settings(), run)
    name = chain.job_name(record.read_identity(run)["run"])
    commands.say("squeue", f"9|{name}|PENDING|Priority|\n")
    assert [job["id"] for job in status.status(run)["coordinators"]] == ["9"]


def test_why_a_run_was_left_is_on_record_until_somebody_goes_on(run: Path, commands: Commands) -> None:
    with pytest.raises(Halted):
        doubles.search(run, CAPPED, backend=dying(run))
    told = status.status(run, lambda who: "gone")
    assert told["state"] == "stopped" and told["why_closed"].startswith("cluster.max_workers: 1 workers have been")
    killed(run, 1)
    told = status.status(run, lambda who: "gone")
    assert told["state"] == "stopped" and told["why_closed"] is None


# ---------------------------------------------------------------- stop


def test_stop_drains_a_run_that_can_go_on(run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = doubles.FakeBackend(run)
    made = doubles.start(run, doubles.config(), backend)
    while made.history.state.num_committed < 4:
        made._turn()
    monkeypatch.setattr(cancel.queue, "judge", lambda who: "alive")
    assert cancel.stop(run).startswith("told process ")
    with pytest.raises(Stopped, match="stopped by `lemonade-hpc stop`"):
        made.search()
    made.close()
    assert {event["kind"] for event in doubles.events(run, doubles.config(), "lost")} <= {"stopped"}
    assert not made.history.state.complete and not backend.workers
    monkeypatch.undo()
    doubles.install(monkeypatch)
    assert doubles.search(run, doubles.config()).state.complete
    doubles.assert_sound(run)


def test_stop_ends_the_chain_also_where_no_coordinator_is_at_work(run: Path, commands: Commands) -> None:
    session.submit(settings(), run)
    assert cancel.stop(run).startswith("no coordinator is at work")
    doubles.start(run, settings(), doubles.FakeBackend(run))._ledger.close()
    commands.say("squeue", "4712\n")
    told = cancel.stop(run)
    assert told.startswith("job 4712 (a coordinator in the queue) is cancelled; no coordinator is at work")
    assert commands.calls("scancel") == ["scancel 4712"] and not (run / files.stop_order(1)).read_bytes()


def test_where_a_coordinators_job_hangs_in_its_end_its_workers_are_cancelled_all_the_same(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    doubles.start(run, settings(), doubles.FakeBackend(run))._ledger.close()
    (run / files.SLURM).mkdir()
    monkeypatch.setattr(queue.owner, "judge", lambda who: "unknown")
    worker = f"lemonade-{record.read_identity(run)['run'][:8]}-e1w00"
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> str:
        asked.append(command)
        if command == queue.LIST:
            return f"80_0|{worker}|RUNNING|None|n1\n"
        return "" if f"--states={chain.LIVING}" in command else "COMPLETING\n"

    monkeypatch.setattr(queue, "ask", ask)
    monkeypatch.setattr(cancel, "POLL_JOB_S", 0.0)
    monkeypatch.setattr(cancel, "LEAVE_S", 0.01)
    with pytest.raises(ConfigError, match=r"^job 80_0; job 77, the coordinator, .* with --take-over goes on"):
        cancel.cancel(run)
    assert ("scancel", "80_0") in asked
    later = asked[asked.index(("scancel", "77")) :]
    assert any(command[0] == "squeue" and f"--states={chain.LIVING}" in command for command in later)


def test_a_coordinator_on_another_node_is_cancelled_by_its_job(
    run: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    doubles.start(run, settings(), doubles.FakeBackend(run))._ledger.close()
    monkeypatch.setattr(queue.owner, "judge", lambda who: "unknown")
    states = iter(["RUNNING", "RUNNING", "COMPLETING", "CANCELLED", ""])
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> str:
        asked.append(command)
        return next(states) if command[0] == "squeue" else ""

    monkeypatch.setattr(queue, "ask", ask)
    monkeypatch.setattr(cancel, "POLL_JOB_S", 0.0)
    (ended,) = cancel.cancel(run)
    assert ended.startswith("coordinator (process ") and ended.endswith("Slurm job 77)")
    assert ("scancel", "77") in asked
