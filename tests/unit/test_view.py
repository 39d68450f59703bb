"""What people see: numbers, tables in 80 columns, the progress of a run, the figure."""

import io
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console
from scipy.stats import binomtest

from lemonade_hpc import config
from lemonade_hpc.run import history as histories
from lemonade_hpc.run import status
from lemonade_hpc.run.checks import Check
from lemonade_hpc.run.history import History
from lemonade_hpc.search import evolution
from lemonade_hpc.search.ops import Signature
from lemonade_hpc.view import figures, progress, tables
from lemonade_hpc.view.progress import ProgressView

ESCAPE = "\x1b"
OBJECTIVES = {
    "params": [{"name": "val_error"}, {"name": "params"}],
    "macs": [{"name": "macs"}, {"name": "val_error"}],
    "both": [{"name": "val_error"}, {"name": "params"}, {"name": "macs"}],
}


def searched(objectives="params", children=12, asks=None, failed=()):
    """The history of a search whose trainings are dice: the longer the lineage, the lower the error."""
    settings = config.from_dict(
        {
            "data": {"name": "digits"},
            "objectives": OBJECTIVES[objectives],
            "search": {"children": children, "proposals": 4, "accepted": 2},
        },
        "test",
    )
    fixed = evolution.problem(config.resolve(settings, (1, 8, 8)), Signature((1, 8, 8), 10), 0.9)
    history = History(fixed)
    rng = np.random.default_rng(0)
    while not history.state.complete and asks != 0:
        before = history.state
        after, new = evolution.ask(before, 2, history.seen.__contains__)
        history.apply(histories.asked(before, after, 2, new))
        for child in new:
            history.apply({"event": "committed", "outcome": outcome(child, rng, failed)})
        asks = None if asks is None else asks - 1
    return history


def outcome(child, rng, failed):
    told = {"child": child.number, "attempt": "e1a1", "digest": child.digest, "wall_s": 1.0}
    if child.number in failed:
        return told | {"failure": {"kind": "Diverged", "reason": "the loss is [nan]"}}
    error = round(350 * rng.uniform(0.02, 0.6) / (1 + child.depth)) / 350
    return told | {"objectives": {"val_error": error}, "receipt": None, "weights": {"path": f"w{child.number}"}}


