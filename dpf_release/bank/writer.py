"""Writing feature banks, format 1: shard by shard, each whole or not there. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import ID_BYTES, INDEX, BankIndex, ShardRecord, SplitName, check_shard, encoded, open_shard
from dpf_release.bank.hdf5_check import MAX_CHUNKS
from dpf_release.core.files import make_folder, replacing, reserve, sha256_of, write_json
from dpf_release.errors import BankError

# HDF5 1.10 and newer index chunks in an array of its own; the older B-tree would lie between the rows.
LIBVER = ("v110", "v110")
GZIP_LEVEL = 1  # docs/banks.md: even this costs much and saves little
# Bytes that HDF5 takes for itself, at the most: of a shard, and of a row (its chunk's place, a filter's header).
SHARD_OVERHEAD, ROW_OVERHEAD = 16_384, 512

Features = Iterator[NDArray[np.floating[Any]]]  # of one batch after the other, (n, C, H, W)


@dataclass(frozen=True)
class SplitRows:
    """What a bank holds of a split beside the features, in its order."""

    targets: NDArray[Any]  # (N,) class indices, or (N, K) regression targets
    ids: NDArray[np.uint8]  # (N, 16) bytes


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of a split: a batch, or all of a shard."""

    split: SplitName
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Shard(Span):
    """A shard that a bank has or will have."""

    file: str  # its path in the bank


