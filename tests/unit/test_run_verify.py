"""What `verify` finds and what `status` and `front` say: each check is seen to fire, and nobody writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc import files
from lemonade_hpc.config import ConfigError
from lemonade_hpc.run import owner, population, record, status, store, verify
from lemonade_hpc.run.journal import RecordError
from lemonade_hpc.run.log import START, link

sys.path.insert(0, str(Path(__file__).parent))

import run_doubles as doubles  # noqa: E402

SETTINGS = doubles.config()
CHECKS = [
    "the run is what it was started as",
    "journals intact in both copies",
    "every decision repeats",
    "attempts within their budgets",
    "sealed files match the journals",
    "weights of the front match their checksums",
    "front and hypervolume recompute",
]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    doubles.install(monkeypatch)


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    """A complete run with a failed child, a crash, and children asked under two budgets."""
    with pytest.MonkeyPatch.context() as patch, doubles.folder() as run:
        doubles.install(patch)
        seen: set[int] = set()

        def behave(task: dict[str, Any]) -> str | None:
            if task["child"] == 6 and 6 not in seen:
                seen.add(6)
                return "crash"
            return "fail" if task["child"] == 5 else None

        doubles.search(run, doubles.config(search={"children": 12}), behave)
        doubles.search(run, SETTINGS, behave)
        yield run


@pytest.fixture
def run(finished: Path) -> Iterator[Path]:
    """A copy of it that may be hurt."""
    with doubles.folder() as made:
        yield doubles.copy(finished, made)


def faults(run: Path) -> dict[str, list[str]]:
    """What each check found, where it found something."""
    return {name: found for name, found in verify.verify(run) if found}


def forge(run: Path, change: Callable[[dict[str, Any]], Any], epoch: int = 1) -> None:
    """Rewrite an epoch's journal with every event changed, all links made right again, and its successor told."""
    paths = [run / path for path in files.journals(epoch)]
    previous, text, ends = START, "", START
    until = None
    if epoch < max(files.epochs(run)):
        first = (run / files.journals(epoch + 1)[0]).read_text().split("\n")[0].partition(" ")[2]
        until = json.loads(first)["continues"]["link"]
    for line in paths[0].read_text().splitlines():
        stated, _, body = line.partition(" ")
        event = json.loads(body)
        change(event)
        body = files.dumps(event)
        previous = link(previous, body)
        text += f"{previous} {body}\n"
        ends = previous if stated == until else ends
    for path in paths:
        path.write_text(text)
    if until is not None:

        def follow(event: dict[str, Any]) -> None:
            if event["event"] == "epoch":
                event["continues"]["link"] = ends

        forge(run, follow, epoch + 1)


def editing(kind: str, where: Callable[[dict[str, Any]], bool], edit: Callable[[dict[str, Any]], Any]) -> Any:
    def change(event: dict[str, Any]) -> None:
        if event["event"] == kind and where(event):
            edit(event)

    return change


# ---------------------------------------------------------------- verify


def test_a_sound_run_passes_every_check_and_is_not_touched(run: Path) -> None:
    before = doubles.contents(run)
    assert verify.verify(run) == [(name, []) for name in CHECKS]
    assert doubles.contents(run) == before


def test_a_forged_journal_that_changes_nothing_is_sound(run: Path) -> None:
    """The forger below is honest: what fires is the change."""
    forge(run, lambda event: None)
    assert faults(run) == {}


def test_a_sound_run_that_was_stopped_passes_too(run: Path) -> None:
    made = doubles.start(run, doubles.config(search={"children": 30}), doubles.FakeBackend(run))
    for _ in range(5):
        made._turn()
    made.close()
    assert faults(run) == {}


def test_a_changed_identity_is_found_in_the_middle_of_a_run_too(run: Path) -> None:
    path = run / files.RUN
    content = json.loads(path.read_text())
    content["reference"][0] += 0.01
    path.write_text(json.dumps(content))
    (first, second) = dict(verify.verify(run))[CHECKS[0]]
    assert "has changed since the coordinators of epochs [1, 2] read it" in first
    assert "the reference point is (0.91" in second


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_copy_of_a_journal_is_found(run: Path, which: int) -> None:
    path = run / files.journals(2)[which]
    content = bytearray(path.read_bytes())
    content[300] ^= 8
    path.write_bytes(bytes(content))
    found = faults(run)
    assert list(found) == ["journals intact in both copies"]
    assert str(path) in found["journals intact in both copies"][0]


