"""A real Slurm on this host: munge, slurmdbd on MariaDB, slurmctld, and four slurmd with a fake GPU each.

Needs root and Debian's `slurm-wlm slurmdbd munge mariadb-server`. Everything lies in a folder of its own and is stopped
by pid. Jobs run as an ordinary user, made and removed with it, so that several may be up at once. Two partitions:
`main`, and `urgent`, whose jobs requeue those of `main`. Limits are short, so that a test does not wait.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lemonade_hpc

USER = f"lemonade{os.getpid()}"
PACKAGE = Path(lemonade_hpc.__file__).parents[1]
NODES = tuple(f"n{k}" for k in range(1, 5))
START_S = 120.0
PORTS = range(20000, 32000, 10)  # blocks of them; from 32768 on, the kernel gives them to whoever connects
CONFIG = """
ClusterName=lemonade
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=20
KillWait=20
MinJobAge=300
MaxArraySize={max_array}
GresTypes=gpu
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=5
{more}
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP
"""
DBD_CONFIG = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


class DaemonError(Exception):
    """A daemon is no more, though nobody has stopped it. No subclass of what `wait_for` waits upon."""


class Slurm:
    """A cluster that runs. `environ` is what a user's process needs to see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = pwd.getpwnam(USER)
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.ports_held, self.ports = take_ports()

    def start(self, name: str, *command: str | Path, user: str = "root") -> None:
        """Start a daemon in the foreground; `name` is how it is stopped, and its log's name."""
        with open(self.folder / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=user, start_new_session=True,
                env={**os.environ, **self.environ},
            )  # fmt: skip

    def stop(self, name: str, which: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon and wait for it."""
        process = self.daemons.pop(name)
        process.send_signal(which)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def start_node(self, name: str, inside: Sequence[str] = ()) -> None:
        """Start one slurmd; `inside`: the words that start a command in name spaces of its own."""
        self.start(name, *inside, "slurmd", "-D", "-N", name, "-f", self.folder / "slurm.conf")

    def start_accounting(self) -> None:
        """Start slurmdbd."""
        self.start("slurmdbd", "slurmdbd", "-D")
        wait_for("slurmdbd answers", lambda: self.run("sacctmgr", "-n", "show", "cluster", root=True) is not None)

    def start_controller(self) -> None:
        """Start slurmctld."""
        self.start("slurmctld", "slurmctld", "-D", "-f", self.folder / "slurm.conf")
        wait_for("slurmctld answers", lambda: "UP" in self.run("scontrol", "ping"))

    def run(self, *command: str | Path, check: bool = True, root: bool = False, **options: Any) -> str:
        """The standard output of a command, run as the ordinary user."""
        who: dict[str, Any] = {} if root else {"user": self.user.pw_uid, "group": self.user.pw_gid}
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False,
            env=self.environment() | options.pop("env", {}), cwd=options.pop("cwd", self.user.pw_dir), **who, **options,
        )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def environment(self) -> dict[str, str]:
        """The ordinary user's environment."""
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SUBMITIT"))}
        return {
            **keep,
            **self.environ,
            "PYTHONPATH": str(PACKAGE),
            "HOME": self.user.pw_dir,
            "USER": USER,
            "LOGNAME": USER,
        }

    def jobs(self) -> list[dict[str, str]]:
        """Every job and array task that the controller knows, with name, state, node and exit code."""
        keys = ("id", "name", "state", "node", "user")
        lines = self.run("squeue", "-a", "-r", "-h", "-t", "all", "-o", "%i|%j|%T|%N|%u").splitlines()
        return [dict(zip(keys, line.split("|"), strict=True)) for line in lines]

    def nodes_are_idle(self) -> bool:
        """Whether all nodes are up and free; raises RuntimeError with what they are, and DaemonError."""
        for name, process in self.daemons.items():
            if process.poll() is not None:
                log = (self.folder / f"{name}.out").read_text()
                raise DaemonError(f"{name}: exit code {process.returncode}\n{log[-2000:]}")
        states = self.run("sinfo", "-h", "-p", "main", "-o", "%T %D")
        if states != f"idle {len(NODES)}\n":
            raise RuntimeError(states)
        return True

    def idle(self) -> bool:
        """Whether no job waits, runs or is completing; raises RuntimeError with those that do."""
        left = [job for job in self.jobs() if job["state"] in ("RUNNING", "PENDING", "COMPLETING", "SUSPENDED")]
        if left:
            raise RuntimeError(f"left are {left}\n{self.run('sinfo', '-N', '-h', '-p', 'main', '-o', '%N %T')}")
        return True


def take_ports() -> tuple[socket.socket, list[int]]:
    """Nine free ports of 127.0.0.1, and a socket on the one before them: nobody is given them while that is open."""
    for first in random.sample(PORTS, len(PORTS)):
        with suppress(OSError), ExitStack() as block:
            held, *free = (block.enter_context(socket.create_server(("127.0.0.1", first + k))) for k in range(10))
            ports = [one.getsockname()[1] for one in free]
            for one in free:
                one.close()
            block.pop_all()
            return held, ports
    raise RuntimeError(f"no ten ports in a row are free from {PORTS.start} to {PORTS.stop - 1}")


def wait_for(what: str, test: Callable[[], Any], timeout_s: float = START_S) -> Any:
    """Wait until a test holds; its value. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if value := test():
                return value
        except (RuntimeError, OSError) as error:
            last = error
        time.sleep(0.1)
    raise TimeoutError(f"not within {timeout_s:.0f} s: {what}" + (f" ({last})" if last else ""))


def make_user() -> None:
    """Make the ordinary user; one of that name was left by a process that was killed."""
    remove_user()
    _change_users(True, "useradd", "--create-home", "--shell", "/bin/bash", USER)


def remove_user() -> None:
    """Remove the ordinary user, if there is one."""
    _change_users(False, "userdel", "--remove", "--force", USER)


def _change_users(wanted: bool, *command: str) -> None:
    """Until there is the user, or none. Another one may be changing the list of users, and has locked it."""

    def done() -> bool:
        with suppress(KeyError):
            return bool(pwd.getpwnam(USER)) == wanted
        return not wanted

    def change() -> bool:
        said = "" if done() else subprocess.run(command, capture_output=True, text=True, check=False).stderr
        if not done():
            raise RuntimeError(said)
        return True

    wait_for(" ".join(command), change)


def open_way(*paths: Path) -> dict[Path, int]:
    """Let everybody pass the folders above these paths, such as root's home; those that were shut, with their modes."""
    changed = {}
    for folder in {folder for path in paths for folder in path.parents}:
        mode = folder.stat().st_mode & 0o7777
        if not mode & 0o001:
            folder.chmod(mode | 0o001)
            changed[folder] = mode
    return changed


@contextmanager
def cluster(max_array: int = 1001, more: str = "", gpu: str = "") -> Iterator[Slurm]:
    """A Slurm that is up, all nodes idle; stopped, with everything it wrote removed, at the end.

    `more`: further lines of its `slurm.conf`; `gpu`: the type of its GPUs.
    """
    if os.geteuid():
        raise RuntimeError("the Slurm of the tests needs root: it starts daemons that start jobs as another user")
    missing = [name for name in ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd") if not shutil.which(name)]
    if missing:
        raise RuntimeError(f"{', '.join(missing)}: not installed; Debian: slurm-wlm slurmdbd munge mariadb-server")
    make_user()
    needed = (Path(sys.executable), Path(sys.executable).resolve(), PACKAGE / "lemonade_hpc", Path(__file__))
    opened = open_way(*needed)
    folder = Path(tempfile.mkdtemp(prefix="lemonade-slurm-"))
    folder.chmod(0o755)
    slurm = Slurm(folder)
    try:
        _start(slurm, max_array, more, gpu)
        yield slurm
    finally:
        _stop(slurm)
        slurm.ports_held.close()
        shutil.rmtree(folder, ignore_errors=True)
        if not list(folder.parent.glob("lemonade-slurm-*")):  # no other one is up, whose jobs pass there
            for path, mode in opened.items():
                path.chmod(mode)
        remove_user()


def _start(slurm: Slurm, max_array: int, more: str, gpu: str) -> None:
    folder = slurm.folder
    port, dbd_port, sql_port, *node_ports = slurm.ports
    host = socket.gethostname()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={number} CPUs=2 RealMemory=5000 "
        f"Gres=gpu:{gpu}{':' * bool(gpu)}1"
        for name, number in zip(NODES, node_ports, strict=False)
    )
    words = {
        "folder": folder, "host": host, "port": port, "dbd_port": dbd_port, "sql_port": sql_port, "nodes": nodes,
        "max_array": max_array, "more": more,
    }  # fmt: skip
    (folder / "slurm.conf").write_text(CONFIG.format(**words))
    kind = f" Type={gpu}" if gpu else ""
    (folder / "gres.conf").write_text("".join(f"NodeName={name} Name=gpu{kind} File=/dev/null\n" for name in NODES))
    (folder / "slurmdbd.conf").touch(mode=0o600)
    (folder / "slurmdbd.conf").write_text(DBD_CONFIG.format(**words))
    _start_munge(slurm)
    _start_database(slurm, sql_port)
    slurm.start_accounting()
    slurm.run("sacctmgr", "-i", "add", "cluster", "lemonade", root=True, check=False)
    slurm.run("sacctmgr", "-i", "add", "account", "lab", root=True)
    slurm.run("sacctmgr", "-i", "add", "user", USER, "account=lab", root=True)
    slurm.start_controller()
    for name in NODES:
        slurm.start_node(name)
    wait_for("all nodes are idle", slurm.nodes_are_idle)


def _start_munge(slurm: Slurm) -> None:
    """A munge of our own, with its own key and socket."""
    folder = slurm.folder / "munge"
    folder.mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    shutil.chown(folder, "munge", "munge")
    shutil.chown(folder / "key", "munge", "munge")
    options = ("key-file=key", "pid-file=pid", "log-file=log", "seed-file=seed")
    named = [f"--{part.partition('=')[0]}={folder / part.partition('=')[2]}" for part in options]
    (slurm.folder / "munge.socket").unlink(missing_ok=True)
    slurm.start("munged", "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *named, user="munge")
    wait_for("munge listens", (folder / "socket").exists)
    (slurm.folder / "munge.socket").symlink_to(folder / "socket")


def _start_database(slurm: Slurm, port: int) -> None:
    folder, scratch = slurm.folder / "sql", slurm.folder / "scratch"
    scratch.mkdir()  # what begins in a shared one removes the tables of others
    shutil.chown(scratch, "mysql")
    install = [
        "mariadb-install-db",
        "--no-defaults",
        "--user=mysql",
        f"--datadir={folder}",
        "--auth-root-authentication-method=normal",
    ]
    environ = os.environ | {"TMPDIR": str(scratch)}
    done = subprocess.run(install, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise RuntimeError(f"{install}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    slurm.start(
        "mariadbd", "mariadbd", "--no-defaults", f"--datadir={folder}", f"--socket={folder / 'socket'}",
        f"--tmpdir={scratch}",
        f"--port={port}", "--bind-address=127.0.0.1", f"--pid-file={folder / 'pid'}", "--innodb-buffer-pool-size=64M",
        user="mysql",
    )  # fmt: skip
    ask = ["mariadb", f"--socket={folder / 'socket'}", "-u", "root", "-e"]
    wait_for("MariaDB answers", lambda: slurm.run(*ask, "select 1", root=True))
    grant = "create user slurm@127.0.0.1 identified by 'slurm'; grant all on slurm_acct_db.* to slurm@127.0.0.1;"
    slurm.run(*ask, grant, root=True)


def _stop(slurm: Slurm) -> None:
    """End every job and daemon that was started here, jobs first."""
    if "slurmctld" in slurm.daemons:
        with suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            slurm.run("scancel", "-f", "-u", USER, timeout=20)
            wait_for("all jobs have ended", slurm.idle, 20)
    for name in (*NODES, "slurmctld", "slurmdbd", "mariadbd", "munged"):
        if name in slurm.daemons:
            slurm.stop(name)
    for process in Path("/proc").glob("[0-9]*"):  # jobs of nodes whose slurmd was killed, and what watches over them
        with suppress(OSError):
            if f"SLURM_CONF={slurm.environ['SLURM_CONF']}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def end_in_good_order() -> None:
    """Have SIGTERM and SIGINT end this process by an exception, also where a shell has put it into the background."""
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, signal.default_int_handler)


def main(arguments: Sequence[str]) -> int:
    """Run a command as the ordinary user while a Slurm is up: `python slurm.py sinfo`."""
    started = time.monotonic()
    end_in_good_order()
    with cluster() as slurm:
        print(json.dumps({"up_s": round(time.monotonic() - started, 1), **slurm.environ}), file=sys.stderr)
        return subprocess.run(
            arguments, env=slurm.environment(), user=slurm.user.pw_uid, group=slurm.user.pw_gid, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
