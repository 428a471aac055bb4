"""Which rows of a bank are as good as equal to rows of another: what a public bank must not have of φ1(S)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import Concat
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import Progress

# Above this mean-centred |cosine| a public row is a private one for every purpose.
SAME_ROW_COSINE = 0.999
# 256 random signs estimate a cosine of 0.999 with a standard deviation of 0.002 / sqrt(256) = 0.000125: eight of them
# below it lies what is looked at exactly.
PROJECTED_DIMENSIONS, PROJECTED_COSINE = 256, 0.998
# Of one public row, the likest. A thousand rows liker than one that is as good as equal are so themselves.
MOST_CANDIDATES = 1000
BATCH_VALUES = 2**23  # of float32, that several arrays have: 32 MB each, however large a row
BLOCK = 2**14  # private rows, and dimensions of a row, that are multiplied at once
Centre = tuple[NDArray[np.float32], NDArray[np.float32]]  # what public, and private, rows are less, (D,) each
Contributors = Callable[[SplitName, Rows], tuple[Rows, Rows]]


def find_near_rows(
    public: Sequence[FeatureBank], private: Sequence[FeatureBank], contributors: Contributors | None = None
) -> list[Rows]:
    """The rows of each public bank that are as good as equal to a private row: mean-centred |cosine| above 0.999.

    Both are centred by the mean of all private rows, which finds a row among others; and each by its own side's mean
    (of the public bank, of the private rows of its ids), which finds a bank whose rows are a·x + b.

    Compared exactly with the private row of the same id and with those that contributed to it, with all others through
    a random projection to 256 dimensions, whose candidates are confirmed exactly. Memory: 1 kB a private row, 256 bytes
    a value of a row, and a few blocks.

    Args:
        public: banks that are to be published; of each the numbers of such rows come back, ascending.
        private: splits of φ1(S).
        contributors: from rows of a private split to pairs (position in them, row of that split that is in it).
    """
    known = _PrivateRows(private)
    near = []
    with Progress("Comparing with the private rows", sum(map(len, public)), "rows") as progress:
        for bank in public:
            centres, found = known.centres(bank), []
            for rows, features in bank.batches(known.batch):
                found.append(rows[known.has(bank.ids[rows], features, centres, contributors)])
                progress.advance(len(rows))
            near.append(np.concatenate([np.empty(0, np.int64), *found]))
    return near


class _PrivateRows:
    """Rows of φ1(S), with their mean and their projections."""

    def __init__(self, banks: Sequence[FeatureBank]) -> None:
        self.banks = banks
        self.rows = Concat(banks)
        self.dimensions = int(np.prod(banks[0].shape))
        self.batch = max(1, min(256, BATCH_VALUES // self.dimensions))
        self.row_of = {row_id.tobytes(): row for row, row_id in enumerate(self.rows.ids)}
        self.mean = self._mean(features for bank in banks for _, features in bank.batches(self.batch))
        signs = np.random.default_rng().integers(0, 2, (self.dimensions, PROJECTED_DIMENSIONS), np.int8)
        self.signs = 2 * signs - 1
        self.projected = np.empty((len(self.rows), PROJECTED_DIMENSIONS), np.float32)  # of the rows less their mean
        for start, bank in zip(self.rows.starts, banks, strict=True):
            for rows, features in bank.batches(self.batch):
                self.projected[start + rows] = self._project(self._flat(features) - self.mean)

    def centres(self, bank: FeatureBank) -> list[Centre]:
        """By what the rows of a public bank, and the private ones, are centred."""
        own = np.sort(self._own(bank.ids))
        own = own[own >= 0]
        theirs = self._mean(self.rows.read(own[at : at + self.batch]) for at in range(0, len(own), self.batch))
        public = self._mean(features for _, features in bank.batches(self.batch))
        return [(self.mean, self.mean), (public, theirs if len(own) else self.mean)]

    def has(
        self, ids: NDArray[np.uint8], features: NDArray[np.float16], centres: Sequence[Centre], mix: Contributors | None
    ) -> NDArray[np.bool_]:
        """Which of the public rows are as good as equal to a private one; `mix` says which rows contributed to one."""
        own = self._own(ids)
        known = np.flatnonzero(own >= 0)
        pairs = [(known, own[known])]  # positions of public rows, and the private rows to compare each with
        if mix is not None:
            for number, places, mine in self.rows.split(own[known]):
                at, members = mix(self.banks[number].split, mine)
                pairs.append((known[places][at], members + self.rows.starts[number]))
        rows = self._flat(features)
        pairs += [self._candidates(self._project(rows - public), private) for public, private in centres]
        near = np.zeros(len(ids), np.bool_)
        for at, members in pairs:
            self._confirm(rows, at, members, centres, near)
        return near

    def _own(self, ids: NDArray[np.uint8]) -> Rows:
        return np.array([self.row_of.get(row_id.tobytes(), -1) for row_id in ids], np.int64)

    def _mean(self, batches: Iterable[NDArray[np.float16]]) -> NDArray[np.float32]:
        total, count = np.zeros(self.dimensions), 0
        for features in batches:
            total += features.reshape(len(features), self.dimensions).sum(axis=0, dtype=np.float64)
            count += len(features)
        mean: NDArray[np.float32] = (total / max(1, count)).astype(np.float32)
        return mean

    def _flat(self, features: NDArray[np.float16]) -> NDArray[np.float32]:
        return features.reshape(len(features), self.dimensions).astype(np.float32)  # (n, D)

    def _project(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of rows (n, D), (n, 256); linear."""
        out = np.zeros((len(rows), PROJECTED_DIMENSIONS), np.float32)
        for start in range(0, self.dimensions, BLOCK):
            out += rows[:, start : start + BLOCK] @ self.signs[start : start + BLOCK].astype(np.float32)
        return out

    def _candidates(self, projected: NDArray[np.float32], centre: NDArray[np.float32]) -> tuple[Rows, Rows]:
        """Pairs (public row, private row) whose projections are alike; of each public row the likest."""
        projected = _unit(projected)
        shift = self._project((self.mean - centre)[None])  # (1, 256)
        at, rows, likeness = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        for start in range(0, len(self.projected), BLOCK):
            block = np.abs(projected @ _unit(self.projected[start : start + BLOCK] + shift).T)  # (n, block)
            more_at, more_rows = np.nonzero(block > PROJECTED_COSINE)
            at, rows = np.concatenate([at, more_at]), np.concatenate([rows, more_rows + start])
            likeness = np.concatenate([likeness, block[more_at, more_rows]])
            order = np.lexsort((-likeness, at))
            rank = np.arange(len(at)) - np.searchsorted(at[order], at[order])
            kept = order[rank < MOST_CANDIDATES]
            at, rows, likeness = at[kept], rows[kept], likeness[kept]
        return at, rows

    def _confirm(
        self, public: NDArray[np.float32], at: Rows, rows: Rows, centres: Sequence[Centre], near: NDArray[np.bool_]
    ) -> None:
        """Marks in `near` those public rows that one of the private rows beside them is as good as equal to."""
        order = np.argsort(rows, kind="stable")  # neighbours are read together
        for start in range(0, len(order), self.batch):
            pairs = order[start : start + self.batch]
            pairs = pairs[~near[at[pairs]]]
            members, where = np.unique(rows[pairs], return_inverse=True)
            private = self._flat(self.rows.read(members))
            for of_public, of_private in centres:
                ours, theirs = _unit(public[at[pairs]] - of_public), _unit(private - of_private)
                cosine = np.abs(np.einsum("nd,nd->n", ours, theirs[where]))
                near[at[pairs[cosine > SAME_ROW_COSINE]]] = True


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12)
    return scaled
