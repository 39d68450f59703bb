"""`doctor` at a site of scripts: each planted fault is found and its fix named, and where all is well all is ok.

The file system's checks are in `test_run_disk.py`, Slurm's in `test_run_scheduler.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import cli
from lemonade_hpc import config as configs
from lemonade_hpc import data as data_sets
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import checks, container, disk, session
from lemonade_hpc.run.checks import FAIL, OK, WARN, Check
from lemonade_hpc.run.host import helper

sys.path.insert(0, str(Path(__file__).parent))

from fake_site import Site, as_ordinary_user, examine, healthy, one, others_are_ok, tree, without_image  # noqa: E402

OUTSIDE = ["this machine", "Apptainer", "image", "start", "imports", "binds", "version", "GPU", "data"]
FOLDER = ["file system", "write permission", "free space", "durable writes", "visibility"]
SLURM = [
    "Slurm's commands", "sacct", "MaxArraySize", "MinJobAge", "PreemptMode", "JobRequeue", "MaxSubmitJobs",
    "coordinator's job", "workers' jobs",
]  # fmt: skip
ALL = [*OUTSIDE, *FOLDER, *SLURM]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with healthy(tmp_path) as made:
        yield made


# ---------------------------------------------------------------- all is well


def test_at_a_healthy_site_all_is_ok_and_nothing_stays_behind(site: Site) -> None:
    before = tree(site.folder)
    found = examine(site)
    assert [check.name for check in found] == ALL and others_are_ok(found), found
    after = tree(site.folder)
    assert {path for path in after.keys() ^ before.keys()} == {str(site.bin / "sbatch.given")}
    assert [path for path in before if after[path] != before[path]] == [str(site.folder / "calls")]


def test_so_it_is_for_who_has_nothing_but_the_image_and_the_helper(site: Site) -> None:
    """And Slurm is asked through the helper, which knows these questions."""
    code, found, err = site.by_helper()
    assert (code, err) == (0, "") and [row["check"] for row in found] == ALL, found
    assert {row["state"] for row in found} == {OK} and {row["fix"] for row in found} == {""}, found
    assert site.calls("sacctmgr") == [
        "sacctmgr --readonly --noheader --parsable2 show assoc user=somebody format=Account,Partition,MaxSubmitJobs"
    ]
    assert not site.run.exists() and list(site.run.parent.iterdir()) == []


def test_without_an_image_and_without_slurm_those_are_left_out(site: Site) -> None:
    found = without_image(site, cluster={"backend": "local", "stale_s": None, "partition": None})
    assert [check.name for check in found] == ["this machine", "image", "GPU", "data", *FOLDER, "Slurm"]
    assert others_are_ok(found)
    assert one(found, "Slurm").seen == "not asked: cluster.backend is local"
    assert (site.folder / "calls").read_text() == ""


# ---------------------------------------------------------------- ten planted faults


def no_image(site: Site) -> None:
    site.image.unlink()


def unreadable_image(site: Site) -> None:
    site.image.chmod(0)


def ignored_binds(site: Site) -> None:
    site.plan(binds="ignored")


def closed_fuse(site: Site) -> None:
    site.plan(fuse="closed")


def no_squashfuse(site: Site) -> None:
    site.plan(fuse="missing")


def no_sbatch(site: Site) -> None:
    site.lacks("sbatch")


def no_sacct(site: Site) -> None:
    site.fail("sacct", "sacct: error: Problem talking to the database: Connection refused\n")


def small_arrays(site: Site) -> None:
    site.setting("MaxArraySize", "10")


def forbidden_folder(site: Site) -> None:
    site.run.parent.chmod(0o555)


AFTER_START = ["imports", "binds", "version"]
AFTER_IMAGE = ["start", *AFTER_START]
FAULTS: list[tuple[Callable[[Site], None], str, str, str, str, list[str]]] = [
    (no_image, "image", FAIL, "lemonade.sif: No such file", "copy the image .* or name another: --image", AFTER_IMAGE),
    (unreadable_image, "image", FAIL, "lemonade.sif: Permission denied", r"chmod a\+r ", AFTER_IMAGE),
    (ignored_binds, "binds", FAIL, "/data, .*/runs. Apptainer says: Ignoring .* disabled by system administrator$",
     "ask the site .*user bind control = yes", ["version"]),
    (closed_fuse, "start", FAIL, "squashfuse_ll exited: fuse: failed to open /dev/fuse: Permission denied$",
     "ask the site for .* /dev/fuse to be open .*cluster.setup: export APPTAINER_UNSQUASH=1", AFTER_START),
    (no_squashfuse, "start", WARN, r"^unpacked, \d.\d\d s to start each time, since FUSE cannot be used",
     r"ask the site for squashfuse.*\$APPTAINER_TMPDIR", []),
    (no_sbatch, "Slurm's commands", FAIL, "^sbatch: not on PATH", "module load slurm", SLURM[1:]),
    (no_sacct, "sacct", WARN, "does not answer", "nothing must be done: only how a worker ended", []),
    (small_arrays, "MaxArraySize", WARN, "^10$", "4 workers take 1 arrays of at most 10.*ask the site", []),
    (forbidden_folder, "write permission", FAIL, "/runs: Permission denied", "chown.*by --run", FOLDER[2:]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "name", "state", "seen", "fix", "hidden"), FAULTS, ids=[f[0].__name__ for f in FAULTS]
)
def test_a_planted_fault_is_found_and_its_fix_named_and_hides_no_other_check(
    site: Site, plant: Callable[[Site], None], name: str, state: str, seen: str, fix: str, hidden: list[str]
) -> None:
    plant(site)
    with as_ordinary_user():
        found = examine(site)
    check = one(found, name)
    assert check.state == state and re.search(seen, check.seen) and re.search(fix, check.fix), check
    assert [made.name for made in found] == [made for made in ALL if made not in hidden]
    assert others_are_ok(found, name), found


def test_a_wrong_partition_is_told_in_slurms_words_with_those_that_there_are(site: Site) -> None:
    found = examine(site, cluster={"partition": "nosuch"})
    check = one(found, "workers' jobs")
    assert check.state == FAIL and "Invalid partition name specified" in check.seen
    assert check.fix == "give cluster.partition as sinfo shows it; there are: main, urgent"
    assert others_are_ok(found, check.name)
    found = examine(site, cluster={"coordinator_partition": "nosuch"})
    check = one(found, "coordinator's job")
    assert check.state == FAIL and "invalid partition specified: nosuch" in check.seen
    assert check.fix == "give cluster.coordinator_partition as sinfo shows it; there are: main, urgent"
    assert others_are_ok(found, check.name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("what", ["write", "folder"])
def test_a_full_disk_is_found_by_writing(site: Site, monkeypatch: pytest.MonkeyPatch, number: int, what: str) -> None:
    """On a real one, `tests/end_to_end/full_disk.py` does so."""

    def full(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((disk.files, "write") if what == "write" else (disk.tempfile, "mkdtemp")), full)
    found = examine(site)
    check = one(found, "free space")
    assert check.state == FAIL and f"cannot be written: {os.strerror(number)}; " in check.seen
    assert "quota" in check.fix and "by --run" in check.fix
    left = [name for name in FOLDER if name not in ("durable writes", "visibility")]
    assert [made.name for made in found if made.name in FOLDER] == [
        n for n in left if what == "write" or "perm" not in n
    ]
    assert others_are_ok(found, "free space") and list(site.run.parent.iterdir()) == []


@pytest.mark.parametrize("plant", [no_image, ignored_binds, closed_fuse])
def test_where_nothing_can_be_started_inside_the_helper_says_why(site: Site, plant: Callable[[Site], None]) -> None:
    plant(site)
    code, found, err = site.by_helper()
    _, name, state, seen, fix, _ = next(fault for fault in FAULTS if fault[0] is plant)
    assert (code, err) == (1, "") and [row["check"] for row in found] == OUTSIDE[: OUTSIDE.index(name) + 1]
    (row,) = [row for row in found if row["state"] != OK]
    assert row["check"] == name and row["state"] == state and set(row) == {"check", "state", "seen", "fix"}
    assert re.search(fix, row["fix"]) and (plant is ignored_binds or re.search(seen, row["seen"]))


def test_what_only_the_host_knows_is_told_inside(site: Site) -> None:
    """Inside there is always an sbatch: the one that asks the helper."""
    no_sbatch(site)
    no_squashfuse(site)
    code, found, err = site.by_helper(container={"binds": [str(site.folder / "absent")]})
    assert code == 1 and "Traceback" not in err
    assert {row["check"]: row["state"] for row in found if row["state"] != OK} == {
        "start": WARN, "container.binds": FAIL, "Slurm's commands": FAIL,
    }  # fmt: skip
    assert [row["fix"] for row in found if row["state"] == FAIL] == [
        "make that folder, or correct its name: container.binds",
        "go to a node where jobs are submitted, or load Slurm's module: module load slurm",
    ]


def test_the_helper_shows_its_checks_as_lines_too(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_image(site)
    monkeypatch.chdir(site.folder)
    assert helper.main(helper._parse(["--image", "lemonade.sif", "doctor", "my.yaml"])) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "fail", "fix:"]
    assert lines[2].split()[1:3] == ["image", f"{site.image}:"]


# ---------------------------------------------------------------- the image


@pytest.mark.parametrize(
    ("plan", "name", "state", "seen", "fix"),
    [
        ({"version": "apptainer version 1.0.3-1.el8"}, "Apptainer", WARN, r"^1\.0\.3-1\.el8, /", "1.1 or newer"),
        ({"version": "no", "version_code": 1}, "Apptainer", FAIL, "apptainer: no$", "mend its Apptainer"),
        ({"fatal": "While checking: format not recognized"}, "start", FAIL, "^While checking: format", "damaged"),
        ({"fatal": "Squashfs image uses zstd compression"}, "start", FAIL, "zstd compression$", "-comp gzip"),
        ({"fatal": "could not create user namespace: No space left"}, "start", FAIL, "^could not", "sysctl user.max"),
        ({"fatal": "unknown flag: --no-eval"}, "start", FAIL, "flag: --no-eval$", "a newer Apptainer"),
        ({"fatal": "who knows"}, "start", FAIL, "^who knows$", r"apptainer exec --cleanenv .*lemonade.sif true$"),
        ({"torch": "OSError: Input/output error"}, "imports", FAIL, "Input/output error$", "copy the image again"),
        ({"inside": "print('0.0.9')"}, "version", FAIL, "^0.0.9 inside the image, ", "install 0.0.9 here, build the"),
        ({"inside": "raise SystemExit('no such module')"}, "version", FAIL, "no such module$", "containers/build"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_apptainer_or_the_image_is_told(
    site: Site, plan: dict[str, Any], name: str, state: str, seen: str, fix: str
) -> None:
    site.plan(**plan)
    found = examine(site)
    check = one(found, name)
    assert check.state == state and re.search(seen, check.seen) and re.search(fix, check.fix), check
    assert others_are_ok(found, name)


@pytest.mark.parametrize(
    ("line", "words"),
    [("Executing /usr/bin/squashfuse_ll -f", "mounted by FUSE"), ("something new", "mounted in an unknown way"),
     ("Mounting loop device /dev/loop0 to /x of type squashfs", "mounted by the kernel")],
)  # fmt: skip
def test_how_the_image_is_mounted_is_read_from_what_apptainer_says(site: Site, line: str, words: str) -> None:
    site.plan(mount=line)
    assert re.fullmatch(rf"{words}, 0\.\d\d s to start", one(examine(site), "start").seen)


def test_a_start_that_takes_long_is_not_repeated_and_one_that_does_not_end_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "QUICK_S", 0.0)
    timed, called = helper._timed, []
    monkeypatch.setattr(helper, "_timed", lambda words, environ: called.append(words[-1]) or timed(words, environ))
    assert one(examine(site), "start").state == OK and called.count("true") == 1
    monkeypatch.setattr(helper, "_timed", timed)
    monkeypatch.setattr(helper, "START_S", 0.01)
    (site.bin / "apptainer").write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.4.5 || exec /bin/sleep 9\n')
    monkeypatch.setattr(helper, "_apptainer", lambda environ: helper.check("Apptainer", OK, ""))
    assert one(examine(site), "start").seen == "no end after 0.01 s"


def test_no_apptainer_and_no_image_are_two_faults(site: Site) -> None:
    site.lacks("apptainer")
    no_image(site)
    found = examine(site)
    assert one(found, "Apptainer").state == FAIL and "module load apptainer" in one(found, "Apptainer").fix
    assert others_are_ok(found, "Apptainer", "image") and one(found, "image").state == FAIL


def test_a_folder_that_is_to_be_bound_and_is_not_there_is_named(site: Site) -> None:
    found = examine(site, container={"binds": [str(site.data), "/nowhere/at/all"]})
    assert one(found, "binds") == Check(
        "binds", FAIL, "no such folder: /nowhere/at/all",
        "make that folder, or correct its name: --bind, container.binds, data.root",
    )  # fmt: skip


def test_a_folder_may_have_any_name_and_be_a_link(site: Site) -> None:
    real = site.folder / 'lr=0.1, bs: "64"'
    real.mkdir()
    (site.folder / "scratch").symlink_to(real)
    site.run = site.folder / "scratch" / "run"
    check = one(examine(site), "binds")
    assert check.state == OK and str(site.folder / "scratch") in check.seen


@pytest.fixture
def inside(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """This process counts as one in the image, which the helper has started."""
    told = helper.host(None, [])
    monkeypatch.setenv(container.AROUND, str(site.image))
    monkeypatch.setenv(helper.HOST, json.dumps(told))
    return site


def test_inside_what_the_helper_has_found_is_shown(inside: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine(inside)
    assert one(found, "version").state == OK and others_are_ok(found)
    told = json.loads(os.environ[helper.HOST])
    monkeypatch.setenv(helper.HOST, json.dumps(told | {"helper": "0123"}))
    check = one(examine(inside), "version")
    assert check.state == WARN and check.fix.endswith("cat /lemonade-hpc > lemonade-hpc")
    monkeypatch.delenv(helper.HOST)
    found = examine(inside)
    assert one(found, "this machine").state == WARN and "./lemonade-hpc doctor" in one(found, "this machine").fix
    assert one(found, "Slurm").state == WARN and not [check for check in found if check.name == "Slurm's commands"]


def test_inside_an_image_for_workers_that_cannot_be_seen_is_told(inside: Site) -> None:
    check = one(examine(inside, container={"image": "/elsewhere/other.sif"}), "workers' image")
    assert check.state == FAIL and "/elsewhere/other.sif: not seen inside" in check.seen
    assert "leave container.image out" in check.fix


# ---------------------------------------------------------------- GPU


def torch_says(site: Site, code: str) -> None:
    site.plan(inside=code)


@pytest.mark.parametrize(
    ("says", "state", "seen", "fix"),
    [
        ('["A100", "2.14.1", "13.0"]', OK, r"^A100; torch 2\.14\.1, CUDA 13\.0$", "^$"),
        ('[null, "2.14.1", "13.0"]', FAIL, "CUDA 13.0: sees no GPU", "nvidia-smi.*container: {nv: true}"),
        ('[null, "2.14.1+cpu", null]', FAIL, "built without CUDA: sees no GPU", "that has CUDA"),
        (None, FAIL, "torch cannot be asked: no torch here", "mend the install"),
    ],
)
def test_where_there_is_a_gpu_torch_is_asked_inside(
    site: Site, monkeypatch: pytest.MonkeyPatch, says: str | None, state: str, seen: str, fix: str
) -> None:
    monkeypatch.setattr(helper, "DEVICE", "/dev/null")
    site.plan(inside=f"print({says!r})" if says else "raise SystemExit('no torch here')")
    check = one(examine(site, cluster={"device": "auto"}), "GPU")
    assert check.state == state and re.search(seen, check.seen) and re.search(fix, check.fix), check


def test_the_question_is_one_that_torch_answers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only check with the real one; a worker that may do without a GPU is no failure."""
    monkeypatch.setattr(helper, "DEVICE", "/dev/null")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = one(without_image(site, cluster={"backend": "local", "device": "auto"}), "GPU")
    assert check.state == WARN and re.match(r"torch \d+\.\d+.*: sees no GPU$", check.seen), check