@dataclass(frozen=True)
class BankWriter:
    """Writes a bank shard by shard, for its owner alone; a shard that is there is kept, so that a crash costs one."""

    folder: Path  # made if missing
    header: BankIndex  # without shards
    shard_bytes: int = 2**30  # of features at the most, before compression (at least one row)
    batch_size: int = 128  # rows computed at once; a batch never crosses a shard

    def shards(self, rows: Mapping[SplitName, SplitRows]) -> list[Shard]:
        """All shards of a bank of these rows, in the order of the index.

        Raises:
            BankError: targets or ids are not what the header says.
        """
        size = max(1, self.shard_bytes // self.header.row_bytes)
        if self.header.compression != "none":
            size = min(size, MAX_CHUNKS)
        shards = []
        for split, own in rows.items():
            targets, ids, count = own.targets, own.ids, len(own.ids)
            expected = self.header.members(count)
            if (ids.dtype, ids.shape) != expected["id"] or targets.shape != expected[self.header.target_member][1]:
                raise BankError(
                    f"expected targets {expected[self.header.target_member][1]} and ids (N, {ID_BYTES}), found "
                    f"{targets.shape}, {ids.shape}."
                )
            for number, start in enumerate(range(0, count, size)):
                shards.append(Shard(split, start, min(start + size, count), f"{split}/shard-{number:05d}.h5"))
        return shards

    def batches(self, shards: Sequence[Shard]) -> list[Span]:
        """The batches of these shards, in the order in which `write` wants their features."""
        return [
            Span(shard.split, start, min(start + self.batch_size, shard.stop))
            for shard in shards
            for start in range(shard.start, shard.stop, self.batch_size)
        ]

    def bytes_of(self, shards: Sequence[Span]) -> int:
        """Bytes that these rows take on disk, at the most."""
        row_bytes = self.header.row_bytes + ID_BYTES + max(8, 4 * self.header.targets)
        return sum((row_bytes + ROW_OVERHEAD) * len(shard) + SHARD_OVERHEAD for shard in shards)

    def holds(self, shard: Shard, rows: Mapping[SplitName, SplitRows]) -> bool:
        """Whether the shard is there: under its final name, therefore whole, and of these rows."""
        path = self.folder / shard.file
        if not path.exists():
            return False
        targets, ids = self._encoded(rows[shard.split].targets), rows[shard.split].ids
        try:
            with open_shard(path) as file:
                check_shard(file, path, self.header, shard.split, len(shard))
                return np.array_equal(file["id"][:], ids[shard.start : shard.stop]) and np.array_equal(
                    file[self.header.target_member][:], targets[shard.start : shard.stop]
                )
        except (BankError, OSError, RuntimeError, KeyError):  # damaged since: written anew
            return False

    def write(
        self,
        shards: Sequence[Shard],
        rows: Mapping[SplitName, SplitRows],
        features: Features,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Writes some of `shards`, each to a partial file that takes its name when it is whole and on disk.

        The features are those of `batches(shards)`; `on_rows` is told how many more rows are done.

        Raises:
            BankError: a row is not finite in float16, or not of the header's shape.
            StorageError: the disk does not take them.
        """
        for shard in shards:
            path = self.folder / shard.file
            make_folder(path.parent)
            (self.folder / INDEX).unlink(missing_ok=True)  # a bank that changes is unfinished until `finish`
            with replacing(path) as partial:
                # HDF5 does not survive a disk that fills up under it: all it may need is taken before, once to see
                # whether it is there, and once for the file that HDF5 begins anew.
                size = self.bytes_of([shard])
                with partial.open("r+b") as empty:
                    reserve(empty.fileno(), size)
                with h5py.File(partial, "w", libver=LIBVER, track_times=False) as file:
                    reserve(file.id.get_vfd_handle(), size)
                    self._fill(file, shard, rows[shard.split], features, on_rows)
                    file.flush()
                    end = file.id.get_filesize()
                os.truncate(partial, end)

    def record(self, shard: Shard) -> ShardRecord:
        """A shard that is there, as the index lists it."""
        path = self.folder / shard.file
        return ShardRecord(file=shard.file, rows=len(shard), bytes=path.stat().st_size, sha256=sha256_of(path))

    def finish(self, records: Sequence[ShardRecord]) -> BankIndex:
        """Writes the index of all shards; from here on the bank is whole."""
        splits: dict[str, list[ShardRecord]] = {}
        for record in records:
            splits.setdefault(record.file.split("/")[0], []).append(record)
        index = BankIndex.model_validate({**self.header.model_dump(), "splits": splits})
        write_json(self.folder / INDEX, index.model_dump(mode="json", exclude=set() if index.drawn else {"drawn"}))
        return index

    def _encoded(self, targets: NDArray[Any]) -> NDArray[Any]:
        return targets.astype(self.header.members(len(targets))[self.header.target_member][0])

    def _fill(
        self, file: h5py.File, shard: Shard, rows: SplitRows, features: Features, on_rows: Callable[[int], None]
    ) -> None:
        file.attrs.update(self.header.attributes(shard.split))
        dataset = _empty_features(file, len(shard), self.header)
        targets = self._encoded(rows.targets[shard.start : shard.stop])
        file.create_dataset(self.header.target_member, data=targets, track_times=False)
        file.create_dataset("id", data=rows.ids[shard.start : shard.stop], track_times=False)
        for span in self.batches([shard]):
            try:
                computed = next(features)
            except OSError as error:  # not this file's: it must not be told as one
                raise BankError(
                    f"rows {span.start} to {span.stop} of {span.split} could not be made: {error}. What is written "
                    "stays; run the same command again to go on."
                ) from error
            if computed.shape != (expected := (len(span), *self.header.feature_shape)):
                raise BankError(f"expected rows of shape {expected}, found {computed.shape}.")
            try:
                stored = encoded(computed)
            except ValueError as error:
                raise BankError(
                    f"rows {span.start} to {span.stop} of {span.split} {error}. Hook the network after a "
                    "normalisation, or rescale."
                ) from error
            dataset[span.start - shard.start : span.stop - shard.start] = stored
            on_rows(len(span))


def _empty_features(file: h5py.File, rows: int, header: BankIndex) -> h5py.Dataset:
    """`/features`; uncompressed its chunks are allocated at once, one behind the other: readers map them."""
    dtype, shape = header.members(rows)["features"]
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_chunk((1, *header.feature_shape))
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    if header.compression == "none":
        create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    else:
        create.set_shuffle()
        create.set_deflate(GZIP_LEVEL)
    space, stored = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype)
    return h5py.Dataset(h5py.h5d.create(file.id, b"features", stored, space, create))
