"""Rows put together from pieces of several rows of a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.errors import ConfigError
from dpf_release.models.functions.interface import (
    FeatureSpec,
    Plan,
    PoisoningFunction,
    Rows,
    RowSource,
    as_tensor,
    register,
    whole,
)


@register("recombine")
class Recombine(PoisoningFunction):
    """Puts each row together from pieces of its group: every `patch`×`patch` window from a random member.

    Groups are a partition of each class into sets of at least `k` rows that φ2 sees alike (nearest in the input of its
    last linear layer); what remains of a class joins its last group. For regression, about `bins` quantile bins of the
    targets are the classes. This is fixed-size microaggregation, with pieces in the place of means. Planning costs
    O(n²/k) a class.
    """

    mixes_rows = True

    def __init__(self, features: FeatureSpec, k: int = 5, patch: int = 2, bins: int = 10) -> None:
        super().__init__(features)
        self.k = whole("recombine:k", k, 2, 10_000)
        self.patch = whole("recombine:patch", patch, 1, max(features.shape[1:]))
        self.bins = whole("recombine:bins", bins, 1, 1000)

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """Groups, and for each piece of each row the member it comes from.

        Raises:
            ConfigError: a class has fewer than `k` rows.
        """
        if not len(source):
            return Plan(secret, np.empty((0, self._pieces), np.int64), {"group": np.empty(0, np.int64)})
        generator = np.random.default_rng(list(secret))
        seen = _seen_by_classifier(source, phi_2)
        classes = _target_bins(source.targets, self.bins)
        names, counts = np.unique(classes, return_counts=True)
        if counts.min() < self.k:
            small = ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True) if count < self.k)
            kind = "class" if source.targets.ndim == 1 else "target bin"
            raise ConfigError(
                f"recombine expects at least k = {self.k} rows of each class in each split, found fewer in {kind} "
                f"{small}. Lower k (for regression, or bins), add images, or make that split larger."
            )
        group_of = np.empty(len(source), np.int64)
        groups: list[Rows] = []
        for name in names:
            for group in _microaggregate(np.flatnonzero(classes == name), seen, self.k, generator):
                group_of[group] = len(groups)
                groups.append(group)
        pieces = np.empty((len(source), self._pieces), np.int64)
        for group in groups:
            pieces[group] = generator.choice(group, size=(len(group), self._pieces))
        return Plan(secret, pieces, {"group": group_of})

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Recombined rows."""
        assert plan.pieces is not None
        members, where = np.unique(plan.pieces[rows], return_inverse=True)
        where = where.reshape(len(rows), self._pieces)
        read = source.read(members).astype(np.float32)  # (members, C, H, W)
        channels, height, width = self.features.shape
        out = np.empty((len(rows), channels, height, width), np.float32)
        corners = [(y, x) for y in range(0, height, self.patch) for x in range(0, width, self.patch)]
        for piece, (y, x) in enumerate(corners):
            window = (slice(None), slice(y, y + self.patch), slice(x, x + self.patch))
            out[(slice(None), *window)] = read[(where[:, piece], *window)]
        return out

    @property
    def _pieces(self) -> int:
        _, height, width = self.features.shape
        return -(-height // self.patch) * -(-width // self.patch)


def _seen_by_classifier(source: RowSource, phi_2: nn.Module, batch: int = 256) -> NDArray[np.float32]:
    """What φ2 makes of each row, (N, D): the input of its last linear layer, or its answer where it has none."""
    linear = [module for module in phi_2.modules() if isinstance(module, nn.Linear)]
    caught: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])) if linear else None
    device = next((parameter.device for parameter in phi_2.parameters()), torch.device("cpu"))
    parts = []
    try:
        with torch.inference_mode():
            for start in range(0, len(source), batch):
                rows = np.arange(start, min(start + batch, len(source)))
                answer = phi_2(as_tensor(source.read(rows)).to(device))
                parts.append((caught.pop() if linear else answer).flatten(1).float().cpu().numpy())
    finally:
        if hook is not None:
            hook.remove()
    return np.concatenate(parts)


def _target_bins(targets: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """Class of each row: the label, or for regression the joint quantile bin of its targets."""
    if targets.ndim == 1:
        return targets.astype(np.int64)
    each = max(1, round(bins ** (1 / targets.shape[1])))  # about `bins` classes in all, whatever K
    classes = np.zeros(len(targets), np.int64)
    for column in targets.T:
        edges = np.quantile(column, np.linspace(0, 1, each + 1)[1:-1])
        classes = classes * each + np.searchsorted(edges, column, side="right")
    return classes


def _microaggregate(rows: Rows, seen: NDArray[np.float32], k: int, generator: np.random.Generator) -> list[Rows]:
    """A partition of `rows` into groups of k alike; what is left over joins the last."""
    groups = []
    while len(rows) >= 2 * k:
        centre = seen[generator.choice(rows)]
        nearest = np.argpartition(np.square(seen[rows] - centre).sum(axis=1), k - 1)[:k]
        groups.append(rows[nearest])
        rows = np.delete(rows, nearest)
    return [*groups, rows]
