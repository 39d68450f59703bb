"""Who may write the record: the lease of a run.

Decides: whether a run is free, and how a coordinator becomes its only one. An epoch is one coordinator's life; its
folder, made complete and renamed into place, is the lease, for a rename succeeds once. No lock is ever taken. A
coordinator that is superseded finds out by looking for a higher epoch; what it still writes counts for nothing, for its
journal is its own and the files it makes bear its epoch's number. Where a coordinator follows one of another machine,
what that one did may be seen late; it is waited for (`settle`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lemonade_hpc import __version__, files
from lemonade_hpc.config import Config, ConfigError, to_dict
from lemonade_hpc.run import journal, owner, queue
from lemonade_hpc.run.journal import Journal, RecordError
from lemonade_hpc.run.log import LogWriter
from lemonade_hpc.run.record import Loaded

QUIET_S = 5.0
"""Longer than between two beats of a coordinator, and than from the last look at a record to the lease."""
LOOK_S = 0.5


class Held(ConfigError):  # noqa: N818
    """Another coordinator holds the run. Exit code 2."""


class Behind(Held):
    """The record has grown since it was read, by a coordinator that has ended since: read it again."""


def read_owner(run: Path, epoch: int) -> dict[str, Any]:
    """Who holds an epoch, since when, with which configuration; raises RecordError."""
    path = run / files.owner(epoch)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from error
    return content


def open_epoch(
    run: Path, config: Config, loaded: Loaded, workers: Iterable[str], *, take_over: bool, image: str | None = None
) -> Journal:
    """Become the run's coordinator: the journal of the new epoch. `image`: the digest of its workers' image.

    The epoch's folder, with owner, journal and the mailboxes of adopted `workers`, is made aside and renamed into
    place, which is atomic and fails if another coordinator was faster. What the last coordinator wrote after `loaded`
    was read would be void, though it may have deleted weights on its strength: so that must be nothing, seen when it
    was known to be gone or, where a person says so (`take_over`), again once it can delete nothing more.

    Raises Held if the run is another's, Behind where `loaded` is not all there is.
    """
    check_free(run, take_over=take_over)
    if journal.read(run).end != (loaded.epoch, loaded.link):
        raise _at_work(run) if take_over else Behind(f"{run}: another coordinator has just written to its journal")
    number = loaded.epoch + 1
    aside = run / files.EPOCHS / f"{files.TEMPORARY}{uuid.uuid4().hex}"
    try:
        files.make_folder(aside)
    except PermissionError as error:
        raise ConfigError(f"{aside.parent}: no permission to write there") from error
    try:
        link = _prepare(run, aside, number, config, loaded, workers, image)
        os.rename(aside, run / files.epoch_folder(number))
    except Exception as error:
        beaten = (run / files.epoch_folder(number)).exists() or not aside.exists()  # the winner may have tidied up
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and beaten and error.errno not in files.STORAGE_ERRORS:
            check_free(run, take_over=False)
            raise Held(f"{run}: another coordinator has just started") from error
        raise
    if take_over and journal.read(run, loaded.epoch).end != (loaded.epoch, loaded.link):
        os.rename(run / files.epoch_folder(number), aside)
        shutil.rmtree(aside)
        raise _at_work(run)
    for folder in (run / files.EPOCHS, run):
        files.sync_folder(folder)
    for path, content in loaded.mended.items():
        files.write(path, content)
    return Journal(run, number, link)


def _prepare(
    run: Path, aside: Path, number: int, config: Config, loaded: Loaded, workers: Iterable[str], image: str | None
) -> str:
    """Fill a new epoch's folder; the link of its journal's first line."""
    before = {"epoch": loaded.epoch, "records": loaded.history.num_records, "link": loaded.link}
    header = {
        "event": "epoch",
        "epoch": number,
        "identity": files.sha256((run / files.RUN).read_bytes()),
        "continues": before if loaded.epoch else None,
        "children": config.search.children,
        "retries": config.cluster.retries,
    }
    who = {"owner": owner.identity(), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "code": __version__, "image": image}
    files.write_json(aside / "owner.json", who | {"config": to_dict(config)})
    for name in (files.heartbeat(number), files.stop_order(number)):
        files.write(aside / name.name, b"")
    for name in files.journals(number):
        with LogWriter(aside / name.name) as writer:
            writer.append([header])
            link = writer.previous
    for worker in workers:
        files.make_folder(aside / "workers" / worker)
        files.write(aside / "workers" / worker / "assigned.log", b"")
    files.sync_folder(aside)
    return link


def settle(
    run: Path, stale_s: float | None, note: Callable[[str], None], *, take_over: bool, calm_s: float = 0.0
) -> None:
    """Wait until all that the last coordinator did must be seen here; nothing to wait for if it was on this machine.

    On a file system that is up to `stale_s` late, lines that it has committed may not be seen yet, and a journal that
    continues before them would make them void. Only looking on tells whether one on another machine lives: what is seen
    to change later than all that was done before is its work. Raises Held in that case. `calm_s`: nobody sits here and
    waits, and Slurm is not to be asked for so long, for that one may have asked it a moment ago.
    """
    if not _elsewhere(run):
        return
    if not calm_s:
        check_free(run, take_over=take_over)
    bound_s = files.Patience(files.STALE_S if stale_s is None else stale_s).bound_s
    quiet_s, key = max((2 * bound_s + QUIET_S, "stale_s"), (calm_s, "status_s"))
    note(f"its last coordinator was on another machine: looking on for {quiet_s:.0f} s (by cluster.{key}) first")
    began = since = time.monotonic()
    seen = _sight(run)
    while time.monotonic() - since < quiet_s:
        time.sleep(LOOK_S)
        before, seen = seen, _sight(run)
        if seen != before:
            since = time.monotonic()
            if since - began > bound_s:
                raise _at_work(run)


def _elsewhere(run: Path) -> bool:
    """Whether there is a coordinator to follow that was on another machine, and ended in no good order."""
    numbers = files.epochs(run)
    if not numbers:
        return False
    with contextlib.suppress(RecordError):
        events = _events(run)
        complete = "complete" in events and "asked" not in events[events.index("complete") :]
        if complete or events[-1] == "closed":
            return False
        return bool(read_owner(run, numbers[-1]).get("owner", {}).get("host") != owner.identity()["host"])
    return True


def _events(run: Path) -> list[str]:
    """What the newest epoch's coordinator has recorded. Raises RecordError."""
    return [json.loads(body)["event"] for _, body in journal.read(run).epochs[-1][1]]


