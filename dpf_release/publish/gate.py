"""The gate: which claims a release may make, by what attacks on exactly its bank reached. `package` asks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dpf_release.attacks.interface import Attack, registered
from dpf_release.attacks.threat_models import ReleaseView, TwoReleases
from dpf_release.errors import RefusedError, VaultError
from dpf_release.evaluation.failed_attacks import Failure, failed_in, failures
from dpf_release.evaluation.suite import report_file
from dpf_release.owner.config import ClaimsSection, GateSection
from dpf_release.owner.project import Project
from dpf_release.release.attack_report import (
    PROFILE_ORDER,
    SCORER,
    AttackReport,
    AttackResult,
    Claim,
    public_report,
)
from dpf_release.release.manifest import Claims

CLAIMS: tuple[Claim, ...] = ("reconstruction", "linkage", "attribute", "bound")
NO_ATTACK = "no attack was run on this bank"
BEYOND_BOUND = "the privacy bound allows"  # in the reasons of an attack that got past what a bound allows any attack
NO_MECHANISM = "the function has no mechanism that the privacy ledger could list"


@dataclass(frozen=True)
class Passage:
    """What may be published, and as what.

    Attributes:
        claims: those that are made, and those that are not.
        report: its public numbers; None: no attack was run on this bank, or they are kept.
        attribute: of which the claim `attribute` is made.
        accepted_risk: why to publish although claims were wanted that are not made; empty: none were.
        objections: what speaks against those claims; nothing in it is private.
        report_kept: whether the report's numbers stay in the vault.
    """

    claims: Claims
    report: AttackReport | None = None
    attribute: str = ""
    accepted_risk: str = ""
    objections: tuple[str, ...] = ()
    report_kept: bool = False


def pass_gate(
    project: Project,
    name: str,
    index_sha256: str,
    retracted: Sequence[Mapping[str, Any]] = (),
    accept_risk: str = "",
    required: Sequence[type[ReleaseView]] = (),
    beside: Sequence[str] = (),
    against_bound: Sequence[str] | None = None,
) -> Passage:
    """What of `[claims]` the release of a candidate may promise.

    Args:
        project: the owner's.
        name: which fitted function's candidate.
        index_sha256: of the candidate's `features/index.json`.
        retracted: by which retractions rows were taken out of it (`candidate.json`).
        accept_risk: why to publish without the claims that do not pass; public, on the card.
        required: attacks with these views speak of `reconstruction` here, and apply.
        beside: digests of the indexes of these images' other releases, the last of each other function.
        against_bound: what the privacy ledger says against the claim `bound`; None: the function has no mechanism.

    Raises:
        RefusedError: a claim does not pass, and no reason was given; all that speaks against it. Or an attack found
            more than a mechanism's bound allows: then no reason helps.
        VaultError: the report in the vault is not one of ours.
    """
    wanted, gate = project.config.claims, project.config.gate
    ancestors = same_but_for_dropped_rows(index_sha256, retracted)
    reports = _reports_of(project, name, ancestors)
    report = _speaking(reports, gate)
    noted = [
        failure
        for failure in failures(project.vault, name)
        if failure.index_sha256 in ancestors and failure.holds(gate.limits)
    ]
    if against_bound is not None:
        _refuse_broken_bound([*noted, *(failure for of in reports for failure in failed_in(of))])
    against: dict[Claim, list[str]] = {
        claim: [NO_ATTACK] if report is None else objections(claim, report, wanted, gate, required, beside)
        for claim in wanted.made
        if claim != "bound"
    }
    if wanted.bound:
        against["bound"] = [NO_MECHANISM] if against_bound is None else [*against_bound]
    told = [] if report is None else failed_in(report)
    for failure in noted:
        if failure.claim in against and failure not in told:
            against[failure.claim].append(str(failure))
    listed = tuple(f"{claim}: {objection}" for claim, of in against.items() for objection in of)
    reason = " ".join(accept_risk.split()) if listed else ""
    if listed and not reason:
        raise RefusedError(
            "what [claims] in dpf.toml promises is not borne out. Nothing was published.\n"
            + "\n".join(f"  {objection}" for objection in listed)
            + f"\nRun `dpf-release attack --name {name} --profile {gate.profile}`, where that was not done. Where an "
            "attack breaks the function, fit another. Or promise less under [claims]; or publish without these claims "
            'with --accept-risk "REASON" (it will be on the card, with all this).'
        )
    made = tuple(claim for claim in CLAIMS if claim in against and not against[claim])
    concerned = [claim for claim in CLAIMS if claim != "bound" or against_bound is not None or wanted.bound]
    claims = Claims(made=made, not_made=tuple(claim for claim in concerned if claim not in made))
    if report is not None:
        report = public_report(report).model_copy(update={"claims_not_made": claims.not_made})
    return Passage(claims, report, wanted.attribute or "" if "attribute" in made else "", reason, listed)


def _refuse_broken_bound(failed: Sequence[Failure]) -> None:
    """That no attack found more than the mechanism allows: one that did shows a bug, and there is no such bound."""
    broken = [one for one in failed if one.claim == "bound" or any(BEYOND_BOUND in reason for reason in one.reasons)]
    if broken:
        raise RefusedError(
            "an attack found more of these images than their privacy bound allows. Nothing was published, and no "
            "accepted risk helps: the mechanism has a bug, or its networks or statistics are not what they are said to "
            "be. Report it.\n" + "\n".join(f"  {one}" for one in dict.fromkeys(map(str, broken)))
        )


def objections(
    claim: Claim,
    report: AttackReport,
    wanted: ClaimsSection,
    gate: GateSection,
    required: Sequence[type[ReleaseView]] = (),
    beside: Sequence[str] = (),
) -> list[str]:
    """What in a report of attacks on a bank speaks against a claim; nothing: it passes.

    A `pass` counts at the gate's profile or a harder one, under limits no wider than today's, of today's version of the
    attack. Each attack of the gate's profile has to be there, unless it does not apply; any that fails counts.
    """
    found = _run_otherwise(claim, report, wanted, gate)
    results = {result.code: result for result in report.attacks}
    passed, needed = 0, set()
    for attack in registered():
        of = "reconstruction" if attack.view in required else attack.claim
        if of != claim or PROFILE_ORDER.index(attack.profile) > PROFILE_ORDER.index(gate.profile):
            continue
        needed.add(attack.code)
        problem = ""
        if result := results.get(attack.code):
            problem = _objection(attack, result, beside)
            passed += not problem
        elif attack.code not in report.not_applicable or attack.view in required:
            problem = "was not run"
        if problem:
            found.append(f"{attack.code} {attack.title}: {problem}")
    for code, result in results.items():
        if result.claim == claim and result.verdict == "fail" and code not in needed:
            found.append(f"{code} {result.title}: {_verdict(result)}")
    if not passed and not found:
        found.append(f"no attack of profile {gate.profile} that applies here speaks of it")
    return found


def _run_otherwise(claim: Claim, report: AttackReport, wanted: ClaimsSection, gate: GateSection) -> list[str]:
    """In what the attacks were run otherwise than the gate wants it today."""
    found = []
    if PROFILE_ORDER.index(report.profile) < PROFILE_ORDER.index(gate.profile):
        found.append(f"attacks of profile {report.profile} were run, those of {gate.profile} are wanted")
    if report.scorer != SCORER:
        found.append(f"attacks were scored by version {report.scorer} of the scorer, today's is {SCORER}")
    for key, limit in gate.limits.items():
        if key not in report.limits or report.limits[key] > limit:
            found.append(f"verdicts were given under a limit for {key} of {report.limits.get(key)}, today's is {limit}")
    if claim == "attribute" and report.attribute != wanted.attribute:
        found.append("attacks were run for another attribute, or for none")
    return found


def _objection(attack: Attack, result: AttackResult, beside: Sequence[str]) -> str:
    """Why the result of an attack is not the `pass` that is wanted; empty where it is."""
    if result.version != attack.version:
        return f"version {result.version} was run, today's is {attack.version}"
    if attack.view is TwoReleases and tuple(beside) != ((result.beside,) if result.beside else ()):
        return f"was not run beside each of the {len(beside)} other releases"
    return "" if result.verdict == "pass" else _verdict(result)


def _verdict(result: AttackResult) -> str:
    return f"{result.verdict}, {'; '.join(result.reasons)}"


def _speaking(reports: Sequence[AttackReport], gate: GateSection) -> AttackReport | None:
    """The report that is asked: of the gate's profile, else of the next harder one, else of the hardest there is."""
    by_profile = {report.profile: report for report in reports}
    place = PROFILE_ORDER.index(gate.profile)
    order = [*PROFILE_ORDER[place:], *reversed(PROFILE_ORDER[:place])]
    return next((by_profile[profile] for profile in order if profile in by_profile), None)


