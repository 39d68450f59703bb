"""The crew on a cluster of fakes: nodes at fault, workers that end for no fault of theirs, caps, and what is spent."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.run import backends, budgets, chain, coordinator, crew, lease, session, status, worker
from lemonade_hpc.run.backends import NotNow
from lemonade_hpc.run.coordinator import RunFailed, Stopped
from lemonade_hpc.run.handle import WorkerHandle
from lemonade_hpc.run.history import Attempt, History
from lemonade_hpc.run.ledger import Halted, Superseded
from lemonade_hpc.run.log import LogWriter, Message
from lemonade_hpc.run.misfortunes import TOGETHER_S, Misfortunes

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

WORKERS = 3


class FakeCluster(doubles.FakeBackend):
    """Workers on nodes, each where the fewest are; `words(node, task)` is what happens to a task there."""

    excludes = lasting = True
    gpus = 2

    def __init__(
        self, run: Path, words: Callable[[str, Message], str | None] = lambda node, task: None, num_nodes: int = WORKERS
    ) -> None:
        super().__init__(run)
        self.words = words
        self.nodes = [f"n{k}" for k in range(num_nodes)]
        self.node_of: dict[str, str] = {}
        self.ends: dict[str, str | None] = {}
        """How workers ended, as far as Slurm has been asked."""
        self.avoided: list[set[str]] = []

    def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
        self.avoided.append(set(avoid))
        free = [node for node in self.nodes if node not in avoid]
        for name in names:
            taken = [self.node_of[one] for one in self.workers]
            node = min(free, key=taken.count)
            self.node_of[name] = node
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SLURMD_NODENAME", node)
                self.behave = lambda task, node=node: self.words(node, task)  # type: ignore[misc]
                behave = self.behave
                self.workers[name] = doubles.worker.Worker(
                    self.run, name, lambda epoch, behave=behave: doubles.FakeTrainer(self.run, behave)
                )

    def ended(self, name: str) -> str | None:
        return self.ends.get(name, "died")

    def adopt(self, name: str, launch: str, place: int) -> None:
        self.node_of.setdefault(name, "elsewhere")

    def last_output(self, name: str) -> str:
        return f"on {self.node_of[name]}"  # only of workers that it was told of


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.install(monkeypatch)


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


def settings(mode: str = "generational", children: int = 18, **cluster: Any) -> Any:
    return doubles.config(search={"mode": mode, "children": children}, cluster={"workers": WORKERS, **cluster})


def told(run: Path, kind: str) -> list[dict[str, Any]]:
    return doubles.events(run, settings(), kind)


def all_in_the_middle(made: coordinator.Coordinator, backend: FakeCluster, words: str) -> None:
    """Children are trained, then every worker has one that does not end: `words` happens to it."""
    while made.history.state.num_committed < 20:
        made._turn()
    backend.words = lambda node, task: words
    while not all(one._current for one in backend.workers.values()):
        made._turn()


class Hole(FakeCluster):
    """One node has all the free places, as long as it is not avoided; then another one."""

    free = "n0"

    def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
        self.nodes = ["n1"] if self.free in avoid else [self.free]
        super().launch(names, avoid)

    def at_work_on(self, node: str) -> list[str]:
        """Workers there that have a child in training."""
        return [name for name, one in self.workers.items() if one._current and self.node_of[name] == node]


# ---------------------------------------------------------------- nodes


def test_a_node_that_fails_everything_is_excluded_and_costs_no_child(run: Path) -> None:
    backend = FakeCluster(run, lambda node, task: "crash" if node == "n1" else None)
    notes = doubles.Notes()
    history = doubles.search(run, settings(), backend=backend, notes=notes)
    assert history.state.complete and history.state.num_failed == 0
    assert list(history.excluded) == ["n1"] and len(notes.about("node n1 gets no worker any more")) == 1
    crashed = [event["child"] for event in told(run, "lost") if event["kind"] == "crash"]
    assert len(crashed) == len(set(crashed)) == budgets.STRIKES  # each of them there, once
    assert all("n1" in avoided for avoided in backend.avoided[1:])
    undisturbed = doubles.search(run.with_name("other"), settings())
    assert doubles.front(history) == doubles.front(undisturbed)
    assert status.status(run)["nodes_excluded"].keys() == {"n1"}
    doubles.assert_sound(run)


@pytest.mark.parametrize("fall", [["n0", "n1"], ["n0"]])
def test_workers_that_fall_at_the_same_time_are_one_event(run: Path, fall: list[str]) -> None:
    """What they share was away for a moment, say; each node has three GPUs. It is seen of one after the other."""
    backend = FakeCluster(run, num_nodes=2)
    many = settings("steady_state", 60, workers=6)
    made = doubles.start(run, many, backend)
    all_in_the_middle(made, backend, "hang")
    for name in [name for name in backend.workers if backend.node_of[name] in fall]:
        backend.die(name)
        made._turn()
    for _ in range(3):
        made._turn()
    assert not made.history.excluded and all(len(events) == 1 for events in made.history.strikes.values())
    assert made.history.departures["died"] == 3 * len(fall)
    made.close()


def test_workers_that_died_with_their_coordinator_are_one_event(run: Path) -> None:
    """Its successor hears one after another what each of them had said."""
    backend = FakeCluster(run, num_nodes=2)
    many = settings("steady_state", 60, workers=6)
    first = doubles.start(run, many, backend)
    all_in_the_middle(first, backend, "hang")
    for name in [name for name in backend.workers if backend.node_of[name] == "n0"]:
        backend.die(name)
    second = doubles.start(run, many, backend)
    for _ in range(4):
        second._turn()
    assert [len(event) for event in second.history.strikes["n0"]] == [3] and not second.history.excluded
    second.close()


@pytest.mark.parametrize(
    ("spans", "together"),
    [
        ([(0, 100), (0, 130), (0, 100 + TOGETHER_S + 1), (0, 165)], [False, True, False, True]),
        ([(0, 100), (0, 140), (0, 180)], [False, True, False]),  # not one to the next: to the first
        ([(0, 100), (101, 102), (101, 103), (104, 105)], [False, False, True, False]),  # begun after the other fell
        ([(0, 3600), (0, 5 * 3600), (0, 9 * 3600)], [False, False, False]),  # begun together only
        ([(0, 100), (0, 10), (0, 100), (0, 11)], [False, False, True, True]),  # found later, silent long before
        ([None, None, None], [False, False, False]),
    ],
)
def test_who_falls_together(spans: list[tuple[float, float] | None], together: list[bool]) -> None:
    series = Misfortunes(Path(), settings().cluster, elsewhere=True)
    assert [series.fell_together(SimpleNamespace(node="n0", heard_s=one)) for one in spans] == together  # type: ignore[arg-type]
    assert not series.fell_together(SimpleNamespace(node="n1", heard_s=(0, 100)))  # type: ignore[arg-type]


def test_a_series_of_those_that_do_not_count_ends_no_run() -> None:
    series = Misfortunes(Path(), settings().cluster, elsewhere=True)
    assert not any(series.add("adopted", counts=False) for _ in range(100))
    assert [series.add("own", counts=True) for _ in range(10)] == [False] * 9 + [True] and series.count == 10


@pytest.mark.parametrize("workers", [3, 8])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_node_that_kills_what_begins_there_is_excluded_however_many_begin(
    run: Path, workers: int, at_once: bool
) -> None:
    """It is the one with free places, as its workers die: then all of them begin there, with the same children."""
    backend = Hole(run, lambda node, task: "long" if node == "n0" else None)
    made = doubles.start(run, settings("steady_state", 40, workers=workers), backend)
    fallen = 0
    while not made.history.state.complete:
        made._turn()
        lost = backend.at_work_on("n0")
        for name in lost if at_once else lost[:1]:
            backend.die(name)
            fallen += 1
    assert set(made.history.excluded) == {"n0"} and made.history.state.num_failed == 0
    assert fallen <= budgets.STRIKES * workers
    made.close()


def test_children_that_fell_together_are_not_to_blame_where_they_fall_next(run: Path) -> None:
    """All of one node did, for once; the node where they begin then kills whatever begins there."""
    backend = Hole(run)
    backend.free = "n1"
    made = doubles.start(run, settings("steady_state", 60), backend)
    all_in_the_middle(made, backend, "long")
    for name in list(backend.workers):
        backend.die(name)
    backend.free, backend.words = "n0", lambda node, task: "long" if node == "n0" else None
    while not made.history.state.complete:
        made._turn()
        for name in backend.at_work_on("n0")[:1]:
            backend.die(name)
    assert set(made.history.excluded) == {"n0"} and made.history.state.num_failed == 0
    made.close()


@pytest.mark.parametrize(
    ("events", "own_fault", "excluded"),
    [
        (["a", "b", "c"], "", True),
        (["a", "b"], "", False),
        (["abc"], "", False),
        (["abc", "abc", "abc"], "", True),
        (["ab", "ab", "ab"], "", False),
        (["abc", "d", "d"], "", False),  # one child that crashes again and again
        (["ab", "ab", "c"], "", True),
        (["a", "b", "c", "d"], "d", True),
        (["a", "b", "c"], "c", False),
        (["ac", "bc", "c"], "c", False),
    ],
)
def test_a_node_is_excluded_for_three_that_come_to_grief_one_after_another(
    events: list[str], own_fault: str, excluded: bool
) -> None:
    history = SimpleNamespace(
        strikes={"n0": [set(event) for event in events]}, own_fault=set(own_fault), fruitful=set(), excluded={}
    )
    assert [node for node, _ in budgets.bad_nodes(history)] == ["n0"] * excluded  # type: ignore[arg-type]


def test_a_node_on_which_one_worker_falls_after_another_is_excluded_soon(run: Path) -> None:
    """Tasks of one array that wait fall there next: the node with the free place is the one that kills."""
    backend = FakeCluster(run, num_nodes=3)
    made = doubles.start(run, settings("steady_state", 60, workers=3), backend)
    while made.history.state.num_committed < 10:
        made._turn()
    backend.words = lambda node, task: "long"
    fallen = 0
    while not made.history.excluded:
        made._turn()
        for name, one in list(backend.workers.items()):
            if one._current and backend.node_of[name] == "n0":
                backend.die(name)
                fallen += 1
        assert fallen <= budgets.STRIKES
    assert set(made.history.excluded) == {"n0"}
    made.close()


def test_workers_that_leave_a_coordinator_of_another_version_are_at_no_fault(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are their nodes; what they train is saved, and goes on elsewhere."""
    backend = FakeCluster(run, num_nodes=2)
    many = settings("steady_state", 60, workers=6)
    first = doubles.start(run, many, backend)
    all_in_the_middle(first, backend, "hang")
    first.stop_signal = 15
    with pytest.raises(Stopped):
        first._leave(15)
    first.close()
    assert all(one._current for one in backend.workers.values())
    monkeypatch.setattr(lease, "__version__", "9.9")
    monkeypatch.setattr(worker, "SAVE_S", 0.0)
    backend.words = lambda node, task: None
    second = doubles.start(run, many, backend)
    for _ in range(20):
        second._turn()
    assert second.history.departures[worker.OTHER] == 6
    assert not second.history.excluded and not second.history.strikes and second.history.last_fault is None
    second.close()


