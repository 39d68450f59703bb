"""The image that workers run in: which it is, that it stays the same, and what a worker's start inside it looks like.

Apptainer is a script here that says how it was called; `tests/cluster/` has a real one.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemonade_hpc import config as configs
from lemonade_hpc import files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import chain, container, request, session, slurm
from lemonade_hpc.run.backends import Refused
from lemonade_hpc.run.host import helper

sys.path.insert(0, str(Path(__file__).parent))

import fake_slurm  # noqa: E402
import run_doubles as doubles  # noqa: E402

APPTAINER = f"""#!{sys.executable} -IS
import json, os, sys
if sys.argv[1:] == ["--version"]:
    sys.exit("LD_PRELOAD" in os.environ and os.environ["LD_PRELOAD"] != "/needed.so")
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv(container.AROUND, raising=False)
    doubles.install(monkeypatch)
    with doubles.folder() as made:
        yield made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "its image.sif"
    path.write_bytes(b"content")
    return path


def settings(image: Path | None = None, **changes: Any) -> Any:
    inside = {"container": {"image": str(image)} | changes.pop("container", {})} if image else {}
    content = doubles.BASE | {"cluster": {"backend": "slurm", "workers": 2, "stale_s": 0}} | inside
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    return configs.resolve(configs.from_dict(content, "test"), (1, 8, 8))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"image": "here.sif"}, r"container: got here.sif; give a path that begins with /, which all nodes see"),
        ({"image": "/i.sif", "binds": ["data"]}, r"container: got data; give a path that begins with /"),
        ({"nope": 1}, r"unknown key 'container.nope'. Valid keys here: binds, image, may_change, nv"),
    ],
)
def test_what_cannot_be_a_container_is_told(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configs.from_dict({"data": {"name": "digits"}, "cluster": {"backend": "slurm"}, "container": section}, "test")


def test_an_image_is_for_workers_on_slurm() -> None:
    with pytest.raises(
        ConfigError, match=r"container.image is for the workers of backend slurm, not local; .*exec IMAGE"
    ):
        configs.from_dict({"data": {"name": "digits"}, "container": {"image": "/i.sif"}}, "test")


def test_folders_to_bind_must_be_there_and_have_names_that_can_be(run: Path, image: Path) -> None:
    with pytest.raises(ConfigError, match="container.binds: /nowhere: no such folder"):
        container.check(settings(image, container={"binds": ["/nowhere"]}))
    relative = settings(image, data={"name": "npz", "root": "data/x.npz"})
    assert container.folders(relative) == [str(Path("data/x.npz").absolute())]


# ---------------------------------------------------------------- which image, and whether it is the same


def test_workers_are_in_the_image_that_is_given_else_in_the_coordinators(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert container.path_of(settings()) is None and container.read(settings()) is None
    monkeypatch.setenv(container.AROUND, "/other.sif")
    assert container.path_of(settings()) == Path("/other.sif")
    assert container.path_of(settings(image)) == image
    found = container.read(settings(image))
    assert found is not None and found.sha256 == files.sha256(b"content")


def test_an_image_that_cannot_be_read_is_told_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.sif", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=rf"container.image: {path}: {why}.*; give an image"):
            container.read(settings(path))


def test_a_folder_that_is_used_as_an_image_on_this_machine_is_like_none(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(container.AROUND, str(tmp_path))
    assert container.read(doubles.config()) is None


def test_an_image_is_another_one_when_its_content_is(run: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is read again where it looks like another one; workers in the queue look at what a coordinator last saw."""
    found = container.read(settings(image))
    assert found is not None
    python, script = container.prepare(found, settings(image), run), run / files.SLURM / "worker.sh"
    assert python() == container.worker_python(run) and found.stamp in script.read_text()
    os.utime(image, (1, 1))
    assert python() == container.worker_python(run) and "7 1.000000000" in script.read_text()
    monkeypatch.setattr(container, "_digest", lambda path: pytest.fail("read through at every launch"))
    python()
    monkeypatch.undo()
    image.write_bytes(b"another")
    with pytest.raises(Refused, match="is another image now than when this coordinator began; submit again"):
        python()
    image.unlink()
    with pytest.raises(Refused, match=f"{image}: No such file or directory"):
        python()


def test_an_image_that_cannot_be_seen_just_now_pauses_a_run(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = container.read(settings(image))
    assert found is not None
    python = container.prepare(found, settings(image), run)

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(container, "_stamp", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        python()


def test_a_run_goes_on_in_the_same_image_or_in_another_where_that_is_allowed(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one is on record, with each coordinator."""
    fake_slurm.install(monkeypatch, fake_slurm.FakeSlurm().run)

    def go(chosen: Any) -> list[str | None]:
        doubles.search(run, chosen)
        return [json.loads((run / files.owner(number)).read_text())["image"] for number in files.epochs(run)]

    first, second = (files.sha256(content) for content in (b"content", b"another"))
    image.write_bytes(b"damaged")
    made = doubles.start(run, settings(image), doubles.FakeBackend(run))  # which trains nobody
    made.close()
    owned = json.loads((run / files.owner(1)).read_text())
    (run / files.owner(1)).write_text(json.dumps(owned | {"image": files.sha256(b"damaged")}))
    image.write_bytes(b"content")
    assert go(settings(image))[1:] == [first]
    image.write_bytes(b"another")
    more = {"search": {"children": 24}}
    with pytest.raises(
        ConfigError, match=rf"in the image {first[:12]}, now it is in the image {second[:12]} \(.*may_ch"
    ):
        go(settings(image, **more))
    with pytest.raises(ConfigError, match=rf"in the image {first[:12]}, now it is in none \(SHA-256\)"):
        go(settings(**more))
    with pytest.raises(ConfigError, match=rf"in the image {first[:12]}, now it is in the image {second[:12]}"):
        session.submit(settings(image, **more), run)
    assert go(settings(image, container={"may_change": True}, **more))[1:] == [first, second]
    assert go(settings(image, search={"children": 30}))[1:] == [first, second, second]
    doubles.assert_sound(run)


def test_a_child_that_is_half_trained_is_a_reason_to_keep_the_image(run: Path, image: Path) -> None:
    made = doubles.start(run, settings(image), doubles.FakeBackend(run, lambda task: "hang"))
    for _ in range(4):
        made._turn()
    made.close()
    for one in (one for all_ in made.history.attempts.values() for one in all_):
        one.lost = one.lost or "stopped"
    history, now = made.history, container.read(settings(image))
    session._same_image(settings(image), run, history, now, lambda text: None)
    attempts = [one for all_ in history.attempts.values() for one in all_]
    attempts[0].done = 0.5
    with pytest.raises(ConfigError, match=r"ran in none, now it is in the image"):
        session._same_image(settings(image), run, history, now, lambda text: None)
    attempts[0].done, attempts[0].lost = 0.0, None  # its coordinator was killed: it may have been saved since
    with pytest.raises(ConfigError, match=r"ran in none, now it is in the image"):
        session._same_image(settings(image), run, history, now, lambda text: None)
    attempts[0].lost = "worker"
    session._same_image(settings(image), run, history, now, lambda text: None)
    folder = run / files.attempt_folder(next(iter(history.attempts)), attempts[0].id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").touch()  # its worker has died before it could say so
    with pytest.raises(ConfigError, match=r"ran in none, now it is in the image"):
        session._same_image(settings(image), run, history, now, lambda text: None)


def test_who_asks_for_folders_knows_what_is_wrong_from_what_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's exit code 3 is followed by another one, 2 is the end."""
    assert container.main(str(tmp_path / "absent.yaml")) == 2

    def away(source: str) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(container, "load", away)
    assert container.main("my.yaml") == 3 and "Input/output error" in capsys.readouterr().err


def test_no_worker_is_started_in_an_image_that_has_changed(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_slurm.FakeSlurm()
    fake_slurm.install(monkeypatch, made.run)
    found = container.read(settings(image))
    assert found is not None
    backend = slurm.SlurmBackend(
        run, "0123456789", settings().cluster, lambda text: None, start=container.prepare(found, settings(image), run)
    )
    backend.launch(["w0"], [])
    assert len(made.jobs) == 1
    image.write_bytes(b"another")
    with pytest.raises(Refused, match="is another image now"):
        backend.launch(["w1"], [])
    assert len(made.jobs) == 1


# ---------------------------------------------------------------- the start of a worker


def started(run: Path, bin: Path, *words: str, **environ: str) -> tuple[list[str], dict[str, str]]:
    """How Apptainer is called by a worker's script, and with what environment."""
    (bin / "apptainer").write_text(APPTAINER)
    (bin / "apptainer").chmod(0o755)
    environment = {"PATH": f"{bin}:/usr/bin:/bin"} | environ
    command = [*shlex.split(container.worker_python(run)), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told: tuple[list[str], dict[str, str]] = json.loads(done.stdout)
    return told


def test_a_worker_starts_in_its_image_with_what_it_needs_and_no_more(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, bin = tmp_path / "it's $HOME `x`, a: b", tmp_path / "bin"
    odd.mkdir()
    bin.mkdir()
    chosen = settings(image, container={"binds": [str(odd)]})
    found = container.read(chosen)
    assert found is not None
    container.prepare(found, chosen, run)()
    poison = {"PYTHONPATH": "/broken", "HOME": "/nowhere", "LD_LIBRARY_PATH": "/broken", "BASH_ENV": "/broken"}
    poison |= {"APPTAINERENV_PYTHONPATH": "/broken", "SINGULARITYENV_LD_PRELOAD": "/broken.so"}
    own = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "GPU-1,2", "SUBMITIT_X": "a b\nc'$(x)", "OMP_NUM_THREADS": "2"}
    words, seen = started(run, bin, "-u", "-m", "submitit", "a b", **poison, **own)
    binds = helper.outermost([str(odd), str(run.resolve())])
    expected = ["--quiet", "exec", "--cleanenv", "--no-home", "--no-eval"]
    expected += [word for folder in binds for word in ("--mount", f'type=bind,"src={folder}","dst={folder}"')]
    assert words == [*expected, str(image), "python3", "-u", "-m", "submitit", "a b"]
    assert {k: v for k, v in seen.items() if k.startswith("APPTAINERENV_")} == {
        f"APPTAINERENV_{key}": value for key, value in own.items()
    }
    assert "LD_LIBRARY_PATH" not in seen  # Apptainer's own tools would follow it
    assert not any(key.startswith("SINGULARITYENV_") for key in seen)
    image.write_bytes(b"another")
    with pytest.raises(subprocess.CalledProcessError):
        started(run, bin, "-u", **own)  # it has waited in the queue meanwhile


def test_what_apptainer_needs_to_start_at_a_site_is_left_to_it(run: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    found = container.read(settings(image))
    assert found is not None
    container.prepare(found, settings(image), run)
    script = (run / files.SLURM / "worker.sh").read_text()
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    _, seen = started(run, tmp_path / "bin", LD_LIBRARY_PATH="/needed")
    assert "LD_LIBRARY_PATH" not in seen


@pytest.mark.parametrize(
    ("nv", "there", "given"), [(None, True, 1), (None, False, 0), (True, False, 1), (False, True, 0)]
)
def test_the_driver_is_seen_where_there_is_one_or_as_said(
    run: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nv: bool | None, there: bool, given: int
) -> None:
    monkeypatch.setattr(helper, "DEVICE", "/dev/null" if there else "/nowhere/nvidiactl")
    (tmp_path / "bin").mkdir()
    chosen = settings(image, container={"nv": nv})
    found = container.read(chosen)
    assert found is not None
    container.prepare(found, chosen, run)
    assert started(run, tmp_path / "bin")[0].count("--nv") == given


def test_what_would_be_submitted_says_how_workers_start(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.data_sets, "load", lambda data: doubles.images())
    fake_slurm.install(monkeypatch, fake_slurm.FakeSlurm().run)
    _, worker = session.submission(settings(image), run)
    (srun,) = [line for line in worker.splitlines() if line.startswith("srun ")]
    assert f"sh {run.resolve()}/slurm/worker.sh -u -m submitit.core._submit" in srun
    _, plain = session.submission(settings(), run)
    assert f"{sys.executable} -u -m submitit.core._submit" in plain
    assert request.script(settings().cluster, "x", run).count("worker.sh") == 0


def test_a_coordinator_in_an_image_is_started_in_it_by_a_helper_of_its_own(
    run: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one outside that has submitted it may be gone, or of another version, when it starts."""
    monkeypatch.setattr(session.data_sets, "load", lambda data: doubles.images())
    fake_slurm.install(monkeypatch, fake_slurm.FakeSlurm().run)
    monkeypatch.setenv(container.AROUND, str(image))
    session.submit(settings(container={"binds": [str(image.parent)]}), run)
    script, copy = (run / files.SLURM / "coordinator.sbatch").read_text(), run.resolve() / files.SLURM / "helper.py"
    assert copy.read_bytes() == Path(helper.__file__).read_bytes()
    line = next(line for line in map(str.strip, script.splitlines()) if line.startswith("python3 "))
    assert shlex.split(line.removesuffix(" &")) == [
        "python3", "-I", str(copy), "--image", str(image), "--bind", str(image.parent), "search",
        str(run.resolve() / files.SLURM / "config.yaml"), "--run", str(run.resolve()),
    ]  # fmt: skip
    assert chain.PROGRAM[0] not in line


# ---------------------------------------------------------------- the lists of wheels

LISTS = Path(__file__).parents[2] / "containers"


@pytest.mark.parametrize(("variant", "version"), [("cuda", "2.13.0+cpu"), ("cpu", "2.14.1"), ("cuda", "2.14.1")])
def test_no_list_of_wheels_has_the_torch_of_another_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, version: str
) -> None:
    """One for CUDA once had torch without, since that was all that pip could resolve."""
    spec = importlib.util.spec_from_file_location("lock", LISTS / "lock.py")
    assert spec is not None and spec.loader is not None
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    item = {
        "metadata": {"name": "torch", "version": version},
        "download_info": {"archive_info": {"hashes": {"sha256": "0" * 64}}},
    }
    monkeypatch.setattr(lock, "HERE", tmp_path)
    said = json.dumps({"install": [item]})
    monkeypatch.setattr(lock.subprocess, "run", lambda *words, **options: SimpleNamespace(stdout=said))
    if (variant == "cpu") == ("+cpu" in version):
        lock.main(variant, [])
        assert (tmp_path / f"requirements-{variant}.txt").read_text().startswith(f"torch=={version} --hash=sha256:")
    else:
        with pytest.raises(SystemExit, match=rf"pip takes torch {re.escape(version)} for the {variant} image"):
            lock.main(variant, [])


def test_the_lists_of_wheels_are_those_of_their_images() -> None:
    for variant, cuda in (("cuda", True), ("cpu", False)):
        names = dict(
            line.split(" ")[0].split("==") for line in (LISTS / f"requirements-{variant}.txt").read_text().splitlines()
        )
        assert ("nvidia-nccl-cu13" in names) == cuda == ("+cpu" not in names["torch"])
