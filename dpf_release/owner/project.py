"""An owner's project: the configuration, the vault beside it, and what both describe."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.build import changed_facts
from dpf_release.bank.format import ID_BYTES, INDEX, SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder
from dpf_release.core.progress import announce
from dpf_release.core.ranks import Ranks
from dpf_release.errors import RankError, VaultError
from dpf_release.images.dataset import BadImage, Pictures
from dpf_release.images.decode import Preprocess
from dpf_release.images.read import Earlier, read_table, read_unlabelled
from dpf_release.images.survey import ImageSet, refuse_bad, survey_together
from dpf_release.images.table import ImageTable
from dpf_release.models.hooks import split
from dpf_release.models.training import pick_device
from dpf_release.models.weights import freeze, parse_state, state_file
from dpf_release.models.zoo import build_network
from dpf_release.owner.config import CONFIG_NAME, Config, read_config
from dpf_release.owner.cut_network import CutNetwork, import_from
from dpf_release.owner.vault.retractions import Retracted, digest_of_name, read_retracted
from dpf_release.owner.vault.vault import Vault
from dpf_release.release.model_record import ModelRecord, PreprocessRecord, parse_model_record


@dataclass(frozen=True, eq=False)
class Project:
    """What the owner's commands work on; one instance serves one run.

    Under `torchrun` all ranks run the same lines, and the first alone writes what there is one of.
    """

    config: Config
    vault: Vault
    ranks: Ranks = Ranks()
    trusts_code: bool = True  # whether networks and functions of the owner's own are imported and run

    @classmethod
    def open(
        cls,
        config: Path = Path(CONFIG_NAME),
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
        """
        read = read_config(config, overrides)
        import_from(read.folder)
        vault = Vault.open(read.folder / "vault", identity, fix_permissions=fix_permissions)
        return cls(read, vault, Ranks.of_torchrun())

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

    def nested_with(self, release: Path) -> list[str]:
        """Why a folder, resolved, is no place for a release: vault, S or Q lie in it, or it lies in the vault."""
        images, vault = self.config.images, self.vault.root.resolve()
        found = ["it lies inside the vault: who copies one copies the other"] if release.is_relative_to(vault) else []
        private = {
            "the vault": vault,
            "the private images": self.config.locate(images.private.path),
            "the public images": self.config.locate(images.public.path),
        }
        for what, path in private.items():
            if path.is_relative_to(release):
                found.append(f"{what} lie inside the release folder: who uploads it uploads them")
        return found

    def forget(self, *names: str) -> None:
        """Lets the named properties be read from the vault again: a step calls it for what it has just replaced."""
        for name in names:
            self.__dict__.pop(name, None)

    @cached_property
    def device(self) -> torch.device:
        """Where networks run; of several GPUs each rank has its own."""
        return pick_device(self.config.compute.device)

    @cached_property
    def preprocess(self) -> Preprocess:
        """From an image file to the input of Φ."""
        model = self.config.model
        return Preprocess(model.size, model.resize or None, model.mean, model.std)

    @cached_property
    def private_images(self) -> ImageSet:
        """S, without what was retracted."""
        return self._surveyed("private", self.private_table, self.config.images.private.max_bad)

    @cached_property
    def private_table(self) -> ImageTable:
        """The files of S, without what was retracted; none of them is decoded, and nothing is written."""
        table, left_out = self.table_without(self.retracted)
        if left_out and self.ranks.is_first:
            announce(f"left out, retracted: {left_out} images that are still among the private images")
        return table

    def table_without(self, retracted: Retracted) -> tuple[ImageTable, int]:
        """The files of S without those that were retracted, and how many of these are still there.

        Where splits are made, each image keeps the one that the bank has it in: made anew, they would mix what Φ was
        trained on with what judges it.
        """
        task, section = self.config.task, self.config.images.private
        splits = {}
        if retracted.retractions and retracted.splitting == self.splitting and self.vault.holds(self.vault.ids):
            splits = {line["source"]: line["split"] for line in self.vault.read_ids()}
        table = read_table(
            self.config.locate(section.path),
            task=task.kind,
            target_columns=task.targets,
            group_column=section.group,
            classes=section.classes,
            val_fraction=section.val_fraction,
            test_fraction=section.test_fraction,
            seed=section.seed,
            earlier=Earlier(retracted.classes, splits),
        )
        gone = set(retracted.sources)
        kept = [row for row, path in enumerate(table.paths) if not gone or digest_of_name(path) not in gone]
        return (table.select(kept) if gone else table), len(table) - len(kept)

    @property
    def splitting(self) -> dict[str, Any]:
        """By what missing splits of S are made."""
        names = {"group", "val_fraction", "test_fraction", "seed"}
        return self.config.images.private.model_dump(mode="json", include=names)

    @cached_property
    def retracted(self) -> Retracted:
        """What was retracted from S."""
        return read_retracted(self.vault)

    @cached_property
    def public_images(self) -> ImageSet:
        """Q."""
        section = self.config.images.public
        table = read_unlabelled(self.config.locate(section.path), classes=section.classes)
        return self._surveyed("public", table, section.max_bad)

    def _surveyed(self, name: Literal["private", "public"], table: ImageTable, max_bad: float) -> ImageSet:
        """The set with its unreadable images found; the finding is kept in the vault while the files stay the same."""
        pictures = Pictures(table, self.preprocess, self.config.compute.workers)
        path, digest = self.vault.survey(name), table.digest()
        known = self.vault.read_record(path, "featurize") if self.vault.holds(path) else {}
        # The first rank's word: another may come when it has written its finding already.
        if self.ranks.from_first(np.array([known.get("digest") == digest]))[0]:
            known = self.vault.read_record(path, "featurize")
            row_of = {source: row for row, source in enumerate(table.paths)}
            bad = [BadImage(row_of[entry["name"]], entry["name"], entry["reason"]) for entry in known["bad"]]
        else:
            bad = survey_together(pictures, self.ranks, f"Reading the {name} images")
            found = {"digest": digest, "bad": [{"name": b.name, "reason": b.reason} for b in bad]}
            self.ranks.once(lambda: self.vault.write_json(path, found))
        refuse_bad(bad, len(table), max_bad)
        return ImageSet(table, pictures, tuple(bad), digest)

    @cached_property
    def bank_order(self) -> tuple[dict[SplitName, Rows], dict[SplitName, NDArray[np.uint8]]]:
        """For each split, the image table's row and the id (16 bytes) of each bank row, in bank order.

        Raises:
            VaultError: no id map, or an image of it is no longer there.
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

    # ------------------------------------------------------------------------------------------ the network

    def new_network(self, seed: int = 0) -> nn.Module:
        """Φ with random weights, drawn from a fixed seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_network(
                self.config.model.arch,
                len(self.output_names),
                self.config.model.arguments,
                allow_import=self.trusts_code,
            )

    def new_classifier(self, seed: int = 0) -> nn.Module:
        """φ2's architecture with new random weights: where a φ3 starts."""
        parts = split(self.new_network(seed), self.config.model.hook, self.config.model.size)
        return parts.classifier.train()

    @property
    def output_names(self) -> tuple[str, ...]:
        """Classes, or regression targets, in the order of Φ's outputs."""
        return self.config.task.targets or self.private_table.classes

    def save_network(self, network: nn.Module) -> ModelRecord:
        """Φ into the vault, with the record that rebuilds it.

        Raises:
            HookError: it cannot be cut at the configured hook point.
        """
        model, task = self.config.model, self.config.task
        hook = split(network.cpu(), model.hook, model.size).hook
        record = ModelRecord.model_validate(
            {
                "arch": model.arch,
                "arguments": model.arguments,
                "outputs": len(self.output_names),
                "hook": hook.name,
                "feature_shape": hook.shape,
                "preprocess": asdict(self.preprocess),
                "task": task.kind,
                "classes": () if task.targets else self.output_names,
                "targets": task.targets,
                "unit": task.unit,
            }
        )
        make_folder(self.vault.network)
        self.vault.write_bytes(self.vault.network / "phi.safetensors", state_file(network.state_dict()))
        self.vault.write_json(self.vault.network / "network.json", record.model_dump(mode="json"))
        self.forget("cut", "source_facts")
        return record

    @cached_property
    def cut(self) -> CutNetwork:
        """Φ from the vault, cut at the configured hook point and frozen.

        Raises:
            VaultError: no network in the vault, or one of another architecture or preprocessing.
            HookError: it cannot be cut there.
        """
        path, weights = self.vault.network / "network.json", self.vault.network / "phi.safetensors"
        if not self.vault.holds(path):
            raise VaultError(
                f"expected a network in {self.vault.network}, found none. Run `dpf-release train`, or name "
                "your weights under [model] weights and run `dpf-release featurize`."
            )
        record, model = parse_model_record(self.vault.read_bytes(path, "train"), path.name), self.config.model
        wanted = {"arch": model.arch, "arguments": model.arguments, "preprocess": _preprocess_record(self.preprocess)}
        found = record.model_dump(mode="json", include=set(wanted))
        if found != wanted:
            raise VaultError(
                f"the vault's network is {found}, but [model] asks for {wanted}. Set [model] back, or run "
                "`dpf-release train --restart` for a new network."
            )
        network = build_network(record.arch, record.outputs, record.arguments, allow_import=self.trusts_code)
        network.load_state_dict(parse_state(self.vault.read_bytes(weights, "train"), weights))
        parts = split(network, model.hook, model.size)
        return CutNetwork(
            record.model_copy(update={"hook": parts.hook.name, "feature_shape": parts.hook.shape}),
            parts,
        )

    @property
    def bank_id(self) -> str:
        """What φ1(S) in the vault is: a digest of the plan that it was written under.

        Raises:
            VaultError: there is no plan, thus no bank.
        """
        if not self.vault.holds(self.vault.plan):
            raise VaultError(
                f"expected features in {self.vault.features}, found none. Run `dpf-release featurize` first."
            )
        return self.vault.sha256(self.vault.plan)

    @property
    def bank_plan(self) -> dict[str, Any]:
        """The plan of φ1(S), with what retractions have changed since.

        Raises:
            VaultError: there is no plan, thus no bank.
        """
        plan: dict[str, Any] = self.vault.read_record(self.vault.plan, "featurize")
        return plan | (self.retracted.facts if self.rows_were_retracted else {})

    @property
    def rows_were_retracted(self) -> bool:
        """Whether φ1(S) has lost rows since it was written: its shards are not those that would be written now."""
        return self.retracted.bank == self.bank_id

    def private_bank(self, split_name: SplitName) -> FeatureBank:
        """One split of φ1(S).

        Raises:
            VaultError: it was made from other images, labels, names or networks than those of today.
        """
        known = self.bank_plan
        changed = changed_facts(known, self.source_facts)
        if self.vault.sha256(self.vault.ids) != known["ids_sha256"]:
            changed.append("ids.csv")
        if changed:
            raise VaultError(
                f"the features in {self.vault.features} were made from something else; changed since: "
                f"{', '.join(changed)}. Put that back, or run `dpf-release featurize --restart`."
            )
        return FeatureBank(self.vault.opened(self.vault.features, INDEX, split_name), split_name)

    @cached_property
    def source_facts(self) -> dict[str, Any]:
        """What a bank of S is made from: images, labels and their names, and φ1.

        Raises:
            VaultError: Φ's outputs are not what the images are labelled with.
        """
        images, answers = self.private_images, self.cut.record.classes or self.cut.record.targets
        if answers != self.output_names:
            raise VaultError(
                f"the vault's network answers {list(answers)}, in this order; the images and [task] say "
                f"{list(self.output_names)}. Set [images.private] classes or [task] targets to those, or train anew."
            )
        return {
            "source_sha256": images.digest,
            "undecodable": [{"name": bad.name, "reason": bad.reason} for bad in images.bad],
            "names": list(self.output_names),
            "featurizer_sha256": self.cut.featurizer_sha256,
        }

    def frozen(self, network: nn.Module) -> nn.Module:
        """The network where it computes, in evaluation mode, without gradients for its weights."""
        return freeze(network).to(self.device).to(memory_format=torch.channels_last)


def _preprocess_record(preprocess: Preprocess) -> dict[str, Any]:
    return PreprocessRecord(**asdict(preprocess)).model_dump(mode="json")


def drop_from_survey(project: Project, table: ImageTable) -> None:
    """Keeps what is known of the images that stay, of which S will be: they need not be looked at again."""
    vault, path = project.vault, project.vault.survey("private")
    known = vault.read_record(path, "featurize") if vault.holds(path) else {}
    if known.get("digest") == project.bank_plan["source_sha256"]:
        there = set(table.paths)
        bad = [entry for entry in known["bad"] if entry["name"] in there]
        vault.write_json(path, {"digest": table.digest(), "bad": bad})
