"""A1: decoders that never saw a poisoned row. The paper's own test, and stronger ones of its kind."""

from __future__ import annotations

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, ReleaseView
from dpf_release.attacks.toolkit.decoder import DECODERS, clean_decoder, decode


@register
class StrawMen(Attack):
    """ψ on (φ1(z), z), z in Q, applied to the rows as if they were clean (paper, sections 3.1.2 and 4.3)."""

    code, title, profile = "A1", "straw man and unseen reconstructors", "quick"
    sets_ceiling = True

    def trainings(self, budget: Budget) -> float:
        """One for each decoder."""
        return min(budget.decoders, len(DECODERS))

    def run(self, view: ReleaseView) -> Reconstructions:
        """Decoders of several architectures and losses; those trained on disturbed features expect a poisoning."""
        numbers = range(min(view.budget.decoders, len(DECODERS)))
        return Reconstructions({DECODERS[number][0]: decode(view, clean_decoder(view, number)) for number in numbers})
