"""Taking rows out of a feature bank: shards that held none of them stay as they are, byte for byte. No torch."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import INDEX, BankIndex, ShardRecord, SplitName, check_shard, open_shard, read_index
from dpf_release.bank.writer import BankWriter, Features, Shard, SplitRows
from dpf_release.core.files import flush_to_disk
from dpf_release.core.progress import Progress

Ids = Set[bytes]  # of rows, 16 bytes each
BEFORE = "index-before.json"  # the index of the bank with its rows, until its owner has noted that they are gone
# Split and ids, (n, 16), of rows that are made anew -> their features, (n, C, H, W)
Remake = Callable[[SplitName, NDArray[np.uint8]], NDArray[np.floating[Any]]]


def drop_rows(
    folder: Path, gone: Ids, batch_size: int, rebuilt: Ids = frozenset(), remake: Remake | None = None
) -> BankIndex:
    """Takes rows out of a bank, and makes some anew; the others keep their bytes and their order.

    A shard that holds any of these is written again under its name, never edited: what is deleted in an HDF5 file stays
    readable. A shard that keeps no row is removed, and the numbers of the others stay. A run that was cut off goes on;
    `index-before.json` stays for the caller to remove. The bank need not have the rows that are `gone`.

    Raises:
        BankError: a shard is missing or damaged, or a row made anew does not fit float16.
        StorageError: the disk does not take the shards.
    """
    old = _begun(folder)
    if not (folder / INDEX).exists():
        writer = BankWriter(folder, old.model_copy(update={"splits": {}}), batch_size=batch_size)
        shards = [(split, record) for split, records in old.splits.items() for record in records]
        kept = []
        with Progress(f"Taking rows out of {folder.parent.name}", len(shards), "shards") as progress:
            for split, record in shards:
                kept.append(_shard_without(writer, split, record, gone, rebuilt, remake))
                progress.advance(1)
        writer.finish([record for record in kept if record is not None])
    new = read_index(folder)
    for file in _files(old) - _files(new):
        (folder / file).unlink(missing_ok=True)
    return new


def _begun(folder: Path) -> BankIndex:
    """The index of the bank with its rows, put aside: a bank that changes is unfinished."""
    before = folder / BEFORE
    if not before.exists():
        (folder / INDEX).replace(before)
        flush_to_disk(folder)
    return BankIndex.model_validate_json(before.read_bytes())


def _files(index: BankIndex) -> set[str]:
    return {record.file for records in index.splits.values() for record in records}


def _shard_without(
    writer: BankWriter, split: SplitName, record: ShardRecord, gone: Ids, rebuilt: Ids, remake: Remake | None
) -> ShardRecord | None:
    """A shard without the rows that go, written only where it has one or has one to be made anew; `None`: empty."""
    path = writer.folder / record.file
    with open_shard(path) as file:
        rows = len(file["id"]) if "id" in file else record.rows  # fewer where it was written before a crash
        check_shard(file, path, writer.header, split, rows)
        ids = file["id"][:]  # (rows, 16)
        kept = np.flatnonzero(~_among(ids, gone))
        is_made = _among(ids[kept], rebuilt)
        if not len(kept):
            return None
        shard = Shard(split, 0, len(kept), record.file)
        if len(kept) == rows and not is_made.any():
            return record if rows == record.rows else writer.record(shard)

        def features() -> Features:
            for span in writer.batches([shard]):
                at = slice(span.start, span.stop)
                rows, anew = kept[at], is_made[at]
                batch = file["features"][rows[0] : rows[-1] + 1][rows - rows[0]]  # in one run, which is far faster
                if remake is not None and anew.any():
                    batch = batch.astype(np.float32)  # and back, without loss: what does not fit is noticed at writing
                    batch[anew] = remake(split, ids[rows[anew]])
                yield batch

        targets = file[writer.header.target_member][:][kept]
        writer.write([shard], {split: SplitRows(targets, ids[kept])}, features())
    return writer.record(shard)


def _among(ids: NDArray[np.uint8], wanted: Ids) -> NDArray[np.bool_]:
    return np.fromiter((row_id.tobytes() in wanted for row_id in ids), np.bool_, len(ids))
