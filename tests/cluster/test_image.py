"""Searches whose coordinator and workers run in a real Apptainer image, on a real Slurm, as an ordinary user.

Needs root, Slurm's daemons (`slurm.py`), apptainer, and an image without CUDA that is built from this source:

    containers/build --cpu lemonade.sif
    LEMONADE_IMAGE=lemonade.sif pytest tests/cluster/test_image.py -n0
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from runs import config  # noqa: E402

from slurm import PACKAGE, Slurm, cluster, wait_for  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "slurm" / "coordinator.sbatch"
HELPER = ("python3", "lemonade-hpc")


class Site:
    """A cluster whose user has an image and the helper out of it, and nothing else of lemonade-hpc."""

    def __init__(self, slurm: Slurm) -> None:
        self.slurm, self.user = slurm, slurm.user
        self.image = Path(os.environ["LEMONADE_IMAGE"]).resolve()
        self.digest = subprocess.run(["sha256sum", self.image], capture_output=True, text=True, check=True).stdout[:64]

    def environment(self) -> dict[str, str]:
        """The user's: no PYTHONPATH, no virtual environment."""
        keep = self.slurm.environment()
        del keep["PYTHONPATH"]
        return keep | {"PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def start(self, home: Path, *command: str | Path, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(word) for word in command], cwd=home, env=self.environment() | environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, user=self.user.pw_uid, group=self.user.pw_gid,
        )  # fmt: skip

    def run(self, home: Path, *command: str | Path, timeout_s: float = 150, **environ: str) -> tuple[int, str, str]:
        process = self.start(home, *command, **environ)
        out, err = process.communicate(timeout=timeout_s)
        return process.returncode, out, err

    def lemonade(self, home: Path, *words: str, **environ: str) -> tuple[int, str, str]:
        return self.run(home, *HELPER, *words, **environ)

    def front(self, home: Path, run: str) -> list[Any]:
        """What must be equal: numbers, networks, objectives, and every bit of the weights."""
        code, out, err = self.lemonade(home, "verify", run)
        assert code == 0, out + err
        members = json.loads(self.lemonade(home, "front", run, "--json")[1])
        return [(m["id"], m["digest"], m["objectives"], m["weights"]["sha256"]) for m in members]

    def jobs(self, *states: str) -> list[dict[str, str]]:
        return [job for job in self.slurm.jobs() if job["state"] in states]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if "LEMONADE_IMAGE" not in os.environ or not shutil.which("apptainer"):
        raise RuntimeError("needs apptainer (.ci/install-apptainer), and LEMONADE_IMAGE: containers/build --cpu FILE")
    with cluster() as slurm:
        yield Site(slurm)


@pytest.fixture
def home(site: Site, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the user's, with spaces in its name, that holds the image, the helper and a configuration."""
    name = request.node.name.partition("[")[0].replace("_", " ")
    folder = Path(tempfile.mkdtemp(prefix=f"{name} ", dir=site.user.pw_dir))
    settle(site, folder)
    yield folder
    site.slurm.run("scancel", "-u", site.user.pw_name)
    wait_for("all jobs have ended", site.slurm.idle)


def settle(site: Site, folder: Path) -> None:
    """What a user copies there: the image (a link does), and what she writes."""
    os.chown(folder, site.user.pw_uid, site.user.pw_gid)
    (folder / "lemonade.sif").symlink_to(site.image)
    (folder / "my.yaml").write_text(config("slurm"))
    (folder / "local.yaml").write_text(config("local"))
    take = ["apptainer", "exec", "--cleanenv", "--no-home", "lemonade.sif", "cat", "/lemonade-hpc"]
    code, out, err = site.run(folder, *take)
    assert code == 0 and out.startswith("#!/usr/bin/env python3"), err
    (folder / "lemonade-hpc").write_text(out)


@pytest.fixture(scope="module")
def expected(site: Site) -> list[Any]:
    """The front of the same search by the local backend inside the same image."""
    home = Path(tempfile.mkdtemp(prefix="local ", dir=site.user.pw_dir))
    settle(site, home)
    code, _, err = site.lemonade(home, "search", "local.yaml", "--run", "local")
    assert code == 0, err
    found = site.front(home, "local")
    assert len(found) > 4
    return found


def complete(site: Site, home: Path, expected: list[Any], run: str = "my") -> dict[str, Any]:
    """The run ends by itself with that front; its status."""
    wait_for("the jobs have ended", site.slurm.idle, 300)
    logs = "".join(path.read_text() for path in sorted((home / run / "slurm").glob("*.log")))
    shown: dict[str, Any] = json.loads(site.lemonade(home, "status", run, "--json")[1])
    assert shown["state"] == "complete" and shown["children"]["failed"] == 0, logs
    assert site.front(home, run) == expected
    return shown


def owner(home: Path, epoch: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home / f"my/epochs/{epoch:06d}/owner.json").read_text())
    return content