def shown(what, width=80):
    """The lines on a console of this width, without trailing blanks."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, markup=False, emoji=False, highlight=False).print(what)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("count", [1, 7, 350, 10_000])
def test_the_interval_is_wilsons(count):
    for wrong in {0, 1, count // 3, count - 1, count}:
        expected = binomtest(wrong, count).proportion_ci(method="wilson")
        assert tables.wilson(wrong / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tables.error_text(5 / 350, 350), "1.4 % [0.6, 3.3]"),
        (tables.error_text(0.0, 350), "0.0 % [0.0, 1.1]"),
        (tables.error_text(1.0, 10), "100.0 % [72.2, 100.0]"),
        (tables.error_text(0.0512, 10_000), "5.12 % [4.70, 5.57]"),
        (tables.value_text("val_error", 5 / 350, 350), "1.4 % [0.6, 3.3]"),
        (tables.value_text("params", 26274.0, 350), "26,274"),
        (tables.count_text(9_999_999.0), "9,999,999"),
        (tables.count_text(12_345_678.0), "12.35 M"),
        (tables.count_text(999_000_000.0), "999.0 M"),
        (tables.count_text(1_234_567_890.0), "1.235 G"),
        (tables.seconds_text(95.4), "95 s"),
        (tables.seconds_text(720.0), "12 min"),
        (tables.seconds_text(12_240.0), "3.4 h"),
        (
            tables.gain_text({"front": 1.5, "initial": 1.2}),
            "hypervolume 1.500, initial networks 1.200: gain +0.300 (+25 %)",
        ),
        (tables.gain_text({"front": 1.5, "initial": 0.0}), "hypervolume 1.500, initial networks 0.000: gain +1.500"),
        (
            tables.gain_text({"front": 1.5, "initial": None}),
            "hypervolume: the initial networks are not all trained yet",
        ),
        (tables.lineage([]), "initial"),
        (tables.lineage([["insert", 7, 5], ["widen", 7, 2], ["remove", 3, 0]]), "insert 5x5, widen x2, remove"),
        (tables.lineage([["add", 7, 5], ["concat", 7, 2], ["prune", 3, 4]]), "skip (add), skip (concat), prune 1/4"),
    ],
)
def test_numbers_are_written_as_people_read_them(text, expected):
    assert text == expected


# ---------------------------------------------------------------- tables


def longest(objectives):
    """A front whose cells are as wide as they come."""
    values = {"val_error": 0.9712, "params": 9_999_999.0, "macs": 1_234_567_890.0}
    edits = [["concat", 7, 2], ["concat", 9, 2], ["concat", 11, 2]]
    names = [objective["name"] for objective in OBJECTIVES[objectives]]
    member = {"id": 5003, "parent": 4999, "edits": edits, "objectives": {name: values[name] for name in names}}
    return [member, member | {"id": 5004}]


@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_a_row_is_one_line_in_80_columns_and_only_the_edits_give_way(objectives):
    lines = shown(tables.front_table(longest(objectives), num_validation=5000))
    assert len(lines) == 1 + 2 + 1 + 2  # title, headings, rule, members
    for line in lines[-2:]:
        assert line.endswith("…")
        assert "97.12 % [96.62, 97.55]" in line and "4999" in line
        assert all(
            tables.count_text(v) in line for k, v in longest(objectives)[0]["objectives"].items() if k != "val_error"
        )


@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_test_errors_take_the_place_of_parent_and_edits(objectives):
    errors = {5003: 0.5, 5004: 0.25}
    lines = shown(tables.front_table(longest(objectives), 5000, errors, 10_000))
    assert len(lines) == 6
    assert "…" not in "".join(lines)
    assert "50.00 % [49.02, 50.98]" in lines[-2] and "25.00 % [24.16, 25.86]" in lines[-1]


def test_in_a_log_file_nothing_is_cut():
    assert "skip (concat), skip (concat), skip (concat)" in shown(tables.front_table(longest("both"), 5000), 160)[-1]


def test_an_empty_front_and_a_front_of_one():
    assert shown(tables.front_table([], 350)) == ["The front is empty: no network has been trained yet."]
    assert shown(tables.front_table(longest("macs")[:1], 350))[0].strip() == "Pareto front, 1 member"


@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_the_front_of_a_search_is_ordered_and_complete(objectives):
    history = searched(objectives)
    members = status.front(history)
    rows = shown(tables.front_table(members, 350))[-len(members) :]
    assert [int(row.split()[0]) for row in rows] == [member["id"] for member in members]
    cheap = history.state.problem.cheap[0]
    assert [m["objectives"][cheap] for m in members] == sorted(m["objectives"][cheap] for m in members)


def job(id, state="PENDING", why="None"):
    return {"id": id, "state": state, "reason": why, "node": ""}


def told(**changed):
    history = searched(failed=(5, 6))
    state = history.state
    data = {
        "state": "complete",
        "warnings": [],
        "why_closed": None,
        "stopping": False,
        "coordinators": None,
        "log": None,
        "log_is_newer": False,
        "job_name": None,
        "data": {"name": "digits", "num_train": 1097, "num_validation": 350, "num_test": 350},
        "children": {
            "budget": 12,
            "asked": state.num_asked,
            "initial": state.num_initial,
            "committed": state.num_committed,
            "failed": state.num_failed,
            "in_flight": len(state.in_flight),
        },
        "attempts_lost": {"crash": 0, "walltime": 0, "worker": 0, "stopped": 0},
        "workers_left": {},
        "last_fault": None,
        "log_ends": "",
        "nodes_excluded": {},
        "usage": {"unit": "GPU-hours", "spent": 12.345, "wasted": 0.25, "idle": 0.0},
        "training_s": history.wall_s,
        "hypervolume": status.hypervolumes(history),
        "front": status.front(history),
        "workers": [],
        "failures": [{"child": o["child"], **o["failure"]} for o in history.failures],
    }
    return data | changed


def test_the_status_tells_failures_with_reasons():
    text = "\n".join(shown(tables.status_view(told(), 350)))
    assert "digits: 1,097 images to train on, 350 for validation, 350 for test" in text
    assert "16 of 16 children done (4 initial), 2 failed; 16 s of training" in text
    assert "child 5 failed (Diverged): the loss is [nan]" in text
    assert "attempts lost" not in text and "the last" not in text
    assert re.search(r"hypervolume \d\.\d{3}, initial networks \d\.\d{3}: gain \+\d\.\d{3} \(\+\d+ %\)", text)


@pytest.mark.parametrize(
    ("state", "words"),
    [("running: process 1", "1 in training, 1 asked and waiting"), ("stopped", "2 asked and not done")],
)
def test_what_is_not_done_is_in_flight_only_while_somebody_is_at_it(state, words):
    children = told()["children"] | {"committed": 14, "in_flight": 2, "failed": 0}
    assert f"14 of 16 children done (4 initial), 0 failed, {words}; " in tables.summary(
        told(state=state, children=children, workers=[{"doing": "child 15, epoch 1"}, {"doing": "idle"}])
    )
    lowered = children | {"budget": 3}
    assert "14 of 16 children done" in tables.summary(told(children=lowered))


def test_the_status_tells_what_is_lost_cut_off_or_damaged_and_how_to_go_on():
    changed = {
        "state": "stopped",
        "warnings": ["[/journal] damaged"],
        "why_closed": "cluster.max_workers is reached",
        "attempts_lost": {"crash": 2, "walltime": 1, "worker": 0, "stopped": 1},
        "workers_left": {"preempted": 3, "idle": 1},
        "nodes_excluded": {"n7": "three came to grief there"},
        "workers": [
            {"name": "e1w00", "node": "node7", "device": "cpu", "doing": "child 3, epoch 2", "job": None},
            {"name": "e1w01", "node": None, "device": None, "doing": "starting", "job": None},
            *(
                {"name": f"e1w{k}", "node": None, "device": None, "doing": "starting", "job": job("9_1", why=why)}
                for k, why in ((2, "Priority"), (3, "Resources"), (4, "Priority"))
            ),
            {"name": "e1w05", "node": "n1", "device": None, "doing": "child 4", "job": job("9_2", "NODE_FAIL")},
            {"name": "e1w06", "node": None, "device": None, "doing": "starting", "job": job("9_3", "CANCELLED")},
        ],
        "failures": told()["failures"][1:],
    }
    lines = shown(tables.status_view(told(**changed), 350))
    assert lines[0] == "stopped: cluster.max_workers is reached; the same command goes on"
    for expected in (
        "attempts lost: crash 2, time limit 1",
        "workers left: preempted 3, idle 1",
        "GPU-hours: 12.3 spent, 0.25 of them wasted on attempts that were lost, 0 idle",
        "node n7 is excluded: three came to grief there",
        "warning: [/journal] damaged",
        "worker e1w00 on node7 (cpu): child 3, epoch 2",
        "workers not at work yet: 1 starting",
        "workers not at work yet: 2 in the queue (Priority)",
        "workers not at work yet: 1 in the queue (Resources)",
        "workers not at work yet: 1 ended (CANCELLED)",
        "worker e1w05 on n1: ended (NODE_FAIL)",
        "the last 1 of 2 failed children:",
    ):
        assert expected in lines


def test_a_worker_that_the_queue_does_not_know_is_told_where_it_was_asked():
    waiting = {"name": "e1w01", "node": None, "device": None, "doing": "starting", "job": None}
    for coordinators, words in ((None, "starting"), ([], "not in the queue")):
        lines = shown(tables.status_view(told(state="stopped", coordinators=coordinators, workers=[waiting]), 350))
        assert f"workers not at work yet: 1 {words}" in lines


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"state": "running: job 8"}, ["running: job 8"]),
        ({"state": "running: job 8", "stopping": True}, ["running: job 8, which ends what is in training and stops"]),
        (
            {"state": "running: job 8", "coordinators": [job("8", "RUNNING")]},
            ["running: job 8", "no successor is in the queue: once the coordinator's job has ended, submit again"],
        ),
        ({"state": "running: job 8", "coordinators": [job("8", "RUNNING"), job("9")]}, ["running: job 8"]),
        (
            {"state": "stopped", "coordinators": [job("9", why="Priority")], "log": "run/slurm/coordinator-8.log",
             "log_ends": "no such module"},
            [
                "stopped; a coordinator waits in the queue: job 9 (Priority)",
                "the last log of a submitted coordinator: run/slurm/coordinator-8.log",
                "it ends: no such module",
            ],
        ),
        ({"state": "not started", "coordinators": [job("10"), job("9", "RUNNING")]},
         ["not started; a coordinator is beginning: job 9"]),
        ({"state": "stopped", "coordinators": [job("8", "COMPLETING")]}, ["stopped; the same command goes on"]),
        ({"state": "stopped", "why_closed": "stopped by SIGUSR1", "log": "a.log"},
         ["stopped: stopped by SIGUSR1; the same command goes on"]),
        ({"state": "stopped", "why_closed": "stopped by SIGUSR1", "log": "a.log", "log_is_newer": True,
          "log_ends": "FATAL: no image", "coordinators": [job("9", "RUNNING")]},
         ["stopped: stopped by SIGUSR1; a coordinator is beginning: job 9",
          "the last log of a submitted coordinator: a.log", "it ends: FATAL: no image"]),
        ({"state": "not started", "log": "a.log", "job_name": "lemonade-0-coordinator", "coordinators": []},
         ["not started", "the last log of a submitted coordinator: a.log; it is empty: sacct may know more"]),
        ({"state": "not started", "job_name": "lemonade-0-coordinator", "coordinators": []},
         ["not started",
          "its coordinator has left the queue and no log: do the nodes see this folder?",
          "more may be known to: sacct -X --name=lemonade-0-coordinator"]),
        ({"state": "not started", "job_name": "lemonade-0-coordinator", "coordinators": None}, ["not started"]),
        ({"state": "complete", "log": "a.log"}, ["complete"]),
    ],
)  # fmt: skip
def test_the_status_tells_who_goes_on(changed, expected):
    lines = shown(tables.status_view(told(**changed), 350))
    assert lines[: len(expected)] == expected and lines[len(expected)].startswith("digits: ")


def test_the_status_tells_why_workers_come_to_grief():
    lines = shown(tables.status_view(told(workers_left={"died": 8}, last_fault="worker e1w04 died: no module"), 350))
    at = lines.index("workers left: died 8")
    assert lines[at + 1] == "since the last child that was trained: worker e1w04 died: no module"


def test_checks_show_what_they_found_brackets_included():
    lines = shown(tables.checks_table([("all is well", []), ("front recomputes", ["[3, 4] is not [/b]", "more"])]))
    assert [line.split() for line in lines] == [
        ["ok", "all", "is", "well"],
        ["FAULT", "front", "recomputes"],
        ["[3,", "4]", "is", "not", "[/b]"],
        ["more"],
    ]


def test_what_doctor_finds_is_a_line_with_the_fix_beneath():
    found = [Check("a", "ok", "well [b]"), Check("Slurm", "fail", "no [/b] here\nnor there", "run x")]
    lines = shown(tables.doctor_table(found))
    assert [line.split() for line in lines] == [
        ["ok", "a", "well", "[b]"],
        ["fail", "Slurm", "no", "[/b]", "here"],
        ["nor", "there"],
        ["fix:", "run", "x"],
    ]


@pytest.mark.parametrize("stderr", [False, True])
def test_the_console_takes_nothing_for_markup_and_breaks_no_line_in_a_file(capsys, stderr):
    text = "[bold]x[/b] :smile: " + "y" * 130
    tables.console(stderr=stderr).print(text)
    streams = capsys.readouterr()
    assert (streams.err if stderr else streams.out) == text + "\n"
    assert (streams.out if stderr else streams.err) == ""


# ---------------------------------------------------------------- progress


def watched(histories, *, terminal, notes=()):
    buffer = io.StringIO()
    console = Console(file=buffer, width=80, force_terminal=terminal, highlight=False)
    with ProgressView(console) as view:
        for text in notes:
            view.note(text)
        for history in histories:
            view.update(history, {})
    return buffer.getvalue()


def test_a_log_gets_plain_lines_with_the_time_and_the_last_one_shows_all_children():
    text = watched([searched(asks=1), searched(), searched()], terminal=False)
    assert ESCAPE not in text and "\r" not in text
    first, last = text.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(stamp + r"4/16 children, front \d, error \d+\.\d to \d+\.\d %, gain \+0\.000", first)
    assert re.fullmatch(stamp + r"16/16 children, front \d+, error \d+\.\d to \d+\.\d %, gain \+\d\.\d{3}", last)


def test_a_log_line_waits_its_turn(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    history = searched(asks=1)
    buffer = io.StringIO()
    view = ProgressView(Console(file=buffer))
    expected = 0
    for asks, at, due in [(0, 0, True), (0, 50, False), (1, 60, True), (2, 65, False), (3, 71, True), (3, 99, False)]:
        history, now[0] = searched(asks=asks), 1000.0 + at
        view.update(history, {})
        expected += due
        assert len(buffer.getvalue().splitlines()) == expected
    assert "0/12 children, waiting for the initial networks" in buffer.getvalue().splitlines()[0]


def test_a_terminal_gets_a_bar_that_ends_full():
    text = watched([searched(asks=1), searched()], terminal=True)
    assert ESCAPE in text
    last = re.sub(rf"{ESCAPE}\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").strip().splitlines()[-1]
    assert "16/16" in last and "gain +" in last and len(last) <= 80


def test_nothing_is_shown_of_a_run_that_is_refused_or_complete():
    assert watched([], terminal=True) == watched([], terminal=False) == ""


def test_a_note_is_shown_as_it_is():
    note = "worker [/e1w00] failed: [Errno 28] no space: " + "x" * 100
    assert watched([], terminal=False, notes=[note]).endswith(f" {note}\n")
    assert watched([], terminal=False, notes=[note]).count("\n") == 1
    assert "[/e1w00] failed: [Errno 28]" in re.sub(rf"{ESCAPE}\[[0-9;]*m", "", watched([], terminal=True, notes=[note]))


# ---------------------------------------------------------------- figures


def drawn(folder, history, children=None):
    paths = [folder / "sub" / "front.png", folder / "sub" / "front.svg"]
    members = status.children(history, Path("unused")) if children is None else children
    gain = tables.gain_text(status.hypervolumes(history))
    figures.front(members, history.state.problem.cheap, 350, "digits: 16 children", gain, paths)
    texts = [
        "".join(node.itertext()).strip() for node in ElementTree.parse(paths[1]).iter() if node.tag.endswith("}text")
    ]
    return paths, texts


@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_a_figure_says_what_it_shows(tmp_path, objectives):
    history = searched(objectives)
    paths, texts = drawn(tmp_path, history)
    assert imread(paths[0]).shape == (720, 1080 if objectives != "both" else 1680, 4)
    assert texts.count("validation error (%)") == 1
    for name in ("params", "macs"):
        assert (figures.AXES[name] in texts) == (name in history.state.problem.cheap)
    num_front = len(history.state.front.numbers)
    assert f"Pareto front ({num_front}), 95 % interval" in texts
    assert "initial networks (4)" in texts
    assert any(text.startswith("dominated children (") for text in texts)
    assert any("digits: 16 children" in text for text in texts)
    assert any(re.search(r"gain \+\d\.\d{3} \(\+\d+ %\)", text) for text in texts)
    assert any(re.fullmatch(r"[125]0* k", text) for text in texts)


def test_the_groups_count_every_child_once(tmp_path):
    history = searched(failed=(5, 6))
    _, texts = drawn(tmp_path, history)
    dominated = next(int(re.search(r"\((\d+)", text)[1]) for text in texts if text.startswith("dominated"))
    front = set(history.state.front.numbers)
    assert dominated == 16 - 2 - len(front | {0, 1, 2, 3})


def test_children_above_the_axis_are_counted(tmp_path):
    children = [
        {"id": k, "objectives": {"params": 1000.0 + k, "val_error": error}, "initial": False, "front": k == 0}
        for k, error in enumerate([0.1, 0.12, 0.2, 0.9])
    ]
    _, texts = drawn(tmp_path, searched(), children)
    assert "dominated children (3, 2 of them above)" in texts


@pytest.mark.parametrize("objectives", OBJECTIVES)
@pytest.mark.parametrize("count", [0, 1])
def test_a_figure_of_nothing_and_of_one_network(tmp_path, objectives, count):
    history = searched(objectives, asks=1)
    children = [child | {"front": True} for child in status.children(history, Path("unused"))[:count]]
    paths, texts = drawn(tmp_path, history, children)
    assert imread(paths[0]).size > 0
    assert ("no trained network yet" in texts) == (count == 0)


def test_an_error_of_zero_can_be_drawn(tmp_path):
    child = {"id": 0, "objectives": {"params": 1.0, "val_error": 0.0}, "initial": True, "front": True}
    assert drawn(tmp_path, searched(), [child])[0][0].exists()


def test_the_same_run_gives_the_same_bytes(tmp_path):
    once, again = (drawn(tmp_path / name, searched())[0] for name in ("a", "b"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_the_three_groups_differ_in_grey():
    shades = [
        np.dot(to_rgb(shade), (0.299, 0.587, 0.114)) for shade in (figures.FRONT, figures.INITIAL, figures.OTHERS)
    ]
    assert min(np.diff(sorted(shades))) > 0.1


def test_the_edge_of_the_front_goes_from_the_top_to_the_right_end():
    members = [{"objectives": {"params": x, "val_error": y}} for x, y in [(300.0, 0.2), (100.0, 0.3), (200.0, 0.4)]]
    assert figures._stairs(members, "params", 50.0, 1000.0) == ([100, 100, 300, 300, 1000], [50, 30, 30, 20, 20])
    assert figures._stairs([], "params", 50.0, 1000.0) == ([], [])


@pytest.mark.parametrize(("value", "expected"), [(500, "500"), (1e3, "1 k"), (2e4, "20 k"), (5e6, "5 M"), (1e9, "1 G")])
def test_ticks_are_short(value, expected):
    assert figures._short(value) == expected


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_ends_does_not_end_what_it_reads(stream):
    """`search ... | head -1`: rich would leave with exit code 1, and a night's search with it."""
    other = "stderr" if stream == "stdout" else "stdout"
    program = (
        "import sys; from lemonade_hpc.view import tables\n"
        f"console = tables.console(stderr={stream == 'stderr'})\n"
        "for _ in range(200): console.print('x' * 1000)\n"
        f"print('went on', file=sys.{other})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    getattr(process, stream).close()
    assert getattr(process, other).read() == b"went on\n"
    assert process.wait() == 0
    getattr(process, other).close()


def test_an_error_bar_never_points_the_wrong_way():
    """Rounding put the lower end of no error at all above it, for 690 of 3,000 counts."""
    for count in range(1, 3001):
        for share in (0.0, 1.0):
            low, high = tables.wilson(share, count)
            assert low <= share <= high, count
        (below,), (above,) = figures._intervals([0.0], count)
        assert below == 0 < above
