"""LEMONADE as two pure functions: `ask` for children, `tell` an outcome.

Decides: who becomes a parent, which proposals are trained, what the front is (paper, Algorithm 1), when a search is
over. Knows no weights, no files, no Slurm, no clock: the record replays it, and a test runs 10^5 children through it.
Every decision draws from its own stream, `default_rng([seed, purpose, number])`; no generator state is kept. The cost
of both functions does not grow with history: whether a network was seen before is a function handed in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import inf

import numpy as np

from lemonade_hpc.config import Config
from lemonade_hpc.search import density, morphisms, objectives, pareto, spaces
from lemonade_hpc.search.graph import Graph, digest, infer
from lemonade_hpc.search.morphisms import Anatomy, Edit
from lemonade_hpc.search.ops import Facts, Signature

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

    @cached_property
    def cheap(self) -> tuple[str, ...]:
        """Names of the cheap objectives."""
        return tuple(objective.name for objective in self.config.cheap)

    @cached_property
    def limits(self) -> Mapping[str, tuple[float, float]]:
        """Least and most of each cheap objective; the space's smallest network counts where params has no `min`."""
        found: dict[str, tuple[float, float]] = {o.name: (o.min or 0.0, o.max or inf) for o in self.config.cheap}
        if all(o.name != "params" or o.min is None for o in self.config.cheap):
            found["params"] = (float(spaces.min_params(self.signature)), found.get("params", (0.0, inf))[1])
        return found


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
class Parents:
    """The front's members as parents: made when the front changes, and not again at every ask."""

    children: tuple[Child, ...] = ()
    anatomies: tuple[Anatomy, ...] = ()

    @cached_property
    def weights(self) -> density.Array:
        """Probabilities in inverse proportion to density."""
        return _weights(self.children, self.children)


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
    parents: Parents = field(default_factory=Parents, compare=False, repr=False)
    """What follows from `members`."""

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
    names = [objective.name for objective in config.cheap]
    sizes = [objectives.measure(names, infer(graph, signature)) for graph in spaces.initial(signature)]
    largest = dict(zip(names, map(max, zip(*sizes, strict=True)), strict=True))
    reference = (
        float(np.log10(o.max or 4 * largest[o.name])) if o.name in largest else majority_error
        for o in config.objectives
    )
    made = Problem(config, signature, tuple(reference))
    if not _initial(made):
        allowed = ", ".join(f"{name} in [{least:g}, {most:g}]" for name, (least, most) in made.limits.items())
        given = "; ".join(", ".join(f"{n} {v:g}" for n, v in zip(names, size, strict=True)) for size in sizes)
        least = (
            f"{spaces.min_params(signature)} parameters are the least on images of this size, unless params has a min"
        )
        raise ValueError(f"objectives: no initial network satisfies {allowed}; they have {given} ({least})")
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
    """The state after an ask that returned these children: what `ask` does once it has decided; a replay repeats it."""
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
        facts = infer(graph, fixed.signature)
        if _within(fixed, facts):
            cheap = objectives.measure(fixed.cheap, facts)
            children.append(Child(len(children), None, (), graph, digest(graph), cheap, 0, 0))
    return tuple(children)


def _within(fixed: Problem, facts: Mapping[int, Facts]) -> bool:
    """Whether a network keeps the hard limits."""
    return all(least <= objectives.CHEAP[name](facts) <= most for name, (least, most) in fixed.limits.items())


def _propose(state: State, rng: np.random.Generator, seen: Callable[[str], bool]) -> tuple[list[Child], Drawn]:
    """Stage 1: `proposals` candidates that are new, different and within the limits; their numbers are not final."""
    fixed = state.problem
    found: dict[str, Child] = {}
    redrawn: Counter[str] = Counter()
    drawn = _drawn(state, rng)
    for _ in range(fixed.config.search.proposals):
        for parent, anatomy in islice(drawn, 1 + MAX_REDRAWS):
            edits, changed = _mutate(fixed, anatomy, rng)
            if not edits:
                redrawn["no_edit"] += 1
            elif not _within(fixed, changed.facts):
                redrawn["limit"] += 1
            elif (name := digest(changed.graph)) in found or seen(name):
                redrawn["duplicate"] += 1
            else:
                cheap = objectives.measure(fixed.cheap, changed.facts)
                found[name] = Child(-1, parent.number, edits, changed.graph, name, cheap, -1, parent.depth + 1)
                break
    before = state.redrawn
    return list(found.values()), Drawn(
        before.no_edit + redrawn["no_edit"],
        before.limit + redrawn["limit"],
        before.duplicate + redrawn["duplicate"],
    )


