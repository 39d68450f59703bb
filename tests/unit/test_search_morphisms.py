"""Which edits are legal, what graph each makes, and that no copy of a cell is forgotten."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import morphisms, spaces
from lemonade_hpc.search.graph import Graph, Node, chain
from lemonade_hpc.search.morphisms import EXACT, KINDS, NEW, Anatomy, Edit, EditError, Fresh, Resize
from lemonade_hpc.search.ops import (
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
    Signature,
)

SIGNATURE = Signature((3, 8, 8), 5)
EVERY_KIND = [kind for kinds in KINDS.values() for kind in kinds]
BLOCK = [Conv(6, 3), BatchNorm(), ReLU()]


def study(graph: Graph) -> Anatomy:
    return morphisms.study(graph, SIGNATURE)


def all_sites(anatomy: Anatomy) -> list[Edit]:
    return [edit for kind in EVERY_KIND for edit in morphisms.sites(anatomy, kind)]


def linked(*nodes: tuple[int, Op, tuple[int, ...]], ties: dict[int, int] | None = None) -> Graph:
    """A graph from ids, operators and inputs; a pooling and a classifier are put behind the last."""
    made = [Node(id_, op, inputs, (ties or {}).get(id_, id_)) for id_, op, inputs in nodes]
    last = max(node.id for node in made)
    made += [Node(last + 1, GlobalPool(), (made[-1].id,), last + 1), Node(last + 2, Linear(), (last + 1,), last + 2)]
    graph = Graph(tuple(made), last + 3)
    graphs.validate(graph, SIGNATURE)
    return graph


def random_chain(
    graph: Graph, seed: int, length: int, operators: tuple[str, ...] = tuple(KINDS)
) -> list[tuple[Edit, Anatomy]]:
    """Edits and what they made, from a graph on."""
    rng = np.random.default_rng(seed)
    steps: list[tuple[Edit, Anatomy]] = []
    anatomy = study(graph)
    while len(steps) < length and (made := morphisms.mutate(anatomy, operators, rng)):
        steps.append(made)
        anatomy = made[1]
    return steps


# ---------------------------------------------------------------- random chains in the full space


@pytest.mark.parametrize("seed", range(12))
def test_every_site_of_a_random_chain_makes_a_valid_graph_and_spends_new_ids(seed: int) -> None:
    before = study(spaces.initial(SIGNATURE)[seed % 4])
    used = set(before.by_id)
    for _, after in random_chain(before.graph, seed, 10):
        for edit in all_sites(before):
            changed = morphisms.edited(before, edit).graph
            facts = graphs.validate(changed, SIGNATURE)
            assert facts == morphisms.edited(before, edit).facts
            new = {node.id for node in changed.nodes} - before.by_id.keys()
            assert all(before.graph.next_id <= id_ < changed.next_id for id_ in new)
            assert changed.next_id == before.graph.next_id + len(new)
            assert all(node.tie == node.id for node in changed.nodes)
        fresh = after.by_id.keys() - before.by_id.keys()
        assert not fresh & used
        used |= fresh
        before = after


@pytest.mark.parametrize("seed", range(8))
def test_apply_takes_exactly_what_sites_offers(seed: int) -> None:
    """Every kind at every node (and where there is none), with every argument that might be taken for a legal one."""
    anatomy = random_chain(spaces.initial(SIGNATURE)[seed % 4], seed, 6)[-1][1]
    offered = set(all_sites(anatomy))
    ties = [*anatomy.by_id, anatomy.graph.next_id, -1]
    tried = {Edit(k, tie, arg) for k in EVERY_KIND for tie in ties for arg in {*range(-2, 9), *ties}}
    assert offered <= tried
    for edit in tried:
        if edit in offered:
            morphisms.edited(anatomy, edit)
        else:
            with pytest.raises(EditError, match=f"kind='{edit.kind}', site={edit.site}, arg={edit.arg}.* not legal"):
                morphisms.edited(anatomy, edit)


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(EditError, match="kinds of edit are insert, widen, add, concat, remove, prune, separable"):
        morphisms.edited(study(chain([Input(), *BLOCK, GlobalPool(), Linear()])), Edit("deepen", 3, 3))


def weights_of(anatomy: Anatomy) -> dict[str, tuple[int, ...]]:
    return {f"{id_}.{param.name}": param.shape for id_, fact in anatomy.facts.items() for param in fact.params}


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_accounts_for_every_weight(seed: int) -> None:
    """A weight of the child is new, or the parent's after its rules; one of the parent's goes on or is dropped."""
    before = study(spaces.initial(SIGNATURE)[seed % 4])
    for _, then in random_chain(before.graph, seed, 8):
        for edit in all_sites(before)[:: 1 + seed % 3]:
            after = morphisms.edited(before, edit)
            kept = {s.group: tuple(range(s.count)) for s in morphisms.selects(before, edit)}
            plan = morphisms.plan(before, edit, after, kept)
            old, new = weights_of(before), weights_of(after)
            assert plan.rules.keys() <= new.keys()
            assert old.keys() - plan.dropped == old.keys() & new.keys()
            for name, shape in new.items():
                given = old.get(name)
                for rule in plan.rules.get(name, ()):
                    if isinstance(rule, Fresh):
                        given = rule.shape
                    else:
                        assert isinstance(rule, Resize) and given is not None
                        assert all(k == NEW or 0 <= k < given[rule.axis] for k in rule.index)
                        given = (*given[: rule.axis], len(rule.index), *given[rule.axis + 1 :])
                assert given == shape, f"{edit}: weight {name}"
            assert plan.exact == (edit.kind in EXACT) and (plan.exact or plan.affected)
            assert set(plan.measure) == {n.id for n in after.of(BatchNorm)} - before.by_id.keys()
        before = then


@pytest.mark.parametrize("seed", range(20))
def test_widen_and_prune_keep_the_widths_of_a_group_equal(seed: int) -> None:
    before = study(spaces.initial(SIGNATURE)[seed % 4])
    for _, then in random_chain(before.graph, seed, 8, ("insert", "skip", "separable", "widen")):
        for edit in morphisms.sites(before, "widen") + morphisms.sites(before, "prune"):
            after = morphisms.edited(before, edit)
            group, width = before.runs[edit.site][0]
            wanted = width * 2 if edit.kind == "widen" else width - max(1, width // edit.arg)
            assert wanted >= 4
            for id_ in before.by_id:
                expected = tuple((g, wanted if g == group else size) for g, size in before.runs[id_])
                assert after.runs[id_] == expected
        before = then


def test_the_images_channels_never_change_width() -> None:
    """A convolution that an addition joins with the image is bound to it."""
    graph = linked((0, Input(), ()), (1, Conv(3, 3), (0,)), (2, Add(), (1, 0)), (3, Conv(8, 3), (2,)))
    assert [edit.site for edit in morphisms.sites(study(graph), "widen")] == [3]
    assert {edit.site for edit in morphisms.sites(study(graph), "prune")} == {3}


@pytest.mark.parametrize("seed", range(20))
def test_no_pooling_goes_and_no_stages_last_block(seed: int) -> None:
    """Removing for as long as anything can be removed."""
    start = random_chain(spaces.initial(SIGNATURE)[seed % 4], seed, 12, ("insert", "skip"))[-1][1]
    steps = random_chain(start.graph, seed, 100, ("remove",))
    assert len(steps) >= 5 and morphisms.sites(steps[-1][1], "remove") == []
    for _, anatomy in steps:
        assert [n.id for n in anatomy.of(MaxPool)] == [n.id for n in start.of(MaxPool)]
        assert {anatomy.shape(n.id)[1:] for n in anatomy.of(ReLU)} == {(8, 8), (4, 4), (2, 2)}
        assert len(anatomy.of(Conv)) >= 3
    assert len(steps[-1][1].of(ReLU)) == 3 and not steps[-1][1].of(Add) and not steps[-1][1].of(Concat)


# ---------------------------------------------------------------- single rules


def test_the_six_operators_on_a_small_network() -> None:
    """Every legal edit, by hand."""
    #                       0        1  2  3           4            5  6  7            8           9
    graph = chain([Input(), *BLOCK, MaxPool(), *BLOCK, GlobalPool(), Linear()])
    anatomy = study(graph)
    assert all_sites(anatomy) == [
        Edit("insert", 3, 3), Edit("insert", 3, 5), Edit("insert", 7, 3), Edit("insert", 7, 5),
        Edit("widen", 1, 2), Edit("widen", 5, 2), Edit("add", 7, 4), Edit("concat", 7, 4),
        Edit("prune", 1, 4), Edit("prune", 5, 4), Edit("separable", 1), Edit("separable", 5),
    ]  # fmt: skip
    words = {edit: graphs.describe(morphisms.edited(anatomy, edit).graph) for edit in all_sites(anatomy)}
    head, tail = "input conv3x3(6) bn relu", "pool conv3x3(6) bn relu"
    assert words[Edit("insert", 3, 5)] == f"{head} conv5x5(6) bn relu {tail} gap linear"
    assert words[Edit("widen", 5, 2)] == f"{head} pool conv3x3(12) bn relu gap linear"
    assert words[Edit("prune", 5, 4)] == f"{head} pool conv3x3(5) bn relu gap linear"
    assert words[Edit("add", 7, 4)] == f"{head} {tail} add gap linear"
    assert words[Edit("concat", 7, 4)] == f"{head} {tail} concat gap linear"
    assert words[Edit("separable", 1)] == f"input dw3x3 conv1x1(6) bn relu {tail} gap linear"
    deeper = study(morphisms.edited(anatomy, Edit("insert", 7, 3)).graph)
    assert morphisms.sites(deeper, "remove") == [Edit("remove", 7), Edit("remove", 12)]
    assert graphs.digest(morphisms.edited(deeper, Edit("remove", 12)).graph) == graphs.digest(graph)


def test_insert_stands_only_behind_a_relu_of_feature_maps() -> None:
    body = (0, Input(), ()), (1, Conv(4, 3), (0,)), (2, ReLU(), (1,)), (3, GlobalPool(), (2,)), (4, ReLU(), (3,))
    nodes = [Node(id_, op, inputs, id_) for id_, op, inputs in body]
    graph = Graph((*nodes, Node(5, Linear(), (4,), 5)), 6)
    graphs.validate(graph, SIGNATURE)
    assert {edit.site for edit in morphisms.sites(study(graph), "insert")} == {2}


def test_insert_does_not_merge_what_an_addition_reads_apart() -> None:
    """Behind ReLU 5, of two runs, a convolution would put one: the addition's operands would differ."""
    graph = linked(
        (0, Input(), ()), (1, Conv(4, 3), (0,)), (2, Conv(4, 3), (0,)), (3, Concat(), (1, 2)), (4, Concat(), (2, 1)),
        (5, ReLU(), (3,)), (6, Add(), (5, 4)),
    )  # fmt: skip
    assert study(graph).mixes(5) and not study(graph).mixes(1)
    assert morphisms.sites(study(graph), "insert") == []
    with pytest.raises(EditError):
        morphisms.edited(study(graph), Edit("insert", 5, 3))


