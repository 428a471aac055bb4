"""A good release, and what registers the ways to make a bad one of it; `bad_*.py` hold them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpf_release.bank.format import BankIndex
from dpf_release.bank.writer import BankWriter, SplitRows
from dpf_release.core.files import sha256_of, write_json, write_text
from dpf_release.models.hooks import split
from dpf_release.models.weights import state_file
from dpf_release.models.zoo import build_network
from dpf_release.release.croissant import CROISSANT, croissant
from dpf_release.release.manifest import (
    MANIFEST,
    SUMS,
    FileRecord,
    Manifest,
    describe_file,
    describe_files,
    role_of,
    write_manifest,
)
from dpf_release.release.model_record import ModelRecord

FIRST, SECOND, VAL = (
    "features/train/shard-00000.h5",
    "features/train/shard-00001.h5",
    "features/val/shard-00000.h5",
)
INDEX, MODEL = "features/index.json", "model/model.json"
FEATURIZER, CLASSIFIER = "model/featurizer.safetensors", "model/classifier.safetensors"
SECRET = b"PRIVATE-face-of-a-person-4711"  # what lies beside the release, and must never come out of it
PLANTED = b"planted-face-of-a-person-4712"  # what a bad release itself holds, where it should not
SHAPE, ROWS = (8, 8, 8), 4  # of a row; rows of a shard
ROW_BYTES = 1024


@dataclass(frozen=True)
class Kind:
    """A kind of bad release, and who says so.

    Attributes:
        make: changes the release.
        verify: kinds of problem of which `verify` finds one; none: it finds nothing.
        deep: the same for `verify --deep`.
        opens: `Release.open` lets it in: its structure is right, its values are not.
        reads: reading the bank without `Release` raises nothing; None: either is right.
        network: it opens, and its network cannot be had.
        alone: checked in a real child, for what could hurt the process that checks it.
    """

    make: Callable[[Path], Any]
    verify: frozenset[str]
    deep: frozenset[str]
    opens: bool = False
    reads: bool | None = None
    network: bool = False
    alone: bool = False


KINDS: dict[str, Kind] = {}


def tampered(*found: str) -> Any:
    """A change that `verify` finds as one of these kinds, because digests or names do not fit."""

    def register(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        name = make.__name__.removeprefix("_").replace("_", " ")
        KINDS[name] = Kind(make, frozenset(found), frozenset(found))
        return make

    return register


def made(*found: str, **expected: Any) -> Any:
    """A change of what a file holds: raw, and with digests made right, which `--deep` finds as one of these kinds."""

    def register(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        name = make.__name__.removeprefix("_").replace("_", " ")
        KINDS[name] = Kind(make, frozenset({"changed"}), frozenset({"changed"}))
        return signed(*found, **expected)(make)

    return register


def signed(*found: str, **expected: Any) -> Any:
    """The same with digests made right alone."""

    def register(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def change(release: Path) -> None:
            make(release)
            resign(release)

        name = make.__name__.removeprefix("_").replace("_", " ")
        KINDS[f"{name}, re-signed"] = Kind(change, frozenset(), frozenset(found), **expected)
        return make

    return register


# --------------------------------------------------------------------------------------------- a good release


def good_release(folder: Path) -> Path:
    """A small release of a random network: 8 train rows in two shards, 4 val rows in one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = split(build_network("resnet20_cifar", 3, {"width": 2}), "conv4_1", (32, 32))
    record = ModelRecord(
        arch="resnet20_cifar",
        arguments={"width": 2},
        outputs=3,
        hook="conv4_1",
        feature_shape=parts.hook.shape,
        preprocess={"size": (32, 32), "resize": None, "mean": (0.5,) * 3, "std": (0.25,) * 3},
        task="classification",
        classes=("cat", "dog", "owl"),
    )
    (folder / "model").mkdir(parents=True)
    write_json(folder / MODEL, record.model_dump(mode="json"))
    said = record.model_dump(mode="json", include={"arch", "arguments", "preprocess"}) | {"hook": parts.hook.path}
    (folder / FEATURIZER).write_bytes(state_file(parts.featurizer.state_dict(), said))
    (folder / CLASSIFIER).write_bytes(state_file(parts.classifier.state_dict()))
    write_text(folder / "README.md", "# A card\n")
    write_features(folder)
    write_croissant(folder, {"name": "small", "version": "1.0.0", "licence": "cc0-1.0"})
    manifest = Manifest(
        name="small",
        version="1.0.0",
        licence="cc0-1.0",
        task="classification",
        classes=record.classes,
        splits={"train": 2 * ROWS, "val": ROWS},
        files=describe_files(folder),
    )
    write_manifest(folder, manifest)
    return folder


