"""Rows drawn at random from statistics of their class: noisy ones, under a privacy bound, or those of groups."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from math import inf, isinf, prod

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from dpf_release.bank.format import ID_BYTES, SplitName
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.parameters import Parameter, Value
from dpf_release.core.privacy import Mechanism, Unit
from dpf_release.core.progress import announce
from dpf_release.errors import ConfigError
from dpf_release.poisoning import groups
from dpf_release.poisoning.components import Components, principal_components
from dpf_release.poisoning.context import FitContext, Material
from dpf_release.poisoning.interface import PoisoningFunction, register
from dpf_release.poisoning.moments import Noise, Numbers, Sums, clip, estimated, noisy_sums, scaling
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from dpf_release.poisoning.stationary import keyed_normal

SHARES, SHARES_BELOW_2 = (0.1, 0.3, 0.6), (0.05, 0.6, 0.35)  # of the budget: counts, sums, second moments
VAL_SHARE = 0.1  # as many rows for each of `train` are drawn for `val`
TARGET_SHARE = 0.3  # of a row's norm, that its regression targets may have
LEAST_OF_CLASS = 50  # images of Q, on average, for its classes to count
LEAST_UNITS = 10  # delta is below 1 / (LEAST_UNITS * units)


@register("mixture")
class Mixture(PoisoningFunction):
    """Draws each row from statistics of its class, in the principal components of public features before the ReLU.

    With a bound (`epsilon`) from noisy counts, means and second moments of each class. Without one from `groups` of
    each class: real public rows are moved so that they have a group's moments.
    """

    draws_rows = True
    uses_classifier = False
    parameters = (
        Parameter("epsilon", 4.0, 1e-3, inf, "privacy budget; inf: no bound"),
        Parameter("delta", 1e-5, 1e-15, 0.1, "of the budget, at most 1 / (10 units)"),
        Parameter("components", 256, 2, 4096, "principal components of Q, at most a quarter of its images"),
        Parameter("groups", 0, 0, 10_000, "groups of each class; 0: one, or 8 without a bound"),
        Parameter("rows", 0, 0, 10**8, "rows of each class; 0: as many as the noisy counts say"),
    )
    epsilon: float
    delta: float
    components: int
    groups: int
    rows: int

    def __init__(self, features: FeatureSpec, **values: Value) -> None:
        super().__init__(features, **values)
        self.learned: dict[str, Tensor] = {}

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
        return Mechanism.calibrated(self.epsilon, self.delta, SHARES if self.epsilon >= 2 else SHARES_BELOW_2, unit)

    def state(self) -> Mapping[str, Tensor]:
        """The components of Q, and the statistics in them. With a bound nothing exact is among them."""
        return self.learned

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        self.learned = dict(state)

    # ------------------------------------------------------------------------------------------------ fitting

    def fit(self, context: FitContext) -> dict[str, float]:
        """Finds the components of Q, and the statistics of S in them; one pass over S.

        Returns:
            The shares of variance, of Q and of S, that lie in the components. Of S it is exact: it stays in the vault.

        Raises:
            ConfigError: there are too few public images, delta is too large for so many units, or regression targets
                have no declared range.
        """
        material, private = context.material, context.material.train
        public = material.public
        if public is None or len(public.rows) < 4 * 2:
            raise ConfigError(
                "mixture draws rows in principal components of public images, and found too few of them. Name more "
                "under [images.public]."
            )
        units = private.units() if self.bounded and private.units else np.arange(len(private.rows))
        most = 1 / (LEAST_UNITS * len(np.unique(units)))
        if self.bounded and self.delta > most:
            raise ConfigError(
                f"expected mixture:delta of at most {most:.1e} for so many {material.unit}s, found {self.delta:g}: "
                "it is the probability that the bound does not hold. Lower it."
            )
        count, size = len(public.rows), prod(self.features.shape)
        kept = min(self.components, count // 4)
        space = principal_components(public.drawn_from.read, count, size, kept)
        z_public = space.coordinates(public.drawn_from.read, count)
        z_private, share = space.projected(private.drawn_from.read, len(private.rows))
        classes, targets = _targets(material)
        self.learned = {"mean": space.mean, "axes": space.axes}
        if self.bounded:
            self._learn_noisy(material, units, z_private, classes, targets, z_public, space)
        else:
            self._learn_groups(z_private, classes, targets, z_public, context)
        return {"public variance in components": space.share, "private variance in components": share}

    def _learn_noisy(
        self,
        material: Material,
        units: Rows,
        private: Numbers,
        classes: Rows,
        targets: Numbers,
        public: Numbers,
        space: Components,
    ) -> None:
        mechanism = self.mechanism(material.unit)
        assert mechanism is not None
        assert material.public is not None
        noise = Noise(*mechanism.noise.values())
        self._warn_of_few(noise, np.bincount(classes), len(space.axes))
        scale = scaling(space.variances.double().numpy(), public)
        count = self.groups or 1
        cells = KMeans(count, n_init=4, random_state=0).fit(public[:, : groups.LEADING]) if count > 1 else None
        cell_of = [
            cells.predict(of[:, : groups.LEADING]).astype(np.int64) if cells else np.zeros(len(of), np.int64)
            for of in (private, public)
        ]
        weight = TARGET_SHARE if targets.shape[1] else 0.0
        room = np.sqrt(1 - weight**2)
        w = np.concatenate([room * clip(private * scale), weight * targets], axis=1)  # of norm 1 at the most
        none = np.zeros((len(public), targets.shape[1]))
        w_public = np.concatenate([room * clip(public * scale), none], axis=1)
        shape = (1 if targets.shape[1] else material.outputs, count)
        found = noisy_sums(w, classes, cell_of[0], units, shape, noise)
        labels = _labels(material.public.rows.targets)
        of_public = Sums.over(w_public, labels, cell_of[1], (int(labels.max()) + 1, count), np.ones(len(public)))
        drawn_from = estimated(found, of_public, noise, targets.shape[1])
        self.learned |= {
            "scale": torch.from_numpy(scale * room),
            "count": torch.from_numpy(found.count),
            "share": torch.from_numpy(drawn_from.share),
            "centre": torch.from_numpy(drawn_from.mean),
            "root": torch.from_numpy(drawn_from.root),
        }
        if targets.shape[1]:
            self.learned["ranges"] = torch.from_numpy(np.asarray(material.ranges, np.float64))

    def _warn_of_few(self, noise: Noise, counts: Rows, kept: int) -> None:
        """Says, before anything is drawn, where the noise on a class's mean is longer than the longest row can be."""
        least, found = int(np.ceil(noise.total * np.sqrt(kept))), int(np.median(counts))
        if found < least:
            announce(
                f"mixture: {found} images a class are too few for epsilon = {self.epsilon:g} and {kept} components. "
                f"Below {least}, the noise on a class's mean is longer than any row. Add images, raise epsilon, or "
                "lower components."
            )

    def _learn_groups(
        self, private: Numbers, classes: Rows, targets: Numbers, public: Numbers, context: FitContext
    ) -> None:
        if targets.shape[1]:
            raise ConfigError("mixture without a bound draws classes, not regression targets. Set epsilon.")
        pools, maps, counts = list[Rows](), list[Numbers](), list[int]()
        centres, sources, shares = list[Numbers](), list[Numbers](), list[int]()
        with context.seeded("groups") as generator:
            seed = int(generator.integers(2**31))
        group_of = np.full(len(private), -1, np.int64)
        for label in range(context.material.outputs):
            mine = np.flatnonzero(classes == label)
            if len(mine) < groups.LEAST_ROWS:
                raise ConfigError(
                    f"expected {groups.LEAST_ROWS} images of each class for mixture, found {len(mine)} of class "
                    f"{label}. Add images, or leave the class out."
                )
            of = groups.clusters(private[mine], self.groups or 8, seed)
            group_of[mine] = len(centres) + of
            covariance = np.cov(private[mine].T, bias=True)
            for group in range(int(of.max()) + 1):
                mean, within = groups.moments(private[mine[of == group]], covariance)
                pool = groups.nearest(public, mean)
                pools.append(np.resize(pool, groups.POOL))
                maps.append(groups.transport(np.cov(public[pool].T, bias=True), within))
                centres.append(mean)
                sources.append(public[pool].mean(0))
                shares.append(label)
                counts.append(int((of == group).sum()))
        self.learned |= {
            "public": torch.from_numpy(public.astype(np.float32)),
            "pool": torch.from_numpy(np.stack(pools)),
            "map": torch.from_numpy(np.stack(maps).astype(np.float32)),
            "centre": torch.from_numpy(np.stack(centres).astype(np.float32)),
            "source": torch.from_numpy(np.stack(sources).astype(np.float32)),
            "label": torch.tensor(shares),
            "count": torch.tensor(np.array(counts)),
            "group": torch.from_numpy(group_of),
        }

    def gaussians(self) -> Iterator[tuple[int, float, Numbers, Numbers]]:
        """What rows are drawn from, in coordinates of the components, as whoever has the state knows it.

        Returns:
            For each class and group: the class, its share of the class's rows, mean (K,) and covariance (K, K).
            Regression has one class, and its targets are left out.
        """
        if self.bounded:
            scale, root = self.learned["scale"].numpy(), self.learned["root"].numpy()
            size = len(scale)
            for (label, group), share in np.ndenumerate(self.learned["share"].numpy()):
                covariance = root[label, :size] @ root[label, :size].T / scale / scale[:, None]
                yield label, float(share), self.learned["centre"].numpy()[label, group, :size] / scale, covariance
            return
        label, count = self.learned["label"].numpy(), self.learned["count"].numpy()
        public, maps = self.learned["public"].double().numpy(), self.learned["map"].double().numpy()
        for group, centre in enumerate(self.learned["centre"].double().numpy()):
            pool = np.unique(self.learned["pool"][group].numpy())
            covariance = maps[group] @ np.cov(public[pool].T, bias=True) @ maps[group].T
            yield int(label[group]), float(count[group] / count[label == label[group]].sum()), centre, covariance

    # ------------------------------------------------------------------------------------------------ drawing

    def draw(self, split: SplitName, secret: bytes) -> Plan:
        """How many rows of each class, their ids, groups and targets: from what was learned, and the secret, alone."""
        key = hashlib.sha256(secret + split.encode()).digest()
        generator = np.random.default_rng(list(key))
        share = 1.0 if split == "train" else VAL_SHARE
        if self.bounded:
            cells = self.learned["share"].numpy()
            of_class = np.maximum(self.learned["count"].numpy().sum(1), 1)
            classes = np.repeat(np.arange(len(cells)), self._rows_of(of_class, share))
            group = np.array([generator.choice(cells.shape[1], p=cells[label]) for label in classes], np.int64)
        else:
            label, count = self.learned["label"].numpy(), self.learned["count"].numpy()
            # Not the true size of a class: one within a tenth of it.
            of_class = np.bincount(label, count) * generator.uniform(0.9, 1.1, label.max() + 1)
            classes = np.repeat(np.arange(len(of_class)), self._rows_of(of_class, share))
            group = np.array(
                [generator.choice(np.flatnonzero(label == of), p=_shares(count, label == of)) for of in classes]
            )
        order = generator.permutation(len(classes))
        ids = generator.integers(0, 256, (len(classes), ID_BYTES), np.uint8)
        arrays = {"ids": ids, "class": classes[order], "group": group[order]}
        if not self.bounded:
            arrays["source"] = self.learned["pool"].numpy()[
                arrays["group"], generator.integers(groups.POOL, size=len(ids))
            ]
            if split == "train" and self.groups != 1:  # any image of its group stands for a row
                arrays["member"] = np.full(len(ids), -1, np.int64)
                for number in np.unique(arrays["group"]):
                    mine = arrays["group"] == number
                    images = np.flatnonzero(self.learned["group"].numpy() == number)
                    arrays["member"][mine] = generator.choice(images, mine.sum())
        plan = Plan(key, arrays)
        arrays["targets"] = self._drawn_targets(plan) if "ranges" in self.learned else arrays["class"].astype(np.int64)
        return plan

    def _rows_of(self, of_class: Numbers, share: float) -> Rows:
        rows = np.full(len(of_class), self.rows) if self.rows else of_class
        return np.maximum(np.round(share * rows), 1).astype(np.int64)

    def _coordinates(self, rows: Rows, plan: Plan) -> Numbers:
        """Of each row what is drawn, (n, K), in bounded functions with the targets behind."""
        group = plan.arrays["group"][rows]
        if not self.bounded:
            moved = self.learned["public"].numpy()[plan.arrays["source"][rows]] - self.learned["source"].numpy()[group]
            maps = self.learned["map"].numpy()
            out = np.empty(moved.shape)
            for number in np.unique(group):
                out[group == number] = moved[group == number] @ maps[number].T
            return out + self.learned["centre"].numpy()[group]
        label = plan.arrays["class"][rows]
        centre, root = self.learned["centre"].numpy(), self.learned["root"].numpy()
        noise = keyed_normal(plan.secret, plan.arrays["ids"][rows], (root.shape[1],)).astype(np.float64)
        out = centre[label, group]
        for number in np.unique(label):
            out[label == number] += noise[label == number] @ root[number].T
        return out

    def _drawn_targets(self, plan: Plan) -> NDArray[np.float32]:
        ranges = self.learned["ranges"].numpy()  # (K, 2)
        drawn = self._coordinates(np.arange(len(plan.arrays["ids"])), plan)[:, -len(ranges) :]
        share = np.clip(drawn * np.sqrt(len(ranges)) / TARGET_SHARE, -1, 1)
        return (ranges.mean(1) + share * (ranges[:, 1] - ranges[:, 0]) / 2).astype(np.float32)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Drawn rows; the source is not looked at."""
        drawn = self._coordinates(rows, plan)
        if self.bounded:
            scale = self.learned["scale"].numpy()
            drawn = drawn[:, : len(scale)] / scale
        features = self.learned["mean"] + torch.from_numpy(drawn.astype(np.float32)) @ self.learned["axes"]
        out: NDArray[np.float32] = features.reshape(len(rows), *self.features.shape).numpy()
        return np.maximum(out, 0) if self.features.non_negative else out

    def contributors(self, rows: Rows, plan: Plan) -> Contributors:
        """Nobody, with one group a class; else one image of the row's group, drawn with the row."""
        if "member" not in plan.arrays:
            return Contributors.nobody()
        return Contributors(np.arange(len(rows)), plan.arrays["member"][rows], np.ones(len(rows), np.int64))


def _labels(targets: NDArray[np.int64]) -> Rows:
    """Labels of Q; all 0 where it has none, or classes too small for their covariance."""
    _, labels, counts = np.unique(targets, return_inverse=True, return_counts=True)
    return labels.astype(np.int64) if counts.mean() >= LEAST_OF_CLASS else np.zeros(len(targets), np.int64)


def _shares(count: NDArray[np.float64], mine: NDArray[np.bool_]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = count[mine] / count[mine].sum()
    return shares


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
