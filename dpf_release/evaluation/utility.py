"""Utility: what a downstream user can do with a candidate, from its bank as it lies on disk.

U1: φ2 on the released rows. U2: a new classifier φ3, trained on them alone. U3: a new classifier φ4, trained on them
and m clean images of one's own a class. U2 and U3 are judged on clean rows that nobody released, and held against the
best that a user has without the bank: own images, public ones labelled by φ2, or what `without_bank` names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import announce
from dpf_release.errors import BankError
from dpf_release.evaluation.classifiers import EFFORTS, Classifiers, Effort, Part, PickedRows, Training
from dpf_release.evaluation.scoring import mean_interval
from dpf_release.evaluation.targets import bins_of
from dpf_release.evaluation.without_bank import Answerer, answerers
from dpf_release.owner.workbench import Candidate, Workbench
from dpf_release.release.attack_report import GAIN, GAIN_OF_CLEAN, Interval, ProfileName, Utility

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
        Means with 95 % intervals over images; of U2 and U3 each image's score is a mean over seeds. U2 and U3 are
        missing where φ1(S) has no test rows.
    """
    found = {}
    if "U1" in only:
        found["U1"] = _equivalence(candidate.measure_task())
    try:
        classifiers, compared = _comparisons(workbench, candidate, profile, seed, share, only)
    except BankError as error:
        announce(f"U2 and U3 are not measured: there are no test rows to judge by ({error})")
        return found
    scores = classifiers.scores(_trainings(compared))
    for code, of in compared.items():
        if of:
            parts = [one.measured(scores, METRICS[workbench.task], seed) for one in of]
            found[code] = Utility(
                measures={name: interval for part, _ in parts for name, interval in part.items()},
                best={one.m: best for one, (_, best) in zip(of, parts, strict=True) if best},
            )
    return found


def utility_minutes(
    workbench: Workbench, candidate: Candidate, profile: ProfileName, seed: int, share: float, only: Sequence[str]
) -> float:
    """How long `measure_utility` takes for what is not kept, by a short trial."""
    try:
        classifiers, compared = _comparisons(workbench, candidate, profile, seed, share, only)
    except BankError:
        return 0.0
    return classifiers.minutes(classifiers.missing(_trainings(compared)))


def _comparisons(
    workbench: Workbench, candidate: Candidate, profile: ProfileName, seed: int, share: float, only: Sequence[str]
) -> tuple[Classifiers, dict[str, list[Comparison]]]:
    """What U2 and U3 compare; where φ1(S) has no test rows, a `BankError`."""
    classifiers = Classifiers(workbench, EFFORTS[profile].shared(share))
    bench = _Bench.of(workbench, candidate, classifiers.effort, seed)
    kinds = {"U2": bench.alone, "U3": bench.joined}
    return classifiers, {code: of() for code, of in kinds.items() if code in only}


def _trainings(compared: Mapping[str, Sequence[Comparison]]) -> list[Training]:
    return [training for of in compared.values() for one in of for training in one.trainings()]


def _equivalence(task: Mapping[str, Any]) -> Utility:
    metric = "mae" if "mae_clean" in task else "top1"
    names = {metric: "poisoned", f"{metric} on clean rows": "clean", "clean - poisoned": "difference"}
    keys = {name: f"{metric}_{kind}" for name, kind in names.items()}
    if "kl" in task:
        keys["KL of the outputs"] = "kl"
    bounds = {name: (task[key], *task[f"{key}_95"]) for name, key in keys.items()}
    return Utility(measures={name: Interval(value=v, low=low, high=high) for name, (v, low, high) in bounds.items()})


