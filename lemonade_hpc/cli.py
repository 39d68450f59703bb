"""The command line: thin. Each command reads its arguments, calls one function, prints.

Decides: exit codes (0 done, 1 the run failed, 2 the user's input is wrong, 3 stopped before complete: the same command
goes on) and what goes to standard output. With `--json` that is one JSON document and nothing else. A command imports
what it needs when it runs, so that help and mistakes in the input are answered at once, without torch or matplotlib.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lemonade_hpc import __version__, config, explain, files

if TYPE_CHECKING:
    from lemonade_hpc.run.record import Loaded
    from lemonade_hpc.search.evolution import Problem

app = typer.Typer(
    name="lemonade-hpc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="a run folder", exists=True, file_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3
WATCH_S = 2.0


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the YAML file to write")] = Path("lemonade.yaml"),
) -> None:
    """Write a commented YAML file to start from."""
    from lemonade_hpc.view.template import template

    if path.exists():
        raise config.ConfigError(f"{path}: exists; give another name, or remove it first")
    try:
        files.write(path, template().encode())
    except OSError as error:
        raise config.ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {path}; edit it, then: {explain.command('search', str(path))}")


@app.command()
def search(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or a shipped name: digits")],
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="run folder; default: CONFIG's name")] = None,
    take_over: Annotated[bool, typer.Option("--take-over", help="the last coordinator is known to be gone")] = False,
) -> None:
    """Start, continue or recover a search: the same command every time."""
    try:
        settings = None
        with contextlib.suppress(OSError):  # a file system that fails now may not do so a moment later
            settings = config.load(source)

        from lemonade_hpc.run import session
        from lemonade_hpc.run.coordinator import Stopped, Superseded
        from lemonade_hpc.run.ledger import Halted
        from lemonade_hpc.view import tables
        from lemonade_hpc.view.progress import ProgressView

        folder = _folder(source, run)
        try:
            with ProgressView(tables.console(stderr=True)) as view:
                settings = settings or session.patiently(lambda: config.load(source), folder, view.note)
                session.search(settings, folder, view, take_over=take_over)
        except Stopped as stop:
            follows = "" if isinstance(stop, Superseded) else f" {_how_to_go_on(source, run, isinstance(stop, Halted))}"
            typer.echo(f"{stop}.{follows}", err=True)
            raise typer.Exit(STOPPED) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted. {_how_to_go_on(source, run, False)}", err=True)
        raise typer.Exit(STOPPED) from None
    _show_result(folder)


def _folder(source: str, run: str | None) -> Path:
    """The run folder: as given, `~` expanded as shells do not in --run=~/x; else CONFIG's name. Raises ConfigError."""
    if run is None:
        return Path(Path(source).stem)
    if not run.strip():
        raise config.ConfigError("--run: got nothing; give the name of a folder, or leave --run out")
    try:
        return Path(run).expanduser()
    except RuntimeError as error:
        raise config.ConfigError(f"--run: got {run!r}: {error}") from error


def _how_to_go_on(source: str, run: str | None, halted: bool) -> str:
    from lemonade_hpc.run import chain

    folder = ["--run", run] if run is not None else []
    if not chain.is_link():
        return f"Nothing is lost. To go on: {explain.command('search', source, *folder)}"
    if halted:
        return f"Nothing is lost. To go on: {explain.command('submit')} with your YAML file, {shlex.join(folder)}"
    cancel = explain.command("cancel", *folder[1:])
    return f"Nothing is lost: the next coordinator goes on, unless its job was cancelled. To end it all: {cancel}"


@app.command()
def submit(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file with cluster.backend: slurm")],
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="run folder; default: CONFIG's name")] = None,
    only_print: Annotated[bool, typer.Option("--print", help="show the batch scripts only")] = False,
    take_over: Annotated[bool, typer.Option("--take-over", help="the last coordinator is known to be gone")] = False,
) -> None:
    """Submit the search as a job of its own, which is followed by others until it is complete."""
    settings, folder = config.load(source), _folder(source, run)

    from lemonade_hpc.run import disk, session
    from lemonade_hpc.run.host import helper

    if only_print:
        coordinator, worker = session.submission(settings, folder)
        typer.echo(f"# ---- the coordinator\n{coordinator}\n# ---- a worker\n{worker}")
        return
    job = session.submit(settings, folder, take_over=take_over)
    status, stop = (explain.command(name, str(folder)) for name in ("status", "stop"))
    typer.echo(
        f"submitted job {job}; its log: {folder / files.SLURM / f'coordinator-{job}.log'}\n"
        f"how it goes: {status}\nto end it: {stop} (or cancel)"
    )
    where = disk.kind(Path(helper.existing(str(folder))), settings.cluster)
    if where.fix:
        typer.echo(f"warning: {where.seen}; {where.fix}", err=True)


