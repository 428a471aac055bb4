"""A good release, and all the ways here known to make a bad one of it: name -> a function that changes the folder."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dpf_release.bank import BankIndex
from dpf_release.bank_writer import BankWriter, SplitRows
from dpf_release.manifest import MANIFEST, SUMS, Manifest, describe_files, role_of, write_manifest
from dpf_release.models.hooks import split
from dpf_release.models.weights import state_file
from dpf_release.models.zoo import build_network
from dpf_release.record import ModelRecord
from dpf_release.storage import sha256_of, write_json, write_text

FIRST, SECOND, VAL = (
    "features/train/shard-00000.h5",
    "features/train/shard-00001.h5",
    "features/val/shard-00000.h5",
)
INDEX, MODEL = "features/index.json", "model/model.json"
FEATURIZER, CLASSIFIER = "model/featurizer.safetensors", "model/classifier.safetensors"
SECRET = b"PRIVATE-face-of-a-person-4711"  # what lies beside the release, and must never come out of it
SHAPE, ROWS = (8, 8, 8), 4  # of a row; rows of a shard
ROW_BYTES = 1024
V110 = ("v110", "v110")


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
# Kinds that today's `verify` does not tell.
NEEDS_VERIFY_BRANCH: set[str] = set()


def tampered(*found: str, needs_verify_branch: bool = False) -> Any:
    """A change that `verify` finds as one of these kinds, because digests or names do not fit."""

    def register(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        name = make.__name__.removeprefix("_").replace("_", " ")
        KINDS[name] = Kind(make, frozenset(found), frozenset(found))
        if needs_verify_branch:
            NEEDS_VERIFY_BRANCH.add(name)
        return make

    return register


def made(*found: str, **expected: Any) -> Any:
    """A change of what a file holds: raw, and with digests that the attacker made right, which `--deep` finds as these."""

    def register(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def signed(release: Path) -> None:
            make(release)
            resign(release)

        name = make.__name__.removeprefix("_").replace("_", " ")
        KINDS[name] = Kind(make, frozenset({"changed"}), frozenset({"changed"}))
        KINDS[f"{name}, re-signed"] = Kind(signed, frozenset(), frozenset(found), **expected)
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
    """What an attacker does: sizes and digests in index, manifest and sums are those of the files as they are."""
    with contextlib.suppress(ValueError, KeyError, RecursionError, OSError, TypeError, AttributeError):
        tree = json.loads(_small(release / INDEX))
        for shards in tree["splits"].values():
            for shard in shards:
                path = release / "features" / shard["file"]
                if path.is_file() and not path.is_symlink():
                    shard |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_json(release / INDEX, tree)
    tree = json.loads((release / MANIFEST).read_bytes())
    tree["files"] = [
        {
            "path": path.relative_to(release).as_posix(),
            "role": role_of(path.relative_to(release).as_posix()),
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(release.rglob("*"))
        if path.is_file() and role_of(path.relative_to(release).as_posix())
    ]
    write_json(release / MANIFEST, tree)
    write_sums(release)


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


# --------------------------------------------------------------------------------------------- files and names


@tampered("missing")
def _card_missing(release: Path) -> None:
    (release / "README.md").unlink()


@tampered("missing")
def _shard_missing(release: Path) -> None:
    (release / FIRST).unlink()


@tampered("missing")
def _shard_renamed(release: Path) -> None:
    (release / FIRST).rename(release / "features/train/shard-00009.h5")


@tampered("unexpected")
def _file_added(release: Path) -> None:
    (release / "model/dpf.safetensors").write_bytes(SECRET)


@tampered("unexpected")
def _shard_added(release: Path) -> None:
    shutil.copy(release / FIRST, release / "features/train/shard-00002.h5")


@tampered("unexpected", "hidden file")
def _gitignore_added(release: Path) -> None:
    (release / ".gitignore").write_text("*\n")


@tampered("unexpected", "hidden file")
def _poisoning_function_in_dot_git(release: Path) -> None:
    (release / ".git").mkdir()
    (release / ".git/dpf.pt").write_bytes(SECRET)


@tampered("unexpected", "empty folder")
def _empty_folder_added(release: Path) -> None:
    (release / "features/test").mkdir()


@tampered("changed")
def _bit_flipped(release: Path) -> None:
    poke(release / FIRST, 3000, b"\x01")


@tampered("changed")
def _file_emptied(release: Path) -> None:
    (release / CLASSIFIER).write_bytes(b"")


@tampered("link")
def _link_to_a_file_inside(release: Path) -> None:
    (release / SECOND).unlink()
    (release / SECOND).symlink_to("shard-00000.h5")


@tampered("link")
def _link_to_a_secret(release: Path) -> None:
    (release / "README.md").unlink()
    (release / "README.md").symlink_to(secret(release))


@tampered("link")
def _linked_folder(release: Path) -> None:
    (release / "features").rename(release.parent / "elsewhere")
    (release / "features").symlink_to(release.parent / "elsewhere")


@tampered("link")
def _links_in_a_circle(release: Path) -> None:
    (release / "a").symlink_to("b")
    (release / "b").symlink_to("a")


@tampered("link", "missing")
def _manifest_linked(release: Path) -> None:
    (release / MANIFEST).rename(release.parent / "manifest")
    (release / MANIFEST).symlink_to(release.parent / "manifest")


@tampered("hard link", needs_verify_branch=True)
def _hard_link_out(release: Path) -> None:
    os.link(release / FIRST, release.parent / "outside")


@tampered("missing", "special file")
def _pipe_for_a_shard(release: Path) -> None:
    (release / FIRST).unlink()
    os.mkfifo(release / FIRST)


@tampered("missing", "special file")
def _pipe_for_the_manifest(release: Path) -> None:
    (release / MANIFEST).unlink()
    os.mkfifo(release / MANIFEST)


@tampered("unexpected", "special file")
def _socket_added(release: Path) -> None:
    folder = os.open(release, os.O_RDONLY)
    try:  # a socket's own path must be short
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(f"/proc/self/fd/{folder}/s")
    finally:
        os.close(folder)


@tampered("missing", "unexpected")
def _folder_for_a_shard(release: Path) -> None:
    (release / FIRST).unlink()
    (release / FIRST).mkdir()


@tampered("unexpected", "collision")
def _same_name_in_another_case(release: Path) -> None:
    (release / "readme.MD").write_text("# Another card\n")


@tampered("unexpected", "collision")
def _same_name_in_another_unicode_form(release: Path) -> None:
    (release / "caf\u00e9").touch()
    (release / "cafe\u0301").touch()


@tampered("unexpected")
def _name_that_is_no_text(release: Path) -> None:
    Path(os.fsdecode(os.fsencode(release) + b"/\xff\x1b[2J")).touch()


@made("structure", reads=False)
def _shards_swapped_between_splits(release: Path) -> None:
    one, other = (release / FIRST).read_bytes(), (release / VAL).read_bytes()
    (release / FIRST).write_bytes(other)
    (release / VAL).write_bytes(one)


# --------------------------------------------------------------------------------------------- manifest and sums


@tampered("missing")
def _manifest_missing(release: Path) -> None:
    (release / MANIFEST).unlink()


@tampered("schema")
def _manifest_is_not_json(release: Path) -> None:
    (release / MANIFEST).write_bytes(b"\xff{")


@tampered("schema")
def _manifest_of_a_million_levels(release: Path) -> None:
    (release / MANIFEST).write_bytes(b"[" * 10**6 + b"]" * 10**6)


@tampered("schema")
def _manifest_of_a_hundred_thousand_levels(release: Path) -> None:
    (release / MANIFEST).write_bytes(b'{"a":' * 10**5 + b"1" + b"}" * 10**5)


@tampered("schema")
def _manifest_of_a_gibibyte(release: Path) -> None:
    sparse(release / MANIFEST)


@tampered("schema")
def _manifest_of_millions_of_values(release: Path) -> None:
    (release / MANIFEST).write_text('{"classes": [' + ",".join(["1"] * 7_000_000) + "]}")


@tampered("schema")
def _manifest_with_a_huge_number(release: Path) -> None:
    text = (release / MANIFEST).read_text()
    (release / MANIFEST).write_text(text.replace('"format_version": 1', '"format_version": 1' + "0" * 100_000))


@tampered("schema", "path escape")
def _manifest_lists_a_path_outside(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"][0].update(path="../secret"))


@tampered("schema", "path escape")
def _manifest_lists_an_absolute_path(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"][0].update(path=str(secret(release))))


@tampered("schema")
def _manifest_gives_a_file_another_role(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"][0].update(role="shard"))


@tampered("schema", "duplicate")
def _manifest_lists_a_file_twice(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"].append(tree["files"][0]))


@tampered("duplicate", needs_verify_branch=True)
def _manifest_with_a_key_twice(release: Path) -> None:
    text = (release / MANIFEST).read_text()
    (release / MANIFEST).write_text(text.replace('"licence": ', '"licence": "mit", "licence": '))
    write_sums(release)


@tampered("schema", "unknown version")
def _manifest_of_another_version(release: Path) -> None:
    edit_manifest(release, lambda tree: tree.update(format_version=2))


@tampered("changed")
def _sums_edited(release: Path) -> None:
    (release / SUMS).write_text((release / SUMS).read_text() + "\n")


@tampered("missing")
def _sums_missing(release: Path) -> None:
    (release / SUMS).unlink()


@tampered("changed", "schema")
def _sums_of_a_gibibyte(release: Path) -> None:
    sparse(release / SUMS)


# --------------------------------------------------------------------------------------------- shards


def in_shard(change: Callable[[h5py.File, Path], Any]) -> Callable[[Path], Any]:
    """A change of the first shard through HDF5."""

    def make(release: Path) -> None:
        with h5py.File(release / FIRST, "r+", libver=V110) as shard:
            change(shard, release)

    make.__name__ = change.__name__
    return make


def bad_shard(*found: str, **expected: Any) -> Any:
    """A change of the first shard through HDF5, as `made`."""
    return lambda change: made(*found, **{"reads": False} | expected)(in_shard(change))


def replace(shard: h5py.File, member: str, data: Any = None, **options: Any) -> None:
    values = shard[member][:] if data is None else data
    del shard[member]
    shard.create_dataset(member, data=values, **options)


def create(shard: h5py.File, name: str, prepare: Callable[[Any], Any], rows: int = ROWS, dtype: Any = None) -> Any:
    """`/features` anew with filters of one's own; returns the data set."""
    if name in shard:
        del shard[name]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, *SHAPE))
    plist.set_obj_track_times(False)
    prepare(plist)
    space = h5py.h5s.create_simple((rows, *SHAPE))
    return h5py.Dataset(h5py.h5d.create(shard.id, name.encode(), dtype or h5py.h5t.IEEE_F16LE, space, plist))


