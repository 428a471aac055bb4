"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpf_release.core.sizes import readable_size
from dpf_release.errors import StorageError

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
PUBLIC_FILE, PUBLIC_FOLDER = 0o644, 0o755
PARTIAL = ".partial"


@contextlib.contextmanager
def replacing(path: Path, mode: int = PRIVATE_FILE) -> Iterator[Path]:
    """A path to write to; it takes the place of `path`, on disk, when the block ends without an error.

    The partial file lies beside `path` (same file system, so the rename is atomic) and exists with `mode`
    before anything is written to it: private bytes are never readable by others, whatever the umask.
    """
    partial = path.with_name(path.name + PARTIAL)
    with writing(path):
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        try:
            partial.chmod(mode)
            yield partial
            flush_to_disk(partial)
            partial.chmod(mode)  # a library that replaces the file instead of writing to it keeps its own mode
            partial.replace(path)
            flush_to_disk(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, a read-only folder, a broken disk: told as what it is."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror or error}. Nothing half-written is left, and what was there "
            "before is as it was. Make room, or make the folder writable, and run the same command again."
        ) from error


def flush_to_disk(path: Path) -> None:
    """`fsync` of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path, mode: int = PRIVATE_FOLDER) -> Path:
    """The folder, with missing parents, each made with `mode` whatever the umask."""
    if not path.is_dir():
        make_folder(path.parent, mode)
        with writing(path):
            path.mkdir(exist_ok=True)  # another rank may have been faster
            path.chmod(mode)
    return path


def remove_folder(folder: Path) -> None:
    """Removes a folder, where it is there, with all that is in it.

    Raises:
        StorageError: something of it stays; it is named.
    """
    shutil.rmtree(folder, ignore_errors=True)  # as much as goes, not up to the first file that does not
    if folder.exists():
        left = [str(path) for path in sorted(folder.rglob("*")) if not path.is_dir()] or [str(folder)]
        raise StorageError(
            f"{len(left)} files could not be removed, and lie in the clear: {', '.join(left[:5])}"
            f"{' ...' if len(left) > 5 else ''}. Remove {folder}, and run the same command again."
        )


def refuse_small_disk(folder: Path, wanted: int) -> None:
    """Raises StorageError where the disk of a folder, which exists, has not so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StorageError(
            f"expected {readable_size(wanted)} of free space at {folder}, found {readable_size(free)}. Nothing was "
            "written. Make room, or work on another disk."
        )


def reserve(handle: int, size: int) -> None:
    """Takes disk space for an open file, which is then that long: later writes up to there find room. Or an OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)


def write_text(path: Path, text: str, mode: int = PRIVATE_FILE) -> None:
    """UTF-8 text, whole or not at all."""
    with replacing(path, mode) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def json_text(tree: Any) -> str:
    """Sorted, indented JSON: the same tree gives the same text."""
    return json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, tree: Any, mode: int = PRIVATE_FILE) -> None:
    """A tree as `json_text`, whole or not at all."""
    write_text(path, json_text(tree), mode)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return digest_of(file)


def digest_of(file: io.FileIO) -> str:
    """The SHA-256 of what an open file holds, hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_at_most(path: Path, limit: int) -> bytes:
    """The bytes of a small file that may be a stranger's.

    Raises:
        OSError: it is missing, no plain file, or larger than `limit`; a pipe is not waited for.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {readable_size(limit)}")
    return content
