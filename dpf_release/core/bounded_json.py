"""JSON files that may be a stranger's, read into a schema: bounded before they are parsed. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Set
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpf_release.core.files import read_at_most

Schema = TypeVar("Schema", bound=BaseModel)

# A file that a manifest lists takes 200 bytes of JSON and 5 values: 50,000 shards, or 50 TB at 1 GiB each, are let in.
# A parser takes up to some 300 bytes a value, and an error of the schema more: 16 MiB of "[[[[" could take gigabytes.
MAX_BYTES = 16 * 2**20
MAX_VALUES = 2**18
SHOWN = 5
# What a stranger wrote and a terminal shows: no characters that it obeys.
SEEN = r"^[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*$"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """What a JSON file of ours holds, or a part of it: its fields and no other, finite numbers, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RepeatedKeyError(ValueError):
    """A key that stands twice in one object means one thing to one reader, another to the next, and hides a value."""

    def __init__(self, key: str) -> None:
        super().__init__("a key stands twice in one object")
        self.key = key  # a stranger's words


def bounded_json(content: bytes, most_values: int = MAX_VALUES) -> Any:
    """The tree that the content of a JSON file holds.

    Raises:
        RepeatedKeyError: an object has a key twice.
        ValueError: it is larger than 16 MiB, has more values, is nested too deeply, or is no JSON in UTF-8.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES >> 20} MiB, found more")
    if sum(content.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"expected at most {most_values} values, found more")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except RepeatedKeyError:
        raise
    except ValueError as error:
        raise ValueError(f"not JSON in UTF-8: {str(error)[:100]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def read_json(path: Path, schema: type[Schema]) -> Schema:
    """What a JSON file says.

    Raises:
        OSError: it is missing, no plain file, or larger than 16 MiB.
        ValueError: as for `parse_json`.
    """
    return parse_json(read_at_most(path, MAX_BYTES), schema)


def parse_json(content: bytes, schema: type[Schema]) -> Schema:
    """What the content of a JSON file says.

    Raises:
        ValueError: as for `bounded_json`, or it does not fit the schema.
    """
    bounded_json(content)
    try:
        return schema.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(faults(error)) from None


def faults(error: ValidationError, known: Set[tuple[int | str, ...]] = frozenset()) -> str:
    """The first differences from a schema, but those at known places; without what was found: it may be anything."""
    differences = error.errors(include_url=False, include_context=False, include_input=False)
    found = [fault for fault in differences if fault["loc"] not in known]
    shown = [
        f"{'.'.join(str(part)[:60] for part in fault['loc']) or 'all'}: {fault['msg'][:200]}" for fault in found[:SHOWN]
    ]
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return re.sub("[^ -~]", "?", "; ".join(shown)) + more
