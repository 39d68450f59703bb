"""What a graph is, when two are the same network, and which channels belong together; spaces and cheap objectives."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search import morphisms, objectives, spaces
from lemonade_hpc.search.graph import Graph, GraphError, Node, chain, digest
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
    ShapeError,
    Signature,
)

SIGNATURE = Signature((4, 8, 8), 5)
SEEDS = st.integers(0, 2**32 - 1)


def grown(seed: int, max_edits: int = 10) -> Graph:
    """An initial network after random edits."""
    rng = np.random.default_rng(seed)
    anatomy = morphisms.study(spaces.initial(SIGNATURE)[rng.integers(4)], SIGNATURE)
    for _ in range(rng.integers(max_edits + 1)):
        made = morphisms.mutate(anatomy, morphisms.KINDS, rng)
        assert made is not None
        anatomy = made[1]
    return anatomy.graph


def scattered(seed: int) -> Graph:
    """A random valid graph that no edits have made: parallel branches, skips anywhere, additions of concatenations."""
    rng = np.random.default_rng(seed)
    nodes = [Node(0, Input(), (), 0)]
    runs: dict[int, list[int]] = {0: [4]}

    def add(op: Op, inputs: Iterable[int], sizes: list[int]) -> None:
        nodes.append(Node(len(nodes), op, tuple(inputs), len(nodes)))
        runs[nodes[-1].id] = sizes

    for _ in range(rng.integers(1, 12)):
        x, y = (int(rng.integers(len(nodes))) for _ in range(2))
        kind = rng.integers(4)
        if kind == 0:
            width = int(rng.integers(2, 5))
            add(Conv(width, 3), [x], [width])
        elif kind == 1:
            add([Depthwise(3), BatchNorm(), ReLU()][rng.integers(3)], [x], runs[x])
        elif kind == 2 and x != y:
            add(Concat(), [x, y], runs[x] + runs[y])
        elif x != y and runs[x] == runs[y]:
            add(Add(), [x, y], runs[x])
    while len(unread := sorted(runs.keys() - {source for node in nodes for source in node.inputs})) > 1:
        add(Concat(), unread[:2], runs[unread[0]] + runs[unread[1]])
    add(GlobalPool(), [len(nodes) - 1] if not unread else unread, [])
    add(Linear(), [len(nodes) - 1], [])
    return Graph(tuple(nodes), len(nodes))


def anyhow(seed: int) -> Graph:
    return grown(seed) if seed % 2 else scattered(seed)


def disguised(graph: Graph, seed: int) -> Graph:
    """The same network: other ids, other ties, another topological order."""
    rng = np.random.default_rng(seed)
    names = dict(zip((n.id for n in graph.nodes), rng.permutation(len(graph.nodes) + 5).tolist(), strict=False))
    left, done = list(graph.nodes), list[Node]()
    while left:
        ready = [n for n in left if all(names[source] in {d.id for d in done} for source in n.inputs)]
        node = ready[rng.integers(len(ready))]
        left.remove(node)
        inputs = tuple(names[source] for source in node.inputs)
        done.append(Node(names[node.id], node.op, inputs, int(rng.integers(100))))
    return Graph(tuple(done), len(graph.nodes) + 5)


def written_out(graph: Graph) -> str:
    """Slow twin of the digest: the network as an expression in which a node named before is a reference."""
    by_id = {node.id: node for node in graph.nodes}
    names: dict[int, str] = {}

    def expression(id_: int) -> str:
        if id_ in names:
            return names[id_]
        node = by_id[id_]
        text = f"{node.op!r}({','.join([expression(source) for source in node.inputs])})"
        names[id_] = f"${len(names)}"
        return text

    return expression(graph.nodes[-1].id)


# ---------------------------------------------------------------- validity


def valid() -> list[Node]:
    return [
        Node(0, Input(), (), 0), Node(1, Conv(4, 3), (0,), 1), Node(2, ReLU(), (1,), 2), Node(3, Concat(), (2, 0), 3),
        Node(4, Conv(4, 3), (3,), 4), Node(5, Add(), (4, 2), 5), Node(6, GlobalPool(), (5,), 6),
        Node(7, Linear(), (6,), 7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "node", "says"),
    [
        (0, Node(0, ReLU(), (), 0), "the first node must be the image"),
        (7, Node(7, ReLU(), (6,), 7), "the first node must be the image and the last the classifier"),
        (2, Node(1, ReLU(), (1,), 2), "node 1: the id is used twice"),
        (7, Node(9, Linear(), (6,), 7), "node 9: the id is used twice, negative or not below next_id 9"),
        (7, Node(-1, Linear(), (6,), 7), "node -1: the id is used twice, negative"),
        (5, Node(5, Add(), (4,), 5), "node 5: add takes 2 inputs, got 1"),
        (2, Node(2, ReLU(), (1, 0), 2), "node 2: relu takes 1 inputs, got 2"),
        (5, Node(5, Add(), (4, 4), 5), "node 5: reads node 4 twice"),
        (2, Node(2, ReLU(), (4,), 2), "node 2: reads \\[4\\], not defined before it"),
        (2, Node(2, ReLU(), (8,), 2), "node 2: reads \\[8\\], not defined before it"),
        (2, Node(2, Input(), (), 2), "node 2: a second image"),
        (5, Node(5, ReLU(), (2,), 5), "nodes \\[4\\] are read by nobody"),
        (4, Node(4, Conv(4, 3), (3,), 6), "nodes of tie 6 are of different operators: conv, globalpool"),
    ],
)
def test_what_is_no_graph_is_refused(place: int, node: Node, says: str) -> None:
    nodes = valid()
    assert graphs.validate(Graph(tuple(nodes), 9), SIGNATURE)[5].shape == (4, 8, 8)
    nodes[place] = node
    with pytest.raises(GraphError, match=says):
        graphs.validate(Graph(tuple(nodes), 9), SIGNATURE)


def test_an_empty_graph_is_refused() -> None:
    with pytest.raises(GraphError, match="the first node must be the image"):
        graphs.validate(Graph((), 0), SIGNATURE)


def test_shapes_that_do_not_fit_are_refused() -> None:
    nodes = valid()
    nodes[4] = Node(4, Conv(5, 3), (3,), 4)
    with pytest.raises(ShapeError, match="add needs equal shapes"):
        graphs.validate(Graph(tuple(nodes), 9), SIGNATURE)


def test_an_addition_of_channels_divided_differently_is_refused() -> None:
    nodes = (
        Node(0, Input(), (), 0), Node(1, Conv(4, 3), (0,), 1), Node(2, Conv(8, 3), (0,), 2),
        Node(3, Concat(), (1, 0), 3),
        Node(4, Add(), (2, 3), 4), Node(5, GlobalPool(), (4,), 5), Node(6, Linear(), (5,), 6),
    )  # fmt: skip
    with pytest.raises(GraphError, match="node 4: an addition of channels divided differently"):
        graphs.validate(Graph(nodes, 7), SIGNATURE)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_random_graphs_are_valid(seed: int) -> None:
    graph = anyhow(seed)
    assert graphs.validate(graph, SIGNATURE).keys() == {node.id for node in graph.nodes}


# ---------------------------------------------------------------- the digest


@given(SEEDS, SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_digest_does_not_see_ids_ties_and_order(seed: int, other: int) -> None:
    graph = anyhow(seed)
    assert digest(disguised(graph, other)) == digest(graph)
    assert len(digest(graph)) == 32 and int(digest(graph), 16) >= 0


def test_digests_are_equal_iff_networks_are() -> None:
    """Against the slow twin, among 1,200 networks of which many are equal."""
    pool = [grown(seed, max_edits=2) for seed in range(600)] + [scattered(seed) for seed in range(600)]
    pairs = {(digest(graph), written_out(graph)) for graph in pool}
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert 200 < len(pairs) < 1100


def test_a_digest_sees_what_is_shared() -> None:
    """One convolution read twice is not two convolutions of one input, though written out both look alike."""
    head = [Node(0, Input(), (), 0), Node(1, Conv(4, 3), (0,), 1), Node(2, ReLU(), (1,), 2)]
    tail = [Node(8, GlobalPool(), (7,), 8), Node(9, Linear(), (8,), 9)]
    once = [Node(3, ReLU(), (1,), 3), Node(7, Add(), (2, 3), 7)]
    twice = [Node(4, Conv(4, 3), (0,), 4), Node(3, ReLU(), (4,), 3), Node(7, Add(), (2, 3), 7)]
    shared, separate = (Graph((*head, *middle, *tail), 10) for middle in (once, twice))
    for graph in (shared, separate):
        graphs.validate(graph, SIGNATURE)
    assert digest(shared) != digest(separate)


def test_a_digest_sees_order_of_inputs_and_numbers() -> None:
    nodes = valid()
    seen = {digest(Graph(tuple(nodes), 9))}
    for place, node in [
        (3, Node(3, Concat(), (0, 2), 3)),
        (4, Node(4, Conv(4, 5), (3,), 4)),
        (5, Node(5, Add(), (2, 4), 5)),
    ]:
        changed = [*nodes[:place], node, *nodes[place + 1 :]]
        seen.add(digest(Graph(tuple(changed), 9)))
    assert len(seen) == 4


def test_a_digest_never_changes_between_versions() -> None:
    """Stored searches find their duplicates by it: do not update these numbers lightly."""
    assert [digest(graph)[:8] for graph in spaces.initial(Signature((1, 8, 8), 10))] == GOLDEN


GOLDEN = ["5f682de3", "1a0140bc", "9c89c5ed", "b9ece7ba"]


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_walk_from_the_output_needs_no_shortcut(seed: int) -> None:
    graph = anyhow(seed)
    by_id, order = graph.by_id, list[int]()

    def walk(id_: int) -> None:
        for source in by_id[id_].inputs:
            if source not in order:
                walk(source)
        order.append(id_)

    walk(graph.nodes[-1].id)
    assert [node.id for node in graphs.from_output(graph)] == order


# ---------------------------------------------------------------- JSON


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_graphs_survive_json(seed: int) -> None:
    graph = anyhow(seed)
    assert graphs.from_json(json.loads(json.dumps(graphs.to_json(graph)))) == graph


@pytest.mark.parametrize(
    "data",
    [
        {"nodes": []},
        {"next_id": 1},
        {"next_id": "1", "nodes": []},
        {"next_id": 1, "nodes": [[0, ["input"], []]]},
        {"next_id": 1, "nodes": [["0", ["input"], [], 0]]},
        {"next_id": 1, "nodes": [[0, ["input"], ["a"], 0]]},
        {"next_id": 1, "nodes": [[0, ["inptu"], [], 0]]},
        {"next_id": 1, "nodes": [[0, ["input"], None, 0]]},
        {"next_id": 1, "nodes": 3},
        [1, 2],
    ],
)
def test_what_is_no_stored_graph_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="graph|operator"):
        graphs.from_json(data)  # type: ignore[arg-type]


# ---------------------------------------------------------------- channel groups


def groups_by_definition(graph: Graph) -> dict[int, list[tuple[int, int]]]:
    """Slow twin: each single channel with its origin; operands of an addition have, place by place, linked origins."""
    facts = graphs.infer(graph, SIGNATURE)
    channels: dict[int, list[tuple[int, int]]] = {}
    links: set[tuple[int, int]] = set()
    for node in graph.nodes:
        sources = [channels[source] for source in node.inputs]
        if not node.op.channelwise:
            channels[node.id] = [(node.id, k) for k in range(facts[node.id].shape[0])]
        elif isinstance(node.op, Concat):
            channels[node.id] = sources[0] + sources[1]
        else:
            channels[node.id] = sources[0]
            for (a, i), (b, j) in zip(sources[0], sources[-1], strict=True):
                assert i == j, "operands of an addition are divided alike"
                links |= {(a, b), (b, a)}

    def group(origin: int) -> int:
        reached, new = {origin}, {origin}
        while new:
            new = {b for a, b in links if a in new} - reached
            reached |= new
        return min(reached)

    return {id_: [(group(origin), k) for origin, k in each] for id_, each in channels.items()}


@given(SEEDS)
@settings(max_examples=150, deadline=None)
def test_channel_groups_against_the_definition(seed: int) -> None:
    graph = anyhow(seed)
    shapes = {id_: fact.shape for id_, fact in graphs.infer(graph, SIGNATURE).items()}
    runs = graphs.channel_runs(graph, shapes)
    single = {id_: [(group, k) for group, size in each for k in range(size)] for id_, each in runs.items()}
    assert single == groups_by_definition(graph)
    widths: dict[int, set[int]] = {}
    for group, size in (run for each in runs.values() for run in each):
        widths.setdefault(group, set()).add(size)
    assert all(len(sizes) == 1 for sizes in widths.values())


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_every_legal_edit_of_any_valid_graph_gives_a_valid_graph(seed: int) -> None:
    """Also of graphs that no edits have made; what the edited graph is known to be is what a fresh look says."""
    anatomy = morphisms.study(anyhow(seed), SIGNATURE)
    for kind in (kind for kinds in morphisms.KINDS.values() for kind in kinds):
        for edit in morphisms.sites(anatomy, kind):
            changed = morphisms.edited(anatomy, edit).graph
            assert graphs.validate(changed, SIGNATURE) == morphisms.edited(anatomy, edit).facts


def test_readers_are_found() -> None:
    graph = Graph(tuple(valid()), 9)
    assert {id_: [n.id for n in nodes] for id_, nodes in graphs.readers(graph).items()} == {
        0: [1, 3], 1: [2], 2: [3, 5], 3: [4], 4: [5], 5: [6], 6: [7], 7: [],
    }  # fmt: skip


def test_a_graph_in_words() -> None:
    graph = chain([Input(), Conv(16, 3), BatchNorm(), ReLU(), MaxPool(), Depthwise(5), GlobalPool(), Linear()])
    assert graphs.describe(graph) == "input conv3x3(16) bn relu pool dw5x5 gap linear"


# ---------------------------------------------------------------- spaces and objectives


def test_initial_networks_have_the_papers_sizes() -> None:
    paper = Signature((3, 32, 32), 10)
    sizes = [graphs.params(graph, paper) for graph in spaces.initial(paper)]
    assert [round(size / 1000, 1) for size in sizes] == [16.7, 51.8, 94.8, 373.8]
    assert spaces.min_params(paper) == 10_000


@pytest.mark.parametrize("image", [(1, 1, 1), (1, 2, 5), (3, 3, 3), (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 48)])
def test_initial_networks_are_valid_and_different_on_any_image(image: tuple[int, int, int]) -> None:
    signature = Signature(image, 2)
    made = spaces.initial(signature)
    for graph in made:
        graphs.validate(graph, signature)
        assert sum(isinstance(node.op, ReLU) for node in graph.nodes) == 3
        assert graphs.params(graph, signature) >= spaces.min_params(signature)
    assert len({digest(graph) for graph in made}) == 4


def test_digits_start_between_one_and_twenty_five_thousand_parameters() -> None:
    digits = Signature((1, 8, 8), 10)
    assert all(1_000 <= graphs.params(graph, digits) <= 25_000 for graph in spaces.initial(digits))
    assert spaces.min_params(digits) == 312


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_cheap_objectives_are_sums_over_the_nodes(seed: int) -> None:
    graph = anyhow(seed)
    facts = graphs.infer(graph, SIGNATURE)
    assert objectives.measure(("macs", "params"), facts) == (
        graphs.macs(graph, SIGNATURE),
        graphs.params(graph, SIGNATURE),
    )


@pytest.mark.parametrize("tie", [-1, 10**6])
def test_ties_out_of_range_are_refused(tie: int) -> None:
    graph = chain([Input(), Conv(4, 3), GlobalPool(), Linear()])
    nodes = tuple(replace(node, tie=tie) if node.id == 1 else node for node in graph.nodes)
    with pytest.raises(GraphError, match=f"node 1: its tie {tie} is negative or not below"):
        graphs.validate(replace(graph, nodes=nodes), SIGNATURE)


@pytest.mark.parametrize("op", [Conv(2**21, 1), Conv(2**20, 401)])
def test_absurd_sizes_are_refused(op: Conv) -> None:
    with pytest.raises(GraphError, match="node 1: .* are allowed"):
        graphs.validate(chain([Input(), op, GlobalPool(), Linear()]), SIGNATURE)
