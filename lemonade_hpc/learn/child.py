"""The trainer: a process that holds torch and the data and trains one child after another.

Decides: what happens to a child, in which order: morph, receipt, distil, train, evaluate, save. It reads tasks from
standard input, one JSON document a line, and writes outcomes to standard output; whatever a library prints goes to
standard error. It leaves when its standard input closes, so that it never outlives its supervisor (`run/worker.py`).
Paper, section 3 (operators, distillation) and Algorithm 1.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from lemonade_hpc import data as data_sets
from lemonade_hpc import files
from lemonade_hpc.config import Config, ConfigError, from_dict
from lemonade_hpc.learn import members, transfer
from lemonade_hpc.learn.network import Network, Weights, build
from lemonade_hpc.learn.training import Diverged, Images, distillation, error, fit, place
from lemonade_hpc.learn.transfer import Morphed
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import morphisms
from lemonade_hpc.search.ops import Signature

PURPOSE_WEIGHTS, PURPOSE_DISTIL, PURPOSE_TRAIN, PURPOSE_MEASURE = 11, 12, 13, 14

NUM_PROBES = 64
"""Validation images that a receipt compares parent and child on, in float64."""

NUM_MEASURED = 256
"""Training images, unaugmented, that an inserted BatchNorm's statistics are measured on."""

EXACT_TOLERANCE = 1e-6
"""Largest difference of logits, relative to their scale, that an exact edit may make in stored float32 weights."""

LATE_POLL_S = 0.5
"""Time between looks for a parent's weights that are not there yet."""


class ParentDamaged(RuntimeError):  # noqa: N818
    """The parent's stored weights are not those of the record: another attempt would find the same."""


class OutOfTolerance(RuntimeError):  # noqa: N818
    """An exact edit changed the function: the child is refused."""


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

    Raises ConfigError for data unlike the run's.
    """
    identity = json.loads((run / files.RUN).read_text())
    config = from_dict(json.loads(owner.read_text())["config"], str(owner))
    data = data_sets.load(config.data)
    if data.checksum != identity["data"]["checksum"]:
        source = config.data.root or config.data.name
        raise ConfigError(f"{source}: not the data that this run was started with (checksum differs)")
    device = _device(config.cluster.device)
    deterministic = bool(config.training.deterministic)
    torch.set_num_threads(1 if deterministic else config.cluster.cpus_per_worker)
    _forbid_chance(deterministic)
    layout = torch.contiguous_format if deterministic else torch.channels_last
    parts = (place(data, part, device) for part in (data.train, data.validation))
    return Lab(run, config, Signature(data.shape, data.num_classes), device, layout, *parts)


def _forbid_chance(forbid: bool) -> None:
    """Have torch refuse, or not, operations that may differ from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused
    # Not use_deterministic_algorithms: it imports torch._inductor, 1.2 s in every fresh process.
    torch.set_deterministic_debug_mode("error" if forbid else "default")
    # Every operator here writes all that it returns.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("cluster.device: cuda, but this machine has no usable GPU; allowed: auto, cpu, cuda")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def seeded(*stream: int) -> torch.Generator:
    """Make a torch generator on the CPU for one decision."""
    seed = int(np.random.default_rng(stream).integers(2**62))
    return torch.Generator().manual_seed(seed)


