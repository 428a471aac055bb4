"""The dataset card of a release: its README.md, with Hugging Face front matter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpf_release.attack_report import AttackReport, AttackResult, Interval
from dpf_release.bank import BankIndex
from dpf_release.battery.sentence import strongest
from dpf_release.config import Config
from dpf_release.gate import Passage
from dpf_release.manifest import ATTACK_REPORT, Claims
from dpf_release.record import ModelRecord
from dpf_release.retracted import Retracted
from dpf_release.storage import PUBLIC_FILE, write_text

NO_DESCRIPTION = "No description was given."
CARD = """\
---
pretty_name: {name}
license: {licence}
task_categories:
- {category}
tags:
- image-features
- privacy
- deep-poisoning-function
- dpf-release
---

# {title} {version}

{description}

A feature bank in the place of an image data set. The rows are P(φ1(S)): images S, seen by the public featurizer φ1
(`{arch}` up to `{hook}`), changed by a poisoning function P that is not published. Neither are the images.

| | |
|---|---|
| task | {task} |
| {names_label} | {names} |
| rows | {rows} |
| a row | {shape}, float16 |
| images for φ1 | RGB, {size} px, mean {mean}, std {std} |
| licence | {licence_text} |
{scores}

## Use

```python
from dpf_release import Release

release = Release.open(".")               # checks every file against manifest.json
bank = release.bank("train")              # a torch data set: (C, H, W) features, target
loader = bank.loader(batch_size=256, shuffle=True)
phi_1, phi_2 = release.featurizer(), release.classifier()
features_of_mine = phi_1(release.preprocess(my_images))
```

`sha256sum -c SHA256SUMS` checks the files without any of our code. `features/*/*.h5` open with plain `h5py`.
{retractions}
## What is promised, and what is not

Claims made: **{claims_made}**.
{claims}
{attacks}
The protection is empirical: the method (Guo et al., arXiv 1912.06895) gives no formal guarantee. A release cannot be
recalled: who has a copy keeps it. A patent application, US 2021/0141926, describes this family of methods.
{accepted_risk}{second_function}"""

CLAIMS: dict[str, str] = {
    "reconstruction": "that no picture can be reconstructed",
    "linkage": "that nobody who holds a picture can tell that it is in here",
    "attribute": "that no attribute of a person can be read from a row",
}

NO_ATTACKS = "Attacks measured: **none**; no attack battery was run on this bank.\n"
ATTACKS = """\
Attacks measured: those of profile **{profile}**, {bank}. All numbers are in `{file}`.

| attack | speaks against | without the bank | attack | unpoisoned rows | leakage | re-identified | power | verdict |
|---|---|---|---|---|---|---|---|---|
{rows}

Each attack is compared with what someone without the bank reaches and with the best that is reached on unpoisoned
rows: leakage 0 is the one, 1 the other, not defined where they are too near (SSIM after a colour fit; of linkage, the
share that is found). Limits that a claim had to stay below: {limits}.
Re-identified: the share of rows, or of pictures, whose own is picked among up to 200 of the class. In brackets, 95 %
intervals. An attack without power does not even break the weak functions that it must break: its failure here proves
nothing.
"""
THIS_BANK = "on exactly this bank"
BANK_BEFORE = "on this bank as it was before {count} rows were dropped; all other rows are as they were then"
POWER = {True: "yes", False: "no", None: "not tried"}
NOT_APPLICABLE, NOT_RUN = "not applicable", "not run"
NOT_DEFINED, NOT_MEASURED = "not defined", "not measured"
NOT_GATED = "none: reported only"

ACCEPTED_RISK = """
## A risk that was accepted

The owner wanted to make claims that the attacks do not bear out, and published without them. What speaks against them:

{objections}

The owner's reason: {reason}
"""

SECOND_FUNCTION = """
## A second function

Of the same images another release was made before, with another poisoning function. Two views of one image help an
attacker: what one hides, the other may show. The owner's reason: {reason}
"""

CATEGORIES = {"classification": "image-classification", "regression": "other"}
SCORES = {"top1": ("top-1", "{:.2%}"), "mae": ("mean absolute error", "{:.3g} {unit}")}


def fixed_card_text() -> str:
    """All that the words of a card are made of, but for what is the owner's."""
    scores = [*(label for label, _ in SCORES.values()), str(_score_rows({}, ""))]
    attacks = [
        NO_ATTACKS,
        ATTACKS,
        THIS_BANK,
        BANK_BEFORE,
        NOT_APPLICABLE,
        NOT_RUN,
        NOT_DEFINED,
        NOT_MEASURED,
        NOT_GATED,
        ACCEPTED_RISK,
        *POWER.values(),
    ]
    sections = [CARD, NO_DESCRIPTION, *attacks, SECOND_FUNCTION, RETRACTIONS, DROPPED, REBUILT, REBUILT_TOO, ANEW]
    return "\n".join([*sections, *CATEGORIES.values(), *CLAIMS, *CLAIMS.values(), *scores])


