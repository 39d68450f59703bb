"""The image that workers run in: which one it is, whether it is still the same, and how a worker is started inside.

Decides: which folders of the host a worker sees, by their own names, and what makes two images the same: every bit. A
coordinator inside an image starts its workers in the same one. How something is started inside at all, and what it
sees of the environment, is `host/helper.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemonade_hpc import files
from lemonade_hpc.config import Config, ConfigError, from_dict, load
from lemonade_hpc.run.backends import Refused
from lemonade_hpc.run.host import helper
from lemonade_hpc.run.record import read_identity

AROUND = "APPTAINER_CONTAINER"
"""Names the image that a process is in."""
HELPER = Path(helper.__file__)
WORKER = HELPER.with_name("worker.sh")


@dataclass(frozen=True)
class Image:
    """An image as it was read: its path, the SHA-256 of its content, and what tells without reading that it changed."""

    path: Path
    sha256: str
    stamp: str


def path_of(config: Config) -> Path | None:
    """The image of a run's workers: given, or else the one that this process is in; None where there is none."""
    given = config.container.image or os.environ.get(AROUND)
    return Path(given).absolute() if given else None


def read(config: Config) -> Image | None:
    """The image of a run's workers, read through; raises ConfigError where there is none, OSError where it fails.

    A folder that is used as an image may change at any time: on this machine it is like none.
    """
    path = path_of(config)
    if path is None or (path.is_dir() and config.cluster.backend != "slurm"):
        return None
    try:
        stamp = _stamp(path)
        return Image(path, _digest(path), stamp)
    except OSError as error:
        if error.errno in files.STORAGE_ERRORS:
            raise
        raise ConfigError(
            f"container.image: {path}: {error.strerror}; give an image (.sif) that every node can read"
        ) from error


def _stamp(path: Path) -> str:
    """Its size, and when it was changed last: as `stat -Lc '%s %.9Y'` says it."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09d}"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(config: Config) -> None:
    """Raise ConfigError for folders that are to be bound and do not exist."""
    for folder in config.container.binds:
        if not Path(folder).is_dir():
            raise ConfigError(f"container.binds: {folder}: no such folder")


def is_inside() -> bool:
    """Whether this process is in an image."""
    return AROUND in os.environ


def folders(config: Config) -> list[str]:
    """What a run needs to see beside its own folder."""
    root = [] if config.data.root is None else [os.path.abspath(config.data.root)]
    return [*config.container.binds, *root]


def worker_python(run: Path) -> str:
    """The shell words that are Python for a worker of this run: a script in its folder (`prepare`)."""
    return shlex.join(["sh", str((run / files.SLURM / WORKER.name).resolve())])


def prepare(image: Image, config: Config, run: Path) -> Callable[[], str]:
    """Write that script, which starts nothing in an image that looks like another one.

    What is returned tells the words for as long as the image is the same, else raises Refused; OSError where that
    cannot be seen now.
    """
    known = [image]
    _write_script(image, config, run)

    def python() -> str:
        path = image.path
        try:
            stamp = _stamp(path)
            if stamp != known[0].stamp:
                if _digest(path) != image.sha256:
                    raise Refused(f"{path}: is another image now than when this coordinator began; submit again")
                known[0] = Image(path, image.sha256, stamp)  # somebody has touched it
                _write_script(known[0], config, run)
        except FileNotFoundError as error:
            raise Refused(f"{path}: {error.strerror}") from error
        return worker_python(run)

    return python


def _write_script(image: Image, config: Config, run: Path) -> None:
    binds = [str(run.resolve()), *folders(config)]
    nv = {None: f"$([ -e {helper.DEVICE} ] && echo --nv)", True: "--nv", False: ""}[config.container.nv]
    begin, last = helper.inside(str(image.path), binds, nv=False)[:-1], shlex.quote(str(image.path))
    values = {
        "kept": helper.KEPT,
        "image": last,
        "stamp": shlex.quote(image.stamp),
        "start": f"{shlex.join(begin)} {nv} {last}",
    }
    files.make_folder(run / files.SLURM)
    files.write(run / files.SLURM / WORKER.name, filled(WORKER.read_text(), values).encode())


def coordinator(config: Config, run: Path, arguments: list[str]) -> list[str]:
    """The words that start a coordinator in the image that this one is in, from outside: by the helper's copy."""
    image, copy = os.environ[AROUND], (run / files.SLURM / HELPER.name).resolve()
    binds = [word for folder in folders(config) for word in ("--bind", folder)]
    return ["python3", "-I", str(copy), "--image", image, *binds, *arguments]


def copy_helper(run: Path) -> None:
    """Put it into the run folder, for those words."""
    files.write(run / files.SLURM / HELPER.name, HELPER.read_bytes())


def filled(text: str, values: dict[str, Any]) -> str:
    """A template with its `@key@` replaced."""
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    return text


def main(source: str) -> int:
    """Print the folders that a configuration, or a run's, names, as JSON: asked by the helper before it starts it."""
    try:
        identity = read_identity(Path(source)) if Path(source).is_dir() else None
        print(json.dumps(folders(load(source) if identity is None else from_dict(identity["config"], source))))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return helper.LATER if isinstance(error, OSError) else helper.WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
