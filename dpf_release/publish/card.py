"""The dataset card of a release: its README.md, with Hugging Face front matter."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpf_release.bank.format import BankIndex
from dpf_release.core.files import PUBLIC_FILE, write_text
from dpf_release.core.privacy import Mechanism
from dpf_release.evaluation.report.headline import strongest
from dpf_release.owner.config import ReleaseSection
from dpf_release.owner.vault.retractions import Retracted
from dpf_release.publish import card_text as words
from dpf_release.publish.gate import Passage
from dpf_release.release.attack_report import AttackReport, AttackResult, Interval
from dpf_release.release.manifest import ATTACK_REPORT
from dpf_release.release.model_record import ModelRecord


def write_card(
    path: Path,
    release: ReleaseSection,
    record: ModelRecord,
    index: BankIndex,
    scores: Mapping[str, Any],
    passage: Passage,
    statement: str,
    second_function: str,
    retractions: str,
    privacy: Mechanism | None = None,
    drawn: bool = False,
) -> None:
    """Writes the card.

    Args:
        path: the file.
        release: the `[release]` section.
        record: the public model record.
        index: the public bank's.
        scores: split → `task` of the measurements of this candidate; empty where none were made.
        passage: what the release promises and what not, and what attacks reached.
        statement: what a row is made of, in a sentence (`PoisoningFunction.statement`).
        second_function: why the same images are published once more, under another function; empty where they are not.
        retractions: as `retractions_section` says it.
        privacy: of the step that made the rows; None: it has no bound.
        drawn: whether rows belong to no image.
    """
    rows_are = words.DRAWN_ROWS_ARE if drawn else words.ROWS_ARE
    text = words.CARD.format(
        release=release,
        rows_are=rows_are.format(arch=record.arch, hook=record.hook),
        name=json.dumps(release.name),
        licence=json.dumps(release.licence.lower()),
        category=words.CATEGORIES[record.task],
        description=release.description.strip() or words.NO_DESCRIPTION,
        task=record.task + (words.IN_UNIT.format(unit=record.unit) if record.unit else ""),
        names_label=words.NAMES[record.task],
        names=_cell(", ".join(record.targets if record.task == "regression" else record.classes)),
        rows=", ".join(f"{split}: {rows}" for split, rows in index.rows.items()),
        shape=" x ".join(map(str, record.feature_shape)),
        size=" x ".join(map(str, record.preprocess.size)),
        mean=list(record.preprocess.mean),
        std=list(record.preprocess.std),
        statement=statement,
        scores="\n".join(f"| {label} | {value} |" for label, value in words.score_rows(scores, record.unit)),
        claims_made=", ".join(passage.claims.made) or words.NO_CLAIM,
        claims=_claims(passage),
        attacks=_attacks_section(passage),
        protection=words.EMPIRICAL if privacy is None else _privacy(privacy),
        accepted_risk=_accepted_risk(passage),
        second_function=words.SECOND_FUNCTION.format(reason=second_function) if second_function else "",
        retractions=retractions,
    )
    write_text(path, text, PUBLIC_FILE)


def retractions_section(retracted: Retracted, steps: Sequence[Mapping[str, Any]], drawn: bool = False) -> str:
    """The section on what was retracted since a version was published; empty where nothing was.

    Args:
        retracted: all retractions of the vault.
        steps: `retracted` of the candidate's `candidate.json`: by which retractions rows were taken out of it.
        drawn: whether rows belong to no image; then it is not told how many images went.
    """
    rows: dict[str, int] = {}
    for retraction in retracted.retractions:
        if retraction.published and retraction.released_rows:
            rows[retraction.published[-1]] = rows.get(retraction.published[-1], 0) + retraction.released_rows
    if not rows:
        return ""
    if drawn:
        return words.DRAWN_AGAIN.format(versions=", ".join(rows))
    base, count = "", 0  # the version whose bank the first of the steps began with, and the rows rebuilt since
    for step in steps:
        retraction = retracted.retractions[step["number"] - 1]
        if retraction.published_index == step["dropped_from"]:
            base, count = retraction.published[-1], 0
        count += step["rebuilt"]
    others = (words.REBUILT if count else words.DROPPED).format(base=base, count=count) if base else words.ANEW
    shown = words.REBUILT_TOO if base and count else ""
    told = ", ".join(words.RETRACTED_SINCE.format(count=count, version=version) for version, count in rows.items())
    return words.RETRACTIONS.format(rows=told, others=others, shown=shown)


def _claims(passage: Passage) -> str:
    of = {"attribute": words.OF_ATTRIBUTE.format(attribute=passage.attribute)} if passage.attribute else {}
    made, not_made = passage.claims.made, passage.claims.not_made
    lines = [words.CLAIMED.format(name=name, of=of.get(name, ""), claim=words.CLAIMS[name]) for name in made]
    lines += [words.NOT_CLAIMED.format(name=name, claim=words.CLAIMS[name]) for name in not_made]
    return "".join(f"\n{line}" for line in lines) + "\n"


def _attacks_section(passage: Passage) -> str:
    if passage.report is not None:
        return _attacks(passage.report)
    return words.ATTACKS_KEPT if passage.report_kept else words.NO_ATTACKS


def _privacy(mechanism: Mechanism) -> str:
    """The bound, with its unit and its condition; only where nothing is left out is it one of the whole release."""
    numbers = {"epsilon": f"{mechanism.epsilon:g}", "delta": f"{mechanism.delta:g}"}
    unit = words.UNITS[mechanism.unit]
    if mechanism.networks_saw_images:
        text = words.BOUND_OF_STEP.format(unit=unit, **numbers)
    else:
        what = words.PARTS if mechanism.not_covered else words.WHOLE
        text = words.BOUND.format(what=what, unit=unit, several=words.SEVERAL[mechanism.unit], **numbers)
    if mechanism.fits > 1:
        text += words.SEVERAL_FITS.format(fits=mechanism.fits, epsilon=f"{mechanism.epsilon_of_all:.3g}")
    if mechanism.not_covered and not mechanism.networks_saw_images:
        text += words.NOT_COVERED.format(listed="; ".join(mechanism.not_covered))
    return words.PRIVACY.format(text=textwrap.fill(" ".join(text.split()), 118))


def _attacks(report: AttackReport) -> str:
    """The table of what attacks reached: one row an attack, and one for each that does not apply."""
    rows = [_attack_row(result) for result in report.attacks]
    rows += [(code, *[""] * 7, words.NOT_APPLICABLE) for code in sorted(report.not_applicable)]
    rows += [(code, *[""] * 7, words.NOT_RUN) for code in report.not_run]
    dropped = report.dropped_since
    return words.ATTACKS.format(
        profile=report.profile,
        bank=words.BANK_BEFORE.format(count=dropped) if dropped else words.THIS_BANK,
        file=ATTACK_REPORT,
        rows="\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in rows),
        limits=", ".join(f"{name} {limit:g}" for name, limit in sorted(report.limits.items())) or words.NO_LIMIT,
    )


def _attack_row(result: AttackResult) -> tuple[str, ...]:
    best = strongest(result)
    reached = best.found.value if best else None
    return (
        f"{result.code} {result.title}",
        result.claim or words.NOT_GATED,
        *("" if value is None else f"{value:.3f}" for value in (result.baseline, reached, result.ceiling)),
        _interval(result.leakage, "{:.3f}") if result.leakage else words.NOT_DEFINED,
        _re_identified(result),
        words.POWER[result.power.passed],
        result.verdict,
    )


def _re_identified(result: AttackResult) -> str:
    if result.re_identification is None:
        return words.NOT_MEASURED
    text = words.AMONG.format(share=_interval(result.re_identification, "{:.1%}"), count=result.among)
    limit = result.re_identification_limit if result.claim else None
    return text if limit is None else text + words.LIMIT.format(limit=limit)


def _interval(found: Interval, form: str) -> str:
    return f"{form.format(found.value)} [{form.format(found.low)}, {form.format(found.high)}]"


def _accepted_risk(passage: Passage) -> str:
    if not passage.accepted_risk:
        return ""
    listed = "\n".join(f"- {objection}" for objection in passage.objections)
    return words.ACCEPTED_RISK.format(objections=listed, reason=passage.accepted_risk)


def _cell(text: str, limit: int = 500) -> str:
    """Text that stays within its table cell."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= limit else text[:limit] + words.CUT_SHORT
