"""`attack`: the battery on a candidate, one attack after the other, each kept as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dpf_release.attack_report import SCORER, AttackReport, AttackResult, Interval, Power, Utility
from dpf_release.attacks import Attack, Attributes, Links, Reconstructions, Result, registered
from dpf_release.attacks.outputs import Outputs
from dpf_release.attacks.view import LeakedVault, ReleaseView, TwoReleases
from dpf_release.battery.attributes import score_attributes
from dpf_release.battery.failures import failed_in, note_failures
from dpf_release.battery.gallery import keep_pictures
from dpf_release.battery.grants import Setting, grant, kept_in
from dpf_release.battery.linking import score_links
from dpf_release.battery.page import write_page
from dpf_release.battery.planted_network import MEMORISER, memorising_target
from dpf_release.battery.profiles import PLANTED_SHARE, PROFILES, Profile, decoder_rate, minutes, within
from dpf_release.battery.reconstructions import baselines, score_answer, score_reconstructions
from dpf_release.battery.scoring import References, RowScores, best_of, mean_interval, score_pictures
from dpf_release.battery.targets import Target, candidate_target, clean_rows, draw_truth, planted_target
from dpf_release.battery.truth import LEAST_POOL, Rows
from dpf_release.battery.utility import UTILITIES, measure_utility, utility_minutes
from dpf_release.battery.verdicts import Scored, judge
from dpf_release.errors import ConfigError, NotGrantedError
from dpf_release.metrics import WINDOW
from dpf_release.pipeline.fitting import load_function
from dpf_release.pipeline.project import Project
from dpf_release.progress import announce
from dpf_release.storage import keeping_large_blocks, make_folder

POWER_ROWS = 1000  # on which it is tried whether an attack breaks a planted function
POWER_LEAKAGE = 0.5  # that it must reach there, surely
SHOWN = (Outputs(),)  # decoders that no attack is


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
    """
    with project.working(public=True, together=False), keeping_large_blocks():
        return _Run.begin(project, name, profile, only, budget_minutes, images, seed).go(restart)