def test_a_changed_outcome_is_found(run: Path) -> None:
    """One that says it is better than all: the front, the decisions and the sealed files disagree."""
    better = editing(
        "committed", lambda e: e["outcome"]["child"] == 4, lambda e: e["outcome"]["objectives"].update(val_error=0.0001)
    )
    forge(run, better)
    found = faults(run)
    assert found.keys() >= {
        "every decision repeats",
        "sealed files match the journals",
        "front and hypervolume recompute",
    }
    assert any("hypervolume" in text and "recorded" in text for text in found["front and hypervolume recompute"])


def test_a_changed_decision_is_found(run: Path) -> None:
    def edit(event: dict[str, Any]) -> None:
        event["children"][-1]["generation"] += 1

    forge(run, editing("asked", lambda e: e["ask"] == 2, edit))
    found = faults(run)
    assert "ask 2 now gives other children than" in found["every decision repeats"][0]


def test_a_child_with_two_outcomes_is_no_record(run: Path) -> None:
    forge(run, editing("committed", lambda e: e["outcome"]["child"] == 4, lambda e: e["outcome"].update(child=3)))
    with pytest.raises(RecordError, match=r"'committed', does not follow .* child 3 is not in flight"):
        verify.verify(run)


def test_weights_that_leave_the_front_while_it_is_looked_at_are_no_fault(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search goes on meanwhile; what is missing for good is a fault all the same."""
    settings = doubles.config(search={"mode": "steady_state", "children": 40})
    going = run.with_name("going")
    made, load, looks = doubles.start(going, settings, doubles.FakeBackend(going)), record.load, list[int]()
    for _ in range(12):
        made._turn()

    def slow(*arguments: Any) -> record.Loaded:
        loaded = load(*arguments)
        for _ in range(8 if len(looks) < 2 else 0):
            made._turn()
        looks.append(loaded.history.state.num_committed)
        return loaded

    monkeypatch.setattr(verify.record, "load", slow)
    assert faults(going) == {}
    assert len(set(looks)) > 1
    number = load(going, doubles.problem(settings)).history.state.front.numbers[0]
    made.close()
    files.remove(going / files.child_folder(number))
    assert "cannot be read" in faults(going)["weights of the front match their checksums"][0]


def test_too_many_attempts_are_found(run: Path) -> None:
    forge(run, editing("epoch", lambda e: True, lambda e: e.update(retries=0)))
    forge(run, editing("epoch", lambda e: True, lambda e: e.update(retries=0)), epoch=2)
    assert faults(run) == {}  # one crash is within the budget even so: it was the last one allowed
    lost = {"event": "lost", "child": 6, "attempt": "e1a9", "kind": "crash", "reason": "", "done": 0.0}
    header = {"event": "epoch", "retries": 0}

    def rows(count: int, kind: str, *, how: str | None = None) -> list[dict[str, Any]]:
        found = []
        for k in range(count):
            key = {"child": 6, "attempt": f"a{k}"}
            found += [{"event": "attempt", "worker": f"w{k}"} | key, lost | key | {"kind": kind}]
            found += [{"event": "left", "worker": f"w{k}", "how": how, "blame": True}] if how else []
        return found

    assert list(verify._attempts([header, *rows(1, "crash")])) == []
    assert list(verify._attempts([header, *rows(2, "crash")])) == ["child 6 lost 2 attempts to crash; allowed are 1"]
    assert list(verify._attempts([header, header | {"retries": 1}, *rows(2, "crash")])) == []
    assert list(verify._attempts([header, *rows(22, "worker")])) == [
        "child 6 lost 22 attempts to worker; allowed are 21"
    ]
    assert list(verify._attempts([header, *rows(7, "worker", how="died")])) == [
        "child 6 lost 7 attempts to death; allowed are 6"
    ]
    assert list(verify._attempts([header, *rows(2, "worker", how="out of memory")])) == [
        "child 6 lost 2 attempts to memory; allowed are 1"
    ]
    assert list(verify._attempts([header, *rows(50, "stopped")])) == []


@pytest.mark.parametrize("name", ["state/children-000000-000009.e1.h5", "population.e2.h5"])
@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_damaged_population_file_is_found(run: Path, name: str, damage: str) -> None:
    path = run / name
    content = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(content[:2000] + b"?" + content[2001:])
    found = faults(run)
    assert list(found) == ["sealed files match the journals"]
    (text,) = found["sealed files match the journals"]
    assert str(path) in text and ("cannot be read" if damage == "gone" else "SHA-256") in text


def test_a_sealed_file_with_other_content_is_found(run: Path) -> None:
    """Well formed, and its checksum is the recorded one."""
    sealed = store.read(run / "population.e2.h5", doubles.load(run, SETTINGS).history.complete["sha256"])  # type: ignore[index]
    sealed.children[3]["outcome"]["wall_s"] += 1
    content = store.encode(sealed.children, sealed.attributes)
    (run / "population.e2.h5").write_bytes(content)
    forge(run, editing("complete", lambda e: True, lambda e: e.update(sha256=files.sha256(content))), epoch=2)
    assert faults(run) == {
        "sealed files match the journals": [f"{run / 'population.e2.h5'}: differs from the journals"]
    }


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_damaged_weights_of_the_front_are_found(run: Path, damage: str) -> None:
    member = status.front(doubles.load(run, SETTINGS).history)[0]
    path = run / member["weights"]["path"]
    path.unlink() if damage == "gone" else path.write_bytes(b"?" + path.read_bytes()[1:])
    found = faults(run)
    assert list(found) == ["weights of the front match their checksums"]
    assert str(path) in found["weights of the front match their checksums"][0]


@pytest.mark.parametrize("key", ["front", "hypervolume"])
def test_a_front_that_is_not_the_recorded_one_is_found(run: Path, key: str) -> None:
    edit = {"front": lambda e: e["front"].pop(), "hypervolume": lambda e: e.update(hypervolume=e["hypervolume"] + 1e-9)}
    forge(run, editing("complete", lambda e: True, edit[key]), epoch=2)
    found = faults(run)
    assert list(found) == ["front and hypervolume recompute"]


def test_a_front_with_a_dominated_member_or_without_a_good_one_is_found(finished: Path) -> None:
    """The definition is checked on its own, whatever `pareto.insert` did."""
    events: list[dict[str, Any]] = []
    history = record.load(finished, doubles.problem(SETTINGS), events).history
    assert list(verify._front(history, events)) == []
    front = history.state.front
    good, better = front.numbers[0], front.values.copy()
    better[0] = [0.0, 1.0]
    object.__setattr__(front, "values", better)
    texts = list(verify._front(history, events))
    assert any(f"is on the front, though [{good}] are no worse" in text for text in texts)
    object.__setattr__(front, "numbers", front.numbers[1:])
    object.__setattr__(front, "values", history.state.front.values[1:])
    texts = list(verify._front(history, events))
    assert f"child {good} is not on the front, though nobody there is as good" in texts


def test_what_cannot_be_read_at_all_is_an_error(run: Path) -> None:
    for path in files.journals(1):
        (run / path).unlink()
    with pytest.raises(RecordError, match="both copies of the journal are damaged"):
        verify.verify(run)
    (run / files.RUN).unlink()
    with pytest.raises(ConfigError, match="not a run folder"):
        verify.verify(run)


def test_every_planted_event_kind_is_known(run: Path) -> None:
    kinds = {event["event"] for event in doubles.events(run, SETTINGS)}
    assert kinds == {
        "epoch",
        "launched",
        "joined",
        "asked",
        "attempt",
        "lost",
        "committed",
        "left",
        "sealed",
        "complete",
        "closed",
    }


# ---------------------------------------------------------------- status and front


def test_the_front_as_the_user_sees_it(run: Path) -> None:
    history = doubles.load(run, SETTINGS).history
    members = status.front(history)
    assert [member["id"] for member in members] == sorted(
        history.state.front.numbers, key=lambda number: history.children[number].cheap[0]
    )
    assert len(members) == len(history.state.front.numbers) > 2
    for member in members:
        child = history.children[member["id"]]
        assert {"id", "digest", "parent", "edits", "generation", "objectives", "receipt", "weights"} <= member.keys()
        assert member["objectives"] == {"val_error": doubles.error_of(child.digest), "params": child.cheap[0]}
        assert member["parent"] == child.parent and member["generation"] == child.generation
        assert files.sha256((run / member["weights"]["path"]).read_bytes()) == member["weights"]["sha256"]
    json.dumps(members, allow_nan=False)


def test_status_of_a_complete_run(run: Path) -> None:
    before = doubles.contents(run)
    found = status.status(run)
    assert found["state"] == "complete" and found["warnings"] == []
    assert found["children"] == {
        "budget": 18, "asked": 21, "initial": 3, "committed": 21, "failed": 1, "in_flight": 0,
    }  # fmt: skip
    assert found["attempts_lost"] == {"crash": 1, "walltime": 0, "worker": 0, "stopped": 0}
    assert found["workers_left"].keys() <= {"stopped by the coordinator", "died", "signalled"}
    assert found["usage"]["unit"] == "worker-hours" and found["nodes_excluded"] == {}
    assert found["failures"] == [{"child": 5, **doubles.FAILURE}]
    assert found["workers"] == [] and found["training_s"] == 20 * 0.5
    assert found["hypervolume"]["front"] > found["hypervolume"]["initial"] > 0
    assert found["front"] == status.front(doubles.load(run, SETTINGS).history)
    json.dumps(found, allow_nan=False)
    status.children(doubles.load(run, SETTINGS).history, run)
    assert doubles.contents(run) == before


def test_status_of_a_run_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with doubles.folder() as run:
        backend = doubles.FakeBackend(run, lambda task: "long" if task["child"] == 4 else None)
        made = doubles.start(run, SETTINGS, backend)
        for _ in range(40):
            made._turn()
        before = doubles.contents(run)
        words = {
            "alive": f"running: {owner.describe(owner.identity())}",
            "gone": "stopped",
            "unknown": "unknown: last held by",
        }
        for verdict, word in words.items():
            monkeypatch.setattr(owner, "judge", lambda who, verdict=verdict: verdict)
            assert status.status(run)["state"].startswith(word)
        found = status.status(run)
        assert found["children"]["in_flight"] == 5 and found["hypervolume"]["initial"] > 0
        doing = {worker["name"]: worker["doing"] for worker in found["workers"]}
        assert "child 4" in doing.values()
        assert {(worker["node"], worker["device"]) for worker in found["workers"]} == {
            (owner.identity()["host"], "fake")
        }
        assert doubles.contents(run) == before
        made.close()
        assert status.status(run)["state"] == "stopped"


def test_status_before_the_first_coordinator() -> None:
    with doubles.folder() as run:
        from lemonade_hpc.run import session

        session._prepare(SETTINGS, doubles.images(), run)
        found = status.status(run)
        assert found["state"] == "not started" and found["front"] == []
        assert found["hypervolume"] == {"front": 0.0, "initial": None}


def test_status_says_what_is_damaged(run: Path) -> None:
    path = run / files.journals(1)[0]
    path.write_bytes(path.read_bytes()[:-400])
    assert len(status.status(run)["warnings"]) == 1


def test_status_uses_the_newest_budget(run: Path) -> None:
    made = doubles.start(run, doubles.config(search={"children": 77}), doubles.FakeBackend(run))
    made.close()
    found = status.status(run)
    assert found["children"]["budget"] == 77 and found["state"] == "stopped"


def test_status_of_a_run_whose_owner_cannot_be_read_says_so(run: Path) -> None:
    (run / files.owner(2)).write_text("{")
    with pytest.raises(RecordError, match=r"owner.json: cannot be read"):
        status.status(run)


@pytest.mark.parametrize(
    ("messages", "doing"),
    [
        ([], "ready on cpu"),
        ([{"say": "started", "child": 3, "attempt": "a"}], "child 3"),
        ([{"say": "epoch", "child": 3, "epoch": 2}], "child 3, epoch 2"),
        ([{"say": "outcome", "outcome": {}}], "idle"),
        ([{"say": "crashed", "child": 3, "attempt": "a"}], "idle"),
        ([{"say": "bye", "reason": "idle"}], "left: idle"),
    ],
)
def test_a_workers_last_words(tmp_path: Path, messages: list[dict[str, Any]], doing: str) -> None:
    from lemonade_hpc.run.log import LogWriter

    (tmp_path / files.done_log("w")).parent.mkdir(parents=True)
    with LogWriter(tmp_path / files.done_log("w")) as writer:
        writer.append(
            [{"say": "hello", "node": "here", "at": 0.0}, {"say": "ready", "device": "cpu", "at": 4.5}, *messages]
        )
    assert status._worker(tmp_path, "w", None) == {
        "name": "w", "node": "here", "job": None, "device": "cpu", "doing": doing, "lived_s": 4.5, "busy_s": 0.0
    }  # fmt: skip


def test_children_are_those_that_a_figure_shows(run: Path) -> None:
    history = doubles.load(run, SETTINGS).history
    shown = status.children(history, run)
    assert [child["id"] for child in shown] == [number for number in range(21) if number != 5]
    assert {child["id"] for child in shown if child["front"]} == set(history.state.front.numbers)
    assert {child["id"] for child in shown if child["initial"]} == {0, 1, 2}
    assert [row["number"] for row in population.finished(run, history)] == list(range(21))
