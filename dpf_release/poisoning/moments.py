"""Class moments under a privacy bound: noisy counts, sums and second moments of S, shrunk towards those of public Q.

A row enters as w, its coordinates in the components of Q, scaled by public numbers and clipped to norm 1. So one row
more or less moves a class's count, its sum of w and its sum of w wᵀ (Frobenius norm) by at most 1 each; a person with
several rows is scaled down until all of theirs together move them no further than one row can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpf_release.core.arrays import Rows
from dpf_release.core.privacy import noisy

Numbers = NDArray[np.float64]
CLIP_SHARE = 0.99  # of Q's rows that are not clipped
BANDS = 16  # of neighbouring components, over which the spread of a moment between classes is taken to be alike


@dataclass(frozen=True)
class Noise:
    """Deviations of the noise: of a count, of each coordinate of a sum, of the diagonal of second moments.

    Off the diagonal it is that over √2: each such number is there twice.
    """

    count: float
    total: float
    square: float


@dataclass(frozen=True, eq=False)
class Sums:
    """For each class, over its rows (G cells of rows in each, by public features)."""

    count: Numbers  # (classes, G)
    total: Numbers  # (classes, G, K), of w
    square: Numbers  # (classes, K, K), of w wᵀ

    @classmethod
    def over(cls, rows: Numbers, classes: Rows, cells: Rows, shape: tuple[int, int], weights: Numbers) -> Sums:
        """Of rows (n, K) with their classes, cells and weights; `shape`: how many of each there are."""
        count, total = np.zeros(shape), np.zeros((*shape, rows.shape[1]))
        np.add.at(count, (classes, cells), weights)
        np.add.at(total, (classes, cells), weights[:, None] * rows)
        square = np.stack([(weights[mine, None] * rows[mine]).T @ rows[mine] for mine in _places(classes, shape[0])])
        return cls(count, total, square)

    def within(self) -> Numbers:
        """(K, K) covariance within the cells of the classes."""
        mean = self.total / np.maximum(self.count, 1)[..., None]
        moved = np.einsum("cg,cgk,cgl->kl", self.count, mean, mean)
        covariance: Numbers = (self.square.sum(0) - moved) / self.count.sum()
        return covariance

    def with_noise(self, noise: Noise) -> Sums:
        """The same, (ε, δ)-private."""
        size = self.square.shape[1]
        off_diagonal = noise.square / np.sqrt(2)
        upper = noisy(self.square, np.where(np.eye(size, dtype=bool), noise.square, off_diagonal))
        square = np.triu(upper) + np.triu(upper, 1).transpose(0, 2, 1)
        return Sums(noisy(self.count, noise.count), noisy(self.total, noise.total), square)


def noisy_sums(rows: Numbers, classes: Rows, cells: Rows, units: Rows, shape: tuple[int, int], noise: Noise) -> Sums:
    """The mechanism as a whole: of any rows whatever, with their classes, cells and units, the sums with noise.

    One unit more or less moves the sums, each over its noise, by at most the length that one row of norm 1 has.
    """
    clipped = clip(rows)
    weights = unit_weights(clipped, classes, cells, units, noise)
    return Sums.over(clipped, classes, cells, shape, weights).with_noise(noise)


def scaling(variances: Numbers, public: Numbers) -> Numbers:
    """(K,) what coordinates are multiplied by before they are clipped; from Q's variances and coordinates alone."""
    scale = variances**-0.25
    scaled: Numbers = scale / np.quantile(np.linalg.norm(public * scale, axis=1), CLIP_SHARE)
    return scaled


