"""Logs of checked lines: what damage they bridge, what a full disk leaves, what a reader sees."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemonade_hpc.files import dumps
from lemonade_hpc.run import log
from lemonade_hpc.run.log import START, LogReader, LogWriter, link, parse, walk

MESSAGES = [{"n": n, "text": "x" * (3 * n)} for n in range(6)]


def written(bodies: list[str]) -> bytes:
    """A log with these JSON texts."""
    previous, text = START, ""
    for body in bodies:
        previous = link(previous, body)
        text += f"{previous} {body}\n"
    return text.encode()


BODIES = [dumps(message) for message in MESSAGES]
CONTENT = written(BODIES)


def texts(copies: list[bytes]) -> list[str]:
    return [body for _, body in walk(copies)]


def line_of(offset: int) -> int:
    """The line that a byte of CONTENT belongs to."""
    return CONTENT[:offset].count(b"\n")


# ---------------------------------------------------------------- link, parse, walk


def test_a_link_stands_for_the_line_and_all_before_it() -> None:
    first = link(START, "a")
    assert len(first) == log.LINK_LENGTH and int(first, 16) >= 0
    assert link(START, "b") != first
    assert link(first, "b") != link(link(START, "x"), "b")


def test_parse_gives_whole_lines_and_the_torn_rest() -> None:
    lines, rest = parse(CONTENT + b"0123 half a li")
    assert rest == b"0123 half a li"
    assert [body for _, _, body in lines] == BODIES
    assert [before for before, _, _ in lines] == [START, *(stated for _, stated, _ in lines[:-1])]
    assert parse(b"") == ([], b"")


def test_a_log_is_what_was_written(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "a") as writer:
        writer.append(MESSAGES[:2])
        writer.append([], durable=False)
        writer.append(MESSAGES[2:], durable=False)
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert texts([CONTENT]) == BODIES
    assert texts([]) == texts([b""]) == []


@pytest.mark.parametrize("bit", [0, 3, 6])
def test_a_flipped_bit_in_one_copy_is_bridged_and_in_both_ends_the_walk(bit: int) -> None:
    for offset in range(len(CONTENT)):
        hurt = bytearray(CONTENT)
        hurt[offset] ^= 1 << bit
        assert texts([bytes(hurt), CONTENT]) == texts([CONTENT, bytes(hurt)]) == BODIES
        assert texts([bytes(hurt), bytes(hurt)]) == BODIES[: line_of(offset)]


def test_a_cut_at_any_byte_of_one_copy_is_bridged_and_of_both_ends_the_walk() -> None:
    for offset in range(len(CONTENT)):
        cut = CONTENT[:offset]
        assert texts([cut, CONTENT]) == texts([CONTENT, cut]) == BODIES
        assert texts([cut, cut]) == BODIES[: line_of(offset)]
        # a hole in the middle, as a lost block leaves it
        hole = CONTENT[:offset] + CONTENT[offset + 7 :]
        assert texts([hole, CONTENT]) == BODIES


def test_a_deleted_line_in_one_copy_is_bridged_and_in_both_ends_the_walk() -> None:
    lines = CONTENT.splitlines(keepends=True)
    for n in range(len(lines)):
        hurt = b"".join(lines[:n] + lines[n + 1 :])
        assert texts([hurt, CONTENT]) == texts([CONTENT, hurt]) == BODIES
        assert texts([hurt, hurt]) == BODIES[:n]


def test_two_copies_hurt_in_different_places_bridge_each_other() -> None:
    lines = CONTENT.splitlines(keepends=True)
    one = b"".join([lines[0], b"garbage\n", *lines[2:]])
    other = b"".join([*lines[:4], b"\xff\xfe" + lines[4], lines[5]])
    assert texts([one, other]) == BODIES


damage = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, len(CONTENT) - 1), st.binary(max_size=6), st.integers(0, 40)),
    max_size=6,
)


@given(damage)
@settings(max_examples=300, deadline=None)
def test_walk_never_returns_a_line_that_was_not_written(wounds: list[tuple[int, int, bytes, int]]) -> None:
    copies = [bytearray(CONTENT), bytearray(CONTENT)]
    for which, offset, put, length in wounds:
        copies[which][offset : offset + length] = put
    found = texts([bytes(copy) for copy in copies])
    assert found == BODIES[: len(found)]
    untouched = [k for k in (0, 1) if all(which != k for which, *_ in wounds)]
    assert not untouched or found == BODIES


# ---------------------------------------------------------------- LogWriter


def test_a_writer_goes_on_where_the_log_ends(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with LogWriter(path) as writer:
        writer.append(MESSAGES[:3])
        last = writer.previous
    with LogWriter(path, last) as writer:
        writer.append(MESSAGES[3:])
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("at", ["short write", "write", "fsync"])
def test_a_full_disk_leaves_whole_lines_and_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path, real = tmp_path / "a", os.write
    calls: list[int] = []

    def short_write(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) % 2 == 0 or at == "write":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[: len(data) // 2])

    def no_fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with LogWriter(path) as writer:
        writer.append(MESSAGES[:2])
        before = path.read_bytes()
        if at == "fsync":
            monkeypatch.setattr(os, "fsync", no_fsync)
        else:
            monkeypatch.setattr(os, "write", short_write)
        with pytest.raises(OSError, match="No space|Input/output"):
            writer.append(MESSAGES[2:4])
        assert path.read_bytes() == before
        monkeypatch.undo()
        writer.append(MESSAGES[2:])
    assert path.read_bytes() == CONTENT


def test_a_disk_that_takes_little_at_a_time_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    with LogWriter(tmp_path / "a") as writer:
        writer.append(MESSAGES)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_torn_line_on_a_disk_that_has_become_read_only_fails_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "a", os.write

    def torn(handle: int, data: bytes) -> int:
        if len(data) < 60:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(handle, data[:30])

    def read_only(handle: int, size: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with LogWriter(path) as writer:
        writer.append(MESSAGES[:5])
        monkeypatch.setattr(os, "write", torn)
        monkeypatch.setattr(os, "ftruncate", read_only)
        with pytest.raises(OSError, match="Read-only"):
            writer.append([{"text": "y" * 50}])
        monkeypatch.undo()
    assert path.stat().st_size > len(written(BODIES[:5]))
    assert texts([path.read_bytes()]) == BODIES[:5]
    assert LogReader(path).poll() == MESSAGES[:5]


def test_a_message_that_is_not_json_writes_nothing(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "a") as writer:
        with pytest.raises(ValueError, match="JSON compliant"):
            writer.append([{"fine": 1}, {"error": float("nan")}])
        writer.append(MESSAGES)
    assert (tmp_path / "a").read_bytes() == CONTENT


# ---------------------------------------------------------------- LogReader


def test_a_reader_follows_a_growing_log_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "a"
    reader, found = LogReader(path), []
    assert reader.poll() == []  # it does not exist yet
    for offset in range(len(CONTENT)):
        with open(path, "ab") as file:
            file.write(CONTENT[offset : offset + 1])
        new = reader.poll()
        assert bool(new) == (CONTENT[offset : offset + 1] == b"\n")
        found += new
    assert found == MESSAGES and reader.num_damaged == 0
    assert reader.poll() == []


def test_a_reader_counts_damaged_lines_and_passes_over_them(tmp_path: Path) -> None:
    path = tmp_path / "a"
    lines = CONTENT.splitlines(keepends=True)
    hurt = bytearray(lines[2])
    hurt[-3] ^= 1  # in the text: the link is as it was, so only this line is lost
    path.write_bytes(b"".join([*lines[:2], bytes(hurt)]))
    reader = LogReader(path)
    assert reader.poll() == MESSAGES[:2] and reader.num_damaged == 1
    with open(path, "ab") as file:
        file.write(b"".join(lines[3:]))
    assert reader.poll() == MESSAGES[3:] and reader.num_damaged == 1


def test_a_damaged_link_costs_the_line_after_it_too(tmp_path: Path) -> None:
    hurt = bytearray(CONTENT)
    start = CONTENT.index(b"\n") + 1
    hurt[start] ^= 1
    (tmp_path / "a").write_bytes(bytes(hurt))
    reader = LogReader(tmp_path / "a")
    assert reader.poll() == [MESSAGES[0], *MESSAGES[3:]] and reader.num_damaged == 2


def test_a_reader_in_the_middle_of_a_torn_line_waits_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(CONTENT[:-10])
    reader = LogReader(path)
    assert reader.poll() == MESSAGES[:-1]
    path.write_bytes(CONTENT)
    assert reader.poll() == MESSAGES[-1:] and reader.num_damaged == 0


def test_a_reader_of_a_log_that_was_cut_back_goes_on(tmp_path: Path) -> None:
    """A writer out of space cuts its torn line off; the reader has not counted it."""
    path = tmp_path / "a"
    whole = written(BODIES[:3])
    path.write_bytes(whole + b"0123456789abcdef {torn")
    reader = LogReader(path)
    assert reader.poll() == MESSAGES[:3]
    path.write_bytes(whole)
    assert reader.poll() == []
    path.write_bytes(CONTENT)
    assert reader.poll() == MESSAGES[3:] and reader.num_damaged == 0


@given(st.lists(st.integers(0, len(CONTENT)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_what_a_reader_finds_does_not_depend_on_when_it_looks(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("log") / "a"
    reader, found = LogReader(path), []
    for end in [*sorted(cuts), len(CONTENT)]:
        path.write_bytes(CONTENT[:end])
        found += reader.poll()
    assert found == MESSAGES and json.dumps(found) == json.dumps(MESSAGES)


def test_a_log_that_has_vanished_is_noticed_once_it_cannot_be_late(tmp_path: Path) -> None:
    path = tmp_path / "done.log"
    with LogWriter(path) as writer:
        writer.append([{"say": "hello"}])
    at_once, patient = LogReader(path), LogReader(path, 3600.0)
    assert len(at_once.poll()) == len(patient.poll()) == 1
    path.unlink()
    assert at_once.poll() == patient.poll() == []
    assert at_once.vanished and not patient.vanished
