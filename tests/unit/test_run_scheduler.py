"""What `doctor` says of Slurm: its settings, its limits, and in its own words why it would not take a job."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lemonade_hpc.run import queue, slurm
from lemonade_hpc.run.checks import FAIL, OK, WARN

sys.path.insert(0, str(Path(__file__).parent))

from fake_site import Site, healthy, one, others_are_ok, without_image  # noqa: E402

REFUSED = "sbatch: error: Batch job submission failed: "


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with healthy(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("setting", "value", "more", "state", "fix"),
    [
        ("MaxArraySize", "", {}, WARN, "scontrol ping"),
        ("MaxArraySize", "0", {}, FAIL, "ask the site to allow them"),
        ("MaxArraySize", "150", {"workers": 200}, WARN, "200 workers take 2 arrays of at most 150"),
        ("MinJobAge", "", {}, WARN, "scontrol ping"),
        ("MinJobAge", "60 sec", {}, WARN, "status_s: 30"),
        ("PreemptMode", "", {}, WARN, "scontrol ping"),
        ("PreemptMode", "GANG,SUSPEND", {}, WARN, r"cluster.child_timeout_min \(240\)"),
        ("PreemptMode", "REQUEUE", {}, OK, "^$"),
        ("JobRequeue", "", {}, WARN, "scontrol ping"),
        ("JobRequeue", "1", {"skip": ["no-requeue"]}, WARN, "take no-requeue out of cluster.skip"),
        ("JobRequeue", "0", {"skip": ["no-requeue"]}, OK, "^$"),
    ],
)
def test_each_of_slurms_settings_is_judged(
    site: Site, setting: str, value: str, more: dict[str, Any], state: str, fix: str
) -> None:
    site.setting(setting, value)
    found = without_image(site, cluster=more)
    check = one(found, setting)
    assert check.state == state and re.search(fix, check.fix), check
    assert check.seen.startswith(value.split()[0] if value else "unknown: ")
    assert others_are_ok(found, setting)


@pytest.mark.parametrize(
    ("rows", "more", "state", "seen", "fix"),
    [
        ("lab||\n", {}, OK, "none for ", "^$"),
        ("lab||6\n", {}, OK, "6 for ", "^$"),
        ("lab||5\n", {}, WARN, "5 for .*; 6 are wanted", "workers: 3}"),
        ("lab||100\nother||5\n", {"account": "lab"}, OK, "100 for .*, account lab", "^$"),
        ("lab|main|5\nlab|urgent|1\n", {}, WARN, "5 for ", "workers: 3}"),
        ("lab||\nold||\n", {"account": "new"}, WARN, "nothing in account new", "one of: lab, old;"),
        (None, {}, WARN, "^unknown: ", "when it is met"),
    ],
)
def test_the_limit_on_jobs_is_that_of_the_users_association(
    site: Site, rows: str | None, more: dict[str, Any], state: str, seen: str, fix: str
) -> None:
    site.say("sacctmgr", rows or "")
    if rows is None:
        site.fail("sacctmgr", "sacctmgr: error: Connection refused\n")
    found = without_image(site, cluster=more)
    check = one(found, "MaxSubmitJobs")
    assert check.state == state and re.search(seen, check.seen) and re.search(fix, check.fix), check
    assert others_are_ok(found, "MaxSubmitJobs")


@pytest.mark.parametrize(
    ("said", "state", "fix"),
    [
        (
            REFUSED + "Invalid account or account/partition combination specified",
            FAIL,
            "cluster.account .*; yours: lab$",
        ),
        (REFUSED + "Invalid qos specification", FAIL, "cluster.qos"),
        (REFUSED + "Invalid wckey specification", FAIL, "cluster.wckey"),
        (REFUSED + "Requested reservation is invalid", FAIL, "cluster.reservation"),
        (REFUSED + "Invalid feature specification", FAIL, "cluster.constraint"),
        ("sbatch: error: Invalid generic resource (gres) specification", FAIL, "cluster.gres"),
        (REFUSED + "Requested time limit is invalid (missing or exceeds some limit)", FAIL, "lower cluster.time_min"),
        (REFUSED + "Memory specification can not be satisfied", FAIL, "lower cluster.mem_gb"),
        ("sbatch: unrecognized option '--exclsive'", FAIL, "out of cluster.extra"),
        ("sbatch: fatal: Could not establish a configuration source", FAIL, "SLURM_CONF"),
        (REFUSED + "something new", FAIL, "submit --print"),
        (
            "sbatch: error: AssocMaxSubmitJobLimit\n" + REFUSED + "Job violates accounting/QOS policy",
            WARN,
            "fewer workers",
        ),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", WARN, "this may pass"),
        ("allocation failure: Requested node configuration is not available", WARN, "nodes may be down"),
    ],
)
def test_a_refusal_is_told_verbatim_with_what_to_change(site: Site, said: str, state: str, fix: str) -> None:
    site.say("sinfo", "main*|2|50000|gpu:1\nurgent|2|50000|gpu:1\n")
    site.fail("sbatch", said + "\n")
    found = without_image(site)
    check = one(found, "workers' jobs")
    assert (check.state, check.seen) == (state, said) and re.search(fix, check.fix), check
    assert one(found, "coordinator's job").seen == said
    assert others_are_ok(found, "workers' jobs", "coordinator's job")


def test_a_coordinator_is_asked_for_by_keys_of_its_own(site: Site) -> None:
    site.fail("sbatch", REFUSED + "Requested time limit is invalid\n")
    assert one(without_image(site), "coordinator's job").fix.startswith("lower cluster.coordinator_time_min ")


def test_what_no_node_has_is_named(site: Site) -> None:
    site.fail("sbatch", "allocation failure: Requested node configuration is not available\n")
    check = one(without_image(site, cluster={"gres": "gpu:4"}), "workers' jobs")
    assert check.state == FAIL and "cluster.gres: got gpu:4, which no node of partition main has" in check.seen
    assert check.fix == "lower cluster.gres, or choose another cluster.partition"


def test_an_sbatch_that_does_not_answer_has_accepted_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.bin / "sbatch").write_text("#!/bin/sh\nexec /bin/sleep 9\n")
    monkeypatch.setattr(queue, "QUERY_TIMEOUT_S", 0.2)
    assert slurm.refusal("") is None
    monkeypatch.setattr(slurm, "tested", lambda text, *options: None)
    for name in ("coordinator's job", "workers' jobs"):
        check = one(without_image(site), name)
        assert check.state == WARN and check.seen.startswith("unknown: sbatch --test-only") and "sinfo" in check.fix


def test_workers_are_tried_as_many_as_are_submitted_at_once(site: Site) -> None:
    site.setting("MaxArraySize", "3")
    assert "--array=0-2 " in one(without_image(site), "workers' jobs").seen
    assert "#SBATCH --partition=main" in (site.bin / "sbatch.given").read_text()
