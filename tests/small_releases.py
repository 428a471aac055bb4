"""A small release that tests write and damage: `verify` looks at bytes, not at what they mean."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpf_release.bank.format import read_index
from dpf_release.core.files import sha256_of, write_json
from dpf_release.release.croissant import CROISSANT, croissant
from dpf_release.release.manifest import Manifest, describe_files, write_manifest
from dpf_release.release.verify import read_manifest

FILES = {
    "README.md": "card",
    "croissant.json": "croissant",
    "model/model.json": "model-record",
    "model/featurizer.safetensors": "featurizer",
    "model/classifier.safetensors": "classifier",
    "features/index.json": "bank-index",
    "features/train/shard-00000.h5": "shard",
    "features/val/shard-00000.h5": "shard",
}
SHARD = "features/train/shard-00000.h5"
HOSTILE = "<script>alert(1)</script>"


def write_release(folder: Path) -> Path:
    """Writes a folder with a file of every role, some 2 kB; returns it."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"content of {name}".encode())
    manifest = Manifest(
        name="small",
        version="1.0.0",
        licence="cc0-1.0",
        task="classification",
        classes=("cat", "dog"),
        splits={"train": 8, "val": 2},
        files=describe_files(folder),
    )
    write_manifest(folder, manifest)
    return folder


def flip_bit(path: Path, bit: int | None = None) -> None:
    """Flips one bit of a file, by default in its middle; a second time brings it back."""
    content = bytearray(path.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def edit_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    """Changes what the manifest says, and leaves everything else as it is."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_bytes())
    change(tree)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")


def list_anew(release: Path, **changes: Any) -> None:
    """Index, manifest and sums over the files as they are now: what an attacker who can write would do."""
    index = read_index(release / "features")
    splits = {
        split: tuple(
            shard.model_copy(
                update={"sha256": sha256_of(release / "features" / shard.file)}
                | {"bytes": (release / "features" / shard.file).stat().st_size}
            )
            for shard in shards
        )
        for split, shards in index.splits.items()
    }
    write_json(release / "features" / "index.json", index.model_copy(update={"splits": splits}).model_dump(mode="json"))
    manifest = read_manifest(release)
    assert isinstance(manifest, Manifest)
    described, listed = json.loads((release / CROISSANT).read_text()), describe_files(release)
    tree = croissant(manifest.name, manifest.version, manifest.licence, described["description"], listed)
    write_json(release / CROISSANT, tree)
    write_manifest(release, manifest.model_copy(update={"files": describe_files(release), **changes}))
