"""How the numbers of a row are stored: format, writer, reader and checks go by an entry of `ENCODINGS`. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

EncodingName = Literal["float16"]


@dataclass(frozen=True)
class Encoding:
    """One way to store numbers.

    Attributes:
        dtype: of `/features` in a shard, and of the rows that a reader hands over.
        encode: features, (n, C, H, W) of any float type → the same in `dtype`; a ValueError says what does not fit.
        not_finite: (n, C, H, W) in `dtype` → (n,) whether a row holds what is infinite or not a number.
    """

    dtype: np.dtype[Any]
    encode: Callable[[NDArray[np.floating[Any]]], NDArray[Any]]
    not_finite: Callable[[NDArray[Any]], NDArray[np.bool_]]


def _as_float16(features: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        encoded = np.ascontiguousarray(features, np.float16)
    if _not_finite_float16(encoded).any():
        raise ValueError(f"do not fit float16 (largest magnitude {np.abs(features).max():g}, limit 65504)")
    return encoded


def _not_finite_float16(rows: NDArray[np.float16]) -> NDArray[np.bool_]:
    exponent = np.uint16(0x7C00)  # all ones: infinite or not a number. Several times faster than isfinite on float16.
    return ((rows.view(np.uint16) & exponent) == exponent).reshape(len(rows), -1).any(axis=1)


ENCODINGS: dict[EncodingName, Encoding] = {"float16": Encoding(np.dtype("<f2"), _as_float16, _not_finite_float16)}
