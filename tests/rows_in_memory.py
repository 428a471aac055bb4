"""Rows of features in memory, and poisoned as a function plans it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.rows import RowSource
from dpf_release.poisoning.chain import Chain, build_chain
from dpf_release.poisoning.interface import PoisoningFunction
from dpf_release.poisoning.plan import FeatureSpec, Plan

SECRET = bytes(32)


@dataclass(frozen=True)
class Rows:
    """Rows of features in memory."""

    features: NDArray[np.float32]
    targets: NDArray[Any]
    ids: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.features)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.features[rows]

    def __getitem__(self, rows: Any) -> Rows:
        return Rows(self.features[rows], self.targets[rows], self.ids[rows])


class Pooled(nn.Module):
    """φ2 that sees the mean of one channel, with a last layer of a kind."""

    def __init__(self, channel: int, last: nn.Module) -> None:
        super().__init__()
        self.channel, self.last = channel, last

    def forward(self, features: Tensor) -> Tensor:
        pooled = features[:, [self.channel]].mean(dim=(2, 3), keepdim=True)  # (N, 1, 1, 1)
        out: Tensor = self.last(pooled if isinstance(self.last, nn.Conv2d) else pooled.flatten(1))
        return out


PHI_2 = Pooled(0, nn.Linear(1, 2))


def rows_of(targets: Any, shape: tuple[int, int, int] = (3, 4, 4), seed: int = 0) -> Rows:
    draw = np.random.default_rng(seed)
    targets = np.asarray(targets)
    return Rows(
        draw.random((len(targets), *shape), np.float32),
        targets,
        draw.integers(0, 256, (len(targets), 16), dtype=np.uint8),
    )


def planned(spec: str, source: Rows, secret: bytes = SECRET, phi_2: nn.Module = PHI_2) -> tuple[Chain, list]:
    chain = build_chain(spec, FeatureSpec(source.features.shape[1:], True))
    return chain, chain.plan(source, phi_2, secret)


def poisoned(spec: str, source: Rows, secret: bytes = SECRET) -> NDArray[np.float32]:
    chain, plans = planned(spec, source, secret)
    return np.asarray(chain.on(source, plans).read(np.arange(len(source))))


class Recorder(PoisoningFunction):
    """Keeps in its plan the rows that it was shown."""

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        return Plan(secret, arrays={"shown": source.read(np.arange(len(source)))})

    def apply(self, rows: NDArray[np.int64], source: RowSource, plan: Plan) -> NDArray[np.float32]:
        return source.read(rows) + 1