def test_a_concatenation_does_not_change_what_an_addition_reads() -> None:
    graph = chain([Input(), *BLOCK, *BLOCK, *BLOCK, GlobalPool(), Linear()])
    joined = study(morphisms.edited(study(graph), Edit("add", 9, 3)).graph)
    assert {(edit.site, edit.arg) for edit in morphisms.sites(study(graph), "concat")} == {(6, 3), (9, 3), (9, 6)}
    assert {(edit.site, edit.arg) for edit in morphisms.sites(joined, "concat")} == {(6, 3)}
    assert {(edit.site, edit.arg) for edit in morphisms.sites(joined, "add")} == {(6, 3), (9, 6)}


def test_layers_joined_already_are_not_joined_again_and_removing_undoes_it() -> None:
    anatomy = study(chain([Input(), *BLOCK, *BLOCK, GlobalPool(), Linear()]))
    for kind in ("add", "concat"):
        joined = study(morphisms.edited(anatomy, Edit(kind, 6, 3)).graph)
        assert morphisms.sites(joined, "add") == morphisms.sites(joined, "concat") == []
        assert Edit("remove", 9) in morphisms.sites(joined, "remove")
        assert graphs.digest(morphisms.edited(joined, Edit("remove", 9)).graph) == graphs.digest(anatomy.graph)


