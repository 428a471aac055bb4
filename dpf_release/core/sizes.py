"""Numbers of bytes, as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Bytes in `"1 GiB"`, `"500 MB"`, `"4096"`.

    Raises:
        ValueError: the text is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get((found.group(2) or "B").upper()) if found else None
    if not found or unit is None:
        raise ValueError(f"expected a size such as '1 GiB' or '500 MB', found {text!r}")
    try:
        return max(1, int(float(found.group(1)) * unit))
    except OverflowError:
        raise ValueError("expected a size such as '1 GiB', found one beyond all disks") from None


def readable_size(count: int) -> str:
    """A number of bytes as a person reads it: `1.5 GiB`."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
