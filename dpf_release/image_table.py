"""Image data sets: which files there are, with which targets, in which splits.

Every file that a source names is a row of its `ImageTable`, whether it can be decoded or not: that is found
out, and reported, by `images.survey`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import numpy as np

from dpf_release.errors import ImageError
from dpf_release.vault import SPLITS

_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_READ_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
# Other image formats are listed too: such a file becomes a reported bad image, not a missing one.
_OTHER_SUFFIXES = {".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".heic", ".heif", ".avif", ".jp2", ".jxl"}


@dataclass(frozen=True, eq=False)
class ImageTable:
    """The images of a data set, one row a file.

    Attributes:
        root: folder that `paths` are relative to.
        paths: (N,) posix paths of the files, each once.
        targets: (N,) int64 class indices, or (N, K) float32 for regression.
        classes: names of the classes, by index; empty for regression and unlabelled images.
        target_names: (K,) names of the regression targets; empty otherwise.
        splits: (N,) of `train`, `val`, `test`.
        attributes: further columns of a CSV table, (N,) texts each.
    """

    root: Path
    paths: tuple[str, ...]
    targets: np.ndarray
    classes: tuple[str, ...]
    target_names: tuple[str, ...]
    splits: np.ndarray
    attributes: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int] | np.ndarray) -> ImageTable:
        """Returns the table of these rows, in this order; `classes` stay, so indices keep their meaning."""
        rows = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            paths=tuple(self.paths[row] for row in rows),
            targets=self.targets[rows],
            splits=self.splits[rows],
            attributes={name: tuple(cells[row] for row in rows) for name, cells in self.attributes.items()},
        )

    def rows_of(self, split: str) -> np.ndarray:
        """Returns the rows of a split, (n,) int64, ascending."""
        return np.flatnonzero(self.splits == split)

    def counts(self) -> dict[str, int]:
        """Returns the number of rows of each split."""
        return {split: len(self.rows_of(split)) for split in SPLITS}

    def digest(self) -> str:
        """Returns a SHA-256 that changes with any path, target, split, attribute, file size or file time.

        The order of the rows does not matter. A file that is not there counts with size -1.
        """
        digest = hashlib.sha256(json.dumps([self.classes, self.target_names]).encode())
        for row in sorted(range(len(self)), key=self.paths.__getitem__):
            try:
                status = (self.root / self.paths[row]).stat()
                file = [status.st_size, status.st_mtime_ns]
            except (OSError, ValueError):  # ValueError: a NUL byte in a name
                file = [-1, -1]
            cells = {name: column[row] for name, column in self.attributes.items()}
            record = [self.paths[row], self.targets[row].tolist(), str(self.splits[row]), cells, file]
            digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Earlier:
    """What is known of a data set from before images were taken out of it.

    Attributes:
        classes: names of its classes; one may have no image left.
        splits: path → the split that was made for it; empty: splits are made anew.
    """

    classes: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)


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
    `group_column`, whole groups at a time.

    Args:
        source: the folder, or the CSV file.
        task: what the targets are. Regression needs a CSV file.
        target_columns: for regression, the K columns that hold numbers.
        group_column: no value of this column (a person, say) occurs in two splits.
        classes: take only these classes, in this order; all, sorted by name, where empty.
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
            what = "numbers as targets" if task == "regression" else f"the group column {group_column!r}"
            raise ImageError(
                f"{source}: expected a CSV table, found a folder: {what} cannot be read from folder names. "
                "Write a table with the columns path, "
                + ("split and the targets." if task == "regression" else "label and the group.")
            )
        table = _read_tree(source, tuple(classes), earlier.classes)
    else:
        table = _read_csv(source, task, tuple(target_columns), group_column, tuple(classes), earlier.classes)
    groups = None if group_column is None else np.array(table.attributes[group_column])
    fractions = {"val": val_fraction, "test": test_fraction}
    return replace(table, splits=_complete_splits(source, table, groups, fractions, seed, earlier.splits))


def read_unlabelled(
    source: Path, *, classes: Sequence[str] = (), val_fraction: float = 0.05, seed: int = 0
) -> ImageTable:
    """Reads public images Q: any folder, searched recursively, or a CSV table with a column `path`.

    Rows under a top-level folder `test` (or with `test` in a column `split`) stay `test`; all others are
    split into `train` and `val` by the seed. Targets are zeros, (N,) int64.

    Args:
        source: the folder, or the CSV file.
        classes: take only files with one of these names among their parent folders, or in the column `label`.
        val_fraction: share of the rows outside `test` that `val` gets.
        seed: of the split.

    Raises:
        ImageError: the source cannot be read, has no images, or lacks one of `classes`.
    """
    source, wanted = Path(source), set(classes)
    if source.is_dir():
        root, columns = source, {"path": tuple(_image_files(source))}
        folders = [PurePosixPath(path).parts[:-1] for path in columns["path"]]
        splits = ["test" if names and names[0].lower() == "test" else "train" for names in folders]
        labels = [wanted.intersection(names) for names in folders]
    else:
        root, columns = source.parent, _csv_columns(source, ["path", *(["label"] if classes else [])])
        splits = ["test" if split == "test" else "train" for split in _csv_splits(columns)]
        labels = [wanted.intersection([label]) for label in columns["label"]] if classes else []
    paths = columns.pop("path")
    targets = np.zeros(len(paths), np.int64)
    table = ImageTable(root, paths, targets, (), (), np.array(splits, dtype="U5"), columns)
    if classes:
        _require_classes(source, classes, set().union(*labels))
        table = table.select([row for row, found in enumerate(labels) if found])
    return replace(table, splits=_complete_splits(source, table, None, {"val": val_fraction}, seed, {}))


def _image_files(folder: Path) -> Iterator[str]:
    """Yields the sorted posix paths, relative to `folder`, of its image files; hidden ones never."""
    seen: set[Path] = set()  # of real folders: links are followed, but a link to a parent must not loop
    found = []
    suffixes = _READ_SUFFIXES | _OTHER_SUFFIXES
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            seen.add(real)
            found += [Path(place, name) for name in names if not name.startswith(".")]
    yield from sorted(file.relative_to(folder).as_posix() for file in found if file.suffix.lower() in suffixes)


def _read_tree(source: Path, classes: tuple[str, ...], earlier: tuple[str, ...]) -> ImageTable:
    paths = list(_image_files(source))
    parts = [PurePosixPath(path).parts for path in paths]
    has_splits = any(entry.is_dir() and entry.name.lower() in _SPLIT_NAMES for entry in source.iterdir())
    depth = 1 if has_splits else 0  # where the class folder stands
    stray = [
        path
        for path, names in zip(paths, parts, strict=True)
        if len(names) < depth + 2 or (has_splits and names[0].lower() not in _SPLIT_NAMES)
    ]
    if stray:
        layout = "train/CLASS/IMAGE, val/CLASS/IMAGE, test/CLASS/IMAGE" if has_splits else "CLASS/IMAGE"
        raise ImageError(
            f"{source}: expected {layout}, found {len(stray)} images elsewhere, first {_shown(stray)}. "
            "Move them into a class folder, or out of the tree."
        )
    found = {names[depth] for names in parts}.union(earlier)
    names = classes or tuple(sorted(found))
    _require_classes(source, names, found)
    index = {name: number for number, name in enumerate(names)}
    kept = [row for row, folders in enumerate(parts) if folders[depth] in index]
    splits = [_SPLIT_NAMES[parts[row][0].lower()] if has_splits else "train" for row in kept]
    targets = np.array([index[parts[row][depth]] for row in kept], dtype=np.int64)
    return ImageTable(source, tuple(paths[row] for row in kept), targets, names, (), np.array(splits, "U5"), {})


def _read_csv(
    source: Path,
    task: str,
    target_columns: tuple[str, ...],
    group_column: str | None,
    classes: tuple[str, ...],
    earlier: tuple[str, ...],
) -> ImageTable:
    regression = task == "regression"
    if regression and not target_columns:
        raise ImageError(f"{source}: a regression needs the names of its target columns, found none.")
    own = [*target_columns] if regression else ["label"]
    needed = ["path", *own, *([group_column] if group_column else [])]
    columns = _csv_columns(source, needed, target_columns)
    splits = np.array(_csv_splits(columns), dtype="U5")
    # The group stays an attribute, also where it is the label or a target.
    attributes = {name: cells for name, cells in columns.items() if name == group_column or name not in ("path", *own)}
    if regression:
        numbers = [[float(cell) for cell in columns[name]] for name in target_columns]
        targets = np.array(numbers, dtype=np.float32).T  # (K, N) -> (N, K)
        return ImageTable(source.parent, columns["path"], targets, (), target_columns, splits, attributes)
    found = set(columns["label"]).union(earlier)
    names = classes or tuple(sorted(found))
    _require_classes(source, names, found)
    index = {name: number for number, name in enumerate(names)}
    targets = np.array([index.get(label, -1) for label in columns["label"]], dtype=np.int64)
    table = ImageTable(source.parent, columns["path"], targets, names, (), splits, attributes)
    return table.select(np.flatnonzero(targets >= 0))


def _csv_splits(columns: dict[str, tuple[str, ...]]) -> list[str]:
    """Takes the column `split` out of the columns and returns it; `train` where there is none."""
    return [_SPLIT_NAMES[name.lower()] for name in columns.pop("split", ("train",) * len(columns["path"]))]


def _csv_columns(
    source: Path,
    needed: Sequence[str],
    number_columns: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
    """Returns the columns of a CSV file by name, with checked and normalised paths, splits and numbers."""
    if source.suffix.lower() != ".csv" or not source.is_file():
        raise ImageError(f"{source}: expected a folder of images or a .csv file, found neither. Check the path.")
    problems: list[str] = []
    lines, rows = [], []
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for cells in filter(None, reader):
                if len(cells) != len(header):
                    problems.append(f"line {reader.line_num}: expected {len(header)} cells, found {len(cells)}")
                    continue
                lines.append(reader.line_num)
                rows.append([cell.strip() for cell in cells])
    except (csv.Error, UnicodeDecodeError) as error:
        raise ImageError(f"{source}: expected a comma-separated table in UTF-8, found: {error}.") from error
    missing = [name for name in needed if name not in header]
    named = [name for name in header if name]  # pandas writes its index under an empty name
    if missing or len(set(named)) < len(named):
        fault = f"no column {', '.join(missing)}" if missing else "a column name twice"
        raise ImageError(
            f"{source}: expected the columns {', '.join(needed)}, each once, found {fault} "
            f"(the first line has: {', '.join(header)}). Correct the first line or the column's name."
        )
    columns = {name: [row[place] for row in rows] for place, name in enumerate(header) if name}
    lines_of: dict[str, int] = {}
    for row, line in enumerate(lines):
        cells_of = {name: column[row] for name, column in columns.items()}
        fault = _row_fault(cells_of, needed, number_columns)
        if not fault:
            path = columns["path"][row] = PurePosixPath(cells_of["path"]).as_posix()
            first = lines_of.setdefault(path, line)
            fault = f"{path} is on line {first} already" if first != line else ""
        if fault:
            problems.append(f"line {line}: {fault}")
    if problems:
        raise ImageError(
            f"{source}: {len(problems)} rows cannot be used: {_shown(problems, '; ')}. Fill or remove these rows."
        )
    return {name: tuple(column) for name, column in columns.items()}


def _row_fault(cells: Mapping[str, str], needed: Sequence[str], number_columns: Sequence[str]) -> str:
    """Returns what is wrong with a row of a CSV table, or an empty text."""
    for name in needed:
        if not cells[name]:
            return f"{name} is empty"
    path = PureWindowsPath(cells["path"])  # reads both kinds of separators, and drives
    if path.anchor or ".." in path.parts:
        return f"path {cells['path']!r} must be relative and stay inside the table's folder"
    if cells.get("split", "train").lower() not in _SPLIT_NAMES:
        return f"split is {cells['split']!r}, expected train, val or test"
    for name in number_columns:
        try:
            finite = abs(float(cells[name])) <= float(np.finfo(np.float32).max)
        except ValueError:
            finite = False
        if not finite:
            return f"{name} is {cells[name]!r}, expected a finite number"
    return ""


def _require_classes(source: Path, wanted: Sequence[str], found: set[str]) -> None:
    if len(set(wanted)) < len(wanted):
        raise ImageError(f"{source}: expected each class once, found one twice in {_shown(wanted)}.")
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ImageError(
            f"{source}: expected images of class {_shown(unknown)}, found "
            f"{_shown(sorted(found)) if found else 'no such class'}. Correct the names under `classes`."
        )


def _complete_splits(
    source: Path,
    table: ImageTable,
    groups: np.ndarray | None,
    fractions: Mapping[str, float],
    seed: int,
    known: Mapping[str, str],
) -> np.ndarray:
    """Returns the (N,) splits, with those that have no row yet carved from `train`, or as they are `known`."""
    if any(fraction < 0 for fraction in fractions.values()) or sum(fractions.values()) >= 1:
        raise ValueError(f"fractions must be at least 0 and sum to less than 1, found {dict(fractions)}")
    if not len(table):
        raise ImageError(f"{source}: expected JPEG, PNG or WebP images, found none. Check the path.")
    splits, pool = table.splits.copy(), table.rows_of("train")
    if not len(pool):
        raise ImageError(
            f"{source}: expected images in the split train, found only {', '.join(sorted(set(splits)))}. "
            "Add a split train, or remove the splits to have them made."
        )
    missing = [split for split, fraction in fractions.items() if fraction and split not in splits]
    wanted = {split: max(1, round(fractions[split] * len(pool))) for split in missing}
    rng = np.random.default_rng(seed)
    if wanted and known:
        splits[pool] = _as_before(table, pool, groups, wanted, known)
    elif wanted:
        if groups is None:
            carved = _carve_rows(pool, _strata(table)[pool], wanted, rng)
        else:
            carved = _carve_groups(pool, groups[pool], wanted, rng)
        if any(not len(carved[split]) for split in wanted):
            unit, made = "images" if groups is None else "groups", " and ".join(missing)
            raise ImageError(
                f"{source}: expected enough {unit} in train to make {made}, found {len(pool)} "
                f"images that leave none over. Add {unit}, or name the splits yourself."
            )
        for split, rows in carved.items():
            splits[rows] = split
    if groups is not None:
        _refuse_shared_groups(source, groups, splits)
    return splits


def _as_before(
    table: ImageTable,
    pool: np.ndarray,
    groups: np.ndarray | None,
    wanted: Mapping[str, int],
    known: Mapping[str, str],
) -> list[str]:
    """Returns the splits of the rows of `pool` as they are known; a new row goes with its group, or to `train`."""
    before = [known.get(table.paths[row]) for row in pool]
    names = pool if groups is None else groups[pool]
    of_group = {name: split for name, split in zip(names, before, strict=True) if split}
    splits = [split or of_group.get(name) for name, split in zip(names, before, strict=True)]
    return [split if split and split in wanted else "train" for split in splits]


def _strata(table: ImageTable) -> np.ndarray:
    """Returns (N,) integers: the class, or the decile of the first target."""
    if not table.target_names:
        return table.targets
    first = table.targets[:, 0]
    return np.searchsorted(np.quantile(first, np.arange(0.1, 0.95, 0.1)), first)


def _carve_rows(
    pool: np.ndarray, strata: np.ndarray, wanted: Mapping[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns rows of `pool` for each split, every stratum in proportion, to within a row or so."""
    order = rng.permutation(len(pool))
    order = order[np.argsort(strata[order], kind="stable")]
    # One row of each stratum stays: a class that training never sees cannot be judged.
    free = np.delete(order, np.unique(strata[order], return_index=True)[1])
    chosen = pool[_even(free, sum(wanted.values()), rng)]
    carved = {}
    for split, count in wanted.items():
        carved[split] = _even(chosen, count, rng)
        chosen = chosen[~np.isin(chosen, carved[split])]
    return carved


