"""The image's own test: a search of a few seconds on real digits, whose children are made by exact operators.

What a run needs is imported on the way. Ends with an error where a child failed, or where an operator that is to leave
its parent's answers as they are has changed them.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lemonade_hpc.run import population, status

CONFIG = """
data: {name: digits}
objectives: [{name: val_error}, {name: params, min: 100, max: 30000}]
search: {mode: generational, children: 2, proposals: 4, accepted: 2, operators: [insert, widen]}
training: {initial_epochs: 1, epochs: 1}
cluster: {backend: inline, device: cpu}
"""
LARGEST = 1e-6
"""How much an exact operator may change an answer, relative to the largest one: what float32 leaves open."""


def main() -> int:
    """Search, verify, and look at every child."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "check.yaml").write_text(CONFIG)
        for words in (("search", "check.yaml", "--run", "run"), ("verify", "run")):
            subprocess.run(("lemonade-hpc", *words), cwd=scratch, env=environ, check=True, stdout=subprocess.DEVNULL)
        run = Path(scratch) / "run"
        history = status.read(run)[2].history
        rows = [row["outcome"] for row in population.finished(run, history) if row["parent"] is not None]
    receipts = [outcome["receipt"] for outcome in rows]
    changes = [receipt["relative_difference"] for receipt in receipts if receipt["exact"]]
    print(f"{len(changes)} children by exact operators, which changed answers by {changes} of the largest")
    return int(len(changes) != 2 or max(changes) > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
