"""Classifiers that an attacker trains on features, to read what they were not released for."""

from __future__ import annotations

from torch import Tensor, nn


class AttributeClassifier(nn.Module):
    """A small CNN from features (N, C, H, W), any H and W, to logits (N, classes) of an attribute.

    Such as the identity of a person: the attack of the paper's section 4.4, which does not give the layers.
    """

    def __init__(self, feature_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, _ = feature_shape
        stride = 2 if height >= 16 else 1
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 128, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # (N, 256, 1, 1) -> (N, 256)
            nn.Dropout(0.2),
            nn.Linear(256, classes),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Returns logits (N, classes)."""
        logits: Tensor = self.layers(features)
        return logits