@bad_shard("structure")
def _external_storage(shard: h5py.File, release: Path) -> None:
    del shard["id"]
    shard.create_dataset("id", (ROWS, 16), "u1", external=[(str(secret(release)), 0, h5py.h5f.UNLIMITED)])


@bad_shard("structure")
def _external_storage_in_the_release(shard: h5py.File, release: Path) -> None:
    del shard["label"]
    shard.create_dataset("label", (ROWS,), "<i8", external=[("shard-00001.h5", 0, 8 * ROWS)])


@bad_shard("structure")
def _external_link(shard: h5py.File, release: Path) -> None:
    with h5py.File(release.parent / "other.h5", "w") as other:
        other["id"] = np.frombuffer((SECRET * 4)[:64], np.uint8).reshape(ROWS, 16)
    del shard["id"]
    shard["id"] = h5py.ExternalLink(str(release.parent / "other.h5"), "/id")


@bad_shard("structure")
def _soft_link(shard: h5py.File, release: Path) -> None:
    del shard["id"]
    shard["id"] = h5py.SoftLink("/label")


@bad_shard("structure")
def _soft_links_in_a_circle(shard: h5py.File, release: Path) -> None:
    del shard["id"]
    shard["id"] = h5py.SoftLink("/a")
    shard["a"] = h5py.SoftLink("/id")


