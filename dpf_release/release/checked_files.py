"""Digests of files that this machine has read through already: a release of 400 GB is checked once, not at each open.

A file is taken for the one that was digested while its device, inode, size and times of change are the same: the system
gives a file that is written to, replaced or moved a new time, and no ordinary program sets it back. `verify` on the
command line never asks here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from dpf_release.core.files import PRIVATE_FILE, PRIVATE_FOLDER, digest_of
from dpf_release.release.tree import identity

Found = TypeVar("Found")
SETTLED_SECONDS = 2.0  # a file younger than that could change again within one tick of the file system's clock


class CheckedDigests:
    """Digests by file, kept for this user of this machine; without a place to keep them, each file is read.

    They hold no path and no name. While one process reads a folder's files, others that want them wait for its result.
    """

    def __init__(self, known: dict[str, str]) -> None:
        self._known = known
        self.changed = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, about: Path) -> Iterator[CheckedDigests]:
        """What is known of the files below a folder; what is learned in the block is kept at its end."""
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(_memory_of(about))
            except (OSError, RuntimeError):  # no home, one that cannot be written to or locked, or another user's file
                yield cls({})
                return
            try:
                known = TypeAdapter(dict[str, str]).validate_json(file.read() or b"{}")
            except ValueError:  # an earlier run was cut off in the middle of it
                known = {}
            digests = cls(known)
            yield digests
            if digests.changed:
                with contextlib.suppress(OSError):  # then they are read again next time
                    file.seek(0)
                    file.truncate()
                    file.write(json.dumps(digests._known).encode())

    def sha256(self, file: io.FileIO) -> str:
        """The SHA-256 of an open file's bytes, hexadecimal."""
        before = os.fstat(file.fileno())
        key = _state(before)
        if key not in self._known:
            settled = _is_settled(before)
            digest = digest_of(file)
            if not settled or _state(os.fstat(file.fileno())) != key:
                return digest
            self._known[key], self.changed = digest, True
        return self._known[key]

    def once(self, check: str, paths: Sequence[Path], run: Callable[[], list[Found]]) -> list[Found]:
        """What a check finds in the files that it looks at; not run again where it found nothing in the same files."""
        before = [path.stat() for path in paths]
        states = list(map(_state, before))
        key = str(int(hashlib.sha256("\n".join([check, *states]).encode()).hexdigest(), 16))
        if key in self._known:
            return []
        found = run()
        if not found and all(map(_is_settled, before)) and states == [_state(path.stat()) for path in paths]:
            self._known[key], self.changed = check, True
        return found


def _state(status: os.stat_result) -> str:
    return "-".join(map(str, identity(status)))


def _is_settled(status: os.stat_result) -> bool:
    return time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS


@contextlib.contextmanager
def _memory_of(folder: Path) -> Iterator[io.FileIO]:
    """The file that remembers a folder's digests, locked; its name tells nothing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpf-release"
    cache.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    handle = os.open(cache / f"{name}.json", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, PRIVATE_FILE)
    with io.FileIO(handle, "r+") as file:
        owner = os.fstat(handle)
        if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
            raise PermissionError(f"{name} is another user's")
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield file
