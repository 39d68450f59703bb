"""The trainer: what becomes of a task, what it reports, that it is the same in any process, and how it ends."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lemonade_hpc import __version__, config, data, files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.learn import child, training, transfer
from lemonade_hpc.learn.child import Lab
from lemonade_hpc.learn.network import Weights, build
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import morphisms, spaces
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.morphisms import Edit, Plan, Resize
from lemonade_hpc.search.ops import Signature

Task = dict[str, Any]

SIGNATURE = Signature((1, 8, 8), 10)
GRAPH = spaces.plain([12, 12], False, SIGNATURE)
EXACT = (Edit("insert", 3, 3), Edit("widen", 1, 2))
APPROXIMATE = (Edit("prune", 5, 4), Edit("separable", 1))


def make_run(folder: Path, **changed: Any) -> tuple[Path, Path]:
    """A run's folder as its coordinator leaves it, and its epoch's `owner.json`."""
    given = {"seed": 3, "data": {"name": "digits"}, **changed}
    given["training"] = {"deterministic": True, "initial_lr": 0.2, "lr": 0.05} | changed.get("training", {})
    found = data.load(config.from_dict(given, "test").data)
    content = config.to_dict(config.resolve(config.from_dict(given, "test"), found.shape))
    owner = folder / files.owner(1)
    owner.parent.mkdir(parents=True)
    files.write_json(folder / files.RUN, {"config": content, "data": {"checksum": found.checksum}})
    files.write_json(owner, {"config": content, "code": __version__})
    return folder, owner


def task_of(graph: Graph, number: int, epochs: int, parent: Task | None = None, edits: tuple[Edit, ...] = ()) -> Task:
    return {
        "child": number,
        "attempt": "e1a1",
        "graph": graphs.to_json(graph),
        "digest": graphs.digest(graph),
        "edits": morphisms.to_json(edits),
        "epochs": [0, epochs],
        "parent": parent,
    }


def child_of(parent: Task, outcome: Task, number: int, edits: tuple[Edit, ...], epochs: int = 1) -> Task:
    graph = morphisms.replay(graphs.from_json(parent["graph"]), edits, SIGNATURE)
    given = {"graph": parent["graph"], "weights": outcome["weights"]}
    return task_of(graph, number, epochs, given, edits)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """`open_lab` decides on threads and determinism for its whole process."""
    mode, threads = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def lab(folder: tuple[Path, Path]) -> Lab:
    return child.open_lab(*folder)


ROOT = task_of(GRAPH, 0, 8)


@pytest.fixture(scope="module")
def root(folder: tuple[Path, Path]) -> Task:
    """The outcome of an initial network."""
    return child.train_child(child.open_lab(*folder), ROOT)


def weights_of(lab: Lab, outcome: Task) -> Weights:
    return load_file(lab.run / outcome["weights"]["path"])


# ---------------------------------------------------------------- what becomes of a task


def test_an_initial_network_is_trained_and_stored(lab: Lab) -> None:
    epochs: list[int] = []
    outcome = child.train_child(lab, ROOT, child.Line(epoch=epochs.append))
    assert epochs == [1, 2, 3, 4, 5, 6, 7, 8]
    assert outcome.keys() == {
        "child", "attempt", "digest", "objectives", "receipt", "weights", "wall_s", "device"
    }  # fmt: skip
    assert (outcome["child"], outcome["attempt"], outcome["digest"]) == (0, "e1a1", graphs.digest(GRAPH))
    assert outcome["receipt"] is None and outcome["device"] == "cpu" and outcome["wall_s"] > 0
    assert json.loads(files.dumps(outcome)) == outcome

    stored = outcome["weights"]
    assert not Path(stored["path"]).is_absolute()
    content = (lab.run / stored["path"]).read_bytes()
    assert stored["bytes"] == len(content) and stored["sha256"] == hashlib.sha256(content).hexdigest()
    network = build(GRAPH, SIGNATURE, weights_of(lab, outcome))
    error = outcome["objectives"]["val_error"]
    assert training.error(network, lab.validation) == error < 0.5


def test_an_exact_child_starts_where_its_parent_ended(lab: Lab, root: Task) -> None:
    untrained = child.train_child(lab, child_of(ROOT, root, 1, EXACT, epochs=0))
    receipt = untrained["receipt"]
    assert receipt["exact"] is True and receipt["kept"] == []
    assert 0 <= receipt["max_difference"] < 1e-5 and 0 <= receipt["relative_difference"] <= child.EXACT_TOLERANCE
    assert untrained["objectives"]["val_error"] == receipt["error_before"] == root["objectives"]["val_error"]
    trained = child.train_child(lab, child_of(ROOT, root, 2, EXACT))
    assert trained["receipt"]["error_before"] == root["objectives"]["val_error"]
    assert any(
        not torch.equal(value, weights_of(lab, untrained)[name]) for name, value in weights_of(lab, trained).items()
    )


def test_an_approximate_child_states_what_was_lost_and_kept(lab: Lab, root: Task) -> None:
    untrained = child.train_child(lab, child_of(ROOT, root, 3, APPROXIMATE, epochs=0))
    receipt = untrained["receipt"]
    assert receipt["exact"] is False and receipt["relative_difference"] > 0.01
    ((group, kept),) = receipt["kept"]
    assert group == 5
    parent = weights_of(lab, root)
    norms = parent["5.weight"].double().abs().flatten(1).sum(1)
    assert kept == sorted(norms.argsort(descending=True)[:9].tolist())
    with torch.no_grad():  # the receipt is about the probes, in float64
        probes = lab.validation.first(child.NUM_PROBES).double()
        edits, generator = APPROXIMATE, child.seeded(3, child.PURPOSE_WEIGHTS, 3)
        morphed = transfer.morph(GRAPH, parent, edits, SIGNATURE, generator)
        before, after = (
            build(graph, SIGNATURE, {name: value.double() for name, value in weights.items()})(probes)
            for graph, weights in ((GRAPH, parent), (morphed.graph, morphed.weights))
        )
    assert receipt["max_difference"] == pytest.approx(float((after - before).abs().max()))
    assert receipt["relative_difference"] == pytest.approx(receipt["max_difference"] / float(before.abs().max()))


def test_only_disturbed_layers_are_distilled_and_only_after_an_approximate_operator(
    lab: Lab, root: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    fit = training.fit

    def noting(*args: Any, **options: Any) -> None:
        calls.append(options)
        fit(*args, **options)

    monkeypatch.setattr(child, "fit", noting)
    child.train_child(lab, child_of(ROOT, root, 4, EXACT))
    assert [call.get("only") for call in calls] == [None] and calls[0]["lr"] == lab.config.training.lr
    calls.clear()
    task = child_of(ROOT, root, 5, APPROXIMATE)
    child.train_child(lab, task)
    distilling, training_all = calls
    assert distilling["epochs"] == lab.config.training.distill_epochs
    assert distilling["only"] and 0 not in distilling["only"]
    assert distilling["only"] < {node[0] for node in task["graph"]["nodes"]}
    assert training_all.get("only") is None and training_all["epochs"] == 1
    assert distilling["stream"] != training_all["stream"]


def test_a_child_that_diverges_fails_and_brings_no_objectives(lab: Lab, root: Task) -> None:
    wild = replace(
        lab, config=lab.config.model_copy(update={"training": lab.config.training.model_copy(update={"lr": 1e30})})
    )
    outcome = child.train_child(wild, child_of(ROOT, root, 6, EXACT))
    assert outcome["failure"]["kind"] == "Diverged" and outcome["failure"]["reason"].startswith("the loss is nan in")
    assert not {"objectives", "weights", "receipt"} & outcome.keys()
    assert outcome["child"] == 6 and outcome["wall_s"] > 0
    assert not (lab.run / files.attempt_folder(6, "e1a1")).exists()
    files.dumps(outcome)


def test_an_exact_operator_that_does_harm_is_refused(lab: Lab, root: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = morphisms.plan

    def wrong(*args: Any) -> Plan:
        right = plan(*args)
        rules = {
            name: tuple(replace(rule, fill="fan_in") if isinstance(rule, Resize) else rule for rule in steps)
            for name, steps in right.rules.items()
        }
        return replace(right, rules=rules)

    monkeypatch.setattr(morphisms, "plan", wrong)
    outcome = child.train_child(lab, child_of(ROOT, root, 7, (Edit("widen", 1, 2),)))
    assert outcome["failure"]["kind"] == "OutOfTolerance"
    assert "allowed is 1e-06" in outcome["failure"]["reason"]
    assert not {"objectives", "weights", "receipt"} & outcome.keys()


def test_without_inheritance_a_child_starts_afresh(tmp_path: Path, lab: Lab, root: Task) -> None:
    search = lab.config.search.model_copy(update={"inheritance": False})
    ablation = replace(lab, config=lab.config.model_copy(update={"search": search}))
    outcome = child.train_child(ablation, child_of(ROOT, root, 8, EXACT, epochs=0))
    assert outcome["receipt"] is None
    graph = morphisms.replay(GRAPH, EXACT, SIGNATURE)
    expected = transfer.initial_weights(graph, SIGNATURE, child.seeded(3, child.PURPOSE_WEIGHTS, 8))
    stored = weights_of(lab, outcome)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())


@pytest.mark.parametrize("inserted_bn", ["measured", "unit"])
def test_statistics_of_an_inserted_batchnorm_follow_the_setting(lab: Lab, root: Task, inserted_bn: str) -> None:
    settings = lab.config.training.model_copy(update={"inserted_bn": inserted_bn})
    here = replace(lab, config=lab.config.model_copy(update={"training": settings}))
    task = child_of(ROOT, root, 9, (Edit("insert", 3, 3),), epochs=0)
    stored = weights_of(lab, child.train_child(here, task))
    mean, var = (
        stored[f"{graphs.from_json(task['graph']).next_id - 2}.{name}"] for name in ("running_mean", "running_var")
    )
    if inserted_bn == "unit":
        assert torch.equal(mean, torch.zeros(12)) and torch.equal(var, torch.ones(12))
        return
    rng = np.random.default_rng([3, child.PURPOSE_MEASURE])
    chosen = np.sort(rng.permutation(len(lab.train.labels))[: child.NUM_MEASURED])
    x = lab.train.normalise(lab.train.images[torch.from_numpy(chosen)])
    with torch.no_grad():
        read = build(GRAPH, SIGNATURE, weights_of(lab, root)).inputs_of(x, [4])[4]
    torch.testing.assert_close(mean, read.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, read.var(dim=(0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is nobody's child's fault


def test_edits_that_do_not_lead_to_the_graph_are_a_defect(lab: Lab, root: Task) -> None:
    """Ids count too: the stored weights are called by them."""
    task = child_of(ROOT, root, 10, EXACT)
    graph = graphs.from_json(task["graph"])
    other = Graph(tuple(replace(node, tie=node.id + 1000) for node in graph.nodes), graph.next_id)
    for wrong in (ROOT["graph"], graphs.to_json(other)):
        with pytest.raises(RuntimeError, match="child 10: the edits do not lead to the graph"):
            child.train_child(lab, task | {"graph": wrong})


def test_a_parents_file_that_is_gone_is_no_fault_of_the_trainer(lab: Lab, root: Task) -> None:
    gone = root | {"weights": root["weights"] | {"path": "children/none"}}
    outcome = child.train_child(lab, child_of(ROOT, gone, 11, EXACT))
    assert outcome["failure"] == {"kind": "ParentDamaged", "reason": f"{lab.run / 'children/none'}: is gone"}


def test_a_parents_file_that_is_not_what_was_stored_is_refused(lab: Lab, root: Task) -> None:
    path = lab.run / root["weights"]["path"]
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        outcome = child.train_child(lab, child_of(ROOT, root, 11, EXACT))
        assert outcome["failure"]["kind"] == "ParentDamaged"
        assert f"{path}: damaged or replaced" in outcome["failure"]["reason"]
        assert "weights" not in outcome
    finally:
        path.write_bytes(content)


def test_a_full_disk_is_reported_as_such(lab: Lab, root: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        def write(path: Path, content: bytes) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files, "write", write)

    task = child_of(ROOT, root, 12, EXACT, epochs=0)
    refuse(errno.ENOSPC)
    assert child.train_child(lab, task) == {"storage": "child 12: No space left on device"}
    refuse(errno.EISDIR)
    with pytest.raises(IsADirectoryError):
        child.train_child(lab, task)


# ---------------------------------------------------------------- the lab


def test_determinism_decides_on_threads_layout_and_algorithms(folder: tuple[Path, Path], tmp_path: Path) -> None:
    lab = child.open_lab(*folder)
    assert lab.layout == torch.contiguous_format and torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.empty(10, dtype=torch.int).put_(torch.tensor([0, 0]), torch.tensor([1, 2], dtype=torch.int))
    free = make_run(tmp_path, training={"deterministic": False}, cluster={"cpus_per_worker": 2})
    lab = child.open_lab(*free)
    assert lab.layout == torch.channels_last and torch.get_num_threads() == 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_both_modes_learn_equally_well(lab: Lab, root: Task) -> None:
    fast = replace(lab, layout=torch.channels_last)
    outcome = child.train_child(fast, ROOT | {"child": 13})
    assert abs(outcome["objectives"]["val_error"] - root["objectives"]["val_error"]) < 0.1


def test_data_unlike_the_runs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, owner = make_run(tmp_path)
    files.write_json(run / files.RUN, {"data": {"checksum": "0"}})
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    said = r"digits: not the data that this run was started with .* So it is on n7, but not where .* same environment"
    with pytest.raises(ConfigError, match=said):
        child.open_lab(run, owner)


def test_data_that_this_node_does_not_see_are_named_with_node_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, owner = make_run(tmp_path)
    content = json.loads(owner.read_text())
    content["config"]["data"] |= {"name": "npz", "root": "/scratch/of/the/login/node.npz"}
    files.write_json(owner, content)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    said = r"data.root: got '/scratch/of.*', not a file .* So it is on n7, but not .* nodes share, and give data.root"
    with pytest.raises(ConfigError, match=said):
        child.open_lab(run, owner)


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no usable GPU; allowed: auto, cpu, cuda"):
        child.open_lab(*make_run(tmp_path, cluster={"device": "cuda"}))


def test_a_gpu_that_slurm_has_given_and_torch_cannot_use_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be paid for, and not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given: list[tuple[dict[str, Any], bool]] = [
        ({}, True), ({"gres": "gpu:a100:1"}, True), ({"gres": "fpga:1"}, False), ({"gpus_per_worker": 0}, False),
        ({"device": "cpu", "gpus_per_worker": 1}, False), ({"backend": "local"}, False),
    ]  # fmt: skip
    for number, (asked, refused) in enumerate(given):
        run = make_run(tmp_path / str(number), cluster={"backend": "slurm"} | asked)
        if refused:
            with pytest.raises(ConfigError, match=r"job has a GPU, and torch .* cannot use it.*device: cpu"):
                child.open_lab(*run)
        else:
            assert child.open_lab(*run).device.type == "cpu"


# ---------------------------------------------------------------- the process


class Trainer:
    """`python -m lemonade_hpc.learn.child RUN OWNER`, as its supervisor starts it."""

    def __init__(self, run: Path, owner: Path) -> None:
        command = [sys.executable, "-m", "lemonade_hpc.learn.child", str(run), str(owner)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def send(self, task: Task) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()

    def read(self) -> Task:
        assert self.process.stdout is not None
        message: Task = json.loads(self.process.stdout.readline())
        return message

    def close(self) -> float:
        """Close its input; the seconds until it has left."""
        assert self.process.stdin is not None
        started = time.perf_counter()
        self.process.stdin.close()
        self.process.wait(timeout=300)
        return time.perf_counter() - started

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def test_the_trainer_serves_tasks_and_gives_the_same_weights_in_any_process(
    folder: tuple[Path, Path], lab: Lab, root: Task
) -> None:
    """Fresh process and warm process, with other children before: bit-identical weights."""
    task = child_of(ROOT, root, 20, (*EXACT, *APPROXIMATE), epochs=2)
    warm = child.train_child(lab, task)  # after all that the tests of this module have trained in this process
    with Trainer(*folder) as trainer:
        assert trainer.read() == {"ready": "cpu"}
        trainer.send(task)
        assert [trainer.read(), trainer.read()] == [{"child": 20, "epoch": 1}, {"child": 20, "epoch": 2}]
        fresh = trainer.read()
        timing = {"wall_s"}
        assert {k: v for k, v in fresh.items() if k not in timing} == {k: v for k, v in warm.items() if k not in timing}
        trainer.send(child_of(ROOT, root, 21, APPROXIMATE))
        trainer.send(ROOT)
        trainer.send(task)
        messages = [trainer.read() for _ in range(2 + 9 + 3)]
        outcomes = [message for message in messages if "digest" in message]
        assert [outcome["child"] for outcome in outcomes] == [21, 0, 20]
        assert outcomes[1]["weights"]["sha256"] == root["weights"]["sha256"]
        assert outcomes[2]["weights"]["sha256"] == warm["weights"]["sha256"]
        assert trainer.close() < 5
        assert trainer.process.returncode == 0
        assert trainer.process.stderr is not None and trainer.process.stderr.read() == ""


def test_the_trainer_leaves_at_once_in_the_middle_of_a_child(folder: tuple[Path, Path]) -> None:
    with Trainer(*folder) as trainer:
        trainer.send(task_of(GRAPH, 30, 100_000))
        assert "ready" in trainer.read()
        assert trainer.read() == {"child": 30, "epoch": 1}
        assert trainer.close() < 5
        assert trainer.process.returncode == 0


def test_a_trainer_that_cannot_start_says_why_and_ends_with_1(tmp_path: Path) -> None:
    run, owner = make_run(tmp_path)
    files.write_json(run / files.RUN, {"data": {"checksum": "0"}})
    with Trainer(run, owner) as trainer:
        # its input is still open: waiting for it must not end in an abort
        assert trainer.process.wait(timeout=300) == 1
        assert trainer.process.stderr is not None
        assert trainer.process.stderr.read().startswith("error: digits: not the data that this run was started with")


def test_output_of_libraries_does_not_reach_the_protocol(folder: tuple[Path, Path]) -> None:
    code = (
        "import sys; from lemonade_hpc import data; from lemonade_hpc.learn import child; load = data.load\n"
        "def noisy(wanted): print('a library talks'); return load(wanted)\n"
        "data.load = noisy; child.main(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *map(str, folder)]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=300)
    assert "a library talks" not in done.stdout


def test_starting_the_trainer_imports_no_compiler(folder: tuple[Path, Path]) -> None:
    """torch._dynamo and torch._inductor take 1.1-1.5 s of every fresh process."""
    code = (
        "import sys, json; from pathlib import Path; from lemonade_hpc.learn import child\n"
        "lab = child.open_lab(*map(Path, sys.argv[1:3]))\n"
        "child.train_child(lab, json.loads(sys.argv[3]))\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'torchvision') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *map(str, folder), json.dumps(task_of(GRAPH, 40, 1))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_told_from_a_defect(fault: Exception) -> None:
    assert child._is_out_of_memory(fault)
    assert not child._is_out_of_memory(RuntimeError("shapes do not match"))