BANK, CLEAN, OWN = "", "clean rows", "own images alone"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The bank, clean rows, and what a user has without the bank, on the same images.

    Attributes:
        m: "m = 10" own images a class; empty for none.
        trained: by name (`BANK`, `CLEAN`, or of what is without the bank), one training a seed.
        answered: by name, (n,) scores of what is without the bank and needs no training.
    """

    m: str
    trained: Mapping[str, Sequence[Training]]
    answered: Mapping[str, NDArray[np.float64]]

    def trainings(self) -> Iterator[Training]:
        """All of them."""
        return itertools.chain.from_iterable(self.trained.values())

    def measured(
        self, scores: Mapping[Training, NDArray[np.float64]], metric: str, seed: int
    ) -> tuple[dict[str, Interval], str]:
        """Each by name, what the bank and clean rows add to the best without the bank, and which that is, if any.

        A gain is positive where it helps, and its interval is over the paired differences of images.
        """
        of_image = {name: np.mean([scores[one] for one in group], axis=0) for name, group in self.trained.items()}
        of_image |= self.answered
        found = {", ".join(filter(None, (metric, self.m, name))): of for name, of in of_image.items()}
        sign = 1 if metric == "top1" else -1
        without = [name for name in of_image if name not in (BANK, CLEAN)]
        best = max(without, key=lambda name: sign * of_image[name].mean(), default="")
        if best:
            for gain, name in ((GAIN, BANK), (GAIN_OF_CLEAN, CLEAN)):
                found[", ".join(filter(None, (gain, self.m)))] = sign * (of_image[name] - of_image[best])
        return {name: mean_interval(of, seed) for name, of in found.items()}, best


@dataclass(frozen=True, eq=False)
class _Bench:
    """Rows to train on and to judge by."""

    effort: Effort
    seed: int  # of what is one's own
    bank: PickedRows  # the candidate's train rows
    clean: PickedRows  # φ1(S train)
    test: Part  # φ1(S test)
    public: FeatureBank  # φ1(Q)
    without: Sequence[Answerer]

    @classmethod
    def of(cls, workbench: Workbench, candidate: Candidate, effort: Effort, seed: int) -> _Bench:
        test, clean = (Part.whole(workbench.private_bank(split)) for split in ("test", "train"))
        if not len(test.rows):
            raise BankError("expected rows in test, found none")
        bank, without = Part.whole(candidate.banks["train"]), answerers(workbench, candidate)
        return cls(effort, seed, PickedRows((bank,)), PickedRows((clean,)), test, workbench.public_bank(), without)

    def alone(self) -> list[Comparison]:
        """U2."""
        judge = PickedRows((self.test,))
        rows = {BANK: self.bank, CLEAN: self.clean, **self._labelled}
        trained = {
            name: [Training(f"U2 {name or 'the bank'}", of, judge, seed) for seed in range(self.effort.seeds)]
            for name, of in rows.items()
        }
        return [Comparison("", trained, self._answered(self.test.rows))]

    def joined(self) -> list[Comparison]:
        """U3; of m that no class has so many of, none, and where that is all the most that there are."""
        (mine, others), found = self._halves, list[Comparison]()
        most, judging = min(map(len, mine)), np.concatenate(others)
        judge = PickedRows((Part(self.test.bank, judging),))
        for m in [m for m in self.effort.own if m <= most] or [most] * (most > 0):
            own = [self._own(m, seed) for seed in range(self.effort.seeds)]
            rows = {BANK: self.bank, OWN: PickedRows(()), CLEAN: self.clean, **self._labelled}
            trained = {
                name: [
                    Training(f"U3 {', '.join(filter(None, (f'm = {m}', name)))}", of + these, judge, seed)
                    for seed, these in enumerate(own)
                ]
                for name, of in rows.items()
            }
            found.append(Comparison(f"m = {m}", trained, self._answered(judging)))
        return found

    @cached_property
    def _labelled(self) -> dict[str, PickedRows]:
        """φ1(Q), labelled by what is public without the bank."""
        return {
            f"public images labelled by {one.name}": PickedRows((Part.whole(self.public, one.of_bank(self.public)),))
            for one in self.without
        }

    def _answered(self, rows: Rows) -> dict[str, NDArray[np.float64]]:
        """The scores of what is public without the bank, on test rows."""
        return {
            f"{one.name} alone": _scores(self._answers[one.name], self.test.bank.targets)[rows] for one in self.without
        }

    @cached_property
    def _answers(self) -> dict[str, NDArray[np.generic]]:
        return {one.name: one.of_bank(self.test.bank) for one in self.without}

    @cached_property
    def _halves(self) -> tuple[list[Rows], list[Rows]]:
        """Test rows of each class, one's own and those that judge."""
        bins, generator = bins_of(self.test.bank.targets), np.random.default_rng([self.seed, 8])
        shuffled = [generator.permutation(np.flatnonzero(bins == label)) for label in np.unique(bins)]
        return [rows[: len(rows) // 2] for rows in shuffled], [np.sort(rows[len(rows) // 2 :]) for rows in shuffled]

    def _own(self, m: int, seed: int) -> PickedRows:
        """Of each class m rows; of a larger m the same and more."""
        generator = np.random.default_rng([self.seed, 9, seed])
        chosen = np.sort(np.concatenate([generator.permutation(rows)[:m] for rows in self._halves[0]]))
        return PickedRows((Part(self.test.bank, chosen),))


def _scores(answers: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """(n,) 1 where a class is right, or the mean absolute error of regression targets."""
    if targets.ndim == 1:
        return (answers == targets).astype(np.float64)
    error: NDArray[np.float64] = np.abs(answers - targets).mean(1).astype(np.float64)
    return error
