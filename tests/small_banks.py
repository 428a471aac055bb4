"""Small feature banks that tests write and read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import BankIndex, ShardRecord
from dpf_release.bank.writer import BankWriter, SplitRows

SHAPE = (2, 3, 4)
ROW_BYTES = 48


def features_of(rows: int, seed: int = 0) -> NDArray[np.float32]:
    """Returns (rows, 2, 3, 4) numbers that float16 rounds."""
    return np.random.default_rng(seed).normal(size=(rows, *SHAPE)).astype(np.float32)


def ids_of(rows: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng([seed, 1]).integers(0, 256, (rows, 16), dtype=np.uint8)


def writer(folder: Path, **header: Any) -> BankWriter:
    """Returns a writer of four rows a shard, three a batch."""
    index = {"poisoned": False, "featurizer_sha256": "a" * 64, "feature_shape": SHAPE, "targets": 0} | header
    return BankWriter(folder, BankIndex(**index), shard_bytes=4 * ROW_BYTES, batch_size=3)


def write_bank(
    folder: Path, rows: int = 10, targets: NDArray[Any] | None = None, seed: int = 0, **header: Any
) -> tuple[ShardRecord, ...]:
    """Writes a bank with one split, train; row i has the label i % 3 unless there are targets."""
    features = features_of(rows, seed)
    labels = np.arange(rows) % 3 if targets is None else targets
    bank = writer(folder, targets=labels.shape[1] if labels.ndim == 2 else 0, **header)
    shards = fill(bank, labels, ids_of(rows, seed), lambda start, stop: features[start:stop])
    bank.finish(shards)
    return shards


def fill(
    bank: BankWriter,
    targets: NDArray[Any],
    ids: NDArray[np.uint8],
    source: Callable[[int, int], NDArray[Any]],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> tuple[ShardRecord, ...]:
    """Writes the shards that are missing of one split, train, asking the source for each batch; no index."""
    rows = {"train": SplitRows(targets, ids)}
    shards = bank.shards(rows)
    missing = [shard for shard in shards if not bank.holds(shard, rows)]
    bank.write(missing, rows, (source(span.start, span.stop) for span in bank.batches(missing)), on_rows)
    return tuple(bank.record(shard) for shard in shards)
