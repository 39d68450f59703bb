"""One invocation of `search`: check everything, then start, continue or recover a run.

Decides: what is refused before anything is written (data, configuration, another run's folder), and how signals end a
session. The same call starts, recovers and resumes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lemonade_hpc import data as data_sets
from lemonade_hpc import explain, files
from lemonade_hpc.config import Config, ConfigError, from_dict, resolve, to_dict
from lemonade_hpc.run import backends, chain, container, lease, owner, population, queue, record, request, slurm
from lemonade_hpc.run.backends import Backend, InlineBackend, LocalBackend
from lemonade_hpc.run.container import Image
from lemonade_hpc.run.coordinator import Coordinator, Observer, Stopped, Superseded
from lemonade_hpc.run.history import History
from lemonade_hpc.run.journal import RecordError
from lemonade_hpc.run.ledger import Halted, NoRoom, RunFailed
from lemonade_hpc.run.record import Loaded
from lemonade_hpc.search import evolution
from lemonade_hpc.search.evolution import Problem
from lemonade_hpc.search.ops import Signature

MAY_CHANGE = ("cluster", "container", "storage", "search.children", "data.root")
"""Keys that may differ when a run goes on: its numbers stay comparable. What data.root leads to must be the same."""


HELD_S, LONG_HELD_S = 4.0, 60.0
"""How often a coordinator of a chain looks whether the one before has ended: first, and where that takes long."""
LOOKS = 30
"""So often it looks before that counts as long."""
ROOM_S = 600.0
"""How long one of a chain waits where the file system fails; if it leaves then, another one follows at once."""

Done = TypeVar("Done")


def search(config: Config, run: Path, observer: Observer, *, take_over: bool = False) -> History:
    """Run a search until its budget is spent.

    Raises ConfigError (the user's input, nothing was written), RunFailed, RecordError or StoreError (exit code 1),
    Stopped (the same call goes on).
    """

    def begin() -> Coordinator | History:
        try:
            return _open(config, run, observer, take_over=take_over or chain.takes_over())
        finally:
            chain.has_begun(run)

    opened = patiently(begin, run, observer.note)
    if isinstance(opened, History):
        return opened
    try:
        return _run(opened, observer)
    except (OSError, NoRoom) as error:
        raise _waited(error, run, observer.note, files.OUTAGES) from error


def patiently(do: Callable[[], Done], run: Path, note: Callable[[str], None]) -> Done:
    """Do it. Where the file system fails, raise NoRoom; a link of a chain tries again: it knows what a person said."""
    while True:
        try:
            return do()
        except OSError as error:
            no_room = _waited(error, run, note)
            if not chain.is_link():
                raise no_room from error


def _waited(
    error: OSError | NoRoom, run: Path, note: Callable[[str], None], outages: frozenset[int] = files.STORAGE_ERRORS
) -> NoRoom:
    """What to raise where the file system fails, in a chain later; raises what is none of the `outages` at once."""
    if isinstance(error, OSError) and error.errno not in outages:
        raise error
    no_room = error if isinstance(error, NoRoom) else NoRoom(f"the file system fails: {files.in_words(error)}")
    if chain.is_link():
        chain.has_begun(run)
        note(f"cannot go on: {no_room}. To be tried again in {ROOM_S / 60:.0f} minutes")
        time.sleep(ROOM_S)
    return no_room


def _open(config: Config, run: Path, observer: Observer, *, take_over: bool) -> Coordinator | History:
    """Check everything and take the run's lease; where nothing is left to be done, what has happened in it."""
    data = data_sets.load(config.data)
    config = resolve(config, data.shape)
    if new := files.size(run / files.RUN) is None:
        _check_backend(config)
    image = container.read(config)
    fixed = _prepare(config, data, run, image)
    journal, looks = None, 0
    while journal is None:
        try:
            calm_s = 0.0 if chain.begun_by_a_person() else config.cluster.status_s
            lease.settle(run, config.cluster.stale_s, observer.note, take_over=take_over, calm_s=calm_s)
            loaded = record.load(run, fixed)
            history = loaded.history
            if _nothing_to_do(run, loaded):
                for text in _overspent(history):
                    observer.note(text)
                return history
            _same_image(config, run, history, image, observer.note)
            if not new and chain.begun_by_a_person():
                _check_backend(config)
            chain.refuse_to_go_on(run, loaded, observer.note)
            digest = image.sha256 if image else None
            journal = lease.open_epoch(run, config, loaded, history.reporters(), take_over=take_over, image=digest)
        except lease.Behind:
            pass
        except lease.Held as held:
            if not chain.is_link():
                raise
            if owner.is_own(lease.read_owner(run, files.epochs(run)[-1])["owner"]):
                raise NoRoom("the file system failed when it had just begun") from held  # the next one goes on
            chain.has_begun(run)
            if looks in (0, LOOKS):
                observer.note(f"{held}. Waiting for that")
            looks += 1
            time.sleep(HELD_S if looks <= LOOKS else LONG_HELD_S)
    for text in (*(f"warning: {one}" for one in data.warnings), *loaded.warnings, *loaded.late, *_overspent(history)):
        observer.note(text)
    return Coordinator(run, config, history, journal, _backend(run, config, image, observer), observer)


def _run(coordinator: Coordinator, observer: Observer) -> History:
    """Have a coordinator search until the budget is spent, and leave in good order whatever ends it."""
    with _signals(coordinator):
        orderly = True
        try:
            coordinator.adopt()
            if chain.begun_by_a_person():
                coordinator.pardon()
            coordinator.search()
        except (Stopped, RunFailed) as error:
            coordinator.why, coordinator.failed = str(error), isinstance(error, RunFailed)
            coordinator.halted = coordinator.failed or isinstance(error, Halted)
            if isinstance(error, Stopped) and not isinstance(error, Superseded) and not chain.is_link():
                _tell_who_goes_on(coordinator, observer)
            raise
        except BaseException as error:
            orderly = isinstance(error, OSError) and error.errno in files.OUTAGES
            raise
        finally:
            chain.has_begun(coordinator.run)
            coordinator.close(orderly=orderly)
            if coordinator.halted and chain.is_link():
                chain.end(record.read_identity(coordinator.run)["run"])
    return coordinator.history


def _tell_who_goes_on(coordinator: Coordinator, observer: Observer) -> None:
    """Somebody who stops a search at the terminal may think that this is all."""
    cluster = coordinator.config.cluster
    if cluster.backend == "slurm" and coordinator.num_workers:
        observer.note(
            f"{coordinator.num_workers} workers go on: they end what they have, and leave when they have waited for "
            f"{cluster.idle_exit_min:g} minutes; {explain.command('cancel', str(coordinator.run))} ends them at once"
        )


def submit(config: Config, run: Path, *, take_over: bool = False) -> str:
    """Check everything, as `search` does, and submit the run's coordinator as a job; its id. Raises ConfigError."""
    config, data = _to_submit(config)
    _check_backend(config)
    slurm.check_script(chain.script(config, run, chain.job_name("check")), "the coordinator's job")
    image = container.read(config)
    fixed = _prepare(config, data, run, image)
    lease.check_free(run, take_over=take_over)
    _refuse_to_wait_for_nothing(config, run, fixed, image)
    return chain.begin(config, run, take_over=take_over)


def check_run(config: Config, data: data_sets.DataSet, run: Path) -> str:
    """Whether a run that has begun goes on with this configuration, data and image; what it has done, in words.

    Raises ConfigError, or RecordError for a record that is damaged.
    """
    loaded = record.load(run, _go_on(config, data, run))
    history = loaded.history
    if not _nothing_to_do(run, loaded):
        _refuse_hopeless(run, history)
        _same_image(config, run, history, container.read(config), lambda text: None)
    return f"{run}: {'is complete' if history.complete else 'goes on'}, {history.state.num_committed} children are done"


def _refuse_to_wait_for_nothing(config: Config, run: Path, fixed: Problem, image: Image | None) -> None:
    """Raise ConfigError for a run that will not go on, or has nothing left to do: its job might wait for hours."""
    with contextlib.suppress(RecordError):  # it may be seen late; its coordinator will find out
        loaded = record.load(run, fixed)
        state = loaded.history.state
        if _nothing_to_do(run, loaded):
            raise ConfigError(f"{run}: is complete, {state.num_committed} children; raise search.children to go on")
        _refuse_hopeless(run, loaded.history)
        _same_image(config, run, loaded.history, image, lambda text: None)


def _refuse_hopeless(run: Path, history: History) -> None:
    state = history.state
    if state.num_asks and not state.members and not state.in_flight:
        raise ConfigError(f"{run}: no initial network is valid; mend the cause and give another --run folder")


def submission(config: Config, run: Path) -> tuple[str, str]:
    """The scripts of the coordinator's job and of a worker's, as `submit` would have them run."""
    config, _ = _to_submit(config)
    slurm.check_commands()
    new = files.size(run / files.RUN) is None
    run_id = "x" * 8 if new else record.read_identity(run)["run"]
    folder = run / files.WORKERS / "e1w00" / "job"
    python = container.worker_python(run) if container.path_of(config) else None
    worker = request.script(config.cluster, f"{queue.prefix(run_id)}e1w00", folder, python)
    return chain.script(config, run, chain.job_name(run_id)), worker


def _to_submit(config: Config) -> tuple[Config, data_sets.DataSet]:
    if config.cluster.backend != "slurm":
        raise ConfigError(f"cluster.backend: got {config.cluster.backend}; what is submitted needs slurm")
    data = data_sets.load(config.data)
    return resolve(config, data.shape), data


def _check_backend(config: Config) -> None:
    """Raise ConfigError where no worker could be started, as far as that can be known beforehand."""
    if config.cluster.backend == "slurm":
        container.check(config)
        slurm.check(config.cluster)
    elif config.cluster.device == "cuda" and not backends.may_have_gpu():
        raise ConfigError("cluster.device: got cuda, but this machine has no GPU; allowed: auto, cpu, cuda")


def _overspent(history: History) -> Iterator[str]:
    """Say it where the budget was lowered below what has been asked."""
    budget, asked = history.state.problem.config.search.children, history.state.num_asked - history.state.num_initial
    if asked > budget:
        yield f"search.children is {budget}, but {asked} children have been asked: they stay, no more will be"


def _nothing_to_do(run: Path, loaded: Loaded) -> bool:
    """Whether the budget is spent and every file is as it should be."""
    history = loaded.history
    if not history.state.complete or history.complete is None or loaded.mended:
        return False
    return all(population.damage(run, event) is None for event in (*history.sealed, history.complete))


def _prepare(config: Config, data: data_sets.DataSet, run: Path, image: Image | None = None) -> Problem:
    """Check configuration and folder against each other; write `run.json` where the run is new."""
    if files.size(run / files.RUN) is not None:
        return _go_on(config, data, run)
    try:
        fixed = evolution.problem(config, Signature(data.shape, data.num_classes), data.majority_error)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if run.exists() and (not run.is_dir() or any(not p.name.startswith(files.TEMPORARY) for p in run.iterdir())):
        raise ConfigError(f"{run}: exists and is not a run folder (it has no {files.RUN}); give another --run")
    if ":" in config.data.name and data_sets.load(config.data).checksum != data.checksum:
        raise ConfigError(
            f"data.name: {config.data.name} gave other data when it was called again; every process calls it, and it "
            f"must return the same arrays each time (seed what is random)"
        )
    try:
        files.make_folder(run)
        files.write_json(
            run / files.RUN, record.identity(config, data, fixed, image.sha256 if image else None), new=True
        )
    except FileExistsError:
        return _go_on(config, data, run)
    except OSError as error:
        if error.errno in files.STORAGE_ERRORS:
            raise
        raise ConfigError(f"{run}: cannot be written: {error}") from error
    return fixed


def _go_on(config: Config, data: data_sets.DataSet, run: Path) -> Problem:
    """The fixed part of a run that has a `run.json`."""
    content = record.read_identity(run)
    _same(content, config, data, run)
    if not os.access(run, os.W_OK):
        raise ConfigError(f"{run}: no permission to write there")
    return record.problem_of(run, content, config)


def _same(content: dict[str, Any], config: Config, data: data_sets.DataSet, run: Path) -> None:
    """Refuse to go on with other settings or other data than the run was started with."""
    then = resolve(from_dict(content["config"], str(run / files.RUN)), data.shape)  # newer keys get their defaults
    before, now = _flat(to_dict(then)), _flat(to_dict(config))
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith(MAY_CHANGE) and before.get(key) != now.get(key):
            was = f"with {key} = {before[key]!r}" if key in before else f"without {key}"
            is_ = f"it is {now[key]!r}" if key in now else "there is none"
            raise ConfigError(
                f"{run}: was started {was}, now {is_}. A run keeps its "
                f"settings, so that its numbers stay comparable; only {', '.join(MAY_CHANGE)} may change. "
                f"Give another --run folder for another search"
            )
    if content["data"]["checksum"] != data.checksum:
        source = config.data.root or config.data.name
        raise ConfigError(f"{run}: was started with other data than {source} gives now (checksum differs)")


def _same_image(config: Config, run: Path, history: History, image: Image | None, note: Callable[[str], None]) -> None:
    """Refuse to go on in another image than last, unless that is allowed: what computes may compute otherwise."""
    numbers = files.epochs(run)
    attempts = [
        (files.attempt_folder(number, one.id), one) for number, all_ in history.attempts.items() for one in all_
    ]
    saved = (one.done or one.lost is None or any((run / folder).glob("*")) for folder, one in attempts)
    if not numbers or not (history.state.num_committed or any(saved)):
        return
    try:
        before = lease.read_owner(run, numbers[-1]).get("image")
    except RecordError:
        return  # whoever held it cannot be told: `lease.open_epoch` wants a person to know, or sees it later
    now = image.sha256 if image else None
    if before == now:
        return
    was, is_ = (f"in the image {digest:.12}" if digest else "in none" for digest in (before, now))
    found = f"its workers ran {was}, now it is {is_}{f' ({image.path})' if image else ''} (SHA-256)"
    if not config.container.may_change:
        raise ConfigError(
            f"{run}: {found}. Give the same image, or allow it by container.may_change: true, which is put on record"
        )
    note(f"{found}, which container.may_change allows")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _backend(run: Path, config: Config, image: Image | None, observer: Observer) -> Backend:
    if config.cluster.backend == "slurm":
        run_id, at_once = record.read_identity(run)["run"], chain.begun_by_a_person()
        start = container.prepare(image, config, run) if image else None
        return slurm.SlurmBackend(run, run_id, config.cluster, observer.note, at_once=at_once, start=start)
    return (InlineBackend if config.cluster.backend == "inline" else LocalBackend)(run, config.cluster)


@contextmanager
def _signals(coordinator: Coordinator) -> Iterator[None]:
    """The first signal ends the session in good order, a second Ctrl-C at once.

    Slurm and containers send one signal twice, so any other is heard once.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if coordinator.stop_signal is not None and number == signal.SIGINT:
            os._exit(3)
        coordinator.stop_signal = coordinator.stop_signal or number

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    # `nohup` has SIGHUP ignored. A shell that starts a job by `&` in a script has SIGINT so, which means nothing.
    heard = [which for which in wanted if which == signal.SIGINT or signal.getsignal(which) != signal.SIG_IGN]
    before = {which: signal.signal(which, handle) for which in heard}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
