"""One node's view of a shared folder: names, sizes, contents and listings up to so many seconds old.

    python tests/cluster/stale.py SOURCE MOUNTPOINT --seconds 60 [--seed 1]

A FUSE file system over SOURCE (which may be MOUNTPOINT itself) that keeps what it has seen as a client of a network
file system does: each name (also one that was not there), each file's attributes, each file's content and each folder's
listing from the first look at it on, for a random time of its own of at most `--seconds`. What other nodes do in the
meantime is not seen, fsynced and closed or not. What is done through this view is done at once, with its true result,
and renews what it touches: all processes of a node agree with one another. A size may be newer than the content: then
zeros are read, as on NFS behind a writer whose pages arrive out of order. A file that is gone is served while anything
of it is kept, and is ESTALE after that. The kernel's own caches are off. Needs root, `fuse3` and `mfusepy`; ends by
SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

os.environ["FUSE_LIBRARY_NAME"] = "fuse3"  # else it takes the older one, where that is installed too

import mfusepy  # noqa: E402

T = TypeVar("T")
STAT = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
TIMES = ("st_atime", "st_mtime", "st_ctime")


class Kept(Generic[T]):
    """What was seen, and until when it is shown."""

    def __init__(self) -> None:
        self.until = 0.0

    def get(self, look: Callable[[], T], seconds: float) -> T:
        if time.monotonic() >= self.until:
            self.seen = look()
            self.until = time.monotonic() + seconds
        return self.seen

    def renew(self) -> None:
        self.until = 0.0


class Node:
    """A file or folder, whatever its name; held open, so that its number is not given to another one."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.path = f"/proc/self/fd/{handle}"
        self.attributes: Kept[os.stat_result] = Kept()
        self.content: Kept[bytes] = Kept()

    def __del__(self) -> None:
        os.close(self.handle)

    def stat(self) -> os.stat_result:
        found = os.fstat(self.handle)
        if not found.st_nlink:
            raise OSError(errno.ESTALE, "gone")
        return found

    def read(self) -> bytes:
        self.stat()
        with open(self.path, "rb") as file:
            return file.read()

    def renew(self) -> None:
        self.attributes.renew()
        self.content.renew()


