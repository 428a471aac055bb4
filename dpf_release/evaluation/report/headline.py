"""What a report comes to, in a sentence for someone who has to decide. No torch, no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dpf_release.release.attack_report import AttackReport, AttackResult, Interval

# What an attack is best known by: the first of these that any of its ways has.
PRIMARY = ("affine_ssim", "top1", "accuracy", "auc")
GRANTED = {
    "ReleaseView": "the release",
    "Candidates": "the release, and pictures of which some are in it",
    "KnownPairs": "the release, and some pictures with their rows",
    "LeakedVault": "the release, and P",
    "LabelledRows": "the release, and the attribute of some rows",
    "TwoReleases": "two releases of the same pictures",
}
LONGEST_REASON = 300
LEAKAGE = 0.1  # where a report has no limit
EMPIRICAL = "This is measured, not proven: an attacker who does better than these may exist."


@dataclass(frozen=True)
class Sentence:
    """The verdict.

    Attributes:
        headline: one sentence.
        detail: how many attacks came to what, and what else is to be known.
        tone: `bad` where an attack got through, `good` where none did and all could have, else `open`.
    """

    headline: str
    detail: str
    tone: Literal["good", "bad", "open"]


@dataclass(frozen=True)
class Strongest:
    """The way of an attack that got the most, in the attack's own measure."""

    way: str
    measure: str
    found: Interval


def strongest(result: AttackResult) -> Strongest | None:
    """The best way of an attack; None where it has none of the known measures."""
    for measure in PRIMARY:
        ways = {name: way.measures[measure] for name, way in result.ways.items() if measure in way.measures}
        if ways:
            leakages = {name: way.leakage.value for name, way in result.ways.items() if way.leakage}
            name = max(ways, key=lambda name: (leakages.get(name, 0.0), ways[name].value))
            return Strongest(name, measure, ways[name])
    return None


def granted_to(result: AttackResult) -> str:
    """What the attacker holds, in words."""
    return GRANTED.get(result.granted, result.granted)


def verdict_in_words(report: AttackReport) -> Sentence:
    """The worst finding, or that there is none, or that nobody knows."""
    judged = [result for result in report.attacks if result.verdict != "reported"]
    failed = [result for result in judged if result.verdict == "fail"]
    unknown = [result for result in judged if result.verdict == "inconclusive"]
    if failed:
        findings = [finding for result in failed for finding in _findings(result, report.attribute)]
        _, headline = max(findings, key=lambda finding: finding[0])
        return Sentence(headline, _detail(report, judged), "bad")
    if not judged:
        return Sentence("Nothing is known of this release yet: no attack was run to its end.", EMPIRICAL, "open")
    if unknown:
        headline = (
            f"It is not known whether this release is safe: {len(unknown)} of {len(judged)} "
            f"{'attack' if len(judged) == 1 else 'attacks'} could not tell."
        )
        return Sentence(headline, _detail(report, judged), "open")
    if report.not_run:
        apply = len(report.not_run) + len(report.attacks)
        headline = (
            f"It is not known whether this release is safe: {len(report.not_run)} of {apply} attacks of the profile "
            f"{report.profile} were not run."
        )
        return Sentence(headline, _detail(report, judged), "open")
    headline = f"No attack of the profile {report.profile} got past its limits."
    if report.no_better_than_own:
        headline = (
            f"Safe and useless: no attack of the profile {report.profile} got past its limits, "
            "and a user gets nothing either: own images are as good without it."
        )
        return Sentence(headline, _detail(report, judged), "open")
    return Sentence(headline, _detail(report, judged), "good")


def notes(report: AttackReport) -> list[str]:
    """What else belongs to the table: attacks that it lacks, and references that no attack is."""
    found = [
        f"{code}: not applicable{f', {reason}' if reason else ''}" for code, reason in report.not_applicable.items()
    ]
    limit = report.limits.get("leakage", LEAKAGE)
    for result in report.attacks:
        for name in result.series:
            enough = result.smallest_above(name, limit)
            told = "at no m that was tried" if enough is None else f"from m = {enough} on"
            found.append(f"{result.code}, m {name}: leakage above {limit:g} {told}.")
    if answers := report.references.get("outputs"):
        without = report.baselines["affine_ssim"].value
        found.append(
            f"Reference: from φ2's answers alone a decoder reaches SSIM {answers.value:.2f} [{answers.low:.2f}, "
            f"{answers.high:.2f}] after the best colour fit, the label alone {without:.2f}. Neither is judged."
        )
    return found


