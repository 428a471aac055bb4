"""How likely points are under statistics of others: Gaussians, nearest neighbours, kernels. All in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 2**24  # distances in memory together


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A normal distribution of points (K,).

    Attributes:
        mean: (K,).
        root: (K, K) lower triangular, whose product with its transpose is the covariance.
        share: of a mixture's points that it has.
    """

    mean: Tensor
    root: Tensor
    share: float = 1.0

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, share: float = 1.0) -> Gaussian:
        """From its moments; eigenvalues below a millionth of the largest are raised to that."""
        values, vectors = torch.linalg.eigh(covariance.double())
        values = values.clamp_min(1e-6 * float(values.max().clamp_min(1e-30)))
        # A triangular root of V diag(values) Vᵀ: the R of its square root's QR decomposition, transposed.
        upper = torch.linalg.qr((vectors * values.sqrt()).T).R
        return cls(mean.double(), upper.T * upper.diagonal().sign(), share)

    @classmethod
    def fitted(cls, points: Tensor, prior: Tensor, weight: float, share: float = 1.0) -> Gaussian:
        """Mean and covariance of points (n, K), the covariance drawn towards `prior` as by `weight` more points."""
        mean = points.double().mean(0)
        centred = points.double() - mean
        return cls.of(mean, (centred.T @ centred + weight * prior.double()) / (len(points) + weight), share)

    def leading(self, count: int) -> Gaussian:
        """Of the first coordinates alone."""
        return Gaussian(self.mean[:count], self.root[:count, :count], self.share)

    def log_density(self, points: Tensor) -> Tensor:
        """(n,) of points (n, K)."""
        scaled = torch.linalg.solve_triangular(self.root, (points.double() - self.mean).T, upper=False)  # (K, n)
        size = len(self.mean)
        return -(scaled.square().sum(0) + size * math.log(2 * math.pi)) / 2 - self.root.diagonal().abs().log().sum()


def log_mixture(parts: Sequence[Gaussian], points: Tensor) -> Tensor:
    """(n,) log density of a mixture."""
    return torch.stack([math.log(max(part.share, 1e-12)) + part.log_density(points) for part in parts]).logsumexp(0)


def nearest(points: Tensor, others: Tensor, number: int = 1) -> Tensor:
    """(n,) distance of points (n, K) to the `number`-th nearest of others (m, K)."""
    kept = min(number, len(others))
    parts = [found.topk(kept, dim=1, largest=False).values[:, -1] for found in _distances(points, others)]
    return torch.cat(parts).sqrt()


def log_kernel_density(points: Tensor, others: Tensor) -> Tensor:
    """(n,) log density by Gaussian kernels around others (m, K), as wide as Scott's rule for unit variances says.

    Up to a constant that depends on K alone, and on m by the rule.
    """
    count, size = others.shape
    width = count ** (-1 / (size + 4))
    parts = [(-found / (2 * width**2)).logsumexp(1) for found in _distances(points, others)]
    return torch.cat(parts) - math.log(count) - size * math.log(width)


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Squared distances (n', m) of some points at a time."""
    for some in points.split(max(1, AT_ONCE // max(1, len(others)))):
        square = some.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * (some @ others.T)
        yield square.clamp_min(0)
