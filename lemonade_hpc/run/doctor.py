"""Whether a site can run a search, and what to change there or in the configuration: `lemonade-hpc doctor`.

Decides: which checks there are, and in what order, that in which things are needed. What only the host can tell is
asked by `host/helper.py`, inside the image before it starts this; file systems and Slurm have modules of their own.
Writes nothing that stays.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lemonade_hpc import __version__, explain, files
from lemonade_hpc import data as data_sets
from lemonade_hpc.config import Cluster, Config, ConfigError, resolve
from lemonade_hpc.run import checks, container, disk, request, scheduler
from lemonade_hpc.run.checks import FAIL, OK, WARN, Check, unknown
from lemonade_hpc.run.host import helper
from lemonade_hpc.run.journal import RecordError

VERSION = "import lemonade_hpc; print(lemonade_hpc.__version__)"
GPU = (
    "import json, torch; there = torch.cuda.is_available(); name = torch.cuda.get_device_name() if there else None\n"
    "print(json.dumps([name, torch.__version__, torch.version.cuda]))"
)
"""Asked of another process, as `run` does not import torch."""


@dataclass(frozen=True)
class Site:
    """What the host has told: its checks, and facts for others."""

    checks: tuple[Check, ...]
    commands: tuple[str, ...]
    user: str
    gpu: bool
    helper: str | None
    """The SHA-256 of what has told it."""

    @property
    def starts(self) -> bool:
        """Whether something can be started in the image of workers, or there is none."""
        return all(check.state != FAIL for check in self.checks)


def doctor(config: Config, run: Path) -> list[Check]:
    """Every check. Raises ConfigError where the configuration is wrong whatever the site is."""
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run}: exists and is no folder; give another --run")
    found, data = _data(config)
    if data is not None:
        config = resolve(config, data.shape)
    folder = Path(helper.existing(str(run)))
    site = _site(config, folder)
    made = [*site.checks, *checks.each("image", partial(_image, config, folder, site))]
    made += checks.each("GPU", partial(_gpu, config, folder, site))
    made.append(found)
    if data is not None and (run / files.RUN).exists():
        made += checks.each("run", partial(_run, config, data, run))
    made += checks.each("run folder", partial(disk.checks, folder, config.cluster))
    if config.cluster.backend == "slurm" and container.is_inside() and helper.HOST not in os.environ:
        made.append(unknown("Slurm", "there is none inside an image that was not started by the helper", "see above"))
    elif config.cluster.backend == "slurm":
        made += checks.each("Slurm", partial(scheduler.checks, config, run, site.commands, site.user))
    else:
        made.append(Check("Slurm", OK, f"not asked: cluster.backend is {config.cluster.backend}"))
    return made


def _data(config: Config) -> tuple[Check, data_sets.DataSet | None]:
    """Whether the data can be read; what was read."""
    source = config.data.root or config.data.name
    try:
        data = data_sets.load(config.data)
    except ConfigError as error:
        fix = "put the data there, readable, or say where it is: data.root; every node must see it by that name"
        return Check("data", FAIL, str(error), fix), None
    counts = ", ".join(f"{len(part.labels):,}" for part in (data.train, data.validation, data.test))
    seen = f"{source}: {counts} images to train on, for validation, for test"
    if data.warnings:
        return Check("data", WARN, f"{seen}; {'; '.join(data.warnings)}", "look at the images and labels"), data
    return Check("data", OK, seen), data


def _run(config: Config, data: data_sets.DataSet, run: Path) -> Iterator[Check]:
    """Whether a run that has begun would go on."""
    from lemonade_hpc.run import session

    try:
        yield Check("run", OK, session.check_run(config, data, run))
    except ConfigError as error:
        yield Check("run", FAIL, str(error), "give what it was started with, or another --run folder")
    except RecordError as error:
        fix = f"{explain.command('verify', str(run))} shows what is damaged; or give another --run folder"
        yield Check("run", FAIL, str(error), fix)


# ---------------------------------------------------------------- the host and the image


def _site(config: Config, folder: Path) -> Site:
    """What is known of the host: told by the helper, or found here where this is no image."""
    if not container.is_inside():
        image = container.path_of(config)
        told = helper.host(str(image) if image else None, _bound(config, folder), config.container.nv)
    elif helper.HOST in os.environ:
        told = json.loads(os.environ[helper.HOST])
    else:
        fix = "start doctor, and all other commands, by the helper from outside: ./lemonade-hpc doctor ..."
        return Site((unknown("this machine", "this image was not started by the helper", fix),), (), "", False, None)
    made = tuple(Check(one["check"], one["state"], one["seen"], one["fix"]) for one in told["checks"])
    return Site(made, tuple(told["commands"]), told["user"], told["gpu"], told["helper"])


def _bound(config: Config, folder: Path) -> list[str]:
    """The folders that workers see."""
    return [str(folder), *container.folders(config)]


def _python(config: Config, folder: Path) -> list[str]:
    """The words that are Python where workers run."""
    image = container.path_of(config)
    if image is None or container.is_inside():
        return [sys.executable]
    return [*helper.inside(str(image), _bound(config, folder), config.container.nv), "python3"]


def _asked(config: Config, folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """What a program says where workers run."""
    environ = None if container.is_inside() else helper.environment(os.environ)
    command, limit = [*_python(config, folder), "-c", program], helper.START_S
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, env=environ)


def _image(config: Config, folder: Path, site: Site) -> Iterator[Check]:
    """What of the image its checks from outside do not tell."""
    image = container.path_of(config)
    if image is None:
        yield Check("image", OK, f"none: workers run {sys.executable}")
    elif container.is_inside():
        yield from _seen_inside(config, image, site)
    elif site.starts:
        yield _same_version(_asked(config, folder, VERSION))


def _seen_inside(config: Config, image: Path, site: Site) -> Iterator[Check]:
    """Whether this image is the workers', the helper its own, and whether all is there that was to be bound."""
    around = os.environ[container.AROUND]
    if not image.exists():
        fix = f"leave container.image out, so that workers run in {around}; or bind its folder: container.binds"
        yield Check("workers' image", FAIL, f"container.image: {image}: not seen inside {around}", fix)
    missing = [one for one in config.container.binds if not os.path.isdir(one)]
    if missing:
        fix = "make that folder, or correct its name: container.binds"
        yield Check("container.binds", FAIL, f"no such folder: {', '.join(missing)}", fix)
    if site.helper not in (None, files.sha256(container.HELPER.read_bytes())):
        fix = f"copy it out again: apptainer exec {around} cat /lemonade-hpc > lemonade-hpc"
        yield Check("version", WARN, "the helper outside is not the one of this image", fix)
    else:
        yield Check("version", OK, __version__)


