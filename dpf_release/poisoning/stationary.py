"""The stationary functions of the paper (SPF), and the identity."""

from __future__ import annotations

import hashlib

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torchvision.transforms.functional import gaussian_blur

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.parameters import Parameter, Value
from dpf_release.errors import ConfigError
from dpf_release.poisoning.interface import PoisoningFunction, as_tensor, register
from dpf_release.poisoning.plan import FeatureSpec, Plan


@register("identity")
class Identity(PoisoningFunction):
    """Leaves every row as it is: the control. `package` refuses it."""

    poisons = False
    uses_classifier = False

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The rows themselves."""
        return source.read(rows).astype(np.float32)


@register("gaussian-noise")
class GaussianNoise(PoisoningFunction):
    """Adds Gaussian noise of `scale` standard deviations of the row (the paper's GN; it states no scale).

    The noise of a row is keyed by (secret, id): it stays the same when other rows come or go.
    """

    uses_classifier = False
    made_of = "Each row is the features of one image, with random noise added."
    parameters = (Parameter("scale", 1.0, 0.0, 1e3, "standard deviations of the row that are added"),)
    scale: float

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Rows plus their noise."""
        clean = source.read(rows).astype(np.float32)
        noise = keyed_normal(plan.secret, source.ids[rows], self.features.shape)
        return np.asarray(clean + self.scale * clean.std(axis=(1, 2, 3), keepdims=True) * noise)


class _Filter(PoisoningFunction):
    """What the filters have in common: a window of `size` feature pixels."""

    uses_classifier = False
    made_of = "Each row is the features of one image, blurred."
    size: int

    def __init__(self, features: FeatureSpec, **values: Value) -> None:
        super().__init__(features, **values)
        largest = 2 * min(features.shape[1:]) - 1  # mirrored borders are as wide as the map, less one, at the most
        if self.size % 2 != 1 or self.size > largest:
            expected = f"expected {self.name}:size odd, from 1 to {largest} for features {features.shape}"
            raise ConfigError(f"{expected}, found {self.size:g}.")


@register("gaussian-filter")
class GaussianFilter(_Filter):
    """Blurs each channel with a Gaussian of `sigma` feature pixels, `size` taps wide (the paper's GF)."""

    parameters = (
        Parameter("sigma", 1.0, 1e-3, 1e3, "width of the Gaussian in feature pixels"),
        Parameter("size", 5, 1, 1e6, "taps of the Gaussian, an odd number"),
    )
    sigma: float

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Blurred rows."""
        blurred = gaussian_blur(as_tensor(source.read(rows)), [self.size] * 2, [self.sigma] * 2)
        return np.asarray(blurred)


@register("mean-filter")
class MeanFilter(_Filter):
    """Replaces each feature by the mean of the `size`×`size` window around it (the paper's MF)."""

    parameters = (Parameter("size", 3, 1, 1e6, "side of the window, an odd number of feature pixels"),)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Averaged rows."""
        windows = F.avg_pool2d(as_tensor(source.read(rows)), self.size, 1, self.size // 2, count_include_pad=False)
        return np.asarray(windows)


def keyed_normal(secret: bytes, ids: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal numbers of that shape for each id, (n, *shape), which follow from the secret and it alone."""
    noise = np.empty((len(ids), *shape), np.float32)
    for place, row_id in enumerate(ids):
        key = int.from_bytes(hashlib.sha256(secret + row_id.tobytes()).digest()[:16])
        noise[place] = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
    return noise
