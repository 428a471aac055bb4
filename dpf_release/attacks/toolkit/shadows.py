"""Shadow functions: poisoning functions that an attacker fits on Q, and what a decoder learns from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from dpf_release.attacks.interface import ATTACKS
from dpf_release.attacks.threat_models import HeldPictures, HeldRows, ReleaseView, batches
from dpf_release.attacks.toolkit.clean_decoders import DECODERS, clean_decoder
from dpf_release.attacks.toolkit.decoder import LEARNING_RATE, VALIDATION_PICTURES, Inputs
from dpf_release.attacks.toolkit.poisoned_public import Poison, PoisonedPublic, poisoned_public, with_room
from dpf_release.attacks.toolkit.trained import freeze_on, recipe_for, schedule, seeded
from dpf_release.bank.rows import ComputedRows
from dpf_release.core.arrays import Rows
from dpf_release.models.training import Recipe
from dpf_release.poisoning.chain import Chain, build_chain
from dpf_release.poisoning.context import Material, Split
from dpf_release.poisoning.fitting import fit_chain
from dpf_release.poisoning.objective import Adversaries, TaskLoss
from dpf_release.poisoning.plan import FeatureSpec

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
    """The recipe of the `dpf` shadow function of that number; the first has the tool's own defaults."""
    return ShadowRecipe(
        ("dpf", "dpf", "dpf:depth=2", "dpf")[number % 4],
        ("equivalence", "paper", "equivalence")[number % 3],
        (1.0, 1.0, 0.3, 3.0, 0.1)[number % 5],
        number % max(1, min(decoders, len(DECODERS))),
        int(np.random.default_rng([seed, 3, number]).integers(2**62)),
    )


def own_kind_recipe(view: ReleaseView, number: int) -> ShadowRecipe:
    """The recipe of the shadow function of that number of P's own kind: the first has P's parameters, others vary them.

    Raises:
        ConfigError: there is no such function any more.
    """
    recipe = shadow_recipe(number, view.budget.decoders, view.seed)
    chain = build_chain(view.function, _features(view))
    return replace(recipe, function=chain.varied(np.random.default_rng(recipe.seed)) if number else chain.spec)


# --------------------------------------------------------------------------------------------- shadow functions


def shadow(view: ReleaseView, number: int) -> nn.Module:
    """The `dpf` of that number, fitted on Q as the owner fits P on S; frozen: features → features."""
    recipe = shadow_recipe(number, view.budget.decoders, view.seed)
    (network,) = fitted_on_public(view, f"A3 shadow {number}", recipe).networks()
    return network


def fitted_on_public(view: ReleaseView, name: str, recipe: ShadowRecipe) -> Chain:
    """A function of any kind, fitted on Q as the owner fits P on S, its networks frozen; or as it was kept.

    Labels of Q are what φ2 makes of it.

    Raises:
        ConfigError: it cannot be fitted on Q.
    """
    budget = max(1, round(view.budget.images * SHARE))
    training, rows = recipe_for(view, budget, len(view.public), LEARNING_RATE)
    subject = {
        **view.subject,
        "name": name,
        "version": ATTACKS["A3"].version,
        "rows": rows,
        "epochs": training.epochs,
        "depends_on": asdict(recipe),
    }
    with seeded(recipe.seed):
        chain = build_chain(recipe.function, _features(view))
    if code := chain.outside_code():
        subject["code"] = code
    kept = view.kept.load(name, subject)
    if kept is not None:
        chain.load(kept)
    elif chain.learns:
        material = _material(view, name, recipe, replace(training, seed=recipe.seed), rows, subject)
        _, _, histories = fit_chain(chain, material)
        if state := chain.state():
            view.kept.save(name, subject, state)
        for path in filter(None, map(material.checkpoint, histories)):
            path.unlink(missing_ok=True)
    for network in chain.networks():
        freeze_on(network, view)
    return chain


