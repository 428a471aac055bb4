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


def batches(numbers: Rows) -> Iterator[Rows]:
    """As many at a time as are looked at together."""
    for first in range(0, len(numbers), BATCH):
        yield numbers[first : first + BATCH]


def on_device(features: NDArray[Any], device: torch.device) -> Tensor:
    """Features (n, C, h, w) as networks take them: float32, channels last."""
    return torch.from_numpy(np.asarray(features, np.float32)).to(device).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Budget:
    """How much work an attacker puts in; a profile's, or less where the owner's patience is shorter."""

    images: int  # pictures that the training of one decoder, matcher or map is shown, repeats counted
    decoders: int  # how many decoders an attack of several trains
    shadows: int  # poisoning functions that the attacker fits (A3)
    deep: bool = False  # whether what takes hours is done too: a student of the network's answers
    # of `images`, what a training on one bank alone gets: less on planted functions, which yield sooner
    share: float = 1.0
    # what imitating P's own kind costs A3, in trainings of a decoder; see `shadows.own_kind_cost`
    own_kind: float = 0.0

    @property
    def bank_images(self) -> int:
        """Pictures that a training is shown which serves one bank alone."""
        return max(1, round(self.images * self.share))


@dataclass(frozen=True, eq=False)
class HeldRows:
    """A bank as someone holds it: rows by number, with their labels."""

    targets: NDArray[Any]  # (N,) class indices, or (N, K) regression targets
    read: Callable[[Rows], NDArray[Any]]  # row numbers → features (n, C, H, W), any float type

    def __len__(self) -> int:
        return len(self.targets)


