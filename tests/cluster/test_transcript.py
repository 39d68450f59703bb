"""The story of `tests/unit/slurm_story.py` on a real Slurm: it says what is written in `transcripts/`.

`python tests/cluster/test_transcript.py` writes it anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "unit")]

import slurm_story  # noqa: E402
from fake_slurm import Answer  # noqa: E402

from slurm import USER, Slurm, cluster, wait_for  # noqa: E402

MORE = f"""
FirstJobId={slurm_story.FIRST_JOB}
TrackWCKey=yes
AccountingStorageEnforce=associations,limits,qos,wckeys
"""
LIMITS = {
    "AssocMaxSubmitJobLimit": ("user", USER, "MaxSubmitJobs"),
    "AssocGrpSubmitJobsLimit": ("account", "lab", "GrpSubmitJobs"),
    "MaxSubmitJobsPerAccount": ("qos", "normal", "MaxSubmitJobsPerAccount"),
}


class RealStage:
    """A real Slurm, as an ordinary user sees it."""

    def __init__(self, slurm: Slurm) -> None:
        self.slurm = slurm

    def run(self, command: Sequence[str], stdin: str | None = None) -> Answer:
        who = self.slurm.user
        done = subprocess.run(
            list(command), input=stdin, capture_output=True, text=True, check=False, env=self.slurm.environment(),
            cwd=who.pw_dir, user=who.pw_uid, group=who.pw_gid, timeout=60,
        )  # fmt: skip
        return Answer(done.returncode, done.stdout, done.stderr)

    def wait(self) -> None:
        time.sleep(0.1)

    def happens(self, what: str) -> None:
        who, change = what.split()
        if who.startswith("n"):
            self.slurm.run("scontrol", "update", f"NodeName={who}", "State=DOWN", "Reason=lost", root=True)
        elif change == "ends":
            self.slurm.stop(who)
            self._wait_for_answers(2 if who == "slurmctld" else None)
        elif who == "slurmdbd":
            self.slurm.start_accounting()
        elif who == "slurmctld":
            self._wait_for_answers(None)
            self.slurm.start_controller()
        else:
            for name, (kind, of, key) in LIMITS.items():
                limit = change if name == who else "-1"
                self.slurm.run("sacctmgr", "-i", "modify", kind, of, "set", f"{key}={limit}", root=True)
            if who == "limits":
                return
            script = f"#!/bin/sh\n#SBATCH --array=0-{change} --mem=1M\ntrue\n"
            wait_for("the limit holds", lambda: who in self.run(("sbatch", "--test-only"), script).err)

    def _wait_for_answers(self, seconds: int | None) -> None:
        """Have commands wait for so long where nobody answers, by default as long as Slurm does."""
        path = self.slurm.folder / "slurm.conf"
        lines = [line for line in path.read_text().splitlines(True) if not line.startswith("MessageTimeout=")]
        path.write_text("".join([*lines, f"MessageTimeout={seconds}\n" * (seconds is not None)]))


def recorded() -> list[dict[str, Any]]:
    """What a Slurm says today. The ordinary user's jobs write into folders that this process makes."""
    mask = os.umask(0)
    try:
        with cluster(slurm_story.MAX_ARRAY, MORE) as made:
            folder = Path(tempfile.mkdtemp(dir=made.user.pw_dir))
            folder.chmod(0o777)
            return slurm_story.play(RealStage(made), folder / "run")
    finally:
        os.umask(mask)


def test_a_real_one_says_what_is_written() -> None:
    expected = json.loads(slurm_story.TRANSCRIPT.read_text())
    for told, line in zip(recorded(), expected, strict=True):
        assert told == line


if __name__ == "__main__":
    slurm_story.TRANSCRIPT.write_text(json.dumps(recorded(), indent=1) + "\n")
