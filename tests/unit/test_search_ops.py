"""The registry of operators against torch, on single operators and on whole random networks."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lemonade_hpc.learn.network import Network
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import morphisms, ops, spaces
from lemonade_hpc.search.graph import Graph
from lemonade_hpc.search.ops import (
    OPS,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Depthwise,
    GlobalPool,
    Input,
    Linear,
    MaxPool,
    Op,
    ReLU,
    Shape,
    ShapeError,
    Signature,
)

SIGNATURES = (Signature((1, 8, 8), 10), Signature((3, 13, 9), 4), Signature((2, 5, 21), 2))
EXAMPLES: tuple[Op, ...] = (Input(), Conv(6, 3), Conv(6, 1), Depthwise(5), BatchNorm(), ReLU(), MaxPool(), GlobalPool(),
                            Linear(), Add(), Concat())  # fmt: skip

torch.set_num_threads(1)


def grown(seed: int, signature: Signature) -> Graph:
    """An initial network after up to 12 random edits."""
    rng = np.random.default_rng(seed)
    anatomy = morphisms.study(spaces.initial(signature)[seed % 4], signature)
    for _ in range(rng.integers(13)):
        made = morphisms.mutate(anatomy, morphisms.KINDS, rng)
        assert made is not None
        anatomy = made[1]
    return anatomy.graph


def measured_macs(network: Network, signature: Signature) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *signature.image))
    return counter.get_total_flops() / 2


def test_random_networks_are_what_the_registry_says() -> None:
    """Names, shapes, trained parameters and multiply-adds of 320 networks; every operator occurs."""
    met: set[str] = set()
    for seed in range(320):
        signature = SIGNATURES[seed % len(SIGNATURES)]
        graph = grown(seed, signature)
        network = Network(graph, signature).eval()
        facts = graphs.infer(graph, signature)
        stated = {f"{id_}.{p.name}": p for id_, fact in facts.items() for p in fact.params}
        assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == {
            name: p.shape for name, p in stated.items()
        }
        assert {name for name, _ in network.named_parameters()} == {name for name, p in stated.items() if p.trained}
        assert sum(value.numel() for value in network.parameters()) == graphs.params(graph, signature)
        assert measured_macs(network, signature) == graphs.macs(graph, signature)
        met.update(node.op.name for node in graph.nodes)
    assert met == OPS.keys()


def test_axis_roles_name_the_channels() -> None:
    """`o` and `c` axes are as long as the output's channels, `i` axes as the input's."""
    for seed in range(60):
        signature = SIGNATURES[seed % len(SIGNATURES)]
        graph = grown(seed, signature)
        facts = graphs.infer(graph, signature)
        for node in graph.nodes:
            out, *read = (facts[id_].shape[0] for id_ in (node.id, *node.inputs))
            for param in facts[node.id].params:
                for role, size in zip(param.roles, param.shape, strict=True):
                    assert role == "." or size == (read[0] if role == "i" else out)


@pytest.mark.parametrize(
    ("op", "inputs", "says"),
    [
        (Conv(4, 3), [(4,)], "conv needs a feature map"),
        (Conv(4, 2), [(4, 8, 8)], "conv needs an odd kernel, got 2"),
        (Conv(4, -1), [(4, 8, 8)], "conv needs an odd kernel, got -1"),
        (Conv(0, 3), [(4, 8, 8)], "at least one channel, got 0"),
        (Depthwise(4), [(4, 8, 8)], "depthwise needs an odd kernel, got 4"),
        (Depthwise(3), [(4,)], "depthwise needs a feature map"),
        (BatchNorm(), [(4,)], "batchnorm needs a feature map"),
        (MaxPool(), [(4,)], "maxpool needs a feature map"),
        (MaxPool(), [(4, 1, 8)], "at least 2x2 pixels, got 1x8"),
        (GlobalPool(), [(4,)], "globalpool needs a feature map"),
        (Linear(), [(4, 8, 8)], "linear needs a vector"),
        (Add(), [(4, 8, 8), (5, 8, 8)], "add needs equal shapes"),
        (Concat(), [(4, 8, 8), (4, 8, 7)], "concat needs equal height and width"),
        (Concat(), [(4, 8, 8), (4,)], "concat needs equal height and width"),
    ],
)
def test_inputs_that_an_operator_cannot_take_are_refused(op: Op, inputs: list[Shape], says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        ops.facts(op, SIGNATURES[0], *inputs)


@pytest.mark.parametrize("op", EXAMPLES, ids=str)
def test_operators_survive_json_and_are_frozen(op: Op) -> None:
    assert ops.from_json(ops.to_json(op)) == op
    assert op.text == " ".join(map(str, ops.to_json(op)))
    with pytest.raises(FrozenInstanceError):
        op.name = "other"  # type: ignore[misc]


def test_every_operator_has_an_example_and_a_text_of_its_own() -> None:
    assert {op.name for op in EXAMPLES} == OPS.keys()
    assert len({op.text for op in EXAMPLES}) == len(EXAMPLES) == len(set(EXAMPLES))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (["swish"], "unknown operator 'swish'; known are input, conv"),
        (["conv", 16], "takes 2 whole numbers, got \\[16\\]"),
        (["conv", 16, 3, 1], "takes 2 whole numbers"),
        (["conv", 16, "3"], "takes 2 whole numbers"),
        (["conv", 16.0, 3], "takes 2 whole numbers"),
        (["conv", True, 3], "takes 2 whole numbers"),
        (["relu", 1], "takes 0 whole numbers"),
        ([], "a list that begins with its name"),
        ([["conv"], 16, 3], "a list that begins with its name"),
        ("conv", "a list that begins with its name"),
    ],
)
def test_what_is_no_operator_is_refused(data: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ops.from_json(data)  # type: ignore[arg-type]
