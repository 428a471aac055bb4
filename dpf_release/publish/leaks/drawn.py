"""Whether ids and order are those that `featurize` drew at random, and tell nothing of the source."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import ID_BYTES, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.images.table import ImageTable
from dpf_release.publish.leaks.findings import Sources
from dpf_release.release.verify import Problem

CHANCE = 1e-6  # how often truly random ids, or a bank in truly random order, may be refused
CONTENT_ROWS = 100  # of a split: ids that are digests of contents are so all over
_HASHES = (hashlib.md5, hashlib.sha1, hashlib.sha256, hashlib.sha512, hashlib.blake2b, hashlib.blake2s)
_NAMESPACES = (uuid.NAMESPACE_DNS, uuid.NAMESPACE_URL, uuid.NAMESPACE_OID, uuid.NAMESPACE_X500)


def telling_ids(
    banks: Sequence[FeatureBank], sources: Sources, drawn: Mapping[SplitName, NDArray[np.uint8]] | None = None
) -> list[Problem]:
    """Ids that the vault's `ids.csv` does not have in this order, that come twice, are not random or are derived.

    Of rows that belong to no image, the ids that were `drawn` for them, (n, 16) for each split: an id of an image's
    would say which it is of. A split whose plan is lost is not in it.

    Derived: the first 16 bytes of a common digest, a UUID of version 3 or 5, or the text itself, of the name, stem,
    path or row of the image; for some rows of each split, also the digest of its file.
    """
    problems, seen = [], 0
    for bank in banks:
        path, positions = f"features/{bank.split}", sources.positions(bank)
        seen += len(bank)
        if drawn is not None:
            problems += [Problem("telling id", path, told) for told in _not_as_drawn(bank, positions, drawn)]
        elif unknown := int((positions < 0).sum()):
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


def _not_as_drawn(bank: FeatureBank, positions: Rows, drawn: Mapping[SplitName, NDArray[np.uint8]]) -> Iterator[str]:
    if images := int((positions >= 0).sum()):
        yield f"{images} drawn rows have the id of an image (ids.csv)"
    if bank.split in drawn and not np.array_equal(bank.ids, drawn[bank.split]):
        yield "ids are not those that were drawn for these rows"


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
        row = int(rows[place])
        file = table.root / table.paths[row]
        derived = _from_texts(table.paths[row], str(file), str(row))
        if place in looked_into and file.is_file():
            derived.update(_digests(file.read_bytes()))
        if bank.ids[place].tobytes() in derived:
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
                made = bytearray(digest(space.bytes + data, usedforsecurity=False).digest()[:ID_BYTES])
                made[6], made[8] = made[6] & 0x0F | version << 4, made[8] & 0x3F | 0x80
                derived.add(bytes(made))
    return derived


def _digests(data: bytes) -> Iterator[bytes]:
    for digest in _HASHES:
        yield digest(data, usedforsecurity=False).digest()[:ID_BYTES]
    yield hashlib.blake2b(data, digest_size=ID_BYTES).digest()
    yield hashlib.blake2s(data, digest_size=ID_BYTES).digest()


def source_order(banks: Sequence[FeatureBank], sources: Sources) -> list[Problem]:
    """Splits whose rows stand in an order that goes with the order of the image table, as a whole or in a class.

    Spearman's rank correlation ρ of n rows in random order has the mean 0 and the variance 1 / (n - 1); its tail is
    lighter than the normal one that its probability is taken from. Rows that were shuffled in blocks have no
    correlation, nor have rows that were dealt out in turn or by i·k mod n; but from one row to the next they take the
    same step of the source too often.
    """
    problems = []
    for bank in banks:
        rows = sources.table_rows(bank)
        known = np.flatnonzero(rows >= 0)
        targets = bank.targets[known]
        scores = list(_scores(rows[known], targets if targets.ndim == 1 else np.zeros(len(known), np.int64)))
        path = f"features/{bank.split}"
        for what, score in scores:
            chance = math.erfc(abs(score) / math.sqrt(2))
            if chance * len(scores) < CHANCE:
                problems.append(
                    Problem("source order", path, f"{what} go with the order of the source (by chance: {chance:.0e})")
                )
        step, times = _commonest_step(rows[known])
        if times >= (limit := _unlikely_times(len(known))):
            told = f"{times} times the next row is the one {step:+d} further in the source; by chance: below {limit}"
            problems.append(Problem("source order", path, told))
    return problems


def _scores(rows: Rows, targets: NDArray[np.int64]) -> Iterator[tuple[str, float]]:
    """What is looked at, and its rank correlation in standard deviations."""
    if len(rows) < 2:
        return
    yield "all its rows", _deviations(rows)
    names = np.unique(targets)
    classes = [(name, rows[targets == name]) for name in names if (targets == name).sum() > 1] if len(names) > 1 else []
    each = [_deviations(members) for _, members in classes]
    yield from ((f"rows of class {name}", score) for (name, _), score in zip(classes, each, strict=True))
    if each:  # many classes with few rows each
        yield "rows within their classes", sum(each) / math.sqrt(len(each))


def _deviations(rows: Rows) -> float:
    """Spearman's ρ of the places in the bank and in the source, over its standard deviation 1 / sqrt(n - 1)."""
    count = len(rows)
    distance = np.arange(count) - np.argsort(np.argsort(rows))
    rho = 1 - 6 * float(np.square(distance, dtype=np.float64).sum()) / (count * (count**2 - 1))
    return rho * math.sqrt(count - 1)


def _commonest_step(rows: Rows) -> tuple[int, int]:
    """From one row to the next: by how many rows of the source, most often, and how often."""
    steps, times = np.unique(np.diff(np.argsort(np.argsort(rows))), return_counts=True)
    return (int(steps[times.argmax()]), int(times.max())) if len(steps) else (0, 0)


@cache
def _unlikely_times(count: int) -> int:
    """How often the commonest step comes in less than one of a million random orders; above `count` where no number is.

    The chance that one step comes m times is at most the expected number of ways to choose m places that all take it.
    Such places lie in c chains, in C(m - 1, c - 1)·C(n - m, c) ways; they fix m + c rows, of which the first of each
    chain can be any: n^c of the n!/(n - m - c)! ways. There are 2(n - 1) steps.
    """

    def chance(times: int) -> float:
        chains = range(1, min(times, count - times) + 1)
        ways = [math.comb(times - 1, c - 1) * math.comb(count - times, c) * count**c for c in chains]
        return sum(2 * (count - 1) * way / math.perm(count, times + c) for c, way in zip(chains, ways, strict=True))

    return next((times for times in range(1, count) if chance(times) < CHANCE), count + 1)
