"""Publish an image data set as poisoned feature banks, without publishing the images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpf_release.bank.dataset import concat
    from dpf_release.release.release import Release


__version__ = "0.1.0"
__all__ = ["Release", "__version__", "concat"]

_HOME = {"Release": "dpf_release.release.release", "concat": "dpf_release.bank.dataset"}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only what is used is loaded, so that `dpf-release --help` answers at once.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dpf_release' has no attribute {name!r}")
