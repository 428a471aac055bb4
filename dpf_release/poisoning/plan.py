"""What a function is built for, what it draws for a bank, and which rows its rows are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpf_release.core.arrays import Rows


@dataclass(frozen=True)
class FeatureSpec:
    """What a function is built for."""

    shape: tuple[int, int, int]  # (C, H, W) of a row
    non_negative: bool  # whether φ1 ends in a ReLU, so that P must too


@dataclass(frozen=True)
class Plan:
    """What one function drew for one bank, before any row was poisoned."""

    secret: bytes  # 32 bytes, what noise is keyed by
    # named numbers, persisted in the vault; empty for a row-wise function without randomness
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class Contributors(NamedTuple):
    """Which rows of a source some rows are made of, each pair once.

    A row that no pair names is made of nobody: it was drawn, and belongs to no image.
    """

    positions: Rows  # (n,) places in the rows that were asked about
    members: Rows  # (n,) numbers of the contributing rows
    pieces: Rows  # (n,) how many pieces of the row each gave; 1 where rows have no pieces

    @classmethod
    def themselves(cls, rows: Rows) -> Contributors:
        """Each row is made of itself."""
        return cls(np.arange(len(rows)), rows, np.ones(len(rows), np.int64))

    @classmethod
    def nobody(cls) -> Contributors:
        """No row is made of any."""
        none = np.empty(0, np.int64)
        return cls(none, none, none)

    def foremost(self, rows: Rows) -> Rows:
        """Of each of `rows`, the one that gave the most pieces; of equals, itself or else the first. Nobody: itself."""
        order = np.lexsort([self.members, self.members != rows[self.positions], -self.pieces, self.positions])
        named, first = np.unique(self.positions[order], return_index=True)
        found = rows.copy()
        found[named] = self.members[order[first]]
        return found
