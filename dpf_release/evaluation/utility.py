"""Utility: what a downstream user can do with a candidate, from its bank as it lies on disk.

U1: φ2 on the released rows. U2: a new classifier φ3, trained on them alone. U3: a new classifier φ4, trained on them
and m clean images of one's own a class. U2 and U3 are judged on clean rows that nobody released.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.bank.dataset import BankDataset
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import Concat, Select
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import announce
from dpf_release.errors import BankError
from dpf_release.evaluation.truth import bins_of
from dpf_release.owner.material import Candidate, Material
from dpf_release.release.attack_report import GAIN, Interval, ProfileName, Utility
from dpf_release.release.train import fit_classifier, score

UTILITIES = ("U1", "U2", "U3")
LARGEST_BATCH, SMALLEST_BATCH, LEAST_STEPS = 128, 16, 32  # of a step; of an epoch
LEARNING_RATE = 0.05  # at the largest batch
METRICS = {"classification": "top1", "regression": "mae"}


@dataclass(frozen=True)
class Effort:
    """How much is trained.

    Attributes:
        seeds: how many times everything is.
        own: numbers m of own images a class.
        rows: that a training is shown, repeats counted, where it has many.
        epochs: at the most, where it has few; but until it was shown `least_rows`.
        least_rows: so that a classifier of few rows is not beaten for want of steps.
    """

    seeds: int
    own: tuple[int, ...]
    rows: int
    epochs: int
    least_rows: int

    def schedule(self, rows: int) -> tuple[int, int, float]:
        """Epochs, batch size and peak learning rate for so many rows; few rows come in small batches."""
        epochs = max(1, round(min(self.rows / rows, max(self.epochs, self.least_rows / rows))))
        batch = min(LARGEST_BATCH, max(SMALLEST_BATCH, rows // LEAST_STEPS))
        return epochs, batch, LEARNING_RATE * (batch / LARGEST_BATCH) ** 0.5

    def shared(self, share: float) -> Effort:
        """With a share of the rows."""
        rows, epochs, least_rows = (max(1, round(share * n)) for n in (self.rows, self.epochs, self.least_rows))
        return replace(self, rows=rows, epochs=epochs, least_rows=least_rows)


EFFORTS: dict[ProfileName, Effort] = {
    "quick": Effort(1, (100,), rows=60_000, epochs=8, least_rows=6_000),
    "standard": Effort(3, (10, 50, 100), rows=90_000, epochs=16, least_rows=12_000),
    "full": Effort(3, (10, 50, 100), rows=360_000, epochs=16, least_rows=12_000),
}


@dataclass(frozen=True, eq=False)
class PickedRows:
    """Some rows of several banks as one."""

    parts: tuple[tuple[FeatureBank, Rows], ...]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features."""
        return self.parts[0][0].index.row_bytes

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) or (N, K)."""
        return self._rows.targets

    @cached_property
    def digest(self) -> str:
        """Changes with any row."""
        parts = [
            [BankDataset([bank], (), [bank.targets]).digest, hashlib.sha256(rows.tobytes()).hexdigest()]
            for bank, rows in self.parts
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Rows by number: (n, C, H, W) float16, and their targets."""
        return torch.from_numpy(self._rows.read(rows)), torch.from_numpy(self.targets[rows])

    def __add__(self, other: PickedRows) -> PickedRows:
        return PickedRows((*self.parts, *other.parts))

    @cached_property
    def _rows(self) -> Concat:
        return Concat([Select(bank, rows) for bank, rows in self.parts])


@dataclass(frozen=True, eq=False)
class Training:
    """A new classifier: on which rows, judged by which, from which seed."""

    title: str
    rows: PickedRows
    judge: PickedRows
    seed: int


