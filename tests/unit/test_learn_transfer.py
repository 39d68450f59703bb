"""Weights of children: what approximate edits keep, what starts afresh, and what an inserted BatchNorm is given.

Mistakes seen elsewhere (lemonade.md, section 8) and the test that would catch each here:

| mistake | test |
|---|---|
| order Conv-ReLU-BN behind a BatchNorm | test_learn_exactness: a_block_of_the_order_conv_relu_bn_clips |
| running_mean not carried through prune | prune_carries_everything_of_the_filters_it_keeps |
| filters removed by position from a list that shrinks meanwhile | prune_keeps_exactly_the_largest_filters |
| running_var = weight^2 - eps | a_measured_batchnorm_has_the_statistics_of_its_input; test_learn_exactness: twins |
| widening without padding or rescaling the reader | test_learn_exactness: twins |
| two equal points delete each other from the front | equal_points_do_not_delete_each_other |
| lambda = sigmoid(-20) | test_learn_exactness: twins, a_new_skip_learns_from_the_first_step_on |
| failed children given error 1.0 and kept | a_failed_child_never_enters_the_front; test_learn_child: diverges |
| budgets read from timedelta.seconds | test_run_worker: a_childs_time_may_be_days |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lemonade_hpc import config
from lemonade_hpc.learn import transfer
from lemonade_hpc.learn.network import Weights, build
from lemonade_hpc.learn.transfer import Morphed, TransferError
from lemonade_hpc.search import evolution, morphisms, pareto, spaces
from lemonade_hpc.search.graph import Graph, Node, chain, infer
from lemonade_hpc.search.morphisms import Edit, Fresh, Plan, Resize, Select
from lemonade_hpc.search.ops import (
    BN_EPS,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Depthwise,
    GlobalPool,
    Input,
    Linear,
    MaxPool,
    ReLU,
    Signature,
)

SIGNATURE = Signature((2, 8, 8), 5)
STATISTICS = ("weight", "bias", "running_mean", "running_var")

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tagged(graph: Graph) -> Weights:
    """Weights of which every entry is a different number, in a random order: a copy can be told from all others."""
    shapes = {f"{id_}.{p.name}": p.shape for id_, facts in infer(graph, SIGNATURE).items() for p in facts.params}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    numbers = torch.randperm(sum(sizes), generator=seeded(1)).double() + 1000
    return {name: part.reshape(shapes[name]) for name, part in zip(shapes, torch.split(numbers, sizes), strict=True)}


def morph(graph: Graph, weights: Weights, *edits: Edit, prune_by: str = "l1", seed: int = 0) -> Morphed:
    return transfer.morph(graph, weights, edits, SIGNATURE, seeded(seed), prune_by=prune_by)


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


#                  0        1           2            3       4           5            6       7
BLOCKS = chain([Input(), Conv(8, 3), BatchNorm(), ReLU(), Conv(6, 3), BatchNorm(), ReLU(), Conv(4, 3),
                BatchNorm(), ReLU(), GlobalPool(), Linear()])  # fmt: skip
#                   8          9         10          11


# ---------------------------------------------------------------- prune


def skipped() -> Graph:
    """Convolutions 1, 4 and 7 write one channel group of 8 through additions; 10 reads it concatenated with itself."""
    nodes = [
        Node(0, Input(), (), 0), Node(1, Conv(8, 3), (0,), 1), Node(2, BatchNorm(), (1,), 2), Node(3, ReLU(), (2,), 3),
        Node(4, Conv(8, 3), (3,), 4), Node(5, BatchNorm(), (4,), 5), Node(6, ReLU(), (5,), 6),
        Node(20, Add(), (6, 3), 20),
        Node(7, Conv(8, 1), (20,), 7), Node(8, BatchNorm(), (7,), 8), Node(9, ReLU(), (8,), 9),
        Node(21, Add(), (9, 20), 21), Node(22, Concat(), (21, 6), 22), Node(23, Depthwise(3), (22,), 23),
        Node(10, Conv(4, 1), (23,), 10), Node(11, BatchNorm(), (10,), 11), Node(12, ReLU(), (11,), 12),
        Node(13, GlobalPool(), (12,), 13), Node(14, Linear(), (13,), 14),
    ]  # fmt: skip
    return Graph(tuple(nodes), 100)


def tied_pair() -> Graph:
    """Two stages of two blocks; the second blocks, nodes 4 to 6 and 11 to 13, are copies of one cell."""
    block = [Conv(6, 3), BatchNorm(), ReLU()]
    stages = (block, [Conv(8, 3), *block[1:]], [MaxPool()], block, [Conv(12, 3), *block[1:]])
    graph = chain([Input(), *(op for stage in stages for op in stage), GlobalPool(), Linear()])
    return Graph(tuple(replace(n, tie=n.id - 7 if 11 <= n.id <= 13 else n.id) for n in graph.nodes), graph.next_id)


def largest(norms: list[float], count: int) -> list[int]:
    """Slow twin: strike out the smallest norm again and again, of equal ones the highest index."""
    left = list(range(len(norms)))
    while len(left) > count:
        smallest = min(norms[k] for k in left)
        left.remove(max(k for k in left if norms[k] == smallest))
    return left


@pytest.mark.parametrize("divisor", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_prune_keeps_exactly_the_largest_filters(divisor: int, seed: int) -> None:
    graph = skipped()
    weights = tagged(graph)
    for name in ("1.weight", "4.weight", "7.weight"):
        weights[name] = torch.randn(weights[name].shape, generator=seeded(seed), dtype=torch.float64)
    norms = [sum(float(weights[f"{w}.weight"][k].abs().sum()) for w in (1, 4, 7)) for k in range(8)]
    kept = largest(norms, 8 - 8 // divisor)
    for site in (1, 4, 7):  # the group is one, whichever of its writers is named
        assert morph(graph, weights, Edit("prune", site, divisor)).kept == ((1, tuple(kept)),)


def test_prune_carries_everything_of_the_filters_it_keeps() -> None:
    graph = skipped()
    weights = tagged(graph)
    morphed = morph(graph, weights, Edit("prune", 4, 4))
    ((_, kept),) = morphed.kept
    k, twice = list(kept), [*kept, *(8 + c for c in kept)]
    child = morphed.weights
    for bn in ("2", "5", "8"):
        for name in STATISTICS:
            assert same(child[f"{bn}.{name}"], weights[f"{bn}.{name}"][k]), (bn, name)
    assert same(child["1.weight"], weights["1.weight"][k])
    assert same(child["4.weight"], weights["4.weight"][k][:, k])
    assert same(child["7.weight"], weights["7.weight"][k][:, k])
    assert same(child["23.weight"], weights["23.weight"][twice])
    assert same(child["10.weight"], weights["10.weight"][:, twice])
    untouched = [n for n in weights if n.split(".")[0] in ("11", "14", "20", "21")]
    assert all(same(child[name], weights[name]) for name in untouched)
    assert child.keys() == weights.keys()
    assert not morphed.exact


def test_prune_of_equal_filters_keeps_the_lowest_indices() -> None:
    weights = tagged(BLOCKS) | {"1.weight": torch.ones(8, 2, 3, 3, dtype=torch.float64)}
    weights["1.weight"][2] = -1.0  # L1: the sign does not matter
    weights["1.weight"][5] = 2.0
    assert morph(BLOCKS, weights, Edit("prune", 1, 2)).kept == ((1, (0, 1, 2, 5)),)


def test_norms_are_summed_in_float64() -> None:
    """In float32 the second filter's small entries would be lost beside its large one, and the first would stay."""
    weight = torch.zeros(2, 1, 9, 9)
    weight[:, 0, 0, 0] = 2.0**24
    weight[1, 0, 1:] = 0.5
    weight[0, 0, 1, 0] = 2.0
    select = Select(1, ("w",), 1)
    assert transfer.resolve({"w": weight}, [select], "l1", seeded()) == {1: (1,)}


