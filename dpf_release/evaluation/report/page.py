"""An attack report as one page of HTML: no script, nothing loaded, every name escaped, pictures and plots inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dpf_release.core.files import PUBLIC_FILE, make_folder, write_text
from dpf_release.core.html import render_page
from dpf_release.errors import ConfigError
from dpf_release.evaluation.gallery import Pictures, read_pictures
from dpf_release.evaluation.report.frontier_points import FRONTIER, Frontier, frontier_plots
from dpf_release.evaluation.report.headline import (
    MEASURES,
    granted_to,
    notes,
    own_images,
    strongest,
    usefulness,
    verdict_in_words,
)
from dpf_release.evaluation.report.numbers import interval, number, planted, power, share
from dpf_release.evaluation.report.plots import leakage_plot, series_plot
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.attack_report import AttackReport, AttackResult, public_report

PAGE = "attack.html"
TILE, GAP = 96, 2  # pixels: the longest side of a picture on the page, and between two
TYPICAL = {"original": "Original", "clean": "From the unprotected row"}
WORST = {
    "worst original": "Original",
    "worst clean": "From the unprotected row",
    "worst attack": "The attack",
    "worst fitted": "The attack, colours fitted",
}
FILTERS = {tell.__name__: tell for tell in (number, interval, share, power, planted)}


@dataclass(frozen=True)
class Strip:
    """Pictures side by side."""

    label: str
    code: str  # of the attack that made them; empty for others
    source: str  # a data URI
    alt: str  # the same in words
    count: int


def write_page(vault: Vault, name: str, report: AttackReport) -> Path:
    """Writes the owner's page into the vault, from what lies there: pictures of S are on it. Returns its path."""
    path, others = make_folder(vault.reports(name)) / PAGE, vault.root / "reports" / FRONTIER
    frontier = Frontier.model_validate(vault.read_record(others, "compare")) if vault.holds(others) else Frontier()
    function = vault.function(name) / "function.json"
    statement = vault.read_record(function, "fit-poison").get("statement", "") if vault.holds(function) else ""
    text = page(report, read_pictures(vault, name, report), frontier, private=True, statement=statement)
    vault.write_bytes(path, text.encode())
    return path


def write_public_page(report: AttackReport, pictures: Pictures, path: Path) -> None:
    """Writes a page that anyone may have: a report's numbers, and pictures of Q (`public_page.public_pictures`)."""
    refuse_inside_release(path)
    write_text(path, page(public_report(report), pictures, Frontier(), private=False), PUBLIC_FILE)


def refuse_inside_release(path: Path) -> None:
    """That a page does not lie in a folder that is published as it was packaged."""
    if any((folder / "manifest.json").exists() for folder in path.resolve().parents):
        raise ConfigError(
            f"expected a place for the page outside of a release, found {path}: `verify` refuses a release with a file "
            "that its manifest does not list. Name another with --public."
        )


def page(report: AttackReport, pictures: Pictures, frontier: Frontier, *, private: bool, statement: str = "") -> str:
    """The page as text; it says nothing that is not in what it is given.

    `private` says that the pictures are of S, `statement` what a row is made of. A frontier without points is not told.
    """
    attacks = report.attacks
    values = {
        **verdict_in_words(report)._asdict(),
        "report": report,
        "private": private,
        "statement": statement,
        "granted": granted_to,
        "notes": notes(report),
        "usefulness": usefulness(report),
        "own_images": own_images,
        "measures": MEASURES,
        "strongest": {result.code: strongest(result) for result in attacks},
        "leakage": data_uri(leakage_plot(attacks)) if any(result.leakage for result in attacks) else "",
        "series": [(result, data_uri(series_plot(result.series))) for result in attacks if any(result.series.values())],
        "typical": typical_strips(attacks, pictures),
        "worst": [(result, strips) for result in attacks if (strips := worst_strips(result, pictures))],
        "not_pictured": [result.code for result in attacks if f"{result.code}/attack" not in pictures],
        "frontier": frontier,
        "scatters": [(what, data_uri(plot)) for what, plot in frontier_plots(frontier)],
    }
    return render_page("dpf_release.evaluation.report", values, FILTERS)


def typical_strips(results: Sequence[AttackResult], pictures: Pictures) -> list[list[Strip]]:
    """Originals, clean reconstructions and each attack's, in one grid for all attacks with the same originals."""
    grids: list[tuple[Tensor, list[Strip]]] = []
    for result in results:
        if f"{result.code}/attack" not in pictures:
            continue
        originals = pictures[f"{result.code}/original"]
        strips = next((strips for shown, strips in grids if shown.equal(originals)), None)
        if strips is None:
            strips = [strip(label, pictures[f"{result.code}/{key}"]) for key, label in TYPICAL.items()]
            grids.append((originals, strips))
        strips.append(strip(result.title, pictures[f"{result.code}/attack"], result.code))
    return [strips for _, strips in grids]


def worst_strips(result: AttackResult, pictures: Pictures) -> list[Strip]:
    """The rows of which an attack shows most; none where its pictures were not kept."""
    shown = {label: pictures.get(f"{result.code}/{key}") for key, label in WORST.items()}
    return [strip(label, these, result.code) for label, these in shown.items() if these is not None]


def strip(label: str, pictures: Tensor, code: str = "") -> Strip:
    """Pictures (n, 3, H, W) uint8 side by side; large ones are made smaller."""
    height, width = pictures.shape[2:]
    scale = min(1.0, TILE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    gap = GAP if scale < 1 or width >= TILE // 2 else 1
    sheet = Image.new("RGB", (len(pictures) * (size[0] + gap) - gap, size[1]), "white")
    for place, picture in enumerate(pictures):
        tile = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))  # (H, W, 3)
        sheet.paste(tile.resize(size, Image.Resampling.BOX) if scale < 1 else tile, (place * (size[0] + gap), 0))
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    alt = f"{label}{f' ({code})' if code else ''}: {len(pictures)} {'picture' if len(pictures) == 1 else 'pictures'}"
    return Strip(label, code, source, alt, len(pictures))


def data_uri(svg: str) -> str:
    """An SVG as the source of an image."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
