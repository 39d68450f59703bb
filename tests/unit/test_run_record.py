"""The record: which lines are in effect, who may write the next one, what makes a run folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import journal, lease, owner, record, session
from lemonade_hpc.run.journal import Journal, RecordError
from lemonade_hpc.run.lease import Held

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

LATE = {"event": "sealed", "children": [0, 0], "file": "late", "sha256": ""}


# ---------------------------------------------------------------- epochs and journals


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new run folder whose earlier coordinators count as gone."""
    monkeypatch.setattr(owner, "judge", lambda who: "gone")
    session._prepare(doubles.config(), doubles.images(), tmp_path / "run")
    return tmp_path / "run"


SETTINGS = doubles.config()


def open_next(run: Path, *, take_over: bool = False, workers: tuple[str, ...] = ()) -> Journal:
    loaded = doubles.load(run, SETTINGS)
    return lease.open_epoch(run, SETTINGS, loaded, workers, take_over=take_over)


def lives(run: Path, num_epochs: int, per_epoch: int = 4) -> list[dict[str, Any]]:
    """A few coordinators' lives, one after another; the events they recorded."""
    events = doubles.straight(SETTINGS, lambda number: False)[1][: num_epochs * per_epoch]
    for k in range(num_epochs):
        written = open_next(run)
        written.append(events[k * per_epoch : (k + 1) * per_epoch])
        written.close()
    return events


def in_effect(run: Path) -> list[dict[str, Any]]:
    return [event for event in doubles.events(run, SETTINGS) if event["event"] != "epoch"]


def test_a_new_run_has_an_empty_record(run: Path) -> None:
    loaded = doubles.load(run, SETTINGS)
    assert (loaded.epoch, loaded.link, loaded.history.num_records, loaded.warnings) == (0, "", 0, ())


def test_a_record_goes_on_across_epochs(run: Path) -> None:
    events = lives(run, 3)
    loaded = doubles.load(run, SETTINGS)
    assert loaded.epoch == 3 and loaded.warnings == () and loaded.mended == {}
    assert in_effect(run) == json.loads(files.dumps(events))
    assert loaded.history.num_records == len(events)
    starts = doubles.events(run, SETTINGS, "epoch")
    assert [start["epoch"] for start in starts] == [1, 2, 3]
    assert starts[0]["continues"] is None
    assert [start["continues"]["records"] for start in starts[1:]] == [4, 8]


def test_what_a_superseded_coordinator_still_writes_is_void(run: Path) -> None:
    events = doubles.straight(SETTINGS, lambda number: False)[1]
    old = open_next(run)
    old.append(events[:2])
    new = open_next(run)
    old.append(events[2:6])
    new.append(events[2:4])
    old.append(events[6:8])
    assert in_effect(run) == json.loads(files.dumps(events[:4]))
    assert doubles.load(run, SETTINGS).warnings == ()
    third = open_next(run)
    old.append(events[8:9])
    new.append(events[9:10])
    third.append(events[4:5])
    assert in_effect(run) == json.loads(files.dumps(events[:5]))
    for one in (old, new, third):
        one.close()