def at_work(home: Path) -> None:
    """Wait until four workers have a child: long before they can have trained it."""

    def started() -> bool:
        logs = (path.read_text() for path in home.glob("my/workers/*/done.log"))
        return sum('"say":"started"' in log for log in logs) == 4

    wait_for("four workers have a child", started, 300)


def trained(home: Path) -> int:
    return len(list((home / "my/children").glob("*/*")))


def around(pid: int) -> str:
    """The image that a process is in, if any."""
    environ = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((line.partition("=")[2] for line in environ if line.startswith("APPTAINER_CONTAINER=")), "")


def inside(site: Site, *words: str) -> list[int]:
    """Pids of the user's processes whose command line has these words, in the image."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode().split("\0")
            if entry.stat().st_uid == site.user.pw_uid and set(words) <= set(line) and around(int(entry.name)):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


# ---------------------------------------------------------------- the way it is used


def test_doctor_then_sbatch_and_the_front_is_there(site: Site, home: Path, expected: list[Any]) -> None:
    """`sbatch slurm/coordinator.sbatch` as it stands, coordinator and workers inside: the local backend's front."""
    code, out, err = site.lemonade(home, "doctor", "my.yaml", "--json")
    checks = {check["check"]: check for check in json.loads(out)}
    assert code == 0 and {check["state"] for check in checks.values()} == {"ok"}, out + err
    assert not (home / "my").exists()
    shutil.copy(SCRIPT, home)
    code, out, err = site.run(home, "sbatch", "--parsable", "coordinator.sbatch", "my.yaml")
    assert code == 0, err
    log = home / f"lemonade-submit-{out.strip()}.log"
    wait_for("children are trained", lambda: trained(home) > 2, 300)
    assert "submitted job " in log.read_text()
    coordinator, workers = owner(home, 1)["owner"]["pid"], inside(site, "submitit.core._submit")
    assert around(coordinator) == around(workers[0]) == str(site.image)
    shown = complete(site, home, expected)
    left = shown["workers_left"]  # one that does not leave in three seconds is ended
    assert left.keys() <= {"stopped by the coordinator", "killed"} and sum(left.values()) == 4
    assert owner(home, 1)["image"] == json.loads((home / "my/run.json").read_text())["image"] == site.digest
    calls = [json.loads(line) for path in home.glob("my/slurm/helper-*.log") for line in path.read_text().splitlines()]
    assert {call["command"][0] for call in calls} >= {"sbatch", "squeue"} and not any("refused" in c for c in calls)


def test_a_coordinator_outside_has_its_workers_inside(site: Site, home: Path, expected: list[Any]) -> None:
    content = yaml.safe_load(config("slurm")) | {"container": {"image": str(home / "lemonade.sif")}}
    (home / "my.yaml").write_text(yaml.safe_dump(content))
    command = (sys.executable, "-m", "lemonade_hpc.cli", "search", "my.yaml", "--run", "my")
    search = site.start(home, *command, PYTHONPATH=str(PACKAGE))
    wait_for("children are trained", lambda: trained(home) > 2, 300)
    assert inside(site, "submitit.core._submit") and not around(owner(home, 1)["owner"]["pid"])
    _, err = search.communicate(timeout=300)
    assert search.returncode == 0, err
    complete(site, home, expected)


def test_a_folder_by_another_name_is_as_good(site: Site, home: Path) -> None:
    """`~/scratch` is a link, and the shell calls by it where one is."""
    link = home.with_name("scratch")
    link.symlink_to(home)
    code, out, err = site.lemonade(home, "doctor", "my.yaml", "--json", PWD=str(link))
    assert code == 0 and not told(json.loads(out), "fail"), out + err
    code, out, err = site.lemonade(home, "init", "new.yaml", PWD=str(link))
    assert (code, err) == (0, "") and "then: python3 lemonade-hpc search new.yaml" in out
    link.unlink()


# ---------------------------------------------------------------- what may happen


def submit(site: Site, home: Path, **environ: str) -> None:
    code, out, err = site.lemonade(home, "submit", "my.yaml", **environ)
    assert code == 0 and out.startswith("submitted job "), out + err


