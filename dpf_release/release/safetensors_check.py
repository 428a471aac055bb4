"""safetensors files that may be a stranger's: what their header says, read without torch and without room for lies."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from dpf_release.core.bounded_json import MAX_BYTES as MAX_HEADER_BYTES
from dpf_release.core.bounded_json import bounded_json
from dpf_release.errors import WeightsError

MAX_VALUES, MAX_RANK = 2**20, 8
# Bytes of a value, by safetensors' name of its type.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# The bits that are all set in a value that is infinite or not a number.
EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
PIECE_BYTES = 2**24


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: name, type, shape, and where its bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """What a header says.

    Attributes:
        metadata: of the file.
        tensors: in the order of their bytes, which fill the file.
    """

    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]


def read_tensor_file(path: Path) -> TensorFile:
    """The header of a safetensors file, which must be as `safetensors` itself writes it.

    Raises:
        WeightsError: it is missing, no safetensors, or its header has repeated keys, unknown types, impossible shapes,
            tensors that overlap, leave holes or do not fill the file, or blanks in which something could hide.
    """
    try:
        with path.open("rb") as file:
            return _parsed(file, path.name)
    except OSError as error:
        raise WeightsError(f"{path.name} cannot be read: {error.strerror}. Fetch it again.") from error


def _parsed(file: BinaryIO, name: str) -> TensorFile:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
        _refuse(name, f"its header would take {length} bytes of {size}, at most {MAX_HEADER_BYTES} are read")
    text = file.read(length)
    try:
        tree = bounded_json(text, MAX_VALUES)
    except ValueError as error:
        _refuse(name, f"its header: {error}")
    if not isinstance(tree, dict):
        _refuse(name, "its header is no object")
    canonical = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode("utf-8", errors="replace")
    if text != canonical.ljust(-(-len(canonical) // 8) * 8):
        _refuse(name, "its header is not written as safetensors writes it: something may hide in its blanks")
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(name, "its metadata are no texts")
    tensors, end = [], 0
    for number, (key, entry) in enumerate(tree.items()):
        dtype, shape, start, stop = _entry(name, number, entry)
        if start != end or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
            _refuse(
                name, f"tensor {number} does not begin where the one before ends, or is not as long as its shape says"
            )
        end = stop
        tensors.append(StoredTensor(key, dtype, shape, 8 + length + start, 8 + length + stop))
    if 8 + length + end != size:
        _refuse(name, f"its tensors end at byte {8 + length + end} of {size}")
    return TensorFile(metadata, tuple(tensors))


def _entry(name: str, number: int, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor."""
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = isinstance(dtype, str) and dtype in ITEM_BYTES
        if known and _counts(shape) and len(shape) <= MAX_RANK and _counts(offsets) and len(offsets) == 2:
            return dtype, tuple(shape), offsets[0], offsets[1]
    return _refuse(name, f"tensor {number} has no known type, no possible shape, or no place")


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _refuse(name: str, what: str) -> NoReturn:
    raise WeightsError(f"{name} is not a whole safetensors file: {what}. Fetch it again.")


def not_finite(path: Path, tensors: tuple[StoredTensor, ...]) -> Iterator[str]:
    """The names of tensors that hold infinite values, or ones that are not numbers; all bytes are read.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for tensor in tensors:
            exponent = EXPONENTS.get(tensor.dtype)
            if exponent is not None and _has_exponent(file, tensor, exponent):
                yield tensor.name


def _has_exponent(file: BinaryIO, tensor: StoredTensor, exponent: int) -> bool:
    kind = np.dtype(f"<u{ITEM_BYTES[tensor.dtype]}")
    mask = kind.type(exponent)
    for start in range(tensor.start, tensor.stop, PIECE_BYTES):
        file.seek(start)
        values = np.frombuffer(file.read(min(PIECE_BYTES, tensor.stop - start)), kind)
        if ((values & mask) == mask).any():
            return True
    return False
