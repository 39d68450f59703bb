"""LEMONADE as two pure functions: `ask` for children, `tell` an outcome.

Decides: who becomes a parent, which proposals are trained, what the front is (paper, Algorithm 1), when a search is
over. Knows no weights, no files, no Slurm, no clock: the record replays it, and a test runs 10^5 children through it.
Every decision draws from its own stream, `default_rng([seed, purpose, number])`; no generator state is kept. The cost of
both functions does not grow with history: whether a network was seen before is a function handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lemonade_hpc.config import Config
from lemonade_hpc.search import density, morphisms, objectives, pareto, spaces
from lemonade_hpc.search.graph import Graph, digest, infer
from lemonade_hpc.search.morphisms import Anatomy, Edit
from lemonade_hpc.search.ops import Signature

MAX_REDRAWS = 50
"""A proposal that has no legal edit, breaks a limit or was seen before is drawn again at most this often."""

PURPOSE_ASK = 1


@dataclass(frozen=True)
class Problem:
    """What stays fixed during a search: the configuration, the signature and the hypervolume's reference."""

    config: Config
    signature: Signature
    reference: tuple[float, ...]
    """One value per objective, cheap ones as log10."""

    @property
    def cheap(self) -> tuple[str, ...]:
        """Names of the cheap objectives."""
        return tuple(objective.name for objective in self.config.cheap)


@dataclass(frozen=True)
class Child:
    """A network to be trained. `parent` is None and `edits` empty for an initial network."""

    number: int
    parent: int | None
    edits: tuple[Edit, ...]
    graph: Graph
    digest: str
    cheap: tuple[float, ...]
    generation: int
    depth: int


@dataclass(frozen=True)
class Outcome:
    """What became of a child: its expensive objectives, or why it failed. A failed child never enters the front."""

    number: int
    expensive: tuple[float, ...]
    failure: str | None = None


@dataclass(frozen=True)
class Drawn:
    """How often proposals were drawn again, by reason."""

    no_edit: int = 0
    limit: int = 0
    duplicate: int = 0


@dataclass(frozen=True)
class State:
    """Everything the next decision depends on."""

    problem: Problem
    front: pareto.Front
    members: Mapping[int, Child]
    """The children on the front, by number."""
    in_flight: Mapping[int, Child]
    num_initial: int = 0
    num_asked: int = 0
    """Distinct children asked so far, initial networks included: the next child's number."""
    num_asks: int = 0
    num_committed: int = 0
    num_failed: int = 0
    redrawn: Drawn = field(default_factory=Drawn)

    @property
    def budget_left(self) -> int:
        """Children that may still be asked after the initial networks."""
        return self.problem.config.search.children - max(0, self.num_asked - self.num_initial)

    @property
    def complete(self) -> bool:
        """Every child of the budget was asked and committed."""
        return self.num_asks > 0 and self.budget_left <= 0 and not self.in_flight


def problem(config: Config, signature: Signature, majority_error: float) -> Problem:
    """The fixed part of a search; raises ValueError where no initial network satisfies the limits.

    The reference point is the error of always guessing the largest class and, for each cheap objective, its `max` or
    4 times the largest initial network, as log10.
    """
    largest: dict[str, float] = {}
    for graph in spaces.initial(signature):
        facts = infer(graph, signature)
        for objective in config.cheap:
            value = objectives.CHEAP[objective.name](facts)
            largest[objective.name] = max(largest.get(objective.name, 0.0), value)
    reference = []
    for objective in config.objectives:
        cheap = objective.name in largest
        reference.append(np.log10(objective.max or 4 * largest[objective.name]) if cheap else majority_error)
    made = Problem(config, signature, tuple(float(value) for value in reference))
    if not _initial(made):
        allowed = ", ".join(f"{o.name} in [{o.min or 0:g}, {o.max or np.inf:g}]" for o in config.cheap)
        smallest = objectives.measure(made.cheap, infer(spaces.initial(signature)[0], signature))
        raise ValueError(
            f"objectives: no initial network satisfies {allowed}; the smallest has "
            + ", ".join(f"{name} {value:g}" for name, value in zip(made.cheap, smallest, strict=True))
        )
    return made


