"""The space that rows are drawn in: the principal components of public features, found a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.core.arrays import Rows

Read = Callable[[Rows], NDArray[np.floating]]  # row numbers → (n, C, H, W)
BATCH_NUMBERS = 2**26  # of features that are in memory together: 256 MiB
# Directions beyond those that are kept, and powers of the covariance (Halko, Martinsson and Tropp 2011 ask for 2).
SPARE, ROUNDS = 16, 4
ROWS = 2**14  # of directions that are in double precision together


@dataclass(frozen=True, eq=False)
class Components:
    """Coordinates of features: z = V (u - mean)."""

    mean: Tensor  # (D,) of the public features, flattened; D = C·H·W
    axes: Tensor  # V, (K, D), orthonormal rows
    variances: Tensor  # (K,) of the public features along them, descending

    def coordinates(self, read: Read, count: int) -> NDArray[np.float64]:
        """Of all rows, (count, K)."""
        return self.projected(read, count)[0]

    def projected(self, read: Read, count: int) -> tuple[NDArray[np.float64], float]:
        """The coordinates, and the share of these rows' variance that lies along the components; in one pass."""
        parts, total = [np.empty((0, len(self.axes)))], 0.0
        for rows in _batches(read, count, len(self.mean)):
            centred = rows - self.mean
            parts.append((centred @ self.axes.T).double().numpy())
            total += float(centred.square().sum())
        found = np.concatenate(parts)
        return found, float(np.square(found).sum()) / max(total, 1e-30)

    def of(self, features: Tensor) -> Tensor:
        """Coordinates (n, K) of features (n, ...) that are in memory."""
        return (features.flatten(1).cpu() - self.mean) @ self.axes.T

    def features(self, coordinates: NDArray[np.floating]) -> Tensor:
        """(n, K) → (n, D), without what lies outside the components."""
        return self.mean + torch.from_numpy(coordinates.astype(np.float32)) @ self.axes


def principal_components(read: Read, count: int, size: int, kept: int, seed: int = 0) -> Components:
    """The first components of rows, by subspace iteration: memory for a batch and 3 · (kept + 16) · D numbers.

    Args:
        read: the rows by number.
        count: how many there are.
        size: D, numbers in a row.
        kept: K, how many components; fewer than rows.
        seed: of the directions that it starts with.
    """
    mean = sum((rows.sum(0) for rows in _batches(read, count, size)), torch.zeros(size)) / count
    generator = torch.Generator().manual_seed(seed)
    width = min(kept + SPARE, count, size)
    axes = torch.randn(size, width, generator=generator)
    for _ in range(ROUNDS + 1):
        axes = torch.linalg.qr(axes).Q  # (D, K + 16)
        image = torch.zeros(size, width)
        for rows in _batches(read, count, size):
            centred = rows - mean
            image += centred.T @ (centred @ axes)  # covariance times axes
        before, axes = axes, image
    within = sum(
        (some.T.double() @ of.double() for some, of in zip(before.split(ROWS), image.split(ROWS), strict=True)),
        torch.zeros(width, width, dtype=torch.float64),
    )
    variances, turn = torch.linalg.eigh(within / count)
    order = variances.argsort(descending=True)[:kept]
    return Components(mean, (before @ turn[:, order].float()).T.contiguous(), variances[order].clamp_min(1e-12))


def _batches(read: Read, count: int, size: int) -> Iterator[Tensor]:
    """(n, D) float32, in the order of the rows."""
    each = max(1, BATCH_NUMBERS // size // 4)
    for first in range(0, count, each):
        yield torch.from_numpy(
            np.ascontiguousarray(read(np.arange(first, min(first + each, count))), np.float32)
        ).flatten(1)
