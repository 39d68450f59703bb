"""The example site files of `slurm/sites`, and an array size of ten, on a real Slurm of such a shape.

Needs root and Slurm's daemons (`slurm.py`): `pytest tests/cluster -n0`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

from runs import lemonade  # noqa: E402

from slurm import USER, Slurm  # noqa: E402

FILES = sorted((Path(__file__).parents[2] / "slurm" / "sites").glob("*.yaml"))
SITE = {
    "max_array": 10,
    "gpu": "a100",
    "more": "AccountingStorageEnforce=limits,qos\n"
    + "\n".join(f"PartitionName={name} Nodes=ALL State=UP" for name in ("gpu", "preempt", "cpu")),
}


@pytest.fixture(scope="module")
def qos(slurm: Slurm) -> None:
    slurm.run("sacctmgr", "-i", "add", "qos", "scavenger", root=True)
    slurm.run("sacctmgr", "-i", "modify", "user", USER, "set", "qos=normal,scavenger", root=True)


def test_there_are_three_shapes() -> None:
    assert [path.stem for path in FILES] == ["cpu", "gres", "preemptible"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.usefixtures("qos")
def test_a_site_file_is_taken_by_slurm(slurm: Slurm, home: Path, path: Path) -> None:
    """Both scripts, as `submit --print` shows them and by `sbatch --test-only`; doctor says what is to be known."""
    (home / "my.yaml").write_text(path.read_text())
    code, out, err = lemonade(slurm, home, "submit", "my.yaml", "--print")
    assert (code, err) == (0, ""), err
    _, coordinator, worker = out.split("# ---- ")
    for text in (coordinator, worker):
        script = "#!" + text.partition("#!")[2]
        asked = yaml.safe_load(path.read_text())["cluster"]
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, env=slurm.environment(),
            user=slurm.user.pw_uid, group=slurm.user.pw_gid, cwd=home, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "to start at" in done.stderr, script + done.stderr
        assert asked["backend"] == "slurm"
    code, out, err = lemonade(slurm, home, "doctor", "my.yaml", "--json")
    checks = {check["check"]: check for check in json.loads(out)}
    assert code == 0 and checks["workers' jobs"]["state"] == checks["coordinator's job"]["state"] == "ok", out
    assert checks["MaxArraySize"]["state"] == "warn" and "arrays of at most 10" in checks["MaxArraySize"]["fix"]
    assert not (home / "my").exists()
