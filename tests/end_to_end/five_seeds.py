"""The shipped digits search with five seeds: each must end with a wide and good front, in time.

For every seed: at least 150 children in less than 2 minutes, 8 members over a factor 10 in parameters, an error of at
most 1.5 %, and at most 3 % with at most 3,000 parameters; the front is non-dominated, and `verify` finds no fault.
Prints a line a seed; exit code 1 where one falls short. Of a run that is there all is asked but its time.

`python tests/end_to_end/five_seeds.py [--max-seconds 120] [--seeds 0 1 2 3 4] [--run DIR]`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from lemonade_hpc import config

COMMAND = [sys.executable, "-m", "lemonade_hpc.cli"]


def search(seed: int, folder: Path) -> dict[str, float]:
    """Run one; what the demands are about."""
    shipped = config.to_dict(config.load("digits"))
    settings, run = folder / f"seed{seed}.yaml", folder / f"seed{seed}"
    settings.write_text(yaml.safe_dump(shipped | {"seed": seed}))
    began = time.monotonic()
    subprocess.run([*COMMAND, "search", str(settings), "--run", str(run)], check=True, capture_output=True)
    return {"seconds": time.monotonic() - began, **result(run)}


def result(run: Path) -> dict[str, float]:
    """What the demands on a run that is complete are about."""
    subprocess.run([*COMMAND, "verify", str(run)], check=True, capture_output=True)
    status, front = (_json(command, run) for command in ("status", "front"))
    errors = [member["objectives"]["val_error"] for member in front]
    sizes = [member["objectives"]["params"] for member in front]
    rising = sorted(zip(sizes, errors, strict=True))
    return {
        "children": status["children"]["committed"],
        "members": len(front),
        "dominated": sum(later[1] >= earlier[1] for earlier, later in zip(rising, rising[1:], strict=False)),
        "span": max(sizes) / min(sizes),
        "percent": 100 * min(errors),
        "percent_small": 100 * min(error for size, error in rising if size <= 3000),
    }


def _json(command: str, run: Path) -> Any:
    done = subprocess.run([*COMMAND, command, str(run), "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def faults(found: dict[str, float], max_seconds: float) -> list[str]:
    """The demands that are not met."""
    demands = {
        "seconds": found.get("seconds", 0.0) < max_seconds,
        "children": found["children"] >= 150,
        "members": found["members"] >= 8,
        "dominated": found["dominated"] == 0,
        "span": found["span"] >= 10,
        "percent": found["percent"] <= 1.5,
        "percent_small": found["percent_small"] <= 3.0,
    }
    return [name for name, met in demands.items() if not met]


def main() -> None:
    """Read the arguments, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run of the digits search that is complete")
    given = parser.parse_args()
    short = 0
    with tempfile.TemporaryDirectory() as folder:
        for what in [given.run] if given.run else given.seeds:
            found = result(what) if given.run else search(what, Path(folder))
            missed = faults(found, given.max_seconds)
            short += bool(missed)
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
            title = what if given.run else f"seed {what}"
            print(f"{title}: {numbers}{'; MISSED: ' + ', '.join(missed) if missed else ''}", flush=True)
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
