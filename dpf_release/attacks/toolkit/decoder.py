"""Decoders: networks that an attacker trains to turn what a row became back into a picture.

Those from clean features of Q to its images are what A1 attacks with, and what others begin from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.attacks.threat_models import HeldPictures, ReleaseView, batches
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained, weights_sha256
from dpf_release.core.arrays import Rows
from dpf_release.models.metrics import l1, ssim
from dpf_release.models.reconstructors import Reconstructor

Inputs = Callable[[HeldPictures, Rows, np.random.Generator | None], Tensor]
DecoderLoss = Literal["l1", "ssim"]
LEARNING_RATE = 3e-3
VALIDATION_PICTURES = 1000
# Name, architecture, loss, whether features are disturbed; the first are the strongest for their time.
DECODERS: tuple[tuple[str, str, DecoderLoss, bool], ...] = (
    ("rx2s2-c, SSIM, disturbed", "rx2s2-c", "ssim", True),
    ("px2s2, L1", "px2s2", "l1", False),
    ("rx2s2-c, L1", "rx2s2-c", "l1", False),
    ("rx4s2, SSIM", "rx4s2", "ssim", False),
    ("px4s2, L1, disturbed", "px4s2", "l1", True),
    ("rx4s4, L1", "rx4s4", "l1", False),
)


def train_decoder(
    view: ReleaseView,
    name: str,
    inputs: Inputs,
    *,
    architecture: str | None = None,
    width: int | None = None,
    loss: DecoderLoss | None = None,
    depends_on: Mapping[str, Any] | None = None,
    start: Mapping[str, Tensor] | None = None,
    images: int | None = None,
    shape: tuple[int, int, int] | None = None,
    originals: Callable[[HeldPictures, Rows], Tensor] | None = None,
) -> nn.Module:
    """A decoder, trained on Q until the view's budget is spent; at the epoch that is best on pictures of Q held out.

    Args:
        view: whose Q, seed, budget and device.
        name: under which it is kept, with the attack's code first.
        inputs: (`view.public`, numbers in it, a generator) → what the decoder sees of these pictures, (n, C, h, w) on
            the device. Of `view.public_val` there is no generator: as in earnest, without augmentation.
        architecture: a name of `Reconstructor`; by default that of A1's first.
        width: of its first stack; by default as many channels as the decoder sees, at most 256.
        loss: mean absolute difference; or 1 - SSIM with a tenth of it; by default that of A1's first.
        depends_on: what else the training depends on, beside Q, φ1, budget and seed: the bank (`view.bank_subject`).
        start: weights to begin with, in the place of random ones.
        images: pictures that it is shown; the budget's by default.
        shape: of what `inputs` gives, where even one costs much.
        originals: (pictures, numbers in them) → what the decoder should make of `inputs`; by default these pictures.

    Returns:
        The network, frozen: inputs → pictures (n, 3, H, W) in [0, 1].
    """
    architecture, kind = architecture or DECODERS[0][1], loss or DECODERS[0][2]
    originals = originals or (lambda held, rows: held.read(rows))
    shape = shape or _shape_of(inputs(view.public_val, np.arange(1), None))
    _, *size = _shape_of(view.public_val.read(np.arange(1)))
    with seeded(view.seed):
        network = Reconstructor(architecture, shape, (size[0], size[1]), width)
    if start is not None:
        network.load_state_dict(dict(start))

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return inputs(view.public, chosen, generator), originals(view.public, chosen)

    def objective(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": decoder_loss(network(batch[0]).float(), batch[1].float() / 255, kind)}

    def validate() -> float:
        total, count = 0.0, min(len(view.public_val), VALIDATION_PICTURES)
        for chosen in batches(np.arange(count)):
            pictures = originals(view.public_val, chosen).to(view.device).float() / 255
            found = network(inputs(view.public_val, chosen, None)).float()
            total += float(decoder_loss(found, pictures, kind)) * len(chosen)
        return total / count

    subject = {"architecture": architecture, "width": width, "inputs": list(shape), "loss": kind, **(depends_on or {})}
    if start is not None:
        subject["start"] = weights_sha256(start)
    recipe = recipe_for(view, images or view.budget.images, len(view.public), LEARNING_RATE)
    return trained(
        view, name, network, read_batch, objective, *recipe, f"Training the decoder {name}", validate, subject
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


def _shape_of(batch: Tensor) -> tuple[int, int, int]:
    """(C, H, W)."""
    channels, height, width = batch.shape[1:]
    return channels, height, width


def decode(
    view: ReleaseView, network: nn.Module, inputs: Callable[[Rows], Tensor] | None = None
) -> Callable[[Rows], Tensor]:
    """What `Reconstructions` wants of a trained decoder: positions in `view.asked` → pictures.

    What the decoder sees is `inputs` of rows of the bank by number; by default the rows.
    """
    seen = inputs or view.rows

    def pictures(positions: Rows) -> Tensor:
        with torch.inference_mode():
            out: Tensor = network(seen(view.asked[positions])).float().cpu()
        return out

    return pictures


def decoder_loss(pictures: Tensor, originals: Tensor, loss: DecoderLoss) -> Tensor:
    """What a decoder is trained for: mean absolute difference; or 1 - SSIM with a tenth of it."""
    if loss == "l1":
        return F.l1_loss(pictures, originals)
    return 1 - ssim(pictures, originals).mean() + 0.1 * l1(pictures, originals).mean()