def _even(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `count` of the values at even distances from a random start; none where there are too few."""
    if count > len(values):
        return values[:0]
    return values[((np.arange(count) + rng.random()) * len(values) / count).astype(np.int64)]


def _carve_groups(
    pool: np.ndarray, groups: np.ndarray, wanted: Mapping[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns rows of `pool` for each split, in whole groups, not more than wanted where that can be."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    left = list(rng.permutation(len(names)))
    carved = {}
    for split, count in wanted.items():
        taken: list[int] = []
        for group in left:
            if len(taken) + 1 < len(left) and sizes[taken].sum() + sizes[group] <= count:
                taken.append(group)
        if not taken and len(left) > 1:  # every group is larger than the split should be
            taken = [min(left, key=sizes.__getitem__)]
        left = [group for group in left if group not in taken]
        carved[split] = pool[np.isin(inverse, np.array(taken, dtype=np.int64))]
    return carved


def _refuse_shared_groups(source: Path, groups: np.ndarray, splits: np.ndarray) -> None:
    pairs = set(zip(groups.tolist(), splits.tolist(), strict=True))
    homes: dict[str, list[str]] = {}
    for group, split in sorted(pairs):
        homes.setdefault(group, []).append(split)
    shared = [f"{group} ({', '.join(found)})" for group, found in homes.items() if len(found) > 1]
    if shared:
        raise ImageError(
            f"{source}: expected each group in one split, found {len(shared)} in several: {_shown(shared)}. "
            "Correct the column split, or remove it to have the splits made."
        )


def _shown(names: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    more = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
