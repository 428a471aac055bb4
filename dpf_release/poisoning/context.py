"""What a poisoning function is given to learn from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.ranks import Ranks
from dpf_release.errors import ConfigError
from dpf_release.models.training import History, Loss, ReadBatch, Recipe, fit
from dpf_release.poisoning.objective import Adversaries, Objective, PoisonBatch, TaskLoss
from dpf_release.poisoning.plan import Contributors, FeatureSpec

VALIDATION_ROWS = 2000  # enough for the third digit of a loss; more would cost a share of each epoch
VALIDATION_BATCH = 256


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split, and the images that they are of.

    Attributes:
        rows: clean features, targets and ids.
        images: row numbers → (n, 3, H, W) uint8.
    """

    rows: RowSource
    images: Callable[[Rows], Tensor]


@dataclass(frozen=True, eq=False)
class Material:
    """What functions are fitted from, whoever does it.

    Attributes:
        features: what a row is.
        phi_1: the featurizer, frozen: normalised images of Q → features. Of S there are the rows.
        phi_2: the classifier, frozen.
        task: what φ2's answers are worth.
        train: rows that a function learns from.
        val: rows that choose the epoch; may be none.
        public: φ1(Q), with labels where Q has them; None: there is no Q.
        adversaries: whom a function is trained against; called when it asks for them, which may train them.
        objective: `equivalence` or `paper`.
        lambda_: weight of the adversaries' term.
        recipe: epochs, batch size, learning rate, seed and precision of each training.
        secret: 32 bytes; all that is secret of a function follows from them.
        device: where networks run.
        title: for progress lines.
        subject: what a training depends on beside its recipe; a checkpoint of another is not gone on from.
        ranks: who takes part.
        checkpoint: name of a training → where it keeps what it goes on from; None: nowhere.
        row_bytes: of a row on disk, where neighbours are best read together; 0: in memory.
    """

    features: FeatureSpec
    phi_1: nn.Module
    phi_2: nn.Module
    task: TaskLoss
    train: Split
    val: Split
    public: RowSource | None
    adversaries: Callable[[], Adversaries]
    objective: str
    lambda_: float
    recipe: Recipe
    secret: bytes
    device: torch.device
    title: str = "Training the poisoning function"
    subject: str = ""
    ranks: Ranks = Ranks()
    checkpoint: Callable[[str], Path | None] = lambda name: None
    row_bytes: int = 0


@dataclass(frozen=True, eq=False)
class FitRows:
    """Rows of one split as a stage is fitted on them.

    Attributes:
        inputs: as the stages before leave them.
        goal: what φ2 should make of each: the row after the last stage that mixes rows, for it *is* that other image.
            Noise or a filter before a learned stage is a disturbance, which that learns to live with.
        contributors: row numbers → which rows' images are in them.
        images: row numbers → (n, 3, H, W) uint8.
    """

    inputs: RowSource
    goal: RowSource
    contributors: Callable[[Rows], Contributors]
    images: Callable[[Rows], Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Rows) -> PoisonBatch:
        """What an objective looks at, of some rows."""
        features = torch.from_numpy(np.asarray(self.inputs.read(rows), np.float32))
        same = self.goal is self.inputs
        seen = features if same else torch.from_numpy(np.asarray(self.goal.read(rows), np.float32))
        made = self.contributors(rows)
        targets = torch.from_numpy(self.inputs.targets[rows])
        return PoisonBatch(features, seen, targets, torch.from_numpy(made.positions), self.images(made.members))


@dataclass(frozen=True, eq=False)
class FitContext:
    """What a stage is given to learn from.

    Attributes:
        material: all that is there.
        stage: its number in the chain.
        train: rows to learn from, as the stages before leave them.
        val: rows to choose by; may be none.
        secret: 32 bytes of this stage's own.
        histories: what each training did, by stage and name.
    """

    material: Material
    stage: int
    train: FitRows
    val: FitRows
    secret: bytes
    histories: dict[str, dict[str, Any]] = field(default_factory=dict)

    def objective(self) -> Objective:
        """What the configuration says that P minimises.

        Raises:
            ConfigError: there are no adversaries.
        """
        material = self.material
        adversaries = material.adversaries()
        if not adversaries:
            raise ConfigError("expected an adversary that the poisoning function is trained against, found none.")
        return Objective(
            material.phi_2, material.task, adversaries, material.objective == "equivalence", material.lambda_
        )

    def fit(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        name: str = "",
        read_batch: ReadBatch | None = None,
        validate: Callable[[], float] | None = None,
        **recipe: Any,
    ) -> dict[str, float]:
        """Fits a network in place, and freezes it: the one training loop, with progress, checkpoints and ranks.

        Args:
            network: what is trained; whatever else the loss uses must be frozen.
            loss: network and batch → `{"loss": ..., other facts to show}`.
            name: of this training, where a function has several.
            read_batch: row numbers of `train` and a generator → a batch; by default a `PoisonBatch`.
            validate: a score after each epoch, lower is better; by default the loss on `val`.
            recipe: what is otherwise than in `material.recipe`: `epochs=3`.

        Returns:
            The best epoch's facts.
        """
        material, key = self.material, f"{self.stage}-{name}" if name else str(self.stage)
        if key in self.histories or not re.fullmatch(r"[A-Za-z0-9_-]{0,40}", name):
            raise ConfigError(
                "expected a name of letters, digits, '_' and '-' for each training of a stage, another each time, "
                f"found {name!r}."
            )
        if validate is None and read_batch is None and len(self.val):
            validate = lambda: self._loss_on_val(network, loss)  # noqa: E731
        history: History = fit(
            network,
            len(self.train),
            read_batch or (lambda rows, _: self.train.batch(rows)),
            loss,
            replace(material.recipe, **recipe),
            title=f"{material.title} ({name})" if name else material.title,
            device=material.device,
            ranks=material.ranks,
            validate=validate,
            checkpoint=material.checkpoint(key),
            subject=f"{key} {material.subject}",
            row_bytes=material.row_bytes,
        )
        network.eval().requires_grad_(False)
        self.histories[key] = asdict(history)
        return history.epochs[history.best_epoch]

    @contextmanager
    def seeded(self, name: str) -> Iterator[np.random.Generator]:
        """What is drawn inside follows the stage's secret and a name; so do the numbers of the generator."""
        seed = hashlib.sha256(self.secret + name.encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(seed[:8]) >> 1)
            yield np.random.default_rng(list(seed))

    def _loss_on_val(self, network: nn.Module, loss: Loss) -> float:
        total, count = 0.0, min(len(self.val), VALIDATION_ROWS)
        for start in range(0, count, VALIDATION_BATCH):
            rows = np.arange(start, min(start + VALIDATION_BATCH, count))
            batch = tuple(tensor.to(self.material.device) for tensor in self.val.batch(rows))
            total += float(loss(network, batch)["loss"]) * len(rows)
        return total / count
