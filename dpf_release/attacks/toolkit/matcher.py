"""A matcher: two networks that bring a picture's clean features and its row, however disturbed, to the same place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.attacks.threat_models import BATCH, ReleaseView
from dpf_release.attacks.toolkit.clean_decoders import disturb
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained
from dpf_release.core.arrays import Rows

NAME = "A5 matcher"
LEARNING_RATE, TEMPERATURE = 2e-3, 0.1


class _Embedding(nn.Sequential):
    """Features (n, C, h, w) → unit vectors (n, 128)."""

    def __init__(self, channels: int, height: int) -> None:
        stride = 2 if height >= 8 else 1
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),  # (n, 128, 4, 4) -> (n, 2048)
            nn.Linear(2048, 128),
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(super().forward(features).float(), dim=1)


def train_matcher(view: ReleaseView) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Embeddings of a query's features and of rows, trained on Q so that pairs are near (a contrastive loss).

    A row of the training is the clean one with noise, channels scaled and dropped (`clean_decoders.disturb`), and up to
    three quarters of its places taken from other pictures.
    """
    channels, height, _ = view.feature_shape
    with seeded(view.seed):
        network = nn.ModuleDict({"picture": _Embedding(channels, height), "row": _Embedding(channels, height)})
    recipe, rows = recipe_for(view, view.budget.images, len(view.public), LEARNING_RATE)

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        features = view.features_of(view.public, chosen)
        return features, poisoned_somehow(features, generator)

    def validate() -> float:
        features = view.features_of(view.public_val, np.arange(min(len(view.public_val), BATCH)))
        other = poisoned_somehow(features, np.random.default_rng(view.seed))
        return float(_contrast(network, (features, other))["loss"])

    trained(view, NAME, network, read_batch, _contrast, recipe, rows, title="Training the matcher", validate=validate)
    return network["picture"], network["row"]


def poisoned_somehow(features: Tensor, generator: np.random.Generator) -> Tensor:
    """Features as some poisoning function might leave them; other pictures of the batch lend the places."""
    count, _, height, width = features.shape
    draws = torch.Generator(features.device).manual_seed(int(generator.integers(2**62)))
    half = (-(-height // 2), -(-width // 2))
    share = 0.75 * torch.rand(count, 1, 1, 1, generator=draws, device=features.device)
    windows = torch.rand(count, 1, *half, generator=draws, device=features.device) < share
    lent = F.interpolate(windows.float(), scale_factor=2)[:, :, :height, :width]  # 2×2 places at once
    order = torch.randperm(count, generator=draws, device=features.device)
    return disturb(features * (1 - lent) + features[order] * lent, generator)


def _contrast(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    assert isinstance(network, nn.ModuleDict)
    scores = network["picture"](batch[0]) @ network["row"](batch[1]).T / TEMPERATURE
    own = torch.arange(len(scores), device=scores.device)
    loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    return {"loss": loss, "top1": (scores.argmax(1) == own).float().mean()}
