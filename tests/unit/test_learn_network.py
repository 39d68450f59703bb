"""The torch module against the registry of operators, and the interpreter against torch by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lemonade_hpc.learn import transfer
from lemonade_hpc.learn.network import Network, build
from lemonade_hpc.search.graph import Graph, GraphError, Node, infer, macs, params
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
    ShapeError,
    Signature,
)

SIGNATURE = Signature((3, 9, 7), 4)  # odd and not square
EXAMPLES: dict[str, tuple[Op, ...]] = {
    "input": (),
    "conv": (Conv(6, 3), Conv(5, 1), Conv(4, 5)),
    "depthwise": (Depthwise(3), Depthwise(5)),
    "batchnorm": (BatchNorm(),),
    "relu": (ReLU(),),
    "maxpool": (MaxPool(),),
    "globalpool": (),
    "linear": (),
    "add": (Add(),),
    "concat": (Concat(),),
}

torch.set_num_threads(1)


def graph_with(op: Op | None) -> Graph:
    """Image, two convolutions of the image, the operator on one or both of them, and the classifier."""
    nodes = [Node(0, Input(), (), 0), Node(1, Conv(6, 3), (0,), 1), Node(2, Conv(6, 1), (0,), 2)]
    two = op is not None and op.arity == 2
    if op is not None:
        nodes.append(Node(3, op, (1, 2) if two else (1,), 3))
    nodes = [node for node in nodes if two or node.id != 2]
    nodes.append(Node(4, GlobalPool(), (nodes[-1].id,), 4))
    nodes.append(Node(5, Linear(), (4,), 5))
    return Graph(tuple(nodes), 6)


def network_of(graph: Graph, signature: Signature = SIGNATURE) -> Network:
    return build(graph, signature, transfer.initial_weights(graph, signature, torch.Generator().manual_seed(0)))


def images(count: int = 2, signature: Signature = SIGNATURE) -> Tensor:
    return torch.randn(count, *signature.image, generator=torch.Generator().manual_seed(1))


def test_every_operator_has_an_example() -> None:
    assert EXAMPLES.keys() == OPS.keys()


@pytest.mark.parametrize("op", [None, *(op for ops in EXAMPLES.values() for op in ops)], ids=str)
def test_an_operator_is_what_the_registry_says(op: Op | None) -> None:
    graph = graph_with(op)
    known = infer(graph, SIGNATURE)
    network = network_of(graph)
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state == {f"{id_}.{p.name}": p.shape for id_, facts in known.items() for p in facts.params}
    trained = {f"{id_}.{p.name}" for id_, facts in known.items() for p in facts.params if p.trained}
    assert {name for name, _ in network.named_parameters()} == trained
    assert sum(value.numel() for value in network.parameters()) == params(graph, SIGNATURE)
    count = 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shapes: dict[int, tuple[int, ...]] = {}
        for id_ in known.keys() - {0}:
            network.get_submodule(str(id_)).register_forward_hook(
                lambda module, inputs, output, id_=id_: shapes.update({id_: tuple(output.shape)})
            )
        network(images(count))
    assert shapes == {id_: (count, *known[id_].shape) for id_ in shapes} and len(shapes) == len(known) - 1
    assert counter.get_total_flops() == 2 * macs(graph, SIGNATURE) * count


def test_the_interpreter_computes_what_the_graph_says() -> None:
    """One network with every operator, written out by hand."""
    nodes = (
        Node(0, Input(), (), 0), Node(1, Conv(4, 3), (0,), 1), Node(2, BatchNorm(), (1,), 2), Node(3, ReLU(), (2,), 3),
        Node(4, Depthwise(5), (3,), 4), Node(5, Conv(4, 1), (4,), 5), Node(6, ReLU(), (5,), 6),
        Node(7, Add(), (6, 3), 7), Node(8, Concat(), (3, 7), 8), Node(9, MaxPool(), (8,), 9),
        Node(10, GlobalPool(), (9,), 10), Node(11, Linear(), (10,), 11),
    )  # fmt: skip
    network = network_of(Graph(nodes, 12))
    w = network.weights()
    w["7.lam"].fill_(0.3)
    w["2.running_mean"].fill_(0.1), w["2.running_var"].fill_(2.0), w["2.weight"].fill_(1.5), w["2.bias"].fill_(0.2)
    network.load_weights(w)
    x = images()
    conv = F.conv2d(x, w["1.weight"], padding=1)
    relu = ((conv - 0.1) / (2.0 + 1e-5) ** 0.5 * 1.5 + 0.2).clamp(min=0)
    deep = F.conv2d(F.conv2d(relu, w["4.weight"], padding=2, groups=4), w["5.weight"]).clamp(min=0)
    mixed = 0.7 * deep + 0.3 * relu
    pooled = F.max_pool2d(torch.cat([relu, mixed], dim=1), 2).mean(dim=(2, 3))
    expected = pooled @ w["11.weight"].T + w["11.bias"]
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
        found = network.inputs_of(x, [2, 5, 9])
        assert found.keys() == {2, 5, 9}
        torch.testing.assert_close(found[2], conv, rtol=1e-5, atol=1e-6)
        assert found[9].shape == (2, 8, 9, 7)
        assert network.inputs_of(x, []) == {}
        assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_network_can_be_built_of_any_dtype_and_starts_in_evaluation_mode() -> None:
    graph = graph_with(BatchNorm())
    weights = network_of(graph).weights()
    network = build(graph, SIGNATURE, {name: value.double() for name, value in weights.items()})
    assert not any(module.training for module in network.modules())
    assert network(images().double()).dtype == torch.float64
    copies = network.weights()
    copies["1.weight"].fill_(0.0)
    assert network.get_parameter("1.weight").abs().max() > 0


def test_weights_that_do_not_fit_are_refused() -> None:
    graph = graph_with(BatchNorm())
    network = network_of(graph)
    weights = network.weights()
    without = {name: value for name, value in weights.items() if name != "3.running_var"}
    with pytest.raises(ValueError, match=r"missing or unknown: \['3\.running_var'\]"):
        network.load_weights(without)
    with pytest.raises(ValueError, match=r"missing or unknown: \['9\.weight'\]"):
        network.load_weights(weights | {"9.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"5\.bias: shape \(3,\), needed \(4,\)"):
        network.load_weights(weights | {"5.bias": torch.zeros(3)})


def test_an_invalid_graph_is_refused() -> None:
    graph = graph_with(ReLU())
    unread = Graph((*graph.nodes[:2], Node(9, ReLU(), (1,), 9), *graph.nodes[2:]), 10)
    with pytest.raises(GraphError, match="read by nobody"):
        Network(unread, SIGNATURE)
    with pytest.raises(ShapeError, match="maxpool needs at least 2x2"):
        Network(graph_with(MaxPool()), replace(SIGNATURE, image=(3, 1, 7)))


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0, -0.5, 1.5])
def test_a_skip_is_convex_in_both_gradients(lam: float) -> None:
    graph = graph_with(Add())
    network = network_of(graph)
    network.load_weights(network.weights() | {"3.lam": torch.tensor(lam)})
    module = network.get_submodule("3")
    x, y = (torch.randn(2, 3, 4, 4, requires_grad=True, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    out = module(x, y)
    torch.testing.assert_close(out, (1 - lam) * x + lam * y)
    g_x, g_y, g_lam = torch.autograd.grad(out.sum(), (x, y, network.get_parameter("3.lam")))
    torch.testing.assert_close(g_x, torch.full_like(x, 1 - lam))
    torch.testing.assert_close(g_y, torch.full_like(y, lam))
    torch.testing.assert_close(g_lam, (y - x).sum(), rtol=1e-4, atol=1e-4)


def test_layouts_give_the_same_answers() -> None:
    graph = graph_with(Conv(5, 3))
    network = network_of(graph)
    with torch.no_grad():
        contiguous = network(images())
        torch.testing.assert_close(network.to(memory_format=torch.channels_last)(images()), contiguous)
