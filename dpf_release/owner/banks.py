"""What the private bank and a candidate's bank have in common: the facts of their plan, the writer, removal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpf_release.bank.build import machine_facts
from dpf_release.bank.drop_rows import BEFORE
from dpf_release.bank.format import INDEX, BankIndex
from dpf_release.bank.writer import BankWriter, Span
from dpf_release.core.files import PARTIAL, refuse_small_disk
from dpf_release.core.sizes import parse_size
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import Vault


def bank_facts(project: Project) -> dict[str, Any]:
    """How a bank is written, as its plan keeps it."""
    section = project.config.bank
    written = section.model_dump() | {"shard_size": parse_size(section.shard_size)}
    return written | machine_facts(project.device)


def bank_writer(project: Project, folder: Path, poisoned: bool) -> BankWriter:
    """Writes a bank of this project's features, sharded as `[bank]` says."""
    cut, section = project.cut, project.config.bank
    header = BankIndex(
        compression=section.compression,
        poisoned=poisoned,
        featurizer_sha256=cut.featurizer_sha256,
        feature_shape=cut.record.feature_shape,
        targets=cut.record.target_columns,
    )
    return BankWriter(folder, header, parse_size(section.shard_size), section.batch_size)


def refuse_small_disk_for_bank(project: Project, folder: Path, rows: Sequence[int]) -> None:
    """That a bank has room when the one that is there is gone: before it is given up."""
    there = sum(path.stat().st_size for path in folder.glob("*/*.h5*"))
    wanted = bank_writer(project, folder, poisoned=False).bytes_of([Span("train", 0, count) for count in rows])
    refuse_small_disk(project.vault.root, wanted - there)


def remove_bank(vault: Vault, folder: Path) -> None:
    """Removes a bank, or what there is of one."""
    shards = [path for path in vault.members(folder) if path.suffix == ".h5"]
    vault.remove(folder / "plan.json", folder / INDEX, folder / BEFORE, *shards)
    for half_written in folder.glob(f"*/shard-*{PARTIAL}"):
        half_written.unlink()
