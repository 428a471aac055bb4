"""Rows that were put together from pieces of others: which rows swapped pieces, and which pieces fit each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from dpf_release.attacks.threat_models import BATCH, HeldPictures, HeldRows, ReleaseView, batches
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained
from dpf_release.core.arrays import Rows

KEYS = 2**25  # places of all rows that are looked at for copies
NATURAL = 0.01  # share of Q's pictures that have a twin at a place, above which a copy says nothing
NATURAL_PICTURES = 4096  # of Q, that this is looked up in
MOST_COPIES = 200  # of a place; what is there more often is a background
WHOLE = 0.95  # share of windows that must have been copied whole for pieces of their size
PATCH = 2  # where nothing was copied
LEARNING_RATE, WIDTH = 2e-3, 64


def find_swaps(view: ReleaseView) -> tuple[Rows, int]:
    """Rows of one class that have bitwise the same features at the same place, where pictures of Q do not.

    A function that puts rows together from pieces draws some piece several times: two rows of a group of k share one
    place of k. What follows such a function hides that, unless it works place by place.

    Returns:
        (N,) rows that hang together by exact copies have the same number; and the side of a piece.
    """
    _, height, width = view.feature_shape
    seen = max(1, min(height * width, KEYS // len(view.bank)))
    places = np.unique(np.linspace(0, height * width - 1, seen).round().astype(np.int64))
    telling = places[_twins(view, places) <= NATURAL]
    keys = _keys(view.bank, telling)
    classes = view.bank.targets if view.task == "classification" else np.zeros(len(keys), np.int64)
    found = [np.empty((2, 0), np.int64)]
    for column in keys.T:
        order = np.lexsort((column, classes))
        same = (column[order][1:] == column[order][:-1]) & (classes[order][1:] == classes[order][:-1])
        run = np.concatenate([[0], np.cumsum(~same)])
        linked = same & (np.bincount(run)[run[1:]] <= MOST_COPIES)
        found.append(np.stack([order[:-1][linked], order[1:][linked]]))
    pairs = np.concatenate(found, axis=1)
    ones = np.ones(pairs.shape[1], np.int8)
    _, group = connected_components(coo_matrix((ones, (pairs[0], pairs[1])), shape=(len(keys),) * 2), directed=False)
    some = pairs[:, np.random.default_rng([view.seed, 11]).permutation(pairs.shape[1])[:NATURAL_PICTURES]]
    return group.astype(np.int64), _patch(view, some, telling)


def _twins(view: ReleaseView, places: Rows) -> NDArray[np.float64]:
    """The share of Q's pictures whose features at a place another picture has too, for each place."""
    count = min(len(view.public), NATURAL_PICTURES)
    public = HeldRows(np.zeros(count), lambda rows: view.features_of(view.public, rows).half().cpu().numpy())
    return np.array([1 - len(np.unique(column)) / count for column in _keys(public, places).T])


