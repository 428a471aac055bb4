"""A4: no pairs are known, but clean features have a distribution, and φ2 knows it: the bank is brought to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, ReleaseView, batches
from dpf_release.attacks.toolkit.decoder import DECODERS, clean_decoder, decode
from dpf_release.attacks.toolkit.taps import open_taps, standard
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained
from dpf_release.core.arrays import Rows
from dpf_release.poisoning.objective import TaskLoss

Map = Callable[[Rows], Tensor]
OfChannels = Callable[[Tensor], Tensor]  # (n, C, h, w) → (n, K, h, w)
STATISTICS, PLACES = 10_000, 64  # rows that moments are taken of, and places of each
LEAST_OF_A_CLASS, MOST_CLASSES, BINS = 50, 32, 10
LEAST_DEVIATION, RIDGE = 1e-2, 1e-2  # in shares of the mean deviation of a channel; of a unit of variance
MAP_COST = 1.5  # a step of the trained map, in steps of a decoder
DECODERS_TRIED = 2
ALL = -1  # the group of all rows, in moments
LEARNING_RATE = 2e-3
SAMPLED = 1024  # places of a batch that are compared
WIDTHS = (0.1, 0.5, 2.0)  # of kernels, in mean squared distances
ALIKE = 10.0  # weight of likeness to Q against φ2's loss


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
    groups, groups_of = label_groups(view)
    bank_moments = _moments((view.rows(some), groups[some]) for some in batches(bank))
    seen = view.public_features(STATISTICS)
    public_moments = _moments((features, groups_of(view.answers(features))) for features in seen)
    of, to = bank_moments[ALL], public_moments[ALL]
    common = sorted(set(bank_moments) & set(public_moments) - {ALL}, key=lambda group: -bank_moments[group].rows)
    both = [group for group in common if min(bank_moments[group].rows, public_moments[group].rows) >= LEAST_OF_A_CLASS]
    by_group = {group: match_covariances(bank_moments[group], public_moments[group]) for group in both[:MOST_CLASSES]}
    maps = {
        "moments": _applied(view, match_moments(of, to), groups),
        "whitening-colouring": _applied(view, match_covariances(of, to), groups),
    }
    if by_group:
        maps["whitening-colouring by class"] = _applied(view, match_covariances(of, to), groups, by_group)
    network = train_map(view, of, to)
    return maps | {"trained map": lambda rows: network(view.rows(rows))}


def label_groups(view: ReleaseView) -> tuple[NDArray[np.int64], Callable[[Tensor], NDArray[np.int64]]]:
    """Of each row its class, (N,), or of regression its tenth by the first target; the same of φ2's answers."""
    targets = view.bank.targets
    if view.task == "classification":
        return targets.astype(np.int64), lambda answers: answers.argmax(1).cpu().numpy()
    edges = np.quantile(targets[:, 0], np.linspace(0, 1, BINS + 1)[1:-1])
    return np.searchsorted(edges, targets[:, 0]), lambda answers: np.searchsorted(edges, answers[:, 0].cpu().numpy())


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


def affine(weight: Tensor, shift: Tensor) -> OfChannels:
    """A map of channels, the same at each place: weight (K, C), shift (K,)."""
    kernel, bias = weight.float()[:, :, None, None], shift.float()
    return lambda features: F.conv2d(features, kernel.to(features.device), bias.to(features.device))


def match_moments(of: Moments, to: Moments) -> OfChannels:
    """Each channel gets mean and deviation of the same channel there."""
    scale = to.deviation / of.deviation
    return affine(torch.diag(scale), to.mean - scale * of.mean)


def match_covariances(of: Moments, to: Moments) -> OfChannels:
    """All channels get mean and covariance, by the map that moves standardised ones the least.

    Of two Gaussians that is the optimal transport B^-1/2 (B^1/2 A B^1/2)^1/2 B^-1/2. It is symmetric, so it undoes a
    scaling of channels, where whitening and then colouring would turn them too.
    """
    weight = to.deviation[:, None] * transport(of, to) / of.deviation
    return affine(weight, to.mean - weight @ of.mean)


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
        flat, channels = flat[:, :, ::every].cpu().double(), flat.shape[1]
        for group in [ALL, *np.unique(groups).tolist()]:
            mine = flat if group == ALL else flat[torch.from_numpy(groups == group)]
            values = mine.transpose(1, 2).flatten(0, 1)  # (n h w, C)
            of = found.setdefault(group, Moments(0, 0, flat.new_zeros(channels), flat.new_zeros(channels, channels)))
            of.rows, of.count = of.rows + len(mine), of.count + len(values)
            of.total, of.squares = of.total + values.sum(0), of.squares + values.T @ values
    return found


def _applied(view: ReleaseView, everywhere: OfChannels, groups: Rows, by_group: Mapping[int, OfChannels] = {}) -> Map:
    def aligned(rows: Rows) -> Tensor:
        features = view.rows(rows)
        out = everywhere(features)
        for group, own in by_group.items():
            mine = torch.from_numpy(np.flatnonzero(groups[rows] == group)).to(features.device)
            out[mine] = own(features[mine])
        return (out.relu() if view.non_negative else out).contiguous(memory_format=torch.channels_last)

    return aligned


