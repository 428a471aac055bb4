"""What the private bank and a candidate's bank have in common: the facts of their plan, the writer, removal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpf_release.bank.build import machine_facts
from dpf_release.bank.drop_rows import BEFORE
from dpf_release.bank.format import INDEX, RELEASED_SPLITS, BankIndex, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import Select
from dpf_release.bank.writer import BankWriter, Span
from dpf_release.core.arrays import Rows
from dpf_release.core.files import PARTIAL, refuse_small_disk
from dpf_release.core.sizes import parse_size
from dpf_release.errors import ConfigError
from dpf_release.owner.project import Project
from dpf_release.owner.vault.retractions import Retracted
from dpf_release.owner.vault.vault import Vault

RowsOfSplit = dict[SplitName, Rows]


def bank_facts(project: Project) -> dict[str, Any]:
    """How a bank is written, as its plan keeps it."""
    section = project.config.bank
    return section.model_dump() | {"shard_size": parse_size(section.shard_size)} | machine_facts(project.device)


def bank_writer(
    project: Project, folder: Path, *, of_phi_1: bool = False, poisoned: bool = True, drawn: bool = False
) -> BankWriter:
    """Writes a bank of this project's features, sharded as `[bank]` says; those of φ1 as they are before its ReLU."""
    cut, section = project.cut, project.config.bank
    header = BankIndex(
        encoding="float16 before ReLU" if of_phi_1 and cut.split.before_relu is not None else "float16",
        compression=section.compression,
        poisoned=poisoned and not of_phi_1,
        drawn=drawn,
        featurizer_sha256=cut.featurizer_sha256,
        feature_shape=cut.record.feature_shape,
        targets=cut.record.target_columns,
    )
    return BankWriter(folder, header, parse_size(section.shard_size), section.batch_size)


def refuse_small_disk_for_bank(project: Project, folder: Path, rows: Sequence[int]) -> None:
    """That a bank has room when the one that is there is gone: before it is given up."""
    there = sum(path.stat().st_size for path in folder.glob("*/*.h5*"))
    wanted = bank_writer(project, folder).bytes_of([Span("train", 0, count) for count in rows])
    refuse_small_disk(project.vault.root, wanted - there)


def remove_bank(vault: Vault, folder: Path) -> None:
    """Removes a bank, or what there is of one."""
    shards = [path for path in vault.members(folder) if path.suffix == ".h5"]
    vault.remove(folder / "plan.json", folder / INDEX, folder / BEFORE, *shards)
    for half_written in folder.glob(f"*/shard-*{PARTIAL}"):
        half_written.unlink()


@dataclass(frozen=True)
class Removal:
    """The rows of the last retraction of `retracted`, which is unfinished, and those that stay.

    `kept` are these for each split of φ1(S), by the numbers that they have had.
    """

    project: Project
    retracted: Retracted
    kept: RowsOfSplit

    @classmethod
    def of(cls, project: Project, retracted: Retracted) -> Removal:
        """From φ1(S) as it is before its rows go; a `ConfigError` where a released split would have no row left."""
        kept, features = {}, project.vault.features
        for split in read_index(features).splits:
            rows = np.arange(len(FeatureBank(features, split).ids))
            kept[split] = np.setdiff1d(rows, (retracted.unfinished or {}).get(split, ()))
        empty = [split for split in RELEASED_SPLITS if not len(kept.get(split, ()))]
        if empty:
            raise ConfigError(
                f"expected rows that stay in train and val, found none in {' and '.join(empty)}. Nothing was "
                "retracted. Delete the images, and make the features anew: `dpf-release featurize --restart`."
            )
        return cls(project, retracted, kept)

    @property
    def number(self) -> int:
        """Of the retraction, from 1."""
        return len(self.retracted.retractions)

    def bank(self, split: SplitName) -> Select:
        """A split of φ1(S) without the rows that go, the others numbered anew."""
        return Select(FeatureBank(self.project.vault.features, split), self.kept[split])
