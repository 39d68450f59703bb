"""The exactness contract of every exact operator (design, section 3), and deliberately wrong twins that must break it.

Float64 weights, evaluation mode, BatchNorm statistics calibrated by a forward pass in training mode (else the logits
do not vary and any test passes), and the logits must vary. Before every edit of a random chain all weights are drawn
again, lambda included, so that each edit is judged on a general network and not on a stack of identities.
As a program, it runs many chains and prints the worst difference: `python test_learn_exactness.py --chains 2000`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import exp, prod, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lemonade_hpc.learn import transfer
from lemonade_hpc.learn.network import Weights, build
from lemonade_hpc.search import morphisms, ops, spaces
from lemonade_hpc.search.graph import Graph, Node, chain, infer, params, validate
from lemonade_hpc.search.morphisms import EXACT, Edit
from lemonade_hpc.search.ops import Add, BatchNorm, Concat, Conv, GlobalPool, Input, Linear, MaxPool, ReLU, Signature

TOLERANCE = 1e-11
"""Largest difference of logits, relative to their scale: rounding in float64 stays well below it."""

MAX_PARAMS = 12_000
"""Chains shrink a network that could exceed this by their next edit."""

torch.set_num_threads(1)
SIGNATURES = (Signature((1, 8, 8), 10), Signature((3, 9, 7), 4))
NUM_IMAGES = 8
Spoil = Callable[[Graph, Graph, Weights], None]


def images(signature: Signature, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal((NUM_IMAGES, *signature.image)))


def general_weights(graph: Graph, signature: Signature, rng: np.random.Generator) -> Weights:
    """A general network: every weight drawn, BatchNorm's statistics calibrated by a forward pass in training mode."""
    drawn = {}
    for id_, facts in infer(graph, signature).items():
        for param in facts.params:
            if param.name == "lam":
                value = rng.uniform(-0.5, 1.5, param.shape)
            elif param.fill == "fan_in":
                value = rng.standard_normal(param.shape) * sqrt(2 / prod(param.shape[1:]))
            elif param.fill == "one":
                value = rng.uniform(0.5, 1.5, param.shape)
            else:
                value = rng.normal(0, 0.5, param.shape)
            drawn[f"{id_}.{param.name}"] = torch.as_tensor(value, dtype=torch.float64)
    network = build(graph, signature, drawn)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images(signature, rng))
    return network.weights()


def answers(graph: Graph, signature: Signature, weights: Weights, x_BCHW: Tensor) -> Tensor:
    with torch.no_grad():
        logits_BK: Tensor = build(graph, signature, weights)(x_BCHW)
    return logits_BK


def assert_varies(logits_BK: Tensor) -> None:
    assert logits_BK.std(dim=0).min() > 1e-3 * logits_BK.abs().max(), "the logits do not vary: nothing would be judged"


def difference(
    graph: Graph,
    signature: Signature,
    edit: Edit,
    rng: np.random.Generator,
    *,
    measured: bool,
    spoil: Spoil | None = None,
) -> tuple[Graph, float]:
    """The edited graph and how much the edit changed a general network's logits, relative to their scale."""
    weights = general_weights(graph, signature, rng)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    batch = images(signature, rng) if measured else None
    morphed = transfer.morph(graph, weights, [edit], signature, generator, images_BCHW=batch)
    assert morphed.exact == (edit.kind in EXACT)
    if spoil is not None:
        spoil(graph, morphed.graph, morphed.weights)
    probes = images(signature, rng)
    before = answers(graph, signature, weights, probes)
    after = answers(morphed.graph, signature, morphed.weights, probes)
    assert_varies(before)
    return morphed.graph, float((after - before).abs().max() / before.abs().max())


# ---------------------------------------------------------------- random chains, in both spaces


