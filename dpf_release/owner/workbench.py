"""What those who attack a candidate and score it need of a project; they know the project by this alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dpf_release.attacks.threat_models import Kept
from dpf_release.bank.format import INDEX, RELEASED_SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import Concat
from dpf_release.core.arrays import Rows
from dpf_release.core.files import sha256_of
from dpf_release.errors import NotGrantedError, VaultError
from dpf_release.images.decode import Preprocess
from dpf_release.images.survey import ImageSet
from dpf_release.owner.featurize import public_bank
from dpf_release.owner.fitted import FittedFunction, load_function
from dpf_release.owner.measure import classifier_file, classifier_of, measure_task
from dpf_release.owner.poison import changed_since_poison
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.plan import FeatureSpec
from dpf_release.release.model_record import ModelRecord


@dataclass(frozen=True, eq=False)
class PrivateRows:
    """φ1(S), its released splits numbered through, and S; `table_rows` are the rows' numbers in its table, (N,)."""

    rows: Concat
    bank_id: str
    table_rows: Rows
    images: ImageSet

    def pictures(self, rows: Rows) -> Tensor:
        """The pictures of rows by number, (n, 3, H, W) uint8."""
        return self.images.pictures.read(self.table_rows[rows])


@dataclass(frozen=True, eq=False)
class Workbench:
    """What is attacked with, and what is known only to those who score.

    Attributes:
        phi_1: the featurizer, frozen, on the device; `phi_2`: the classifier, likewise.
        before_relu: φ1 without the ReLU that it ends in, likewise; None: it ends in something else.
        record: of Φ, as cut there.
        classifier_from_bank: whether φ2 is trained on the candidate's rows.
        bf16: as in `training.Recipe`.
        public: Q.
        limits: of `[gate]`, by name.
        attribute: the column of `[claims] attribute`.
        group: the column of `[images.private] group`.
        new_classifier: seed → φ2's architecture with new random weights.
        private_bank: one split of φ1(S).
        public_bank: φ1(Q) of its `train` split.
        open_private: see `private`.
    """

    phi_1: nn.Module
    phi_2: nn.Module
    classifier_from_bank: bool
    before_relu: nn.Module | None
    record: ModelRecord
    features: FeatureSpec
    preprocess: Preprocess
    task: Literal["classification", "regression"]
    device: torch.device
    bf16: Literal["auto", "on", "off"]
    featurizer_sha256: str
    classifier_sha256: str
    public: ImageSet
    kept: Kept
    limits: Mapping[str, float]
    attribute: str | None
    group: str | None
    new_classifier: Callable[[int], nn.Module]
    private_bank: Callable[[SplitName], FeatureBank]
    public_bank: Callable[[], FeatureBank]
    open_private: Callable[[], PrivateRows]

    @cached_property
    def private(self) -> PrivateRows:
        """φ1(S) and S, looked at only when asked for: who shows what anyone may see, does not."""
        return self.open_private()


def workbench_of(project: Project, name: str = "default") -> Workbench:
    """What a project gives to those who attack and score a candidate; its vault is held by the caller."""

    def open_private() -> PrivateRows:
        order, _ = project.bank_order
        return PrivateRows(
            Concat([project.private_bank(split) for split in RELEASED_SPLITS]),
            project.bank_id,
            np.concatenate([order[split] for split in RELEASED_SPLITS]),
            project.private_images,
        )

    cut, config, phi_2 = project.cut, project.config, classifier_file(project, name)
    return Workbench(
        phi_1=project.frozen(cut.split.featurizer),
        phi_2=classifier_of(project, name),
        classifier_from_bank=config.network.classifier == "from-bank",
        before_relu=cut.split.before_relu and project.frozen(cut.split.before_relu),
        record=cut.record,
        features=cut.features,
        preprocess=project.preprocess,
        task=config.task.kind,
        device=project.device,
        bf16=config.compute.bf16,
        featurizer_sha256=cut.featurizer_sha256,
        classifier_sha256=hashlib.sha256(phi_2).hexdigest(),
        public=project.public_images,
        kept=kept_in(project.vault),
        limits=config.gate.limits,
        attribute=config.claims.attribute,
        group=config.images.private.group,
        new_classifier=project.new_classifier,
        private_bank=project.private_bank,
        public_bank=lambda: public_bank(project),
        open_private=open_private,
    )


