"""What an attacker is given beyond the release: candidates, labelled rows; and what only the scorer knows of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import RELEASED_SPLITS, SplitName
from dpf_release.core.arrays import Rows
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.targets import Target
from dpf_release.evaluation.truth import POOL, Suspects, Truth, bin_of
from dpf_release.owner.project import Project

LEAST_OF_A_VALUE = 4  # rows of an attribute's value; of rarer ones nothing could be learnt and tried


def draw_suspects(project: Project, target: Target, truth: Truth, seed: int) -> Suspects:
    """Members: pictures of the truth's pools, as many as rows are asked for. Non-members: as many of S test.

    Of all classes alike, shuffled. A member's pool has one row that its picture is in, the one with the most pieces of
    it; any other pool has none.
    """
    if target.suspects is not None:
        return target.suspects
    generator = np.random.default_rng([seed, 5])
    labels = np.unique([pool.label for pool in truth.pools])
    each = max(1, len(truth.asked) // len(labels))
    table_rows, test = released_table_rows(project), project.private_images.rows("test")
    bins: list[int] = np.unique(truth.bins).tolist() if _is_binned(target) else []
    edges = [float(target.rows.targets[truth.bins == label, 0].max()) for label in bins]
    test_labels = bin_of(project.private_images.table.targets[test], edges)
    found: list[tuple[Rows, Rows, list[Rows], list[Rows]]] = []  # of each class: table rows, own, with picture, class
    for label in labels:
        rows = np.flatnonzero(truth.bins == label)
        asked = np.unique(np.concatenate([pool.pictures for pool in truth.pools if pool.label == label]))
        asked = asked[truth.bins[asked] == label]  # mixed rows may have pictures of other bins, non-members have none
        own, with_picture = _rows_of(target, rows, asked, generator)
        members = generator.permutation(np.flatnonzero(own >= 0))[:each]
        others = generator.permutation(test[test_labels == label])[:each]
        none = np.empty(0, np.int64)
        found.append(
            (
                np.concatenate([table_rows[asked[members]], others]),
                np.concatenate([own[members], np.full(len(others), -1)]),
                [with_picture[member] for member in members] + [none] * len(others),
                [rows],
            )
        )
    most = [max((len(gone) for gone in with_picture), default=0) for _, _, with_picture, _ in found]
    size = min([POOL, *(len(rows[0]) - gone + 1 for (_, _, _, rows), gone in zip(found, most, strict=True))])
    pools = [
        np.stack([_pool(row, gone, rows[0], size, generator) for row, gone in zip(own, with_picture, strict=True)])
        for _, own, with_picture, rows in found
        if len(own)
    ]
    pictures, own = (np.concatenate([parts[number] for parts in found]) for number in (0, 1))
    named = np.concatenate([np.full(len(parts[0]), label) for label, parts in zip(labels, found, strict=True)])
    order = generator.permutation(len(pictures))
    column = attribute_column(project)
    cells = None if column is None else np.array(project.private_table.attributes[column])[pictures[order]]
    return Suspects(
        read=lambda numbers: project.private_images.pictures.read(pictures[order][numbers]),
        labels=named[order].astype(np.int64),
        pools=np.concatenate(pools)[order],
        own=own[order],
        persons=None if cells is None else np.unique(cells, return_inverse=True)[1].astype(np.int64),
        trained_on=np.isin(pictures[order], project.private_images.rows("train")),
    )


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


def draw_labelled(project: Project, target: Target, truth: Truth, seed: int) -> Labelled:
    """Of each value half of its rows, the other half to be asked for; at most as many of each as the truth asks for.

    A row's value is that of the picture that it has the most pieces of.

    Raises:
        NotGrantedError: no attribute is claimed, the table has no such column, or it has fewer than two values with
            four rows.
    """
    column, table = project.config.claims.attribute, project.private_images.table
    if column not in table.attributes:
        raise NotGrantedError(f"no attribute: [claims] attribute is {column!r}, the table has {[*table.attributes]}.")
    generator = np.random.default_rng([seed, 8])
    rows = np.arange(len(target.rows))
    positions, members, counts = most_of(target, rows)
    order = np.lexsort((generator.random(len(positions)), -counts, positions))
    named, first = np.unique(positions[order], return_index=True)
    cells = np.full(len(rows), "", object)
    of_table = np.array(table.attributes[column], object)
    cells[named] = of_table[released_table_rows(project)[members[order[first]]]]
    names, numbers = np.unique(cells.astype(str), return_counts=True)
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
    public = project.public_images
    public_cells = np.array(public.table.attributes.get(column, ("",) * len(public.table)))
    return Labelled(
        values=tuple(values.tolist()),
        public_values=_index_of(public_cells[public_rows(project, "train", seed)], values),
        asked=asked_rows,
        asked_values=_index_of(cells[asked_rows].astype(str), values),
        known_rows=known_rows,
        known_values=_index_of(cells[known_rows].astype(str), values),
    )


def public_rows(project: Project, split: SplitName, seed: int) -> Rows:
    """Rows of Q's table in an order that is drawn: in the table they lie class by class, and many look at the first."""
    return np.random.default_rng([seed, 12]).permutation(project.public_images.rows(split))


def _index_of(cells: NDArray[np.str_], values: NDArray[np.str_]) -> NDArray[np.int64]:
    place = np.searchsorted(values, cells).clip(max=len(values) - 1)
    return np.where(values[place] == cells, place, -1).astype(np.int64)


def released_table_rows(project: Project) -> Rows:
    """Of each row of the clean bank, the image table's."""
    return np.concatenate([project.bank_order[0][split] for split in RELEASED_SPLITS])


def attribute_column(project: Project) -> str | None:
    """The column that says whom (or what) a picture shows: that of `[claims] attribute`, else the group."""
    wanted = project.config.claims.attribute or project.config.images.private.group
    return wanted if wanted in project.private_table.attributes else None


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


def _pool(own: int, with_picture: Rows, rows: Rows, size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    others = generator.permutation(np.setdiff1d(rows, with_picture))
    chosen = others[:size] if own < 0 else np.append(others[: size - 1], own)
    return np.sort(chosen)


def _is_binned(target: Target) -> bool:
    return bool(target.rows.targets.ndim > 1)
