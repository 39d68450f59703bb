"""Kill processes of real runs at random moments and check that nothing is lost: `python kills.py --kills 50`.

Kills a coordinator, a supervisor or a trainer with SIGKILL, in turn. After every kill `verify` must pass, and what had
been committed must stay so, each child once and by the same attempt; after a coordinator's death the same command must
go on. Every run, when complete, must have the front of an undisturbed one, bit for bit. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness

KINDS = ("coordinator", "supervisor", "trainer")


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Runs, one after another, until enough kills have hit; what was done."""
    rng = random.Random(seed)
    config = harness.write_config(folder)
    code, _, err = harness.search(config, folder / "undisturbed")
    assert code == 0, err
    wanted = harness.front(folder / "undisturbed")
    done: Counter[str] = Counter()
    runs = 0
    while sum(done.values()) < kills:
        run = folder / f"run{runs}"
        runs += 1
        torment(config, run, kills - sum(done.values()), done, rng)
        assert harness.front(run) == wanted, f"{run}: the front differs from the undisturbed run's"
        harness.assert_sound(run)
        harness.assert_gone(run)
    return {"kills": dict(done), "runs": runs, "seed": seed}


def torment(config: Path, run: Path, left: int, done: Counter[str], rng: random.Random) -> None:
    """One run to its end, hurt again and again on the way, at most `left` times."""
    process = harness.start(config, run)
    kept: dict[int, str] = {}
    while True:
        time.sleep(rng.uniform(0.2, 3.0))
        before, kept = kept, harness.committed(run)
        assert before.items() <= kept.items(), f"{run}: outcomes that were committed are gone or others"
        if process.poll() is not None:
            code, _, err = harness.finish(process)
            assert code == 0, err
            return
        kind = KINDS[sum(done.values()) % len(KINDS)]
        if left <= 0:
            continue
        if kind == "coordinator":
            harness.kill(process.pid)
            process.wait()
            if (run / "run.json").exists():
                harness.assert_sound(run)
            process = harness.start(config, run)
        elif not harness.hurt(run, kind, rng):
            continue
        elif process.poll() is None:
            harness.assert_sound_now(run, process)
        done[kind] += 1
        left -= 1


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = campaign(Path(folder), arguments.kills, arguments.seed)
    print(json.dumps(result | {"wall_s": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
