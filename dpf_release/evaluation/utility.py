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
from dpf_release.evaluation.targets import bins_of
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

    The vault is held by the caller. `share` is of the profile's trainings, where the owner's patience is shorter.

    Returns:
        Intervals: of U1 95 % over images; of U2 and U3 the mean, the lowest and the highest over seeds. U2 and U3 are
        missing where φ1(S) has no test rows.
    """
    found = {}
    if "U1" in only:
        found["U1"] = _equivalence(candidate.measure_task())
    try:
        classifiers, trainings = _trainings(workbench, candidate, profile, seed, share, only)
    except BankError as error:
        announce(f"U2 and U3 are not measured: there are no test rows to judge by ({error})")
        return found
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
    try:
        classifiers, trainings = _trainings(workbench, candidate, profile, seed, share, only)
    except BankError:
        return 0.0
    return classifiers.minutes(classifiers.missing(_flat(trainings)))


Groups = dict[str, dict[str, list[Training]]]  # code → measure → one training a seed


def _trainings(
    workbench: Workbench, candidate: Candidate, profile: ProfileName, seed: int, share: float, only: Sequence[str]
) -> tuple[Classifiers, Groups]:
    """What U2 and U3 train; where φ1(S) has no test rows, a `BankError`."""
    classifiers = Classifiers(workbench, EFFORTS[profile].shared(share))
    bench = _Bench.of(workbench, candidate, classifiers.effort, seed)
    kinds = {"U2": bench.alone, "U3": bench.joined}
    return classifiers, {code: of() for code, of in kinds.items() if code in only}


def _flat(trainings: Groups) -> list[Training]:
    return [training for of in trainings.values() for group in of.values() for training in group]


def _equivalence(task: Mapping[str, Any]) -> Utility:
    metric = "mae" if "mae_clean" in task else "top1"
    names = {metric: "poisoned", f"{metric} on clean rows": "clean", "clean - poisoned": "difference"}
    keys = {name: f"{metric}_{kind}" for name, kind in names.items()}
    if "kl" in task:
        keys["KL of the outputs"] = "kl"
    bounds = {name: (task[key], *task[f"{key}_95"]) for name, key in keys.items()}
    return Utility(measures={name: Interval(value=v, low=low, high=high) for name, (v, low, high) in bounds.items()})


@dataclass(frozen=True, eq=False)
class _Bench:
    """Rows to train on and to judge by."""

    metric: str
    effort: Effort
    seed: int  # of what is one's own
    bank: PickedRows  # the candidate's train rows
    clean: PickedRows  # φ1(S train)
    test: PickedRows  # φ1(S test)

    @classmethod
    def of(cls, workbench: Workbench, candidate: Candidate, effort: Effort, seed: int) -> _Bench:
        test, clean = (_all_rows(workbench.private_bank(split)) for split in ("test", "train"))
        if not len(test):
            raise BankError("expected rows in test, found none")
        return cls(METRICS[workbench.task], effort, seed, _all_rows(candidate.banks["train"]), clean, test)

    def alone(self) -> dict[str, list[Training]]:
        """U2."""
        kinds = {self.metric: ("the bank", self.bank), f"{self.metric} on clean rows": ("clean rows", self.clean)}
        return {
            name: [Training(f"U2 {what}", rows, self.test, seed) for seed in range(self.effort.seeds)]
            for name, (what, rows) in kinds.items()
        }

    def joined(self) -> dict[str, list[Training]]:
        """U3; of m that no class has so many of, none, and where that is all the most that there are."""
        (mine, others), found = self._halves, dict[str, list[Training]]()
        most, judge = min(map(len, mine)), self._picked(np.concatenate(others))
        for m in [m for m in self.effort.own if m <= most] or [most] * (most > 0):
            own = [self._own(m, seed) for seed in range(self.effort.seeds)]
            for name, rows in (
                (f"{self.metric}, m = {m}", self.bank),
                (f"{self.metric}, m = {m}, own images alone", None),
                (f"{self.metric}, m = {m}, with clean rows", self.clean),
            ):
                found[name] = [
                    Training(f"U3 {name}", these if rows is None else rows + these, judge, seed)
                    for seed, these in enumerate(own)
                ]
        return found

    @cached_property
    def _halves(self) -> tuple[list[Rows], list[Rows]]:
        """Test rows of each class, one's own and those that judge."""
        bins, generator = bins_of(self.test.targets), np.random.default_rng([self.seed, 8])
        shuffled = [generator.permutation(np.flatnonzero(bins == label)) for label in np.unique(bins)]
        return [rows[: len(rows) // 2] for rows in shuffled], [np.sort(rows[len(rows) // 2 :]) for rows in shuffled]

    def _own(self, m: int, seed: int) -> PickedRows:
        """Of each class m rows; of a larger m the same and more."""
        generator = np.random.default_rng([self.seed, 9, seed])
        return self._picked(np.sort(np.concatenate([generator.permutation(rows)[:m] for rows in self._halves[0]])))

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