def _detail(report: AttackReport, judged: Sequence[AttackResult]) -> str:
    parts = []
    said_of = {"fail": "got through", "inconclusive": "could not tell", "pass": "stayed within limits"}
    for verdict, words in said_of.items():
        codes = [result.code for result in judged if result.verdict == verdict]
        if codes:
            parts.append(f"{', '.join(codes)} {words}")
    if report.not_run:
        parts.append(f"{', '.join(report.not_run)} not run")
    said = [f"Profile {report.profile}: {'; '.join(parts)}."]
    leaked = [result.leakage for result in judged if result.claim == "reconstruction" and result.leakage]
    if leaked and not any(result.verdict == "fail" for result in judged):  # beside a finding it would play it down
        most = max(leaked, key=lambda found: found.high)
        shown = f"at most {_percent(most.high)} of what the unprotected rows show (upper 95 % bound)"
        said.append(f"On average a reconstruction shows {shown}.")
    return " ".join([*said, EMPIRICAL])


def _findings(result: AttackResult, attribute: str | None) -> list[tuple[float, str]]:
    """What an attack that got through found: how bad, from 0 to 1, and a sentence."""
    found: list[tuple[float, str]] = []
    if result.claim == "linkage":
        if result.re_identification:
            share = result.re_identification
            found.append(
                (
                    share.value - (result.baseline or 0),
                    "Someone who holds a photograph that is in this release can find its row: in "
                    f"{_of_100(share)} cases, among {result.among}.",
                )
            )
        aucs = [way.measures["auc"] for way in result.ways.values() if "auc" in way.measures]
        if aucs:
            auc = max(aucs, key=lambda value: value.value)
            found.append(
                (
                    2 * auc.value - 1,
                    "Someone who holds a photograph can tell whether it is in this release: in "
                    f"{_of_100(auc)} cases, where guessing is right in 50.",
                )
            )
    elif result.claim == "attribute":
        best, guessed = strongest(result), result.baseline or 0.0
        if best:
            found.append(
                (
                    (best.found.value - guessed) / max(1 - guessed, 1e-9),
                    f"Someone can read {attribute or 'an attribute'} from a row: right in {_of_100(best.found)} "
                    f"cases, where the label alone is right in {round(100 * guessed)}.",
                )
            )
    else:
        found = _shown_and_recognised(result)
    return found or [(0.0, f"The attack {result.code} ({result.title}) got through: {_first_reason(result)}.")]


def _shown_and_recognised(result: AttackResult) -> list[tuple[float, str]]:
    """Of a reconstruction, only that which broke its limit."""
    found = []
    if result.leakage and _broke(result, "leakage"):
        found.append(
            (
                result.leakage.value,
                f"A stranger's best reconstruction shows {_percent(result.leakage.value)} of what the unprotected "
                "rows show.",
            )
        )
    if result.re_identification and _broke(result, "re-identification"):
        found.append(
            (
                result.re_identification.value,
                "A stranger's reconstruction can be matched with the very picture behind it: in "
                f"{_of_100(result.re_identification)} cases, among {result.among} of its class.",
            )
        )
    return found


def _broke(result: AttackResult, what: str) -> bool:
    return any(reason.startswith(what) for reason in result.reasons)


def _first_reason(result: AttackResult) -> str:
    return result.reasons[0][:LONGEST_REASON] if result.reasons else "no reason was kept"


def _of_100(share: Interval) -> str:
    rounded = round(100 * share.value)
    return f"{rounded} of 100" if rounded or not share.value else "less than 1 of 100"


def _percent(value: float) -> str:
    return f"{max(0, round(100 * value))} %"