def test_prune_by_random_draws_from_the_generator_alone() -> None:
    weights = tagged(BLOCKS)
    edit = Edit("prune", 1, 2)
    drawn = [morph(BLOCKS, weights, edit, prune_by="random", seed=seed).kept[0][1] for seed in range(20)]
    again = [morph(BLOCKS, weights, edit, prune_by="random", seed=seed).kept[0][1] for seed in range(20)]
    assert drawn == again
    assert len(set(drawn)) > 5
    assert all(len(set(kept)) == 4 and list(kept) == sorted(kept) for kept in drawn)
    kept = list(drawn[0])
    child = morph(BLOCKS, weights, edit, prune_by="random", seed=0).weights
    assert same(child["4.weight"], weights["4.weight"][:, kept])


def test_cells_that_are_tied_choose_their_filters_each_for_themselves() -> None:
    tied = tied_pair()
    weights = tagged(tied)
    kept = dict(morph(tied, weights, Edit("prune", 4, 2)).kept)
    assert {group: len(filters) for group, filters in kept.items()} == {4: 4, 11: 6}
    for group in (4, 11):
        norms = weights[f"{group}.weight"].abs().flatten(1).sum(1).tolist()
        assert list(kept[group]) == largest(norms, len(kept[group]))


# ---------------------------------------------------------------- remove, separable


