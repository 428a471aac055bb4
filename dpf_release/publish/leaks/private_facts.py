"""What a release must not tell: every check that needs the vault to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import RELEASED_SPLITS, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.errors import VaultError
from dpf_release.owner.fitted import FittedFunction, load_function
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import BANK
from dpf_release.publish.leaks.drawn import source_order, telling_ids
from dpf_release.publish.leaks.findings import Sources, public_banks, shard_of
from dpf_release.publish.leaks.near_rows import SAME_ROW_COSINE, find_near_rows
from dpf_release.publish.leaks.tensors import private_tensors
from dpf_release.publish.leaks.text import private_words
from dpf_release.release.verify import Problem


def private_facts(release: Path, project: Project, name: str | None = None) -> list[Problem]:
    """All private facts that a release tells (docs/package.md: what is looked for, and what cannot be seen).

    Args:
        release: a folder whose files have the structure of their roles; its digests need not be right.
        project: whose vault it was made from.
        name: the fitted function that made it, for the rows that contributed to each public one; `None` where it is
            no longer in the vault.

    Raises:
        BankError: a bank, public or private, is not whole.
        VaultError: the vault lacks what the release is compared with.
        VerificationError: the release has no manifest, or a text is longer than any of a release.
        WeightsError: a safetensors file is damaged.
    """
    sources, public = Sources.of(project.vault, project.private_table), public_banks(release)
    function = None if name is None else load_function(project, name)
    return [
        *private_words(release, project, sources),
        *private_tensors(release, project.vault, public),
        *telling_ids(public, sources, drawn_ids(function)),
        *source_order(public, sources),
        *private_rows(public, project, function),
    ]


def drawn_ids(function: FittedFunction | None) -> dict[SplitName, NDArray[np.uint8]] | None:
    """The ids, (n, 16), that a function drew for its rows; None: its rows are those of images, or it is not known."""
    if function is None or not function.chain.draws_rows:
        return None
    return {split: function.plans[split][0].arrays["ids"] for split in RELEASED_SPLITS}


def private_rows(
    public: Sequence[FeatureBank], project: Project, function: FittedFunction | None = None
) -> list[Problem]:
    """Public rows that are as good as equal to a row of φ1(S); `function` made them, None where it is not known.

    Raises:
        BankError: a bank, public or private, is not whole.
        VaultError: the vault's φ1(S) has rows of another shape.
    """
    features = project.vault.opened(project.vault.features, *BANK)
    private = [FeatureBank(features, split) for split in read_index(features).splits]
    contributors = partial(_contributors, function) if function and function.chain.mixing_stages() else None
    if {bank.shape for bank in public} - {bank.shape for bank in private}:
        raise VaultError(
            f"expected a release of rows of {private[0].shape}, as the vault's are, found {public[0].shape}: it was "
            "made from another vault, or before [network] was changed. Compare it with the vault that it was made from."
        )
    problems = []
    for bank, near in zip(public, find_near_rows(public, private, contributors), strict=True):
        for path, rows in shard_of(bank.index, bank.split, near).items():
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            detail = f"{len(rows)} rows are, but for a cosine of {SAME_ROW_COSINE}, rows of φ1(S): {shown}"
            problems.append(Problem("private row", path, detail))
    return problems


def _contributors(function: FittedFunction, split: SplitName, rows: Rows) -> tuple[Rows, Rows]:
    made = function.chain.contributors(rows, function.plans.get(split, []))
    return made.positions, made.members
