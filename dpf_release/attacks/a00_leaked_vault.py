"""A0: the vault is lost, and P with it. The paper's "secondary attack"."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.attacks.interface import Attack, Reconstructions, register
from dpf_release.attacks.threat_models import BATCH, Budget, HeldPictures, HeldRows, LeakedVault, ReleaseView, batches
from dpf_release.attacks.toolkit.clean_decoders import DECODERS, clean_decoder
from dpf_release.attacks.toolkit.decoder import VALIDATION_PICTURES, DecoderLoss, decode, train_decoder
from dpf_release.attacks.toolkit.trained import schedule
from dpf_release.core.arrays import Rows
from dpf_release.errors import ConfigError, NotGrantedError

# A decoder's loss, and its share of the pictures. Both begin with A1's first decoder.
LOSSES: tuple[tuple[DecoderLoss, float], ...] = (("ssim", 1.0), ("l1", 0.5))
IN_MEMORY, ON_DISK = 2**28, 2**32  # bytes of rows
FLOAT16_LARGEST = 65504.0
LEAST_ROWS = 32  # of a class, to begin with: functions that mix rows refuse classes smaller than they need


@register
class LeakedP(Attack):
    """Decoders on (P(φ1(z)), z), z in Q: what is left when the secret is out."""

    code, title, claim, version = "A0", "leaked vault", None, 2
    view = LeakedVault
    planted = ("weak-noise", "channel-affine", "channel-permutation", "random-convolution")
    of_bank = True

    def trainings(self, budget: Budget) -> float:
        """Those of `LOSSES`."""
        return sum(share for _, share in LOSSES)

    def run(self, view: ReleaseView) -> Reconstructions:
        """P is applied to Q as a bank of its own; a mixed row is paired with the picture that it has the most of."""
        assert isinstance(view, LeakedVault)
        start = clean_decoder(view).state_dict()  # on all of Q: it is A1's
        _, rows = schedule(view.budget.bank_images, len(view.public))
        count = min(rows, max(BATCH, ON_DISK // 2 // _bytes(1, view.feature_shape)))
        view = replace(view, public=HeldPictures(count, view.public.read, view.public.remembered))
        poisoned = functools.cache(lambda: poisoned_public(view))  # not made where all is kept

        def numbers(held: HeldPictures, rows: Rows) -> Rows:
            return rows + (count if held is view.public_val else 0)  # these come after the others

        def inputs(held: HeldPictures, rows: Rows, generator: np.random.Generator | None) -> Tensor:
            features = torch.from_numpy(np.asarray(poisoned()[0][numbers(held, rows)], np.float32)).to(view.device)
            return features.contiguous(memory_format=torch.channels_last)

        def originals(held: HeldPictures, rows: Rows) -> Tensor:
            shown = poisoned()[1][numbers(held, rows)]
            if (shown < count).all():
                return view.public.read(shown)
            pictures = view.public_val.read(np.maximum(shown - count, 0)).clone()
            pictures[torch.from_numpy(shown < count)] = view.public.read(shown[shown < count])
            return pictures

        decoders = {}
        for loss, share in LOSSES:
            network = train_decoder(
                view,
                f"A0 {loss}",
                inputs,
                architecture=DECODERS[0][1],
                loss=loss,
                depends_on={"bank": view.bank_subject},
                start=start,
                images=max(1, round(view.budget.bank_images * share)),
                shape=view.feature_shape,
                originals=originals,
            )
            decoders[loss.upper()] = decode(view, network)
        return Reconstructions(decoders)


def poisoned_public(view: LeakedVault) -> tuple[NDArray[np.float16], Rows]:
    """P of φ1(Q): (N, C, H, W), first all of `view.public`, then the pictures that a decoder is validated on.

    Q gets the labels that φ2 gives it. Classes that P finds too small for it go to what φ2 takes them for next; of
    several regression targets the first stands for all then.

    Returns:
        The rows, and which of these pictures each has the most of, (N,).

    Raises:
        NotGrantedError: Q has no class that is large enough for P.
    """
    sets = [(view.public, len(view.public)), (view.public_val, min(len(view.public_val), VALIDATION_PICTURES))]
    clean, answers = room(sum(count for _, count in sets), view.feature_shape), []
    done = 0
    for pictures, count in sets:
        for some in batches(np.arange(count)):
            features = view.features_of(pictures, some)
            answers.append(view.answers(features).cpu().numpy())
            clean[done : done + len(features)] = _float16(features.cpu().numpy())
            done += len(features)
    bank, foremost = _poisoned_bank(view, clean, np.concatenate(answers))
    poisoned = room(done, view.feature_shape)
    for rows in batches(np.arange(done)):
        poisoned[rows] = _float16(bank.read(rows))
    return poisoned, foremost


def _poisoned_bank(
    view: LeakedVault, clean: NDArray[np.float16], answers: NDArray[np.float32]
) -> tuple[HeldRows, Rows]:
    def read(rows: Rows) -> NDArray[np.float16]:
        return np.array(clean[rows])

    refusal: ConfigError | None = None
    for targets in _targets(answers, view.task):
        try:
            return view.poison(HeldRows(targets, read))
        except ConfigError as error:  # P wants larger classes
            refusal = error
    raise NotGrantedError(f"P refuses all of Q as a bank: {refusal}")


def _targets(answers: NDArray[np.float32], task: str) -> Iterator[NDArray[Any]]:
    """What Q may be labelled with, by φ2's answers: fewer and larger classes each time."""
    if task == "regression":
        yield answers
        yield np.repeat(answers[:, :1], answers.shape[1], axis=1)
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
