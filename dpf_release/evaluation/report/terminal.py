"""An attack report on a terminal, at 80 columns and more."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpf_release.evaluation.report.frontier_points import Frontier
from dpf_release.evaluation.report.headline import (
    granted_to,
    notes,
    own_images,
    strongest,
    usefulness,
    verdict_in_words,
)
from dpf_release.evaluation.report.numbers import interval, number, power, share
from dpf_release.release.attack_report import AttackReport, AttackResult

WIDE = 130  # columns, from which all numbers stand side by side
TONES = {"good": "bold green", "bad": "bold red", "open": "bold yellow"}
VERDICTS = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "reported": "dim"}


def print_attacks(report: AttackReport, console: Console | None = None) -> None:
    """Prints the verdict in a sentence, the table of attacks, why they were judged so, and the utilities."""
    console = console or Console()
    verdict = verdict_in_words(report)
    console.print(Text(verdict.headline, TONES[verdict.tone]))
    console.print(Text(verdict.detail))
    if not report.attacks:
        return
    console.print()
    table = _table(f"Attacks{f' on {report.function}' if report.function else ''}, profile {report.profile}")
    console.print((_wide if console.width >= WIDE else _narrow)(table, report))
    for result in report.attacks:
        for reason in result.reasons:
            console.print(Text.assemble((f"{result.code} {result.verdict}: ", VERDICTS[result.verdict]), reason))
    for note in notes(report):
        console.print(Text(note, "dim"))
    if report.utility:
        console.print()
        for sentence in usefulness(report):
            console.print(Text(sentence))
        table = _table(f"Utility of {report.function}" if report.function else "Utility")
        for column in ("", "measure", "found"):
            table.add_column(column, overflow="fold")
        for name, utility in report.utility.items():
            for measure, found in utility.ordered.items():
                table.add_row(Text(name), Text(measure), interval(found))
        console.print(table)


def print_frontier(frontier: Frontier, console: Console | None = None) -> None:
    """Prints a line a function."""
    console = console or Console()
    table = _table(f"Privacy and use, profile {frontier.profile}")
    for column in ("function", "ε", "leakage", "row found", "the bank adds", "clean rows add"):
        table.add_column(column, overflow="fold", no_wrap=column != "function")
    for point in frontier.points:
        bound = "none" if point.epsilon is None else f"{point.epsilon:g}"
        cells = (
            bound,
            interval(point.privacy),
            share(point.linkage),
            *map(interval, (point.gain, point.gain_of_clean)),
        )
        named = Text.assemble((point.name, "bold"), f" {point.function}")
        table.add_row(named, *(cell.replace(" [", "\n[") for cell in cells))
    console.print(table)
    for m in {point.m for point in frontier.points} - {""}:
        console.print(f"Added to the best that a user has without the bank, with {own_images(m)}.", highlight=False)


def _wide(table: Table, report: AttackReport) -> Table:
    for column in ("attack", "baseline", "attack's", "ceiling", "leakage", "re-identification", "power", "verdict"):
        table.add_column(column, overflow="fold", no_wrap=column != "attack")
    for result in report.attacks:
        found = interval(result.leakage), share(result.re_identification), power(result)
        table.add_row(_name(result), *_compared(result), *found, _verdict(result))
    return table


def _narrow(table: Table, report: AttackReport) -> Table:
    """Intervals below their numbers, and what belongs together in one cell."""
    table.add_column("attack", overflow="fold", ratio=1)
    for column in ("baseline, attack, ceiling", "leakage", "re-identified", "verdict, power"):
        table.add_column(column.replace(", ", ",\n", 1), no_wrap=True)
    for result in report.attacks:
        table.add_row(
            _name(result),
            "  ".join(_compared(result)),
            interval(result.leakage).replace(" [", "\n["),
            share(result.re_identification).replace(" [", "\n["),
            _verdict(result).append("\n" + power(result).replace(", ", "\n"), "dim"),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)


def _name(result: AttackResult) -> Text:
    return Text.assemble((result.code, "bold"), f" {result.title}\n", (f"has {granted_to(result)}", "dim"))


def _compared(result: AttackResult) -> tuple[str, str, str]:
    best = strongest(result)
    return number(result.baseline), number(best.found.value if best else None), number(result.ceiling)


def _verdict(result: AttackResult) -> Text:
    return Text(result.verdict, VERDICTS[result.verdict])
