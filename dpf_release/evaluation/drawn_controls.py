"""Weak functions that draw rows, which A13 must see through: of few images, without shrinkage, or with copies."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.attacks.threat_models import HeldRows
from dpf_release.bank.rows import ComputedRows, Concat, RowSource, Select
from dpf_release.core.arrays import Rows
from dpf_release.errors import ConfigError, NotGrantedError
from dpf_release.evaluation.targets import Target, bins_of
from dpf_release.models.training import Recipe
from dpf_release.owner.workbench import Workbench
from dpf_release.poisoning.chain import Chain, build_chain, fit_chain
from dpf_release.poisoning.components import Components, principal_components
from dpf_release.poisoning.context import Material, Split
from dpf_release.poisoning.groups import LEAST_ROWS
from dpf_release.poisoning.objective import Adversaries, TaskLoss
from dpf_release.poisoning.plan import Contributors

SMALL, PLAIN, COPIES = "mixture-400", "mixture-200-plain", "mixture-copies"
FITTED = {SMALL: 400, PLAIN: 200, COPIES: 400}  # rows of each class, or half of the class, where that is fewer
DRAWN = 2000  # rows of each class in a bank
COMPONENTS = 256
COPIED, LEAST_COPIED = 0.01, 50  # of the rows; and how many at least, for a share of them to be known
LEAST_POWER = {COPIES: 0.9}  # of those copies nearly all must be found


def drawn_from(workbench: Workbench, spec: str, mine: Split, secret: bytes) -> tuple[RowSource, Chain]:
    """Rows that a function draws from statistics of some rows, in components of Q; and the function."""
    public = workbench.public_bank()
    material = Material(
        features=workbench.features,
        phi_1=workbench.phi_1,
        phi_2=workbench.phi_2,
        task=TaskLoss(None),
        train=mine,
        val=mine,
        public=Split(public, workbench.private.pictures, public.before_relu()),
        adversaries=lambda: Adversaries({}),
        objective="equivalence",
        lambda_=0.0,
        recipe=Recipe(1, 1, 1e-3),
        secret=secret,
        device=workbench.device,
        outputs=int(mine.rows.targets.max()) + 1,
    )
    chain = build_chain(spec, workbench.features)
    plans, _, _ = fit_chain(chain, material)
    return chain.on(mine.rows, plans["train"]), chain


@dataclass(frozen=True, eq=False)
class _Material:
    """Some rows of each class of S, and Q.

    Attributes:
        rows: numbers of the rows that statistics are taken of, ascending.
        others: numbers of all other rows.
        classes: of `rows`, 0 to K; of regression, bins.
    """

    workbench: Workbench
    rows: Rows
    others: Rows
    classes: Rows
    secret: bytes

    @classmethod
    def drawn(cls, workbench: Workbench, each: int, seed: int) -> _Material:
        classes = bins_of(workbench.private_bank("train").targets)
        generator = np.random.default_rng([seed, 17])
        chosen = list[Rows]()
        for label in np.unique(classes):
            mine = generator.permutation(np.flatnonzero(classes == label))
            chosen.append(mine[: min(each, len(mine) // 2)])
        if min(map(len, chosen)) < LEAST_ROWS:
            raise ConfigError(f"expected {2 * LEAST_ROWS} rows of each class, found {2 * min(map(len, chosen))}")
        rows = np.sort(np.concatenate(chosen))
        others = np.setdiff1d(np.arange(len(classes)), rows)
        return cls(workbench, rows, others, classes[rows], hashlib.sha256(f"planted {seed}".encode()).digest())

    def before_relu(self) -> ComputedRows:
        """The chosen rows before the last ReLU, with their classes."""
        bank = self.workbench.private_bank("train").before_relu()
        return ComputedRows(self.classes, lambda rows: bank.read(self.rows[rows]))

    def fitted(self) -> tuple[RowSource, Chain]:
        """Rows that `mixture` without a bound draws from their statistics; and what it learned."""
        mine = Split(self.before_relu(), self.workbench.private.pictures)
        spec = f"mixture:epsilon=inf,components={COMPONENTS},rows={DRAWN}"
        return drawn_from(self.workbench, spec, mine, self.secret)

    def plain(self) -> RowSource:
        """Gaussian rows with the very mean and covariance of the chosen rows of their class, shrunk towards nothing."""
        workbench, public, source = self.workbench, self.workbench.public_bank(), self.before_relu()
        kept = min(COMPONENTS, len(public) // 4)
        space = principal_components(public.before_relu().read, len(public), prod(workbench.features.shape), kept)
        coordinates, generator = space.coordinates(source.read, len(source)), np.random.default_rng(list(self.secret))
        drawn = []
        for label in np.unique(self.classes):
            mine = coordinates[self.classes == label]
            noise = generator.standard_normal((DRAWN, len(mine))) / np.sqrt(len(mine))
            drawn.append(mine.mean(0) + noise @ (mine - mine.mean(0)))
        return ComputedRows(
            np.repeat(np.unique(self.classes), DRAWN), _decoded(workbench, space, np.concatenate(drawn))
        )


def drawn_target(workbench: Workbench, name: str, seed: int) -> Target:
    """A bank of drawn rows that gives its members away, who alone are asked about.

    Raises:
        ConfigError: a class has too few rows.
    """
    material = _Material.drawn(workbench, FITTED[name], seed)
    members, learned = material.rows, dict[str, Tensor]()
    if name == PLAIN:
        rows, function = material.plain(), f"mixture:epsilon=inf,components={COMPONENTS}"
    else:
        rows, chain = material.fitted()
        learned, function = chain.state(), chain.spec
    targets, read = _targets(material, rows.targets), rows.read
    if name == COPIES:
        count = max(LEAST_COPIED, round(COPIED * len(rows)))
        members = np.sort(np.random.default_rng([seed, 18]).permutation(material.others)[:count])
        copies = Select(workbench.private_bank("train"), members)
        targets, read = np.concatenate([targets, copies.targets]), Concat([rows, copies]).read
    return Target(
        name,
        HeldRows(targets, lambda numbers: np.asarray(read(numbers), np.float16)),
        _refuse,
        lambda _: Contributors.nobody(),
        f"planted {name}, seed {seed}, {workbench.private.bank_id}",
        function=function,
        draws_rows=True,
        learned=learned,
        drawn_of=members,
        by_auc=name != COPIES,
    )


def _refuse(rows: HeldRows) -> tuple[HeldRows, Rows]:
    raise NotGrantedError("a planted function that draws rows is not applied to others")


def _decoded(
    workbench: Workbench, space: Components, coordinates: NDArray[np.float64]
) -> Callable[[Rows], NDArray[np.float32]]:
    """Row numbers → rows (n, C, H, W) at these coordinates."""

    def compute(rows: Rows) -> NDArray[np.float32]:
        out: NDArray[np.float32] = space.features(coordinates[rows]).reshape(-1, *workbench.features.shape).numpy()
        return np.maximum(out, 0) if workbench.features.non_negative else out

    return compute


def _targets(material: _Material, classes: Rows) -> NDArray[Any]:
    """Targets of drawn rows: their class; of regression, those of any row of S in the same bin."""
    targets = material.workbench.private_bank("train").targets
    if targets.ndim == 1:
        return classes
    generator, out = (
        np.random.default_rng(list(material.secret)),
        np.empty((len(classes), targets.shape[1]), np.float32),
    )
    for label in np.unique(classes):
        mine = classes == label
        out[mine] = targets[generator.choice(material.rows[material.classes == label], mine.sum())]
    return out