def measure_utility(
    material: Material,
    candidate: Candidate,
    profile: ProfileName,
    seed: int = 0,
    share: float = 1.0,
    only: Sequence[str] = UTILITIES,
) -> dict[str, Utility]:
    """U1, U2, U3 of a candidate; what is trained is kept, and what does not depend on the candidate serves them all.

    The vault is held by the caller.

    Args:
        material: of the owner's side.
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
    try:
        bench = _Bench.of(material, candidate, EFFORTS[profile].shared(share), seed)
    except BankError as error:
        announce(f"U2 and U3 are not measured: there are no test rows to judge by ({error})")
        return found
    trainings = bench.trainings(only)
    scores = bench.scores(_flat(trainings))
    for code, of in trainings.items():
        by_group = {key: np.array([scores[training] for training in group]) for key, group in of.items()}
        if by_group:
            found[code] = Utility(measures=bench.measures(by_group))
    return found


def utility_minutes(
    material: Material, candidate: Candidate, profile: ProfileName, seed: int, share: float, only: Sequence[str]
) -> float:
    """How long `measure_utility` takes for what is not kept, by a short trial."""
    try:
        bench = _Bench.of(material, candidate, EFFORTS[profile].shared(share), seed)
    except BankError:
        return 0.0
    return bench.minutes(bench.missing(_flat(bench.trainings(only))))


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
    """Rows to train on and to judge by, and what was trained before.

    Attributes:
        bank: the candidate's train rows.
        clean: φ1(S train).
        test: φ1(S test).
    """

    material: Material
    effort: Effort
    seed: int
    bank: PickedRows
    clean: PickedRows
    test: PickedRows

    @classmethod
    def of(cls, material: Material, candidate: Candidate, effort: Effort, seed: int) -> _Bench:
        test = _all_rows(material.private_bank("test"))
        if not len(test):
            raise BankError("expected rows in test, found none")
        bank, clean = (_all_rows(bank) for bank in (candidate.banks["train"], material.private_bank("train")))
        return cls(material, effort, seed, bank, clean, test)

    @property
    def metric(self) -> str:
        return METRICS[self.material.task]

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

    def measures(self, scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Interval]:
        """Over seeds; of U3 also what the bank adds to one's own images, positive where it helps."""
        found = {name: _over_seeds(values) for name, values in scores.items()}
        for name, values in scores.items():
            base, _, what = name.rpartition(", ")
            if what == "own images alone":
                gain = scores[base] - values if self.metric == "top1" else values - scores[base]
                found[f"{GAIN}, {base.rpartition(', ')[2]}"] = _over_seeds(gain)
        return found

    # --------------------------------------------------------------------------------------- trainings

    def scores(self, trainings: Sequence[Training]) -> dict[Training, float]:
        """The score of each; what was trained before is not trained again."""
        if missing := self.missing(trainings):
            announce(f"Utility: {len(missing)} trainings")  # how long they take was told with the attacks
        for training in missing:
            self._train(training)
        return {training: score for training in trainings if (score := self._known(training)) is not None}

    def missing(self, trainings: Sequence[Training]) -> list[Training]:
        """Those that were not done before."""
        return [training for training in trainings if self._known(training) is None]

    def minutes(self, trainings: Sequence[Training]) -> float:
        """What they take, by a short trial."""
        shown = sum(len(training.rows) * self.effort.schedule(len(training.rows))[0] for training in trainings)
        return shown / self._rate(trainings[0].rows) / 60 if trainings else 0.0

    def _known(self, training: Training) -> float | None:
        subject = self._subject(training)
        kept = self.material.kept.load(subject["utility"], subject)
        return None if kept is None else float(kept["score"])

    def _train(self, training: Training) -> None:
        epochs, batch_size, learning_rate = self.effort.schedule(len(training.rows))
        kept, subject = self.material.kept, self._subject(training)
        network, name = self.material.new_classifier(training.seed), subject["utility"]
        fit_classifier(
            network,
            training.rows,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=training.seed,
            device=str(self.material.device),
            title=f"Training a new classifier: {training.title}",
            checkpoint=kept.checkpoint(name, subject),
            subject=json.dumps(subject, sort_keys=True),
        )
        found = score(network, training.judge)
        kept.save(name, subject, {"score": torch.tensor(found, dtype=torch.float64)})

    def _subject(self, training: Training) -> dict[str, Any]:
        """What a score depends on."""
        epochs, batch_size, learning_rate = self.effort.schedule(len(training.rows))
        return {
            "utility": training.title.split(" ")[0],
            "version": 1,
            "network": self.material.record.model_dump(mode="json"),
            "rows": training.rows.digest,
            "judge": training.judge.digest,
            "recipe": [epochs, batch_size, learning_rate],
            "seed": training.seed,
        }

    def _rate(self, rows: PickedRows, seconds: float = 1.0) -> float:
        """Rows a second of training here; a short trial."""
        device = self.material.device
        network = self.material.new_classifier(0).to(device).to(memory_format=torch.channels_last)
        batch = rows.read(np.arange(min(len(rows), LARGEST_BATCH)))[0].float().to(device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        step: Callable[[], None] = lambda: network(batch).float().mean().backward()  # noqa: E731
        step()  # the first is slower than all others
        started, done = time.monotonic(), 0
        while not done or time.monotonic() - started < seconds:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += len(batch)
        return done / (time.monotonic() - started)


def _all_rows(bank: FeatureBank) -> PickedRows:
    return PickedRows(((bank, np.arange(len(bank))),))


def _over_seeds(values: NDArray[np.float64]) -> Interval:
    return Interval(value=float(values.mean()), low=float(values.min()), high=float(values.max()))
