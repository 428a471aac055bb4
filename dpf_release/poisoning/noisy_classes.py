"""With a bound: each class as a Gaussian, from moments to which noise was added before anything else saw them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from dpf_release.core.arrays import Rows
from dpf_release.poisoning.components import Components
from dpf_release.poisoning.groups import LEADING, Coordinates
from dpf_release.poisoning.moments import Noise, Numbers, Sums, clip, estimated, noisy_sums, scaling
from dpf_release.poisoning.plan import Plan
from dpf_release.poisoning.stationary import keyed_normal

TARGET_SHARE = 0.3  # of a row's norm, that its regression targets may have
LEAST_OF_CLASS = 50  # images of Q, on average, for its classes to count


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
    def learned(
        cls, private: Coordinates, public: Coordinates, space: Components, noise: Noise, cells: int, ranges: Numbers
    ) -> NoisyClasses:
        """Of S and Q in the components of Q; S goes through the mechanism once."""
        scale = scaling(space.variances.double().numpy(), public.z)
        cell_of = [np.zeros(len(of.z), np.int64) for of in (private, public)]
        if cells > 1:
            found = KMeans(cells, n_init=4, random_state=0).fit(public.z[:, :LEADING])
            cell_of = [found.predict(of.z[:, :LEADING]).astype(np.int64) for of in (private, public)]
        weight = TARGET_SHARE if len(ranges) else 0.0
        room = np.sqrt(1 - weight**2)
        # Of norm 1 at the most.
        w = np.concatenate([room * clip(private.z * scale), weight * private.targets], axis=1)
        w_public = np.concatenate([room * clip(public.z * scale), np.zeros((len(public.z), len(ranges)))], axis=1)
        sums = noisy_sums(w, private.classes, cell_of[0], private.units, (private.outputs, cells), noise)
        labels = labels_of(public.classes)
        shape = (int(labels.max()) + 1, cells)
        of_public = Sums.over(w_public, labels, cell_of[1], shape, np.ones(len(public.z)))
        drawn_from = estimated(sums, of_public, noise, len(ranges))
        return cls(scale * room, sums.count, drawn_from.share, drawn_from.mean, drawn_from.root, ranges)

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


def labels_of(classes: Rows) -> Rows:
    """Labels of Q; all 0 where it has none, or classes too small for their covariance."""
    _, labels, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return labels.astype(np.int64) if counts.mean() >= LEAST_OF_CLASS else np.zeros(len(classes), np.int64)
