"""An audit as one page of HTML: no script, nothing loaded, every name escaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dpf_release.core.files import PRIVATE_FILE, PUBLIC_FILE, write_text
from dpf_release.core.html import render_page
from dpf_release.core.sizes import readable_size
from dpf_release.errors import ConfigError
from dpf_release.publish.audit.audit import Audit

SHORT_DIGEST = 12
TONES = {"passed": "good", "failed": "bad", "not run": "open"}
LONGEST_SHOWN = 5000  # a path has 4,096 bytes at the most
CLAIMS = {
    "reconstruction": "no picture can be reconstructed from its row",
    "linkage": "nobody who holds a picture can tell that it is in the release",
    "attribute": "no attribute of a person can be read from a row",
    "bound": "what rows, φ1 and φ2 tell of one unit is bounded",
}
NOT_MEASURED = (
    "An audit looks for mistakes and leaks in files. It does not measure what an attacker reconstructs from the rows: "
    "but for a bound that the manifest names, on its conditions, what protects them is empirical, without a formal "
    "guarantee. What is published cannot be called back."
)


def write_page(audit: Audit, path: Path, release: Path) -> None:
    """Writes the page on a release: for its owner alone (0600) where it was made with a vault.

    Raises:
        ConfigError: the file would lie inside the release.
        StorageError: it cannot be written.
    """
    if path.resolve().is_relative_to(release.resolve()):
        raise ConfigError(
            f"expected a place for the page outside the release, found {path}: it would be published with it, and "
            "`verify` would refuse the release. Name another with --html."
        )
    write_text(path, page(audit), PRIVATE_FILE if audit.private else PUBLIC_FILE)


def page(audit: Audit) -> str:
    """The page as text; it says nothing that is not in the audit."""
    values = {
        "audit": audit,
        "private": audit.private,
        "tone": TONES[audit.status],
        "headline": audit.headline,
        "detail": audit.verdict,
        "claims": CLAIMS,
        "not_measured": NOT_MEASURED,
        "short": SHORT_DIGEST,
    }
    filters: dict[str, Callable[..., Any]] = {"size": readable_size, "code": _with_code}
    return render_page("dpf_release.publish.audit", values, filters, finalize=_shown)


def printable(text: str) -> str:
    """Text of bounded length in which control characters, marks of direction and undecodable bytes are spelt out."""
    text = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " ..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _shown(value: Any) -> Any:
    """Of what the template prints."""
    return printable(value) if type(value) is str else value


def _with_code(text: str) -> Markup:
    """Words between backticks as code."""
    parts = printable(text).split("`")
    return Markup("").join(Markup("<code>{}</code>" if i % 2 else "{}").format(part) for i, part in enumerate(parts))
