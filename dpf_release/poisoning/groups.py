"""Without a bound: clusters of each class, and real public rows moved so that they have a cluster's moments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.cluster import KMeans

from dpf_release.core.arrays import Rows

Numbers = NDArray[np.float64]
LEADING = 64  # components that clusters are found in
LEAST_ROWS = 50  # of a group
CLASS_ROWS = 200  # how many rows the class's covariance counts for, beside the group's own
POOL = 2500  # public rows nearest a group's mean, that its rows are made from


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