def test_a_coordinator_that_is_killed_is_followed_by_the_next(site: Site, home: Path, expected: list[Any]) -> None:
    submit(site, home)
    wait_for("children are trained", lambda: trained(home) > 4, 300)
    os.kill(owner(home, 1)["owner"]["pid"], signal.SIGKILL)
    complete(site, home, expected)
    assert (home / "my/epochs/000002").exists()


def test_a_helper_that_is_killed_ends_no_run(site: Site, home: Path, expected: list[Any]) -> None:
    """Its job is over with it. What ran inside may go on, without Slurm's commands; else the next one takes over."""
    submit(site, home)
    wait_for("children are trained", lambda: trained(home) > 4, 300)
    command = ["pgrep", "-u", site.user.pw_name, "-f", "slurm/helper.py"]
    pids = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    assert len(pids) == 1
    complete(site, home, expected)


def test_workers_are_signalled_twice_and_their_children_go_on_elsewhere(
    site: Site, home: Path, expected: list[Any]
) -> None:
    """USR2, as submitit and Slurm send it, to the step: Apptainer passes it on, and Slurm sends it itself.

    It also ends the process that has mounted the image, so that nothing more can be read of it.
    """
    content = yaml.safe_load(config("slurm", checkpoint_epochs=1))
    (home / "my.yaml").write_text(yaml.safe_dump(content))
    submit(site, home)
    wait_for("children are trained", lambda: trained(home) > 4, 300)
    array = next(job["id"] for job in site.jobs("RUNNING") if not job["name"].endswith("-coordinator"))
    site.slurm.run("scancel", "--signal=USR2", array)
    shown = complete(site, home, expected)
    ended = {how: n for how, n in shown["workers_left"].items() if how != "stopped by the coordinator"}
    assert sum(ended.values()) == 1, shown["workers_left"]
    assert shown["attempts_lost"]["crash"] == 0 and shown["nodes_excluded"] == {}


def test_a_run_is_stopped_and_cancelled_from_outside(site: Site, home: Path, expected: list[Any]) -> None:
    submit(site, home)
    at_work(home)
    code, out, err = site.lemonade(home, "stop", "my")
    assert code == 0 and "told process " in out, out + err
    wait_for("the jobs have ended", site.slurm.idle, 300)
    submit(site, home)
    wait_for("the next is at work", lambda: (home / "my/epochs/000002").exists(), 300)
    code, out, err = site.lemonade(home, "cancel", "my")
    assert code == 0 and "coordinator" in out, out + err
    wait_for("the jobs have ended", site.slurm.idle, 300)
    submit(site, home)
    complete(site, home, expected)


def test_another_image_is_refused_unless_that_is_allowed(site: Site, home: Path, expected: list[Any]) -> None:
    submit(site, home)
    complete(site, home, expected)
    other = home / "other.sif"
    shutil.copy(site.image, other)
    with open(other, "ab") as file:
        file.write(b"\0")
    (home / "my.yaml").write_text(config("slurm", {"children": 32}))
    code, _, err = site.lemonade(home, "submit", "my.yaml", LEMONADE_IMAGE=str(other))
    assert code == 2 and f"its workers ran in the image {site.digest[:12]}, now it is in the image " in err, err
    content = yaml.safe_load(config("slurm", {"children": 32})) | {"container": {"may_change": True}}
    (home / "my.yaml").write_text(yaml.safe_dump(content))
    submit(site, home, LEMONADE_IMAGE=str(other))
    wait_for("the jobs have ended", site.slurm.idle, 300)
    assert len(site.front(home, "my")) > 4
    assert owner(home, 2)["image"] != owner(home, 1)["image"] == site.digest


# ---------------------------------------------------------------- a poisoned environment (18)


def poison(site: Site, home: Path) -> dict[str, str]:
    """A broken torch on PYTHONPATH, an old numpy in ~/.local, a loader path to nonsense, no home."""
    broken = home / "broken"
    for path in ("torch/__init__.py", "numpy/__init__.py", "submitit/__init__.py"):
        (broken / path).parent.mkdir(parents=True)
        (broken / path).write_text("raise ImportError('this is the wrong one')\n")
    (broken / "sitecustomize.py").write_text("print('sitecustomize of the host')\n")
    user = Path(site.user.pw_dir) / ".local/lib/python3.11/site-packages"
    shutil.copytree(broken, user, dirs_exist_ok=True)
    (broken / "libstdc++.so.6").write_bytes(b"no library")
    return {
        "PYTHONPATH": str(broken), "LD_LIBRARY_PATH": str(broken), "HOME": "/home/of/nobody", "PYTHONSTARTUP": "/none",
        "XDG_CACHE_HOME": "/proc", "MPLCONFIGDIR": "/proc", "APPTAINERENV_PYTHONPATH": str(broken),
        "SINGULARITYENV_LD_PRELOAD": str(broken / "libstdc++.so.6"),
    }  # fmt: skip