@pytest.mark.parametrize(
    ("more", "state", "seen", "fix"),
    [
        ({"cluster": {"device": "auto", "account": "lab"}}, WARN, "this machine has none",
         "srun --partition=main --account=lab --gres=gpu:1 lemonade-hpc doctor"),
        ({"cluster": {"device": "auto"}, "container": {"nv": False}}, FAIL, "container.nv is false", "nv: true"),
        ({"cluster": {"device": "auto", "gpus_per_worker": 0}}, OK, "none is asked for", "^$"),
        ({"cluster": {"backend": "local", "device": "cuda"}, "container": {"image": None}}, WARN, "has none",
         "on a machine that has one: lemonade-hpc doctor"),
    ],
)  # fmt: skip
def test_where_there_is_none_it_is_said_where_to_look(
    site: Site, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], state: str, seen: str, fix: str
) -> None:
    monkeypatch.setattr(helper, "DEVICE", "/nowhere/nvidiactl")
    found = examine(site, **more)
    check = one(found, "GPU")
    assert check.state == state and seen in check.seen and re.search(fix, check.fix), check
    assert others_are_ok(found, "GPU")


def test_in_an_image_that_does_not_start_no_gpu_is_looked_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "DEVICE", "/dev/null")
    no_image(site)
    check = one(examine(site, cluster={"device": "auto"}), "GPU")
    assert check.state == WARN and check.seen.startswith("unknown: ")