def test_remove_keeps_the_overlap_where_the_reader_narrows() -> None:
    """Block 4-5-6 (6 channels) goes; its reader, 7, now reads 8: six are its own, two are new."""
    weights = tagged(BLOCKS)
    morphed = morph(BLOCKS, weights, Edit("remove", 6))
    assert weights.keys() - morphed.weights.keys() == {"4.weight", *(f"5.{name}" for name in STATISTICS)}
    reader = morphed.weights["7.weight"]
    assert reader.shape == (4, 8, 3, 3)
    assert same(reader[:, :6], weights["7.weight"])
    fresh = reader[:, 6:]
    assert 0 < fresh.std() < 2 and fresh.abs().max() < 2  # He's deviation is 0.17, tags are above 1000
    assert 7 in morphed.affected and 1 not in morphed.affected
    others = [name for name in morphed.weights if name != "7.weight"]
    assert all(same(morphed.weights[name], weights[name]) for name in others)


def test_remove_keeps_the_overlap_where_the_reader_shrinks() -> None:
    """Block 1-2-3 (8 channels) goes; its reader, 4, now reads the image's 2."""
    weights = tagged(BLOCKS)
    morphed = morph(BLOCKS, weights, Edit("remove", 3))
    assert same(morphed.weights["4.weight"], weights["4.weight"][:, :2])


def test_remove_of_a_skip_leaves_the_original_path() -> None:
    graph = skipped()
    weights = tagged(graph)
    morphed = morph(graph, weights, Edit("remove", 21))
    assert weights.keys() - morphed.weights.keys() == {"21.lam"}
    assert all(same(value, weights[name]) for name, value in morphed.weights.items())
    assert morphed.graph.by_id[22].inputs == (9, 6)


def test_remove_of_a_concatenation_keeps_its_first_operands_part_of_the_reader() -> None:
    graph = skipped()
    weights = tagged(graph)
    morphed = morph(graph, weights, Edit("remove", 22))
    assert same(morphed.weights["23.weight"], weights["23.weight"][:8])
    assert same(morphed.weights["10.weight"], weights["10.weight"][:, :8])


def test_separable_makes_two_new_layers_and_keeps_all_else() -> None:
    weights = tagged(BLOCKS)
    morphed = morph(BLOCKS, weights, Edit("separable", 4))
    depthwise, pointwise = 12, 13
    new = {f"{depthwise}.weight", f"{pointwise}.weight"}
    assert morphed.weights.keys() == (weights.keys() - {"4.weight"}) | new
    assert all(same(morphed.weights[name], weights[name]) for name in weights.keys() - {"4.weight"})
    assert morphed.weights[f"{depthwise}.weight"].shape == (8, 1, 3, 3)
    assert morphed.weights[f"{pointwise}.weight"].shape == (6, 8, 1, 1)
    assert all(0.1 < morphed.weights[name].std() < 1.5 for name in new)
    assert {depthwise, pointwise, 5} <= morphed.affected
    assert not {1, 2, 8, 11} & morphed.affected


