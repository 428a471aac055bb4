"""Φ: new, into the vault and out of it; cut in two, as files and as they are published."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from dpf_release.core.files import make_folder
from dpf_release.errors import VaultError
from dpf_release.images.decode import Preprocess
from dpf_release.models.hooks import Split, split
from dpf_release.models.weights import load_state, state_file
from dpf_release.models.zoo import build_network, is_public_architecture
from dpf_release.owner.config import Config, NetworkSection
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.plan import FeatureSpec
from dpf_release.release.model_record import CUSTOM, ModelRecord, PreprocessRecord, read_model_record


def import_from(folder: Path) -> None:
    """Lets `package.module:function` of a `dpf.toml` be found beside it: never in a stranger's release.

    Last on the path: nothing there can take the place of a module of ours.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@dataclass(frozen=True, eq=False)
class CutNetwork:
    """Φ in two, φ1 and φ2, with its record for the hook point and feature shape of this cut."""

    record: ModelRecord
    split: Split

    @property
    def features(self) -> FeatureSpec:
        """What a row of φ1's is."""
        return FeatureSpec(self.record.feature_shape, self.split.non_negative)

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


def preprocess_of(section: NetworkSection) -> Preprocess:
    """From an image file to the input of Φ."""
    return Preprocess(section.size, section.resize or None, section.mean, section.std)


def new_network(section: NetworkSection, outputs: int, trusts_code: bool, seed: int = 0) -> nn.Module:
    """Φ with random weights, drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(section.arch, outputs, section.arguments, allow_import=trusts_code)


def save_network(network: nn.Module, output_names: tuple[str, ...], config: Config, vault: Vault) -> None:
    """Φ into the vault, with the record that rebuilds it; a `HookError` where it cannot be cut as configured."""
    section, task = config.network, config.task
    hook = split(network.cpu(), section.hook, section.size).hook
    record = ModelRecord(
        arch=section.arch,
        arguments=section.arguments,
        outputs=len(output_names),
        hook=hook.name,
        feature_shape=hook.shape,
        preprocess=PreprocessRecord(**asdict(preprocess_of(section))),
        task=task.kind,
        classes=() if task.targets else output_names,
        targets=task.targets,
        unit=task.unit,
    )
    make_folder(vault.network)
    vault.write_bytes(vault.network / "phi.safetensors", state_file(network.state_dict()))
    vault.write_json(vault.network / "network.json", record.model_dump(mode="json"))


def read_cut(vault: Vault, section: NetworkSection, trusts_code: bool) -> CutNetwork:
    """Φ from the vault, cut at the configured hook point; a `HookError` where it cannot be.

    Raises:
        VaultError: no network in the vault, or one of another architecture or preprocessing.
    """
    path, weights = vault.network / "network.json", vault.network / "phi.safetensors"
    if not vault.holds(path):
        raise VaultError(
            f"expected a network in {vault.network}, found none. Run `dpf-release train`, or name "
            "your weights under [network] weights and run `dpf-release featurize`."
        )
    record = read_model_record(path, vault.read_bytes(path, "train"))
    preprocess = PreprocessRecord(**asdict(preprocess_of(section))).model_dump(mode="json")
    wanted = {"arch": section.arch, "arguments": section.arguments, "preprocess": preprocess}
    found = record.model_dump(mode="json", include=set(wanted))
    if found != wanted:
        raise VaultError(
            f"the vault's network is {found}, but [network] asks for {wanted}. Set [network] back, or run "
            "`dpf-release train --restart` for a new network."
        )
    network = build_network(record.arch, record.outputs, record.arguments, allow_import=trusts_code)
    network.load_state_dict(load_state(weights, vault.read_bytes(weights, "train")))
    parts = split(network, section.hook, section.size)
    return CutNetwork(record.model_copy(update={"hook": parts.hook.name, "feature_shape": parts.hook.shape}), parts)
