"""A2: decoders behind blocks of φ2. P is made to have φ2 answer as before: the deeper, the more it must resemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, HeldPictures, ReleaseView
from dpf_release.attacks.toolkit.clean_decoders import disturb
from dpf_release.attacks.toolkit.decoder import decode, train_decoder
from dpf_release.attacks.toolkit.taps import MOST, WIDEST, Standard, Taps, open_taps, standard, together
from dpf_release.core.arrays import Rows

MISSING = 0.25  # share of rows for which a decoder on several taps has to do without one of them


@register
class DeepTap(Attack):
    """A decoder on (φ2[:k](φ1(z)), z), z in Q, applied to φ2[:k] of the rows; and one on all taps together."""

    code, title, profile = "A2", "decoders behind blocks of φ2", "quick"
    sets_ceiling = True

    def trainings(self, budget: Budget) -> float:
        """One on all taps, and one for each that is looked at alone."""
        return 1 + _alone(budget)

    def run(self, view: ReleaseView) -> Reconstructions:
        """All taps together; then the first tap alone, which shows the most; then each."""
        taps = open_taps(view)
        scaled = standard(view, taps)
        ways = {"all taps": tuple(range(len(taps)))}
        if len(taps) > 1:
            ways |= {f"{taps.names[k]} alone": (k,) for k in range(min(len(taps), _alone(view.budget)))}
        return Reconstructions({name: _decoder(view, name, taps, scaled, of) for name, of in ways.items()})


def _alone(budget: Budget) -> int:
    return min(MOST, max(0, budget.decoders - 2))


def _decoder(
    view: ReleaseView, name: str, taps: Taps, scaled: Standard, of: tuple[int, ...]
) -> Callable[[Rows], Tensor]:
    """A decoder on some taps of φ2."""

    def seen(features: Tensor) -> list[Tensor]:
        every = scaled(taps.of(features))
        return [every[k] for k in of]

    def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
        features = view.features_of(held, rows)
        if generator is None:
            return together(seen(features))
        return together(drop_out(seen(disturb(features, generator)), generator))

    network = train_decoder(view, f"A2 {name}", inputs, width=min(view.feature_shape[0], WIDEST), loss="ssim")
    return decode(view, network, lambda rows: together(seen(view.rows(rows))))


def drop_out(taps: Sequence[Tensor], generator: np.random.Generator) -> list[Tensor]:
    """Of each row, each tap is missing (all zeros) in a quarter of the cases, but never all of them.

    So a decoder does not learn to look at the first alone, which is the one that P has changed the most.
    """
    count = len(taps[0])
    there = generator.random((count, len(taps))) > MISSING
    there[np.arange(count), generator.integers(len(taps), size=count)] = True
    shares = torch.from_numpy(there.astype(np.float32)).to(taps[0].device)
    return [tap * shares[:, number, None, None, None] for number, tap in enumerate(taps)]