def test_a_worker_that_begins_on_an_excluded_node_is_ended(run: Path) -> None:
    """Its array was submitted before the node was known to be at fault."""

    class Stubborn(FakeCluster):
        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            super().launch(names, [] if len(self.avoided) < 3 else avoid)

    backend = Stubborn(run, lambda node, task: "crash" if node == "n0" else None)
    history = doubles.search(run, settings(), backend=backend)
    assert history.state.complete and history.state.num_failed == 0
    assert history.departures["on an excluded node"] > 1
    late = [name for name, node in backend.node_of.items() if node == "n0"][1:]
    assert late and not {event["worker"] for event in told(run, "attempt")} & set(late)


def test_a_node_where_no_worker_can_start_is_excluded(run: Path) -> None:
    backend = FakeCluster(run, lambda node, task: "unfit" if node == "n2" else None)
    history = doubles.search(run, settings(), backend=backend)
    assert history.state.num_failed == 0 and list(history.excluded) == ["n2"]
    assert "worker e1w" in history.excluded["n2"]


def test_a_node_where_no_worker_lives_to_say_a_word_is_excluded(run: Path) -> None:
    """Its jobs fail before the worker begins: where they ran is known from Slurm."""

    class Hole(FakeCluster):
        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            super().launch(names, avoid)
            for name in names:
                if self.node_of[name] == "n2":
                    path = self.run / files.done_log(name)
                    self.workers.pop(name)
                    path.write_bytes(b"")

        def node(self, name: str) -> str | None:
            return self.node_of[name]

    backend = Hole(run)
    history = doubles.search(run, settings(), backend=backend)
    assert history.state.complete and history.state.num_failed == 0 and list(history.excluded) == ["n2"]
    assert history.departures["died"] == budgets.STRIKES
    assert status.status(run)["nodes_excluded"].keys() == {"n2"}
    doubles.assert_sound(run)


