"""What a poisoning function is: one class, one file. It is fitted, then planned for a bank, then applied to rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.format import SplitName
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.parameters import Parameter, Value
from dpf_release.core.privacy import Mechanism, Unit
from dpf_release.errors import ConfigError
from dpf_release.poisoning.context import FitContext
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from dpf_release.poisoning.procedure import Procedure

State = Mapping[str, Tensor | Value]  # named tensors and numbers


class PoisoningFunction:
    """One stage of P. A class of your own fills in `apply`, and what else it needs (docs/functions.md).

    Example:
        >>> from dpf_release import PoisoningFunction, register_function
        >>> @register_function("halve")
        ... class Halve(PoisoningFunction):
        ...     def apply(self, rows, source, plan):
        ...         return source.read(rows).astype("float32") / 2

    Attributes:
        name: that it is registered under, or `package.module:Class`.
        parameters: what can be set in its name (`halve:by=3`); each is an attribute of an instance.
        poisons: whether it changes anything; `package` refuses a bank that no stage poisoned.
        mixes_rows: whether a row comes out as another image, put together from several rows: φ2 should then see that.
        learned_secret: whether more than the draws for a bank is secret, as weights are. Without, whoever knows the
            name can do the same to images of their own, and an attack with P at hand (A0) is anybody's.
        draws_rows: whether its rows belong to no image: how many there are, their ids and targets are in the plan that
            `draw` makes. It is alone in its chain.
        needs_adversaries: whether it is trained against adversaries, and cannot be without any.
        uses_classifier: whether φ2 is needed to fit or plan it: there is none yet where φ2 is trained on the bank.
        made_of: what `statement` says, with its parameters in braces.
    """

    procedure: Procedure | None = None  # what draws its rows and anyone may have, made from public images alone
    name: ClassVar[str] = ""
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    poisons: ClassVar[bool] = True
    mixes_rows: ClassVar[bool] = False
    learned_secret: ClassVar[bool] = False
    needs_adversaries: ClassVar[bool] = False
    uses_classifier: ClassVar[bool] = True
    draws_rows: ClassVar[bool] = False
    made_of: ClassVar[str] = "Each row is the features of one image, changed by a function that is not published."

    def __init__(self, features: FeatureSpec, **values: Value) -> None:
        self.features = features
        declared = {parameter.name: parameter for parameter in self.parameters}
        if unknown := sorted(values.keys() - declared.keys()):
            raise ConfigError(f"{self.name} has the parameters {list(declared) or 'none'}, found {unknown[0]!r}.")
        for name, parameter in declared.items():
            setattr(self, name, parameter.check(self.name, values.get(name, parameter.default)))

    def fit(self, context: FitContext) -> dict[str, float]:
        """Learns what there is to learn: nothing, one network, or several in stages (`context.fit` each).

        Networks are best made in `__init__`, which draws from secret randomness.

        Returns:
            What is worth telling of it, as losses by name.
        """
        return {}

    def state(self) -> State:
        """What `fit` learned; kept in the vault, encrypted where that is."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave back, numbers as tensors without dimensions."""

    def networks(self) -> list[nn.Module]:
        """The networks in it, to be put on the device and frozen."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> Plan:
        """Draws what `apply` needs for this source; by default nothing but the secret itself."""
        return Plan(secret)

    def draw(self, split: SplitName, secret: bytes) -> Plan:
        """Of a function that draws rows, in the place of `plan`: arrays `ids` and `targets`, and what `apply` needs."""
        raise NotImplementedError

    def mechanism(self, unit: Unit) -> Mechanism | None:
        """The noise by which what it learned of S is differentially private; None: it is not."""
        return None

    def drop_rows(
        self, plan: Plan, kept: Rows, source: RowSource, phi_2: nn.Module, secret: bytes
    ) -> tuple[Plan, Rows]:
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
        if plan.arrays:
            raise ConfigError(
                f"{type(self).__name__} plans with the rows of a bank, and has no `drop_rows` that does without some "
                "of them. Write one (docs/functions.md), or write the features anew without these images and fit it "
                "again."
            )
        return plan, np.empty(0, np.int64)

    def apply(self, rows: Rows, source: RowSource, plan: Plan) -> NDArray[np.float32]:
        """The poisoned rows, (n, C, H, W)."""
        raise NotImplementedError

    def contributors(self, rows: Rows, plan: Plan) -> Contributors:
        """Which rows of the source each of `rows` is made of; by default itself alone."""
        return Contributors.themselves(rows)

    def statement(self) -> str:
        """What a row is made of, in one sentence for card and report; nothing secret is in it."""
        return self.made_of.format_map(vars(self))


@dataclass(frozen=True)
class PoisonedRows:
    """A row source seen through one planned function; nested, a chain."""

    source: RowSource
    function: PoisoningFunction
    plan: Plan

    @property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes, those of the source, or of rows that are drawn."""
        return self.plan.arrays["ids"] if self.function.draws_rows else self.source.ids

    @property
    def targets(self) -> NDArray[Any]:
        """Those of the source: a recombined row keeps its own target, a drawn row has the one it was drawn for."""
        return self.plan.arrays["targets"] if self.function.draws_rows else self.source.targets

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Rows) -> NDArray[np.float32]:
        """Poisoned rows by number, (n, C, H, W)."""
        return self.function.apply(rows, self.source, self.plan)


PUBLIC = "public "  # begins the names of what `state` has of public images alone, and the release has too
FUNCTIONS: dict[str, type[PoisoningFunction]] = {}
Function = TypeVar("Function", bound=PoisoningFunction)


def register(name: str) -> Callable[[type[Function]], type[Function]]:
    """Class decorator: makes a poisoning function known under a name (letters, digits, '-').

    Example:
        >>> from dpf_release import PoisoningFunction, register_function
        >>> @register_function("as-it-is")
        ... class AsItIs(PoisoningFunction):
        ...     def apply(self, rows, source, plan):
        ...         return source.read(rows).astype("float32")
    """

    def keep(cls: type[Function]) -> type[Function]:
        known = FUNCTIONS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(f"{known.__qualname__} is called {name!r} already. Give your function another name.")
        cls.name = name
        FUNCTIONS[name] = cls
        return cls

    return keep


def as_tensor(rows: NDArray[Any]) -> Tensor:
    """Rows as float32, on the CPU."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
