#!/usr/bin/env python3
"""The part of lemonade-hpc that is outside its image: starts a command inside, and runs Slurm's commands for it.

    lemonade-hpc [--image FILE] [--bind FOLDER]... search my.yaml --run my      # or any other command

Decides: what of the host is seen inside (folders, by their own names; variables), and which commands of Slurm's, with
which words, are run for what is inside. Those that it is not told of here are refused; all are written down in the
run folder, `slurm/helper-*.log`. For `doctor`: what only the host can tell, and whether anything can be started inside.
Standard library of Python 3.6 only: beside Apptainer, it is all that a cluster needs, and so it is one file.
"""

import os
import sys

if __name__ == "__main__" and not sys.flags.isolated:  # neither PYTHONPATH nor a json.py beside it is to be imported
    os.execv(sys.executable, [sys.executable, "-I", *sys.argv])

import argparse
import errno
import getpass
import hashlib
import json
import platform
import re
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

SOCKET = "LEMONADE_SOCKET"
AS = "LEMONADE_AS"
"""How a person has called this, for messages to her, also from jobs that follow."""
SHIMS = "/opt/lemonade/shims"
"""Where the image has its commands of Slurm's."""
KEPT = (
    "(SLURM|SLURMD|SUBMITIT|LEMONADE)_[A-Za-z0-9_]*|CUDA_VISIBLE_DEVICES|(OMP|MKL|OPENBLAS)_NUM_THREADS"
    "|TERM|COLUMNS|LANG|LC_ALL|TZ"
)
"""Variables of the host that are seen inside, as an extended regular expression."""
JOBS_OWN = r"SLURM_(?!(CONF|CLUSTERS|JWT|TIME_FORMAT)$).*"
"""Variables that tell a process of the job it is in. What it submits is not to inherit them: srun would take them for
its options."""
PASSED_ON = r"(APPTAINER|SINGULARITY)ENV_.*"
"""Variables of the host that Apptainer would set inside, whatever they are."""
LOADER = ("LD_LIBRARY_PATH", "LD_PRELOAD")
"""Variables that may lead Apptainer's own tools to a wrong library."""
WITH_CONFIG = ("search", "submit", "doctor")
"""Commands whose first word is a configuration, not a run folder."""
DEVICE = "/dev/nvidiactl"
"""Is there on a machine with an NVIDIA GPU."""

MOST_BYTES = 2**20
"""Of a request."""
READ_S = 10.0
"""How long a request may take to arrive."""
RUN_S = {"sbatch": 120.0}
"""How long a command may take; others, OTHERS_S."""
OTHERS_S = 30.0
MOST_NOTED, MOST_LINES = 10_000, 10_000
"""Characters of a line of the log, and lines that are kept until there is a folder for it."""
ELSEWHERE = "/tmp/lemonade-helper-{}.log"
"""Of a user: what was asked where there is no run folder."""
CONNECTIONS = 16
"""Served at a time; others wait."""
REFUSED, TIMED_OUT, NOT_FOUND = 126, 124, 127
"""Exit codes of commands that were not run, were ended, or are not there."""
NOT_STARTED, WRONG_INPUT, LATER = 255, 2, 3
"""Of Apptainer where it starts nothing; of this where something that was given is wrong, or a file system is away."""
AWAY = (errno.EIO, errno.ESTALE, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENOTCONN)

NAMES = r"lemonade-[0-9a-f]{8}-[A-Za-z0-9]+(,lemonade-[0-9a-f]{8}-[A-Za-z0-9]+)*"
JOB = r"\d+(_\d+)?"
WORDS = {
    "sbatch": (r"--parsable", r"--test-only", r"--array=0-\d+"),
    "squeue": (
        r"--(me|array|noheader)",
        r"--states=[A-Za-z,]+",
        r"--format=[%|A-Za-z]+",
        "--name=" + NAMES,
        "--jobs=" + JOB,
    ),
    "scancel": (r"--me", "--name=" + NAMES, r"--state=PENDING", JOB),
    "scontrol": (r"show", r"config", r"job", r"--oneliner"),
    "sacct": (r"-[XnPSjo]", r"--name", NAMES, JOB, r"now-\d+days", r"[A-Za-z,]+"),
    "sinfo": (r"--(all|Node|noheader)", r"--format=[%|A-Za-z]+"),
    "sacctmgr": (r"--(readonly|noheader|parsable2)", r"show", r"assoc", r"user=[A-Za-z0-9_.@-]+", r"format=[A-Za-z,]+"),
}  # type: Dict[str, Tuple[str, ...]]
"""What each command may be given, besides a script of sbatch's."""
BEGINNINGS = ("first", "take-over")
"""Words that a script of a coordinator may be given (`run/chain.py`)."""


