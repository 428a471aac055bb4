"""An audit on a terminal, at 80 columns and more."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dpf_release.audit.checks import Result
from dpf_release.audit.page import NOT_MEASURED, SHORT_DIGEST, claims_in_words, printable
from dpf_release.audit.report import Artefact, Audit
from dpf_release.storage import readable_size

STYLES = {"passed": "green", "failed": "bold red", "not run": "yellow"}


def print_audit(audit: Audit, console: Console | None = None) -> None:
    """Prints verdict, findings, checks, artefacts of both sides, and claims; names of a stranger's as plain text."""
    console = console or Console()
    if audit.private:
        console.print(Text("Made with the vault: private, like the vault.", "bold"))
    style = STYLES["failed" if audit.findings else "passed"]
    console.print(Text(printable(f"{audit.headline}. {audit.verdict}"), style))
    for result in audit.results:
        if result.findings:
            console.print()
            console.print(_findings(result))
    _print_table(console, "Checks", ("check", "result", "what it proves / cannot see"), map(_check_row, audit.results))
    for title, artefacts, header in (
        ("Public artefacts", audit.of("public"), ("file, and what it holds", "role", "size", "SHA-256", "checks")),
        ("Private artefacts", audit.of("private"), ("file, and what it holds", "role", "size", "SHA-256", "held by")),
    ):
        if artefacts:
            _print_table(console, title, header, map(_artefact_row, artefacts))
    console.print()
    for sentence in (*claims_in_words(audit.claims), NOT_MEASURED):
        console.print(Text(printable(sentence)))


def _findings(result: Result) -> Group:
    lines = [Text(f"{result.check.name}: {result.check.advice}", "bold")]
    for finding in result.findings:
        where = ("vault/" if result.check.side == "private" else "") + finding.path
        lines.append(Text(printable(f"  {finding.kind}: {where}: {finding.detail}")))
    return Group(*lines)


def _check_row(result: Result) -> tuple[Text, ...]:
    said = Text(result.check.proves)
    said.append(f"\nCannot see: {result.check.cannot_see}", "dim")
    if result.reason:
        said = Text(printable(f"{result.reason}."), STYLES["not run"]).append("\n").append_text(said)
    status = result.status if result.status != "failed" else f"FAILED ({len(result.findings)})"
    return Text(result.check.name), Text(status, STYLES[result.status]), said


def _artefact_row(artefact: Artefact) -> tuple[Text, ...]:
    first = Text(printable(artefact.path))
    if artefact.holds:
        first.append("\n" + printable(artefact.holds), "dim")
    if artefact.side == "public":
        last = Text(f"{len(artefact.passed)} passed")
    else:
        last = Text(f"{artefact.mode} {'sealed' if artefact.sealed else 'in the clear'}")
        if artefact.releases:
            last.append("\n" + printable(", ".join(artefact.releases)), "dim")
    if artefact.failed:
        last = Text(f"FAILED {', '.join(artefact.failed)}", STYLES["failed"]).append("\n").append_text(last)
    digest = (artefact.sha256 or "not read")[:SHORT_DIGEST]
    return first, Text(artefact.role), Text(readable_size(artefact.bytes)), Text(digest), last


def _print_table(console: Console, title: str, header: tuple[str, ...], rows: Iterable[tuple[Text, ...]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for number, column in enumerate(header):
        # The first column of files, and the last of checks, take what is left of the width.
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left", no_wrap=False)
        if column in {"size", "SHA-256", "role", "check", "result"}:
            table.columns[number].no_wrap = True
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
