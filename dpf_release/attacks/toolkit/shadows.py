"""Shadow functions: poisoning functions that an attacker fits on Q, and what a decoder learns from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from dpf_release.attacks.threat_models import HeldPictures, ReleaseView, batches
from dpf_release.attacks.toolkit.clean_decoders import DECODERS, clean_decoder
from dpf_release.attacks.toolkit.decoder import LEARNING_RATE, VALIDATION_PICTURES, Inputs
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained
from dpf_release.core.arrays import Rows
from dpf_release.poisoning.chain import build_chain
from dpf_release.poisoning.interface import FeatureSpec
from dpf_release.poisoning.objective import Objective, TaskLoss

STEP_COST = 1.5  # a step of a shadow function, in steps of a decoder
SHARE = 0.5  # of the pictures that a decoder is shown, those that a shadow function is
MOMENT_PICTURES = 5000  # that per-channel moments are taken of


@dataclass(frozen=True)
class ShadowRecipe:
    """How one P' is fitted: what the attacker cannot know of P, he varies."""

    function: str
    objective: Literal["equivalence", "paper"]
    lambda_: float
    straw_man: int
    seed: int


def shadow_recipe(number: int, decoders: int, seed: int) -> ShadowRecipe:
    """The recipe of the shadow function of that number; the first has the tool's own defaults."""
    return ShadowRecipe(
        ("dpf", "dpf", "dpf:depth=2", "dpf")[number % 4],
        ("equivalence", "paper", "equivalence")[number % 3],
        (1.0, 1.0, 0.3, 3.0, 0.1)[number % 5],
        number % max(1, min(decoders, len(DECODERS))),
        int(np.random.default_rng([seed, 3, number]).integers(2**62)),
    )


# --------------------------------------------------------------------------------------------- shadow functions


def shadow(view: ReleaseView, number: int) -> nn.Module:
    """P' of that number, fitted on Q as the owner fits P on S; frozen."""
    recipe = shadow_recipe(number, view.budget.decoders, view.seed)
    with seeded(recipe.seed):
        network = build_chain(recipe.function, FeatureSpec(view.feature_shape, view.non_negative)).learned
    assert network is not None
    objective = Objective(
        view.phi_2,
        TaskLoss(_scale(view)),
        {"psi": clean_decoder(view, recipe.straw_man)},
        {},
        recipe.objective == "equivalence",
        recipe.lambda_,
    )

    def batch_of(held: HeldPictures, rows: Rows) -> tuple[Tensor, ...]:
        features = view.features_of(held, rows)
        answers = view.answers(features)
        labels = answers if view.task == "regression" else answers.argmax(1)
        return features, features, labels, torch.arange(len(features)), held.read(rows)

    def validate() -> float:
        count, total = min(len(view.public_val), VALIDATION_PICTURES), 0.0
        for some in batches(np.arange(count)):
            batch = tuple(tensor.to(view.device) for tensor in batch_of(view.public_val, some))
            total += float(objective(network, batch)["loss"]) * len(some)
        return total / count

    fitting, rows = recipe_for(view, max(1, round(view.budget.images * SHARE)), len(view.public), LEARNING_RATE)
    return trained(
        view,
        f"A3 shadow {number}",
        network,
        lambda chosen, _: batch_of(view.public, chosen),
        objective,
        replace(fitting, seed=recipe.seed),
        rows,
        title=f"Training the shadow function {number + 1}",
        validate=validate,
        depends_on=asdict(recipe),
    )


def _scale(view: ReleaseView) -> Tensor | None:
    """Standard deviations of regression targets: those of φ2's answers on Q."""
    if view.task != "regression":
        return None
    count = min(len(view.public), MOMENT_PICTURES)
    numbers = np.arange(count)
    answers = torch.cat([view.answers(view.features_of(view.public, some)).cpu() for some in batches(numbers)])
    return answers.std(dim=0, correction=0) + 1e-6


# --------------------------------------------------------------------------------------------- what a decoder sees


def union(view: ReleaseView, shadows: Sequence[nn.Module]) -> Inputs:
    """Clean features of Q, each row through a function drawn anew.

    One of the shadow functions, the identity, a random per-channel affine map, or noise or a blur as the stationary
    functions have them, all alike often.
    """

    def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
        generator = generator or np.random.default_rng([view.seed, 4, int(rows[0])])
        features = view.features_of(held, rows)
        drawn = generator.integers(len(shadows) + 3, size=len(features))
        draws = torch.Generator(view.device).manual_seed(int(generator.integers(2**62)))
        out = features.clone()
        for number in np.unique(drawn):
            mine = torch.from_numpy(np.flatnonzero(drawn == number)).to(view.device)
            if number < len(shadows):
                out[mine] = shadows[number](features[mine])
            elif number == len(shadows):
                out[mine] = _affine(features[mine], draws)
            elif number == len(shadows) + 1:
                out[mine] = _stationary(features[mine], int(generator.integers(3)), draws)
        return out.contiguous(memory_format=torch.channels_last)

    return inputs


def _affine(features: Tensor, draws: torch.Generator) -> Tensor:
    """Each channel of each row times 0.5 to 2, plus up to one unit."""
    scale, shift = torch.rand((2, *features.shape[:2], 1, 1), generator=draws, device=features.device)
    return features * 2 ** (2 * scale - 1) + shift


def _stationary(features: Tensor, kind: int, draws: torch.Generator) -> Tensor:
    """Noise of up to one deviation of the row; the mean over 3×3; a Gaussian of one place."""
    if kind == 0 or min(features.shape[2:]) < 3:
        noise = torch.randn(features.shape, generator=draws, device=features.device)
        scale = torch.rand((len(features), 1, 1, 1), generator=draws, device=features.device)
        return features + scale * features.std(dim=(1, 2, 3), keepdim=True) * noise
    if kind == 1:
        return F.avg_pool2d(features, 3, 1, 1, count_include_pad=False)
    blurred: Tensor = gaussian_blur(features, [5, 5], [1.0, 1.0])
    return blurred


def with_moments_of_q(view: ReleaseView) -> Callable[[Rows], Tensor]:
    """Rows of the bank, by number, with the mean and deviation that each channel has in φ1(Q)."""
    numbers = np.random.default_rng([view.seed, 5]).permutation(len(view.bank))[:MOMENT_PICTURES]
    mean, deviation = _moments(view.rows(some) for some in batches(np.sort(numbers)))
    public = np.arange(min(len(view.public), MOMENT_PICTURES))
    wanted_mean, wanted = _moments(view.features_of(view.public, some) for some in batches(public))

    def rows(numbers: Rows) -> Tensor:
        return (view.rows(numbers) - mean) / deviation.clamp_min(1e-6) * wanted + wanted_mean

    return rows


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
