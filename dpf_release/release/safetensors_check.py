"""safetensors files that may be a stranger's: what their header says, read without torch and without room for lies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open

from dpf_release.core.bounded_json import MAX_BYTES as MAX_HEADER_BYTES
from dpf_release.core.bounded_json import bounded_json
from dpf_release.errors import WeightsError
from dpf_release.release.tree import identity

MAX_VALUES = 2**20
# Types of values, by safetensors' names; of a float the bits that are all set where it is infinite or not a number.
EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF << 52),
    "F32": np.uint32(0xFF << 23),
    "F16": np.uint16(0x1F << 10),
    "BF16": np.uint16(0xFF << 7),
}
WHOLE_NUMBERS = {"I64", "I32", "I16", "I8", "U8", "BOOL"}
PIECE_BYTES = 2**24


class StoredTensor(NamedTuple):
    """A tensor of a file: name, type, shape, and where its bytes lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile(NamedTuple):
    """What a header says: its metadata, and the tensors as it lists them, whose bytes fill the file."""

    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]


def read_tensor_file(path: Path) -> TensorFile:
    """The header of a safetensors file, which must be as `safetensors` itself writes it.

    That shapes are possible and that tensors fill the file, without holes or overlap, safetensors checks. It does not
    bound what it takes to read a header, takes the last of repeated keys, and reads over fields that it does not know.

    Raises:
        WeightsError: it is missing, no safetensors, or its header is long, has repeated keys, types that are not those
            of weights, or more than safetensors writes: blanks and fields in which something could hide.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                _refuse(path, f"its header would take {length} bytes, at most {MAX_HEADER_BYTES} are read")
            text = file.read(length)
            with safe_open(path, "np"):  # opens it again
                if identity(os.fstat(file.fileno())) != identity(path.stat()):
                    _refuse(path, "it was changed while it was read")
        return _parsed(path, text)
    except OSError as error:
        raise WeightsError(f"{path.name} cannot be read: {error.strerror}. Fetch it again.") from error
    except (SafetensorError, ValueError) as error:
        _refuse(path, f"its header: {ascii(str(error))[:200]}")


def _parsed(path: Path, text: bytes) -> TensorFile:
    """What a header says that safetensors has found to be right."""
    tree = bounded_json(text, MAX_VALUES)
    known = {
        key: entry if key == "__metadata__" else {field: entry[field] for field in ("dtype", "shape", "data_offsets")}
        for key, entry in tree.items()
    }
    canonical = json.dumps(known, separators=(",", ":"), ensure_ascii=False).encode("utf-8", errors="replace")
    if text != canonical.ljust(-(-len(canonical) // 8) * 8):
        _refuse(path, "its header is not written as safetensors writes it: something may hide in it")
    metadata = known.pop("__metadata__", {})
    if not {entry["dtype"] for entry in known.values()} <= EXPONENTS.keys() | WHOLE_NUMBERS:
        _refuse(path, "a tensor is of a type that weights do not have")
    begin = 8 + len(text)
    tensors = (
        StoredTensor(name, entry["dtype"], tuple(entry["shape"]), *(begin + at for at in entry["data_offsets"]))
        for name, entry in known.items()
    )
    return TensorFile(metadata or {}, tuple(tensors))


def _refuse(path: Path, what: str) -> NoReturn:
    raise WeightsError(f"{path.name} is not a whole safetensors file: {what}. Fetch it again.")


def not_finite(path: Path, tensors: tuple[StoredTensor, ...]) -> Iterator[str]:
    """The names of tensors that hold infinite values, or ones that are not numbers; all bytes are read."""
    with path.open("rb") as file:
        for tensor in tensors:
            exponent = EXPONENTS.get(tensor.dtype)
            if exponent is None:
                continue
            for start in range(tensor.start, tensor.stop, PIECE_BYTES):
                file.seek(start)
                values = np.frombuffer(file.read(min(PIECE_BYTES, tensor.stop - start)), exponent.dtype)
                if ((values & exponent) == exponent).any():
                    yield tensor.name
                    break
