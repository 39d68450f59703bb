"""Durable writes, checked lines, and where things lie in a run folder.

Decides: the one way a file is written (temporary file, fsync, replace, fsync of the folder), the one text of a JSON
value, every path, and how long what another machine has written may be late before it counts as missing or damaged.
Standard library only. Paths in a run are relative to it, so that it can be moved.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

RUN = Path("run.json")
EPOCHS = Path("epochs")
WORKERS = Path("workers")
STATE = Path("state")
SLURM = Path("slurm")
CHILDREN = Path("children")
TEMPORARY = ".tmp-"
WEIGHTS = "weights.safetensors"
"""A child's trained weights, in the folder of the attempt that counts."""

STORAGE_ERRORS = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENOTCONN,
    errno.EFBIG,
})  # fmt: skip
"""Errors of the file system, not of the program: the run pauses and can go on once they are gone."""
OUTAGES = STORAGE_ERRORS | {errno.EACCES, errno.EPERM}
"""The same in the middle of a run: what was allowed when it began is refused by an expired ticket, or a `chmod`."""

STALE_S = 60.0
"""For how long a machine may see what others do in a shared folder as it was before: NFS's acregmax and acdirmax."""


class Patience:
    """Tells what is late from what is wrong: on a file system that is up to `stale_s` late, wrong is what stays so.

    `bound_s` is a little longer. Without `stale_s` what is wrong is so at once.
    """

    def __init__(self, stale_s: float | None) -> None:
        self.bound_s = 1.1 * stale_s + 1 if stale_s else 0.0
        self._since: float | None = None

    def waits(self, fine: bool) -> bool:
        """Whether to look again later: it is not fine, and has not been so for longer than the bound."""
        now = time.monotonic()
        self._since = None if fine else now if self._since is None else self._since
        return self._since is not None and now - self._since < self.bound_s


def child_folder(child: int) -> Path:
    """Where a child's attempts keep their files: `children/000/000123`, a thousand children a folder."""
    return CHILDREN / f"{child // 1000:03d}" / f"{child:06d}"


def attempt_folder(child: int, attempt: str) -> Path:
    """Where one attempt at a child keeps its files."""
    return child_folder(child) / attempt


def epoch_folder(epoch: int) -> Path:
    """One coordinator's life."""
    return EPOCHS / f"{epoch:06d}"


def journals(epoch: int) -> tuple[Path, Path]:
    """The two copies of an epoch's journal."""
    return epoch_folder(epoch) / "journal.log", epoch_folder(epoch) / "journal.copy"


def owner(epoch: int) -> Path:
    """Who holds an epoch, and the configuration it runs with."""
    return epoch_folder(epoch) / "owner.json"


def heartbeat(epoch: int) -> Path:
    """Grows by a byte with every beat of the epoch's coordinator."""
    return epoch_folder(epoch) / "heartbeat"


def stop_order(epoch: int) -> Path:
    """Empty; whoever wants the epoch's coordinator to stop, in good order, adds a byte."""
    return epoch_folder(epoch) / "stop"


def epochs(run: Path) -> list[int]:
    """Numbers of the epochs that a run has seen, ascending."""
    try:
        return sorted(int(item.name) for item in (run / EPOCHS).iterdir() if item.name.isdigit())
    except (FileNotFoundError, NotADirectoryError):
        return []


def assigned_log(epoch: int, worker: str) -> Path:
    """Coordinator to worker."""
    return epoch_folder(epoch) / "workers" / worker / "assigned.log"


def done_log(worker: str) -> Path:
    """Worker to coordinator."""
    return WORKERS / worker / "done.log"


def size(path: Path) -> int | None:
    """A file's size in bytes, None where there is none.

    Raises OSError where that cannot be told, which `Path.exists` does not everywhere (from Python 3.14 on never).
    """
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def sha256(content: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(content).hexdigest()


NO_SUCH_CALL = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a file system says that has no such operation."""


def sync(handle: int) -> None:
    """Make what was written to an open file or folder durable, where the file system can. Raises OSError."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, durably: a file in it is no safer than its name."""
    for folder in reversed([one for one in (path, *path.parents) if not one.exists()]):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def write(path: Path, content: bytes, *, new: bool = False) -> None:
    """Write a whole file durably: readers see the old one or the new one, never a part. Raises OSError.

    `new`: one that exists stays as it is, and FileExistsError is raised; of two who try, one succeeds. An error names
    the file.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        if new:
            _claim(temporary, path)
        else:
            os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _claim(temporary: Path, path: Path) -> None:
    """Give a file a name that none has; raises FileExistsError where one has.

    A file system without hard links, such as exFAT or sshfs, has the name made first, empty for a moment.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL | {errno.EPERM, errno.EMLINK}:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        os.replace(temporary, path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it. What is gone already, or cannot go now, stays: nobody relies on it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def in_words(error: OSError) -> str:
    """`path: No space left on device`."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error.strerror or str(error)


def write_json(path: Path, value: Any, *, new: bool = False) -> None:
    """`write` of an indented JSON document."""
    write(path, (json.dumps(value, indent=1) + "\n").encode(), new=new)


def dumps(value: Any) -> str:
    """Canonical one-line JSON: the same value gives the same text. Raises ValueError for NaN and infinity."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
