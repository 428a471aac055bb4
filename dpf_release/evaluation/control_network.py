"""A network that has learnt some pictures by heart: what an attack on the weights must break."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.attacks.toolkit.trained import seeded
from dpf_release.core.arrays import Rows
from dpf_release.evaluation.targets import Target, planted_target
from dpf_release.evaluation.truth import QueryTruth, bins_of
from dpf_release.models.probes import AttributeClassifier
from dpf_release.models.training import Recipe, fit
from dpf_release.models.weights import freeze
from dpf_release.owner.workbench import Workbench

MEMORISER = "memorising-network"
PICTURES, EPOCHS, BATCH = 400, 40, 32


def memorising_target(workbench: Workbench, seed: int) -> Target:
    """The clean rows, with a φ2 that was trained on some pictures of Q with labels drawn at random.

    The attacker holds those pictures, and as many others of Q with labels just as random: only memory tells them apart.
    """
    target, images = planted_target(workbench, "clean", seed), workbench.public
    generator = np.random.default_rng([seed, 6])
    chosen = generator.permutation(images.rows("train"))[:PICTURES]
    labels, answers = _any_labels(target.rows.targets, len(chosen))
    members = np.arange(len(chosen)) < len(chosen) // 2
    with torch.no_grad():
        pictures = workbench.preprocess.normalise(images.pictures.read(chosen[members]).to(workbench.device))
        features = torch.cat([workbench.phi_1(part).float() for part in pictures.split(64)])
    network = _learnt_by_heart(workbench, features, answers, seed)
    queries = QueryTruth(
        read=lambda numbers: images.pictures.read(chosen[numbers]),
        labels=labels,
        pools=np.zeros((len(chosen), 1), np.int64),
        own=np.where(members, 0, -1),
    )
    subject = f"{MEMORISER}, seed {seed}, {workbench.private.bank_id}"
    return replace(target, name=MEMORISER, subject=subject, classifier=network, queries=queries)


def _any_labels(targets: NDArray[Any], count: int) -> tuple[NDArray[np.int64], Tensor]:
    """Classes, or bins, of pictures that are in an order that is drawn; and what a network should answer to each."""
    bins = bins_of(targets)
    names = np.unique(bins)
    labels = names[np.arange(count) % len(names)]  # of members and others alike
    if targets.ndim == 1:
        return labels, torch.from_numpy(labels)
    means = {name: targets[bins == name].mean(0) for name in names}
    return labels, torch.from_numpy(np.stack([means[label] for label in labels]).astype(np.float32))


def _learnt_by_heart(workbench: Workbench, features: Tensor, answers: Tensor, seed: int) -> nn.Module:
    """A classifier of features that was shown the answers until it knows them; frozen."""
    with seeded(seed):
        network = AttributeClassifier(workbench.features.shape, workbench.record.outputs)

    def read_batch(rows: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return features[torch.from_numpy(rows).to(features.device)], answers[torch.from_numpy(rows)]

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        found = network(batch[0]).float()
        same = F.cross_entropy(found, batch[1]) if batch[1].ndim == 1 else F.mse_loss(found, batch[1])
        return {"loss": same}

    recipe = Recipe(EPOCHS, min(BATCH, len(features)), 3e-3, seed=seed, bf16="off")
    fit(network, len(features), read_batch, loss, recipe, title="Planting a network", device=workbench.device)
    return freeze(network).to(workbench.device).to(memory_format=torch.channels_last)
