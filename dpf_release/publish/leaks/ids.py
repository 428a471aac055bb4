"""Whether public ids are those that `featurize` drew, and tell nothing."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import ID_BYTES
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.images.table import ImageTable
from dpf_release.publish.leaks.findings import Sources, public_banks
from dpf_release.release.verify import Problem

CHANCE = 1e-6  # how often truly random ids may be refused
CONTENT_ROWS = 100  # of a split: ids that are digests of contents are so all over
_HASHES = (hashlib.md5, hashlib.sha1, hashlib.sha256, hashlib.sha512, hashlib.blake2b, hashlib.blake2s)
_NAMESPACES = [
    space.bytes for space in (uuid.NAMESPACE_DNS, uuid.NAMESPACE_URL, uuid.NAMESPACE_OID, uuid.NAMESPACE_X500)
]


def telling_ids(release: Path, sources: Sources) -> list[Problem]:
    """Ids that the vault's `ids.csv` does not have in this order, that come twice, are not random or are derived.

    Derived: the first 16 bytes of a common digest, a UUID of version 3 or 5, or the text itself, of the name, stem,
    path or row of the image; for some rows of each split, also the digest of its file.
    """
    problems, seen = [], 0
    banks = public_banks(release)
    for bank in banks:
        path, positions = f"features/{bank.split}", sources.positions(bank)
        seen += len(bank)
        if unknown := int((positions < 0).sum()):
            problems.append(Problem("telling id", path, f"{unknown} ids are not of the plan of this bank (ids.csv)"))
        elif (np.diff(positions) <= 0).any():
            problems.append(Problem("telling id", path, "ids stand in another order than in ids.csv"))
        if _chance_of_bits(bank.ids) < CHANCE:
            problems.append(Problem("telling id", path, "ids are not random: some of their bits are 0 or 1 too often"))
        if derived := _derived(bank, sources.table_rows(bank), sources.table):
            told = f"{len(derived)} ids are derived from their images, as that of row {derived[0]}"
            problems.append(Problem("telling id", path, told))
    if len({row_id.tobytes() for bank in banks for row_id in bank.ids}) < seen:
        problems.append(Problem("telling id", "features", "several rows have the same id"))
    return problems


def _chance_of_bits(ids: NDArray[np.uint8]) -> float:
    """How likely so uneven bits are, at most, where each is 0 or 1 by a coin."""
    count, bits = len(ids), 8 * ID_BYTES
    if not count:
        return 1.0
    ones = np.zeros(bits)
    for start in range(0, count, 2**16):
        ones += np.unpackbits(ids[start : start + 2**16], axis=1).sum(axis=0)
    each = np.abs(2 * ones - count).max() / math.sqrt(count)
    together = abs(2 * ones.sum() - count * bits) / math.sqrt(count * bits)
    return min(bits * math.erfc(each / math.sqrt(2)), math.erfc(together / math.sqrt(2)))


def _derived(bank: FeatureBank, rows: Rows, table: ImageTable) -> list[int]:
    """Public rows whose id can be had from their image."""
    known = np.flatnonzero(rows >= 0)
    looked_into = set(known[:: max(1, len(known) // CONTENT_ROWS)].tolist())
    found = []
    for place in known.tolist():
        row, row_id = int(rows[place]), bank.ids[place].tobytes()
        file = table.root / table.paths[row]
        derived = _from_texts(table.paths[row], str(file), str(row))
        if place in looked_into and file.is_file():
            derived.update(_digests(file.read_bytes()))
        if row_id in derived:
            found.append(place)
    return found


def _from_texts(path: str, absolute: str, row: str) -> set[bytes]:
    name = PurePosixPath(path)
    derived: set[bytes] = set()
    for text in (path, name.name, name.stem, absolute, row):
        data = text.encode(errors="surrogateescape")
        derived.add(data[:ID_BYTES].ljust(ID_BYTES, b"\0"))
        derived.update(_digests(data))
        # As uuid.uuid3 and uuid.uuid5, which are slow, and take no name that is not UTF-8.
        for space in _NAMESPACES:
            for version, digest in ((3, hashlib.md5), (5, hashlib.sha1)):
                made = bytearray(digest(space + data, usedforsecurity=False).digest()[:ID_BYTES])
                made[6], made[8] = made[6] & 0x0F | version << 4, made[8] & 0x3F | 0x80
                derived.add(bytes(made))
    return derived


def _digests(data: bytes) -> Iterator[bytes]:
    for digest in _HASHES:
        yield digest(data, usedforsecurity=False).digest()[:ID_BYTES]
    yield hashlib.blake2b(data, digest_size=ID_BYTES).digest()
    yield hashlib.blake2s(data, digest_size=ID_BYTES).digest()
