"""An attack from outside the package: a decoder that does not mind what P did to the scale and shift of a channel.

Lay this file beside `dpf.toml`, then

    dpf-release attack --attack own_attack:ScaleBlind --trust-code --profile quick

It is scored as all others are: against the same baseline and ceiling, and it must first break what it declares. What it
holds is what `view` has, and nothing else. Where an installed package names an attack under the entry points
`dpf_release.attacks`, that name takes the place of `own_attack:ScaleBlind`.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dpf_release import Attack, register_attack
from dpf_release.attacks.interface import Reconstructions
from dpf_release.attacks.threat_models import Budget, HeldPictures, ReleaseView
from dpf_release.attacks.toolkit.decoder import decode, train_decoder


@register_attack
class ScaleBlind(Attack):
    """A decoder on features whose channels all have mean 0 and deviation 1 over places, row by row."""

    code, title, profile, claim = "X1", "scale-blind decoder", "quick", "reconstruction"
    planted = ("weak-noise", "channel-affine")

    def trainings(self, budget: Budget) -> float:
        """One."""
        return 1.0

    def run(self, view: ReleaseView) -> Reconstructions:
        """Trained on Q, applied to the rows."""

        def inputs(held: HeldPictures, numbers: np.ndarray, generator: np.random.Generator | None) -> Tensor:
            return standardised(view.features_of(held, numbers))

        network = train_decoder(view, "X1 decoder", inputs, loss="ssim")
        return Reconstructions({"decoder": decode(view, network, lambda rows: standardised(view.rows(rows)))})


def standardised(features: Tensor) -> Tensor:
    """Each channel of each row with mean 0 and deviation 1, (n, C, H, W)."""
    centred = features - features.mean(dim=(2, 3), keepdim=True)
    return centred / (centred.std(dim=(2, 3), keepdim=True) + 1e-3)