class View(mfusepy.Operations):
    """The file system; `root` is an open descriptor of the folder it shows."""

    use_ns = True

    def __init__(self, root: int, seconds: float, seed: int) -> None:
        self._root = f"/proc/self/fd/{root}"
        self._max_s, self._rng = seconds, random.Random(seed)
        self._names: dict[str, Kept[Node | None]] = {}
        self._listings: dict[str, Kept[set[str]]] = {}
        self._nodes: WeakValueDictionary[tuple[int, int], Node] = WeakValueDictionary()
        self._open: dict[int, Node] = {}

    # ------------------------------------------------------------ what is seen

    def _seconds(self) -> float:
        return self._rng.uniform(0, self._max_s)

    def _find(self, path: str) -> Node | None:
        """What has this name in truth."""
        try:
            handle = os.open(self._root + path, os.O_PATH | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None
        found = os.fstat(handle)
        node = self._nodes.get((found.st_dev, found.st_ino))
        if node is None:
            node = self._nodes[found.st_dev, found.st_ino] = Node(handle)
        else:
            os.close(handle)
        return node

    def _node(self, path: str) -> Node:
        """What this view believes to have this name."""
        node = self._names.setdefault(path, Kept()).get(lambda: self._find(path), self._seconds())
        if node is None:
            raise OSError(errno.ENOENT, "not there")
        return node

    def _attributes(self, node: Node) -> os.stat_result:
        return node.attributes.get(node.stat, self._seconds())

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        try:
            found = self._attributes(self._node(path) if fh is None else self._open[fh])
        except OSError as error:
            if error.errno == errno.ESTALE:
                self._names.pop(path, None)
            raise
        return {key: getattr(found, key) for key in STAT} | {key: getattr(found, key + "_ns") for key in TIMES}

    def readdir(self, path: str, fh: int) -> list[str]:
        node = self._node(path)
        seen = self._listings.setdefault(path, Kept()).get(lambda: set(os.listdir(node.path)), self._seconds())
        return [".", "..", *seen]

    def readlink(self, path: str) -> str:
        return os.readlink(self._root + path)

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._root)
        return {key: getattr(found, key) for key in dir(found) if key.startswith("f_")}

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        node = self._open[fh]
        length = self._attributes(node).st_size
        content = node.content.get(node.read, self._seconds())
        part = content[offset : min(offset + size, length)]
        return part.ljust(max(0, min(size, length - offset)), b"\0")

    # ------------------------------------------------------------ what is done

    @contextmanager
    def _changing(self, *paths: str) -> Iterator[None]:
        """Do something to names; all that was kept of them is renewed, whatever came of it."""
        try:
            yield
        finally:
            for path in paths:
                for kept in (self._names, self._listings):
                    for known in [known for known in kept if known == path or known.startswith(path + "/")]:
                        del kept[known]
                folder, _, name = path.rpartition("/")
                node = self._names.setdefault(path, Kept()).get(lambda path=path: self._find(path), self._seconds())
                if node is not None:
                    node.renew()
                if (listing := self._listings.get(folder or "/")) and listing.until:
                    (listing.seen.discard if node is None else listing.seen.add)(name)
                if above := self._find(folder or "/"):
                    above.attributes.renew()

    def _give(self, path: str) -> None:
        """To whoever asked: this process is root."""
        uid, gid, _ = mfusepy.fuse_get_context()
        os.lchown(self._root + path, uid, gid)

    def mkdir(self, path: str, mode: int) -> int:
        with self._changing(path):
            os.mkdir(self._root + path, mode)
            self._give(path)
        return 0

    def symlink(self, target: str, source: str) -> int:
        with self._changing(target):
            os.symlink(source, self._root + target)
            self._give(target)
        return 0

    def link(self, target: str, source: str) -> int:
        with self._changing(target, source):
            os.link(self._root + source, self._root + target)
        return 0

    def rename(self, old: str, new: str) -> int:
        with self._changing(old, new):
            os.rename(self._root + old, self._root + new)
        return 0

    def unlink(self, path: str) -> int:
        with self._changing(path):
            os.unlink(self._root + path)
        return 0

    def rmdir(self, path: str) -> int:
        with self._changing(path):
            os.rmdir(self._root + path)
        return 0

    def chmod(self, path: str, mode: int) -> int:
        with self._changing(path):
            os.chmod(self._root + path, mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        with self._changing(path):
            os.lchown(self._root + path, uid, gid)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        with self._changing(path):
            os.utime(self._root + path, ns=times)
        return 0

    # ------------------------------------------------------------ open files

    def _opened(self, handle: int, node: Node) -> int:
        self._open[handle] = node
        return handle

    def create(self, path: str, mode: int, flags: int) -> int:
        with self._changing(path):
            new = not os.path.lexists(self._root + path)
            handle = os.open(self._root + path, flags | os.O_CREAT, mode)
            if new:
                self._give(path)
        return self._opened(handle, self._node(path))

    def open(self, path: str, flags: int) -> int:
        node = self._node(path)
        if not flags & (os.O_WRONLY | os.O_RDWR):
            return self._opened(os.dup(node.handle), node)  # `read` looks when it must
        if not os.fstat(node.handle).st_nlink:
            self._names[path].renew()
            raise OSError(errno.ESTALE, "gone")
        return self._opened(os.open(node.path, flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)), node)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        count = os.pwrite(fh, data, offset)  # which appends, whatever the offset, where the file was opened to append
        self._open[fh].renew()
        return count

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        node = self._node(path) if fh is None else self._open[fh]
        os.truncate(node.path, length)
        node.renew()
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        with suppress(OSError):  # EBADF: opened to read
            os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        del self._open[fh]
        os.close(fh)
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description="a folder as another node saw it some seconds ago")
    parser.add_argument("source")
    parser.add_argument("mountpoint")
    parser.add_argument("--seconds", type=float, default=60.0, help="how old what is shown may be")
    parser.add_argument("--seed", type=int, default=0, help="how old each thing is")
    given = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.umask(0)
    view = View(os.open(given.source, os.O_RDONLY | os.O_DIRECTORY), given.seconds, given.seed)
    with suppress(RuntimeError):  # how it says that it was told to end
        mfusepy.FUSE(
            view, given.mountpoint, foreground=True, nothreads=True, allow_other=True, default_permissions=True,
            hard_remove=True, direct_io=True, entry_timeout=0, negative_timeout=0, attr_timeout=0,
        )  # fmt: skip


if __name__ == "__main__":
    main()
