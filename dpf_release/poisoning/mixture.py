"""Rows drawn at random from statistics of their class: noisy ones, under a privacy bound, or those of groups."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isinf, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.format import ID_BYTES, SplitName
from dpf_release.bank.procedure_format import MOST_COMPONENTS, MOST_GROUPS
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.parameters import Parameter
from dpf_release.core.privacy import Mechanism, Unit
from dpf_release.core.progress import announce
from dpf_release.errors import ConfigError
from dpf_release.poisoning.components import Components, principal_components
from dpf_release.poisoning.context import FitContext, Material
from dpf_release.poisoning.groups import CANDIDATES, LEAST_ROWS, Coordinates, Groups
from dpf_release.poisoning.interface import PUBLIC, PoisonedRows, PoisoningFunction, register
from dpf_release.poisoning.moments import Noise, Numbers
from dpf_release.poisoning.noisy_classes import NoisyClasses
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from dpf_release.poisoning.procedure import Procedure

SHARES = (0.05, 0.25, 0.7)  # of the budget: counts, sums, second moments (docs/measurements/mixture-choices.json)
VAL_SHARE = 0.1  # as many rows for each of `train` are drawn for `val`
UNBOUNDED_GROUPS = 8  # of a class, where nothing else is said
CENTRE_ROWS = 200  # drawn rows of a group, whose mean stands for it
LEAST_UNITS = 10  # delta is below 1 / (LEAST_UNITS * units)


@register("mixture")
class Mixture(PoisoningFunction):
    """Draws each row from statistics of its class, in the principal components of public features before the ReLU.

    With a bound (`epsilon`) from noisy counts and means of each class and one noisy covariance. Without one from
    `groups` of each class: real public rows are moved so that they have a group's moments.
    """

    draws_rows = True
    uses_classifier = False
    parameters = (
        Parameter("epsilon", 4.0, 1e-3, inf, "privacy budget; inf: no bound"),
        Parameter("delta", 1e-5, 1e-15, 0.1, "of the budget, at most 1 / (10 units)"),
        Parameter("components", 512, 2, MOST_COMPONENTS, "principal components of Q, at most a quarter of its images"),
        Parameter("groups", 0, 0, MOST_GROUPS, "groups of each class; 0: one, or 8 without a bound"),
        Parameter("rows", 0, 0, 10**8, "rows of each class; 0: as many as the noisy counts say"),
    )
    epsilon: float
    delta: float
    components: int
    groups: int
    rows: int

    procedure: Procedure  # of Q
    statistics: NoisyClasses | Groups  # of S in it

    @property
    def space(self) -> Components:
        """The components of Q."""
        return self.procedure.space

    @property
    def bounded(self) -> bool:
        """Whether what it learned is differentially private."""
        return not isinf(self.epsilon)

    def statement(self) -> str:
        """See `PoisoningFunction.statement`."""
        of = "noisy statistics of its class" if self.bounded else "statistics of a group of images of its class"
        return f"Each row is drawn at random from {of}; it shows no single image."

    def mechanism(self, unit: Unit) -> Mechanism | None:
        """See `PoisoningFunction.mechanism`."""
        if not self.bounded:
            return None
        return Mechanism.calibrated(self.epsilon, self.delta, SHARES, unit)

    def linkage(self) -> float:
        """How surely a row's image may be named among 200 of its class, on average: groups / 200; 0 with a bound.

        The bound's own limit is on membership, and A5 and A13 are held against it.
        """
        return 0.0 if self.bounded else (self.groups or UNBOUNDED_GROUPS) / CANDIDATES

    def state(self) -> Mapping[str, Tensor]:
        """The components of Q, and the statistics in them. With a bound nothing exact is among them."""
        public = {f"{PUBLIC}{name}": value for name, value in self.procedure.tensors().items()}
        return public | self.statistics.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        public = {name.removeprefix(PUBLIC): value for name, value in state.items() if name.startswith(PUBLIC)}
        state = {name: value for name, value in state.items() if not name.startswith(PUBLIC)}
        self.procedure = Procedure.of_tensors(public, self.features.shape)
        self.statistics = (NoisyClasses if self.bounded else Groups).of_state(state)

    # ------------------------------------------------------------------------------------------------ fitting

    def fit(self, context: FitContext) -> dict[str, float]:
        """Finds the components of Q, and the statistics of S in them; one pass over S.

        Returns:
            The shares of variance, of Q and of S, that lie in the components; without a bound, how surely a row's image
            can be named. Of S these are exact: they stay in the vault.

        Raises:
            ConfigError: there are too few public images, delta is too large for so many units, or regression targets
                have no declared range.
        """
        material, private, public = context.material, context.material.train, context.material.public
        if public is None or len(public.rows) < 4 * 2:
            raise ConfigError(
                "mixture draws rows in principal components of public images, and found too few of them. Name more "
                "under [images.public]."
            )
        units = private.units() if private.units else np.arange(len(private.rows))
        if self.bounded:
            _refuse_delta(self.delta, len(np.unique(units)), material.unit)
        count, size = len(public.rows), prod(self.features.shape)
        space = principal_components(public.drawn_from.read, count, size, min(self.components, count // 4))
        z_public, share_of_public = space.projected(public.drawn_from.read, count)
        z, share = space.projected(private.drawn_from.read, len(private.rows))
        facts = {"public variance in components": share_of_public, "private variance in components": share}
        classes, targets = _targets(material)
        cells, clusters = (self.groups or 1, 0) if self.bounded else (1, self.groups or UNBOUNDED_GROUPS)
        procedure = Procedure.of_public(space, z_public, public.rows.targets, cells, targets.shape[1])
        self.procedure = replace(procedure, clusters=clusters, non_negative=self.features.non_negative)
        mine = Coordinates(z, classes, targets, units, 1 if targets.shape[1] else material.outputs)
        if not self.bounded:
            return facts | self._fit_groups(mine, z_public, context)
        mechanism = self.mechanism(material.unit)
        assert mechanism is not None
        noise = Noise(*mechanism.noise.values())
        self._warn_of_few(noise, np.bincount(classes))
        ranges = np.asarray(material.ranges, np.float64) if targets.shape[1] else np.empty((0, 2))
        self.statistics = NoisyClasses.learned(mine, self.procedure, noise, ranges)
        return facts

    def _fit_groups(self, private: Coordinates, public: Numbers, context: FitContext) -> dict[str, float]:
        if private.targets.shape[1]:
            raise ConfigError("mixture without a bound draws classes, not regression targets. Set epsilon.")
        with context.seeded("groups") as generator:
            seed = int(generator.integers(2**31))
        groups = Groups.learned(private, public, self.procedure.clusters, seed)
        self.statistics = groups
        return groups.linkage(private.units)

    def _warn_of_few(self, noise: Noise, counts: Rows) -> None:
        """Says, before anything is drawn, where the noise on a class's mean is longer than the longest row can be."""
        kept = len(self.space.axes)
        least, found = int(np.ceil(noise.total * np.sqrt(kept))), int(np.median(counts))
        if found < least:
            announce(
                f"mixture: {found} images a class are too few for epsilon = {self.epsilon:g} and {kept} components. "
                f"Below {least}, the noise on a class's mean is longer than any row. Add images, raise epsilon, or "
                "lower components."
            )

    def gaussians(self) -> Iterator[tuple[int, float, Numbers, Numbers]]:
        """What rows are drawn from, in coordinates of the components, as whoever has the state knows it.

        Returns:
            For each class and group: the class, its share of the class's rows, mean (K,) and covariance (K, K).
            Regression has one class, and its targets are left out.
        """
        return self.statistics.gaussians()

    # ------------------------------------------------------------------------------------------------ drawing

    def draw(self, split: SplitName, secret: bytes) -> Plan:
        """How many rows of each class, their ids, groups and targets: from what was learned, and the secret, alone."""
        key = hashlib.sha256(secret + split.encode()).digest()
        generator = np.random.default_rng(list(key))
        sizes = self.statistics.class_sizes(generator)
        rows = (1.0 if split == "train" else VAL_SHARE) * (np.where(sizes > 0, self.rows, 0) if self.rows else sizes)
        classes = np.repeat(np.arange(len(sizes)), np.maximum(np.round(rows), sizes > 0).astype(np.int64))
        classes = generator.permutation(classes)
        arrays = {"ids": generator.integers(0, 256, (len(classes), ID_BYTES), np.uint8), "class": classes}
        arrays |= self.statistics.choose(classes, generator)
        if split != "train":
            arrays.pop("member", None)  # only images of `train` are in the groups
        return self._with_targets(Plan(key, arrays))

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """One drawn row for each of a source, from its class and nearest group: what an attacker has pairs of.

        Raises:
            ConfigError: there is a bound, and a row says no more of an image than its class.
        """
        if not isinstance(self.statistics, Groups):
            raise ConfigError("rows of mixture with a bound belong to no image, so none can be drawn for an image.")
        generator = np.random.default_rng(list(secret))
        classes = source.targets.astype(np.int64)
        coordinates = self.space.coordinates(source.read, len(source))
        group = self.statistics.of_rows(coordinates, classes, self._centres(self.statistics))
        ids = generator.integers(0, 256, (len(classes), ID_BYTES), np.uint8)
        arrays = {"ids": ids, "class": classes, "member": np.arange(len(classes))}
        return self._with_targets(Plan(secret, arrays | self.statistics.planned(group, generator)))

    def _centres(self, groups: Groups) -> Numbers:
        """(G, K) of each group, the mean of rows as they are released: after the ReLU, where there is one."""
        generator, found = np.random.default_rng(0), list[Numbers]()
        for group in range(len(groups.label)):
            mine = np.full(CENTRE_ROWS, group)
            plan = Plan(bytes(32), groups.planned(mine, generator))
            released = torch.from_numpy(self.apply(np.arange(CENTRE_ROWS), None, plan))
            found.append(self.space.of(released).mean(0).double().numpy())
        return np.stack(found)

    def _with_targets(self, plan: Plan) -> Plan:
        drawn = self.statistics.targets(plan) if isinstance(self.statistics, NoisyClasses) else np.empty((0, 0))
        plan.arrays["targets"] = drawn if drawn.shape[1] else plan.arrays["class"].astype(np.int64)
        return plan

    def apply(self, rows: Rows, source: RowSource | None, plan: Plan) -> NDArray[np.float32]:
        """Drawn rows; the source is not looked at."""
        features = self.space.features(self.statistics.coordinates(rows, plan))
        out: NDArray[np.float32] = features.reshape(len(rows), *self.features.shape).numpy()
        return np.maximum(out, 0) if self.features.non_negative else out

    def contributors(self, rows: Rows, plan: Plan) -> Contributors:
        """Nobody, with one group a class; else one image of the row's group, drawn with the row."""
        if "member" not in plan.arrays:
            return Contributors.nobody()
        return Contributors(np.arange(len(rows)), plan.arrays["member"][rows], np.ones(len(rows), np.int64))


