"""The deep poisoning function (DPF) of the paper."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.parameters import Parameter, Value
from dpf_release.poisoning.context import FitContext
from dpf_release.poisoning.interface import PoisoningFunction, State, register
from dpf_release.poisoning.plan import FeatureSpec, Plan


class _Bottleneck(nn.Module):
    """ResNet's bottleneck: 1×1 down, 3×3, 1×1 up, plus its input; the last BN scale starts at zero."""

    def __init__(self, channels: int, width: int, final_relu: bool) -> None:
        super().__init__()
        last = nn.BatchNorm2d(channels)
        nn.init.zeros_(last.weight)
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 1, bias=False),
            last,
        )
        self.final = nn.ReLU() if final_relu else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.final(features + self.residual(features))
        return out


@register("dpf")
class DeepPoisoningFunction(PoisoningFunction):
    """The paper's learned P: `depth` residual bottleneck blocks of inner `width` (default C / 4, at least 16).

    Starts as the identity: each block's last BN scale is zero. A ReLU follows an addition only where φ1's features
    are themselves the output of one; elsewhere it would cut off what φ2 needs.
    """

    learned_secret, needs_adversaries = True, True
    made_of = "Each row is the features of one image, changed by a network that was trained for it and is secret."
    parameters = (
        Parameter("depth", 4, 1, 64, "residual blocks"),
        Parameter("width", 0, 0, 65_536, "inner channels of a block; 0: a quarter of the row's, at least 16"),
    )
    depth: int
    width: int

    def __init__(self, features: FeatureSpec, **values: Value) -> None:
        super().__init__(features, **values)
        width = self.width or max(16, features.shape[0] // 4)
        blocks = [_Bottleneck(features.shape[0], width, features.non_negative) for _ in range(self.depth)]
        self.network: nn.Module = nn.Sequential(*blocks)

    def fit(self, context: FitContext) -> dict[str, float]:
        """Minimises the configured objective on S train; `val` chooses the epoch."""
        return context.fit(self.network, context.objective())

    def state(self) -> State:
        """The weights."""
        return self.network.state_dict()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights."""
        self.network.load_state_dict(dict(state))

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Rows through the network as it was fitted (evaluation mode)."""
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            features = torch.from_numpy(source.read(rows)).to(device)  # float16 where it can be: half the way
            features = features.to(torch.float32, memory_format=torch.channels_last)
            return np.asarray(self.network.eval()(features).contiguous().cpu())
