"""Rows by number, wherever they come from: one bank, several as one, some of one.

A source of rows is anything with `ids`, `targets`, a length and `read`. Nothing else in this package numbers rows
through: what needs rows of several splits reads a `Concat`, what needs some of them a `Select`. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import ID_BYTES
from dpf_release.core.arrays import Rows


class RowSource(Protocol):
    """Rows of features with their targets and ids: a bank, or a bank seen through a poisoning function."""

    @property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes."""

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) class indices or (N, K) regression targets."""

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> NDArray[Any]:
        """Rows by number, (n, C, H, W), any float type."""


@dataclass(frozen=True, eq=False)
class Concat:
    """Several sources as one: the rows of the first, then those of the second, and so on."""

    parts: Sequence[RowSource]

    @cached_property
    def starts(self) -> Rows:
        """The number of each part's first row, (parts,)."""
        return np.cumsum([0, *map(len, self.parts)])[:-1].astype(np.int64)

    @cached_property  # noise asks for them row by row
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes."""
        return np.concatenate([part.ids for part in self.parts])

    @cached_property
    def targets(self) -> NDArray[Any]:
        """(N,) or (N, K)."""
        return np.concatenate([part.targets for part in self.parts])

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, rows: Rows) -> NDArray[Any]:
        """Rows by number, (n, C, H, W)."""
        rows = np.asarray(rows, np.int64)
        found = [(places, self.parts[number].read(mine)) for number, places, mine in self.split(rows)]
        if len(found) < 2:
            return found[0][1] if found else self.parts[0].read(rows)
        out = np.empty((len(rows), *found[0][1].shape[1:]), found[0][1].dtype)
        for places, part in found:
            out[places] = part
        return out

    def split(self, rows: Rows) -> Iterator[tuple[int, Rows, Rows]]:
        """For each part that has some of `rows`: its number, their places in `rows`, and their numbers in the part."""
        part_of = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(part_of):
            places = np.flatnonzero(part_of == number)
            yield int(number), places, rows[places] - self.starts[number]


@dataclass(frozen=True, eq=False)
class Select:
    """Some rows of a source, numbered anew."""

    source: RowSource
    rows: Rows

    @cached_property
    def ids(self) -> NDArray[np.uint8]:
        """(n, 16) bytes."""
        return self.source.ids[self.rows]

    @cached_property
    def targets(self) -> NDArray[Any]:
        """(n,) class indices or (n, K) regression targets."""
        return self.source.targets[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Rows by number, (n, C, H, W)."""
        return self.source.read(self.rows[rows])


@dataclass(frozen=True, eq=False)
class ComputedRows:
    """Rows that are computed as they are read, of targets that are known."""

    targets: NDArray[Any]  # (N,) class indices or (N, K) regression targets
    compute: Callable[[Rows], NDArray[Any]]  # row numbers → features (n, C, H, W), any float type

    @cached_property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes, the same each time: these rows are nobody's, and go nowhere."""
        return np.random.default_rng(0).integers(0, 256, (len(self), ID_BYTES), np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Rows by number, (n, C, H, W)."""
        return self.compute(rows)
