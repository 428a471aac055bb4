"""Shadow functions: poisoning functions that an attacker fits on Q, and what a decoder learns from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from dpf_release.attacks.interface import ATTACKS
from dpf_release.attacks.threat_models import HeldPictures, HeldRows, ReleaseView, batches
from dpf_release.attacks.toolkit.decoder import DECODERS, LEARNING_RATE, VALIDATION_PICTURES, Inputs, clean_decoder
from dpf_release.attacks.toolkit.poisoned_public import Poison
from dpf_release.attacks.toolkit.trained import freeze_on, recipe_for, seeded
from dpf_release.bank.rows import ComputedRows, Select
from dpf_release.core.arrays import Rows
from dpf_release.models.training import Recipe
from dpf_release.poisoning.chain import Chain, build_chain, draws_rows, fit_chain
from dpf_release.poisoning.context import Material, Split
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
    subject = {**view.subject, "name": name, "version": ATTACKS["A3"].version, "rows": rows}
    subject |= {"epochs": training.epochs, "depends_on": asdict(recipe)}
    with seeded(recipe.seed):
        chain = build_chain(recipe.function, FeatureSpec(view.feature_shape, view.non_negative))
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
    train, scale = _labelled(view, view.public, rows), None
    others = train
    if draws_rows(recipe.function):  # as the owner's S and Q, the attacker's two share no image
        train, others = (_part(train, numbers) for numbers in np.array_split(np.arange(rows), 2))
    if view.task == "regression":  # standard deviations of the targets: those of φ2's answers on Q
        count = min(len(view.public), MOMENT_PICTURES)
        scale = _answers(view, view.public, count).std(dim=0, correction=0) + 1e-6
    return Material(
        features=FeatureSpec(view.feature_shape, view.non_negative),
        phi_1=view.phi_1,
        phi_2=view.phi_2,
        task=TaskLoss(scale),
        train=train,
        val=_labelled(view, view.public_val, min(len(view.public_val), VALIDATION_PICTURES)),
        public=others,
        outputs=_answers(view, view.public, 1).shape[1],
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
    answers = _answers(view, held, count)
    labels = answers if view.task == "regression" else answers.argmax(1)
    rows = ComputedRows(labels.numpy(), lambda rows: view.features_of(held, rows).cpu().numpy())
    return Split(rows, held.read)


def _part(split: Split, numbers: Rows) -> Split:
    return Split(Select(split.rows, numbers), lambda rows: split.images(numbers[rows]))


def _answers(view: ReleaseView, held: HeldPictures, count: int) -> Tensor:
    return torch.cat([view.answers(view.features_of(held, some)).cpu() for some in batches(np.arange(count))])


def own_kind_cost(function: str, learns: bool, shadows: int) -> float:
    """What A3's functions of P's own kind and their decoder cost, in trainings of a decoder."""
    return 0.0 if function in ("", "dpf") else 1 + learns * shadows * SHARE * STEP_COST


def poison_with(chain: Chain, phi_2: nn.Module, seed: str) -> Poison:
    """P on a bank of the attacker's, under a plan for that bank; what it learned, and fixed numbers, are P's own."""

    def poison(rows: HeldRows) -> tuple[HeldRows, Rows]:
        source, numbers = ComputedRows(rows.targets, rows.read), np.arange(len(rows))
        plans = chain.plan(source, phi_2, hashlib.sha256(seed.encode()).digest())
        poisoned = chain.on(source, plans)
        return HeldRows(poisoned.targets, poisoned.read), chain.contributors(numbers, plans).foremost(numbers)

    return poison


def union(view: ReleaseView, shadows: Sequence[nn.Module]) -> Inputs:
    """Clean features of Q, each row through a function drawn anew.

    One of the shadow functions, the identity, a random affine map (channels times 0.5 to 2, plus up to one unit), or
    noise or a blur as the stationary functions have them, all alike often.
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
                scale, shift = torch.rand((2, len(mine), out.shape[1], 1, 1), generator=draws, device=out.device)
                out[mine] = features[mine] * 2 ** (2 * scale - 1) + shift
            elif number == len(shadows) + 1:
                out[mine] = _stationary(features[mine], int(generator.integers(3)), draws)
        return out.contiguous(memory_format=torch.channels_last)

    return inputs


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
