"""A CSV table as a source of images: `path`, `label` or targets, perhaps `split`; other columns are attributes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from dpf_release.errors import ImageError
from dpf_release.images.table import SPLIT_NAMES, ImageTable, first_of, require_classes


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
    if regression:
        numbers = [[float(cell) for cell in columns[name]] for name in target_columns]
        targets = np.array(numbers, dtype=np.float32).T  # (K, N) -> (N, K)
        return ImageTable(source.parent, columns["path"], targets, (), target_columns, splits, attributes)
    found = set(columns["label"]).union(earlier)
    names = classes or tuple(sorted(found))
    require_classes(source, names, found)
    index = {name: number for number, name in enumerate(names)}
    targets = np.array([index.get(label, -1) for label in columns["label"]], dtype=np.int64)
    table = ImageTable(source.parent, columns["path"], targets, names, (), splits, attributes)
    return table.select(np.flatnonzero(targets >= 0))


def csv_splits(columns: dict[str, tuple[str, ...]]) -> list[str]:
    """Takes the column `split` out of the columns and returns it; `train` where there is none."""
    return [SPLIT_NAMES[name.lower()] for name in columns.pop("split", ("train",) * len(columns["path"]))]


def csv_columns(
    source: Path,
    needed: Sequence[str],
    number_columns: Sequence[str] = (),
) -> dict[str, tuple[str, ...]]:
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