def _drawn(state: State, rng: np.random.Generator) -> Iterator[tuple[Child, Anatomy]]:
    """Parents without end, drawn with replacement, a block at a time."""
    search, parents = state.problem.config.search, state.parents
    weights = _even(parents.children) if search.sampling == "uniform" else parents.weights
    while True:
        for k in density.draw_with_replacement(weights, search.proposals, rng).tolist():
            yield parents.children[k], parents.anatomies[k]


def _mutate(fixed: Problem, anatomy: Anatomy, rng: np.random.Generator) -> tuple[tuple[Edit, ...], Anatomy]:
    """1 to `max_edits` random edits (paper, section 4) and what they make of a network; none if one is impossible."""
    search = fixed.config.search
    edits: list[Edit] = []
    for _ in range(1 + int(rng.random() * search.max_edits)):
        made = morphisms.mutate(anatomy, search.operators, rng)
        if made is None:
            return (), anatomy
        edits.append(made[0])
        anatomy = made[1]
    return tuple(edits), anatomy


def _accept(state: State, proposals: list[Child], n: int, rng: np.random.Generator) -> list[Child]:
    """Stage 2: `n` of the proposals, without replacement, where they and what is in flight are sparse."""
    if not proposals:
        return []
    search = state.problem.config.search
    fitted = proposals if search.child_density == "proposals" else list(state.members.values())
    if search.count_in_flight:
        fitted = [*fitted, *state.in_flight.values()]
    weights = _even(proposals) if search.sampling == "uniform" else _weights(fitted, proposals)
    return [proposals[k] for k in density.draw_without_replacement(weights, n, rng)]


def _weights(fitted: Sequence[Child], drawn: Sequence[Child]) -> density.Array:
    """Probabilities over `drawn`: inverse density of `fitted`, in log10 of the cheap objectives."""
    data, points = (np.log10(np.array([child.cheap for child in children])) for children in (fitted, drawn))
    return density.inverse_density(data, points)


def _even(drawn: Sequence[Child]) -> density.Array:
    """Equal probabilities: the ablation `sampling: uniform`."""
    return np.full(len(drawn), 1 / len(drawn))


# ---------------------------------------------------------------- tell


def tell(state: State, outcome: Outcome) -> State:
    """The state after one outcome; raises ValueError for a child that is not in flight or whose turn it is not.

    A generational search must be told in the order of child numbers (`next_to_tell`), so that timing cannot matter.
    """
    child = state.in_flight.get(outcome.number)
    if child is None:
        raise ValueError(f"child {outcome.number} is not in flight")
    if next_to_tell(state) not in (None, child.number):
        raise ValueError(f"child {child.number} is told before child {next_to_tell(state)}; a generation has an order")
    in_flight = {number: c for number, c in state.in_flight.items() if number != child.number}
    state = replace(state, in_flight=in_flight, num_committed=state.num_committed + 1)
    if outcome.failure is not None:
        return replace(state, num_failed=state.num_failed + 1)
    front = pareto.insert(state.front, child.number, vector(state.problem, child.cheap, outcome.expensive))
    return state if front is state.front else _enter(state, front, child)


def _enter(state: State, front: pareto.Front, child: Child) -> State:
    """The state with a front that a child has entered."""
    known = {**state.members, child.number: child}
    members = {number: known[number] for number in front.numbers}
    parents = state.parents
    anatomies = {c.number: anatomy for c, anatomy in zip(parents.children, parents.anatomies, strict=True)}
    anatomies[child.number] = morphisms.study(child.graph, state.problem.signature)
    parents = Parents(tuple(members.values()), tuple(anatomies[number] for number in front.numbers))
    return replace(state, front=front, members=members, parents=parents)


def next_to_tell(state: State) -> int | None:
    """The only child whose outcome may be told now; None where any in flight may (steady state)."""
    if state.problem.config.search.mode == "generational" and state.in_flight:
        return min(state.in_flight)
    return None


def vector(fixed: Problem, cheap: tuple[float, ...], expensive: tuple[float, ...]) -> tuple[float, ...]:
    """Objective values in the configuration's order; raises ValueError where one is missing or too many."""
    names = [objective.name for objective in fixed.config.objectives]
    if (len(cheap), len(expensive)) != (len(fixed.cheap), len(names) - len(fixed.cheap)):
        raise ValueError(f"expected values of {', '.join(names)}, got cheap {cheap} and expensive {expensive}")
    left = {True: iter(cheap), False: iter(expensive)}
    return tuple(float(next(left[name in fixed.cheap])) for name in names)


def hypervolume(fixed: Problem, values: pareto.Array) -> float:
    """Hypervolume of objective vectors (n, d): error times decades of each cheap objective, up to the reference."""
    columns = [
        np.log10(values[:, k]) if objective.name in fixed.cheap else values[:, k]
        for k, objective in enumerate(fixed.config.objectives)
    ]
    return pareto.hypervolume(np.stack(columns, axis=1), fixed.reference) if len(values) else 0.0
