"""The command line: exit codes, what goes where, and that a mistake costs nothing.

Every command is run as a user runs it, through `cli.main`, in a folder of its own.
"""

import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.torch
import torch
from matplotlib.image import imread

from lemonade_hpc import cli, config
from lemonade_hpc import data as data_sets
from lemonade_hpc.learn import members
from lemonade_hpc.run import owner, session
from lemonade_hpc.run.coordinator import RunFailed, Stopped
from lemonade_hpc.run.record import RecordError
from lemonade_hpc.run.store import StoreError

QUICK = """
data: {name: digits}
objectives: [{name: val_error}, {name: params, min: 300, max: 3e4}, {name: macs}]
search: {children: 3, proposals: 5, accepted: 2}
training: {epochs: 1, initial_epochs: 1, distill_epochs: 1}
cluster: {backend: inline, workers: 1}
"""
IMAGES = "digits: 1,097 images to train on, 350 for validation, 350 for test\n"
PACKAGE = str(Path(cli.__file__).parents[1])
READERS = ("status", "front", "test", "report", "verify")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", PACKAGE)  # for the process that `test` starts
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def lemonade(capfd):
    """Run a command: its exit code, standard output and standard error."""

    def run(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        return left.value.code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its configuration and what `search` said. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "quick.yaml").write_text(QUICK)
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "lemonade_hpc.cli", "search", "quick.yaml"]
    environ = {key: value for key, value in environment(HOME=str(home)).items() if key != "MPLCONFIGDIR"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(item.name for item in folder.iterdir()) == ["quick", "quick.yaml"]
    assert list(home.rglob("*")) == []  # nothing outside the run folder
    return folder / "quick", done.stdout, done.stderr


@pytest.fixture
def copy(finished, here):
    """The finished run and its configuration, to be changed."""
    shutil.copytree(finished[0].parent, here, dirs_exist_ok=True)
    return Path("quick")


def environment(**more):
    return {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", **more}


def tree(folder):
    """Every path below a folder, with the content of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


# ---------------------------------------------------------------- mistakes in the input: exit code 2, nothing written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {name: digits}\ntrainig: {epochs: 5}", "unknown key 'trainig'. Did you mean 'training'?"),
        ("data: {name: digits}\ntraining: {epochs: -5}", "mine.yaml: training.epochs: got -5; it must be at least 1"),
        ("data: {name: digits}\nsearch: {proposals: 5}", "proposals (5) must be at least accepted (50)"),
        ("data: {name: digits}\ntraining: {cutout: 9}", "training.cutout: got 9; the images have 8 x 8 pixels"),
        ("data: {name: digits}\ntraining: {pad: 9}", "training.pad: got 9; the images have 8 x 8 pixels"),
        (
            "data: {name: digits}\nobjectives: [{name: val_error}, {name: params, max: 300}]",
            "no initial network satisfies",
        ),
        (
            "data: {name: digits}\nobjectives: [{name: val_error}, {name: macs, min: 1e9}]",
            "no initial network satisfies",
        ),
        ("data: {name: digits, validation: 1797}", "data.validation: 1797 validation"),
        ("data: {name: digits, root: /tmp}", "data.root: got '/tmp', but 'digits' takes none"),
        ("data: {name: digit}", "data.name: unknown data set 'digit'. Did you mean 'digits'?"),
        ("data: {name: npz}", "data.root: not given; npz needs a file"),
        ("data: {name: npz, root: none.npz}", "data.root: got 'none.npz', not a file"),
        ("data: {name: npz, root: cut.npz}", "cut.npz: no npz of plain arrays, or truncated"),
        ("data: {name: npz, root: shape.npz}", "shape.npz: x has the shape (20, 8)"),
        ("data: {name: npz, root: labels.npz}", "labels.npz: y_test holds the label 7"),
        ("data: {name: cifar10, root: .}", "cifar10 cannot find"),
        ("data: {name: 'nothing:here'}", "data.name: nothing:here: ModuleNotFoundError"),
        ("", "mine.yaml: expected keys"),
        ("- a", "mine.yaml: expected keys"),
        ("data: !!python/object/apply:os.mkdir ['made']", "could not determine a constructor"),
        ("data: [", "mine.yaml, line 1: not valid YAML"),
        ("\x00\x01", "mine.yaml: not valid YAML"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_written(here, lemonade, text, expected):
    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
    np.savez("whole.npz", x=images, y=labels)
    Path("cut.npz").write_bytes(Path("whole.npz").read_bytes()[:-200])
    np.savez("shape.npz", x=images[:, 0], y=labels)
    np.savez("labels.npz", x_train=images, y_train=labels, x_test=images[:1], y_test=np.array([7]))
    Path("mine.yaml").write_text(text)
    before = tree(here)
    code, out, err = lemonade("search", "mine.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and expected in err
    assert tree(here) == before


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("digit", "error: digit: no such file. Did you mean 'digits'?"),
        ("folder", "error: folder: a folder"),
        ("binary", "error: binary: not valid YAML"),
        ("empty", "error: empty: expected keys, at least 'data: {name: digits}'; it is empty"),
        ("empty/x", "error: empty/x: cannot be read: Not a directory"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(here, lemonade, source, expected):
    Path("folder").mkdir()
    Path("binary").write_bytes(bytes(range(128, 256)))
    Path("empty").touch()
    before = tree(here)
    code, out, err = lemonade("search", source)
    assert (code, out) == (2, "")
    assert err.startswith(expected)
    assert tree(here) == before


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(
    ("name", "expected"), [("absent", "does not exist"), ("file", "is a file"), ("empty", "not a run folder")]
)
def test_every_reading_command_refuses_what_is_no_run_folder(here, lemonade, command, name, expected):
    Path("file").touch()
    Path("empty").mkdir()
    before = tree(here)
    code, out, err = lemonade(command, name)
    assert (code, out) == (2, "")
    assert expected in err and name in err
    assert tree(here) == before


@pytest.mark.parametrize("command", READERS)
def test_every_reading_command_refuses_a_run_of_a_newer_version(lemonade, command):
    Path("new").mkdir()
    Path("new/run.json").write_text('{"schema": 999, "layout": "unheard of"}')
    code, out, err = lemonade(command, "new")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"error: {Path('new/run.json')}: written by a newer version (schema 999, this one reads up to "
    )


def test_search_refuses_a_folder_that_is_something_else(here, lemonade):
    Path("quick.yaml").write_text(QUICK)
    Path("quick").mkdir()
    Path("quick/thesis.tex").write_text("precious")
    before = tree(here)
    for folder in ("quick", "quick/thesis.tex"):
        code, out, err = lemonade("search", "quick.yaml", "--run", folder)
        assert (code, out) == (2, "")
        assert f"error: {folder}: exists and is not a run folder" in err
    code, _, err = lemonade("search", "quick.yaml", "--run", "quick.yaml/run")
    assert (code, "quick.yaml/run: cannot be written" in err) == (2, True)
    assert tree(here) == before


def test_search_refuses_a_place_it_may_not_write_to(here, lemonade, monkeypatch):
    Path("quick.yaml").write_text(QUICK)

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere
    code, out, err = lemonade("search", "quick.yaml", "--run", "place")
    assert (code, out) == (2, "")
    assert err.startswith("error: place: ") and "Permission denied" in err
    assert [path.name for path in here.iterdir()] == ["quick.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("epochs: 1,", "epochs: 2,", "was started with training.epochs = 1, now it is 2"),
        ("max: 3e4", "max: 4e4", "was started with objectives.1.max = 30000.0, now it is 40000.0"),
        ("{name: macs}]", "]", "was started with objectives.2.name = 'macs', now there is none"),
        ("accepted: 2", "accepted: 3", "was started with search.accepted = 2, now it is 3"),
        ("data: {name: digits}", "data: {name: digits, test: 300}", "was started with data.test = None, now it is 300"),
        ("data:", "seed: 1\ndata:", "was started with seed = 0, now it is 1"),
    ],
)
def test_a_run_folder_of_another_configuration_is_refused_with_the_first_key(copy, here, lemonade, old, new, expected):
    Path("quick.yaml").write_text(QUICK.replace(old, new))
    before = tree(here)
    code, out, err = lemonade("search", "quick.yaml")
    assert (code, out) == (2, "")
    assert f"error: quick: {expected}" in err and "search.children" in err
    assert tree(here) == before


@pytest.mark.parametrize(
    "arguments",
    [("serch",), ("search",), ("front",), ("front", "quick", "--jsn"), ("search", "digits", "--runs", "x"), ()],
)
def test_a_slip_of_the_hand_is_exit_code_2_with_the_usage(here, lemonade, arguments):
    Path("quick").mkdir()
    code, out, err = lemonade(*arguments)
    assert code == 2
    assert "Usage: " in out + err


@pytest.mark.parametrize(("command", "options"), [("front", ("--json", "--csv")), ("status", ("--watch", "--json"))])
def test_two_outputs_at_once_are_refused(copy, lemonade, command, options):
    code, out, err = lemonade(command, copy, *options)
    assert (code, out) == (2, "")
    assert all(option in err for option in options)


# ---------------------------------------------------------------- errors that are not the user's, and interruptions


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailed("no initial network is valid"), 1),
        (RecordError("both copies are damaged"), 1),
        (StoreError("x.h5: not readable"), 1),
        (config.ConfigError("some key: bad"), 2),
    ],
)
def test_an_error_is_told_in_words(here, lemonade, monkeypatch, error, code):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(session, "search", fail)
    assert lemonade("search", "digits") == (code, "", f"error: {error}\n")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(5, "Input/output error", "some/file"), 1, "some/file: Input/output error"),
        (OSError(5, "Input/output error"), 1, "Input/output error"),
        (PermissionError(13, "Permission denied", "some/file"), 2, "some/file: Permission denied"),
    ],
)
def test_an_error_of_the_file_system_names_the_file(lemonade, monkeypatch, error, code, words):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(session, "search", fail)
    assert lemonade("search", "digits") == (code, "", f"error: {words}\n")


def test_ctrl_c_before_the_search_has_begun_is_a_stop_too(lemonade, monkeypatch):
    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", interrupt)
    code, out, err = lemonade("search", "digits")
    assert (code, out) == (3, "")
    assert err == "interrupted. Nothing is lost. To go on: lemonade-hpc search digits\n"


def test_a_defect_of_the_program_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(session, "search", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["search", "digits"])


@pytest.mark.parametrize(
    ("stop", "words"), [(Stopped("stopped by SIGTERM"), "stopped by SIGTERM"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_stop_is_exit_code_3_and_says_how_to_go_on(lemonade, monkeypatch, stop, words):
    seen = []

    def end(settings, folder, view, *, take_over):
        seen.append((settings, folder, take_over))
        raise stop

    monkeypatch.setattr(session, "search", end)
    Path("my digits.yaml").write_text("data: {name: digits}")
    code, out, err = lemonade("search", "my digits.yaml", "--run", "a run", "--take-over")
    assert (code, out) == (3, "")
    start, again = err.strip().split(" To go on: ")
    assert start == f"{words}. Nothing is lost."
    name, *arguments = shlex.split(again)
    assert name == "lemonade-hpc"
    assert lemonade(*arguments)[0] == 3
    settings = config.load("my digits.yaml")
    assert seen == [(settings, Path("a run"), True), (settings, Path("a run"), False)]


@pytest.mark.parametrize(("source", "folder"), [("digits", "digits"), ("configs/mine.v2.yaml", "mine.v2")])
def test_the_run_folder_is_named_after_the_configuration(lemonade, monkeypatch, source, folder):
    Path("configs").mkdir()
    Path("configs/mine.v2.yaml").write_text("data: {name: digits}")
    seen = []
    monkeypatch.setattr(session, "search", lambda settings, run, view, **options: seen.append(run))
    monkeypatch.setattr(cli, "_show_result", seen.append)
    assert lemonade("search", source)[0] == 0
    assert seen == [Path(folder), Path(folder)]


# ---------------------------------------------------------------- what is imported


def imported(*arguments):
    """Which of the heavy packages a command has imported, its exit code and standard output."""
    program = (
        "import sys\nfrom lemonade_hpc import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "finally:\n    print(*[name for name in sys.modules if '.' not in name], sep='\\n', file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    return set(done.stderr.split()) & {"torch", "matplotlib", "sklearn", "scipy", "submitit", "h5py", "numpy"}, done


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("search", "--help"), 0),
        (("init", "mine.yaml"), 0),
        (("search", "bad.yaml"), 2),
        (("search", "absent.yaml"), 2),
        (("front", "absent"), 2),
    ],
)
def test_help_and_mistakes_are_answered_without_heavy_imports(arguments, code):
    Path("bad.yaml").write_text("data: {name: digits}\nquux: 1")
    found, done = imported(*arguments)
    assert (found, done.returncode) == (set(), code)


def test_a_folder_that_is_no_run_is_refused_without_torch_and_figures():
    Path("empty").mkdir()
    found, done = imported("front", "empty")
    assert found.isdisjoint({"torch", "matplotlib", "sklearn"}) and done.returncode == 2


def test_the_test_of_imports_can_fail(finished):
    assert "matplotlib" in imported("report", copied(finished))[0]


def copied(finished):
    return shutil.copytree(finished[0], "copied")


# ---------------------------------------------------------------- init


def test_init_writes_a_file_that_search_accepts_as_the_defaults(lemonade):
    code, out, err = lemonade("init", "a file.yaml")
    assert (code, err) == (0, "")
    assert config.load("a file.yaml") == config.Config(data=config.Data(name="digits"))
    assert "lemonade-hpc search 'a file.yaml'" in out
    assert lemonade("init")[0] == 0
    assert sorted(path.name for path in Path().iterdir()) == ["a file.yaml", "lemonade.yaml"]


def test_init_overwrites_nothing(here, lemonade):
    Path("mine.yaml").write_text("precious")
    Path("folder").mkdir()
    before = tree(here)
    for name, expected in [("mine.yaml", "exists"), ("folder", "exists"), ("absent/x.yaml", "cannot be written")]:
        code, out, err = lemonade("init", name)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {name}: {expected}")
    assert tree(here) == before


# ---------------------------------------------------------------- search, to the end


def test_a_search_ends_with_the_front_as_a_table_and_a_picture(finished):
    run, out, err = finished
    assert "Pareto front, " in out and "multiply-" in out and "7 of 7 children done (4 initial)" in out
    assert "picture: quick/front.png" in out.splitlines()
    assert f"every child: quick/{next(run.glob('population.*.h5')).name}" in out.splitlines()
    assert imread(run / "front.png").shape[2] == 4
    assert "7/7 children, front " in err.splitlines()[-1]
    assert "\x1b" not in out + err and "\r" not in out + err


def test_the_same_command_on_a_complete_run_shows_the_front_and_starts_nothing(copy, finished, lemonade):
    epochs = list(copy.glob("epochs/*"))
    code, out, err = lemonade("search", "quick.yaml")
    assert (code, err) == (0, "")
    assert out == finished[1]
    assert list(copy.glob("epochs/*")) == epochs


def test_a_picture_that_cannot_be_written_is_no_failure_of_the_run(copy, lemonade):
    (copy / "front.png").unlink()
    (copy / "front.png").mkdir()
    code, out, err = lemonade("search", "quick.yaml")
    assert code == 0
    assert "Pareto front, " in out and "picture: " not in out
    assert err.startswith("no picture: ")


def test_a_picture_that_cannot_be_drawn_is_no_failure_of_the_run(copy, lemonade, monkeypatch):
    def broken(*arguments):
        raise ImportError("libfreetype.so.6")

    monkeypatch.setattr(cli, "_draw", broken)
    code, out, err = lemonade("search", "quick.yaml")
    assert (code, err) == (0, "no picture: libfreetype.so.6\n") and "Pareto front, " in out


# ---------------------------------------------------------------- reading a run

ROW = {"id", "digest", "parent", "edits", "generation", "objectives", "receipt", "weights"}


def test_front_as_json_as_csv_and_as_a_table_agree(finished, lemonade):
    run = finished[0]
    code, out, err = lemonade("front", run, "--json")
    members = json.loads(out)
    assert (code, err) == (0, "")
    for member in members:
        assert set(member) == ROW | {"depth", "network"}
        assert list(member["objectives"]) == ["val_error", "params", "macs"]
        weights = run / member["weights"]["path"]
        assert weights.stat().st_size == member["weights"]["bytes"]
        assert (member["parent"] is None) == (member["edits"] == []) == (member["generation"] == 0)
    code, out, err = lemonade("front", run, "--csv")
    assert (code, err, "\r" in out) == (0, "", False)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["id", "val_error", "params", "macs", "parent", "generation", "weights"]
    assert [int(row["id"]) for row in rows] == [member["id"] for member in members]
    assert [{k: float(row[k]) for k in ("val_error", "params", "macs")} for row in rows] == [
        member["objectives"] for member in members
    ]
    code, out, err = lemonade("front", run)
    assert (code, err) == (0, "")
    assert [int(line.split()[0]) for line in out.splitlines()[4:]] == [member["id"] for member in members]


@pytest.fixture
def begun(copy):
    """A run of which nothing but `run.json` was written."""
    for path in copy.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def test_a_run_that_has_only_begun_can_be_looked_at(begun, lemonade):
    assert lemonade("front", begun) == (0, "The front is empty: no network has been trained yet.\n", "")
    assert lemonade("front", begun, "--json") == (0, "[]\n", "")
    assert lemonade("front", begun, "--csv") == (0, "id,val_error,params,macs,parent,generation,weights\n", "")
    code, out, err = lemonade("status", begun)
    assert (code, err) == (0, "")
    assert out.startswith(f"not started\n{IMAGES}0 of 3 children done")
    code, out, err = lemonade("report", begun)
    assert (code, err) == (0, "")
    assert "no trained network yet" in (begun / "report/front.svg").read_text()
    assert lemonade("test", begun)[0] == 0
    assert lemonade("verify", begun)[0] == 0


def test_status_as_json_and_in_words(finished, lemonade):
    code, out, err = lemonade("status", finished[0], "--json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["state"] == "complete"
    assert data["children"] == {"budget": 3, "asked": 7, "initial": 4, "committed": 7, "failed": 0, "in_flight": 0}
    assert data["hypervolume"]["front"] >= data["hypervolume"]["initial"]
    assert data["front"] == json.loads(lemonade("front", finished[0], "--json")[1])
    code, out, err = lemonade("status", finished[0])
    assert (code, err) == (0, "")
    assert out.startswith(f"complete\n{IMAGES}7 of 7 children done (4 initial), 0 failed")


def test_watching_ends_with_the_run_or_with_ctrl_c(finished, lemonade, monkeypatch):
    words = lemonade("status", finished[0])[1]
    assert lemonade("status", finished[0], "--watch") == (0, words, "")

    from lemonade_hpc.run import status

    lives, slept = iter(["running: process 1", "running: process 1", "complete"]), []
    honest = status.status
    monkeypatch.setattr(status, "status", lambda run, judge, look: honest(run) | {"state": next(lives)})
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    code, out, _ = lemonade("status", finished[0], "--watch")
    assert (code, out.count("running: process 1\n"), out.count("complete\n"), len(slept)) == (0, 2, 1, 2)

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "status", lambda run, judge, look: honest(run) | {"state": "stopped"})
    monkeypatch.setattr(cli.time, "sleep", interrupt)
    code, out, err = lemonade("status", finished[0], "--watch")
    assert (code, err) == (0, "")
    assert out.startswith("stopped; the same command goes on\n")


def test_test_measures_the_front_on_the_test_images(finished, lemonade):
    code, out, err = lemonade("test", finished[0], "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [row["id"] for row in rows] == [m["id"] for m in json.loads(lemonade("front", finished[0], "--json")[1])]
    for row in rows:
        assert set(row) == {"id", "test_error", "num_test"}
        assert row["num_test"] == 350
        assert row["test_error"] * 350 == pytest.approx(round(row["test_error"] * 350))
        assert 0 < row["test_error"] < 0.9
    code, out, err = lemonade("test", finished[0])
    assert (code, err) == (0, "")
    assert "test error" in out and len(out.splitlines()) == 4 + len(rows)


def test_the_test_images_decide_nothing(monkeypatch, lemonade):
    """Other test images, wrongly labelled, under the same checksum: the same front, weights bit for bit."""
    load = data_sets.load

    def other(wanted):
        found = load(wanted)
        return replace(found, test=data_sets.Part(255 - found.test.images, 9 - found.test.labels))

    Path("quick.yaml").write_text(QUICK)
    fronts, errors = [], []
    for name, reader in (("one", load), ("two", other)):
        monkeypatch.setattr(data_sets, "load", reader)
        assert lemonade("search", "quick.yaml", "--run", name)[0] == 0
        fronts.append(json.loads(lemonade("front", name, "--json")[1]))
        stored = {member["weights"]["path"]: member["weights"]["sha256"] for member in fronts[-1]}
        errors.append(members.evaluate(Path(name), config.Data(name="digits"), stored))
    assert fronts[0] == fronts[1]
    assert errors[0] != errors[1]  # they were other images


def test_data_of_ones_own_from_the_search_to_the_test_wherever_it_lies(here, lemonade, monkeypatch):
    """Two classes that one pixel tells apart: no error is left, on a count whose interval was once below it."""
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 2
    images = rng.integers(0, 40, (600, 8, 8)).astype(np.uint8)
    images[labels == 1, 2:6, 2:6] += 200
    np.savez("mine.npz", x=images, y=labels)
    text = QUICK.replace("{name: digits}", "{name: npz, root: mine.npz}").replace(
        "initial_epochs: 1", "initial_epochs: 6"
    )
    Path("mine.yaml").write_text(text)
    code, out, err = lemonade("search", "mine.yaml", "--run", "run")
    assert (code, "Traceback" in err) == (0, False)
    assert " 0.0 % [0.0, 3.8]" in out and "npz: 384 images to train on, 96 for validation, 120 for test" in out
    assert Path("run/front.png").exists()
    Path("elsewhere").mkdir()
    Path("mine.npz").rename("elsewhere/mine.npz")
    code, out, err = lemonade("test", "run")
    assert (code, out) == (2, "")
    assert "say by --root where it is now" in err and f"got 'mine.npz', not a file (seen from {here})" in err
    code, out, err = lemonade("test", "run", "--root", "elsewhere/mine.npz", "--json")
    assert (code, err) == (0, "") and json.loads(out)[0]["num_test"] == 120
    Path("mine.yaml").write_text(text.replace("mine.npz", "elsewhere/mine.npz").replace("children: 3", "children: 4"))
    monkeypatch.setattr(owner, "judge", lambda who: "gone")  # it was this process
    assert lemonade("search", "mine.yaml", "--run", "run")[0] == 0
    assert lemonade("test", "run", "--json")[0] == 0
    np.savez("other.npz", x=255 - images, y=labels)
    code, out, err = lemonade("test", "run", "--root", "other.npz")
    assert (code, out) == (2, "") and "other data than other.npz gives now (checksum differs)" in err


def test_a_member_of_the_front_is_loaded_as_the_readme_shows(finished, lemonade):
    weights = finished[0] / json.loads(lemonade("front", finished[0], "--json")[1])[0]["weights"]["path"]
    network = members.load(weights)
    assert network(torch.zeros(5, 1, 8, 8, dtype=torch.uint8)).shape == (5, 10)
    for shape in ((5, 8, 8), (5, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"images have the shape .*; expected \(B, 1, H, W\)"):
            network(torch.zeros(shape))
    for path in (finished[0], finished[0] / "none"):
        with pytest.raises(FileNotFoundError, match=r"no such file; `lemonade-hpc front DIR --json` names those"):
            members.load(path)
    Path("weights").write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    for path in ("weights", finished[0] / "run.json"):
        with pytest.raises(ValueError, match="not a network that a search has stored"):
            members.load(path)


def test_test_refuses_weights_that_are_not_those_of_the_record(copy, lemonade):
    """One bit of one weight: the file loads, and its error is a number, but of no network of this front."""
    weights = copy / json.loads(lemonade("front", copy, "--json")[1])[0]["weights"]["path"]
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0x40
    weights.write_bytes(content)
    code, out, err = lemonade("test", copy, "--json")
    assert (code, out) == (1, "")
    assert f"{weights}: damaged or replaced" in err and "Traceback" not in err


def test_test_refuses_other_data_and_tells_of_missing_weights(copy, lemonade):
    content = json.loads((copy / "run.json").read_text())
    weights = copy / json.loads(lemonade("front", copy, "--json")[1])[0]["weights"]["path"]
    weights.unlink()
    code, out, err = lemonade("test", copy)
    assert (code, out) == (1, "")
    assert weights.name in err and "Traceback" not in err
    assert err.endswith("error: the test errors could not be measured, see above\n")
    content["data"]["checksum"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(content))
    code, out, err = lemonade("test", copy)
    assert (code, out) == (2, "")
    assert "other data" in err


def test_report_writes_a_png_and_an_svg_with_labels_and_units(copy, lemonade):
    code, out, err = lemonade("report", copy)
    png, svg = (copy / "report" / f"front.{kind}" for kind in ("png", "svg"))
    assert (code, out, err) == (0, f"{png}\n{svg}\n", "")
    assert imread(png).ndim == 3
    texts = {"".join(node.itertext()).strip() for node in ElementTree.parse(svg).iter() if node.tag.endswith("}text")}
    assert {"validation error (%)", "parameters", "multiply-adds per image", "initial networks (4)"} <= texts
    assert svg.stat().st_size < 100_000
    shutil.rmtree(copy / "report")
    (copy / "report").touch()
    code, out, err = lemonade("report", copy)
    assert (code, out) == (1, "") and "report" in err and "Traceback" not in err


def test_verify_finds_a_sound_run_sound_and_a_damaged_one_damaged(copy, lemonade):
    code, out, err = lemonade("verify", copy)
    assert (code, err) == (0, "")
    assert "FAULT" not in out
    checks = json.loads(lemonade("verify", copy, "--json")[1])
    assert len(checks) == out.count("ok ") and all(check["faults"] == [] for check in checks)
    weights = copy / json.loads(lemonade("front", copy, "--json")[1])[0]["weights"]["path"]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, err = lemonade("verify", copy)
    assert (code, err) == (1, "")
    assert out.count("FAULT") == 1 and str(weights) in out
    code, out, err = lemonade("verify", copy, "--json")
    assert (code, err) == (1, "")
    assert [check["faults"] != [] for check in json.loads(out)].count(True) == 1


def test_a_record_beyond_repair_is_told_in_words(copy, lemonade):
    for path in copy.glob("epochs/*/journal.*"):
        path.write_bytes(b"")
    for command in ("front", "status", "verify", "report", "test"):
        code, out, err = lemonade(command, copy)
        assert (code, out) == (1, "")
        assert err.startswith("error: quick/epochs/000001") and "journal" in err


# ---------------------------------------------------------------- terminals and locales


def test_a_locale_without_our_characters_ends_no_command(finished):
    command = [sys.executable, "-m", "lemonade_hpc.cli", "front", str(finished[0])]
    for encoding in ("ascii", "latin-1"):
        narrow = environment(PYTHONIOENCODING=encoding, FORCE_COLOR="1", COLUMNS="66")
        done = subprocess.run(command, capture_output=True, env=narrow, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"Pareto front" in done.stdout


def test_where_a_run_folder_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli._folder("a/mine.yaml", None) == Path("mine")
    assert cli._folder("mine.yaml", "~/x") == tmp_path / "x"
    for given in ("", " ", "~nobody-of-this-name/x"):
        with pytest.raises(config.ConfigError, match="--run: got"):
            cli._folder("mine.yaml", given)
