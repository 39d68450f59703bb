"""One line of what `doctor` says, and how checks are made one after another.

Decides: what a check that could not be made counts as: unknown, which is a warning, never ok.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lemonade_hpc.config import ConfigError
from lemonade_hpc.files import in_words

State: TypeAlias = Literal["ok", "warn", "fail"]
OK: State = "ok"
WARN: State = "warn"
FAIL: State = "fail"
AGAIN = "run doctor again; where it stays so, find out why"


@dataclass(frozen=True)
class Check:
    """What was seen, and what to do about it where that is not ok."""

    name: str
    state: State
    seen: str
    fix: str = ""


def unknown(name: str, why: str, fix: str = AGAIN) -> Check:
    """A question that nobody has answered."""
    return Check(name, WARN, f"unknown: {why}", fix)


def each(name: str, make: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks that `make` makes; where one cannot be made, that is said, under this name, and no other is hidden."""
    try:
        yield from make()
    except OSError as error:
        yield unknown(name, in_words(error))
    except (ConfigError, subprocess.SubprocessError, ValueError) as error:
        yield unknown(name, str(error))
