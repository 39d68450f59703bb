"""C14: durable commits of outcomes: the journal, 16 events at a time, against an HDF5 file that grows in place.

The rival opens an HDF5 file for every outcome, appends it to a compound table, flushes, fsyncs and closes: what a
population kept in one HDF5 file would do. Floor 2x, target more than 1,000 a second. Wall clock, since fsync is what is
measured. The guard: everything committed is read back. Prints JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from common import against_target, arguments, compared, report

from lemonade_hpc import files
from lemonade_hpc.run import journal
from lemonade_hpc.run.journal import Journal
from lemonade_hpc.run.log import LogWriter

BATCH = 16
TABLE = np.dtype([("child", "i8"), ("val_error", "f8"), ("params", "f8"), ("outcome", "S600")])
FLOOR, TARGET_PER_S = 2.0, 1000.0


def outcome(number: int) -> dict[str, Any]:
    """An outcome as workers report it."""
    return {
        "child": number,
        "attempt": "e1a1",
        "digest": f"{number:032x}",
        "objectives": {"val_error": 0.01 + number % 100 / 1000},
        "receipt": {
            "exact": True,
            "max_difference": 1e-7,
            "relative_difference": 1e-8,
            "error_before": 0.02,
            "kept": [],
        },
        "weights": {"path": f"children/000/{number:06d}/e1a1/weights.safetensors", "sha256": "0" * 64, "bytes": 26728},
        "wall_s": 0.4,
        "device": "cpu",
    }


def journalled(run: Path, count: int) -> tuple[float, bool]:
    """Seconds for `count` outcomes in a new epoch's journal, and whether all are read back."""
    epoch = max(files.epochs(run), default=0) + 1
    (run / files.epoch_folder(epoch)).mkdir(parents=True)
    for path in files.journals(epoch):
        with LogWriter(run / path) as writer:
            writer.append([{"event": "epoch", "epoch": epoch, "continues": None}])
            link = writer.previous
    made = Journal(run, epoch, link)
    events = [{"event": "committed", "outcome": outcome(number)} for number in range(count)]
    began = time.perf_counter()
    for start in range(0, count, BATCH):
        made.append(events[start : start + BATCH])
    seconds = time.perf_counter() - began
    made.close()
    return seconds, len(journal.read(run).epochs[-1][1]) == count + 1


def grown(path: Path, count: int) -> tuple[float, bool]:
    """Seconds for `count` outcomes appended to an HDF5 table, one by one, and whether all are read back."""
    with h5py.File(path, "w") as file:
        file.create_dataset("outcomes", (0,), TABLE, maxshape=(None,), chunks=(256,))
    rows = [(n, 0.01, 1000.0, json.dumps(outcome(n)).encode()) for n in range(count)]
    began = time.perf_counter()
    for row in rows:
        with h5py.File(path, "r+") as file:
            table = file["outcomes"]
            table.resize((len(table) + 1,))
            table[-1] = np.array(row, dtype=TABLE)
            file.flush()
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    seconds = time.perf_counter() - began
    with h5py.File(path, "r") as file:
        return seconds, len(file["outcomes"]) == count


def main() -> None:
    """Measure both in turn."""
    given = arguments(__doc__)
    count = BATCH * (4 if given.small else 20)
    times: dict[str, list[float]] = {"HDF5 in place": [], "journal": []}
    complete = True
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            sides = {
                "HDF5 in place": grown(Path(folder) / "h5", count),
                "journal": journalled(Path(folder) / "run", count),
            }
        for name, (seconds, read_back) in sides.items():
            times[name].append(seconds / count)
            complete = complete and read_back
    found = compared(times, "HDF5 in place", "journal", FLOOR)
    report("C14", given, {"everything committed is read back": complete}, against_target(found, TARGET_PER_S))


if __name__ == "__main__":
    main()