def tied_graph(copies: int = 2) -> Graph:
    """Cells of two Conv-BN-ReLU blocks, repeated with pooling between: the n-th nodes of all cells share a tie."""
    cell = [(Conv, 3), (BatchNorm, 0), (ReLU, 0), (Conv, 3), (BatchNorm, 0), (ReLU, 0)]
    nodes = [
        Node(0, Input(), (), 0),
        Node(1, Conv(4, 3), (0,), 1),
        Node(2, BatchNorm(), (1,), 2),
        Node(3, ReLU(), (2,), 3),
    ]
    for copy in range(copies):
        for k, (kind, kernel) in enumerate(cell):
            op = Conv(5 * 2**copy, kernel) if kind is Conv else kind()
            nodes.append(Node(len(nodes), op, (len(nodes) - 1,), 100 + k))
        nodes.append(Node(len(nodes), MaxPool(), (len(nodes) - 1,), 200 + copy))
    nodes.append(Node(len(nodes), GlobalPool(), (len(nodes) - 1,), 300))
    nodes.append(Node(len(nodes), Linear(), (len(nodes) - 1,), 301))
    return Graph(tuple(nodes), 1000)


def starting_graph(space: str, signature: Signature, rng: np.random.Generator) -> Graph:
    if space == "tied":
        return tied_graph()
    widths = [int(width) for width in rng.integers(4, 9, size=rng.integers(1, 4))]
    return spaces.plain(widths, bool(rng.integers(2)), signature)


@dataclass
class Tally:
    """What the chains have seen."""

    edits: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)


def run_chain(space: str, number: int, tally: Tally, length: int = 10) -> None:
    """One random chain; exact edits are judged, approximate ones make the graphs diverse."""
    rng = np.random.default_rng([2018, number])
    signature = SIGNATURES[number % 2]
    graph = starting_graph(space, signature, rng)
    for _ in range(length):
        anatomy = morphisms.study(graph, signature)
        kinds = [kind for kinds in morphisms.KINDS.values() for kind in kinds]
        if params(graph, signature) > MAX_PARAMS / 4:  # an edit multiplies parameters by 4 at most
            kinds = ["remove", "prune", "separable"]
        found = [edits for edits in (morphisms.sites(anatomy, kind) for kind in kinds) if edits]
        if not found:
            return
        sites = found[rng.integers(len(found))]
        edit = sites[rng.integers(len(sites))]
        graph, relative = difference(graph, signature, edit, rng, measured=bool(rng.integers(2)))
        validate(graph, signature)
        tally.edits[edit.kind] += 1
        if edit.kind in EXACT:
            tally.worst[edit.kind] = max(tally.worst.get(edit.kind, 0.0), relative)


@pytest.mark.parametrize("space", ["plain", "tied"])
def test_exact_operators_leave_general_networks_unchanged(space: str) -> None:
    tally = Tally()
    for number in range(75):
        run_chain(space, number, tally)
    assert all(tally.edits[kind] >= 20 for kinds in morphisms.KINDS.values() for kind in kinds), tally.edits
    assert tally.worst.keys() == EXACT
    assert max(tally.worst.values()) <= TOLERANCE, tally.worst


# ---------------------------------------------------------------- wrong twins

PLAIN = spaces.plain([5, 6, 7], False, SIGNATURES[0])


def first(graph: Graph, kind: str, signature: Signature = SIGNATURES[0]) -> Edit:
    return morphisms.sites(morphisms.study(graph, signature), kind)[0]


