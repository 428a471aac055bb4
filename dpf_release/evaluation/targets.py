"""What is attacked: the candidate as it lies on disk, and planted functions of the same clean rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dpf_release.attacks.threat_models import HeldRows
from dpf_release.attacks.toolkit.shadows import poison_with
from dpf_release.bank.format import ID_BYTES, INDEX, RELEASED_SPLITS
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.files import sha256_of
from dpf_release.errors import NotGrantedError, VaultError
from dpf_release.evaluation.controls import Member, planted
from dpf_release.evaluation.truth import Contributors, Suspects, Truth, bins_of, draw_pools
from dpf_release.owner.fitted import FittedFunction
from dpf_release.owner.poison import changed_since_poison
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import releases
from dpf_release.poisoning.chain import Chain
from dpf_release.poisoning.plan import FeatureSpec, Plan


@dataclass(frozen=True, eq=False)
class Target:
    """One bank, and what only the harness knows of it. Its rows are numbered through the released splits.

    Attributes:
        name: of the function.
        rows: as an attacker holds them.
        poison: P on another bank; and of each of its rows, which row of that bank it has the most of.
        contributors: which clean rows each row is made of.
        foremost: which clean row each row has the most of.
        subject: what the bank is, for what is kept of it.
        pieces: (n, pieces) of which clean row each piece of some rows is; None: rows are not made of pieces, or of
            pieces of pieces.
        classifier: in the place of φ2, where a network is planted.
        suspects: the candidates, where they belong to a planted network.
        function: of what kind it is, as its name with its parameters; empty: of none that has a name.
        known_by_name: whether who knows P's name can do the same to pictures of their own.
        second: the same pictures under another function, as they are released too, and a digest of that bank.
    """

    name: str
    rows: HeldRows
    poison: Callable[[HeldRows], tuple[HeldRows, Rows]]
    contributors: Contributors
    foremost: Callable[[Rows], Rows]
    subject: str
    pieces: Callable[[Rows], Rows | None] = lambda rows: None
    classifier: nn.Module | None = None
    suspects: Suspects | None = None
    function: str = ""
    known_by_name: bool = False
    second: Callable[[Project], tuple[HeldRows, str]] = lambda project: _no_second()


def _no_second() -> tuple[HeldRows, str]:
    raise NotGrantedError("the ledger has no other release of these images under another function")


@dataclass(frozen=True, eq=False)
class Joined:
    """Several row sources as one."""

    parts: tuple[RowSource, ...]

    @cached_property  # noise asks for them row by row
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes."""
        return np.concatenate([part.ids for part in self.parts])

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) or (N, K)."""
        return np.concatenate([part.targets for part in self.parts])

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, rows: Rows) -> NDArray[Any]:
        """Rows by number, (n, C, H, W)."""
        return read_joined([(part.read, len(part)) for part in self.parts], np.asarray(rows, np.int64))


def read_joined(parts: Sequence[tuple[Callable[[Rows], Any], int]], rows: Rows) -> NDArray[Any]:
    """Rows of several sources, numbered through."""
    starts = np.cumsum([0, *(length for _, length in parts)])
    part_of = np.searchsorted(starts, rows, side="right") - 1
    out: NDArray[Any] | None = None
    for number in np.unique(part_of):
        mine = part_of == number
        found = np.asarray(parts[number][0](rows[mine] - starts[number]))
        if out is None:
            out = np.empty((len(rows), *found.shape[1:]), found.dtype)
        out[mine] = found
    if out is None:
        raise ValueError("expected a row to read, found none")
    return out


def held(source: RowSource) -> HeldRows:
    """A source as an attacker may hold it: rows, and no way to what they were made of."""
    return HeldRows(source.targets, lambda rows: np.asarray(source.read(rows)))


def clean_rows(project: Project) -> Joined:
    """φ1(S), the released splits."""
    return Joined(tuple(project.private_bank(split) for split in RELEASED_SPLITS))


def candidate_target(project: Project, name: str, function: FittedFunction) -> Target:
    """The candidate of a fitted function.

    Raises:
        VaultError: it is not what that function makes of today's features: which row is made of which is not known.
    """
    features = _features(project, name)
    if problems := changed_since_poison(project, name, function, features / INDEX):
        raise VaultError(
            f"the candidate {name!r} is not of today: {'; '.join(problems)}. Run `dpf-release poison --name {name}` "
            "again, then attack what it makes."
        )
    parts = [FeatureBank(features, split) for split in RELEASED_SPLITS]
    starts = np.cumsum([0, *map(len, parts)])

    def contributors(rows: Rows) -> tuple[Rows, Rows]:
        found = []
        for number, split in enumerate(RELEASED_SPLITS):
            mine = np.flatnonzero((rows >= starts[number]) & (rows < starts[number + 1]))
            made = function.chain.contributors(rows[mine] - starts[number], function.plans[split])
            found.append((mine[made.positions], made.members + starts[number]))
        return np.concatenate([at for at, _ in found]), np.concatenate([members for _, members in found])

    def pieces(rows: Rows) -> Rows | None:
        found = [_pieces(function.plans[split]) for split in RELEASED_SPLITS]
        if any(part is None for part in found):
            return None
        joined = np.concatenate([part + start for part, start in zip(found, starts, strict=False) if part is not None])
        return joined[rows]

    def foremost(rows: Rows) -> Rows:
        found = np.empty(len(rows), np.int64)
        for number, split in enumerate(RELEASED_SPLITS):
            mine = (rows >= starts[number]) & (rows < starts[number + 1])
            below = rows[mine] - starts[number]
            made = function.chain.contributors(below, function.plans[split])
            found[mine] = made.foremost(below) + starts[number]
        return found

    phi_2 = project.frozen(project.cut.split.classifier)
    subject = sha256_of(features / INDEX)
    rows, poison = held(Joined(tuple(parts))), poison_with(function.chain, phi_2, subject)
    second = lambda project: _released_too(project, function.digest)  # noqa: E731
    return Target(
        name,
        rows,
        poison,
        contributors,
        foremost,
        subject,
        pieces,
        function=function.chain.spec,
        known_by_name=not function.chain.learned_secret,
        second=second,
    )


def _features(project: Project, name: str) -> Path:
    vault = project.vault
    return vault.opened(vault.candidate(name) / "features", INDEX, *RELEASED_SPLITS)


def _released_too(project: Project, digest: str) -> tuple[HeldRows, str]:
    """The candidate that was published last of these features under another function.

    Raises:
        NotGrantedError: there is none, or it is not in the vault as it was.
    """
    others = [
        entry
        for entry in releases(project.vault)
        if entry["function_digest"] != digest and entry["bank"] == project.bank_id and entry.get("published", True)
    ]
    if not others:
        return _no_second()
    name, index = others[-1]["function"], others[-1]["index_sha256"]
    if project.vault.holds(project.vault.candidate(name) / "features" / INDEX):
        features = _features(project, name)
        if sha256_of(features / INDEX) == index:
            return held(Joined(tuple(FeatureBank(features, split) for split in RELEASED_SPLITS))), index
    raise NotGrantedError(f"the vault no longer has the candidate {name!r} as it was published")


def _pieces(plans: Sequence[Plan]) -> Rows | None:
    """Of the one stage that puts rows together; None where there is none, or several."""
    mixing = [plan.arrays["pieces"] for plan in plans if "pieces" in plan.arrays]
    return mixing[0] if len(mixing) == 1 else None


def planted_target(project: Project, name: str, clean: RowSource, seed: int, member: nn.Module | None = None) -> Target:
    """The same rows under a planted function (`battery.planted`), or under a network of the attacker's own."""
    cut = project.cut
    features = FeatureSpec(cut.record.feature_shape, cut.split.non_negative)
    chain = planted(name, features) if member is None else Chain(name, (Member(features, member),))
    phi_2 = project.frozen(cut.split.classifier)
    plans = chain.plan(clean, phi_2, hashlib.sha256(f"planted {seed}".encode()).digest())
    subject, pieces = f"planted {name}, seed {seed}, {project.bank_id}", _pieces(plans)
    return Target(
        name,
        held(chain.on(clean, plans)),
        poison_with(chain, phi_2, f"planted {seed}"),
        lambda rows: chain.contributors(rows, plans)[:2],
        lambda rows: chain.contributors(rows, plans).foremost(rows),
        subject,
        lambda rows: None if pieces is None else pieces[rows],
        second=lambda project: (
            held(chain.on(clean, chain.plan(clean, phi_2, hashlib.sha256(f"second {seed}".encode()).digest()))),
            f"second {subject}",
        ),
    )


@dataclass(frozen=True, eq=False)
class _Source:
    """Held rows with ids, as a poisoning function wants them."""

    rows: HeldRows

    @cached_property
    def ids(self) -> NDArray[np.uint8]:
        return np.random.default_rng(0).integers(0, 256, (len(self.rows), ID_BYTES), np.uint8)

    @property
    def targets(self) -> NDArray[Any]:
        return self.rows.targets

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Rows) -> NDArray[Any]:
        return self.rows.read(rows)


def held_source(rows: HeldRows) -> RowSource:
    """A bank of an attacker's, as a poisoning function wants it."""
    return _Source(rows)


def draw_truth(project: Project, target: Target, rows: int, seed: int) -> Truth:
    """The pools that a target is scored in."""
    table_rows = np.concatenate([project.bank_order[0][split] for split in RELEASED_SPLITS])
    bins = bins_of(target.rows.targets)
    pools = draw_pools(bins, target.contributors, rows, seed)
    return Truth(pools, lambda rows: project.private_images.pictures.read(table_rows[rows]), bins)
