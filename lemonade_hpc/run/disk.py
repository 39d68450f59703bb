"""The file system of a run folder: whether it can be written, what is left of it, how slow it is, and how late.

Decides: what of that a search does not survive, or suffers from, and which `cluster.stale_s` it needs. Measures on
files in a folder of its own, which it removes; never touches the run's.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lemonade_hpc import files
from lemonade_hpc.config import Cluster
from lemonade_hpc.run.checks import FAIL, OK, WARN, Check

LOCAL = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
"""Types of file systems that one machine has, unless it exports them."""
COHERENT = frozenset({"beegfs", "ceph", "fuse.ceph", "gpfs", "lustre"})
"""Types that show every node at once what another has written."""
FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE = 2**20
ENOUGH_GB, ENOUGH_INODES = 5.0, 10_000
LEAST_GB, LEAST_INODES = 0.1, 100
"""Below these no search gets far."""
ROUNDS = 20
SLOW_S, STALL_S = 0.2, 5.0
"""The median and the worst durable write from which on it is told."""
SEEN_S, LATE_S = 20.0, 1.0
"""How long another process looks for a new name, and from when on it is told."""
ELSEWHERE = "or choose a folder on another file system by --run"
WATCH = (
    "import os, sys, time; print(flush=True); until = time.monotonic() + float(sys.argv[2])\n"
    "while not os.path.exists(sys.argv[1]) and time.monotonic() < until: time.sleep(0.001)\n"
    "print(time.monotonic() if os.path.exists(sys.argv[1]) else '')"
)


def checks(folder: Path, cluster: Cluster) -> Iterator[Check]:
    """Every check of a folder that exists; those that need to write are left out where that cannot be."""
    yield kind(folder, cluster)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f"{files.TEMPORARY}doctor-", dir=folder))
    except OSError as error:
        yield _full(folder, error) if error.errno in FULL else _forbidden(folder, error)
        return
    try:
        yield Check("write permission", OK, str(folder))
        room = _room(folder, scratch)
        yield room
        if room.state != FAIL:
            yield _writes(scratch)
            yield _visibility(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _forbidden(folder: Path, error: OSError) -> Check:
    seen = f"{folder}: {error.strerror}"
    fix = "have its owner let you write there (chmod u+w, chown)"
    if error.errno == errno.EROFS:
        fix = "find out why it is read-only here (a site may have made it so, or the file system is in trouble)"
    return Check("write permission", FAIL, seen, f"{fix}, {ELSEWHERE}")


def _room(folder: Path, scratch: Path) -> Check:
    """Whether 1 MiB can be written, and what is said to be left. Of quotas only the write knows."""
    try:
        files.write(scratch / "probe", os.urandom(PROBE))
    except OSError as error:
        if error.errno not in files.STORAGE_ERRORS:
            raise
        return _full(folder, error)
    gb, inodes = _left(folder)
    name, seen = "free space", _left_text(gb, inodes)
    if gb < LEAST_GB or inodes < LEAST_INODES:
        return Check(name, FAIL, seen, f"delete something, {ELSEWHERE}")
    if gb < ENOUGH_GB or inodes < ENOUGH_INODES:
        return Check(name, WARN, seen, f"make room before a long search (it pauses when the disk is full), {ELSEWHERE}")
    return Check(name, OK, seen)


def _full(folder: Path, error: OSError) -> Check:
    seen = f"{folder}: cannot be written: {error.strerror}; {_left_text(*_left(folder))}"
    fix = f"delete something or have your quota raised (quota -s shows it, or the site's own command), {ELSEWHERE}"
    return Check("free space", FAIL, seen, fix)


def _left(folder: Path) -> tuple[float, float]:
    """GB and inodes that an ordinary user may still have; some file systems do not count inodes."""
    told = os.statvfs(folder)
    return told.f_bavail * told.f_frsize / 1e9, told.f_favail if told.f_files else float("inf")


def _left_text(gb: float, inodes: float) -> str:
    return f"{gb:.1f} GB and {f'{inodes:,.0f}' if inodes < float('inf') else 'any number of'} inodes are free"


def kind(folder: Path, cluster: Cluster) -> Check:
    """Its type, and whether `cluster.stale_s` fits: how late a node may see what another has written."""
    name, found = "file system", kind_of(folder)
    if cluster.backend != "slurm":
        return Check(name, OK, f"{folder}: {found}")
    stale_s = files.STALE_S if cluster.stale_s is None else cluster.stale_s
    seen = f"{folder}: {found}; cluster.stale_s is {stale_s:g}"
    if found in LOCAL:
        if not stale_s:
            return Check(name, OK, f"{seen}, so all nodes are taken to be on this machine")
        fix = (
            "choose a folder that all nodes share, by --run; where this one is exported to them, leave it so; where "
            "this machine is the only node, cluster: {stale_s: 0}"
        )
        return Check(name, WARN, f"{seen}; it may be a disk that only this machine sees", fix)
    if found in COHERENT:
        return Check(name, OK, f"{seen}{'; 0 is enough there, and a successor begins sooner' if stale_s else ''}")
    if stale_s < files.STALE_S:
        late = f"nodes may see each other's files {files.STALE_S:g} s late"
        return Check(name, WARN, f"{seen}, but {late}", f"cluster: {{stale_s: {files.STALE_S:g}}}")
    return Check(name, OK, seen)


def kind_of(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that a folder is on, as the kernel names it: that of the last mount above it."""
    found, length = "unknown", -1
    for line in mounts.read_text().splitlines():
        where, _, rest = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), where.split()[4]))
        if folder.resolve().is_relative_to(point) and len(point.parts) >= length:
            found, length = rest.split()[0], len(point.parts)
    return found


def _writes(scratch: Path) -> Check:
    """How long a durable write takes, as the record makes one: write, fsync, rename, fsync of the folder."""
    times = []
    for number in range(ROUNDS):
        began = time.monotonic()
        files.write(scratch / str(number), b"x" * 1000)
        times.append(time.monotonic() - began)
    median, worst = statistics.median(times), max(times)
    seen = f"write, fsync, rename, fsync: median {1000 * median:.1f} ms, worst {1000 * worst:.1f} ms of {ROUNDS}"
    if median > SLOW_S or worst > STALL_S:
        fix = "a search goes on with it, but waits that long several times a child: choose a faster folder by --run"
        return Check("durable writes", WARN, seen, fix)
    return Check("durable writes", OK, seen)


def _visibility(scratch: Path) -> Check:
    """How long until another process, which was there before, sees a new name."""
    name, path = "visibility", scratch / "seen"
    command = [sys.executable, "-IS", "-c", WATCH, str(path), str(SEEN_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        files.write(path, b"")
        written = time.monotonic()
        told = watcher.stdout.readline().strip()
    late_s = max(0.0, float(told) - written) if told else SEEN_S
    seen = (
        f"another process on this machine sees a new name {1000 * late_s:.0f} ms later{'' if told else ', or never'}; "
        f"another node may see it later (cluster.stale_s)"
    )
    if late_s > LATE_S:
        return Check(name, WARN, seen, f"cluster: {{stale_s: {files.STALE_S:g}}} or more, {ELSEWHERE}")
    return Check(name, OK, seen)
