"""One call of `search`: what it refuses before anything is written, what may change, how it goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.config import Config, ConfigError, resolve, to_dict
from lemonade_hpc.run import backends, owner, record, session
from lemonade_hpc.run.coordinator import Coordinator, Stopped
from lemonade_hpc.run.lease import Held
from lemonade_hpc.run.ledger import NoRoom
from lemonade_hpc.run.log import Message
from lemonade_hpc.search import evolution

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

SETTINGS = doubles.config()


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.install(monkeypatch)


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


# ---------------------------------------------------------------- refusals

OTHER: list[tuple[str, dict[str, Any]]] = [
    ("seed", {"seed": 4}),
    ("objectives.1.max", {"objectives": [{"name": "val_error"}, {"name": "params", "min": 300, "max": 30000}]}),
    ("objectives.1.name", {"objectives": [{"name": "val_error"}, {"name": "macs", "min": 300, "max": 20000}]}),
    ("objectives.2.name", {"objectives": [*doubles.BASE["objectives"], {"name": "macs"}]}),
    ("search.mode", {"search": {"mode": "steady_state"}}),
    ("search.accepted", {"search": {"accepted": 5}}),
    ("search.operators.0", {"search": {"operators": ["widen", "insert"]}}),
    ("search.operators.2", {"search": {"operators": ["insert", "widen"]}}),
    ("search.inheritance", {"search": {"inheritance": False}}),
    ("training.lr", {"training": {"lr": 0.5}}),
    ("training.deterministic", {"training": {"deterministic": False}}),
    ("data.validation", {"data": {"validation": 100}}),
]


def changed(change: dict[str, Any]) -> Config:
    base = {**doubles.BASE, "training": {}} if "training" in change else doubles.BASE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doubles, "BASE", base)
        return doubles.config(**change)


@pytest.mark.parametrize(("key", "change"), OTHER)
def test_a_changed_setting_is_refused_by_name_and_nothing_is_changed(
    run: Path, key: str, change: dict[str, Any]
) -> None:
    session._prepare(SETTINGS, doubles.images(), run)
    before = doubles.contents(run)
    with pytest.raises(ConfigError) as refusal:
        doubles.search(run, changed(change))
    text = str(refusal.value)
    assert f"was started with {key} = " in text or f"was started without {key}, now it is 'macs'" in text
    assert (
        "only cluster, container, storage, search.children, data.root may change" in text
        and "another --run folder" in text
    )
    assert doubles.contents(run) == before


def test_every_setting_is_compared_but_those_that_may_change(run: Path) -> None:
    flat = session._flat(to_dict(SETTINGS))
    free = {key for key in flat if key.startswith(session.MAY_CHANGE)}
    assert "search.children" in free and "cluster.workers" in free and "storage.keep" in free
    assert {key.partition(".")[0] for key in flat.keys() - free} == {
        "seed", "data", "space", "objectives", "search", "training",
    }  # fmt: skip
    assert flat["objectives.1.max"] == 20000 and flat["search.operators.0"] == "insert"


def test_other_data_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.search(run, SETTINGS)
    before = doubles.contents(run)
    monkeypatch.setattr(session.data_sets, "load", lambda data: doubles.images(seed=1))
    with pytest.raises(ConfigError, match=r"started with other data than digits gives now \(checksum differs\)"):
        doubles.search(run, SETTINGS)
    assert doubles.contents(run) == before


@pytest.mark.parametrize("kind", ["folder", "file", "below a file", "run.json"])
def test_what_is_no_run_folder_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    if kind == "folder":
        run.mkdir()
        (run / "thesis.tex").write_text("years of work")
    elif kind == "run.json":
        run.mkdir()
        (run / files.RUN).write_text("{}")
    else:
        run.write_text("a file")
        run = run / "below" if kind == "below a file" else run
    before = doubles.contents(tmp_path)
    message = {
        "folder": r"exists and is not a run folder \(it has no run.json\); give another --run",
        "file": r"exists and is not a run folder",
        "below a file": r"cannot be written: .*Not a directory",
        "run.json": r"run.json: cannot be read",
    }[kind]
    with pytest.raises(ConfigError, match=message):
        doubles.search(run, SETTINGS)
    assert doubles.contents(tmp_path) == before


def test_an_empty_folder_and_one_with_a_torn_start_are_new_runs(tmp_path: Path) -> None:
    for name in ("empty", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / f"{files.TEMPORARY}run.json-7").write_text("{half")
    for name in ("empty", "torn"):
        assert doubles.search(tmp_path / name, SETTINGS).state.complete
    assert not list((tmp_path / "torn").glob(f"{files.TEMPORARY}*"))


def test_a_folder_where_nothing_may_be_written_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the answer of the operating system is given here."""
    session._prepare(SETTINGS, doubles.images(), run)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="no permission to write there"):
        doubles.search(run, SETTINGS)

    def forbidden(path: Path, value: object, *, new: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "write_json", forbidden)
    with pytest.raises(ConfigError, match="cannot be written: .*Permission denied"):
        doubles.search(run.with_name("new"), SETTINGS)


