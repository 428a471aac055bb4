"""The dataset card of a release: its README.md, with Hugging Face front matter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpf_release.bank.format import BankIndex
from dpf_release.core.files import PUBLIC_FILE, write_text
from dpf_release.evaluation.report.headline import strongest
from dpf_release.owner.config import ReleaseSection
from dpf_release.owner.vault.retractions import Retracted
from dpf_release.publish.card_text import (
    ACCEPTED_RISK,
    AMONG,
    ANEW,
    ATTACKS,
    BANK_BEFORE,
    CARD,
    CATEGORIES,
    CLAIMED,
    CLAIMS,
    CUT_SHORT,
    DROPPED,
    IN_UNIT,
    LIMIT,
    NAMES,
    NO_ATTACKS,
    NO_CLAIM,
    NO_DESCRIPTION,
    NO_LIMIT,
    NOT_APPLICABLE,
    NOT_CLAIMED,
    NOT_DEFINED,
    NOT_GATED,
    NOT_MEASURED,
    NOT_RUN,
    OF_ATTRIBUTE,
    POWER,
    REBUILT,
    REBUILT_TOO,
    RETRACTED_SINCE,
    RETRACTIONS,
    SECOND_FUNCTION,
    THIS_BANK,
    score_rows,
)
from dpf_release.publish.gate import Passage
from dpf_release.release.attack_report import AttackReport, AttackResult, Interval
from dpf_release.release.manifest import ATTACK_REPORT, Claims
from dpf_release.release.model_record import ModelRecord


def write_card(
    path: Path,
    release: ReleaseSection,
    record: ModelRecord,
    index: BankIndex,
    scores: Mapping[str, Any],
    passage: Passage,
    statement: str,
    second_function: str = "",
    retractions: str = "",
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
    """
    text = CARD.format(
        **_facts(release, record, index),
        statement=statement,
        scores="\n".join(f"| {label} | {value} |" for label, value in score_rows(scores, record.unit)),
        claims_made=", ".join(passage.claims.made) or NO_CLAIM,
        claims=_claims(passage.claims, passage.attribute),
        attacks=NO_ATTACKS if passage.report is None else attacks_section(passage.report),
        accepted_risk=_accepted_risk(passage),
        second_function=SECOND_FUNCTION.format(reason=second_function) if second_function else "",
        retractions=retractions,
    )
    write_text(path, text, PUBLIC_FILE)


def _facts(release: ReleaseSection, record: ModelRecord, index: BankIndex) -> dict[str, Any]:
    """What the card says of the release, its network and its rows, by the places in `CARD`."""
    return {
        "name": json.dumps(release.name),
        "licence": json.dumps(release.licence.lower()),
        "licence_text": release.licence,
        "category": CATEGORIES[record.task],
        "title": release.name,
        "version": release.version,
        "description": release.description.strip() or NO_DESCRIPTION,
        "arch": record.arch,
        "hook": record.hook,
        "task": record.task + (IN_UNIT.format(unit=record.unit) if record.unit else ""),
        "names_label": NAMES[record.task],
        "names": _cell(", ".join(record.targets if record.task == "regression" else record.classes)),
        "rows": ", ".join(f"{split}: {rows}" for split, rows in index.rows.items()),
        "shape": " x ".join(map(str, record.feature_shape)),
        "size": " x ".join(map(str, record.preprocess.size)),
        "mean": list(record.preprocess.mean),
        "std": list(record.preprocess.std),
    }


def retractions_section(retracted: Retracted, steps: Sequence[Mapping[str, Any]]) -> str:
    """The section on what was retracted since a version was published; empty where nothing was.

    Args:
        retracted: all retractions of the vault.
        steps: `retracted` of the candidate's `candidate.json`: by which retractions rows were taken out of it.
    """
    rows: dict[str, int] = {}
    for retraction in retracted.retractions:
        if retraction.published and retraction.released_rows:
            rows[retraction.published[-1]] = rows.get(retraction.published[-1], 0) + retraction.released_rows
    if not rows:
        return ""
    base, count = "", 0  # the version whose bank the first of the steps began with, and the rows rebuilt since
    for step in steps:
        retraction = retracted.retractions[step["number"] - 1]
        if retraction.published_index == step["dropped_from"]:
            base, count = retraction.published[-1], 0
        count += step["rebuilt"]
    others = (REBUILT if count else DROPPED).format(base=base, count=count) if base else ANEW
    shown = REBUILT_TOO if base and count else ""
    told = ", ".join(RETRACTED_SINCE.format(count=count, version=version) for version, count in rows.items())
    return RETRACTIONS.format(rows=told, others=others, shown=shown)


def _claims(claims: Claims, attribute: str) -> str:
    of = {"attribute": OF_ATTRIBUTE.format(attribute=attribute)} if attribute else {}
    lines = [CLAIMED.format(name=name, of=of.get(name, ""), claim=CLAIMS[name]) for name in claims.made]
    lines += [NOT_CLAIMED.format(name=name, claim=CLAIMS[name]) for name in claims.not_made]
    return "".join(f"\n{line}" for line in lines) + "\n"


def attacks_section(report: AttackReport) -> str:
    """The table of what attacks reached: one row an attack, and one for each that does not apply."""
    rows = [_attack_row(result) for result in report.attacks]
    rows += [(code, *[""] * 7, NOT_APPLICABLE) for code in sorted(report.not_applicable)]
    rows += [(code, *[""] * 7, NOT_RUN) for code in report.not_run]
    dropped = report.dropped_since
    return ATTACKS.format(
        profile=report.profile,
        bank=BANK_BEFORE.format(count=dropped) if dropped else THIS_BANK,
        file=ATTACK_REPORT,
        rows="\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in rows),
        limits=", ".join(f"{name} {limit:g}" for name, limit in sorted(report.limits.items())) or NO_LIMIT,
    )


def _attack_row(result: AttackResult) -> tuple[str, ...]:
    return (
        f"{result.code} {result.title}",
        result.claim or NOT_GATED,
        _number(result.baseline),
        _number(reached(result)),
        _number(result.ceiling),
        _interval(result.leakage, "{:.3f}") or NOT_DEFINED,
        _re_identified(result),
        POWER[result.power.passed],
        result.verdict,
    )


def _re_identified(result: AttackResult) -> str:
    if result.re_identification is None:
        return NOT_MEASURED
    text = AMONG.format(share=_interval(result.re_identification, "{:.1%}"), count=result.among)
    limit = result.re_identification_limit if result.claim else None
    return text if limit is None else text + LIMIT.format(limit=limit)


def reached(result: AttackResult) -> float | None:
    """What an attack reached, in the measure of its baseline and its ceiling."""
    best = strongest(result)
    return best.found.value if best else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(found: Interval | None, form: str) -> str:
    return "" if found is None else f"{form.format(found.value)} [{form.format(found.low)}, {form.format(found.high)}]"


def _accepted_risk(passage: Passage) -> str:
    if not passage.accepted_risk:
        return ""
    listed = "\n".join(f"- {objection}" for objection in passage.objections)
    return ACCEPTED_RISK.format(objections=listed, reason=passage.accepted_risk)


def _cell(text: str, limit: int = 500) -> str:
    """Text that stays within its table cell."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= limit else text[:limit] + CUT_SHORT