# ---------------------------------------------------------------- chains


@pytest.mark.parametrize("make", [lambda: spaces.plain([6, 8, 8], True, SIGNATURE), skipped, tied_pair])
def test_every_weight_of_a_random_child_is_the_parents_or_new(make: object) -> None:
    """Tags tell: a child's entry is an entry of the same weight of its parent, each used once, or newly drawn."""
    assert callable(make)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        graph = make()
        for step in range(6):
            anatomy = morphisms.study(graph, SIGNATURE)
            edit = morphisms.draw(anatomy, morphisms.KINDS, rng)
            assert edit is not None
            weights = tagged(graph)
            morphed = morph(graph, weights, edit, seed=step)
            for name, value in morphed.weights.items():
                old = set(weights[name].flatten().tolist()) if name in weights else set()
                copied = [entry for entry in value.flatten().tolist() if entry in old]
                assert len(copied) == len(set(copied)), (edit, name)
                if edit.kind in morphisms.EXACT:
                    assert set(copied) == old, (edit, name)
                elif name in weights and edit.kind == "separable":
                    assert same(value, weights[name])
            network = build(morphed.graph, SIGNATURE, morphed.weights)
            assert network(torch.zeros(2, *SIGNATURE.image, dtype=torch.float64)).shape == (2, 5)
            graph = morphed.graph
            if sum(value.numel() for value in morphed.weights.values()) > 20_000:
                break


def test_edits_of_one_child_are_carried_out_one_after_another() -> None:
    weights = tagged(BLOCKS)
    edits = (Edit("widen", 4, 2), Edit("prune", 4, 2), Edit("remove", 9))
    at_once = morph(BLOCKS, weights, *edits)
    generator = seeded()
    graph, current = BLOCKS, weights
    for edit in edits:
        step = transfer.morph(graph, current, [edit], SIGNATURE, generator)
        graph, current = step.graph, step.weights
    assert at_once.graph == graph
    assert all(same(value, current[name]) for name, value in at_once.weights.items())
    assert not at_once.exact
    assert at_once.affected <= graph.by_id.keys()  # what a later edit removed is not named
    assert morph(BLOCKS, weights, edits[0]).exact and not morph(BLOCKS, weights, edits[0]).affected


def test_morph_leaves_the_parent_alone() -> None:
    weights = {name: value.clone() for name, value in tagged(BLOCKS).items()}
    before = {name: value.clone() for name, value in weights.items()}
    edits = (Edit("insert", 3, 3), Edit("widen", 4, 2), Edit("prune", 4, 4))
    batch = torch.randn(4, *SIGNATURE.image, generator=seeded(), dtype=torch.float64)
    transfer.morph(BLOCKS, weights, edits, SIGNATURE, seeded(), images_BCHW=batch)
    assert all(same(weights[name], before[name]) for name in before)


# ---------------------------------------------------------------- fresh weights


