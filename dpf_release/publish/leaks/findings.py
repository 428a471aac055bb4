"""What a check of this package reports, and which rows of S the public ones are."""

from __future__ import annotations

import contextlib
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import ID_BYTES, BankIndex, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.errors import VerificationError
from dpf_release.images.table import ImageTable
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.manifest import MANIFEST, SUMS
from dpf_release.release.tree import Tree
from dpf_release.release.verify import Problem, read_manifest


@contextlib.contextmanager
def public_files(release: Path) -> Iterator[tuple[Tree, list[str]]]:
    """All that is in a release, and which of it may be read: plain files that the manifest lists, and it and its sums.

    Raises:
        VerificationError: there is no manifest that can be read.
    """
    manifest = read_manifest(release)
    if isinstance(manifest, Problem):
        raise VerificationError(f"{release} is not a release: {manifest}.")
    listed = {record.path for record in manifest.files} | {MANIFEST, SUMS}
    with Tree.open(release) as tree:
        yield tree, [path for path, found in tree.entries.items() if path in listed and stat.S_ISREG(found.st_mode)]


def public_banks(release: Path) -> list[FeatureBank]:
    """The splits of a release's bank."""
    return [FeatureBank(release / "features", split) for split in read_index(release / "features").splits]


def shard_of(index: BankIndex, split: SplitName, rows: Rows) -> dict[str, Rows]:
    """Rows of a split by the shard that holds them: its path in the release, and row numbers inside it."""
    shards = index.splits[split]
    starts = np.cumsum([0, *(shard.rows for shard in shards)])
    numbers = np.searchsorted(starts, rows, side="right") - 1
    return {f"features/{shards[n].file}": rows[numbers == n] - starts[n] for n in np.unique(numbers)}


@dataclass(frozen=True, eq=False)
class Sources:
    """The vault's `ids.csv`, in bank order.

    Attributes:
        table: of the images.
        ids: of each split, (N, 16).
        rows: of each split, (N,) rows of the image table; -1 where the image is no longer in it.
        gone: names of the images that are no longer in the table.
    """

    table: ImageTable
    ids: dict[str, NDArray[np.uint8]]
    rows: dict[str, Rows]
    gone: tuple[str, ...]

    @classmethod
    def of(cls, vault: Vault, table: ImageTable) -> Sources:
        """Read from the vault; VaultError where there is no `ids.csv`."""
        row_of = {source: row for row, source in enumerate(table.paths)}
        ids: dict[str, bytearray] = {}
        rows: dict[str, array[int]] = {}
        gone = []
        for line in vault.read_ids():
            split, row = line["split"], row_of.get(line["source"], -1)
            ids.setdefault(split, bytearray()).extend(bytes.fromhex(line["id"]))
            rows.setdefault(split, array("q")).append(row)
            if row < 0:
                gone.append(line["source"])
        return cls(
            table,
            {split: np.frombuffer(data, np.uint8).reshape(-1, ID_BYTES) for split, data in ids.items()},
            {split: np.frombuffer(numbers, np.int64) for split, numbers in rows.items()},
            tuple(gone),
        )

    def positions(self, bank: FeatureBank) -> Rows:
        """Where in the vault's order of its split each public row stands, (n,); -1: its id is not there."""
        ids = self.ids.get(bank.split, np.empty((0, ID_BYTES), np.uint8))
        place = {row_id.tobytes(): row for row, row_id in enumerate(ids)}
        return np.array([place.get(row_id.tobytes(), -1) for row_id in bank.ids], np.int64)

    def table_rows(self, bank: FeatureBank) -> Rows:
        """The image table's row of each public row, (n,); -1: not known."""
        positions = self.positions(bank)
        rows = np.append(self.rows.get(bank.split, np.empty(0, np.int64)), -1)  # the last: for an id that is not there
        found: Rows = rows[positions]
        return found
