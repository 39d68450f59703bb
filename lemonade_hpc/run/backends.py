"""Where workers run: inside this process, or as processes of this machine through submitit.

Decides: how a worker is started, seen and ended. Never decides whether a child is finished: only its outcome does.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from lemonade_hpc import files
from lemonade_hpc.config import Cluster
from lemonade_hpc.run import owner, trainers, worker

CLOSE_S = 1.5
"""How long workers that have said goodbye may take to be gone."""
LAST_BYTES = 2000
"""How much of a dead worker's standard error is told."""
DIED, CANCELLED, REQUEUED = "died", "cancelled", "requeued"
"""How a worker ended: nobody can say more; a person cancelled it; its job was put back into the queue."""
FATE = frozenset({CANCELLED, REQUEUED, "preempted", "node failure", "time limit"})
"""Ends that are no fault of a worker's, nor of its node's."""
UNBOUND = {"OMP_PROC_BIND": "false", "OMP_PLACES": "", "GOMP_CPU_AFFINITY": "", "KMP_AFFINITY": "disabled"}
"""Else OpenMP binds the first thread of each worker of a machine to the same core."""
PLACEHOLDER = re.compile("%[jtaA]")
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Has submitit's processes import nothing from the working folder."""
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Refused(RuntimeError):  # noqa: N818
    """Workers cannot be started, now or later: says why."""


class NotNow(RuntimeError):  # noqa: N818
    """These workers were not started; others may be, later or fewer at a time: says why."""


class Backend(Protocol):
    """Starts workers and knows which of them live."""

    lasting: bool
    """Whether workers go on when the coordinator stops."""
    excludes: bool
    """Whether there are other nodes where one is at fault."""

    gpus: int
    """How many GPUs a worker takes up."""

    def room(self) -> int:
        """How many workers may be started now: a cluster is not asked too often."""

    def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
        """Start workers, whose mailboxes exist, on none of the nodes to `avoid`. Raises Refused or NotNow."""

    def adopt(self, name: str, launch: str, place: int) -> None:
        """Take over a worker of an earlier coordinator, which was launched in this place after the worker `launch`."""

    def heard(self, name: str, messages: Sequence[dict[str, Any]]) -> None:
        """What a worker has reported; its hello says which process it is."""

    def alive(self, name: str) -> bool:
        """Whether a worker may still report."""

    def seen(self, name: str) -> bool:
        """Whether the job of a worker was seen to wait for its turn by this coordinator."""

    def ended(self, name: str) -> str | None:
        """How a worker ended that is gone, in a word or two; None where that may be known later."""

    def node(self, name: str) -> str | None:
        """Where a worker is or was that has not said it itself; None where that is not known."""

    def kill(self, name: str) -> None:
        """End a worker at once."""

    def last_output(self, name: str) -> str:
        """The end of what a dead worker wrote to its standard error."""

    def step(self) -> None:
        """Let inline workers work, clean up after others."""

    def close(self) -> None:
        """Wait for workers that have said goodbye to be gone, end the rest."""


class InlineBackend:
    """Workers are objects of this process and take turns: for tests and debugging."""

    lasting = excludes = False
    gpus = 0

    def __init__(self, run: Path, cluster: Cluster) -> None:
        self._run, self._cluster = run, cluster
        self._workers: dict[str, worker.Worker] = {}

    def room(self) -> int:  # noqa: D102
        return self._cluster.workers

    def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:  # noqa: D102
        for name in names:
            self._workers[name] = worker.Worker(self._run, name, lambda epoch: trainers.InlineTrainer(self._run, epoch))

    def adopt(self, name: str, launch: str, place: int) -> None:  # noqa: D102
        pass

    def heard(self, name: str, messages: Sequence[dict[str, Any]]) -> None:  # noqa: D102
        pass

    def alive(self, name: str) -> bool:  # noqa: D102
        return name in self._workers

    def seen(self, name: str) -> bool:  # noqa: D102
        return False

    def ended(self, name: str) -> str | None:  # noqa: D102
        return DIED

    def node(self, name: str) -> str | None:  # noqa: D102
        return None

    def kill(self, name: str) -> None:  # noqa: D102
        self._workers.pop(name, None)

    def last_output(self, name: str) -> str:  # noqa: D102
        return ""

    def step(self) -> None:  # noqa: D102
        for name, one in list(self._workers.items()):
            if not one.step():
                del self._workers[name]

    def close(self) -> None:  # noqa: D102
        self._workers.clear()


