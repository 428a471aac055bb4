"""What the harness hands to an attack: the view that it declares, no more; and what only the scorer knows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpf_release.attacks.threat_models import (
    Budget,
    DrawnRows,
    HeldPictures,
    HeldRows,
    KnownPairs,
    LabelledRows,
    LeakedFunction,
    LeakedVault,
    QueryImages,
    ReleaseView,
    Remembered,
    TwoReleases,
)
from dpf_release.bank.format import SplitName
from dpf_release.core.arrays import Rows
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.targets import POOL, QueryTruth, Target, Truth, Units, bin_of
from dpf_release.images.survey import ImageSet
from dpf_release.owner.workbench import Workbench

KNOWN_PAIRS = 1000  # that A6 holds
LEAST_OF_A_VALUE = 4  # rows of an attribute's value; of rarer ones nothing could be learnt and tried


@dataclass(frozen=True, eq=False)
class Setting:
    """What all attacks of a run have in common."""

    workbench: Workbench
    truth: Truth  # only pictures that a view grants leave it
    budget: Budget
    seed: int
    # φ1(Q), of each split.
    remembered: Mapping[str, Remembered] = field(default_factory=lambda: {"train": Remembered(), "val": Remembered()})

    @property
    def of_clean(self) -> Setting:
        """For what is done to rows of the clean bank; see `Truth.of_clean`."""
        return replace(self, truth=self.truth.of_clean)


def grant(view: type[ReleaseView], target: Target, setting: Setting) -> ReleaseView:
    """A view of one target; what the project has not (attributes, a second release) is a `NotGrantedError`."""
    workbench = setting.workbench
    fields: dict[str, Any] = {
        "phi_1": workbench.phi_1,
        "phi_2": target.classifier or workbench.phi_2,
        "before_relu": workbench.before_relu,
        "preprocess": workbench.preprocess,
        "non_negative": workbench.features.non_negative,
        "task": workbench.task,
        "bank": target.rows,
        "asked": setting.truth.asked,
        "public": _public(setting, "train"),
        "public_val": _public(setting, "val"),
        "budget": setting.budget,
        "seed": setting.seed,
        "device": workbench.device,
        "bf16": workbench.bf16,
        "subject": {
            "featurizer_sha256": workbench.featurizer_sha256,
            "classifier_sha256": target.subject if target.classifier else workbench.classifier_sha256,
            "public_images_sha256": workbench.public.digest,
            "public_order": setting.seed,
        },
        "bank_subject": target.subject,
        "function": target.function,
        "kept": workbench.kept,
    }
    more = GRANTS[view](target, setting) if view in GRANTS else {}
    return view(**fields | more)


def public_rows(public: ImageSet, split: SplitName, seed: int) -> Rows:
    """Rows of Q's table in an order that is drawn: in the table they lie class by class, and many look at the first."""
    return np.random.default_rng([seed, 12]).permutation(public.rows(split))


def _public(setting: Setting, split: Literal["train", "val"]) -> HeldPictures:
    images = setting.workbench.public
    rows, read = public_rows(images, split, setting.seed), images.pictures.read
    return HeldPictures(len(rows), lambda numbers: read(rows[numbers]), setting.remembered[split])


def _query_images(target: Target, setting: Setting) -> dict[str, Any]:
    queries = draw_queries(target, setting)
    return {
        "pictures": HeldPictures(len(queries.labels), queries.read),
        "labels": queries.labels,
        "bins": setting.truth.bins,
        "pools": queries.pools,
        "persons": queries.persons,
    }


def _labelled_rows(target: Target, setting: Setting) -> dict[str, Any]:
    labelled = draw_labelled(target, setting)
    return {
        "values": labelled.values,
        "public_values": labelled.public_values,
        "known_rows": labelled.known_rows,
        "known_values": labelled.known_values,
        "bins": setting.truth.bins,
        "asked": labelled.asked,
    }


def _refuse_drawn(target: Target) -> None:
    if target.draws_rows:
        raise NotGrantedError("its rows belong to no image, so there are no pairs of a row and its image")


