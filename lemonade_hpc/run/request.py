"""What is asked of Slurm for one worker, as submitit takes it and as a batch script. Asks nobody."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lemonade_hpc.config import Cluster
from lemonade_hpc.run.backends import THREAD_LIMITS

SIGNAL_S = 30
"""Slurm signals a worker this long before its time limit, which it has left a little before by itself."""


def script(cluster: Cluster, name: str, folder: Path, python: str | None = None) -> str:
    """The batch script of one worker; `python`: the shell words that are Python there, by default this one's."""
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder=folder, python=python)
    executor.update_parameters(**parameters(cluster, name))
    return str(executor._make_submission_file_text(executor._submitit_command_str, "check"))


def parameters(cluster: Cluster, name: str, avoid: Collection[str] = ()) -> dict[str, Any]:
    """The arguments of submitit's executor: what is asked of Slurm for one worker."""
    cpus = cluster.cpus_per_worker
    gpus = f"gpu:{cluster.gpus}" if cluster.gpus else None
    asked = {
        "cpus_per_task": cpus,
        "mem": f"{int(1024 * cluster.mem_gb)}M",
        "gres": cluster.gres or gpus,
        "no-requeue": True,
        "reservation": cluster.reservation,
    }
    asked = {key: v for key, v in asked.items() if v is not None and key.replace("_", "-") not in cluster.skip}
    further = {key: asked.pop(key) for key in ("no-requeue", "reservation") if key in asked}
    return {
        "job_name": name,
        "time": cluster.time_min,
        "signal_delay_s": SIGNAL_S,
        "srun_args": [f"--cpus-per-task={cpus}"] if "cpus_per_task" in asked else [],  # from 22.05 on not inherited
        **asked,
        **{key: getattr(cluster, key) for key in ("partition", "account", "qos", "constraint", "wckey")},
        "exclude": ",".join([*([cluster.exclude] if cluster.exclude else []), *sorted(avoid)]) or None,
        "array_parallelism": cluster.max_array,
        "setup": [*(f"export {key}={cpus}" for key in THREAD_LIMITS), *cluster.setup],
        "additional_parameters": {**further, **cluster.extra},
    }


def gpus_of(cluster: Cluster) -> int:
    """How many GPUs a worker is given."""
    found = re.search(r"\bgpu(?::[^:,]+)??(?::(\d+))?(?:,|$)", cluster.gres or "")
    if found:
        return int(found[1] or 1)
    return 0 if cluster.gres else cluster.gpus
