"""Which rows of a bank are as good as equal to rows of another: what a public bank must not have of φ1(S)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank import FeatureBank, SplitName
from dpf_release.progress import Progress

# Above this mean-centred cosine a public row is a private one for every purpose.
SAME_ROW_COSINE = 0.999
# 256 random signs estimate a cosine of 0.999 with a standard deviation of 0.002 / sqrt(256) = 0.000125: eight of them
# below it lies what is looked at exactly.
PROJECTED_DIMENSIONS, PROJECTED_COSINE = 256, 0.998
# Candidates of one public row that are looked at, the likest first. A thousand rows liker than one that is as good as
# equal are as good as equal themselves.
MOST_CANDIDATES = 1000
BATCH_VALUES = 2**23  # of float32, that several arrays have: 32 MB each, however large a row
BLOCK = 2**14  # private rows, and dimensions of a row, that are multiplied at once

Rows = NDArray[np.int64]
Contributors = Callable[[SplitName, Rows], tuple[Rows, Rows]]


def find_near_rows(
    public: Sequence[FeatureBank], private: Sequence[FeatureBank], contributors: Contributors | None = None
) -> list[Rows]:
    """The rows of each public bank that are as good as equal to a private row: mean-centred cosine above 0.999.

    Compared exactly with the private row of the same id and with those that contributed to it, with all others through
    a random projection to 256 dimensions, whose candidates are confirmed exactly. Memory: 1 kB a private row, 256 bytes
    a value of a row, and a few blocks.

    Args:
        public: banks that are to be published.
        private: splits of φ1(S).
        contributors: from rows of a private split to pairs (position in them, row of that split that is in it).

    Returns:
        For each public bank the row numbers, ascending.
    """
    known = _PrivateRows(private)
    near = []
    with Progress("Comparing with the private rows", sum(map(len, public)), "rows") as progress:
        for bank in public:
            found = []
            for rows, features in known.batches(bank):
                found.append(rows[known.has(bank.ids[rows], features, contributors)])
                progress.advance(len(rows))
            near.append(np.concatenate([np.empty(0, np.int64), *found]))
    return near


class _PrivateRows:
    """Banks of φ1(S), numbered through, with their mean and their projections."""

    def __init__(self, banks: Sequence[FeatureBank]) -> None:
        self.banks = banks
        self.starts = np.cumsum([0, *map(len, banks)])
        self.dimensions = int(np.prod(banks[0].shape))
        ids = np.concatenate([bank.ids for bank in banks])
        self.row_of = {row_id.tobytes(): row for row, row_id in enumerate(ids)}
        self.mean = self._mean()  # (D,)
        signs = np.random.default_rng().integers(0, 2, (self.dimensions, PROJECTED_DIMENSIONS), np.int8)
        self.signs = 2 * signs - 1
        self.projected = np.empty((len(ids), PROJECTED_DIMENSIONS), np.float32)
        for start, bank in zip(self.starts, banks, strict=False):
            for rows, features in self.batches(bank):
                self.projected[start + rows] = self._project(self._centred(features))

    def batches(self, bank: FeatureBank) -> Iterator[tuple[Rows, NDArray[np.float16]]]:
        """All rows of a bank, so many at a time that their values stay few."""
        return bank.batches(self.batch)

    @property
    def batch(self) -> int:
        return max(1, min(256, BATCH_VALUES // self.dimensions))

    def has(
        self, ids: NDArray[np.uint8], features: NDArray[np.float16], contributors: Contributors | None
    ) -> NDArray[np.bool_]:
        """Which of the public rows are as good as equal to a private one."""
        centred = self._centred(features)
        own = np.array([self.row_of.get(row_id.tobytes(), -1) for row_id in ids], np.int64)
        known = np.flatnonzero(own >= 0)
        near = self._confirm(centred, known, own[known], np.zeros(len(ids), np.bool_))
        if contributors is not None:
            for number, bank in enumerate(self.banks):
                mine = np.flatnonzero((own >= self.starts[number]) & (own < self.starts[number + 1]))
                if len(mine):
                    at, members = contributors(bank.split, own[mine] - self.starts[number])
                    near = self._confirm(centred, mine[at], members + self.starts[number], near)
        return self._confirm(centred, *self._candidates(self._project(centred)), near)

    def _mean(self) -> NDArray[np.float32]:
        total = np.zeros(self.dimensions)
        for bank in self.banks:
            for _, features in self.batches(bank):
                total += features.reshape(len(features), self.dimensions).sum(axis=0, dtype=np.float64)
        mean: NDArray[np.float32] = (total / max(1, self.starts[-1])).astype(np.float32)
        return mean

    def _centred(self, features: NDArray[np.float16]) -> NDArray[np.float32]:
        """Unit vectors, (n, D); of a row that is the mean, zero."""
        rows = features.reshape(len(features), self.dimensions).astype(np.float32) - self.mean
        return _unit(rows)

    def _project(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit vectors of 256 dimensions, (n, 256)."""
        out = np.zeros((len(rows), PROJECTED_DIMENSIONS), np.float32)
        for start in range(0, self.dimensions, BLOCK):
            out += rows[:, start : start + BLOCK] @ self.signs[start : start + BLOCK].astype(np.float32)
        return _unit(out)

    def _candidates(self, projected: NDArray[np.float32]) -> tuple[Rows, Rows]:
        """Pairs (public row, private row) whose projections are alike; of each public row the likest."""
        at, rows, likeness = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        for start in range(0, len(self.projected), BLOCK):
            block = projected @ self.projected[start : start + BLOCK].T  # (n, block)
            more_at, more_rows = np.nonzero(block > PROJECTED_COSINE)
            at, rows = np.concatenate([at, more_at]), np.concatenate([rows, more_rows + start])
            likeness = np.concatenate([likeness, block[more_at, more_rows]])
            order = np.lexsort((-likeness, at))
            rank = np.arange(len(at)) - np.searchsorted(at[order], at[order])
            kept = order[rank < MOST_CANDIDATES]
            at, rows, likeness = at[kept], rows[kept], likeness[kept]
        return at, rows

    def _confirm(
        self, centred: NDArray[np.float32], at: Rows, rows: Rows, near: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """`near`, and those public rows that one of the private rows beside them is as good as equal to."""
        order = np.argsort(rows, kind="stable")  # neighbours are read together
        for start in range(0, len(order), self.batch):
            pairs = order[start : start + self.batch]
            pairs = pairs[~near[at[pairs]]]
            members, where = np.unique(rows[pairs], return_inverse=True)
            theirs = self._centred(self._read(members))[where]  # (pairs, D)
            cosine = np.einsum("nd,nd->n", centred[at[pairs]], theirs)
            near[at[pairs[cosine > SAME_ROW_COSINE]]] = True
        return near

    def _read(self, rows: Rows) -> NDArray[np.float16]:
        features = np.empty((len(rows), *self.banks[0].shape), np.float16)
        for number, bank in enumerate(self.banks):
            mine = (rows >= self.starts[number]) & (rows < self.starts[number + 1])
            if mine.any():
                features[mine] = bank.read(rows[mine] - self.starts[number])
        return features


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12)
    return scaled
