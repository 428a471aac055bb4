"""Poisoning functions P: features → features of the same shape, by name, alone or in a chain.

A function first makes a *plan* for a bank (which rows it draws on, from the vault's secret), then is *applied* to
rows by number. Row-wise functions have an empty plan. `FUNCTIONS` is the registry; a function of your own is named
`package.module.Class` in `dpf.toml`, or registered with `@register("name")`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from dpf_release.errors import ConfigError

Rows = NDArray[np.int64]


class RowSource(Protocol):
    """Rows of features with their targets and ids: a bank, or a bank seen through a poisoning function."""

    @property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes."""

    @property
    def targets(self) -> NDArray[Any]:
        """(N,) class indices or (N, K) regression targets."""

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> NDArray[Any]:
        """Rows by number, (n, C, H, W), any float type."""


@dataclass(frozen=True)
class FeatureSpec:
    """What a function is built for.

    Attributes:
        shape: (C, H, W) of a row.
        non_negative: whether φ1 ends in a ReLU, so that P must too.
    """

    shape: tuple[int, int, int]
    non_negative: bool


@dataclass(frozen=True)
class Plan:
    """What one function drew for one bank, before any row was poisoned.

    Attributes:
        arrays: named numbers, persisted in the vault; empty for a row-wise function without randomness.
        pieces: (N, pieces) row numbers, which row each piece of a row comes from; `None`: all from the row itself.
        secret: 32 bytes, what noise is keyed by.
    """

    secret: bytes
    pieces: Rows | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def contributors(self, rows: Rows) -> tuple[Rows, Rows]:
        """Every (position in `rows`, contributing row) pair, once, ordered by position."""
        if self.pieces is None:
            return np.arange(len(rows)), rows
        pairs = [np.unique(self.pieces[row]) for row in rows]
        positions = np.repeat(np.arange(len(rows)), [len(members) for members in pairs])
        return positions, np.concatenate(pairs) if pairs else np.empty(0, np.int64)


class PoisoningFunction:
    """The interface: one stage of P.

    Attributes:
        network: what training fits, for a learned function; otherwise `None`.
        mixes_rows: whether a row comes out as another picture, put together from several rows.
        poisons: whether it changes anything; `package` refuses a bank that no stage poisoned.
    """

    mixes_rows: ClassVar[bool] = False
    poisons: ClassVar[bool] = True
    network: nn.Module | None = None

    def __init__(self, features: FeatureSpec) -> None:
        self.features = features

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """Draws what `apply` needs for this source; by default nothing but the secret itself."""
        return Plan(secret)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The poisoned rows, (n, C, H, W)."""
        raise NotImplementedError


@dataclass(frozen=True)
class PoisonedRows:
    """A row source seen through one planned function; nested, a chain."""

    source: RowSource
    function: PoisoningFunction
    plan: Plan

    @property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes, those of the source."""
        return self.source.ids

    @property
    def targets(self) -> NDArray[Any]:
        """Those of the source: a recombined row keeps its own target."""
        return self.source.targets

    def __len__(self) -> int:
        return len(self.source)

    def read(self, rows: Rows) -> NDArray[np.float32]:
        """Poisoned rows by number, (n, C, H, W)."""
        return self.function.apply(rows, self.source, self.plan)


# --------------------------------------------------------------------------------------------- the registry

FUNCTIONS: dict[str, type[PoisoningFunction]] = {}


def register(name: str) -> Callable[[type[PoisoningFunction]], type[PoisoningFunction]]:
    """Class decorator: makes a poisoning function known under a name (letters, digits, '-')."""

    def keep(cls: type[PoisoningFunction]) -> type[PoisoningFunction]:
        FUNCTIONS[name] = cls
        return cls

    return keep


