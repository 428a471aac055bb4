"""How much of its own picture a reconstruction shows, or of any of its pool; and what that is worth.

Pictures are floats in [0, 1], (n, 3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from dpf_release.attacks.threat_models import batches
from dpf_release.core.arrays import Rows
from dpf_release.evaluation.targets import LEAST_POOL, MadeOf, Truth
from dpf_release.models.metrics import l1, psnr, ssim
from dpf_release.release.attack_report import Interval, Way

Numbers = NDArray[np.float64]
PSNR_LIMIT = 100.0  # of equal pictures it is infinite
DRAWS = 2000
LEAST_GAP = 0.1  # between baseline and ceiling, below which their ratio says nothing
WORST = 0.01


@dataclass(frozen=True)
class RowScores:
    """One number an asked row.

    Measures are against the row's own picture (of several, the one that it is most like), but `affine_ssim_matched`
    against its match.
    """

    measures: dict[str, Numbers]
    own: NDArray[np.bool_]  # whether the match is a picture that the row is made of
    guess: Numbers  # share of its pool that the row is made of, which is how often a guess is right
    pictures: Rows = field(default_factory=lambda: np.empty(0, np.int64))  # the own one, as a row of the clean bank

    @property
    def primary(self) -> Numbers:
        """SSIM after the best affine colour fit, with the row's own picture."""
        return self.measures["affine_ssim"]

    @property
    def matched(self) -> Numbers:
        """The same with the row's match: whose row it was is not taken on trust."""
        return self.measures["affine_ssim_matched"]

    def at(self, places: Rows) -> RowScores:
        """Those of some of the rows."""
        pictures = self.pictures[places] if len(self.pictures) else self.pictures
        measures = {name: values[places] for name, values in self.measures.items()}
        return RowScores(measures, self.own[places], self.guess[places], pictures)


def score_pictures(truth: Truth, contributors: MadeOf, reconstruct: Callable[[Rows], Tensor]) -> RowScores:
    """Scores reconstructions of `truth.asked`: against their own picture, and against their match.

    The match is the picture of the pool that a reconstruction correlates with most. So a bank whose rows were shuffled
    within their pools, which no id gives away, scores by its matches as it did before. `reconstruct` makes pictures of
    positions in `truth.asked`.
    """
    columns: dict[str, list[NDArray[Any]]] = {}
    done = 0
    for pool in truth.pools:
        originals = truth.read(pool.pictures).float() / 255
        directions = _directions(originals)
        at, members, _ = contributors(pool.rows)
        made_of = np.zeros((len(pool.rows), len(pool.pictures)), np.bool_)
        there = np.isin(members, pool.pictures)
        made_of[at[there], np.searchsorted(pool.pictures, members[there])] = True
        for places in batches(np.arange(len(pool.rows))):
            pictures = reconstruct(done + places).float().clamp(0, 1)
            correlation = (_directions(pictures) @ directions.T).abs()  # (n, M)
            match = correlation.argmax(dim=1)
            with_own, mine = correlation.where(torch.from_numpy(made_of[places]), -1).max(dim=1)
            nobody = with_own < 0  # a row that belongs to no picture has its match for its own
            with_own, mine = correlation.max(dim=1).values.where(nobody, with_own), match.where(nobody, mine)
            found = _measure(pictures, originals[mine])
            found["affine_ssim_matched"] = ssim(affine_fit(pictures, originals[match]), originals[match])
            found["correlation"] = with_own
            row = {"own": made_of[places, match.numpy()], "guess": made_of[places].mean(axis=1)}
            row["pictures"] = pool.pictures[mine.numpy()]
            for name, values in (row | {name: of.double().numpy() for name, of in found.items()}).items():
                columns.setdefault(name, []).append(values)
        done += len(pool.rows)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return RowScores(own=joined.pop("own"), guess=joined.pop("guess"), pictures=joined.pop("pictures"), measures=joined)


def _measure(pictures: Tensor, originals: Tensor) -> dict[str, Tensor]:
    plain = ssim(pictures, originals)
    return {
        "affine_ssim": ssim(affine_fit(pictures, originals), originals),
        "ssim": plain,
        "abs_ssim": torch.maximum(plain, ssim(1 - pictures, originals)),
        "l1": l1(pictures, originals),
        "psnr": psnr(pictures, originals).clamp_max(PSNR_LIMIT),
    }


def _directions(pictures: Tensor) -> Tensor:
    """Pictures as unit vectors around their mean, (n, 3HW); their products are pixel correlations."""
    flat = pictures.flatten(1)
    centred = flat - flat.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-6)


def affine_fit(pictures: Tensor, originals: Tensor) -> Tensor:
    """Each picture with its colours mapped by the 3×4 matrix that brings it nearest to its original.

    A negative, or a picture in false colours, is so seen for what it is; a constant becomes the original's mean colour.
    """
    count, _, height, width = pictures.shape
    flat = pictures.flatten(2).transpose(1, 2).double()  # (n, HW, 3)
    design = torch.cat([flat, torch.ones_like(flat[..., :1])], dim=2)  # (n, HW, 4)
    wanted = originals.flatten(2).transpose(1, 2).double()  # (n, HW, 3)
    gram = design.transpose(1, 2) @ design + 1e-6 * torch.eye(4, dtype=torch.float64)
    colours = torch.linalg.solve(gram, design.transpose(1, 2) @ wanted)  # (n, 4, 3)
    fitted = (design @ colours).transpose(1, 2).reshape(count, 3, height, width)
    return fitted.clamp(0, 1).to(pictures.dtype)


