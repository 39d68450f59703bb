"""Who a process is, and whether it still lives.

Decides: when the owner of an epoch, or a worker, counts as gone. On the same host and boot a process is known by its
pid and start time; on another host nothing is known from here. Clocks are never compared.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["alive", "gone", "unknown"]


def identity(pid: int | None = None) -> dict[str, Any]:
    """Tell who this process (or `pid`) is: host, boot, pid name space, pid, start time in clock ticks since boot."""
    pid = os.getpid() if pid is None else pid
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_space": os.stat("/proc/self/ns/pid").st_ino,
        "pid": pid,
        "started": _started(pid),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "user": os.getuid(),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
    }


def judge(who: dict[str, Any]) -> Verdict:
    """Whether the process with this identity is alive, as far as can be told from here."""
    here = identity()
    if who["host"] != here["host"]:
        return "unknown"
    if who["boot"] != here["boot"]:
        return "gone"
    if who["pid_space"] != here["pid_space"]:
        return "unknown"
    started = _started(who["pid"])
    if started is None and _hidden(who["pid"]):
        return "unknown"
    return "alive" if started is not None and started == who["started"] else "gone"


def is_own(who: dict[str, Any]) -> bool:
    """Whether it is this very process."""
    here = identity()
    return all(who.get(key) == here[key] for key in ("host", "boot", "pid_space", "pid", "started"))


def describe(who: dict[str, Any]) -> str:
    """In words, for messages."""
    job = f", Slurm job {who['slurm_job']}" if who.get("slurm_job") else ""
    return f"process {who['pid']} on {who['host']}{job}"


def _hidden(pid: int) -> bool:
    """Whether it is another user's process, which /proc need not show (`hidepid`)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False


def _started(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None for a dead one, a zombie, or one that is hidden."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last: `hidepid=1`
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
