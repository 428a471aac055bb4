"""An audit on a terminal, at 80 columns and more."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpf_release.core.sizes import readable_size
from dpf_release.publish.audit.audit import Artefact, Audit
from dpf_release.publish.audit.engine import Result
from dpf_release.publish.audit.page import CLAIMS, NOT_MEASURED, SHORT_DIGEST, printable

WIDE = 120  # columns, from which the facts of a file stand side by side
STYLES = {"passed": "green", "failed": "bold red", "not run": "yellow"}


def print_audit(audit: Audit, console: Console | None = None) -> None:
    """Prints verdict, findings, checks, artefacts of both sides, and claims; names of a stranger's as plain text."""
    console = console or Console()
    if audit.private:
        console.print(Text("Made with the vault: private, like the vault.", "bold"))
    console.print(Text(printable(f"{audit.headline}. {audit.verdict}"), STYLES[audit.status]))
    for result in audit.results:
        if result.findings:
            console.print(Text(f"\n{result.check.name}: {result.check.advice}", "bold"))
        for finding in result.findings:
            where = ("vault/" if result.check.side == "private" else "") + finding.path
            console.print(Text(printable(f"  {finding.kind}: {where}: {finding.detail}")))
    _print_table(
        console, "Checks", ("check", "result", "what it proves, and cannot see"), map(_check_row, audit.results)
    )
    wide = console.width >= WIDE
    for title, artefacts, last in (
        ("Public artefacts", audit.of("public"), "checks passed"),
        ("Private artefacts", audit.of("private"), "kept"),
    ):
        header = ("file, and what it holds", "role", "size", "SHA-256", last) if wide else ("file, and what it holds",)
        if artefacts:
            _print_table(console, title, header, map(_artefact_row if wide else _artefact_block, artefacts))
    console.print()
    for label, names in (("Claims made", audit.claims.made), ("Claims not made", audit.claims.not_made)):
        told = "; ".join(f"{name} ({CLAIMS[name]})" if name in CLAIMS else name for name in names) or "none"
        console.print(Text(printable(f"{label}: {told}.")))
    console.print(Text(NOT_MEASURED))


def _check_row(result: Result) -> tuple[Text, ...]:
    said = Text(result.check.proves)
    said.append(f"\nCannot see: {result.check.cannot_see}", "dim")
    if result.reason:
        said = Text(printable(f"{result.reason}."), STYLES["not run"]).append("\n").append_text(said)
    status = result.status if result.status != "failed" else f"FAILED ({len(result.findings)})"
    return Text(result.check.name), Text(status, STYLES[result.status]), said


def _artefact_row(artefact: Artefact) -> tuple[Text, ...]:
    facts = Text(artefact.role), Text(readable_size(artefact.bytes)), Text(_digest(artefact))
    return _name(artefact), *facts, _judged(artefact)


def _artefact_block(artefact: Artefact) -> tuple[Text]:
    """One below the other what a wide terminal shows side by side."""
    size, digest = readable_size(artefact.bytes), _digest(artefact)
    facts = Text(f"\n{artefact.role}, {size}, SHA-256 {digest}\n", "dim")
    if artefact.passed and artefact.side == "public":
        facts.append("passed: ", "dim")
    return (_name(artefact).append_text(facts).append_text(_judged(artefact)),)


def _name(artefact: Artefact) -> Text:
    name = Text(printable(artefact.path), "bold")
    return name.append("\n" + printable(artefact.holds), "not bold") if artefact.holds else name


def _judged(artefact: Artefact) -> Text:
    said = ", ".join(artefact.passed) or "none passed"
    if artefact.side == "private":
        said = f"{artefact.mode}, {artefact.at_rest}"
        said += f", of {', '.join(artefact.releases)}" if artefact.releases else ""
    failed = Text(f"FAILED: {', '.join(artefact.failed)}\n" if artefact.failed else "", STYLES["failed"])
    return failed.append(printable(said), "not bold")


def _digest(artefact: Artefact) -> str:
    return (artefact.sha256 or "not read")[:SHORT_DIGEST]


def _print_table(console: Console, title: str, header: tuple[str, ...], rows: Iterable[tuple[Text, ...]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for column in header:
        narrow = column in {"role", "size", "SHA-256", "check", "result"}
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left", no_wrap=narrow)
    for row in rows:
        table.add_row(*row, end_section=len(header) == 1)
    console.print()
    console.print(table)
