"""Code from outside this package: named as `package.module:name`, or an entry point of an installed package."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points


def imported(path: str) -> object:
    """What `package.module:name` or `package.module.name` stands for.

    Raises:
        ImportError: there is no such module, or the path is none.
        AttributeError: there is no such name in it.
    """
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or module.strip(".") != module:
        raise ImportError(f"{path!r} is not package.module:name")
    return getattr(importlib.import_module(module), attribute)


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group, by name; nothing of them is imported yet."""
    return {entry.name: entry for entry in entry_points(group=group)}
