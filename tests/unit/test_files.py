"""Durable writes and paths."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemonade_hpc import files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, b"long old content")
    files.write(path, b"new")
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a"
    files.write(path, b"old")

    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr("builtins.open", full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_write_makes_content_durable_before_the_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        target = os.readlink(f"/proc/self/fd/{handle}")
        steps.append("folder" if target == str(tmp_path) else f"{Path(target).name[:5]} {os.stat(target).st_size}")
        fsync(handle)

    def noted_replace(source: str, target: str) -> None:
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write(tmp_path / "a", b"four")
    assert steps == [".tmp- 4", "replace", "folder"]


def test_a_new_folder_is_durable_with_all_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[str] = []
    monkeypatch.setattr(files, "sync_folder", lambda folder: forced.append(str(folder.relative_to(tmp_path))))
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert forced == [".", "a", "a/b"]
    files.make_folder(tmp_path / "a" / "b" / "c")
    assert len(forced) == 3
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_new_file_never_replaces_another(tmp_path: Path) -> None:
    files.write(tmp_path / "a", b"first", new=True)
    with pytest.raises(FileExistsError):
        files.write(tmp_path / "a", b"second", new=True)
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("a", b"first")]


def test_remove_takes_files_folders_and_what_is_gone(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "outside").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    for name in ("folder", "file", "link", "never was"):
        files.remove(tmp_path / name)
    assert [item.name for item in tmp_path.iterdir()] == ["outside"]


def test_paths_are_relative_and_fan_out() -> None:
    assert files.attempt_folder(12345, "e1a2") == Path("children/012/012345/e1a2")
    assert files.attempt_folder(1234567, "a") == Path("children/1234/1234567/a")
    assert [str(path) for path in files.journals(4)] == ["epochs/000004/journal.log", "epochs/000004/journal.copy"]
    assert files.assigned_log(4, "w") == Path("epochs/000004/workers/w/assigned.log")
    assert files.done_log("w") == Path("workers/w/done.log")
    assert files.owner(4).parent == files.heartbeat(4).parent == files.epoch_folder(4)


def test_epochs_are_numbers_in_order(tmp_path: Path) -> None:
    assert files.epochs(tmp_path) == []
    for name in ("000010", "000002", ".tmp-abc", "notes"):
        (tmp_path / files.EPOCHS / name).mkdir(parents=True)
    assert files.epochs(tmp_path) == [2, 10]


def test_what_cannot_be_told_of_a_path_is_not_taken_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `Path.exists` and `is_dir` do from Python 3.14 on: a run whose folder is away would seem to have no epochs."""
    (tmp_path / "file").write_bytes(b"ab")
    assert files.size(tmp_path / "file") == 2
    assert files.size(tmp_path / "none") is None and files.size(tmp_path / "file" / "below") is None
    assert files.epochs(tmp_path / "file") == []
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    away = tmp_path / ("x" * 300)  # a name that no file system takes
    with pytest.raises(OSError, match="File name too long"):
        files.size(away)
    with pytest.raises(OSError, match="File name too long"):
        files.epochs(away)


@given(JSON)
@settings(max_examples=40, deadline=None)
def test_dumps_is_one_line_and_canonical(value: object) -> None:
    text = files.dumps(value)
    assert "\n" not in text and text.isascii()
    assert json.loads(text) == value
    assert files.dumps(json.loads(text)) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_dumps_refuses_what_json_has_not(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.dumps({"x": [value]})


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    files.write(tmp_path / "a", b"one", new=True)
    with pytest.raises(FileExistsError):
        files.write(tmp_path / "a", b"two", new=True)
    assert (tmp_path / "a").read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.ENOSYS, False), (errno.EIO, True)])
def test_a_file_system_that_has_no_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError) if raises else contextlib.nullcontext():
        files.write(tmp_path / "a", b"one")
    assert (tmp_path / "a").exists() != raises
