"""The truth that only the scorer holds: the private pictures, in pools of one class, and which row is made of which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Rows = NDArray[np.int64]
# Of some rows: pairs (position in them, row of the clean bank that is in it).
Contributors = Callable[[Rows], tuple[Rows, Rows]]
POOL = 200  # pictures among which a row's own is looked for
LEAST_POOL = 50  # below it a re-identification says nothing


@dataclass(frozen=True)
class Pool:
    """Rows of one class, and the private pictures that they are matched with.

    Attributes:
        rows: of the bank, that are asked for.
        pictures: as rows of the clean bank, which has one for each picture.
        label: class, or bin of the target.
    """

    rows: Rows
    pictures: Rows
    label: int


@dataclass(frozen=True, eq=False)
class Truth:
    """What the attack is scored against.

    Attributes:
        pools: of rows and pictures.
        read: rows of the clean bank → their pictures, (n, 3, H, W) uint8.
        bins: (N,) class, or bin of the target, of each row.
    """

    pools: tuple[Pool, ...]
    read: Callable[[Rows], Tensor]
    bins: NDArray[np.int64]

    @cached_property
    def asked(self) -> Rows:
        """All rows that are asked for, pool by pool."""
        return np.concatenate([pool.rows for pool in self.pools])

    @property
    def among(self) -> int:
        """Pictures in the smallest pool."""
        return min(len(pool.pictures) for pool in self.pools)

    def at(self, places: Rows) -> Truth:
        """With some of the rows only, matched among as many pictures as before.

        Args:
            places: of those rows in `asked`, ascending.
        """
        pools, start = [], 0
        for pool in self.pools:
            mine = places[(places >= start) & (places < start + len(pool.rows))] - start
            if len(mine):
                pools.append(replace(pool, rows=pool.rows[mine]))
            start += len(pool.rows)
        return Truth(tuple(pools), self.read, self.bins)

    def first(self, rows: int) -> tuple[Truth, Rows]:
        """With so many pools that they have about that many rows, of all classes alike; and where those rows were."""
        rank = dict.fromkeys((pool.label for pool in self.pools), 0)
        order = []
        for number, pool in enumerate(self.pools):
            order.append((rank[pool.label], number))
            rank[pool.label] += 1
        chosen: list[int] = []
        for _, number in sorted(order):
            if sum(len(self.pools[other].rows) for other in chosen) < rows:
                chosen.append(number)
        starts = np.cumsum([0, *(len(pool.rows) for pool in self.pools)])
        chosen.sort()
        places = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in chosen])
        return Truth(tuple(self.pools[number] for number in chosen), self.read, self.bins), places


@dataclass(frozen=True, eq=False)
class Suspects:
    """Pictures that an attacker holds, and which of them are in the bank.

    Attributes:
        read: numbers → (n, 3, H, W) uint8.
        labels: (n,) class, or bin of the target.
        pools: (n, M) rows of the bank among which each one's is looked for, ascending.
        own: (n,) the row of the pool that it is in; -1: it is in none.
        persons: (n,) whom it shows, as numbers; None: not known.
    """

    read: Callable[[Rows], Tensor]
    labels: NDArray[np.int64]
    pools: Rows
    own: Rows
    persons: NDArray[np.int64] | None = None

    @property
    def members(self) -> NDArray[np.bool_]:
        """Which are in the bank."""
        return self.own >= 0


def bins_of(targets: NDArray[Any], most: int = 10, least_rows: int = POOL) -> NDArray[np.int64]:
    """Classes as they are; of regression targets, quantile bins of the first, as many as have 200 rows each."""
    if targets.ndim == 1:
        return targets.astype(np.int64)
    count = int(np.clip(len(targets) // least_rows, 1, most))
    edges = np.quantile(targets[:, 0], np.linspace(0, 1, count + 1)[1:-1])
    return np.searchsorted(edges, targets[:, 0], side="right").astype(np.int64)


def bin_of(targets: NDArray[Any], edges: list[float]) -> NDArray[np.int64]:
    """Of targets that are not in the bank: their class, or their bin, where each edge is the highest value of a bin."""
    if targets.ndim == 1:
        return targets.astype(np.int64)
    return np.searchsorted(edges[:-1], targets[:, 0], side="left").astype(np.int64)


def draw_pools(bins: NDArray[np.int64], contributors: Contributors, rows: int, seed: int) -> tuple[Pool, ...]:
    """Pools of at most 200 rows, of all classes alike, about `rows` rows in all.

    A row's own pictures must be in its pool, or it could not be found. So rows that share pictures go together: of a
    function that mixes rows within groups, whole groups. Where everything hangs together, each row brings one of its
    pictures.
    """
    generator = np.random.default_rng([seed, 1])
    labels = np.unique(bins)
    each = max(1, round(rows / (POOL * len(labels))))
    pools = []
    for label in labels:
        members = generator.permutation(np.flatnonzero(bins == label))
        positions, pictures = contributors(members)
        group = _groups(positions, pictures, len(members), len(bins))
        order = np.argsort(generator.permutation(group.max() + 1)[group], kind="stable")
        size = min(POOL, len(members))
        for first in range(0, min(each, len(members) // size) * size, size):
            places = order[first : first + size]
            chosen = np.sort(members[places])
            if np.bincount(group).max() <= size:
                pools.append(Pool(chosen, chosen, int(label)))
                continue
            shuffled = generator.permutation(len(positions))
            mine = shuffled[np.isin(positions[shuffled], places)]
            _, one_each = np.unique(positions[mine], return_index=True)
            own = np.unique(pictures[mine[one_each]])
            others = generator.permutation(np.setdiff1d(members, own))[: size - len(own)]
            pools.append(Pool(chosen, np.sort(np.concatenate([own, others])), int(label)))
    return tuple(pools)


def _groups(positions: Rows, pictures: Rows, count: int, total: int) -> NDArray[np.int64]:
    """Of each of `count` rows, the number of its group: rows that share pictures, by whatever way round, are in one."""
    ones = np.ones(len(positions), np.int8)
    size = count + total  # rows, then pictures, in one graph
    graph = coo_matrix((ones, (positions, count + pictures)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, group = np.unique(labels[:count], return_inverse=True)
    return group.astype(np.int64)
