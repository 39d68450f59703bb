"""Sealed HDF5 files: finished children as columns, written once, never changed.

Decides: the layout of the population on disk: columns of length n; texts are packed bytes with n + 1 offsets.
A file is written aside, flushed, fsynced and renamed; its SHA-256 stands in the record, and it can be rebuilt from the
journals at any time. Other programs should open it with `locking=False`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from lemonade_hpc import files

SCHEMA = 1
"""Version of the layout. A reader refuses a newer one."""

NO_PARENT = -1


class StoreError(ValueError):
    """A file cannot be used: says which and why."""


@dataclass(frozen=True)
class Sealed:
    """What a sealed file holds: one dict a child (its asked form, with `outcome`), and the file's attributes."""

    children: list[dict[str, Any]]
    attributes: dict[str, Any]


def encode(children: Sequence[dict[str, Any]], attributes: dict[str, Any]) -> bytes:
    """The bytes of a sealed file; `attributes` name the run, versions, and the `cheap` and `expensive` objectives."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=("v110", "v110")) as file:
        file.attrs.update({"schema": SCHEMA, **{key: json.dumps(value) for key, value in attributes.items()}})
        group = file.create_group("children")
        for name in ("number", "generation", "depth"):
            group[name] = np.array([child[name] for child in children], dtype=np.int64)
        group["parent"] = np.array(
            [NO_PARENT if child["parent"] is None else child["parent"] for child in children], dtype=np.int64
        )
        group["failed"] = np.array(["failure" in child["outcome"] for child in children], dtype=bool)
        group["wall_s"] = np.array([child["outcome"].get("wall_s", np.nan) for child in children])
        for k, name in enumerate(attributes["cheap"]):
            group[name] = np.array([child["cheap"][k] for child in children], dtype=np.float64)
        for name in attributes["expensive"]:
            values = [child["outcome"].get("objectives", {}).get(name, np.nan) for child in children]
            group[name] = np.array(values, dtype=np.float64)
        group["digest"] = np.array([child["digest"].encode() for child in children], dtype="S32")
        for name in ("graph", "edits", "outcome"):
            _pack(group, name, (files.dumps(child[name]) for child in children))
    return buffer.getvalue()


def decode(content: bytes, name: str) -> Sealed:
    """The inverse of `encode`; raises StoreError naming the file for damage or a newer schema."""
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            if file.attrs["schema"] > SCHEMA:
                raise StoreError(f"{name}: schema {file.attrs['schema']}, this version reads up to {SCHEMA}")
            attributes = {key: json.loads(value) for key, value in file.attrs.items() if key != "schema"}
            return Sealed(list(_rows(file["children"], attributes)), attributes)
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{name}: not a readable sealed file: {error}") from error


def read(path: Path, sha256: str) -> Sealed:
    """Read a sealed file and check it against its checksum; raises StoreError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if files.sha256(content) != sha256:
        raise StoreError(f"{path}: its SHA-256 is not the one in the record")
    return decode(content, str(path))


def _rows(group: Any, attributes: dict[str, Any]) -> Iterable[dict[str, Any]]:
    texts = {name: _unpack(group, name) for name in ("graph", "edits", "outcome")}
    numbers = {name: group[name][:].tolist() for name in ("number", "parent", "generation", "depth")}
    cheap = np.stack([group[name][:] for name in attributes["cheap"]], axis=1).tolist()
    digests = [value.decode() for value in group["digest"][:]]
    for k in range(len(digests)):
        row: dict[str, Any] = {name: values[k] for name, values in numbers.items()}
        row["parent"] = None if row["parent"] == NO_PARENT else row["parent"]
        row |= {name: json.loads(values[k]) for name, values in texts.items()}
        yield row | {"cheap": cheap[k], "digest": digests[k]}


def _pack(group: Any, name: str, texts: Iterable[str]) -> None:
    parts = [text.encode() for text in texts]
    group[f"{name}_bytes"] = np.frombuffer(b"".join(parts), dtype=np.uint8)
    group[f"{name}_offsets"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)


def _unpack(group: Any, name: str) -> list[str]:
    content, offsets = group[f"{name}_bytes"][:].tobytes(), group[f"{name}_offsets"][:]
    return [content[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
