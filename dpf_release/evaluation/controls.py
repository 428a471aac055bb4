"""Weak poisoning functions that an attack must break, so that its failure elsewhere means something."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.poisoning.chain import Chain
from dpf_release.poisoning.interface import PoisoningFunction, as_tensor
from dpf_release.poisoning.plan import FeatureSpec, Plan
from dpf_release.poisoning.recombine import Recombine
from dpf_release.poisoning.stationary import GaussianNoise, Identity


class _Fixed(PoisoningFunction):
    """Draws its numbers from the plan's secret."""

    def generator(self, plan: Plan) -> np.random.Generator:
        return np.random.default_rng(list(plan.secret))


class ChannelAffine(_Fixed):
    """Each channel times 0.5 to 2, plus up to one unit."""

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The rows, scaled and shifted."""
        generator, shape = self.generator(plan), (self.features.shape[0], 1, 1)
        scale, shift = 2 ** generator.uniform(-1, 1, shape), generator.uniform(0, 1, shape)
        out: NDArray[np.float32] = (source.read(rows) * scale + shift).astype(np.float32)
        return out


class ChannelPermutation(_Fixed):
    """The channels in another order."""

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The rows, their channels reordered."""
        order = self.generator(plan).permutation(self.features.shape[0])
        return source.read(rows)[:, order].astype(np.float32)


class RandomConvolution(_Fixed):
    """A random rotation of the channels, the same at each place: a 1×1 convolution."""

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The rows, their channels rotated."""
        channels = self.features.shape[0]
        rotation, _ = np.linalg.qr(self.generator(plan).standard_normal((channels, channels)))
        out: NDArray[np.float32] = np.einsum("kc,nchw->nkhw", rotation, source.read(rows)).astype(np.float32)
        return out


class Member(PoisoningFunction):
    """A network of the attacker's own, as P: one of those that he learned by."""

    def __init__(self, features: FeatureSpec, network: nn.Module) -> None:
        super().__init__(features)
        self._attackers = network

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The rows through the network."""
        device = next((parameter.device for parameter in self._attackers.parameters()), torch.device("cpu"))
        with torch.inference_mode():
            out: NDArray[np.float32] = self._attackers(as_tensor(source.read(rows)).to(device)).float().cpu().numpy()
        return out


def planted(name: str, features: FeatureSpec) -> Chain:
    """The planted function of a name."""
    stages: dict[str, PoisoningFunction] = {
        "clean": Identity(features),
        "weak-noise": GaussianNoise(features, scale=0.1),
        "channel-affine": ChannelAffine(features),
        "channel-permutation": ChannelPermutation(features),
        "random-convolution": RandomConvolution(features),
        "recombine-2": Recombine(features, k=2),
    }
    return Chain(name, (stages[name],))
