"""A published release, as a downstream user opens it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dpf_release.bank import BankIndex, SplitName, read_index
from dpf_release.digests import CheckedDigests
from dpf_release.errors import VerificationError
from dpf_release.images import Preprocess
from dpf_release.loader import BankDataset
from dpf_release.manifest import Manifest
from dpf_release.models.hooks import Split, split
from dpf_release.models.weights import freeze, load_state
from dpf_release.models.zoo import build_network, is_public_architecture
from dpf_release.record import CUSTOM, ModelRecord, read_model_record
from dpf_release.verification import Problem, read_manifest, verify

Builder = Callable[[int], nn.Module]


class Release:
    """A release folder whose files are those of its manifest.

    Attributes:
        folder: where it is.
        manifest: name, version, licence, counts, claims, digests.
        record: what rebuilds φ1 and φ2.
        index: the bank's index.
        preprocess: from images to φ1's input.
    """

    def __init__(self, folder: Path, manifest: Manifest, record: ModelRecord, index: BankIndex) -> None:
        self.folder, self.manifest, self.record, self.index = folder, manifest, record, index
        self.preprocess = Preprocess(**record.preprocess.model_dump())

    @classmethod
    def open(cls, folder: str | Path) -> Release:
        """Verifies every file, then opens. What was read through on this machine, and is unchanged, is not read again.

        Raises:
            VerificationError: files are missing, changed or unexpected, or records contradict each other; all of it.
        """
        folder = Path(folder)
        with CheckedDigests.open(folder) as digests_here:
            problems = verify(folder, digest=digests_here.sha256)
        manifest = read_manifest(folder)
        if problems or isinstance(manifest, Problem):
            raise VerificationError(
                f"{folder} is not the release that its manifest describes:\n"
                + "\n".join(f"  {problem}" for problem in problems)
                + "\nFetch it again from where you trust it.",
                [str(problem) for problem in problems],
            )
        record, index = read_model_record(folder / "model" / "model.json"), read_index(folder / "features")
        digests = {entry.path: entry.sha256 for entry in manifest.files}
        contradictions = [
            text
            for text, contradicts in {
                "the bank was made by another featurizer": index.featurizer_sha256
                != digests.get("model/featurizer.safetensors"),
                "the bank's rows have another shape than the model's features": index.feature_shape
                != record.feature_shape,
                "bank and model differ in their targets": index.targets != record.target_columns,
                "manifest and model differ in their classes": manifest.classes != record.classes,
                "the bank lists other shards than the manifest": {
                    f"features/{shard.file}": shard.sha256 for shards in index.splits.values() for shard in shards
                }
                != {entry.path: entry.sha256 for entry in manifest.files if entry.role == "shard"},
            }.items()
            if contradicts
        ]
        if contradictions:
            raise VerificationError(f"{folder} contradicts itself: " + "; ".join(contradictions) + ".", contradictions)
        return cls(folder, manifest, record, index)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index; empty for regression."""
        return self.record.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, by index, or of the regression targets."""
        return self.record.classes or self.record.targets

    def bank(self, split: SplitName) -> BankDataset:
        """P(φ1(S)) of one split, as a torch data set."""
        return BankDataset.open(self.folder / "features", split, self.names)

    def featurizer(self, build: Builder | None = None) -> nn.Module:
        """φ1: (N, 3, H, W) preprocessed images → (N, C, H, W) features; frozen.

        Args:
            build: makes the network from its number of outputs; needed for an owner's own architecture only.
        """
        return freeze(self._part("featurizer", build))

    def classifier(self, build: Builder | None = None) -> nn.Module:
        """φ2: (N, C, H, W) features → (N, outputs); in evaluation mode, its weights free to be refined."""
        return self._part("classifier", build).eval()

    def untrained_classifier(self, build: Builder | None = None) -> nn.Module:
        """φ2's architecture with fresh random weights: where a new classifier φ3 starts."""
        return self._split(build).classifier.train().requires_grad_(True)

    def _part(self, name: Literal["featurizer", "classifier"], build: Builder | None) -> nn.Module:
        part: nn.Module = getattr(self._split(build), name)
        tensors = load_state(self.folder / "model" / f"{name}.safetensors")
        expected = {key: value.shape for key, value in part.state_dict().items()}
        if expected != {key: value.shape for key, value in tensors.items()}:
            raise VerificationError(f"model/{name}.safetensors does not hold the weights of {self.record.arch}.")
        part.load_state_dict(tensors)
        return part

    def _split(self, build: Builder | None) -> Split:
        record = self.record
        if build is None and not is_public_architecture(record.arch):
            raise VerificationError(
                f"this release's network is its owner's own (architecture {record.arch!r}, expected a known one or "
                f"{CUSTOM!r}). Hand in what builds it: release.featurizer(build=my_function)."
            )
        with torch.random.fork_rng(devices=[]):
            network = build_network(record.arch, record.outputs, record.arguments, builder=build)
        parts = split(network, record.hook, record.preprocess.size)
        if parts.hook.shape != record.feature_shape:
            raise VerificationError(
                f"expected features {record.feature_shape} at {record.hook}, the network makes {parts.hook.shape}."
            )
        return parts
