#!/usr/bin/env python3
"""The part of lemonade-hpc that is outside its image: starts a command inside, and runs Slurm's commands for it.

    python3 helper.py [--image FILE] [--bind FOLDER]... search my.yaml --run my      # or any other command

Decides: what of the host is seen inside (folders, by their own names; variables), and which commands of Slurm's, with
which words, are run for what is inside. Those that it is not told of here are refused; all are written down in the
run folder, `slurm/helper-*.log`. Standard library of Python 3.6 only: beside Apptainer, it is all that a cluster needs.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

SOCKET = "LEMONADE_SOCKET"
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
CONNECTIONS = 16
"""Served at a time; others wait."""
REFUSED, TIMED_OUT, NOT_FOUND = 126, 124, 127
"""Exit codes of commands that were not run, were ended, or are not there."""

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
}  # type: Dict[str, Tuple[str, ...]]
"""What each command may be given, besides a script of sbatch's."""


class Refused(Exception):  # noqa: N818
    """A request that is not granted: says why."""


def granted(request: Any, root: str) -> Tuple[List[str], str, str]:
    """The command, working directory and input of a request; raises Refused. Scripts must lie in the folder `root`."""
    try:
        command, cwd, text = request["command"], request["cwd"], request["input"]
        told = [*command, cwd, text]
    except (KeyError, TypeError):
        raise Refused("a request names command, cwd and input")
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in told):
        raise Refused("command is a list of text, not empty; cwd and input are text")
    if any(not word.isprintable() for word in [*command, cwd]):
        raise Refused("a word has a character that cannot be printed")
    name, words = command[0], command[1:]
    if name not in WORDS:
        raise Refused("{}: allowed are {}".format(name, ", ".join(sorted(WORDS))))
    plain = [word for word in words if not any(re.fullmatch(pattern, word) for pattern in WORDS[name])]
    if name == "sbatch":
        plain = _without_script(plain, words, root)
    if plain:
        raise Refused("{}: {!r} is not among the words it may be given".format(name, plain[0]))
    return command, cwd if os.path.isdir(cwd) else root, text


def _without_script(plain: List[str], words: List[str], root: str) -> List[str]:
    """What is neither an option, nor a script of this run's that comes last, maybe with the word `first`."""
    if plain and plain[-1] == "first" and words[-1] == "first":
        plain, words = plain[:-1], words[:-1]
    if not plain or plain[-1] != words[-1] or plain[-1].startswith("-"):
        if "--test-only" not in words:
            raise Refused("sbatch: without --test-only, its last word is a script")
        return plain
    script = os.path.realpath(plain[-1])
    if not script.startswith(os.path.realpath(root) + os.sep) or not os.path.isfile(script):
        raise Refused("sbatch: {} is not a file in {}".format(plain[-1], root))
    return plain[:-1]


class Helper:
    """Serves requests on a socket that only its owner can open. `log`: a file, made with its first line."""

    def __init__(self, root: str, log: str) -> None:
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
        """Serve no more."""
        self._socket.close()
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
            threading.Thread(target=self._attend, args=(connection,), daemon=True).start()

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
        with self._lock:
            self._lines.append(json.dumps(told) + "\n")
            if os.path.isdir(os.path.dirname(self._log)):
                try:
                    with open(self._log, "a") as log:
                        log.write("".join(self._lines))
                    self._lines = []
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
        process = subprocess.Popen(command, cwd=cwd, env=environ, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        return {"code": NOT_FOUND, "out": "", "err": "{}: {}\n".format(command[0], error.strerror)}
    try:
        out, err = process.communicate(text.encode(errors="replace"), limit)
    except subprocess.TimeoutExpired:
        process.kill()
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
    """The words that start a command in the image, in the same working directory."""
    words = ["apptainer", "exec", "--cleanenv", "--no-home", "--no-eval"]
    if nv or (nv is None and os.path.exists(DEVICE)):
        words.append("--nv")
    for folder in outermost(binds):
        words += ["--bind", folder]
    return [*words, image]


def environment(environ: Mapping[str, str]) -> Dict[str, str]:
    """Variables for Apptainer, which passes on those that begin with APPTAINERENV_."""
    kept = {"APPTAINERENV_" + key: value for key, value in environ.items() if re.fullmatch(KEPT, key)}
    others = {key: value for key, value in environ.items() if key not in LOADER or not _starts_without_loader(environ)}
    return {**others, **kept}


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
    name = next((word for word in words[1:] if not word.startswith("-")), "")
    return os.path.abspath(os.path.splitext(os.path.basename(name))[0] if words[0] in WITH_CONFIG else name)


def _existing(path: str) -> str:
    """The folder that a path is, or is in; or the first one above that is there."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def _folders(image: str, words: List[str], environ: Dict[str, str]) -> List[str]:
    """Folders that a command needs: those of the paths on its command line, and what its configuration names."""
    named = [os.getcwd(), run_folder(words), *(word for word in words[1:] if os.path.exists(word))]
    folders = [folder for folder in map(_existing, named) if folder != "/"]
    config = next((word for word in words[1:] if not word.startswith("-")), None)
    if words[0] in WITH_CONFIG and config is not None:
        ask = [*inside(image, folders), "python3", "-m", "lemonade_hpc.run.container", config]
        done = subprocess.run(ask, env=environ, stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.returncode)
        folders += json.loads(done.stdout.decode())
    return folders


def _image(given: Optional[str]) -> str:
    """The image to use; exits where there is none."""
    here = os.path.dirname(os.path.abspath(__file__))
    tried = [given] if given else [os.path.join(folder, "lemonade.sif") for folder in (os.getcwd(), here)]
    for path in tried:
        if os.access(path, os.R_OK):
            return os.path.abspath(path)
    sys.exit("error: no image that can be read: {}; name one by --image or LEMONADE_IMAGE".format(", ".join(tried)))


def main(arguments: List[str]) -> int:
    """Run one command inside the image; its exit code."""
    parser = argparse.ArgumentParser(description="Run lemonade-hpc in its image, from outside.")
    parser.add_argument("--image", default=os.environ.get("LEMONADE_IMAGE"), help="default: lemonade.sif, here")
    parser.add_argument("--bind", action="append", default=[], help="a further folder that is to be seen inside")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="a command of lemonade-hpc")
    given = parser.parse_args(arguments)
    words = given.words or ["--help"]
    if shutil.which("apptainer") is None:
        sys.exit("error: apptainer cannot be found here; it may be a module: module load apptainer")
    image, environ, run = _image(given.image), environment(os.environ), run_folder(words)
    folders = [image, *given.bind, *_folders(image, words, environ)]
    helper = Helper(run, os.path.join(run, "slurm", "helper-{}-{}.log".format(socket.gethostname(), os.getpid())))
    try:
        folders.append(helper.folder)
        seen = {"APPTAINERENV_" + SOCKET: helper.path, "APPTAINERENV_PREPEND_PATH": SHIMS}
        return _wait([*inside(image, folders), "lemonade-hpc", *words], {**environ, **seen})
    finally:
        helper.close()


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
    sys.exit(main(sys.argv[1:]))
