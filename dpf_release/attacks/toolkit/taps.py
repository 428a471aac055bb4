"""φ2 cut open: what its blocks make of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from dpf_release.attacks.threat_models import ReleaseView
from dpf_release.errors import HookError
from dpf_release.models.tracing import Trace, trace_network

MOST = 4  # taps
WIDEST = 256  # channels of a tap that a decoder sees; of a wider one, as many principal ones
STATISTICS = 1024  # pictures of Q that channels are standardised by
LEAST_DEVIATION = 1e-3  # of a channel, in shares of its tap's; below it a channel is dead, and is not blown up


@dataclass(frozen=True, eq=False)
class Taps:
    """Blocks of φ2, the first first."""

    names: tuple[str, ...]  # of where the taps are, as φ2's graph calls them
    cut: Callable[[Tensor], tuple[Tensor, ...]]  # rows (n, C, H', W') → φ2[:k] of them for each tap, (n, C_k, h_k, w_k)

    def __len__(self) -> int:
        return len(self.names)

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows → what each tap makes of them, float32, without gradients."""
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            return tuple(tap.float() for tap in self.cut(rows))


def open_taps(view: ReleaseView, most: int = MOST) -> Taps:
    """Up to `most` places of φ2 where all that goes on goes through one feature map, spread evenly over its depth.

    Such places are the outputs of residual blocks, or of layers that nothing goes past; of a network of any make. The
    first is behind the first weights after the hook, the last before the maps are pooled away. A φ2 without feature
    maps of its own has one tap, its outputs (n, K, 1, 1).
    """
    try:
        trace = trace_network(view.phi_2)
    except HookError:
        trace = Trace(view.phi_2, _InOrder().trace(view.phi_2), {})
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
    return Taps(("outputs",), lambda rows: (view.phi_2(rows)[:, :, None, None],))


def standard(view: ReleaseView, taps: Taps) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Brings each tap's channels to mean 0 and deviation 1 on 1024 pictures of Q, of a wide tap its 256 principal ones.

    Returns:
        (n, C_k, h_k, w_k) for each tap → (n, K, h_k, w_k), K at most 256.
    """
    sums: list[Tensor] = []
    squares: list[Tensor] = []
    counts: list[int] = []
    for features in view.public_features(STATISTICS):
        flat = [tap.movedim(1, -1).flatten(0, -2).double() for tap in taps.of(features)]
        if not sums:
            sums, squares, counts = [0 * f[0] for f in flat], [0 * (f[:1].T @ f[:1]) for f in flat], [0] * len(flat)
        for number, values in enumerate(flat):  # (n h w, C)
            sums[number] += values.sum(0)
            squares[number] += values.T @ values
            counts[number] += len(values)
    maps = []
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
        maps.append((weight.float()[:, :, None, None], -(weight @ mean).float()))
    return lambda taps: tuple(nn.functional.conv2d(tap, *of_tap) for tap, of_tap in zip(taps, maps, strict=True))


def together(taps: Sequence[Tensor]) -> Tensor:
    """All taps at the size of the first, one behind the other: (n, ΣK, h_1, w_1)."""
    size = taps[0].shape[-2:]
    same = [tap if tap.shape[-2:] == size else nn.functional.interpolate(tap, size, mode="bilinear") for tap in taps]
    return torch.cat(same, dim=1).contiguous(memory_format=torch.channels_last)


class _InOrder(fx.Tracer):
    """Follows sequences only: what is in them stays whole, so that it need not be traceable."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).forward is not nn.Sequential.forward


def _places(trace: Trace, rows: Tensor) -> list[fx.Node]:
    """One node for each depth (count of weights passed): of those with the finest map, the last."""
    phi_2, graph, shapes = trace.network, trace.graph, trace.shapes(rows)
    order = {node: number for number, node in enumerate(graph.nodes)}
    last_use = {node: max((order[user] for user in node.users), default=-1) for node in graph.nodes}
    best: dict[int, fx.Node] = {}
    live: set[fx.Node] = set()
    depth = 0
    for node in graph.nodes:
        if node.op == "call_module":  # a convolution or the like has weights; a BatchNorm has none
            depth += any(weights.ndim > 1 for weights in phi_2.get_submodule(str(node.target)).parameters())
        if node.op != "get_attr":
            live.add(node)
        live = {other for other in live if last_use[other] > order[node]}
        shape = shapes.get(node, torch.Size())
        if depth == 0 or live != {node} or len(shape) != 4 or math.prod(shape[2:]) < 2:
            continue
        if depth not in best or math.prod(shape[2:]) >= math.prod(shapes[best[depth]][2:]):
            best[depth] = node
    return list(best.values())
