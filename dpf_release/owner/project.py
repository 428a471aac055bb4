"""An owner's project: the configuration, the vault beside it, and what both describe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpf_release.bank.format import SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.progress import announce
from dpf_release.core.ranks import Ranks
from dpf_release.errors import RankError, VaultError
from dpf_release.images.decode import Preprocess
from dpf_release.images.survey import ImageSet
from dpf_release.images.table import ImageTable
from dpf_release.models.hooks import split
from dpf_release.models.training import pick_device
from dpf_release.models.weights import freeze
from dpf_release.owner.config import CONFIG_NAME, Config, read_config
from dpf_release.owner.cut_network import CutNetwork, import_from, new_network, preprocess_of, read_cut
from dpf_release.owner.private_bank import BankOrder, bank_id, bank_order, open_split, source_facts
from dpf_release.owner.private_images import public_table, surveyed, table_without
from dpf_release.owner.vault.retractions import Retracted, read_retracted
from dpf_release.owner.vault.vault import Vault


@dataclass(frozen=True, eq=False)
class Project:
    """What the owner's steps work on: configuration, vault and ranks, and what it remembers of what these describe.

    Under `torchrun` all ranks run the same lines, and the first alone writes what there is one of.

    Attributes:
        config: `dpf.toml`, with options laid over it.
        vault: beside it.
        ranks: the processes that work together.
        trusts_code: whether networks and functions of the owner's own are imported and run.

    Example:
        >>> from dpf_release import Project
        >>> project = Project.open("my-release/dpf.toml")
        >>> project.config.release.name
        'shapes'
        >>> sorted(project.vault.root.glob("candidates/*/features/index.json"))[0].parts[-3]
        'default'
    """

    config: Config
    vault: Vault
    ranks: Ranks = Ranks()
    trusts_code: bool = True

    @classmethod
    def open(
        cls,
        config: Path | str = CONFIG_NAME,
        overrides: Mapping[str, Any] | None = None,
        identity: Path | None = None,
        *,
        fix_permissions: bool = False,
    ) -> Project:
        """The project of a `dpf.toml`.

        Args:
            config: the file.
            overrides: options laid over it (dotted keys, as `"poison.epochs"`).
            identity: the file of the secret key that opens the vault, where it is encrypted.
            fix_permissions: take away the rights of others to the vault, in the place of a refusal.

        Raises:
            ConfigError: the configuration does not fit.
            VaultError: no vault beside it, or one that is not its owner's alone.

        Example:
            >>> from dpf_release import Project
            >>> Project.open("my-release/dpf.toml", {"poison.epochs": 3}).config.poison.epochs
            3
        """
        read = read_config(Path(config), overrides)
        import_from(read.folder)
        vault = Vault.open(read.folder / "vault", identity, fix_permissions=fix_permissions)
        return cls(read, vault, Ranks.of_torchrun())

    def with_options(self, options: Mapping[str, Any]) -> Project:
        """The project with options laid over its configuration: dotted keys, as `"poison.epochs"`; None: as it is.

        Raises:
            ConfigError: options that do not fit, all of them.
        """
        if all(value is None for value in options.values()):
            return self
        return replace(self, config=self.config.with_options(options))

    @contextlib.contextmanager
    def working(self, *, public: bool = False, together: bool = True, retracting: bool = False) -> Iterator[None]:
        """Holds the vault for one step, its images surveyed.

        Args:
            public: whether the step needs Q.
            together: whether several ranks can share the step.
            retracting: whether the step takes images out of S: no survey, and one that was cut off is gone on with.

        Raises:
            VaultError: a retraction was cut off.
            StorageError: another run works in the vault.
            VaultError: it is encrypted, and there are several ranks or no identity.
            RankError: there are several ranks, and the step is one process's work.
        """
        if self.ranks.world_size > 1 and not together:
            raise RankError("expected one process for this step, found several. Run it without torchrun.")
        self.vault.storage.refuse_several_processes(self.ranks.world_size)
        with self.ranks.holding(self.vault.root), self.vault.run():
            self.ranks.once(self.vault.begin_run)
            if not retracting:
                self._refuse_unfinished_retraction()
                # Here, where all ranks come by: a survey is shared, and must not begin on one of them alone.
                _ = self.private_images, self.public_images if public else None
            yield

    def _refuse_unfinished_retraction(self) -> None:
        if read_retracted(self.vault).unfinished is not None:
            raise VaultError(
                "a retraction was cut off, and some of its rows are still in the vault. Run `dpf-release retract` to "
                "finish it."
            )

    def forget(self, *names: str) -> None:
        """Lets the named properties be read from the vault again: a step calls it for what it is about to replace."""
        for name in names:
            self.__dict__.pop(name, None)

    @cached_property
    def device(self) -> torch.device:
        """Where networks run; of several GPUs each rank has its own."""
        return pick_device(self.config.compute.device)

    @cached_property
    def preprocess(self) -> Preprocess:
        """From an image file to the input of Φ."""
        return preprocess_of(self.config.model)

    @cached_property
    def retracted(self) -> Retracted:
        """What was retracted from S."""
        return read_retracted(self.vault)

    @cached_property
    def private_table(self) -> ImageTable:
        """The files of S, without what was retracted; none of them is decoded, and nothing is written."""
        table, left_out = table_without(self.config, self.vault, self.retracted)
        if left_out and self.ranks.is_first:
            announce(f"left out, retracted: {left_out} images that are still among the private images")
        return table

    @cached_property
    def private_images(self) -> ImageSet:
        """S, without what was retracted."""
        return surveyed("private", self.private_table, self.preprocess, self.config, self.vault, self.ranks)

    @cached_property
    def public_images(self) -> ImageSet:
        """Q."""
        return surveyed("public", public_table(self.config), self.preprocess, self.config, self.vault, self.ranks)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Classes, or regression targets, in the order of Φ's outputs."""
        return self.config.task.targets or self.private_table.classes

    @cached_property
    def cut(self) -> CutNetwork:
        """Φ from the vault, cut and frozen; see `read_cut`."""
        return read_cut(self.vault, self.config.model, self.trusts_code)

    def new_classifier(self, seed: int = 0) -> nn.Module:
        """φ2's architecture with new random weights: where a φ3 starts."""
        model = self.config.model
        network = new_network(model, len(self.output_names), self.trusts_code, seed)
        return split(network, model.hook, model.size).classifier.train()

    def frozen(self, network: nn.Module) -> nn.Module:
        """The network where it computes, in evaluation mode, without gradients for its weights."""
        return freeze(network).to(self.device).to(memory_format=torch.channels_last)

    @property
    def bank_id(self) -> str:
        """What φ1(S) in the vault is; see `private_bank.bank_id`."""
        return bank_id(self.vault)

    @cached_property
    def bank_order(self) -> BankOrder:
        """Which image and which id each bank row has; see `private_bank.bank_order`."""
        return bank_order(self.vault, self.private_table)

    def private_bank(self, split_name: SplitName) -> FeatureBank:
        """One split of φ1(S); see `open_split`."""
        facts = source_facts(self.private_images, self.cut, self.output_names)
        return open_split(self.vault, self.retracted, facts, split_name)