def test_a_block_between_joined_layers_stays_since_its_reader_would_read_one_layer_twice() -> None:
    anatomy = study(chain([Input(), *BLOCK, *BLOCK, GlobalPool(), Linear()]))
    joined = study(morphisms.edited(anatomy, Edit("concat", 6, 3)).graph)
    assert Edit("remove", 6) in morphisms.sites(anatomy, "remove")
    assert Edit("remove", 6) not in morphisms.sites(joined, "remove")


def test_a_skip_whose_far_end_nobody_else_reads_stays() -> None:
    graph = linked(
        (0, Input(), ()), (1, Conv(4, 3), (0,)), (2, ReLU(), (1,)), (3, Conv(4, 1), (0,)), (4, ReLU(), (3,)),
        (5, Add(), (4, 2)),
    )  # fmt: skip
    assert morphisms.sites(study(graph), "remove") == []


def test_a_block_read_in_the_middle_is_none() -> None:
    graph = linked(
        (0, Input(), ()), (1, Conv(4, 3), (0,)), (2, BatchNorm(), (1,)), (3, ReLU(), (2,)), (4, Concat(), (3, 2)),
        (5, Conv(4, 3), (4,)), (6, BatchNorm(), (5,)), (7, ReLU(), (6,)),
    )  # fmt: skip
    assert morphisms.sites(study(graph), "remove") == [Edit("remove", 7), Edit("remove", 4)]