def test_an_epoch_that_wrote_nothing_is_passed_through(run: Path) -> None:
    events = lives(run, 1)
    for _ in range(3):
        open_next(run).close()
    assert doubles.load(run, SETTINGS).epoch == 4
    assert in_effect(run) == json.loads(files.dumps(events))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_damage_to_one_copy_is_bridged_noted_and_mended(run: Path, which: int, epoch: int) -> None:
    events = lives(run, 3)
    path = run / files.journals(epoch)[which]
    sound = path.read_bytes()
    hurt = bytearray(sound)
    hurt[len(hurt) // 2] ^= 4
    path.write_bytes(bytes(hurt))
    loaded = doubles.load(run, SETTINGS)
    assert in_effect(run) == json.loads(files.dumps(events))
    assert len(loaded.warnings) == 1 and str(path) in loaded.warnings[0] and "damaged after line" in loaded.warnings[0]
    open_next(run).close()
    assert path.read_bytes() == sound
    assert doubles.load(run, SETTINGS).warnings == ()


@pytest.mark.parametrize("which", [0, 1])
def test_a_copy_that_is_gone_is_mended(run: Path, which: int) -> None:
    events = lives(run, 2)
    path = run / files.journals(1)[which]
    path.unlink()
    loaded = doubles.load(run, SETTINGS)
    assert len(loaded.warnings) == 1 and in_effect(run) == json.loads(files.dumps(events))
    open_next(run).close()
    assert path.exists() and doubles.load(run, SETTINGS).warnings == ()


def test_a_crash_between_the_copies_is_no_damage_and_the_second_copy_is_completed(run: Path) -> None:
    events = doubles.straight(SETTINGS, lambda number: False)[1]
    written = open_next(run)
    written.append(events[:2])
    written._writers[0].append(events[2:3])  # and killed
    written.close()
    loaded = doubles.load(run, SETTINGS)
    assert loaded.warnings == () and in_effect(run) == json.loads(files.dumps(events[:3]))
    open_next(run).close()
    first, second = (run / path for path in files.journals(1))
    assert first.read_bytes() == second.read_bytes()
    first.unlink()  # from now on the copy alone is enough
    assert in_effect(run) == json.loads(files.dumps(events[:3]))


def test_a_copy_that_lacks_lines_of_an_epoch_long_past_is_damage(run: Path) -> None:
    """A crash explains it for the newest epoch alone: a successor completes the copies."""
    lives(run, 2)
    path = run / files.journals(1)[1]
    path.write_bytes(path.read_bytes()[:-200])
    assert len(doubles.load(run, SETTINGS).warnings) == 1


def test_a_reader_beside_a_living_writer_sees_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that come between the reading of the two copies must not look like a loss."""
    events = doubles.straight(SETTINGS, lambda number: False)[1]
    written = open_next(run)
    written.append(events[:1])
    rest, real = iter(events[1:]), Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        content = real(path)
        if path.name.startswith("journal"):
            written.append([next(rest)])
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    loaded = doubles.load(run, SETTINGS)
    assert loaded.warnings == () and loaded.history.num_records >= 1
    written.close()


def test_damage_to_both_copies_at_one_place_says_what_is_lost(run: Path) -> None:
    lives(run, 2)
    for path in files.journals(1):
        hurt = bytearray((run / path).read_bytes())
        hurt[len(hurt) // 2] ^= 1
        (run / path).write_bytes(bytes(hurt))
    with pytest.raises(RecordError, match=r"epochs/000001: both copies .* damaged after line \d; a later .* is lost"):
        doubles.load(run, SETTINGS)


def test_damage_to_both_first_lines_says_so(run: Path) -> None:
    lives(run, 1)
    for path in files.journals(1):
        (run / path).write_bytes(b"?" + (run / path).read_bytes()[1:])
    with pytest.raises(RecordError, match=r"epochs/000001: both copies of the journal have lost their first line"):
        doubles.load(run, SETTINGS)


def test_damage_to_both_ends_of_the_last_epoch_loses_only_that_end(run: Path) -> None:
    """Nobody has seen what stood there but workers, whose reports are read again."""
    events = lives(run, 2)
    for path in files.journals(2):
        (run / path).write_bytes((run / path).read_bytes()[:-5])
    assert in_effect(run) == json.loads(files.dumps(events[:-1]))


@pytest.mark.parametrize("cut_second", [False, True])
@pytest.mark.parametrize("line", [1, 3, -2, -1])
def test_damage_to_both_copies_of_the_last_epoch_is_no_end(run: Path, line: int, cut_second: bool) -> None:
    """Else everything behind it would go in silence, and with it the files that still hold it."""
    lives(run, 2)
    for path in files.journals(2):
        lines = (run / path).read_bytes().splitlines(keepends=True)
        assert len(lines) > 4
        rest = [] if cut_second and path.name == "journal.copy" else lines[line:][1:]
        (run / path).write_bytes(b"".join([*lines[:line], lines[line].replace(b'"', b"'", 1), *rest]))
    with pytest.raises(RecordError, match=r"epochs/000002: both copies .* damaged at line \d+, .* is lost"):
        doubles.load(run, SETTINGS)


def test_events_that_contradict_one_another_are_an_error_in_words(run: Path) -> None:
    events = doubles.straight(SETTINGS, lambda number: False)[1]
    written = open_next(run)
    written.append([*events[:2], events[1]])
    written.close()
    with pytest.raises(RecordError, match=r"epochs/000001: event 2 of the run, 'committed', does not follow .* not in"):
        doubles.load(run, SETTINGS)


@pytest.mark.parametrize("writer", [0, 1])
def test_a_journal_that_failed_takes_no_more(run: Path, writer: int) -> None:
    """Else the first copy could hold the same events twice."""
    events = doubles.straight(SETTINGS, lambda number: False)[1]
    written = open_next(run)
    written.append(events[:1])

    def full(bodies: list[str], *, durable: bool = True) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written._writers[writer], "append_texts", full)
        with pytest.raises(OSError, match="No space left"):
            written.append(events[1:2])
    with pytest.raises(OSError, match="No space left"):
        written.append(events[1:2])
    written.close()
    assert in_effect(run) == json.loads(files.dumps(events[: 1 + writer]))


# ---------------------------------------------------------------- the lease


def test_a_living_owner_keeps_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives(run, 1)
    monkeypatch.undo()  # it was this process
    with pytest.raises(Held, match=rf"held by process \d+ on {owner.identity()['host']}, which is running"):
        open_next(run)
    assert files.epochs(run) == [1]


def test_an_owner_on_another_host_keeps_the_run_until_a_person_says_it_is_gone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives(run, 1)
    monkeypatch.undo()
    here = owner.identity()
    monkeypatch.setattr(owner, "identity", lambda pid=None: here | {"host": "elsewhere"})
    with pytest.raises(Held, match=r"whether it still runs cannot be told from here.* add --take-over"):
        open_next(run)
    open_next(run, take_over=True).close()
    assert files.epochs(run) == [1, 2]


def test_a_dead_owner_is_followed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives(run, 1)
    monkeypatch.undo()
    path = run / files.owner(1)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"owner": content["owner"] | {"started": 1}}))
    open_next(run).close()
    assert files.epochs(run) == [1, 2]


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"owner": {}}'])
def test_an_owner_that_cannot_be_read_needs_a_person(
    run: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    lives(run, 1)
    monkeypatch.undo()
    path = run / files.owner(1)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(Held, match=r"who holds it cannot be told: .*--take-over"):
        open_next(run)
    open_next(run, take_over=True).close()
    assert files.epochs(run) == [1, 2]


def test_a_coordinator_that_writes_cannot_be_taken_over(run: Path) -> None:
    events = lives(run, 1)
    loaded = doubles.load(run, SETTINGS)
    assert events
    writing = open_next(run)
    stale = doubles.load(run, SETTINGS)
    writing.append([{"event": "attempt", "child": 1, "attempt": "e2a1", "worker": "w"}])
    with pytest.raises(Held, match="its coordinator is at work"):
        lease.open_epoch(run, SETTINGS, stale, (), take_over=True)
    with pytest.raises(Held, match="its coordinator is at work"):
        lease.open_epoch(run, SETTINGS, loaded, (), take_over=True)
    assert files.epochs(run) == [1, 2]
    assert not list((run / files.EPOCHS).glob(".tmp-*"))
    writing.close()


def test_one_that_writes_while_it_is_taken_over_keeps_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says between the last look and the rename would be void, and it may have deleted weights since."""
    lives(run, 1)
    writing, rename = open_next(run), os.rename
    loaded = doubles.load(run, SETTINGS)

    def slow(old: Path, new: Path) -> None:
        if new.name == "000003":
            writing.append([LATE])
        rename(old, new)

    monkeypatch.setattr(lease.os, "rename", slow)
    with pytest.raises(Held, match="its coordinator is at work"):
        lease.open_epoch(run, SETTINGS, loaded, (), take_over=True)
    assert [path.name for path in sorted((run / files.EPOCHS).iterdir())] == ["000001", "000002"]
    assert in_effect(run)[-1] == LATE
    writing.close()


def test_what_was_recorded_after_the_record_was_read_is_not_lost(run: Path) -> None:
    """The coordinator before ended in between: its last lines would be void without a word."""
    lives(run, 1)
    writing, loaded = open_next(run), doubles.load(run, SETTINGS)
    writing.append([LATE])
    writing.close()  # gone
    with pytest.raises(lease.Behind, match="another coordinator has just written"):
        lease.open_epoch(run, SETTINGS, loaded, (), take_over=False)
    assert in_effect(run)[-1] == LATE
    lease.open_epoch(run, SETTINGS, doubles.load(run, SETTINGS), (), take_over=False).close()
    assert files.epochs(run) == [1, 2, 3]


def test_of_racing_threads_exactly_one_wins(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives(run, 1)
    loaded = doubles.load(run, SETTINGS)
    for number in range(2, 12):
        barrier, won, lost = threading.Barrier(4), list[Journal](), list[Held]()

        def start(gate: threading.Barrier, won: list[Journal] = won, lost: list[Held] = lost) -> None:
            loaded = doubles.load(run, SETTINGS)
            gate.wait()
            try:
                won.append(lease.open_epoch(run, SETTINGS, loaded, (), take_over=False))
            except Held as error:
                lost.append(error)

        threads = [threading.Thread(target=start, args=(barrier,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 3)
        assert files.epochs(run)[-1] == number
        won[0].close()
    assert loaded.epoch == 1 and not list((run / files.EPOCHS).glob(".tmp-*"))
    assert doubles.load(run, SETTINGS).epoch == 11


RACER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import run_doubles as doubles
from lemonade_hpc.run import lease
settings, run = doubles.config(), Path(sys.argv[1])
loaded = doubles.load(run, settings)
print("ready", flush=True)
input()
try:
    lease.open_epoch(run, settings, loaded, (), take_over=False)
    print("won", flush=True)
except lease.Held as error:
    print("Held", error, flush=True)
input()
"""


def test_of_racing_processes_exactly_one_wins(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    command = [sys.executable, "-c", RACER, str(run), str(Path(__file__).parent)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None and racer.stdin is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")  # type: ignore[union-attr]
        said = sorted(racer.stdout.readline().split()[0] for racer in racers)  # type: ignore[union-attr]
    finally:
        for racer in racers:
            racer.communicate("end\n", timeout=20)
    assert said == ["Held", "won"]
    assert files.epochs(run) == [1]


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_crash_while_an_epoch_is_made_is_harmless(run: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    events = lives(run, 1)

    class Killed(BaseException):
        pass

    def killed(*arguments: object, **named: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((files, "write") if step == "write" else (lease.os, "rename")), killed)
        with pytest.raises(Killed):
            open_next(run)
    assert len(list((run / files.EPOCHS).glob(".tmp-*"))) == 1
    assert files.epochs(run) == [1]
    assert in_effect(run) == json.loads(files.dumps(events))
    open_next(run).close()
    assert files.epochs(run) == [1, 2]


def test_a_folder_of_epochs_that_may_not_be_written_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the answer of the operating system is given here."""

    def forbidden(path: Path, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(ConfigError, match="epochs: no permission to write there") as caught:
        open_next(run)
    assert not isinstance(caught.value, Held)


def test_a_full_disk_while_an_epoch_is_made_leaves_nothing(run: Path) -> None:
    lives(run, 1)
    before = doubles.contents(run)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease.os, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            open_next(run)
    assert doubles.contents(run) == before


def test_an_epoch_has_mailboxes_for_the_workers_it_adopts(run: Path) -> None:
    open_next(run, workers=("e1w00", "e1w01")).close()
    for name in ("e1w00", "e1w01"):
        assert (run / files.assigned_log(1, name)).read_bytes() == b""
    assert (run / files.heartbeat(1)).read_bytes() == b""
    owned = json.loads((run / files.owner(1)).read_text())
    assert owned["config"]["seed"] == 3 and owned["owner"]["pid"] > 0


# ---------------------------------------------------------------- run.json


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run folder \(it has no run.json\)"):
        record.read_identity(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run.json: cannot be read: IsADirectoryError"),
        ("", "run.json: cannot be read: JSONDecodeError"),
        ("[]", "run.json: cannot be read: TypeError"),
        ("{}", "run.json: cannot be read: KeyError: 'schema'"),
        ('{"schema": 1}', "run.json: cannot be read: KeyError: 'run'"),
        ('{"schema": "one"}', "run.json: cannot be read: ValueError"),
        ('{"schema": 2}', r"run.json: written by a newer version \(schema 2, this one reads up to 1\)"),
    ],
)
def test_a_run_json_that_cannot_be_used_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "run.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        record.read_identity(tmp_path)


def test_every_key_of_run_json_is_needed(run: Path) -> None:
    content = json.loads((run / files.RUN).read_text())
    assert record.read_identity(run) == content
    for where in ((), ("data",)):
        inner = content[where[0]] if where else content
        for key in [key for key in inner if key not in ("code", "image")]:
            less = json.loads(json.dumps(content))
            del (less[where[0]] if where else less)[key]
            (run / files.RUN).write_text(json.dumps(less))
            with pytest.raises(ConfigError, match=f"cannot be read: KeyError: '{key}'"):
                record.read_identity(run)


def test_journals_of_a_run_moved_elsewhere_are_read(run: Path) -> None:
    events = lives(run, 2)
    moved = run.parent / "moved here"
    shutil.move(run, moved)
    assert in_effect(moved) == json.loads(files.dumps(events))
    assert journal.read(moved).warnings == []