def features_of(rows: int) -> Any:
    return np.random.default_rng(0).normal(size=(rows, *SHAPE)).astype(np.float32)


def write_features(release: Path, compression: str = "none") -> None:
    """Writes the bank of a release anew, as `package` would."""
    shutil.rmtree(release / "features", ignore_errors=True)
    header = BankIndex(
        poisoned=True,
        featurizer_sha256=sha256_of(release / FEATURIZER),
        feature_shape=SHAPE,
        targets=0,
        compression=compression,
    )
    writer = BankWriter(release / "features", header, shard_bytes=ROWS * ROW_BYTES, batch_size=ROWS)
    rows = {
        name: SplitRows(np.arange(count) % 3, np.random.default_rng(count).integers(0, 256, (count, 16), np.uint8))
        for name, count in (("train", 2 * ROWS), ("val", ROWS))
    }
    shards = writer.shards(rows)
    writer.write(shards, rows, (features_of(len(span)) for span in writer.batches(shards)))
    writer.finish([writer.record(shard) for shard in shards])


def resign(release: Path) -> None:
    """What an attacker does: sizes and digests in index, croissant, manifest and sums are those of the files."""
    with contextlib.suppress(ValueError, KeyError, RecursionError, OSError, TypeError, AttributeError):
        tree = json.loads(_small(release / INDEX))
        for shards in tree["splits"].values():
            for shard in shards:
                path = release / "features" / shard["file"]
                if path.is_file() and not path.is_symlink():
                    shard |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        if tree != json.loads(_small(release / INDEX)):
            write_json(release / INDEX, tree)
    tree = json.loads((release / MANIFEST).read_bytes())
    if (release / CROISSANT).is_file():
        write_croissant(release, {key: tree[key] for key in ("name", "version", "licence")})
    tree["files"] = [record.model_dump() for record in _records(release)]
    write_json(release / MANIFEST, tree)
    write_sums(release)


def _records(release: Path) -> list[FileRecord]:
    """Of every file that has a role."""
    names = [path.relative_to(release).as_posix() for path in sorted(release.rglob("*")) if path.is_file()]
    return [describe_file(release, name) for name in names if role_of(name)]


def write_croissant(release: Path, said: dict[str, str]) -> None:
    """`croissant.json` of the files as they are; one that says so already is left as it is."""
    tree = croissant(**said, description="", files=_records(release))
    if not (release / CROISSANT).is_file() or json.loads((release / CROISSANT).read_bytes()) != tree:
        write_json(release / CROISSANT, tree)


def write_sums(release: Path) -> None:
    """SHA256SUMS of the manifest as it is."""
    tree = json.loads((release / MANIFEST).read_bytes())
    sums = {file["path"]: file["sha256"] for file in tree["files"]} | {MANIFEST: sha256_of(release / MANIFEST)}
    write_text(release / SUMS, "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items())))


def _small(path: Path) -> bytes:
    if path.stat().st_size > 2**20:
        raise ValueError
    return path.read_bytes()


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes the tree of a JSON file."""
    tree = json.loads(path.read_bytes())
    change(tree)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")


def edit_manifest(release: Path, change: Callable[[Any], Any]) -> None:
    """Changes the manifest, and makes the sums right again where that can be done."""
    edit(release / MANIFEST, change)
    with contextlib.suppress(KeyError, TypeError):
        write_sums(release)


def poke(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def sparse(path: Path, size: int = 2**30) -> None:
    path.unlink(missing_ok=True)
    path.touch()
    os.truncate(path, size)


def secret(release: Path) -> Path:
    return release.parent / "secret"


def change_header(path: Path, change: Callable[[Any], Any], raw: Callable[[bytes], bytes] = lambda text: text) -> None:
    """Changes the header of a safetensors file; `raw` its text."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    change(tree)
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    text = raw(text.ljust(-(-len(text) // 8) * 8))
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


class Payload:
    """What runs when a pickle is loaded: it only leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)