def _same_version(done: subprocess.CompletedProcess[str]) -> Check:
    """Whether workers inside are of the coordinator's version."""
    name, inside = "version", done.stdout.strip()
    if done.returncode:
        seen = f"lemonade_hpc cannot be imported inside: {_last(done.stderr)}"
        return Check(name, FAIL, seen, "use an image that was built by containers/build")
    if inside != __version__:
        fix = f"install {inside} here, build the image anew, or start the coordinator inside it too (slurm/README.md)"
        return Check(name, FAIL, f"{inside} inside the image, {__version__} here", fix)
    return Check(name, OK, f"{inside}, inside the image and here")


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no reason is given"])[-1]


# ---------------------------------------------------------------- GPU


def _gpu(config: Config, folder: Path, site: Site) -> Iterator[Check]:
    """Whether torch sees a GPU where workers run; tried only on a machine that has one."""
    cluster, name, slurm = config.cluster, "GPU", config.cluster.backend == "slurm"
    needed = request.gpus_of(cluster) > 0 if slurm else cluster.device == "cuda"
    if cluster.device == "cpu" or (slurm and not needed):
        yield Check(name, OK, "none is asked for")
    elif needed and config.container.nv is False:
        yield Check(name, FAIL, "container.nv is false: workers see no GPU", "container: {nv: true}, or leave nv out")
    elif not site.gpu and needed and os.environ.get("SLURM_JOB_GPUS"):
        fix = "ask the site why: a job that was given a GPU does not find its device"
        yield Check(
            name, FAIL, f"this job has GPU {os.environ['SLURM_JOB_GPUS']}, but there is no {helper.DEVICE}", fix
        )
    elif not site.gpu:
        seen = f"this machine has none ({helper.DEVICE})"
        yield Check(name, WARN, f"{seen}: not tried", _where(cluster)) if needed else Check(name, OK, seen)
    elif not site.starts:
        yield unknown(name, "nothing can be started in the image", "mend that first")
    else:
        yield _visible(_asked(config, folder, GPU), needed)


def _visible(done: subprocess.CompletedProcess[str], needed: bool) -> Check:
    name, state = "GPU", FAIL if needed else WARN
    if done.returncode:
        return Check(name, state, f"torch cannot be asked: {_last(done.stderr)}", "mend the install of torch")
    device, torch, cuda = json.loads(_last(done.stdout))
    seen = f"torch {torch}, {f'CUDA {cuda}' if cuda else 'built without CUDA'}"
    if device is not None:
        return Check(name, OK, f"{device}; {seen}")
    if cuda is None:
        return Check(name, state, f"{seen}: sees no GPU", "use the image, or install the torch, that has CUDA")
    fix = "compare that CUDA with the driver's (nvidia-smi); see CUDA_VISIBLE_DEVICES; container: {nv: true}"
    return Check(name, state, f"{seen}: sees no GPU", fix)


def _where(cluster: Cluster) -> str:
    """How to run doctor on a machine that has one."""
    command = explain.command("doctor", "...")
    if cluster.backend != "slurm":
        return f"run it on a machine that has one: {command}, or cluster: {{device: cpu}}"
    gres = None if "gres" in cluster.skip else cluster.gres or f"gpu:{cluster.gpus}"
    asked = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "gres": gres}
    options = [f"--{key}={value}" for key, value in (asked | cluster.extra).items() if value]
    return f"run it on a node that has one: {shlex.join(['srun', *options])} {command}"
