"""What lies in a run folder and is of no use any more.

Decides: what may be deleted: what a killed coordinator or worker left half made, files that another has replaced, and
the folders of children whose weights nobody needs. Deletes nothing itself. Of population files, none that a later epoch
has made is ever named: a coordinator may have been superseded without knowing it yet.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lemonade_hpc import files
from lemonade_hpc.run.history import History
from lemonade_hpc.run.log import Message


def half_made(run: Path) -> list[Path]:
    """Files and folders that were being written."""
    epochs = run / files.EPOCHS
    workers = (*epochs.glob("*/workers/*"), *(run / files.WORKERS).glob("*"))
    folders = (run, epochs, run / files.STATE, *epochs.glob("*"), *workers)
    return [path for folder in folders for path in folder.glob(f"{files.TEMPORARY}*")]


def beside_weights(run: Path, outcomes: Iterable[Message]) -> list[Path]:
    """In the folders of finished children, all but the weights: other attempts, checkpoints, half made files."""
    found = []
    for outcome in outcomes:
        folder = run / files.child_folder(outcome["child"])
        kept = {outcome["attempt"]: None} if "weights" in outcome else {}
        found += [path for path in folder.glob("*") if path.name not in kept]
        found += [p for attempt in kept for p in (folder / attempt).glob("*") if p.name != files.WEIGHTS]
    return found


def jobs(run: Path, living: Collection[str]) -> list[Path]:
    """What submitit keeps for launches that are not among the `living`: pickles, which nothing that lasts may be."""
    return [path for path in (run / files.WORKERS).glob("*/job") if path.parent.name not in living]


def replaced(run: Path, history: History, epoch: int) -> list[Path]:
    """Population files of epochs before this one that no event names."""
    named = {event["file"] for event in (*history.sealed, history.complete) if event is not None}
    found = []
    for path in (*(run / files.STATE).glob("*.h5"), *run.glob("population.*.h5")):
        writer = re.fullmatch(r".*\.e(\d+)\.h5", path.name)
        if writer and int(writer[1]) < epoch and str(path.relative_to(run)) not in named:
            found.append(path)
    return found


def unneeded(run: Path, history: History) -> list[int]:
    """Children with a folder that are neither on the front, nor parents of children in flight, nor in flight."""
    kept = history.results.keys() | history.state.in_flight.keys()
    present = [int(path.name) for path in (run / files.CHILDREN).glob("*/*") if path.name.isdigit()]
    return [number for number in present if number not in kept]