def test_where_all_nodes_are_excluded_the_run_ends_with_what_happened_there(run: Path) -> None:
    class Full(FakeCluster):
        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            if len(avoid) == WORKERS:
                raise backends.Refused("Requested node configuration is not available")
            super().launch(names, avoid)

    said = r"no worker can be started: Requested node .*; excluded is n0: .*\. The last: .*cannot start .*\nno GPU"
    with pytest.raises(RunFailed, match=said):
        doubles.search(run, settings(), backend=Full(run, lambda node, task: "unfit"))
    assert doubles.load(run, settings()).history.excluded.keys() == {"n0", "n1", "n2"}


def test_a_person_who_starts_a_run_anew_may_have_mended_its_nodes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next coordinator of a chain is nobody who has."""

    def excluded(words: Callable[[str, Message], str | None], children: int) -> list[str]:
        return list(doubles.search(run, settings(children=children), backend=FakeCluster(run, words)).excluded)

    assert excluded(lambda node, task: "unfit" if node == "n2" else None, 18) == ["n2"]
    with monkeypatch.context() as patch:
        patch.setenv(chain.LINK, "1")
        assert excluded(lambda node, task: None, 24) == ["n2"]
    assert excluded(lambda node, task: None, 30) == []
    doubles.assert_sound(run)


def test_a_child_that_crashes_everywhere_is_itself_at_fault(run: Path) -> None:
    backend = FakeCluster(run, lambda node, task: "crash" if task["child"] in (5, 6, 7, 8) else None)
    history = doubles.search(run, settings(), backend=backend)
    assert [one["child"] for one in history.failures] == [5, 6, 7, 8] and history.excluded == {}
    by_child: dict[int, set[str]] = {}
    for event in told(run, "lost"):
        attempt = next(
            a for a in told(run, "attempt") if (a["child"], a["attempt"]) == (event["child"], event["attempt"])
        )
        by_child.setdefault(event["child"], set()).add(backend.node_of[attempt["worker"]])
    assert all(len(by_child[child]) == 3 for child in (5, 6, 7, 8))  # never twice on the same node


@pytest.mark.parametrize("crashing", [5, 7, 8])
def test_a_child_that_crashed_where_a_worker_is_idle_waits_for_another_node_in_peace(run: Path, crashing: int) -> None:
    """It was taken back from the busy worker for the idle one, and given to the busy one again, in every turn."""

    def words(node: str, task: Message) -> str | None:
        if node == "n1" and task["child"] > 3:
            return "long"
        return "crash" if task["child"] == crashing else None

    made = doubles.start(run, settings(workers=2), FakeCluster(run, words, num_nodes=2))
    for _ in range(200):
        made._turn()
    attempts = made.history.attempts[crashing]
    assert [one.node for one in attempts if one.lost == "crash"] == ["n0"] and attempts[-1].node == "n1"
    assert len(attempts) <= 3
    given = {handle.node: {number for number, _ in handle.tasks} for handle in made._crew.handles.values()}
    assert given == {"n0": set(), "n1": {4, crashing}}  # the others did not have to wait behind either
    made.close()


def test_the_only_node_is_not_excluded_for_its_children(run: Path) -> None:
    backend = FakeCluster(run, lambda node, task: "crash" if task["child"] > 12 else None, num_nodes=1)
    history = doubles.search(run, settings(), backend=backend)
    assert history.state.complete and history.excluded == {} and history.state.num_failed == 8


def test_a_cluster_where_nothing_works_ends_the_run(run: Path) -> None:
    with pytest.raises(RunFailed, match="no initial network is valid"):
        doubles.search(run, settings(), backend=FakeCluster(run, lambda node, task: "crash", num_nodes=9))


# ---------------------------------------------------------------- ends that are nobody's fault


def ending(run: Path, how: str, times: int) -> FakeCluster:
    """A cluster on which a worker ends so while it trains, several times."""
    backend = FakeCluster(run, lambda node, task: None)
    step = backend.step

    def step_and_end() -> None:
        step()
        for name, one in list(backend.workers.items()):
            if one._current is not None and len(backend.ends) < times:
                backend.ends[name] = how
                backend.die(name)

    backend.step = step_and_end  # type: ignore[method-assign]
    return backend


def killing(run: Path, how: str, when: Callable[[str, int], bool], num_nodes: int) -> FakeCluster:
    """A cluster on which the worker of a node dies so when it trains a child for which that holds."""
    backend = FakeCluster(run, lambda node, task: "long" if when(node, task["child"]) else None, num_nodes=num_nodes)
    step = backend.step

    def step_and_kill() -> None:
        step()
        for name, one in list(backend.workers.items()):
            if one._current is not None and when(backend.node_of[name], one._current["child"]):
                backend.ends[name] = how
                backend.die(name)

    backend.step = step_and_kill  # type: ignore[method-assign]
    return backend


@pytest.mark.parametrize("workers", [1, WORKERS, 6])
@pytest.mark.parametrize(
    ("how", "kind", "attempts", "says"),
    [("out of memory", "memory", 3, r"3 attempts .* is gone: out of memory; raise cluster.mem_gb"),
     ("died", "death", budgets.MAX_DEATHS + 1, r"6 attempts .* is gone: died$")],
)  # fmt: skip
def test_a_child_that_takes_its_worker_down_fails_and_nobody_else_pays(
    run: Path, workers: int, how: str, kind: str, attempts: int, says: str
) -> None:
    backend = killing(run, how, lambda node, child: child == 5, num_nodes=workers)
    history = doubles.search(run, settings(workers=workers), backend=backend)
    assert history.state.complete and history.excluded == {}
    (failure,) = [one["failure"] for one in history.failures]
    assert failure["kind"] == kind and re.search(says, failure["reason"]), failure
    assert len([event for event in told(run, "attempt") if event["child"] == 5]) == attempts
    doubles.assert_sound(run)


def test_a_job_that_was_ended_for_its_memory_is_known_by_its_log(run: Path) -> None:
    """Slurm calls it FAILED."""
    backend = killing(run, "died", lambda node, child: child == 5, WORKERS)
    said = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0."
    backend.last_output = lambda name: said  # type: ignore[method-assign]
    history = doubles.search(run, settings(), backend=backend)
    assert [one["failure"]["kind"] for one in history.failures] == ["memory"]
    assert history.departures["out of memory"] == 3


def test_a_node_where_workers_die_under_any_child_is_excluded(run: Path) -> None:
    backend = killing(run, "died", lambda node, child: node == "n1", num_nodes=WORKERS)
    history = doubles.search(run, settings(), backend=backend)
    assert history.state.complete and history.state.num_failed == 0 and list(history.excluded) == ["n1"]
    assert history.excluded["n1"].count("child ") == budgets.STRIKES


def test_workers_whose_submission_failed_are_no_misfortune_and_do_not_count(run: Path) -> None:
    class Closed(FakeCluster):
        num_tried = 0

        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            self.num_tried += 1
            if self.num_tried <= 15:  # more than misfortunes may be
                self.ends |= dict.fromkeys(names, "not started")
            else:
                super().launch(names, avoid)

    notes = doubles.Notes()
    history = doubles.search(run, settings(max_workers=WORKERS), backend=Closed(run), notes=notes)
    assert history.state.complete and history.num_launched == WORKERS and notes.notes == []


def test_a_child_that_crashed_waits_for_a_worker_that_may_never_start_for_some_time_only(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(FakeCluster):
        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            super().launch(names[: 1 - len(self.workers)], avoid)
            self.pending = set(names) - self.workers.keys()

        def alive(self, name: str) -> bool:
            return name in self.workers or name in self.pending

    first: set[int] = set()
    backend = Narrow(run, lambda node, task: "crash" if task["child"] == 1 and not first else None)
    made = doubles.start(run, settings(), backend)
    for _ in range(50):
        made._turn()
        first |= {1} & {number for number, tries in made.history.attempts.items() if any(one.lost for one in tries)}
    assert [one.lost for one in made.history.attempts[1]] == ["crash"]
    monkeypatch.setattr(crew, "ELSEWHERE_S", 0.0)
    for _ in range(50):
        made._turn()
    assert made.history.state.num_committed > 2
    made.close()


@pytest.mark.parametrize("how", ["preempted", "node failure", "time limit"])
def test_workers_that_end_for_no_fault_of_theirs_are_replaced_and_end_no_run(run: Path, how: str) -> None:
    """However many in a row: the limit on misfortunes is 9 here."""
    backend = ending(run, how, times=15)
    notes = doubles.Notes()
    history = doubles.search(run, settings(), backend=backend, notes=notes)
    assert history.state.complete and history.state.num_failed == 0 and history.excluded == {}
    assert history.departures[how] == 15 and len(notes.about(f": {how}")) == 15
    assert doubles.front(history) == doubles.front(doubles.search(run.with_name("other"), settings()))


def test_a_worker_whose_end_is_on_record_is_not_asked_after_again(run: Path) -> None:
    """It has reported on a child, which waits for an earlier one; then it died, and later its coordinator."""
    backend = FakeCluster(run, lambda node, task: "long" if task["child"] == 4 else None)
    made = doubles.start(run, settings(), backend)
    while 5 not in made._arrived:
        made._turn()
    (name,) = [one.worker for one in made.history.attempts[5]]
    backend.die(name)
    made._turn()
    (left,) = [event for event in told(run, "left") if event["worker"] == name]
    made._crew.close()
    made._ledger.close()
    history = doubles.search(run, settings(), backend=FakeCluster(run))
    assert history.state.complete and [e for e in told(run, "left") if e["worker"] == name] == [left]
    assert sum(history.departures.values()) == history.num_launched


def test_a_worker_whose_end_is_on_record_gets_no_child(run: Path) -> None:
    """Files may be seen late here, so its last words are waited for; it is no worker that a child could be given to."""
    backend = FakeCluster(run, lambda node, task: "long" if task["child"] == 4 else None)
    made = doubles.start(run, settings(), backend)
    while 5 not in made._arrived:
        made._turn()
    (name,) = [one.worker for one in made.history.attempts[5]]
    backend.die(name)
    made._turn()
    assert name not in made.history.workers
    made._crew.close()
    made._ledger.close()
    later = doubles.start(run, settings(stale_s=60.0), FakeCluster(run))
    assert later._crew.handles[name].present and not later._crew.handles[name].tasks
    later._crew.handles = {name: later._crew.handles[name]}  # there is no other one
    number = min(later.history.state.in_flight)
    before = list(later.history.attempts[number])
    later._crew.hand_out([number], ahead=99)
    assert later.history.attempts[number] == before
    later._crew.close()
    later._ledger.close()


def test_a_worker_whose_end_is_not_known_yet_is_not_replaced(run: Path) -> None:
    """It may have been cancelled by a person. Its children go elsewhere at once."""
    backend = FakeCluster(run, lambda node, task: "long")
    made = doubles.start(run, settings(), backend)
    for _ in range(3):
        made._turn()
    backend.ends["e1w00"] = None
    backend.die("e1w00")
    for _ in range(5):
        made._turn()
    assert len(made._crew.handles) == 2 and [event["kind"] for event in told(run, "lost")] == ["worker"]
    backend.ends["e1w00"] = "preempted"
    for _ in range(3):
        made._turn()
    assert len(made._crew.handles) == 3
    made.close()


def test_a_cancelled_worker_is_not_replaced(run: Path) -> None:
    backend = ending(run, "cancelled", times=2)
    notes = doubles.Notes()
    history = doubles.search(run, settings(), backend=backend, notes=notes)
    assert history.state.complete and history.state.num_failed == 0
    assert len(notes.about("was cancelled from outside: no other is started in its place")) == 2
    assert history.num_launched == WORKERS


def test_when_every_worker_is_cancelled_the_run_stops_and_can_go_on(run: Path) -> None:
    with pytest.raises(Stopped, match=r"every worker was cancelled \(3\)"):
        doubles.search(run, settings(), backend=ending(run, "cancelled", times=3))
    history = doubles.search(run, settings())
    assert history.state.complete
    doubles.assert_sound(run)


def test_workers_that_were_cancelled_before_a_coordinators_life_are_replaced(run: Path) -> None:
    """`cancel`, and then the same command: it is to go on with as many as before."""
    backend = FakeCluster(run, lambda node, task: "long")
    made = doubles.start(run, settings(), backend)
    for _ in range(3):
        made._turn()
    made._ledger.close()
    after = FakeCluster(run)
    after.ends = dict.fromkeys(backend.workers, "cancelled")
    history = doubles.search(run, settings(), backend=after)
    assert history.state.complete and history.departures["cancelled"] == WORKERS
    assert history.num_launched == 2 * WORKERS


def test_a_worker_that_has_waited_since_before_and_is_cancelled_now_is_not_replaced(run: Path) -> None:
    class Waiting(FakeCluster):
        def seen(self, name: str) -> bool:
            return name in self.ends

    made = doubles.start(run, settings(), FakeCluster(run, lambda node, task: "long"))
    for _ in range(3):
        made._turn()
    made._ledger.close()
    after = Waiting(run)
    after.ends = {"e1w00": "cancelled"}
    history = doubles.search(run, settings(), backend=after)
    assert history.state.complete and history.num_launched == 2 * WORKERS - 1


def test_a_worker_that_was_told_to_leave_is_at_no_fault(run: Path) -> None:
    """Its coordinator died before it had heard that."""
    made = doubles.start(run, settings(), backend := FakeCluster(run, lambda node, task: "long"))
    for _ in range(3):
        made._turn()
    for handle in made._crew.handles.values():
        handle.stop()
    made._ledger.close()
    backend.step()
    history = doubles.search(run, settings())
    assert history.state.complete and history.departures == {"stopped by the coordinator": 2 * WORKERS}
    assert not history.strikes and {event["fault"] for event in told(run, "left")} == {None}


def test_a_worker_that_there_is_no_room_for_leaves_no_mailbox(run: Path) -> None:
    class Full(FakeCluster):
        num_refused = 0

        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            if self.num_refused < 2:
                self.num_refused += 1
                raise NotNow("no room")
            super().launch(names, avoid)

    assert doubles.search(run, settings(), backend=Full(run)).state.complete
    boxes = sorted(path.name for path in (run / files.epoch_folder(1) / "workers").iterdir())
    assert boxes == sorted(path.name for path in (run / files.WORKERS).iterdir()) and len(boxes) == WORKERS


def folders_of_workers(run: Path) -> set[str]:
    """Names of workers that have a folder of their own, or a mailbox."""
    kept = [*(run / files.WORKERS).iterdir(), *run.glob("epochs/*/workers/*")]
    return {path.name for path in kept}


def test_workers_that_sbatch_refuses_for_good_never_were(run: Path) -> None:
    """Their account has expired, say: once that is mended, as many may be started as before."""

    class Expired(FakeCluster):
        refuses = True

        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            if self.refuses:
                raise backends.Refused("Invalid account")
            super().launch(names, avoid)

    capped = settings(max_workers=WORKERS)
    backend = Expired(run)
    with pytest.raises(RunFailed, match="no worker can be started: Invalid account"):
        doubles.search(run, capped, backend=backend)
    history = doubles.load(run, capped).history
    assert history.num_launched == 0 and not history.departures and not folders_of_workers(run)
    backend.refuses = False
    assert doubles.search(run, capped, backend=backend).state.complete


def test_workers_that_slurm_may_have_taken_and_has_not_leave_nothing_behind(run: Path) -> None:
    """sbatch failed in a way that may pass, again and again: a partition is drained for days."""

    class Drained(FakeCluster):
        launches = 0

        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            self.launches += 1
            if self.launches > 20:
                super().launch(names, avoid)
            else:
                self.ends |= dict.fromkeys(names, "not started")

    backend = Drained(run)
    history = doubles.search(run, settings(), backend=backend)
    assert history.state.complete and backend.launches > 20 and history.num_launched == WORKERS
    assert folders_of_workers(run) == set(backend.node_of)


class TooSmall(FakeCluster):
    """Workers that run out of memory under one child."""

    def __init__(self, run: Path, child: int) -> None:
        super().__init__(run, lambda node, task: "hang" if task["child"] == child else None)
        self.child = child

    def step(self) -> None:
        super().step()
        for name, one in list(self.workers.items()):
            if one._current is not None and one._current["child"] == self.child:
                self.ends[name] = budgets.OUT_OF_MEMORY
                self.die(name)


@pytest.mark.parametrize("retries", [0, 9])
def test_a_child_that_takes_too_much_memory_is_given_up_before_its_run(run: Path, retries: int) -> None:
    child = 5

    backend = TooSmall(run, child)
    history = doubles.search(run, settings(workers=1, retries=retries), backend=backend)
    assert [one["child"] for one in history.failures] == [child]
    assert history.departures[budgets.OUT_OF_MEMORY] == retries + 1


def test_a_last_child_that_fails_with_the_last_worker_completes_the_run(run: Path) -> None:
    """Nobody needs another worker for nothing."""
    last = 8

    capped = settings("steady_state", 6, workers=1, max_workers=3, retries=2)
    backend = TooSmall(run, last)
    history = doubles.search(run, capped, backend=backend)
    assert history.complete is not None and history.num_launched == 3
    assert [one["child"] for one in history.failures] == [last] == [max(range(history.state.num_asked))]


def test_where_no_worker_was_ever_heard_of_the_run_folder_is_asked_after(run: Path) -> None:
    class Blind(FakeCluster):
        said = ""

        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            self.node_of |= dict.fromkeys(names, "nowhere")

        def last_output(self, name: str) -> str:
            return self.said

    with pytest.raises(
        RunFailed, match=r"10 workers in a row .*None has ever been heard of: can the nodes see and write /"
    ):
        doubles.search(run, settings(), backend=Blind(run))
    Blind.said = "no such module"  # which came to the run folder
    with pytest.raises(RunFailed, match=r"10 workers in a row .* died: no such module$"):
        doubles.search(run, settings(), backend=Blind(run))


# ---------------------------------------------------------------- budgets


def test_losses_that_took_a_child_further_do_not_count_but_crashes_do() -> None:
    losses = [("worker", 0.0), ("worker", 0.2), ("walltime", 0.2), ("walltime", 0.5), ("crash", 0.9), ("crash", 0.95)]
    assert budgets.charged(losses) == Counter(worker=1, walltime=1, crash=2)


def test_a_child_that_gets_no_further_in_a_workers_time_fails_and_says_what_to_do(run: Path) -> None:
    made = doubles.start(run, settings(), FakeCluster(run))
    made._turn()
    history: History = made.history
    history.attempts[1] = [Attempt(f"a{k}", "w", lost="walltime", reason="gone", done=0.5) for k in range(4)]
    (failure,) = budgets.spent(history, retries=2)
    assert failure["failure"]["kind"] == "walltime"
    assert failure["failure"]["reason"].startswith("3 attempts ended so; the last one: gone; raise cluster.time_min")
    assert not list(budgets.spent(history, retries=3))
    made.close()


def test_no_more_workers_are_started_than_the_run_may(run: Path) -> None:
    with pytest.raises(Stopped, match="max_workers: 5 workers have been started"):
        doubles.search(run, settings(max_workers=5), backend=ending(run, "preempted", times=99))
    assert doubles.load(run, settings()).history.num_launched == 5
    assert doubles.search(run, settings(max_workers=50)).state.complete


def test_when_the_gpu_hours_are_spent_children_in_training_end_and_the_run_stops(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeCluster(run)
    real = crew.Crew.spent_s
    monkeypatch.setattr(crew.Crew, "spent_s", lambda self: real(self) + 600 * self._ledger.history.state.num_committed)
    capped = settings(max_gpu_hours=1)
    with pytest.raises(Stopped, match=r"max_gpu_hours: 1 GPU-hours are spent, .*raise it to go on"):
        doubles.search(run, capped, backend=backend)
    history = doubles.load(run, capped).history
    assert 6 <= history.state.num_committed <= 6 + WORKERS and not history.state.complete
    assert {event["kind"] for event in told(run, "lost")} <= {"stopped"} and not backend.workers
    monkeypatch.undo()
    doubles.install(monkeypatch)
    assert doubles.search(run, settings(max_gpu_hours=2)).state.complete
    doubles.assert_sound(run)


@pytest.mark.parametrize("cap", [{"max_workers": WORKERS}, {"max_gpu_hours": 1}])
def test_a_limit_that_is_reached_with_the_last_child_stops_no_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, cap: dict[str, int]
) -> None:
    """Every worker is gone by then."""
    backend = FakeCluster(run)
    step = backend.step

    def step_and_leave() -> None:
        step()
        state = made.history.state
        idle = all(one._current is None and not one._queue for one in backend.workers.values())
        if state.num_committed + len(state.in_flight) == 18 + 3 and idle:
            backend.workers.clear()

    backend.step = step_and_leave  # type: ignore[method-assign]
    made = doubles.start(run, settings(**cap), backend)
    real = made._crew.spent_s
    monkeypatch.setattr(made._crew, "spent_s", lambda: real() + 3600 * made.history.state.complete)
    made.search()
    made.close()
    assert made.history.complete is not None


# ---------------------------------------------------------------- what is spent


REPORTS: list[Message] = [
    {"say": "hello", "at": 0.0, "node": "n3"},
    {"say": "started", "at": 10.0, "child": 1, "attempt": "a"},
    {"say": "outcome", "at": 40.0, "outcome": {}},
    {"say": "started", "at": 50.0, "child": 2, "attempt": "a"},
    {"say": "checkpoint", "at": 65.0, "child": 2, "attempt": "a", "done": 0.25},
    {"say": "alive", "at": 70.0},
]


@pytest.mark.parametrize("last", [[], [{"say": "crashed", "at": 71.0, "child": 2, "attempt": "a", "reason": ""}]])
def test_a_worker_tells_how_long_it_lived_trained_and_what_is_lost_with_it(tmp_path: Path, last: list[Message]) -> None:
    (tmp_path / files.done_log("w")).parent.mkdir(parents=True)
    with LogWriter(tmp_path / files.done_log("w")) as log:
        log.append([*REPORTS, *last, {"say": "alive", "at": 90.0}])
    handle = WorkerHandle(tmp_path, None, "w")
    handle.hear()
    assert (handle.node, handle.lived_s, handle.busy_s) == ("n3", 90.0, 30 + (21 if last else 40))
    assert handle.unsaved_s((2, "a")) == (6 if last else 25) and handle.done[2, "a"] == 0.25


def test_usage_adds_up_over_workers_and_gpus(run: Path) -> None:
    made = doubles.start(run, settings(), FakeCluster(run))
    made._turn()
    history = made.history
    left = {"event": "left", "how": "idle", "fault": None, "lived_s": 3600.0, "busy_s": 1800.0}
    history.apply(left | {"worker": "e1w00"})
    history.attempts[1] = [Attempt("a", "e1w01")]
    lost = {"event": "lost", "child": 1, "attempt": "a", "kind": "crash", "reason": "", "seconds": 360.0, "done": 0.0}
    history.apply(lost)
    two = [{"name": "e1w01", "lived_s": 1800.0, "busy_s": 1800.0}, {"name": "e1w02", "lived_s": 0.0, "busy_s": 0.0}]
    assert status._usage(history, two) == {"unit": "GPU-hours", "spent": 3.0, "wasted": 0.2, "idle": 1.0}
    made.close()


# ---------------------------------------------------------------- a coordinator that leaves


def reversed_order(run: Path, children: int = 18) -> tuple[coordinator.Coordinator, FakeCluster]:
    """One in generational mode that has the outcome of a later child, and not that of an earlier one."""
    backend = FakeCluster(run, lambda node, task: "long" if task["child"] == 4 else None)
    made = doubles.start(run, settings(children=children), backend)
    while not made._arrived:
        made._turn()
    return made, backend


def test_a_drained_run_stops_though_it_has_outcomes_that_cannot_be_told_yet(run: Path) -> None:
    """The one before them was given back, or its worker has died: whoever goes on finds them."""
    made, backend = reversed_order(run)
    (run / files.stop_order(1)).write_bytes(b".")
    (name,) = [name for name, one in backend.workers.items() if one._current and one._current["child"] == 4]
    backend.die(name)
    with pytest.raises(Stopped, match="stopped by `lemonade-hpc stop`"):
        made.search()
    arrived = set(made._arrived)
    assert arrived
    made.halted = True
    made.close()
    history = doubles.search(run, settings())
    assert doubles.front(history) == doubles.front(doubles.search(run.with_name("other"), settings()))
    attempts = Counter(event["child"] for event in told(run, "attempt"))
    assert {attempts[child] for child in arrived} == {1}


def test_a_signal_does_not_undo_a_stop(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked, given out or submitted any more, and no successor goes on by itself."""
    made, backend = reversed_order(run, children=60)
    (run / files.stop_order(1)).write_bytes(b".")
    made._turn()
    before = len(told(run, "attempt")), made.history.num_launched, made.history.state.num_asked
    made.stop_signal = 10
    with pytest.raises(Halted, match="stopped by `lemonade-hpc stop`") as stopped:
        made.search()
    assert before == (len(told(run, "attempt")), made.history.num_launched, made.history.state.num_asked)
    made.why, made.halted = str(stopped.value), True
    made.close()
    with monkeypatch.context() as patch:
        patch.setenv(chain.LINK, "next")
        patch.setattr(chain.queue, "ask", lambda *command: "")
        with pytest.raises(Halted, match="stopped by `lemonade-hpc stop`"):
            doubles.search(run, settings(children=60))
    assert doubles.search(run, settings(children=60)).state.complete