def test_a_poisoned_environment_changes_nothing(site: Site, home: Path, expected: list[Any]) -> None:
    environ = poison(site, home)
    take = ("bash", "-c", 'umask 077 && exec "$@"', "bash")
    code, out, err = site.run(home, *take, *HELPER, "submit", "my.yaml", **environ)
    assert code == 0 and "submitted job " in out, out + err
    try:
        complete(site, home, expected)
    finally:
        shutil.rmtree(Path(site.user.pw_dir) / ".local")
    assert all(path.stat().st_mode & 0o077 == 0 for path in (home / "my").rglob("*") if path.is_file())


def test_neither_the_image_nor_the_home_is_written_to(site: Site, home: Path, expected: list[Any]) -> None:
    """The image is as it was, bit for bit; of the home, only the folder of the run has changed."""

    def seen() -> dict[str, int]:
        top = Path(site.user.pw_dir)
        paths = [path for path in top.rglob("*") if home not in (path, *path.parents)]
        return {str(path): path.lstat().st_mtime_ns for path in (top, *paths)}

    before = seen()
    submit(site, home)
    complete(site, home, expected)
    assert seen() == before
    allowed = {"lemonade.sif", "my.yaml", "local.yaml", "lemonade-hpc", "my"}
    assert {path.name for path in home.iterdir()} == allowed
    now = subprocess.run(["sha256sum", site.image], capture_output=True, text=True, check=True).stdout[:64]
    assert now == site.digest


# ---------------------------------------------------------------- the helper, with another user


ASK = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as asked:
    asked.connect(sys.argv[1])
    asked.sendall(json.dumps({"command": ["squeue", "--me"], "cwd": "/", "input": ""}).encode() + b"\\n")
    print(asked.makefile().read())
"""


def test_another_user_can_not_ask_the_helper(site: Site, home: Path) -> None:
    submit(site, home)
    wait_for("the coordinator is at work", lambda: (home / "my/epochs/000001").exists(), 300)
    sockets = [path for path in Path("/tmp").glob("lemonade-*/socket") if path.stat().st_uid == site.user.pw_uid]
    path = max(sockets, key=lambda path: path.stat().st_mtime_ns)  # helpers that were killed have left theirs

    def ask(who: str | int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["python3", "-c", ASK, path], user=who, capture_output=True, text=True, check=False, cwd="/"
        )

    assert json.loads(ask(site.user.pw_uid).stdout)["code"] == 0
    done = ask("nobody")
    assert done.returncode and "PermissionError" in done.stderr
    path.parent.chmod(0o755)  # as if that did not protect it
    path.chmod(0o666)
    done = ask("nobody")
    assert '"code": 0' not in done.stdout
    logs = list(home.glob("my/slurm/helper-*.log"))
    refused = "is not the one whose helper this is"
    wait_for("it is written down", lambda: any(refused in log.read_text() for log in logs))
    site.lemonade(home, "cancel", "my")


# ---------------------------------------------------------------- doctor, with each fault planted


def told(checks: Sequence[dict[str, str]], state: str) -> dict[str, dict[str, str]]:
    return {check["check"]: check for check in checks if check["state"] == state}


@contextmanager
def changed(path: Path, old: str, new: str) -> Iterator[None]:
    """A file of the site's with something else in it, for a while."""
    before = path.read_text()
    assert old in before
    try:
        path.write_text(before.replace(old, new))
        yield
    finally:
        path.write_text(before)


@pytest.fixture
def plant(site: Site, home: Path) -> Iterator[Any]:
    """Runs doctor with a changed configuration, command line or environment; its exit code and checks."""

    def run(*options: str, section: dict[str, Any] | None = None, **environ: str) -> tuple[int, list[dict[str, str]]]:
        content = yaml.safe_load(config("slurm"))
        for key, value in (section or {}).items():
            content[key] = content.get(key, {}) | value
        (home / "my.yaml").write_text(yaml.safe_dump(content))
        code, out, err = site.lemonade(home, *options, "doctor", "my.yaml", "--json", **environ)
        assert out.startswith("["), out + err
        return code, json.loads(out)

    yield run


