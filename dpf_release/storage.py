"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        path.mkdir()
        path.chmod(mode)
    return path


def write_text(path: Path, text: str, mode: int = PRIVATE_FILE) -> None:
    """UTF-8 text, whole or not at all."""
    with replacing(path, mode) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, tree: Any, mode: int = PRIVATE_FILE) -> None:
    """Sorted, indented JSON: the same tree gives the same bytes."""
    write_text(path, json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", mode)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
