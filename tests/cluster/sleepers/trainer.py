"""A trainer that sleeps in place of training: SLEEP_S seconds to four times as long, always as long for a child.

It speaks `learn/child.py`'s side of the protocol, and its errors are made up (`run_doubles.py`).
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "unit"))

import run_doubles as doubles  # noqa: E402

SPREAD = 4.0


def seconds(child: int) -> float:
    """How long a child takes: between SLEEP_S and SPREAD times that, evenly on a log scale."""
    return float(os.environ["SLEEP_S"]) * SPREAD ** random.Random(child).random()


def main(run: Path) -> None:
    """Answer tasks until standard input closes."""
    print(json.dumps({"ready": "sleeper"}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "child" in task:
            began = time.monotonic()
            time.sleep(seconds(task["child"]))
            made = doubles.outcome(task, run) | {"wall_s": time.monotonic() - began}
            print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
