"""The trainer: a process that holds torch and the data and trains one child after another.

Decides: what happens to a child, in which order: morph, receipt, distil, train, evaluate, save; and where one that an
earlier attempt has begun goes on (`checkpoints.py`). It reads tasks from standard input, one JSON document a line, and
writes outcomes to standard output; whatever a library prints goes to standard error. `{"do": "save"}` among the tasks
asks for a checkpoint at once. It leaves when its standard input closes, so that it never outlives its supervisor
(`run/worker.py`).
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from lemonade_hpc import files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.learn import checkpoints, members, transfer
from lemonade_hpc.learn.checkpoints import DISTIL, TRAIN, Checkpoint, Keeper, Policy, Work
from lemonade_hpc.learn.lab import Lab, device_name, open_lab
from lemonade_hpc.learn.network import Network, Weights, build
from lemonade_hpc.learn.training import Diverged, Moment, batches_of, distillation, error, fit
from lemonade_hpc.learn.transfer import Morphed
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import morphisms

PURPOSE_WEIGHTS, PURPOSE_DISTIL, PURPOSE_TRAIN, PURPOSE_MEASURE = 11, 12, 13, 14

NUM_PROBES = 64
"""Validation images that a receipt compares parent and child on, in float64."""

NUM_MEASURED = 256
"""Training images, unaugmented, that an inserted BatchNorm's statistics are measured on."""

EXACT_TOLERANCE = 1e-6
"""Largest difference of logits, relative to their scale, that an exact edit may make in stored float32 weights."""

MOST_WORDS = 400
"""Characters of what torch says of memory that are put on record."""

LATE_POLL_S = 0.5
"""Time between looks for a parent's weights that are not there yet."""


class ParentDamaged(RuntimeError):  # noqa: N818
    """The parent's stored weights are not those of the record: another attempt would find the same."""


class OutOfTolerance(RuntimeError):  # noqa: N818
    """An exact edit changed the function: the child is refused."""


def seeded(*stream: int) -> torch.Generator:
    """Make a torch generator on the CPU for one decision."""
    seed = int(np.random.default_rng(stream).integers(2**62))
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Line:
    """What a child in training tells its supervisor, and hears: epochs that end, checkpoints taken; one is wanted."""

    epoch: Callable[[int], None] = lambda epoch: None
    saved: Callable[[dict[str, float]], None] = lambda progress: None
    wanted: threading.Event = field(default_factory=threading.Event)


def train_child(lab: Lab, task: dict[str, Any], line: Line | None = None) -> dict[str, Any]:
    """Train one child, from the start or from a checkpoint, save its weights and return the outcome as JSON.

    A child's own fault, or its parent's, is an outcome (`failure`), not an exception. So is an error of the file system
    (`storage`). `wall_s` counts what earlier attempts did up to the checkpoint; `resumed` is the share of the work that
    was done there.
    """
    started = time.perf_counter()
    outcome: dict[str, Any] = {key: task[key] for key in ("child", "attempt", "digest")}
    before_s = 0.0
    try:
        key = _key(lab, task)
        found = checkpoints.find(lab.run / files.child_folder(task["child"]), key)
        if found is not None:
            outcome["resumed"] = found.work.done(found.phase, found.moment)
            before_s = found.wall_s
        network, receipt = _train(lab, task, key, found, line or Line())
        val_error = error(network, lab.validation)
        outcome |= {"objectives": {"val_error": val_error}, "receipt": receipt, "weights": _store(lab, task, network)}
    except OSError as trouble:
        if trouble.errno not in files.OUTAGES:
            raise
        return {"storage": f"child {task['child']}: {files.in_words(trouble)}"}
    except (Diverged, OutOfTolerance, ParentDamaged) as fault:
        outcome |= {"failure": {"kind": type(fault).__name__, "reason": str(fault)}}
    except (MemoryError, RuntimeError) as fault:
        if not _is_out_of_memory(fault):
            raise
        outcome |= {"failure": {"kind": "memory", "reason": f"needs more memory than there is: {fault}"[:MOST_WORDS]}}
    if "failure" in outcome and lab.device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = before_s + time.perf_counter() - started
    return outcome | {"wall_s": round(seconds, 3), "device": device_name(lab.device)}