# ---------------------------------------------------------------- data and configuration


def test_data_that_cannot_be_read_is_a_fault_of_the_site(site: Site) -> None:
    found = examine(site, data={"name": "npz", "root": str(site.data)})
    check = one(found, "data")
    assert check.state == FAIL and str(site.data) in check.seen and "data.root" in check.fix
    assert others_are_ok(found, "data")


def test_a_run_that_would_not_go_on_is_told(site: Site) -> None:
    """Started with other settings, in another image, or no run at all."""
    config = configs.from_dict(site.settings(), "test")
    data = data_sets.load(config.data)
    config = configs.resolve(config, data.shape)
    session._prepare(config, data, site.run, container.read(config))
    check = one(examine(site), "run")
    assert (check.state, check.seen) == (OK, f"{site.run}: goes on, 0 children are done")
    path = site.run / "run.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    check = one(examine(site), "run")
    assert check.state == FAIL and "was started with seed = 7, now it is 0" in check.seen and "--run" in check.fix
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 0'))
    (site.run / "epochs" / "000001").mkdir(parents=True)
    for name in ("journal.log", "journal.copy"):
        (site.run / "epochs" / "000001" / name).write_text("damaged\n")
    check = one(found := examine(site), "run")
    assert check.state == FAIL and check.fix.startswith("lemonade-hpc verify ") and others_are_ok(found, "run")
    path.write_text("{}")
    assert "cannot be read" in one(examine(site), "run").seen


