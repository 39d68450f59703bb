"""A site where all is well, of scripts on PATH (Slurm's commands, Apptainer) and an image; and ways to plant faults.

What the scripts say is what Slurm 22.05 and Apptainer 1.4.5 said of the same faults. "Inside" is outside: the program
of this checkout, with the variables that Apptainer would pass on.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import lemonade_hpc
from lemonade_hpc import config as configs
from lemonade_hpc.run import container
from lemonade_hpc.run.checks import OK, Check
from lemonade_hpc.run.doctor import doctor
from lemonade_hpc.run.host import helper, shim

CAPABILITIES = 0x20080522
"""The version of the kernel's interface; effective, permitted and inheritable are the first three words of SETS."""
SETS = ctypes.c_uint32 * 6
OVERRIDE = (1, 2)
"""CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH."""
TOOLS = ("basename", "cat", "dirname", "sed", "sh", "stat", "true")
PACKAGE = Path(lemonade_hpc.__file__).parents[1]
SLURM = """#!/bin/sh
[ ! -f "$0.fails" ] || { cat "$0.fails" >&2; exit 1; }
[ ! -f "$0.says" ] || cat "$0.says"
echo "$(basename $0) $*" >> "$(dirname $0)/../calls"
"""
SBATCH = """#!/bin/sh
cat > "$0.given"
[ ! -f "$0.fails" ] || { cat "$0.fails" >&2; exit 1; }
partition=$(sed -n 's/^#SBATCH --partition=//p' "$0.given")
case $partition in
    main | "") echo "sbatch: Job 7 to start at 2026-01-01T00:00:00 using 1 processors on nodes n1" >&2 ;;
    *) echo "sbatch: error: invalid partition specified: $partition" >&2
       echo "allocation failure: Invalid partition name specified" >&2
       exit 1 ;;
esac
"""
CONFIG = """Configuration data as of 2026-01-01T00:00:00
JobRequeue              = 1
MaxArraySize            = 1001
MinJobAge               = 300 sec
LaunchParameters        =
PreemptMode             = OFF
"""
APPTAINER = """#!{python}
import csv, json, os, subprocess, sys
home = os.path.dirname(os.path.abspath(__file__)) + "/.."
plan = json.load(open(home + "/plan"))
def say(word, text):
    print(word + ("   [U=1000,P=7]      Master()      " if debug else ":   ") + text, file=sys.stderr)
def fatal(text):
    say("FATAL", text)
    sys.exit(255)
words = sys.argv[1:]
debug = words[0] == "--debug"
words = words[words[0] in ("--debug", "--quiet"):]
if words == ["--version"]:
    print(plan.get("version", "apptainer version 1.4.5"))
    sys.exit(plan.get("version_code", 0))
assert words.pop(0) == "exec", sys.argv
binds = []
while words[0].startswith("-"):
    word = words.pop(0)
    assert word in ("--cleanenv", "--no-home", "--no-eval", "--nv", "--mount"), word
    if word == "--mount":
        kind, source, target = next(csv.reader([words.pop(0)]))
        assert kind == "type=bind" and source[4:] == target[4:], (source, target)
        binds.append(source[4:])
image = words.pop(0)
try:
    open(image, "rb").close()
except OSError as error:
    fatal("While checking container encryption: could not open image " + image)
if "fatal" in plan:
    fatal(plan["fatal"])
unsquash = "APPTAINER_UNSQUASH" in os.environ
if plan.get("fuse") == "closed" and not unsquash:
    fatal("container creation failed: image driver mount failure: image driver squashfuse_ll instance exited with "
          "error: squashfuse_ll exited: fuse: failed to open /dev/fuse: Permission denied")
if plan.get("fuse") == "missing" or unsquash:
    say("INFO", "Converting SIF file to temporary sandbox...")
elif debug:
    say("DEBUG", plan.get("mount", "Executing /usr/bin/squashfuse_ll -f -o allow_other,ro,offset=36864"))
hidden = binds if plan.get("binds") == "ignored" else []
for folder in hidden:
    say("WARNING", "Ignoring " + folder + " bind mount: user bind control disabled by system administrator")
for folder in binds:
    if not os.path.exists(folder):
        fatal("container creation failed: mount hook function failure: mount " + folder)
if words[0] == "stat":
    words = [word for word in words if word not in hidden]
given = {{key[13:]: value for key, value in os.environ.items() if key.startswith("APPTAINERENV_")}}
path = ([home + "/shims"] if given.pop("PREPEND_PATH", None) else []) + [os.environ["PATH"]]
environ = {{"PATH": ":".join(path), "PYTHONPATH": {package!r}, "APPTAINER_CONTAINER": image, **given}}
start = {{"python3": [sys.executable], "lemonade-hpc": [sys.executable, "-m", "lemonade_hpc.cli"]}}
words = start.get(words[0], words[:1]) + words[1:]
if words[1:2] == ["-c"] and words[2].startswith("import torch,"):
    if "torch" in plan:
        sys.exit(plan["torch"])
    print("2.14.1")
    sys.exit(0)
if plan.get("inside") and words[1:2] == ["-c"]:
    words = [sys.executable, "-c", plan["inside"]]
os.execvpe(words[0], words, environ)
"""


