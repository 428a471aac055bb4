"""Where everything in a shard lies, read without the HDF5 library. No torch.

HDF5 can name other files, filters to load and data sets made of others, and a small file can make its library take much
memory. A shard needs none of that: its bytes are read here first, by the little of the format (HDF5 File Format
Specification 3.0) that format 1 needs, and what is more than that is refused before the library opens the file. As
every byte has its place then, bytes that belong to nothing, such as those of deleted data, are found too.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from dpf_release.errors import BankError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
NOWHERE = 2**64 - 1  # an address that is none
MAX_CHUNKS = 2**22  # that are stored one by one, in a shard
PAGE_BITS = 10  # HDF5 keeps entries of so many chunks together
# Ours have a superblock, 4 headers in some 7 blocks of at most 600 bytes, one heap of 4 KiB, and 3 members.
MAX_BLOCKS, MAX_BLOCK_BYTES = 64, 2**16
# Types of header messages.
NOTHING, DATASPACE, LINK_INFO, DATATYPE, FILL_VALUE, LINK, LAYOUT = 0x00, 0x01, 0x02, 0x03, 0x05, 0x06, 0x08
GROUP_INFO, FILTERS, ATTRIBUTE, CONTINUATION, ATTRIBUTE_INFO = 0x0A, 0x0B, 0x0C, 0x10, 0x15
# Classes of layouts; kinds of chunk indexes.
CONTIGUOUS, CHUNKED = 1, 2
SINGLE, IMPLICIT, FIXED_ARRAY = 1, 2, 3
# Whole messages, which have no room for more: a data set's types and the bytes of a value, an attribute's, ...
NUMBERS = {
    bytes.fromhex("11200f0002000000000010000a05000a0f000000"): 2,  # float16
    bytes.fromhex("11201f000400000000002000170800177f000000"): 4,  # float32
    bytes.fromhex("100800000800000000004000"): 8,  # int64
    bytes.fromhex("100000000100000000000800"): 1,  # uint8
}
TEXT = bytes.fromhex("1901010010000000" + "100000000100000000000800")
TRUTH = bytes.fromhex("3802000001000000" + "100800000100000000000800") + b"FALSE\0TRUE\0\0\1"
ONE_VALUE = bytes.fromhex("02000000")
NO_HEAP = bytes.fromhex("0000") + b"\xff" * 16  # links, or attributes, are in the header itself
NO_GROUP_INFO = bytes.fromhex("0000")
# Filters; the numbers that they are given are shuffle's bytes of a value and deflate's level.
SHUFFLE, DEFLATE = 2, 1
# Where the chunk of a row lies: bytes from the file's begin, `NOWHERE` where it was never written; bytes as stored; and
# a mask, whose bit i is set where the i-th filter was left out.
STORED_ROW = np.dtype([("offset", "u8"), ("size", "u8"), ("mask", "u4")])


def read_layout(path: Path) -> ShardLayout:
    """The layout of a shard; reads its structures, none of its data.

    Raises:
        BankError: it is missing, or its structures are not those that format 1 needs: it has another superblock,
            links, groups, storage outside the file, types that are not plain numbers, other chunk indexes, or parts
            that overlap.
    """
    try:
        with path.open("rb") as file:
            return ShardLayout(file, path.name)
    except OSError as error:
        raise BankError(f"{path} cannot be read as a shard: {error.strerror}. Write or fetch it again.") from error
    except (struct.error, IndexError) as error:
        raise BankError(f"{path.name} is not a shard of format 1: a structure in it is cut off.") from error


class ShardLayout:
    """What lies where in a shard: from the superblock to everything that it leads to.

    Each method reads one kind of structure.

    Attributes:
        size: of the file, in bytes.
        rows: `STORED_ROW`, (N,), of each data set whose chunks are stored one by one, by name.
        begins: of each data set whose data lie in one piece, by name.
        used: (n, 2) first byte and end of every structure and datum, ascending, none in another.
        unused: first byte and end of what structures keep in reserve.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name, self.size = file, name, os.fstat(file.fileno()).st_size
        self.rows: dict[str, NDArray[np.void]] = {}
        self.begins: dict[str, int] = {}
        self.unused: list[tuple[int, int]] = []
        self._blocks: list[tuple[int, int]] = []
        self._timed: list[str] = []
        self._texts: dict[int, dict[int, int]] = {}  # heap -> number in it -> length
        self._attributes: set[bytes] = set()
        members: dict[str, int] = {}
        for kind, body in self._messages(self._superblock(), "the root group"):
            if kind == LINK:
                member, address = self._link(body)
                if member in members:
                    self._refuse(f"/{member} is there twice")
                members[member] = address
            elif kind == ATTRIBUTE:
                self._attribute(body)
            elif body != {LINK_INFO: NO_HEAP, ATTRIBUTE_INFO: NO_HEAP, GROUP_INFO: NO_GROUP_INFO}.get(kind):
                self._refuse(f"the root group has more than format 1, or too much: {_named(kind)}")
        for member, address in members.items():
            self._dataset(member, address)
        for address, texts in self._texts.items():
            self._heap(address, texts)
        if self._timed:
            self._refuse(f"{self._timed[0]} keeps times")
        self.used = self._used()

    def hidden_bytes(self, file: BinaryIO) -> int | None:
        """Where the first byte is that belongs to nothing and is not zero, in the open shard; None: there is none."""
        edges = np.concatenate([[np.uint64(0)], self.used.ravel(), [np.uint64(self.size)]]).reshape(-1, 2)
        gaps = edges[edges[:, 0] < edges[:, 1]].tolist()
        for start, stop in [*gaps, *self.unused]:
            file.seek(start)
            while start < stop:
                piece = file.read(min(2**20, stop - start))
                if not piece:
                    break
                if piece.strip(b"\0"):
                    return start + len(piece) - len(piece.lstrip(b"\0"))
                start += len(piece)
        return None

    def _refuse(self, what: str) -> NoReturn:
        raise BankError(f"{self._name} is not a shard of format 1: {what}. Write or fetch it again.")

    def _read(self, start: int, count: int) -> bytes:
        if start > self.size:
            self._refuse("a structure lies beyond the file's end; is it cut off?")
        self._file.seek(start)
        return self._file.read(count)

    def _block(self, start: int, count: int, what: str) -> bytes:
        """A structure, which no other may overlap."""
        if count > MAX_BLOCK_BYTES:
            self._refuse(f"{what} takes {count} bytes")
        self._claim(start, count, what)
        return self._read(start, count)

    def _claim(self, start: int, count: int, what: str) -> None:
        stop = start + count
        if stop > self.size:
            self._refuse(f"{what} lies beyond the file's end; is it cut off?")
        if len(self._blocks) == MAX_BLOCKS:
            self._refuse(f"it has more than {MAX_BLOCKS} structures")
        if any(start < other_stop and other_start < stop for other_start, other_stop in self._blocks):
            self._refuse(f"{what} overlaps something else")
        self._blocks.append((start, stop))

    def _used(self) -> NDArray[np.uint64]:
        """All blocks and chunks, ascending."""
        parts = [np.array(self._blocks, np.uint64)]
        for rows in self.rows.values():
            written = rows[rows["offset"] != NOWHERE]
            offsets, sizes = written["offset"], written["size"]
            if (offsets > self.size).any() or (sizes > self.size).any() or (offsets + sizes > self.size).any():
                self._refuse("a row lies beyond the file's end; is it cut off?")
            parts.append(np.stack([offsets, offsets + sizes], axis=1))
        used = np.concatenate(parts)
        used = used[np.argsort(used[:, 0], kind="stable")]
        if (used[1:, 0] < used[:-1, 1]).any():
            self._refuse("rows overlap each other, or something else")
        return used

    # ----------------------------------------------------------------------------------------- headers

    def _superblock(self) -> int:
        """The address of the root group's header."""
        if self._read(0, 8) != SIGNATURE:
            self._refuse("it does not begin as an HDF5 file")
        *fixed, end, root = struct.unpack_from("<BBBBQQQQ", self._block(0, 48, "the superblock"), 8)
        if fixed != [3, 8, 8, 0, 0, NOWHERE]:  # version, bytes of an offset and of a length, flags, base, extension
            self._refuse("its superblock is not one that HDF5 1.10 writes and closes, without more")
        if end != self.size:
            self._refuse(f"expected {end} bytes, found {self.size}")
        return int(root)

    def _messages(self, address: int, what: str) -> Iterator[tuple[int, bytes]]:
        """The messages of an object's header (version 2), through its continuation blocks."""
        prefix = self._read(address, 6)
        if prefix[:5] != b"OHDR\x02":
            self._refuse(f"{what} has no header of version 2")
        flags = prefix[5]
        if flags & 0x20:
            self._timed.append(what)
        if flags & ~0x23:
            self._refuse(f"the header of {what} has more than format 1")
        begin = 6 + (16 if flags & 0x20 else 0)
        width = 1 << (flags & 3)
        length = int.from_bytes(self._read(address + begin, width), "little")
        blocks = [(address, begin + width, begin + width + length + 4)]
        while blocks:
            start, position, length = blocks.pop(0)
            block = self._block(start, length, f"the header of {what}")
            if start != address and block[:4] != b"OCHK":
                self._refuse(f"the header of {what} goes on where there is none")
            end = length - 4  # the checksum is HDF5's to check
            while end - position >= 4:
                kind, size, message_flags = struct.unpack_from("<BHB", block, position)
                body, position = block[position + 4 : position + 4 + size], position + 4 + size
                if position > end or message_flags & ~5:
                    self._refuse(f"the header of {what} is cut off, or shared with another")
                if kind == NOTHING:
                    self.unused.append((start + position - size, start + position))
                elif kind == CONTINUATION:
                    next_block, next_length = struct.unpack("<QQ", body)
                    blocks.append((next_block, 4, next_length))
                else:
                    yield kind, body
            self.unused.append((start + position, start + end))

    def _link(self, body: bytes) -> tuple[str, int]:
        """The name of a member and the address of its header."""
        begin = 4 if body[1] & 8 else 3  # a link that is none to a header of this file says its kind
        end = begin + body[begin - 1]
        name = body[begin:end].decode("ascii", errors="replace")
        if not re.fullmatch(r"[A-Za-z0-9_ .-]{1,64}", name):
            self._refuse("a member has a name that is none")
        if body[:2] != b"\1\0":
            self._refuse(f"/{name} is a link")
        return name, struct.unpack("<Q", body[end:])[0]

    def _attribute(self, body: bytes) -> None:
        """That it is a number, a truth value or a text, and no more; where its text lies is noted."""
        version, flags, name_bytes, type_bytes, space_bytes, alphabet = struct.unpack_from("<BBHHHB", body)
        pieces = io.BytesIO(body[9:])
        name, type_, space, value = map(pieces.read, (name_bytes, type_bytes, space_bytes, -1))
        size = {TEXT: 16, TRUTH: 1}.get(type_) or NUMBERS.get(type_)
        if (version, flags, alphabet, space, len(value)) != (3, 0, 0, ONE_VALUE, size):
            self._refuse("an attribute is no number, truth value or text, or more than that")
        if name.find(b"\0") != name_bytes - 1 or name in self._attributes:
            self._refuse("an attribute has a name that is none, or that of another")
        self._attributes.add(name)
        if type_ == TEXT:
            length, address, number = struct.unpack("<IQI", value)
            self._texts.setdefault(address, {})[number] = length

    def _heap(self, address: int, texts: dict[int, int]) -> None:
        """That a heap of texts holds those of the attributes, and no others."""
        what = "the heap of texts"
        head = self._read(address, 16)
        length = struct.unpack_from("<Q", head, 8)[0]
        heap = self._block(address, length, what)
        if heap[:8] != b"GCOL\1\0\0\0":
            self._refuse(f"{what} is none")
        found: set[int] = set()
        position = 16
        while length - position >= 16:
            number, nothing, size = struct.unpack_from("<H6sQ", heap, position)
            if number == 0 and nothing == bytes(6) and size == length - position:  # the rest is free
                position += 16
                break
            stop = position + 16 + -(-size // 8) * 8
            if stop > length or number in found or nothing != bytes(6) or texts.get(number) != size:
                self._refuse(f"{what} holds what no attribute names")
            if b"\0" in heap[position + 16 : position + 16 + size]:
                self._refuse(f"{what} holds a text that goes on behind its end")
            self.unused.append((address + position + 16 + size, address + stop))
            found.add(number)
            position = stop
        if found != set(texts):
            self._refuse(f"{what} lacks a text that an attribute names")
        self.unused.append((address + position, address + length))

    # ----------------------------------------------------------------------------------------- data sets

    def _dataset(self, name: str, address: int) -> None:
        what = f"/{name}"
        found: dict[int, bytes] = {}
        for kind, body in self._messages(address, what):
            if kind in found or kind not in {DATASPACE, DATATYPE, FILL_VALUE, LAYOUT, FILTERS, ATTRIBUTE_INFO}:
                self._refuse(f"{what} is not a data set stored in this file, or is more: {_named(kind)}")
            found[kind] = body
        if not {DATASPACE, DATATYPE, LAYOUT} <= found.keys():
            self._refuse(f"{what} is not a data set stored in this file: it lacks a shape, a type or a layout")
        shape, layout = self._shape(found[DATASPACE]), found[LAYOUT]
        if found[DATATYPE] not in NUMBERS:
            self._refuse(f"{what} holds no plain numbers of format 1")
        item = NUMBERS[found[DATATYPE]]
        if found.get(ATTRIBUTE_INFO, NO_HEAP) != NO_HEAP:
            self._refuse(f"{what} has attributes")
        fill = found.get(FILL_VALUE, b"\3\0")
        if len(fill) != 2 or fill[0] != 3 or fill[1] & 0xF0:
            self._refuse(f"{what} says what it holds where nothing was written")
        if layout[:2] in {bytes([3, CONTIGUOUS]), bytes([4, CONTIGUOUS])} and FILTERS not in found:
            start, count = struct.unpack("<QQ", layout[2:])
            if count != math.prod(shape) * item:
                self._refuse(f"{what} takes {count} bytes, not those of its values")
            self._piece(name, start, count)
        elif layout[:2] == bytes([4, CHUNKED]):
            self._chunks(name, shape, item, layout)
            if FILTERS in found and not _is_gzip(found[FILTERS], item):
                self._refuse(f"{what} has filters that are not those of format 1")
        else:
            self._refuse(f"{what} is not a data set stored in this file, as format 1 stores it")

    def _shape(self, body: bytes) -> tuple[int, ...]:
        rank = body[1]
        shape = struct.unpack_from(f"<{rank}Q", body, 4)
        # With or without the shape that it can grow to, which is its own.
        whole = [struct.pack(f"<4B{rank * times}Q", 2, rank, times - 1, 1, *shape * times) for times in (1, 2)]
        if body not in whole:
            self._refuse("a data set has a shape of another kind, or can grow")
        return shape

    def _piece(self, name: str, start: int, count: int) -> None:
        if start != NOWHERE:
            self._claim(start, count, f"/{name}")
            self.begins[name] = start

    def _chunks(self, name: str, shape: tuple[int, ...], item: int, layout: bytes) -> None:
        """Notes where the chunks lie, by one of the three indexes of HDF5 1.10 for a fixed shape."""
        flags, rank, width = layout[2], layout[3], layout[4]
        sides = [int.from_bytes(layout[5 + i * width : 5 + (i + 1) * width], "little") for i in range(rank)]
        chunk_bytes = math.prod(sides)
        if rank != len(shape) + 1 or sides[-1] != item or not 0 < chunk_bytes < 2**63:
            self._refuse(f"/{name} has chunks of another rank than its own, or of no possible size")
        count = math.prod(-(-extent // side) for extent, side in zip(shape, sides, strict=False))
        index, rest = layout[5 + rank * width], layout[6 + rank * width :]
        if index == SINGLE and flags == 2:
            size, mask, address = struct.unpack("<QIQ", rest)
            self.rows[name] = np.array([(address, size, mask)], STORED_ROW)
        elif index in {SINGLE, IMPLICIT} and flags == 0:
            self._piece(name, struct.unpack("<Q", rest)[0], count * chunk_bytes)
        elif index == FIXED_ARRAY and flags == 0 and rest[0] == PAGE_BITS:
            self._fixed_array(name, struct.unpack("<Q", rest[1:])[0], count, chunk_bytes)
        else:
            self._refuse(f"the chunks of /{name} are indexed in another way than format 1's")

    def _fixed_array(self, name: str, address: int, count: int, chunk_bytes: int) -> None:
        """One entry a chunk: address and, where there are filters, stored size and mask; in pages where many."""
        what = f"the index of /{name}"
        if address == NOWHERE:
            return
        if count > MAX_CHUNKS:
            self._refuse(f"/{name} has {count} chunks, expected at most {MAX_CHUNKS}")
        head = self._block(address, 28, what)
        magic, filtered, entry, page_bits, entries, table = struct.unpack_from("<5sBBBQQ", head)
        if magic != b"FAHD\0" or filtered > 1 or entries != count or page_bits != PAGE_BITS:
            self._refuse(f"{what} is not of its shape")
        if not (13 <= entry <= 20 if filtered else entry == 8):
            self._refuse(f"{what} has entries of {entry} bytes")
        per_page = min(count, 1 << PAGE_BITS) or 1
        pages = -(-count // per_page) if count > per_page else 0
        prefix = 14 + -(-pages // 8) + (4 if pages else 0)
        self._claim(table, prefix + count * entry + (pages or 1) * 4, what)
        if self._read(table, 14) != struct.pack("<5sBQ", b"FADB\0", filtered, address):
            self._refuse(f"{what} has no table")
        rows = np.zeros(count, STORED_ROW)
        rows["size"] = chunk_bytes
        self._file.seek(table + prefix)
        for start in range(0, count, per_page):
            stop = min(start + per_page, count)
            page = np.frombuffer(self._file.read((stop - start) * entry), np.uint8).reshape(-1, entry)
            rows["offset"][start:stop] = _numbers(page[:, :8])
            if filtered:
                rows["size"][start:stop] = _numbers(page[:, 8 : entry - 4])
                rows["mask"][start:stop] = _numbers(page[:, entry - 4 :])
            self._file.seek(4, os.SEEK_CUR)  # the page's checksum
        self.rows[name] = rows


def _numbers(octets: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(n, width) little-endian octets as (n,) numbers."""
    wide = np.zeros((len(octets), 8), np.uint8)
    wide[:, : octets.shape[1]] = octets
    return wide.view("<u8")[:, 0]


def _is_gzip(body: bytes, item: int) -> bool:
    """Whether a message says nothing but format 1's chain of filters: shuffle, then deflate."""
    if len(body) != 22:
        return False
    shuffle_flag, deflate_flag, level = body[4], body[14], body[-4:]
    expected = b"\2\2" + struct.pack("<HHHI", SHUFFLE, shuffle_flag, 1, item)
    expected += struct.pack("<HHH", DEFLATE, deflate_flag, 1) + level
    return body == expected and {shuffle_flag, deflate_flag} <= {0, 1} and int.from_bytes(level, "little") <= 9


def _named(kind: int) -> str:
    known = {0x07: "storage outside the file", ATTRIBUTE: "an attribute", LINK: "a group", LINK_INFO: "a group"}
    return known.get(kind, f"a header message of type {kind}")
