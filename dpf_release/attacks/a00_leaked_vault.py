"""A0: the vault is lost, and P with it. The paper's "secondary attack"."""

from __future__ import annotations

import functools

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, LeakedVault, ReleaseView
from dpf_release.attacks.toolkit.decoder import DecoderLoss, clean_decoder, decode, train_decoder
from dpf_release.attacks.toolkit.poisoned_public import poisoned_public, with_room
from dpf_release.attacks.toolkit.trained import schedule

# A decoder's loss, and its share of the pictures. Both begin with A1's first decoder.
LOSSES: tuple[tuple[DecoderLoss, float], ...] = (("ssim", 1.0), ("l1", 0.5))


@register
class LeakedP(Attack):
    """Decoders on (P(φ1(z)), z), z in Q: what is left when the secret is out."""

    code, title, claim, version = "A0", "leaked vault", None, 2
    view = LeakedVault
    planted = ("weak-noise", "channel-affine", "channel-permutation", "random-convolution")
    of_bank = True

    def trainings(self, budget: Budget) -> float:
        """Those of `LOSSES`."""
        return sum(share for _, share in LOSSES)

    def run(self, view: ReleaseView) -> Reconstructions:
        """P is applied to Q as a bank of its own; a mixed row is paired with the picture that it has the most of."""
        assert isinstance(view, LeakedVault)
        start = clean_decoder(view).state_dict()  # on all of Q: it is A1's
        _, rows = schedule(view.budget.bank_images, len(view.public))
        view = with_room(view, rows)
        poisoned = functools.cache(lambda: poisoned_public(view, view.poison))  # not made where all is kept
        decoders = {}
        for loss, share in LOSSES:
            network = train_decoder(
                view,
                f"A0 {loss}",
                lambda held, rows, generator: poisoned().inputs(held, rows),
                loss=loss,
                depends_on={"bank": view.bank_subject},
                start=start,
                images=max(1, round(view.budget.bank_images * share)),
                shape=view.feature_shape,
                originals=lambda held, rows: poisoned().originals(held, rows),
            )
            decoders[loss.upper()] = decode(view, network)
        return Reconstructions(decoders)