def _reports_of(project: Project, name: str, ancestors: Mapping[str, int]) -> list[AttackReport]:
    """The reports of attacks on this bank, one a profile."""
    vault, found = project.vault, []
    for profile in PROFILE_ORDER:
        path = vault.reports(name) / report_file(profile)
        if not vault.holds(path):
            continue
        try:
            report = AttackReport.model_validate(vault.read_record(path, "attack"))
        except ValidationError as error:
            raise VaultError(
                f"{path} is not a report of attacks of this version: {error}. Run `dpf-release attack --name {name} "
                f"--profile {profile} --restart`."
            ) from error
        if report.index_sha256 in ancestors and report.featurizer_sha256 == project.cut.featurizer_sha256:
            found.append(report.model_copy(update={"dropped_since": ancestors[report.index_sha256]}))
    return found


def same_but_for_dropped_rows(index_sha256: str, retracted: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Digests of the indexes of this bank and of those it was before rows were only dropped: how many were, since.

    What an attack reaches on a row does not depend on rows that are gone. One that was rebuilt is another row: what was
    before that is no longer this bank.
    """
    known, dropped = {index_sha256: 0}, 0
    for step in reversed(retracted):
        if step["rebuilt"]:
            break
        dropped += step["dropped"]
        known.setdefault(step["dropped_from"], dropped)
    return known