def test_a_run_that_has_failed_keeps_no_workers(run: Path) -> None:
    """They would wait for ten minutes, each with a GPU."""
    backend = FakeCluster(run, lambda node, task: "fail")
    with pytest.raises(RunFailed, match="no initial network is valid"):
        doubles.search(run, settings(), backend=backend)
    assert not backend.workers and doubles.load(run, settings()).history.workers == {}


def test_who_stops_a_search_at_the_terminal_is_told_of_the_workers_that_go_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = doubles.config(cluster={"backend": "slurm", "workers": WORKERS, "stale_s": 0})
    monkeypatch.setattr(session, "_check_backend", lambda config: None)
    backend, notes = FakeCluster(run, lambda node, task: "long"), doubles.Notes()
    turn = coordinator.Coordinator._turn

    def interrupted(self: coordinator.Coordinator) -> None:
        turn(self)
        if len([one for one in self._crew.handles.values() if one.present]) == WORKERS:
            self.stop_signal = 2

    def superseded(self: coordinator.Coordinator) -> None:
        raise Superseded("another one")

    monkeypatch.setattr(coordinator.Coordinator, "_turn", interrupted)
    for link in (False, True):
        with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped by SIGINT"):
            if link:
                patch.setenv(chain.LINK, "next")
            doubles.search(run, chosen, backend=backend, notes=notes)
    monkeypatch.setattr(coordinator.Coordinator, "_turn", superseded)
    with pytest.raises(Superseded):  # whose workers have another coordinator
        doubles.search(run, chosen, backend=backend, notes=notes)
    (note,) = notes.about("3 workers go on: they end what they have, and leave when they have waited for 10 minutes")
    assert note.endswith(f"lemonade-hpc cancel {run} ends them at once")


