"""What an attacker is given beyond the release: query images, labelled rows; and what only the scorer knows of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import SplitName
from dpf_release.core.arrays import Rows
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.targets import Target
from dpf_release.evaluation.truth import POOL, QueryTruth, Truth, bin_of
from dpf_release.images.survey import ImageSet
from dpf_release.owner.workbench import Workbench

LEAST_OF_A_VALUE = 4  # rows of an attribute's value; of rarer ones nothing could be learnt and tried


def draw_queries(workbench: Workbench, target: Target, truth: Truth, seed: int) -> QueryTruth:
    """Members: pictures of the truth's pools, as many as rows are asked for. Non-members: as many of S test.

    Of all classes alike, shuffled. A member's pool has one row that its picture is in, the one with the most pieces of
    it; any other pool has none.
    """
    if target.queries is not None:
        return target.queries
    generator, images = np.random.default_rng([seed, 5]), workbench.private.images
    classes = _draw_classes(workbench, target, truth, generator)
    size = min([POOL, *(len(drawn.rows) - drawn.most_rows + 1 for drawn in classes)])
    pools = [drawn.pools(size, generator) for drawn in classes if len(drawn.own)]
    pictures, own = (np.concatenate([getattr(drawn, name) for drawn in classes]) for name in ("table_rows", "own"))
    labels = np.concatenate([np.full(len(drawn.own), drawn.label) for drawn in classes])
    order = generator.permutation(len(pictures))
    pictures = pictures[order]
    column = workbench.attribute or workbench.group
    cells = np.array(images.table.attributes[column])[pictures] if column in images.table.attributes else None
    return QueryTruth(
        read=lambda numbers: images.pictures.read(pictures[numbers]),
        labels=labels[order].astype(np.int64),
        pools=np.concatenate(pools)[order],
        own=own[order],
        persons=None if cells is None else np.unique(cells, return_inverse=True)[1].astype(np.int64),
        trained_on=np.isin(pictures, images.rows("train")),
    )


@dataclass(frozen=True, eq=False)
class _DrawnClass:
    """The pictures of one class that an attacker asks about.

    Attributes:
        label: class, or bin of the target.
        rows: of the bank, of that class.
        table_rows: (n,) of each picture, the image table's row: members, then others.
        own: (n,) the row that has the most of it; -1: it is in none.
        with_picture: of each, all rows that have some of it.
    """

    label: int
    rows: Rows
    table_rows: Rows
    own: Rows
    with_picture: list[Rows]

    @property
    def most_rows(self) -> int:
        """That one picture is in."""
        return max(map(len, self.with_picture), default=0)

    def pools(self, size: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """(n, size) of each picture the rows among which its own is looked for, ascending."""
        pools = []
        for own, with_picture in zip(self.own, self.with_picture, strict=True):
            others = generator.permutation(np.setdiff1d(self.rows, with_picture))
            pools.append(np.sort(others[:size] if own < 0 else np.append(others[: size - 1], own)))
        return np.stack(pools)


def _draw_classes(
    workbench: Workbench, target: Target, truth: Truth, generator: np.random.Generator
) -> list[_DrawnClass]:
    images, labels = workbench.private.images, np.unique([pool.label for pool in truth.pools])
    each = max(1, len(truth.asked) // len(labels))
    test = images.rows("test")
    bins: list[int] = np.unique(truth.bins).tolist() if target.rows.targets.ndim > 1 else []
    edges = [float(target.rows.targets[truth.bins == label, 0].max()) for label in bins]
    test_labels = bin_of(images.table.targets[test], edges)
    found = []
    for label in labels:
        rows = np.flatnonzero(truth.bins == label)
        asked = np.unique(np.concatenate([pool.pictures for pool in truth.pools if pool.label == label]))
        asked = asked[truth.bins[asked] == label]  # mixed rows may have pictures of other bins, non-members have none
        own, with_picture = _rows_of(target, rows, asked, generator)
        members = generator.permutation(np.flatnonzero(own >= 0))[:each]
        others = generator.permutation(test[test_labels == label])[:each]
        found.append(
            _DrawnClass(
                int(label),
                rows,
                np.concatenate([workbench.private.table_rows[asked[members]], others]),
                np.concatenate([own[members], np.full(len(others), -1)]),
                [with_picture[member] for member in members] + [np.empty(0, np.int64)] * len(others),
            )
        )
    return found


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows of which the attribute is known, some of them to the attacker.

    Attributes:
        values: of the attribute.
        public_values: (n,) of each picture of Q's train split (`public_rows`), as an index of `values`; -1: not known.
        asked: rows that are asked for.
        asked_values: theirs, which only the scorer has.
        known_rows: rows that the attacker is told of.
        known_values: theirs.
    """

    values: tuple[str, ...]
    public_values: NDArray[np.int64]
    asked: Rows
    asked_values: NDArray[np.int64]
    known_rows: Rows
    known_values: NDArray[np.int64]


