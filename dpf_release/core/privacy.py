"""Differential privacy of noisy statistics: calibration, composition, and what an attacker can reach at the most.

All of it is one Gaussian mechanism. Its privacy is one number μ, that of Gaussian differential privacy (Dong, Roth and
Su 2022): telling a data set from one with a unit more or less is as hard as telling N(0, 1) from N(μ, 1). Several
compose to the root of the sum of the squares, exactly. ε for a δ follows by the analytic Gaussian mechanism (Balle and
Wang 2018), which `dp-accounting` computes. No torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from importlib.metadata import version
from statistics import NormalDist
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dpf_release.core.bounded_json import SEEN, Record

# A record may be a stranger's: numbers that can be reckoned with, and few words.
Positive = Annotated[float, Field(ge=1e-12, le=1e12)]
Delta = Annotated[float, Field(ge=1e-15, le=0.5)]
Sentence = Annotated[str, Field(max_length=300, pattern=SEEN)]
Unit = Literal["image", "person"]
NORMAL = NormalDist()
STATISTICS = ("count", "sum", "second moment")
# Statistics and noise are rounded to multiples of this before they are added, so the low bits of a noisy number say
# nothing of the number below: a multiple of GRID plus rounded noise is the rounded exact sum. (The attack on noise in
# floating point: Mironov 2012; for Gaussian noise Jin, McMurtry, Rubinstein and Ohrimenko 2022.)
GRID = 2.0**-30
# By how much neighbours can lie too far apart, in units of the sensitivity 1: rounding moves each of up to
# 10^9 numbers by at most GRID; adding n rows of norm 1 up in another order, in blocks of 1000, all together by at most
# n^2 2^-52 / 1000; a row's coordinates, in float32, change with the batch it is in by 1e-5.
ROUNDING = GRID * 10**4.5


class Mechanism(Record):
    """What was released of a data set under (ε, δ), all of it public: from the noise ε can be computed again.

    Attributes:
        epsilon: of one fit.
        delta: likewise.
        unit: what may be added or removed: an image with all its copies, or a person with all their images.
        adjacency: how neighbours differ. Class names are public.
        noise: deviation for each statistic of `STATISTICS`. An image moves each by at most `sensitivity` in Euclidean
            length; a person all together, each over its deviation, no further than one image can.
        sensitivity: of each statistic.
        shares: of the budget, in μ².
        clip: norm to which a row's scaled coordinates are clipped.
        fits: how many such fits of these images are published, this one among them.
        epsilon_of_all: of all of them together.
        networks_saw_images: whether φ1 or φ2 was trained on these images, so that no bound holds for the release.
        not_covered: what else was computed from the images and is published.
        library: that calibrated the noise, with its version.
    """

    epsilon: Positive
    delta: Delta
    unit: Unit
    adjacency: Literal["add or remove one unit"] = "add or remove one unit"
    noise: dict[Literal["count", "sum", "second moment"], Positive]
    sensitivity: Positive = 1.0
    shares: tuple[Positive, Positive, Positive]
    clip: Positive = 1.0
    fits: Annotated[int, Field(ge=1, le=10_000)] = 1
    epsilon_of_all: Positive
    networks_saw_images: bool = True
    not_covered: Annotated[tuple[Sentence, ...], Field(max_length=20)] = ()
    library: Annotated[str, Field(max_length=100, pattern=SEEN)]

    @classmethod
    def calibrated(cls, epsilon: float, delta: float, shares: tuple[float, float, float], unit: Unit) -> Mechanism:
        """Noise for one fit that is (ε, δ)-private, the budget divided by `shares`."""
        mu = gaussian_mu(epsilon, delta)
        noise = {name: (1 + ROUNDING) / (mu * math.sqrt(share)) for name, share in zip(STATISTICS, shares, strict=True)}
        library = f"dp-accounting {version('dp-accounting')}"
        return cls(
            epsilon=epsilon,
            delta=delta,
            unit=unit,
            noise=noise,
            shares=shares,
            epsilon_of_all=epsilon,
            library=library,
        )

    @model_validator(mode="after")
    def _of_all_statistics(self) -> Self:
        if set(self.noise) != set(STATISTICS):
            raise ValueError(
                f"expected noise for {', '.join(STATISTICS)}, found it for {', '.join(self.noise) or 'none'}"
            )
        return self

    @property
    def mu(self) -> float:
        """Of one fit, computed from its noise."""
        return composed(self.sensitivity * (1 + ROUNDING) / sigma for sigma in self.noise.values())


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ of the Gaussian mechanism that is exactly (ε, δ)-private."""
    import dp_accounting  # a second to import, and only fits and audits need it

    return 1.0 / float(dp_accounting.get_sigma_gaussian(epsilon, delta))


def epsilon_of(mu: float, delta: float) -> float:
    """The ε of a Gaussian mechanism, or of several composed; 0 where nothing was released."""
    import dp_accounting

    return float(dp_accounting.get_epsilon_gaussian(1.0 / mu, delta)) if mu else 0.0


def composed(mus: Iterable[float]) -> float:
    """The μ of all of them together, on the same data."""
    return math.sqrt(sum(mu * mu for mu in mus))


def highest_auc(mu: float) -> float:
    """The largest area under a membership attack's ROC curve that μ allows, 0.5 to 1."""
    return NORMAL.cdf(mu / math.sqrt(2))


def highest_tpr(mu: float, false_positives: float) -> float:
    """The largest share of members that a membership attack can find at a share of false alarms."""
    return NORMAL.cdf(NORMAL.inv_cdf(false_positives) + mu)


def noisy(values: NDArray[np.float64], sigma: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Values plus Gaussian noise of deviation `sigma`, all on the grid.

    The noise is the operating system's randomness and is kept nowhere. It is the sum of two halves, each rounded
    (Holohan and Braghin 2021): beyond five deviations the noise that one number of 52 bits gives lies sparser than the
    grid, and would tell there which values it cannot have been added to. Together they reach 11 deviations, and every
    number of the grid within.
    """
    from scipy.special import ndtri  # as long to import as all else that verifying a release needs, which draws nothing

    drawn = np.frombuffer(os.urandom(16 * values.size), np.uint64).reshape(2, *values.shape) >> np.uint64(12)
    halves = sigma / math.sqrt(2) * ndtri((drawn + 0.5) * 2.0**-52)
    return GRID * (np.round(values / GRID) + np.round(halves / GRID).sum(0))
