"""A folder that a stranger filled, looked at without being led anywhere: no link is followed, no pipe is waited for."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

# A release has some 50,000 files at most, three folders deep.
MAX_ENTRIES = 100_000
MAX_DEPTH = 16
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Tree:
    """All that is below a folder, as it was when it was looked at. The folder itself may be reached through a link.

    Attributes:
        entries: path inside the folder → what the system says of it; of a link itself, not of what it points to.
        unseen: path → why it was not looked into; `.` where there are too many files and folders.
    """

    def __init__(self, root: int) -> None:
        self.entries: dict[str, os.stat_result] = {}
        self.unseen: dict[str, str] = {}
        self._root = root
        self._latest = "", root
        self._way = contextlib.ExitStack()  # the folders that lead to the latest one
        self._walk(root, "", 1)

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Tree]:
        """Looks at everything below a folder; its files can be opened until the block ends.

        Raises:
            OSError: it is no folder, or cannot be read.
        """
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            tree = cls(root)
            with tree._way:
                yield tree
        finally:
            os.close(root)

    def _walk(self, folder: int, prefix: str, depth: int) -> None:
        with os.scandir(folder) as listing:
            names = sorted(entry.name for entry in itertools.islice(listing, MAX_ENTRIES + 1))
        for name in names:
            if len(self.entries) >= MAX_ENTRIES:
                self.unseen["."] = f"more than {MAX_ENTRIES} files and folders: the rest was not looked at"
                return
            try:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:  # gone since it was listed
                continue
            path = prefix + name
            self.entries[path] = status
            if not stat.S_ISDIR(status.st_mode):
                continue
            if depth == MAX_DEPTH:
                self.unseen[path] = f"more than {MAX_DEPTH} folders in each other: not looked into"
                continue
            try:
                inner = os.open(name, _FOLDER, dir_fd=folder)
            except OSError as error:
                self.unseen[path] = f"cannot be looked into: {error.strerror}"
                continue
            try:
                self._walk(inner, f"{path}/", depth + 1)
            finally:
                os.close(inner)

    @contextlib.contextmanager
    def file(self, path: str) -> Iterator[io.FileIO]:
        """A regular file of `entries`, open for reading; every folder on the way is one, not a link.

        Raises:
            OSError: it cannot be read, is another one than when it was looked at, or was written to in the block.
        """
        folder, _, name = path.rpartition("/")
        with open_plain(name, self._folder(folder)) as file:
            _refuse_another(file, self.entries[path])
            yield file
            _refuse_another(file, self.entries[path])

    def _folder(self, path: str) -> int:
        """A folder, open; the latest one stays so, as the files of a folder are asked for one after the other."""
        if path != self._latest[0]:
            self._latest = "", self._root
            self._way.close()
            folder = self._root
            for name in filter(None, path.split("/")):
                folder = os.open(name, _FOLDER, dir_fd=folder)
                self._way.callback(os.close, folder)
            self._latest = path, folder
        return self._latest[1]


def open_plain(path: str | Path, parent: int | None = None) -> io.FileIO:
    """A regular file, open for reading; the path begins at `parent`, an open folder, or at the working one.

    Raises:
        OSError: it cannot be read, or is itself a link, folder, pipe or device; none is waited for.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = io.FileIO(path, "r", opener=lambda name, _: os.open(name, flags, dir_fd=parent))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _refuse_another(file: io.FileIO, then: os.stat_result) -> None:
    if identity(os.fstat(file.fileno())) != identity(then):
        raise OSError(errno.ESTALE, "exchanged or written to while it was checked")


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What stays the same while a file is the same and nothing is written to it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
