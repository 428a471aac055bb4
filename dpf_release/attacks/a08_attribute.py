"""A8: an attribute of a picture (who it shows, say) read from its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.attacks.interface import Attack, Attributes, register
from dpf_release.attacks.threat_models import Budget, LabelledRows, ReleaseView, batches
from dpf_release.attacks.toolkit.shadows import shadow, union
from dpf_release.attacks.toolkit.taps import open_taps
from dpf_release.attacks.toolkit.trained import seeded, trained
from dpf_release.core.arrays import Rows
from dpf_release.models.probes import AttributeClassifier
from dpf_release.models.training import Recipe

MOST_EPOCHS = 200
HELD_OUT = 0.15  # of each value's examples, to choose the epoch by
LEAST_TO_HOLD_OUT = 4  # examples of a value, below which it needs them all
TRAINING_BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 3e-3, 1e-4
Inputs = Callable[[Tensor], Tensor]  # features (n, C, h, w) → what a probe sees
Examples = Callable[[Rows], Tensor]  # numbers → features


@register
class Attribute(Attack):
    """Probes for the attribute: on φ1(Q) and P'(φ1(Q)), where Q has it; on rows of the bank whose value is known."""

    code, title, claim, version = "A8", "attribute, identity", "attribute", 2
    view, answers = LabelledRows, Attributes
    of_bank = True

    def trainings(self, budget: Budget) -> float:
        """A small probe and two linear ones on known rows, about a decoder's work in all; those on Q are left out."""
        return 1.0

    def run(self, view: ReleaseView) -> Attributes:
        """A linear and a convolutional probe on rows, a linear one on the blocks of φ2."""
        assert isinstance(view, LabelledRows)
        images, known = view.budget.images, np.flatnonzero(view.public_values >= 0)
        sources: list[tuple[str, Examples, NDArray[np.int64], int, dict[str, Any]]] = []
        if len(np.unique(view.public_values[known])) >= 2:
            shadows = [shadow(view, number) for number in range(view.budget.shadows)]
            subject = {"images": images, "shadows": view.budget.shadows, "decoders": view.budget.decoders}
            of_q = view.public_values[known], images, subject
            sources.append(("from Q", lambda rows: view.features_of(view.public, known[rows]), *of_q))
            if shadows:
                poisoned = union(view, shadows)
                read = lambda rows: poisoned(view.public, known[rows], None)  # noqa: E731
                sources.append(("from Q under shadow functions", read, *of_q))
        of_bank = {"bank": view.bank_subject, "rows": view.known_rows.tolist()}
        of_rows = view.known_values, view.budget.bank_images, of_bank
        sources.append(("from known rows", lambda rows: view.rows(view.known_rows[rows]), *of_rows))
        found = {}
        for source, read, values, shown, depends_on in sources:
            for kind, (inputs_of, build) in PROBES.items():
                name, inputs = f"{kind}, {source}", inputs_of(view)
                network = _train_probe(view, f"A8 {name}", inputs, build, read, values, shown, depends_on)
                answers = [network(inputs(view.rows(rows))).argmax(1).cpu().numpy() for rows in batches(view.asked)]
                found[name] = np.concatenate(answers)
        return Attributes(found)


def _rows(view: ReleaseView) -> Inputs:
    return lambda features: features


def _blocks(view: ReleaseView) -> Inputs:
    """Means and deviations over places of what φ2's blocks make of rows, and φ2's answers: (n, D, 1, 1)."""
    taps = open_taps(view)

    def inputs(features: Tensor) -> Tensor:
        maps = [features, *taps.of(features)]
        parts = [part for tap in maps for part in (tap.mean((2, 3)), tap.std((2, 3), unbiased=False))]
        return torch.cat([*parts, view.answers(features)], dim=1)[..., None, None]

    return inputs


def _linear(shape: tuple[int, ...], values: int) -> nn.Module:
    size = math.prod(shape)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(size, affine=False), nn.Dropout(0.2), nn.Linear(size, values))


def _convolutional(shape: tuple[int, ...], values: int) -> nn.Module:
    channels, height, width = shape
    return nn.Sequential(nn.BatchNorm2d(channels, affine=False), AttributeClassifier((channels, height, width), values))


Build = Callable[[tuple[int, ...], int], nn.Module]  # shape of what it sees, and values → a probe
PROBES: dict[str, tuple[Callable[[ReleaseView], Inputs], Build]] = {
    "linear": (_rows, _linear),
    "convolutional": (_rows, _convolutional),
    "linear on blocks of φ2": (_blocks, _linear),
}


def _train_probe(
    view: LabelledRows,
    name: str,
    inputs: Inputs,
    build: Build,
    read: Examples,
    values: NDArray[np.int64],
    images: int,
    depends_on: Mapping[str, Any],
) -> nn.Module:
    """A probe, each value of equal weight; shown so many images, at the epoch that is best on examples held out.

    It depends on Q, φ1, φ2, values and seed, and on what else it is told. `values` are those of the examples, (n,).
    """
    shape = tuple(inputs(read(np.arange(1))).shape[1:])
    with seeded(view.seed):
        network = build(shape, len(view.values))
    train, val = _held_out(values, view.seed)
    weight = _alike(values[train], len(view.values)).to(view.device)

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return inputs(read(train[chosen])), torch.from_numpy(values[train[chosen]])

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        scores = network(batch[0]).float()
        right = (scores.argmax(1) == batch[1]).float()
        return {"loss": F.cross_entropy(scores, batch[1], weight), "top1": right.mean()}

    def validate() -> float:
        total = 0.0
        for chosen in batches(val):
            scores = network(inputs(read(chosen))).float()
            total += float(F.cross_entropy(scores, torch.from_numpy(values[chosen]).to(view.device), reduction="sum"))
        return total / len(val)

    epochs = int(np.clip(images // len(train), 1, MOST_EPOCHS))
    rows = min(len(train), max(TRAINING_BATCH, images // epochs))
    batch = min(TRAINING_BATCH, rows)
    recipe = Recipe(epochs, batch, LEARNING_RATE, weight_decay=WEIGHT_DECAY, seed=view.seed, bf16="off")
    title, subject = f"Training the probe {name}", {"values": values.tolist(), "of": len(view.values), **depends_on}
    return trained(view, name, network, read_batch, loss, recipe, rows, title, validate, subject)


def _alike(values: NDArray[np.int64], count: int) -> Tensor:
    """Weights of `count` values, (count,), so that all weigh the same; 1 on average over the examples."""
    weights = 1 / np.maximum(np.bincount(values, minlength=count), 1)
    return torch.from_numpy((weights / weights[values].mean()).astype(np.float32))


def _held_out(values: NDArray[np.int64], seed: int) -> tuple[Rows, Rows]:
    """Examples to train on, and others to choose by: a share of each value that has several."""
    shuffled = np.random.default_rng(seed).permutation(len(values))
    chosen = [shuffled[values[shuffled] == value] for value in np.unique(values)]
    val = [rows[: max(1, round(HELD_OUT * len(rows)))] for rows in chosen if len(rows) >= LEAST_TO_HOLD_OUT]
    if not val:
        return np.sort(shuffled), np.sort(shuffled)
    return np.setdiff1d(shuffled, np.concatenate(val)), np.sort(np.concatenate(val))