def _show_result(run: Path) -> None:
    """Print the front and what was gained, and draw the picture; a picture that fails is no failure of the run."""
    from lemonade_hpc.run import status
    from lemonade_hpc.view import tables

    content, fixed, loaded = status.read(run)
    out = tables.console()
    out.print(tables.front_table(status.front(loaded.history), content["data"]["num_validation"]))
    typer.echo(f"\n{tables.summary(status.status(run))}")
    try:
        _draw(run, content, fixed, loaded, [run / "front.png"])
        typer.echo(f"picture: {run / 'front.png'}")
    except Exception as error:  # whatever drawing may lack
        typer.echo(f"no picture: {error}", err=True)
    if loaded.history.complete is not None:
        typer.echo(f"every child: {run / loaded.history.complete['file']}")


def _draw(run: Path, content: dict[str, Any], fixed: Problem, loaded: Loaded, paths: list[Path]) -> None:
    """Draw the front of a run as read."""
    from lemonade_hpc.run import status
    from lemonade_hpc.view import tables

    with tempfile.TemporaryDirectory() as scratch:  # matplotlib would write a list of fonts to the user's home
        os.environ.setdefault("MPLCONFIGDIR", scratch)
        from lemonade_hpc.view import figures
    history = loaded.history
    failed = f", {history.state.num_failed} failed" if history.state.num_failed else ""
    title = f"{content['config']['data']['name']}: {history.state.num_committed} children{failed}"
    figures.front(
        status.children(history, run),
        fixed.cheap,
        content["data"]["num_validation"],
        title,
        tables.gain_text(status.hypervolumes(history)),
        paths,
    )


@app.command()
def doctor(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or a shipped name: digits")],
    run: Annotated[str | None, typer.Option("--run", metavar="DIR", help="run folder; default: CONFIG's name")] = None,
    as_json: Json = False,
) -> None:
    """Check whether this site can run the search, and say what to change."""
    settings, folder = config.load(source), _folder(source, run)

    from lemonade_hpc.run import checks
    from lemonade_hpc.run.doctor import doctor as made
    from lemonade_hpc.view import tables

    found = made(settings, folder)
    if as_json:
        rows = [{"check": one.name, "state": one.state, "seen": one.seen, "fix": one.fix} for one in found]
        typer.echo(json.dumps(rows, indent=1))
    else:
        tables.console().print(tables.doctor_table(found))
    if any(one.state == checks.FAIL for one in found):
        raise typer.Exit(FAILED)


@app.command("status")
def show_status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="again every 2 s, until complete or Ctrl-C")] = False,
    as_json: Json = False,
) -> None:
    """Show what runs, what is done, failures with reasons, the front."""
    _exclusive(watch=watch, json=as_json)

    from lemonade_hpc.run import queue, record, status
    from lemonade_hpc.view import tables

    judge, look = queue.Patient(queue.judge), queue.Patient(queue.queued)
    num_validation = record.read_identity(run)["data"]["num_validation"]
    if as_json:
        typer.echo(json.dumps(status.status(run), indent=1))
        return
    out = tables.console()
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            data = status.status(run, judge, look)
            if watch:
                out.clear()
            out.print(tables.status_view(data, num_validation))
            if not watch or data["state"] == "complete":
                return
            time.sleep(WATCH_S)


@app.command()
def stop(run: RunFolder) -> None:
    """Have a run end what is in training and stop; the same search or submit command goes on."""
    from lemonade_hpc.run.cancel import stop as order

    typer.echo(order(run))


@app.command()
def cancel(run: RunFolder) -> None:
    """End the coordinator and the workers of a run; the same command goes on."""
    from lemonade_hpc.run.cancel import cancel as end

    done = end(run)
    typer.echo(f"ended: {', '.join(done)}" if done else "nothing was running")


