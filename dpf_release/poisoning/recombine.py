"""Rows put together from pieces of several rows of a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.parameters import Parameter, Value
from dpf_release.errors import ConfigError
from dpf_release.poisoning.interface import PoisoningFunction, as_tensor, register
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan


@register("recombine")
class Recombine(PoisoningFunction):
    """Puts each row together from pieces of its group: every `patch`×`patch` window from a random member.

    Groups are a partition of each class into sets of at least `k` rows that φ2 sees alike (nearest in the input of its
    last linear layer); what remains of a class joins its last group. For regression, about `bins` quantile bins of the
    targets are the classes. This is fixed-size microaggregation, with pieces in the place of means. Planning costs
    O(n²/k) a class.
    """

    mixes_rows = True
    made_of = "Each row is put together from pieces of the features of {k} or more images of its class."
    parameters = (
        Parameter("k", 5, 2, 10_000, "rows of a group at the least"),
        Parameter("patch", 2, 1, 1e6, "side of a piece in feature pixels"),
        Parameter("bins", 10, 1, 1000, "classes that regression targets are cut into"),
    )
    k: int
    patch: int
    bins: int

    def __init__(self, features: FeatureSpec, **values: Value) -> None:
        super().__init__(features, **values)
        largest = max(features.shape[1:])
        if self.patch > largest:
            raise ConfigError(f"expected recombine:patch from 1 to {largest}, found {self.patch}.")

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """Groups, and for each piece of each row the member it comes from.

        Raises:
            ConfigError: a class has fewer than `k` rows.
        """
        generator = np.random.default_rng(list(secret))
        rows = np.arange(len(source))
        seen = _seen_by_classifier(source, phi_2, rows) if len(rows) else np.empty((0, 0), np.float32)
        classes = target_bins(source.targets, self.bins)
        advice = ". Lower k (for regression, or bins), add images, or make that split larger."
        refuse_small_classes("recombine", self.k, classes, source, "in each split", advice)
        group_of = np.empty(len(source), np.int64)
        groups: list[Rows] = []
        for name in np.unique(classes):
            for group in _microaggregate(np.flatnonzero(classes == name), seen, self.k, generator):
                group_of[group] = len(groups)
                groups.append(group)
        pieces = np.empty((len(source), self._pieces), np.int64)
        for group in groups:
            pieces[group] = generator.choice(group, size=(len(group), self._pieces))
        return Plan(secret, {"pieces": pieces, "class": classes, "group": group_of})

    def drop_rows(
        self, plan: Plan, kept: Rows, source: RowSource, phi_2: nn.Module, secret: bytes
    ) -> tuple[Plan, Rows]:
        """Rows with a piece of one that has gone are drawn anew from what is left of their group, all their pieces.

        All: were only those replaced, the difference of two versions would be the pieces of the row that has gone.
        A group with fewer than `k` rows left joins the one of its class that φ2 sees nearest.

        Raises:
            ConfigError: a class has some rows left, but fewer than `k`.
        """
        number = np.full(len(plan.arrays["pieces"]), -1, np.int64)  # of a row that is left
        number[kept] = np.arange(len(kept))
        classes = plan.arrays["class"][kept]
        advice = ". Retract the others of it in that split too; or fit another function."
        refuse_small_classes("recombine", self.k, classes, source, "that does not go as a whole", advice)
        pieces = number[plan.arrays["pieces"][kept]]  # (rows left, pieces)
        rebuilt = np.flatnonzero((pieces < 0).any(axis=1))
        group_of = _refill(plan.arrays["group"][kept], classes, source, phi_2, self.k)
        generator = np.random.default_rng(list(secret))
        for group in np.unique(group_of[rebuilt]):
            rows = rebuilt[group_of[rebuilt] == group]
            pieces[rows] = generator.choice(np.flatnonzero(group_of == group), size=(len(rows), self._pieces))
        return Plan(plan.secret, {"pieces": pieces, "class": classes, "group": group_of}), rebuilt

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Recombined rows."""
        members, where = np.unique(plan.arrays["pieces"][rows], return_inverse=True)
        where = where.reshape(len(rows), self._pieces)
        read = source.read(members).astype(np.float32)  # (members, C, H, W)
        channels, height, width = self.features.shape
        out = np.empty((len(rows), channels, height, width), np.float32)
        corners = [(y, x) for y in range(0, height, self.patch) for x in range(0, width, self.patch)]
        for piece, (y, x) in enumerate(corners):
            window = (slice(None), slice(y, y + self.patch), slice(x, x + self.patch))
            out[(slice(None), *window)] = read[(where[:, piece], *window)]
        return out

    def contributors(self, rows: Rows, plan: Plan) -> Contributors:
        """Those of the group that a piece came from, with how many of them did."""
        chosen = plan.arrays["pieces"][rows]  # (n, pieces)
        total = int(chosen.max(initial=0)) + 1
        keys, counts = np.unique(np.arange(len(rows))[:, None] * total + chosen, return_counts=True)
        return Contributors(keys // total, keys % total, counts.astype(np.int64))

    @property
    def _pieces(self) -> int:
        _, height, width = self.features.shape
        return -(-height // self.patch) * -(-width // self.patch)


def _seen_by_classifier(source: RowSource, phi_2: nn.Module, rows: Rows, batch: int = 256) -> NDArray[np.float32]:
    """What φ2 makes of rows, (n, D): the input of its last linear layer, or its answer where it has none."""
    linear = [module for module in phi_2.modules() if isinstance(module, nn.Linear)]
    caught: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])) if linear else None
    device = next((parameter.device for parameter in phi_2.parameters()), torch.device("cpu"))
    parts = []
    try:
        with torch.inference_mode():
            for start in range(0, len(rows), batch):
                answer = phi_2(as_tensor(source.read(rows[start : start + batch])).to(device))
                parts.append((caught.pop() if linear else answer).flatten(1).float().cpu().numpy())
    finally:
        if hook is not None:
            hook.remove()
    return np.concatenate(parts)


