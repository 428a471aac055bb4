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
from dpf_release.owner.vault.vault import UNPUBLISHED, Vault
from dpf_release.release.manifest import MANIFEST


def build_beside(vault: Vault, place: Path) -> Path:
    """An empty folder, 0700, in which to build what will lie at an absolute path."""
    write_json(vault.root / UNPUBLISHED, {"place": os.path.relpath(place, vault.root.resolve())})
    make_folder(place.parent, PUBLIC_FOLDER)
    remove_folder(_beside(place))
    return make_folder(_beside(place))


def unpublished_folder(vault: Vault) -> Path | None:
    """The folder of a release that is built, or was when its run was killed; None where there is none."""
    place = _note(vault).get("place")
    folder = place and _beside(Path(os.path.normpath(vault.root.resolve() / place)))
    return folder if folder and folder.is_dir() else None


def removed_manifest(vault: Vault) -> str | None:
    """The digest of the manifest of the last release that was removed before it took its place."""
    return _note(vault).get("manifest_sha256")


def remove_unpublished(vault: Vault) -> None:
    """Removes a release that is not in its place; the digest of its manifest stays, for the ledger to be settled.

    Raises:
        StorageError: something of it stays.
    """
    note, folder = vault.root / UNPUBLISHED, unpublished_folder(vault)
    if folder is not None:
        if (folder / MANIFEST).is_file():
            write_json(note, _note(vault) | {"manifest_sha256": sha256_of(folder / MANIFEST)})
        remove_folder(folder)
    if removed_manifest(vault) is None:
        note.unlink(missing_ok=True)


def _note(vault: Vault) -> dict[str, Any]:
    note = vault.root / UNPUBLISHED
    return json.loads(note.read_bytes()) if note.is_file() else {}


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.dpf-staging")
