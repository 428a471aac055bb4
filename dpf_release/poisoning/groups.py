"""Without a bound: clusters of each class, and real public rows moved so that they have a cluster's moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.cluster import KMeans
from torch import Tensor

from dpf_release.bank.procedure_format import LEADING
from dpf_release.core.arrays import Rows
from dpf_release.errors import ConfigError
from dpf_release.poisoning.plan import Plan

Numbers = NDArray[np.float64]
LEAST_ROWS = 50  # of a group
CLASS_ROWS = 200  # how many rows the class's covariance counts for, beside the group's own
POOL = 2500  # public rows nearest a group's mean, that its rows are made from; all, where there are fewer
CANDIDATES = 200  # images of its class among which an attacker looks for the one that a row stands for


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Images in the components of Q."""

    z: Numbers  # (n, K)
    classes: Rows  # (n,)
    targets: Numbers  # (n, T) regression targets, of norm 1 at the most; T = 0 for classes
    units: Rows  # (n,) whose each image is, that a privacy bound protects
    outputs: int  # how many classes there are


@dataclass(frozen=True, eq=False)
class Groups:
    """Clusters of the classes of S, numbered through; exact, so that they are as secret as S."""

    public: NDArray[np.float32]  # (n, K) coordinates of Q
    pool: Rows  # (G, P) the rows of Q that a group's rows are made from
    map: NDArray[np.float32]  # (G, K, K) what gives them its covariance
    centre: NDArray[np.float32]  # (G, K) its mean
    source: NDArray[np.float32]  # (G, K) mean of its pool
    label: Rows  # (G,) its class
    count: Rows  # (G,) its images
    group: Rows  # (N,) of each image of S

    @classmethod
    def learned(cls, private: Coordinates, public: Numbers, most: int, seed: int) -> Groups:
        """At most so many groups of each class; one of more than 50 images that do not fall apart.

        Raises:
            ConfigError: a class has fewer than 50 images.
        """
        columns: dict[str, list[Any]] = {name: [] for name in ("pool", "map", "centre", "source", "label", "count")}
        group_of = np.full(len(private.z), -1, np.int64)
        for label in np.unique(private.classes).tolist():
            mine = np.flatnonzero(private.classes == label)
            if len(mine) < LEAST_ROWS:
                raise ConfigError(
                    f"expected {LEAST_ROWS} images of each class for mixture, found {len(mine)} of class {label}. "
                    "Add images, or leave the class out."
                )
            of = clusters(private.z[mine], most, seed)
            group_of[mine] = len(columns["label"]) + of
            covariance = np.cov(private.z[mine].T, bias=True)
            for group in range(int(of.max()) + 1):
                mean, within = moments(private.z[mine[of == group]], covariance)
                pool = nearest(public, mean)
                moved = transport(np.cov(public[pool].T, bias=True), within)
                values = (pool, moved, mean, public[pool].mean(0), label, int((of == group).sum()))
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
        arrays = {name: np.array(column) for name, column in columns.items()}
        arrays |= {name: arrays[name].astype(np.float32) for name in ("map", "centre", "source")}
        return cls(public=public.astype(np.float32), group=group_of, **arrays)

    def state(self) -> dict[str, Tensor]:
        """All of it."""
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Groups:
        """What `state` gave."""
        return cls(**{name: state[name].numpy() for name in cls.__dataclass_fields__})

    def linkage(self, units: Rows) -> dict[str, float]:
        """The highest chance to name the image that a row stands for, among `CANDIDATES` of its class.

        On average over the rows; for an image of the smallest group; for whoever has the largest share of a group.
        """
        of_class = np.bincount(self.label, self.count)[self.label]
        inside = np.maximum(self.count / of_class * np.minimum(CANDIDATES, of_class), 1)
        owners = max(
            float(np.unique(units[self.group == group], return_counts=True)[1].max()) / self.count[group]
            for group in range(len(self.count))
        )
        return {
            "linkage on average": float((self.count / self.count.sum() / inside).sum()),
            "linkage of an image, at most": float((1 / inside).max()),
            "of a person, at most": max(owners, float((1 / inside).max())),
        }

    def gaussians(self) -> Iterator[tuple[int, float, Numbers, Numbers]]:
        """See `Mixture.gaussians`."""
        public = self.public.astype(np.float64)
        for group, centre in enumerate(self.centre.astype(np.float64)):
            drawn = public[self.pool[group]] @ self.map[group].astype(np.float64).T
            share = self.count[group] / self.count[self.label == self.label[group]].sum()
            yield int(self.label[group]), float(share), centre, np.cov(drawn.T, bias=True)

    def class_sizes(self, generator: np.random.Generator) -> Numbers:
        """(classes,) how many rows each is to have: not its true size, one within a tenth of it (0 if it has none)."""
        sizes: Numbers = np.bincount(self.label, self.count) * generator.uniform(0.9, 1.1, self.label.max() + 1)
        return sizes

    def choose(self, classes: Rows, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """The group of each row of these classes, the row of Q that it is made from, and an image that it stands for.

        With one group a class it stands for none.
        """
        group = np.empty(len(classes), np.int64)
        for label in np.unique(classes):
            there, mine = np.flatnonzero(self.label == label), classes == label
            group[mine] = generator.choice(there, mine.sum(), p=self.count[there] / self.count[there].sum())
        return self.planned(group, generator) | self._members(group, generator)

    def planned(self, group: Rows, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        """What rows of these groups are made from."""
        return {"group": group, "source": self.pool[group, generator.integers(self.pool.shape[1], size=len(group))]}

    def _members(self, group: Rows, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
        if len(self.label) == len(np.unique(self.label)):
            return {}
        members = np.empty(len(group), np.int64)
        for number in np.unique(group):
            mine = group == number
            members[mine] = generator.choice(np.flatnonzero(self.group == number), mine.sum())
        return {"member": members}

    def of_rows(self, z: Numbers, classes: Rows, centres: Numbers) -> Rows:
        """The group that rows (n, K) of these classes would be in: of their class, the one with the nearest centre."""
        group = np.empty(len(z), np.int64)
        for label in np.unique(classes):
            there, mine = np.flatnonzero(self.label == label), classes == label
            if not len(there):
                raise ConfigError(f"mixture has no group of class {label}.")
            group[mine] = there[_squares(z[mine, :LEADING], centres[there][:, :LEADING]).argmin(1)]
        return group

    def coordinates(self, rows: Rows, plan: Plan) -> Numbers:
        """(n, K) of rows, drawn."""
        group = plan.arrays["group"][rows]
        moved = self.public[plan.arrays["source"][rows]] - self.source[group]
        out = np.empty(moved.shape)
        for number in np.unique(group):
            out[group == number] = moved[group == number] @ self.map[number].T
        return out + self.centre[group]


def clusters(rows: Numbers, count: int, seed: int) -> Rows:
    """(n,) group of each row, 0 to `count`; fewer groups where one would have fewer than 50 rows."""
    for groups in range(min(count, len(rows) // LEAST_ROWS), 1, -1):
        of = KMeans(groups, n_init=4, random_state=seed).fit_predict(rows[:, :LEADING]).astype(np.int64)
        if np.bincount(of, minlength=groups).min() >= LEAST_ROWS:
            return of
    return np.zeros(len(rows), np.int64)


def moments(rows: Numbers, of_class: Numbers) -> tuple[Numbers, Numbers]:
    """Mean (K,) and covariance (K, K) of a group's rows, the covariance shrunk towards the class's."""
    mean = rows.mean(0)
    centred = rows - mean
    return mean, (centred.T @ centred + CLASS_ROWS * of_class) / (len(rows) + CLASS_ROWS)


def nearest(public: Numbers, mean: Numbers) -> Rows:
    """The public rows that a group's are made from."""
    return np.sort(np.argsort(np.square(public - mean).sum(1), kind="stable")[:POOL])


def transport(source: Numbers, target: Numbers) -> Numbers:
    """The optimal-transport map between Gaussians of these covariances, (K, K), symmetric."""
    root = _power(source, 0.5)
    inverse = _power(source, -0.5)
    return inverse @ _power(root @ target @ root, 0.5) @ inverse


def _power(matrix: Numbers, exponent: float) -> Numbers:
    values, vectors = eigh(matrix)
    values = np.maximum(values, 1e-6 * values.max())
    power: Numbers = (vectors * values**exponent) @ vectors.T
    return power


def _squares(rows: Numbers, centres: NDArray[Any]) -> Numbers:
    """Squared distances of rows (n, K) from centres (G, K), less what is the same for all centres."""
    squares: Numbers = np.square(centres).sum(1) - 2 * rows @ centres.T
    return squares