def _targets(material: Material) -> tuple[Rows, Numbers]:
    """The class of each row of S, and its regression targets, from -1 to 1 over the declared range: (n, 0) without."""
    targets = material.train.rows.targets
    if targets.ndim == 1:
        return targets.astype(np.int64), np.empty((len(targets), 0))
    if material.ranges is None:
        raise ConfigError(
            "mixture draws regression targets within a range that does not depend on the private images. Declare it "
            "under [task] ranges, as [[-90, 90]]."
        )
    low, high = np.asarray(material.ranges, np.float64).T
    share = np.clip((targets - (low + high) / 2) / ((high - low) / 2), -1, 1)
    return np.zeros(len(targets), np.int64), share / np.sqrt(targets.shape[1])


@dataclass(frozen=True)
class Draw:
    """How rows of one's own are drawn: without a privacy bound for their images, or with one."""

    seed: int = 0
    epsilon: float | None = None
    delta: float = 1e-5

    def refuse(self, procedure: Procedure, counts: Rows) -> None:
        """A `ConfigError` where rows of classes with so many images cannot be drawn so."""
        if procedure.room < 1:
            raise ConfigError("this release has regression targets: rows of one's own are drawn for classes only.")
        if procedure.clusters:
            if self.epsilon is not None:
                raise ConfigError(
                    "the rows of this release were drawn without a privacy bound, so rows with one would differ from "
                    "them. Leave epsilon out."
                )
            if counts.min() < LEAST_ROWS:
                raise ConfigError(f"expected {LEAST_ROWS} images of each class, found {counts.min()} of one.")
        if self.epsilon is not None:
            _refuse_delta(self.delta, int(counts.sum()), "image")
            if not self.epsilon > 0:
                raise ConfigError(f"expected epsilon above 0, found {self.epsilon:g}.")


