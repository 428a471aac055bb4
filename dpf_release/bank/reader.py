"""`FeatureBank`: rows of a split by number, mapped where they lie uncompressed."""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import FLOAT16, HDF5_ERRORS, BankIndex, SplitName, check_shard, open_shard, read_index
from dpf_release.bank.hdf5_check import NOWHERE, read_layout
from dpf_release.core.arrays import Rows
from dpf_release.errors import BankError

LARGE_ROW_BYTES = 2**15
DEFLATE_LEFT_OUT = 0b10  # HDF5 does so where a row would grow by it
DEFLATE_BYTES = 2**6  # that deflate takes for itself, and a little of the row
# Each open shard is a file handle; 1,024 is what a process commonly may have.
MAX_OPEN_SHARDS = 256


class _MappedShard:
    """The rows of an uncompressed shard, mapped where HDF5 says that they lie: as fast as a raw `numpy.memmap`."""

    def __init__(self, path: Path, offset: int, rows: int, index: BankIndex) -> None:
        self.offset, self.row_bytes = offset, index.row_bytes
        self.mapping = _mapped(path)
        try:
            flat = np.frombuffer(self.mapping, FLOAT16, rows * math.prod(index.feature_shape), offset)
        except ValueError as error:  # shorter since it was checked
            raise BankError(f"{path} cannot be read as a shard: {error}. Write or fetch it again.") from error
        self.features = flat.reshape(rows, *index.feature_shape)

    def read(self, rows: Rows, places: Rows, out: NDArray[np.float16]) -> None:
        """Those of `rows` that are at `places`, to the same places of `out`."""
        if len(places) == len(rows):  # "raise" would copy twice; bounds are checked before
            np.take(self.features, rows, axis=0, out=out, mode="clip")
        elif self.row_bytes < LARGE_ROW_BYTES:
            out[places] = np.take(self.features, rows[places], axis=0)
        else:  # one copy of each row, in the place of two
            for place in places:
                out[place] = self.features[rows[place]]

    def will_need(self, start: int, stop: int) -> None:
        first = (self.offset + start * self.row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        self.mapping.madvise(mmap.MADV_WILLNEED, first, self.offset + stop * self.row_bytes - first)


class _GzipShard:
    """The rows of a shard compressed with gzip. Each is unpacked to its size and no further; HDF5 would go on."""

    def __init__(self, path: Path, stored: NDArray[np.void], index: BankIndex) -> None:
        self.name, self.stored, self.row_bytes = path.name, stored, index.row_bytes
        self.mapping = memoryview(_mapped(path))  # whose pieces are no copies: the disk is waited for in `decompress`

    def read(self, rows: Rows, places: Rows, out: NDArray[np.float16]) -> None:
        """Those of `rows` that are at `places`, to the same places of `out`."""
        for place in places:
            out[place] = self._row(int(rows[place])).reshape(out.shape[1:])

    def _row(self, row: int) -> NDArray[np.float16]:
        begin, size, mask = self.stored[row].tolist()
        octets: memoryview | bytes = self.mapping[begin : begin + size]
        whole = True
        if mask != DEFLATE_LEFT_OUT:
            unpack = zlib.decompressobj()
            try:
                octets = unpack.decompress(octets, self.row_bytes + 1)
            except zlib.error as error:
                raise BankError(f"row {row} of {self.name} cannot be unpacked: {error}. Fetch it again.") from error
            whole = unpack.eof and not unpack.unused_data
        if mask not in {0, DEFLATE_LEFT_OUT} or not whole or len(octets) != self.row_bytes:
            raise BankError(f"row {row} of {self.name} does not unpack to {self.row_bytes} bytes. Fetch it again.")
        shuffled = np.frombuffer(octets, np.uint8).reshape(2, -1)  # all low bytes, then all high ones
        return np.ascontiguousarray(shuffled.T).view(FLOAT16)[:, 0]


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # gone, or empty, since it was checked
        raise BankError(f"{path} cannot be read as a shard: {error}. Write or fetch it again.") from error


_OpenShard = _MappedShard | _GzipShard


def row_numbers(rows: Rows | Sequence[int]) -> Rows:
    """Row numbers as an array; an IndexError for a mask, or fractions."""
    numbers = np.asarray(rows)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise IndexError(f"expected row numbers, found {numbers.dtype}; np.flatnonzero gives those of a mask")
    return numbers.astype(np.int64, copy=False)


class FeatureBank:
    """One split of a bank: rows by number, as numpy arrays.

    Safe to pickle and to use after a fork: files are opened anew in each process, when first read. A slice or a list
    of row numbers gives (features, targets): `bank[:100]`.

    Attributes:
        index: the bank's index.
        split: which split.
        rectified: whether what is below 0 is read as 0, as the encoding says.

    Example:
        >>> from pathlib import Path
        >>> from dpf_release import FeatureBank
        >>> bank = FeatureBank(Path("my-release/release/features"), "train")
        >>> features, targets = bank[:10]
        >>> features.dtype.name, len(targets)
        ('float16', 10)
    """

    def __init__(self, folder: Path, split: SplitName, index: BankIndex | None = None) -> None:
        self.folder = folder
        self.index = read_index(folder) if index is None else index
        if split not in self.index.splits:
            raise BankError(f"expected a split {split!r} in {folder}, found {sorted(self.index.splits)}.")
        self.split: SplitName = split
        self.rectified = self.index.encoding == "float16 before ReLU"
        self._shards = self.index.splits[split]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])  # (shards + 1,)
        self._open: dict[int, _OpenShard] = {}
        self._offsets: dict[int, int] = {}  # of the rows in the shards that were checked
        self._pid = os.getpid()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and without what can be read again."""
        state = self.__dict__ | {"_open": {}, "_offsets": {}}
        return {key: value for key, value in state.items() if key not in {"ids", "targets"}}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a row."""
        return self.index.feature_shape

    @cached_property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) random bytes, one id a row."""
        return self._all("id")

    @cached_property
    def targets(self) -> NDArray[Any]:
        """(N,) int64 class indices, or (N, K) float32 regression targets."""
        return self._all(self.index.target_member)

    def __getitem__(self, rows: int | slice | Sequence[int] | Rows) -> tuple[NDArray[np.float16], NDArray[Any]]:
        """Features and targets: (C, H, W) and one target of a row, (n, C, H, W) and (n, ...) of several."""
        if isinstance(rows, int | np.integer):
            features, targets = self[[range(len(self))[rows]]]
            return features[0], targets[0]
        targets = self.targets  # of as many rows as there are: an index may claim more
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else row_numbers(rows)
        return self.read(numbers), targets[numbers]

    def read(self, rows: Rows | Sequence[int], out: NDArray[np.float16] | None = None) -> NDArray[np.float16]:
        """Rows by number, (n, C, H, W), in the order asked for; in `out` if given.

        Raises:
            IndexError: a row number below 0 or beyond the last row.
        """
        rows = row_numbers(rows)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows 0 to {len(self) - 1} exist, asked for {rows.min()} to {rows.max()}")
        if out is None:
            if rows.size:  # room is made for rows whose shape a shard has
                self._shard(int(np.searchsorted(self._starts, rows[0], side="right")) - 1)
            out = np.empty((len(rows), *self.shape), FLOAT16)
        # Not a `rows.Concat` of shards, whose parts are read to arrays of their own: each row is copied once here.
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shards):
            self._shard(int(number)).read(rows - self._starts[number], np.flatnonzero(shards == number), out)
        if self.rectified:
            bits = out.view(np.uint16)  # several times faster than comparing float16
            bits *= bits < 0x8000  # no sign
        return out

    def before_relu(self) -> FeatureBank:
        """The same rows as they were before φ1's last ReLU, where that is how they are stored; else as they are."""
        bank = copy.copy(self)
        bank.rectified = False
        return bank

    def will_need(self, start: int, stop: int) -> None:
        """Asks the system to have rows `start` to `stop` in memory soon; returns at once."""
        if self.index.compression != "none":
            return  # unpacking takes longer than the disk
        for number in range(len(self._shards)):
            first, last = self._starts[number], self._starts[number + 1]
            shard = self._shard(number) if start < last and first < stop else None
            if isinstance(shard, _MappedShard):
                shard.will_need(int(max(start, first) - first), int(min(stop, last) - first))

    def batches(self, size: int) -> Iterator[tuple[Rows, NDArray[np.float16]]]:
        """All rows in order: their numbers and their features, `size` at a time."""
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield rows, self.read(rows)

    def _shard(self, number: int, *, checked: bool = False) -> _OpenShard:
        if self._pid != os.getpid():  # a handle belongs to the process that opened it
            self._open, self._offsets, self._pid = {}, {}, os.getpid()
        opened = self._open  # of this thread from here on: another may put a shard out meanwhile
        shard = opened.get(number)
        if shard is None:
            while len(opened) >= MAX_OPEN_SHARDS:
                opened.pop(list(opened)[0], None)
            shard = opened[number] = self._opened(number, checked)
        return shard

    def _opened(self, number: int, checked: bool) -> _OpenShard:
        record = self._shards[number]
        path = self.folder / record.file
        if number not in self._offsets:  # once it was checked there is no need of HDF5
            with contextlib.nullcontext() if checked else self._checked(number):
                layout = read_layout(path)
            if self.index.compression == "gzip":
                stored, most = layout.rows.get("features"), self.index.row_bytes
                if stored is None or (stored["offset"] == NOWHERE).any():
                    raise BankError(f"{path.name} lacks rows. Write or fetch it again.")
                if (stored["size"] > most + DEFLATE_BYTES + most // 100).any():
                    raise BankError(f"{path.name} has rows that take more room compressed than they have bytes.")
                return _GzipShard(path, stored, self.index)
            if "features" not in layout.begins:
                raise BankError(f"the rows of {path.name} do not lie one behind the other, as format 1 writes them.")
            self._offsets[number] = layout.begins["features"]
        return _MappedShard(path, self._offsets[number], record.rows, self.index)

    @contextlib.contextmanager
    def _checked(self, number: int) -> Iterator[h5py.File]:
        record = self._shards[number]
        path = self.folder / record.file
        with open_shard(path) as file:
            check_shard(file, path, self.index, self.split, record.rows)
            yield file

    def _all(self, member: str) -> NDArray[Any]:
        dtype, shape = self.index.members(0)[member]
        parts: list[NDArray[Any]] = [np.empty(shape, dtype)]
        for number in range(len(self._shards)):
            with self._checked(number) as file:
                self._shard(number, checked=True)  # whose labels are taken must be whole
                try:
                    parts.append(file[member][:])
                except HDF5_ERRORS as error:
                    raise BankError(f"/{member} of {file.filename} cannot be read: {error}. Fetch it again.") from error
        return np.concatenate(parts)