class Refused(Exception):  # noqa: N818
    """A request that is not granted: says why."""


def granted(request: Any, root: Optional[str]) -> Tuple[List[str], str, str]:
    """The command, working directory and input of a request; raises Refused.

    Scripts must lie in the folder `root`; without one, nothing may be submitted.
    """
    try:
        command, cwd, text = request["command"], request["cwd"], request["input"]
        told = [*command, cwd, text]
    except (KeyError, TypeError):
        raise Refused("a request names command, cwd and input")
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in told):
        raise Refused("command is a list of text, not empty; cwd and input are text")
    if any(not word.isprintable() for word in [*command, cwd]):
        raise Refused("a word has a character that cannot be printed")
    command, cwd = [os.fsdecode(word.encode()) for word in command], os.fsdecode(cwd.encode())  # in an ASCII locale
    name, words = command[0], command[1:]
    if name not in WORDS:
        raise Refused("{}: allowed are {}".format(name, ", ".join(sorted(WORDS))))
    plain = [word for word in words if not any(re.fullmatch(pattern, word) for pattern in WORDS[name])]
    if name == "sbatch":
        plain, words = _with_script(plain, words, root)
    if name == "scancel" and not (words and all(re.fullmatch(JOB, word) for word in words)):
        if not any(word.startswith("--name=") for word in words):
            raise Refused("scancel: jobs are named, one by one or by --name")
    if plain:
        raise Refused("{}: {!r} is not among the words it may be given".format(name, plain[0]))
    if text and name != "sbatch":  # without words, scontrol and sacctmgr would carry it out
        raise Refused("{}: only sbatch is given an input".format(name))
    return [name, *words], cwd if os.path.isdir(cwd) else root or "/", text


def _with_script(plain: List[str], words: List[str], root: Optional[str]) -> Tuple[List[str], List[str]]:
    """What of sbatch's words is not known, and all of them with its script by its real name.

    A script is this run's, and comes last, maybe with a word for a coordinator after it.
    """
    end = []  # type: List[str]
    if plain and plain[-1] == words[-1] in BEGINNINGS:
        plain, words, end = plain[:-1], words[:-1], words[-1:]
    if not plain or plain[-1] != words[-1] or plain[-1].startswith("-"):
        if "--test-only" not in words:
            raise Refused("sbatch: without --test-only, its last word is a script")
        return plain, words + end
    script = os.path.realpath(plain[-1])
    if root is None or not os.path.isabs(plain[-1]) or not script.startswith(os.path.realpath(root) + os.sep):
        raise Refused("sbatch: {} is not the whole path of a file in {}".format(plain[-1], root or "a run folder"))
    if not os.path.isfile(script):
        raise Refused("sbatch: {} is not a file".format(plain[-1]))
    return plain[:-1], [*words[:-1], script, *end]


