"""The record of a run as a whole: which search it is (`run.json`), and the events so far, from which all else follows.

Decides: what makes a run folder, and what is read back of it. What an event means is `history.py`'s, where events are
kept and which of them are in effect `journal.py`'s, who may write the next one `lease.py`'s.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemonade_hpc import __version__, files
from lemonade_hpc.config import Config, ConfigError, from_dict, to_dict
from lemonade_hpc.data import DataSet
from lemonade_hpc.run import journal
from lemonade_hpc.run.history import History
from lemonade_hpc.run.journal import Event
from lemonade_hpc.run.journal import RecordError as RecordError
from lemonade_hpc.search.evolution import Problem
from lemonade_hpc.search.ops import Signature

SCHEMA = 1
"""Version of the run folder's layout. A newer one is refused."""

DATA_KEYS = ("checksum", "shape", "num_classes", "majority_error", "num_train", "num_validation", "num_test")
"""What `run.json` says of the data."""


# ---------------------------------------------------------------- identity


def identity(config: Config, data: DataSet, fixed: Problem, image: str | None) -> dict[str, Any]:
    """What `run.json` says of a new run: written once, never changed. `image`: the digest of its workers' image."""
    return {
        "run": uuid.uuid4().hex,
        "schema": SCHEMA,
        "code": __version__,
        "image": image,
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
    """The content of `run.json`; raises ConfigError where there is none, or one of a newer schema.

    Where the file system fails, OSError (`files.STORAGE_ERRORS`).
    """
    path = run / files.RUN
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        schema = int(content["schema"])
        if schema <= SCHEMA:
            _ = [content[key] for key in ("run", "config", "reference")] + [content["data"][key] for key in DATA_KEYS]
    except FileNotFoundError:
        raise ConfigError(f"{run}: not a run folder (it has no {files.RUN})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in files.STORAGE_ERRORS:
            raise
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    if schema > SCHEMA:
        raise ConfigError(f"{path}: written by a newer version (schema {schema}, this one reads up to {SCHEMA})")
    return content


def problem_of(run: Path, content: dict[str, Any], config: Config | None = None) -> Problem:
    """The search's fixed part, from `run.json`; with another `config` where budget or cluster keys have changed."""
    config = config or from_dict(content["config"], str(run / files.RUN))
    signature = Signature(tuple(content["data"]["shape"]), content["data"]["num_classes"])
    return Problem(config, signature, tuple(content["reference"]))


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Loaded:
    """A run folder as read: its events folded, the last epoch, the link of its last line, and what was damaged."""

    history: History
    epoch: int
    link: str
    warnings: tuple[str, ...]
    mended: dict[Path, bytes]
    """Copies of journals that lack lines, as they should be; `lease.open_epoch` puts them back."""
    late: tuple[str, ...]
    """What would be damage as well, but may only be seen late on another machine."""


def load(run: Path, fixed: Problem, upto: list[Event] | None = None) -> Loaded:
    """Read all epochs' journals; raises RecordError for what is lost, and for events that contradict one another.

    `upto`, if given, receives every event in effect, in order, the beginnings of epochs among them.
    """
    history, found = History(fixed), journal.read(run)
    for number, lines in found.epochs:
        for _, body in lines:
            event = json.loads(body)
            if upto is not None:
                upto.append(event)
            if event["event"] == "epoch":
                history.begin()
            else:
                _apply(history, event, run / files.epoch_folder(number))
    return Loaded(history, *found.end, tuple(found.warnings), found.mended, tuple(found.late))


def _apply(history: History, event: Event, where: Path) -> None:
    try:
        history.apply(event)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(
            f"{where}: event {history.num_records} of the run, {event['event']!r}, does not follow from those before "
            f"it ({type(error).__name__}: {error})"
        ) from error
