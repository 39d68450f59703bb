"""How often a child is tried again.

Decides: how many attempts may be lost in each way, and what becomes of a child that has lost more. Told by the record
alone, so that a coordinator that dies in between changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lemonade_hpc.run.log import Message
from lemonade_hpc.run.record import History

MAX_WORKER_LOSSES = 20
"""Workers that may die under one child before it is given up: their deaths are not counted against it otherwise."""


def allowed(retries: int) -> dict[str, int]:
    """How many attempts a child may lose in each way and still be tried again; in any other way, any number."""
    return {"crash": retries, "worker": MAX_WORKER_LOSSES}


def spent(history: History, retries: int) -> Iterator[Message]:
    """The outcomes, failures, of children that have lost more attempts than they may."""
    for number, attempts in history.attempts.items():
        counts = Counter(one.lost for one in attempts)
        for kind, most in allowed(retries).items():
            if counts[kind] > most and not counts[None]:
                last = [one for one in attempts if one.lost == kind][-1]
                reason = f"{counts[kind]} attempts ended so; the last one: {last.reason}"
                digest = history.state.in_flight[number].digest
                failure = {"kind": kind, "reason": reason}
                yield {"child": number, "attempt": last.id, "digest": digest, "failure": failure}
                break
