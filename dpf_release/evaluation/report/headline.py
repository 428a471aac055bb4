"""What a report comes to: in a sentence for someone who has to decide. No torch, no pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from dpf_release.release.attack_report import AttackReport, AttackResult, Interval

MEASURES = {  # what an attack is best known by: the first of these that any of its ways has
    "affine_ssim": "SSIM after the best colour fit",
    "top1": "right row first",
    "accuracy": "balanced accuracy",
    "auc": "AUC of membership",
}
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


class Sentence(NamedTuple):
    """The verdict: a sentence; how many attacks came to what, and what else is to be known."""

    headline: str
    detail: str
    tone: Literal["good", "bad", "open"]  # bad: an attack got through; good: none did and all could have


class Strongest(NamedTuple):
    """The way of an attack that got the most, in the attack's own measure."""

    way: str
    measure: str
    found: Interval


def strongest(result: AttackResult) -> Strongest | None:
    """The best way of an attack; None where it has none of the known measures."""
    for measure in MEASURES:
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
    if not judged:
        return Sentence("Nothing is known of this release yet: no attack was run to its end.", EMPIRICAL, "open")
    detail, nobody_knows = _detail(report, judged), "It is not known whether this release is safe: "
    if failed:
        findings = [finding for result in failed for finding in _findings(result, report.attribute)]
        return Sentence(max(findings, key=lambda finding: finding[0])[1], detail, "bad")
    if unknown:
        attacks = "attack" if len(judged) == 1 else "attacks"
        return Sentence(f"{nobody_knows}{len(unknown)} of {len(judged)} {attacks} could not tell.", detail, "open")
    if missing := len(report.not_run):
        all_of = f"{missing + len(report.attacks)} attacks of the profile {report.profile}"
        return Sentence(f"{nobody_knows}{missing} of {all_of} were not run.", detail, "open")
    past = f"attack of the profile {report.profile} got past its limits"
    if report.adds_nothing:
        useless = "and a user gets nothing either: what is there without it is as good."
        return Sentence(f"Safe and useless: no {past}, {useless}", detail, "open")
    return Sentence(f"No {past}.", detail, "good")


def notes(report: AttackReport) -> list[str]:
    """What else belongs to the table: attacks that it lacks, and references that no attack is."""
    lacks = report.not_applicable
    found = [f"{code}: not applicable{f', {reason}' if reason else ''}" for code, reason in lacks.items()]
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


def usefulness(report: AttackReport) -> list[str]:
    """What the bank is good for: a sentence for none and each number of own images."""
    found = []
    for m, (bank, clean, best) in report.gains.items():
        if any(name.startswith("top1") for name in report.utility["U3" if m else "U2"].measures):
            adds, low, high, of_clean = (f"{100 * of:.1f}" for of in (bank.value, bank.low, bank.high, clean.value))
            what = f"The bank adds {adds} points [{low}, {high}] to {best}"
            if bank.value < 0:
                what = f"The bank is {adds.lstrip('-')} points worse [{low}, {high}] than {best}"
            to = f"clean features would add {of_clean}"
        else:
            adds, low, high, of_clean = (f"{of:.3g}" for of in (bank.value, bank.low, bank.high, clean.value))
            what = f"The bank takes {adds} [{low}, {high}] off the mean error of {best}"
            to = f"clean features would take off {of_clean}"
        found.append(f"{what}, the best that a user with {own_images(m)} has without it; {to}.")
    return found


def own_images(m: str) -> str:
    """`m = 10` in words."""
    return f"{m.removeprefix('m = ')} own images a class" if m else "no own images"


def _detail(report: AttackReport, judged: Sequence[AttackResult]) -> str:
    said_of = {"fail": "got through", "inconclusive": "could not tell", "pass": "stayed within limits"}
    came_to = {words: [one.code for one in judged if one.verdict == verdict] for verdict, words in said_of.items()}
    parts = [f"{', '.join(codes)} {words}" for words, codes in (came_to | {"not run": report.not_run}).items() if codes]
    said = [f"Profile {report.profile}: {'; '.join(parts)}."]
    leaked = [result.leakage for result in judged if result.claim == "reconstruction" and result.leakage]
    if leaked and not any(result.verdict == "fail" for result in judged):  # beside a finding it would play it down
        most = max(leaked, key=lambda found: found.high)
        shown = f"at most {_percent(most.high)} of what the unprotected rows show (upper 95 % bound)"
        said.append(f"On average a reconstruction shows {shown}.")
    return " ".join([*said, EMPIRICAL])


def _findings(result: AttackResult, attribute: str | None) -> list[tuple[float, str]]:
    """What an attack that got through found: how bad, from 0 to 1, and a sentence."""
    told = {"linkage": _linked(result), "attribute": _read(result, attribute)}
    reason = result.reasons[0][:LONGEST_REASON] if result.reasons else "no reason was kept"
    unnamed = 0.0, f"The attack {result.code} ({result.title}) got through: {reason}."
    return list(told.get(result.claim or "", _shown_and_recognised(result))) or [unnamed]


def _linked(result: AttackResult) -> Iterator[tuple[float, str]]:
    holder = "Someone who holds a photograph"
    if share := result.re_identification:
        words = f"{holder} that is in this release can find its row: in {_of_100(share)} cases, among {result.among}."
        yield share.value - (result.baseline or 0), words
    if aucs := [way.measures["auc"] for way in result.ways.values() if "auc" in way.measures]:
        auc = max(aucs, key=lambda value: value.value)
        cases = f"in {_of_100(auc)} cases, where guessing is right in 50."
        yield 2 * auc.value - 1, f"{holder} can tell whether it is in this release: {cases}"


def _read(result: AttackResult, attribute: str | None) -> Iterator[tuple[float, str]]:
    best, guessed = strongest(result), result.baseline or 0.0
    if best:
        words = f"Someone can read {attribute or 'an attribute'} from a row: right in {_of_100(best.found)} cases,"
        label = f"where the label alone is right in {round(100 * guessed)}."
        yield (best.found.value - guessed) / max(1 - guessed, 1e-9), f"{words} {label}"


def _shown_and_recognised(result: AttackResult) -> Iterator[tuple[float, str]]:
    """Of a reconstruction, only that which broke its limit."""
    broke = {what for what in ("leakage", "re-identification") for reason in result.reasons if reason.startswith(what)}
    if result.leakage and "leakage" in broke:
        shown = f"shows {_percent(result.leakage.value)} of what the unprotected rows show."
        yield result.leakage.value, f"A stranger's best reconstruction {shown}"
    if (found := result.re_identification) and "re-identification" in broke:
        cases = f"in {_of_100(found)} cases, among {result.among} of its class."
        yield found.value, f"A stranger's reconstruction can be matched with the very picture behind it: {cases}"


def _of_100(share: Interval) -> str:
    rounded = round(100 * share.value)
    return f"{rounded} of 100" if rounded or not share.value else "less than 1 of 100"


def _percent(value: float) -> str:
    return f"{max(0, round(100 * value))} %"
