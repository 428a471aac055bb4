"""What φ2's answers give away. A reference and no attack: every P that keeps the answers gives this away too."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions
from dpf_release.attacks.threat_models import Budget, HeldPictures, ReleaseView
from dpf_release.attacks.toolkit.decoder import decode, train_decoder
from dpf_release.attacks.toolkit.taps import Taps, answers_alone, standard
from dpf_release.core.arrays import Rows

WIDTH = 256  # of the decoder's first stack: of K outputs alone it would be K


class Outputs(Attack):
    """A decoder on φ2's outputs alone, K numbers → a picture. Shown, never subtracted, never gated; not registered."""

    code, title, claim, planted = "outputs", "what φ2's answers give away", None, ()

    def trainings(self, budget: Budget) -> float:
        """One."""
        return 1.0

    def run(self, view: ReleaseView) -> Reconstructions:
        """Outputs standardised on Q, as maps of one pixel."""
        taps: Taps = answers_alone(view)
        scaled = standard(view, taps)

        def seen(features: Tensor) -> Tensor:
            return scaled(taps.of(features))[0]

        def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
            return seen(view.features_of(held, rows))

        network = train_decoder(view, "outputs alone", inputs, width=WIDTH, loss="ssim")
        return Reconstructions({"outputs alone": decode(view, network, lambda rows: seen(view.rows(rows)))})
