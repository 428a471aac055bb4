"""A labelled or unlabelled data set from its source, with every split that the source does not name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from dpf_release.errors import ImageError
from dpf_release.images.sources import csv_columns, csv_splits, image_files, read_csv, read_folder
from dpf_release.images.splits import complete_splits
from dpf_release.images.table import SPLIT_NAMES, ImageTable, require_classes


@dataclass(frozen=True)
class Earlier:
    """What is known of a data set from before images were taken out of it."""

    classes: tuple[str, ...] = ()  # one may have no image left
    splits: Mapping[str, str] = field(default_factory=dict)  # path → the split made for it; empty: made anew


def read_table(
    source: Path,
    *,
    task: Literal["classification", "regression"],
    target_columns: Sequence[str] = (),
    group_column: str | None = None,
    classes: Sequence[str] = (),
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    earlier: Earlier | None = None,
) -> ImageTable:
    """Reads a labelled data set.

    A folder is an ImageFolder tree, `train/CLASS/*.jpg`, `val/...`, `test/...`, or `CLASS/*.jpg` without
    splits. A `.csv` file has the columns `path` (relative to its folder), `label` or `target_columns`,
    perhaps `split`; the others are attributes. Where `val` or `test` is missing it is carved from `train`:
    stratified by class, or by deciles of the first target, with a row of each kept in `train`; or, with
    `group_column`, whole groups (all rows of a person, say) at a time.

    Args:
        source: the folder, or the CSV file; regression needs that.
        task: what the targets are.
        target_columns: for regression, the K columns that hold numbers.
        group_column: no value of it occurs in two splits.
        classes: take only these, in this order; all, sorted by name, where empty.
        val_fraction: share of the `train` rows that a missing `val` gets; 0 makes none.
        test_fraction: the same for `test`.
        seed: of the splits that are made.
        earlier: classes and splits that stay, whatever images have gone.

    Raises:
        ImageError: the source is not laid out as expected; all faulty lines are counted, the first are shown.
    """
    source = Path(source)
    earlier = earlier or Earlier()
    if source.is_dir():
        if task == "regression" or group_column is not None:
            what, columns = f"the group column {group_column!r}", "label and the group"
            if task == "regression":
                what, columns = "numbers as targets", "split and the targets"
            raise ImageError(
                f"{source}: expected a CSV table, found a folder: {what} cannot be read from folder names. "
                f"Write a table with the columns path, {columns}."
            )
        table = read_folder(source, tuple(classes), earlier.classes)
    else:
        table = read_csv(source, task, tuple(target_columns), group_column, tuple(classes), earlier.classes)
    groups = None if group_column is None else np.array(table.attributes[group_column])
    fractions = {"val": val_fraction, "test": test_fraction}
    return replace(table, splits=complete_splits(source, table, groups, fractions, seed, earlier.splits))


def read_public(source: Path, *, classes: Sequence[str] = (), val_fraction: float = 0.05, seed: int = 0) -> ImageTable:
    """Reads public images Q: any folder, searched recursively, or a CSV table with a column `path`.

    Rows under a top-level folder `test` (or with `test` in a column `split`) stay `test`; of all others `val` gets its
    share by the seed, `train` the rest. Of files only those with one of the `classes` among their parent folders, or in
    the column `label`, are taken, where any is named.

    Returns:
        Its classes are those that were named, or else the folders that files are in (or the column `label`), where
        every file is in one; without, there are none, and targets are zeros, (N,) int64.

    Raises:
        ImageError: the source cannot be read, has no images, or lacks one of `classes`.
    """
    source = Path(source)
    if source.is_dir():
        root, columns = source, {"path": tuple(image_files(source))}
        folders = [PurePosixPath(path).parts[:-1] for path in columns["path"]]
        splits = ["test" if names and names[0].lower() == "test" else "train" for names in folders]
        labels = [_label_of(names, classes) for names in folders]
    else:
        root, columns = source.parent, csv_columns(source, ["path", *(["label"] if classes else [])])
        splits = ["test" if split == "test" else "train" for split in csv_splits(columns)]
        labels = [_label_of((label,), classes) for label in columns.get("label", ("",) * len(columns["path"]))]
    paths = columns.pop("path")
    names = tuple(classes) or tuple(sorted(set(labels) if all(labels) else ()))
    number = {name: place for place, name in enumerate(names)}
    targets = np.array([number.get(label, 0) for label in labels], np.int64)
    table = ImageTable(root, paths, targets, names, (), np.array(splits, dtype="U5"), columns)
    if classes:
        require_classes(source, classes, set(labels))
        table = table.select([row for row, label in enumerate(labels) if label in number])
    unlabelled = replace(table, targets=np.zeros(len(table), np.int64), classes=())  # `val` is of all classes together
    return replace(table, splits=complete_splits(source, unlabelled, None, {"val": val_fraction}, seed, {}))


def _label_of(folders: Sequence[str], classes: Sequence[str]) -> str:
    """The one of `classes` that is among the folders; the last folder, where no class is named; else nothing."""
    if classes:
        return next((name for name in folders if name in classes), "")
    return folders[-1] if folders and folders[-1].lower() not in SPLIT_NAMES else ""
