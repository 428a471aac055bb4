"""Rows drawn from the moments of their class: the private extreme, of which nothing is left but statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.parameters import Parameter
from dpf_release.poisoning.interface import PoisoningFunction, register
from dpf_release.poisoning.plan import Plan
from dpf_release.poisoning.recombine import refuse_small_classes, target_bins
from dpf_release.poisoning.stationary import keyed_normal

BATCH = 256


@register("class-gaussian")
class ClassGaussian(PoisoningFunction):
    """Draws each row from a Gaussian: mean and deviation of each channel, over rows and places of its class.

    The draw is keyed by (secret, id); what is below zero is zero where φ1's features are. For regression, about `bins`
    quantile bins of the targets are the classes. A class has at least `k` rows: the moments of one would be its own.

    A row is made of no picture more than of another of its class. What asks for contributors (near rows, an objective
    behind it, a scorer) is given the row that bears the same id.
    """

    mixes_rows = True
    uses_classifier = False
    made_of = "Each row is drawn from the mean and spread of its class, which are those of {k} images or more."
    parameters = (
        Parameter("k", 5, 2, 10_000, "rows that a class has at the least"),
        Parameter("bins", 10, 1, 1000, "classes that regression targets are cut into"),
    )
    k: int
    bins: int

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """The class of each row, and the moments of each class.

        Raises:
            ConfigError: a class has fewer than `k` rows.
        """
        return self._planned(secret, target_bins(source.targets, self.bins), source, secret)

    def drop_rows(
        self, plan: Plan, kept: Rows, source: RowSource, phi_2: nn.Module, secret: bytes
    ) -> tuple[Plan, Rows]:
        """Where rows have gone, new moments and new draws: all rows are rebuilt.

        New draws: under the old ones the difference of two versions would be that of their moments, without any noise.

        Raises:
            ConfigError: a class has some rows left, but fewer than `k`.
        """
        if len(kept) == len(plan.arrays["class"]):
            return plan, np.empty(0, np.int64)
        planned = self._planned(plan.secret, plan.arrays["class"][kept], source, secret)
        return planned, np.arange(len(source))

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Rows drawn from the moments; of the source only the ids are looked at."""
        key = plan.secret + plan.arrays["draw"].tobytes()
        noise = keyed_normal(key, source.ids[rows], self.features.shape)  # (n, C, H, W)
        classes = plan.arrays["class"][rows]
        mean, deviation = (plan.arrays[name][classes][:, :, None, None] for name in ("mean", "deviation"))
        drawn: NDArray[np.float32] = mean + deviation * noise
        return np.maximum(drawn, 0) if self.features.non_negative else drawn

    def _planned(self, secret: bytes, classes: Rows, source: RowSource, draw: bytes) -> Plan:
        advice = (
            ": their moments would be those of a few pictures. Lower k (for regression, or bins), or add images; where "
            "images are retracted, retract the others of it too."
        )
        refuse_small_classes("class-gaussian", self.k, classes, source, "in each split", advice)
        mean, deviation = _moments(source, classes, self.features.shape[0])
        drawn = np.frombuffer(draw, np.uint8).copy()
        return Plan(secret, {"class": classes, "mean": mean, "deviation": deviation, "draw": drawn})


def _moments(source: RowSource, classes: Rows, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of each channel of each class, (classes, C) each; zeros for a class without rows."""
    count = int(classes.max()) + 1 if len(classes) else 0
    sums, squares, places = np.zeros((count, channels)), np.zeros((count, channels)), np.zeros((count, 1))
    for start in range(0, len(classes), BATCH):
        rows = np.arange(start, min(start + BATCH, len(classes)))
        features = source.read(rows).astype(np.float64)  # (n, C, H, W)
        np.add.at(sums, classes[rows], features.sum(axis=(2, 3)))
        np.add.at(squares, classes[rows], np.square(features).sum(axis=(2, 3)))
        np.add.at(places, classes[rows], features.shape[2] * features.shape[3])
    mean = sums / np.maximum(places, 1)
    variance = np.maximum(squares / np.maximum(places, 1) - np.square(mean), 0)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
