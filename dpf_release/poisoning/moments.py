"""Moments under a privacy bound: noisy counts and sums of the classes of S, and noisy second moments of all of S.

A row enters as w, its coordinates in the components of Q, scaled by public numbers and clipped to norm 1. So one row
more or less moves a class's count, its sum of w, and the sum of w wᵀ (Frobenius norm) by at most 1 each; a person with
several rows is scaled down until all of theirs together move them no further than one row can.

Classes share one covariance. Those of their own, even exact, serve a classifier worse: it learns their differences,
which clean features do not have in that form (docs/measurements/mixture-choices.json).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpf_release.core.arrays import Rows
from dpf_release.core.privacy import noisy

Numbers = NDArray[np.float64]
# Of Q's rows, that are not clipped. Clipped rows are biased, and noise is as large as the longest row allows: half of
# them clipped serves a classifier no worse, and at epsilon = 1 better (docs/measurements/mixture-choices.json).
CLIP_SHARE = 0.5
BLOCK = 1000  # rows that are added up first: their sums differ by order, and each block adds one rounding more
BANDS = 16  # of neighbouring components, over which the spread of a moment between classes is taken to be alike


@dataclass(frozen=True)
class Noise:
    """Deviations of the noise: of a count, of each coordinate of a sum, of the diagonal of second moments.

    Off the diagonal it is that over √2: each such number is there twice.
    """

    count: float
    total: float
    square: float

    def of_square(self, size: int) -> Numbers:
        """(K, K) of each number of the second moments."""
        return np.where(np.eye(size, dtype=bool), self.square, self.square / np.sqrt(2))


@dataclass(frozen=True, eq=False)
class Sums:
    """Over rows, for each class with G cells in it, by public features."""

    count: Numbers  # (classes, G)
    total: Numbers  # (classes, G, K), of w
    square: Numbers  # (K, K), of w wᵀ, over all classes

    @classmethod
    def over(cls, rows: Numbers, classes: Rows, cells: Rows, shape: tuple[int, int], weights: Numbers) -> Sums:
        """Of rows (n, K) with their classes, cells and weights; `shape`: how many of each there are."""
        size = rows.shape[1]
        count, total, square = np.zeros(shape), np.zeros((*shape, size)), np.zeros((size, size))
        np.add.at(count, (classes, cells), weights)
        for first in range(0, len(rows), BLOCK):
            some = slice(first, first + BLOCK)
            weighted, part = weights[some, None] * rows[some], np.zeros(total.shape)
            np.add.at(part, (classes[some], cells[some]), weighted)
            total += part
            square += weighted.T @ rows[some]
        return cls(count, total, square)

    def within(self) -> Numbers:
        """(K, K) covariance within the cells of the classes."""
        return self.around(self.total / np.maximum(self.count, 1)[..., None], self.count)

    def around(self, mean: Numbers, count: Numbers) -> Numbers:
        """(K, K) covariance around such means (classes, G, K) of cells with such counts."""
        covariance: Numbers = (self.square - np.einsum("cg,cgk,cgl->kl", count, mean, mean)) / count.sum()
        return covariance

    def with_noise(self, noise: Noise) -> Sums:
        """The same, (ε, δ)-private."""
        upper = noisy(self.square, noise.of_square(self.square.shape[-1]))
        square = np.triu(upper) + np.triu(upper, 1).swapaxes(-1, -2)
        return Sums(noisy(self.count, noise.count), noisy(self.total, noise.total), square)


def noisy_sums(
    rows: Numbers, classes: Rows, cells: Rows, units: Rows, shape: tuple[int, int], noise: Noise | None
) -> Sums:
    """The mechanism as a whole: of any rows whatever, with their classes, cells and units, the sums with noise.

    One unit more or less moves the sums, each over its noise, by at most the length that one row of norm 1 has.
    Without noise, they are the sums of the clipped rows.
    """
    clipped = clip(rows)
    if noise is None:
        return Sums.over(clipped, classes, cells, shape, np.ones(len(rows)))
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

    A unit's contribution is one vector: counts and sums of all classes, and second moments, each over its noise; it is
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
            some = rows[mine]
            length = float(np.linalg.norm(some @ some.T) / noise.square) ** 2  # that of Σ w wᵀ, without making it
            for there in _places(classes[mine] * (cells.max() + 1) + cells[mine]):
                length += (len(there) / noise.count) ** 2
                length += float(np.linalg.norm(some[there].sum(0)) / noise.total) ** 2
            weights[mine] = min(1.0, longest / np.sqrt(length))
    return weights


def _places(numbers: Rows) -> list[Rows]:
    """Where each number that occurs is."""
    order = np.argsort(numbers, kind="stable")
    _, starts = np.unique(numbers[order], return_index=True)
    return np.split(order, starts[1:])


@dataclass(frozen=True, eq=False)
class Gaussians:
    """What rows are drawn from."""

    share: Numbers  # (classes, G) of a class's rows, that are drawn in each cell
    mean: Numbers  # (classes, G, K)
    root: Numbers  # (K, K), whose product with its transpose is the covariance around each mean


def estimated(found: Sums, public: Sums, noise: Noise | None, apart: int = 0) -> Gaussians:
    """Means of the classes and their common covariance from noisy sums: empirical Bayes, drawn towards public numbers.

    A number keeps the share τ² / (τ² + noise²) of its distance from where it is drawn to: a mean first over the classes
    towards Q's, then each class's towards that; a covariance towards Q's. τ², how far apart such numbers truly are, is
    how far apart the noisy ones are, less the noise, averaged over bands of neighbouring components: that costs no
    budget, and what is drawn from is made of noisy numbers and of Q alone.

    Args:
        found: noisy, of S.
        public: of Q, whose classes (labels or none) its covariance is within; with the same cells.
        noise: that is in `found`; None: there is none, and nothing is drawn towards anything.
        apart: how many of the last coordinates are regression targets, each a band of its own.
    """
    if noise is None:
        mean = found.total / np.maximum(found.count, 1)[..., None]
        share = found.count / found.count.sum(1, keepdims=True)  # 0 of a cell that no row is in
        return Gaussians(share, mean, _root(found.around(mean, found.count), public.within()))
    bands = _Bands.of_size(found.total.shape[2], apart)
    count = np.maximum(found.count, 1.0)  # (classes, G)
    start = public.total.sum(0) / np.maximum(public.count.sum(0)[:, None], 1)  # (G, K)
    deviation = np.broadcast_to(noise.total / count[..., None], found.total.shape)
    of_classes = found.total / count[..., None]
    weight = deviation**-2 / (deviation**-2).sum(0)
    centre = _drawn((weight * of_classes).sum(0), start, (deviation**-2).sum(0) ** -0.5, bands.over_last)
    mean = _drawn(of_classes, centre, deviation, lambda values: bands.over_last(values.mean(0)))
    within, size = public.within(), found.square.shape[0]
    covariance = _drawn(found.around(mean, count), within, noise.of_square(size) / count.sum(), bands.over_square)
    return Gaussians(count / count.sum(1, keepdims=True), mean, _root(covariance, within))


def _root(covariance: Numbers, public: Numbers) -> Numbers:
    """(K, K) whose product with its transpose is the covariance, its eigenvalues at least a share of Q's."""
    values, vectors = np.linalg.eigh(covariance)
    root: Numbers = vectors * np.sqrt(np.maximum(values, 1e-3 * np.linalg.eigvalsh(public).clip(0)))
    return root


def _drawn(found: Numbers, to: Numbers, deviation: Numbers, smooth: Callable[[Numbers], Numbers]) -> Numbers:
    """Noisy numbers, drawn to others by as much as their deviation asks for."""
    apart = found - to
    signal = np.maximum(smooth(apart**2 - deviation**2), 0)
    shrunk: Numbers = to + apart * signal / (signal + deviation**2)
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
