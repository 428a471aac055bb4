"""What a retraction takes out of the vault, as every kind of member is told it: each does without these rows itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpf_release.bank.format import RELEASED_SPLITS, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import Select
from dpf_release.core.arrays import Rows
from dpf_release.errors import ConfigError
from dpf_release.owner.project import Project
from dpf_release.owner.vault.retractions import Retracted

RowsOfSplit = dict[SplitName, Rows]


@dataclass(frozen=True)
class Removal:
    """The rows of the last retraction, and those that stay.

    Attributes:
        project: the owner's.
        retracted: all retractions, the last one unfinished.
        kept: for each split the rows of φ1(S) that stay, by the numbers that they have had.
    """

    project: Project
    retracted: Retracted
    kept: RowsOfSplit

    @classmethod
    def of(cls, project: Project, retracted: Retracted) -> Removal:
        """From φ1(S) as it is before its rows go.

        Raises:
            ConfigError: a released split would have no row left.
            BankError: a shard is missing or damaged.
        """
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
