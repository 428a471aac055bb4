"""A12: rows that were put together from pieces of several pictures are taken apart, and put together as they were."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import BATCH, Budget, ReleaseView, batches
from dpf_release.attacks.toolkit.decoder import clean_decoder, decode
from dpf_release.attacks.toolkit.pieces import Grid, find_swaps, fits, train_fitting
from dpf_release.attacks.toolkit.taps import answers_alone, open_taps
from dpf_release.core.arrays import Rows

NEAREST, MOST = 12, 64  # rows that lend pieces: where no copies tell which, and at most
TOGETHER = 2**25  # numbers of rows and messages that are worked on at once
ROUNDS, DAMPING = 12, 0.3  # of messages between pieces
OWN = 1.5  # log-odds of a row's own piece, where none is the anchor
FITTING_COST = 0.5  # a step of the training which pieces fit, in steps of a decoder


@register
class Jigsaw(Attack):
    """Rows with copies of a piece are a pool; pieces of it that fit each other are joined; then A1's decoder.

    What is rebuilt is the picture that the row's middle piece is of, or the one that most of its pieces seem to be of.
    """

    code, title, version = "A12", "jigsaw", 2
    planted = ("recombine-2",)
    surpasses = "A1"

    def trainings(self, budget: Budget) -> float:
        """Which pieces fit."""
        return FITTING_COST

    def run(self, view: ReleaseView) -> Reconstructions:
        """For each anchor the likeliest pieces, and the mean of all by how likely they are."""
        group, patch = find_swaps(view)
        grid, pools = Grid(view.feature_shape, patch), pools_of(view, group)
        fitting = train_fitting(view, patch)
        decoders = {}
        for anchor in ("middle piece", "most pieces"):
            shares = _assemble(view, grid, pools, fitting, anchor == "middle piece")
            for name, sharp in (("likeliest", True), ("mean", False)):
                rebuilt = _rebuilt(view, grid, pools, shares, sharp)
                decoders[f"{anchor}, {name}"] = decode(view, clean_decoder(view), rebuilt)
        return Reconstructions(decoders)


def pools_of(view: ReleaseView, group: Rows) -> Rows:
    """For each asked row those with pieces of the same pictures, itself the first: (asked, M), -1 where fewer."""
    pools: list[Rows] = []
    members = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[members], np.arange(group.max() + 2))
    seen: Tensor | None = None
    for row in view.asked.tolist():
        pool = members[starts[group[row]] : starts[group[row] + 1]]
        if not 1 < len(pool) <= MOST:
            seen = _seen(view) if seen is None else seen
            among = pool if len(pool) > MOST else _same_class(view, row)
            distances = (seen[torch.from_numpy(among)] - seen[row]).square().sum(1)
            pool = among[distances.argsort()[: MOST if len(pool) > MOST else NEAREST].numpy()]
        pools.append(np.concatenate([[row], pool[pool != row]]))
    return np.array(list(zip_longest(*pools, fillvalue=-1)), np.int64).T


def _same_class(view: ReleaseView, row: int) -> Rows:
    if view.task == "regression":
        return np.argsort(np.abs(view.bank.targets[:, 0] - view.bank.targets[row, 0]), kind="stable")[:BATCH]
    return np.flatnonzero(view.bank.targets == view.bank.targets[row])


def _seen(view: ReleaseView) -> Tensor:
    """What the last block of φ2 makes of each row of the bank, on average over places: (N, D)."""
    taps = open_taps(view) if view.task == "classification" else answers_alone(view)
    numbers = np.arange(len(view.bank))
    return torch.cat([taps.of(view.rows(some))[-1].mean(dim=(2, 3)).cpu() for some in batches(numbers)])


def _assemble(
    view: ReleaseView, grid: Grid, pools: Rows, fitting: Callable[[Tensor], tuple[Tensor, ...]], middle: bool
) -> Tensor:
    """How likely the picture has at each place the piece of each row of the pool: (asked, down, across, M) float16."""
    (down, across), most = grid.size, pools.shape[1]
    numbers = max(int(np.prod(grid.shape)) * most, down * across * most**2)
    size = max(1, TOGETHER // numbers)
    found = []
    for first in range(0, len(pools), size):
        pool = pools[first : first + size]
        pieces = _pieces(view, grid, pool)  # (n, M, d, a, K)
        prior = _prior(pieces, torch.from_numpy(pool >= 0).to(view.device), middle)
        sides = [side.unflatten(0, pool.shape) for side in fitting(pieces.flatten(0, 1))]
        found.append(beliefs(prior, *sides).half().cpu())
    return torch.cat(found)


def _pieces(view: ReleaseView, grid: Grid, pool: Rows) -> Tensor:
    """(n, M) rows → their pieces (n, M, down, across, K)."""
    distinct, where = np.unique(np.maximum(pool, 0), return_inverse=True)
    parts = [grid.cut(view.rows(some)) for some in batches(distinct)]
    return torch.cat(parts)[torch.from_numpy(where.reshape(pool.shape)).to(view.device)]


def _prior(pieces: Tensor, there: Tensor, middle: bool) -> Tensor:
    """Log-odds of each piece before it is seen what it fits, (n, d, a, M): copies count once, the anchor is certain."""
    count, most, down, across, size = pieces.shape
    prior = torch.zeros(count, down, across, most, device=pieces.device)
    prior.masked_fill_(~there[:, None, None], -1e4)
    factors = torch.linspace(1, 2, size, dtype=torch.float64, device=pieces.device).sqrt().float()
    digests = (pieces * factors).sum(dim=-1).permute(0, 2, 3, 1)  # (n, d, a, M); the same of copies alone
    earlier = torch.ones(most, most, dtype=torch.bool, device=pieces.device).tril(-1)
    copied = ((digests[..., :, None] == digests[..., None, :]) & earlier).any(dim=-1)
    prior.masked_fill_(copied, -1e4)
    if middle:
        prior[:, down // 2, across // 2, 1:] = -1e4
    else:
        prior[..., 0] += OWN
    return prior


def beliefs(prior: Tensor, right: Tensor, left: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Sums and products of messages between neighbouring places, as if there were no loops (belief propagation).

    From log-odds (n, d, a, M), and each piece towards its four neighbours as `pieces.Fitting` has it, (n, M, d, a, 64),
    to shares (n, d, a, M) of sum 1.
    """
    beside = fits(right[:, :, :, :-1], left[:, :, :, 1:])  # (n, d, a - 1, M, M)
    below = fits(lower[:, :, :-1], upper[:, :, 1:])  # (n, d - 1, a, M, M)
    edges = ((beside, 2), (below, 1))
    to_next = [prior.new_zeros(scores.shape[:-1]) for scores, _ in edges]  # of the earlier place to the later
    to_last = [message.clone() for message in to_next]
    for _ in range(ROUNDS):
        total = _belief(prior, to_next, to_last)
        for number, (scores, axis) in enumerate(edges):
            length = total.shape[axis] - 1
            if length == 0:
                continue
            earlier = total.narrow(axis, 0, length) - to_last[number]
            later = total.narrow(axis, 1, length) - to_next[number]
            onward = (scores + earlier[..., :, None]).logsumexp(dim=-2).log_softmax(dim=-1)
            back = (scores + later[..., None, :]).logsumexp(dim=-1).log_softmax(dim=-1)
            to_next[number] = DAMPING * to_next[number] + (1 - DAMPING) * onward
            to_last[number] = DAMPING * to_last[number] + (1 - DAMPING) * back
    return _belief(prior, to_next, to_last).softmax(dim=-1)