def kept_in(vault: Vault) -> Kept:
    """Where attackers keep what they train: three functions and no vault, as an attack holds nothing of the owner's."""

    def path_of(name: str, subject: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps([name, subject], sort_keys=True).encode()).hexdigest()
        return vault.root / "attackers" / f"{name.split(' ', 1)[0]}-{digest[:32]}.safetensors"

    def path_to_write(name: str, subject: Mapping[str, Any]) -> Path:
        path = path_of(name, subject)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return path

    def load_kept(name: str, subject: Mapping[str, Any]) -> dict[str, Tensor] | None:
        path = path_of(name, subject)
        return load(vault.read_bytes(path, "attack")) if vault.holds(path) else None

    def save_kept(name: str, subject: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        path = path_to_write(name, subject)
        vault.write_bytes(path, save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}))
        vault.remove(path.with_suffix(".checkpoint"))

    def checkpoint(name: str, subject: Mapping[str, Any]) -> Path | None:
        return vault.checkpoint(path_to_write(name, subject).with_suffix(".checkpoint"))

    return Kept(load_kept, save_kept, checkpoint)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A candidate as it lies on disk, which is what its function makes of today's features.

    Attributes:
        name: of the function.
        banks: its released splits.
        index_sha256: of its `features/index.json`.
        second: the candidate that was published last of the same features under another function, and its
            `index_sha256`; raises `NotGrantedError` where there is none, or it is not in the vault as it was.
        measure_task: what φ2 makes of its `val`, as `measure.measure_task` has it.
    """

    name: str
    function: FittedFunction
    banks: Mapping[SplitName, FeatureBank]
    index_sha256: str
    second: Callable[[], tuple[Concat, str]]
    measure_task: Callable[[], Mapping[str, Any]]

    @cached_property
    def rows(self) -> Concat:
        """The released splits, numbered through."""
        return Concat(list(self.banks.values()))


def open_candidate(project: Project, name: str) -> Candidate:
    """The candidate of a fitted function; a `VaultError` where it is not what that makes of today's features."""
    function = load_function(project, name)
    banks, index = _read_candidate(project.vault, name)
    if problems := changed_since_poison(project, name, function, index):
        raise VaultError(
            f"the candidate {name!r} is not of today: {'; '.join(problems)}. Run `dpf-release poison --name {name}` "
            "again, then attack what it makes."
        )

    def second() -> tuple[Concat, str]:
        return _released_too(project.vault, project.bank_id, function.digest)

    return Candidate(name, function, banks, sha256_of(index), second, lambda: measure_task(project, name))


def _read_candidate(vault: Vault, name: str) -> tuple[dict[SplitName, FeatureBank], Path]:
    """Its released splits, and its `features/index.json` in the clear."""
    features = vault.opened(vault.candidate(name) / "features", INDEX, *RELEASED_SPLITS)
    return {split: FeatureBank(features, split) for split in RELEASED_SPLITS}, features / INDEX


def _released_too(vault: Vault, bank_id: str, digest: str) -> tuple[Concat, str]:
    """As of `Candidate.second`; for the function of that digest."""
    published = (entry for entry in releases(vault) if entry.get("published", True))
    others = [entry for entry in published if entry["function_digest"] != digest and entry["bank"] == bank_id]
    if not others:
        raise NotGrantedError("the ledger has no other release of these images under another function")
    name, index_sha256 = others[-1]["function"], others[-1]["index_sha256"]
    if vault.holds(vault.candidate(name) / "features" / INDEX):
        banks, index = _read_candidate(vault, name)
        if sha256_of(index) == index_sha256:
            return Concat(list(banks.values())), index_sha256
    raise NotGrantedError(f"the vault no longer has the candidate {name!r} as it was published")