def start(fixed: Problem) -> State:
    """The state before anything was asked."""
    return State(fixed, pareto.Front.empty(len(fixed.config.objectives)), {}, {})


# ---------------------------------------------------------------- ask


def ask(state: State, n: int, seen: Callable[[str], bool]) -> tuple[State, tuple[Child, ...]]:
    """Up to `n` new children, in flight from now on; `seen(digest)` says whether a network was asked before.

    The first ask returns the initial networks, whatever `n`. Steady state then needs one valid network, a generation
    (asked at once, whatever `n`) needs every earlier child told. Nobody is returned when it is not time yet, the
    budget is spent, or no new network was found (`redrawn` counts why).
    """
    redrawn = state.redrawn
    if state.num_asks == 0:
        children = _initial(state.problem)
    else:
        search = state.problem.config.search
        if search.mode == "generational":
            n = 0 if state.in_flight else search.accepted
        n = min(n, state.budget_left)
        if n <= 0 or not state.members:
            return state, ()
        rng = np.random.default_rng([state.problem.config.seed, PURPOSE_ASK, state.num_asks])
        proposals, redrawn = _propose(state, rng, seen)
        chosen = _accept(state, proposals, n, rng)
        before = state.num_asked - state.num_initial
        children = tuple(
            replace(child, number=state.num_asked + k, generation=1 + (before + k) // search.accepted)
            for k, child in enumerate(chosen)
        )
    return take(state, children, redrawn), children


def take(state: State, children: tuple[Child, ...], redrawn: Drawn) -> State:
    """The state after an ask that returned these children: what `ask` does once it has decided, and a replay repeats."""
    in_flight = {**state.in_flight, **{child.number: child for child in children}}
    return replace(
        state,
        in_flight=in_flight,
        num_initial=state.num_initial if state.num_asks else len(children),
        num_asked=state.num_asked + len(children),
        num_asks=state.num_asks + 1,
        redrawn=redrawn,
    )


def _initial(fixed: Problem) -> tuple[Child, ...]:
    """The initial networks within the limits, as children without a parent."""
    children: list[Child] = []
    for graph in spaces.initial(fixed.signature):
        cheap = objectives.measure(fixed.cheap, infer(graph, fixed.signature))
        if _within(fixed, graph, cheap):
            children.append(Child(len(children), None, (), graph, digest(graph), cheap, 0, 0))
    return tuple(children)


def _within(fixed: Problem, graph: Graph, cheap: tuple[float, ...]) -> bool:
    """Whether the cheap objectives keep their hard limits; params has the space's floor where none is given."""
    for objective, value in zip(fixed.config.cheap, cheap, strict=True):
        least = objective.min
        if least is None:
            least = spaces.min_params(fixed.signature) if objective.name == "params" else 0
        if value < least or (objective.max is not None and value > objective.max):
            return False
    return True


def _propose(
    state: State, rng: np.random.Generator, seen: Callable[[str], bool]
) -> tuple[list[Child], Drawn]:
    """Stage 1: `proposals` candidates that are new, different and within the limits; their numbers are not final."""
    search = state.problem.config.search
    parents = [state.members[number] for number in state.front.numbers]
    weights = _weights(state, [p.cheap for p in parents], [p.cheap for p in parents])
    studied: dict[int, Anatomy] = {}
    fresh: set[str] = set()
    found: list[Child] = []
    counts = {"no_edit": 0, "limit": 0, "duplicate": 0}
    for _ in range(search.proposals):
        for _ in range(1 + MAX_REDRAWS):
            parent = parents[int(density.draw_with_replacement(weights, 1, rng)[0])]
            if parent.number not in studied:
                studied[parent.number] = morphisms.study(parent.graph, state.problem.signature)
            drawn = _mutate(state, studied[parent.number], rng)
            if drawn is None:
                counts["no_edit"] += 1
                continue
            edits, graph, cheap = drawn
            if not _within(state.problem, graph, cheap):
                counts["limit"] += 1
                continue
            name = digest(graph)
            if name in fresh or seen(name):
                counts["duplicate"] += 1
                continue
            fresh.add(name)
            found.append(Child(-1, parent.number, edits, graph, name, cheap, -1, parent.depth + 1))
            break
    before = state.redrawn
    return found, Drawn(
        before.no_edit + counts["no_edit"], before.limit + counts["limit"], before.duplicate + counts["duplicate"]
    )


def _mutate(
    state: State, anatomy: Anatomy, rng: np.random.Generator
) -> tuple[tuple[Edit, ...], Graph, tuple[float, ...]] | None:
    """1 to `max_edits` random edits (paper, section 4), the edited graph and its cheap objectives; None if illegal."""
    search = state.problem.config.search
    edits: list[Edit] = []
    signature = state.problem.signature
    count = int(rng.integers(1, search.max_edits + 1))
    for k in range(count):
        edit = morphisms.draw(anatomy, search.operators, rng)
        if edit is None:
            return None
        edits.append(edit)
        graph = morphisms.apply(anatomy, edit)
        facts = infer(graph, signature)
        if k + 1 < count:
            anatomy = morphisms.study(graph, signature)
    return tuple(edits), graph, objectives.measure(state.problem.cheap, facts)


def _accept(state: State, proposals: list[Child], n: int, rng: np.random.Generator) -> list[Child]:
    """Stage 2: `n` of the proposals, without replacement, where they and what is in flight are sparse."""
    if not proposals:
        return []
    search = state.problem.config.search
    fitted = proposals if search.child_density == "proposals" else list(state.members.values())
    if search.count_in_flight:
        fitted = [*fitted, *state.in_flight.values()]
    weights = _weights(state, [c.cheap for c in fitted], [c.cheap for c in proposals])
    return [proposals[k] for k in density.draw_without_replacement(weights, n, rng)]


def _weights(state: State, data: list[tuple[float, ...]], points: list[tuple[float, ...]]) -> density.Array:
    """Sampling probabilities over `points`: inverse density of `data` in log10 of the cheap objectives, or uniform."""
    if state.problem.config.search.sampling == "uniform":
        return np.full(len(points), 1 / len(points))
    return density.inverse_density(np.log10(np.array(data)), np.log10(np.array(points)))


# ---------------------------------------------------------------- tell


def tell(state: State, outcome: Outcome) -> State:
    """The state after one outcome; raises ValueError for a child that is not in flight.

    A generational search must be told in the order of child numbers (`next_to_tell`), so that timing cannot matter.
    """
    child = state.in_flight.get(outcome.number)
    if child is None:
        raise ValueError(f"child {outcome.number} is not in flight")
    in_flight = {number: c for number, c in state.in_flight.items() if number != outcome.number}
    state = replace(state, in_flight=in_flight, num_committed=state.num_committed + 1)
    if outcome.failure is not None:
        return replace(state, num_failed=state.num_failed + 1)
    front = pareto.insert(state.front, child.number, vector(state.problem, child.cheap, outcome.expensive))
    if front is state.front:
        return state
    known = {**state.members, child.number: child}
    return replace(state, front=front, members={number: known[number] for number in front.numbers})


def next_to_tell(state: State) -> int | None:
    """The only child whose outcome may be told now; None where any in flight may (steady state)."""
    if state.problem.config.search.mode == "generational" and state.in_flight:
        return min(state.in_flight)
    return None


def vector(fixed: Problem, cheap: tuple[float, ...], expensive: tuple[float, ...]) -> tuple[float, ...]:
    """Objective values in the configuration's order."""
    values = {"cheap": iter(cheap), "expensive": iter(expensive)}
    return tuple(float(next(values["cheap" if o.name in fixed.cheap else "expensive"])) for o in fixed.config.objectives)


def hypervolume(fixed: Problem, values: pareto.Array) -> float:
    """Hypervolume of objective vectors (n, d): error times decades of each cheap objective, up to the reference."""
    columns = [
        np.log10(values[:, k]) if objective.name in fixed.cheap else values[:, k]
        for k, objective in enumerate(fixed.config.objectives)
    ]
    return pareto.hypervolume(np.stack(columns, axis=1), fixed.reference) if len(values) else 0.0
