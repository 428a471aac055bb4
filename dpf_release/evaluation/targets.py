"""What is attacked: a bank, as the candidate that lies on disk; and the truth that only the scorer holds.

That is the private pictures, in pools of one class, and which row is made of which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from dpf_release.attacks.threat_models import HeldRows
from dpf_release.attacks.toolkit.poisoned_public import Poison
from dpf_release.attacks.toolkit.shadows import poison_with
from dpf_release.bank.format import RELEASED_SPLITS
from dpf_release.bank.rows import Concat, RowSource
from dpf_release.core.arrays import Rows
from dpf_release.errors import NotGrantedError
from dpf_release.owner.workbench import Candidate, Workbench
from dpf_release.poisoning.chain import Chain
from dpf_release.poisoning.groups import Groups
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.plan import Contributors, Plan

MadeOf = Callable[[Rows], Contributors]  # rows of a bank → rows of the clean bank that are in each
POOL = 200  # pictures among which a row's own is looked for
LEAST_POOL = 50  # below it a re-identification says nothing


def _no_second() -> tuple[HeldRows, str]:
    raise NotGrantedError("this bank was released under one function only")


@dataclass(frozen=True, eq=False)
class Target:
    """One bank, and what only the harness knows of it. Its rows are numbered through the released splits."""

    name: str  # of the function
    rows: HeldRows
    poison: Poison  # P on another bank
    contributors: MadeOf
    subject: str  # what the bank is, for what is kept of it
    classifier: nn.Module | None = None  # in the place of φ2, where a network is planted
    queries: QueryTruth | None = None  # the pictures that an attacker holds, where they belong to a planted network
    function: str = ""  # of what kind P is, as its name with its parameters; empty: of none that has a name
    draws_rows: bool = False  # whether its rows belong to no image
    learned: Mapping[str, Tensor] = field(default_factory=dict)  # what a function that draws rows learned
    groups: int = 0  # of a class at the most, from whose statistics rows are drawn; 0: rows have no such groups
    # of such a row, all images of its group: to name any of them is to name it; None: `contributors`
    of_group: MadeOf | None = None
    bound_mu: float | None = None  # of the bound that it has on what its rows tell of a unit; None: it has none
    # rows of the clean bank, that drawn rows are asked about; None: all of `train`
    drawn_of: Rows | None = None
    # whether, where it is planted, an attack has power on it by AUC alone: it tells a little of all members
    by_auc: bool = False
    learned_secret: bool = True  # whether more than P's draws is secret; else whoever knows its name can do the same
    # The same pictures under another function, as they are released too, and a digest of that bank.
    second: Callable[[], tuple[HeldRows, str]] = _no_second

    @property
    def shown(self) -> MadeOf:
        """The pictures of which a reconstruction of a row may show any."""
        return self.of_group or self.contributors

    def foremost(self, rows: Rows) -> Rows:
        """The clean row that each of `rows` has the most of."""
        return self.contributors(rows).foremost(rows)


def made_of(bank: Concat, chain: Chain, plans: Sequence[Sequence[Plan]]) -> MadeOf:
    """Which clean rows each row is made of, where every part of a bank has plans of its own."""

    def contributors(rows: Rows) -> Contributors:
        found = [Contributors.nobody()]
        for part, places, mine in bank.split(rows):
            made = chain.contributors(mine, plans[part])
            found.append(Contributors(places[made.positions], made.members + bank.starts[part], made.pieces))
        return Contributors(*(np.concatenate(column) for column in zip(*found, strict=True)))

    return contributors


def held(source: RowSource) -> HeldRows:
    """A source as an attacker may hold it: rows, and no way to what they were made of."""
    return HeldRows(source.targets, lambda rows: np.asarray(source.read(rows)))


def candidate_target(workbench: Workbench, candidate: Candidate) -> Target:
    """A candidate, as it lies on disk."""
    function, subject = candidate.function, candidate.index_sha256
    chain, plans = function.chain, [function.plans[split] for split in RELEASED_SPLITS]
    mechanism = chain.mechanism("person" if workbench.group else "image")

    def second() -> tuple[HeldRows, str]:
        rows, index_sha256 = candidate.second()
        return held(rows), index_sha256

    return Target(
        candidate.name,
        held(candidate.rows),
        poison_with(chain, workbench.phi_2, subject),
        made_of(candidate.rows, chain, plans),
        subject,
        function=chain.spec,
        draws_rows=chain.draws_rows,
        learned=chain.state() if chain.draws_rows else {},
        groups=groups_of(chain),
        of_group=images_of_groups(candidate.rows, chain, plans) if groups_of(chain) > 1 else None,
        bound_mu=mechanism.mu if mechanism else None,
        learned_secret=chain.learned_secret,
        second=second,
    )


def groups_of(chain: Chain) -> int:
    """How many groups of a class there are at the most, from whose statistics rows are drawn; 0: it does not say."""
    groups = _groups_in(chain)
    return 0 if groups is None else int(np.bincount(groups.label).max())


def _groups_in(chain: Chain) -> Groups | None:
    stage = chain.stages[0]
    return stage.statistics if isinstance(stage, Mixture) and isinstance(stage.statistics, Groups) else None


def images_of_groups(bank: Concat, chain: Chain, plans: Sequence[Sequence[Plan]]) -> MadeOf:
    """Which images of `train` are in the group that each of its rows was drawn from; of rows of `val`, none."""
    groups = _groups_in(chain)
    assert groups is not None

    def images(rows: Rows) -> Contributors:
        found = [Contributors.nobody()]
        for part, places, mine in bank.split(rows):
            if part == 0:
                drawn_from = plans[part][0].arrays["group"][mine]
                of_group = {of: np.flatnonzero(groups.group == of) for of in np.unique(drawn_from)}
                there = [of_group[of] for of in drawn_from]
                sizes = np.array(list(map(len, there)), np.int64)
                members = np.concatenate(there)
                found.append(Contributors(np.repeat(places, sizes), members, np.ones(len(members), np.int64)))
        return Contributors(*(np.concatenate(column) for column in zip(*found, strict=True)))

    return images


# --------------------------------------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Pool:
    """Rows of one class that are asked for, and the private pictures that they are matched with."""

    rows: Rows
    pictures: Rows  # as rows of the clean bank, which has one for each picture
    label: int  # class, or bin of the target
    clean: Rows | None = None  # of drawn rows, the clean row that stands for each; None: the row itself


@dataclass(frozen=True, eq=False)
class Truth:
    """What the attack is scored against."""

    pools: tuple[Pool, ...]
    read: Callable[[Rows], Tensor]  # rows of the clean bank → their pictures, (n, 3, H, W) uint8
    bins: NDArray[np.int64]  # (N,) class, or bin of the target, of each row
    clean_bins: NDArray[np.int64] | None = None  # of each row of the clean bank, where rows are drawn; None: as `bins`

    @property
    def picture_bins(self) -> NDArray[np.int64]:
        """(N,) class, or bin, of each row of the clean bank, which has one for each picture."""
        return self.bins if self.clean_bins is None else self.clean_bins

    @cached_property
    def asked(self) -> Rows:
        """All rows that are asked for, pool by pool."""
        return np.concatenate([pool.rows for pool in self.pools])

    @property
    def among(self) -> int:
        """Pictures in the smallest pool that is large enough for a match to say something, where one is."""
        enough = self.sizes[self.sizes >= LEAST_POOL]
        return int((enough if len(enough) else self.sizes).min())

    @cached_property
    def sizes(self) -> Rows:
        """Of each asked row, among how many pictures its own is looked for."""
        return np.repeat([len(pool.pictures) for pool in self.pools], [len(pool.rows) for pool in self.pools])

    def at(self, places: Rows) -> Truth:
        """With some rows only, by their places in `asked`, ascending; matched among as many pictures as before."""
        pools, start = [], 0
        for pool in self.pools:
            mine = places[(places >= start) & (places < start + len(pool.rows))] - start
            if len(mine):
                clean = None if pool.clean is None else pool.clean[mine]
                pools.append(replace(pool, rows=pool.rows[mine], clean=clean))
            start += len(pool.rows)
        return replace(self, pools=tuple(pools))

    @cached_property
    def of_clean(self) -> Truth:
        """The same pools with rows of the clean bank in the place of drawn rows, one each: each has its own picture."""
        if self.clean_bins is None:
            return self
        pools = tuple(replace(pool, rows=pool.rows if pool.clean is None else pool.clean) for pool in self.pools)
        return Truth(pools, self.read, self.clean_bins)


@dataclass(frozen=True, eq=False)
class Units:
    """Whom pictures show."""

    of: NDArray[np.int64]  # (n,) as numbers
    members: NDArray[np.bool_]  # (n,) whether S has a picture of them to train on


@dataclass(frozen=True, eq=False)
class QueryTruth:
    """Pictures that an attacker holds and asks about, and which of them are in the bank."""

    read: Callable[[Rows], Tensor]  # numbers → (n, 3, H, W) uint8
    labels: NDArray[np.int64]  # (n,) class, or bin of the target
    pools: Rows  # (n, M) rows of the bank among which each one's is looked for, ascending
    own: Rows  # (n,) the row of the pool that it is in; -1: it is in none
    persons: NDArray[np.int64] | None = None  # (n,) whom it shows, as numbers; None: not known
    units: Units | None = None  # None: not known
    trained_on: NDArray[np.bool_] | None = None  # (n,) whether Φ was; None: on all that are in the bank
    # (n,) where rows are drawn, and belong to no image: whether it had a part in the statistics
    drawn_from: NDArray[np.bool_] | None = None

    @property
    def members(self) -> NDArray[np.bool_]:
        """Which are in the bank, or had a part in it."""
        return self.own >= 0 if self.drawn_from is None else self.drawn_from


def bins_of(targets: NDArray[Any], most: int = 10, least_rows: int = POOL) -> NDArray[np.int64]:
    """Classes as they are; of regression targets, quantile bins of the first, as many as have 200 rows each."""
    if targets.ndim == 1:
        return targets.astype(np.int64)
    count = int(np.clip(len(targets) // least_rows, 1, most))
    edges = np.quantile(targets[:, 0], np.linspace(0, 1, count + 1)[1:-1])
    bins = np.searchsorted(edges, targets[:, 0], side="right")
    return np.unique(bins, return_inverse=True)[1].astype(np.int64)  # of targets that repeat, some bins are empty


def bin_of(targets: NDArray[Any], edges: list[float]) -> NDArray[np.int64]:
    """Of targets that are not in the bank: their class, or their bin, where each edge is the highest value of a bin."""
    if targets.ndim == 1:
        return targets.astype(np.int64)
    return np.searchsorted(edges[:-1], targets[:, 0], side="left").astype(np.int64)


def draw_truth(workbench: Workbench, target: Target, rows: int, seed: int) -> Truth:
    """The pools that a target is scored in."""
    bins, private = bins_of(target.rows.targets), workbench.private
    if not target.draws_rows:
        return Truth(draw_pools(bins, target.contributors, rows, seed), private.pictures, bins)
    targets = private.rows.targets
    edges = (
        [float(target.rows.targets[bins == label, 0].max()) for label in np.unique(bins)] if targets.ndim > 1 else []
    )
    picture_bins = bin_of(targets, edges)
    mine = np.arange(len(private.rows.parts[0])) if target.drawn_of is None else target.drawn_of
    drawn_from = np.isin(np.arange(len(targets)), mine)  # `val` has no part in the statistics
    labels, generator, pools = np.unique(bins), np.random.default_rng([seed, 11]), list[Pool]()
    each = POOL * max(1, round(rows / (POOL * len(labels))))
    for label in labels:
        asked = generator.permutation(np.flatnonzero(bins == label))[:each]
        images = np.flatnonzero((picture_bins == label) & drawn_from)
        for some in np.split(asked, range(POOL, len(asked), POOL)):
            made = target.contributors(np.sort(some))
            own = np.unique(made.members)
            others = generator.permutation(np.setdiff1d(images, own))[: max(0, POOL - len(own))]
            pictures = np.concatenate([own, others])
            clean = generator.choice(pictures, len(some), replace=len(some) > len(pictures))
            clean[made.positions] = made.members
            pools.append(Pool(np.sort(some), np.sort(pictures), int(label), clean))
    return Truth(tuple(pools), private.pictures, bins, picture_bins)


def draw_pools(bins: NDArray[np.int64], contributors: MadeOf, rows: int, seed: int) -> tuple[Pool, ...]:
    """Pools of at most 200 pictures, of all classes alike, for about `rows` rows in all.

    Pools of each class, or, where one each were more than twice as many rows, of some classes. The pictures that a row
    is made of must be in its pool, or it could not be found, and the row's own, which is what clean rows are compared
    with. So rows that share pictures go together: of a function that mixes rows within groups, whole groups, and the
    pool is filled up with pictures of other rows. Of a group that is too large for a pool, each row brings its own
    picture and one that it is made of.
    """
    generator = np.random.default_rng([seed, 1])
    labels, counts = np.unique(bins, return_counts=True)
    if np.minimum(counts, POOL).sum() > 2 * rows:
        drawn = generator.permutation(len(labels))
        enough = int(np.searchsorted(np.cumsum(np.minimum(counts, POOL)[drawn]), rows)) + 1
        labels = np.sort(labels[drawn[:enough]])
    each = POOL * max(1, round(rows / (POOL * len(labels))))
    pools = []
    for label in labels:
        members = generator.permutation(np.flatnonzero(bins == label))
        for chosen, own in _sets(members, *contributors(members)[:2], each, len(bins), generator):
            size = max(min(POOL, len(members)), len(own))
            others = generator.permutation(np.setdiff1d(members, own))[: size - len(own)]
            pools.append(Pool(np.sort(chosen), np.sort(np.concatenate([own, others])), int(label)))
    return tuple(pools)


def _sets(
    members: Rows, positions: Rows, pictures: Rows, most: int, total: int, generator: np.random.Generator
) -> list[tuple[Rows, Rows]]:
    """Sets of rows that share no picture with others, in all `most` rows or some more; and the pictures of each."""
    group = _groups(positions, pictures, len(members), total)
    group = generator.permutation(group.max() + 1)[group]
    sets: list[tuple[Rows, Rows]] = []
    order = np.argsort(group, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        mine = np.isin(positions, places)
        parts = [(members[places], np.union1d(pictures[mine], members[places]))]
        if len(parts[0][1]) > POOL:
            shuffled = generator.permutation(np.flatnonzero(mine))
            found, first = np.unique(positions[shuffled], return_index=True)
            one = pictures[shuffled[first]]  # of each of `found`
            parts = [
                (members[found[some]], np.union1d(one[some], members[found[some]]))
                for some in np.array_split(np.arange(len(found)), -(-2 * len(found) // POOL))
            ]
        for rows, own in parts:
            both = np.union1d(sets[-1][1], own) if sets else own
            if sets and len(both) <= POOL:
                sets[-1] = np.concatenate([sets[-1][0], rows]), both
            elif sum(len(chosen) for chosen, _ in sets) >= most:
                return sets
            else:
                sets.append((rows, own))
    return sets


def _groups(positions: Rows, pictures: Rows, count: int, total: int) -> NDArray[np.int64]:
    """Of each of `count` rows, the number of its group: rows that share pictures, by whatever way round, are in one."""
    size = count + total  # rows, then pictures, in one graph
    graph = coo_matrix((np.ones(len(positions), np.int8), (positions, count + pictures)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    _, group = np.unique(labels[:count], return_inverse=True)
    return group.astype(np.int64)