# --------------------------------------------------------------------------------------------- what it is worth


@dataclass(frozen=True)
class References:
    """What leakage is measured between, of the same rows."""

    baseline: RowScores  # the best that needs no bank
    ceiling: RowScores  # the best on clean rows
    clean: Callable[[Rows], Tensor] | None = None  # that one's pictures of rows of the clean bank, for the report

    def at(self, places: Rows) -> References:
        """Those of some of the rows."""
        return References(self.baseline.at(places), self.ceiling.at(places))


def way_of(scores: RowScores, references: References, sizes: Rows, seed: int) -> Way:
    """Means of what was measured for one decoder, with their intervals; and its leakage, by own picture or by match.

    The higher of the two, bound by bound. By match alone, what says nothing does well (the mean of a class is matched
    with the one picture of the pool that is most like it), and what says a little seems worse than nothing. By own
    picture alone, a shuffle of the rows would pass for a defence. So where one is not defined, neither is the leakage;
    what the other one says is among the measures, and can fail.
    """
    measures = {name: mean_interval(values, seed) for name, values in scores.measures.items()}
    count = max(1, round(WORST * len(scores.primary)))
    for name, values in scores.measures.items():  # the worst for whoever is shown: the most alike
        alike = np.sort(values)
        measures[f"{name}_worst"] = mean_interval(alike[:count] if name == "l1" else alike[-count:], seed)
    if (sizes >= LEAST_POOL).any() and scores.guess.any():  # a row of no image has none to be found
        measures["re_identification"] = share_interval(scores.own[sizes >= LEAST_POOL])
    baseline, ceiling = references.baseline, references.ceiling
    by_own = ratio_interval(scores.primary, baseline.primary, ceiling.primary, seed)
    by_match = ratio_interval(scores.matched, baseline.matched, ceiling.matched, seed)
    leakage = None
    if by_own and by_match:
        bounds = {name: max(getattr(by_own, name), getattr(by_match, name)) for name in ("value", "low", "high")}
        leakage = Interval(**bounds)
    defined = {"leakage_own": by_own, "leakage_matched": by_match}
    return Way(measures=measures | {name: found for name, found in defined.items() if found}, leakage=leakage)


def leakages_of(way: Way) -> list[Interval | None]:
    """What a claim is held against: the leakage; where it is not defined also what there is of it."""
    parts = [way.measures[name] for name in ("leakage_own", "leakage_matched") if name in way.measures]
    return [way.leakage] if way.leakage else [None, *parts]


def interval_over(drawn: NDArray[np.float64], value: float) -> Interval:
    """A number with its 95 % interval, by what bootstrap draws came to."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))


def mean_interval(values: NDArray[Any], seed: int) -> Interval:
    """The mean of one number an image, with its bootstrap 95 % interval over images."""
    return interval_over(_resampled([values], seed)[0], float(np.mean(values)))


def share_interval(found: NDArray[np.bool_]) -> Interval:
    """A share of images, with its 95 % interval by Wilson: the bootstrap of none found would be exactly zero."""
    low, high = wilson(int(found.sum()), len(found))
    return Interval(value=float(found.mean()), low=low, high=high)


def wilson(found: int, among: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    interval = binomtest(found, among).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def ratio_interval(attack: Numbers, baseline: Numbers, ceiling: Numbers, seed: int) -> Interval | None:
    """(attack - baseline) / (ceiling - baseline) of means over the same images; None where the gap is below 0.1."""
    if ceiling.mean() - baseline.mean() < LEAST_GAP:
        return None
    means = _resampled([attack, baseline, ceiling], seed)
    ratios = (means[0] - means[1]) / np.maximum(means[2] - means[1], 1e-9)
    return interval_over(ratios, float((attack.mean() - baseline.mean()) / (ceiling.mean() - baseline.mean())))


def _resampled(columns: list[NDArray[Any]], seed: int) -> NDArray[np.float64]:
    """Means of each column over the same bootstrap draws of its rows, (columns, draws)."""
    table = np.stack([np.asarray(column, np.float64) for column in columns])
    generator = np.random.default_rng([seed, 2])
    count = table.shape[1]
    chunk = max(1, 2**21 // count)
    sizes = [min(chunk, DRAWS - first) for first in range(0, DRAWS, chunk)]
    return np.concatenate([table[:, generator.integers(count, size=(n, count))].mean(axis=2) for n in sizes], axis=1)


def best_of(scores: Mapping[str, RowScores]) -> tuple[str, RowScores]:
    """The name and scores with the highest mean; scores by match are those of whoever is the best by match."""
    name = max(scores, key=lambda name: float(scores[name].primary.mean()))
    matched = max((one.matched for one in scores.values()), key=lambda values: float(values.mean()))
    return name, replace(scores[name], measures={**scores[name].measures, "affine_ssim_matched": matched})
