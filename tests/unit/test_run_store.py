"""Sealed files: what goes in comes out, and what is damaged is refused by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import h5py
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemonade_hpc import files
from lemonade_hpc.run import store
from lemonade_hpc.run.store import StoreError

ATTRIBUTES = {"run": "abc", "code": "0.1", "cheap": ["params", "macs"], "expensive": ["val_error"]}


def child(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "number": number,
        "parent": number - 1 if number % 3 else None,
        "edits": [{"edit": "widen", "node": number, "factor": 2.0}],
        "graph": {"nodes": [[0, "input", []], [number, "linear", [0]]], "next_id": number + 1},
        "digest": f"{number:032x}",
        "cheap": [100.0 + number, 1e9 + number],
        "generation": number // 5,
        "depth": number % 4,
        "outcome": {"child": number, "attempt": "e1a1", "objectives": {"val_error": 0.1 * number}, "wall_s": 1.5},
    } | changes


FAILED = {
    "child": 2,
    "attempt": "e1a3",
    "failure": {"kind": "crash", "reason": "killed\nby SIGSEGV; ünïcode"},
}
CHILDREN = [child(0), child(1, edits=[]), child(2, outcome=FAILED), child(3)]


def test_round_trip() -> None:
    found = store.decode(store.encode(CHILDREN, ATTRIBUTES), "name")
    assert found.children == CHILDREN
    assert found.attributes == ATTRIBUTES


texts = st.text(max_size=20)
rows = st.builds(
    child,
    number=st.integers(0, 2**40),
    parent=st.none() | st.integers(0, 2**40),
    edits=st.lists(st.dictionaries(texts, texts, max_size=2), max_size=3),
    graph=st.recursive(st.integers() | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    digest=st.text("0123456789abcdef", min_size=32, max_size=32),
    cheap=st.lists(st.floats(0, 1e12), min_size=2, max_size=2),
    generation=st.integers(0, 10**6),
    depth=st.integers(0, 10**6),
    outcome=st.fixed_dictionaries({"objectives": st.dictionaries(st.just("val_error"), st.floats(0, 1))}),
)


@given(st.lists(rows, min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_round_trip_of_anything(children: list[dict[str, Any]]) -> None:
    assert store.decode(store.encode(children, ATTRIBUTES), "name").children == children


def test_the_same_children_give_the_same_bytes() -> None:
    assert store.encode(CHILDREN, ATTRIBUTES) == store.encode([dict(c) for c in CHILDREN], dict(ATTRIBUTES))
    assert store.encode(CHILDREN, ATTRIBUTES) != store.encode(CHILDREN[:3], ATTRIBUTES)


def test_other_programs_see_columns(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(store.encode(CHILDREN, ATTRIBUTES))
    with h5py.File(tmp_path / "a.h5", "r", locking=False) as file:
        columns = file["children"]
        assert columns["number"][:].tolist() == [0, 1, 2, 3]
        assert columns["parent"][:].tolist() == [-1, 0, 1, -1]
        assert columns["failed"][:].tolist() == [False, False, True, False]
        assert columns["macs"][1] == 1e9 + 1
        assert columns["val_error"][3] == pytest.approx(0.3)
        assert columns["val_error"][2] != columns["val_error"][2]  # a failed child has none
        assert columns["wall_s"][0] == 1.5


def test_a_newer_schema_is_refused_by_name() -> None:
    buffer = io.BytesIO(store.encode(CHILDREN, ATTRIBUTES))
    with h5py.File(buffer, "r+") as file:
        file.attrs["schema"] = store.SCHEMA + 1
    with pytest.raises(StoreError, match=r"some/file.h5: schema 2, this version reads up to 1"):
        store.decode(buffer.getvalue(), "some/file.h5")


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    path, content = tmp_path / "a.h5", store.encode(CHILDREN, ATTRIBUTES)
    checksum = files.sha256(content)
    path.write_bytes(content)
    assert store.read(path, checksum).children == CHILDREN
    wounds = [content[:offset] for offset in range(0, len(content), 97)]
    for offset in range(0, len(content), 53):
        hurt = bytearray(content)
        hurt[offset] ^= 1 << (offset % 8)
        wounds.append(bytes(hurt))
    for hurt in [*wounds, b"", content + b"\0"]:
        path.write_bytes(hurt)
        with pytest.raises(StoreError, match=r"a.h5: its SHA-256 is not the one in the record"):
            store.read(path, checksum)


def test_a_file_that_is_missing_or_something_else_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"gone.h5: cannot be read: .*No such file"):
        store.read(tmp_path / "gone.h5", "")
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(StoreError, match=r"folder.h5: cannot be read"):
        store.read(tmp_path / "folder.h5", "")
    (tmp_path / "text.h5").write_bytes(b"no HDF5 at all")
    with pytest.raises(StoreError, match=r"text.h5: not a readable sealed file"):
        store.read(tmp_path / "text.h5", files.sha256(b"no HDF5 at all"))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["schema"] = 1
    with pytest.raises(StoreError, match=r"empty.h5: not a readable sealed file"):
        store.decode(buffer.getvalue(), "empty.h5")