def test_of_two_first_starts_the_faster_one_says_what_the_run_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one has seen an empty folder; it must neither replace `run.json` nor go on with other settings."""
    write_json = files.write_json

    def overtaken(path: Path, value: object, *, new: bool = False) -> None:
        monkeypatch.setattr(files, "write_json", write_json)
        assert doubles.search(run, SETTINGS).state.complete
        write_json(path, value, new=new)

    monkeypatch.setattr(files, "write_json", overtaken)
    with pytest.raises(ConfigError, match="was started with seed = 3, now it is 4"):
        doubles.search(run, doubles.config(seed=4))
    doubles.assert_sound(run)
    assert doubles.search(run, SETTINGS).state.complete


def test_a_full_disk_at_the_start_is_no_refusal(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object, *, new: bool = False) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        with pytest.raises(Stopped, match="the file system fails: .*No space left"):
            doubles.search(run, SETTINGS)
    assert doubles.search(run, SETTINGS).state.complete


def test_an_error_that_is_not_the_disks_is_not_called_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*arguments: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Coordinator, "search", odd)
    with pytest.raises(OSError, match="Too many open files"):
        doubles.search(run, SETTINGS)


def test_limits_that_no_initial_network_satisfies_are_refused_before_anything_is_written(run: Path) -> None:
    settings = doubles.config()
    limits = tuple(o.model_copy(update={"max": 310.0}) if o.name == "params" else o for o in settings.objectives)
    with pytest.raises(ConfigError, match="no initial network satisfies"):
        doubles.search(run, settings.model_copy(update={"objectives": limits}))
    assert not run.exists()


def test_data_that_cannot_be_read_is_refused_before_anything_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(data: object) -> None:
        raise ConfigError("data: nothing there")

    monkeypatch.setattr(session.data_sets, "load", unreadable)
    with pytest.raises(ConfigError, match="nothing there"):
        doubles.search(run, SETTINGS)
    assert not run.exists()


def test_a_run_that_another_holds_is_refused_and_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = doubles.start(run, SETTINGS, doubles.FakeBackend(run))
    made._turn()
    before = doubles.contents(run)
    monkeypatch.setattr(owner, "judge", lambda who: "alive")
    with pytest.raises(Held, match="held by process"):
        doubles.search(run, SETTINGS)
    monkeypatch.setattr(owner, "judge", lambda who: "unknown")
    with pytest.raises(Held, match="--take-over"):
        doubles.search(run, SETTINGS)
    assert doubles.contents(run) == before
    assert doubles.search(run, SETTINGS, take_over=True).state.complete
    made.close()
    doubles.assert_sound(run)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": {"workers": 1, "retries": 7, "child_timeout_min": 1.0, "idle_exit_min": 3.0, "cpus_per_worker": 2}},
        {"storage": {"keep": "all", "seal_every": 7}},
        {"search": {"children": 24}},
    ],
)
def test_what_may_change_is_accepted_in_the_middle_of_a_run(run: Path, change: dict[str, Any]) -> None:
    made = doubles.start(run, SETTINGS, doubles.FakeBackend(run))
    for _ in range(6):
        made._turn()
    made.close()
    history = doubles.search(run, doubles.config(**change))
    assert history.state.complete
    assert history.state.num_committed == 3 + change.get("search", {}).get("children", 18)
    newest = json.loads((run / files.owner(2)).read_text())
    assert newest["config"] == to_dict(doubles.config(**change))
    assert json.loads((run / files.RUN).read_text())["config"] == to_dict(SETTINGS)
    doubles.assert_sound(run)


def test_what_the_coordinator_before_commits_while_the_record_is_read_counts(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends between the reading of the record and the lease, as with a successor that waits for its end."""
    settings = doubles.config(search={"mode": "steady_state", "children": 40})
    before = doubles.start(run, settings, doubles.FakeBackend(run))
    for _ in range(5):
        before._turn()
    load, committed, trained = record.load, set[int](), set[int]()

    def slow(*arguments: Any) -> record.Loaded:
        loaded = load(*arguments)
        if not committed:
            committed.add(0)
            for _ in range(15):
                before._turn()
            before.close()
            committed.update(e["outcome"]["child"] for e in doubles.events(run, settings, "committed"))
        return loaded

    def behave(task: Message) -> None:
        trained.add(task["child"])

    with monkeypatch.context() as patch:
        patch.setattr(session.record, "load", slow)
        history = doubles.search(run, settings, behave)
    assert history.state.complete and 5 < len(committed) < 40
    assert not committed & trained
    assert files.epochs(run) == [1, 2]
    doubles.assert_sound(run)


