"""What an attacker holds. An attack receives one of these types, the one that it declares, and nothing else.

Nothing here leads back to the vault: a bank is read through a function that gives rows, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.core.arrays import Rows
from dpf_release.images.decode import Preprocess

BATCH = 256
REMEMBERED_BYTES = 2**30  # of φ1(Q)


def batches(numbers: Rows) -> Iterator[Rows]:
    """As many at a time as are looked at together."""
    for first in range(0, len(numbers), BATCH):
        yield numbers[first : first + BATCH]


@dataclass(frozen=True)
class Budget:
    """How much work an attacker puts in; a profile's, or less where the owner's patience is shorter.

    Attributes:
        images: pictures that the training of one decoder, matcher or map is shown, repeats counted.
        decoders: how many decoders an attack of several trains.
        shadows: poisoning functions that the attacker fits (A3).
        deep: whether what takes hours is done too: a student of the network's answers.
        own_kind: what imitating P's own kind costs A3, in trainings of a decoder; see `shadows.own_kind_cost`.
        share: of `images`, what a training on one bank alone gets: less on planted functions, which yield sooner.
    """

    images: int
    decoders: int
    shadows: int
    deep: bool = False
    share: float = 1.0
    own_kind: float = 0.0

    @property
    def bank_images(self) -> int:
        """Pictures that a training is shown which serves one bank alone."""
        return max(1, round(self.images * self.share))


@dataclass(frozen=True, eq=False)
class HeldRows:
    """A bank as someone holds it: rows by number, with their labels.

    Attributes:
        targets: (N,) class indices, or (N, K) regression targets.
        read: row numbers → features (n, C, H, W), any float type.
    """

    targets: NDArray[Any]
    read: Callable[[Rows], NDArray[Any]]

    def __len__(self) -> int:
        return len(self.targets)


class Remembered:
    """Features of pictures by number, computed once: of as many of the first ones as there is room for."""

    def __init__(self, most_bytes: int = REMEMBERED_BYTES) -> None:
        self.most_bytes = most_bytes
        self._features, self._there = torch.empty(0), torch.empty(0, dtype=torch.bool)

    def get(self, rows: Rows, count: int, compute: Callable[[Rows], Tensor]) -> Tensor:
        """Features (n, C, h, w) of some of `count` pictures."""
        with torch.inference_mode(False), torch.no_grad():  # asked in validation first, they must serve training too
            return self._get(rows, count, compute)

    def _get(self, rows: Rows, count: int, compute: Callable[[Rows], Tensor]) -> Tensor:
        if not len(self._there):
            channels, height, width = (one := compute(rows[:1])).shape[1:]
            room = max(1, min(count, self.most_bytes // one[0].nbytes))
            self._features, self._there = torch.empty(room, height, width, channels), torch.zeros(room).bool()
        numbers = torch.from_numpy(rows)
        fits = numbers < len(self._there)
        known = fits & self._there[numbers.clamp_max(len(self._there) - 1)]
        out = torch.empty(len(rows), *self._features.shape[1:])
        out[known] = self._features[numbers[known]]
        if not known.all():
            out[~known] = compute(rows[~known.numpy()]).permute(0, 2, 3, 1)
            self._features[numbers[fits]] = out[fits]
            self._there[numbers[fits]] = True
        return out.permute(0, 3, 1, 2)  # (n, h, w, C) -> (n, C, h, w), channels last


@dataclass(frozen=True, eq=False)
class HeldPictures:
    """Pictures that someone holds.

    Attributes:
        count: how many.
        read: numbers → (n, 3, H, W) uint8.
        remembered: what φ1 makes of them; see `ReleaseView.features_of`.
    """

    count: int
    read: Callable[[Rows], Tensor]
    remembered: Remembered | None = None

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, eq=False)
class Kept:
    """What an attacker has trained and keeps: a run that was cut off goes on, the next need not begin anew.

    Attributes:
        load: name, subject → what was kept under the name for exactly this subject; None where nothing was.
        save: name, subject, tensors: keeps them, beside what the name has for other subjects.
        checkpoint: name, subject → where a training may keep what it goes on from.
    """

    load: Callable[[str, Mapping[str, Any]], dict[str, Tensor] | None]
    save: Callable[[str, Mapping[str, Any], Mapping[str, Tensor]], None]
    checkpoint: Callable[[str, Mapping[str, Any]], Path | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class ReleaseView:
    """A release, the code of this tool, and public images Q: what everybody has.

    Attributes:
        name: of what is granted, as attack reports say it.
        phi_1: the featurizer, frozen: normalised pictures (N, 3, H, W) → features (N, C, H', W').
        phi_2: the classifier, frozen: features → outputs (N, K).
        preprocess: of pictures, for φ1.
        non_negative: whether φ1 ends in a ReLU.
        task: of φ2.
        bank: all released rows.
        asked: numbers of the rows for which the harness wants an answer.
        public: Q, what an attacker trains on.
        public_val: Q, what an attacker chooses by.
        budget: the work to be put in.
        seed: of everything that is drawn.
        device: where networks run.
        bf16: as in `training.Recipe`.
        subject: what a training on Q alone depends on: digests of φ1, φ2, Q.
        bank_subject: what one that uses the bank depends on too: a digest of it.
        kept: what was trained before.
        function: of what kind P is, as its name with its parameters: `recombine:k=20`; neither its draws nor what it
            learned. Empty: not known.
    """

    name: ClassVar[str] = "ReleaseView"

    phi_1: nn.Module
    phi_2: nn.Module
    preprocess: Preprocess
    non_negative: bool
    task: Literal["classification", "regression"]
    bank: HeldRows
    asked: Rows
    public: HeldPictures
    public_val: HeldPictures
    budget: Budget
    seed: int
    device: torch.device
    bf16: Literal["auto", "on", "off"]
    subject: Mapping[str, Any]
    bank_subject: str
    kept: Kept
    function: str = ""

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(C, H', W') of a row."""
        channels, height, width = self.bank.read(self.asked[:1]).shape[1:]
        return channels, height, width

    def features(self, pictures: Tensor) -> Tensor:
        """φ1 of pictures (n, 3, H, W) uint8: (n, C, H', W') float32 on the device, as the bank is made."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            inputs = self.preprocess.normalise(pictures.to(self.device))
            out: Tensor = self.phi_1(inputs.contiguous(memory_format=torch.channels_last)).float()
        return out

    def features_of(self, held: HeldPictures, rows: Rows) -> Tensor:
        """φ1 of held pictures by number. On a CPU, where that costs half a decoder's step, those of Q are kept."""
        if held.remembered is None or self.device.type != "cpu":
            return self.features(held.read(rows))
        return held.remembered.get(rows, len(held), lambda missing: self.features(held.read(missing)))

    def rows(self, rows: Rows) -> Tensor:
        """Rows of the bank by number: (n, C, H', W') float32 on the device."""
        features = torch.from_numpy(np.asarray(self.bank.read(rows), np.float32)).to(self.device)
        return features.contiguous(memory_format=torch.channels_last)

    def answers(self, features: Tensor) -> Tensor:
        """φ2 of features: (n, K) float32."""
        with torch.no_grad():
            out: Tensor = self.phi_2(features).float()
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryImages(ReleaseView):
    """The attacker also holds pictures, some of which are in S, and wants to know which, and where.

    Attributes:
        pictures: those pictures.
        labels: (n,) class, or bin of the target, of each: a person sees it.
        bins: (N,) the same of each row of the bank.
        pools: (n, M) rows of the bank among which each picture's own is looked for; of one that is in S, one row is.
        persons: (n,) whom each shows, as numbers; None where nobody said.
    """

    name: ClassVar[str] = "Candidates"

    pictures: HeldPictures
    labels: NDArray[np.int64]
    bins: NDArray[np.int64]
    pools: Rows
    persons: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class KnownPairs(ReleaseView):
    """The attacker also knows of some pictures which rows they became.

    Attributes:
        pictures: those pictures.
        pair_rows: (m,) the row of each; none of them is asked for.
    """

    name: ClassVar[str] = "KnownPairs"

    pictures: HeldPictures
    pair_rows: Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class LeakedVault(ReleaseView):
    """The attacker also has P.

    Attributes:
        poison: a bank → the same, poisoned as the released one was (rows that mix, mix within it); and which row of the
            given one each row has the most of, (N,).
    """

    name: ClassVar[str] = "LeakedVault"

    poison: Callable[[HeldRows], tuple[HeldRows, Rows]]


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledRows(ReleaseView):
    """The attacker also knows an attribute (a person, say) of some rows' pictures, and of Q's.

    Attributes:
        values: the attribute's values.
        public_values: (n,) value of each picture of Q, as an index of `values`; -1: unknown.
        known_rows: (m,) rows of the bank whose value is known; none of them is asked for.
        known_values: (m,) their values.
        bins: (N,) class, or bin of the target, of each row of the bank.
    """

    name: ClassVar[str] = "LabelledRows"

    values: tuple[str, ...]
    public_values: NDArray[np.int64]
    known_rows: Rows
    known_values: NDArray[np.int64]
    bins: NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class TwoReleases(ReleaseView):
    """The attacker also has another release of the same pictures, under another function, in another order.

    Attributes:
        other: its bank.
    """

    name: ClassVar[str] = "TwoReleases"

    other: HeldRows