def test_the_status_says_why_workers_come_to_grief_until_a_child_is_trained(run: Path) -> None:
    made = doubles.start(run, settings(), backend := FakeCluster(run, lambda node, task: "long"))
    made._turn()
    made._turn()
    backend.die("e1w00")
    for _ in range(3):
        made._turn()
    assert status.status(run)["last_fault"] == "worker e1w00 died: on n0"
    made._crew.close()
    made._ledger.close()
    doubles.search(run, settings())
    assert status.status(run)["last_fault"] is None


def test_a_coordinator_that_must_leave_does_not_ask_slurm(run: Path) -> None:
    backend = FakeCluster(run, lambda node, task: "long")
    made = doubles.start(run, settings(), backend)
    made._turn()
    backend.step = lambda: pytest.fail("Slurm may take a minute to answer")  # type: ignore[method-assign]
    made.stop_signal = 10
    with pytest.raises(Stopped, match="stopped by SIGUSR1"):
        made.search()
    made.close()


def leaving(run: Path, chosen: Any) -> coordinator.Coordinator:
    """One that is stopped by a signal when some children are done, its workers busy."""
    backend = FakeCluster(run, lambda node, task: "long" if task["child"] > 7 else None)
    made = doubles.start(run, chosen, backend)
    made.stop_signal = None
    while made.history.state.num_committed < 7:
        made._turn()
    made.stop_signal = 10
    with pytest.raises(Stopped, match="stopped by SIGUSR1"):
        made.search()
    return made


