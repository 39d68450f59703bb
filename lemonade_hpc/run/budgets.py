"""How often a child is tried again, and which nodes are not.

Decides: how many attempts may be lost in each way, what becomes of a child that has lost more, and when a node is at
fault instead. Told by the record alone, so that a coordinator that dies in between changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from lemonade_hpc.run.history import History
from lemonade_hpc.run.log import Message

MAX_WORKER_LOSSES = 20
"""Workers that may die under one child without progress before it is given up: otherwise not counted against it."""
STRIKES = 3
"""Different children, or workers, that come to grief in a row on a node before it is excluded."""

ADVICE = {"walltime": "; raise cluster.time_min, or let checkpoints be made sooner (cluster.checkpoint_min)"}


def allowed(retries: int) -> dict[str, int]:
    """How many attempts a child may lose in each way and still be tried again; in any other way, any number."""
    return {"crash": retries, "walltime": retries, "worker": MAX_WORKER_LOSSES}


def charged(losses: Iterable[tuple[str, float]]) -> Counter[str]:
    """How many lost attempts count against a child, by kind, of (kind, share done) in their order.

    One that took the child further than any before it does not, unless the child's own trainer crashed.
    """
    counts: Counter[str] = Counter()
    furthest = 0.0
    for kind, done in losses:
        counts[kind] += kind == "crash" or done <= furthest
        furthest = max(furthest, done)
    return counts


def spent(history: History, retries: int) -> Iterator[Message]:
    """The outcomes, failures, of children that have lost more attempts than they may."""
    for number, attempts in history.attempts.items():
        if any(one.lost is None for one in attempts):
            continue
        counts = charged((one.lost, one.done) for one in attempts if one.lost is not None)
        for kind, most in allowed(retries).items():
            if counts[kind] > most:
                last = [one for one in attempts if one.lost == kind][-1]
                ended = f"{counts[kind]} attempt{'s' * (counts[kind] > 1)} ended so"
                reason = f"{ended}; the last one: {last.reason}{ADVICE.get(kind, '')}"
                digest = history.state.in_flight[number].digest
                failure = {"kind": kind, "reason": reason}
                yield {"child": number, "attempt": last.id, "digest": digest, "failure": failure}
                break


def bad_nodes(history: History) -> Iterator[tuple[str, str]]:
    """Nodes that are to get no worker any more, and why.

    A node that has trained children is only at fault where others do so too: else the children may be.
    """
    for node, strikes in history.strikes.items():
        alone = history.fruitful <= {node} and node in history.fruitful
        if len(strikes) >= STRIKES and not alone and node not in history.excluded:
            yield node, f"{', '.join(sorted(strikes))} came to grief there, one after another"
