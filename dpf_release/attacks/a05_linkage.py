"""A5: whose picture is in the release, and which row it is. For someone who holds pictures and wants to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.attacks.interface import Attack, Likeness, Links, register
from dpf_release.attacks.threat_models import BATCH, Budget, QueryImages, ReleaseView, batches
from dpf_release.attacks.toolkit.coefficients import space_of
from dpf_release.attacks.toolkit.decoder import disturb
from dpf_release.attacks.toolkit.taps import open_taps
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained
from dpf_release.core.arrays import Rows
from dpf_release.poisoning.chain import draws_rows

SAMPLE_ROWS = 512  # of a class, from which its mean and the typical distance of a piece are estimated
PUBLIC_PICTURES = 500  # of Q, that nobody's likeness is compared with
NUMBERS_AT_ONCE = 2**25  # of the queries' features, at most; more queries take another pass over the bank
COPY = 1e-3  # of the typical squared distance: as near as this is a copy
LEARNING_RATE, TEMPERATURE = 2e-3, 0.1  # of the matcher
Measure = Literal["cosine", "either sign", "evidence"]
Vectors = Callable[[Tensor], list[Tensor]]  # features (n, C, h, w) → (n, d) for each piece


@dataclass(frozen=True, eq=False)
class Look:
    """One way of looking at features."""

    of_picture: Vectors  # of queries' own
    of_row: Vectors  # of the bank's
    # likeness is the cosine around the mean; or its absolute value, on average over pieces: a P that turns signs, or
    # scales and shifts pieces, changes nothing in it; or the evidence of copies, summed over pieces
    measure: Measure = "evidence"


@dataclass(eq=False)
class Seen:
    """What one look showed of the queries of a class."""

    vectors: list[Tensor]  # of the queries
    scales: list[Tensor]  # typical squared distance of each piece of each query to a row, (n, 1)
    means: list[tuple[Tensor, Tensor]]  # of queries and of rows, piece by piece; what the cosine is around
    pools: Tensor  # (n, M) likeness of query and row of its pool
    highest: Tensor  # (n,) over all rows of the class
    highest_public: Tensor  # (n,) over Q
    nearest: Tensor  # (pieces, n) the highest that each piece alone contributes, over all rows of the class
    sums: Tensor  # of likenesses and of their squares, (2, n)
    rows: int = 0


@register
class Linkage(Attack):
    """The query's features against the rows of its class: as they are, inside φ2, its answers, piece by piece."""

    code, title, profile, claim, version = "A5", "linkage, membership", "quick", "linkage", 2
    view, answers = QueryImages, Links

    def trainings(self, budget: Budget) -> float:
        """A matcher, from `standard` on."""
        return float(budget.decoders > 1)

    def run(self, view: ReleaseView) -> Links:
        """Each way of looking, and all together.

        On membership each says three things: how alike the nearest row is, how much so for its class, how much more so
        than a picture of Q. Pieces say a fourth: how near each one's nearest is, in whatever row.
        """
        assert isinstance(view, QueryImages)
        looks = all_looks(view)
        names = [*looks, "all together"]
        pools = {name: np.zeros(view.pools.shape, np.float32) for name in names}
        copies = {name: np.zeros(len(view.pictures), np.float32) for name in looks}
        member = {name: np.zeros((3, len(view.pictures)), np.float32) for name in names}
        for queries, rows in _classes(view):
            for name, seen in _look_at(view, looks, queries, rows).items():
                mean, deviation = _moments(seen)
                pools[name][queries] = seen.pools.cpu().numpy()
                against = (seen.highest, (seen.highest - mean) / deviation, seen.highest - seen.highest_public)
                member[name][:, queries] = torch.stack(against).cpu().numpy()
                if len(seen.vectors) > 1:  # pieces, of which each may have gone into another row
                    copies[name][queries] = seen.nearest.sum(0).cpu().numpy()
                pools["all together"][queries] += ((seen.pools - mean[:, None]) / deviation[:, None]).cpu().numpy()
        for name in looks:
            scores = member[name]
            member["all together"] += (scores - scores.mean(1, keepdims=True)) / (scores.std(1, keepdims=True) + 1e-9)
        ways = {name: Likeness(pools[name], member[name][0]) for name in names}
        for number, compared in enumerate(("its class", "Q"), start=1):
            ways |= {f"{name}, against {compared}": Likeness(None, member[name][number]) for name in names}
        ways |= {f"{name}, the nearest of each": Likeness(None, copies[name]) for name in looks if copies[name].any()}
        return Links(ways)