def test_prune_leaves_four_channels_at_least() -> None:
    for width, divisors in ((4, set()), (5, {4}), (6, {4}), (8, {2, 4})):
        graph = chain([Input(), Conv(width, 3), BatchNorm(), ReLU(), GlobalPool(), Linear()])
        assert {edit.arg for edit in morphisms.sites(study(graph), "prune")} == divisors


# ---------------------------------------------------------------- drawing


def test_an_operator_without_a_site_is_not_drawn_and_none_at_all_gives_nothing() -> None:
    graph = chain([Input(), Conv(4, 1), BatchNorm(), ReLU(), GlobalPool(), Linear()])
    rng = np.random.default_rng(0)
    assert morphisms.draw(study(graph), ("remove", "prune", "separable", "skip"), rng) is None
    assert morphisms.mutate(study(graph), ("remove",), rng) is None
    assert {morphisms.draw(study(graph), tuple(KINDS), rng).kind for _ in range(50)} == {"insert", "widen"}  # type: ignore[union-attr]


def test_operators_then_kinds_then_sites_are_drawn_evenly() -> None:
    """Against the definition, by chi-square, with a fixed seed."""
    anatomy = study(chain([Input(), *BLOCK, MaxPool(), *BLOCK, *BLOCK, GlobalPool(), Linear()]))
    operators = ("insert", "widen", "skip", "separable")
    expected: dict[Edit, float] = {}
    for operator in operators:
        kinds = [found for kind in KINDS[operator] if (found := morphisms.sites(anatomy, kind))]
        for found in kinds:
            expected |= {edit: 1 / len(operators) / len(kinds) / len(found) for edit in found}
    rng = np.random.default_rng(1)
    count = 20_000
    drawn = Counter(morphisms.draw(anatomy, operators, rng) for _ in range(count))
    assert drawn.keys() == expected.keys()
    assert chisquare([drawn[edit] for edit in expected], [count * p for p in expected.values()]).pvalue > 0.01


def test_mutate_is_draw_apply_and_study() -> None:
    before = study(spaces.initial(SIGNATURE)[1])
    for seed in range(30):
        made = morphisms.mutate(before, tuple(KINDS), np.random.default_rng(seed))
        edit = morphisms.draw(before, tuple(KINDS), np.random.default_rng(seed))
        assert made is not None and edit is not None
        after = study(morphisms.edited(before, edit).graph)
        assert (made[0], made[1].graph, made[1].facts) == (edit, after.graph, after.facts)


def test_edits_survive_json_and_can_be_replayed() -> None:
    start = spaces.initial(SIGNATURE)[0]
    steps = random_chain(start, 3, 12)
    stored = json.loads(json.dumps(morphisms.to_json(edit for edit, _ in steps)))
    edits = morphisms.from_json(stored)
    assert edits == tuple(edit for edit, _ in steps)
    assert morphisms.replay(start, edits, SIGNATURE) == steps[-1][1].graph
    with pytest.raises(EditError):
        morphisms.replay(start, (*edits, Edit("widen", -5, 2)), SIGNATURE)


# ---------------------------------------------------------------- cells whose copies are tied


