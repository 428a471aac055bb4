"""Image data sets: which files there are, with which targets, in which splits.

Every file that a source names is a row of its `ImageTable`, whether it can be decoded or not: that is found
out, and reported, by `images.survey`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dpf_release.bank.format import SPLITS
from dpf_release.errors import ImageError

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, eq=False)
class ImageTable:
    """The images of a data set, one row a file."""

    root: Path  # folder that `paths` are relative to
    paths: tuple[str, ...]  # (N,) posix paths of the files, each once
    targets: np.ndarray  # (N,) int64 class indices, or (N, K) float32 for regression
    classes: tuple[str, ...]  # names by index; empty for regression and unlabelled images
    target_names: tuple[str, ...]  # (K,) names of the regression targets; empty otherwise
    splits: np.ndarray  # (N,) of `train`, `val`, `test`
    attributes: dict[str, tuple[str, ...]]  # further columns of a CSV table, (N,) texts each

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int] | np.ndarray) -> ImageTable:
        """Returns the table of these rows, in this order; `classes` stay, so indices keep their meaning."""
        rows = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            targets=self.targets[rows],
            splits=self.splits[rows],
            attributes={name: tuple(cells[row] for row in rows) for name, cells in self.attributes.items()},
        )

    def rows_of(self, split: str) -> np.ndarray:
        """Returns the rows of a split, (n,) int64, ascending."""
        return np.flatnonzero(self.splits == split)

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each split."""
        return {split: len(self.rows_of(split)) for split in SPLITS}

    def digest(self) -> str:
        """Returns a SHA-256 that changes with any path, target, split, attribute, file size or file time.

        The order of the rows does not matter. A file that is not there counts with size -1.
        """
        digest = hashlib.sha256(json.dumps([self.classes, self.target_names]).encode())
        for row in sorted(range(len(self)), key=self.paths.__getitem__):
            try:
                status = (self.root / self.paths[row]).stat()
                file = [status.st_size, status.st_mtime_ns]
            except (OSError, ValueError):  # ValueError: a NUL byte in a name
                file = [-1, -1]
            cells = {name: column[row] for name, column in self.attributes.items()}
            record = [self.paths[row], self.targets[row].tolist(), str(self.splits[row]), cells, file]
            digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def require_classes(source: Path, wanted: Sequence[str], found: set[str]) -> None:
    """Raises ImageError where a wanted class is named twice, or has no image."""
    if len(set(wanted)) < len(wanted):
        raise ImageError(f"{source}: expected each class once, found one twice in {first_of(wanted)}.")
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ImageError(
            f"{source}: expected images of class {first_of(unknown)}, found "
            f"{first_of(sorted(found)) if found else 'no such class'}. Correct the names under `classes`."
        )


def first_of(names: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
