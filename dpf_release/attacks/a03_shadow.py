"""A3: the attacker runs this very tool on Q, and learns to undo what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, HeldPictures, ReleaseView, batches
from dpf_release.attacks.toolkit.decoder import Inputs, clean_decoder, decode, train_decoder
from dpf_release.attacks.toolkit.poisoned_public import PoisonedPublic, poisoned_public, with_room
from dpf_release.attacks.toolkit.shadows import (
    MOMENT_PICTURES,
    SHARE,
    STEP_COST,
    fitted_on_public,
    poison_with,
    shadow,
    shadow_recipe,
    union,
)
from dpf_release.attacks.toolkit.trained import schedule
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import announce
from dpf_release.errors import ConfigError, NotGrantedError
from dpf_release.poisoning.chain import build_chain, draws_rows
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.plan import FeatureSpec

LACKS = "no function of P's own kind could be fitted on the public images"


@register
class ShadowFunctions(Attack):
    """m functions P' fitted on Q, and one decoder for them all, for clean features and for simple disturbances.

    They are `dpf`, whatever P is. Where P is of another kind, there are as many of that kind, with P's parameters and
    with others, and a decoder for them: the only one where rows are drawn from groups of images, which gives pairs of a
    row and any image of its group. Leakage against m, m = 1, 2, 4, ...
    """

    code, title, version = "A3", "shadow functions", 2
    planted = ("weak-noise", "channel-affine")

    def trainings(self, budget: Budget) -> float:
        """The shadow functions, on fewer pictures; a decoder for each m; and what imitating P's own kind takes."""
        return budget.shadows * SHARE * STEP_COST + len(_counts(budget.shadows)) + budget.own_kind

    def members(self, view: ReleaseView) -> Mapping[str, nn.Module]:
        """Its `dpf` functions, which are known to be weak."""
        return {f"shadow {number + 1}": shadow(view, number) for number in range(view.budget.shadows)}

    def refuse(self, view: ReleaseView) -> None:
        """Drawn rows say of an image to which group of its class it belongs; of one group there is nothing to learn."""
        if not draws_rows(view.function):
            return
        stage = build_chain(view.function, FeatureSpec(view.feature_shape, view.non_negative)).stages[0]
        if not isinstance(stage, Mixture) or stage.bounded or stage.groups == 1:
            raise NotGrantedError(
                "its rows belong to no image, so no shadow function gives pairs of a row and its image"
            )

    def run(self, view: ReleaseView) -> Reconstructions:
        """Decoders on rows as they are; the last one also on rows with the per-channel moments of clean features."""
        shadows: list[nn.Module] = []
        decoders, series = {}, {}
        if not draws_rows(view.function):  # of drawn rows, `dpf` functions teach nothing
            shadows = [shadow(view, number) for number in range(view.budget.shadows)]
        for m in _counts(len(shadows)):
            recipes = [asdict(shadow_recipe(number, view.budget.decoders, view.seed)) for number in range(m)]
            start, of = clean_decoder(view).state_dict(), union(view, shadows[:m])
            network = train_decoder(view, f"A3 decoder for {m}", of, start=start, depends_on={"shadows": recipes})
            decoders[f"{m} shadows"] = decode(view, network)
            series[f"{m} shadows"] = ("shadows", m)
            if m == len(shadows):
                decoders[f"{m} shadows, moments"] = decode(view, network, with_moments_of_q(view))
        try:
            own_kind = of_its_own_kind(view)
        except (ConfigError, NotGrantedError) as error:
            announce(f"A3: no shadow function of P's own kind: {error}")  # in whose words may stand what is private
            known = decoders or {"clean features": decode(view, clean_decoder(view))}
            return Reconstructions(known, series=series, lacks=LACKS)
        if own_kind is not None:
            small, inputs, facts = own_kind
            name, start = "A3 decoder for P's own kind", clean_decoder(view).state_dict()
            network = train_decoder(small, name, inputs, depends_on=facts, start=start, shape=view.feature_shape)
            decoders[f"{view.budget.shadows} shadows of its own kind"] = decode(view, network)
        return Reconstructions(decoders, series=series)


def _counts(shadows: int) -> list[int]:
    """1, 2, 4, ... and `shadows` itself."""
    return sorted({2**power for power in range(shadows.bit_length()) if 2**power <= shadows} | {shadows} - {0})


def of_its_own_kind(view: ReleaseView) -> tuple[ReleaseView, Inputs, dict[str, Any]] | None:
    """Shadow functions of P's own kind; None where P is `dpf` as A3's others are, or not known.

    Each is planned for Q as a bank of the attacker's, whose labels are φ2's answers. The first has P's parameters,
    others vary them.

    Returns:
        The view, with as many pictures of Q as there are such rows of: what a decoder of them is trained on; pictures
        of Q → their rows, each under one of the functions, drawn anew; and what the functions are.

    Raises:
        ConfigError: P's kind cannot be fitted on Q.
        NotGrantedError: Q has no class that is large enough for it.
    """
    if view.function in ("", "dpf"):
        return None
    _, rows = schedule(view.budget.images, len(view.public))
    small = with_room(view, rows, view.budget.shadows)
    of_name = build_chain(view.function, FeatureSpec(view.feature_shape, view.non_negative))
    banks: list[PoisonedPublic] = []
    fitted: list[Any] = []
    for number in range(view.budget.shadows):
        recipe = shadow_recipe(number, view.budget.decoders, view.seed)
        varies = number and not of_name.draws_rows  # with one group a class there would be no pairs
        function = of_name.varied(np.random.default_rng(recipe.seed)) if varies else of_name.spec
        recipe = replace(recipe, function=function)
        chain = fitted_on_public(view, f"A3 own kind {number}", recipe)
        fitted.append([asdict(recipe), *chain.outside_code()])
        banks.append(poisoned_public(small, poison_with(chain, view.phi_2, f"shadow {recipe.seed}")))

    def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
        generator = generator or np.random.default_rng([view.seed, 4, int(rows[0])])
        drawn = torch.from_numpy(generator.integers(len(banks), size=len(rows)))
        out = banks[0].with_most_of(held, rows)
        for number, bank in enumerate(banks[1:], start=1):
            if (drawn == number).any():
                out[drawn == number] = bank.with_most_of(held, rows[(drawn == number).numpy()])
        return out

    return small, inputs, {"function": view.function, "shadows": fitted}


def with_moments_of_q(view: ReleaseView) -> Callable[[Rows], Tensor]:
    """Rows of the bank, by number, with the mean and deviation that each channel has in φ1(Q)."""
    numbers = np.random.default_rng([view.seed, 5]).permutation(len(view.bank))[:MOMENT_PICTURES]
    mean, deviation = _moments(view.rows(some) for some in batches(np.sort(numbers)))
    wanted_mean, wanted = _moments(view.public_features(MOMENT_PICTURES))
    return lambda rows: (view.rows(rows) - mean) / deviation.clamp_min(1e-6) * wanted + wanted_mean


def _moments(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (1, C, 1, 1)."""
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for batch in features:
        double = batch.double().cpu()  # (n, C, h, w)
        total = total + double.sum(dim=(0, 2, 3))
        squares = squares + double.square().sum(dim=(0, 2, 3))
        count += batch.shape[0] * batch.shape[2] * batch.shape[3]
        device = batch.device
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    return mean.float().to(device)[None, :, None, None], deviation.float().to(device)[None, :, None, None]
