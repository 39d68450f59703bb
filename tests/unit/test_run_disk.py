"""What `doctor` says of a run folder's file system: its type, its room, how fast it writes and shows."""

from __future__ import annotations

import re
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from lemonade_hpc.run import disk
from lemonade_hpc.run.checks import FAIL, OK, WARN

sys.path.insert(0, str(Path(__file__).parent))

from fake_site import Site, healthy, one, others_are_ok, tree, without_image  # noqa: E402


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with healthy(tmp_path) as made:
        yield made


KINDS = [
    ("nfs4", None, OK, "stale_s is 60$", "^$"),
    ("nfs", 0, WARN, "files 60 s late", "stale_s: 60"),
    ("unheard-of", 5, WARN, "files 60 s late", "stale_s: 60"),
    ("lustre", None, OK, "0 is enough there", "^$"),
    ("gpfs", 0, OK, "stale_s is 0$", "^$"),
    ("xfs", None, WARN, "a disk that only this machine sees", "by --run; .*stale_s: 0"),
    ("tmpfs", 0, OK, "all nodes are taken to be on this machine", "^$"),
]


@pytest.mark.parametrize(("kind", "stale_s", "state", "seen", "fix"), KINDS)
def test_the_type_of_file_system_says_how_late_it_is(
    site: Site, monkeypatch: pytest.MonkeyPatch, kind: str, stale_s: float | None, state: str, seen: str, fix: str
) -> None:
    monkeypatch.setattr(disk, "kind_of", lambda folder: kind)
    found = without_image(site, cluster={"stale_s": stale_s})
    check = one(found, "file system")
    assert check.state == state and re.search(seen, check.seen) and re.search(fix, check.fix), check
    assert kind in check.seen and others_are_ok(found, "file system")


def test_the_type_is_that_of_the_last_mount_above_it(site: Site) -> None:
    place = site.folder / "a b" / "run"
    place.mkdir(parents=True)
    mounts = site.folder / "mounts"
    rows = [
        ("/", "ext4"), (str(site.folder), "nfs4"), (str(place.parent).replace(" ", "\\040"), "xfs"),
        (str(place.parent).replace(" ", "\\040"), "lustre"), (f"{site.folder}/a", "tmpfs"),
    ]  # fmt: skip
    mounts.write_text("".join(f"9 1 0:1 / {point} rw shared:1 - {kind} source rw\n" for point, kind in rows))
    assert [disk.kind_of(path, mounts) for path in (place, site.data, Path("/usr"))] == ["lustre", "nfs4", "ext4"]
    assert disk.kind_of(Path("/proc")) == "proc"


Left = namedtuple("Left", "f_bavail f_frsize f_favail f_files")


@pytest.mark.parametrize(
    ("left", "state", "seen"),
    [
        (Left(2**20, 4096, 10**6, 10**7), WARN, "4.3 GB and 1,000,000 inodes are free"),
        (Left(2**30, 4096, 9_999, 10**7), WARN, "4398.0 GB and 9,999 inodes are free"),
        (Left(2**30, 4096, 0, 0), OK, "any number of inodes are free"),
        (Left(2**10, 4096, 10**6, 10**7), FAIL, "0.0 GB"),
        (Left(2**30, 4096, 99, 10**7), FAIL, "99 inodes"),
    ],
)
def test_little_room_is_told(site: Site, monkeypatch: pytest.MonkeyPatch, left: Left, state: str, seen: str) -> None:
    monkeypatch.setattr(disk.os, "statvfs", lambda folder: left)
    found = without_image(site)
    check = one(found, "free space")
    assert check.state == state and seen in check.seen and bool(check.fix) == (state != OK)
    assert others_are_ok(found, "free space")


def test_slow_writes_and_late_names_are_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SLOW_S", -1.0)
    monkeypatch.setattr(disk, "SEEN_S", 0.0)
    monkeypatch.setattr(disk, "LATE_S", -1.0)
    found = without_image(site)
    assert others_are_ok(found, "durable writes", "visibility")
    writes, seen = one(found, "durable writes"), one(found, "visibility")
    assert writes.state == WARN and "by --run" in writes.fix and re.search(r"median \d+\.\d ms, worst", writes.seen)
    assert seen.state == WARN and "stale_s: 60" in seen.fix


def test_a_name_that_is_never_seen_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "WATCH", "print(); print()")
    check = one(without_image(site), "visibility")
    assert check.state == WARN and check.seen.endswith("another node may see it later (cluster.stale_s)")


def test_an_existing_run_folder_is_examined_itself_and_left_as_it_was(site: Site) -> None:
    site.run.mkdir()
    (site.run / "run.json").write_text("{}")
    before = tree(site.run)
    assert one(without_image(site), "write permission").seen == str(site.run)
    assert tree(site.run) == before