def _is_out_of_memory(fault: Exception) -> bool:
    """Whether there was too little memory; torch says so on a CPU by a plain RuntimeError."""
    return isinstance(fault, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(fault)


def _key(lab: Lab, task: dict[str, Any]) -> str:
    """All that a child's numbers depend on, as one checksum: a checkpoint of anything else is not of this child."""
    asked = {key: task[key] for key in ("child", "digest", "graph", "edits", "epochs", "parent")}
    settings = [lab.config.seed, lab.config.training.model_dump(mode="json")]
    ways = [lab.config.search.inheritance, lab.config.search.prune_by]
    return files.sha256(files.dumps([checkpoints.FORMAT, asked, settings, ways]).encode())


@dataclass(frozen=True)
class Begun:
    """A child between two batches: its work, its network, and while it is distilled its parent's."""

    work: Work
    network: Network
    teacher: Network | None
    phase: int
    moment: Moment


def _train(
    lab: Lab, task: dict[str, Any], key: str, found: Checkpoint | None, line: Line
) -> tuple[Network, dict[str, Any] | None]:
    number, training = task["child"], lab.config.training
    begun = _begin(lab, task, key) if found is None else _go_on(lab, task, found)
    network, work, moment = begun.network, begun.work, begun.moment
    keeper = Keeper(
        lab.run / files.attempt_folder(number, task["attempt"]), _policy(lab), work,
        report=line.saved, wanted=line.wanted, before_s=found.wall_s if found else 0.0,
    )  # fmt: skip
    if begun.phase == DISTIL:
        assert begun.teacher is not None
        watch = keeper.watch(DISTIL, network, work.affected)
        _distil(lab, number, begun.teacher, network, work, moment, watch)
        moment = Moment()
    lr = training.initial_lr if task["parent"] is None else training.lr
    assert lr is not None
    stream, watch = (lab.config.seed, PURPOSE_TRAIN, number), keeper.watch(TRAIN, network, None)
    epochs = work.epochs[TRAIN]
    fit(
        network, lab.train, training, epochs=epochs, lr=lr, stream=stream, begin=moment, progress=line.epoch,
        watch=watch,
    )  # fmt: skip
    return network, work.receipt


def _policy(lab: Lab) -> Policy:
    cluster = lab.config.cluster
    return Policy(cluster.checkpoint_min * 60, cluster.checkpoint_epochs or 0)


def _begin(lab: Lab, task: dict[str, Any], key: str) -> Begun:
    """Make a child that nobody has trained yet."""
    generator = seeded(lab.config.seed, PURPOSE_WEIGHTS, task["child"])
    teacher, receipt, affected = None, None, frozenset[int]()
    if task["parent"] is None or not lab.config.search.inheritance:
        graph = graphs.from_json(task["graph"])
        network = _network(lab, graph, transfer.initial_weights(graph, lab.signature, generator))
    else:
        teacher, network, morphed = _inherit(lab, task, generator)
        receipt = _receipt(lab, teacher, network, morphed)
        affected = morphed.affected
    first, last = task["epochs"]
    distil = (lab.config.training.distill_epochs or 0) if affected else 0
    num_batches = batches_of(lab.train, lab.config.training)
    work = Work(key, affected, (distil, last - first), num_batches, receipt)
    return Begun(work, network, teacher, DISTIL if distil else TRAIN, Moment())


def _go_on(lab: Lab, task: dict[str, Any], found: Checkpoint) -> Begun:
    """Make a child as a checkpoint has it. Its parent may be gone by now, and is read only where it still teaches."""
    network = _network(lab, graphs.from_json(task["graph"]), found.weights)
    teacher = None
    if found.phase == DISTIL:
        parent = task["parent"]
        teacher = _network(lab, graphs.from_json(parent["graph"]), _read(lab, parent["weights"]))
    only = found.work.affected if found.phase == DISTIL else None
    return Begun(found.work, network, teacher, found.phase, found.resumed(network, only))


def _inherit(lab: Lab, task: dict[str, Any], generator: torch.Generator) -> tuple[Network, Network, Morphed]:
    """Read a child's parent and morph it: the parent's network, the child's, and what the morphism did."""
    graph = graphs.from_json(task["parent"]["graph"])
    weights = _read(lab, task["parent"]["weights"])
    morphed = _morph(lab, task, graph, weights, generator)
    if morphed.graph != graphs.from_json(task["graph"]):  # ids included: weights are called by them
        raise RuntimeError(f"child {task['child']}: the edits do not lead to the graph that was asked for")
    return _network(lab, graph, weights), _network(lab, morphed.graph, morphed.weights), morphed


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


def _distil(
    lab: Lab, number: int, teacher: Network, network: Network, work: Work, begin: Moment,
    watch: Callable[[Moment], None],
) -> None:  # fmt: skip
    """Teach the disturbed layers, all others frozen, to answer as the parent does (paper, section 3).

    The rate is `lr / distill_temperature`: softened answers have gradients that many times those of cross entropy.
    """
    training = lab.config.training
    assert training.lr is not None
    fit(
        network,
        lab.train,
        training,
        epochs=work.epochs[DISTIL],
        lr=training.lr / training.distill_temperature,
        stream=(lab.config.seed, PURPOSE_DISTIL, number),
        loss_of=distillation(teacher, training.distill_temperature),
        only=work.affected,
        begin=begin,
        watch=watch,
    )


def _store(lab: Lab, task: dict[str, Any], network: Network) -> dict[str, Any]:
    """Save the weights durably; their path in the run folder, checksum and size in bytes."""
    content = members.encode(network, graphs.from_json(task["graph"]), lab.signature, lab.train)
    path = files.attempt_folder(task["child"], task["attempt"]) / files.WEIGHTS
    files.make_folder((lab.run / path).parent)
    files.write(lab.run / path, content)
    return {"path": str(path), "sha256": files.sha256(content), "bytes": len(content)}


def main(run: str, owner: str) -> None:
    """Serve tasks from standard input until it closes."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    wanted = threading.Event()
    threading.Thread(target=_listen, args=(inbox, wanted), daemon=True).start()
    try:
        lab = open_lab(Path(run), Path(owner))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"ready": device_name(lab.device)}), file=out)
    while True:
        task = json.loads(inbox.get())
        print(json.dumps(train_child(lab, task, _line(out, task, wanted))), file=out)


def _line(out: TextIO, task: dict[str, Any], wanted: threading.Event) -> Line:
    def tell(**what: Any) -> None:
        print(json.dumps({"child": task["child"], **what}), file=out)

    return Line(
        epoch=lambda epoch: tell(epoch=epoch),
        saved=lambda progress: tell(attempt=task["attempt"], saved=progress),
        wanted=wanted,
    )


def _listen(inbox: queue.SimpleQueue[bytes], wanted: threading.Event) -> None:
    """Pass tasks on, and the wish for a checkpoint; when the supervisor is gone, leave at once, also in mid-child.

    A wish that comes after a child's last batch is granted in the next child: one checkpoint too many does no harm.
    Reads the descriptor itself: a thread that waits in sys.stdin holds its lock, and Python aborts where it ends so.
    """
    rest = b""
    while part := os.read(0, 65536):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if _asks_to_save(line):
                wanted.set()
            else:
                inbox.put(line)
    os._exit(0)


def _asks_to_save(line: bytes) -> bool:
    try:
        return bool(json.loads(line).get("do") == "save")
    except (ValueError, AttributeError):  # who takes it for a task says what is wrong; this thread must live
        return False


if __name__ == "__main__":
    main(*sys.argv[1:3])