def refuse_small_classes(name: str, k: int, classes: Rows, source: RowSource, which: str, advice: str) -> None:
    """Raises ConfigError, with the function's advice, where a class of these rows has fewer than `k`."""
    values, counts = np.unique(classes, return_counts=True)
    small = [f"{value}: {count}" for value, count in zip(values, counts, strict=True) if count < k]
    if small:
        kind = "class" if source.targets.ndim == 1 else "target bin"
        raise ConfigError(
            f"{name} expects at least k = {k} rows of each class {which}, found fewer in {kind} "
            f"{', '.join(small)}{advice}"
        )


def target_bins(targets: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """Class of each row: the label, or for regression the joint quantile bin of its targets."""
    if targets.ndim == 1:
        return targets.astype(np.int64)
    each = max(1, round(bins ** (1 / targets.shape[1])))  # about `bins` classes in all, whatever K
    classes = np.zeros(len(targets), np.int64)
    for column in targets.T if len(targets) else ():
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


def _refill(group_of: Rows, classes: Rows, source: RowSource, phi_2: nn.Module, k: int) -> Rows:
    """Groups of k rows or more again: one that has fewer joins the nearest of its class, seen by φ2 and on average."""
    group_of = group_of.copy()
    groups, counts = np.unique(group_of, return_counts=True)
    for name in np.unique(classes[np.isin(group_of, groups[counts < k])]):
        rows = np.flatnonzero(classes == name)
        seen = _seen_by_classifier(source, phi_2, rows)
        while True:
            groups, counts = np.unique(group_of[rows], return_counts=True)
            if counts.min() >= k:
                break
            means = np.stack([seen[group_of[rows] == group].mean(axis=0) for group in groups])  # (groups, D)
            short = int(counts.argmin())
            distances = np.square(means - means[short]).sum(axis=1)
            distances[short] = np.inf
            group_of[rows[group_of[rows] == groups[short]]] = groups[distances.argmin()]
    return group_of
