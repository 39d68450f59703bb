"""The coordinator on a real run folder, with workers that answer at once: completeness, losses, fences, files."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lemonade_hpc import files
from lemonade_hpc.run import budgets, coordinator, crew, population, status
from lemonade_hpc.run import history as histories
from lemonade_hpc.run.coordinator import RunFailed, Stopped
from lemonade_hpc.run.handle import WorkerHandle
from lemonade_hpc.run.log import LogWriter, Message
from lemonade_hpc.search import evolution

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

SETTINGS = doubles.config()
NUM = 18 + 3  # children and initial networks


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.install(monkeypatch)


@pytest.fixture
def run() -> Iterator[Path]:
    with doubles.folder() as made:
        yield made


def committed(run: Path, settings: Any = SETTINGS) -> list[dict[str, Any]]:
    return [event["outcome"] for event in doubles.events(run, settings, "committed")]


def lost(run: Path, settings: Any = SETTINGS) -> list[tuple[int, str]]:
    return [(event["child"], event["kind"]) for event in doubles.events(run, settings, "lost")]


def present(run: Path) -> list[int]:
    """Children with a folder."""
    return sorted(int(path.name) for path in (run / files.CHILDREN).glob("*/*"))


# ---------------------------------------------------------------- completeness


@pytest.mark.parametrize("mode", ["steady_state", "generational"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_search_completes_and_is_sound(run: Path, mode: str, workers: int) -> None:
    settings = doubles.config(search={"mode": mode}, cluster={"workers": workers})
    history = doubles.search(run, settings)
    assert history.state.complete and history.state.num_committed == NUM
    assert sorted(outcome["child"] for outcome in committed(run, settings)) == list(range(NUM))
    assert lost(run, settings) == []
    attempts = doubles.events(run, settings, "attempt")
    assert len(attempts) == NUM and len({event["worker"] for event in attempts}) <= workers
    assert present(run) == list(history.state.front.numbers)
    doubles.assert_sound(run)


def test_never_more_than_two_children_wait_for_a_worker(run: Path) -> None:
    settings = doubles.config(search={"mode": "steady_state"}, cluster={"workers": 2})
    doubles.search(run, settings)
    in_flight, busiest = set[int](), Counter[str]()
    running: dict[int, str] = {}
    for event in doubles.events(run, settings):
        if event["event"] == "asked":
            in_flight |= {child["number"] for child in event["children"]}
            assert len(in_flight) <= 4
        elif event["event"] == "attempt":
            running[event["child"]] = event["worker"]
            busiest |= Counter(running.values())
        elif event["event"] == "committed":
            running.pop(event["outcome"]["child"])
            in_flight.remove(event["outcome"]["child"])
    assert max(busiest.values()) == 2


def test_a_generational_front_does_not_depend_on_the_order_of_outcomes(run: Path) -> None:
    front = doubles.front(doubles.search(run, SETTINGS))
    for seed in range(4):
        settings = doubles.config(cluster={"workers": 1 + seed})
        other = run.with_name(f"run{seed}")
        history = doubles.search(other, settings, backend=doubles.FakeBackend(other, seed=seed))
        assert doubles.front(history) == front
        order = [outcome["child"] for outcome in committed(other)]
        assert order == sorted(order)


def test_a_steady_search_records_the_order_in_which_outcomes_came(run: Path) -> None:
    settings = doubles.config(search={"mode": "steady_state"}, cluster={"workers": 3})
    doubles.search(run, settings, backend=doubles.FakeBackend(run, seed=1))
    order = [outcome["child"] for outcome in committed(run, settings)]
    assert order != sorted(order)
    doubles.assert_sound(run)


def test_observers_hear_of_every_worker(run: Path) -> None:
    notes = doubles.Notes()
    doubles.search(run, SETTINGS, notes=notes)
    assert notes.notes == []
    assert {name for doing in notes.doing for name in doing} == {"e1w00", "e1w01"}
    assert "idle" in {words for doing in notes.doing for words in doing.values()}


@pytest.mark.parametrize(("mode", "workers", "started"), [("generational", 9, 3), ("steady_state", 3, 3)])
def test_a_worker_starts_for_every_child_that_waits_and_only_for_these(
    run: Path, mode: str, workers: int, started: int
) -> None:
    """Three initial networks on three workers, not two of them on one."""
    settings = doubles.config(search={"mode": mode}, cluster={"workers": workers})
    made, backend, *_ = running(run, settings)
    assert len(made.history.state.in_flight) == 3 and sorted(backend.workers) == [f"e1w{k:02d}" for k in range(started)]
    assert [len(handle.tasks) for handle in made._crew.handles.values()] == [1] * started
    made.close()


def test_a_worker_that_still_waits_for_a_machine_holds_no_child_up(run: Path) -> None:
    """Two of four are never heard of: the others train everything."""

    class HalfPending(doubles.FakeBackend):
        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            super().launch([name for name in names if name in ("e1w00", "e1w01")], avoid)

        def alive(self, name: str) -> bool:
            return True

    settings = doubles.config(search={"mode": "steady_state"}, cluster={"workers": 4})
    history = doubles.search(run, settings, backend=HalfPending(run))
    assert history.state.complete and lost(run, settings) == []
    assert {event["worker"] for event in doubles.events(run, settings, "attempt")} == {"e1w00", "e1w01"}
    doubles.assert_sound(run)


def test_a_child_that_waits_behind_another_is_given_to_a_worker_that_is_idle(run: Path) -> None:
    """In generational mode the next generation waits for all: nobody may sit idle beside a queue."""
    settings = doubles.config(cluster={"workers": 2})
    made = doubles.start(run, settings, doubles.FakeBackend(run, lambda task: "long" if task["child"] == 5 else None))
    for _ in range(60):
        made._turn()
    assert list(made.history.state.in_flight) == [5, 6, 7, 8]  # told in order, so all wait for the first
    assert sorted(made._arrived) == [6, 7, 8]
    attempts = [event for event in doubles.events(run, settings, "attempt") if event["child"] == 7]
    assert [event["attempt"] for event in attempts] == ["e1a1", "e1a2"]
    assert attempts[0]["worker"] != attempts[1]["worker"]
    assert lost(run, settings) == [(7, "stopped")]
    made.close()
    assert doubles.search(run, settings).state.complete
    doubles.assert_sound(run)


# ---------------------------------------------------------------- retries


def test_a_child_that_crashes_within_its_budget_is_tried_again(run: Path) -> None:
    tries = Counter[int]()

    def behave(task: Message) -> str | None:
        tries[task["child"]] += 1
        return "crash" if task["child"] == 5 and tries[5] <= 2 else None

    history = doubles.search(run, SETTINGS, behave)
    assert tries[5] == 3 and history.state.num_failed == 0
    assert lost(run) == [(5, "crash")] * 2
    undisturbed = doubles.search(run.with_name("other"), SETTINGS)
    assert doubles.front(history) == doubles.front(undisturbed)


def test_a_child_that_crashes_beyond_its_budget_fails_with_its_reason(run: Path) -> None:
    notes = doubles.Notes()
    history = doubles.search(run, SETTINGS, lambda task: "crash" if task["child"] == 5 else None, notes=notes)
    assert history.state.complete and history.state.num_failed == 1
    assert lost(run) == [(5, "crash")] * 3
    failure = history.failures[0]["failure"]
    assert failure["kind"] == "crash"
    assert failure["reason"] == "3 attempts ended so; the last one: killed by SIGSEGV\nlast words"
    assert len(notes.about("child 5 failed: crash: 3 attempts ended so")) == 1
    assert 5 not in history.state.front.numbers and 5 not in present(run)
    doubles.assert_sound(run)


@pytest.mark.parametrize("retries", [0, 1])
def test_the_budget_is_the_configurations(run: Path, retries: int) -> None:
    settings = doubles.config(cluster={"retries": retries})
    doubles.search(run, settings, lambda task: "crash" if task["child"] == 5 else None)
    assert lost(run, settings) == [(5, "crash")] * (1 + retries)


def test_a_childs_own_failure_is_not_tried_again(run: Path) -> None:
    history = doubles.search(run, SETTINGS, lambda task: "fail" if task["child"] % 4 == 1 else None)
    assert history.state.num_failed == len([n for n in range(NUM) if n % 4 == 1])
    assert lost(run) == []
    assert all(failed["failure"] == doubles.FAILURE for failed in history.failures)
    doubles.assert_sound(run)


@pytest.mark.parametrize("mode", ["generational", "steady_state"])
def test_a_child_that_has_used_up_its_budget_is_not_tried_by_the_next_coordinator(run: Path, mode: str) -> None:
    """Killed after the last crash is on record and before the failure is: that child 3 is awaited makes the moment."""
    settings = doubles.config(search={"mode": mode})
    words = {3: "long", 4: "crash"}
    made = doubles.start(run, settings, doubles.FakeBackend(run, lambda task: words.get(task["child"])))
    real = made._commit
    made._commit = lambda: real() if lost(run, settings).count((4, "crash")) < 3 else False  # type: ignore[method-assign]
    for _ in range(60):
        made._turn()
    made._ledger.close()  # killed
    assert lost(run, settings).count((4, "crash")) == 3 and 4 in made.history.state.in_flight
    history = doubles.search(run, settings)
    assert history.state.complete and [one["child"] for one in history.failures] == [4]
    assert lost(run, settings).count((4, "crash")) == 3
    assert history.failures[0]["failure"]["reason"].startswith("3 attempts ended so; the last one: killed by SIGSEGV")
    doubles.assert_sound(run)


def test_workers_that_died_with_the_coordinator_before_are_no_misfortune(run: Path) -> None:
    """Else a run of many workers could not go on with few."""
    many = doubles.config(search={"mode": "steady_state"}, cluster={"workers": 16})
    made = doubles.start(run, many, doubles.FakeBackend(run, lambda task: "long" if task["child"] > 3 else None))
    for _ in range(30):
        made._turn()
    assert len(made._crew.handles) == 16
    made._ledger.close()  # killed, and every worker with it
    notes = doubles.Notes()
    few = doubles.config(search={"mode": "steady_state"}, cluster={"workers": 1})
    assert doubles.search(run, few, notes=notes).state.complete
    assert len(notes.about("died")) > 3
    doubles.assert_sound(run)


def test_workers_that_die_are_counted_apart_and_cost_the_child_nothing(run: Path) -> None:
    """Two deaths under child 5 and two crashes of it: neither budget of retries is spent."""
    backend = doubles.FakeBackend(run)
    tries = Counter[int]()

    def behave(task: Message) -> str | None:
        tries[task["child"]] += 1
        if task["child"] != 5 or tries[5] > 4:
            return None
        return "long" if tries[5] % 2 else "crash"

    backend.behave, step = behave, backend.step

    def step_and_kill() -> None:
        step()
        for name, one in list(backend.workers.items()):
            if one._current is not None and one._current["child"] == 5 and tries[5] in (1, 3):
                backend.die(name)

    backend.step = step_and_kill  # type: ignore[method-assign]
    notes = doubles.Notes()
    history = doubles.search(run, SETTINGS, backend=backend, notes=notes)
    assert history.state.num_failed == 0
    assert Counter(kind for child, kind in lost(run) if child == 5) == {"crash": 2, "worker": 2}
    assert {kind for child, kind in lost(run) if child != 5} <= {"stopped"}
    assert len(notes.about("died")) == 2
    doubles.assert_sound(run)


def test_a_child_under_which_workers_die_for_ever_is_given_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "MAX_DEATHS", 3)
    backend = doubles.FakeBackend(run, lambda task: "long" if task["child"] == 5 else None)
    step = backend.step

    def step_and_kill() -> None:
        step()
        for name, one in list(backend.workers.items()):
            if one._current is not None and one._current["child"] == 5:
                backend.die(name)

    backend.step = step_and_kill  # type: ignore[method-assign]
    history = doubles.search(run, SETTINGS, backend=backend)
    assert lost(run).count((5, "worker")) == 4
    assert history.failures[0]["failure"]["reason"].startswith("4 attempts ended so; the last one: worker e1w")


@pytest.mark.parametrize("word", ["long", "hang"])
def test_a_stopped_attempt_counts_nothing(run: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one whose worker was told to leave and could not in time."""
    settings = doubles.config(cluster={"retries": 0})
    monkeypatch.setattr(crew, "STOP_S", 0.05)
    for _ in range(4):
        backend = doubles.FakeBackend(run, lambda task: word if task["child"] == 5 else None)
        held: list[coordinator.Coordinator] = []
        made = doubles.start(run, settings, backend)
        held.append(made)
        for _ in range(40):
            made._turn()
        made.close()
    history = doubles.search(run, settings)
    assert history.state.complete and history.state.num_failed == 0
    assert lost(run, settings).count((5, "stopped")) == 4
    assert {kind for _, kind in lost(run, settings)} == {"stopped"}


