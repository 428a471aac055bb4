"""What an attacker trains: kept, gone on with, and frozen."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dpf_release.attacks.interface import ATTACKS
from dpf_release.attacks.threat_models import ReleaseView
from dpf_release.models.training import Loss, ReadBatch, Recipe, fit

TRAINING_BATCH = 128
Network = TypeVar("Network", bound=nn.Module)


def trained(
    view: ReleaseView,
    name: str,
    network: Network,
    read_batch: ReadBatch,
    loss: Loss,
    recipe: Recipe,
    rows: int,
    title: str,
    validate: Callable[[], float] | None = None,
    depends_on: Mapping[str, Any] | None = None,
) -> Network:
    """The network, fitted; or as it was kept, where that has been done before.

    `read_batch`, `loss`, `recipe`, `rows` (of an epoch) and `validate` are as of `training.fit`. It is kept under its
    name, with the attack's code first, and depends on Q, φ1, φ2, name, the attack's version, rows, epochs and seed, and
    on what else is said. Returned on the view's device, in evaluation mode, without gradients for its weights.
    """
    attack = ATTACKS.get(name.split(" ", 1)[0])
    subject = {**view.subject, "name": name, "version": attack.version if attack else 1, "rows": rows}
    subject |= {"epochs": recipe.epochs, "seed": recipe.seed, "depends_on": dict(depends_on or {})}
    kept = view.kept.load(name, subject)
    if kept is not None:
        network.load_state_dict(kept)
    else:
        fit(
            network,
            rows,
            read_batch,
            loss,
            recipe,
            title=title,
            device=view.device,
            validate=validate,
            checkpoint=view.kept.checkpoint(name, subject),
            subject=json.dumps(subject, sort_keys=True),
        )
        view.kept.save(name, subject, network.state_dict())
    return freeze_on(network, view)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside, as the weights of a new network, follows a seed; what is drawn after, does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of weights that a training begins with, or that it is against: it depends on them."""
    there = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return hashlib.sha256(save(there)).hexdigest()


def recipe_for(view: ReleaseView, images: int, there: int, learning_rate: float) -> tuple[Recipe, int]:
    """How a network is shown about `images` of the examples that are there; and of how many of them an epoch is."""
    epochs, rows = schedule(images, there)
    return Recipe(epochs, min(TRAINING_BATCH, rows), learning_rate, seed=view.seed, bf16=view.bf16), rows


def schedule(images: int, there: int) -> tuple[int, int]:
    """Epochs, and the rows of each, that show a network about `images` of the examples that are there."""
    epochs = max(1, math.ceil(images / there))
    return epochs, min(there, max(TRAINING_BATCH, math.ceil(images / epochs)))


def freeze_on(network: Network, view: ReleaseView) -> Network:
    """The network on the view's device, in evaluation mode, without gradients for its weights."""
    network.eval().requires_grad_(False).to(view.device).to(memory_format=torch.channels_last)
    return network
