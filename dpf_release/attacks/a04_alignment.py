"""A4: no pairs are known, but clean features have a distribution, and φ2 knows it: the bank is brought to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, ReleaseView, batches
from dpf_release.attacks.toolkit.alignment_map import train_map
from dpf_release.attacks.toolkit.clean_decoders import DECODERS, clean_decoder
from dpf_release.attacks.toolkit.decoder import decode
from dpf_release.core.arrays import Rows

Map = Callable[[Rows], Tensor]
STATISTICS, PLACES = 10_000, 64  # rows that moments are taken of, and places of each
LEAST_OF_A_CLASS, MOST_CLASSES, BINS = 50, 32, 10
LEAST_DEVIATION, RIDGE = 1e-2, 1e-2  # in shares of the mean deviation of a channel; of a unit of variance
MAP_COST = 1.5  # a step of the trained map, in steps of a decoder
DECODERS_TRIED = 2


@register
class Alignment(Attack):
    """Maps from the bank to clean features that need no pairs, then A1's decoders.

    Per-channel moments; whitening and colouring of all channels together; the same for each class; a trained map.
    """

    code, title = "A4", "unpaired alignment"
    planted = ("channel-affine",)
    of_bank = True

    def trainings(self, budget: Budget) -> float:
        """The map, and A1's decoders where they are not there yet."""
        return MAP_COST

    def run(self, view: ReleaseView) -> Reconstructions:
        """Every map with A1's first decoders: one that expects a disturbance and one that does not."""
        decoders = {}
        for name, aligned in alignments(view).items():
            for number in range(min(view.budget.decoders, DECODERS_TRIED)):
                way = f"{name}; {DECODERS[number][0]}"
                decoders[way] = decode(view, clean_decoder(view, number), aligned)
        return Reconstructions(decoders)


def alignments(view: ReleaseView) -> dict[str, Map]:
    """Name of a map → rows of the bank by number, brought to clean features."""
    bank = np.sort(np.random.default_rng([view.seed, 9]).permutation(len(view.bank))[:STATISTICS])
    public = np.arange(min(len(view.public), STATISTICS))
    groups, groups_of = label_groups(view)
    bank_moments = _moments((view.rows(some), groups[some]) for some in batches(bank))
    seen = (view.features_of(view.public, some) for some in batches(public))
    public_moments = _moments((features, groups_of(view.answers(features))) for features in seen)
    of, to = bank_moments[ALL], public_moments[ALL]
    common = sorted(set(bank_moments) & set(public_moments) - {ALL}, key=lambda group: -bank_moments[group].rows)
    both = [group for group in common if _enough(bank_moments[group], public_moments[group])][:MOST_CLASSES]
    maps: dict[str, Map] = {
        "moments": _applied(view, match_moments(of, to)),
        "whitening-colouring": _applied(view, match_covariances(of, to)),
    }
    if both:
        by_group = {group: match_covariances(bank_moments[group], public_moments[group]) for group in both}
        maps["whitening-colouring by class"] = _applied(view, match_covariances(of, to), by_group, groups)
    network = train_map(view, *_standard(of), *_standard(to), transport(of, to).float())

    def trained(rows: Rows) -> Tensor:
        with torch.inference_mode():
            out: Tensor = network(view.rows(rows))
        return out

    return maps | {"trained map": trained}


def label_groups(view: ReleaseView) -> tuple[NDArray[np.int64], Callable[[Tensor], NDArray[np.int64]]]:
    """Of each row its class, (N,), or of regression its tenth by the first target; the same of φ2's answers."""
    targets = view.bank.targets
    if view.task == "classification":
        return targets.astype(np.int64), lambda answers: answers.argmax(1).cpu().numpy()
    edges = np.quantile(targets[:, 0], np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, targets[:, 0]), lambda answers: np.searchsorted(edges, answers[:, 0].cpu().numpy())


# --------------------------------------------------------------------------------------------- moments

ALL = -1  # the group of all rows


