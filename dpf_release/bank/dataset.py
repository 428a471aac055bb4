"""Banks for training with torch: a data set, its loader, and several banks as one."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dpf_release.bank.format import SplitName
from dpf_release.bank.reader import FeatureBank, row_numbers
from dpf_release.bank.rows import Concat
from dpf_release.core.arrays import Rows
from dpf_release.errors import BankError

BLOCK_BYTES = 8 * 2**20  # long enough for a disk to read at its full speed
BATCHES_AHEAD = 2  # of each worker
WINDOW_BLOCKS = 32  # as much as a machine can be asked to keep in its page cache for each loader


class BankDataset(Dataset[tuple[Tensor, Tensor]]):
    """Rows of one or more banks of one featurizer.

    An item is ((C, H, W) float16 features, target): the class index, or (K,) float32 regression targets.

    Attributes:
        names: of the classes, by index; of the target columns for regression.
    """

    def __init__(self, banks: Sequence[FeatureBank], names: Sequence[str], targets: Sequence[NDArray[Any]]) -> None:
        self.banks, self.names = tuple(banks), tuple(names)
        self.targets = np.concatenate(targets)
        self._rows = Concat(self.banks)

    @classmethod
    def open(cls, folder: str | Path, split: SplitName, names: Sequence[str] = ()) -> BankDataset:
        """One split of a bank folder, such as one's own φ1(T) from `featurize --release`; names are `release.names`.

        Raises:
            BankError: no finished bank of format 1, no such split, or labels that are not among the names.
        """
        bank = FeatureBank(Path(folder), split)
        if names and not bank.index.targets and not np.isin(bank.targets, np.arange(len(names))).all():
            raise BankError(f"{folder} has labels beyond its {len(names)} classes. Fetch or write it again.")
        return cls([bank], names, [bank.targets])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: int | slice) -> tuple[Tensor, Tensor]:
        """Features and targets: (C, H, W) and one target of a row, (n, C, H, W) and (n, ...) of a slice."""
        if isinstance(rows, slice):
            return self.read(range(len(self))[rows])
        features, targets = self.read([range(len(self))[rows]])
        return features[0], targets[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Several items, read at once: what a torch `DataLoader` with its own collation asks for."""
        return list(zip(*self.read(rows), strict=True))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's features."""
        return self.banks[0].index.row_bytes

    @property
    def digest(self) -> str:
        """Changes with any row of any bank, and with their order: from the digests of the shards."""
        shards = [[shard.sha256 for shard in bank.index.splits[bank.split]] for bank in self.banks]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    def read(self, rows: Sequence[int] | Rows, out: NDArray[np.float16] | None = None) -> tuple[Tensor, Tensor]:
        """Rows by number, in the order asked for, into `out` if given: (n, C, H, W) float16 and their targets."""
        rows = row_numbers(rows)
        if len(self.banks) == 1:
            out = self.banks[0].read(rows, out)
        else:
            out = np.empty((len(rows), *self.banks[0].shape), np.float16) if out is None else out
            for bank, places, mine in self._rows.split(rows):
                out[places] = self.banks[bank].read(mine)
        return torch.from_numpy(out), torch.from_numpy(self.targets[rows])

    def numpy(self, rows: slice | Sequence[int] | Rows) -> tuple[NDArray[np.float16], NDArray[Any]]:
        """Features and targets of some rows as arrays; `dpf_release.FeatureBank` needs no torch for it."""
        features, targets = self.read(range(len(self))[rows] if isinstance(rows, slice) else rows)
        return features.numpy(), targets.numpy()

    def will_need(self, start: int, stop: int) -> None:
        """Asks the system to have rows `start` to `stop` in memory soon; returns at once."""
        for bank, first in zip(self.banks, self._rows.starts, strict=True):
            bank.will_need(max(0, start - int(first)), stop - int(first))

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        workers: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        device: str | torch.device | None = None,
    ) -> BankLoader:
        """Batches of ((n, C, H, W) float16, targets); the order depends on the seed and the epoch alone.

        Args:
            batch_size: rows a batch of one rank.
            shuffle: another order each epoch, in blocks that are read one behind the other: see `block_shuffle`.
            workers: how many threads read ahead; 0: none.
            seed: of the order.
            rank: which share of the rows, 0 to world_size - 1; by default what torchrun says.
            world_size: how many shares, likewise; each has as many batches as the others (a few rows are left out,
                others each epoch).
            device: where batches go; to a GPU from pinned memory, while the one before is computed on. None: they stay.
        """
        rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
        where = None if device is None else torch.device(device)
        return BankLoader(self, batch_size, shuffle, workers, seed, rank, world_size, where)


