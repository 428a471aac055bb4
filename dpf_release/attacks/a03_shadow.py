"""A3: the attacker runs this very tool on Q, and learns to undo what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import nn

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, ReleaseView
from dpf_release.attacks.toolkit.clean_decoders import DECODERS, clean_decoder
from dpf_release.attacks.toolkit.decoder import decode, train_decoder
from dpf_release.attacks.toolkit.shadows import (
    SHARE,
    STEP_COST,
    of_its_own_kind,
    shadow,
    shadow_recipe,
    union,
    with_moments_of_q,
)
from dpf_release.core.progress import announce
from dpf_release.errors import ConfigError, NotGrantedError

LACKS = "no function of P's own kind could be fitted on the public images"


@register
class ShadowFunctions(Attack):
    """m functions P' fitted on Q, and one decoder for them all, for clean features and for simple disturbances.

    They are `dpf`, whatever P is. Where P is of another kind, there are as many of that kind, with P's parameters and
    with others, and a decoder for them. Leakage against m, m = 1, 2, 4, ...
    """

    code, title, version = "A3", "shadow functions", 2
    planted = ("weak-noise", "channel-affine")

    def trainings(self, budget: Budget) -> float:
        """The shadow functions, on fewer pictures; a decoder for each m; and what imitating P's own kind takes."""
        return budget.shadows * SHARE * STEP_COST + len(_counts(budget.shadows)) + budget.own_kind

    def members(self, view: ReleaseView) -> Mapping[str, nn.Module]:
        """Its `dpf` functions, which are known to be weak."""
        return {f"shadow {number + 1}": shadow(view, number) for number in range(view.budget.shadows)}

    def run(self, view: ReleaseView) -> Reconstructions:
        """Decoders on rows as they are; the last one also on rows with the per-channel moments of clean features."""
        shadows = [shadow(view, number) for number in range(view.budget.shadows)]
        decoders, series = {}, {}
        for m in _counts(len(shadows)):
            recipes = [asdict(shadow_recipe(number, view.budget.decoders, view.seed)) for number in range(m)]
            network = train_decoder(
                view,
                f"A3 decoder for {m}",
                union(view, shadows[:m]),
                architecture=DECODERS[0][1],
                loss=DECODERS[0][2],
                depends_on={"shadows": recipes},
                start=clean_decoder(view).state_dict(),
            )
            decoders[f"{m} shadows"] = decode(view, network)
            series[f"{m} shadows"] = ("shadows", m)
            if m == len(shadows):
                decoders[f"{m} shadows, moments"] = decode(view, network, with_moments_of_q(view))
        try:
            own_kind = of_its_own_kind(view)
        except (ConfigError, NotGrantedError) as error:
            announce(f"A3: no shadow function of P's own kind: {error}")  # in whose words may stand what is private
            return Reconstructions(decoders, series=series, lacks=LACKS)
        if own_kind is not None:
            network = train_decoder(
                own_kind.view,
                "A3 decoder for P's own kind",
                own_kind.inputs,
                architecture=DECODERS[0][1],
                loss=DECODERS[0][2],
                depends_on=own_kind.depends_on,
                start=clean_decoder(view).state_dict(),
                shape=view.feature_shape,
            )
            decoders[f"{len(shadows)} shadows of its own kind"] = decode(view, network)
        return Reconstructions(decoders, series=series)


def _counts(shadows: int) -> list[int]:
    """1, 2, 4, ... and `shadows` itself."""
    return sorted({2**power for power in range(shadows.bit_length()) if 2**power <= shadows} | {shadows} - {0})
