"""Banks for training with torch: a data set, its loader, and several banks as one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dpf_release.bank import FeatureBank, SplitName
from dpf_release.errors import BankError


class BankDataset(Dataset[tuple[Tensor, Tensor]]):
    """Rows of one or more banks of one featurizer.

    An item is ((C, H, W) float16 features, target): the class index, or (K,) float32 regression targets.

    Attributes:
        names: of the classes, by index; of the target columns for regression.
    """

    def __init__(self, banks: Sequence[FeatureBank], names: Sequence[str], targets: Sequence[NDArray[Any]]) -> None:
        self.banks, self.names = tuple(banks), tuple(names)
        self.targets = np.concatenate(targets)
        self._starts = np.cumsum([0, *(len(bank) for bank in banks)])

    @classmethod
    def open(cls, folder: str | Path, split: SplitName, names: Sequence[str] = ()) -> BankDataset:
        """One split of a bank folder, such as one's own φ1(T) from `featurize --release`.

        Args:
            folder: the bank.
            split: which.
            names: what its targets are, `release.names`.

        Raises:
            BankError: no finished bank of format 1, no such split, or labels that are not among the names.
        """
        bank = FeatureBank(Path(folder), split)
        if names and not bank.index.targets and not np.isin(bank.targets, np.arange(len(names))).all():
            raise BankError(f"{folder} has labels beyond its {len(names)} classes. Fetch or write it again.")
        return cls([bank], names, [bank.targets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        features, targets = self.read([range(len(self))[row]])
        return features[0], targets[0]

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several rows at once: a whole batch, (n, C, H, W) and (n,) or (n, K)."""
        return self.read(rows)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Rows by number, in the order asked for: (n, C, H, W) float16 and their targets."""
        numbers = np.asarray(rows, np.int64)
        if len(self.banks) == 1:
            return torch.from_numpy(self.banks[0].read(numbers)), torch.from_numpy(self.targets[numbers])
        of_bank = np.searchsorted(self._starts, numbers, side="right") - 1
        features = np.empty((len(numbers), *self.banks[0].shape), np.float16)
        for bank in np.unique(of_bank):
            mine = np.flatnonzero(of_bank == bank)
            features[mine] = self.banks[bank].read(numbers[mine] - self._starts[bank])
        return torch.from_numpy(features), torch.from_numpy(self.targets[numbers])

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        workers: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of ((n, C, H, W) float16, targets); the order depends on the seed and the epoch alone.

        Args:
            batch_size: rows a batch of one rank.
            shuffle: another order each epoch.
            workers: reading processes; 0 reads in this one, which is fast where the bank is in the page cache.
            seed: of the order.
            rank: which share of the rows, 0 to world_size - 1; by default what torchrun says.
            world_size: how many shares, likewise; each has as many batches as the others (a few rows may be left
                out).
        """
        rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        return DataLoader(
            self,
            batch_sampler=_Batches(len(self), batch_size, shuffle, seed, rank, world_size),
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )


def concat(datasets: Sequence[BankDataset]) -> BankDataset:
    """The rows of several releases' banks as one data set; classes are matched by name, in the order of the first.

    Raises:
        BankError: the banks are of different featurizers, or their classes or targets differ.
    """
    if not datasets:
        raise BankError("expected at least one bank to combine, found none.")
    first = datasets[0]
    index = first.banks[0].index
    targets = []
    for number, other in enumerate(datasets):
        theirs = other.banks[0].index
        if theirs.featurizer_sha256 != index.featurizer_sha256:
            raise BankError(
                f"bank {number} was made by another featurizer (φ1) than bank 0: their features do not mix. "
                f"Expected {index.featurizer_sha256[:12]}…, found {theirs.featurizer_sha256[:12]}…."
            )
        same = other.names == first.names if index.targets else set(other.names) == set(first.names)
        if not same or theirs.targets != index.targets:
            raise BankError(
                f"bank {number} has other classes or targets than bank 0: expected {list(first.names)}, found "
                f"{list(other.names)}. Select the common classes before releasing."
            )
        new_label = np.array([first.names.index(name) for name in other.names], np.int64)
        targets.append(other.targets if index.targets or not len(new_label) else new_label[other.targets])
    return BankDataset([bank for other in datasets for bank in other.banks], first.names, targets)


def _as_is(batch: Any) -> Any:
    """A batch that `__getitems__` made is one already."""
    return batch


class _Batches(Sampler[list[int]]):
    """Row numbers of each batch of one rank; an epoch is one pass of the iterator."""

    def __init__(self, rows: int, batch_size: int, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(
                f"expected 0 <= rank < world_size and a batch of 1 or more, found {rank}, {world_size}, {batch_size}"
            )
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def __len__(self) -> int:
        return -(-(self.rows // self.world_size) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        self.epoch += 1
        share = order[self.rank : self.rows - self.rows % self.world_size : self.world_size]
        for start in range(0, len(share), self.batch_size):
            yield share[start : start + self.batch_size].tolist()