class Helper:
    """Serves requests on a socket that only its owner can open. `log`: a file, made with its first line."""

    def __init__(self, root: Optional[str], log: str) -> None:
        self._root, self._log = root, log
        self._lines = []  # type: List[str]
        self._lock = threading.Lock()
        self._free = threading.Semaphore(CONNECTIONS)
        self.folder = tempfile.mkdtemp(prefix="lemonade-", dir="/tmp")
        self.path = os.path.join(self.folder, "socket")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        os.chmod(self.path, 0o600)
        self._socket.listen(CONNECTIONS)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Serve no more. Where there was no folder for the log, it is added to one of the user's in /tmp."""
        self._socket.close()
        with self._lock:
            if self._lines:
                self._write(ELSEWHERE.format(os.getuid()))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _serve(self) -> None:
        while True:
            self._free.acquire()
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed; or too many files are open
                self._free.release()
                if self._socket.fileno() == -1:
                    return
                time.sleep(0.1)
                continue
            try:
                threading.Thread(target=self._attend, args=(connection,), daemon=True).start()
            except RuntimeError:  # the user has as many processes as may be
                connection.close()
                self._free.release()

    def _attend(self, connection: socket.socket) -> None:
        began, request, refused = time.time(), None, ""  # type: float, Any, str
        answer = {"code": REFUSED, "out": "", "err": ""}
        try:
            with connection:
                try:
                    _check_peer(connection)
                    request = _read(connection)
                    answer = _run(*granted(request, self._root))
                except Refused as error:
                    refused = str(error)
                    answer["err"] = "lemonade-hpc: the helper outside the image refuses this: {}\n".format(refused)
                except Exception as error:  # whatever it is, it is answered and written down
                    refused = answer["err"] = "lemonade-hpc: the helper outside the image failed: {!r}\n".format(error)
                connection.settimeout(READ_S)
                connection.sendall(json.dumps(answer).encode())
        except OSError as error:  # whoever asked has gone
            refused = refused or str(error)
        finally:
            self._free.release()
            told = {"refused": refused} if refused else {}
            command = request.get("command") if isinstance(request, dict) else None
            self._note({"at": began, "command": command, "code": answer["code"], "s": time.time() - began, **told})

    def _note(self, told: Dict[str, Any]) -> None:
        """Add a line to the log, once there is a folder for it."""
        told["at"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told["at"]))
        told["s"] = round(told["s"], 3)
        line = json.dumps(told)
        if len(line) > MOST_NOTED:
            line = json.dumps({**told, "command": str(told["command"])[:MOST_NOTED] + "..."})
        with self._lock:
            self._lines = self._lines[-MOST_LINES:] + [line + "\n"]
            if os.path.isdir(os.path.dirname(self._log)):
                self._write(self._log)

    def _write(self, path: str) -> None:
        """Add what there is to a file: this user's own, and no link. What cannot be written stays for the next time."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.write(handle, "".join(self._lines).encode())
                self._lines = []
            finally:
                os.close(handle)
        except OSError:  # a full disk must not keep anybody from asking
            pass


def _check_peer(connection: socket.socket) -> None:
    """Raises Refused where another user is at the other end."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", told)
    if uid != os.getuid():
        raise Refused("user {} is not the one whose helper this is".format(uid))


def _read(connection: socket.socket) -> Any:
    """One line of JSON; raises Refused."""
    until, content = time.monotonic() + READ_S, b""
    while not content.endswith(b"\n"):
        connection.settimeout(max(0.01, until - time.monotonic()))
        try:
            part = connection.recv(2**16)
        except socket.timeout:
            raise Refused("no whole request within {:g} s".format(READ_S))
        if not part or len(content) + len(part) > MOST_BYTES:
            raise Refused("a request is one line, of at most {} bytes".format(MOST_BYTES))
        content += part
    connection.settimeout(None)
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError):
        raise Refused("a request is JSON")