# --------------------------------------------------------------------------------------------- the trained map


class AlignmentMap(nn.Module):
    """Rows (n, C, h, w) → clean features; at the start, their mean and covariance are matched.

    Args:
        statistics: (4, C): mean and deviation of the bank, and of clean features.
        transport: (C, C) of standardised channels: where it begins.
        non_negative: of clean features.
    """

    def __init__(self, statistics: Tensor, transport: Tensor, non_negative: bool) -> None:
        super().__init__()
        buffers = (nn.Buffer(values[:, None, None].clone()) for values in statistics)
        self.mean, self.deviation, self.wanted_mean, self.wanted = buffers
        self.non_negative, channels = non_negative, len(transport)
        width = min(channels, 128)
        self.linear = nn.Conv2d(channels, channels, 1)
        last = nn.Conv2d(width, channels, 1)
        self.bent = nn.Sequential(
            nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), last
        )
        with torch.no_grad():
            self.linear.weight.copy_(transport[:, :, None, None])
        for zero in (self.linear.bias, last.weight, last.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, rows: Tensor) -> Tensor:
        """Returns (n, C, h, w)."""
        scaled = (rows - self.mean) / self.deviation
        scaled = self.linear(scaled) + self.bent(scaled)
        out: Tensor = scaled * self.wanted + self.wanted_mean
        return (out.relu() if self.non_negative else out).contiguous(memory_format=torch.channels_last)


def train_map(view: ReleaseView, of: Moments, to: Moments) -> AlignmentMap:
    """The map, trained on rows of the bank with their labels and on φ1(Q); frozen.

    The loss is φ2's on the mapped rows and their released labels, and the discrepancy (MMD) between mapped rows and
    φ1(Q) of single places, of 3×3 places, and of what the blocks of φ2 make of them.
    """
    statistics = torch.stack([of.mean, of.deviation, to.mean, to.deviation]).float()
    with seeded(view.seed):
        network = AlignmentMap(statistics, transport(of, to).float(), view.non_negative)
    drawn = np.random.default_rng([view.seed, 10]).permutation(len(view.bank))
    unlike = _unlike(view, *statistics[2:])
    targets = np.asarray(view.bank.targets)
    regression = targets.ndim > 1
    task = TaskLoss(torch.from_numpy(targets.std(axis=0) + 1e-6).float() if regression else None)

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        mine, public = drawn[chosen], generator.integers(len(view.public), size=len(chosen))
        labels = torch.from_numpy(targets[mine]).to(torch.float32 if regression else torch.long)
        return view.rows(mine), labels, view.features_of(view.public, public)

    def objective(trained: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        rows, labels, clean = batch
        mapped = trained(rows).float()
        wrong, alike = task.loss(view.phi_2(mapped).float(), labels), unlike(mapped, clean)
        return {"loss": wrong + ALIKE * alike, "φ2": wrong, "MMD": alike}

    recipe = recipe_for(view, view.budget.bank_images, len(view.bank), LEARNING_RATE)
    title, subject = "Training the map to clean features", {"bank": view.bank_subject}
    return trained(view, "A4 map", network, read_batch, objective, *recipe, title, depends_on=subject)


def _unlike(view: ReleaseView, mean: Tensor, deviation: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Mapped features, clean ones → the mean discrepancy of all that is compared."""
    mean, deviation = (part.to(view.device)[:, None, None] for part in (mean, deviation))
    taps = open_taps(view)
    scale_taps = standard(view, taps)

    def shown(features: Tensor) -> list[Tensor]:
        """Samples (n, D): of single places, of 3×3 around them, and for each tap its means over places."""
        scaled = (features - mean) / deviation
        around = torch.cat([scaled, F.avg_pool2d(scaled, 3, 1, 1), scaled - F.avg_pool2d(scaled, 3, 1, 1)], dim=1)
        of_taps = scale_taps(taps.cut(features))
        return [_some(scaled), _some(around), *(tap.float().mean(dim=(2, 3)) for tap in of_taps)]

    def unlike(mapped: Tensor, clean: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = shown(clean)
        pairs = zip(shown(mapped), wanted, strict=True)
        return torch.stack([discrepancy(one, other) for one, other in pairs]).mean()

    return unlike


def _some(features: Tensor) -> Tensor:
    """Places of a batch, at most 1024: (n, C)."""
    flat = features.permute(0, 2, 3, 1).flatten(0, 2)
    return flat[torch.randint(len(flat), (min(len(flat), SAMPLED),), device=flat.device)]


def discrepancy(one: Tensor, other: Tensor) -> Tensor:
    """MMD² of two samples (n, D), (m, D), with Gaussian kernels of several widths."""
    with torch.autocast(one.device.type, enabled=False):
        one, other = one.float(), other.float()
        width = torch.cdist(other, other).square().mean().detach().clamp_min(1e-6)

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
            return torch.stack([torch.exp(-squares.clamp_min(0) / (share * width)).mean() for share in WIDTHS]).mean()

        return kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)
