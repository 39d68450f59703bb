"""How often a child is tried again, and which nodes are not.

Decides: how many attempts may be lost in each way, what becomes of a child that has lost more, and when a node is at
fault instead. Told by the record alone, so that a coordinator that dies in between changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from lemonade_hpc.run.history import Attempt, History
from lemonade_hpc.run.log import Message

MAX_WORKER_LOSSES = 20
"""Workers that may be preempted or lost with their nodes under one child, without progress, before it is given up:
otherwise not counted against it."""
MAX_DEATHS = 5
"""Workers that may die of nothing known under one child."""
OUT_OF_MEMORY = "out of memory"
"""How a worker dies whose job needs more than it was given."""
TOO_MUCH = re.compile(r"oom.kill|exceeded (job )?memory limit", re.IGNORECASE)
"""In what Slurm writes to the log of such a job, whose state does not always say it."""
STRIKES = 3
"""Different children, or workers, that come to grief on a node, and times in a row that some do, before it is excluded.
"""

ADVICE = {
    "walltime": "; raise cluster.time_min, or let checkpoints be made sooner (cluster.checkpoint_min)",
    "memory": "; raise cluster.mem_gb",
}


def allowed(retries: int) -> dict[str, int]:
    """How many attempts a child may lose in each way and still be tried again; in any other way, any number."""
    own = dict.fromkeys(("crash", "walltime", "memory"), retries)
    return own | {"death": MAX_DEATHS, "worker": MAX_WORKER_LOSSES}


def kind(attempt: Attempt) -> str | None:
    """In which of these ways an attempt was lost, or in another; None where it was not."""
    if attempt.lost != "worker" or attempt.death is None:
        return attempt.lost
    return "memory" if attempt.death == OUT_OF_MEMORY else "death"


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
        counts = charged((str(kind(one)), one.done) for one in attempts)
        for how, most in allowed(retries).items():
            if counts[how] > most:
                last = [one for one in attempts if kind(one) == how][-1]
                ended = f"{counts[how]} attempt{'s' * (counts[how] > 1)} ended so"
                death = f": {last.death}" if last.death else ""
                reason = f"{ended}; the last one: {last.reason}{death}{ADVICE.get(how, '')}"
                digest = history.state.in_flight[number].digest
                failure = {"kind": how, "reason": reason}
                yield {"child": number, "attempt": last.id, "digest": digest, "failure": failure}
                break


def bad_nodes(history: History) -> Iterator[tuple[str, str]]:
    """Nodes that are to get no worker any more, and why.

    A node that has trained children is only at fault where another one that did does well: else the children may be,
    or what all nodes share.
    """
    struck = {}
    for node, events in history.strikes.items():
        times = [event - history.own_fault for event in events]
        who = set[str]().union(*times)
        lone = {min(one) for one in times if len(one) == 1}  # a child that did so again and again counts once
        if len(lone) + sum(len(one) > 1 for one in times) >= STRIKES <= len(who):
            struck[node] = f"{', '.join(sorted(who))} came to grief there, one after another"
    well = history.fruitful - struck.keys() - history.excluded.keys()
    for node in struck.keys() - history.excluded.keys():
        if well or node not in history.fruitful:
            yield node, struck[node]
