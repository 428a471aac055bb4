"""The harness: attacks on a bank, between what is reached without it and on clean rows; and on planted functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpf_release.attacks.a02_deep_tap import Outputs
from dpf_release.attacks.a13_drawn_rows import ClassAndGroup
from dpf_release.attacks.interface import Attack, Attributes, Links, Reconstructions, Result, registered
from dpf_release.attacks.threat_models import Kept, ReleaseView
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import announce
from dpf_release.errors import ConfigError
from dpf_release.evaluation.controls import MEMORISER, memorising_target, planted_target
from dpf_release.evaluation.drawn_controls import FITTED, LEAST_POWER, drawn_target
from dpf_release.evaluation.profiles import PLANTED_SHARE, Profile
from dpf_release.evaluation.score_guesses import score_attributes, score_links
from dpf_release.evaluation.score_reconstructions import baselines, score_decoders, score_reconstructions
from dpf_release.evaluation.scoring import References, RowScores, best_of, mean_interval, score_pictures
from dpf_release.evaluation.targets import Target, draw_truth
from dpf_release.evaluation.verdicts import Scored
from dpf_release.evaluation.views import Setting, grant
from dpf_release.release.attack_report import SCORER, Interval, Power

POWER_ROWS = 1000  # on which it is tried whether an attack breaks a planted function
POWER_LEAKAGE = 0.5  # that it must reach there, surely
SHOWN = (Outputs(),)  # decoders that no attack is
SHOWN_OF_DRAWN = (ClassAndGroup(),)  # likewise, of rows that are drawn


@dataclass(frozen=True, eq=False)
class Harness:
    """Runs attacks, and holds the truth."""

    profile: Profile  # which attacks set the ceiling
    target: Target  # the candidate
    clean: Target  # φ1(S), as if it were one
    made: dict[bytes, References] = field(default_factory=dict)  # for each truth and target
    ceilings: dict[bytes, tuple[RowScores, Callable[[Rows], Tensor]]] = field(default_factory=dict)  # for each truth

    def scored(self, attack: Attack, target: Target, setting: Setting) -> Scored:
        """What an attack gets out of a bank; where the owner lacks what it holds, a `NotGrantedError`."""
        scored = self._answered(attack, target, setting)
        if not scored.primary:
            return scored
        if (top := scored.ceiling) is not None:
            return scored.against(Interval(value=top, low=top, high=top))
        # What its best way reaches where the bank is φ1(S); kept for this S, φ1, Q and budget.
        name, subject = f"{attack.code} on clean rows, {len(setting.truth.asked)}", self._subject(attack, setting)
        reach = lambda: self._answered(attack, self.clean, setting.of_clean).reached()  # noqa: E731
        ceiling = _once(setting.workbench.kept, name, subject, "reached", reach)
        return scored.against(ceiling) if ceiling else scored

    def _answered(self, attack: Attack, target: Target, setting: Setting) -> Scored:
        view = grant(attack.view, target, setting)
        attack.refuse(view)
        return score_answer(attack.run(view), target, setting, lambda: self.references(target, setting))

    def _subject(self, attack: Attack, setting: Setting) -> dict[str, Any]:
        """What a result that is kept depends on, beside the bank."""
        return {
            **grant(ReleaseView, self.clean, setting).subject,
            "attack": [attack.code, attack.version],
            "scorer": SCORER,
            "bank": self.clean.subject,
            "budget": [setting.budget.images, setting.budget.decoders, setting.budget.shadows, setting.budget.share],
            "seed": setting.seed,
            "rows": setting.truth.asked.tolist(),
            "attribute": [setting.workbench.attribute, setting.workbench.group],
        }

    def power(self, attack: Attack, setting: Setting) -> Power:
        """Whether the attack breaks the functions that it declares; kept for this S, φ1, Q and budget."""
        budget = replace(setting.budget, share=PLANTED_SHARE if attack.of_bank else 1.0)
        setting = replace(setting, budget=budget)
        members = attack.members(grant(ReleaseView, self.clean, setting))
        functions: dict[str, nn.Module | None] = {**dict.fromkeys(attack.planted), **members}
        if not functions:
            return Power(passed=None)
        other = next((one for one in registered() if one.code == attack.surpasses), None)
        found, surpassed = {}, {}
        for name, member in functions.items():
            try:
                target = self._planted(name, member, setting)
            except ConfigError as error:  # it wants larger classes than there are
                announce(f"{attack.code} {attack.title}: {name} cannot be planted: {error}")
                continue
            # Rows that are mixed want pools that hold all their pictures.
            setting = replace(setting, truth=draw_truth(setting.workbench, target, POWER_ROWS, setting.seed))
            if leakage := self._out_of(attack, name, target, setting):
                found[name] = leakage
            if other and (leakage := self._out_of(other, name, target, setting)):
                surpassed[name] = leakage
        broken = [value.low >= LEAST_POWER.get(name, POWER_LEAKAGE) for name, value in found.items()]
        passed = len(found) == len(functions) and all(broken)
        if other:
            passed &= len(surpassed) == len(found) and all(found[name].low > surpassed[name].high for name in found)
        return Power(passed=passed, planted=found, surpassed=surpassed)

    def _out_of(self, attack: Attack, name: str, target: Target, setting: Setting) -> Interval | None:
        """What an attack gets out of a planted function."""
        subject = {**self._subject(attack, setting), "planted": name}
        tell = lambda: self.scored(attack, target, setting).power()  # noqa: E731
        return _once(setting.workbench.kept, f"{attack.code} power on {name}", subject, "leakage", tell)

    def _planted(self, name: str, member: nn.Module | None, setting: Setting) -> Target:
        if name == MEMORISER:
            return memorising_target(setting.workbench, setting.seed)
        if name in FITTED:
            return drawn_target(setting.workbench, name, setting.seed)
        return planted_target(setting.workbench, name, setting.seed, member)

    def references(self, target: Target, setting: Setting) -> References:
        """What leakage is measured between, on the rows of a truth; made once for each.

        The baseline is compared with the pictures that the target's rows are made of, as an attack on it is: of many, a
        mean picture is always like one. What clean rows give away, each row has alone.
        """
        truth = setting.truth
        known = truth.asked.tobytes() + target.subject.encode()
        if known not in self.made:
            ceiling, clean = self._ceiling(setting)
            guesses = baselines(grant(ReleaseView, self.clean, setting.of_clean), truth.of_clean)
            scores = {name: score_pictures(truth, target.shown, of) for name, of in guesses.items()}
            _, baseline = best_of(scores)
            self.made[known] = References(baseline, ceiling, clean)
            announce(
                f"Affine-fit SSIM on {len(truth.asked)} rows: of nothing but labels {baseline.primary.mean():.3f}, of "
                f"clean rows at best {ceiling.primary.mean():.3f}"
            )
        return self.made[known]

    def _ceiling(self, setting: Setting) -> tuple[RowScores, Callable[[Rows], Tensor]]:
        """The best of what decoders for clean rows reach on these, and what it makes of any clean rows."""
        setting = setting.of_clean
        truth = setting.truth
        known = truth.asked.tobytes()
        if known not in self.ceilings:
            reached, makers = {}, {}
            for attack in self.profile.attacks():
                if attack.sets_ceiling:
                    answer = attack.run(grant(attack.view, self.clean, setting))
                    assert isinstance(answer, Reconstructions)
                    for name, pictures in answer.decoders.items():
                        reached[f"{attack.code} {name}"] = score_pictures(truth, self.clean.contributors, pictures)
                        makers[f"{attack.code} {name}"] = self._clean_pictures(attack, name, setting)
            name, ceiling = best_of(reached)
            self.ceilings[known] = ceiling, makers[name]
        return self.ceilings[known]

    def _clean_pictures(self, attack: Attack, way: str, setting: Setting) -> Callable[[Rows], Tensor]:
        """What a way of an attack makes of any rows of the clean bank."""
        view = grant(attack.view, self.clean, setting)

        def pictures(rows: Rows) -> Tensor:
            answer = attack.run(replace(view, asked=rows))
            assert isinstance(answer, Reconstructions)
            return answer.decoders[way](np.arange(len(rows)))

        return pictures

    def shown(self, setting: Setting) -> dict[str, dict[str, Interval]]:
        """Affine-fit SSIM that leakage is measured between, and of what is shown beside the attacks and not gated."""
        seed, references = setting.seed, self.references(self.target, setting)
        shown = {"clean affine_ssim": mean_interval(references.ceiling.primary, seed)}
        for reference in (*SHOWN, *(SHOWN_OF_DRAWN if self.target.draws_rows else ())):
            if self.profile.runs(reference):
                answer = reference.run(grant(reference.view, self.target, setting))
                _, best = best_of(score_decoders(answer, self.target, setting.truth))
                shown[reference.code] = mean_interval(best.primary, seed)
                announce(f"Affine-fit SSIM of {reference.title}: {shown[reference.code].value:.3f}")
        return {"baselines": {"affine_ssim": mean_interval(references.baseline.primary, seed)}, "references": shown}


def _once(
    kept: Kept, name: str, subject: Mapping[str, Any], key: str, find: Callable[[], Interval | None]
) -> Interval | None:
    """What was found and kept, or is now."""
    tensors = kept.load(name, subject)
    if tensors is None:
        found = find()
        numbers = [found.value, found.low, found.high] if found else []
        tensors = {key: torch.tensor(numbers, dtype=torch.float64)}
        kept.save(name, subject, tensors)
    if not len(tensors[key]):
        return None
    value, low, high = tensors[key].tolist()
    return Interval(value=value, low=low, high=high)


def score_answer(answer: Result, target: Target, setting: Setting, references: Callable[[], References]) -> Scored:
    """What an answer is worth; one scorer for each kind of answer."""
    scorers: dict[type, Callable[..., Scored]] = {
        Attributes: score_attributes,
        Links: score_links,
        Reconstructions: score_reconstructions,
    }
    return scorers[type(answer)](answer, target, setting, references)