def _sight(run: Path) -> tuple[int, list[int | None]]:
    """What changes as a coordinator works: the newest epoch, the sizes of its heartbeat and journals."""
    number = max(files.epochs(run), default=0)
    sizes: list[int | None] = []
    for path in (files.heartbeat(number), *files.journals(number)):
        try:
            sizes.append((run / path).stat().st_size)
        except FileNotFoundError:
            sizes.append(None)
    return number, sizes


def check_free(run: Path, *, take_over: bool) -> None:
    """Raise Held unless the last epoch's owner is gone, or `take_over` says that a person knows it is."""
    numbers = files.epochs(run)
    if not numbers or take_over:
        return
    try:
        who = read_owner(run, numbers[-1])["owner"]
        verdict = judge(run, who)
    except (RecordError, KeyError) as error:
        raise Held(
            f"{run}: who holds it cannot be told: {error}. If you know that nobody does, add --take-over"
        ) from error
    if verdict == "alive":
        raise Held(
            f"{run}: held by {owner.describe(who)}, which is running. Stop it first, or use another --run folder"
        )
    if verdict == "unknown":
        raise Held(
            f"{run}: last held by {owner.describe(who)}; whether it still runs cannot be told from here. "
            f"If you know that it does not, add --take-over"
        )


def judge(run: Path, who: dict[str, Any]) -> owner.Verdict:
    """Whether the last epoch's owner lives.

    One that has closed its journal has nothing more to do with the run, wherever it was.
    """
    with contextlib.suppress(RecordError):
        if _events(run)[-1] == "closed":
            return "gone"
    return queue.judge(who)


def _at_work(run: Path) -> Held:
    return Held(f"{run}: its coordinator is at work: it has just written to its journal. Stop it first")
