"""Kinds of bad shard: members, types, storage, filters, bytes, values."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from corpus import (
    CLASSIFIER,
    FIRST,
    INDEX,
    PLANTED,
    ROW_BYTES,
    ROWS,
    SECOND,
    SECRET,
    SHAPE,
    VAL,
    edit,
    made,
    poke,
    secret,
    tampered,
    write_features,
)
from dpf_release.bank.hdf5_check import DATATYPE, FILTERS, LAYOUT

V110 = ("v110", "v110")


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
    shard.create_dataset("source", data=np.frombuffer(PLANTED, np.uint8))


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
    shard.attrs["source"] = PLANTED.decode()


@bad_shard("structure")
def _attribute_of_a_member(shard: h5py.File, release: Path) -> None:
    shard["features"].attrs["source"] = PLANTED.decode()


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
    path.write_bytes(PLANTED.ljust(512, b"\0") + path.read_bytes())


@made("structure", reads=False)
def _bytes_after_the_end(release: Path) -> None:
    with (release / FIRST).open("ab") as file:
        file.write(PLANTED)


@made("structure", reads=True)
def _bytes_in_a_gap(release: Path) -> None:
    poke(release / FIRST, 0x700, PLANTED)


@bad_shard("structure", reads=True)
def _deleted_data_set(shard: h5py.File, release: Path) -> None:
    shard.create_dataset("source", data=np.frombuffer(PLANTED * 100, np.uint8), track_times=False)
    shard.create_dataset("copy", data=shard["id"][:], track_times=False)  # behind it: at the end it would be cut off
    del shard["id"]
    shard.move("copy", "id")
    shard.flush()
    del shard["source"]


@bad_shard("structure", reads=None)
def _deleted_attribute(shard: h5py.File, release: Path) -> None:
    shard.attrs["source"] = PLANTED.decode()
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
def _id_twice_in_a_shard(shard: h5py.File, release: Path) -> None:
    shard["id"][1] = shard["id"][3]


@bad_shard("values", opens=True, reads=True)
def _id_of_another_shard(shard: h5py.File, release: Path) -> None:
    with h5py.File(release / SECOND, "r") as other:
        shard["id"][1] = other["id"][3]


@bad_shard("values", opens=True, reads=True)
def _ids_of_another_split(shard: h5py.File, release: Path) -> None:
    with h5py.File(release / VAL, "r") as other:
        shard["id"][:] = other["id"][:]


@tampered("unexpected")
def _external_link_beside_a_stray_file(release: Path) -> None:
    _external_link(release)
    (release / "stray.txt").write_text("a file that no manifest lists\n")


@bad_shard("values", opens=True, reads=True)
def _infinite_features(shard: h5py.File, release: Path) -> None:
    shard["features"][3, 7, 7, 7] = -np.inf


@bad_shard("values", reads=True)
def _labels_beyond_the_classes(shard: h5py.File, release: Path) -> None:
    shard["label"][1] = 3


@bad_shard("values", reads=True)
def _labels_below_zero(shard: h5py.File, release: Path) -> None:
    shard["label"][1] = -1


@bad_shard("values", opens=True, reads=True)
def _an_id_twice(shard: h5py.File, release: Path) -> None:
    shard["id"][1] = shard["id"][0]


@made("structure", reads=False)
def _shards_swapped_between_splits(release: Path) -> None:
    one, other = (release / FIRST).read_bytes(), (release / VAL).read_bytes()
    (release / FIRST).write_bytes(other)
    (release / VAL).write_bytes(one)


# --------------------------------------------------------------------------------- texts that HDF5 reads over


def checksum(data: bytes) -> int:
    """Bob Jenkins' lookup3, which HDF5 puts behind each block of a header."""
    words = struct.unpack(f"<{-(-len(data) // 12) * 3}I", data + bytes(-len(data) % 12))
    a = b = c = 0xDEADBEEF + len(data)

    def turned(value: int, bits: int) -> int:
        return (value << bits | value >> 32 - bits) % 2**32

    for place in range(0, len(words), 3):
        a, b, c = ((old + new) % 2**32 for old, new in zip((a, b, c), words[place : place + 3], strict=True))
        for bits in (4, 6, 8, 16, 19, 4) if place + 3 < len(words) else ():
            a, b, c = b, (c + b) % 2**32, (a - c) % 2**32 ^ turned(c, bits)
    for bits in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, ((c ^ b) - turned(b, bits)) % 2**32, a
    return b


def with_message(path: Path, member: str, kind: int, change: Callable[[bytes], bytes]) -> None:
    """A longer message in the header of a data set, whose reserve has room for it; with a right checksum."""
    with h5py.File(path, "r") as shard:
        begin = h5py.h5o.get_info(shard[member].id).addr
    content = bytearray(path.read_bytes())
    position, stop = begin + 8, begin + 8 + int.from_bytes(content[begin + 6 : begin + 8], "little")
    messages = []
    while position < stop:
        found, size, flags = struct.unpack_from("<BHB", content, position)
        body = bytes(content[position + 4 : position + 4 + size])
        messages.append((found, flags, change(body) if found == kind else body))
        position += 4 + size
    grown = sum(4 + len(body) for _, _, body in messages) - (stop - begin - 8)
    messages[-1] = (0, 0, messages[-1][2][grown:])
    content[begin + 8 : stop] = b"".join(struct.pack("<BHB", k, len(body), flags) + body for k, flags, body in messages)
    content[stop : stop + 4] = checksum(bytes(content[begin:stop])).to_bytes(4, "little")
    path.write_bytes(content)


@made("structure", reads=False)
def _text_behind_a_layout(release: Path) -> None:
    with_message(release / FIRST, "label", LAYOUT, lambda body: body + PLANTED)


@made("structure", reads=False)
def _text_behind_a_type(release: Path) -> None:
    with_message(release / FIRST, "id", DATATYPE, lambda body: body + PLANTED)


@made("structure", reads=False)
def _text_behind_the_name_of_a_filter(release: Path) -> None:
    write_features(release, "gzip")
    name = (b"deflate\0" + PLANTED).ljust(40, b"\0")
    # Of version 1, in which a known filter may have a name too.
    shuffle, deflate = struct.pack("<4H2I", 2, 0, 1, 1, 2, 0), struct.pack("<4H", 1, len(name), 1, 1)
    named = b"\1\2" + bytes(6) + shuffle + deflate + name + struct.pack("<2I", 1, 0)
    with_message(release / FIRST, "features", FILTERS, lambda body: named)


@made("structure", reads=False)
def _text_behind_the_numbers_of_a_filter(release: Path) -> None:
    write_features(release, "gzip")
    more = PLANTED.ljust(32)
    with_message(
        release / FIRST,
        "features",
        FILTERS,
        lambda body: body[:6] + struct.pack("<H", 1 + len(more) // 4) + body[8:12] + more + body[12:],
    )


@made("structure", reads=False)
def _text_behind_a_text(release: Path) -> None:
    path = release / FIRST
    with h5py.File(path, "r+", libver=V110) as shard:
        shard.attrs["split"] = "train#" + PLANTED.decode()
    poke(path, path.read_bytes().index(b"train#") + 5, b"\0")


@made("structure", reads=False)
def _text_behind_a_packed_row(release: Path) -> None:
    with_chunk(release, zlib.compress(bytes(ROW_BYTES)) + PLANTED)
