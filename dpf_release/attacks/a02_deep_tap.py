"""A2: decoders behind blocks of φ2. P is made to have φ2 answer as before: the deeper, the more it must resemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, HeldPictures, ReleaseView
from dpf_release.attacks.toolkit.decoder import decode, disturb, train_decoder
from dpf_release.attacks.toolkit.taps import MOST, WIDEST, answers_alone, open_taps, standard, together
from dpf_release.core.arrays import Rows

MISSING = 0.25  # share of rows for which a decoder on several taps has to do without one of them
WIDTH = 256  # of the first stack of a decoder on outputs: of K alone it would be K


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

        def decoder(name: str, of: tuple[int, ...]) -> Callable[[Rows], Tensor]:
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

        return Reconstructions({name: decoder(name, of) for name, of in ways.items()})


def _alone(budget: Budget) -> int:
    return min(MOST, max(0, budget.decoders - 2))


def drop_out(taps: Sequence[Tensor], generator: np.random.Generator) -> list[Tensor]:
    """Of each row, each tap is missing (all zeros) in a quarter of the cases, but never all of them.

    So a decoder does not learn to look at the first alone, which is the one that P has changed the most.
    """
    count = len(taps[0])
    there = generator.random((count, len(taps))) > MISSING
    there[np.arange(count), generator.integers(len(taps), size=count)] = True
    shares = torch.from_numpy(there.astype(np.float32)).to(taps[0].device)
    return [tap * shares[:, number, None, None, None] for number, tap in enumerate(taps)]


class Outputs(Attack):
    """A decoder on φ2's outputs alone, K numbers → a picture: what every P that keeps the answers gives away.

    A reference and no attack: shown, never subtracted, never gated; not registered.
    """

    code, title, claim, planted = "outputs", "what φ2's answers give away", None, ()

    def trainings(self, budget: Budget) -> float:
        """One."""
        return 1.0

    def run(self, view: ReleaseView) -> Reconstructions:
        """Outputs standardised on Q, as maps of one pixel."""
        taps = answers_alone(view)
        scaled = standard(view, taps)

        def seen(features: Tensor) -> Tensor:
            return scaled(taps.of(features))[0]

        def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
            return seen(view.features_of(held, rows))

        network = train_decoder(view, "outputs alone", inputs, width=WIDTH, loss="ssim")
        return Reconstructions({"outputs alone": decode(view, network, lambda rows: seen(view.rows(rows)))})
