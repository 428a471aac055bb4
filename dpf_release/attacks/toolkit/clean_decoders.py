"""Decoders from clean features of Q to its images: what A1 attacks with, and what others begin from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dpf_release.attacks.threat_models import HeldPictures, ReleaseView
from dpf_release.attacks.toolkit.decoder import DecoderLoss, train_decoder
from dpf_release.core.arrays import Rows

# Name, architecture, loss, whether features are disturbed; the first are the strongest for their time.
DECODERS: tuple[tuple[str, str, DecoderLoss, bool], ...] = (
    ("rx2s2-c, SSIM, disturbed", "rx2s2-c", "ssim", True),
    ("px2s2, L1", "px2s2", "l1", False),
    ("rx2s2-c, L1", "rx2s2-c", "l1", False),
    ("rx4s2, SSIM", "rx4s2", "ssim", False),
    ("px4s2, L1, disturbed", "px4s2", "l1", True),
    ("rx4s4, L1", "rx4s4", "l1", False),
)


def clean_decoder(view: ReleaseView, number: int = 0) -> nn.Module:
    """One of `DECODERS`, trained where it is not kept. Other attacks begin with it."""
    name, architecture, loss, disturbed = DECODERS[number]

    def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
        features = view.features_of(held, rows)
        return disturb(features, generator) if disturbed and generator is not None else features

    return train_decoder(view, f"A1 {name}", inputs, architecture=architecture, loss=loss)


def disturb(features: Tensor, generator: np.random.Generator) -> Tensor:
    """Noise of up to half a row's deviation, channels times 0.5 to 2, a tenth of them dropped out."""
    draws = torch.Generator(features.device).manual_seed(int(generator.integers(2**62)))
    count, channels = features.shape[:2]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draws, device=features.device)

    noise = torch.randn(features.shape, generator=draws, device=features.device)
    deviation = features.std(dim=(1, 2, 3), keepdim=True) * uniform(count, 1, 1, 1) / 2
    scale = 2 ** (2 * uniform(count, channels, 1, 1) - 1)
    kept = (uniform(count, channels, 1, 1) > 0.1).float()
    return ((features + deviation * noise) * scale * kept).contiguous(memory_format=torch.channels_last)