def test_a_wrong_configuration_is_exit_code_2_and_asks_nobody(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(site.folder)
    Path("wrong.yaml").write_text("data: {name: digits}\ntraining: {cutout: 9}")
    Path("right.yaml").write_text("data: {name: digits}")
    for words in (["wrong.yaml"], ["right.yaml", "--run", "lemonade.sif"], ["absent.yaml"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["doctor", *words])
        said = capsys.readouterr()
        assert (left.value.code, said.out) == (2, "") and said.err.startswith("error: ")
    assert not [path for path in site.folder.iterdir() if path.name in ("wrong", "right")]


# ---------------------------------------------------------------- a check that cannot be made


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error", "/x"), ConfigError("wrong"), ValueError("strange"),
     subprocess.TimeoutExpired("x", 3)],
)  # fmt: skip
def test_a_check_that_cannot_be_made_is_unknown_and_hides_no_other(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(disk, "_writes", fails)
    found = examine(site)
    check = one(found, "run folder")
    assert check.state == WARN and check.seen.startswith("unknown: ") and check.fix == checks.AGAIN
    assert [made.name for made in found] == [
        "run folder" if name == "durable writes" else name for name in ALL if name != "visibility"
    ]
    assert others_are_ok(found, "run folder") and list(site.run.parent.iterdir()) == []


def test_a_defect_of_ours_is_not_taken_for_one_of_the_site() -> None:
    with pytest.raises(ZeroDivisionError):
        list(checks.each("x", lambda: [Check("x", OK, str(1 // 0))]))


# ---------------------------------------------------------------- the command


def test_the_command_shows_a_line_a_check_with_the_fix_beneath_or_one_json_document(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(site.folder)
    Path("my.yaml").write_text(json.dumps(site.settings()))
    no_sacct(site)
    codes = []
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["doctor", "my.yaml", "--run", str(site.run), *words])
        codes.append(left.value.code)
    text, _, document = capsys.readouterr().out.partition("[\n")
    rows = json.loads("[\n" + document)
    assert codes == [0, 0] and [row["check"] for row in rows] == ALL
    assert set(rows[0]) == {"check", "state", "seen", "fix"}
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if line[0] in (OK, WARN, FAIL)] == [row["state"] for row in rows]
    assert any(line[:2] == ["fix:", "nothing"] for line in lines)
    no_sbatch(site)
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "my.yaml", "--run", str(site.run)])
    assert left.value.code == 1


# ---------------------------------------------------------------- the helper


ASK = [
    "sacctmgr",
    "--readonly",
    "--noheader",
    "--parsable2",
    "show",
    "assoc",
    "user=a.b-c",
    "format=Account,MaxSubmitJobs",
]


def granted(command: list[str], text: str = "") -> list[str]:
    return helper.granted({"command": command, "cwd": "/", "input": text}, "/tmp")[0]


def test_the_helper_runs_the_questions_of_doctor_and_no_order_to_the_database() -> None:
    assert granted(ASK) == ASK
    for words in (
        ["delete", "user"],
        ["show", "user=x;id"],
        ["-i", "add"],
        ["show", "assoc", "where"],
        ["--immediate"],
    ):
        with pytest.raises(helper.Refused, match="is not among the words"):
            granted(["sacctmgr", *words])


@pytest.mark.parametrize("command", [["sacctmgr"], ["scontrol"], ["squeue", "--me"]])
def test_the_helper_gives_an_input_to_sbatch_alone(command: list[str]) -> None:
    """Without words, some commands carry out what they are given."""
    with pytest.raises(helper.Refused, match="only sbatch is given an input"):
        granted(command, "shutdown\n")
    assert granted(["sbatch", "--test-only"], "#!/bin/sh\n") == ["sbatch", "--test-only"]


@pytest.mark.parametrize(
    "words",
    [["doctor", "a.yaml", "--run", "b", "--json"], ["doctor", "--json", "--run", "b", "a.yaml"],
     ["doctor", "--run=b", "a.yaml"]],
)  # fmt: skip
def test_the_helper_finds_configuration_and_run_folder_wherever_they_stand(words: list[str]) -> None:
    assert helper._first(words) == "a.yaml" and helper.run_folder(words) == os.path.abspath("b")
    assert helper.run_folder(["doctor", "--json", "x/a.yaml"]) == os.path.abspath("a")


def test_which_folders_there_are_to_bind_is_looked_for_outside(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inside they are not seen yet."""
    monkeypatch.chdir(site.folder)
    Path("my.yaml").write_text(json.dumps(site.settings(container={"binds": ["/nowhere", str(site.data)]})))
    assert container.main("my.yaml") == 0 and json.loads(capsys.readouterr().out) == ["/nowhere", str(site.data)]
    found = helper._folders(str(site.image), ["doctor", "my.yaml"], helper.environment(os.environ))
    assert str(site.data) in found and "/nowhere" not in found


def test_the_helper_is_python_3_6_without_new_syntax() -> None:
    import ast

    def parsed(text: str) -> ast.Module:
        return ast.parse(text, feature_version=(3, 6))

    assert parsed(Path(helper.__file__).read_text()).body
    with pytest.raises(SyntaxError):
        parsed("(newer := 1)")