def all_looks(view: ReleaseView) -> dict[str, Look]:
    """The ways of looking, by name."""

    def both(vectors: Vectors, measure: Measure = "evidence") -> Look:
        return Look(vectors, vectors, measure)

    def answers(features: Tensor) -> list[Tensor]:
        out = view.answers(features)
        return [F.log_softmax(out, dim=1) if view.task == "classification" else out]

    def whole(features: Tensor) -> list[Tensor]:
        return [features.flatten(1)]

    def channels(features: Tensor) -> list[Tensor]:
        return list(features.flatten(2).unbind(1))

    @lru_cache(maxsize=1)  # all blocks are asked about the same features, one after the other
    def blocks(features: Tensor) -> list[Tensor]:
        return [tap.flatten(1) for tap in taps.of(features)]

    def block(number: int) -> Vectors:
        return lambda features: [blocks(features)[number]]

    taps = open_taps(view)
    looks = {
        "features": both(whole, "cosine"),
        "features, either sign": both(whole, "either sign"),
        **{f"block {number + 1} of {len(taps)}": both(block(number), "cosine") for number in range(len(taps))},
        "answers": both(answers),
        "channels": both(channels),
        "channels, either sign": both(channels, "either sign"),
        "patches": both(patches),
    }
    if draws_rows(view.function):
        coefficients = lru_cache(maxsize=1)(_coefficients(view))
        looks["coefficients"] = both(coefficients, "cosine")
        looks["coefficients, distance"] = both(coefficients)
    if view.budget.decoders > 1:  # from `standard` on
        of_picture, of_row = train_matcher(view)
        looks["learned matcher"] = Look(lambda features: [of_picture(features)], lambda rows: [of_row(rows)], "cosine")
    return looks


def _coefficients(view: ReleaseView) -> Vectors:
    """Features → their coordinates in the components that rows were drawn in, in deviations of Q."""
    space = space_of(view)
    return lambda features: [space.whitened(space.of_rows(features)).to(features.device)]


def patches(features: Tensor, size: int = 2) -> list[Tensor]:
    """The windows of `size` × `size` places, (n, C·size²) each; at the border what there is."""
    height, width = features.shape[2:]
    return [
        features[:, :, y : y + size, x : x + size].flatten(1)
        for y in range(0, height, size)
        for x in range(0, width, size)
    ]


