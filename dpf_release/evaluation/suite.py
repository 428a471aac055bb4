"""`attack`: the battery on a candidate, one attack after the other, each kept as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions
from dpf_release.attacks.threat_models import LeakedVault, ReleaseView, TwoReleases
from dpf_release.attacks.toolkit.shadows import own_kind_cost
from dpf_release.core.files import make_folder
from dpf_release.core.memory import keeping_large_blocks
from dpf_release.core.progress import announce
from dpf_release.errors import ConfigError, NotGrantedError
from dpf_release.evaluation.controls import planted_target
from dpf_release.evaluation.failed_attacks import failed_in, note_failures
from dpf_release.evaluation.gallery import keep_pictures
from dpf_release.evaluation.harness import SHOWN, Harness
from dpf_release.evaluation.profiles import PROFILES, Profile, decoder_rate, minutes, within
from dpf_release.evaluation.report.page import write_page
from dpf_release.evaluation.targets import LEAST_POOL, candidate_target, draw_truth
from dpf_release.evaluation.utility import UTILITIES, measure_utility, utility_minutes
from dpf_release.evaluation.verdicts import PRIVACY, Scored, judge
from dpf_release.evaluation.views import Setting, grant
from dpf_release.models.metrics import WINDOW
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import Vault
from dpf_release.owner.workbench import Candidate, open_candidate, workbench_of
from dpf_release.release.attack_report import SCORER, AttackReport, AttackResult

# What of a `Scored` is told as it is.
OF_SCORED = (
    "ways", "baseline", "ceiling", "leakage", "re_identification", "among", "re_identification_limit", "rows", "series",
    "exceeds_bound",
)  # fmt: skip


def attack(
    project: Project,
    name: str = "default",
    profile: str = "",
    *,
    only: Sequence[str] = (),
    budget_minutes: float | None = None,
    images: int | None = None,
    seed: int = 0,
    restart: bool = False,
) -> AttackReport:
    """Runs the attack battery on a candidate, and keeps the report in the vault.

    What is done already for this bank, profile, budget and seed is not done again. What a run that was cut off had
    trained is gone on with.

    Args:
        project: the owner's.
        name: which fitted function's candidate.
        profile: `quick`, `standard` or `full`; by default what the gate asks for.
        only: codes of attacks and utilities (U1, U2, U3); all of the profile by default.
        budget_minutes: of training, for all attacks of the profile; with less than it needs no result is a pass.
        images: that each training is shown, in the place of the profile's; what `budget_minutes` would reckon.
        seed: of all that is drawn.
        restart: attack anew; what attackers trained is kept, and what failed is not forgotten (`failures`).

    Returns:
        The report, as `vault/reports/NAME/attack-PROFILE.json` has it: one profile's results are not another's.

    Raises:
        ConfigError: no such profile or attack.
        VaultError: there is no such candidate.

    Example:
        >>> from dpf_release import Project, attack
        >>> attack(Project.open("my-release/dpf.toml"), profile="quick", only=["U2"], images=100).profile
        'quick'
    """
    with project.working(public=True, together=False), keeping_large_blocks():
        return _Run.begin(project, name, profile, only, budget_minutes, images, seed).go(restart)


@dataclass(frozen=True, eq=False)
class _Run:
    vault: Vault
    candidate: Candidate
    profile: Profile
    wanted: tuple[str, ...]
    setting: Setting
    harness: Harness

    @classmethod
    def begin(
        cls,
        project: Project,
        name: str,
        profile_name: str,
        only: Sequence[str],
        budget_minutes: float | None,
        images: int | None,
        seed: int,
    ) -> _Run:
        profile, wanted = _asked_for(profile_name or project.config.gate.profile, only)
        if min(project.config.network.size) < WINDOW:
            raise ConfigError(
                f"expected pictures of at least {WINDOW} by {WINDOW} pixels, of which SSIM can tell how much is seen, "
                f"found {project.config.network.size} ([network] size). Smaller ones cannot be attacked, so no claim "
                "passes."
            )
        candidate, workbench = open_candidate(project, name), workbench_of(project, name)
        target = candidate_target(workbench, candidate)
        harness = Harness(profile, target, planted_target(workbench, "clean", seed))
        setting = Setting(workbench, draw_truth(workbench, target, profile.rows, seed), profile.budget, seed)
        return cls(project.vault, candidate, profile, wanted, setting, harness)._within(budget_minutes, images)

    def _within(self, limit: float | None, images: int | None) -> _Run:
        """With trainings that take so many minutes, or are shown so many pictures; says how long that is."""
        setting, profile, chain = self.setting, self.profile, self.candidate.function.chain
        full = replace(profile.budget, own_kind=own_kind_cost(chain.spec, chain.learns, profile.budget.shadows))
        of_profile = [attack for attack in profile.attacks() if self._applies(attack)]
        attacks = [attack for attack in of_profile if attack.code in self.wanted]
        trained = _with_beside(attacks, profile)
        rate = decoder_rate(grant(ReleaseView, self.harness.target, setting))
        # Reckoned over the whole profile: what is shortened does not depend on what is asked for.
        budget = within(_with_beside(of_profile, profile), full, rate, limit)
        if images is not None:
            budget = replace(full, images=images)
        share = budget.images / full.images
        beside = utility_minutes(setting.workbench, self.candidate, profile.name, setting.seed, share, self.wanted)
        announce(
            f"Profile {profile.name}: {len(attacks)} attacks on {len(setting.truth.asked)} rows, trainings of "
            f"{budget.images} pictures; about {minutes(trained, budget, rate):.0f} minutes where nothing is kept of "
            f"before ({rate:.0f} pictures/s)"
            + (f", of {minutes(trained, full, rate):.0f} that a pass wants" if budget != full else "")
            + (f"; utilities: {beside:.0f} minutes more" if beside >= 0.5 else "")
        )
        return replace(self, setting=replace(setting, budget=budget))

    def _applies(self, attack: Attack) -> bool:
        """Whether the owner has what it holds, and rows can say what it learns; its own run says why not."""
        try:
            attack.refuse(grant(attack.view, self.harness.target, self.setting))
        except NotGrantedError:
            return False
        return True

    def go(self, restart: bool) -> AttackReport:
        report = self._begun(restart)
        done, lacks = {result.code: result for result in report.attacks}, dict(report.not_applicable)
        wanted = [attack for attack in self.profile.attacks() if attack.code in self.wanted]
        missing = [attack for attack in wanted if self._is_missing(done.get(attack.code), attack)]
        if any(attack.answers is Reconstructions for attack in missing):
            report = report.model_copy(update=self.harness.shown(self.setting))
        for attack in missing:
            result, pictures = self._attack(attack)
            done.pop(attack.code, None)
            if isinstance(result, AttackResult):
                done[attack.code] = result
                keep_pictures(self.vault, self.candidate.name, report, attack.code, pictures)
            else:
                lacks[attack.code] = result[:500]
            self._write(report, done, lacks)
        if codes := [code for code in UTILITIES if code in self.wanted]:
            setting, share = self.setting, self.setting.budget.images / self.profile.budget.images
            found = measure_utility(setting.workbench, self.candidate, self.profile.name, setting.seed, share, codes)
            report = report.model_copy(update={"utility": {**report.utility, **found}})
        return self._write(report, done, lacks)

    def _is_missing(self, kept: AttackResult | None, attack: Attack) -> bool:
        if kept is None or attack.view is TwoReleases:  # which other releases there are, changes
            return True
        return kept.version != attack.version or kept.images < self.setting.budget.images

    # ------------------------------------------------------------------------------------------ one attack

    def _attack(self, attack: Attack) -> tuple[AttackResult | str, Mapping[str, Tensor]]:
        """The result, or what the owner lacks for it; and pictures for the report."""
        started = time.monotonic()
        try:
            scored = self.harness.scored(attack, self.harness.target, self.setting)
        except NotGrantedError as error:
            announce(f"{attack.code} {attack.title}: not applicable, {error}")
            return str(error), {}
        power = self.harness.power(attack, self.setting)
        claim, criteria = attack.claim, scored.criteria
        if claim is None and (of_bound := tuple(one for one in criteria if one.allowed_by == PRIVACY)):
            claim, criteria = "bound", of_bound  # of what leaked with the function, nothing else is promised
        verdict, reasons = judge(criteria, power, self._shortage(attack, scored))
        if attack.view is LeakedVault and not self.harness.target.learned_secret:
            claim = "reconstruction"  # nothing has to leak for that
        if claim is None:
            verdict, reasons = "reported", ()
        result = AttackResult(
            claim=claim,
            granted=attack.view.name,
            images=self.setting.budget.images,
            seconds=round(time.monotonic() - started, 1),
            beside=self.harness.target.second()[1] if attack.view is TwoReleases else None,
            power=power,
            verdict=verdict,
            reasons=reasons,
            **{key: getattr(attack, key) for key in ("code", "title", "version")},
            **{key: getattr(scored, key) for key in OF_SCORED},
        )
        leakage = "not defined" if scored.leakage is None else f"{scored.leakage.value:.3f}"
        announce(f"{attack.code} {attack.title}: leakage {leakage}, {verdict} ({result.seconds:.0f} s)")
        return result, scored.pictures

    def _shortage(self, attack: Attack, scored: Scored) -> list[str]:
        profile, found = self.profile, list[str]()
        least = min(profile.least_rows, attack.rows or profile.least_rows)
        if scored.rows < least:
            found.append(f"{scored.rows} rows, the profile wants {least}")
        elif scored.judged is not None and scored.judged < least:
            found.append(f"{scored.judged} rows in pools of {LEAST_POOL} pictures or more, the profile wants {least}")
        if scored.lacks:
            found.append(scored.lacks)
        if (images := self.setting.budget.images) < profile.budget.images:
            found.append(f"trainings of {images} pictures, the profile's are {profile.budget.images}")
        return found

    # ------------------------------------------------------------------------------------------ the report

    def _begun(self, restart: bool) -> AttackReport:
        """What was told of this very run before; nothing where it is new."""
        workbench = self.setting.workbench
        empty = AttackReport(
            index_sha256=self.harness.target.subject,
            featurizer_sha256=workbench.featurizer_sha256,
            public_images_sha256=workbench.public.digest,
            profile=self.profile.name,
            scorer=SCORER,
            seed=self.setting.seed,
            function=self.candidate.name,
            attribute=workbench.attribute,
            limits=dict(workbench.limits),
        )

        path = self.vault.reports(self.candidate.name) / report_file(self.profile.name)
        if restart or not self.vault.holds(path):
            return empty
        try:
            known = AttackReport.model_validate(self.vault.read_record(path, "attack"))
        except ValidationError:  # of another version of this tool: all of it is run anew
            return empty
        return known if all(getattr(known, key) == getattr(empty, key) for key in empty.model_fields_set) else empty

    def _write(self, report: AttackReport, done: Mapping[str, AttackResult], lacks: Mapping[str, str]) -> AttackReport:
        attacks = self.profile.attacks()
        results = tuple(done[attack.code] for attack in attacks if attack.code in done)
        lacks = {code: reason for code, reason in lacks.items() if code not in done}
        not_run = tuple(attack.code for attack in attacks if attack.code not in {*done, *lacks})
        report = report.model_copy(update={"attacks": results, "not_applicable": lacks, "not_run": not_run})
        vault, name = self.vault, self.candidate.name
        folder = make_folder(vault.reports(name))
        note_failures(vault, name, failed_in(report))  # first: a report may be replaced
        vault.write_json(folder / report_file(self.profile.name), report.model_dump(mode="json"))
        write_page(vault, name, report)
        return report


def _with_beside(attacks: Sequence[Attack], profile: Profile) -> list[Attack]:
    """With what answers in pictures are compared with: those that set the ceiling, and decoders that no attack is."""
    if not any(attack.answers is Reconstructions for attack in attacks):
        return list(attacks)
    there = {attack.code for attack in attacks}
    beside = [attack for attack in profile.attacks() if attack.sets_ceiling and attack.code not in there]
    return [*attacks, *beside, *(reference for reference in SHOWN if profile.runs(reference))]


def report_file(profile: str) -> str:
    """Where under `vault/reports/NAME` the results of a profile are."""
    return f"attack-{profile}.json"


def _asked_for(name: str, only: Sequence[str]) -> tuple[Profile, tuple[str, ...]]:
    """A profile, and codes of its attacks and utilities, or of those that are asked for."""
    if name not in PROFILES:
        raise ConfigError(
            f"expected a profile of {', '.join(PROFILES)}, found {name!r} (--profile, or [gate] profile)."
        )
    profile = PROFILES[name]
    codes = [*(attack.code for attack in profile.attacks()), *UTILITIES]
    if unknown := set(only) - set(codes):
        raise ConfigError(
            f"expected attacks of profile {profile.name} ({', '.join(codes)}), found {', '.join(sorted(unknown))} in "
            "--only. A harder --profile has more of them."
        )
    return profile, tuple(code for code in codes if not only or code in only)
