"""What a trainer process has from its first child to its last: configuration, data on the device, arithmetic.

Decides: which device it computes on, and whether torch may do anything that differs from run to run.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from lemonade_hpc import __version__, files
from lemonade_hpc import data as data_sets
from lemonade_hpc.config import Cluster, Config, ConfigError, Data, from_dict
from lemonade_hpc.learn.training import Images, place
from lemonade_hpc.search.ops import Signature


@dataclass(frozen=True)
class Lab:
    """What stays in the trainer from child to child: configuration, data on the device, the run folder.

    `layout` is the feature maps' order in memory: channels last is 1.15-1.3 times faster on a CPU.
    """

    run: Path
    config: Config
    signature: Signature
    device: torch.device
    layout: torch.memory_format
    train: Images
    validation: Images


def open_lab(run: Path, owner: Path) -> Lab:
    """Load the data and place it on the device; the configuration is that of the epoch whose `owner.json` is given.

    Raises ConfigError for data that cannot be read here, or are unlike the run's.
    """
    identity, epoch = json.loads((run / files.RUN).read_text()), json.loads(owner.read_text())
    _same_code(epoch["code"])
    config = from_dict(epoch["config"], str(owner))
    data = _load(config.data, identity["data"]["checksum"])
    device = _device(config.cluster)
    deterministic = bool(config.training.deterministic)
    torch.set_num_threads(1 if deterministic else config.cluster.cpus_per_worker)
    _forbid_chance(deterministic)
    layout = torch.contiguous_format if deterministic else torch.channels_last
    parts = (place(data, part, device) for part in (data.train, data.validation))
    return Lab(run, config, Signature(data.shape, data.num_classes), device, layout, *parts)


def _same_code(coordinators: str) -> None:
    """Refuse to work for a coordinator of another version."""
    if coordinators != __version__:
        raise ConfigError(
            f"the coordinator is lemonade-hpc {coordinators}, its worker on {_here()} {__version__}: have both run "
            f"in one image, or one environment"
        )


def _here() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _load(wanted: Data, checksum: str) -> data_sets.DataSet:
    """Read the data; the process that started the search could, so an error names this machine."""
    try:
        data = data_sets.load(wanted)
        if data.checksum != checksum:
            source = wanted.root or wanted.name
            raise ConfigError(f"{source}: not the data that this run was started with (checksum differs)")
    except ConfigError as error:
        advice = "have every node run in the same environment and folder"
        if wanted.root is not None:
            advice = "put it on the file system that all nodes share, and give data.root there"
        raise ConfigError(f"{error}. So it is on {_here()}, but not where the search was started: {advice}") from error
    return data


def _forbid_chance(forbid: bool) -> None:
    """Have torch refuse, or not, operations that may differ from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused
    # Not use_deterministic_algorithms: it imports torch._inductor, 1.2 s in every fresh process.
    torch.set_deterministic_debug_mode("error" if forbid else "default")
    # Every operator here writes all that it returns.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _device(cluster: Cluster) -> torch.device:
    """What to compute on; raises ConfigError where a GPU is to be had, or was asked of Slurm, and cannot be used."""
    wanted = cluster.device
    if wanted == "cpu" or torch.cuda.is_available():
        return torch.device("cpu" if wanted == "cpu" else "cuda")
    if wanted == "cuda":
        raise ConfigError("cluster.device: cuda, but this machine has no usable GPU; allowed: auto, cpu, cuda")
    if cluster.backend == "slurm" and cluster.gpus and (cluster.gres is None or "gpu" in cluster.gres):
        raise ConfigError(
            f"this worker's job has a GPU, and torch {torch.__version__} cannot use it on {_here()} (nvidia-smi shows "
            f"the driver; is a module missing in cluster.setup?). To train without: cluster: {{device: cpu}}"
        )
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """What a device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