class Site:
    """A folder with `bin/`, an image, a folder of data to bind, and a place for runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.image, self.data, self.run = folder / "lemonade.sif", folder / "data", folder / "runs" / "mine"
        for made in (folder, self.bin, folder / "tools", folder / "shims", self.data, self.run.parent):
            made.mkdir(exist_ok=True)
        for name in TOOLS:
            (folder / "tools" / name).symlink_to(shutil.which(name) or f"{name}: is not here")
        self.image.write_bytes(b"an image")
        for name in (*helper.WORDS, "srun"):
            self._script(self.bin / name, SBATCH if name == "sbatch" else SLURM)
            self._script(folder / "shims" / name, f"#!{sys.executable} -IS\n{Path(shim.__file__).read_text()}")
        self._script(self.bin / "apptainer", APPTAINER.format(python=sys.executable, package=str(PACKAGE)))
        self.say("scontrol", CONFIG)
        self.say("sinfo", "main*|2|5000|gpu:1\nurgent|2|5000|gpu:1\n")
        self.say("sacctmgr", "lab||\n")
        (folder / "calls").touch()
        self.plan()

    def _script(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def say(self, name: str, text: str) -> None:
        """What a command of Slurm's says."""
        (self.bin / f"{name}.says").write_text(text)

    def fail(self, name: str, text: str) -> None:
        """What it says while it fails."""
        (self.bin / f"{name}.fails").write_text(text)

    def setting(self, name: str, value: str) -> None:
        """Change a line of Slurm's configuration; an empty value takes it out."""
        kept = [line for line in CONFIG.splitlines() if not line.startswith(name)]
        self.say("scontrol", "\n".join([*kept, *([f"{name} = {value}"] if value else [])]) + "\n")

    def plan(self, **how: Any) -> None:
        """How Apptainer behaves."""
        (self.folder / "plan").write_text(json.dumps(how))

    def lacks(self, name: str) -> None:
        """Take a command away."""
        (self.bin / name).unlink()

    def settings(self, **more: Any) -> dict[str, Any]:
        """A configuration with which all is well; `more`: keys of its sections."""
        base: dict[str, dict[str, Any]] = {
            "data": {"name": "digits"},
            "cluster": {"backend": "slurm", "workers": 4, "partition": "main", "device": "cpu", "stale_s": 0},
            "container": {"image": str(self.image), "binds": [str(self.data)]},
        }
        return {key: value | more.get(key, {}) for key, value in base.items()}

    def environ(self) -> dict[str, str]:
        """An environment with these commands, and those that scripts need: this machine may have a real Slurm."""
        return {
            "PATH": f"{self.bin}:{self.folder / 'tools'}",
            "OMP_NUM_THREADS": "1",
            "HOME": "/nowhere",
            "USER": "somebody",
        }

    def calls(self, name: str) -> list[str]:
        """What a command of Slurm's was asked."""
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(f"{name} ")]

    def by_helper(self, **more: Any) -> tuple[int, list[dict[str, str]], str]:
        """`doctor` as a user starts it who has nothing but the image and the helper: exit code, checks, complaints."""
        (self.folder / "my.yaml").write_text(yaml.safe_dump(self.settings(**more)))
        words = ["--image", str(self.image), "--bind", str(self.data), "doctor", "--run", str(self.run), "my.yaml"]
        done = subprocess.run(
            [sys.executable, helper.__file__, *words, "--json"],
            cwd=self.folder, env=self.environ(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


@contextmanager
def healthy(folder: Path) -> Iterator[Site]:
    """A site; this process has its commands alone."""
    made = Site(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", made.environ()["PATH"])
        patch.delenv(container.AROUND, raising=False)
        yield made


def examine(site: Site, **more: Any) -> list[Check]:
    """What is found from outside of the image."""
    return doctor(configs.from_dict(site.settings(**more), "test"), site.run)


def without_image(site: Site, **more: Any) -> list[Check]:
    """What is found where workers run in none."""
    return examine(site, container={"image": None}, **more)


def one(found: list[Check], name: str) -> Check:
    """The check of that name."""
    (check,) = [check for check in found if check.name == name]
    return check


def others_are_ok(found: list[Check], *names: str) -> bool:
    """Whether no other check finds anything."""
    return all(check.state == OK and not check.fix for check in found if check.name not in names)


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Without root's right to read and write anything, in this thread, if it has it."""
    libc, header, before = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(CAPABILITIES, 0), SETS()
    assert libc.capget(header, before) == 0, os.strerror(ctypes.get_errno())
    less = SETS(*before)
    less[0] &= ~sum(1 << number for number in OVERRIDE)
    assert libc.capset(header, less) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0, os.strerror(ctypes.get_errno())


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below a folder, with its kind and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        found[str(path)] = kind, path.read_bytes() if stat.S_ISREG(kind) else b""
    return found