def _drawn_rows(target: Target, setting: Setting) -> dict[str, Any]:
    if not target.draws_rows:
        raise NotGrantedError("its rows are not drawn: each belongs to an image, which A5 looks for")
    return _query_images(target, setting)


def _leaked_function(target: Target, setting: Setting) -> dict[str, Any]:
    return {**_drawn_rows(target, setting), "learned": target.learned}


def _leaked_vault(target: Target, setting: Setting) -> dict[str, Any]:
    if target.groups < 2:  # of several groups, rows say of an image to which it belongs
        _refuse_drawn(target)
    return {"poison": target.poison}


def _known_pairs(target: Target, setting: Setting) -> dict[str, Any]:
    """Rows that are not asked for, with the picture that each has the most of; none of these is to be found either."""
    _refuse_drawn(target)
    truth = setting.truth
    rows = np.setdiff1d(np.arange(len(target.rows)), truth.asked)
    own = target.foremost(rows)
    rows = rows[~np.isin(own, np.concatenate([pool.pictures for pool in truth.pools]))]
    if not len(rows):
        raise NotGrantedError("all rows are asked for: the bank has none left of which the picture could be known")
    rows = np.random.default_rng([setting.seed, 6]).permutation(rows)[:KNOWN_PAIRS]
    own = target.foremost(rows)
    return {"pictures": HeldPictures(len(rows), lambda numbers: truth.read(own[numbers])), "pair_rows": rows}


def _two_releases(target: Target, setting: Setting) -> dict[str, Any]:
    """Another release of the same pictures, its rows in an order that says nothing."""
    _refuse_drawn(target)
    other, _ = target.second()
    order = np.random.default_rng([setting.seed, 9]).permutation(len(other))
    return {"other": HeldRows(other.targets[order], lambda rows: other.read(order[rows]))}


# What a view holds beyond a release: view → (target, setting) → its fields, in the place of a release's.
GRANTS: dict[type[ReleaseView], Callable[[Target, Setting], dict[str, Any]]] = {
    QueryImages: _query_images,
    DrawnRows: _drawn_rows,
    LeakedFunction: _leaked_function,
    LabelledRows: _labelled_rows,
    KnownPairs: _known_pairs,
    LeakedVault: _leaked_vault,
    TwoReleases: _two_releases,
}


# --------------------------------------------------------------------------------------------- pictures to ask about


def draw_queries(target: Target, setting: Setting) -> QueryTruth:
    """Members: pictures of the truth's pools, as many as rows are asked for. Non-members: as many of S test.

    Of all classes alike, shuffled. A member's pool has one row that its picture is in, the one with the most pieces of
    it; any other pool has none.
    """
    if target.queries is not None:
        return target.queries
    workbench, generator = setting.workbench, np.random.default_rng([setting.seed, 5])
    images, classes = workbench.private.images, _draw_classes(target, setting, generator)
    rooms = (len(drawn.rows) - max([1, *map(len, drawn.with_picture)]) + 1 for drawn in classes)
    size = min([POOL, *rooms])
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
        drawn_from=np.isin(pictures, workbench.private.table_rows) if target.draws_rows else None,
        persons=None if cells is None else np.unique(cells, return_inverse=True)[1].astype(np.int64),
        units=_units(workbench, pictures) if target.drawn_of is None else None,
        trained_on=np.isin(pictures, images.rows("train")),
    )


def _units(workbench: Workbench, pictures: Rows) -> Units | None:
    """Of each picture, as a row of S's table, whom it shows, and whether S train shows them; None: nobody said."""
    images, column = workbench.private.images, workbench.group
    if column is None or column not in images.table.attributes:
        return None
    cells = np.array(images.table.attributes[column])
    inside = np.isin(cells[pictures], cells[images.rows("train")])
    return Units(np.unique(cells[pictures], return_inverse=True)[1].astype(np.int64), inside)


