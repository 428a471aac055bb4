"""A map from the bank to clean features, trained without pairs: what comes out must look clean, to φ2 as well."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.attacks.threat_models import ReleaseView
from dpf_release.attacks.toolkit.taps import Standard, Taps, open_taps, standard
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained
from dpf_release.core.arrays import Rows

LEARNING_RATE = 2e-3
SAMPLED = 1024  # places of a batch that are compared
WIDTHS = (0.1, 0.5, 2.0)  # of kernels, in mean squared distances
ALIKE = 10.0  # weight of likeness to Q against φ2's loss


class AlignmentMap(nn.Module):
    """Rows (n, C, h, w) → clean features; at the start, their mean and covariance are matched.

    Args:
        mean: (C,) of the bank.
        deviation: (C,) of the bank.
        wanted_mean: (C,) of clean features.
        wanted: (C,) deviations of clean features.
        transport: (C, C) of standardised channels: where it begins.
        non_negative: of clean features.
    """

    mean: Tensor
    deviation: Tensor
    wanted: Tensor
    wanted_mean: Tensor

    def __init__(
        self,
        mean: Tensor,
        deviation: Tensor,
        wanted_mean: Tensor,
        wanted: Tensor,
        transport: Tensor,
        non_negative: bool,
    ) -> None:
        super().__init__()
        statistics = {"mean": mean, "deviation": deviation, "wanted_mean": wanted_mean, "wanted": wanted}
        for name, values in statistics.items():
            self.register_buffer(name, values[:, None, None].clone())
        self.non_negative, channels = non_negative, len(mean)
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


def train_map(
    view: ReleaseView, mean: Tensor, deviation: Tensor, wanted_mean: Tensor, wanted: Tensor, transport: Tensor
) -> AlignmentMap:
    """The map, trained on rows of the bank with their labels and on φ1(Q); frozen.

    The loss is φ2's on the mapped rows and their released labels, and the discrepancy (MMD) between mapped rows and
    φ1(Q) of single places, of 3×3 places, and of what the blocks of φ2 make of them.
    """
    with seeded(view.seed):
        network = AlignmentMap(mean, deviation, wanted_mean, wanted, transport, view.non_negative)
    recipe, rows = recipe_for(view, view.budget.bank_images, len(view.bank), LEARNING_RATE)
    drawn = np.random.default_rng([view.seed, 10]).permutation(len(view.bank))
    looks = _Looks(view, wanted_mean, wanted)

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        mine, public = drawn[chosen], generator.integers(len(view.public), size=len(chosen))
        return (
            view.rows(mine),
            torch.from_numpy(np.asarray(view.bank.targets[mine])),
            view.features_of(view.public, public),
        )

    def objective(trained: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        rows, targets, clean = batch
        mapped = trained(rows).float()
        task, alike = looks.task(mapped, targets), looks.unlike(mapped, clean)
        return {"loss": task + ALIKE * alike, "φ2": task, "MMD": alike}

    return trained(
        view,
        "A4 map",
        network,
        read_batch,
        objective,
        recipe,
        rows,
        title="Training the map to clean features",
        depends_on={"bank": view.bank_subject},
    )


class _Looks:
    """What clean features look like, to φ2 and by themselves."""

    def __init__(self, view: ReleaseView, mean: Tensor, deviation: Tensor) -> None:
        self.view, self.mean, self.deviation = (
            view,
            *(part.to(view.device)[:, None, None] for part in (mean, deviation)),
        )
        self.taps: Taps = open_taps(view)
        self.scaled: Standard = standard(view, self.taps)
        targets = np.asarray(view.bank.targets)
        self.spread = torch.from_numpy(targets.std(axis=0) + 1e-6).float().to(view.device) if targets.ndim > 1 else None

    def task(self, features: Tensor, targets: Tensor) -> Tensor:
        """φ2's loss: cross entropy, or smooth L1 in deviations of each target."""
        answers = self.view.phi_2(features).float()
        if self.spread is None:
            return F.cross_entropy(answers, targets.long())
        return F.smooth_l1_loss(answers / self.spread, targets.float() / self.spread)

    def unlike(self, mapped: Tensor, clean: Tensor) -> Tensor:
        """The mean discrepancy of all that is compared."""
        with torch.no_grad():
            wanted = self._shown(clean)
        pairs = list(zip(self._shown(mapped), wanted, strict=True))
        return torch.stack([discrepancy(one, other) for one, other in pairs]).mean()

    def _shown(self, features: Tensor) -> Sequence[Tensor]:
        """Samples (n, D): of single places, of 3×3 around them, and for each tap its means over places."""
        scaled = (features - self.mean) / self.deviation
        around = torch.cat([scaled, F.avg_pool2d(scaled, 3, 1, 1), scaled - F.avg_pool2d(scaled, 3, 1, 1)], dim=1)
        taps = self.scaled(self.taps.cut(features))
        return [_some(scaled), _some(around), *(tap.float().mean(dim=(2, 3)) for tap in taps)]


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