@bad_shard("structure")
def _link_to_nothing(shard: h5py.File, release: Path) -> None:
    del shard["id"]
    shard["id"] = h5py.SoftLink("/nothing")


@bad_shard("structure")
def _virtual_data_set(shard: h5py.File, release: Path) -> None:
    layout = h5py.VirtualLayout((ROWS, 16), "u1")
    layout[:] = h5py.VirtualSource("shard-00001.h5", "id", (ROWS, 16))
    del shard["id"]
    shard.create_virtual_dataset("id", layout)


@bad_shard("structure")
def _virtual_data_set_of_a_secret(shard: h5py.File, release: Path) -> None:
    with h5py.File(release.parent / "other.h5", "w") as other:
        other["id"] = np.frombuffer((SECRET * 4)[:64], np.uint8).reshape(ROWS, 16)
    layout = h5py.VirtualLayout((ROWS, 16), "u1")
    layout[:] = h5py.VirtualSource(str(release.parent / "other.h5"), "id", (ROWS, 16))
    del shard["id"]
    shard.create_virtual_dataset("id", layout)


@bad_shard("structure")
def _group_for_a_member(shard: h5py.File, release: Path) -> None:
    del shard["id"]
    shard.create_group("id")


@bad_shard("structure")
def _group_added(shard: h5py.File, release: Path) -> None:
    shard.create_group("more")


@bad_shard("structure")
def _thousand_groups_added(shard: h5py.File, release: Path) -> None:
    for number in range(1000):
        shard.create_group(f"group-{number}")


@bad_shard("structure")
def _group_that_holds_itself(shard: h5py.File, release: Path) -> None:
    shard["more"] = shard["/"]


@bad_shard("structure")
def _member_added(shard: h5py.File, release: Path) -> None:
    shard.create_dataset("source", data=np.frombuffer(SECRET, np.uint8))


@bad_shard("structure")
def _member_with_two_names(shard: h5py.File, release: Path) -> None:
    shard["more"] = shard["id"]


@bad_shard("structure")
def _member_missing(shard: h5py.File, release: Path) -> None:
    del shard["id"]


@bad_shard("structure")
def _committed_type(shard: h5py.File, release: Path) -> None:
    shard["type"] = np.dtype("<f2")


@bad_shard("structure")
def _member_of_a_committed_type(shard: h5py.File, release: Path) -> None:
    shard["type"] = np.dtype("u1")
    values = shard["id"][:]
    del shard["id"]
    shard.create_dataset("id", data=values, dtype=shard["type"])


