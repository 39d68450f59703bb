"""Runs of the real command on the local backend, undisturbed and killed: design.md sections 5 and 6."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import harness
import pytest


def test_complete_run(undisturbed: Path) -> None:
    harness.assert_sound(undisturbed)
    found = harness.status(undisturbed)
    assert found["state"] == "complete"
    assert found["children"]["committed"] == 12 + found["children"]["initial"]
    assert (undisturbed / "front.png").stat().st_size > 10_000
    assert not list(undisturbed.rglob("*.pkl"))
    harness.assert_gone(undisturbed)


def test_complete_run_again_changes_nothing(undisturbed: Path) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and path.suffix != ".png"}
    code, out, _ = harness.search(undisturbed.parent / "config.yaml", undisturbed)
    assert code == 0 and "Pareto front" in out
    after = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and path.suffix != ".png"}
    assert after == before


def test_inline_backend_gives_the_same_front(undisturbed: Path, tmp_path: Path) -> None:
    config = harness.write_config(tmp_path, cluster={"backend": "inline"})
    code, _, err = harness.search(config, tmp_path / "run")
    assert code == 0, err
    assert harness.front(tmp_path / "run") == harness.front(undisturbed)


def test_kill_coordinator(undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, each followed by the same command."""
    rng, run = random.Random(1), tmp_path / "run"
    config = harness.write_config(tmp_path)
    for _ in range(3):
        process = harness.start(config, run)
        target = harness.num_committed(run) + rng.randint(0, 4)
        harness.wait_for_outcomes(run, target, process)
        time.sleep(rng.random() * 0.3)
        before = harness.committed(run)
        harness.kill(process.pid)
        harness.finish(process)
        assert before.items() <= harness.committed(run).items()
        if (run / "epochs").exists():
            harness.assert_sound(run)
    code, _, err = harness.search(config, run)
    assert code == 0, err
    harness.assert_sound(run)
    assert harness.front(run) == harness.front(undisturbed)
    harness.assert_gone(run)


@pytest.mark.parametrize("kind", ["supervisor", "trainer"])
def test_kill_worker(undisturbed: Path, tmp_path: Path, kind: str) -> None:
    """kill -9 of a supervisor or a trainer: the run goes on by itself and ends as if nothing had been."""
    rng, run = random.Random(5), tmp_path / "run"
    process = harness.start(harness.write_config(tmp_path), run)
    for target in (2, 8):
        harness.wait_for_outcomes(run, target, process)
        harness.wait_for(lambda: harness.hurt(run, kind, rng), f"a {kind} to kill")
        harness.assert_sound_now(run, process)
    code, _, err = harness.finish(process)
    assert code == 0, err
    harness.assert_sound(run)
    assert harness.front(run) == harness.front(undisturbed)
    lost = harness.status(run)["attempts_lost"]
    assert lost["worker" if kind == "supervisor" else "crash"] >= 1
    harness.assert_gone(run)


def test_killed_trainers_leave_checkpoints_that_others_go_on_from(undisturbed: Path, tmp_path: Path) -> None:
    """A checkpoint after every batch; the run, and each child that was interrupted, ends as if nothing had been."""
    run = tmp_path / "run"
    process = harness.start(harness.write_config(tmp_path, cluster={"checkpoint_min": 1e-9}), run)

    def kill_one() -> bool:
        """The trainer of a child that has a checkpoint, and no outcome yet."""
        known = harness.committed(run)
        begun = [path for path in run.glob("children/*/*/*/checkpoint-*") if int(path.parts[-3]) not in known]
        return any([harness.kill(pid) for pid in harness.pids(run, "trainer")]) if begun else process.poll() is not None

    for target in (0, 3, 6, 9):
        harness.wait_for_outcomes(run, target, process)
        harness.wait_for(kill_one, "a checkpoint")
        harness.assert_sound_now(run, process)
    code, _, err = harness.finish(process)
    assert code == 0, err
    harness.assert_sound(run)
    assert harness.front(run) == harness.front(undisturbed)
    assert any(0 < outcome.get("resumed", 0) < 1 for outcome in harness.outcomes(run).values())
    harness.assert_gone(run)


