"""φ1(S) in the vault: which one it is, what it was made from, in which order its rows lie, and one split of it."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.build import changed_facts
from dpf_release.bank.format import ID_BYTES, INDEX, SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.errors import VaultError
from dpf_release.images.survey import ImageSet
from dpf_release.images.table import ImageTable
from dpf_release.owner.cut_network import CutNetwork
from dpf_release.owner.vault.retractions import Retracted
from dpf_release.owner.vault.vault import Vault

BankOrder = tuple[dict[SplitName, Rows], dict[SplitName, NDArray[np.uint8]]]


def bank_id(vault: Vault) -> str:
    """What φ1(S) in the vault is: a digest of the plan that it was written under.

    Raises:
        VaultError: there is no plan, thus no bank.
    """
    if not vault.holds(vault.plan):
        raise VaultError(f"expected features in {vault.features}, found none. Run `dpf-release featurize` first.")
    return vault.sha256(vault.plan)


def bank_plan(vault: Vault, retracted: Retracted) -> dict[str, Any]:
    """The plan of φ1(S), with what retractions have changed since.

    Raises:
        VaultError: there is no plan, thus no bank.
    """
    plan: dict[str, Any] = vault.read_record(vault.plan, "featurize")
    return plan | (retracted.facts if rows_were_retracted(vault, retracted) else {})


def rows_were_retracted(vault: Vault, retracted: Retracted) -> bool:
    """Whether φ1(S) has lost rows since it was written: its shards are not those that would be written now."""
    return retracted.bank == bank_id(vault)


def bank_order(vault: Vault, table: ImageTable) -> BankOrder:
    """For each split, the image table's row and the id (16 bytes) of each bank row, in bank order.

    Raises:
        VaultError: no id map, or an image of it is no longer there.
    """
    row_of = {source: row for row, source in enumerate(table.paths)}
    rows = {name: array("q") for name in SPLITS}
    ids = {name: bytearray() for name in SPLITS}
    for line in vault.read_ids():
        if line["source"] not in row_of:
            raise VaultError(f"{line['source']} is in {vault.ids} but no longer among the private images.")
        split_name: SplitName = line["split"]  # type: ignore[assignment]
        rows[split_name].append(row_of[line["source"]])
        ids[split_name] += bytes.fromhex(line["id"])
    return (
        {name: np.frombuffer(members, np.int64) for name, members in rows.items()},
        {name: np.frombuffer(members, np.uint8).reshape(-1, ID_BYTES) for name, members in ids.items()},
    )


def source_facts(images: ImageSet, cut: CutNetwork, output_names: tuple[str, ...]) -> dict[str, Any]:
    """What a bank of S is made from: images, labels and their names, and φ1.

    Raises:
        VaultError: Φ's outputs are not what the images are labelled with.
    """
    answers = cut.record.classes or cut.record.targets
    if answers != output_names:
        raise VaultError(
            f"the vault's network answers {list(answers)}, in this order; the images and [task] say "
            f"{list(output_names)}. Set [images.private] classes or [task] targets to those, or train anew."
        )
    return {
        "source_sha256": images.digest,
        "undecodable": [{"name": bad.name, "reason": bad.reason} for bad in images.bad],
        "names": list(output_names),
        "featurizer_sha256": cut.featurizer_sha256,
    }


def open_split(vault: Vault, retracted: Retracted, facts: dict[str, Any], split_name: SplitName) -> FeatureBank:
    """One split of φ1(S), where it was made from what `source_facts` says today.

    Raises:
        VaultError: it was made from other images, labels, names or networks.
    """
    known = bank_plan(vault, retracted)
    changed = changed_facts(known, facts)
    if vault.sha256(vault.ids) != known["ids_sha256"]:
        changed.append("ids.csv")
    if changed:
        raise VaultError(
            f"the features in {vault.features} were made from something else; changed since: "
            f"{', '.join(changed)}. Put that back, or run `dpf-release featurize --restart`."
        )
    return FeatureBank(vault.opened(vault.features, INDEX, split_name), split_name)