@bad_shard("structure")
def _attribute_added(shard: h5py.File, release: Path) -> None:
    shard.attrs["source"] = SECRET.decode()


@bad_shard("structure")
def _attribute_of_a_member(shard: h5py.File, release: Path) -> None:
    shard["features"].attrs["source"] = SECRET.decode()


@bad_shard("structure")
def _attribute_changed(shard: h5py.File, release: Path) -> None:
    shard.attrs["poisoned"] = False


@bad_shard("structure")
def _attribute_of_another_version(shard: h5py.File, release: Path) -> None:
    shard.attrs.modify("version", 2)


@bad_shard("structure")
def _attribute_missing(shard: h5py.File, release: Path) -> None:
    del shard.attrs["split"]


@bad_shard("structure")
def _attribute_that_is_an_array(shard: h5py.File, release: Path) -> None:
    shard.attrs["poisoned"] = [True, True]


@bad_shard("structure")
def _attribute_of_60_kilobytes(shard: h5py.File, release: Path) -> None:
    shard.attrs["more"] = np.zeros(60_000, np.uint8)


@bad_shard("structure")
def _hundred_attributes(shard: h5py.File, release: Path) -> None:
    for number in range(100):
        shard.attrs[f"a{number}"] = number


@bad_shard("structure")
def _attribute_with_a_reference(shard: h5py.File, release: Path) -> None:
    shard.attrs.create("more", shard["id"].ref, dtype=h5py.ref_dtype)


@bad_shard("structure")
def _labels_of_another_type(shard: h5py.File, release: Path) -> None:
    replace(shard, "label", dtype="<i4")


@bad_shard("structure")
def _big_endian_features(shard: h5py.File, release: Path) -> None:
    replace(shard, "features", dtype=">f2", chunks=(1, *SHAPE))


@bad_shard("structure")
def _labels_that_are_texts(shard: h5py.File, release: Path) -> None:
    replace(shard, "label", ["a", "b", "c", "d"], dtype=h5py.string_dtype())


@bad_shard("structure")
def _labels_that_are_records(shard: h5py.File, release: Path) -> None:
    replace(shard, "label", np.zeros(ROWS, [("label", "<i8"), ("name", "S20")]))


@bad_shard("structure")
def _labels_that_are_references(shard: h5py.File, release: Path) -> None:
    del shard["label"]
    shard.create_dataset("label", (ROWS,), dtype=h5py.ref_dtype)


@bad_shard("structure")
def _fewer_labels(shard: h5py.File, release: Path) -> None:
    replace(shard, "label", np.arange(ROWS - 1))


@bad_shard("structure")
def _short_ids(shard: h5py.File, release: Path) -> None:
    replace(shard, "id", np.zeros((ROWS, 8), np.uint8))


@bad_shard("structure")
def _labels_of_2_to_the_60_rows(shard: h5py.File, release: Path) -> None:
    del shard["label"]
    shard.create_dataset("label", (2**60,), "<i8", chunks=(2**16,))


@bad_shard("structure")
def _features_of_2_to_the_50_rows(shard: h5py.File, release: Path) -> None:
    del shard["features"]
    shard.create_dataset("features", (2**50, *SHAPE), "<f2", chunks=(1, *SHAPE))


@bad_shard("structure")
def _features_without_chunks(shard: h5py.File, release: Path) -> None:
    replace(shard, "features")


@bad_shard("structure")
def _features_in_one_chunk(shard: h5py.File, release: Path) -> None:
    replace(shard, "features", chunks=(ROWS, *SHAPE))


@bad_shard("structure")
def _features_never_written(shard: h5py.File, release: Path) -> None:
    del shard["features"]
    shard.create_dataset("features", (ROWS, *SHAPE), "<f2", chunks=(1, *SHAPE), fillvalue=1)


@bad_shard("structure", reads=None)
def _labels_never_written(shard: h5py.File, release: Path) -> None:
    del shard["label"]
    shard.create_dataset("label", (ROWS,), "<i8")


@bad_shard("structure", reads=None)
def _labels_that_can_grow(shard: h5py.File, release: Path) -> None:
    replace(shard, "label", chunks=(ROWS,), maxshape=(None,))


@bad_shard("structure")
def _features_that_can_grow(shard: h5py.File, release: Path) -> None:
    replace(shard, "features", chunks=(1, *SHAPE), maxshape=(None, *SHAPE))


@bad_shard("structure")
def _filter_on_ids(shard: h5py.File, release: Path) -> None:
    replace(shard, "id", chunks=(ROWS, 16), compression="gzip")


@bad_shard("structure")
def _gzip_that_the_index_does_not_name(shard: h5py.File, release: Path) -> None:
    replace(shard, "features", chunks=(1, *SHAPE), compression="gzip")


@bad_shard("structure")
def _unknown_filter(shard: h5py.File, release: Path) -> None:
    values = shard["features"][:]
    create(shard, "features", lambda plist: plist.set_filter(4711, h5py.h5z.FLAG_OPTIONAL, (1, 2)))[:] = values


