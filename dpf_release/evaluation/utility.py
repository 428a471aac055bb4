"""Utility: what a downstream user can do with a candidate, from its bank as it lies on disk.

U1: φ2 on the released rows. U2: a new classifier φ3, trained on them alone. U3: a new classifier φ4, trained on them
and m clean images of one's own a class. U2 and U3 are judged on clean rows that nobody released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import announce
from dpf_release.errors import BankError
from dpf_release.evaluation.classifiers import EFFORTS, Classifiers, Effort, PickedRows, Training
from dpf_release.evaluation.truth import bins_of
from dpf_release.owner.workbench import Candidate, Workbench
from dpf_release.release.attack_report import GAIN, Interval, ProfileName, Utility

UTILITIES = ("U1", "U2", "U3")
METRICS = {"classification": "top1", "regression": "mae"}


def measure_utility(
    workbench: Workbench,
    candidate: Candidate,
    profile: ProfileName,
    seed: int = 0,
    share: float = 1.0,
    only: Sequence[str] = UTILITIES,
) -> dict[str, Utility]:
    """U1, U2, U3 of a candidate; what is trained is kept, and what does not depend on the candidate serves them all.

    The vault is held by the caller.

    Args:
        workbench: what it is trained and judged with.
        candidate: whose bank is used.
        profile: how hard.
        seed: of all that is drawn.
        share: of the profile's trainings, where the owner's patience is shorter.
        only: which.

    Returns:
        Intervals: of U1 95 % over images; of U2 and U3 the mean, the lowest and the highest over seeds. U2 and U3 are
        missing where φ1(S) has no test rows.
    """
    found = {}
    if "U1" in only:
        found["U1"] = _equivalence(candidate.measure_task())
    classifiers = Classifiers(workbench, EFFORTS[profile].shared(share))
    try:
        bench = _Bench.of(workbench, candidate, classifiers.effort, seed)
    except BankError as error:
        announce(f"U2 and U3 are not measured: there are no test rows to judge by ({error})")
        return found
    trainings = bench.trainings(only)
    scores = classifiers.scores(_flat(trainings))
    for code, of in trainings.items():
        by_group = {key: np.array([scores[training] for training in group]) for key, group in of.items()}
        if by_group:
            found[code] = Utility(measures=measures_over_seeds(METRICS[workbench.task], by_group))
    return found


def utility_minutes(
    workbench: Workbench, candidate: Candidate, profile: ProfileName, seed: int, share: float, only: Sequence[str]
) -> float:
    """How long `measure_utility` takes for what is not kept, by a short trial."""
    classifiers = Classifiers(workbench, EFFORTS[profile].shared(share))
    try:
        bench = _Bench.of(workbench, candidate, classifiers.effort, seed)
    except BankError:
        return 0.0
    return classifiers.minutes(classifiers.missing(_flat(bench.trainings(only))))


def _flat(trainings: Mapping[str, Mapping[str, Sequence[Training]]]) -> list[Training]:
    return [training for of in trainings.values() for group in of.values() for training in group]


def _equivalence(task: Mapping[str, Any]) -> Utility:
    metric = "mae" if "mae_clean" in task else "top1"
    names = {
        metric: f"{metric}_poisoned",
        f"{metric} on clean rows": f"{metric}_clean",
        "clean - poisoned": f"{metric}_difference",
    }
    if "kl" in task:
        names["KL of the outputs"] = "kl"
    return Utility(
        measures={
            name: Interval(value=task[key], low=task[f"{key}_95"][0], high=task[f"{key}_95"][1])
            for name, key in names.items()
        }
    )


@dataclass(frozen=True, eq=False)
class _Bench:
    """Rows to train on and to judge by.

    Attributes:
        metric: `top1` or `mae`.
        effort: how many seeds, and how many images of one's own.
        seed: of what is one's own.
        bank: the candidate's train rows.
        clean: φ1(S train).
        test: φ1(S test).
    """

    metric: str
    effort: Effort
    seed: int
    bank: PickedRows
    clean: PickedRows
    test: PickedRows

    @classmethod
    def of(cls, workbench: Workbench, candidate: Candidate, effort: Effort, seed: int) -> _Bench:
        test = _all_rows(workbench.private_bank("test"))
        if not len(test):
            raise BankError("expected rows in test, found none")
        bank, clean = (_all_rows(bank) for bank in (candidate.banks["train"], workbench.private_bank("train")))
        return cls(METRICS[workbench.task], effort, seed, bank, clean, test)

    def trainings(self, only: Sequence[str]) -> dict[str, dict[str, list[Training]]]:
        """What utilities train: code → measure → one training a seed."""
        return {code: of() for code, of in (("U2", self._alone), ("U3", self._joined)) if code in only}

    def _alone(self) -> dict[str, list[Training]]:
        """U2."""
        return {
            name: [Training(f"U2 {what}", rows, self.test, seed) for seed in range(self.effort.seeds)]
            for name, what, rows in (
                (self.metric, "the bank", self.bank),
                (f"{self.metric} on clean rows", "clean rows", self.clean),
            )
        }

    def _joined(self) -> dict[str, list[Training]]:
        """U3; of m that no class has so many of, none, and where that is all the most that there are."""
        most, found = min(map(len, self._own_half)), dict[str, list[Training]]()
        for m in [m for m in self.effort.own if m <= most] or [most] * (most > 0):
            own = [self._own(m, seed) for seed in range(self.effort.seeds)]
            judge = self._picked(np.concatenate(self._other_half))
            for name, rows in (
                (f"{self.metric}, m = {m}", self.bank),
                (f"{self.metric}, m = {m}, own images alone", None),
                (f"{self.metric}, m = {m}, with clean rows", self.clean),
            ):
                found[name] = [
                    Training(f"U3 {name}", mine if rows is None else rows + mine, judge, seed)
                    for seed, mine in enumerate(own)
                ]
        return found

    @cached_property
    def _halves(self) -> tuple[list[Rows], list[Rows]]:
        """Test rows of each class, one's own and those that judge."""
        bins, generator = bins_of(self.test.targets), np.random.default_rng([self.seed, 8])
        shuffled = [generator.permutation(np.flatnonzero(bins == label)) for label in np.unique(bins)]
        return [rows[: len(rows) // 2] for rows in shuffled], [np.sort(rows[len(rows) // 2 :]) for rows in shuffled]

    @property
    def _own_half(self) -> list[Rows]:
        return self._halves[0]

    @property
    def _other_half(self) -> list[Rows]:
        return self._halves[1]

    def _own(self, m: int, seed: int) -> PickedRows:
        """Of each class m rows; of a larger m the same and more."""
        generator = np.random.default_rng([self.seed, 9, seed])
        return self._picked(np.sort(np.concatenate([generator.permutation(rows)[:m] for rows in self._own_half])))

    def _picked(self, rows: Rows) -> PickedRows:
        ((bank, _),) = self.test.parts
        return PickedRows(((bank, rows),))


def measures_over_seeds(metric: str, scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Interval]:
    """Mean, lowest and highest; of U3 also what the bank adds to one's own images, positive where it helps."""
    found = {name: _over_seeds(values) for name, values in scores.items()}
    for name, values in scores.items():
        base, _, what = name.rpartition(", ")
        if what == "own images alone":
            gain = scores[base] - values if metric == "top1" else values - scores[base]
            found[f"{GAIN}, {base.rpartition(', ')[2]}"] = _over_seeds(gain)
    return found


def _all_rows(bank: FeatureBank) -> PickedRows:
    return PickedRows(((bank, np.arange(len(bank))),))


def _over_seeds(values: NDArray[np.float64]) -> Interval:
    return Interval(value=float(values.mean()), low=float(values.min()), high=float(values.max()))