def _material(
    view: ReleaseView, name: str, recipe: ShadowRecipe, training: Recipe, rows: int, subject: Mapping[str, Any]
) -> Material:
    train = _labelled(view, view.public, rows)
    return Material(
        features=_features(view),
        phi_1=view.phi_1,
        phi_2=view.phi_2,
        task=TaskLoss(_scale(view)),
        train=train,
        val=_labelled(view, view.public_val, min(len(view.public_val), VALIDATION_PICTURES)),
        public=train.rows,
        adversaries=lambda: Adversaries({"psi": clean_decoder(view, recipe.straw_man)}),
        objective=recipe.objective,
        lambda_=recipe.lambda_,
        recipe=training,
        secret=hashlib.sha256(f"shadow {recipe.seed}".encode()).digest(),
        device=view.device,
        title=f"Training {name}",
        subject=json.dumps(subject, sort_keys=True),
        checkpoint=lambda training: view.kept.checkpoint(f"{name} {training}".strip(), subject),
    )


def _labelled(view: ReleaseView, held: HeldPictures, count: int) -> Split:
    """φ1 of pictures of Q, with the labels that φ2 gives them."""

    def features(rows: Rows) -> NDArray[np.float32]:
        found: NDArray[np.float32] = view.features_of(held, rows).cpu().numpy()
        return found

    answers = torch.cat([view.answers(view.features_of(held, some)).cpu() for some in batches(np.arange(count))])
    labels = answers if view.task == "regression" else answers.argmax(1)
    return Split(ComputedRows(labels.numpy(), features), held.read)


def _features(view: ReleaseView) -> FeatureSpec:
    return FeatureSpec(view.feature_shape, view.non_negative)


def _scale(view: ReleaseView) -> Tensor | None:
    """Standard deviations of regression targets: those of φ2's answers on Q."""
    if view.task != "regression":
        return None
    count = min(len(view.public), MOMENT_PICTURES)
    numbers = np.arange(count)
    answers = torch.cat([view.answers(view.features_of(view.public, some)).cpu() for some in batches(numbers)])
    return answers.std(dim=0, correction=0) + 1e-6


@dataclass(frozen=True, eq=False)
class OwnKind:
    """What a decoder sees of P's own kind.

    Attributes:
        view: with as many pictures of Q as there are such rows of: what a decoder of them is trained on.
        inputs: pictures of Q → their rows, each under one of the functions, drawn anew.
        depends_on: recipes and code of the functions.
    """

    view: ReleaseView
    inputs: Inputs
    depends_on: dict[str, Any]


def of_its_own_kind(view: ReleaseView) -> OwnKind | None:
    """Shadow functions of P's own kind; None where P is `dpf` as A3's others are, or not known.

    Each is planned for Q as a bank of the attacker's, whose labels are φ2's answers.

    Raises:
        ConfigError: P's kind cannot be fitted on Q.
        NotGrantedError: Q has no class that is large enough for it.
    """
    if view.function in ("", "dpf"):
        return None
    _, rows = schedule(view.budget.images, len(view.public))
    small = with_room(view, rows, view.budget.shadows)
    banks: list[PoisonedPublic] = []
    fitted: list[Any] = []
    for number in range(view.budget.shadows):
        recipe = own_kind_recipe(view, number)
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

    return OwnKind(small, inputs, {"function": view.function, "shadows": fitted})


def own_kind_cost(function: str, learns: bool, shadows: int) -> float:
    """What `of_its_own_kind` and its decoder cost, in trainings of a decoder."""
    return 0.0 if function in ("", "dpf") else 1 + learns * shadows * SHARE * STEP_COST


def poison_with(chain: Chain, phi_2: nn.Module, seed: str) -> Poison:
    """P on a bank of the attacker's, under a plan for that bank; what it learned, and fixed numbers, are P's own."""

    def poison(rows: HeldRows) -> tuple[HeldRows, Rows]:
        source, numbers = ComputedRows(rows.targets, rows.read), np.arange(len(rows))
        plans = chain.plan(source, phi_2, hashlib.sha256(seed.encode()).digest())
        poisoned = chain.on(source, plans)
        return HeldRows(poisoned.targets, poisoned.read), chain.contributors(numbers, plans).foremost(numbers)

    return poison


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
