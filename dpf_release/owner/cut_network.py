"""Φ cut in two, as files and as they are published."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dpf_release.models.hooks import Split
from dpf_release.models.weights import state_file
from dpf_release.models.zoo import is_public_architecture
from dpf_release.release.model_record import CUSTOM, ModelRecord


def import_from(folder: Path) -> None:
    """Lets `package.module:function` of a `dpf.toml` be found beside it.

    Last on the path, and only ever the owner's folder: nothing there can take the place of a module of ours, and a
    stranger's release is never imported from.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@dataclass(frozen=True, eq=False)
class CutNetwork:
    """Φ in two.

    Attributes:
        record: of Φ, with hook point and feature shape of this cut.
        split: φ1 and φ2.
    """

    record: ModelRecord
    split: Split

    @property
    def public_record(self) -> ModelRecord:
        """The record as it may be published: an owner's own architecture is not named."""
        if is_public_architecture(self.record.arch):
            return self.record
        return self.record.model_copy(update={"arch": CUSTOM, "arguments": {}})

    @cached_property
    def featurizer_file(self) -> bytes:
        """φ1 as published. Its header says what the weights alone do not: where Φ is cut, and what it is fed."""
        record = self.public_record.model_dump(mode="json", include={"arch", "arguments", "preprocess"})
        return state_file(self.split.featurizer.state_dict(), record | {"hook": self.split.hook.path})

    @cached_property
    def classifier_file(self) -> bytes:
        """φ2 as published."""
        return state_file(self.split.classifier.state_dict())

    @cached_property
    def featurizer_sha256(self) -> str:
        """Of φ1's file: what a bank, an attacker and a function name as the featurizer that they are for."""
        return hashlib.sha256(self.featurizer_file).hexdigest()