class LocalBackend:
    """Processes of this machine, started by submitit's local executor."""

    lasting = excludes = False

    def __init__(self, run: Path, cluster: Cluster) -> None:
        self._run, self._cluster = run, cluster
        self._jobs: dict[str, Any] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._gpus: dict[str, str | None] = {}
        self._links: tempfile.TemporaryDirectory[str] | None = None
        """Other names of workers' folders."""
        self.gpus = int(cluster.device != "cpu" and bool(visible_gpus()))

    def room(self) -> int:  # noqa: D102
        return self._cluster.workers

    def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:  # noqa: D102
        for name in names:
            self._launch(name)

    def _launch(self, name: str) -> None:
        """Start a worker that ignores Ctrl-C: the coordinator tells it when to leave.

        submitit's local jobs default to 5 minutes, no GPU, and the caller's process group: the first is overridden
        here, the others by the worker itself, for submitit knows GPUs by index only.
        """
        from submitit import LocalExecutor

        executor = LocalExecutor(folder=self._plain(self._run / files.WORKERS / name / "job"))
        executor.update_parameters(timeout_min=10 * 365 * 24 * 60)
        self._gpus[name] = gpu = self._free_gpu()
        changed = dict.fromkeys(THREAD_LIMITS, str(self._cluster.cpus_per_worker)) | UNBOUND | SAFE_PATH
        before_them = {key: os.environ.get(key) for key in changed}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit the mask
        try:
            os.environ.update(changed)
            environment = {"CUDA_VISIBLE_DEVICES": gpu, **dict.fromkeys((*UNBOUND, *SAFE_PATH))}
            environment |= {"OMP_PROC_BIND": "false"}
            self._jobs[name] = executor.submit(worker.serve, str(self._run), name, environment)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for key, value in before_them.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})

    def _plain(self, folder: Path) -> Path:
        """A name of this folder in which submitit finds none of its placeholders, such as %t in `95%target`."""
        if not PLACEHOLDER.search(str(folder.absolute())):
            return folder
        files.make_folder(folder)
        if self._links is None:
            self._links = tempfile.TemporaryDirectory(prefix="lemonade-")
        link = Path(self._links.name) / folder.parent.name
        link.symlink_to(folder.absolute())
        return link

    def _free_gpu(self) -> str | None:
        """The GPU that the fewest living workers have, as CUDA_VISIBLE_DEVICES names it; None: as torch finds it."""
        if self._cluster.device == "cpu":
            return ""
        gpus = visible_gpus()
        if not gpus:
            return os.environ.get("CUDA_VISIBLE_DEVICES")
        taken = [gpu for name, gpu in self._gpus.items() if self.alive(name)]
        return min(gpus, key=taken.count)

    def adopt(self, name: str, launch: str, place: int) -> None:  # noqa: D102
        pass  # its hello says more

    def heard(self, name: str, messages: Sequence[dict[str, Any]]) -> None:  # noqa: D102
        for who in messages:
            if who["say"] == "hello":
                self._known[name] = who
                self._gpus.setdefault(name, who["gpu"])

    def alive(self, name: str) -> bool:  # noqa: D102
        if name in self._jobs:
            return bool(self._jobs[name].get_info()["jobState"] == "RUNNING")
        return name in self._known and owner.judge(self._known[name]) == "alive"

    def seen(self, name: str) -> bool:  # noqa: D102
        return False

    def ended(self, name: str) -> str | None:  # noqa: D102
        return DIED

    def node(self, name: str) -> str | None:  # noqa: D102
        return None

    def kill(self, name: str) -> None:
        """SIGKILL the supervisor; its trainer leaves when its standard input closes.

        One that has not said hello is known to submitit's process alone, whose pid is the job's id: SIGTERM to that
        one is passed on, though not before it has started the supervisor.
        """
        who = self._known.get(name)
        if who is not None and owner.judge(who) == "alive":
            with contextlib.suppress(ProcessLookupError):
                os.kill(who["pid"], signal.SIGKILL)
        elif who is None and name in self._jobs and self.alive(name):
            os.kill(int(self._jobs[name].job_id), signal.SIGTERM)

    def last_output(self, name: str) -> str:  # noqa: D102
        logs = sorted((self._run / files.WORKERS / name / "job").glob("*.err"))
        return logs[-1].read_bytes()[-LAST_BYTES:].decode(errors="replace").strip() if logs else ""

    def step(self) -> None:
        """Remove the pickles of workers that have ended: nothing that outlives a job is a pickle."""
        for name in [name for name in self._jobs if not self.alive(name)]:
            del self._jobs[name]
            for path in (self._run / files.WORKERS / name / "job").glob("*.pkl"):
                files.remove(path)

    def close(self) -> None:  # noqa: D102
        deadline = time.monotonic() + CLOSE_S
        while self._jobs and time.monotonic() < deadline:
            for name in self._jobs.keys() - self._known.keys():
                self.kill(name)
            self.step()
            time.sleep(0.02)
        for name in list(self._jobs):
            self.kill(name)
        if self._links is not None:
            self._links.cleanup()


DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")
"""A device in CUDA_VISIBLE_DEVICES: an index, or a UUID. Slurm sets "NoDevFiles" where a job has none."""


def visible_gpus() -> list[str]:
    """List the NVIDIA GPUs of this machine that this process may use, by index or UUID; asked without loading CUDA."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        parts = (part.strip() for part in allowed.split(","))
        return list(itertools.takewhile(DEVICE.fullmatch, parts))  # CUDA too ends at the first that is no device
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index in range(len(list(folder.iterdir())))] if folder.is_dir() else []


def may_have_gpu() -> bool:
    """Whether a worker here may find a GPU: False only where there is none for sure."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return bool(visible_gpus())
    devices = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, WSL, AMD
    return any(Path(path).exists() for path in devices)
