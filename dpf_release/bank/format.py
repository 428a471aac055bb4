"""Feature banks, format 1: a folder of HDF5 shards and an index, and how they are read. No torch.

A shard `SPLIT/shard-NNNNN.h5` holds `/features` (N, C, H, W) float16 with one row a chunk, `/label` (N,) int64
or `/target` (N, K) float32, `/id` (N, 16) uint8, and six attributes. `index.json` is written last, so a folder
without one is unfinished. `writer` writes them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from dpf_release.bank.hdf5_check import read_layout
from dpf_release.core.bounded_json import Record, read_json
from dpf_release.errors import BankError

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
RELEASED_SPLITS: tuple[SplitName, ...] = ("train", "val")
INDEX = "index.json"
VERSION: Literal[1] = 1
ID_BYTES = 16
FLOAT16 = np.dtype("<f2")
Compression = Literal["none", "gzip"]
Encoding = Literal["float16", "float16 before ReLU"]  # of the second, what is below 0 is read as 0
# HDF5's numbers of the filters that `/features` has, in order: byte shuffle, deflate.
FILTERS: dict[Compression, tuple[int, ...]] = {"none": (), "gzip": (2, 1)}
# A file claims at most so many times its size; 1,032 is deflate's limit.
MOST_COMPRESSED: dict[Compression, int] = {"none": 1, "gzip": 1100}
HDF5_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError)  # what h5py raises on a damaged file

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=2**24)]
MAX_ROW_BYTES = 2**27


class ShardRecord(Record):
    """One shard as the index lists it."""

    file: Annotated[str, Field(pattern=r"^(train|val|test)/shard-[0-9]{5}\.h5$")]
    rows: Annotated[int, Field(ge=1, le=2**40)]
    bytes: Annotated[int, Field(ge=1)]
    sha256: Digest


class BankIndex(Record):
    """`index.json`: what every shard of a bank has in common, and the shards of each split in order."""

    format: Literal["dpf-release-bank"] = "dpf-release-bank"
    version: Literal[1] = VERSION
    encoding: Encoding = "float16"
    compression: Compression = "none"
    poisoned: bool
    drawn: bool = False  # whether rows were drawn, and belong to no image; written where they were
    featurizer_sha256: Digest
    feature_shape: tuple[Size, Size, Size]
    targets: Annotated[int, Field(ge=0, le=2**20)]  # columns of `/target`; 0: the shards hold `/label`
    splits: dict[SplitName, tuple[ShardRecord, ...]] = {}

    @field_validator("compression", mode="before")
    @classmethod
    def _is_not_of_an_earlier_version(cls, compression: Any) -> Any:
        if compression == "blosc2":
            raise ValueError("Blosc2, which an earlier version wrote, is not read any more. Write the bank again")
        return compression

    @model_validator(mode="after")
    def _has_rows_of_a_possible_size(self) -> BankIndex:
        if self.row_bytes > MAX_ROW_BYTES:
            raise ValueError(f"rows of {self.row_bytes} bytes, expected at most {MAX_ROW_BYTES}")
        return self

    @model_validator(mode="after")
    def _lists_each_shard_once(self) -> BankIndex:
        for split, shards in self.splits.items():
            if len({shard.file for shard in shards}) != len(shards):
                raise ValueError(f"a shard of {split} is listed twice")
            if not all(shard.file.startswith(f"{split}/") for shard in shards):
                raise ValueError(f"{split} lists a shard of another split")
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's features."""
        return FLOAT16.itemsize * math.prod(self.feature_shape)

    @property
    def target_member(self) -> str:
        """Which member of a shard holds the targets."""
        return "target" if self.targets else "label"

    def members(self, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of each member of a shard of so many rows."""
        targets = (np.dtype("<f4"), (rows, self.targets)) if self.targets else (np.dtype("<i8"), (rows,))
        features = (FLOAT16, (rows, *self.feature_shape))
        return {"features": features, self.target_member: targets, "id": (np.dtype("u1"), (rows, ID_BYTES))}

    def attributes(self, split: str) -> dict[str, Any]:
        """The attributes of a shard, all of them, in their order in the file."""
        own = {"poisoned": self.poisoned, "encoding": self.encoding, "featurizer_sha256": self.featurizer_sha256}
        return {"format": self.format, "version": self.version, "split": split} | own

    @property
    def rows(self) -> dict[SplitName, int]:
        """How many rows each split has."""
        return {split: sum(shard.rows for shard in shards) for split, shards in self.splits.items()}


def encoded(features: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """Features as a shard stores them; a ValueError, the predicate of a sentence about them, where they do not fit."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(features, FLOAT16)
    if not_finite_rows(stored).any():
        raise ValueError(f"do not fit float16 (largest magnitude {np.abs(features).max():g}, limit 65504)")
    return stored


def not_finite_rows(rows: NDArray[np.float16]) -> NDArray[np.bool_]:
    """Whether each of (n, C, H, W) stored rows holds what is infinite or not a number, (n,)."""
    exponent = np.uint16(0x7C00)  # all ones: infinite or not a number. Several times faster than isfinite on float16.
    return ((rows.view(np.uint16) & exponent) == exponent).reshape(len(rows), -1).any(axis=1)


def read_index(folder: Path) -> BankIndex:
    """The index of a bank.

    Raises:
        BankError: no index (an unfinished bank), or one that is not format 1.
    """
    path = folder / INDEX
    if not path.is_file():
        raise BankError(f"expected a finished feature bank with {path}, found none. Run the command that writes it.")
    try:
        return read_json(path, BankIndex)
    except (OSError, ValueError) as error:
        raise BankError(f"{path} is not an index of bank format {VERSION}: {error}") from error


def open_shard(path: Path) -> h5py.File:
    """A shard, open for reading; HDF5 sees it only where its structures are those of format 1.

    Raises:
        BankError: it is missing, cut off, no HDF5 file, or one with more than format 1 needs.
    """
    read_layout(path)
    try:
        return h5py.File(path, "r")
    except HDF5_ERRORS as error:
        raise BankError(f"{path} cannot be read as a shard: {error}. Write or fetch it again.") from error


def check_shard(shard: h5py.File, path: Path, header: BankIndex, split: str, rows: int) -> None:
    """That an open shard is format 1 and says what the index says; reads no data.

    Raises:
        BankError: all differences: members, links, storage outside the file, types, shapes, attributes.
    """
    try:
        problems = _differences(shard, path, header, split, rows)
    except HDF5_ERRORS as error:
        raise BankError(f"{path.name} of {split} is damaged: {error}. Write or fetch it again.") from error
    if problems:
        raise BankError(f"{path.name} of {split} is not a shard of this bank: " + "; ".join(problems) + ".")


def _differences(shard: h5py.File, path: Path, header: BankIndex, split: str, rows: int) -> list[str]:
    size, expected, members, problems = path.stat().st_size, header.members(rows), set(shard), []
    if members != set(expected):
        problems.append(f"expected the members {sorted(expected)}, found {sorted(members)}")
    for member, (dtype, shape) in expected.items():
        # Links are looked at before they are followed: one that leaves the file could read any file here.
        if member not in members:
            continue
        if not isinstance(shard.get(member, getlink=True), h5py.HardLink):
            problems.append(f"/{member} is a link")
            continue
        dataset = shard[member]
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
            problems.append(f"/{member} is not a data set stored in this file")
        elif dataset.dtype != dtype or dataset.shape != shape:
            problems.append(f"/{member}: expected {dtype} {shape}, found {dataset.dtype} {dataset.shape}")
        elif _filters(dataset) != (FILTERS[header.compression] if member == "features" else ()):
            problems.append(f"/{member} has the filters {_filters(dataset)}, not those of {header.compression!r}")
        elif len(dataset.attrs):
            problems.append(f"/{member} has attributes of its own: {sorted(dataset.attrs)}")
        elif dataset.nbytes > size * (MOST_COMPRESSED[header.compression] if member == "features" else 1):
            problems.append(f"/{member} claims {dataset.nbytes} bytes in a file of {size}")
        elif member == "features" and dataset.chunks != (1, *header.feature_shape):
            problems.append(f"/features: expected one row a chunk, found chunks {dataset.chunks}")
        elif member != "features" and dataset.chunks is not None:
            problems.append(f"/{member} is stored in chunks")
    found = {key: value.item() if isinstance(value, np.generic) else value for key, value in shard.attrs.items()}
    attributes = header.attributes(split)
    # As text: an array, or a 0 in the place of False, is not equal.
    if repr(sorted(found.items())) != repr(sorted(attributes.items())):
        problems.append(f"expected the attributes {attributes}, found {found}")
    return problems


def _filters(dataset: h5py.Dataset) -> tuple[int, ...]:
    create = dataset.id.get_create_plist()
    return tuple(create.get_filter(number)[0] for number in range(create.get_nfilters()))
