"""The record of a run: ordered events, from which everything else is derived.

Decides: what an event is, what it changes (`History`), how a run folder is read, and who may write it (`open_epoch`). The
journal of an epoch is written twice, so that a flipped bit or a cut in one copy is bridged by the other. An epoch is
one coordinator's life: its folder, made complete and renamed into place, is the lease. Lines that a superseded
coordinator still writes stand behind the point where its successor continued, and are void.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemonade_hpc import __version__, files
from lemonade_hpc.config import Config, ConfigError, from_dict, to_dict
from lemonade_hpc.data import DataSet
from lemonade_hpc.run import owner
from lemonade_hpc.run.log import LogWriter, walk
from lemonade_hpc.search import evolution, morphisms
from lemonade_hpc.search import graph as graphs
from lemonade_hpc.search.evolution import Child, Drawn, Outcome, Problem
from lemonade_hpc.search.ops import Signature

SCHEMA = 1
"""Version of the run folder's layout. A newer one is refused."""

Event = dict[str, Any]


class RecordError(RuntimeError):
    """The record is damaged beyond repair: says where and what is lost. Exit code 1."""


class Held(ConfigError):
    """Another coordinator holds the run. Exit code 2."""


# ---------------------------------------------------------------- identity


def identity(config: Config, data: DataSet, fixed: Problem) -> dict[str, Any]:
    """What `run.json` says of a new run: written once, never changed."""
    return {
        "run": uuid.uuid4().hex,
        "schema": SCHEMA,
        "code": __version__,
        "config": to_dict(config),
        "data": {
            "checksum": data.checksum,
            "shape": list(data.shape),
            "num_classes": data.num_classes,
            "majority_error": data.majority_error,
            "num_train": len(data.train.labels),
            "num_validation": len(data.validation.labels),
            "num_test": len(data.test.labels),
        },
        "reference": list(fixed.reference),
    }


def read_identity(run: Path) -> dict[str, Any]:
    """The content of `run.json`; raises ConfigError where there is none, or one of a newer schema."""
    path = run / files.RUN
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        schema = content["schema"]
    except FileNotFoundError:
        raise ConfigError(f"{run}: not a run folder (it has no {files.RUN})") from None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if schema > SCHEMA:
        raise ConfigError(f"{path}: written by a newer version (schema {schema}, this one reads up to {SCHEMA})")
    return content


def problem_of(run: Path, content: dict[str, Any], config: Config | None = None) -> Problem:
    """The search's fixed part, from `run.json`; with another `config` where budget or cluster keys have changed."""
    config = config or from_dict(content["config"], str(run / files.RUN))
    signature = Signature(tuple(content["data"]["shape"]), content["data"]["num_classes"])
    return Problem(config, signature, tuple(content["reference"]))


# ---------------------------------------------------------------- events


def child_to_json(child: Child) -> dict[str, Any]:
    """A child as the record states it."""
    return {
        "number": child.number,
        "parent": child.parent,
        "edits": morphisms.to_json(child.edits),
        "graph": graphs.to_json(child.graph),
        "digest": child.digest,
        "cheap": list(child.cheap),
        "generation": child.generation,
        "depth": child.depth,
    }


def child_from_json(data: dict[str, Any]) -> Child:
    """The inverse of `child_to_json`."""
    fields = dict(data) | {
        "edits": morphisms.from_json(data["edits"]),
        "graph": graphs.from_json(data["graph"]),
        "cheap": tuple(data["cheap"]),
    }
    return Child(**fields)


def asked(before: evolution.State, after: evolution.State, n: int, children: Iterable[Child]) -> Event:
    """The event of one `ask`, complete enough to repeat the decision and to do without repeating it."""
    drawn = after.redrawn
    return {
        "event": "asked",
        "ask": before.num_asks,
        "n": n,
        "redrawn": [drawn.no_edit, drawn.limit, drawn.duplicate],
        "children": [child_to_json(child) for child in children],
    }


def outcome_of(fixed: Problem, data: dict[str, Any]) -> Outcome:
    """What the search learns from an outcome as the worker reports it."""
    if "failure" in data:
        return Outcome(data["child"], (), data["failure"]["kind"])
    names = [o.name for o in fixed.config.objectives if o.name not in fixed.cheap]
    return Outcome(data["child"], tuple(data["objectives"][name] for name in names))


@dataclass
class Attempt:
    """One execution of a child by one worker."""

    id: str
    worker: str
    lost: str | None = None
    """How it was lost (`crash`, `worker`, `stopped`), None while it may still report."""