class Remembered:
    """Features of pictures by number, computed once: of as many of the first ones as there is room for."""

    def __init__(self, most_bytes: int = 2**30) -> None:
        self.most_bytes = most_bytes
        self._features, self._there = torch.empty(0), torch.empty(0, dtype=torch.bool)

    @torch.inference_mode(False)  # asked in validation first, they must serve training too
    @torch.no_grad()
    def get(self, rows: Rows, count: int, compute: Callable[[Rows], Tensor]) -> Tensor:
        """Features (n, C, h, w) of some of `count` pictures."""
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
    """Pictures that someone holds."""

    count: int  # how many
    read: Callable[[Rows], Tensor]  # numbers → (n, 3, H, W) uint8
    remembered: Remembered | None = None  # what φ1 makes of them; see `ReleaseView.features_of`

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True, eq=False)
class Kept:
    """What an attacker has trained and keeps: a run that was cut off goes on, the next need not begin anew."""

    # name, subject → what was kept under the name for exactly this subject; None where nothing was
    load: Callable[[str, Mapping[str, Any]], dict[str, Tensor] | None]
    # name, subject, tensors: keeps them, beside what the name has for other subjects
    save: Callable[[str, Mapping[str, Any], Mapping[str, Tensor]], None]
    # name, subject → where a training may keep what it goes on from
    checkpoint: Callable[[str, Mapping[str, Any]], Path | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class ReleaseView:
    """A release, the code of this tool, and public images Q: what everybody has."""

    name: ClassVar[str] = "ReleaseView"  # of what is granted, as attack reports say it
    phi_1: nn.Module  # the featurizer, frozen: normalised pictures (N, 3, H, W) → features (N, C, H', W')
    phi_2: nn.Module  # the classifier, frozen: features → outputs (N, K)
    preprocess: Preprocess  # of pictures, for φ1
    non_negative: bool  # whether φ1 ends in a ReLU
    task: Literal["classification", "regression"]  # of φ2
    bank: HeldRows  # all released rows
    asked: Rows  # numbers of the rows for which the harness wants an answer
    public: HeldPictures  # Q, what an attacker trains on
    public_val: HeldPictures  # Q, what an attacker chooses by
    budget: Budget  # the work to be put in
    seed: int  # of everything that is drawn
    device: torch.device  # where networks run
    bf16: Literal["auto", "on", "off"]  # as in `training.Recipe`
    subject: Mapping[str, Any]  # what a training on Q alone depends on: digests of φ1, φ2, Q
    bank_subject: str  # what one that uses the bank depends on too: a digest of it
    kept: Kept  # what was trained before
    # of what kind P is, as its name with its parameters: `recombine:k=20`; neither its draws nor what it learned.
    # Empty: not known
    function: str = ""
    before_relu: nn.Module | None = None  # φ1 without the ReLU that it ends in; None: it ends in something else

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(C, H', W') of a row."""
        channels, height, width = self.bank.read(self.asked[:1]).shape[1:]
        return channels, height, width

    def features(self, pictures: Tensor) -> Tensor:
        """φ1 of pictures (n, 3, H, W) uint8: (n, C, H', W') float32 on the device, as the bank is made."""
        return self._through(self.phi_1, pictures)

    def features_before_relu(self, pictures: Tensor) -> Tensor:
        """The same before φ1's last ReLU, which anyone can leave out; as they are, where it ends in something else."""
        return self._through(self.before_relu or self.phi_1, pictures)

    def _through(self, network: nn.Module, pictures: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            inputs = self.preprocess.normalise(pictures.to(self.device))
            out: Tensor = network(inputs.contiguous(memory_format=torch.channels_last)).float()
        return out

    def features_of(self, held: HeldPictures, rows: Rows) -> Tensor:
        """φ1 of held pictures by number. On a CPU, where that costs half a decoder's step, those of Q are kept."""
        if held.remembered is None or self.device.type != "cpu":
            return self.features(held.read(rows))
        return held.remembered.get(rows, len(held), lambda missing: self.features(held.read(missing)))

    def public_features(self, most: int) -> Iterator[Tensor]:
        """φ1 of the first pictures of Q, at most so many, a batch at a time."""
        return (self.features_of(self.public, some) for some in batches(np.arange(min(len(self.public), most))))

    def rows(self, rows: Rows) -> Tensor:
        """Rows of the bank by number: (n, C, H', W') float32 on the device."""
        return on_device(self.bank.read(rows), self.device)

    def answers(self, features: Tensor) -> Tensor:
        """φ2 of features: (n, K) float32."""
        with torch.no_grad():
            out: Tensor = self.phi_2(features).float()
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryImages(ReleaseView):
    """The attacker also holds pictures, some of which are in S, and wants to know which, and where."""

    name: ClassVar[str] = "Candidates"
    pictures: HeldPictures  # those pictures
    labels: NDArray[np.int64]  # (n,) class, or bin of the target, of each: a person sees it
    bins: NDArray[np.int64]  # (N,) the same of each row of the bank
    pools: Rows  # (n, M) rows of the bank among which each picture's own is looked for; of one that is in S, one row is
    persons: NDArray[np.int64] | None = None  # (n,) whom each shows, as numbers; None where nobody said


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnRows(QueryImages):
    """As `QueryImages`, of a release whose rows were drawn from statistics and belong to no image."""

    name: ClassVar[str] = "DrawnRows"


@dataclass(frozen=True, eq=False, kw_only=True)
class LeakedFunction(DrawnRows):
    """The attacker also has what the function learned: components, and the statistics that rows are drawn from."""

    name: ClassVar[str] = "LeakedFunction"
    learned: Mapping[str, Tensor]  # `Chain.state`


@dataclass(frozen=True, eq=False, kw_only=True)
class KnownPairs(ReleaseView):
    """The attacker also knows of some pictures which rows they became."""

    name: ClassVar[str] = "KnownPairs"
    pictures: HeldPictures  # those pictures
    pair_rows: Rows  # (m,) the row of each; none of them is asked for


@dataclass(frozen=True, eq=False, kw_only=True)
class LeakedVault(ReleaseView):
    """The attacker also has P."""

    name: ClassVar[str] = "LeakedVault"
    # a bank → the same, poisoned as the released one was (rows that mix, mix within it); and which row of the given
    # one each row has the most of, (N,)
    poison: Callable[[HeldRows], tuple[HeldRows, Rows]]


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledRows(ReleaseView):
    """The attacker also knows an attribute (a person, say) of some rows' pictures, and of Q's."""

    name: ClassVar[str] = "LabelledRows"
    values: tuple[str, ...]  # the attribute's values
    public_values: NDArray[np.int64]  # (n,) value of each picture of Q, as an index of `values`; -1: unknown
    known_rows: Rows  # (m,) rows of the bank whose value is known; none of them is asked for
    known_values: NDArray[np.int64]  # (m,) their values
    bins: NDArray[np.int64]  # (N,) class, or bin of the target, of each row of the bank


@dataclass(frozen=True, eq=False, kw_only=True)
class TwoReleases(ReleaseView):
    """The attacker also has another release of the same pictures, under another function, in another order."""

    name: ClassVar[str] = "TwoReleases"
    other: HeldRows  # its bank