@bad_shard("structure")
def _checksum_filter(shard: h5py.File, release: Path) -> None:
    values = shard["features"][:]
    create(shard, "features", lambda plist: plist.set_fletcher32())[:] = values


def gzip_bank(release: Path, change: Callable[[h5py.File], Any]) -> None:
    """A bank of gzip, whose first shard is changed."""
    write_features(release, "gzip")
    with h5py.File(release / FIRST, "r+", libver=V110) as shard:
        change(shard)


@made("structure", reads=False)
def _filters_in_a_chain(release: Path) -> None:
    def change(shard: h5py.File) -> None:
        values = shard["features"][:]

        def prepare(plist: Any) -> None:
            plist.set_shuffle()
            plist.set_deflate(1)
            plist.set_deflate(1)

        create(shard, "features", prepare)[:] = values

    gzip_bank(release, change)


@made("structure", reads=False)
def _index_names_another_compression(release: Path) -> None:
    write_features(release, "gzip")
    edit(release / INDEX, lambda tree: tree.update(compression="none"))


@cache
def bomb(size: int) -> bytes:
    """Zeros, packed a thousandfold."""
    packer = zlib.compressobj(9)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(size >> 20)), packer.flush()])


def with_chunk(release: Path, chunk: bytes, mask: int = 0) -> None:
    """A bank of gzip with bytes of one's own in the place of its first packed row."""

    def change(shard: h5py.File) -> None:
        values = shard["features"][:]

        def prepare(plist: Any) -> None:
            plist.set_shuffle()
            plist.set_deflate(1)

        features = create(shard, "features", prepare)
        features[1:] = values[1:]
        features.id.write_direct_chunk((0, 0, 0, 0), chunk, mask)

    gzip_bank(release, change)


@made("structure", reads=False, alone=True)
def _compression_bomb_of_400_megabytes(release: Path) -> None:
    with_chunk(release, bomb(400 * 2**20))


@made("structure", reads=False)
def _compression_bomb_of_a_megabyte(release: Path) -> None:
    with_chunk(release, bomb(2**20))


@made("structure", reads=False)
def _packed_row_that_is_none(release: Path) -> None:
    with_chunk(release, b"not deflate")


@made("structure", reads=False)
def _packed_row_cut_short(release: Path) -> None:
    with_chunk(release, zlib.compress(bytes(ROW_BYTES))[:-4])


@made("structure", reads=False)
def _packed_row_of_fewer_bytes(release: Path) -> None:
    with_chunk(release, zlib.compress(bytes(ROW_BYTES - 2)))


@made("structure", reads=False)
def _packed_row_with_an_unknown_mask(release: Path) -> None:
    with_chunk(release, bytes(ROW_BYTES), mask=3)


@made("structure", reads=False, alone=True)
def _chunk_size_bomb(release: Path) -> None:
    """Rows of a gibibyte in a small file."""

    def change(shard: h5py.File) -> None:
        del shard["features"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1, 512, 1024, 1024))
        plist.set_shuffle()
        plist.set_deflate(1)
        space = h5py.h5s.create_simple((ROWS, 512, 1024, 1024))
        made = h5py.h5d.create(shard.id, b"features", h5py.h5t.IEEE_F16LE, space, plist)
        for row in range(ROWS):
            made.write_direct_chunk((row, 0, 0, 0), bomb(400 * 2**20))

    gzip_bank(release, change)
    edit(release / INDEX, lambda tree: tree.update(feature_shape=[512, 1024, 1024]))


@made("structure", reads=False)
def _rows_that_share_a_chunk(release: Path) -> None:
    write_features(release, "gzip")
    path = release / FIRST
    content = bytearray(path.read_bytes())
    table = content.index(b"FADB") + 14
    entry = content[content.index(b"FAHD") + 6]
    content[table + entry : table + 2 * entry] = content[table : table + entry]
    path.write_bytes(content)


@made("structure", reads=False)
def _row_beyond_the_end(release: Path) -> None:
    write_features(release, "gzip")
    path = release / FIRST
    table = path.read_bytes().index(b"FADB") + 14
    poke(path, table, struct.pack("<Q", 2**62))


@made("structure", reads=False)
def _header_that_goes_on_in_itself(release: Path) -> None:
    path = release / FIRST
    content = path.read_bytes()
    root = content.index(b"OHDR")
    first = content.index(b"\x10\x10\x00", root)  # the first continuation message of the root group
    poke(path, first + 4, struct.pack("<QQ", root, 64))


@made("structure", reads=False)
def _header_of_4_gigabytes(release: Path) -> None:
    poke(release / FIRST, 48 + 5, struct.pack("<BI", 2, 2**32 - 1))


@made("structure", reads=False)
def _superblock_of_another_version(release: Path) -> None:
    poke(release / FIRST, 8, b"\x02")