def test_workers_that_are_signalled_save_their_children(tmp_path: Path) -> None:
    """In a run that takes no checkpoint otherwise. Trainers are signalled too, as Slurm does."""
    run = tmp_path / "run"
    long = {"initial_epochs": 12, "epochs": 1, "distill_epochs": 1}
    config = harness.write_config(
        tmp_path, cluster={"checkpoint_min": 0}, training=long, search={"children": 1, "accepted": 1}
    )
    process = harness.start(config, run)
    harness.wait_for(lambda: any('"epoch":2' in path.read_text() for path in run.glob("workers/*/done.log")), "epochs")
    for kind in ("trainer", "supervisor"):
        for pid in harness.pids(run, kind):
            harness.kill(pid, signal.SIGTERM)
    code, _, err = harness.finish(process)
    assert code == 0, err
    assert any(0 < outcome.get("resumed", 0) < 1 for outcome in harness.outcomes(run).values())
    assert harness.status(run)["attempts_lost"].get("crash", 0) == 0
    harness.assert_sound(run)
    harness.assert_gone(run)


def test_ctrl_c_and_on(undisturbed: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group; it ends within 5 s with code 3, and the same command goes on."""
    run, config = tmp_path / "run", harness.write_config(tmp_path)
    process = harness.start(config, run)
    harness.wait_for_outcomes(run, 5, process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = harness.finish(process)
    assert code == 3, err
    assert time.monotonic() - began < 10.0
    assert "To go on: lemonade-hpc search" in err
    harness.assert_gone(run, 1.0)
    harness.assert_sound(run)
    assert harness.status(run)["state"] == "stopped"
    assert harness.search(config, run)[0] == 0
    assert harness.front(run) == harness.front(undisturbed)


def test_ctrl_c_while_workers_are_still_starting(tmp_path: Path) -> None:
    """On a slow disk the imports of a supervisor take long; it has not said a word yet, and must not be left behind."""
    run = tmp_path / "run"
    process = harness.start(harness.write_config(tmp_path), run, supervisors="import time; time.sleep(30)")
    harness.wait_for(lambda: harness.pids(run, "supervisor"), "a supervisor")
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = harness.finish(process)
    assert code == 3, err
    assert time.monotonic() - began < 12.0
    harness.assert_gone(run, 1.0)
    assert not list(run.rglob("*.pkl"))


def test_why_workers_cannot_start_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = harness.start(harness.write_config(tmp_path), run, supervisors="sys.exit('libfoo.so not found')")
    code, _, err = harness.finish(process)
    assert code == 1
    assert "workers in a row ended" in err and "died: " in err and err.endswith("SystemExit: libfoo.so not found\n")
    harness.assert_gone(run, 1.0)


def test_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = harness.start(harness.write_config(tmp_path), run)
    harness.wait_for_outcomes(run, 1, process)
    for worker in harness.pids(run, "supervisor"):
        harness.kill(worker, signal.SIGSTOP)  # workers that do not answer, so that the first Ctrl-C takes its time
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 3  # not `finish`: the stopped workers hold its output open
    assert time.monotonic() - began < 1.0
    for worker in harness.pids(run, "supervisor"):
        harness.kill(worker, signal.SIGCONT)
    harness.finish(process)
    harness.assert_gone(run)


def test_second_coordinator_is_told_who_holds_the_run(tmp_path: Path) -> None:
    run, config = tmp_path / "run", harness.write_config(tmp_path)
    process = harness.start(config, run)
    harness.wait_for_outcomes(run, 1, process)
    code, _, err = harness.search(config, run)
    assert code == 2
    assert f"held by process {process.pid}" in err
    os.killpg(process.pid, signal.SIGINT)
    assert harness.finish(process)[0] == 3


def test_paused_coordinator_that_wakes_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """SIGSTOP, a take-over that completes, SIGCONT: the sleeper finds itself superseded and leaves."""
    run, config = tmp_path / "run", harness.write_config(tmp_path)
    sleeper = harness.start(config, run)
    harness.wait_for_outcomes(run, 4, sleeper)
    harness.kill(sleeper.pid, signal.SIGSTOP)
    code, _, err = harness.search(config, run, "--take-over")
    assert code == 0, err
    before = harness.front(run)
    harness.kill(sleeper.pid, signal.SIGCONT)
    code, _, err = harness.finish(sleeper)
    assert code == 3 and "has another coordinator now" in err
    harness.assert_sound(run)
    assert harness.front(run) == before == harness.front(undisturbed)
    harness.assert_gone(run)


def test_more_children_continue_a_finished_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = {"mode": "steady_state", "children": 3, "accepted": 2}
    assert harness.search(harness.write_config(tmp_path, search=few), run)[0] == 0
    first = json.loads(harness.command("status", str(run), "--json")[1])["children"]
    config = harness.write_config(tmp_path, search=few | {"children": 6})
    assert harness.search(config, run)[0] == 0
    second = json.loads(harness.command("status", str(run), "--json")[1])["children"]
    assert second["committed"] == first["committed"] + 3
    harness.assert_sound(run)
