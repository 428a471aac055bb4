"""What several commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from dpf_release.bank.format import BankIndex
    from dpf_release.core.privacy import Mechanism
    from dpf_release.images.dataset import BadImage
    from dpf_release.owner.privacy import PrivacySpent


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


def print_bound(mechanism: Mechanism) -> None:
    """What a release says of its privacy bound, with its condition."""
    networks = "the networks were trained on these images, so the release has no bound"
    clean = "φ1 never saw these images, and φ2 was trained on the drawn rows alone"
    print(
        f"The step that made the rows: epsilon = {mechanism.epsilon:g}, delta = {mechanism.delta:g} for each "
        f"{mechanism.unit}, for fixed networks; {networks if mechanism.networks_saw_images else clean}."
    )
    if mechanism.fits > 1:
        print(f"With the other published fits, {mechanism.fits} in all: epsilon = {mechanism.epsilon_of_all:.3g}.")
    print(f"Not covered: {'; '.join(mechanism.not_covered) or 'nothing that is published'}.")


def print_spent(spent: PrivacySpent) -> None:
    """What of the images' privacy is spent and left, and the table of fits."""
    if not spent.fits:
        print("No function with a privacy bound was fitted.")
    else:
        print(f"Published fits together: epsilon = {spent.spent:.3g} (delta = {spent.delta:g}), for each {spent.unit}.")
        print(
            "This is of the steps that made rows, for fixed networks; `package` says whether a release has the bound."
        )
    if spent.budget is not None:
        print(f"Budget ([privacy] epsilon): {spent.budget:g}. Left: epsilon = {spent.left:.3g}.")
    if spent.next_fit is not None:
        print(
            "A retraction fits a function that draws rows once more. One more fit like the last, once published: "
            f"epsilon = {spent.next_fit:.3g} of all together."
        )
    if spent.unbounded:
        print(f"Without a bound: {', '.join(spent.unbounded)}. No epsilon holds for all that is published.")
    rows = [
        (
            fit.name,
            fit.function,
            f"{fit.mechanism.epsilon:g}",
            f"{fit.mechanism.delta:g}",
            fit.mechanism.unit,
            ", ".join(fit.published) or "no",
        )
        for fit in spent.fits
    ]
    if rows:
        print_table("Fits", ("name", "function", "epsilon", "delta", "for each", "published"), rows)


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
