"""Digests of files that this machine has read through already: a release of 400 GB is checked once, not at each open.

A file is taken for the one that was digested while its device, inode, size and times of change are the same: the system
gives a file that is written to, replaced or moved a new time, and no ordinary program sets it back. `verify` on the
command line never asks here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dpf_release.storage import PRIVATE_FILE, PRIVATE_FOLDER, sha256_of

SETTLED_SECONDS = 2.0  # a file younger than that could change again within one tick of the file system's clock
MOST_ENTRIES = 100_000


class CheckedDigests:
    """Digests by file, kept for this user of this machine; without a place to keep them, each file is read.

    They hold no path and no name. While one process reads files, others that want them too wait for its result.
    """

    def __init__(self, known: dict[str, str]) -> None:
        self._known = known
        self.changed = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path | None = None) -> Iterator[CheckedDigests]:
        """What is known; what is learned in the block is kept at its end.

        Args:
            folder: where they are kept; `dpf-release` in the user's cache folder by default.
        """
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpf-release"
        try:
            folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            handle = os.open(folder / "digests.json", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, PRIVATE_FILE)
        except (OSError, RuntimeError):  # no home, or one that cannot be written to
            yield cls({})
            return
        with open(handle, "r+b") as file:  # noqa: PTH123, an open handle
            fcntl.flock(handle, fcntl.LOCK_EX)
            digests = cls(_parsed(file.read()))
            yield digests
            if digests.changed:
                latest = dict(list(digests._known.items())[-MOST_ENTRIES:])
                file.seek(0)
                file.truncate()
                file.write(json.dumps(latest).encode())

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a file's bytes, hexadecimal."""
        before = path.stat()
        key = f"{before.st_dev}-{before.st_ino}-{before.st_size}-{before.st_mtime_ns}-{before.st_ctime_ns}"
        if key not in self._known:
            settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_SECONDS
            digest = sha256_of(path)
            after = path.stat()
            if not settled or (after.st_mtime_ns, after.st_ctime_ns) != (before.st_mtime_ns, before.st_ctime_ns):
                return digest
            self._known[key], self.changed = digest, True
        return self._known[key]


def _parsed(text: bytes) -> dict[str, str]:
    """What an earlier run kept; nothing where it was cut off in the middle."""
    try:
        known = json.loads(text or b"{}")
    except ValueError:
        return {}
    return known if isinstance(known, dict) and all(isinstance(value, str) for value in known.values()) else {}
