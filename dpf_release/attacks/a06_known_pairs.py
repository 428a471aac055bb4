"""A6: the attacker knows of some pictures which rows they became."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import Budget, HeldPictures, KnownPairs, ReleaseView, batches
from dpf_release.attacks.toolkit.decoder import clean_decoder, decode, disturb, train_decoder
from dpf_release.core.arrays import Rows

PAIRS = (1, 10, 100, 1000)
FEWEST_TO_TRAIN = 100  # pairs, below which a decoder would learn them by heart
PASSES, LEAST_PICTURES = 50, 10_000  # that a decoder is shown: so often each pair, but so many at the least
HELD_OUT, FOLDS = 0.2, 5
STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge, in mean squares of a channel


@register
class KnownPlaintext(Attack):
    """From m pairs of a picture and its row a linear map back to clean features, then a decoder for what that leaves.

    Leakage against m, m = 1, 10, 100, 1000: the first of the same pairs.
    """

    code, title, claim = "A6", "known pairs", None
    view = KnownPairs
    planted = ("weak-noise", "channel-affine", "channel-permutation", "random-convolution")
    of_bank = True

    def trainings(self, budget: Budget) -> float:
        """A decoder for each m of 100 and more, on few pictures."""
        return sum(_pictures_shown(budget, m) for m in PAIRS if m >= FEWEST_TO_TRAIN) / budget.images

    def run(self, view: ReleaseView) -> Reconstructions:
        """The map is followed by A1's first decoder, and from 100 pairs on also by one that is trained on them."""
        assert isinstance(view, KnownPairs)
        decoders, series = {}, {}
        for m in sorted({min(m, len(view.pair_rows)) for m in PAIRS}):
            inverse = fit_inverse(view, m)
            ways = {f"{m} pairs, linear": clean_decoder(view)}
            if m >= FEWEST_TO_TRAIN:
                ways[f"{m} pairs, trained"] = _train(view, m, inverse)
            for name, network in ways.items():
                decoders[name] = decode(view, network, lambda rows, inverse=inverse: inverse(view.rows(rows)))  # type: ignore[misc]
                series[name] = ("pairs", m)
        return Reconstructions(decoders, series=series)


def _pictures_shown(budget: Budget, m: int) -> int:
    return min(budget.bank_images, max(PASSES * m, LEAST_PICTURES))


def _train(view: KnownPairs, m: int, inverse: Callable[[Tensor], Tensor]) -> torch.nn.Module:
    """A1's first decoder, trained on; at the epoch that is best on a fifth of the pairs.

    Pairs take turns with clean features of Q, disturbed: from the pairs alone it would learn their pictures by heart.
    """
    kept = m - round(HELD_OUT * m)
    turns = min(len(view.public), max(kept, 1000))

    def read(numbers: Rows) -> Tensor:
        pictures = view.public.read(numbers // 2)
        of_pair = np.flatnonzero(numbers % 2)
        if len(of_pair):
            pictures = pictures.clone()
            pictures[of_pair] = view.pictures.read(numbers[of_pair] // 2 % kept)
        return pictures

    def inputs(held: HeldPictures, numbers: Rows, generator: np.random.Generator | None) -> Tensor:
        if generator is None:  # of `public_val`
            return inverse(view.rows(view.pair_rows[kept + numbers]))
        features = disturb(view.features_of(held, numbers), generator)
        of_pair = np.flatnonzero(numbers % 2)
        if len(of_pair):
            features[of_pair] = inverse(view.rows(view.pair_rows[numbers[of_pair] // 2 % kept]))
        return features

    held_out = HeldPictures(m - kept, lambda numbers: view.pictures.read(kept + numbers))
    pairs = replace(view, public=HeldPictures(2 * turns, read), public_val=held_out)
    subject = {"bank": view.bank_subject, "pairs": view.pair_rows[:m].tolist()}
    start, images = clean_decoder(view).state_dict(), _pictures_shown(view.budget, m)
    name, shape = f"A6 {m} pairs", view.feature_shape
    return train_decoder(pairs, name, inputs, depends_on=subject, start=start, images=images, shape=shape)


# --------------------------------------------------------------------------------------------- the linear map


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums over places: of a row's channels (and a one) times themselves and times clean ones, and of clean squares."""

    rows: Tensor  # (C + 1, C + 1)
    both: Tensor  # (C + 1, C)
    clean: float

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.rows + other.rows, self.both + other.both, self.clean + other.clean)

    def map(self, strength: float, prior: float) -> Tensor:
        """Ridge towards `prior` times the identity, (C + 1, C)."""
        size = len(self.rows)
        towards = prior * torch.eye(size, size - 1, dtype=self.rows.dtype)
        weight = strength * self.rows.diagonal()[:-1].mean() + 1e-9
        penalty = weight * torch.eye(size, dtype=self.rows.dtype)
        return torch.linalg.solve(self.rows + penalty, self.both + weight * towards)

    def error(self, weights: Tensor) -> float:
        """The sum of squares that a map leaves."""
        fitted = (weights * (self.rows @ weights)).sum() - 2 * (weights * self.both).sum()
        return float(fitted) + self.clean


def fit_inverse(view: KnownPairs, m: int) -> Callable[[Tensor], Tensor]:
    """A 1×1 convolution from rows of the bank to clean features, from the first m pairs: features → features.

    Strength of the ridge, and whether it draws to zero or to the identity, by cross-validation: over pairs, and where
    there are fewer than five, over bands of places.
    """
    folds = _fold_moments(view, m)

    def left(strength: float, prior: float) -> float:
        others = [reduce(add, (fold for fold in folds if fold is not out)) for out in folds]
        return sum(out.error(other.map(strength, prior)) for out, other in zip(folds, others, strict=True))

    strength, prior = min(((s, p) for s in STRENGTHS for p in (0.0, 1.0)), key=lambda choice: left(*choice))
    weights = reduce(add, folds).map(strength, prior).float().to(view.device)

    def inverse(rows: Tensor) -> Tensor:
        mapped = torch.nn.functional.conv2d(rows, weights[:-1].T[:, :, None, None], weights[-1])
        return (mapped.relu() if view.non_negative else mapped).contiguous(memory_format=torch.channels_last)

    return inverse


def _fold_moments(view: KnownPairs, m: int) -> list[_Moments]:
    channels, dtype = view.feature_shape[0], torch.float64
    nothing = torch.zeros(channels + 1, channels + 1, dtype=dtype), torch.zeros(channels + 1, channels, dtype=dtype)
    folds = [_Moments(*nothing, 0.0) for _ in range(FOLDS)]
    for numbers in batches(np.arange(m)):
        rows, clean = view.rows(view.pair_rows[numbers]), view.features_of(view.pictures, numbers)
        places = rows.shape[2] * rows.shape[3]
        by_place = np.arange(places) * FOLDS // places
        fold_of = np.repeat(numbers % FOLDS, places) if m >= FOLDS else np.tile(by_place, len(numbers))
        flat_rows = rows.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()  # (n·h·w, C)
        flat_rows = torch.cat([flat_rows, torch.ones_like(flat_rows[:, :1])], dim=1)
        flat_clean = clean.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
        for fold in np.unique(fold_of):
            mine = torch.from_numpy(fold_of == fold)
            b, x = flat_rows[mine], flat_clean[mine]
            folds[fold] += _Moments(b.T @ b, b.T @ x, float(x.square().sum()))
    return folds
