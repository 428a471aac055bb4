"""A folder that one run at a time works in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dpf_release.core.files import PRIVATE_FILE, writing
from dpf_release.errors import StorageError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, run: str = "") -> Iterator[None]:
    """Holds a folder, which exists, for one run, until the process ends, however it ends; see `belongs_to_run`.

    Raises:
        StorageError: another process holds it, or the folder cannot be written to.
    """
    path = folder / LOCK
    with writing(path):
        handle = _lock_file(path)
    try:
        holder = {"run": run, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "argv": sys.argv[1:]}
        with writing(path):
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(holder).encode(), 0)
            os.fsync(handle)  # for the ranks of other machines to see
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock_file(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 2000).decode(errors="replace")
            os.close(handle)
            raise StorageError(
                f"another run works in {path.parent}: {holder or 'it has just begun'}. Wait for its end, or stop it."
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # whoever held it has just removed it


def belongs_to_run(folder: Path, run: str) -> bool:
    """Whether the process that holds a folder is of this run."""
    try:
        return bool(json.loads((folder / LOCK).read_text(encoding="utf-8"))["run"] == run)
    except (OSError, ValueError, KeyError):
        return False