def _classes(view: QueryImages) -> Iterator[tuple[Rows, Rows]]:
    """Queries of one class, not too many at once, and all rows of that class."""
    most = max(64, NUMBERS_AT_ONCE // int(np.prod(view.feature_shape)))
    for label in np.unique(view.labels):
        queries = np.flatnonzero(view.labels == label)
        for first in range(0, len(queries), most):
            yield queries[first : first + most], np.flatnonzero(view.bins == label)


def _look_at(view: QueryImages, looks: dict[str, Look], queries: Rows, rows: Rows) -> dict[str, Seen]:
    """One pass over the rows of a class, and one over a part of Q, for all ways of looking."""
    sample = np.sort(np.random.default_rng(view.seed).permutation(rows)[:SAMPLE_ROWS])
    asked = [view.features_of(view.pictures, some) for some in batches(queries)]
    seen = {name: _begin(view, look, asked, queries, sample) for name, look in looks.items()}
    pools = torch.from_numpy(view.pools[queries])
    for batch in batches(rows):
        features = view.rows(batch)
        place = torch.searchsorted(torch.from_numpy(batch), pools).clamp_max(len(batch) - 1)
        here = (torch.from_numpy(batch)[place] == pools).to(view.device)
        place = place.to(view.device)
        for name, look in looks.items():
            of = seen[name]
            likeness, nearest = _likeness(look, of, look.of_row(features))
            of.nearest = torch.maximum(of.nearest, nearest)
            of.pools = torch.where(here, likeness.gather(1, place), of.pools)
            of.highest = torch.maximum(of.highest, likeness.amax(1))
            of.sums = of.sums + torch.stack([likeness.sum(1), likeness.square().sum(1)])
            of.rows += len(batch)
    for features in view.public_features(PUBLIC_PICTURES):
        for name, look in looks.items():
            likeness, _ = _likeness(look, seen[name], look.of_picture(features), public=True)
            seen[name].highest_public = torch.maximum(seen[name].highest_public, likeness.amax(1))
    return seen


def _begin(view: QueryImages, look: Look, asked: Sequence[Tensor], queries: Rows, sample: Rows) -> Seen:
    """A look at the queries, whose features are given, and what is typical of the class."""
    parts = [look.of_picture(features) for features in asked]
    vectors = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    sums = [torch.zeros_like(piece[0]) for piece in vectors]
    scales = [torch.zeros_like(piece[:, :1]) for piece in vectors]
    for some in batches(sample):
        for number, row in enumerate(look.of_row(view.rows(some))):
            sums[number] += row.sum(0)
            scales[number] += _distances(vectors[number], row).sum(1, keepdim=True) / len(sample)
    means = [(piece.mean(0), total / len(sample)) for piece, total in zip(vectors, sums, strict=True)]
    none = torch.full((len(queries),), -torch.inf, device=view.device)
    pools = torch.full((len(queries), view.pools.shape[1]), -torch.inf, device=view.device)
    nearest = none.expand(len(vectors), -1)
    return Seen(vectors, scales, means, pools, none, none, nearest, torch.zeros(2, len(queries), device=view.device))


def _likeness(look: Look, seen: Seen, rows: list[Tensor], *, public: bool = False) -> tuple[Tensor, Tensor]:
    """(n, m) of each query and each of some rows, or of some pictures of Q; (pieces, n) of each piece."""
    total = torch.zeros(len(seen.vectors[0]), len(rows[0]), device=rows[0].device)
    highest = []
    for own, row, scale, (mean, mean_of_rows) in zip(seen.vectors, rows, seen.scales, seen.means, strict=True):
        if look.measure == "evidence":
            likeness = -torch.log(_distances(own, row) / scale.clamp_min(1e-12) + COPY)
        else:
            other = row - (mean if public else mean_of_rows)
            likeness = F.normalize(own - mean, dim=1) @ F.normalize(other, dim=1).T
            likeness = likeness.abs() if look.measure == "either sign" else likeness
        highest.append(likeness.amax(1))
        total += likeness if look.measure == "evidence" else likeness / len(rows)
    return total, torch.stack(highest)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Squared, (n, m) of vectors (n, d) and (m, d)."""
    return (one.square().sum(1)[:, None] + other.square().sum(1)[None] - 2 * (one @ other.T)).clamp_min(0)


def _moments(seen: Seen) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each query's likeness to the rows of its class."""
    mean, square = seen.sums / seen.rows
    return mean, (square - mean.square()).clamp_min(1e-12).sqrt()


# --------------------------------------------------------------------------------------------- the learned matcher


class _Embedding(nn.Sequential):
    """Features (n, C, h, w) → unit vectors (n, 128)."""

    def __init__(self, channels: int, height: int) -> None:
        stride = 2 if height >= 8 else 1
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),  # (n, 128, 4, 4) -> (n, 2048)
            nn.Linear(2048, 128),
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(super().forward(features).float(), dim=1)


def train_matcher(view: ReleaseView) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Embeddings of a query's features and of rows, trained on Q so that pairs are near (a contrastive loss).

    A row of the training is the clean one with noise, channels scaled and dropped (`decoder.disturb`), and up to
    three quarters of its places taken from other pictures.
    """
    channels, height, _ = view.feature_shape
    with seeded(view.seed):
        network = nn.ModuleDict({"picture": _Embedding(channels, height), "row": _Embedding(channels, height)})

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        features = view.features_of(view.public, chosen)
        return features, poisoned_somehow(features, generator)

    def validate() -> float:
        features = view.features_of(view.public_val, np.arange(min(len(view.public_val), BATCH)))
        other = poisoned_somehow(features, np.random.default_rng(view.seed))
        return float(_contrast(network, (features, other))["loss"])

    recipe = recipe_for(view, view.budget.images, len(view.public), LEARNING_RATE)
    trained(view, "A5 matcher", network, read_batch, _contrast, *recipe, "Training the matcher", validate)
    return network["picture"], network["row"]


def poisoned_somehow(features: Tensor, generator: np.random.Generator) -> Tensor:
    """Features as some poisoning function might leave them; other pictures of the batch lend the places."""
    count, _, height, width = features.shape
    draws = torch.Generator(features.device).manual_seed(int(generator.integers(2**62)))
    half = (-(-height // 2), -(-width // 2))
    share = 0.75 * torch.rand(count, 1, 1, 1, generator=draws, device=features.device)
    windows = torch.rand(count, 1, *half, generator=draws, device=features.device) < share
    lent = F.interpolate(windows.float(), scale_factor=2)[:, :, :height, :width]  # 2×2 places at once
    order = torch.randperm(count, generator=draws, device=features.device)
    return disturb(features * (1 - lent) + features[order] * lent, generator)


def _contrast(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    assert isinstance(network, nn.ModuleDict)
    scores = network["picture"](batch[0]) @ network["row"](batch[1]).T / TEMPERATURE
    own = torch.arange(len(scores), device=scores.device)
    loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    return {"loss": loss, "top1": (scores.argmax(1) == own).float().mean()}