def test_raising_children_continues_a_finished_run_as_if_it_had_been_so_from_the_start(run: Path) -> None:
    doubles.search(run, doubles.config(search={"children": 12}))
    more = doubles.config(search={"children": 24})
    history = doubles.search(run, more)
    at_once = doubles.search(run.with_name("other"), more)
    assert history.state.num_committed == 27
    assert doubles.front(history) == doubles.front(at_once)
    assert [path.name for path in run.glob("population.*")] == ["population.e2.h5"]
    doubles.assert_sound(run)


def test_lowering_children_ends_a_run_once_what_is_in_flight_has_come(run: Path) -> None:
    made = doubles.start(run, SETTINGS, doubles.FakeBackend(run))
    for _ in range(8):
        made._turn()
    made.close()
    asked = doubles.load(run, SETTINGS).history.state.num_asked
    assert asked > 5
    history = doubles.search(run, doubles.config(search={"children": 1}))
    assert history.state.complete and history.state.num_committed == asked
    doubles.assert_sound(run)
    for _ in range(2):  # also once it is complete
        notes = doubles.Notes()
        doubles.search(run, doubles.config(search={"children": 1}), notes=notes)
        assert notes.notes == [
            f"search.children is 1, but {asked - 3} children have been asked: they stay, no more will be"
        ]


