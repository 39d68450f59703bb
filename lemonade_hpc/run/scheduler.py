"""Slurm as it is set up at a site: whether it takes a run's jobs, and which of its limits the run will meet.

Decides: what to change, in the configuration or at the site. Asks each question once, submits nothing (`--test-only`).
A question that nobody answers is unknown, never ok.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from lemonade_hpc.config import Cluster, Config
from lemonade_hpc.run import chain, queue, request, site, slurm
from lemonade_hpc.run.checks import FAIL, OK, WARN, Check, unknown

FEW_TASKS = 100
"""Of an array: below that it is told."""
LEAST_STATUS_S = 15
"""Nobody should be advised to ask Slurm more often."""
LINKS = 2
"""Jobs of a run beside its workers': a coordinator and its successor."""
DOWN = "see whether it answers: sinfo, scontrol ping"
REMEDIES = (
    (r"\baccount\b", "give cluster.account as sbatch takes it; yours: {accounts}"),
    (r"time ?limit", "lower {time} to what sinfo --format='%P %l' shows"),
    (r"partition", "give {partition} as sinfo shows it; there are: {partitions}"),
    (r"\bqos\b", "give cluster.qos as sbatch takes it: sacctmgr show assoc format=account,partition,qos user=$USER"),
    (r"wckey", "give cluster.wckey as sbatch takes it: sacctmgr show wckey user=$USER"),
    (r"reservation", "give cluster.reservation as scontrol show reservation has it, or none"),
    (r"feature|constraint", "give cluster.constraint as sinfo --format='%N %f' shows them, or none"),
    (r"generic resource|\bgres\b", "give cluster.gres, or gpus_per_worker, as sinfo --format='%N %G' shows them"),
    (r"memory", "lower {memory}; sinfo --format='%P %m' shows what nodes have"),
    (r"configuration source", "have SLURM_CONF name the site's slurm.conf, or load Slurm's module: module load slurm"),
    (r"unrecognized option|invalid option", "take that option out of {extra}, or name it in cluster.skip"),
)
"""What to do about a refusal, by what Slurm says: the first that fits."""
OTHERWISE = "change what it names in the section cluster; `lemonade-hpc submit --print` shows the whole script"


def checks(config: Config, run: Path, commands: Collection[str], user: str) -> Iterator[Check]:
    """Every check of Slurm. `commands`: those that there are, outside of an image; `user`: who is to submit."""
    cluster, missing = config.cluster, [name for name in slurm.COMMANDS if name not in commands]
    if missing:
        fix = "go to a node where jobs are submitted, or load Slurm's module: module load slurm"
        yield Check("Slurm's commands", FAIL, f"{', '.join(missing)}: not on PATH", fix)
        return
    yield Check("Slurm's commands", OK, ", ".join(slurm.COMMANDS))
    yield _accounting()
    told = queue.settings()
    yield from _settings(told, cluster)
    yield _submit_limit(cluster, user)
    coordinator = chain.script(config, run, chain.job_name("check"))
    yield _submission("coordinator's job", coordinator, (), cluster, user)
    yield _submission("workers' jobs", *_workers(cluster, told), cluster, user)


