"""A disk that fills up, for real: a run on a small tmpfs pauses with exit code 3 and goes on when there is room again.

`doctor` says beforehand that it is full. Mounts a file system, so it needs root or a name space of its own:
`unshare -rm python full_disk.py`. Prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import harness

SIZES_KIB = (60, 150, 250, 350)


def mount(folder: Path, options: str) -> None:
    """Mount, or mount again, a tmpfs."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def examine(config: Path, small: Path) -> None:
    """What `doctor` says of a disk that is full, and of the same one when it is not: nothing of it stays."""
    for size, code, state in ((f"{SIZES_KIB[0]}k", 1, "fail"), ("8g", 0, "ok")):
        mount(small, f"remount,size={size}")
        found, out, err = harness.command("doctor", str(config), "--run", str(small / "run"), "--json")
        checks = {check["check"]: check for check in json.loads(out)}
        told = checks.pop("free space")
        assert (found, told["state"]) == (code, state), (out, err)
        assert code == 0 or ("No space left on device" in told["seen"] and "delete something" in told["fix"]), told
        assert all(check["state"] == "ok" for check in checks.values()) and not list(small.iterdir()), out
    mount(small, f"remount,size={SIZES_KIB[0]}k")


def main() -> None:
    """Fill the disk at several sizes, then give it room; the front must be the undisturbed run's."""
    pauses = 0
    with tempfile.TemporaryDirectory() as base:
        config = harness.write_config(Path(base))
        code, _, err = harness.search(config, Path(base) / "undisturbed")
        assert code == 0, err
        small = Path(base) / "small"
        small.mkdir()
        run = small / "run"
        mount(small, f"size={SIZES_KIB[0]}k")
        try:
            examine(config, small)
            for size in SIZES_KIB:
                mount(small, f"remount,size={size}k")
                code, _, err = harness.search(config, run)
                if code == 0:
                    break
                assert code == 3 and "No space left on device" in err, (size, code, err)
                pauses += 1
                harness.assert_gone(run, 5.0)
                if (run / "run.json").exists():
                    harness.assert_sound(run)
            mount(small, "remount,size=50m")
            code, _, err = harness.search(config, run)
            assert code == 0, err
            harness.assert_sound(run)
            assert harness.front(run) == harness.front(Path(base) / "undisturbed")
        finally:
            subprocess.run(["umount", str(small)], check=True)
    assert pauses, f"the disk never filled up at {SIZES_KIB} KiB"
    print(json.dumps({"pauses": pauses, "sizes_kib": SIZES_KIB}))


if __name__ == "__main__":
    main()
