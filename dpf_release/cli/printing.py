"""What several commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from dpf_release.bank.format import BankIndex
    from dpf_release.images.dataset import BadImage


def print_unreadable(images: Sequence[BadImage]) -> None:
    """A line for each image that has no row."""
    for bad in images:
        print(f"left out, unreadable: {bad.name}: {bad.reason}")


def print_bank(index: BankIndex, folder: Path, unreadable: Sequence[BadImage]) -> None:
    """What was written where, after a line for each image that has no row."""
    print_unreadable(unreadable)
    print(f"Wrote {folder}: {index.rows}, {index.row_bytes} bytes a row")


def print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on the terminal; all but its first column stands to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_edge=False)
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def print_measurements(report: Mapping[str, Any]) -> None:
    """The table of `measure`: clean and poisoned, split by split."""
    for split in [name for name in ("val", "test") if name in report]:
        part = report[split]
        if "not_measured" in part:
            print(f"{split}: {part['not_measured']}")
            continue
        rows = []
        for metric in ("top1", "top5", "mae"):
            if f"{metric}_clean" in part["task"]:
                rows.append(_measured_row("φ2", part["task"], metric))
        for straw_man, values in part["reconstruction"].items():
            rows += [_measured_row(straw_man, values, metric) for metric in ("l1", "psnr", "ssim", "abs_ssim")]
        for column, values in part["attributes"].items():
            if "not_measured" in values:
                rows.append((f"{column} top1", "", "", values["not_measured"]))
            else:
                rows.append(_measured_row(column, values, "top1"))
        objective = f", objective {report['objective']}" if report["objective"] else ""
        title = f"{split}, {part['rows']} rows, {report['function']}{objective}"
        print_table(title, ("", "clean", "poisoned", "clean - poisoned, 95 %"), rows)


def _measured_row(whose: str, values: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    interval = values.get(f"{metric}_difference_95")
    shown = f"{values[f'{metric}_difference']:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f"{whose} {metric}", f"{values[f'{metric}_clean']:.4f}", f"{values[f'{metric}_poisoned']:.4f}", shown