def train_child(lab: Lab, task: dict[str, Any], progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train one child, save its weights and return the outcome as JSON.

    A child's own fault, or its parent's, is an outcome (`failure`), not an exception. So is an error of the file system
    (`storage`).
    """
    started = time.perf_counter()
    outcome: dict[str, Any] = {key: task[key] for key in ("child", "attempt", "digest")}
    try:
        network, receipt = _train(lab, task, progress)
        val_error = error(network, lab.validation)
        outcome |= {"objectives": {"val_error": val_error}, "receipt": receipt, "weights": _store(lab, task, network)}
    except OSError as trouble:
        if trouble.errno not in files.STORAGE_ERRORS:
            raise
        return {"storage": f"child {task['child']}: {files.in_words(trouble)}"}
    except (Diverged, OutOfTolerance, ParentDamaged) as fault:
        outcome |= {"failure": {"kind": type(fault).__name__, "reason": str(fault)}}
    seconds = time.perf_counter() - started
    return outcome | {"wall_s": round(seconds, 3), "device": _device_name(lab.device)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _train(
    lab: Lab, task: dict[str, Any], progress: Callable[[int], None] | None
) -> tuple[Network, dict[str, Any] | None]:
    number, training, seed = task["child"], lab.config.training, lab.config.seed
    generator = seeded(seed, PURPOSE_WEIGHTS, number)
    initial = task["parent"] is None
    if initial or not lab.config.search.inheritance:
        graph = graphs.from_json(task["graph"])
        network = _network(lab, graph, transfer.initial_weights(graph, lab.signature, generator))
        receipt = None
    else:
        network, receipt = _inherit(lab, task, generator)
    lr = training.initial_lr if initial else training.lr
    assert lr is not None
    first, last = task["epochs"]
    stream = (seed, PURPOSE_TRAIN, number)
    fit(network, lab.train, training, epochs=last - first, lr=lr, stream=stream, progress=progress)
    return network, receipt


def _inherit(lab: Lab, task: dict[str, Any], generator: torch.Generator) -> tuple[Network, dict[str, Any]]:
    """Make the child of a trained parent: morphed, checked and, after an approximate operator, distilled."""
    graph = graphs.from_json(task["parent"]["graph"])
    weights = _read(lab, task["parent"]["weights"])
    morphed = _morph(lab, task, graph, weights, generator)
    if morphed.graph != graphs.from_json(task["graph"]):  # ids included: weights are called by them
        raise RuntimeError(f"child {task['child']}: the edits do not lead to the graph that was asked for")
    teacher = _network(lab, graph, weights)
    network = _network(lab, morphed.graph, morphed.weights)
    receipt = _receipt(lab, teacher, network, morphed)
    if morphed.affected and lab.config.training.distill_epochs:
        _distil(lab, task["child"], teacher, network, morphed)
    return network, receipt


def _network(lab: Lab, graph: graphs.Graph, weights: Weights) -> Network:
    network = build(graph, lab.signature, weights).to(lab.device)
    return network.to(memory_format=lab.layout)


def _read(lab: Lab, stored: dict[str, Any]) -> Weights:
    """Read the weights that an outcome names; raises ParentDamaged where the file is gone or not what was stored.

    Another machine's file may be late here: it is looked for again before anything is said of it.
    """
    path, patience = lab.run / stored["path"], files.Patience(lab.config.cluster.stale_s)
    content = _content(path)
    while patience.waits(content is not None and files.sha256(content) == stored["sha256"]):
        time.sleep(LATE_POLL_S)
        content = _content(path)
    if content is None:
        raise ParentDamaged(f"{path}: is gone")
    if files.sha256(content) != stored["sha256"]:
        raise ParentDamaged(f"{path}: damaged or replaced, its sha256 is not {stored['sha256']}")
    return {name: value.to(lab.device) for name, value in load(content).items()}


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _morph(
    lab: Lab, task: dict[str, Any], parent: graphs.Graph, inherited: Weights, generator: torch.Generator
) -> Morphed:
    images: Tensor | None = None
    if lab.config.training.inserted_bn == "measured":
        rng = np.random.default_rng([lab.config.seed, PURPOSE_MEASURE])
        chosen = np.sort(rng.permutation(len(lab.train.labels))[:NUM_MEASURED])
        images = lab.train.normalise(lab.train.images[torch.from_numpy(chosen).to(lab.device)])
    edits = morphisms.from_json(task["edits"])
    prune_by = lab.config.search.prune_by
    return transfer.morph(parent, inherited, edits, lab.signature, generator, images_BCHW=images, prune_by=prune_by)


def _receipt(lab: Lab, parent: Network, child: Network, morphed: Morphed) -> dict[str, Any]:
    """Measure what the morphism did, before any training; raises OutOfTolerance for an exact one that did harm."""
    probes = lab.validation.first(NUM_PROBES).double()
    with torch.no_grad():
        before, after = (network.double()(probes) for network in (parent, child))
    for network in (parent, child):
        network.float()
    difference = float((after - before).abs().max())
    scale = float(before.abs().max())
    relative = difference / scale if scale else difference
    if morphed.exact and not relative <= EXACT_TOLERANCE:
        raise OutOfTolerance(
            f"exact operators changed the logits by {relative:.1e} of their scale; allowed is {EXACT_TOLERANCE:.0e}"
        )
    return {
        "exact": morphed.exact,
        "max_difference": difference,
        "relative_difference": relative,
        "error_before": error(child, lab.validation),
        "kept": [[group, list(filters)] for group, filters in morphed.kept],
    }


def _distil(lab: Lab, number: int, teacher: Network, network: Network, morphed: Morphed) -> None:
    """Teach the disturbed layers, all others frozen, to answer as the parent does (paper, section 3).

    The rate is `lr / distill_temperature`: softened answers have gradients that many times those of cross entropy.
    """
    training = lab.config.training
    assert training.distill_epochs is not None and training.lr is not None
    fit(
        network,
        lab.train,
        training,
        epochs=training.distill_epochs,
        lr=training.lr / training.distill_temperature,
        stream=(lab.config.seed, PURPOSE_DISTIL, number),
        loss_of=distillation(teacher, training.distill_temperature),
        only=morphed.affected,
    )


def _store(lab: Lab, task: dict[str, Any], network: Network) -> dict[str, Any]:
    """Save the weights durably; their path in the run folder, checksum and size in bytes."""
    content = members.encode(network, graphs.from_json(task["graph"]), lab.signature, lab.train)
    path = files.attempt_folder(task["child"], task["attempt"]) / "weights.safetensors"
    files.make_folder((lab.run / path).parent)
    files.write(lab.run / path, content)
    return {"path": str(path), "sha256": files.sha256(content), "bytes": len(content)}


def main(run: str, owner: str) -> None:
    """Serve tasks from standard input until it closes."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    try:
        lab = open_lab(Path(run), Path(owner))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"ready": _device_name(lab.device)}), file=out)
    while True:
        task = json.loads(inbox.get())
        report = _reporter(out, task)
        print(json.dumps(train_child(lab, task, report)), file=out)


def _reporter(out: TextIO, task: dict[str, Any]) -> Callable[[int], None]:
    return lambda epoch: print(json.dumps({"child": task["child"], "epoch": epoch}), file=out)


def _listen(inbox: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on; when the supervisor is gone, leave at once, also in the middle of a child.

    Reads the descriptor itself: a thread that waits in sys.stdin holds its lock, and Python aborts where it ends so.
    """
    rest = b""
    while part := os.read(0, 65536):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            inbox.put(line)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:3])
