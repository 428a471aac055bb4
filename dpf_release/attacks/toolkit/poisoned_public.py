"""P(φ1(Q)): Q as a bank of the attacker's own, poisoned by a function that the attacker has."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.attacks.threat_models import BATCH, HeldPictures, HeldRows, ReleaseView, batches, on_device
from dpf_release.attacks.toolkit.decoder import VALIDATION_PICTURES
from dpf_release.core.arrays import Rows
from dpf_release.errors import ConfigError, NotGrantedError

Poison = Callable[[HeldRows], tuple[HeldRows, Rows]]
View = TypeVar("View", bound=ReleaseView)
IN_MEMORY, ON_DISK = 2**28, 2**32  # bytes of rows
FLOAT16_LARGEST = 65504.0
LEAST_ROWS = 32  # of a class, to begin with: functions that mix rows refuse classes smaller than they need


@dataclass(frozen=True, eq=False)
class PoisonedPublic:
    """Rows of P(φ1(Q)), and which picture of Q each has the most of."""

    view: ReleaseView  # whose Q
    rows: NDArray[np.float16]  # (N, C, H, W); first those of `view.public`, then those of `view.public_val`
    foremost: Rows  # (N,) picture of each row, numbered as rows are

    def inputs(self, held: HeldPictures, numbers: Rows) -> Tensor:
        """The rows that stand where these pictures' own would, (n, C, H, W) on the device."""
        return on_device(self.rows[self._number(held, numbers)], self.view.device)

    def originals(self, held: HeldPictures, numbers: Rows) -> Tensor:
        """Of each of those rows, the picture that it has the most of, (n, 3, H, W) uint8."""
        view, shown, count = self.view, self.foremost[self._number(held, numbers)], len(self.view.public)
        if (shown < count).all():
            return view.public.read(shown)
        pictures = view.public_val.read(np.maximum(shown - count, 0)).clone()
        pictures[torch.from_numpy(shown < count)] = view.public.read(shown[shown < count])
        return pictures

    def with_most_of(self, held: HeldPictures, numbers: Rows) -> Tensor:
        """Of each picture, a row that has the most of it, or where there is none the row in its place, (n, C, H, W)."""
        return on_device(self.rows[self._row_of[self._number(held, numbers)]], self.view.device)

    @cached_property
    def _row_of(self) -> Rows:
        rows = np.arange(len(self.foremost))
        rows[self.foremost[::-1]] = np.arange(len(self.foremost))[::-1]
        return rows

    def _number(self, held: HeldPictures, numbers: Rows) -> Rows:
        return numbers + (len(self.view.public) if held is self.view.public_val else 0)


def with_room(view: View, wanted: int, banks: int = 1) -> View:
    """The view, with only as many pictures of Q as fit where several such banks are kept: on disk, 2 GiB in all."""
    count = min(wanted, len(view.public), max(BATCH, ON_DISK // 2 // banks // _bytes(1, view.feature_shape)))
    return replace(view, public=HeldPictures(count, view.public.read, view.public.remembered))


def poisoned_public(view: ReleaseView, poison: Poison) -> PoisonedPublic:
    """P (as `LeakedVault.poison`) of φ1(Q): first all of `view.public`, then what a decoder is validated on.

    Q gets the labels that φ2 gives it. Classes that P finds too small for it go to what φ2 takes them for next; of
    several regression targets the first stands for all then.

    Raises:
        NotGrantedError: Q has no class that is large enough for P.
    """
    sets = [(view.public, len(view.public)), (view.public_val, min(len(view.public_val), VALIDATION_PICTURES))]
    clean, answers = room(sum(some_of for _, some_of in sets), view.feature_shape), []
    done = 0
    for pictures, some_of in sets:
        for some in batches(np.arange(some_of)):
            features = view.features_of(pictures, some)
            answers.append(view.answers(features).cpu().numpy())
            clean[done : done + len(features)] = _float16(features.cpu().numpy())
            done += len(features)
    bank, foremost = _poisoned_bank(view, poison, clean, np.concatenate(answers))
    poisoned = room(done, view.feature_shape)
    for rows in batches(np.arange(done)):
        poisoned[rows] = _float16(bank.read(rows))
    return PoisonedPublic(view, poisoned, foremost)


def _poisoned_bank(
    view: ReleaseView, poison: Poison, clean: NDArray[np.float16], answers: NDArray[np.float32]
) -> tuple[HeldRows, Rows]:
    refusal: ConfigError | None = None
    for targets in _targets(answers, view.task):
        try:
            return poison(HeldRows(targets, lambda rows: np.array(clean[rows])))
        except ConfigError as error:  # P wants larger classes
            refusal = error
    raise NotGrantedError(f"P refuses all of Q as a bank: {refusal}")


def _targets(answers: NDArray[np.float32], task: str) -> Iterator[NDArray[Any]]:
    """What Q may be labelled with, by φ2's answers: fewer and larger classes each time."""
    if task == "regression":
        yield from (answers, np.repeat(answers[:, :1], answers.shape[1], axis=1))
        return
    least, classes = LEAST_ROWS, 2
    while classes > 1:
        labels, classes = _labels(answers, least)
        yield labels
        least *= 2


def _labels(answers: NDArray[np.float32], least: int) -> tuple[NDArray[np.int64], int]:
    """Class of each row by φ2, (N,), among those classes that have `least` rows; and how many these are."""
    allowed = np.ones(answers.shape[1], np.bool_)
    while True:
        labels = np.where(allowed, answers, -np.inf).argmax(1).astype(np.int64)
        counts = np.bincount(labels, minlength=len(allowed))
        small = allowed & (counts < least)
        if not small.any() or allowed.sum() == 1:
            return labels, int((counts > 0).sum())
        allowed[np.where(small, counts, len(labels) + 1).argmin()] = False  # one at a time: its rows help others


def room(rows: int, shape: tuple[int, int, int]) -> NDArray[np.float16]:
    """(rows, C, H, W) to be filled: in memory where that is little, else in a temporary file without a name."""
    if _bytes(rows, shape) <= IN_MEMORY:
        return np.empty((rows, *shape), np.float16)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.float16, "w+", shape=(rows, *shape))


def _bytes(rows: int, shape: tuple[int, int, int]) -> int:
    return 2 * rows * int(np.prod(shape))


def _float16(features: NDArray[np.floating]) -> NDArray[np.float16]:
    return features.clip(-FLOAT16_LARGEST, FLOAT16_LARGEST).astype(np.float16)
