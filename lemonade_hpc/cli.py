"""The command line: thin. Each command reads its arguments, calls one function, prints.

Decides: exit codes (0 done, 1 the run failed, 2 the user's input is wrong, 3 stopped before complete: the same command
goes on) and what goes to standard output. With `--json` that is one JSON document and nothing else.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lemonade_hpc import __version__, config

app = typer.Typer(
    name="lemonade-hpc", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

Run = Annotated[Path, typer.Argument(metavar="DIR", help="a run folder")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]

DONE, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 3


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the YAML file to write")] = Path("lemonade.yaml"),
) -> None:
    """Write a commented YAML file to start from."""
    if path.exists():
        raise config.ConfigError(f"{path}: exists; give another name, or remove it first")
    try:
        path.write_text(config.template())
    except OSError as error:
        raise config.ConfigError(f"{path}: cannot be written: {error}") from error
    typer.echo(f"wrote {path}; edit it, then: lemonade-hpc search {path}")


@app.command()
def search(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file, or a shipped name: digits")],
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="run folder; default: CONFIG's name")] = None,
    take_over: Annotated[bool, typer.Option("--take-over", help="the run's last coordinator is known to be gone")] = False,
) -> None:
    """Start, continue or recover a search: the same command every time."""
    from lemonade_hpc.run import session
    from lemonade_hpc.run.coordinator import Stopped
    from lemonade_hpc.view import tables
    from lemonade_hpc.view.progress import ProgressView

    settings = config.load(source)
    folder = run if run is not None else Path(Path(source).stem)
    try:
        with ProgressView(tables.console(stderr=True)) as view:
            session.search(settings, folder, view, take_over=take_over)
    except (Stopped, KeyboardInterrupt) as stop:
        again = "lemonade-hpc " + " ".join(word for word in sys.argv[1:] if word != "--take-over")
        typer.echo(f"{stop or 'interrupted'}. Nothing is lost. To go on: {again}", err=True)
        raise typer.Exit(STOPPED) from None
    _show_result(folder)


def _show_result(run: Path) -> None:
    """The front as a table and a picture, and what was gained."""
    from lemonade_hpc.run import status
    from lemonade_hpc.view import tables

    content, _, loaded = status.read(run)
    out = tables.console()
    out.print(tables.front_table(status.front(loaded.history), content["data"]["num_validation"]))
    out.print(tables.summary(status.status(run)))
    _draw(run, [run / "front.png"])
    out.print(f"picture: {run / 'front.png'}   every child: {run / loaded.history.complete['file']}" if loaded.history.complete else "")


def _draw(run: Path, paths: list[Path]) -> None:
    from lemonade_hpc.run import status
    from lemonade_hpc.view import figures

    content, fixed, loaded = status.read(run)
    children = status.children(loaded.history, run)
    title = f"{content['config']['data']['name']}: {loaded.history.state.num_committed} children"
    figures.front(children, fixed.cheap[0], title, paths)


@app.command("status")
def show_status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="again every 2 seconds, until Ctrl-C")] = False,
    as_json: Json = False,
) -> None:
    """What runs, what is done, failures with reasons, the front."""
    from lemonade_hpc.run import record, status
    from lemonade_hpc.view import tables

    num_validation = record.read_identity(run)["data"]["num_validation"]
    if as_json:
        typer.echo(json.dumps(status.status(run), indent=1))
        return
    out = tables.console()
    while True:
        data = status.status(run)
        if watch:
            out.clear()
        out.print(tables.status_view(data, num_validation))
        if not watch or data["state"] == "complete":
            return
        time.sleep(2)


@app.command()
def front(
    run: Run, as_json: Json = False, as_csv: Annotated[bool, typer.Option("--csv", help="comma-separated values")] = False
) -> None:
    """The Pareto front so far."""
    from lemonade_hpc.run import status
    from lemonade_hpc.view import tables

    content, _, loaded = status.read(run)
    members = status.front(loaded.history)
    if as_json:
        typer.echo(json.dumps(members, indent=1))
    elif as_csv:
        names = list(members[0]["objectives"]) if members else []
        writer = csv.writer(sys.stdout)
        writer.writerow(["id", *names, "parent", "generation", "weights"])
        for m in members:
            writer.writerow([m["id"], *m["objectives"].values(), m["parent"], m["generation"], m["weights"]["path"]])
    else:
        tables.console().print(tables.front_table(members, content["data"]["num_validation"]))


@app.command()
def test(run: Run, as_json: Json = False) -> None:
    """The front's error on the test images: the only command that reads them."""
    from lemonade_hpc.run import status
    from lemonade_hpc.view import tables

    content, _, loaded = status.read(run)
    members = status.front(loaded.history)
    count = content["data"]["num_test"]
    command = [sys.executable, "-m", "lemonade_hpc.learn.members", str(run), *(m["weights"]["path"] for m in members)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        typer.echo(done.stderr, err=True)
        raise typer.Exit(FAILED)
    errors = dict(zip((m["id"] for m in members), json.loads(done.stdout), strict=True))
    if as_json:
        typer.echo(json.dumps([{"id": id_, "test_error": error, "num_test": count} for id_, error in errors.items()]))
        return
    texts = {id_: tables.error_text(error, count) for id_, error in errors.items()}
    tables.console().print(tables.front_table(members, content["data"]["num_validation"], texts))


@app.command()
def report(run: Run) -> None:
    """The front as PNG and SVG, in DIR/report."""
    paths = [run / "report" / f"front.{kind}" for kind in ("png", "svg")]
    _draw(run, paths)
    for path in paths:
        typer.echo(path)


@app.command()
def verify(run: Run, as_json: Json = False) -> None:
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
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """Multi-objective neural architecture search by Lamarckian evolution (LEMONADE)."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script: errors in words, and the exit code."""
    from lemonade_hpc.run.coordinator import RunFailed
    from lemonade_hpc.run.record import RecordError
    from lemonade_hpc.run.store import StoreError

    code: Any = DONE
    try:
        app(arguments, standalone_mode=True)
    except config.ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        code = WRONG_INPUT
    except (RunFailed, RecordError, StoreError) as error:
        typer.echo(f"the run failed: {error}", err=True)
        code = FAILED
    sys.exit(code)


if __name__ == "__main__":
    main()
