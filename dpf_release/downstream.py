"""What a downstream user does with a bank: train a classifier on its rows (φ3, a refined φ2), and score it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.loader import BankDataset
from dpf_release.metrics import mean_absolute_error, topk_correct
from dpf_release.training import History, Recipe, fit, pick_device

Rows = NDArray[np.int64]


def fit_classifier(
    network: nn.Module,
    rows: BankDataset,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    seed: int = 0,
    device: str = "auto",
) -> History:
    """Fits a network from features to targets, in place: cross entropy, or smooth L1 for regression.

    In float32: the same seed gives the same weights on the same machine.

    Args:
        network: (N, C, H, W) features → (N, outputs): `release.untrained_classifier()` for a new φ3,
            `release.classifier()` to refine φ2 (with a small learning rate).
        rows: a release's bank, one's own, or several by `concat`.
        epochs: passes over the rows.
        batch_size: rows a step.
        learning_rate: peak of the one-cycle schedule of SGD.
        seed: of the order of rows.
        device: where.
    """

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return rows.read(chosen)

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        outputs = network(batch[0].float().contiguous(memory_format=torch.channels_last)).float()
        regression = batch[1].is_floating_point()
        return {"loss": F.smooth_l1_loss(outputs, batch[1]) if regression else F.cross_entropy(outputs, batch[1])}

    recipe = Recipe(epochs, min(batch_size, len(rows)), learning_rate, "sgd", 5e-4, seed, bf16="off")
    return fit(
        network,
        len(rows),
        read_batch,
        loss,
        recipe,
        title="Training on features",
        device=pick_device(device),
        row_bytes=rows.row_bytes,
    )


def score(network: nn.Module, rows: BankDataset) -> float:
    """Top-1 of a network on a bank (0 to 1), or its mean absolute error in the target's unit."""
    parts = []
    network.eval()
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        for start in range(0, len(rows), 256):
            features, targets = rows.read(np.arange(start, min(start + 256, len(rows))))
            outputs = network(features.float().to(device)).float().cpu()
            regression = targets.is_floating_point()
            parts.append(
                mean_absolute_error(outputs, targets) if regression else topk_correct(outputs, targets, 1).float()
            )
    return float(torch.cat(parts).mean())
