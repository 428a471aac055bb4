"""A release folder takes its place as a whole, or not at all; and which place is none."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

from dpf_release.core.files import flush_to_disk
from dpf_release.owner.config import Config


def swap(staging: Path, out: Path) -> None:
    """Puts `staging` in the place of `out`: whoever looks finds the old folder or the new one, whole.

    Where the system cannot exchange the two in one step there are two renames, and `recover` after a crash between.
    """
    flush_to_disk(staging)
    if not out.exists():
        staging.replace(out)
    elif _exchange(staging, out):
        shutil.rmtree(staging)
    else:
        out.replace(_set_aside(out))
        staging.replace(out)
        shutil.rmtree(_set_aside(out))
    flush_to_disk(out.parent)


def _set_aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.dpf-old")


def recover(out: Path) -> None:
    """After a crash between two renames: the old release back in its place, or out of the way of the new one."""
    old = _set_aside(out)
    if old.is_dir() and out.exists():
        shutil.rmtree(old)
    elif old.is_dir():
        old.replace(out)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths in one step (Linux's `renameat2`); False where the system cannot."""
    at_cwd, exchange = -100, 2
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def nested_with(release: Path, config: Config, vault: Path) -> list[str]:
    """Why a folder, resolved, is no place for a release: vault, S or Q lie in it, or it lies in the vault."""
    images, vault = config.images, vault.resolve()
    found = ["it lies inside the vault: who copies one copies the other"] if release.is_relative_to(vault) else []
    private = {
        "the vault": vault,
        "the private images": config.locate(images.private.path),
        "the public images": config.locate(images.public.path),
    }
    for what, path in private.items():
        if path.is_relative_to(release):
            found.append(f"{what} lie inside the release folder: who uploads it uploads them")
    return found
