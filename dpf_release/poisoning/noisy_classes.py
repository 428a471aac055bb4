"""With a bound: each class as a Gaussian, from moments to which noise was added before anything else saw them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.core.arrays import Rows
from dpf_release.poisoning.groups import Coordinates
from dpf_release.poisoning.moments import Noise, Numbers, estimated, noisy_sums
from dpf_release.poisoning.plan import Plan
from dpf_release.poisoning.procedure import TARGET_SHARE, Procedure
from dpf_release.poisoning.stationary import keyed_normal


@dataclass(frozen=True, eq=False)
class NoisyClasses:
    """What is known of S: noisy numbers, and public ones of Q."""

    scale: Numbers  # (K,) what coordinates are multiplied by
    count: Numbers  # (classes, G) noisy; G cells of rows in each, by public features
    share: Numbers  # (classes, G) of a class's rows that are drawn in each cell
    centre: Numbers  # (classes, G, K + T) scaled, T regression targets behind
    root: Numbers  # (K + T, K + T), whose product with its transpose is the covariance, the same for all classes
    ranges: Numbers  # (T, 2) lowest and highest of each target, as declared

    @classmethod
    def learned(cls, private: Coordinates, procedure: Procedure, noise: Noise | None, ranges: Numbers) -> NoisyClasses:
        """Of rows that go through the mechanism once; without noise of rows that nothing has to be hidden of."""
        rows, cells = procedure.scaled(private.z, private.targets), procedure.cells_of(private.z)
        shape = (private.outputs, procedure.groups)
        sums = noisy_sums(rows, private.classes, cells, private.units, shape, noise)
        drawn_from = estimated(sums, procedure.prior, noise, len(ranges))
        scale = procedure.scale * procedure.room
        return cls(scale, sums.count, drawn_from.share, drawn_from.mean, drawn_from.root, ranges)

    def state(self) -> dict[str, Tensor]:
        """All of it; nothing exact of S is among it."""
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> NoisyClasses:
        """What `state` gave."""
        return cls(**{name: state[name].numpy() for name in cls.__dataclass_fields__})

    def gaussians(self) -> Iterator[tuple[int, float, Numbers, Numbers]]:
        """See `Mixture.gaussians`."""
        size = len(self.scale)
        covariance = self.root[:size] @ self.root[:size].T / self.scale / self.scale[:, None]
        for (label, cell), share in np.ndenumerate(self.share):
            yield label, float(share), self.centre[label, cell, :size] / self.scale, covariance

    def class_sizes(self, generator: np.random.Generator) -> Numbers:
        """(classes,) how many rows each is to have: the noisy counts."""
        return np.maximum(self.count.sum(1), 1)

    def choose(self, classes: Rows, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """The cell of each row of these classes."""
        cell = np.zeros(len(classes), np.int64)
        for label in np.unique(classes):
            mine = classes == label
            cell[mine] = generator.choice(self.share.shape[1], mine.sum(), p=self.share[label])
        return {"group": cell}

    def coordinates(self, rows: Rows, plan: Plan) -> Numbers:
        """(n, K) of rows, drawn."""
        return self._scaled(rows, plan)[:, : len(self.scale)] / self.scale

    def targets(self, plan: Plan) -> NDArray[np.float32]:
        """(N, T) of all rows, drawn with their coordinates and within the declared ranges; T = 0 for classes."""
        shares = self._scaled(np.arange(len(plan.arrays["ids"])), plan)[:, len(self.scale) :]
        shares = np.clip(shares * np.sqrt(len(self.ranges)) / TARGET_SHARE, -1, 1)
        return (self.ranges.mean(1) + shares * (self.ranges[:, 1] - self.ranges[:, 0]) / 2).astype(np.float32)

    def _scaled(self, rows: Rows, plan: Plan) -> Numbers:
        label, cell = plan.arrays["class"][rows], plan.arrays["group"][rows]
        noise = keyed_normal(plan.secret, plan.arrays["ids"][rows], (len(self.root),)).astype(np.float64)
        return self.centre[label, cell] + noise @ self.root.T
