"""An owner's project: the configuration, the vault beside it, and what both describe."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.build import changed_facts
from dpf_release.bank.format import ID_BYTES, INDEX, SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.core.progress import announce
from dpf_release.core.ranks import Ranks
from dpf_release.errors import RankError, VaultError
from dpf_release.images.decode import Preprocess
from dpf_release.images.read import read_public
from dpf_release.images.survey import ImageSet
from dpf_release.images.table import ImageTable
from dpf_release.models.hooks import split
from dpf_release.models.training import pick_device
from dpf_release.models.weights import freeze
from dpf_release.owner.config import CONFIG_NAME, Config, read_config
from dpf_release.owner.cut_network import CutNetwork, import_from, new_network, preprocess_of, read_cut
from dpf_release.owner.private_images import surveyed, table_without
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
        """The project with options laid over its configuration: dotted keys, as `"poison.epochs"`; None: as it is."""
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
            VaultError: a retraction was cut off; or it is encrypted, and there are several ranks or no identity.
            StorageError: another run works in the vault.
            RankError: there are several ranks, and the step is one process's work.
        """
        if self.ranks.world_size > 1 and not together:
            raise RankError("expected one process for this step, found several. Run it without torchrun.")
        if self.ranks.world_size > 1 and self.vault.is_sealed:  # what one opens, another would not know of
            raise VaultError(
                "expected one process for a sealed vault, found several. Run it without torchrun, or open the vault "
                "for good with `dpf-release vault open`."
            )
        with self.ranks.holding(self.vault.root), self.vault.run():
            self.ranks.once(self.vault.begin_run)
            if not retracting:
                if read_retracted(self.vault).unfinished is not None:
                    raise VaultError(
                        "a retraction was cut off, and some of its rows are still in the vault. Run `dpf-release "
                        "retract` to finish it."
                    )
                # Here, where all ranks come by: a survey is shared, and must not begin on one of them alone.
                _ = self.private_images, self.public_images if public else None
            yield

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
        return preprocess_of(self.config.network)

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
        section = self.config.images.public
        table = read_public(self.config.locate(section.path), classes=section.classes)
        return surveyed("public", table, self.preprocess, self.config, self.vault, self.ranks)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Classes, or regression targets, in the order of Φ's outputs."""
        return self.config.task.targets or self.private_table.classes

    @cached_property
    def cut(self) -> CutNetwork:
        """Φ from the vault, cut and frozen; see `read_cut`."""
        return read_cut(self.vault, self.config.network, self.trusts_code)

    @property
    def network_names(self) -> tuple[str, ...]:
        """What Φ is trained to answer: the outputs of φ2, or the classes of Q."""
        return self.public_images.table.classes if self.config.network.train_on == "public" else self.output_names

    @property
    def networks_saw_images(self) -> bool:
        """Whether φ1 or φ2 was trained on S: then no privacy bound holds for what is published."""
        history, model = self.vault.network / "history.json", self.config.network
        trained = self.vault.read_record(history, "train") if self.vault.holds(history) else None
        started_clean = model.weights is None or model.never_saw_private
        clean = model.never_saw_private if trained is None else trained["trained_on"] == "public" and started_clean
        return not (clean and model.classifier == "from-bank")

    def new_classifier(self, seed: int = 0) -> nn.Module:
        """φ2's architecture with new random weights: where a φ3 starts."""
        model = self.config.network
        network = new_network(model, len(self.output_names), self.trusts_code, seed)
        return split(network, model.hook, model.size).classifier.train()

    def frozen(self, network: nn.Module) -> nn.Module:
        """The network where it computes, in evaluation mode, without gradients for its weights."""
        return freeze(network).to(self.device).to(memory_format=torch.channels_last)

    # ------------------------------------------------------------------------------------------ φ1(S)

    @property
    def bank_id(self) -> str:
        """What φ1(S) in the vault is: a digest of the plan that it was written under; or a `VaultError`."""
        vault = self.vault
        if not vault.holds(vault.plan):
            raise VaultError(f"expected features in {vault.features}, found none. Run `dpf-release featurize` first.")
        return vault.sha256(vault.plan)

    @property
    def bank_lost_rows(self) -> bool:
        """Whether φ1(S) has lost rows since it was written: its shards are not those that would be written now."""
        return self.retracted.bank == self.bank_id

    @property
    def bank_plan(self) -> dict[str, Any]:
        """The plan of φ1(S), with what retractions have changed since."""
        plan: dict[str, Any] = self.vault.read_record(self.vault.plan, "featurize")
        return plan | (self.retracted.facts if self.bank_lost_rows else {})

    @cached_property
    def bank_order(self) -> tuple[dict[SplitName, Rows], dict[SplitName, NDArray[np.uint8]]]:
        """For each split, the image table's row and the id (16 bytes) of each bank row, in bank order.

        A `VaultError`, where there is no id map, or an image of it is no longer there.
        """
        row_of = {source: row for row, source in enumerate(self.private_table.paths)}
        rows = {name: array("q") for name in SPLITS}
        ids = {name: bytearray() for name in SPLITS}
        for line in self.vault.read_ids():
            if line["source"] not in row_of:
                raise VaultError(f"{line['source']} is in {self.vault.ids} but no longer among the private images.")
            split_name: SplitName = line["split"]  # type: ignore[assignment]
            rows[split_name].append(row_of[line["source"]])
            ids[split_name] += bytes.fromhex(line["id"])
        return (
            {name: np.frombuffer(members, np.int64) for name, members in rows.items()},
            {name: np.frombuffer(members, np.uint8).reshape(-1, ID_BYTES) for name, members in ids.items()},
        )

    def source_facts(self) -> dict[str, Any]:
        """What a bank of S is made from today; a `VaultError` where Φ's outputs are not what S is labelled with."""
        images, cut = self.private_images, self.cut
        answers = cut.record.classes or cut.record.targets
        if answers != self.output_names:
            raise VaultError(
                f"the vault's network answers {list(answers)}, in this order; the images and [task] say "
                f"{list(self.output_names)}. Set [images.private] classes or [task] targets to those, or train anew."
            )
        return {
            "source_sha256": images.digest,
            "undecodable": [{"name": bad.name, "reason": bad.reason} for bad in images.bad],
            "names": list(self.output_names),
            "featurizer_sha256": cut.featurizer_sha256,
        }

    def private_bank(self, split_name: SplitName) -> FeatureBank:
        """One split of φ1(S); a `VaultError` where it was made of other images, labels, names or networks."""
        vault, facts, known = self.vault, self.source_facts(), self.bank_plan
        changed = changed_facts(known, facts) + ["ids.csv"] * (vault.sha256(vault.ids) != known["ids_sha256"])
        if changed:
            raise VaultError(
                f"the features in {vault.features} were made from something else; changed since: "
                f"{', '.join(changed)}. Put that back, or run `dpf-release featurize --restart`."
            )
        return FeatureBank(vault.opened(vault.features, INDEX, split_name), split_name)
