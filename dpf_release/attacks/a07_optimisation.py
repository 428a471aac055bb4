"""A7: a picture is sought for each row by itself, such that φ1 and blocks of φ2 make of it what the row is.

Mahendran and Vedaldi, "Understanding deep image representations by inverting them" (2015), with total variation as the
prior; then with a deep image prior (Ulyanov et al., 2018), where the picture is what an untrained convolutional network
draws: such a network draws pictures sooner than noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, ReleaseView
from dpf_release.attacks.toolkit.taps import STATISTICS, Taps, open_taps
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import Progress

ROWS = 250  # of fewer than 80, none found is no proof that it is below 5 %: the upper bound is above
FEWEST_ROWS = 16
STEPS = 1000  # whatever the budget: with a tenth of them it does not break weak noise
RESTARTS = 4
AT_ONCE = 32  # rows; what is done of them is kept
TOTAL_VARIATION = 0.5
COST = 2.3  # of a picture's step, in steps of a decoder, mean of both ways


@register
class PerSample(Attack):
    """Minimises Σ_k ‖φ2[:k](φ1(x)) - φ2[:k](b)‖² + TV(x) over x, with k = 0 the row itself; the best of 4 restarts."""

    code, title, profile, version = "A7", "a picture sought for each row", "full", 2
    of_bank = True
    rows = ROWS

    def trainings(self, budget: Budget) -> float:
        """Pixels, and a generator: each a step for every picture of a decoder's training."""
        return 2 * COST * rows_within(budget) * RESTARTS * STEPS / budget.bank_images

    def run(self, view: ReleaseView) -> Reconstructions:
        """Rows of all classes alike: of a smaller budget fewer, each sought as long."""
        count = min(rows_within(view.budget), len(view.asked))
        answered = np.unique(np.linspace(0, len(view.asked) - 1, count).round().astype(np.int64))
        taps = open_taps(view)
        spread = _spread(view, taps)
        ways: dict[str, Drawn] = {"pixels": Pixels, "deep image prior": DeepImagePrior}
        found = {name: _sought(view, name, drawn, taps, spread, answered) for name, drawn in ways.items()}
        return Reconstructions(found, answered)