@dataclass(frozen=True, eq=False)
class _Run:
    project: Project
    name: str
    profile: Profile
    wanted: tuple[str, ...]
    setting: Setting
    target: Target
    clean: Target
    enough: bool
    made: dict[bytes, References] = field(default_factory=dict)
    ceilings: dict[bytes, tuple[RowScores, Callable[[Rows], Tensor]]] = field(default_factory=dict)

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
        profile = _profile(profile_name or project.config.gate.profile)
        of_profile = [attack for attack in registered() if profile.runs(attack)]
        codes = [*(attack.code for attack in of_profile), *UTILITIES]
        if unknown := set(only) - set(codes):
            there = ", ".join(codes)
            raise ConfigError(
                f"expected attacks of profile {profile.name} ({there}), found {', '.join(sorted(unknown))} in --only. "
                "A harder --profile has more of them."
            )
        if min(project.config.model.size) < WINDOW:
            raise ConfigError(
                f"expected pictures of at least {WINDOW} by {WINDOW} pixels, of which SSIM can tell how much is seen, "
                f"found model.size {project.config.model.size}. Smaller ones cannot be attacked, so no claim passes."
            )
        function = load_function(project, name)
        target = candidate_target(project, name, function)
        rows = clean_rows(project)
        clean = planted_target(project, "clean", rows, seed)
        truth = draw_truth(project, target, profile.rows, seed)
        setting = Setting(project, truth, profile.budget, seed, kept_in(project.vault))
        wanted = tuple(code for code in codes if not only or code in only)
        attacks = [attack for attack in of_profile if attack.code in wanted]
        trained = _with_beside(attacks, profile)
        rate, full = decoder_rate(grant(ReleaseView, target, setting)), profile.budget
        # Reckoned over the whole profile: what is shortened does not depend on what is asked for.
        budget = within(_with_beside(of_profile, profile), full, rate, budget_minutes)
        if images is not None:
            budget = replace(full, images=images)
        beside = utility_minutes(project, name, profile.name, seed, budget.images / full.images, wanted)
        announce(
            f"Profile {profile.name}: {len(attacks)} attacks on {len(truth.asked)} rows, trainings of {budget.images} "
            f"pictures; about {minutes(trained, budget, rate):.0f} minutes where nothing is kept of before ({rate:.0f} "
            "pictures/s)"
            + (f", of {minutes(trained, full, rate):.0f} that a pass wants" if budget != full else "")
            + (f"; utilities: {beside:.0f} minutes more" if beside >= 0.5 else "")
        )
        enough = budget.images >= full.images
        return cls(project, name, profile, wanted, replace(setting, budget=budget), target, clean, enough)

    def go(self, restart: bool) -> AttackReport:
        attacks = [attack for attack in registered() if self.profile.runs(attack)]
        report, known = self._empty(), None if restart else self._known()
        if known and _same_run(known, report):
            report = known
        done, lacks = {result.code: result for result in report.attacks}, dict(report.not_applicable)
        missing = [
            attack
            for attack in attacks
            if attack.code in self.wanted and self._is_missing(done.get(attack.code), attack)
        ]
        if any(attack.answers is Reconstructions for attack in missing):
            report = report.model_copy(update=self._shown())
        for attack in missing:
            result, pictures = self._attack(attack)
            done.pop(attack.code, None)
            if isinstance(result, AttackResult):
                done[attack.code] = result
                keep_pictures(self.project.vault, self.name, report, attack.code, pictures)
            else:
                lacks[attack.code] = result[:500]
            self._write(report, attacks, done, lacks)
        utility = {**report.utility, **self._utility([code for code in UTILITIES if code in self.wanted])}
        return self._write(report.model_copy(update={"utility": utility}), attacks, done, lacks)

    def _is_missing(self, kept: AttackResult | None, attack: Attack) -> bool:
        if kept is None or attack.view is TwoReleases:  # which other releases there are, changes
            return True
        return kept.version != attack.version or kept.images < self.setting.budget.images

    def _utility(self, codes: Sequence[str]) -> dict[str, Utility]:
        """With trainings that are shorter by as much as the attacks' are."""
        if not codes:
            return {}
        share = self.setting.budget.images / self.profile.budget.images
        return measure_utility(self.project, self.name, self.profile.name, self.setting.seed, share, codes)

    # ------------------------------------------------------------------------------------------ one attack

    def _attack(self, attack: Attack) -> tuple[AttackResult | str, Mapping[str, Tensor]]:
        """The result, or what the project lacks for it; and pictures for the report."""
        started = time.monotonic()
        try:
            scored = self._scored(attack, self.target, self.setting)
        except NotGrantedError as error:
            announce(f"{attack.code} {attack.title}: not applicable, {error}")
            return str(error), {}
        power = self._power(attack)
        verdict, reasons = judge(scored.limits, power, self._shortage(attack, scored))
        claim = attack.claim
        if attack.view is LeakedVault and self.target.known_by_name:
            claim = "reconstruction"  # nothing has to leak for that
        if claim is None:
            verdict, reasons = "reported", ()
        result = AttackResult(
            code=attack.code,
            title=attack.title,
            version=attack.version,
            claim=claim,
            granted=attack.view.__name__,
            rows=self._rows(scored),
            images=self.setting.budget.images,
            seconds=round(time.monotonic() - started, 1),
            ways=scored.ways,
            baseline=scored.baseline,
            ceiling=scored.ceiling,
            leakage=scored.leakage,
            re_identification=scored.found,
            among=scored.among,
            re_identification_limit=scored.re_identification_limit,
            beside=self.target.second(self.project)[1] if attack.view is TwoReleases else None,
            power=power,
            verdict=verdict,
            reasons=reasons,
            series={key: dict(values) for key, values in scored.series.items()},
        )
        leakage = "not defined" if scored.leakage is None else f"{scored.leakage.value:.3f}"
        announce(f"{attack.code} {attack.title}: leakage {leakage}, {verdict} ({result.seconds:.0f} s)")
        return result, scored.pictures

    def _scored(self, attack: Attack, target: Target, setting: Setting) -> Scored:
        scored = self._answered(attack, target, setting)
        if scored.primary is None:
            return scored
        top = scored.ceiling
        ceiling = self._reached_on_clean(attack, setting) if top is None else _exactly(top)
        return scored if ceiling is None else scored.against(ceiling)

    def _answered(self, attack: Attack, target: Target, setting: Setting) -> Scored:
        answer = attack.run(grant(attack.view, target, setting))
        return score(answer, target, setting, lambda: self._references(target, setting), self.project)

    def _reached_on_clean(self, attack: Attack, setting: Setting) -> Interval | None:
        """What the attack's best way reaches where the bank is φ1(S); kept for this S, φ1, Q and budget."""
        name = f"{attack.code} on clean rows, {len(setting.truth.asked)}"
        subject = self._subject(attack, setting)
        kept = setting.kept.load(name, subject)
        if kept is None:
            kept = {"reached": _as_tensor(self._answered(attack, self.clean, setting).reached())}
            setting.kept.save(name, subject, kept)
        return _as_interval(kept["reached"])

    def _subject(self, attack: Attack, setting: Setting) -> dict[str, Any]:
        """What a result that is kept depends on, beside the bank."""
        config = self.project.config
        return {
            **grant(ReleaseView, self.clean, setting).subject,
            "attack": [attack.code, attack.version],
            "scorer": SCORER,
            "bank": self.clean.subject,
            "budget": [setting.budget.images, setting.budget.decoders, setting.budget.shadows, setting.budget.share],
            "seed": setting.seed,
            "rows": setting.truth.asked.tolist(),
            "attribute": [config.claims.attribute, config.images.private.group],
        }

    def _rows(self, scored: Scored) -> int:
        return len(self.setting.truth.asked) if scored.rows is None else scored.rows

    def _shortage(self, attack: Attack, scored: Scored) -> list[str]:
        profile, found = self.profile, list[str]()
        rows, least = self._rows(scored), min(profile.least_rows, attack.rows or profile.least_rows)
        if rows < least:
            found.append(f"{rows} rows, the profile wants {least}")
        elif scored.judged is not None and scored.judged < least:
            found.append(f"{scored.judged} rows in pools of {LEAST_POOL} pictures or more, the profile wants {least}")
        if not self.enough:
            found.append(
                f"trainings of {self.setting.budget.images} pictures, the profile's are {profile.budget.images}"
            )
        return found

    def _power(self, attack: Attack) -> Power:
        """Whether the attack breaks the functions that it declares; kept for this S, φ1, Q and budget."""
        budget = replace(self.setting.budget, share=PLANTED_SHARE if attack.of_bank else 1.0)
        setting = replace(self.setting, budget=budget)
        members = attack.members(grant(ReleaseView, self.clean, setting))
        functions: dict[str, nn.Module | None] = {**dict.fromkeys(attack.planted), **members}
        if not functions:
            return Power(passed=None)
        other = next((one for one in registered() if one.code == attack.surpasses), None)
        found, surpassed = {}, {}
        for name, member in functions.items():
            try:
                target = self._planted(name, member)
            except ConfigError as error:  # it wants larger classes than there are
                announce(f"{attack.code} {attack.title}: {name} cannot be planted: {error}")
                continue
            # Rows that are mixed want pools that hold all their pictures.
            setting = replace(setting, truth=draw_truth(self.project, target, POWER_ROWS, setting.seed))
            if leakage := self._out_of(attack, name, target, setting):
                found[name] = leakage
            if other and (leakage := self._out_of(other, name, target, setting)):
                surpassed[name] = leakage
        passed = len(found) == len(functions) and all(value.low >= POWER_LEAKAGE for value in found.values())
        if other:
            passed &= len(surpassed) == len(found) and all(found[name].low > surpassed[name].high for name in found)
        return Power(passed=passed, planted=found, surpassed=surpassed)

    def _out_of(self, attack: Attack, name: str, target: Target, setting: Setting) -> Interval | None:
        """What an attack gets out of a planted function."""
        subject = {**self._subject(attack, setting), "planted": name}
        kept = setting.kept.load(f"{attack.code} power on {name}", subject)
        if kept is None:
            kept = {"leakage": _as_tensor(self._scored(attack, target, setting).power())}
            setting.kept.save(f"{attack.code} power on {name}", subject, kept)
        return _as_interval(kept["leakage"])

    def _planted(self, name: str, member: nn.Module | None) -> Target:
        clean, seed = clean_rows(self.project), self.setting.seed
        if name == MEMORISER:
            return memorising_target(self.project, clean=clean, seed=seed)
        return planted_target(self.project, name, clean, seed, member)

    # ------------------------------------------------------------------------------------------ references

    def _references(self, target: Target, setting: Setting) -> References:
        """What leakage is measured between, on the rows of a truth; made once for each.

        The baseline is compared with the pictures that the target's rows are made of, as an attack on it is: of many, a
        mean picture is always like one. What clean rows give away, each row has alone.
        """
        truth = setting.truth
        known = truth.asked.tobytes() + target.subject.encode()
        if known not in self.made:
            ceiling, clean = self._ceiling(setting)
            scores = {
                name: score_pictures(truth, target.contributors, pictures)
                for name, pictures in baselines(grant(ReleaseView, self.clean, setting), truth).items()
            }
            _, baseline = best_of(scores)
            self.made[known] = References(baseline, ceiling, clean)
            announce(
                f"Affine-fit SSIM on {len(truth.asked)} rows: of nothing but labels {baseline.primary.mean():.3f}, of "
                f"clean rows at best {ceiling.primary.mean():.3f}"
            )
        return self.made[known]

    def _ceiling(self, setting: Setting) -> tuple[RowScores, Callable[[Rows], Tensor]]:
        """The best of what decoders for clean rows reach on these, and what it makes of any clean rows."""
        truth = setting.truth
        known = truth.asked.tobytes()
        if known not in self.ceilings:
            reached, makers = {}, {}
            for attack in registered():
                if attack.sets_ceiling and self.profile.runs(attack):
                    answer = attack.run(grant(attack.view, self.clean, setting))
                    assert isinstance(answer, Reconstructions)
                    for name, pictures in answer.decoders.items():
                        reached[f"{attack.code} {name}"] = score_pictures(truth, self.clean.contributors, pictures)
                        makers[f"{attack.code} {name}"] = self._clean_pictures(attack, name)
            name, ceiling = best_of(reached)
            self.ceilings[known] = ceiling, makers[name]
        return self.ceilings[known]

    def _clean_pictures(self, attack: Attack, way: str) -> Callable[[Rows], Tensor]:
        """What a way of an attack makes of any rows of the clean bank."""
        view = grant(attack.view, self.clean, self.setting)

        def pictures(rows: Rows) -> Tensor:
            answer = attack.run(replace(view, asked=rows))
            assert isinstance(answer, Reconstructions)
            return answer.decoders[way](np.arange(len(rows)))

        return pictures

    def _shown(self) -> dict[str, dict[str, Interval]]:
        """Affine-fit SSIM that leakage is measured between, and of what is shown beside the attacks and not gated."""
        seed, references = self.setting.seed, self._references(self.target, self.setting)
        shown = {"clean affine_ssim": mean_interval(references.ceiling.primary, seed)}
        for reference in SHOWN:
            if self.profile.runs(reference):
                answer = reference.run(grant(reference.view, self.target, self.setting))
                _, best = best_of(score_answer(answer, self.target, self.setting.truth))
                shown[reference.code] = mean_interval(best.primary, seed)
                announce(f"Affine-fit SSIM of {reference.title}: {shown[reference.code].value:.3f}")
        return {"baselines": {"affine_ssim": mean_interval(references.baseline.primary, seed)}, "references": shown}

    # ------------------------------------------------------------------------------------------ the report

    def _empty(self) -> AttackReport:
        return AttackReport(
            index_sha256=self.target.subject,
            featurizer_sha256=self.project.cut.featurizer_sha256,
            public_images_sha256=self.project.public_images.digest,
            profile=self.profile.name,
            scorer=SCORER,
            seed=self.setting.seed,
            function=self.name,
            attribute=self.project.config.claims.attribute,
            limits=self.project.config.gate.limits,
        )

    def _known(self) -> AttackReport | None:
        vault = self.project.vault
        path = vault.reports(self.name) / report_file(self.profile.name)
        try:
            return AttackReport.model_validate(vault.read_record(path, "attack")) if vault.holds(path) else None
        except ValidationError:  # of another version of this tool: all of it is run anew
            return None

    def _write(
        self,
        report: AttackReport,
        attacks: Sequence[Attack],
        done: Mapping[str, AttackResult],
        lacks: Mapping[str, str],
    ) -> AttackReport:
        results = tuple(done[attack.code] for attack in attacks if attack.code in done)
        lacks = {code: reason for code, reason in lacks.items() if code not in done}
        not_run = tuple(attack.code for attack in attacks if attack.code not in {*done, *lacks})
        report = report.model_copy(update={"attacks": results, "not_applicable": lacks, "not_run": not_run})
        folder = make_folder(self.project.vault.reports(self.name))
        note_failures(self.project.vault, self.name, failed_in(report))  # first: a report may be replaced
        self.project.vault.write_json(folder / report_file(self.profile.name), report.model_dump(mode="json"))
        write_page(self.project.vault, self.name, report)
        return report