def _keys(bank: HeldRows, places: Rows) -> NDArray[np.uint64]:
    """A digest of what is at each place of each row, (N, places)."""
    out = np.empty((len(bank), len(places)), np.uint64)
    for rows in batches(np.arange(len(bank))):
        read = np.asarray(bank.read(rows), np.float32)
        flat = read.reshape(*read.shape[:2], -1)[:, :, places] + np.float32(0)  # (n, C, places); -0 is 0
        factors = np.random.default_rng(0).integers(1, 2**63, flat.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
        total = np.zeros((len(flat), len(places)), np.uint64)
        for channel, factor in enumerate(factors):
            bits = np.ascontiguousarray(flat[:, channel]).view(np.uint32).astype(np.uint64)
            total += (bits + np.uint64(1)) * factor
        out[rows] = total
    return out


def _patch(view: ReleaseView, pairs: Rows, telling: Rows) -> int:
    """The largest window that is copied as a whole or not at all; where nothing was, `PATCH`."""
    _, height, width = view.feature_shape
    shared = np.zeros((pairs.shape[1], height, width), np.bool_)
    for some in batches(np.arange(pairs.shape[1])):
        one, other = (np.asarray(view.bank.read(rows[some])) for rows in pairs)
        shared[some] = (one == other).all(axis=1)
    shared = shared[~shared.reshape(len(shared), height * width)[:, telling].all(axis=1)]  # the same picture twice
    if not len(shared):
        return min(PATCH, height, width)
    tells = np.zeros((height, width), np.bool_)
    tells.flat[telling] = True
    best = 1
    for patch in range(2, max(height, width)):
        there, of = (_counts(mask, patch) for mask in (shared & tells, np.broadcast_to(tells, shared.shape)))
        touched = (there > 0) & (of > 1)
        if touched.any() and (there == of)[touched].mean() >= WHOLE:
            best = patch
    return best


def _counts(mask: NDArray[np.bool_], patch: int) -> NDArray[np.int64]:
    """How many places of each window a mask (n, h, w) has."""
    padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % patch), (0, -mask.shape[2] % patch)))
    count, height, width = padded.shape
    return padded.reshape(count, height // patch, patch, width // patch, patch).sum(axis=(2, 4))


# --------------------------------------------------------------------------------------------- pieces


@dataclass(frozen=True)
class Grid:
    """Pieces of a row: windows of `patch`×`patch` places, the last of a line narrower where it does not divide."""

    shape: tuple[int, int, int]
    patch: int

    @property
    def size(self) -> tuple[int, int]:
        """How many pieces down and across."""
        return -(-self.shape[1] // self.patch), -(-self.shape[2] // self.patch)

    def cut(self, rows: Tensor) -> Tensor:
        """(n, C, h, w) → (n, down, across, C·patch·patch)."""
        (down, across), p, (channels, height, width) = self.size, self.patch, self.shape
        padded = F.pad(rows, (0, across * p - width, 0, down * p - height))
        windows = padded.reshape(len(rows), channels, down, p, across, p)
        return windows.permute(0, 2, 4, 1, 3, 5).reshape(len(rows), down, across, channels * p * p)

    def join(self, pieces: Tensor) -> Tensor:
        """The way back."""
        (down, across), p, (channels, height, width) = self.size, self.patch, self.shape
        windows = pieces.reshape(len(pieces), down, across, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        rows = windows.reshape(len(pieces), channels, down * p, across * p)[:, :, :height, :width]
        return rows.contiguous(memory_format=torch.channels_last)


class Fitting(nn.Module):
    """How well pieces fit side by side, and one above the other: log of how much likelier than by chance."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        down, across = grid.size
        self.grid = grid
        self.place = nn.Parameter(0.02 * torch.randn(1, down, across, WIDTH * 2))
        size = grid.shape[0] * grid.patch**2
        self.entry = nn.Sequential(nn.BatchNorm1d(size), nn.Linear(size, WIDTH * 2))
        self.sides = nn.Sequential(
            nn.ReLU(), nn.Linear(WIDTH * 2, WIDTH * 4), nn.ReLU(), nn.Linear(WIDTH * 4, WIDTH * 4)
        )

    def forward(self, pieces: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(n, down, across, size) → each piece towards its right, left, lower and upper neighbour, (n, d, a, 64)."""
        entered = self.entry(pieces.flatten(0, 2)).reshape(*pieces.shape[:3], -1)
        right, left, lower, upper = self.sides(entered + self.place).float().chunk(4, dim=-1)
        return right, left / math.sqrt(WIDTH), lower, upper / math.sqrt(WIDTH)


def fits(one: Tensor, other: Tensor) -> Tensor:
    """(..., d, a, 64) of n and m pieces at neighbouring places → (..., d, a, n, m)."""
    return torch.einsum("...ndak,...mdak->...danm", one, other)


def train_fitting(view: ReleaseView, patch: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """`Fitting`, trained on φ1(Q): each piece's neighbour among those of other pictures that φ2 takes for the same."""
    grid = Grid(view.feature_shape, patch)
    with seeded(view.seed):
        network = Fitting(grid)

    def batch_of(held: HeldPictures, chosen: Rows) -> tuple[Tensor, ...]:
        features = view.features_of(held, chosen)
        answers = view.answers(features)
        alike = answers.argmax(1) if view.task == "classification" else torch.zeros(len(features), dtype=torch.long)
        return grid.cut(features), alike

    def objective(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        right, left, lower, upper = network(batch[0])
        unlike = batch[1][:, None] != batch[1]
        losses = []
        for scores in (fits(right[:, :, :-1], left[:, :, 1:]), fits(lower[:, :-1], upper[:, 1:])):
            of_alike = scores.masked_fill(unlike, -1e4).flatten(0, 1)  # (places, n, n)
            own = torch.arange(len(unlike), device=scores.device).expand(len(of_alike), -1)
            if len(of_alike):
                losses += [F.cross_entropy(of_alike, own), F.cross_entropy(of_alike.transpose(1, 2), own)]
        return {"loss": torch.stack(losses).mean()}

    def validate() -> float:
        chosen = np.arange(min(len(view.public_val), BATCH))
        return float(objective(network, batch_of(view.public_val, chosen))["loss"])

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return batch_of(view.public, chosen)

    recipe = recipe_for(view, view.budget.images, len(view.public), LEARNING_RATE)
    name, title, subject = f"A12 fitting {patch}", "Training which pieces fit", {"patch": patch}
    return trained(view, name, network, read_batch, objective, *recipe, title, validate, subject)
