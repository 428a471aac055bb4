"""Whether a bank holds rows of another: the last check before a bank is published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank import FeatureBank
from dpf_release.progress import Progress

# Above this mean-centred cosine a public row is a private one for every purpose.
SAME_ROW_COSINE = 0.999
PROJECTED_COSINE = 0.99  # what 256 random dimensions may make of 0.999; what is above is looked at exactly
PROJECTED_DIMENSIONS = 256


def count_near_rows(public: list[FeatureBank], private: list[FeatureBank]) -> tuple[int, int]:
    """How many public rows are as good as equal to a private one, and how many public rows there are.

    Equal: mean-centred cosine above 0.999. The nearest private row is found among random projections to 256 dimensions
    (1 kB a private row in memory) and confirmed on the rows themselves; rows of the same id are compared in any case.
    """
    dimensions = int(np.prod(private[0].shape))
    matrix = np.random.default_rng().standard_normal((dimensions, PROJECTED_DIMENSIONS)).astype(np.float32)
    total = np.zeros(dimensions)
    for _, rows in _flat_batches(private):
        total += rows.sum(axis=0, dtype=np.float64)
    mean = (total / sum(map(len, private))).astype(np.float32)
    projected = np.concatenate([_unit((rows - mean) @ matrix) for _, rows in _flat_batches(private)])  # (N, 256)
    ids = np.concatenate([bank.ids for bank in private])
    row_of = {row_id.tobytes(): row for row, row_id in enumerate(ids)}
    starts = np.cumsum([0, *map(len, private)])
    count = sum(map(len, public))
    near = 0
    with Progress("Comparing with the private rows", count, "rows") as progress:
        for row_ids, rows in _flat_batches(public):
            centred = rows - mean
            own = np.array([row_of.get(row_id.tobytes(), -1) for row_id in row_ids])
            found = _same_as(centred, own, private, starts, mean)
            likeness = _unit(centred @ matrix) @ projected.T  # (n, N)
            best = np.where(likeness.max(axis=1) > PROJECTED_COSINE, likeness.argmax(axis=1), -1)
            near += int((found | _same_as(centred, best, private, starts, mean)).sum())
            progress.advance(len(rows))
    return near, count


def _same_as(
    centred: NDArray[np.float32],
    rows: NDArray[np.int64],
    private: list[FeatureBank],
    starts: NDArray[np.int64],
    mean: NDArray[np.float32],
) -> NDArray[np.bool_]:
    """Which of the public rows equal the private row numbered beside them; -1: none to compare with."""
    same = np.zeros(len(rows), np.bool_)
    for number, bank in enumerate(private):
        mine = np.flatnonzero((rows >= starts[number]) & (rows < starts[number + 1]))
        if len(mine):
            theirs = bank.read(rows[mine] - starts[number]).reshape(len(mine), -1).astype(np.float32) - mean
            same[mine] = (_unit(centred[mine]) * _unit(theirs)).sum(axis=1) > SAME_ROW_COSINE
    return same


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-12)
    return scaled


def _flat_batches(banks: list[FeatureBank]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    for bank in banks:
        for rows, features in bank.batches(256):
            yield bank.ids[rows], features.reshape(len(rows), -1).astype(np.float32)