def _with_beside(attacks: Sequence[Attack], profile: Profile) -> list[Attack]:
    """With what answers in pictures are compared with: those that set the ceiling, and decoders that no attack is."""
    if not any(attack.answers is Reconstructions for attack in attacks):
        return list(attacks)
    there = {attack.code for attack in attacks}
    beside = [attack for attack in registered() if attack.sets_ceiling and attack.code not in there]
    return [*attacks, *(attack for attack in [*beside, *SHOWN] if profile.runs(attack))]


def report_file(profile: str) -> str:
    """Where under `vault/reports/NAME` the results of a profile are."""
    return f"attack-{profile}.json"


def _profile(name: str) -> Profile:
    if name not in PROFILES:
        raise ConfigError(
            f"expected a profile of {', '.join(PROFILES)}, found {name!r} (--profile, or [gate] profile)."
        )
    return PROFILES[name]


def _as_tensor(interval: Interval | None) -> Tensor:
    numbers = [interval.value, interval.low, interval.high] if interval else []
    return torch.tensor(numbers, dtype=torch.float64)


def _as_interval(numbers: Tensor) -> Interval | None:
    if not len(numbers):
        return None
    value, low, high = numbers.tolist()
    return Interval(value=value, low=low, high=high)


def _exactly(value: float) -> Interval:
    return Interval(value=value, low=value, high=value)


def _same_run(one: AttackReport, other: AttackReport) -> bool:
    keys = ("index_sha256", "featurizer_sha256", "public_images_sha256", "profile", "scorer", "seed", "attribute")
    return all(getattr(one, key) == getattr(other, key) for key in (*keys, "limits"))


def score(
    answer: Result, target: Target, setting: Setting, references: Callable[[], References], project: Project
) -> Scored:
    """What an answer is worth; one scorer for each kind of answer."""
    scorer = SCORERS[type(answer)]
    return scorer(answer, target, setting, references, project)


SCORERS: dict[type, Callable[[Any, Target, Setting, Callable[[], References], Project], Scored]] = {
    Attributes: score_attributes,
    Links: score_links,
    Reconstructions: score_reconstructions,
}
