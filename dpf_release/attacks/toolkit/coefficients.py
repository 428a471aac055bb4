"""Of rows that were drawn in the components of Q: their coordinates there, which the last ReLU leaves almost exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpf_release.attacks.threat_models import ReleaseView, batches
from dpf_release.core.arrays import Rows
from dpf_release.poisoning.chain import build_chain, draws_rows
from dpf_release.poisoning.components import Components, principal_components
from dpf_release.poisoning.plan import FeatureSpec

KEPT = 256  # components, where the function does not say how many it has
PUBLIC_BYTES = 2**31  # of Q's features before the ReLU, in memory together
UNITS = 8192  # numbers of a row that coordinates are fitted to, where it has more
STEPS, ENOUGH = 40, 1e-5  # of conjugate gradients; the residual, as a share of the first, that ends them
NOISE = 1e-6  # of the variance that a component has: what rounding to float16 leaves of a row


@dataclass(frozen=True, eq=False)
class Space:
    """The components of φ1(Q) before its last ReLU, as anyone can compute them, and coordinates in them.

    Attributes:
        components: of Q.
        public: (n, K) coordinates of images of Q.
        units: numbers of those of a row that coordinates are fitted to.
        rectified: whether a ReLU comes after them.
    """

    components: Components
    public: Tensor
    units: Tensor
    rectified: bool

    def of_features(self, features: Tensor) -> Tensor:
        """Coordinates (n, K) of features before the ReLU (n, C, h, w): exact."""
        return self.components.of(features)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Coordinates (n, K) of rows of a bank (n, C, h, w): least squares over the units that are positive.

        Exact but for the rounding of rows where as many are positive as there are components, or more.
        """
        if not self.rectified:
            return self.of_features(rows)
        seen = rows.flatten(1).cpu()[:, self.units]
        mean, axes = self.components.mean[self.units], self.components.axes[:, self.units]
        return least_squares(seen - mean, seen > 0, axes, NOISE * self.components.variances.mean().float())

    def whitened(self, coordinates: Tensor) -> Tensor:
        """Coordinates (n, K) in deviations of Q."""
        return coordinates / self.components.variances.float().sqrt()


def least_squares(rows: Tensor, there: Tensor, axes: Tensor, ridge: float | Tensor) -> Tensor:
    """The z (n, K) that minimise Σ (row - Vᵀz)² over the units that are there, plus ridge · z², for all rows at once.

    Args:
        rows: (n, U) less their mean.
        there: (n, U) which of their units count.
        axes: V, (K, U).
        ridge: what keeps coordinates finite where few units are there.

    Returns:
        By conjugate gradients, so that no row needs a matrix of its own.
    """
    mask = there.to(rows.dtype)
    residual = (mask * rows) @ axes.T  # (n, K)
    found, direction = torch.zeros_like(residual), residual.clone()
    square = residual.square().sum(1, keepdim=True)
    first = square.clamp_min(1e-30)
    for _ in range(STEPS):
        image = (mask * (direction @ axes)) @ axes.T + ridge * direction
        step = square / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        found += step * direction
        residual -= step * image
        after = residual.square().sum(1, keepdim=True)
        if bool((after < ENOUGH**2 * first).all()):
            break
        direction = residual + after / square.clamp_min(1e-30) * direction
        square = after
    return found


def space_of(view: ReleaseView, *, after_relu: bool = False) -> Space:
    """The components that this kind of function draws in; kept for all banks of this φ1 and Q.

    Args:
        view: what an attacker holds; of the function its name alone is looked at.
        after_relu: of features as they are released.
    """
    count = min(len(view.public), max(8, PUBLIC_BYTES // (2 * int(np.prod(view.feature_shape)))))
    kept = max(2, min(_kept(view), count // 4))
    name = f"A13 components, {kept} of {count}" + ", after the ReLU" * after_relu
    tensors = view.kept.load(name, view.subject)
    if tensors is None:
        tensors = _computed(view, count, kept, after_relu)
        view.kept.save(name, view.subject, tensors)
    components = Components(tensors["mean"], tensors["axes"], tensors["variances"])
    size = len(components.mean)
    units = np.random.default_rng([view.seed, 13]).permutation(size)[: max(UNITS, 8 * kept)]
    rectified = view.before_relu is not None and not after_relu
    return Space(components, tensors["public"], torch.from_numpy(np.sort(units)), rectified)


def _kept(view: ReleaseView) -> int:
    if not draws_rows(view.function):
        return KEPT
    chain = build_chain(view.function, FeatureSpec(view.feature_shape, view.non_negative))
    return int(getattr(chain.stages[0], "components", KEPT))


def _computed(view: ReleaseView, count: int, kept: int, after_relu: bool) -> dict[str, Tensor]:
    features = np.empty((count, *view.feature_shape), np.float16)  # as banks keep them
    for some in batches(np.arange(count)):
        if after_relu:
            features[some] = view.features_of(view.public, some).cpu().numpy()
        else:
            features[some] = view.features_before_relu(view.public.read(some)).cpu().numpy()

    def read(rows: Rows) -> np.ndarray:
        return features[rows]

    found = principal_components(read, count, int(np.prod(view.feature_shape)), kept)
    public = torch.from_numpy(found.coordinates(read, count)).float()
    return {"mean": found.mean, "axes": found.axes, "variances": found.variances, "public": public}