def test_a_worker_that_leaves_gives_its_children_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubles.worker, "SAVE_S", 0.05)
    backend = doubles.FakeBackend(
        run, lambda task: "long" if task["attempt"] == "e1a1" and task["child"] == 4 else None
    )
    step = backend.step

    def step_and_signal() -> None:
        step()
        for one in backend.workers.values():
            task = one._current
            one.caught[:] = [15] * (task is not None and (task["child"], task["attempt"]) == (4, "e1a1"))

    backend.step = step_and_signal  # type: ignore[method-assign]
    notes = doubles.Notes()
    history = doubles.search(run, SETTINGS, backend=backend, notes=notes)
    assert history.state.num_failed == 0
    assert (4, "worker") in lost(run) and {kind for _, kind in lost(run)} == {"worker", "stopped"}
    (note,) = notes.notes
    assert note.endswith("left its children: signalled")


def test_workers_that_leave_in_a_row_with_nothing_done_end_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody signals each of them: no progress is possible."""
    monkeypatch.setattr(doubles.worker, "SAVE_S", 0.05)
    backend = doubles.FakeBackend(run, lambda task: "long")
    step = backend.step

    def step_and_signal() -> None:
        step()
        for one in backend.workers.values():
            one.caught[:] = [15] * (one._current is not None)

    backend.step = step_and_signal  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match=r"9 workers in a row ended.* left its children: signalled"):
        doubles.search(run, SETTINGS, backend=backend)
    assert {kind for _, kind in lost(run)} == {"worker", "stopped"}


# ---------------------------------------------------------------- the run cannot go on


def test_unfit_workers_in_a_row_end_the_run(run: Path) -> None:
    notes = doubles.Notes()
    with pytest.raises(
        RunFailed, match=r"(?s)9 workers in a row ended and no child was trained meanwhile. .*no GPU here"
    ):
        doubles.search(run, SETTINGS, lambda task: "unfit", notes=notes)
    assert len(notes.about("cannot start training: exit code 1\nno GPU here")) == 9
    assert {kind for _, kind in lost(run)} == {"stopped"}
    history = doubles.search(run, SETTINGS)  # the same call, once it is mended
    assert history.state.complete and history.state.num_failed == 0
    doubles.assert_sound(run)


def test_unfit_workers_now_and_then_do_not(run: Path) -> None:
    tries: list[int] = []

    def behave(task: Message) -> str | None:
        tries.append(task["child"])
        return "unfit" if len(tries) % 3 == 1 else None

    assert doubles.search(run, SETTINGS, behave).state.complete


def test_workers_that_die_in_a_row_end_the_run(run: Path) -> None:
    class Stillborn(doubles.FakeBackend):
        def launch(self, names: Sequence[str], avoid: Collection[str]) -> None:
            pass

    with pytest.raises(RunFailed, match=r"9 workers in a row .* The last: worker e1w\d\d died"):
        doubles.search(run, SETTINGS, backend=Stillborn(run))


@pytest.mark.parametrize("children", [18, 0])
def test_no_valid_initial_network_ends_the_run_again_and_again(run: Path, children: int) -> None:
    settings = doubles.config(search={"children": children})
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"no initial network is valid.*child 0: the loss is not a number; child 1"):
            doubles.search(run, settings, lambda task: "fail")
    assert len(committed(run, settings)) == 3
    assert status.status(run)["state"] == "failed: no initial network is valid; start again in another folder"


def test_one_valid_initial_network_is_enough(run: Path) -> None:
    assert doubles.search(run, SETTINGS, lambda task: "fail" if task["child"] in (0, 2) else None).state.complete


def test_an_exhausted_space_ends_the_run(run: Path) -> None:
    settings = doubles.config(
        search={"operators": ["prune"], "children": 5000, "max_edits": 1}, storage={"seal_every": 50}
    )
    settings = settings.model_copy(
        update={
            "objectives": tuple(
                o.model_copy(update={"min": 1500.0, "max": 1600.0}) if o.name == "params" else o
                for o in settings.objectives
            )
        }
    )
    with pytest.raises(RunFailed, match=r"no new network was found within the limits .*search.operators"):
        doubles.search(run, settings)
    before = len(committed(run, settings))
    with pytest.raises(RunFailed, match="no new network was found"):
        doubles.search(run, settings)
    assert len(committed(run, settings)) == before == 1


@pytest.mark.parametrize("mode", ["steady_state", "generational"])
def test_a_search_that_found_nothing_new_asks_again_when_it_has_learnt_something(
    run: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    real, asks = evolution.ask, list[int]()

    def ask(state: evolution.State, n: int, seen: Any) -> Any:
        asks.append(len(state.in_flight))
        if len(asks) > 4 and len(asks) % 2 and state.in_flight and n > 0 and mode == "steady_state":
            return evolution.take(state, (), state.redrawn), ()
        return real(state, n, seen)

    monkeypatch.setattr(evolution, "ask", ask)
    settings = doubles.config(search={"mode": mode})
    assert doubles.search(run, settings).state.complete
    empty = [event for event in doubles.events(run, settings, "asked") if not event["children"]]
    assert bool(empty) == (mode == "steady_state")


def test_storage_trouble_of_a_worker_stops_the_run_and_the_same_call_goes_on(run: Path) -> None:
    with pytest.raises(Stopped, match=r"worker e1w0\d cannot write: child 6: No space left on device"):
        doubles.search(run, SETTINGS, lambda task: "storage" if task["child"] == 6 else None)
    history = doubles.search(run, SETTINGS)
    assert history.state.complete and history.state.num_failed == 0
    assert {kind for _, kind in lost(run)} <= {"stopped"}
    doubles.assert_sound(run)


def test_what_else_a_worker_said_before_its_disk_was_full_is_not_lost(run: Path) -> None:
    backend = doubles.FakeBackend(run, lambda task: "long")
    made = doubles.start(run, doubles.config(cluster={"workers": 1}), backend)
    for _ in range(3):
        made._turn()
    (name,) = backend.workers
    key, task = next(iter(made._crew.handles[name].tasks.items()))
    told = doubles.outcome(task, run)
    backend.workers[name]._done.append([{"say": "storage", "reason": "full"}, {"say": "outcome", "outcome": told}])
    with pytest.raises(Stopped, match="cannot write: full"):
        made._crew._hear(made._crew.handles[name])
    made.close()
    assert key[0] in [outcome["child"] for outcome in committed(run)]


# ---------------------------------------------------------------- outcomes that do not count


def running(
    run: Path, settings: Any = SETTINGS, word: str = "long", notes: doubles.Notes | None = None
) -> tuple[coordinator.Coordinator, Any, Any, Message]:
    """A coordinator with a worker that has a child in training: both, the handle, and the task."""
    backend = doubles.FakeBackend(run, lambda task: word)
    made = doubles.start(run, settings, backend, notes)
    for _ in range(3):
        made._turn()
    handle = made._crew.handles["e1w00"]
    return made, backend, handle, next(iter(handle.tasks.values()))


def report(backend: Any, handle: Any, outcome: Message) -> None:
    backend.workers[handle.name]._done.append([{"say": "outcome", "outcome": outcome}])


def test_an_outcome_of_another_network_is_a_lost_attempt(run: Path) -> None:
    """The child is trained again: ignored, it would be in flight for ever."""
    made, backend, handle, task = running(run)
    report(backend, handle, doubles.outcome(task, run) | {"digest": "f" * 32})
    made._turn()
    assert made.history.state.num_committed == 0
    assert lost(run) == [(task["child"], "worker")]
    tried = [event["attempt"] for event in doubles.events(run, SETTINGS, "attempt") if event["child"] == task["child"]]
    assert tried == ["e1a1", "e1a2"]
    made.close()


def test_only_the_first_outcome_of_a_child_counts(run: Path) -> None:
    made, backend, handle, task = running(run)
    first = doubles.outcome(task, run)
    report(backend, handle, first)
    report(backend, handle, first | {"objectives": {"val_error": 0.0}})
    made._turn()
    report(backend, handle, first | {"objectives": {"val_error": 0.0}})
    made._turn()
    made.close()
    assert committed(run) == [first]


def test_a_zombies_later_outcome_is_told_and_ignored(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker counted as dead reports when its child has long gone to another."""
    notes = doubles.Notes()
    made, backend, handle, task = running(run, notes=notes)
    zombie = backend.workers.pop(handle.name)
    backend.workers.clear()
    backend.behave = lambda task: None
    for _ in range(30):
        made._turn()
    state = made.history.state
    assert (task["child"], "worker") in lost(run) and state.num_committed > 3
    zombie._done.append(
        [{"say": "outcome", "outcome": doubles.outcome(task, run) | {"objectives": {"val_error": 0.0}}}]
    )
    monkeypatch.setattr(crew, "LISTEN_S", 0.0)
    for _ in range(3):
        made._turn()
    made.close()
    assert notes.about(f"child {task['child']}: an outcome by {handle.name}, long given up, comes too late")
    told = [outcome for outcome in committed(run) if outcome["child"] == task["child"]]
    assert len(told) == 1 and told[0]["attempt"] == "e1a2"
    assert doubles.search(run, SETTINGS).state.complete
    assert len([one for one in committed(run) if one["child"] == task["child"]]) == 1
    doubles.assert_sound(run)


