"""What an image costs at the start of a process: torch imported outside, inside, and inside as if not compiled, and all
that a worker imports, in the two processes that it is.

    python tests/benchmarks/image_start.py lemonade.sif [--rounds 5]      # not as root

The Python that runs this is the one outside; it should have the image's torch, and this project. Prints JSON: seconds,
medians of interleaved rounds, and the ratios to outside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lemonade_hpc.run.host import helper

NOTHING, TORCH = ["-c", "pass"], ["-c", "import torch; print(torch.__version__)"]
WORKER = [
    "-c",
    "import subprocess, sys, submitit, lemonade_hpc.run.worker\n"
    "subprocess.run([sys.executable, '-c', 'import lemonade_hpc.learn.lab'], check=True)",
]
UNCOMPILED = {"APPTAINERENV_PYTHONPYCACHEPREFIX": "/nowhere"}


def timed(command: list[str], environ: dict[str, str]) -> tuple[float, str]:
    """Seconds, and what it says."""
    began = time.perf_counter()
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, text=True)
    return time.perf_counter() - began, done.stdout.strip()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    within = [*helper.inside(str(given.image.resolve()), [], nv=False), "python3"]
    environ = helper.environment(os.environ)
    cases = {
        "nothing outside": ([sys.executable, *NOTHING], dict(os.environ)),
        "nothing inside": ([*within, *NOTHING], environ),
        "torch outside": ([sys.executable, *TORCH], dict(os.environ)),
        "torch inside": ([*within, *TORCH], environ),
        "torch inside, not compiled": ([*within, *TORCH], environ | UNCOMPILED),
        "worker outside": ([sys.executable, *WORKER], dict(os.environ)),
        "worker inside": ([*within, *WORKER], environ),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    said = {}
    for _ in range(given.rounds + 1):  # the first one warms the caches of the disk
        for name, (command, seen) in cases.items():
            seconds, said[name] = timed(command, seen)
            times[name].append(seconds)
    medians = {name: round(statistics.median(row[1:]), 3) for name, row in times.items()}
    base = {name: medians[f"{name} outside"] for name in ("torch", "worker")}
    found = {
        "median_s": medians,
        "spread_s": {name: [round(min(row[1:]), 3), round(max(row[1:]), 3)] for name, row in times.items()},
        "torch": said,
        "ratio_to_outside": {
            name: round(seconds / base[name.partition(" ")[0]], 2)
            for name, seconds in medians.items()
            if name.partition(" ")[0] in base
        },
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