def test_fresh_weights_start_as_their_fill_says() -> None:
    for fill, value in (("zero", 0.0), ("one", 1.0)):
        assert same(transfer.fresh(fill, (3, 2), seeded()), torch.full((3, 2), value, dtype=torch.float64))
    x = torch.randn(2, 4, 5, 6, generator=seeded(), dtype=torch.float64)
    for kernel in (1, 3, 5):
        weight = transfer.fresh("identity", (4, 4, kernel, kernel), seeded())
        assert same(torch.nn.functional.conv2d(x, weight, padding=kernel // 2), x)
    weight = transfer.fresh("fan_in", (200, 10, 3, 3), seeded())
    assert weight.std().item() == pytest.approx((2 / 90) ** 0.5, rel=0.02)
    with pytest.raises(TransferError, match="unknown fill 'ones'"):
        transfer.fresh("ones", (1,), seeded())


def test_initial_weights_are_float32_complete_and_follow_the_generator_alone() -> None:
    graph = spaces.initial(SIGNATURE)[0]
    weights = transfer.initial_weights(graph, SIGNATURE, seeded(3))
    again = transfer.initial_weights(graph, SIGNATURE, seeded(3))
    other = transfer.initial_weights(graph, SIGNATURE, seeded(4))
    assert all(value.dtype == torch.float32 and same(value, again[name]) for name, value in weights.items())
    assert not same(weights["1.weight"], other["1.weight"])
    build(graph, SIGNATURE, weights)


# ---------------------------------------------------------------- a plan that forgets


def plan_of(
    rules: Mapping[str, tuple[Resize | Fresh, ...]] | None = None, dropped: frozenset[str] = frozenset()
) -> Plan:
    return Plan(True, rules or {}, dropped, (), frozenset())


def test_a_plan_that_forgets_a_weight_is_refused() -> None:
    weights = tagged(BLOCKS)
    same_graph = morphisms.study(BLOCKS, SIGNATURE)
    assert transfer.transfer(weights, plan_of(), same_graph, seeded()).keys() == weights.keys()

    missing = {name: value for name, value in weights.items() if name != "4.weight"}
    with pytest.raises(TransferError, match=r"4\.weight: the plan gives None, the network needs \(6, 8, 3, 3\)"):
        transfer.transfer(missing, plan_of(), same_graph, seeded())
    with pytest.raises(TransferError, match=r"4\.weight: to be resized, but the parent has none"):
        resize = plan_of({"4.weight": (Resize(0, (0, 1), "zero"),)})
        transfer.transfer(missing, resize, same_graph, seeded())
    with pytest.raises(TransferError, match=r"2\.bias: the plan gives \(3,\), the network needs \(8,\)"):
        transfer.transfer(weights, plan_of({"2.bias": (Resize(0, (0, 1, 2), "zero"),)}), same_graph, seeded())
    smaller = morphisms.study(morphisms.edited(same_graph, Edit("remove", 9)).graph, SIGNATURE)
    rules = {"11.weight": (Resize(1, tuple(range(4)) + (morphisms.NEW,) * 2, "zero"),)}
    with pytest.raises(TransferError, match=r"\['7\.weight', '8\.bias'.*neither used nor dropped"):
        transfer.transfer(weights, plan_of(rules), smaller, seeded())


# ---------------------------------------------------------------- the inserted BatchNorm


def trained_like(graph: Graph) -> Weights:
    """A general float64 network whose statistics are those of the measured batch."""
    weights = {n: v.double() for n, v in transfer.initial_weights(graph, SIGNATURE, seeded(7)).items()}
    network = build(graph, SIGNATURE, weights)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.5, generator=seeded(8))
                module.bias.normal_(0, 0.5, generator=seeded(9))
        network.train()(batch())
    return network.weights()


def batch() -> Tensor:
    return torch.randn(64, *SIGNATURE.image, generator=seeded(5), dtype=torch.float64)


def in_mode(graph: Graph, weights: Weights, x_BCHW: Tensor, *, training: bool) -> Tensor:
    network = build(graph, SIGNATURE, weights).train(training)
    with torch.no_grad():
        logits_BK: Tensor = network(x_BCHW)
    return logits_BK


INSERTS = (Edit("insert", 3, 3), Edit("insert", 6, 5), Edit("insert", 9, 3), Edit("insert", 14, 3))


@pytest.mark.parametrize("count", [1, 4])
def test_a_measured_insert_is_exact_in_evaluation_and_close_in_training(count: int) -> None:
    weights = trained_like(BLOCKS)
    measured = transfer.morph(BLOCKS, weights, INSERTS[:count], SIGNATURE, seeded(), images_BCHW=batch())
    unit = transfer.morph(BLOCKS, weights, INSERTS[:count], SIGNATURE, seeded())
    probes = torch.randn(32, *SIGNATURE.image, generator=seeded(6), dtype=torch.float64)
    before = in_mode(BLOCKS, weights, probes, training=False)
    for child in (measured, unit):
        after = in_mode(child.graph, child.weights, probes, training=False)
        assert (after - before).abs().max() <= 1e-12 * before.abs().max()
    before = in_mode(BLOCKS, weights, batch(), training=True)
    scale = before.std(dim=0).mean()
    moved = {
        name: float((in_mode(child.graph, child.weights, batch(), training=True) - before).abs().max() / scale)
        for name, child in (("measured", measured), ("unit", unit))
    }
    assert moved["measured"] < 0.02, moved
    assert moved["unit"] > 0.5, moved


def test_a_measured_batchnorm_has_the_statistics_of_its_input() -> None:
    weights = trained_like(BLOCKS)
    morphed = transfer.morph(BLOCKS, weights, INSERTS[:2], SIGNATURE, seeded(), images_BCHW=batch())
    network = build(morphed.graph, SIGNATURE, morphed.weights)
    for bn in (13, 16):
        with torch.no_grad():
            x_BCHW = network.inputs_of(batch(), [bn])[bn]
        mean, var = x_BCHW.mean(dim=(0, 2, 3)), x_BCHW.var(dim=(0, 2, 3), correction=0)
        given = {name: morphed.weights[f"{bn}.{name}"] for name in STATISTICS}
        torch.testing.assert_close(given["running_mean"], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given["running_var"], var, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given["bias"], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given["weight"], (var + BN_EPS).sqrt(), rtol=1e-12, atol=1e-12)
        assert bool((given["running_var"] >= 0).all())


def test_an_inserted_batchnorm_that_is_not_measured_has_unit_statistics() -> None:
    child = morph(BLOCKS, tagged(BLOCKS), Edit("insert", 3, 3)).weights
    ones = torch.ones(8, dtype=torch.float64)
    expected = (ones * (1 + BN_EPS) ** 0.5, 0 * ones, 0 * ones, ones)
    assert all(same(child[f"13.{name}"], value) for name, value in zip(STATISTICS, expected, strict=True))


def test_a_dead_channel_has_a_variance_of_zero_and_stays_exact() -> None:
    weights = trained_like(BLOCKS)
    weights["2.bias"][0] = -1e6  # the ReLU behind it lets nothing through
    morphed = transfer.morph(BLOCKS, weights, INSERTS[:1], SIGNATURE, seeded(), images_BCHW=batch())
    assert morphed.weights["13.running_var"][0] == 0
    before = in_mode(BLOCKS, weights, batch(), training=False)
    after = in_mode(morphed.graph, morphed.weights, batch(), training=False)
    assert (after - before).abs().max() <= 1e-12 * before.abs().max()


# ---------------------------------------------------------------- mistakes of the search that weights would suffer from


def test_equal_points_do_not_delete_each_other() -> None:
    front = pareto.Front.empty(2)
    for number in (7, 3, 9):
        front = pareto.insert(front, number, (0.1, 500.0))
    assert front.numbers == (3,)


def test_a_failed_child_never_enters_the_front() -> None:
    given = {"data": {"name": "digits"}, "search": {"proposals": 4, "accepted": 2, "children": 2}}
    fixed = evolution.problem(config.from_dict(given, "test"), Signature((1, 8, 8), 10), 0.9)
    state, children = evolution.ask(evolution.start(fixed), 4, lambda _: False)
    state = evolution.tell(state, evolution.Outcome(0, (0.2,)))
    reference, before = fixed.reference, evolution.hypervolume(fixed, state.front.values)
    for child in children[1:]:
        state = evolution.tell(state, evolution.Outcome(child.number, (), "diverged"))
    assert state.front.numbers == (0,) and state.num_failed == len(children) - 1
    assert evolution.hypervolume(fixed, state.front.values) == before and fixed.reference == reference