def cells(cell: list[Op], per_stage: int, widths: list[int], stem: bool = True) -> Graph:
    """Stages of copies of one cell, each reading the one before it, with pooling between stages."""
    ops: list[tuple[Op, int | None]] = [(Input(), None)]
    ops += [(op, None) for op in (Conv(widths[0], 3), BatchNorm(), ReLU())] if stem else []
    for stage, width in enumerate(widths):
        ops += [(MaxPool(), None)] if stage else []
        for _ in range(per_stage):
            ops += [(replace(op, channels=width) if isinstance(op, Conv) else op, k) for k, op in enumerate(cell)]
    plain = chain([op for op, _ in ops] + [GlobalPool(), Linear()])
    first = next(id_ for id_, (_, k) in enumerate(ops) if k == 0)
    ties = [first + k if k is not None else id_ for id_, (_, k) in enumerate(ops)]
    nodes = [replace(n, tie=ties[n.id]) if n.id < len(ties) else n for n in plain.nodes]
    graph = Graph(tuple(nodes), plain.next_id)
    graphs.validate(graph, SIGNATURE)
    return graph


def assert_copies_are_alike(graph: Graph, num_copies: int) -> None:
    """Tied nodes: one in every copy, of one operator, kernel and wiring."""
    anatomy = study(graph)
    tied = {tie: nodes for tie, nodes in anatomy.ties.items() if len(nodes) > 1}
    place = {node.id: (tie, k) for tie, nodes in tied.items() for k, node in enumerate(nodes)}
    for nodes in tied.values():
        assert len(nodes) == num_copies
        kinds = {(n.op.name, getattr(n.op, "kernel", 0)) for n in nodes}
        assert len(kinds) == 1
        wiring = set()
        for k, node in enumerate(nodes):
            sources = [place.get(source, (-1, -1)) for source in node.inputs]
            wiring.add(tuple(tie if copy == k else None for tie, copy in sources))
        assert len(wiring) == 1


def assert_all_resized_or_none(before: Anatomy, after: Graph) -> None:
    """Of the convolutions of a tie, all have changed their width or none."""
    now = after.by_id
    for nodes in before.ties.values():
        assert len({now[n.id].op == n.op for n in nodes if n.id in now}) <= 1


TWO_BLOCKS: list[Op] = [Conv(1, 3), BatchNorm(), ReLU(), Conv(1, 3), BatchNorm(), ReLU()]


@pytest.mark.parametrize("seed", range(25))
def test_tied_copies_are_edited_all_or_none(seed: int) -> None:
    """Every legal edit along random chains; copies that read each other directly, and stages of different widths."""
    per_stage, widths = ((2, [8, 16]), (3, [8]), (1, [8, 16, 32]), (2, [8, 8]))[seed % 4]
    graph = cells(TWO_BLOCKS[: 3 if seed % 3 == 0 else 6], per_stage, widths, stem=seed % 5 > 0)
    before = study(graph)
    num_copies = per_stage * len(widths)
    for _, after in [(None, before), *random_chain(graph, seed, 8)]:
        for edit in all_sites(before):
            changed = morphisms.edited(before, edit).graph
            graphs.validate(changed, SIGNATURE)
            assert_copies_are_alike(changed, num_copies)
            assert_all_resized_or_none(before, changed)
        before = after


def test_the_check_of_tied_copies_can_fail() -> None:
    graph = cells(TWO_BLOCKS, 2, [8])
    untied = Graph(tuple(replace(node, tie=node.id) for node in graph.nodes), graph.next_id)
    site = study(graph).ties[next(n.tie for n in graph.nodes if isinstance(n.op, ReLU) and n.id > 3)][0]
    changed = morphisms.edited(study(untied), Edit("insert", site.id, 3)).graph
    ties = {node.id: node.tie for node in graph.nodes}
    half = Graph(tuple(replace(node, tie=ties.get(node.id, node.tie)) for node in changed.nodes), changed.next_id)
    with pytest.raises(AssertionError):
        assert_copies_are_alike(half, 2)


def test_every_kind_of_edit_occurs_on_tied_copies() -> None:
    met: Counter[str] = Counter()
    for seed in range(12):
        met.update(edit.kind for edit, _ in random_chain(cells(TWO_BLOCKS, 2, [8, 16]), seed, 8))
    assert met.keys() == set(EVERY_KIND)