def test_a_coordinator_that_leaves_gives_workers_that_go_on_enough_to_do(run: Path) -> None:
    made = leaving(run, settings("steady_state", children=100))
    given = [len(handle.tasks) for handle in made._crew.handles.values()]
    assert len(given) == WORKERS and min(given) == coordinator.FILL_AHEAD
    made.close()
    assert doubles.search(run, settings("steady_state", children=100)).state.complete
    doubles.assert_sound(run)


def test_in_generational_mode_it_can_give_no_more_than_the_generation_holds(run: Path) -> None:
    made = leaving(run, settings("generational", children=100))
    assert sum(len(handle.tasks) for handle in made._crew.handles.values()) == len(made.history.state.in_flight) <= 6
    made.close()
    history = doubles.search(run, settings("generational", children=100))
    other = doubles.search(run.with_name("other"), settings("generational", children=100))
    assert doubles.front(history) == doubles.front(other)


@pytest.mark.parametrize(("wall_s", "expected"), [(1e-3, coordinator.FILL_AHEAD), (4000.0, 4), (1e9, 1)])
def test_as_many_children_as_fit_a_workers_time_are_worth_giving(run: Path, wall_s: float, expected: int) -> None:
    made = doubles.start(run, settings(time_min=240), FakeCluster(run))
    while made.history.state.num_committed < 3:
        made._turn()
    made.history.wall_s = made.history.state.num_committed * wall_s
    assert made._worth_filling() == expected
    made.close()


@pytest.mark.parametrize(("wall_s", "expected"), [(0.0, 2), (1e9, 2), (1.0, 3), (0.5, 5), (1e-9, 6)])
def test_short_children_are_handed_out_by_the_handful(run: Path, wall_s: float, expected: int) -> None:
    """One in training, and as many as it ends in two of the coordinator's turns."""
    backend = FakeCluster(run, lambda node, task: "long" if task["child"] > 35 else None)
    made = doubles.start(run, settings("steady_state", children=400, poll_s=1.0), backend)
    for _ in range(60):
        made._turn()
    assert made.history.state.num_committed == 36  # so all workers together may have 18
    assert {len(one.tasks) for one in made._crew.handles.values()} == {5}  # for a fake child takes half a second
    made.history.wall_s = made.history.state.num_committed * wall_s
    assert made._ahead() == expected
    made.close()
