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
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.privacy import Unit
from dpf_release.core.ranks import Ranks
from dpf_release.errors import ConfigError
from dpf_release.models.training import History, Loss, ReadBatch, Recipe, fit
from dpf_release.poisoning.objective import Adversaries, Objective, PoisonBatch, TaskLoss
from dpf_release.poisoning.plan import Contributors, FeatureSpec

VALIDATION_ROWS, VALIDATION_BATCH = 2000, 256  # enough for a loss's third digit; more would cost a share of each epoch


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split, and the images that they are of."""

    rows: RowSource  # clean features, targets and ids
    images: Callable[[Rows], Tensor]  # row numbers → (n, 3, H, W) uint8
    before_relu: RowSource | None = None  # the rows before φ1's last ReLU; None: as `rows`
    # (N,) numbers of whose each row is, that a privacy bound protects; each row its own by default
    units: Callable[[], Rows] | None = None

    @property
    def drawn_from(self) -> RowSource:
        """The rows whose statistics a function that draws rows takes."""
        return self.rows if self.before_relu is None else self.before_relu


@dataclass(frozen=True, eq=False)
class Material:
    """What functions are fitted from, whoever does it."""

    features: FeatureSpec  # what a row is
    phi_1: nn.Module  # the featurizer, frozen: normalised images of Q → features. Of S there are the rows
    phi_2: nn.Module  # the classifier, frozen
    task: TaskLoss  # what φ2's answers are worth
    train: Split  # rows that a function learns from
    val: Split  # rows that choose the epoch; may be none
    public: Split | None  # φ1(Q), with labels, all 0 where Q has none; None: there is no Q
    # whom a function is trained against; called when it asks for them, which may train them
    adversaries: Callable[[], Adversaries]
    objective: str  # `equivalence` or `paper`
    lambda_: float  # weight of the adversaries' term
    recipe: Recipe  # epochs, batch size, learning rate, seed and precision of each training
    secret: bytes  # 32 bytes; all that is secret of a function follows from them
    device: torch.device  # where networks run
    title: str = "Training the poisoning function"  # for progress lines
    subject: str = ""  # what a training depends on beside its recipe; a checkpoint of another is not gone on from
    ranks: Ranks = Ranks()  # who takes part
    # name of a training → where it keeps what it goes on from; None: nowhere
    checkpoint: Callable[[str], Path | None] = lambda name: None
    outputs: int = 0  # classes, or regression targets
    ranges: NDArray[np.float64] | None = None  # (K, 2) lowest and highest of each regression target, as declared
    unit: Unit = "image"  # what a privacy bound protects
    row_bytes: int = 0  # of a row on disk, where neighbours are best read together; 0: in memory


@dataclass(frozen=True, eq=False)
class FitRows:
    """Rows of one split as a stage is fitted on them."""

    inputs: RowSource  # as the stages before leave them
    # what φ2 should make of each: the row after the last stage that mixes rows, for it *is* that other image. Noise
    # or a filter before a learned stage is a disturbance, which that learns to live with
    goal: RowSource
    contributors: Callable[[Rows], Contributors]  # row numbers → which rows' images are in them
    images: Callable[[Rows], Tensor]  # row numbers → (n, 3, H, W) uint8

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
    """What a stage is given to learn from."""

    material: Material  # all that is there
    stage: int  # its number in the chain
    train: FitRows  # rows to learn from, as the stages before leave them
    val: FitRows  # rows to choose by; may be none
    secret: bytes  # 32 bytes of this stage's own
    histories: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each training did, by stage and name

    def objective(self) -> Objective:
        """What the configuration says that P minimises.

        Raises:
            ConfigError: there are no adversaries.
        """
        material = self.material
        adversaries = material.adversaries()
        if not adversaries:
            raise ConfigError("expected an adversary that the poisoning function is trained against, found none.")
        equivalence = material.objective == "equivalence"
        return Objective(material.phi_2, material.task, adversaries, equivalence, material.lambda_)

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
            expected = "expected a name of letters, digits, '_' and '-' for each training of a stage, another each time"
            raise ConfigError(f"{expected}, found {name!r}.")
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
