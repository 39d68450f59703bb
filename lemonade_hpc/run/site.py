"""What the nodes of a site have: whether any of them, also one that is down now, could ever run such a worker.

Decides: which setting asks for more than there is. Asks nobody; what it judges is what `sinfo` said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from lemonade_hpc.config import Cluster

QUESTION = ("sinfo", "--all", "--Node", "--noheader", "--format=%P|%c|%m|%G")


class Node(NamedTuple):
    """A node as it is configured: CPUs, memory in MiB, and its gres in Slurm's words."""

    cpus: int
    memory: int
    gres: str


def nodes(cluster: Cluster, answer: str) -> list[Node]:
    """Those of the partitions that workers go to, of what was answered to `QUESTION`; what is no such line is none."""
    wanted = set(cluster.partition.split(",")) if cluster.partition else None
    found = []
    for line in answer.splitlines():
        partition, *rest = line.strip().split("|")
        here = partition.endswith("*") if wanted is None else partition.rstrip("*") in wanted
        if here and len(rest) == 3 and rest[0].isdigit() and rest[1].isdigit():
            found.append(Node(int(rest[0]), int(rest[1]), "" if rest[2] == "(null)" else rest[2]))
    return found


def unmet(cluster: Cluster, answer: str) -> str | None:
    """Which setting no node meets, and what there is; None where each is met by some node, or no node is known."""
    there = nodes(cluster, answer)
    if not there:
        return None
    where = f"no node of {f'partition {cluster.partition}' if cluster.partition else 'the default partition'} has"
    gres = cluster.gres or (f"gpu:{cluster.gpus}" if cluster.gpus else "")
    if "gres" not in cluster.skip and not any(_has(node.gres, gres) for node in there):
        key, got = ("gres", gres) if cluster.gres else ("gpus_per_worker", cluster.gpus)
        return f"cluster.{key}: got {got}, which {where}; there are: {_listed(node.gres for node in there)}"
    cpus = max(node.cpus for node in there)
    if "cpus-per-task" not in cluster.skip and cluster.cpus_per_worker > cpus:
        return f"cluster.cpus_per_worker: got {cluster.cpus_per_worker}, which {where}; the largest has {cpus}"
    memory = max(node.memory for node in there)
    if "mem" not in cluster.skip and 1024 * cluster.mem_gb > memory:
        return f"cluster.mem_gb: got {cluster.mem_gb:g} GB, which {where}; the largest has {memory / 1024:.4g} GB"
    return None


def _has(configured: str, asked: str) -> bool:
    """Whether a node's gres are enough: `gpu:2` of any type, `gpu:a100:2` of that one."""
    there = _counted(configured)
    return all(there[name] >= count for name, count in _counted(asked, every=False).items())


def _counted(gres: str, *, every: bool = True) -> Counter[str]:
    """How many there are by name, and by name and type, as in `gpu:a100:4(S:0-1),shard:8`.

    `every`: those with a type count as ones of any type too.
    """
    counts: Counter[str] = Counter()
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = part.strip().split(":")
        count = int(rest.pop()) if rest and rest[-1].isdigit() else 1
        if name:
            counts[":".join([name, *rest])] += count
            if rest and every:
                counts[name] += count
    return counts


def _listed(gres: Iterable[str]) -> str:
    return "; ".join(sorted({one or "none" for one in gres}))
