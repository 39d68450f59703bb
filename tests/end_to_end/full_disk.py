"""A disk that fills up, for real: a run on a small tmpfs pauses with exit code 3 and goes on when there is room again.

Once its blocks run out, once its inodes. `doctor` says beforehand that it is full. Mounts file systems, so it needs
root or a name space of its own: `unshare -rm python full_disk.py`. Prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness

LIMITS = {"size": ("60k", "150k", "250k", "350k"), "nr_inodes": ("15", "40", "70", "100")}
ROOM = {"size": "50m", "nr_inodes": "100k"}


def mount(folder: Path, options: str) -> None:
    """Mount, or mount again, a tmpfs."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def examine(config: Path, small: Path) -> None:
    """What `doctor` says of a disk that is full, and of the same one when it is not: nothing of it stays."""
    for size, code, state in ((LIMITS["size"][0], 1, "fail"), ("8g", 0, "ok")):
        mount(small, f"remount,size={size}")
        found, out, err = harness.command("doctor", str(config), "--run", str(small / "run"), "--json")
        checks = {check["check"]: check for check in json.loads(out)}
        told = checks.pop("free space")
        assert (found, told["state"]) == (code, state), (out, err)
        assert code == 0 or ("No space left on device" in told["seen"] and "delete something" in told["fix"]), told
        assert all(check["state"] == "ok" for check in checks.values()) and not list(small.iterdir()), out


def fill(config: Path, small: Path, kind: str) -> int:
    """Search on a disk that has more and more room of one kind, and enough at last; how often it was full."""
    run, pauses = small / "run", 0
    for limit in LIMITS[kind]:
        mount(small, f"remount,{kind}={limit}")
        code, _, err = harness.search(config, run)
        if code == 0:
            break
        assert code == 3 and "No space left on device" in err, (kind, limit, code, err)
        pauses += 1
        harness.assert_gone(run, 5.0)
        if (run / "run.json").exists():
            harness.assert_sound(run)
    mount(small, f"remount,{kind}={ROOM[kind]}")
    code, _, err = harness.search(config, run)
    assert code == 0, err
    harness.assert_sound(run)
    assert pauses, f"the disk never filled up: {kind} {LIMITS[kind]}"
    return pauses


def main() -> None:
    """Fill the disk in each way; the front must be the undisturbed run's."""
    pauses = {}
    with tempfile.TemporaryDirectory() as base:
        config = harness.write_config(Path(base))
        code, _, err = harness.search(config, Path(base) / "undisturbed")
        assert code == 0, err
        for kind in LIMITS:
            small = Path(base) / kind
            small.mkdir()
            mount(
                small, ",".join(f"{name}={ROOM[name]}" for name in ROOM if name != kind) + f",{kind}={LIMITS[kind][0]}"
            )
            try:
                if kind == "size":
                    examine(config, small)
                pauses[kind] = fill(config, small, kind)
                assert harness.front(small / "run") == harness.front(Path(base) / "undisturbed")
            finally:
                subprocess.run(["umount", str(small)], check=True)
    print(json.dumps({"pauses": pauses, "limits": LIMITS}))


if __name__ == "__main__":
    main()
