"""Searches on a real Slurm whose nodes share a folder as a network file system may show it: seconds out of date.

Each slurmd, and each place where a user types commands, has a name of its own and a view of its own (`stale.py`), with
somebody who keeps looking at everything in it, also at names that are not there yet: so it is all kept, and late. Needs
root, Slurm's daemons (`slurm.py`) and fuse3: `pytest tests/cluster -n0`. LEMONADE_STALE_S=60 makes it as late as NFS
may be, which takes a quarter of an hour.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import LEMONADE, config  # noqa: E402

from slurm import NODES, USER, Slurm, cluster, wait_for  # noqa: E402

STALE_S = float(os.environ.get("LEMONADE_STALE_S", "3"))
PLACES = (*NODES, "login1", "login2", "office")
SEARCH = {"children": 10, "accepted": 5}
WATCH = """
cd $0
while sleep 1; do
    ls -lR
    for name in children/000/0000{00..19}{,/e1a1,/e1a1/weights.safetensors} epochs/00000{1..3}; do [ -e $name ]; done
    cat epochs/*/* workers/*/done.log
done >/dev/null 2>&1
"""


class Cluster:
    """The places, with how to be there, and the folder that they share."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.pids: dict[str, int] = {}

    @contextmanager
    def place(self, name: str, seed: int) -> Iterator[None]:
        """A place of this name behind its own view."""
        spaces = ("unshare", "--mount", "--uts", "--propagation=private")
        inside = (*spaces, "sh", "-c", 'hostname "$0" && exec "$@"', name)
        view = (sys.executable, Path(__file__).with_name("stale.py"), self.folder, self.folder)
        options = (f"--seconds={STALE_S}", f"--seed={seed}")
        with subprocess.Popen([*inside, *view, *options], stderr=subprocess.DEVNULL) as process:
            mounts = Path(f"/proc/{process.pid}/mounts")
            wait_for(
                f"{name} is there", lambda: process.poll() is not None or f" {self.folder} fuse " in mounts.read_text()
            )
            assert process.poll() is None, f"the view of {name} has ended with {process.returncode}"
            self.pids[name] = process.pid
            yield
            process.terminate()

    def enter(self, name: str) -> tuple[str, ...]:
        return ("nsenter", f"--target={self.pids[name]}", "--mount", "--uts")

    def start(self, name: str, *command: str) -> subprocess.Popen[str]:
        """A process of the ordinary user's in some place."""
        user = self.slurm.user
        who = (f"--setuid={user.pw_uid}", f"--setgid={user.pw_gid}", f"--wdns={self.folder}")
        return subprocess.Popen(
            [*self.enter(name), *who, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.slurm.environment() | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def lemonade(self, name: str, *arguments: str) -> tuple[int, str, str]:
        """A command: its exit code and what it said."""
        process = self.start(name, *LEMONADE, *arguments)
        out, err = process.communicate(timeout=120 + 20 * STALE_S)
        return process.returncode, out, err

    def front(self, name: str, run: str) -> list[Any]:
        """What must be equal: numbers, networks, objectives, and every bit of the weights."""
        code, out, err = self.lemonade(name, "verify", run)
        assert code == 0, out + err
        members = json.loads(self.lemonade(name, "front", run, "--json")[1])
        return [(m["id"], m["digest"], m["objectives"], m["weights"]["sha256"]) for m in members]


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """A cluster with the result of the local backend in its folder."""
    with cluster() as slurm, ExitStack() as stack:
        made = Cluster(slurm, Path(tempfile.mkdtemp(prefix="shared-", dir=slurm.user.pw_dir)))
        stack.callback(shutil.rmtree, made.folder)
        for backend, stale_s in (("local", 0), ("slurm", STALE_S)):
            text = config(backend, SEARCH, workers=3, time_min=30, stale_s=stale_s)
            (made.folder / f"{backend}.yaml").write_text(text)
        os.chown(made.folder, slurm.user.pw_uid, slurm.user.pw_gid)
        for seed, name in enumerate(PLACES):
            stack.enter_context(made.place(name, seed))
        for name in NODES:
            slurm.stop(name)
            slurm.start_node(name, made.enter(name))
            stack.callback(slurm.stop, name)
        code, _, err = made.lemonade("login1", "search", "local.yaml", "--run", "local")
        assert code == 0, err
        wait_for("all nodes are back", lambda: "idle 4" in slurm.run("sinfo", "-h", "-p", "main", "-o", "%T %D"))
        yield made


@pytest.fixture
def run(shared: Cluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run folder to be, in truth; under a name that nobody has seen."""
    yield shared.folder / request.node.name
    shared.slurm.run("scancel", "-u", USER)
    wait_for("all jobs have ended", shared.slurm.idle)


@contextmanager
def begun(shared: Cluster, run: Path) -> Iterator[subprocess.Popen[str]]:
    """A search in the middle of its work, everywhere looked at."""
    search = shared.start("login1", *LEMONADE, "search", "slurm.yaml", "--run", run.name)
    wait_for("workers work", lambda: len(list(run.glob("children/*/*"))) > 1 or search.poll() is not None, 120)
    assert search.poll() is None, search.communicate()[1]
    watchers = [shared.start(name, "bash", "-c", WATCH, run.name) for name in PLACES]
    try:
        wait_for("children are trained", lambda: len(list(run.glob("children/*/*"))) > 3, 60 + 10 * STALE_S)
        yield search
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.communicate()


def ended(search: subprocess.Popen[str]) -> None:
    """Wait for a search to complete."""
    _, err = search.communicate(timeout=120 + 60 * STALE_S)
    assert search.returncode == 0, err


def assert_right(shared: Cluster, run: Path) -> None:
    """The front is that of the local backend, also as seen from elsewhere at once; nothing was lost or done twice."""
    assert shared.front("office", run.name) == shared.front("office", "local")
    status = json.loads(shared.lemonade("office", "status", run.name, "--json")[1])
    assert status["failures"] == status["warnings"] == []
    lost = status["attempts_lost"]
    assert lost["crash"] == lost["worker"] == 0  # others had not begun: an idle worker was to have them
    lines = [line for path in sorted(run.glob("epochs/*/journal.log")) for line in path.read_text().splitlines()]
    events = [json.loads(line.partition(" ")[2]) for line in lines]
    count = Counter(event["event"] for event in events)
    assert count["committed"] == status["children"]["asked"] == count["attempt"] - lost["stopped"]
    assert count["launched"] == 1, [event for event in events if event["event"] in ("launched", "left")]


def test_a_view_is_late_for_others_and_at_once_for_itself(shared: Cluster) -> None:
    def shell(name: str, command: str) -> list[str]:
        return shared.start(name, "bash", "-c", command).communicate()[0].split()

    def seen(name: str, view: str) -> tuple[int, int, int]:
        """How many are there by name, in the listing, and with all their content."""
        names, listed = shell(name, f"ls {view}/{{a..z}} 2>/dev/null"), shell(name, f"ls {view}")
        return len(names), len(listed), shell(name, f"cat {view}/log").count("more")

    late = 0
    for k in range(5):  # what is seen late may be seen in time where this machine is slow
        view = f"view{k}"
        shell("n1", f"mkdir {view} && echo some > {view}/log")
        assert seen("n2", view) == (0, 1, 0)
        shell("n1", f"touch {view}/{{a..z}}; for k in {{1..26}}; do echo more >> {view}/log; done")
        assert seen("n1", view) == (26, 27, 26)
        late += seen("n2", view) != (26, 27, 26)
        assert shell("n2", f"mkdir {view}/a 2>&1 || ls {view}/a")[-1] == f"{view}/a"
        wait_for("it is seen", lambda view=view: seen("n2", view) == (26, 27, 26), 3 * STALE_S + 60)
        if late:
            break
    assert late


def test_the_front_is_that_of_the_local_backend_and_nobody_takes_a_living_run_over(shared: Cluster, run: Path) -> None:
    with begun(shared, run) as search:
        code, _, err = shared.lemonade("login2", "search", "slurm.yaml", "--run", run.name, "--take-over")
        assert code == 2 and "is at work" in err
        ended(search)
        assert_right(shared, run)


def test_a_coordinator_that_is_killed_is_followed_by_one_elsewhere(shared: Cluster, run: Path) -> None:
    with begun(shared, run) as search:
        assert shared.lemonade("login2", "status", run.name)[0] == 0
        search.kill()
        search.communicate()
        code, _, err = shared.lemonade("login2", "search", "slurm.yaml", "--run", run.name)
        assert code == 2 and "add --take-over" in err
        ended(shared.start("login2", *LEMONADE, "search", "slurm.yaml", "--run", run.name, "--take-over"))
        assert_right(shared, run)
