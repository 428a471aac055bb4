"""The public half of `mixture`: what rows are drawn in, made from Q alone.

It is released with the rows, so that others can put rows of their own through the same procedure: a classifier tells
drawn rows from real ones, and learns that difference where some classes are drawn and others are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from dpf_release.bank.procedure_format import LEADING, MOST_GROUPS, PRIOR, malformed
from dpf_release.core.arrays import Rows
from dpf_release.errors import WeightsError
from dpf_release.models.weights import state_file
from dpf_release.poisoning.components import Components
from dpf_release.poisoning.moments import Numbers, Sums, clip, scaling

TARGET_SHARE = 0.3  # of a row's norm, that its regression targets may have
LEAST_OF_CLASS = 50  # images of Q, on average, for its classes to count


@dataclass(frozen=True, eq=False)
class Procedure:
    """How rows become coordinates, and what is known of public ones."""

    space: Components  # of Q
    scale: Numbers  # (K,) what coordinates are multiplied by
    cells: NDArray[np.float32]  # (G, at most 64) centres of G cells in the first components; (0, ...) for one cell
    prior: Sums  # of Q, clipped: counts (L, G) of its L labels, totals (L, G, K + T), squares (K + T, K + T)
    clusters: int = 0  # of a class, where rows are drawn without a bound; 0: from noisy statistics
    non_negative: bool = False  # whether a ReLU comes after drawing

    @classmethod
    def of_public(cls, space: Components, z: Numbers, classes: Rows, cells: int, targets: int) -> Procedure:
        """From coordinates of Q (n, K), with its classes; T regression targets come behind them."""
        centres = np.empty((0, min(LEADING, z.shape[1])), np.float32)
        if cells > 1:
            found = KMeans(cells, n_init=4, random_state=0).fit(z[:, :LEADING])
            centres = found.cluster_centers_.astype(np.float32)
        none = Sums(np.zeros((1, 1)), np.zeros((1, 1, z.shape[1] + targets)), np.zeros((0, 0)))
        start = cls(space, scaling(space.variances.double().numpy(), z), centres, none)
        labels = labels_of(classes)
        shape = (int(labels.max()) + 1, start.groups)
        rows = start.scaled(z, np.zeros((len(z), targets)))
        prior = Sums.over(rows, labels, start.cells_of(z), shape, np.ones(len(z)))
        return cls(space, start.scale, centres, prior)

    @property
    def groups(self) -> int:
        """How many cells there are."""
        return max(1, len(self.cells))

    @property
    def room(self) -> float:
        """The norm that the coordinates of a row may have; regression targets have the rest."""
        return float(np.sqrt(1 - TARGET_SHARE**2)) if self.prior.total.shape[2] > len(self.scale) else 1.0

    def scaled(self, z: Numbers, targets: Numbers) -> Numbers:
        """(n, K + T) of norm 1 at the most, of coordinates (n, K) and targets (n, T) of norm 1 at the most."""
        weight = TARGET_SHARE if targets.shape[1] else 0.0
        return np.concatenate([self.room * clip(z * self.scale), weight * targets], axis=1)

    def cells_of(self, z: Numbers) -> Rows:
        """(n,) the cell of each row, the one with the nearest centre."""
        if self.groups == 1:
            return np.zeros(len(z), np.int64)
        centres = self.cells.astype(np.float64)
        distance: Numbers = np.square(centres).sum(1) - 2 * z[:, :LEADING] @ centres.T
        return distance.argmin(1).astype(np.int64)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        space = {name: getattr(self.space, name) for name in ("mean", "axes", "variances")}
        arrays = {"scale": self.scale, "cells": self.cells}
        arrays |= {f"prior_{name}": value for name, value in vars(self.prior).items()}
        arrays |= {"clusters": np.array(self.clusters), "non_negative": np.array(int(self.non_negative))}
        return space | {name: torch.from_numpy(value) for name, value in arrays.items()}

    def file(self) -> bytes:
        """As it is released."""
        return state_file(self.tensors())

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Procedure:
        """What `tensors` gave, for features of a shape.

        Raises:
            WeightsError: they are not such tensors.
        """
        if problem := malformed({name: tuple(tensor.shape) for name, tensor in tensors.items()}, prod(shape)):
            raise WeightsError(f"the tensors that rows are drawn with are not what they should be: {problem}.")
        space = Components(*(tensors[name].float() for name in ("mean", "axes", "variances")))
        scale, *prior = (tensors[name].double().numpy() for name in ("scale", *PRIOR))
        clusters, non_negative = (int(tensors[name]) for name in ("clusters", "non_negative"))
        if not (0 <= clusters <= MOST_GROUPS and non_negative in (0, 1)):
            raise WeightsError(f"expected up to {MOST_GROUPS} groups of a class, found {clusters}.")
        numbers = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
        if not (all(bool(of.isfinite().all()) for of in numbers) and (scale > 0).all()):
            raise WeightsError("the tensors that rows are drawn with hold values that are not numbers, or no scale.")
        return cls(space, scale, tensors["cells"].float().numpy(), Sums(*prior), clusters, bool(non_negative))


def labels_of(classes: Rows) -> Rows:
    """Labels of Q; all 0 where it has none, or classes too small for their covariance."""
    _, labels, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return labels.astype(np.int64) if counts.mean() >= LEAST_OF_CLASS else np.zeros(len(classes), np.int64)
