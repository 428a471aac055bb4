"""Decoders: networks that an attacker trains to turn what a row became back into a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.attacks.view import BATCH, ReleaseView, Rows
from dpf_release.metrics import l1, ssim
from dpf_release.models.reconstructors import build_reconstructor
from dpf_release.training import Recipe, fit

Inputs = Callable[[Rows, Tensor, np.random.Generator | None], Tensor]
DecoderLoss = Literal["l1", "ssim"]
TRAINING_BATCH, LEARNING_RATE = 128, 3e-3
VALIDATION_PICTURES = 1000


def train_decoder(
    view: ReleaseView,
    name: str,
    inputs: Inputs,
    *,
    architecture: str = "rx2s2-c",
    width: int | None = None,
    loss: DecoderLoss = "l1",
    depends_on: Mapping[str, Any] | None = None,
    start: Mapping[str, Tensor] | None = None,
    images: int | None = None,
    shape: tuple[int, int, int] | None = None,
) -> nn.Module:
    """A decoder, trained on Q until the view's budget is spent; at the epoch that is best on pictures of Q held out.

    Args:
        view: whose Q, seed, budget and device.
        name: under which it is kept, with the attack's code first.
        inputs: (numbers in Q, those pictures uint8, a generator) → what the decoder sees of them, (n, C, h, w) on the
            device. Without a generator: as in earnest, without augmentation, and the numbers are those of `public_val`.
        architecture: a name of `build_reconstructor`.
        width: of its first stack; by default as many channels as the decoder sees, at most 256.
        loss: mean absolute difference; or 1 - SSIM with a tenth of it.
        depends_on: what else the training depends on, beside Q, φ1, budget and seed: the bank (`view.bank_subject`).
        start: weights to begin with, in the place of random ones.
        images: pictures that it is shown; the budget's by default.
        shape: of what `inputs` gives, where even one costs much.

    Returns:
        The network, frozen: inputs → pictures (n, 3, H, W) in [0, 1].
    """
    one = view.public_val.read(np.arange(1))
    if shape is None:
        channels, *map_size = inputs(np.arange(1), one, None).shape[1:]
        shape = (channels, map_size[0], map_size[1])
    size = (one.shape[-2], one.shape[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(view.seed)
        network = build_reconstructor(architecture, shape, size, width)
    if start is not None:
        network.load_state_dict(dict(start))
    epochs, rows = schedule(view, images or view.budget.images)
    recipe = Recipe(epochs, min(TRAINING_BATCH, rows), LEARNING_RATE, seed=view.seed, bf16=view.bf16)
    subject = {
        **view.subject,
        "name": name,
        "architecture": architecture,
        "inputs": list(shape),
        **({} if width is None else {"width": width}),
        "loss": loss,
        "rows": rows,
        "epochs": epochs,
        "seed": view.seed,
        "depends_on": dict(depends_on or {}),
    }
    kept = view.kept.load(name, subject)
    if kept is not None:
        network.load_state_dict(kept)
        return freeze_on(network, view)

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        pictures = view.public.read(chosen)
        return inputs(chosen, pictures, generator), pictures

    def objective(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": _loss(network(batch[0]).float(), batch[1].float() / 255, loss)}

    def validate() -> float:
        total, count = 0.0, min(len(view.public_val), VALIDATION_PICTURES)
        for first in range(0, count, BATCH):
            chosen = np.arange(first, min(first + BATCH, count))
            pictures = view.public_val.read(chosen)
            seen = inputs(chosen, pictures, None)
            total += float(_loss(network(seen).float(), pictures.to(view.device).float() / 255, loss)) * len(chosen)
        return total / count

    fit(
        network,
        rows,
        read_batch,
        objective,
        recipe,
        title=f"Training the decoder {name}",
        device=view.device,
        validate=validate,
        checkpoint=view.kept.checkpoint(name),
        subject=json.dumps(subject, sort_keys=True),
    )
    view.kept.save(name, subject, network.state_dict())
    return freeze_on(network, view)


def schedule(view: ReleaseView, images: int) -> tuple[int, int]:
    """How many epochs, of how many pictures of Q, show a network about `images` pictures."""
    epochs = max(1, math.ceil(images / len(view.public)))
    return epochs, min(len(view.public), max(TRAINING_BATCH, math.ceil(images / epochs)))


def decode(
    view: ReleaseView, network: nn.Module, inputs: Callable[[Rows], Tensor] | None = None
) -> Callable[[Rows], Tensor]:
    """What `Reconstructions` wants of a trained decoder: positions in `view.asked` → pictures.

    Args:
        view: whose rows.
        network: the decoder.
        inputs: rows of the bank → what the decoder sees of them; by default the rows.
    """
    seen = inputs or view.rows

    def pictures(positions: Rows) -> Tensor:
        with torch.inference_mode():
            out: Tensor = network(seen(view.asked[positions])).float().cpu()
        return out

    return pictures


def freeze_on(network: nn.Module, view: ReleaseView) -> nn.Module:
    """The network on the view's device, in evaluation mode, without gradients for its weights."""
    return network.eval().requires_grad_(False).to(view.device).to(memory_format=torch.channels_last)


def _loss(pictures: Tensor, originals: Tensor, loss: DecoderLoss) -> Tensor:
    if loss == "l1":
        return F.l1_loss(pictures, originals)
    return 1 - ssim(pictures, originals).mean() + 0.1 * l1(pictures, originals).mean()