@made("structure", reads=False)
def _superblock_that_lies_about_the_end(release: Path) -> None:
    poke(release / FIRST, 28, struct.pack("<Q", 2**40))


@made("structure", reads=False)
def _old_superblock(release: Path) -> None:
    path = release / FIRST
    with h5py.File(path, "r") as old, h5py.File(path.with_suffix(".new"), "w", libver="earliest") as new:
        new.attrs.update(old.attrs)
        for member in old:
            new.create_dataset(member, data=old[member][:], chunks=(1, *SHAPE) if member == "features" else None)
    path.with_suffix(".new").replace(path)


@made("structure", reads=False)
def _user_block(release: Path) -> None:
    path = release / FIRST
    path.write_bytes(SECRET.ljust(512, b"\0") + path.read_bytes())


@made("structure", reads=False)
def _bytes_after_the_end(release: Path) -> None:
    with (release / FIRST).open("ab") as file:
        file.write(SECRET)


@made("structure", reads=True)
def _bytes_in_a_gap(release: Path) -> None:
    poke(release / FIRST, 0x700, SECRET)


@bad_shard("structure", reads=True)
def _deleted_data_set(shard: h5py.File, release: Path) -> None:
    shard.create_dataset("source", data=np.frombuffer(SECRET * 100, np.uint8), track_times=False)
    shard.flush()
    del shard["source"]


@bad_shard("structure", reads=None)
def _deleted_attribute(shard: h5py.File, release: Path) -> None:
    shard.attrs["source"] = SECRET.decode()
    shard.flush()
    del shard.attrs["source"]


@made("structure", reads=False)
def _truncated_shard(release: Path) -> None:
    path = release / FIRST
    os.truncate(path, path.stat().st_size - 100)


@made("structure", reads=False)
def _empty_shard(release: Path) -> None:
    (release / FIRST).write_bytes(b"")


@made("structure", reads=False)
def _garbage_for_a_shard(release: Path) -> None:
    (release / FIRST).write_bytes(np.random.default_rng(0).bytes(10_000))


@made("structure", reads=False)
def _garbage_behind_a_superblock(release: Path) -> None:
    path = release / FIRST
    content = path.read_bytes()
    path.write_bytes(content[:48] + np.random.default_rng(0).bytes(len(content) - 48))


@made("structure", reads=False)
def _weights_for_a_shard(release: Path) -> None:
    shutil.copy(release / CLASSIFIER, release / FIRST)


@bad_shard("values", opens=True, reads=True)
def _features_that_are_not_numbers(shard: h5py.File, release: Path) -> None:
    shard["features"][2, 1, 2, 3] = np.nan


@bad_shard("values", opens=True, reads=True)
def _infinite_features(shard: h5py.File, release: Path) -> None:
    shard["features"][3, 7, 7, 7] = -np.inf


@bad_shard("values", opens=True, reads=True)
def _labels_beyond_the_classes(shard: h5py.File, release: Path) -> None:
    shard["label"][1] = 3


@bad_shard("values", opens=True, reads=True)
def _labels_below_zero(shard: h5py.File, release: Path) -> None:
    shard["label"][1] = -1


@bad_shard("values", opens=True, reads=True)
def _an_id_twice(shard: h5py.File, release: Path) -> None:
    shard["id"][1] = shard["id"][0]


# --------------------------------------------------------------------------------------------- index


@made("schema", reads=False)
def _index_lists_a_path_outside(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"][0].update(file="../../secret"))


@made("schema", reads=False)
def _index_of_2_to_the_60_rows(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"][0].update(rows=2**60))


@made("structure", reads=False)
def _index_of_2_to_the_40_rows(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"][0].update(rows=2**40))


@made("schema", reads=False)
def _index_with_rows_of_2_to_the_72_values(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree.update(feature_shape=[2**24] * 3))


@made("structure", reads=False)
def _index_with_a_million_targets(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree.update(targets=2**20))


@made("schema", reads=False)
def _index_lists_a_shard_twice(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"].append(tree["splits"]["train"][0]))


@made("schema", reads=None)
def _index_forgets_a_shard(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"].pop())


@made("schema", reads=False)
def _index_lists_shards_of_another_split(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"].update(train=tree["splits"]["val"]))


@made("schema", reads=None)
def _index_of_another_featurizer(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree.update(featurizer_sha256="0" * 64))


@made("schema", reads=False)
def _index_of_a_million_levels(release: Path) -> None:
    (release / INDEX).write_bytes(b'{"splits":' + b"[" * 10**6)


@made("schema", reads=False)
def _index_of_a_gibibyte(release: Path) -> None:
    sparse(release / INDEX)


@made("schema", reads=False)
def _index_of_millions_of_values(release: Path) -> None:
    (release / INDEX).write_text('{"splits": {"train": [' + ",".join(["{}"] * 4_000_000) + "]}}")


# --------------------------------------------------------------------------------------------- model record and card


@made(opens=True, network=True)
def _model_names_an_import(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="os:getcwd"))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _model_names_a_path(release: Path) -> None:
    (release.parent / "evil.py").write_text("raise SystemExit('ran')\n")
    edit(release / MODEL, lambda tree: tree.update(arch="../evil:function"))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _network_of_a_thousand_million_parameters(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="resnet56_cifar", arguments={"width": 1024}))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _regnet_of_600_million_parameters(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="regnet_y_128gf", arguments={}, hook="trunk_output.block1"))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _images_of_16_million_pixels(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree["preprocess"].update(size=[4096, 4096]))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _hook_that_is_not_there(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(hook="conv" + "9" * 190 + "_1"))


@made(opens=True, network=True)
def _network_of_other_weights(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arguments={"width": 3}))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _unknown_argument(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arguments={"blocks": 10_000}))
    _say_in_the_featurizer(release)


def _say_in_the_featurizer(release: Path) -> None:
    """The metadata of the weights say what model.json says, and the bank is of these weights."""
    record = json.loads((release / MODEL).read_bytes())
    said = {key: record[key] for key in ("arch", "arguments", "preprocess")} | {"hook": record["hook"]}
    change_header(
        release / FEATURIZER, lambda tree: tree.update(__metadata__={"record": json.dumps(said, sort_keys=True)})
    )
    write_features(release)


@made("structure")
def _weights_that_say_another_network(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="resnet18", arguments={}))