def drawn_anew(
    procedure: Procedure, shape: tuple[int, int, int], rows: RowSource, draw: Draw, classes: Sequence[int] = ()
) -> RowSource:
    """Rows of one's own put through a release's procedure: drawn ones of each class, about as many.

    They combine with the release's bank, which real rows of other classes do not: a classifier would learn to tell
    drawn from real.

    Args:
        procedure: of the release.
        shape: of its rows, (C, H, W).
        rows: one's own, before φ1's last ReLU where the release has one; classes as targets, numbered in any way.
        draw: with which seed, and which bound.
        classes: that are drawn; by default those of the rows. With a bound, name them: that a class has any row is
            then not told by its being there.

    Raises:
        ConfigError: see `Draw.refuse`.
    """
    if rows.targets.ndim > 1 or not len(rows):
        raise ConfigError("expected rows with classes, found none.")
    names = np.unique(classes or rows.targets)
    labels = np.searchsorted(names, rows.targets)
    draw.refuse(procedure, np.bincount(labels, minlength=len(names)))
    bound = inf if procedure.clusters else 1.0 if draw.epsilon is None else draw.epsilon
    function = Mixture(FeatureSpec(shape, procedure.non_negative), epsilon=bound, delta=draw.delta)
    function.procedure = procedure
    z = procedure.space.coordinates(rows.read, len(rows))
    mine = Coordinates(z, labels, np.empty((len(rows), 0)), np.arange(len(rows)), len(names))
    if procedure.clusters:
        function.statistics = Groups.learned(mine, z, procedure.clusters, draw.seed)
    else:
        mechanism = None if draw.epsilon is None else function.mechanism("image")
        noise = None if mechanism is None else Noise(*mechanism.noise.values())
        function.statistics = NoisyClasses.learned(mine, procedure, noise, np.empty((0, 2)))
    plan = function.draw("train", hashlib.sha256(f"own rows {draw.seed}".encode()).digest())
    targets = {"targets": names[plan.arrays["class"]].astype(np.int64)}
    return PoisonedRows(rows, function, Plan(plan.secret, plan.arrays | targets))


def _refuse_delta(delta: float, units: int, unit: Unit) -> None:
    most = 1 / (LEAST_UNITS * units)
    if delta > most:
        raise ConfigError(
            f"expected delta of at most {most:.1e} for so many {unit}s, found {delta:g}: it is the probability that "
            "the bound does not hold. Lower it."
        )