def _run(command: List[str], cwd: str, text: str) -> Dict[str, Any]:
    """A command's exit code and output."""
    limit, pipe = RUN_S.get(command[0], OTHERS_S), subprocess.PIPE
    environ = dict(outside_a_job(os.environ), SLURM_BITSTR_LEN="0")
    try:
        process = subprocess.Popen(
            command, cwd=cwd, env=environ, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
    except OSError as error:
        return {"code": NOT_FOUND, "out": "", "err": "{}: {}\n".format(command[0], error.strerror)}
    try:
        out, err = process.communicate(text.encode(errors="replace"), limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a site may have put a script around it
        process.communicate()
        return {"code": TIMED_OUT, "out": "", "err": "{}: timed out after {:g} s\n".format(command[0], limit)}
    return {"code": process.returncode, "out": out.decode(errors="replace"), "err": err.decode(errors="replace")}


def outside_a_job(environ: Mapping[str, str]) -> Dict[str, str]:
    """What a command that submits jobs is to see of an environment."""
    return {key: value for key, value in environ.items() if not re.fullmatch(JOBS_OWN, key)}


# ---------------------------------------------------------------- starting inside


def outermost(folders: Iterable[str]) -> List[str]:
    """Those folders that are in none of the others, by their own names."""
    found = []  # type: List[str]
    for folder in sorted({os.path.abspath(folder) for folder in folders}):
        if not any(folder == other or folder.startswith(other.rstrip("/") + "/") for other in found):
            found.append(folder)
    return found


def inside(image: str, binds: Iterable[str], nv: Optional[bool] = None) -> List[str]:
    """The words that start a command in the image, in the same working directory.

    What is bound is seen by its own name, and by the one that links on the way to it lead to.
    """
    words = ["apptainer", "--quiet", "exec", "--cleanenv", "--no-home", "--no-eval"]
    if nv or (nv is None and os.path.exists(DEVICE)):
        words.append("--nv")
    for folder in outermost(path for name in binds for path in (name, os.path.realpath(name))):
        quoted = folder.replace('"', '""')
        words += ["--mount", 'type=bind,"src={0}","dst={0}"'.format(quoted)]
    return [*words, image]


def environment(environ: Mapping[str, str]) -> Dict[str, str]:
    """Variables for Apptainer, which passes on those that begin with APPTAINERENV_."""
    kept = {"APPTAINERENV_" + key: value for key, value in environ.items() if re.fullmatch(KEPT, key)}
    dropped = LOADER if any(key in environ for key in LOADER) and _starts_without_loader(environ) else ()
    others = {key: value for key, value in environ.items() if key not in dropped and not re.fullmatch(PASSED_ON, key)}
    return {**others, **kept, "PWD": os.getcwd()}  # there Apptainer starts: by another name, through a link, nothing is


def _starts_without_loader(environ: Mapping[str, str]) -> bool:
    """Whether Apptainer does without these variables: at a few sites it needs them."""
    plain = {key: value for key, value in environ.items() if key not in LOADER}
    try:
        null = subprocess.DEVNULL
        return subprocess.call(["apptainer", "--version"], env=plain, stdout=null, stderr=null) == 0
    except OSError:
        return False


def run_folder(words: List[str]) -> str:
    """The run folder that a command line names, or goes without saying."""
    for place, word in enumerate(words):
        if word.startswith("--run="):
            return os.path.abspath(word[6:])
        if word == "--run" and place + 1 < len(words):
            return os.path.abspath(words[place + 1])
    name = _first(words) or ""
    return os.path.abspath(os.path.splitext(os.path.basename(name))[0] if words[0] in WITH_CONFIG else name)


def _first(words: List[str]) -> Optional[str]:
    """The first word after the command that is neither an option nor the value of one."""
    places = range(1, len(words))
    return next(
        (words[k] for k in places if not words[k].startswith("-") and words[k - 1] not in ("--run", "--root")), None
    )


def existing(path: str) -> str:
    """The folder that a path is, or is in; or the first one above that is there."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _folders(image: str, words: List[str], environ: Dict[str, str]) -> List[str]:
    """Folders that a command needs: those of the paths on its command line, and what its configuration names."""
    given = [word.partition("=")[2] if word.startswith("--root=") else word for word in words[1:]]
    named = [os.getcwd(), run_folder(words), *filter(os.path.exists, given)]
    folders = [folder for folder in map(existing, named) if folder != "/"]
    config = _first(words)
    if words[0] in (*WITH_CONFIG, "test") and config is not None:
        ask = [*inside(image, folders), "python3", "-m", "lemonade_hpc.run.container", config]
        done = subprocess.run(ask, env=environ, stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.returncode)
        asked = (os.fsdecode(folder.encode()) for folder in json.loads(done.stdout.decode()))
        folders += filter(os.path.exists, asked)
    return folders


def _image(given: Optional[str]) -> str:
    """The image to use, whether or not it can be read."""
    here = os.path.dirname(os.path.abspath(__file__))
    tried = [given] if given else [os.path.join(folder, "lemonade.sif") for folder in (os.getcwd(), here)]
    return os.path.abspath(next((path for path in tried if os.access(path, os.R_OK)), tried[0]))


# ---------------------------------------------------------------- what is seen of the host, for `doctor`

HOST = "LEMONADE_HOST"
"""Tells `doctor` inside what `host` has found, as JSON."""
OK, WARN, FAIL = "ok", "warn", "fail"
LEAST = (1, 1)
"""Apptainer's version that has all that is used here, and needs nothing of root's."""
START_S, QUICK_S = 300.0, 10.0
"""How long a start may take, and up to when it is tried again for a median."""
MOUNTS = (
    ("unpacked", r"Converting SIF file to temporary sandbox"),
    ("mounted by FUSE", r"Executing \S*squashfuse"),
    ("mounted by the kernel", r"of type squashfs"),
)
"""How an image becomes a file system, by what Apptainer says with --debug."""
FUSE_FIX = "ask the site for squashfuse, and for /dev/fuse to be open to users (chmod 666); until then, "
STARTS = (
    (
        r"/dev/fuse|fusermount",
        FUSE_FIX + "here and in cluster.setup: export APPTAINER_UNSQUASH=1, with which each start unpacks the image",
    ),
    (r"user ?namespace", "ask the site for user namespaces (sysctl user.max_user_namespaces), or apptainer-suid"),
    (r"compression", "build the image for what can be read here: containers/build --mksquashfs-args='-comp gzip'"),
    (
        r"not recognized|squashfs image|[Ii]nput/output error",
        "copy the image again: it is damaged (compare the sha256sum), or is none",
    ),
    (r"unknown flag", "ask the site for a newer Apptainer; there may be a module"),
)
"""What to do where it does not start, by what it says."""


def check(name: str, state: str, seen: str, fix: str = "") -> Dict[str, str]:
    """One line of `doctor`."""
    return {"check": name, "state": state, "seen": seen, "fix": fix}


def host(image: Optional[str], folders: Iterable[str], nv: Optional[bool] = None) -> Dict[str, Any]:
    """What can be known of this machine from outside alone: checks, and facts that others need.

    Where something is to run in an `image`, which is to see `folders`: whether that can be.
    """
    words = platform.python_version(), os.confstr("CS_GNU_LIBC_VERSION"), platform.release()
    checks = [check("this machine", OK, "{}: Python {}, {}, Linux {}".format(socket.gethostname(), *words))]
    with open(os.path.abspath(__file__), "rb") as file:
        itself = hashlib.sha256(file.read()).hexdigest()
    return {
        "checks": checks + (list(_startable(image, list(folders), nv)) if image else []),
        "commands": [name for name in (*WORDS, "srun") if shutil.which(name)],
        "user": getpass.getuser(),
        "gpu": os.path.exists(DEVICE),
        "helper": itself,
    }


def _startable(image: str, folders: List[str], nv: Optional[bool]) -> Iterator[Dict[str, str]]:
    """Whether something can be started in an image, and sees these folders; a check that fails is the last."""
    environ = environment(os.environ)
    found = _apptainer(environ), _readable(image)
    for one in found:
        yield one
    if any(one["state"] == FAIL for one in found):
        return
    started = _start(image, environ, nv)
    yield started
    if started["state"] != FAIL:
        yield _imported(image, environ, nv)
        yield _bound(image, folders, environ, nv)


def _apptainer(environ: Dict[str, str]) -> Dict[str, str]:
    name, path = "Apptainer", shutil.which("apptainer")
    if path is None:
        return check(name, FAIL, "no apptainer on PATH", "it may be a module: module load apptainer (or ask the site)")
    code, out, err, _ = _timed(["apptainer", "--version"], environ)
    number = re.search(r"(\d+)\.(\d+)\S*", out)
    if code or number is None:
        return check(name, FAIL, "{}: {}".format(path, (err or out).strip()), "ask the site to mend its Apptainer")
    seen = "{}, {}".format(number.group(), path)
    if (int(number.group(1)), int(number.group(2))) < LEAST:
        return check(name, WARN, seen, "ask the site for {}.{} or newer; there may be a module".format(*LEAST))
    return check(name, OK, seen)


def _readable(image: str) -> Dict[str, str]:
    try:
        with open(image, "rb") as file:
            file.read(1)
            return check("image", OK, "{}, {:,.0f} MB".format(image, os.fstat(file.fileno()).st_size / 1e6))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            fix = "have its owner open it: chmod a+r {}, and a+x of the folders above".format(shlex.quote(image))
        else:
            fix = "copy the image (.sif) there, or name another: --image, LEMONADE_IMAGE; for workers, container.image"
        return check("image", FAIL, "{}: {}".format(image, error.strerror), fix)


def _start(image: str, environ: Dict[str, str], nv: Optional[bool]) -> Dict[str, str]:
    """How it is mounted, and how long `true` takes inside it."""
    name, words = "start", inside(image, [], nv)
    code, out, err, took = _timed([words[0], "--debug", *words[2:], "true"], environ)
    if code:
        lines = re.sub(r"\x1b\[\d*m", "", err).strip().splitlines() or ["exit code {}".format(code)]
        said = [line for line in lines if re.match("FATAL|ERROR|Error", line)] or lines
        why = re.sub(r"^(FATAL|ERROR)\s*:?\s*(\[\S*\]\s+\S+\(\)\s+)?", "", said[-1])
        fix = next((fix for pattern, fix in STARTS if re.search(pattern, why)), None)
        return check(
            name, FAIL, why, fix or "find out what Apptainer lacks: {} true".format(" ".join([words[0], *words[2:]]))
        )
    times = [took] + [_timed([*words, "true"], environ)[3] for _ in range(2 if took < QUICK_S else 0)]
    how = next((how for how, pattern in MOUNTS if re.search(pattern, err)), "mounted in an unknown way")
    seen = "{}, {:.2f} s to start".format(how, statistics.median(times))
    if how == MOUNTS[0][0]:
        fix = FUSE_FIX + "$APPTAINER_TMPDIR (/tmp) of a node must have room for the image, once for each worker"
        return check(name, WARN, seen + " each time, since FUSE cannot be used", fix)
    return check(name, OK, seen)


def _imported(image: str, environ: Dict[str, str], nv: Optional[bool]) -> Dict[str, str]:
    """Whether what a worker imports can be read, and how long that takes: a damaged image may show itself only here."""
    asked = "import torch, lemonade_hpc.run.worker as worker, lemonade_hpc.learn.lab; print(torch.__version__)"
    code, out, err, took = _timed([*inside(image, [], nv), "python3", "-c", asked], environ)
    if code:
        said = (err.strip().splitlines() or ["exit code {}".format(code)])[-1]
        fix = "if the image is damaged (compare its sha256sum with that where it was built), copy the image again"
        return check("imports", FAIL, "torch and this program: {}".format(said), fix)
    return check("imports", OK, "torch {} and this program, in {:.1f} s".format(out.strip(), took))


def _bound(image: str, folders: List[str], environ: Dict[str, str], nv: Optional[bool]) -> Dict[str, str]:
    """Whether the folders are inside what they are outside: the same device, the same inode."""
    name, missing = "binds", [folder for folder in folders if not os.path.exists(folder)]
    if missing:
        fix = "make that folder, or correct its name: --bind, container.binds, data.root"
        return check(name, FAIL, "no such folder: {}".format(", ".join(missing)), fix)
    wanted = outermost(folder for folder in folders if folder != "/")
    _, out, err, _ = _timed([*inside(image, wanted, nv), "stat", "-L", "-c", "%d %i %n", *wanted], environ)
    outside = {folder: "{0.st_dev} {0.st_ino} {1}".format(os.stat(folder), folder) for folder in wanted}
    other = [folder for folder in wanted if outside[folder] not in out.splitlines()]
    if not other:
        return check(name, OK, "the same inside: {}".format(", ".join(wanted)))
    warned = re.findall(r"^(?:WARNING|FATAL): *(.* (?:bind|mount).*)", err, re.MULTILINE)
    seen = "inside the image not what it is outside: {}".format(", ".join(other))
    fix = "ask the site to let users bind folders (user bind control = yes in apptainer.conf)"
    return check(name, FAIL, ". Apptainer says: ".join([seen, *warned[:1]]), fix)


def _timed(words: List[str], environ: Dict[str, str]) -> Tuple[int, str, str, float]:
    """A command's exit code, output and complaints, and the seconds it took."""
    began, pipe = time.monotonic(), subprocess.PIPE
    try:
        done = subprocess.run(words, env=environ, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, timeout=START_S)
        code, out, err = done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    except OSError as error:
        code, out, err = NOT_FOUND, "", str(error)
    except subprocess.TimeoutExpired:
        code, out, err = TIMED_OUT, "", "no end after {:g} s".format(START_S)
    return code, out, err, time.monotonic() - began


def show(checks: List[Dict[str, str]], as_json: bool) -> None:
    """Print checks as `doctor` does."""
    if as_json:
        print(json.dumps(checks, indent=1))
        return
    for one in checks:
        print("{0[state]:<4}  {0[check]:<18}  {0[seen]}".format(one))
        if one["fix"]:
            print(26 * " " + "fix: " + one["fix"])


# ---------------------------------------------------------------- the command


def _parse(arguments: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run lemonade-hpc in its image, from outside.")
    where = "default: LEMONADE_IMAGE; else lemonade.sif, here or beside this"
    parser.add_argument("--image", help=where)
    parser.add_argument("--bind", action="append", default=[], help="a further folder that is to be seen inside")
    parser.add_argument("--version", action="store_true", help="the image's")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="a command of lemonade-hpc")
    return parser.parse_args(arguments)


def main(given: argparse.Namespace) -> int:
    """Run one command inside the image; its exit code."""
    words = given.words or ["--version" if given.version else "--help"]
    image = _image(given.image or os.environ.get("LEMONADE_IMAGE"))
    environ, run = environment(os.environ), run_folder(words)
    told = {}  # type: Dict[str, str]
    if words[0] == "doctor":
        seen_of_host = host(image, [os.getcwd(), existing(run), *given.bind])
        if any(one["state"] == FAIL for one in seen_of_host["checks"]):
            show(seen_of_host["checks"], "--json" in words)
            return 1
        told["APPTAINERENV_" + HOST] = json.dumps(seen_of_host)
    if shutil.which("apptainer") is None:
        return _say("apptainer cannot be found here", "it may be a module: module load apptainer")
    try:
        with open(image, "rb") as file:
            file.read(1)
    except OSError as error:
        what = "{}: {}".format(image, error.strerror or error)
        if error.errno in AWAY:
            return _say(what, "the file system fails: try again later", LATER)
        return _say(what, _readable(image)["fix"] or "try again")
    folders = [image, *given.bind, *_folders(image, words, environ)]
    log = os.path.join(run, "slurm", "helper-{}.log".format(socket.gethostname()))
    helper = Helper(run if words[0] in WITH_CONFIG else None, log)
    try:
        folders.append(helper.folder)
        seen = {"APPTAINERENV_" + SOCKET: helper.path, "APPTAINERENV_PREPEND_PATH": SHIMS, **told}
        code = _wait([*inside(image, folders), "lemonade-hpc", *words], {**environ, **seen})
        if code == NOT_STARTED:
            _say("Apptainer could not start the image", "doctor may say why")
        return code
    finally:
        helper.close()


def _called(given: argparse.Namespace) -> str:
    """What a person has typed so far, before the command."""
    path = sys.argv[0]
    words = [path] if os.sep in path and os.access(path, os.X_OK) else ["python3", path]
    words += ["--image", given.image] if given.image else []
    return " ".join(shlex.quote(word) for word in words + [w for folder in given.bind for w in ("--bind", folder)])


def _say(error: str, fix: str, code: int = WRONG_INPUT) -> int:
    """Tell an error; the exit code."""
    print("error: {}; {}".format(error, fix), file=sys.stderr)
    return code


def _wait(words: List[str], environ: Dict[str, str]) -> int:
    """Run a command, which hears the signals that come here; its exit code."""
    processes = []  # type: List[subprocess.Popen[bytes]]

    def pass_on(number: int, frame: Any) -> None:
        if not processes:
            sys.exit(128 + number)
        processes[0].send_signal(number)

    for which in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(which, pass_on)
    processes.append(subprocess.Popen(words, env=environ))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both
    code = processes[0].wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    parsed = _parse(sys.argv[1:])
    os.environ.setdefault(AS, _called(parsed))
    sys.exit(main(parsed))