def test_a_worker_that_was_given_up_is_told_to_leave(run: Path) -> None:
    made, backend, handle, _ = running(run, word="long")
    zombie = backend.workers.pop(handle.name)
    made._turn()
    assert handle.name not in made._crew.handles
    assert not zombie.step()
    made.close()


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_an_outcome_without_its_weights_is_a_lost_attempt(run: Path, damage: str) -> None:
    made, backend, handle, task = running(run)
    outcome = doubles.outcome(task, run)
    path = run / outcome["weights"]["path"]
    path.unlink() if damage == "missing" else path.write_bytes(b"w")
    report(backend, handle, outcome)
    made._turn()
    assert made.history.state.num_committed == 0
    assert lost(run) == [(task["child"], "worker")]
    made.close()
    history = doubles.search(run, SETTINGS)
    assert history.state.complete
    reasons = [event["reason"] for event in doubles.events(run, SETTINGS, "lost") if event["kind"] == "worker"]
    assert "weights.safetensors is missing or has the wrong size" in reasons[0]


def test_a_worker_with_a_damaged_report_is_ended_and_its_children_go_elsewhere(run: Path) -> None:
    made, backend, handle, task = running(run)
    path = run / files.done_log(handle.name)
    with open(path, "ab") as file:
        file.write(b"0123456789abcdef {}\n")
    notes = made._observer
    made._turn()
    assert backend.killed == [handle.name] and handle.name not in made._crew.handles
    assert "a damaged message in" in notes.notes[0]
    assert (task["child"], "worker") in lost(run)
    made.close()
    assert doubles.search(run, SETTINGS).state.complete