def test_the_same_call_on_a_complete_run_changes_no_file(run: Path) -> None:
    first = doubles.search(run, SETTINGS)
    before, times = doubles.contents(run), {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    second = doubles.search(run, SETTINGS)
    third = doubles.search(run, doubles.config(cluster={"workers": 5}))
    assert doubles.contents(run) == before
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == times
    assert doubles.front(first) == doubles.front(second) == doubles.front(third)


def test_data_that_lies_elsewhere_now_is_the_same_data(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.search(run, doubles.config(data={"name": "npz", "root": "here.npz"}))
    moved = doubles.config(data={"name": "npz", "root": "there.npz"}, search={"children": 20})
    assert doubles.search(run, moved).state.complete
    monkeypatch.setattr(session.data_sets, "load", lambda data: doubles.images(seed=1))
    with pytest.raises(ConfigError, match=r"other data than there.npz gives now \(checksum differs\)"):
        doubles.search(run, moved)


def test_a_function_that_returns_other_data_each_time_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def load(data: Any) -> Any:
        calls.append(1)
        return doubles.images(seed=len(calls))

    monkeypatch.setattr(session.data_sets, "load", load)
    with pytest.raises(ConfigError, match=r"mine:make gave other data when it was called again; .* the same arrays"):
        doubles.search(run, doubles.config(data={"name": "mine:make"}))
    assert not run.exists()


def test_a_gpu_that_is_asked_for_where_there_is_none_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = doubles.config(cluster={"device": "cuda"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"cluster.device: got cuda, but this machine has no GPU"):
        doubles.search(run, settings)
    assert not run.exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f1c")
    assert doubles.search(run, settings).state.complete  # the fakes need none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doubles.search(run, settings).state.complete  # there is nothing to do


@pytest.mark.parametrize(
    ("allowed", "gpus"),
    [("", []), ("-1", []), ("0", ["0"]), ("1, 3", ["1", "3"]), ("GPU-8f1c,MIG-77", ["GPU-8f1c", "MIG-77"])],
)
def test_gpus_are_named_as_the_environment_names_them(
    monkeypatch: pytest.MonkeyPatch, allowed: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert backends.visible_gpus() == gpus
    assert backends.may_have_gpu() == bool(gpus)


def test_a_worker_gets_the_gpu_that_the_fewest_living_workers_have(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8f1c")
    local = backends.LocalBackend(run, SETTINGS.cluster)
    alive = {"old", "e1w00", "e1w01", "e1w02"}
    monkeypatch.setattr(local, "alive", alive.__contains__)
    local.heard("old", [{"say": "hello", "gpu": "4"}])
    given = []
    for name in ("e1w00", "e1w01", "e1w02"):
        given.append(local._free_gpu())
        local._gpus[name] = given[-1]
    assert given == ["GPU-8f1c", "4", "GPU-8f1c"]
    alive.remove("e1w00")
    alive.remove("e1w02")
    assert local._free_gpu() == "GPU-8f1c"
    assert backends.LocalBackend(run, doubles.config(cluster={"device": "cpu"}).cluster)._free_gpu() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local._free_gpu() == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(backends, "visible_gpus", list)
    assert local._free_gpu() is None  # torch may know better


def test_a_moved_run_goes_on(run: Path) -> None:
    made = doubles.start(run, SETTINGS, doubles.FakeBackend(run))
    for _ in range(8):
        made._turn()
    made.close()
    moved = run.with_name("moved here")
    run.rename(moved)
    assert doubles.search(moved, SETTINGS).state.complete
    doubles.assert_sound(moved)


# ---------------------------------------------------------------- workers of earlier coordinators


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_stops_the_session_in_good_order_and_handlers_are_put_back(run: Path, which: str) -> None:
    number = getattr(signal, which)
    before = signal.getsignal(number)

    def behave(task: dict[str, Any]) -> str | None:
        if task["child"] == 8:
            os.kill(os.getpid(), number)
        return None

    with pytest.raises(Stopped, match=f"stopped by {which}"):
        doubles.search(run, SETTINGS, behave)
    assert signal.getsignal(number) == before
    assert doubles.search(run, SETTINGS).state.complete
    doubles.assert_sound(run)


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    class Sitting:
        stop_signal: int | None = None

    sitting = Sitting()
    with session._signals(sitting):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        assert (sitting.stop_signal, codes) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [3]


def test_the_configured_backend_is_used(run: Path) -> None:
    session._prepare(SETTINGS, doubles.images(), run)
    for name, kind in (("inline", "InlineBackend"), ("local", "LocalBackend"), ("slurm", "SlurmBackend")):
        settings = doubles.config(cluster={"backend": name})
        assert type(session._backend(run, settings, None, doubles.Notes())).__name__ == kind


def test_a_run_starts_with_its_identity(run: Path) -> None:
    fixed = session._prepare(SETTINGS, doubles.images(), run)
    content = json.loads((run / files.RUN).read_text())
    assert content["config"] == to_dict(SETTINGS) and content["data"]["checksum"] == "checksum 0"
    assert tuple(content["reference"]) == fixed.reference
    assert len(content["run"]) == 32
    again = session._prepare(SETTINGS, doubles.images(), run)
    assert again == fixed and evolution.start(again).num_asked == 0


def test_nohup_holds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP is ignored where it was ignored before the search began."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = doubles.search(run, SETTINGS, lambda task: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.state.complete


def test_an_error_that_nobody_expected_counts_as_a_crash(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a chain whose coordinators fail one after another would go on for ever."""

    def fail(*args: Any) -> None:
        raise KeyError("a defect")

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Coordinator, "_go_on", fail)
        doubles.search(run, SETTINGS)
    history = doubles.load(run, SETTINGS).history
    assert (history.num_crashes, history.closed) == (1, False)
    assert doubles.search(run, SETTINGS).state.complete


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EFBIG])
def test_what_is_refused_in_the_middle_of_a_run_is_an_outage(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """An expired ticket, `chmod`, `ulimit -f`: the same command goes on once it is mended, and no child has failed."""

    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number), str(run))

    with monkeypatch.context() as patch, pytest.raises(NoRoom, match=os.strerror(number)):
        patch.setattr(Coordinator, "_seal", fail)
        doubles.search(run, SETTINGS)
    history = doubles.search(run, SETTINGS)
    assert history.state.complete and not history.failures


def test_a_run_of_an_older_version_goes_on(run: Path) -> None:
    """Keys that are newer than the run count as their defaults, those that follow the images too."""
    doubles.search(run, doubles.config(search={"children": 3}))
    content = json.loads((run / files.RUN).read_text())
    del content["config"]["data"]["axes"], content["config"]["training"]["cutout"]
    (run / files.RUN).write_text(json.dumps(content))
    older = record.read_identity(run)["config"]
    assert "axes" not in older["data"]
    session._same(record.read_identity(run), resolve(SETTINGS, doubles.images().shape), doubles.images(), run)


def test_what_makes_errors_mean_less_is_told_at_the_start(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.data_sets, "load", lambda settings: replace(doubles.images(), warnings=("data: few",)))
    notes = doubles.Notes()
    session.search(SETTINGS, run, notes)
    assert notes.about("warning: data: few")


@pytest.mark.parametrize(
    ("allowed", "gpus"),
    [
        ("NoDevFiles", []),
        ("", []),
        ("-1", []),
        ("none", []),
        ("0,-1,1", ["0"]),
        ("MIG-3eb87630/1/0,GPU-8932f937", None),
    ],
)
def test_what_cuda_visible_devices_may_hold(
    monkeypatch: pytest.MonkeyPatch, allowed: str, gpus: list[str] | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    assert backends.visible_gpus() == (allowed.split(",") if gpus is None else gpus)


@pytest.mark.parametrize("name", ["95%target", "%j", "plain"])
def test_submitit_finds_no_placeholder_in_a_folders_name(tmp_path: Path, name: str) -> None:
    backend = backends.LocalBackend(tmp_path / name, SETTINGS.cluster)
    folder = tmp_path / name / "workers" / "e1w00" / "job"
    plain = backend._plain(folder)
    assert (plain == folder) == (name == "plain")
    if plain != folder:
        assert "%" not in str(plain) and plain.resolve() == folder
        backend.close()
        assert not plain.exists() and folder.is_dir()