def _workers(cluster: Cluster, told: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """A worker's script, and the options that make it as many as are submitted at once."""
    most = min(cluster.workers, cluster.max_array, queue.number(told.get("MaxArraySize")) or cluster.workers)
    return request.script(cluster, "lemonade-check", Path(".")), (f"--array=0-{most - 1}",)


def _accounting() -> Check:
    if queue.ask("sacct", "-X", "-n", "-P", "-S", "now-1days", "-o", "JobID") is None:
        fix = (
            "nothing must be done: only how a worker ended stays unknown where the queue has forgotten its job; to "
            "have it, ask the site for accounting (slurmdbd), or whether it is down"
        )
        return Check("sacct", WARN, "does not answer", fix)
    return Check("sacct", OK, "answers")


# ---------------------------------------------------------------- limits


def _settings(told: Mapping[str, str], cluster: Cluster) -> Iterator[Check]:
    """What Slurm's own configuration means for a run."""
    yield _max_array(queue.number(told.get("MaxArraySize")), cluster)
    yield _job_age(queue.number(told.get("MinJobAge")), cluster)
    yield _preemption(told.get("PreemptMode"), cluster)
    yield _requeue(queue.number(told.get("JobRequeue")), cluster)


def _max_array(size: int | None, cluster: Cluster) -> Check:
    name = "MaxArraySize"
    if size is None:
        return unknown(name, "scontrol show config does not tell it", DOWN)
    if size == 0:
        return Check(name, FAIL, "0: no arrays, and workers are tasks of arrays", "ask the site to allow them")
    if size < min(FEW_TASKS, cluster.max_array) or size < cluster.workers:
        split = f"{cluster.workers} workers take {-(-cluster.workers // size)} arrays of at most {size}"
        fix = (
            f"nothing must be done: {split}, {cluster.submit_s:g} s apart (cluster.submit_s); to have larger "
            f"ones, ask the site to raise MaxArraySize in slurm.conf"
        )
        return Check(name, WARN, str(size), fix)
    return Check(name, OK, str(size))


def _job_age(age_s: int | None, cluster: Cluster) -> Check:
    name = "MinJobAge"
    if age_s is None:
        return unknown(name, "scontrol show config does not tell it", DOWN)
    if age_s == 0:
        return Check(name, OK, "0: squeue shows every job that has ended")
    seen = f"{age_s} s: for so long squeue shows a job that has ended; it is asked every {cluster.status_s:g} s"
    if age_s >= 2 * cluster.status_s:
        return Check(name, OK, seen)
    less = f"cluster: {{status_s: {age_s // 2}}}, or " if age_s // 2 >= LEAST_STATUS_S else ""
    rest = "ask the site to raise it; without accounting (sacct), how a worker ended may stay unknown"
    return Check(name, WARN, seen, less + rest)


def _preemption(mode: str | None, cluster: Cluster) -> Check:
    name = "PreemptMode"
    if mode is None:
        return unknown(name, "scontrol show config does not tell it", DOWN)
    if "SUSPEND" in mode.upper():
        fix = (
            "choose cluster.partition so that nobody's jobs suspend yours: what is suspended keeps its child, and "
            f"cluster.child_timeout_min ({cluster.child_timeout_min:g}) goes on"
        )
        return Check(name, WARN, mode, fix)
    lost = f"a child in training loses {cluster.checkpoint_min:g} min at most (cluster.checkpoint_min)"
    return Check(name, OK, mode if mode.upper() == "OFF" else f"{mode}: {lost}")


def _requeue(again: int | None, cluster: Cluster) -> Check:
    name = "JobRequeue"
    if again is None:
        return unknown(name, "scontrol show config does not tell it", DOWN)
    if again and "no-requeue" in cluster.skip:
        fix = "take no-requeue out of cluster.skip, if the site lets you: a worker whose job begins anew is given up"
        return Check(name, WARN, f"{again}, and cluster.skip names no-requeue", fix)
    return Check(name, OK, f"{again}{'; jobs are submitted with --no-requeue' if again else ''}")


def _associations(user: str, *columns: str) -> list[dict[str, str]] | None:
    """What Slurm's database has of a user, a row for each account; None where it does not answer."""
    words = ("--readonly", "--noheader", "--parsable2", "show", "assoc", f"user={user}")
    answer = queue.ask("sacctmgr", *words, f"format={','.join(columns)}")
    rows = (line.split("|") for line in (answer or "").splitlines())
    return None if answer is None else [dict(zip(columns, row, strict=False)) for row in rows]


def _submit_limit(cluster: Cluster, user: str) -> Check:
    """MaxSubmitJobs of the association that workers use, as far as it is known which."""
    name, needed = "MaxSubmitJobs", cluster.workers + LINKS
    rows = _associations(user, "Account", "Partition", "MaxSubmitJobs")
    if rows is None:
        return unknown(name, "sacctmgr does not answer", "a limit shows itself when it is met: fewer workers run then")
    ours = [row for row in rows if cluster.account in (None, row["Account"])]
    ours = [row for row in ours if row.get("Partition", "") in ("", cluster.partition)]
    if rows and not ours:
        there = ", ".join(sorted({row["Account"] for row in rows}))
        fix = f"give cluster.account, one of: {there}; where the site does not insist on accounts, nothing must be done"
        asked = (("account", cluster.account), ("partition", cluster.partition))
        seen = f"{user} has nothing in {', '.join(f'{key} {value}' for key, value in asked if value)}"
        return Check(name, WARN, seen, fix)
    limits = [queue.number(row.get("MaxSubmitJobs")) for row in ours]
    known = [limit for limit in limits if limit is not None]
    where = f"{user}{f', account {cluster.account}' if cluster.account else ''}"
    if known and min(known) < needed:
        fix = f"cluster: {{workers: {max(1, min(known) - LINKS)}}}, or ask the site to raise it; until then fewer run"
        return Check(name, WARN, f"{min(known)} for {where}; {needed} are wanted", fix)
    return Check(name, OK, f"{min(known) if known else 'none'} for {where} (a QOS may have one of its own)")


# ---------------------------------------------------------------- submission


def _submission(name: str, text: str, options: tuple[str, ...], cluster: Cluster, user: str) -> Check:
    """Whether Slurm would take such a job, and in its own words why not."""
    said = slurm.tested(text, *options)
    if said is None:
        return unknown(name, "sbatch --test-only does not answer", DOWN)
    if not said:
        return Check(name, OK, " ".join(("sbatch --test-only", *options, "accepts it")))
    if slurm.CROWDED.search(said):
        return Check(name, WARN, said, "nothing must be done: fewer workers run while so many of your jobs are queued")
    if slurm.may_pass(said):
        return Check(name, WARN, said, f"this may pass; {DOWN}")
    if slurm.NODES_MAY_BE_DOWN in said.lower():
        unmet = site.unmet(cluster, queue.ask(*site.QUESTION) or "") if name == "workers' jobs" else None
        if unmet is None:
            return Check(name, WARN, said, "nodes may be down (sinfo), and then this passes; else ask for less")
        fix = f"lower {unmet.partition(':')[0]}, or choose another cluster.partition"
        return Check(name, FAIL, f"{said}\n{unmet}", fix)
    return Check(name, FAIL, said, _remedy(said, cluster, user, coordinator=name != "workers' jobs"))


def _remedy(said: str, cluster: Cluster, user: str, *, coordinator: bool) -> str:
    """What to change, with what there is to choose from."""
    text = next((text for pattern, text in REMEDIES if re.search(pattern, said.lower())), OTHERWISE)
    keys = ("partition", "time", "memory", "extra")
    theirs = ("coordinator_partition", "coordinator_time_min", "coordinator_mem_gb", "coordinator_extra")
    ours = ("partition", "time_min", "mem_gb", "extra")
    values = {key: f"cluster.{value}" for key, value in zip(keys, theirs if coordinator else ours, strict=True)}
    if "{partitions}" in text:
        names = {line.partition("|")[0].rstrip("*") for line in (queue.ask(*site.QUESTION) or "").splitlines()}
        values["partitions"] = ", ".join(sorted(names)) or "unknown"
    if "{accounts}" in text:
        values["accounts"] = (
            ", ".join(sorted({row["Account"] for row in _associations(user, "Account") or []})) or "unknown"
        )
    return text.format(**values)