def judge(graph: Graph, edit: Edit, spoil: Spoil | None = None, *, measured: bool = False, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    return difference(graph, SIGNATURES[0], edit, rng, measured=measured, spoil=spoil)[1]


def added(before: Graph, after: Graph, op: type[ops.Op]) -> list[int]:
    return [node.id for node in after.nodes if node.id not in before.by_id and isinstance(node.op, op)]


def bn_weight_one(before: Graph, after: Graph, weights: Weights) -> None:
    weights[f"{added(before, after, BatchNorm)[0]}.weight"].fill_(1.0)


def bn_without_bias(before: Graph, after: Graph, weights: Weights) -> None:
    weights[f"{added(before, after, BatchNorm)[0]}.bias"].fill_(0.0)


def variance_from_weight(before: Graph, after: Graph, weights: Weights) -> None:
    """running_var = weight^2 - eps, of a weight that was redrawn meanwhile: a negative variance where it is small."""
    weights[f"{added(before, after, BatchNorm)[0]}.running_var"].sub_(1e-6)


def readers_not_zero(before: Graph, after: Graph, weights: Weights) -> None:
    """Entries that read new channels, zero in the right child, start as any new weight does."""
    known = infer(before, SIGNATURES[0])
    for node in after.nodes:
        old = known.get(node.id)
        if not isinstance(node.op, Conv | Linear) or old is None:
            continue
        weight = weights[f"{node.id}.weight"]
        if weight.shape[1] > old.params[0].shape[1]:
            weight[:, old.params[0].shape[1] :] = 0.1


def set_lambda(value: float) -> Spoil:
    def spoil(before: Graph, after: Graph, weights: Weights) -> None:
        weights[f"{added(before, after, Add)[0]}.lam"].fill_(value)

    return spoil


TWINS: Mapping[str, tuple[str, Spoil, bool]] = {
    "insert: BatchNorm weight 1": ("insert", bn_weight_one, False),
    "insert: BatchNorm weight 1, statistics measured": ("insert", bn_weight_one, True),
    "insert: measured mean, but no bias": ("insert", bn_without_bias, True),
    "insert: variance not that of the weight": ("insert", variance_from_weight, True),
    "widen: readers not padded with zeros": ("widen", readers_not_zero, False),
    "concat: readers not padded with zeros": ("concat", readers_not_zero, False),
    "add: lambda 0.01": ("add", set_lambda(0.01), False),
    "add: lambda sigmoid(-20)": ("add", set_lambda(1 / (1 + exp(20))), False),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_wrong_twin_breaks_the_contract(name: str) -> None:
    kind, spoil, measured = TWINS[name]
    graph = PLAIN
    if kind in ("add", "concat"):  # a skip needs two layers of one size: the inserted one and what it stands behind
        graph = morphisms.edited(morphisms.study(graph, SIGNATURES[0]), first(graph, "insert")).graph
    edit = first(graph, kind)
    assert judge(graph, edit, measured=measured) <= TOLERANCE
    assert judge(graph, edit, spoil, measured=measured) > TOLERANCE


def insert_anywhere(graph: Graph, node: int, signature: Signature, order: tuple[ops.Op, ...]) -> Graph:
    """A block behind any node, legal or not, its operators in any order."""
    width = infer(graph, signature)[node].shape[0]
    block = [Node(100 + k, op, (node if k == 0 else 99 + k,), 100 + k) for k, op in enumerate((Conv(width, 3), *order))]
    nodes: list[Node] = []
    for old in graph.nodes:
        nodes.append(replace(old, inputs=tuple(block[-1].id if source == node else source for source in old.inputs)))
        if old.id == node:
            nodes.extend(block)
    return Graph(tuple(nodes), 200)


def with_block(graph: Graph, node: int, order: tuple[ops.Op, ...], lam: float = 0.5) -> float:
    """Relative change of the logits by an identity block behind `node`, its BatchNorm measured."""
    rng, signature = np.random.default_rng(1), SIGNATURES[0]
    weights = general_weights(graph, signature, rng)
    weights |= {name: torch.full_like(value, lam) for name, value in weights.items() if name.endswith(".lam")}
    child = insert_anywhere(graph, node, signature, order)
    new = {id_: facts for id_, facts in infer(child, signature).items() if id_ >= 100}
    generator = torch.Generator().manual_seed(0)
    for id_, facts in new.items():
        for param in facts.params:
            fill = "identity" if isinstance(child.by_id[id_].op, Conv) else param.fill
            weights[f"{id_}.{param.name}"] = transfer.fresh(fill, param.shape, generator)
    norm = next(id_ for id_ in new if isinstance(child.by_id[id_].op, BatchNorm))
    plan = morphisms.Plan(True, {}, frozenset(), (norm,), frozenset())
    transfer.measure(weights, plan, morphisms.study(child, signature), signature, images(signature, rng))
    probes = images(signature, rng)
    parent = {name: value for name, value in weights.items() if int(name.split(".")[0]) < 100}
    before = answers(graph, signature, parent, probes)
    return float((answers(child, signature, weights, probes) - before).abs().max() / before.abs().max())


CONV_RELU_BN = chain(
    [Input(), Conv(6, 3), ReLU(), BatchNorm(), Conv(6, 3), ReLU(), BatchNorm(), GlobalPool(), Linear()]
)


def test_a_block_of_the_order_conv_relu_bn_clips_what_a_batchnorm_put_out() -> None:
    behind_bn = CONV_RELU_BN.nodes[3].id
    assert with_block(CONV_RELU_BN, behind_bn, (ReLU(), BatchNorm())) > 0.01
    assert with_block(CONV_RELU_BN, behind_bn, (BatchNorm(), ReLU())) > 0.01
    behind_relu = CONV_RELU_BN.nodes[2].id
    assert with_block(CONV_RELU_BN, behind_relu, (BatchNorm(), ReLU())) <= TOLERANCE


def test_a_block_behind_a_skip_is_refused_since_lambda_may_have_any_sign() -> None:
    signature = SIGNATURES[0]
    graph = morphisms.edited(morphisms.study(PLAIN, signature), first(PLAIN, "insert")).graph
    edit = first(graph, "add")
    graph = morphisms.edited(morphisms.study(graph, signature), edit).graph
    skip = next(node.id for node in graph.nodes if isinstance(node.op, Add))
    with pytest.raises(morphisms.EditError, match="not legal"):
        morphisms.edited(morphisms.study(graph, signature), Edit("insert", skip, 3))
    assert with_block(graph, skip, (BatchNorm(), ReLU()), lam=0.5) <= TOLERANCE
    assert with_block(graph, skip, (BatchNorm(), ReLU()), lam=-0.5) > 0.01


def test_the_contract_refuses_to_judge_logits_that_do_not_vary() -> None:
    signature, rng = SIGNATURES[0], np.random.default_rng(0)
    weights = general_weights(PLAIN, signature, rng)
    probes = images(signature, rng)
    assert_varies(answers(PLAIN, signature, weights, probes))
    for name in weights:
        if name.endswith("running_var"):  # far from calibrated: whatever comes in, BatchNorm puts out its bias
            weights[name] *= 1e8
    with pytest.raises(AssertionError, match="do not vary"):
        assert_varies(answers(PLAIN, signature, weights, probes))


def test_a_new_skip_learns_from_the_first_step_on() -> None:
    """With lambda = sigmoid(logit of -20) the gradient would be 2e-9 of this one."""
    signature, rng = SIGNATURES[0], np.random.default_rng(3)
    graph = morphisms.edited(morphisms.study(PLAIN, signature), first(PLAIN, "insert")).graph
    edit = first(graph, "add")
    generator = torch.Generator().manual_seed(0)
    morphed = transfer.morph(graph, general_weights(graph, signature, rng), [edit], signature, generator)
    network = build(morphed.graph, signature, morphed.weights)
    lam = network.get_parameter(f"{added(graph, morphed.graph, Add)[0]}.lam")
    network(images(signature, rng)).square().mean().backward()
    assert lam.item() == 0.0
    assert lam.grad is not None and abs(lam.grad.item()) > 1e-3


def test_concatenated_channels_come_in_the_order_that_readers_expect() -> None:
    """A general network, not a fresh one: a reader's entries for both operands are exchanged with them."""
    signature, rng = SIGNATURES[0], np.random.default_rng(5)
    nodes = (
        Node(0, Input(), (), 0), Node(1, Conv(4, 3), (0,), 1), Node(2, ReLU(), (1,), 2),
        Node(3, Conv(3, 3), (2,), 3), Node(4, ReLU(), (3,), 4), Node(5, Concat(), (4, 2), 5),
        Node(6, GlobalPool(), (5,), 6), Node(7, Linear(), (6,), 7),
    )  # fmt: skip
    graph = Graph(nodes, 8)
    weights = general_weights(graph, signature, rng)
    swapped = Graph((*nodes[:5], Node(5, Concat(), (2, 4), 5), *nodes[6:]), 8)
    other = dict(weights) | {"7.weight": weights["7.weight"][:, [3, 4, 5, 6, 0, 1, 2]]}
    probes = images(signature, rng)
    torch.testing.assert_close(
        answers(graph, signature, weights, probes), answers(swapped, signature, other, probes), rtol=1e-12, atol=1e-12
    )


def main() -> None:
    """Run many chains and print what they saw as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=2000)
    chains = parser.parse_args().chains
    tally = Tally()
    for number in range(chains):
        run_chain(("plain", "tied")[number // 2 % 2], number, tally)
    print(json.dumps({"chains": chains, "edits": dict(tally.edits), "worst": tally.worst, "tolerance": TOLERANCE}))
    assert max(tally.worst.values()) <= TOLERANCE


if __name__ == "__main__":
    main()