@made("schema")
def _model_of_another_version(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(version=2))


@made("schema")
def _model_with_a_builder(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(builder="os.system"))


@made("schema")
def _model_with_a_mean_that_is_no_number(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree["preprocess"].update(mean=[float("nan"), 0, 0]))


@made("schema")
def _model_with_infinite_deviation(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree["preprocess"].update(std=[float("inf"), 1, 1]))


@made("schema")
def _model_of_other_classes(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(classes=["a", "b", "c"]))


@made("schema")
def _model_of_another_shape(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(feature_shape=[8, 8, 9]))


@made("schema")
def _model_of_a_million_levels(release: Path) -> None:
    (release / MODEL).write_bytes(b'{"arguments":' * 10**6)


@made("schema")
def _model_of_a_gibibyte(release: Path) -> None:
    sparse(release / MODEL)


@made("schema")
def _model_of_millions_of_classes(release: Path) -> None:
    (release / MODEL).write_text('{"classes": [' + ",".join(["0"] * 7_000_000) + "]}")


@made("structure")
def _card_that_is_no_text(release: Path) -> None:
    (release / "README.md").write_bytes(b"\xff\xfe")


@made("structure")
def _card_of_a_gibibyte(release: Path) -> None:
    sparse(release / "README.md")


@made("structure")
def _card_with_terminal_commands(release: Path) -> None:
    (release / "README.md").write_text("\x1b]0;owned\x07\x1b[2J")


# --------------------------------------------------------------------------------------------- weights


def change_header(path: Path, change: Callable[[Any], Any], raw: Callable[[bytes], bytes] = lambda text: text) -> None:
    """Changes the header of a safetensors file; `raw` its text."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    change(tree)
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    text = raw(text.ljust(-(-len(text) // 8) * 8))
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def tensors(tree: dict[str, Any]) -> list[Any]:
    return [entry for key, entry in tree.items() if key != "__metadata__"]


def bad_weights(change: Callable[[dict[str, Any]], Any]) -> Any:
    """A change of the header of φ2's file, which `--deep` and `Release.open` find as its structure."""

    def make(release: Path) -> None:
        change_header(release / CLASSIFIER, change)

    make.__name__ = change.__name__
    return made("structure")(make)


@bad_weights
def _overlapping_tensors(tree: dict[str, Any]) -> None:
    tensors(tree)[1]["data_offsets"] = tensors(tree)[0]["data_offsets"]


@bad_weights
def _tensors_beyond_the_end(tree: dict[str, Any]) -> None:
    tensors(tree)[-1]["data_offsets"][1] = 2**62


@bad_weights
def _tensor_of_2_to_the_62_values(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[2**31, 2**31])


@bad_weights
def _tensor_of_a_shape_that_overflows(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[2**32, 2**32, 2**32])


