"""Feature banks, format 1: a folder of HDF5 shards and an index. No torch.

A shard `SPLIT/shard-NNNNN.h5` holds `/features` (N, C, H, W) float16 with one row a chunk, `/label` (N,) int64
or `/target` (N, K) float32, `/id` (N, 16) uint8, and six attributes. `index.json` is written last, so a folder
without one is unfinished.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpf_release.errors import BankError
from dpf_release.storage import PRIVATE_FILE, PRIVATE_FOLDER, make_folder, replacing, sha256_of, write_json

SplitName = Literal["train", "val", "test"]
INDEX = "index.json"
VERSION: Literal[1] = 1
ID_BYTES = 16
# HDF5 1.10 and newer index chunks in an array of its own; the older B-tree would lie between the rows.
LIBVER = ("v110", "v110")

Rows = NDArray[np.int64]
# (start, stop) of one split -> (stop - start, C, H, W), any float type
FeatureSource = Callable[[int, int], NDArray[np.floating[Any]]]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=2**24)]


class ShardRecord(BaseModel):
    """One shard as the index lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^(train|val|test)/shard-[0-9]{5}\.h5$")]
    rows: Annotated[int, Field(ge=1, le=2**40)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Digest


class BankIndex(BaseModel):
    """`index.json`: what every shard of a bank has in common, and the shards of each split in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["dpf-release-bank"] = "dpf-release-bank"
    version: Literal[1] = VERSION
    encoding: Literal["float16"] = "float16"
    poisoned: bool
    featurizer_sha256: Digest
    feature_shape: tuple[Size, Size, Size]
    targets: Annotated[int, Field(ge=0, le=2**20)]  # columns of `/target`; 0: the shards hold `/label`
    splits: dict[SplitName, tuple[ShardRecord, ...]] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's features."""
        return 2 * int(np.prod(self.feature_shape))


def read_index(folder: Path) -> BankIndex:
    """The index of a bank.

    Raises:
        BankError: no index (an unfinished bank), or one that is not format 1.
    """
    path = folder / INDEX
    if not path.is_file():
        raise BankError(f"expected a finished feature bank with {path}, found none. Run the command that writes it.")
    try:
        return BankIndex.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BankError(f"{path} is not an index of bank format {VERSION}: {error}") from error


# ---------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class BankWriter:
    """Writes a bank split by split; a shard that is there already is kept, so that a crash costs one shard.

    Attributes:
        folder: the bank; made if missing.
        header: the index, without shards.
        shard_bytes: feature bytes a shard holds at the most (at least one row).
        batch_size: rows asked of the source at once; a batch never crosses a shard.
        private: files 0600 and folders 0700, or 0644 and 0755.
    """

    folder: Path
    header: BankIndex
    shard_bytes: int = 2**30
    batch_size: int = 128
    private: bool = True

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full shard."""
        return max(1, self.shard_bytes // self.header.row_bytes)

    def write_split(
        self,
        split: SplitName,
        targets: NDArray[Any],
        ids: NDArray[np.uint8],
        features: FeatureSource,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> tuple[ShardRecord, ...]:
        """The shards of one split.

        Args:
            split: its name.
            targets: (N,) class indices or (N, K) regression targets, in bank order.
            ids: (N, 16) bytes.
            features: called with (start, stop), in order; returns those rows.
            on_rows: told how many more rows are done.

        Raises:
            BankError: a row is not finite in float16, or targets or ids are not what the header says.
        """
        expected = (len(ids), self.header.targets) if self.header.targets else (len(ids),)
        if targets.shape != expected or ids.shape != (len(ids), ID_BYTES) or ids.dtype != np.uint8:
            raise BankError(f"expected targets {expected} and ids (N, {ID_BYTES}), found {targets.shape}, {ids.shape}.")
        targets = targets.astype(np.float32 if self.header.targets else np.int64)
        folder = make_folder(self.folder / split, PRIVATE_FOLDER if self.private else 0o755)
        records = []
        for number, start in enumerate(range(0, len(ids), self.rows_per_shard)):
            stop = min(start + self.rows_per_shard, len(ids))
            path = folder / f"shard-{number:05d}.h5"
            if path.exists() and self._holds(path, split, targets[start:stop], ids[start:stop]):
                on_rows(stop - start)
            else:
                self._write_shard(path, split, start, targets[start:stop], ids[start:stop], features, on_rows)
            records.append(
                ShardRecord(
                    file=f"{split}/{path.name}",
                    rows=stop - start,
                    bytes=path.stat().st_size,
                    sha256=sha256_of(path),
                )
            )
        return tuple(records)

    def finish(self, splits: dict[SplitName, tuple[ShardRecord, ...]]) -> BankIndex:
        """Writes the index; from here on the bank is whole."""
        index = BankIndex.model_validate({**self.header.model_dump(), "splits": splits})
        write_json(self.folder / INDEX, index.model_dump(mode="json"), self._file_mode)
        return index

    @property
    def _file_mode(self) -> int:
        return PRIVATE_FILE if self.private else 0o644

    def _write_shard(
        self,
        path: Path,
        split: str,
        first: int,
        targets: NDArray[Any],
        ids: NDArray[np.uint8],
        features: FeatureSource,
        on_rows: Callable[[int], None],
    ) -> None:
        shape = self.header.feature_shape
        (self.folder / INDEX).unlink(missing_ok=True)  # a bank that changes is unfinished until `finish`
        with (
            replacing(path, self._file_mode) as partial,
            h5py.File(partial, "w", libver=LIBVER, track_times=False) as shard,
        ):
            shard.attrs.update(_attributes(self.header, split))
            dataset = _empty_features(shard, len(ids), shape)
            shard.create_dataset("target" if targets.ndim == 2 else "label", data=targets, track_times=False)
            shard.create_dataset("id", data=ids, track_times=False)
            for start in range(0, len(ids), self.batch_size):
                stop = min(start + self.batch_size, len(ids))
                rows = features(first + start, first + stop)  # (n, C, H, W)
                if rows.shape != (stop - start, *shape):
                    raise BankError(f"expected rows of shape {(stop - start, *shape)}, found {rows.shape}.")
                with np.errstate(over="ignore"):
                    encoded = rows.astype(np.float16)
                if not np.isfinite(encoded).all():
                    raise BankError(
                        f"rows {first + start} to {first + stop} of {split} do not fit float16 (largest magnitude "
                        f"{np.abs(rows).max():g}, limit 65504). Hook the network after a normalisation, or rescale."
                    )
                dataset[start:stop] = encoded
                on_rows(stop - start)

    def _holds(self, path: Path, split: str, targets: NDArray[Any], ids: NDArray[np.uint8]) -> bool:
        """Whether a shard under its final name, therefore whole, is the one that would be written."""
        with open_shard(path) as shard:
            try:
                check_shard(shard, path, self.header, split, len(ids))
            except BankError:
                return False
            name = "target" if targets.ndim == 2 else "label"
            return np.array_equal(shard["id"][:], ids) and np.array_equal(shard[name][:], targets)


def _empty_features(shard: h5py.File, rows: int, shape: tuple[int, int, int]) -> h5py.Dataset:
    """`/features`, its chunks allocated at once: they lie one behind the other, which readers can map."""
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_chunk((1, *shape))
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    create.set_obj_track_times(False)
    space = h5py.h5s.create_simple((rows, *shape))
    return h5py.Dataset(h5py.h5d.create(shard.id, b"features", h5py.h5t.IEEE_F16LE, space, create))


def _attributes(header: BankIndex, split: str) -> dict[str, Any]:
    return {
        "format": header.format,
        "version": header.version,
        "split": split,
        "poisoned": header.poisoned,
        "encoding": header.encoding,
        "featurizer_sha256": header.featurizer_sha256,
    }


# ---------------------------------------------------------------------------------------------- reading


def open_shard(path: Path) -> h5py.File:
    """A shard, open for reading.

    Raises:
        BankError: it is missing, cut off, or no HDF5 file.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise BankError(f"{path} cannot be read as a shard: {error}. Write or fetch it again.") from error


def check_shard(shard: h5py.File, path: Path, header: BankIndex, split: str, rows: int) -> None:
    """That an open shard is format 1 and says what the index says; reads no data.

    Raises:
        BankError: all differences: members, links, storage outside the file, types, shapes, attributes.
    """
    size = path.stat().st_size
    name = "target" if header.targets else "label"
    expected = {
        "features": (np.dtype("<f2"), (rows, *header.feature_shape)),
        name: (np.dtype("<f4"), (rows, header.targets)) if header.targets else (np.dtype("<i8"), (rows,)),
        "id": (np.dtype("u1"), (rows, ID_BYTES)),
    }
    problems = []
    if set(shard) != set(expected):
        problems.append(f"expected the members {sorted(expected)}, found {sorted(shard)}")
    for member, (dtype, shape) in expected.items():
        # Links are looked at before they are followed: one that leaves the file could read any file here.
        if member not in set(shard):
            continue
        if not isinstance(shard.get(member, getlink=True), h5py.HardLink):
            problems.append(f"/{member} is a link")
            continue
        dataset = shard[member]
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
            problems.append(f"/{member} is not a data set stored in this file")
        elif dataset.dtype != dtype or dataset.shape != shape:
            problems.append(f"/{member}: expected {dtype} {shape}, found {dataset.dtype} {dataset.shape}")
        elif dataset.id.get_create_plist().get_nfilters():
            problems.append(f"/{member} has filters; format 1 is written without")
        elif len(dataset.attrs):
            problems.append(f"/{member} has attributes of its own: {sorted(dataset.attrs)}")
        elif dataset.nbytes > size:
            problems.append(f"/{member} claims {dataset.nbytes} bytes in a file of {size}")
        elif member == "features" and dataset.chunks != (1, *header.feature_shape):
            problems.append(f"/features: expected one row a chunk, found chunks {dataset.chunks}")
    found = {key: value.item() if isinstance(value, np.generic) else value for key, value in shard.attrs.items()}
    attributes = _attributes(header, split)
    # As text: an array, or a 0 in the place of False, is not equal.
    if repr(sorted(found.items())) != repr(sorted(attributes.items())):
        problems.append(f"expected the attributes {attributes}, found {found}")
    if problems:
        raise BankError(f"{path.name} of {split} is not a shard of this bank: " + "; ".join(problems) + ".")


class _OpenShard:
    """One mapped shard of one process."""

    def __init__(self, path: Path, header: BankIndex, split: str, rows: int) -> None:
        self.file = open_shard(path)
        check_shard(self.file, path, header, split, rows)
        self.features = _mapped(self.file["features"], path)

    def read(self, rows: Rows) -> NDArray[np.float16]:
        return np.asarray(self.features[rows])


def _mapped(dataset: h5py.Dataset, path: Path) -> NDArray[np.float16]:
    """The rows of `/features` mapped into memory where HDF5 says that they lie: as fast as a raw memmap."""
    offsets = np.full(dataset.shape[0], -1, dtype=np.int64)

    def note(chunk: Any) -> None:
        offsets[chunk.chunk_offset[0]] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    stride = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    last = offsets[0] + stride * (len(offsets) - 1)
    if offsets[0] < 0 or last + stride > path.stat().st_size or np.any(np.diff(offsets) != stride):
        raise BankError(f"the rows of {path.name} do not lie one behind the other, as format 1 writes them.")
    mapped: NDArray[np.float16] = np.memmap(path, dtype="<f2", mode="r", offset=int(offsets[0]), shape=dataset.shape)
    return mapped


class FeatureBank:
    """One split of a bank: rows by number, as numpy arrays.

    Safe to pickle and to use after a fork: files are opened anew in each process, when first read.

    Attributes:
        index: the bank's index.
        split: which split.
    """

    def __init__(self, folder: Path, split: SplitName) -> None:
        self.folder = folder
        self.index = read_index(folder)
        if split not in self.index.splits:
            raise BankError(f"expected a split {split!r} in {folder}, found {sorted(self.index.splits)}.")
        self.split: SplitName = split
        self._shards = self.index.splits[split]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])  # (shards + 1,)
        self._open: dict[int, _OpenShard] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Without open files and without what can be read again."""
        state = self.__dict__ | {"_open": {}}
        return {key: value for key, value in state.items() if key not in {"ids", "targets"}}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a row."""
        return self.index.feature_shape

    @cached_property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) random bytes, one id a row."""
        return self._all("id", np.empty((0, ID_BYTES), np.uint8))

    @cached_property
    def targets(self) -> NDArray[Any]:
        """(N,) int64 class indices, or (N, K) float32 regression targets."""
        if self.index.targets:
            return self._all("target", np.empty((0, self.index.targets), np.float32))
        return self._all("label", np.empty(0, np.int64))

    def read(self, rows: Rows | Sequence[int]) -> NDArray[np.float16]:
        """Rows by number, (n, C, H, W), in the order asked for.

        Raises:
            IndexError: a row number below 0 or beyond the last row.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows 0 to {len(self) - 1} exist, asked for {rows.min()} to {rows.max()}")
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        present = np.unique(shards)
        if len(present) == 1:
            return self._shard(int(present[0])).read(rows - self._starts[present[0]])
        out = np.empty((len(rows), *self.shape), dtype=np.float16)
        for number in present:
            mine = np.flatnonzero(shards == number)
            out[mine] = self._shard(int(number)).read(rows[mine] - self._starts[number])
        return out

    def batches(self, size: int) -> Iterator[tuple[Rows, NDArray[np.float16]]]:
        """All rows in order: their numbers and their features, `size` at a time."""
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield rows, self.read(rows)

    def _shard(self, number: int) -> _OpenShard:
        if self._pid != os.getpid():  # a handle belongs to the process that opened it
            self._open, self._pid = {}, os.getpid()
        if number not in self._open:
            record = self._shards[number]
            self._open[number] = _OpenShard(self.folder / record.file, self.index, self.split, record.rows)
        return self._open[number]

    def _all(self, member: str, empty: NDArray[Any]) -> NDArray[Any]:
        parts = [self._shard(number).file[member][:] for number in range(len(self._shards))]
        return np.concatenate([empty, *parts])
