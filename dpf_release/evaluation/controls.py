"""What an attack must break, so that its failure elsewhere means something: weak functions, and a network.

The network has learnt some pictures by heart: for attacks on the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.attacks.toolkit.shadows import poison_with
from dpf_release.attacks.toolkit.trained import seeded
from dpf_release.bank.rows import Concat, RowSource
from dpf_release.core.arrays import Rows
from dpf_release.evaluation.targets import QueryTruth, Target, bins_of, held, made_of
from dpf_release.models.probes import AttributeClassifier
from dpf_release.models.training import Recipe, fit
from dpf_release.models.weights import freeze
from dpf_release.owner.workbench import Workbench
from dpf_release.poisoning.chain import Chain
from dpf_release.poisoning.interface import PoisoningFunction, as_tensor
from dpf_release.poisoning.plan import FeatureSpec, Plan
from dpf_release.poisoning.recombine import Recombine
from dpf_release.poisoning.stationary import GaussianNoise, Identity

MEMORISER = "memorising-network"
PICTURES, EPOCHS, BATCH = 400, 40, 32
Change = Callable[[NDArray[Any], np.random.Generator], NDArray[Any]]


class Weak(PoisoningFunction):
    """Does something to rows (n, C, H, W), with numbers that it draws from the plan's secret."""

    def __init__(self, features: FeatureSpec, change: Change) -> None:
        super().__init__(features)
        self._change = change

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The rows, changed."""
        out: NDArray[np.float32] = self._change(source.read(rows), np.random.default_rng(list(plan.secret)))
        return out.astype(np.float32)


def _channel_affine(rows: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
    """Each channel times 0.5 to 2, plus up to one unit."""
    shape = (rows.shape[1], 1, 1)
    scale, shift = 2 ** generator.uniform(-1, 1, shape), generator.uniform(0, 1, shape)
    return rows * scale + shift


def _random_convolution(rows: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
    """A random rotation of the channels, the same at each place: a 1×1 convolution."""
    rotation, _ = np.linalg.qr(generator.standard_normal((rows.shape[1], rows.shape[1])))
    return np.einsum("kc,nchw->nkhw", rotation, rows)


def _through(network: nn.Module) -> Change:
    """A network of the attacker's own, as P: one of those that he learned by."""

    def change(rows: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        with torch.inference_mode():
            return network(as_tensor(rows).to(device)).float().cpu().numpy()

    return change


def planted_target(workbench: Workbench, name: str, seed: int, member: nn.Module | None = None) -> Target:
    """φ1(S) under a planted function, or under a network of the attacker's own."""
    clean, features, phi_2 = workbench.private.rows, workbench.features, workbench.phi_2
    functions: dict[str, Callable[[], PoisoningFunction]] = {
        "clean": lambda: Identity(features),
        "weak-noise": lambda: GaussianNoise(features, scale=0.1),
        "channel-affine": lambda: Weak(features, _channel_affine),
        "channel-permutation": lambda: Weak(features, lambda rows, draws: rows[:, draws.permutation(rows.shape[1])]),
        "random-convolution": lambda: Weak(features, _random_convolution),
        "recombine-2": lambda: Recombine(features, k=2),
    }
    chain = Chain(name, (Weak(features, _through(member)) if member else functions[name](),))

    def under(secret: str) -> list[Plan]:
        return chain.plan(clean, phi_2, hashlib.sha256(f"{secret} {seed}".encode()).digest())

    plans = under("planted")
    subject = f"planted {name}, seed {seed}, {workbench.private.bank_id}"
    return Target(
        name,
        held(chain.on(clean, plans)),
        poison_with(chain, phi_2, f"planted {seed}"),
        made_of(Concat([clean]), chain, [plans]),
        subject,
        second=lambda: (held(chain.on(clean, under("second"))), f"second {subject}"),
    )


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
    means = np.stack([targets[bins == name].mean(0) for name in names])
    return labels, torch.from_numpy(means[np.arange(count) % len(names)].astype(np.float32))


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