def test_a_damaged_first_report_does_not_stop_the_next_coordinator(run: Path) -> None:
    made, backend, handle, _ = running(run)
    path = run / files.done_log(handle.name)
    path.write_bytes(b"?" + path.read_bytes()[1:])
    made._turn()
    made.close()
    assert doubles.search(run, SETTINGS).state.complete


# ---------------------------------------------------------------- weights


def test_weights_are_kept_as_long_as_they_are_needed(run: Path) -> None:
    """At every moment: of the front, and of the parents of children in flight; a parent that is gone would crash."""
    settings = doubles.config(search={"mode": "steady_state", "children": 40}, cluster={"workers": 3})
    backend = doubles.FakeBackend(run, seed=5)
    made = doubles.start(run, settings, backend)
    dominated_parents = 0
    while not made.history.state.complete:
        made._turn()
        state = made.history.state
        parents = {child.parent for child in state.in_flight.values()} - {None}
        dominated_parents += len(parents - set(state.front.numbers))
        needed = parents | set(state.front.numbers)
        assert needed <= set(present(run)) <= needed | state.in_flight.keys()
    made._complete()
    made.close()
    assert dominated_parents > 0
    assert present(run) == list(made.history.state.front.numbers)
    assert lost(run, settings) == []


def test_keep_all_keeps_all_and_keep_front_deletes_them_later(run: Path) -> None:
    everything = doubles.config(storage={"keep": "all"})
    doubles.search(run, everything)
    assert present(run) == list(range(NUM))
    raised = doubles.config(search={"children": 20})
    history = doubles.search(run, raised)
    assert present(run) == list(history.state.front.numbers)