def draw_labelled(workbench: Workbench, target: Target, truth: Truth, seed: int) -> Labelled:
    """Of each value half of its rows, the other half to be asked for; at most as many of each as the truth asks for.

    A row's value is that of the picture that it has the most pieces of.

    Raises:
        NotGrantedError: no attribute is claimed, the table has no such column, or it has fewer than two values with
            four rows.
    """
    column, table = workbench.attribute, workbench.private.images.table
    if column not in table.attributes:
        raise NotGrantedError(f"no attribute: [claims] attribute is {column!r}, the table has {[*table.attributes]}.")
    generator = np.random.default_rng([seed, 8])
    cells = _cells_of_rows(workbench, target, column, generator)
    names, numbers = np.unique(cells, return_counts=True)
    values = names[(numbers >= LEAST_OF_A_VALUE) & (names != "")]
    if len(values) < 2:
        raise NotGrantedError(f"{column!r} has fewer than two values with {LEAST_OF_A_VALUE} released rows each.")
    known, asked = [], []
    for value in values:
        mine = generator.permutation(np.flatnonzero(cells == value))
        known.append(mine[: len(mine) // 2])
        asked.append(mine[len(mine) // 2 :])
    most = len(truth.asked)
    known_rows, asked_rows = (np.sort(generator.permutation(np.concatenate(part))[:most]) for part in (known, asked))
    public = workbench.public
    public_cells = np.array(public.table.attributes.get(column, ("",) * len(public.table)))
    return Labelled(
        values=tuple(values.tolist()),
        public_values=_index_of(public_cells[public_rows(public, "train", seed)], values),
        asked=asked_rows,
        asked_values=_index_of(cells[asked_rows], values),
        known_rows=known_rows,
        known_values=_index_of(cells[known_rows], values),
    )


def _cells_of_rows(
    workbench: Workbench, target: Target, column: str, generator: np.random.Generator
) -> NDArray[np.str_]:
    """A column's value for each row, (N,): of the picture that it has the most pieces of; of equals, of any."""
    rows = np.arange(len(target.rows))
    positions, members, counts = most_of(target, rows)
    order = np.lexsort((generator.random(len(positions)), -counts, positions))
    named, first = np.unique(positions[order], return_index=True)
    of_table = np.array(workbench.private.images.table.attributes[column], object)
    cells = np.full(len(rows), "", object)
    cells[named] = of_table[workbench.private.table_rows[members[order[first]]]]
    return cells.astype(str)


def public_rows(public: ImageSet, split: SplitName, seed: int) -> Rows:
    """Rows of Q's table in an order that is drawn: in the table they lie class by class, and many look at the first."""
    return np.random.default_rng([seed, 12]).permutation(public.rows(split))


def _index_of(cells: NDArray[np.str_], values: NDArray[np.str_]) -> NDArray[np.int64]:
    place = np.searchsorted(values, cells).clip(max=len(values) - 1)
    return np.where(values[place] == cells, place, -1).astype(np.int64)


def most_of(target: Target, rows: Rows) -> tuple[Rows, Rows, Rows]:
    """What rows are made of: positions in `rows`, clean rows, and how many pieces (1 where that is not known)."""
    pieces = target.pieces(rows)
    if pieces is None:
        positions, members = target.contributors(rows)
        return positions, members, np.ones(len(positions), np.int64)
    keys = np.arange(len(rows))[:, None] * (pieces.max() + 1) + pieces
    found, counts = np.unique(keys, return_counts=True)
    return found // (pieces.max() + 1), found % (pieces.max() + 1), counts.astype(np.int64)


def _rows_of(target: Target, rows: Rows, pictures: Rows, generator: np.random.Generator) -> tuple[Rows, list[Rows]]:
    """Of each picture, the row that has the most of it (-1: none has any), and all rows that have some."""
    positions, members, counts = most_of(target, rows)
    place = np.flatnonzero(np.isin(members, pictures))
    place = place[np.lexsort((generator.random(len(place)), -counts[place], members[place]))]
    names, first, lengths = np.unique(members[place], return_index=True, return_counts=True)
    own, with_picture = np.full(len(pictures), -1), [np.empty(0, np.int64)] * len(pictures)
    at = dict(zip(names.tolist(), range(len(names)), strict=True))
    for number, picture in enumerate(pictures.tolist()):
        if picture in at:
            start = first[at[picture]]
            with_picture[number] = rows[positions[place[start : start + lengths[at[picture]]]]]
            own[number] = with_picture[number][0]
    return own, with_picture