@register("identity")
class Identity(PoisoningFunction):
    """Leaves every row as it is: the control. `package` refuses it."""

    poisons = False

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The rows themselves."""
        return source.read(rows).astype(np.float32)


@register("gaussian-noise")
class GaussianNoise(PoisoningFunction):
    """Adds Gaussian noise of `scale` standard deviations of the row (the paper's GN; it states no scale).

    The noise of a row is keyed by (secret, id): it stays the same when other rows come or go.
    """

    def __init__(self, features: FeatureSpec, scale: float = 1.0) -> None:
        super().__init__(features)
        self.scale = _bounded("gaussian-noise:scale", scale, 0.0, 1e3)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Rows plus their noise."""
        clean = source.read(rows).astype(np.float32)
        noise = np.stack([_normal(plan.secret, source.ids[row], self.features.shape) for row in rows])
        noised: NDArray[np.float32] = clean + self.scale * clean.std(axis=(1, 2, 3), keepdims=True) * noise
        return noised


@register("gaussian-filter")
class GaussianFilter(PoisoningFunction):
    """Blurs each channel with a Gaussian of `sigma` feature pixels, `size` taps wide (the paper's GF)."""

    def __init__(self, features: FeatureSpec, sigma: float = 1.0, size: int = 5) -> None:
        super().__init__(features)
        self.sigma = _bounded("gaussian-filter:sigma", sigma, 1e-3, 1e3)
        self.size = _window("gaussian-filter:size", size, features)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Blurred rows."""
        blurred: NDArray[np.float32] = gaussian_blur(
            _tensor(source.read(rows)), [self.size] * 2, [self.sigma] * 2
        ).numpy()
        return blurred


@register("mean-filter")
class MeanFilter(PoisoningFunction):
    """Replaces each feature by the mean of the `size`×`size` window around it (the paper's MF)."""

    def __init__(self, features: FeatureSpec, size: int = 3) -> None:
        super().__init__(features)
        self.size = _window("mean-filter:size", size, features)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Averaged rows."""
        windows = F.avg_pool2d(_tensor(source.read(rows)), self.size, 1, self.size // 2, count_include_pad=False)
        averaged: NDArray[np.float32] = windows.numpy()
        return averaged


@register("recombine")
class Recombine(PoisoningFunction):
    """Puts each row together from pieces of its group: every `patch`×`patch` window from a random member.

    Groups are a partition of each class into sets of at least `k` rows that φ2 sees alike (nearest in the input of its
    last linear layer); what remains of a class joins its last group. For regression, deciles of each target are the
    classes. This is fixed-size microaggregation, with pieces in the place of means. Planning costs O(n²/k) a class.
    """

    mixes_rows = True

    def __init__(self, features: FeatureSpec, k: int = 5, patch: int = 2, bins: int = 10) -> None:
        super().__init__(features)
        self.k = int(_bounded("recombine:k", k, 2, 10_000))
        self.patch = int(_bounded("recombine:patch", patch, 1, max(features.shape[1:])))
        self.bins = int(_bounded("recombine:bins", bins, 1, 1000))

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """Groups, and for each piece of each row the member it comes from.

        Raises:
            ConfigError: a class has fewer than `k` rows.
        """
        generator = np.random.default_rng(list(secret))
        seen = _seen_by_classifier(source, phi_2)
        classes = _target_bins(source.targets, self.bins)
        names, counts = np.unique(classes, return_counts=True)
        if counts.min() < self.k:
            small = ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True) if count < self.k)
            raise ConfigError(
                f"recombine expects at least k = {self.k} rows of each class in each split, found fewer in class "
                f"{small}. Lower k, add images, or make that split larger."
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

    def __init__(self, features: FeatureSpec, depth: int = 4, width: int = 0) -> None:
        super().__init__(features)
        depth = int(_bounded("dpf:depth", depth, 1, 64))
        width = int(_bounded("dpf:width", width, 0, 65_536)) or max(16, features.shape[0] // 4)
        blocks = [_Bottleneck(features.shape[0], width, features.non_negative) for _ in range(depth)]
        self.network: nn.Module = nn.Sequential(*blocks)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """Rows through the network as it was fitted (evaluation mode)."""
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            poisoned: NDArray[np.float32] = self.network.eval()(_tensor(source.read(rows)).to(device)).cpu().numpy()
        return poisoned


# --------------------------------------------------------------------------------------------- chains


@dataclass(frozen=True)
class Chain:
    """P as one or more stages, the first applied first."""

    spec: str
    stages: tuple[PoisoningFunction, ...]

    @property
    def learned(self) -> nn.Module | None:
        """The network to be fitted; only the last stage can have one."""
        return self.stages[-1].network

    @property
    def poisons(self) -> bool:
        """Whether any stage changes anything."""
        return any(stage.poisons for stage in self.stages)

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> list[Plan]:
        """One plan a stage, each made on the rows as the stage before leaves them."""
        plans: list[Plan] = []
        for number, stage in enumerate(self.stages):
            plans.append(stage.plan(source, phi_2, self.stage_secret(secret, number)))
            source = PoisonedRows(source, stage, plans[-1])
        return plans

    @staticmethod
    def stage_secret(secret: bytes, stage: int) -> bytes:
        """The 32 bytes that a stage's plan gets."""
        return hashlib.sha256(secret + stage.to_bytes(4)).digest()

    def on(self, source: RowSource, plans: Sequence[Plan], stages: int | None = None) -> RowSource:
        """The source as the first `stages` stages (all by default) leave it."""
        for stage, plan in list(zip(self.stages, plans, strict=True))[:stages]:
            source = PoisonedRows(source, stage, plan)
        return source

    def contributors(self, rows: Rows, plans: Sequence[Plan]) -> tuple[Rows, Rows]:
        """Which bank rows are in which of `rows` after all stages: pairs (position in `rows`, bank row), each once."""
        positions, members = np.arange(len(rows)), rows
        for plan in reversed(plans):
            below, members = plan.contributors(members)
            pairs = np.unique(np.stack([positions[below], members], axis=1), axis=0)
            positions, members = pairs[:, 0], pairs[:, 1]
        return positions, members

    @property
    def mixing_stages(self) -> int:
        """How many stages up to and with the last that mixes rows: what a row *is*, before it is disturbed."""
        return max((number + 1 for number, stage in enumerate(self.stages) if stage.mixes_rows), default=0)


def build_chain(spec: str, features: FeatureSpec) -> Chain:
    """A poisoning function from its name: `dpf`, `recombine:k=20`, `gaussian-filter:sigma=2+dpf:depth=4,width=64`.

    Raises:
        ConfigError: no such function or parameter, or a learned function that is not the last.
    """
    stages = tuple(_build_stage(part.strip(), features) for part in spec.split("+"))
    if any(stage.network is not None for stage in stages[:-1]):
        raise ConfigError(f"expected a learned function last in a chain, as in 'gaussian-filter+dpf', found {spec!r}.")
    return Chain(spec, stages)


def _build_stage(text: str, features: FeatureSpec) -> PoisoningFunction:
    name, _, rest = text.partition(":")
    cls = FUNCTIONS.get(name) or _import_function(name)
    parameters = dict(pair.split("=", 1) for pair in rest.split(",")) if re.fullmatch(r"(\w+=[^,=]+,?)+", rest) else {}
    if rest and not parameters:
        raise ConfigError(f"expected parameters as in 'recombine:k=20,patch=2', found {text!r}.")
    known = [key for key in inspect.signature(cls).parameters if key != "features"]
    values = {}
    for key, value in parameters.items():
        if key not in known:
            raise ConfigError(f"{name} has the parameters {known or 'none'}, found {key!r} in {text!r}.")
        try:
            values[key] = int(value) if re.fullmatch(r"-?\d+", value) else float(value)
        except ValueError:
            raise ConfigError(f"expected a number for {name}:{key}, found {value!r}.") from None
    return cls(features, **values)


def _import_function(name: str) -> type[PoisoningFunction]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the poisoning function {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, PoisoningFunction)):
        raise ConfigError(
            f"expected a poisoning function, one of {', '.join(sorted(FUNCTIONS))} or package.module.Class, "
            f"found {name!r}."
        )
    return found


# --------------------------------------------------------------------------------------------- parts


def _tensor(rows: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))


def _normal(secret: bytes, row_id: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    key = int.from_bytes(hashlib.sha256(secret + row_id.tobytes()).digest()[:16])
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)


def _bounded(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise ConfigError(f"expected {name} from {low:g} to {high:g}, found {value:g}.")
    return value


def _window(name: str, size: int, features: FeatureSpec) -> int:
    largest = 2 * min(features.shape[1:]) - 1  # mirrored borders are as wide as the map, less one, at the most
    if size % 2 == 0 or not 1 <= size <= largest:
        raise ConfigError(f"expected {name} odd, from 1 to {largest} for features {features.shape}, found {size}.")
    return int(size)


def _seen_by_classifier(source: RowSource, phi_2: nn.Module, batch: int = 256) -> NDArray[np.float32]:
    """What φ2 makes of each row, (N, D): the input of its last linear layer, or its answer where it has none."""
    linear = [module for module in phi_2.modules() if isinstance(module, nn.Linear)]
    caught: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])) if linear else None
    device = next(phi_2.parameters()).device
    parts = []
    try:
        with torch.inference_mode():
            for start in range(0, len(source), batch):
                rows = np.arange(start, min(start + batch, len(source)))
                answer = phi_2(_tensor(source.read(rows)).to(device))
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