def test_removing_copies_that_read_each_other_reaches_past_all_of_them() -> None:
    """Three copies of one block in a row behind a stem: what stays reads the stem."""
    graph = cells(TWO_BLOCKS[:3], 3, [8])
    relu = study(graph).of(ReLU)[1]
    changed = morphisms.edited(study(graph), Edit("remove", relu.tie)).graph
    assert graphs.describe(changed) == "input conv3x3(8) bn relu gap linear"


def test_copies_that_are_all_of_a_stage_stay() -> None:
    """Each copy alone could go, both together would leave nothing between two poolings."""
    graph = cells(TWO_BLOCKS[:3], 2, [8, 8], stem=False)
    untied = Graph(tuple(replace(node, tie=node.id) for node in graph.nodes), graph.next_id)
    assert len(morphisms.sites(study(untied), "remove")) == 4
    assert morphisms.sites(study(graph), "remove") == []


def test_a_group_that_one_copy_shares_with_another_tie_is_not_resized() -> None:
    """In the first copy, convolutions a and b write one group; b's second copy would stay behind."""
    nodes = (
        (0, Input(), ()), (1, Conv(4, 3), (0,)), (2, Conv(4, 1), (0,)), (3, Add(), (1, 2)),
        (4, Conv(4, 3), (3,)), (5, Conv(8, 1), (3,)), (6, Concat(), (4, 5)),
    )  # fmt: skip
    tied = study(linked(*nodes, ties={1: 1, 4: 1, 2: 2, 5: 2}))
    assert tied.writers[1] == [tied.by_id[1], tied.by_id[2]]
    assert morphisms.sites(tied, "widen") == morphisms.sites(tied, "prune") == []
    assert len(morphisms.sites(study(linked(*nodes)), "widen")) == 4


def test_separable_copies_that_read_each_other_directly() -> None:
    """Two copies of a bare convolution in a row: the second's depthwise part reads the first's pointwise one."""
    graph = cells([Conv(1, 3)], 2, [8], stem=False)
    changed = morphisms.edited(study(graph), Edit("separable", 1)).graph
    assert graphs.describe(changed) == "input dw3x3 conv1x1(8) dw3x3 conv1x1(8) gap linear"
    assert_copies_are_alike(changed, 2)


def test_a_layer_that_is_in_no_cell_is_not_joined_with_one_that_is() -> None:
    """Neither from behind two copies of a ReLU nor from the copies to the one before them."""
    nodes = (
        (0, Input(), ()), (1, Conv(4, 3), (0,)), (2, ReLU(), (1,)), (3, Conv(4, 3), (2,)), (4, ReLU(), (3,)),
        (5, Conv(4, 3), (4,)), (6, ReLU(), (5,)), (7, Conv(4, 3), (6,)), (8, ReLU(), (7,)),
    )  # fmt: skip
    for kind in ("add", "concat"):
        tied = morphisms.sites(study(linked(*nodes, ties={3: 3, 4: 4, 5: 3, 6: 4})), kind)
        assert {(edit.site, edit.arg) for edit in tied} == {(8, 2)}
        assert len(morphisms.sites(study(linked(*nodes)), kind)) == 6


def test_a_skip_needs_its_far_end_in_every_copy() -> None:
    graph = cells(TWO_BLOCKS, 2, [8])
    stem = study(graph).of(ReLU)[0]
    pairs = {(edit.site, edit.arg) for edit in morphisms.sites(study(graph), "add")}
    first, second = (node.tie for node in study(graph).of(ReLU)[1:3])
    assert pairs == {(second, first)} and stem.tie not in {arg for _, arg in pairs}
    changed = study(morphisms.edited(study(graph), Edit("add", second, first)).graph)
    assert len(changed.of(Add)) == 2 and len({node.tie for node in changed.of(Add)}) == 1
    assert len(changed.of(Depthwise)) == 0


@pytest.mark.parametrize(
    "data",
    [
        None, 3, "widen", [3], [["widen"]], [["widen", 1, 2, 3]], [["wide", 1, 2]], [["widen", "1", 2]],
        [[1, 1, 1]], [["widen", 1, None]], [["widen", True, 2]], {"kind": "widen"},
    ],
)  # fmt: skip
def test_what_is_no_edit_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="an edit is a list|expected a kind"):
        morphisms.from_json(data)