def rows_within(budget: Budget) -> int:
    """How many pictures are sought."""
    return int(np.clip(budget.bank_images // (RESTARTS * STEPS), FEWEST_ROWS, ROWS))


class Pixels(nn.Module):
    """The pixels themselves, (n, 3, H, W) through a sigmoid: the sum of a pyramid, so that coarse forms move as one."""

    learning_rate = 0.05
    levels = 4

    def __init__(self, count: int, size: tuple[int, int], draws: torch.Generator) -> None:
        super().__init__()
        self.size = size
        self.pyramid = nn.ParameterList(
            0.1 * torch.randn(count, 3, -(-size[0] // 2**level), -(-size[1] // 2**level), generator=draws)
            for level in range(self.levels)
        )

    def forward(self) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1]."""
        levels = [F.interpolate(level, self.size, mode="bilinear") for level in self.pyramid]
        return torch.sigmoid(torch.stack(levels).sum(0))


class DeepImagePrior(nn.Module):
    """For each picture a network of its own, from fixed noise: stages of 3×3, norm, each twice as large.

    All networks are one, in which groups of channels keep to themselves.
    """

    learning_rate = 0.03
    width, noise, stages = 24, 16, 3

    def __init__(self, count: int, size: tuple[int, int], draws: torch.Generator) -> None:
        super().__init__()
        self.count, self.size = count, size
        factor = 2**self.stages
        start = (-(-size[0] // factor), -(-size[1] // factor))
        self.drawn = nn.Buffer(torch.randn(1, count * self.noise, *start, generator=draws))
        channels = [self.noise] + [self.width] * (self.stages + 1)
        self.weights = nn.ParameterList(
            torch.randn(count * after, before, 3, 3, generator=draws) * (2 / (9 * before)) ** 0.5
            for before, after in zip(channels, channels[1:], strict=False)
        )
        self.scales = nn.ParameterList(torch.ones(count * self.width) for _ in self.weights)
        self.shifts = nn.ParameterList(torch.zeros(count * self.width) for _ in self.weights)
        self.last = nn.Parameter(torch.randn(count * 3, self.width, 1, 1, generator=draws) * self.width**-0.5)
        self.colour = nn.Parameter(torch.zeros(count * 3))

    def forward(self) -> Tensor:
        """Pictures (n, 3, H, W) in [0, 1]."""
        maps: Tensor = self.drawn  # (1, n·noise, h, w): groups are pictures
        for stage, weight in enumerate(self.weights):
            if stage:
                maps = F.interpolate(maps, scale_factor=2, mode="bilinear")
            maps = F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="reflect"), weight, groups=self.count)
            maps = F.leaky_relu(F.instance_norm(maps, weight=self.scales[stage], bias=self.shifts[stage]), 0.1)
        pictures = F.conv2d(maps, self.last, self.colour, groups=self.count)  # (1, 3n, ≥H, ≥W)
        pictures = pictures.reshape(self.count, 3, *pictures.shape[2:])
        return torch.sigmoid(pictures[..., : self.size[0], : self.size[1]])


Drawn = type[Pixels] | type[DeepImagePrior]


def _sought(
    view: ReleaseView, name: str, drawn: Drawn, taps: Taps, spread: tuple[Tensor, ...], answered: Rows
) -> Callable[[Rows], Tensor]:
    """Pictures of the answered rows, by position; what is done is kept, for each few rows."""
    done: list[Tensor] = []
    with Progress(f"Seeking pictures, {name}", len(answered)) as progress:
        for first in range(0, len(answered), AT_ONCE):
            rows = view.asked[answered[first : first + AT_ONCE]]
            subject = {**view.subject, "bank": view.bank_subject, "rows": rows.tolist()}
            subject |= {"seed": view.seed, "version": PerSample.version}
            kept = view.kept.load(f"A7 {name}", subject)
            if kept is None:
                kept = {"pictures": _seek(view, drawn, taps, spread, rows, [view.seed, first])}
                view.kept.save(f"A7 {name}", subject, kept)
            done.append(kept["pictures"])
            progress.advance(len(rows))
    pictures = torch.cat(done)
    return lambda positions: pictures[torch.from_numpy(np.searchsorted(answered, positions))].float() / 255


def _seek(
    view: ReleaseView, drawn: Drawn, taps: Taps, spread: tuple[Tensor, ...], rows: Rows, seed: list[int]
) -> Tensor:
    """The best of several restarts for each row, by what is minimised: (n, 3, H, W) uint8."""
    batch = view.rows(rows)
    wanted = [batch, *taps.of(batch)]
    height, width = view.public.read(np.arange(1)).shape[-2:]
    best, lowest = torch.empty(0), torch.full((len(rows),), torch.inf)
    for restart in range(RESTARTS):
        draws = torch.Generator().manual_seed(int(np.random.default_rng([*seed, restart]).integers(2**62)))
        drawing = drawn(len(rows), (height, width), draws).to(view.device)
        optimizer = torch.optim.Adam(drawing.parameters(), drawn.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, drawn.learning_rate / 20)
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            _loss(view, taps, spread, wanted, drawing()).sum().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            pictures = drawing()
            loss = _loss(view, taps, spread, wanted, pictures).cpu()
        pictures = (255 * pictures.cpu()).round().to(torch.uint8)
        better = loss < lowest
        best = torch.where(better[:, None, None, None], pictures, best if restart else pictures)
        lowest = torch.minimum(loss, lowest)
    return best


def _loss(view: ReleaseView, taps: Taps, spread: tuple[Tensor, ...], wanted: list[Tensor], pictures: Tensor) -> Tensor:
    """What is minimised, of each picture, (n,): squared distances in units of what is common among pictures of Q."""
    features = view.phi_1(view.preprocess.normalise(pictures).contiguous(memory_format=torch.channels_last))
    found = [features, *taps.cut(features)]
    distances = [
        (one - other).square().flatten(1).mean(1) / unit for one, other, unit in zip(found, wanted, spread, strict=True)
    ]
    across, down = pictures.diff(dim=3).abs(), pictures.diff(dim=2).abs()
    variation = across.flatten(1).mean(1) + down.flatten(1).mean(1)
    return torch.stack(distances).mean(0) + TOTAL_VARIATION * variation


def _spread(view: ReleaseView, taps: Taps) -> tuple[Tensor, ...]:
    """Variance of the row itself and of each tap, over at most 1024 pictures of Q: mean over channels and places."""
    parts: list[list[Tensor]] = []
    for features in view.public_features(STATISTICS):
        parts.append([torch.stack([tap.mean(0), tap.square().mean(0)]) for tap in (features, *taps.of(features))])
    means = [torch.stack(of_tap).mean(0) for of_tap in zip(*parts, strict=True)]
    return tuple((square - mean**2).mean().clamp_min(1e-12) for mean, square in means)
