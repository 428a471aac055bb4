"""Where a release is built before it takes its place: beside that, its owner's alone, and known to the vault.

Whatever ends the `package` that builds it, the next run of any command removes it: a note in the vault, in the clear so
that no key is needed, says where it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dpf_release.core.files import PUBLIC_FOLDER, make_folder, remove_folder, sha256_of, write_json
from dpf_release.release.manifest import MANIFEST

UNPUBLISHED = ".unpublished.json"  # in the clear: where a release is built that is not in its place yet


def build_beside(root: Path, place: Path) -> Path:
    """An empty folder, 0700, in which to build what will lie at an absolute path; noted in the vault at `root`."""
    write_json(root / UNPUBLISHED, {"place": os.path.relpath(place, root.resolve())})
    make_folder(place.parent, PUBLIC_FOLDER)
    remove_folder(_beside(place))
    return make_folder(_beside(place))


def unpublished_folder(root: Path) -> Path | None:
    """The folder of a release that is built, or was when its run was killed; None where there is none."""
    place = _note(root).get("place")
    folder = place and _beside(Path(os.path.normpath(root.resolve() / place)))
    return folder if folder and folder.is_dir() else None


def removed_manifest(root: Path) -> str | None:
    """The digest of the manifest of the last release that was removed before it took its place."""
    return _note(root).get("manifest_sha256")


def remove_unpublished(root: Path) -> None:
    """Removes a release that is not in its place; the digest of its manifest stays, for the ledger to be settled."""
    note, folder = root / UNPUBLISHED, unpublished_folder(root)
    if folder is not None:
        if (folder / MANIFEST).is_file():
            write_json(note, _note(root) | {"manifest_sha256": sha256_of(folder / MANIFEST)})
        remove_folder(folder)
    if removed_manifest(root) is None:
        note.unlink(missing_ok=True)


def _note(root: Path) -> dict[str, Any]:
    note = root / UNPUBLISHED
    return json.loads(note.read_bytes()) if note.is_file() else {}


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.dpf-staging")
