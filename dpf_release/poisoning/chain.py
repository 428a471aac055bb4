"""P from its name: one function, or a chain of them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.errors import ConfigError
from dpf_release.poisoning.interface import FUNCTIONS, FeatureSpec, Plan, PoisonedRows, PoisoningFunction


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

    @property
    def known_by_name(self) -> bool:
        """Whether who knows its name can do the same to pictures of their own."""
        return all(stage.known_by_name for stage in self.stages)

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> list[Plan]:
        """One plan a stage, each made on the rows as the stage before leaves them."""
        plans: list[Plan] = []
        for number, stage in enumerate(self.stages):
            plans.append(stage.plan(source, phi_2, self.stage_secret(secret, number)))
            source = PoisonedRows(source, stage, plans[-1])
        return plans

    def replan(
        self, plans: Sequence[Plan], kept: Rows, source: RowSource, phi_2: nn.Module, secret: bytes
    ) -> tuple[list[Plan], Rows]:
        """The stages' plans when rows have gone, as `PoisoningFunction.replan`.

        Returns:
            One plan a stage, and the numbers of the rows that come out otherwise than before after all stages.
        """
        replanned: list[Plan] = []
        rebuilt = np.empty(0, np.int64)
        for number, (stage, plan) in enumerate(zip(self.stages, plans, strict=True)):
            planned, drawn = stage.replan(plan, kept, source, phi_2, self.stage_secret(secret, number))
            if len(rebuilt):  # what a stage before made otherwise goes into whatever is made of it
                rows, members = planned.contributors(np.arange(len(source)))
                rebuilt = rows[np.isin(members, rebuilt)]
            rebuilt = np.union1d(rebuilt, drawn)
            replanned.append(planned)
            source = PoisonedRows(source, stage, planned)
        return replanned, rebuilt

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
        """Which bank rows are in which of `rows` after all stages: pairs (position in `rows`, bank row), each once.

        After two stages that mix rows, those that may be in them: pieces are not followed through both.
        """
        positions, members = np.arange(len(rows)), rows
        for plan in reversed(plans):
            below, members = plan.contributors(members)
            pairs = np.unique(np.stack([positions[below], members], axis=1), axis=0)
            positions, members = pairs[:, 0], pairs[:, 1]
        return positions, members

    def foremost(self, rows: Rows, plans: Sequence[Plan]) -> Rows:
        """Of each of `rows`, the bank row that it has the most pieces of after all stages."""
        for plan in reversed(plans):
            rows = plan.foremost(rows)
        return rows

    @property
    def mixing_stages(self) -> int:
        """How many stages up to and with the last that mixes rows: what a row *is*, before it is disturbed."""
        return max((number + 1 for number, stage in enumerate(self.stages) if stage.mixes_rows), default=0)


def build_chain(spec: str, features: FeatureSpec, *, allow_import: bool = True) -> Chain:
    """A poisoning function from its name: `dpf`, `recombine:k=20`, `gaussian-filter:sigma=2+dpf:depth=4,width=64`.

    Without `allow_import` no `package.module.Class` is imported.

    Raises:
        ConfigError: no such function or parameter, or a learned function that is not the last.
    """
    stages = tuple(_build_stage(part.strip(), features, allow_import) for part in spec.split("+"))
    if any(stage.network is not None for stage in stages[:-1]):
        raise ConfigError(f"expected a learned function last in a chain, as in 'gaussian-filter+dpf', found {spec!r}.")
    return Chain(spec, stages)


def _build_stage(text: str, features: FeatureSpec, allow_import: bool) -> PoisoningFunction:
    name, _, rest = text.partition(":")
    cls = FUNCTIONS.get(name) or _import_function(name, allow_import)
    well_formed = re.fullmatch(r"\w+=[^,=]+(,\w+=[^,=]+)*", rest)
    parameters = dict(pair.split("=") for pair in rest.split(",")) if well_formed else {}
    if (rest or text.endswith(":")) and not parameters:
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


def _import_function(name: str, allow_import: bool) -> type[PoisoningFunction]:
    if not allow_import:
        raise ConfigError(f"the poisoning function {name!r} is somebody's own code: say --trust-code to run it")
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module.strip(".") == module != "" else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the poisoning function {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, PoisoningFunction)):
        raise ConfigError(
            f"expected a poisoning function, one of {', '.join(sorted(FUNCTIONS))} or package.module.Class, "
            f"found {name!r}."
        )
    return found