def concat(datasets: Sequence[BankDataset], *, allow_shortcut: bool = False) -> BankDataset:
    """The rows of several banks as one data set; classes are matched by name, new ones come after those before.

    Args:
        datasets: of one featurizer: releases' banks, one's own.
        allow_shortcut: also where some classes have drawn rows alone and others none. A classifier tells drawn rows
            from real ones, and learns that in the place of the classes.

    Raises:
        BankError: the banks are of different featurizers or their regression targets differ; or such a shortcut.

    Example:
        >>> from dpf_release import Release, concat
        >>> release = Release.open("my-release/release")
        >>> bank = concat([release.bank("train"), release.bank("val")])
        >>> len(bank) == len(release.bank("train")) + len(release.bank("val"))
        True
    """
    if not datasets:
        raise BankError("expected at least one bank to combine, found none.")
    first = datasets[0]
    index = first.banks[0].index
    names, targets = list(first.names), []
    for number, other in enumerate(datasets):
        theirs = other.banks[0].index
        if theirs.featurizer_sha256 != index.featurizer_sha256:
            raise BankError(
                f"bank {number} was made by another featurizer (φ1) than bank 0: their features do not mix. "
                f"Expected {index.featurizer_sha256[:12]}…, found {theirs.featurizer_sha256[:12]}…."
            )
        if theirs.targets != index.targets or (index.targets and other.names != first.names):
            raise BankError(
                f"bank {number} has other targets than bank 0: expected {list(first.names)}, found "
                f"{list(other.names)}. Only banks of the same targets combine."
            )
        if bool(other.names) != bool(first.names):
            raise BankError(f"bank {0 if other.names else number} has no names of its classes: open it with `names`.")
        if not index.targets:
            names += [name for name in other.names if name not in names]
            new_label = np.array([names.index(name) for name in other.names], np.int64)
        targets.append(other.targets if index.targets or not len(other.names) else new_label[other.targets])
    joined = BankDataset([bank for other in datasets for bank in other.banks], names, targets)
    if not (allow_shortcut or index.targets):
        _refuse_shortcut(joined)
    return joined


def _refuse_shortcut(joined: BankDataset) -> None:
    """That no class has drawn rows alone where another has none."""
    drawn = np.concatenate([np.full(len(bank), bank.index.drawn) for bank in joined.banks])
    kinds = [{bool(kind) for kind in np.unique(drawn[joined.targets == label])} for label in range(len(joined.names))]
    only_drawn, only_real = (
        [name for name, found in zip(joined.names, kinds, strict=True) if found == {kind}] for kind in (True, False)
    )
    if only_drawn and only_real:
        raise BankError(
            f"the rows of {', '.join(only_drawn)} are drawn and those of {', '.join(only_real)} are not: a classifier "
            "would learn to tell drawn rows from real ones, and do badly on real images. Put your images through the "
            "same procedure, with `dpf-release featurize --release R --images T --draw` or release.draw(...), and "
            "combine those; or pass allow_shortcut=True."
        )


