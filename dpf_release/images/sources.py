"""Where images come from: a folder, `train/CLASS/*.jpg` or `CLASS/*.jpg` without splits, or a CSV table.

A table has `path`, `label` or targets, perhaps `split`; other columns are attributes. `images.read` chooses. A source
of another kind (WebDataset, Hugging Face `datasets`) is one more function here, and one more case there.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from dpf_release.errors import ImageError
from dpf_release.images.table import SPLIT_NAMES, ImageTable, first_of, require_classes

_READ_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
# Other image formats are listed too: such a file becomes a reported bad image, not a missing one.
_OTHER_SUFFIXES = {".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".heic", ".heif", ".avif", ".jp2", ".jxl"}


def image_files(folder: Path) -> Iterator[str]:
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


def read_folder(source: Path, classes: tuple[str, ...], earlier: tuple[str, ...]) -> ImageTable:
    """A labelled folder, its splits as far as it names them; arguments as of `read.read_table`."""
    paths = list(image_files(source))
    parts = [PurePosixPath(path).parts for path in paths]
    has_splits = any(entry.is_dir() and entry.name.lower() in SPLIT_NAMES for entry in source.iterdir())
    depth = 1 if has_splits else 0  # where the class folder stands
    stray = [
        path
        for path, names in zip(paths, parts, strict=True)
        if len(names) < depth + 2 or (has_splits and names[0].lower() not in SPLIT_NAMES)
    ]
    if stray:
        layout = "train/CLASS/IMAGE, val/CLASS/IMAGE, test/CLASS/IMAGE" if has_splits else "CLASS/IMAGE"
        raise ImageError(
            f"{source}: expected {layout}, found {len(stray)} images elsewhere, first {first_of(stray)}. "
            "Move them into a class folder, or out of the tree."
        )
    splits = np.array([SPLIT_NAMES[names[0].lower()] if has_splits else "train" for names in parts], "U5")
    table = ImageTable(source, tuple(paths), np.empty(0), (), (), splits, {})
    return _labelled(source, table, [names[depth] for names in parts], classes, earlier)


def _labelled(
    source: Path, table: ImageTable, labels: Sequence[str], classes: tuple[str, ...], earlier: tuple[str, ...]
) -> ImageTable:
    """The images of a table that are of the wanted classes; all classes, sorted, where none is named."""
    found = set(labels).union(earlier)
    names = classes or tuple(sorted(found))
    require_classes(source, names, found)
    index = {name: number for number, name in enumerate(names)}
    targets = np.array([index.get(label, -1) for label in labels], dtype=np.int64)
    return replace(table, targets=targets, classes=names).select(np.flatnonzero(targets >= 0))


def read_csv(
    source: Path,
    task: str,
    target_columns: tuple[str, ...],
    group_column: str | None,
    classes: tuple[str, ...],
    earlier: tuple[str, ...],
) -> ImageTable:
    """A labelled table, its splits as far as it names them; arguments as of `read.read_table`."""
    regression = task == "regression"
    if regression and not target_columns:
        raise ImageError(f"{source}: a regression needs the names of its target columns, found none.")
    own = [*target_columns] if regression else ["label"]
    needed = ["path", *own, *([group_column] if group_column else [])]
    columns = csv_columns(source, needed, target_columns)
    splits = np.array(csv_splits(columns), dtype="U5")
    # The group stays an attribute, also where it is the label or a target.
    attributes = {name: cells for name, cells in columns.items() if name == group_column or name not in ("path", *own)}
    table = ImageTable(source.parent, columns["path"], np.empty(0), (), (), splits, attributes)
    if regression:
        numbers = [[float(cell) for cell in columns[name]] for name in target_columns]
        targets = np.array(numbers, dtype=np.float32).T  # (K, N) -> (N, K)
        return replace(table, targets=targets, target_names=target_columns)
    return _labelled(source, table, columns["label"], classes, earlier)


def csv_splits(columns: dict[str, tuple[str, ...]]) -> list[str]:
    """Takes the column `split` out of the columns and returns it; `train` where there is none."""
    return [SPLIT_NAMES[name.lower()] for name in columns.pop("split", ("train",) * len(columns["path"]))]


def csv_columns(source: Path, needed: Sequence[str], number_columns: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Returns the columns of a CSV file by name, with checked and normalised paths, splits and numbers."""
    if source.suffix.lower() != ".csv" or not source.is_file():
        raise ImageError(f"{source}: expected a folder of images or a .csv file, found neither. Check the path.")
    header, rows, problems = _cells(source)
    missing = [name for name in needed if name not in header]
    named = [name for name in header if name]  # pandas writes its index under an empty name
    if missing or len(set(named)) < len(named):
        fault = f"no column {', '.join(missing)}" if missing else "a column name twice"
        raise ImageError(
            f"{source}: expected the columns {', '.join(needed)}, each once, found {fault} "
            f"(the first line has: {', '.join(header)}). Correct the first line or the column's name."
        )
    columns = {name: [cells[place] for cells in rows.values()] for place, name in enumerate(header) if name}
    lines_of: dict[str, int] = {}
    for row, line in enumerate(rows):
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
            f"{source}: {len(problems)} rows cannot be used: {first_of(problems, '; ')}. Fill or remove these rows."
        )
    return {name: tuple(column) for name, column in columns.items()}


def _cells(source: Path) -> tuple[list[str], dict[int, list[str]], list[str]]:
    """The first line's cells, those of the others by line number, and what is wrong with lines of another length."""
    rows, problems = {}, []
    try:
        with source.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(reader, [])]
            for cells in filter(None, reader):
                if len(cells) == len(header):
                    rows[reader.line_num] = [cell.strip() for cell in cells]
                else:
                    problems.append(f"line {reader.line_num}: expected {len(header)} cells, found {len(cells)}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise ImageError(f"{source}: expected a comma-separated table in UTF-8, found: {error}.") from error
    return header, rows, problems


def _row_fault(cells: Mapping[str, str], needed: Sequence[str], number_columns: Sequence[str]) -> str:
    """Returns what is wrong with a row of a CSV table, or an empty text."""
    for name in needed:
        if not cells[name]:
            return f"{name} is empty"
    path = PureWindowsPath(cells["path"])  # reads both kinds of separators, and drives
    if path.anchor or ".." in path.parts:
        return f"path {cells['path']!r} must be relative and stay inside the table's folder"
    if cells.get("split", "train").lower() not in SPLIT_NAMES:
        return f"split is {cells['split']!r}, expected train, val or test"
    for name in number_columns:
        try:
            finite = abs(float(cells[name])) <= float(np.finfo(np.float32).max)
        except ValueError:
            finite = False
        if not finite:
            return f"{name} is {cells[name]!r}, expected a finite number"
    return ""