def clip(rows: Numbers) -> Numbers:
    """Each row (n, K) scaled to norm 1 where it is longer; 0 where it is not finite, or it would undo all sums."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    clipped: Numbers = np.divide(rows, np.maximum(norm, 1), out=np.zeros_like(rows), where=np.isfinite(norm))
    return clipped


def unit_weights(rows: Numbers, classes: Rows, cells: Rows, units: Rows, noise: Noise) -> Numbers:
    """By what each row is scaled, so that no unit (image or person) counts for more than one row can.

    A unit's contribution is one vector: counts, sums and second moments of all classes, each over its noise; it is
    scaled to at most the length of one row's. Scaling class by class would let a person in many classes count in each.

    Args:
        rows: (n, K) clipped.
        classes: (n,).
        cells: (n,) within the class.
        units: (n,) whose each row is.
        noise: of the statistics.

    Returns:
        (n,) from 0 to 1; rows of one unit have the same.
    """
    weights = np.ones(len(rows))
    longest = np.sqrt(noise.count**-2 + noise.total**-2 + noise.square**-2)
    for mine in _places(units):
        if len(mine) > 1:
            length = 0.0
            for of in _places(classes[mine]):
                some, cell = rows[mine[of]], cells[mine[of]]
                length += float(np.linalg.norm(some @ some.T) / noise.square) ** 2  # that of Σ w wᵀ, without making it
                for there in _places(cell):
                    length += (len(there) / noise.count) ** 2
                    length += float(np.linalg.norm(some[there].sum(0)) / noise.total) ** 2
            weights[mine] = min(1.0, longest / np.sqrt(length))
    return weights


def _places(numbers: Rows, count: int | None = None) -> list[Rows]:
    """Where each number is: of 0 to `count`, or of those that occur."""
    names = np.arange(count) if count is not None else np.unique(numbers)
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], names, side="right")
    starts = np.searchsorted(numbers[order], names, side="left")
    return [order[start:end] for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True, eq=False)
class Gaussians:
    """What rows are drawn from."""

    share: Numbers  # (classes, G) of a class's rows, that are drawn in each cell
    mean: Numbers  # (classes, G, K)
    root: Numbers  # (classes, K, K), whose product with its transpose is the covariance around the cell's mean


def estimated(found: Sums, public: Sums, noise: Noise, apart: int = 0) -> Gaussians:
    """The moments of each class from noisy sums: empirical Bayes, each number drawn towards a public one.

    A number keeps the share τ² / (τ² + noise²) of its distance from where it is drawn to: first those pooled over the
    classes towards Q's, then each class's towards these. τ², how far apart such numbers truly are, is how far apart the
    noisy ones are, less the noise, averaged over bands of neighbouring components: that costs no budget, and what is
    drawn from is made of noisy numbers and of Q alone.

    Args:
        found: noisy, of S.
        public: of Q, whose classes (labels or none) its covariance is within; with the same cells.
        noise: that is in `found`.
        apart: how many of the last coordinates are regression targets, each a band of its own.
    """
    bands = _Bands.of_size(found.total.shape[2], apart)
    count = np.maximum(found.count, 1.0)  # (classes, G)
    of_class = count.sum(1)
    start = public.total.sum(0) / np.maximum(public.count.sum(0)[:, None], 1)  # (G, K)
    mean = _towards(start, found.total / count[..., None], noise.total / count[..., None], bands.over_last)
    share = count / of_class[:, None]
    moved = np.einsum("cg,cgk,cgl->ckl", share, mean, mean)
    size = mean.shape[2]
    deviation = np.where(np.eye(size, dtype=bool), 1.0, 2**-0.5) * noise.square / of_class[:, None, None]
    within = public.within()
    covariance = _towards(within, found.square / of_class[:, None, None] - moved, deviation, bands.over_square)
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 1e-3 * np.linalg.eigvalsh(within).clip(0))
    return Gaussians(share, mean, vectors * np.sqrt(values)[:, None, :])


def _towards(public: Numbers, found: Numbers, deviation: Numbers, smooth: Callable[[Numbers], Numbers]) -> Numbers:
    """Numbers of each class, first axis, drawn towards those of all classes, and these towards the public ones."""
    deviation = np.broadcast_to(deviation, found.shape)
    weight = deviation**-2 / (deviation**-2).sum(0)
    pooled = (weight * found).sum(0) - public
    noise = (weight**2 * deviation**2).sum(0)
    signal = np.maximum(smooth(pooled**2 - noise), 0)
    centre = public + pooled * signal / (signal + noise)
    apart = found - centre
    signal = np.maximum(smooth((apart**2 - deviation**2).mean(0)), 0)
    shrunk: Numbers = centre + apart * signal / (signal + deviation**2)
    return shrunk


@dataclass(frozen=True, eq=False)
class _Bands:
    """Neighbouring components, whose moments are taken to be alike; the first bands are narrow."""

    of: Rows  # (K,) the band of each coordinate
    mean: Numbers  # (bands, K), which takes means over them

    @classmethod
    def of_size(cls, size: int, apart: int) -> _Bands:
        edges = np.unique(np.round(np.geomspace(1, size - apart + 1, BANDS + 1)).astype(int) - 1)
        widths = np.append(np.diff(edges), np.ones(apart, int))
        of = np.repeat(np.arange(len(widths)), widths)
        return cls(of, (of == np.arange(len(widths))[:, None]) / widths[:, None])

    def over_last(self, values: Numbers) -> Numbers:
        """Each number (..., K) as the mean of its band."""
        smoothed: Numbers = (values @ self.mean.T)[..., self.of]
        return smoothed

    def over_square(self, values: Numbers) -> Numbers:
        """Each number (K, K) as the mean of its block; those of the diagonal, which are larger, by themselves."""
        diagonal = np.diag(values)
        there = self.mean @ (1 - np.eye(len(values))) @ self.mean.T
        blocks = self.mean @ (values - np.diag(diagonal)) @ self.mean.T / np.maximum(there, 1e-12)
        smoothed: Numbers = blocks[self.of][:, self.of]
        np.fill_diagonal(smoothed, self.over_last(diagonal))
        return smoothed