class History:
    """The events so far, folded: the search's state, and what the coordinator must know besides.

    Holds children in flight, on the front, and not sealed yet; not those long finished.
    """

    def __init__(self, fixed: Problem) -> None:
        self.state = evolution.start(fixed)
        self.seen: set[str] = set()
        self.attempts: dict[int, list[Attempt]] = {}
        """Attempts at children in flight."""
        self.results: dict[int, dict[str, Any]] = {}
        """Outcomes of children on the front and of parents of children in flight: their weights are kept."""
        self.children: dict[int, Child] = {}
        """The same children, and those in flight."""
        self.released: list[int] = []
        """Children whose weights nobody needs any more, since the last `release`."""
        self.unsealed: dict[int, dict[str, Any]] = {}
        """Children of no sealed file yet; with `outcome` once committed."""
        self.sealed: list[Event] = []
        self.failures: list[dict[str, Any]] = []
        """Outcomes of failed children."""
        self.num_lost = {"crash": 0, "worker": 0, "stopped": 0}
        self.wall_s = 0.0
        """Seconds that committed attempts took."""
        self.num_records = 0
        self.initial_front: Any = None
        """Objective values of the front of the initial networks, once all have reported."""
        self.complete: Event | None = None

    def apply(self, event: Event) -> None:
        """One more event; raises ValueError for one that cannot follow."""
        kind = event["event"]
        if kind == "asked":
            self._asked(event)
        elif kind == "attempt":
            self.attempts[event["child"]].append(Attempt(event["attempt"], event["worker"]))
        elif kind == "lost":
            self._lost(event)
        elif kind == "committed":
            self._committed(event["outcome"])
        elif kind == "sealed":
            self.sealed = [one for one in self.sealed if one["children"] != event["children"]] + [event]
            for number in range(*event["children"]):
                self.unsealed.pop(number, None)
        elif kind == "complete":
            self.complete = event
        else:
            raise ValueError(f"unknown event {kind!r}")
        self.num_records += 1

    def _asked(self, event: Event) -> None:
        children = tuple(child_from_json(data) for data in event["children"])
        self.state = evolution.take(self.state, children, Drawn(*event["redrawn"]))
        self.complete = None
        for child, data in zip(children, event["children"], strict=True):
            self.seen.add(child.digest)
            self.attempts[child.number] = []
            self.children[child.number] = child
            self.unsealed[child.number] = dict(data)

    def _lost(self, event: Event) -> None:
        self.num_lost[event["kind"]] += 1
        for attempt in self.attempts.get(event["child"], []):
            if attempt.id == event["attempt"]:
                attempt.lost = event["kind"]

    def _committed(self, outcome: dict[str, Any]) -> None:
        number = outcome["child"]
        self.state = evolution.tell(self.state, outcome_of(self.state.problem, outcome))
        self.attempts.pop(number)
        self.wall_s += outcome.get("wall_s", 0.0)
        self.unsealed[number]["outcome"] = outcome
        if "failure" in outcome:
            self.failures.append(outcome)
        self.results[number] = outcome
        needed = set(self.state.front.numbers) | {c.parent for c in self.state.in_flight.values()}
        for gone in self.results.keys() - needed:
            del self.results[gone]
            self.released.append(gone)
        self.children = {n: c for n, c in self.children.items() if n in self.results or n in self.state.in_flight}
        if self.initial_front is None and not any(n < self.state.num_initial for n in self.state.in_flight):
            self.initial_front = self.state.front.values

    def release(self) -> list[int]:
        """Children whose weights may be deleted; each is returned once."""
        released, self.released = self.released, []
        return released

    def sealable(self, count: int) -> tuple[int, int] | None:
        """The first `count` unsealed children, as (first, past the last), if all of them are finished."""
        first = min(self.unsealed, default=0)
        numbers = range(first, first + count)
        return (first, first + count) if all("outcome" in self.unsealed.get(n, {}) for n in numbers) else None


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Loaded:
    """A run folder as read: its events folded, the last epoch, the link of its last line, and what was damaged."""

    history: History
    epoch: int
    link: str
    warnings: tuple[str, ...]
    mended: dict[Path, bytes]
    """Damaged copies of journals, as they should be; `open_epoch` puts them back."""


def load(run: Path, fixed: Problem, upto: list[Event] | None = None) -> Loaded:
    """Read all epochs' journals; raises RecordError for what both copies of a journal have lost.

    `upto`, if given, receives every event in effect, in order, the beginnings of epochs among them.
    """
    history, warnings, mended = History(fixed), list[str](), dict[Path, bytes]()
    number, link = 0, ""
    for number, lines in _effective(run, warnings, mended):
        for link, body in lines:
            event = json.loads(body)
            if event["event"] != "epoch":
                history.apply(event)
            if upto is not None:
                upto.append(event)
    return Loaded(history, number, link, tuple(warnings), mended)