def _belief(prior: Tensor, to_next: list[Tensor], to_last: list[Tensor]) -> Tensor:
    beside = prior + F.pad(to_next[0], (0, 0, 1, 0)) + F.pad(to_last[0], (0, 0, 0, 1))
    return beside + F.pad(to_next[1], (0, 0, 0, 0, 1, 0)) + F.pad(to_last[1], (0, 0, 0, 0, 0, 1))


def _rebuilt(view: ReleaseView, grid: Grid, pools: Rows, shares: Tensor, sharp: bool) -> Callable[[Rows], Tensor]:
    """Numbers of asked rows → those put together anew, (n, C, h, w)."""
    size = max(1, TOGETHER // (int(np.prod(grid.shape)) * pools.shape[1]))
    order = np.argsort(view.asked)

    def rebuilt(rows: Rows) -> Tensor:
        positions, parts = order[np.searchsorted(view.asked, rows, sorter=order)], []
        for first in range(0, len(positions), size):
            some = positions[first : first + size]
            weights = shares[torch.from_numpy(some)].float().to(view.device)  # (n, d, a, M)
            if sharp:
                weights = F.one_hot(weights.argmax(dim=-1), weights.shape[-1]).float()
            parts.append(grid.join(torch.einsum("ndam,nmdak->ndak", weights, _pieces(view, grid, pools[some]))))
        return torch.cat(parts)

    return rebuilt