@app.command()
def front(
    run: RunFolder,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="comma-separated values")] = False,
) -> None:
    """Show the Pareto front so far."""
    _exclusive(json=as_json, csv=as_csv)

    from lemonade_hpc.run import status
    from lemonade_hpc.view import tables

    content, fixed, loaded = status.read(run)
    members = status.front(loaded.history)
    if as_json:
        typer.echo(json.dumps(members, indent=1))
    elif as_csv:
        names = [objective.name for objective in fixed.config.objectives]
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["id", *names, "parent", "generation", "weights"])
        for m in members:
            values = [m["objectives"][name] for name in names]
            writer.writerow([m["id"], *values, m["parent"], m["generation"], m["weights"]["path"]])
    else:
        tables.console().print(tables.front_table(members, content["data"]["num_validation"]))


def _exclusive(**options: bool) -> None:
    """Refuse two options that ask for different outputs."""
    if sum(options.values()) > 1:
        raise config.ConfigError(f"give one of {' and '.join(f'--{name}' for name in options)}, not both")


@app.command()
def test(
    run: RunFolder,
    root: Annotated[str | None, typer.Option("--root", help="where the data is now, if not at data.root")] = None,
    as_json: Json = False,
) -> None:
    """Measure the front on the test images, on which nothing else is measured."""
    from lemonade_hpc import data as data_sets
    from lemonade_hpc.run import status
    from lemonade_hpc.view import tables

    content, fixed, loaded = status.read(run)
    source = fixed.config.data if root is None else fixed.config.data.model_copy(update={"root": root})
    try:
        checksum = data_sets.load(source).checksum
    except config.ConfigError as error:
        raise config.ConfigError(f"{run}: its data cannot be read; say by --root where it is now. {error}") from error
    if checksum != content["data"]["checksum"]:
        where = source.root or source.name
        raise config.ConfigError(f"{run}: was started with other data than {where} gives now (checksum differs)")
    while True:
        members = status.front(loaded.history)
        stored = [part for m in members for part in (m["weights"]["path"], m["weights"]["sha256"])]
        command = [
            sys.executable,
            "-P",
            "-m",
            "lemonade_hpc.learn.members",
            str(run),
            source.model_dump_json(),
            *stored,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        before, (content, fixed, loaded) = (loaded.epoch, loaded.link), status.read(run)
        if done.returncode == 0:
            break
        if before == (loaded.epoch, loaded.link):  # else a search has gone on, and deleted what left the front
            typer.echo(f"{done.stderr}error: the test errors could not be measured, see above", err=True)
            raise typer.Exit(FAILED)
    count = content["data"]["num_test"]
    errors = dict(zip((m["id"] for m in members), json.loads(done.stdout), strict=True))
    if as_json:
        rows = [{"id": id_, "test_error": error, "num_test": count} for id_, error in errors.items()]
        typer.echo(json.dumps(rows, indent=1))
    else:
        tables.console().print(tables.front_table(members, content["data"]["num_validation"], errors, count))


@app.command()
def report(run: RunFolder) -> None:
    """Draw the front as PNG and SVG, in DIR/report."""
    from lemonade_hpc.run import status

    paths = [run / "report" / f"front.{kind}" for kind in ("png", "svg")]
    _draw(run, *status.read(run), paths)
    for path in paths:
        typer.echo(path)


@app.command()
def verify(run: RunFolder, as_json: Json = False) -> None:
    """Read everything back: every checksum, every decision, the front."""
    from lemonade_hpc.run.verify import verify as checked
    from lemonade_hpc.view import tables

    checks = checked(run)
    if as_json:
        typer.echo(json.dumps([{"check": name, "faults": faults} for name, faults in checks], indent=1))
    else:
        tables.console().print(tables.checks_table(checks))
    if any(faults for _, faults in checks):
        raise typer.Exit(FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show it and exit")
    ] = False,
) -> None:
    """Multi-objective neural architecture search by Lamarckian evolution (LEMONADE)."""


def _exit_code(error: Exception) -> int | None:
    """Say what an error means: wrong input, a failed run, or (None) a defect of this program."""
    if isinstance(error, config.ConfigError):
        return WRONG_INPUT
    from lemonade_hpc.run.coordinator import RunFailed
    from lemonade_hpc.run.record import RecordError
    from lemonade_hpc.run.store import StoreError

    if isinstance(error, PermissionError):
        return WRONG_INPUT
    return FAILED if isinstance(error, (RunFailed, RecordError, StoreError, OSError)) else None


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the console script: errors in words, and the exit code. A defect of the program shows its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale that lacks a character must not end a command
    try:
        app(arguments)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        typer.echo(f"error: {files.in_words(error) if isinstance(error, OSError) else error}", err=True)
        sys.exit(code)
    sys.exit(DONE)


if __name__ == "__main__":
    main()