def _effective(run: Path, warnings: list[str], mended: dict[Path, bytes]) -> list[tuple[int, list[tuple[str, str]]]]:
    """For each epoch that counts, oldest first, its lines in effect as (link, JSON text)."""
    found: list[tuple[int, list[tuple[str, str]]]] = []
    until: str | None = None
    wanted = max(files.epochs(run), default=0)
    while wanted:
        lines = _journal(run, wanted, warnings, mended)
        if until is not None:
            links = [link for link, _ in lines]
            if until not in links:
                raise RecordError(
                    f"{run / files.epoch_folder(wanted)}: both copies of the journal are damaged after line {len(lines)}; "
                    f"a later coordinator has seen more. What was recorded in between is lost."
                )
            lines = lines[: links.index(until) + 1]
        if not lines:
            raise RecordError(f"{run / files.epoch_folder(wanted)}: both copies of the journal have lost their first line")
        found.append((wanted, lines))
        before = json.loads(lines[0][1])["continues"]
        wanted, until = (before["epoch"], before["link"]) if before else (0, None)
    return found[::-1]


def _journal(run: Path, epoch: int, warnings: list[str], mended: dict[Path, bytes]) -> list[tuple[str, str]]:
    """An epoch's intact lines, from both copies; a difference that a crash cannot explain is a warning."""
    paths = [run / path for path in files.journals(epoch)]
    contents = [path.read_bytes() if path.exists() else b"" for path in paths]
    lines = walk(contents)
    for k, (path, content) in enumerate(zip(paths, contents, strict=True)):
        own = len(walk([content]))
        crash = k == 1 and content.count(b"\n") == own  # the copy is written last: it may lack the newest lines
        if own < len(lines) and not crash:
            warnings.append(f"{path}: damaged after line {own}; {len(lines) - own} lines were read from the other copy")
            mended[path] = "".join(f"{link} {body}\n" for link, body in lines).encode()
    return lines


# ---------------------------------------------------------------- writing


class Journal:
    """The two copies of one epoch's journal, written one after the other."""

    def __init__(self, run: Path, epoch: int, link: str) -> None:
        self.epoch = epoch
        self._writers = [LogWriter(run / path, link) for path in files.journals(epoch)]

    def append(self, events: list[Event]) -> None:
        """Make events durable in both copies. Raises OSError; whether they count is then seen by reading again."""
        for writer in self._writers:
            writer.append(events)

    def close(self) -> None:
        """Close both files."""
        for writer in self._writers:
            writer.close()


def open_epoch(
    run: Path, config: Config, loaded: Loaded, workers: Iterable[str], *, take_over: bool
) -> tuple[int, Journal]:
    """Become the run's coordinator: the new epoch's number and journal.

    The epoch's folder, with owner, journal and the mailboxes of adopted `workers`, is made aside and renamed into place,
    which is atomic and fails if another coordinator was faster. Raises Held if the run is another's.
    """
    check_free(run, take_over=take_over)
    number = loaded.epoch + 1
    aside = run / files.EPOCHS / f"{files.TEMPORARY}{uuid.uuid4().hex}"
    aside.mkdir(parents=True)
    before = {"epoch": loaded.epoch, "records": loaded.history.num_records, "link": loaded.link}
    continues = before if loaded.epoch else None
    header = {"event": "epoch", "epoch": number, "continues": continues, "children": config.search.children}
    try:
        who = {"owner": owner.identity(), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "code": __version__}
        files.write_json(aside / "owner.json", who | {"config": to_dict(config)})
        files.write(aside / "heartbeat", b"")
        for name in files.journals(number):
            with LogWriter(aside / name.name) as writer:
                writer.append([header])
                link = writer.previous
        for worker in workers:
            (aside / "workers" / worker).mkdir(parents=True)
            files.write(aside / "workers" / worker / "assigned.log", b"")
        os.rename(aside, run / files.epoch_folder(number))
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if (run / files.epoch_folder(number)).exists():
            check_free(run, take_over=False)
            raise Held(f"{run}: another coordinator has just started") from error
        raise
    files.sync_folder(run / files.EPOCHS)
    for path, content in loaded.mended.items():
        files.write(path, content)
    return number, Journal(run, number, link)


def check_free(run: Path, *, take_over: bool) -> None:
    """Raise Held unless the last epoch's owner is gone, or `take_over` says that a person knows it is."""
    numbers = files.epochs(run)
    if not numbers or take_over:
        return
    who = json.loads((run / files.owner(numbers[-1])).read_text())["owner"]
    verdict = owner.judge(who)
    if verdict == "alive":
        raise Held(f"{run}: held by {owner.describe(who)}, which is running. Stop it first, or use another --run folder")
    if verdict == "unknown":
        raise Held(
            f"{run}: last held by {owner.describe(who)}; whether it still runs cannot be told from here. "
            f"If you know that it does not, add --take-over"
        )
