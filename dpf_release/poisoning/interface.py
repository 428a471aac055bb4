"""What a poisoning function is, and the registry of their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.errors import ConfigError


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

    def foremost(self, rows: Rows) -> Rows:
        """Of each of `rows`, the row that it has the most pieces of; of equals, itself or else the first."""
        if self.pieces is None:
            return rows
        found = []
        for row in rows:
            members, counts = np.unique(self.pieces[row], return_counts=True)
            found.append(members[np.lexsort([members != row, -counts])[0]])
        return np.array(found, np.int64)


class PoisoningFunction:
    """The interface: one stage of P.

    Attributes:
        network: what training fits, for a learned function; otherwise `None`.
        mixes_rows: whether a row comes out as another picture, put together from several rows.
        poisons: whether it changes anything; `package` refuses a bank that no stage poisoned.
        known_by_name: whether who knows its name can do the same to pictures of their own: nothing but the draws for
            this bank is secret. An attack with P at hand is then anybody's.
    """

    mixes_rows: ClassVar[bool] = False
    poisons: ClassVar[bool] = True
    known_by_name: ClassVar[bool] = False
    network: nn.Module | None = None

    def __init__(self, features: FeatureSpec) -> None:
        self.features = features

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """Draws what `apply` needs for this source; by default nothing but the secret itself."""
        return Plan(secret)

    def replan(self, plan: Plan, kept: Rows, source: RowSource, phi_2: nn.Module, secret: bytes) -> tuple[Plan, Rows]:
        """The plan when rows have gone; by default that of a function whose rows have nothing to do with each other.

        Args:
            plan: of all rows.
            kept: numbers of the rows that are left, in that plan, ascending.
            source: the rows that are left.
            phi_2: the classifier.
            secret: 32 bytes, for what is drawn anew.

        Returns:
            The plan of the rows that are left, and the numbers in it of those that are drawn anew: each to which one
            that has gone contributed. All others come out as before.

        Raises:
            ConfigError: the function planned with several rows, and does not say how it does without some.
        """
        if plan.pieces is not None or plan.arrays:
            raise ConfigError(
                f"{type(self).__name__} plans with the rows of a bank, and has no `replan` that does without some of "
                "them. Write one (docs/functions.md), or write the features anew without these images and fit it again."
            )
        return plan, np.empty(0, np.int64)

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


FUNCTIONS: dict[str, type[PoisoningFunction]] = {}


def register(name: str) -> Callable[[type[PoisoningFunction]], type[PoisoningFunction]]:
    """Class decorator: makes a poisoning function known under a name (letters, digits, '-')."""

    def keep(cls: type[PoisoningFunction]) -> type[PoisoningFunction]:
        FUNCTIONS[name] = cls
        return cls

    return keep


def as_tensor(rows: NDArray[Any]) -> Tensor:
    """Rows as float32, on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))


def bounded(name: str, value: float, low: float, high: float) -> float:
    """The value, or a ConfigError that names the parameter and its bounds."""
    if not low <= value <= high:
        raise ConfigError(f"expected {name} from {low:g} to {high:g}, found {value:g}.")
    return value


def whole(name: str, value: float, low: int, high: int) -> int:
    """A whole number within its bounds, or a ConfigError that names the parameter."""
    if value != int(bounded(name, value, low, high)):
        raise ConfigError(f"expected a whole number for {name}, found {value:g}.")
    return int(value)
