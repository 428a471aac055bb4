"""New classifiers on rows of a bank: how much they are trained, what of that is kept, how long the rest takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.bank.dataset import BankDataset
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import ComputedRows, Concat, RowSource, Select
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import announce
from dpf_release.evaluation.profiles import rate
from dpf_release.owner.workbench import Workbench
from dpf_release.release.attack_report import ProfileName
from dpf_release.release.train import fit_classifier, scores

LARGEST_BATCH, SMALLEST_BATCH, LEAST_STEPS = 128, 16, 32  # of a step; of an epoch
LEARNING_RATE = 0.05  # at the largest batch


@dataclass(frozen=True)
class Effort:
    """How much is trained."""

    seeds: int  # how many times everything is
    own: tuple[int, ...]  # numbers m of own images a class
    rows: int  # that a training is shown, repeats counted, where it has many
    epochs: int  # at the most, where it has few; but until it was shown `least_rows`
    least_rows: int  # so that a classifier of few rows is not beaten for want of steps

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
    "standard": Effort(3, (10, 100), rows=90_000, epochs=16, least_rows=12_000),
    "full": Effort(3, (10, 100), rows=360_000, epochs=16, least_rows=12_000),
}


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a bank."""

    bank: FeatureBank
    rows: Rows
    targets: NDArray[Any] | None = None  # of these rows, where they are not the bank's own

    @classmethod
    def whole(cls, bank: FeatureBank, targets: NDArray[Any] | None = None) -> Part:
        """All rows of a bank."""
        return cls(bank, np.arange(len(bank)), targets)

    def source(self) -> RowSource:
        """As rows by number."""
        if self.targets is None:
            return Select(self.bank, self.rows)
        return ComputedRows(self.targets, lambda numbers: self.bank.read(self.rows[numbers]))

    @property
    def digest(self) -> str:
        """Changes with any row, and any target."""
        of_bank = BankDataset([self.bank], (), [self.bank.targets]).digest
        told = b"" if self.targets is None else np.ascontiguousarray(self.targets).tobytes()
        return hashlib.sha256(of_bank.encode() + self.rows.tobytes() + told).hexdigest()


@dataclass(frozen=True, eq=False)
class PickedRows:
    """Some rows of several banks as one."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features."""
        return self.parts[0].bank.index.row_bytes

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) or (N, K)."""
        return self._rows.targets

    @cached_property
    def digest(self) -> str:
        """Changes with any row."""
        return hashlib.sha256(json.dumps([part.digest for part in self.parts]).encode()).hexdigest()

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Rows by number: (n, C, H, W) float16, and their targets."""
        return torch.from_numpy(self._rows.read(rows)), torch.from_numpy(self.targets[rows])

    def __add__(self, other: PickedRows) -> PickedRows:
        return PickedRows((*self.parts, *other.parts))

    @cached_property
    def _rows(self) -> Concat:
        return Concat([part.source() for part in self.parts])


@dataclass(frozen=True, eq=False)
class Training:
    """A new classifier: on which rows, judged by which, from which seed."""

    title: str
    rows: PickedRows
    judge: PickedRows
    seed: int


@dataclass(frozen=True, eq=False)
class Classifiers:
    """Trains φ2's architecture anew, and keeps the scores."""

    workbench: Workbench
    effort: Effort

    def scores(self, trainings: Sequence[Training]) -> dict[Training, NDArray[np.float64]]:
        """Of each training (n,) scores of the rows that judge it; what was trained before is not trained again."""
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
        if not trainings:
            return 0.0
        shown = sum(len(training.rows) * self.effort.schedule(len(training.rows))[0] for training in trainings)
        rows, device = trainings[0].rows, self.workbench.device
        network = self.workbench.new_classifier(0).to(device).to(memory_format=torch.channels_last)
        batch = rows.read(np.arange(min(len(rows), LARGEST_BATCH)))[0].float().to(device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        return shown / rate(lambda: network(batch).float().mean().backward(), len(batch), device) / 60

    def _known(self, training: Training) -> NDArray[np.float64] | None:
        subject = self._subject(training)
        kept = self.workbench.kept.load(subject["utility"], subject)
        return None if kept is None else kept["scores"].double().numpy()

    def _train(self, training: Training) -> None:
        kept, subject = self.workbench.kept, self._subject(training)
        epochs, batch_size, learning_rate = subject["recipe"]
        network, name = self.workbench.new_classifier(training.seed), subject["utility"]
        fit_classifier(
            network,
            training.rows,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=training.seed,
            device=str(self.workbench.device),
            title=f"Training a new classifier: {training.title}",
            checkpoint=kept.checkpoint(name, subject),
            subject=json.dumps(subject, sort_keys=True),
        )
        kept.save(name, subject, {"scores": scores(network, training.judge)})

    def _subject(self, training: Training) -> dict[str, Any]:
        """What a score depends on."""
        return {
            "utility": training.title.split(" ")[0],
            "version": 2,
            "network": self.workbench.record.model_dump(mode="json"),
            "rows": training.rows.digest,
            "judge": training.judge.digest,
            "recipe": [*self.effort.schedule(len(training.rows))],
            "seed": training.seed,
        }
