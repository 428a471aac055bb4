"""A published release, as a downstream user opens it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.dataset import BankDataset
from dpf_release.bank.format import BankIndex, SplitName, read_index
from dpf_release.bank.rows import ComputedRows
from dpf_release.core.sizes import readable_size
from dpf_release.errors import ConfigError, VerificationError
from dpf_release.images.decode import Preprocess
from dpf_release.models.hooks import Split, split
from dpf_release.models.weights import freeze, load_state
from dpf_release.models.zoo import build_network, is_public_architecture, network_on_paper
from dpf_release.poisoning.mixture import Draw, drawn_anew
from dpf_release.poisoning.procedure import Procedure
from dpf_release.release.checked_files import CheckedDigests
from dpf_release.release.contents import VERSION as STRUCTURE
from dpf_release.release.contents import check_structure, contradictions
from dpf_release.release.manifest import CLASSIFIER, FEATURIZER, MANIFEST, MODEL, PROCEDURE, Manifest
from dpf_release.release.model_record import CUSTOM, ModelRecord, read_model_record
from dpf_release.release.verify import Problem, read_manifest, verify

Builder = Callable[[int], nn.Module]
Level = Literal["full", "sizes", "none"]


class Release:
    """A release folder whose files are those of its manifest.

    Attributes:
        folder: where it is.
        manifest: name, version, licence, counts, claims, digests.
        record: what rebuilds φ1 and φ2.
        index: the bank's index.
        preprocess: from images to φ1's input.

    Example:
        >>> from dpf_release import Release
        >>> release = Release.open("my-release/release")
        >>> features, target = release.bank("train")[0]
        >>> features.shape == release.record.feature_shape
        True
    """

    def __init__(self, folder: Path, manifest: Manifest, record: ModelRecord, index: BankIndex) -> None:
        self.folder, self.manifest, self.record, self.index = folder, manifest, record, index
        self.preprocess = Preprocess(**record.preprocess.model_dump())

    @classmethod
    def open(cls, folder: str | Path, verify: Level = "full") -> Release:
        """Checks a release, then opens it. What was checked on this machine, and is unchanged, is not checked again.

        Args:
            folder: the release.
            verify: "full": every file's size and SHA-256, then what the files are, in a child process with little
                memory and time; no rows are read, `dpf-release verify --deep` does that. "sizes": the same without the
                SHA-256, for which every byte is read. "none": nothing; for a folder that was checked already.

        Raises:
            VerificationError: files are missing, changed, unexpected, or not what a release holds, or records
                contradict each other; all of it.
            BankError: "none", and no index of a bank.
        """
        folder = Path(folder)
        problems = [] if verify == "none" else _problems(folder, verify)
        manifest = read_manifest(folder)
        if isinstance(manifest, Problem):
            problems = problems or [manifest]
        if problems or isinstance(manifest, Problem):
            raise VerificationError(
                f"{folder} is not the release that its manifest describes:\n"
                + "\n".join(f"  {problem}" for problem in problems)
                + "\nFetch it again from where you trust it.",
                [str(problem) for problem in problems],
            )
        record, index = read_model_record(folder / MODEL), read_index(folder / "features")
        found = contradictions(manifest, record, index)
        if found:
            raise VerificationError(f"{folder} contradicts itself: " + "; ".join(found) + ".", found)
        return cls(folder, manifest, record, index)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index; empty for regression."""
        return self.record.classes

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, by index, or of the regression targets."""
        return self.record.classes or self.record.targets

    @property
    def ends_in_relu(self) -> bool:
        """Whether φ1 does."""
        return self._split(None).before_relu is not None

    def bank(self, split: SplitName) -> BankDataset:
        """P(φ1(S)) of one split, as a torch data set."""
        return BankDataset.open(self.folder / "features", split, self.names)

    def featurizer(self, build: Builder | None = None, *, before_relu: bool = False) -> nn.Module:
        """φ1: (N, 3, H, W) preprocessed images → (N, C, H, W) features; frozen.

        An owner's own architecture needs `build`, which makes the network from its number of outputs. With
        `before_relu`, without the ReLU that φ1 ends in, where it ends in one: what `draw` takes.
        """
        parts = self._loaded("featurizer", build)
        without = parts.before_relu if before_relu else None
        return freeze(parts.featurizer if without is None else without)

    def classifier(self, build: Builder | None = None) -> nn.Module:
        """φ2: (N, C, H, W) features → (N, outputs); in evaluation mode, its weights free to be refined."""
        return self._loaded("classifier", build).classifier.eval()

    def draw(
        self, features: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], seed: int = 0
    ) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """Rows of your own, put through the procedure that this release's rows were drawn by, so that they combine.

        A classifier tells drawn rows from real ones: trained on drawn rows of some classes beside real rows of others
        it learns that difference. Files of images: `featurize --draw`, which also has a privacy bound for yours.

        Args:
            features: (n, C, H, W) of your images, by `featurizer(before_relu=True)`.
            labels: (n,) their classes, numbered as you like.
            seed: of the draws.

        Returns:
            About as many drawn rows (m, C, H, W), and their classes (m,).

        Raises:
            ConfigError: the rows of this release were not drawn, or have regression targets.
        """
        own = ComputedRows(np.asarray(labels, np.int64), lambda rows: features[rows])
        drawn = drawn_anew(self.procedure, self.record.feature_shape, own, Draw(seed))
        return drawn.read(np.arange(len(drawn))).astype(np.float16), drawn.targets

    @cached_property
    def procedure(self) -> Procedure:
        """What rows were drawn with; a `ConfigError` where they were not drawn."""
        if not (self.folder / PROCEDURE).exists():
            raise ConfigError(
                "the rows of this release were not drawn by `mixture`: there is no procedure to draw yours by, and "
                "rows that were not drawn combine as they are."
            )
        return Procedure.of_tensors(load_state(self.folder / PROCEDURE), self.record.feature_shape)

    def untrained_classifier(self, build: Builder | None = None, *, outputs: int | None = None) -> nn.Module:
        """φ2's architecture with fresh random weights: where a new classifier φ3 starts.

        `outputs` where it is to tell other classes apart than this release's, as those of several banks.
        """
        wanted, parts = outputs or self.record.outputs, self._split(build)
        if build is None:
            stored = sum((self.folder / path).stat().st_size for path in (FEATURIZER, CLASSIFIER))
            state = [*parts.featurizer.state_dict().values(), *parts.classifier.state_dict().values()]
            weights = sum(tensor.nbytes for tensor in state)
            if weights > stored:  # before it is built
                raise VerificationError(
                    f"{self.record.arch} as model/model.json describes it has weights of {readable_size(weights)}; the "
                    f"release holds {readable_size(stored)}. It was not built. Fetch it again from where you trust it."
                )
            parts = self._split(None, wanted)  # its record is in proportion; more outputs are the user's own wish
            with torch.random.fork_rng(devices=[]):
                fresh = build_network(self.record.arch, wanted, self.record.arguments).state_dict()
            parts.classifier.load_state_dict({name: fresh[name] for name in parts.classifier.state_dict()}, assign=True)
        elif outputs is not None:
            parts = self._split(build, outputs)
        return parts.classifier.train().requires_grad_(True)

    def _loaded(self, name: Literal["featurizer", "classifier"], build: Builder | None) -> Split:
        parts = self._split(build)
        part: nn.Module = getattr(parts, name)
        tensors = load_state(self.folder / "model" / f"{name}.safetensors")
        expected = {key: (value.shape, value.dtype) for key, value in part.state_dict().items()}
        if expected != {key: (value.shape, value.dtype) for key, value in tensors.items()}:
            raise VerificationError(f"model/{name}.safetensors does not hold the weights of {self.record.arch}.")
        part.load_state_dict(tensors, assign=build is None)
        return parts

    def _split(self, build: Builder | None, outputs: int | None = None) -> Split:
        """φ1 and φ2; of a known architecture on paper: whatever its record says takes no room and little work."""
        record, outputs = self.record, outputs or self.record.outputs
        if build is not None:
            with torch.random.fork_rng(devices=[]):
                network = build_network(record.arch, outputs, record.arguments, builder=build)
        elif is_public_architecture(record.arch):
            network = network_on_paper(record.arch, outputs, record.arguments)
        else:
            raise VerificationError(
                f"this release's network is its owner's own (architecture {record.arch!r}, expected a known one or "
                f"{CUSTOM!r}). Hand in what builds it: release.featurizer(build=my_function)."
            )
        parts = split(network, record.hook, record.preprocess.size)
        if parts.hook.shape != record.feature_shape:
            raise VerificationError(
                f"expected features {record.feature_shape} at {record.hook}, the network makes {parts.hook.shape}."
            )
        return parts


def _problems(folder: Path, level: Level) -> list[Problem]:
    """What is wrong with the files of a release; what is known of them from before is taken for granted."""
    with CheckedDigests.open(folder) as memory:
        problems = verify(folder, digest=memory.sha256 if level == "full" else None)
        manifest = read_manifest(folder)
        if problems or isinstance(manifest, Problem):
            return problems
        paths = [folder / MANIFEST, *(folder / file.path for file in manifest.files)]
        return memory.once(f"structure {STRUCTURE}", paths, lambda: check_structure(folder))
