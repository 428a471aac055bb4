"""What a downstream user does with a bank: train a classifier on its rows (φ3, a refined φ2), and score it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.core.arrays import Rows
from dpf_release.models.metrics import mean_absolute_error, topk_correct
from dpf_release.models.training import History, Recipe, fit, pick_device


class TargetedRows(Protocol):
    """Rows with their targets: a `BankDataset`, or some rows of several."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features."""

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Rows by number: (n, C, H, W) float16, and (n,) classes or (n, K) regression targets."""


def fit_classifier(
    network: nn.Module,
    rows: TargetedRows,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    seed: int = 0,
    device: str = "auto",
    title: str = "Training on features",
    checkpoint: Path | None = None,
    subject: str = "",
    validate: Callable[[], float] | None = None,
) -> History:
    """Fits a network from features to targets, in place: cross entropy, or smooth L1 for regression.

    By SGD in float32: the same seed gives the same weights on the same machine. The network maps (N, C, H, W) features
    to (N, outputs): `release.untrained_classifier()` for a new φ3, `release.classifier()` to refine φ2 (with a small
    learning rate). The rows are a release's bank, one's own, or several by `concat`. All else is as of `training.fit`.
    """
    recipe = Recipe(epochs, min(batch_size, len(rows)), learning_rate, "sgd", 5e-4, seed, bf16="off")
    return fit(
        network,
        len(rows),
        lambda chosen, _: rows.read(chosen),
        _loss,
        recipe,
        title=title,
        device=pick_device(device),
        checkpoint=checkpoint,
        subject=subject,
        validate=validate,
        row_bytes=rows.row_bytes,
    )


def _loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Of features (n, C, H, W) with their targets."""
    features, targets = batch
    outputs = network(features.float().contiguous(memory_format=torch.channels_last)).float()
    regression = targets.is_floating_point()
    return {"loss": F.smooth_l1_loss(outputs, targets) if regression else F.cross_entropy(outputs, targets)}


def score(network: nn.Module, rows: TargetedRows) -> float:
    """Top-1 of a network on a bank (0 to 1), or its mean absolute error in the target's unit."""
    return float(scores(network, rows).mean())


def scores(network: nn.Module, rows: TargetedRows) -> Tensor:
    """(N,) of each row: 1 where the network's first answer is right, else 0; or its mean absolute error."""
    parts = []
    network.eval()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        for start in range(0, len(rows), 256):
            features, targets = rows.read(np.arange(start, min(start + 256, len(rows))))
            outputs = network(features.float().to(device)).float().cpu()
            regression = targets.is_floating_point()
            scored = mean_absolute_error(outputs, targets) if regression else topk_correct(outputs, targets, 1)
            parts.append(scored.float())
    return torch.cat(parts)
