"""What is attacked: the candidate as it lies on disk, and planted functions of the same clean rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dpf_release.attacks.threat_models import HeldRows
from dpf_release.attacks.toolkit.shadows import poison_with
from dpf_release.bank.format import RELEASED_SPLITS
from dpf_release.bank.rows import Concat, RowSource
from dpf_release.core.arrays import Rows
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.controls import Member, planted
from dpf_release.evaluation.truth import MadeOf, QueryTruth, Truth, bins_of, draw_pools
from dpf_release.owner.workbench import Candidate, Workbench
from dpf_release.poisoning.chain import Chain
from dpf_release.poisoning.plan import Contributors, Plan


@dataclass(frozen=True, eq=False)
class Target:
    """One bank, and what only the harness knows of it. Its rows are numbered through the released splits.

    Attributes:
        name: of the function.
        rows: as an attacker holds them.
        poison: P on another bank; and of each of its rows, which row of that bank it has the most of.
        contributors: which clean rows each row is made of.
        subject: what the bank is, for what is kept of it.
        classifier: in the place of φ2, where a network is planted.
        queries: the pictures that an attacker holds, where they belong to a planted network.
        function: of what kind P is, as its name with its parameters; empty: of none that has a name.
        learned_secret: whether more than P's draws is secret; without, whoever knows its name can do the same.
        second: the same pictures under another function, as they are released too, and a digest of that bank.
    """

    name: str
    rows: HeldRows
    poison: Callable[[HeldRows], tuple[HeldRows, Rows]]
    contributors: MadeOf
    subject: str
    classifier: nn.Module | None = None
    queries: QueryTruth | None = None
    function: str = ""
    learned_secret: bool = True
    second: Callable[[], tuple[HeldRows, str]] = lambda: _no_second()

    def foremost(self, rows: Rows) -> Rows:
        """The clean row that each of `rows` has the most of."""
        return self.contributors(rows).foremost(rows)


def _no_second() -> tuple[HeldRows, str]:
    raise NotGrantedError("this bank was released under one function only")


def _made_of(bank: Concat, chain: Chain, plans: Sequence[Sequence[Plan]]) -> MadeOf:
    """Which clean rows each row is made of, where every part of a bank has plans of its own."""

    def contributors(rows: Rows) -> Contributors:
        found = [Contributors.nobody()]
        for part, places, mine in bank.split(rows):
            made = chain.contributors(mine, plans[part])
            found.append(Contributors(places[made.positions], made.members + bank.starts[part], made.pieces))
        return Contributors(*(np.concatenate(column) for column in zip(*found, strict=True)))

    return contributors


def held(source: RowSource) -> HeldRows:
    """A source as an attacker may hold it: rows, and no way to what they were made of."""
    return HeldRows(source.targets, lambda rows: np.asarray(source.read(rows)))


def candidate_target(workbench: Workbench, candidate: Candidate) -> Target:
    """A candidate, as it lies on disk."""
    function, subject = candidate.function, candidate.index_sha256

    def second() -> tuple[HeldRows, str]:
        rows, index_sha256 = candidate.second()
        return held(rows), index_sha256

    return Target(
        candidate.name,
        held(candidate.rows),
        poison_with(function.chain, workbench.phi_2, subject),
        _made_of(candidate.rows, function.chain, [function.plans[split] for split in RELEASED_SPLITS]),
        subject,
        function=function.chain.spec,
        learned_secret=function.chain.learned_secret,
        second=second,
    )


def planted_target(workbench: Workbench, name: str, seed: int, member: nn.Module | None = None) -> Target:
    """φ1(S) under a planted function (`evaluation.controls`), or under a network of the attacker's own."""
    clean, features, phi_2 = workbench.private.rows, workbench.features, workbench.phi_2
    chain = planted(name, features) if member is None else Chain(name, (Member(features, member),))

    def under(secret: str) -> list[Plan]:
        return chain.plan(clean, phi_2, hashlib.sha256(f"{secret} {seed}".encode()).digest())

    plans = under("planted")
    subject = f"planted {name}, seed {seed}, {workbench.private.bank_id}"
    return Target(
        name,
        held(chain.on(clean, plans)),
        poison_with(chain, phi_2, f"planted {seed}"),
        _made_of(Concat([clean]), chain, [plans]),
        subject,
        second=lambda: (held(chain.on(clean, under("second"))), f"second {subject}"),
    )


def draw_truth(workbench: Workbench, target: Target, rows: int, seed: int) -> Truth:
    """The pools that a target is scored in."""
    bins = bins_of(target.rows.targets)
    return Truth(draw_pools(bins, target.contributors, rows, seed), workbench.private.pictures, bins)