@bad_weights
def _tensor_of_an_unknown_type(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(dtype="OBJECT")


@bad_weights
def _tensor_of_a_negative_shape(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[-1])


@bad_weights
def _tensor_of_a_shape_of_truth_values(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[True])


@bad_weights
def _hole_between_tensors(tree: dict[str, Any]) -> None:
    name = [key for key in tree if key != "__metadata__"][1]
    del tree[name]


@bad_weights
def _metadata_of_more(tree: dict[str, Any]) -> None:
    tree["__metadata__"] = {"format": "pt", "source": SECRET.decode()}


@bad_weights
def _metadata_that_are_no_texts(tree: dict[str, Any]) -> None:
    tree["__metadata__"] = {"format": ["pt"]}


@made("structure")
def _blanks_in_a_header(release: Path) -> None:
    change_header(release / CLASSIFIER, lambda tree: None, lambda text: text.replace(b",", b", " + b" " * 7))


@made("structure")
def _header_with_a_key_twice(release: Path) -> None:
    change_header(release / CLASSIFIER, lambda tree: None, lambda text: b'{"fc.bias":{},' + text[1:])


@made("structure")
def _header_longer_than_the_file(release: Path) -> None:
    poke(release / CLASSIFIER, 0, struct.pack("<Q", 2**63))


@made("structure", alone=True)
def _header_of_a_million_levels(release: Path) -> None:
    text = b'{"a":' * 10**6
    (release / CLASSIFIER).write_bytes(len(text).to_bytes(8, "little") + text)


@made("structure", alone=True)
def _header_of_millions_of_values(release: Path) -> None:
    text = b"[" + b",".join([b"[]"] * 5_000_000) + b"]"
    (release / CLASSIFIER).write_bytes(len(text).to_bytes(8, "little") + text)


@made("structure")
def _header_of_a_gibibyte(release: Path) -> None:
    sparse(release / CLASSIFIER)
    poke(release / CLASSIFIER, 0, struct.pack("<Q", 2**30 - 8))


@made("structure")
def _header_that_is_no_object(release: Path) -> None:
    (release / CLASSIFIER).write_bytes(b"\x08" + bytes(7) + b"[1]     ")


@made("structure")
def _bytes_after_the_tensors(release: Path) -> None:
    with (release / CLASSIFIER).open("ab") as file:
        file.write(SECRET)


class Payload:
    """What runs when a pickle is loaded: it only leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@made("structure")
def _pickle_named_as_weights(release: Path) -> None:
    (release / CLASSIFIER).write_bytes(pickle.dumps(Payload(release.parent / "marker")))


@made("structure")
def _torch_file_named_as_weights(release: Path) -> None:
    torch.save({"fc.weight": Payload(release.parent / "marker")}, release / CLASSIFIER)


@made("structure")
def _pickle_named_as_a_shard(release: Path) -> None:
    (release / FIRST).write_bytes(pickle.dumps(Payload(release.parent / "marker")))


@made("values", opens=True)
def _weights_that_are_not_numbers(release: Path) -> None:
    path = release / CLASSIFIER
    poke(path, path.stat().st_size - 4, struct.pack("<f", float("nan")))


def _without(release: Path, names: slice) -> None:
    """φ2's file without some tensors, whole otherwise."""
    from safetensors.torch import load_file

    state = load_file(release / CLASSIFIER)
    (release / CLASSIFIER).write_bytes(state_file({key: state[key] for key in sorted(state)[names]}))


@made(opens=True, network=True)
def _tensor_missing(release: Path) -> None:
    _without(release, slice(1, None))


@made(opens=True, network=True)
def _tensor_added(release: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(release / CLASSIFIER)
    (release / CLASSIFIER).write_bytes(state_file(state | {"source": torch.frombuffer(bytearray(SECRET), dtype=torch.uint8)}))


@made(opens=True, network=True)
def _tensor_of_another_type(release: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(release / CLASSIFIER)
    (release / CLASSIFIER).write_bytes(state_file({key: value.double() for key, value in state.items()}))


# --------------------------------------------------------------------------------------------- dpf.toml

CONFIGS: dict[str, bytes] = {
    "a text for a number": b'[train]\nepochs = "many"',
    "a number for a text": b"[release]\nname = 1",
    "a table for a number": b"[train.epochs]\nx = 1",
    "an array for a table": b"train = [1, 2]",
    "a date for a path": b"[images.private]\npath = 2020-01-01",
    "a truth value for a number": b"[train]\nepochs = true",
    "a fraction for a number": b"[train]\nepochs = 1.5",
    "not a number": b"[poison]\nlambda = nan",
    "infinite": b"[train]\nlearning_rate = inf",
    "too large": b"[train]\nepochs = 1" + b"0" * 4000,
    "too large to be written": b"[train]\nepochs = 0x" + b"f" * 100_000,
    "below zero": b"[train]\nepochs = -1",
    "an unknown key": b"[train]\nepoch = 1",
    "an unknown section": b"[vault]\npath = 1",
    "the folder": b'folder = "/"',
    "a key twice": b"[train]\nepochs = 1\nepochs = 2",
    "a name with a path": b'[release]\nname = "../up"',
    "arrays of a million levels": b"a = " + b"[" * 10**5,
    "tables of many levels": b"a = " + b"{a = " * 10**5,
    "a key of many parts": b"a." * 100_000 + b"b = 1",
    "a table of many parts": b"[" + b'"a" . ' * 100_000 + b"b]",
    "no text": b"\xff\xfe",
    "a zero byte": b"[release]\nname = \"a\x00b\"",
    "not TOML": b"{}",
    "a pickle": pickle.dumps({"train": 1}),
}
