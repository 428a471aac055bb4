"""`featurize`: φ1(S), on disk."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.build import changed_facts, refuse_other_plan, write_bank
from dpf_release.bank.format import ID_BYTES, INDEX, SPLITS, BankIndex, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import ComputedRows, RowSource
from dpf_release.bank.writer import SplitRows
from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder
from dpf_release.images.dataset import BadImage
from dpf_release.owner.banks import bank_facts, bank_writer, refuse_small_disk_for_bank, remove_bank
from dpf_release.owner.project import Project
from dpf_release.owner.train import import_network
from dpf_release.owner.vault.vault import BANK, ID_COLUMNS
from dpf_release.poisoning.chain import draws_rows
from dpf_release.release.featurize import featurized


@dataclass(frozen=True)
class FeaturizeResult:
    """φ1(S): its index, its folder in the vault, and the images of S that have no row."""

    index: BankIndex
    folder: Path
    unreadable: tuple[BadImage, ...]


def featurize(
    project: Project, *, device: str | None = None, shard_size: str | None = None, restart: bool = False
) -> FeaturizeResult:
    """Splits Φ and writes the private bank φ1(S), all three splits, rows in a secret random order.

    Where `[poison]` names a function that draws rows, φ1(Q) is written too.

    What the bank depends on is drawn and written before row 0; a run that was cut off goes on under that plan. Under
    `torchrun` the shards are divided among the ranks.

    Args:
        project: the owner's.
        device: where φ1 computes, as `"cuda:1"`; by default as the configuration says.
        shard_size: of the bank's files at the most, as `"500 MB"`; by default as the configuration says.
        restart: write it anew, under a new plan; the bank that is there is lost.

    Raises:
        VaultError: the folder holds a bank, or half of one, made under another plan, and `restart` is not set.
        StorageError: another run works in the vault, or the disk has not enough room.

    Example:
        >>> from dpf_release import Project, featurize
        >>> written = featurize(Project.open("my-release/dpf.toml"))
        >>> written.index.poisoned, [image.name for image in written.unreadable]
        (False, ['disc/disc-portrait-007.png'])
    """
    project.forget("cut", "bank_order")
    project = project.with_options({"compute.device": device, "bank.shard_size": shard_size})
    public = project.config.locate(project.config.images.public.path)
    draws = draws_rows(project.config.poison.function) and public.exists()  # else `fit-poison` asks for them
    with project.working(public=draws):
        written = FeaturizeResult(_featurize(project, restart), project.vault.features, project.private_images.bad)
        if draws:
            public_bank(project)
        return written


def _featurize(project: Project, restart: bool) -> BankIndex:
    project.ranks.once(lambda: import_network(project, restart))
    images, vault = project.private_images, project.vault
    facts = project.source_facts() | bank_facts(project)
    project.ranks.once(lambda: _draw_plan(project, facts, restart))
    known = project.bank_plan
    changed = changed_facts(known, facts) + ["ids.csv"] * (vault.sha256(vault.ids) != known["ids_sha256"])
    anew = "start anew with --restart (new ids; functions fitted on the old bank are void)"
    refuse_other_plan(str(vault.features), changed, anew)
    if project.bank_lost_rows and vault.holds(vault.features / INDEX):
        # Whole; its shards are not those that would be written now, after it was forgotten.
        return read_index(vault.opened(vault.features, INDEX))
    rows_of, ids_of = project.bank_order
    rows = {name: SplitRows(images.table.targets[rows_of[name]], ids_of[name]) for name in SPLITS}
    compute = featurized(_stored_featurizer(project), images.pictures, rows_of, project.device)
    with vault.changing(vault.features, *BANK) as folder:
        writer = bank_writer(project, folder, of_phi_1=True)
        return write_bank(writer, rows, compute, project.ranks, "Writing features", "images")


def _stored_featurizer(project: Project) -> nn.Module:
    """φ1, without the ReLU that it ends in: readers of a bank apply that."""
    parts = project.cut.split
    return project.frozen(parts.featurizer if parts.before_relu is None else parts.before_relu)


def public_features(project: Project) -> RowSource:
    """φ1(Q), computed as it is read, as rows of the `train` split of Q; targets where Q is labelled."""
    images = project.public_images
    rows, phi_1 = images.rows("train"), project.frozen(project.cut.split.featurizer)

    def features(numbers: Rows) -> NDArray[np.float32]:
        with torch.inference_mode():
            inputs = project.preprocess.normalise(images.pictures.read(rows[numbers]).to(project.device))
            out: NDArray[np.float32] = phi_1(inputs.contiguous(memory_format=torch.channels_last)).float().cpu().numpy()
        return out

    return ComputedRows(images.table.targets[rows], features)


def public_bank(project: Project) -> FeatureBank:
    """φ1(Q) of the `train` split of Q, with its labels, 0 where it has none; written where the vault has none of it."""
    vault, images, ranks = project.vault, project.public_images, project.ranks
    folder, chosen = vault.public_features, images.rows("train")
    facts = {
        "source_sha256": images.digest,
        "undecodable": [bad.name for bad in images.bad],
        "featurizer_sha256": project.cut.featurizer_sha256,
        **bank_facts(project),
    }

    def begin() -> None:
        plan = folder / "plan.json"
        if not vault.holds(plan) or changed_facts(vault.read_record(plan, "featurize"), facts):
            refuse_small_disk_for_bank(project, folder, [len(chosen)])
            remove_bank(vault, folder)
            make_folder(folder)
            vault.write_json(plan, facts)

    ranks.once(begin)
    if not vault.holds(folder / INDEX):
        ids = np.random.default_rng(0).integers(0, 256, (len(chosen), ID_BYTES), np.uint8)  # these rows are nobody's
        rows: dict[SplitName, SplitRows] = {"train": SplitRows(images.table.targets[chosen].astype(np.int64), ids)}
        compute = featurized(_stored_featurizer(project), images.pictures, {"train": chosen}, project.device)
        with vault.changing(folder, *BANK) as where:
            writer = bank_writer(project, where, of_phi_1=True)
            writer = replace(writer, header=writer.header.model_copy(update={"targets": 0}))
            write_bank(writer, rows, compute, ranks, "Writing public features", "images")
    return FeatureBank(vault.opened(folder, INDEX, "train"), "train")


def _draw_plan(project: Project, facts: dict[str, Any], restart: bool) -> None:
    """The secret order and the random ids, from the operating system's randomness, and what goes with them."""
    vault, images = project.vault, project.private_images
    if vault.holds(vault.plan) and not restart:
        return
    refuse_small_disk_for_bank(project, vault.features, [len(images.rows(name)) for name in SPLITS])
    remove_bank(vault, vault.features)
    make_folder(vault.features)
    generator = np.random.default_rng(secrets.randbits(256))
    lines = []
    for name in SPLITS:
        for row, source in enumerate(generator.permutation(images.rows(name))):
            attributes = {key: values[source] for key, values in images.table.attributes.items()}
            fixed = {"id": secrets.token_hex(ID_BYTES), "split": name, "row": row, "source": images.table.paths[source]}
            lines.append(attributes | fixed)
    vault.write_ids(lines, [key for key in images.table.attributes if key not in ID_COLUMNS])
    vault.write_json(vault.plan, {**facts, "ids_sha256": vault.sha256(vault.ids)})
