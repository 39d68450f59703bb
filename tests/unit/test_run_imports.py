"""The coordinator and the worker's supervisor start without torch: a login node should not pay for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

RING = [
    "backends", "budgets", "cancel", "chain", "checks", "container", "coordinator", "crew", "disk", "doctor", "handle",
    "history", "journal", "lease", "ledger", "leftovers", "log", "misfortunes", "owner", "population", "queue",
    "record", "request", "scheduler", "session", "site", "slurm", "status", "store", "trainers", "verify", "worker",
]  # fmt: skip
HEAVY = ("torch", "torchvision", "submitit", "sklearn", "matplotlib", "lemonade_hpc.learn")


def imported(code: str, names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of the names a fresh interpreter has imported after `code`."""
    ask = f"\nimport sys; print(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_run_ring_imports_nothing_heavy() -> None:
    assert imported("\n".join(f"import lemonade_hpc.run.{name}" for name in RING)) == []


@pytest.mark.parametrize("name", ["coordinator", "worker", "session"])
def test_each_entry_alone_imports_nothing_heavy(name: str) -> None:
    assert imported(f"import lemonade_hpc.run.{name}") == []


def test_this_test_can_fail() -> None:
    assert imported("import lemonade_hpc.learn.child") == ["torch", "lemonade_hpc.learn"]


def test_the_list_is_complete() -> None:
    from pathlib import Path

    import lemonade_hpc.run as ring

    assert sorted(RING) == sorted(
        path.stem for path in Path(ring.__file__).parent.glob("*.py") if path.stem != "__init__"
    )
