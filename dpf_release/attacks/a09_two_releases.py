"""A9: the same pictures were released twice, under two functions. What one hides the other may show."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import (
    Budget,
    HeldPictures,
    HeldRows,
    ReleaseView,
    TwoReleases,
    batches,
    on_device,
)
from dpf_release.attacks.toolkit.decoder import clean_decoder, decode, train_decoder
from dpf_release.attacks.toolkit.shadows import SHARE, STEP_COST, shadow, union
from dpf_release.attacks.toolkit.taps import open_taps, standard
from dpf_release.core.arrays import Rows

SHADOWS = 4  # at most; the first of A3's
ASSIGNED = 2**24  # numbers of likenesses, up to which rows are joined one to one


@register
class TwoFunctions(Attack):
    """Rows of two banks are joined by what φ2 makes of them; a decoder on the pair, trained on two shadows of a row."""

    code, title, profile = "A9", "two releases", "full"
    view = TwoReleases
    planted = ("weak-noise", "channel-affine")

    def trainings(self, budget: Budget) -> float:
        """A decoder, and the shadow functions where A3 has not fitted them."""
        return 1 + min(SHADOWS, budget.shadows) * SHARE * STEP_COST

    def run(self, view: ReleaseView) -> Reconstructions:
        """The pair by its own decoder; and the mean of what A1's first decoder makes of each."""
        assert isinstance(view, TwoReleases)
        other = join(view)
        network = _train(view)

        def second(rows: Rows) -> Tensor:
            return on_device(view.other.read(other(rows)), view.device)

        def pair(rows: Rows) -> Tensor:
            return torch.cat([view.rows(rows), second(rows)], dim=1).contiguous(memory_format=torch.channels_last)

        of_pair = decode(view, network, pair)
        one, two = (decode(view, clean_decoder(view), read) for read in (view.rows, second))
        return Reconstructions({"pair": of_pair, "mean of both": lambda rows: (one(rows) + two(rows)) / 2})


def _train(view: ReleaseView) -> torch.nn.Module:
    count = min(SHADOWS, view.budget.shadows)
    disturbed = union(view, [shadow(view, number) for number in range(count)])

    def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
        generator = generator or np.random.default_rng([view.seed, 12, int(rows[0])])
        both = [disturbed(held, rows, generator) for _ in range(2)]  # each row through two functions
        return torch.cat(both, dim=1).contiguous(memory_format=torch.channels_last)

    subject = {"shadows": count, "decoders": view.budget.decoders}
    return train_decoder(view, f"A9 pair of {count}", inputs, width=view.feature_shape[0], depends_on=subject)


def join(view: TwoReleases) -> Callable[[Rows], Rows]:
    """Of an asked row, the row of the other bank that φ2 sees most alike, by number.

    Compared are φ2's answers and means and deviations of each channel in its blocks, each bank around its own mean, of
    rows with the same label or targets. One row is joined with one, where there are not too many.
    """
    mine, theirs = _looks(view, view.bank, view.asked), _looks(view, view.other, np.arange(len(view.other)))
    found = np.empty(len(view.asked), np.int64)
    for asked, others in _alike(view):
        likeness = mine[asked] @ theirs[others].T
        if likeness.numel() <= ASSIGNED and len(asked) <= len(others):
            at, to = linear_sum_assignment(likeness.numpy(), maximize=True)
            found[asked[at]] = others[to]
        else:
            found[asked] = others[likeness.argmax(dim=1).numpy()]
    order = np.argsort(view.asked)
    return lambda rows: found[order[np.searchsorted(view.asked, rows, sorter=order)]]


def _alike(view: TwoReleases) -> list[tuple[Rows, Rows]]:
    """Positions in `view.asked`, and the rows of the other bank among which theirs are."""
    targets, others = view.bank.targets[view.asked], view.other.targets
    if view.task == "regression":
        _, of_mine = np.unique(np.concatenate([targets, others]), axis=0, return_inverse=True)
        targets, others = np.split(of_mine.reshape(-1), [len(targets)])
    found = []
    for target in np.unique(targets):
        among = np.flatnonzero(others == target)
        found.append((np.flatnonzero(targets == target), among if len(among) else np.arange(len(others))))
    return found


def _looks(view: ReleaseView, bank: HeldRows, rows: Rows) -> Tensor:
    """What φ2 makes of rows, each part standardised over these rows: unit vectors (n, D)."""
    taps = open_taps(view)
    scaled = standard(view, taps)
    parts: list[list[Tensor]] = []
    for some in batches(rows):
        features = torch.from_numpy(np.asarray(bank.read(some), np.float32)).to(view.device)
        seen = scaled(taps.of(features))
        flat = [torch.cat([tap.mean(dim=(2, 3)), tap.std(dim=(2, 3), correction=0)], dim=1) for tap in seen]
        parts.append([part.cpu() for part in (*flat, view.answers(features))])
    whole = [torch.cat(part) for part in zip(*parts, strict=True)]
    standardised = [(part - part.mean(0)) / part.std(0, correction=0).clamp_min(1e-6) for part in whole]
    weighted = [part / part.shape[1] ** 0.5 for part in standardised]  # each block counts the same
    return torch.nn.functional.normalize(torch.cat(weighted, dim=1), dim=1)
