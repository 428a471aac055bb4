"""JSON files that may be a stranger's, read into a schema: bounded before they are parsed. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dpf_release.storage import read_at_most

Record = TypeVar("Record", bound=BaseModel)

# A file that a manifest lists takes 200 bytes of JSON and 5 values: 50,000 shards, or 50 TB at 1 GiB each, are let in.
# A parser takes up to some 300 bytes a value, and an error of the schema more: 16 MiB of "[[[[" could take gigabytes.
MAX_BYTES = 16 * 2**20
MAX_VALUES = 2**18
SHOWN = 5


def read_json(path: Path, schema: type[Record]) -> Record:
    """What a JSON file says.

    Raises:
        OSError: it is missing, no plain file, or larger than 16 MiB.
        ValueError: it has more than 262,144 values, is nested too deeply, or does not fit the schema.
    """
    return parse_json(read_at_most(path, MAX_BYTES), schema)


def parse_json(content: bytes, schema: type[Record]) -> Record:
    """What the content of a JSON file says.

    Raises:
        ValueError: it is larger than 16 MiB, has more than 262,144 values, is nested too deeply, or does not fit the
            schema.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES} bytes, found {len(content)}")
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"expected at most {MAX_VALUES} values, found more")
    try:
        return schema.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(faults(error)) from None


def faults(error: ValidationError) -> str:
    """The first differences from a schema, in one line, without what was found: that may be long, or anything."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        f"{'.'.join(str(part)[:60] for part in fault['loc']) or 'all'}: {fault['msg'][:200]}" for fault in found[:SHOWN]
    ]
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return re.sub("[^ -~]", "?", "; ".join(shown)) + more