def test_nothing_is_deleted_before_the_outcome_that_frees_it_is_durable(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    real = files.remove

    def remove(path: Path) -> None:
        if path.parent.parent.name == "children":
            state = doubles.load(run, SETTINGS).history.state
            needed = {*state.front.numbers, *state.in_flight, *(c.parent for c in state.in_flight.values())}
            assert int(path.name) not in needed
            checked.append(int(path.name))
        real(path)

    monkeypatch.setattr(files, "remove", remove)
    doubles.search(run, SETTINGS)
    assert len(checked) > 5


# ---------------------------------------------------------------- sealed files


def test_children_are_sealed_and_the_population_is_whole(run: Path) -> None:
    history = doubles.search(run, SETTINGS)
    assert [event["children"] for event in history.sealed] == [[0, 10], [10, 20]]
    assert sorted(history.unsealed) == [20]
    assert sorted(path.name for path in (run / files.STATE).iterdir()) == [
        "children-000000-000009.e1.h5",
        "children-000010-000019.e1.h5",
    ]
    assert history.complete is not None and history.complete["file"] == "population.e1.h5"
    rows = population.read(run, history.complete)
    assert [row["number"] for row in rows] == list(range(NUM))
    assert rows == population.finished(run, history)
    assert {row["outcome"]["child"]: row["outcome"] for row in rows} == {o["child"]: o for o in committed(run)}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_sealed_file_is_rebuilt_with_a_note(run: Path, damage: str) -> None:
    doubles.search(run, SETTINGS)
    path = run / "state/children-000010-000019.e1.h5"
    sound = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(sound[:3000] if damage == "cut" else sound[:3000] + b"?" + sound[3001:])
    notes = doubles.Notes()
    history = doubles.search(run, SETTINGS, notes=notes)  # the run is complete: it is mended all the same
    (note,) = notes.about("It was rebuilt from the journals as state/children-000010-000019.e2.h5")
    assert str(path) in note
    rebuilt = run / "state/children-000010-000019.e2.h5"
    assert rebuilt.read_bytes() == sound
    assert [event["file"] for event in history.sealed] == [
        "state/children-000000-000009.e1.h5",
        str(rebuilt.relative_to(run)),
    ]
    doubles.assert_sound(run)
    doubles.search(run, doubles.config(search={"children": 20}))
    assert not path.exists()  # no event names it any more


def test_a_damaged_population_is_written_again(run: Path) -> None:
    first = doubles.search(run, SETTINGS)
    path = run / "population.e1.h5"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    history = doubles.search(run, SETTINGS)
    assert [p.name for p in run.glob("population.*")] == ["population.e2.h5"]
    assert (run / "population.e2.h5").read_bytes() == sound
    assert first.complete is not None and history.complete is not None
    assert history.complete["front"] == first.complete["front"]
    doubles.assert_sound(run)


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_copy_of_the_journal_is_mended_with_a_note(run: Path, which: int) -> None:
    doubles.search(run, SETTINGS)
    path = run / files.journals(1)[which]
    sound = path.read_bytes()
    path.write_bytes(sound[:500] + b"?" + sound[501:])
    notes = doubles.Notes()
    doubles.search(run, SETTINGS, notes=notes)
    assert len(notes.about(f"{path}: damaged after line")) == 1
    assert path.read_bytes() == sound
    doubles.assert_sound(run)


def test_what_killed_coordinators_left_behind_is_removed(run: Path) -> None:
    made, *_ = running(run)
    made._ledger.close()  # killed
    junk = [
        "epochs/.tmp-abc/owner.json", "epochs/000001/.tmp-journal.log-7", "state/.tmp-children.h5-7",
        ".tmp-population-7", "state/children-000000-000009.e1.h5", "population.e0.h5",
        "workers/e1w00/job/1_submitted.pkl", "children/000/000099/e1a1/weights.safetensors",
    ]  # fmt: skip
    mine = ["state/notes.txt", "population.mine.h5", "state/children-000000-000009.e9.h5", "children/notes"]
    for name in junk + mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    made = doubles.start(run, SETTINGS, doubles.FakeBackend(run))
    made._tidy()
    assert (run / "workers/e1w00/job").exists()  # adopted: it may still live
    made.close()
    assert [name for name in junk if (run / name).exists()] == []
    assert [name for name in mine if not (run / name).exists()] == []


def test_what_lost_attempts_left_beside_weights_that_are_needed_is_removed(run: Path) -> None:
    history = doubles.search(run, SETTINGS)
    number = history.state.front.numbers[0]
    folder = run / files.child_folder(number)
    (folder / "e1a9").mkdir()
    for name in ("e1a9/weights.safetensors", "e1a1/.tmp-weights.safetensors-7"):
        (folder / name).touch()
    more = doubles.config(search={"children": 19})
    history = doubles.search(run, more)
    assert number in history.state.front.numbers
    assert [str(path.relative_to(folder)) for path in folder.rglob("*")] == ["e1a1", "e1a1/weights.safetensors"]


def test_every_name_that_the_record_relies_on_is_durable(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file outlives a power cut only if its name does: the folder is forced to disk after the name was made."""
    fsync, forced = os.fsync, dict[str, set[str]]()

    def noted(handle: int) -> None:
        fsync(handle)
        target = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isdir(target):
            forced.setdefault(target, set()).update(os.listdir(target))

    monkeypatch.setattr(os, "fsync", noted)
    doubles.search(run, SETTINGS)
    inside = [path for path in run.rglob("*") if path.name not in ("heartbeat", "workers")]
    names = {name for seen in forced.values() for name in seen}
    assert len(inside) > 20
    assert [str(path) for path in inside if path.name not in names] == []
    assert str(run.parent) in forced and run.name in forced[str(run.parent)]


# ---------------------------------------------------------------- another coordinator takes over


def test_a_paused_coordinator_that_wakes_changes_nothing(run: Path) -> None:
    old, backend, handle, _ = running(run)
    workers = dict(backend.workers)
    successor = doubles.FakeBackend(run)
    new = doubles.start(run, SETTINGS, successor)
    successor.workers |= workers  # it adopts them
    (run / "workers/e2w09/job").mkdir(parents=True)
    (run / "workers/e2w09/job/1_submitted.pkl").touch()  # and starts one
    before = doubles.contents(run)
    with pytest.raises(Stopped, match="has another coordinator now"):
        old.search()
    old.close()
    assert doubles.contents(run) == before
    assert backend.killed == [] and not backend.closed
    backend.behave = lambda task: None
    for one in successor.workers.values():  # what was in training comes to its end
        one._trainer.messages.append(doubles.outcome(one._current, run))  # type: ignore[union-attr, arg-type]
    new.search()
    new.close()
    assert new.history.state.complete
    doubles.assert_sound(run)


@pytest.mark.parametrize("step", ["_tidy", "_clean", "_delete", "_complete"])
def test_one_that_wakes_before_it_deletes_deletes_nothing(run: Path, step: str) -> None:
    """What it knows of the run may be old: what nobody needed then may be needed now."""
    backend = doubles.FakeBackend(run)
    old = doubles.start(run, SETTINGS, backend)
    real, taken, before = getattr(old, step), list[coordinator.Coordinator](), dict[str, bytes]()

    def paused(*arguments: Any) -> Any:
        if not taken and (step != "_delete" or any(arguments)) and (step != "_clean" or old._settled):
            taken.append(doubles.start(run, SETTINGS, doubles.FakeBackend(run)))
            (run / "children/000/000099").mkdir(parents=True)
            for outcome in old._settled:  # its successor has another attempt under way
                (run / files.attempt_folder(outcome["child"], "e2a1")).mkdir()
                (run / files.attempt_folder(outcome["child"], "e2a1") / files.WEIGHTS).touch()
            (run / "population.e0.h5").touch()
            before.update(doubles.contents(run))
        return real(*arguments)

    setattr(old, step, paused)
    with pytest.raises(coordinator.Superseded):
        old.search()
    old.close()
    assert before and doubles.contents(run) == before and (run / "children/000/000099").exists()
    taken[0].search()
    taken[0].close()
    doubles.assert_sound(run)


@pytest.mark.parametrize("step", ["_commit", "_crew.retire", "_ask", "_dispatch", "_ledger.write", "_seal"])
def test_one_that_wakes_in_the_middle_of_a_turn_changes_nothing_that_counts(run: Path, step: str) -> None:
    """It writes into its own dead epoch at most; the successor's run is as if nothing had happened."""
    old, backend, handle, task = running(run)
    report(backend, handle, doubles.outcome(task, run))
    owner = attrgetter(step.rpartition(".")[0])(old) if "." in step else old
    real = getattr(owner, step.rpartition(".")[2])
    taken: list[coordinator.Coordinator] = []

    def paused(*arguments: Any) -> Any:
        if not taken:
            taken.append(doubles.start(run, SETTINGS, doubles.FakeBackend(run)))
        return real(*arguments)

    setattr(owner, step.rpartition(".")[2], paused)
    with pytest.raises(Stopped):
        old.search()
    old.close()
    assert backend.killed == []
    taken[0].search()
    taken[0].close()
    assert doubles.front(taken[0].history) == doubles.front(doubles.search(run.with_name("other"), SETTINGS))
    doubles.assert_sound(run)


def test_one_that_is_superseded_while_it_stops_its_workers_does_not_kill_them(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, backend, *_ = running(run)
    monkeypatch.setattr(crew, "STOP_S", 0.2)
    taken: list[coordinator.Coordinator] = []

    def step() -> None:
        if not taken:
            taken.append(doubles.start(run, SETTINGS, doubles.FakeBackend(run)))

    backend.step = step
    old.close()
    assert backend.killed == [] and not backend.closed
    taken[0].close()


def test_living_workers_are_adopted_with_their_children(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, backend, handle, task = running(run)
    made._ledger.close()  # killed; its workers live on
    successor = doubles.FakeBackend(run)
    successor.workers = backend.workers
    backend.behave = lambda task: None
    notes = doubles.Notes()
    new = doubles.start(run, SETTINGS, successor, notes)
    for one in successor.workers.values():  # what was in training comes to its end
        one._trainer.messages.append(doubles.outcome(one._current, run))  # type: ignore[union-attr, arg-type]
    new.search()
    new.close()
    attempts = doubles.events(run, SETTINGS, "attempt")
    assert [event["worker"] for event in attempts if event["child"] == task["child"]] == [handle.name]
    assert lost(run) == [] and notes.notes == []
    assert {event["worker"] for event in attempts} == {"e1w00", "e1w01"}
    doubles.assert_sound(run)


def test_what_a_dead_worker_reported_last_still_counts(run: Path) -> None:
    made, backend, handle, task = running(run)
    made._ledger.close()
    report(backend, handle, doubles.outcome(task, run))  # nobody heard it
    doubles.search(run, SETTINGS)
    told = next(outcome for outcome in committed(run) if outcome["child"] == task["child"])
    assert told["attempt"] == "e1a1"
    doubles.assert_sound(run)


def test_what_a_worker_says_right_before_it_dies_still_counts(run: Path) -> None:
    made, backend, handle, task = running(run)

    def alive(name: str) -> bool:
        if name == handle.name and name in backend.workers:
            report(backend, handle, doubles.outcome(task, run))
            backend.die(name)
        return name in backend.workers

    backend.alive = alive
    made._turn()
    made.close()
    assert [outcome["attempt"] for outcome in committed(run) if outcome["child"] == task["child"]] == ["e1a1"]
    assert (task["child"], "worker") not in lost(run)


def test_a_worker_learns_of_a_child_only_when_it_is_on_record(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, assigned = WorkerHandle.assign, []

    def assign(handle: WorkerHandle, keys: Any) -> None:
        history = doubles.load(run, SETTINGS).history
        for number, attempt in keys:
            assert any(one.id == attempt and one.worker == handle.name for one in history.attempts[number])
        assigned.extend(keys)
        real(handle, keys)

    monkeypatch.setattr(WorkerHandle, "assign", assign)
    doubles.search(run, SETTINGS)
    assert len(assigned) == NUM


# ---------------------------------------------------------------- signals and the end


def test_a_signal_stops_in_good_order(run: Path) -> None:
    made, backend, *_ = running(run)
    made.stop_signal = 15
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        made.search()
    made.close()
    assert backend.workers == {} and backend.killed == [] and backend.closed
    assert {kind for _, kind in lost(run)} == {"stopped"}
    assert {event["done"] for event in doubles.events(run, SETTINGS) if event["event"] == "lost"} == {0.0, 0.5}
    assert doubles.search(run, SETTINGS).state.complete


def test_outcomes_that_come_while_it_stops_are_committed(run: Path) -> None:
    made, backend, handle, task = running(run)
    report(backend, handle, doubles.outcome(task, run))
    made.close()
    assert [outcome["child"] for outcome in committed(run)] == [task["child"]]


def test_workers_that_do_not_leave_in_time_are_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, backend, *_ = running(run)
    monkeypatch.setattr(crew, "STOP_S", 0.05)
    names = sorted(backend.workers)
    backend.step = lambda: None
    made.close()
    assert sorted(backend.killed) == names and backend.closed


def test_a_disk_that_is_full_at_the_end_too_loses_nothing_that_was_recorded(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, backend, handle, task = running(run)
    report(backend, handle, doubles.outcome(task, run))
    real = LogWriter.append_texts

    def full(self: LogWriter, bodies: Any, *, durable: bool = True) -> None:
        if "done" not in self.path.name:
            raise OSError(28, "No space left on device")
        real(self, bodies, durable=durable)

    with monkeypatch.context() as patch:
        patch.setattr(LogWriter, "append_texts", full)
        patch.setattr(crew, "STOP_S", 0.05)
        with pytest.raises(OSError, match="No space left"):
            made._turn()
        made.close()
    assert committed(run) == []
    assert doubles.search(run, SETTINGS).state.complete
    assert next(o for o in committed(run) if o["child"] == task["child"])["attempt"] == "e1a1"
    doubles.assert_sound(run)


def test_a_task_holds_what_a_worker_must_know(run: Path) -> None:
    history = doubles.search(run, doubles.config(search={"mode": "steady_state"}, storage={"keep": "all"}))
    made = doubles.start(run, doubles.config(search={"mode": "steady_state", "children": 20}), doubles.FakeBackend(run))
    made._ask(2)
    number, child = next(iter(made.history.state.in_flight.items()))
    task = histories.task(made.history, number, "e2a1")
    assert (task["child"], task["attempt"], task["digest"]) == (number, "e2a1", child.digest)
    assert task["epochs"] == [0, made.config.training.epochs]
    assert task["parent"]["weights"] == history.results[child.parent]["weights"]  # type: ignore[index]
    assert task["graph"] == histories.child_to_json(child)["graph"]
    made.close()


def test_a_front_is_what_the_outcomes_say(run: Path) -> None:
    history = doubles.search(run, SETTINGS)
    vectors = np.array([[o["objectives"]["val_error"]] for o in committed(run)])
    cheap = {c["number"]: c["cheap"][0] for e in doubles.events(run, SETTINGS, "asked") for c in e["children"]}
    points = [(vectors[k][0], cheap[o["child"]], o["child"]) for k, o in enumerate(committed(run))]
    best = [n for e, p, n in points if not any((e2 <= e and p2 <= p) and n2 != n for e2, p2, n2 in points)]
    assert sorted(best) == list(history.state.front.numbers)
