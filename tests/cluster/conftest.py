"""A Slurm for the tests of one file, a folder for each of them, and the front that all are compared with."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import config, front, lemonade  # noqa: E402

from slurm import USER, Slurm, cluster, wait_for  # noqa: E402

EXPECTED: list[Any] = []


@pytest.fixture(scope="module")
def slurm(request: pytest.FixtureRequest) -> Iterator[Slurm]:
    """What the file's SITE says, if it has one."""
    with cluster(**getattr(request.module, "SITE", {})) as made:
        yield made


@pytest.fixture
def home(slurm: Slurm, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the ordinary user's, with a configuration for each backend."""
    folder = Path(tempfile.mkdtemp(prefix=f"{request.node.name.partition('[')[0]}-", dir=slurm.user.pw_dir))
    for backend in ("local", "slurm"):
        (folder / f"{backend}.yaml").write_text(config(backend))
    os.chown(folder, slurm.user.pw_uid, slurm.user.pw_gid)
    yield folder
    slurm.run("scancel", "-u", USER)
    wait_for("all jobs have ended", slurm.idle)


@pytest.fixture(scope="module")
def expected(slurm: Slurm) -> list[Any]:
    """The front of the same search by the local backend, made once for all files."""
    if EXPECTED:
        return EXPECTED
    home = Path(tempfile.mkdtemp(prefix="local-", dir=slurm.user.pw_dir))
    os.chown(home, slurm.user.pw_uid, slurm.user.pw_gid)
    (home / "local.yaml").write_text(config("local"))
    code, _, err = lemonade(slurm, home, "search", "local.yaml", "--run", "local")
    assert code == 0, err
    found = front(slurm, home, "local")
    assert len(found) > 4
    EXPECTED.extend(found)
    return EXPECTED