@dataclass
class Moments:
    """Of the channels, over rows and places; in double precision on the CPU."""

    rows: int
    count: int
    total: Tensor  # (C,)
    squares: Tensor  # (C, C)

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C)."""
        return self.squares / self.count - self.mean[:, None] * self.mean

    @property
    def deviation(self) -> Tensor:
        """(C,), of a dead channel not zero."""
        deviation = self.covariance.diagonal().clamp_min(0).sqrt()
        return deviation.clamp_min(LEAST_DEVIATION * float(deviation.mean()) + 1e-9)


@dataclass(frozen=True, eq=False)
class Affine:
    """A map of channels, the same at each place: weight (K, C), shift (K,)."""

    weight: Tensor
    shift: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(n, C, h, w) → (n, K, h, w)."""
        weight, shift = (part.float().to(features.device) for part in (self.weight, self.shift))
        return F.conv2d(features, weight[:, :, None, None], shift)


def match_moments(of: Moments, to: Moments) -> Affine:
    """Each channel gets mean and deviation of the same channel there."""
    scale = to.deviation / of.deviation
    return Affine(torch.diag(scale), to.mean - scale * of.mean)


def match_covariances(of: Moments, to: Moments) -> Affine:
    """All channels get mean and covariance, by the map that moves standardised ones the least.

    Of two Gaussians that is the optimal transport B^-1/2 (B^1/2 A B^1/2)^1/2 B^-1/2. It is symmetric, so it undoes a
    scaling of channels, where whitening and then colouring would turn them too.
    """
    weight = to.deviation[:, None] * transport(of, to) / of.deviation
    return Affine(weight, to.mean - weight @ of.mean)


def transport(of: Moments, to: Moments) -> Tensor:
    """The map of standardised channels, (C, C)."""
    a, b = _correlation(to), _correlation(of)
    root, inverse = _power(b, 0.5), _power(b, -0.5)
    return inverse @ _power(root @ a @ root, 0.5) @ inverse


def _correlation(moments: Moments) -> Tensor:
    scaled = moments.covariance / moments.deviation[:, None] / moments.deviation
    return scaled + RIDGE * torch.eye(len(scaled), dtype=scaled.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    powers: Tensor = (vectors * values.clamp_min(1e-12) ** exponent) @ vectors.T
    return powers


def _moments(batches: Iterable[tuple[Tensor, NDArray[np.int64]]]) -> dict[int, Moments]:
    """Of all rows, and of each group of rows."""
    found: dict[int, Moments] = {}
    for features, groups in batches:
        flat = features.flatten(2)  # (n, C, h w)
        every = max(1, flat.shape[2] // PLACES)
        flat = flat[:, :, ::every].cpu().double()
        for group in [ALL, *np.unique(groups).tolist()]:
            mine = flat if group == ALL else flat[torch.from_numpy(groups == group)]
            values = mine.transpose(1, 2).flatten(0, 1)  # (n h w, C)
            new = Moments(len(mine), len(values), values.sum(0), values.T @ values)
            known = found.get(group)
            found[group] = new if known is None else _sum(known, new)
    return found


def _sum(one: Moments, other: Moments) -> Moments:
    total, squares = one.total + other.total, one.squares + other.squares
    return Moments(one.rows + other.rows, one.count + other.count, total, squares)


def _standard(moments: Moments) -> tuple[Tensor, Tensor]:
    return moments.mean.float(), moments.deviation.float()


def _enough(*moments: Moments) -> bool:
    return all(of.rows >= LEAST_OF_A_CLASS for of in moments)


def _applied(
    view: ReleaseView, everywhere: Affine, by_group: dict[int, Affine] | None = None, groups: Rows | None = None
) -> Map:
    def aligned(rows: Rows) -> Tensor:
        features = view.rows(rows)
        out = everywhere(features)
        for group, own in (by_group or {}).items():
            assert groups is not None
            mine = torch.from_numpy(np.flatnonzero(groups[rows] == group)).to(features.device)
            out[mine] = own(features[mine])
        return (out.relu() if view.non_negative else out).contiguous(memory_format=torch.channels_last)

    return aligned