def block_shuffle(rows: int, row_bytes: int, generator: np.random.Generator) -> list[Rows]:
    """All row numbers in a random order that a disk reads in long runs, as windows one after the other.

    Blocks of neighbouring rows (8 MiB) are shuffled; then the rows within each window of 32 blocks. A row comes
    anywhere in the epoch with equal chance; it stays within one window (256 MiB, or all rows where they are fewer) of
    the rows of its block, whose borders are others each epoch. A bank's rows lie in a random order already.
    """
    block = max(1, BLOCK_BYTES // row_bytes)
    if rows <= block * WINDOW_BLOCKS:
        return [generator.permutation(rows)]
    borders = np.arange(int(generator.integers(block)) - block, rows, block)
    windows = []
    for starts in np.array_split(generator.permutation(borders), -(-len(borders) // WINDOW_BLOCKS)):
        members = [np.arange(max(0, start), min(start + block, rows)) for start in starts]
        windows.append(generator.permutation(np.concatenate(members)))
    return windows


class BankLoader:
    """Batches of a bank, epoch after epoch; an epoch is one `for` over it."""

    def __init__(
        self,
        dataset: BankDataset,
        batch_size: int,
        shuffle: bool,
        workers: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device | None,
    ) -> None:
        if not 0 <= rank < world_size or batch_size < 1:
            raise ValueError(
                f"expected 0 <= rank < world_size and a batch of 1 or more, found {rank}, {world_size}, {batch_size}"
            )
        self.dataset, self._batch_size, self._shuffle, self._workers = dataset, batch_size, shuffle, workers
        self._seed, self._rank, self._world_size, self._device = seed, rank, world_size, device
        self._pin = device is not None and device.type == "cuda"
        self._rows = len(dataset) // world_size  # of one rank in an epoch
        self._epoch = self._start = self._done = (
            0  # batches before the next `for`, and those given since the epoch began
        )

    @property
    def epoch(self) -> int:
        """Which epoch the next `for` is; set it to choose."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch, self._start, self._done = epoch, 0, 0

    def __len__(self) -> int:
        return -(-self._rows // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._done > self._start:  # the `for` before was left early
            self.epoch += 1
        # Rows are copied, and unpacked, outside Python's lock: threads read them, and hand over a batch for nothing.
        for features, targets in self._in_threads() if self._workers else map(self._read, self.batch_sampler):
            self._done += 1
            if self._device is not None:
                features = features.to(self._device, non_blocking=True)
                targets = targets.to(self._device, non_blocking=True)
            yield features, targets
        self.epoch += 1

    @property
    def batch_sampler(self) -> Iterator[Rows]:
        """Row numbers of each batch of this rank, from where it stands in the epoch on."""
        rows, row_bytes = len(self.dataset), self.dataset.banks[0].index.row_bytes
        if self._shuffle:
            windows = block_shuffle(rows, row_bytes, np.random.default_rng([self._seed, self._epoch]))
        else:
            count = -(-rows * row_bytes // (WINDOW_BLOCKS * BLOCK_BYTES))
            windows = np.array_split(np.arange(rows), max(1, count))
        order, ends = np.concatenate(windows), np.cumsum([len(window) for window in windows])
        announced = 0
        first, last = self._rank * self._rows, (self._rank + 1) * self._rows
        for start in range(first + self._start * self._batch_size, last, self._batch_size):
            window = int(np.searchsorted(ends, start, side="right"))
            for coming in range(max(announced, window), min(window + 2, len(windows))):
                begin = int(ends[coming]) - len(windows[coming])
                self._announce(order[max(begin, first) : min(int(ends[coming]), last)])
                announced = coming + 1
            yield order[start : min(start + self._batch_size, last)]

    def _announce(self, rows: Rows) -> None:
        """Tells the system what is read next, in runs, so that the disk is read while batches are computed on."""
        ascending = np.sort(rows)
        for run in np.split(ascending, np.flatnonzero(np.diff(ascending) > 1) + 1):
            if len(run):  # none where the window is all of other ranks
                self.dataset.will_need(int(run[0]), int(run[-1]) + 1)

    def _read(self, rows: Rows, out: NDArray[np.float16] | None = None) -> tuple[Tensor, Tensor]:
        features, targets = self.dataset.read(rows, out)
        return (features.pin_memory(), targets.pin_memory()) if self._pin else (features, targets)

    def _in_threads(self) -> Iterator[tuple[Tensor, Tensor]]:
        shape = self.dataset.banks[0].shape
        with ThreadPoolExecutor(self._workers) as pool:
            coming: deque[Future[tuple[Tensor, Tensor]]] = deque()
            try:
                for rows in self.batch_sampler:
                    # Made here, as freed here: another thread's memory goes back to the system, and is zeroed anew.
                    coming.append(pool.submit(self._read, rows, np.empty((len(rows), *shape), np.float16)))
                    if len(coming) > BATCHES_AHEAD * self._workers:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                for future in coming:
                    future.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: numbers and texts only, one state for all ranks."""
        return {**self._order(), "epoch": self.epoch, "batches": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on there: the next `for` gives the batches that remain of that epoch.

        Raises:
            ValueError: the state is of a loader with another bank, batches, order or number of ranks.
        """
        order = self._order()
        if {key: state.get(key) for key in order} != order:
            raise ValueError(f"expected the state of a loader with {order}, found {dict(state)}")
        self.epoch = int(state["epoch"])
        self._start = self._done = int(state["batches"])
        if self._done == len(self):
            self.epoch += 1

    def _order(self) -> dict[str, Any]:
        own = {"batch_size": self._batch_size, "shuffle": self._shuffle, "seed": self._seed}
        return {"bank": self.dataset.digest, **own, "world_size": self._world_size}
