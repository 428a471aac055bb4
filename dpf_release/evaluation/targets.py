"""What is attacked: the candidate as it lies on disk, and planted functions of the same clean rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dpf_release.attacks.threat_models import HeldRows
from dpf_release.bank.format import ID_BYTES, RELEASED_SPLITS
from dpf_release.bank.rows import Concat, RowSource
from dpf_release.core.arrays import Rows
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.controls import Member, planted
from dpf_release.evaluation.truth import Contributors, QueryTruth, Truth, bins_of, draw_pools
from dpf_release.owner.workbench import Candidate, Workbench
from dpf_release.poisoning.chain import Chain
from dpf_release.poisoning.interface import Plan


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
        queries: the pictures that an attacker holds, where they belong to a planted network.
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
    queries: QueryTruth | None = None
    known_by_name: bool = False
    second: Callable[[], tuple[HeldRows, str]] = lambda: _no_second()


def _no_second() -> tuple[HeldRows, str]:
    raise NotGrantedError("this bank was released under one function only")


@dataclass(frozen=True, eq=False)
class _MadeOf:
    """Which clean rows each row is made of, where every part of a bank has plans of its own.

    Attributes:
        bank: poisoned or not: each part has as many rows.
        chain: P.
        plans: of each part, one a stage.
    """

    bank: Concat
    chain: Chain
    plans: Sequence[Sequence[Plan]]

    def contributors(self, rows: Rows) -> tuple[Rows, Rows]:
        """Pairs (position in `rows`, clean row that is in it)."""
        positions, members = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for part, places, mine in self.bank.split(rows):
            at, of_part = self.chain.contributors(mine, self.plans[part])
            positions.append(places[at])
            members.append(of_part + self.bank.starts[part])
        return np.concatenate(positions), np.concatenate(members)

    def foremost(self, rows: Rows) -> Rows:
        """The clean row that each has the most of."""
        found = np.empty(len(rows), np.int64)
        for part, places, mine in self.bank.split(rows):
            found[places] = self.chain.foremost(mine, self.plans[part]) + self.bank.starts[part]
        return found

    def pieces(self, rows: Rows) -> Rows | None:
        """Of which clean row each piece is, where one stage of each part puts rows together."""
        if self._pieces is None:
            return None
        found = np.empty((len(rows), self._pieces[0].shape[1]), np.int64)
        for part, places, mine in self.bank.split(rows):
            found[places] = self._pieces[part][mine] + self.bank.starts[part]
        return found

    @cached_property
    def _pieces(self) -> list[Rows] | None:
        mixing = [[plan.pieces for plan in stages if plan.pieces is not None] for stages in self.plans]
        return [pieces for (pieces,) in mixing] if all(len(found) == 1 for found in mixing) else None


def held(source: RowSource) -> HeldRows:
    """A source as an attacker may hold it: rows, and no way to what they were made of."""
    return HeldRows(source.targets, lambda rows: np.asarray(source.read(rows)))


def candidate_target(workbench: Workbench, candidate: Candidate) -> Target:
    """A candidate, as it lies on disk."""
    function, subject = candidate.function, candidate.index_sha256
    made_of = _MadeOf(candidate.rows, function.chain, [function.plans[split] for split in RELEASED_SPLITS])

    def second() -> tuple[HeldRows, str]:
        rows, index_sha256 = candidate.second()
        return held(rows), index_sha256

    return Target(
        candidate.name,
        held(candidate.rows),
        poison_with(function.chain, workbench.phi_2, subject),
        made_of.contributors,
        made_of.foremost,
        subject,
        made_of.pieces,
        known_by_name=function.chain.known_by_name,
        second=second,
    )


def planted_target(workbench: Workbench, name: str, seed: int, member: nn.Module | None = None) -> Target:
    """φ1(S) under a planted function (`evaluation.controls`), or under a network of the attacker's own."""
    clean, features, phi_2 = workbench.private.rows, workbench.features, workbench.phi_2
    chain = planted(name, features) if member is None else Chain(name, (Member(features, member),))

    def under(secret: str) -> list[Plan]:
        return chain.plan(clean, phi_2, hashlib.sha256(f"{secret} {seed}".encode()).digest())

    plans = under("planted")
    made_of = _MadeOf(Concat([clean]), chain, [plans])
    subject = f"planted {name}, seed {seed}, {workbench.private.bank_id}"
    return Target(
        name,
        held(chain.on(clean, plans)),
        poison_with(chain, phi_2, f"planted {seed}"),
        made_of.contributors,
        made_of.foremost,
        subject,
        made_of.pieces,
        second=lambda: (held(chain.on(clean, under("second"))), f"second {subject}"),
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


def poison_with(chain: Chain, phi_2: nn.Module, seed: str) -> Callable[[HeldRows], tuple[HeldRows, Rows]]:
    """P on a bank of the attacker's, under a plan for that bank; learned weights and fixed numbers are P's own."""

    def poison(rows: HeldRows) -> tuple[HeldRows, Rows]:
        source = held_source(rows)
        plans = chain.plan(source, phi_2, hashlib.sha256(seed.encode()).digest())
        return held(chain.on(source, plans)), chain.foremost(np.arange(len(rows)), plans)

    return poison


def draw_truth(workbench: Workbench, target: Target, rows: int, seed: int) -> Truth:
    """The pools that a target is scored in."""
    bins = bins_of(target.rows.targets)
    return Truth(draw_pools(bins, target.contributors, rows, seed), workbench.private.pictures, bins)