def test_doctor_finds_what_is_wrong_with_the_image(site: Site, home: Path, plant: Any) -> None:
    code, checks = plant("--image", "/nowhere/lemonade.sif")
    assert code == 1 and "copy the image" in told(checks, "fail")["image"]["fix"]
    shutil.copy(site.image, home / "shut.sif")
    (home / "shut.sif").chmod(0)
    code, checks = plant("--image", "shut.sif")
    assert code == 1 and "chmod a+r" in told(checks, "fail")["image"]["fix"]
    (home / "shut.sif").chmod(0o644)
    with open(home / "shut.sif", "r+b") as file:  # its size is right, and what it begins and ends with
        file.seek(150 * 2**20)
        file.write(bytes(60 * 2**20))
    code, checks = plant("--image", "shut.sif")
    failed = told(checks, "fail")
    assert code == 1 and set(failed) <= {"start", "imports"}, checks
    assert all("copy the image again" in check["fix"] for check in failed.values()), checks
    (home / "shut.sif").write_bytes(b"no image")
    code, checks = plant("--image", "shut.sif")
    assert code == 1 and "copy the image again" in told(checks, "fail")["start"]["fix"]


def test_doctor_finds_a_folder_that_is_not_seen(site: Site, home: Path, plant: Any) -> None:
    code, checks = plant(section={"container": {"binds": [str(home / "absent")]}})
    assert code == 1 and "container.binds" in told(checks, "fail")["container.binds"]["fix"], checks
    with changed(Path("/etc/apptainer/apptainer.conf"), "user bind control = yes", "user bind control = no"):
        code, checks = plant()
    failed = told(checks, "fail")["binds"]
    assert code == 1 and str(home) in failed["seen"] and "user bind control = yes" in failed["fix"], checks


def test_doctor_finds_what_is_wrong_with_slurm(site: Site, home: Path, plant: Any) -> None:
    bare = home / "bare"
    bare.mkdir()
    needed = (*"python3 apptainer bash sh env squashfuse_ll squashfuse fusermount3 unsquashfs stat cat true".split(),)
    for name in needed:
        if path := shutil.which(name, path="/usr/bin:/bin:/usr/sbin"):
            (bare / name).symlink_to(path)
    code, checks = plant(PATH=str(bare))
    assert code == 1 and "sbatch" in told(checks, "fail")["Slurm's commands"]["seen"], checks
    code, checks = plant(section={"cluster": {"partition": "nosuch"}})
    failed = told(checks, "fail")["workers' jobs"]
    assert code == 1 and "invalid partition specified: nosuch" in failed["seen"] and failed["fix"], checks
    site.slurm.stop("slurmdbd")
    try:
        code, checks = plant()
        assert code == 0 and told(checks, "warn")["sacct"]["fix"], checks
    finally:
        site.slurm.start_accounting()


def test_doctor_finds_that_arrays_are_small(site: Site, home: Path, plant: Any) -> None:
    slurm = site.slurm
    slurm.stop("slurmctld")
    try:
        with changed(slurm.folder / "slurm.conf", "MaxArraySize=1001", "MaxArraySize=10"):
            slurm.start_controller()
            code, checks = plant(section={"cluster": {"workers": 25}})
            slurm.stop("slurmctld")
    finally:
        slurm.start_controller()
    warned = told(checks, "warn")["MaxArraySize"]
    assert code == 0 and warned["seen"] == "10" and "3 arrays of at most 10" in warned["fix"], checks


def test_doctor_finds_a_disk_that_is_full_or_not_ones_own(site: Site, home: Path, plant: Any) -> None:
    small = home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=64k,uid={site.user.pw_uid}", "none", small], check=True)
    try:
        (small / "filler").write_bytes(bytes(60_000))
        content = yaml.safe_load(config("slurm"))
        (home / "my.yaml").write_text(yaml.safe_dump(content))
        code, out, err = site.lemonade(home, "doctor", "my.yaml", "--run", str(small / "run"), "--json")
        assert code == 1 and "delete something" in told(json.loads(out), "fail")["free space"]["fix"], out + err
    finally:
        subprocess.run(["umount", small], check=True)
    roots = home / "roots"
    roots.mkdir(mode=0o755)
    code, out, err = site.lemonade(home, "doctor", "my.yaml", "--run", str(roots / "run"), "--json")
    assert (
        code == 1 and "have its owner let you write there" in told(json.loads(out), "fail")["write permission"]["fix"]
    )


def test_doctor_finds_that_fuse_cannot_be_used(site: Site, home: Path, plant: Any) -> None:
    mode = Path("/dev/fuse").stat().st_mode & 0o777
    Path("/dev/fuse").chmod(0o600)
    try:
        code, checks = plant()
        assert code == 1 and "/dev/fuse" in told(checks, "fail")["start"]["fix"], checks
    finally:
        Path("/dev/fuse").chmod(mode)