def write_card(
    path: Path,
    config: Config,
    record: ModelRecord,
    index: BankIndex,
    scores: Mapping[str, Any],
    passage: Passage,
    second_function: str = "",
    retractions: str = "",
) -> None:
    """Writes the card.

    Args:
        path: the file.
        config: for the `[release]` section.
        record: the public model record.
        index: the public bank's.
        scores: split → `task` of the measurements of this candidate; empty where none were made.
        passage: what the release promises and what not, and what attacks reached.
        second_function: why the same images are published once more, under another function; empty where they are not.
        retractions: as `describe_retractions` says it.
    """
    regression = record.task == "regression"
    text = CARD.format(
        name=json.dumps(config.release.name),
        licence=json.dumps(config.release.licence.lower()),
        licence_text=config.release.licence,
        category=CATEGORIES[record.task],
        title=config.release.name,
        version=config.release.version,
        description=config.release.description.strip() or NO_DESCRIPTION,
        arch=record.arch,
        hook=record.hook,
        task=record.task + (f", in {record.unit}" if record.unit else ""),
        names_label="targets" if regression else "classes",
        names=_cell(", ".join(record.targets if regression else record.classes)),
        rows=", ".join(f"{split}: {sum(s.rows for s in shards)}" for split, shards in index.splits.items()),
        shape=" x ".join(map(str, record.feature_shape)),
        size=" x ".join(map(str, record.preprocess.size)),
        mean=list(record.preprocess.mean),
        std=list(record.preprocess.std),
        scores="\n".join(f"| {label} | {value} |" for label, value in _score_rows(scores, record.unit)),
        claims_made=", ".join(passage.claims.made) or "none",
        claims=_claims(passage.claims, passage.attribute),
        attacks=NO_ATTACKS if passage.report is None else describe_attacks(passage.report),
        accepted_risk=_accepted_risk(passage),
        second_function=SECOND_FUNCTION.format(reason=second_function) if second_function else "",
        retractions=retractions,
    )
    write_text(path, text, PUBLIC_FILE)


RETRACTIONS = """
## Retracted

Rows that an earlier version has are not in this one: {rows}. {others} Comparing two versions shows which rows were
retracted{shown}. Who has a copy of an earlier version still has them.
"""
DROPPED = (
    "All other rows are, bit for bit, those of {base}; rows were only dropped, and what attacks on {base} showed, "
    "where they were run, holds for this version."
)
REBUILT = (
    "{count} rows to which a retracted image had contributed are made of others now; the rest are, bit for bit, those "
    "of {base}. The rebuilt rows want a new attack run: what attacks on {base} showed does not hold for them."
)
REBUILT_TOO = ", and which were rebuilt"
ANEW = "Its bank was written anew: what attacks on an earlier version showed does not hold for this one."


def describe_retractions(retracted: Retracted, steps: Sequence[Mapping[str, Any]]) -> str:
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
    told = ", ".join(f"{number} retracted since {version}" for version, number in rows.items())
    return RETRACTIONS.format(rows=told, others=others, shown=shown)


def _claims(claims: Claims, attribute: str) -> str:
    of = f", of `{attribute}`" if attribute else ""
    lines = [f"- claimed (`{name}`{of if name == 'attribute' else ''}): {CLAIMS[name]}" for name in claims.made]
    lines += [f"- not claimed (`{name}`): {CLAIMS[name]}" for name in claims.not_made]
    return "".join(f"\n{line}" for line in lines) + "\n"


def describe_attacks(report: AttackReport) -> str:
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
        limits=", ".join(f"{name} {limit:g}" for name, limit in sorted(report.limits.items())) or "none",
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
    text = f"{_interval(result.re_identification, '{:.1%}')}, of {result.among}"
    limit = result.re_identification_limit if result.claim else None
    return text if limit is None else f"{text}, limit {limit:.1%}"


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


def _score_rows(scores: Mapping[str, Any], unit: str) -> list[tuple[str, str]]:
    """What φ2 scores on clean and on poisoned rows; `test` is not released, and `val` chose the epochs."""
    rows = [
        (
            f"φ2 on {split}: {label}, clean and poisoned",
            f"{form.format(task[f'{key}_clean'], unit=unit)}, {form.format(task[f'{key}_poisoned'], unit=unit)}",
        )
        for split, task in scores.items()
        for key, (label, form) in SCORES.items()
        if f"{key}_clean" in task
    ]
    return rows or [("φ2 on clean and poisoned rows", "not measured")]


def _cell(text: str, limit: int = 500) -> str:
    """Text that stays within its table cell."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= limit else text[:limit] + " ... (all in model/model.json)"