@dataclass(frozen=True, eq=False)
class _DrawnClass:
    """The pictures of one class that an attacker asks about: members, then others."""

    label: int  # class, or bin of the target
    rows: Rows  # of the bank, of that class
    table_rows: Rows  # (n,) of each picture, the image table's
    own: Rows  # (n,) the row that has the most of it; -1: it is in none
    with_picture: list[Rows]  # of each, all rows that have some of it

    def pools(self, size: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """(n, size) of each picture the rows among which its own is looked for, ascending."""
        pools = []
        for own, with_picture in zip(self.own, self.with_picture, strict=True):
            others = generator.permutation(self.rows[~np.isin(self.rows, with_picture)])
            pools.append(np.sort(others[:size] if own < 0 else np.append(others[: size - 1], own)))
        return np.stack(pools)


def _draw_classes(target: Target, setting: Setting, generator: np.random.Generator) -> list[_DrawnClass]:
    truth, private = setting.truth, setting.workbench.private
    images, labels = private.images, np.unique([pool.label for pool in truth.pools])
    each = max(1, len(truth.asked) // len(labels))
    test = images.rows("test")
    bins: list[int] = np.unique(truth.bins).tolist() if target.rows.targets.ndim > 1 else []
    edges = [float(target.rows.targets[truth.bins == label, 0].max()) for label in bins]
    test_labels = bin_of(images.table.targets[test], edges)
    found = []
    for label in labels:
        rows = np.flatnonzero(truth.bins == label)
        asked = np.unique(np.concatenate([pool.pictures for pool in truth.pools if pool.label == label]))
        # Mixed rows may have pictures of other bins, non-members have none.
        asked = asked[truth.picture_bins[asked] == label]
        own, with_picture = _rows_of(target, rows, asked, generator)
        members = generator.permutation(np.flatnonzero((own >= 0) | target.draws_rows))[:each]
        others = generator.permutation(test[test_labels == label])[:each]
        table_rows = np.concatenate([private.table_rows[asked[members]], others])
        own = np.concatenate([own[members], np.full(len(others), -1)])
        with_picture = [with_picture[member] for member in members] + [np.empty(0, np.int64)] * len(others)
        found.append(_DrawnClass(int(label), rows, table_rows, own, with_picture))
    return found


# --------------------------------------------------------------------------------------------- attributes


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows of which the attribute is known, some of them to the attacker; their values are indices of `values`."""

    values: tuple[str, ...]
    public_values: NDArray[np.int64]  # (n,) of Q's train split (`public_rows`); -1: not known
    asked: Rows
    asked_values: NDArray[np.int64]  # which only the scorer has
    known_rows: Rows  # that the attacker is told of
    known_values: NDArray[np.int64]


def draw_labelled(target: Target, setting: Setting) -> Labelled:
    """Of each value half of its rows, the other half to be asked for; at most as many of each as the truth asks for.

    A row's value is that of the picture that it has the most pieces of. An attribute that is not claimed, not in the
    table, or has fewer than two values with four rows is a `NotGrantedError`.
    """
    workbench, seed = setting.workbench, setting.seed
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
    most = len(setting.truth.asked)
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
    positions, members, counts = target.contributors(rows)
    order = np.lexsort((generator.random(len(positions)), -counts, positions))
    named, first = np.unique(positions[order], return_index=True)
    of_table = np.array(workbench.private.images.table.attributes[column], object)
    cells = np.full(len(rows), "", object)
    cells[named] = of_table[workbench.private.table_rows[members[order[first]]]]
    return cells.astype(str)


def _index_of(cells: NDArray[np.str_], values: NDArray[np.str_]) -> NDArray[np.int64]:
    place = np.searchsorted(values, cells).clip(max=len(values) - 1)
    return np.where(values[place] == cells, place, -1).astype(np.int64)


def _rows_of(target: Target, rows: Rows, pictures: Rows, generator: np.random.Generator) -> tuple[Rows, list[Rows]]:
    """Of each picture, the row that has the most of it (-1: none has any), and all rows that have some."""
    positions, members, counts = target.contributors(rows)
    place = np.flatnonzero(np.isin(members, pictures))
    place = place[np.lexsort((generator.random(len(place)), -counts[place], members[place]))]
    names, first = np.unique(members[place], return_index=True)
    of = dict(zip(names.tolist(), np.split(place, first[1:]), strict=False))  # without any name there is one empty part
    with_picture = [rows[positions[of.get(picture, place[:0])]] for picture in pictures.tolist()]
    return np.array([found[0] if len(found) else -1 for found in with_picture], np.int64), with_picture
