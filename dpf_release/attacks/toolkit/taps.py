"""φ2 cut open: what its blocks make of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from dpf_release.attacks.threat_models import ReleaseView, batches
from dpf_release.errors import HookError
from dpf_release.models.tracing import Trace, trace_network

MOST = 4  # taps
WIDEST = 256  # channels of a tap that a decoder sees; of a wider one, as many principal ones
STATISTICS = 1024  # pictures of Q that channels are standardised by
LEAST_DEVIATION = 1e-3  # of a channel, in shares of its tap's; below it a channel is dead, and is not blown up


@dataclass(frozen=True, eq=False)
class Taps:
    """Blocks of φ2, the first first.

    Attributes:
        names: of where the taps are, as φ2's graph calls them.
        cut: rows (n, C, H', W') → φ2[:k] of them for each tap, (n, C_k, h_k, w_k).
    """

    names: tuple[str, ...]
    cut: nn.Module

    def __len__(self) -> int:
        return len(self.names)

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows → what each tap makes of them, float32, without gradients."""
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            return tuple(tap.float() for tap in self.cut(rows))


@dataclass(frozen=True, eq=False)
class Standard:
    """Brings each tap's channels to mean 0 and deviation 1 on Q, of a wide tap its 256 principal ones.

    Attributes:
        weights: (K, C_k, 1, 1) for each tap.
        shifts: (K,) for each tap.
    """

    weights: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]

    def __call__(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(n, C_k, h_k, w_k) → (n, K, h_k, w_k), K at most 256."""
        both = zip(taps, self.weights, self.shifts, strict=True)
        return tuple(nn.functional.conv2d(tap, weight, shift) for tap, weight, shift in both)


def open_taps(view: ReleaseView, most: int = MOST) -> Taps:
    """Up to `most` places of φ2 where all that goes on goes through one feature map, spread evenly over its depth.

    Such places are the outputs of residual blocks, or of layers that nothing goes past; of a network of any make. The
    first is behind the first weights after the hook, the last before the maps are pooled away. A φ2 without feature
    maps of its own has one tap, its outputs (n, K, 1, 1).
    """
    trace = _trace(view.phi_2)
    places = _places(trace, view.rows(view.asked[:2]))
    if not places:
        return answers_alone(view)
    chosen = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, most).round().astype(int))]
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in trace.graph.nodes:
        copies[node] = part.node_copy(node, copies.__getitem__)
        if node is chosen[-1]:
            break
    part.output(tuple(copies[node] for node in chosen))
    return Taps(tuple(node.name for node in chosen), fx.GraphModule(view.phi_2, part, "Taps"))


def answers_alone(view: ReleaseView) -> Taps:
    """One tap: φ2's outputs, (n, K, 1, 1)."""
    return Taps(("outputs",), _Outputs(view.phi_2))


def standard(view: ReleaseView, taps: Taps) -> Standard:
    """The statistics of taps on at most 1024 pictures of Q."""
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    counts: list[int] = []
    for chosen in batches(np.arange(min(len(view.public), STATISTICS))):
        flat = [tap.movedim(1, -1).flatten(0, -2).double() for tap in taps.of(view.features_of(view.public, chosen))]
        if not sums:
            sums, squares, counts = [0 * f[0] for f in flat], [0 * (f[:1].T @ f[:1]) for f in flat], [0] * len(flat)
        for number, values in enumerate(flat):  # (n h w, C)
            sums[number] += values.sum(0)
            squares[number] += values.T @ values
            counts[number] += len(values)
    weights, shifts = [], []
    for total, square, count in zip(sums, squares, counts, strict=True):
        mean = total / count
        covariance = square / count - mean[:, None] * mean
        if len(mean) > WIDEST:
            variances, directions = torch.linalg.eigh(covariance)  # ascending
            variances, directions = variances[-WIDEST:], directions[:, -WIDEST:].T
        else:
            variances, directions = covariance.diagonal(), torch.eye(len(mean)).to(covariance)
        least = LEAST_DEVIATION * covariance.diagonal().mean().clamp_min(0).sqrt().clamp_min(1e-12)
        weight = directions / variances.clamp_min(0).sqrt().clamp_min(least)[:, None]  # (K, C)
        weights.append(weight.float()[:, :, None, None])
        shifts.append(-(weight @ mean).float())
    return Standard(tuple(weights), tuple(shifts))


def together(taps: Sequence[Tensor]) -> Tensor:
    """All taps at the size of the first, one behind the other: (n, ΣK, h_1, w_1)."""
    size = taps[0].shape[-2:]
    same = [tap if tap.shape[-2:] == size else nn.functional.interpolate(tap, size, mode="bilinear") for tap in taps]
    return torch.cat(same, dim=1).contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------- places


class _Outputs(nn.Module):
    """What φ2 answers, as the one tap of a φ2 that has no other."""

    def __init__(self, phi_2: nn.Module) -> None:
        super().__init__()
        self.phi_2 = phi_2

    def forward(self, rows: Tensor) -> tuple[Tensor]:
        """(n, C, H', W') → ((n, K, 1, 1),)."""
        return (self.phi_2(rows)[:, :, None, None],)


class _InOrder(fx.Tracer):
    """Follows sequences only: what is in them stays whole, so that it need not be traceable."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).forward is not nn.Sequential.forward


def _trace(phi_2: nn.Module) -> Trace:
    try:
        return trace_network(phi_2)
    except HookError:
        return Trace(phi_2, _InOrder().trace(phi_2), {})


def _places(trace: Trace, rows: Tensor) -> list[fx.Node]:
    """One node for each depth (count of weights passed): of those with the finest map, the last."""
    phi_2, graph, shapes = trace.network, trace.graph, trace.shapes(rows)
    order = {node: number for number, node in enumerate(graph.nodes)}
    last_use = {node: max((order[user] for user in node.users), default=-1) for node in graph.nodes}
    best: dict[int, fx.Node] = {}
    live: set[fx.Node] = set()
    depth = 0
    for node in graph.nodes:
        depth += _has_weights(phi_2, node)
        if node.op != "get_attr":
            live.add(node)
        live = {other for other in live if last_use[other] > order[node]}
        shape = shapes.get(node, torch.Size())
        if depth == 0 or live != {node} or len(shape) != 4 or math.prod(shape[2:]) < 2:
            continue
        if depth not in best or math.prod(shape[2:]) >= math.prod(shapes[best[depth]][2:]):
            best[depth] = node
    return list(best.values())


def _has_weights(phi_2: nn.Module, node: fx.Node) -> bool:
    """Whether it is a convolution or the like; a BatchNorm is none."""
    if node.op != "call_module":
        return False
    return any(parameter.ndim > 1 for parameter in phi_2.get_submodule(str(node.target)).parameters())
