"""P from its name: one function, or a chain of them; how it is fitted; and all functions, as they are declared."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpf_release.bank.format import SplitName
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.files import sha256_of
from dpf_release.core.own_code import imported, installed
from dpf_release.core.parameters import parse_parameters
from dpf_release.core.privacy import Mechanism, Unit
from dpf_release.errors import ConfigError
from dpf_release.poisoning.context import FitContext, FitRows, Material, Split
from dpf_release.poisoning.interface import FUNCTIONS, PoisonedRows, PoisoningFunction
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from dpf_release.poisoning.procedure import Procedure

ENTRY_POINTS = "dpf_release.functions"
TABLE_HEADER = ("function", "parameter", "default", "from", "to", "what it is")
Plans = dict[str, list[Plan]]  # of each split, one a stage


@dataclass(frozen=True)
class Chain:
    """P as one or more stages, the first applied first."""

    spec: str
    stages: tuple[PoisoningFunction, ...]

    @property
    def poisons(self) -> bool:
        """Whether any stage changes anything."""
        return any(stage.poisons for stage in self.stages)

    @property
    def draws_rows(self) -> bool:
        """Whether its rows belong to no image."""
        return self.stages[0].draws_rows

    def mechanism(self, unit: Unit) -> Mechanism | None:
        """See `PoisoningFunction.mechanism`; of what draws rows, which is alone."""
        return self.stages[0].mechanism(unit)

    @property
    def procedure(self) -> Procedure | None:
        """The public half of what draws rows, which is alone."""
        return self.stages[0].procedure

    @property
    def learned_secret(self) -> bool:
        """As of a stage, for any."""
        return any(stage.learned_secret for stage in self.stages)

    @property
    def needs_adversaries(self) -> bool:
        """As of a stage, for any."""
        return any(stage.needs_adversaries for stage in self.stages)

    @property
    def uses_classifier(self) -> bool:
        """As of a stage, for any."""
        return any(stage.uses_classifier for stage in self.stages)

    def outside_code(self) -> list[str]:
        """SHA-256 of the files that stages from outside this package are written in: what is kept depends on them."""
        modules = {type(stage).__module__ for stage in self.stages}
        theirs = sorted(name for name in modules if not name.startswith("dpf_release."))
        files = [getattr(sys.modules.get(name), "__file__", None) for name in theirs]
        return [sha256_of(Path(file)) if file else "unknown" for file in files]

    @property
    def learns(self) -> bool:
        """Whether a stage has something to fit."""
        return any(type(stage).fit is not PoisoningFunction.fit for stage in self.stages)

    def statement(self) -> str:
        """What a row is made of, a sentence a stage; nothing secret is in it."""
        return " ".join(stage.statement() for stage in self.stages)

    def varied(self, generator: np.random.Generator) -> str:
        """The name of a chain of the same kind, with other parameters: each halved to doubled, within its bounds."""
        return "+".join(_varied(stage, generator) for stage in self.stages)

    def networks(self) -> list[nn.Module]:
        """Of all stages."""
        return [network for stage in self.stages for network in stage.networks()]

    def state(self) -> dict[str, Tensor]:
        """What all stages learned, `STAGE/NAME` → tensor."""
        return {
            f"{number}/{name}": torch.as_tensor(value)
            for number, stage in enumerate(self.stages)
            for name, value in stage.state().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        for number, stage in enumerate(self.stages):
            mine = f"{number}/"
            stage.load({name.removeprefix(mine): value for name, value in state.items() if name.startswith(mine)})

    def plan(self, source: RowSource, phi_2: nn.Module, secret: bytes) -> list[Plan]:
        """One plan a stage, each made on the rows as the stage before leaves them."""
        plans: list[Plan] = []
        for number, stage in enumerate(self.stages):
            plans.append(stage.plan(self.on(source, plans), phi_2, self.stage_secret(secret, number)))
        return plans

    def drop_rows(
        self, plans: Sequence[Plan], kept: Rows, source: RowSource, phi_2: nn.Module, secret: bytes
    ) -> tuple[list[Plan], Rows]:
        """As `PoisoningFunction.drop_rows`: one plan a stage, and the rows that come out otherwise after all stages."""
        left: list[Plan] = []
        rebuilt = np.empty(0, np.int64)
        for number, (stage, plan) in enumerate(zip(self.stages, plans, strict=True)):
            planned, drawn = stage.drop_rows(plan, kept, source, phi_2, self.stage_secret(secret, number))
            if len(rebuilt):  # what a stage before made otherwise goes into whatever is made of it
                made = stage.contributors(np.arange(len(source)), planned)
                rebuilt = made.positions[np.isin(made.members, rebuilt)]
            rebuilt = np.union1d(rebuilt, drawn)
            left.append(planned)
            source = PoisonedRows(source, stage, planned)
        return left, rebuilt

    @staticmethod
    def stage_secret(secret: bytes, stage: int) -> bytes:
        """The 32 bytes that a stage's plan gets."""
        return hashlib.sha256(secret + stage.to_bytes(4)).digest()

    def on(self, source: RowSource, plans: Sequence[Plan], stages: int | None = None) -> RowSource:
        """The source as the first `stages` stages (all that have plans by default) leave it."""
        for stage, plan in list(zip(self.stages, plans, strict=False))[:stages]:
            source = PoisonedRows(source, stage, plan)
        return source

    def contributors(self, rows: Rows, plans: Sequence[Plan], stages: int | None = None) -> Contributors:
        """Which rows of the source are in which of `rows` after the first `stages` stages (all by default).

        After two stages that mix rows, those that may be in them: pieces are not followed through both. Their numbers
        are products then, and tell which of them is likely to be seen most of.
        """
        found = Contributors.themselves(rows)
        for stage, plan in reversed(list(zip(self.stages, plans, strict=False))[:stages]):
            below = stage.contributors(found.members, plan)
            pairs = np.stack([found.positions[below.positions], below.members], axis=1)
            unique, which = np.unique(pairs, axis=0, return_inverse=True)
            pieces = np.zeros(len(unique), np.int64)
            np.add.at(pieces, which.reshape(-1), found.pieces[below.positions] * below.pieces)
            found = Contributors(unique[:, 0], unique[:, 1], pieces)
        return found

    def mixing_stages(self, stages: int | None = None) -> int:
        """Of the first `stages`, how many up to and with the last that mixes rows: what a row *is*."""
        mixing = [number + 1 for number, stage in enumerate(self.stages[:stages]) if stage.mixes_rows]
        return max(mixing, default=0)


def build_chain(spec: str, features: FeatureSpec, *, allow_import: bool = True) -> Chain:
    """A poisoning function from its name: `dpf`, `recombine:k=20`, `gaussian-filter:sigma=2+dpf:depth=4,width=64`.

    Args:
        spec: names with their parameters; `package.module:Class` is a class of your own.
        features: what a row is.
        allow_import: whether code from outside this package is imported: `package.module:Class`, and what installed
            packages have under the entry points `dpf_release.functions`.

    Raises:
        ConfigError: no such function or parameter, or one that is learned and is not the last: what it learns by is
            what φ2 makes of its own rows.
    """
    stages = tuple(_build_stage(part.strip(), features, allow_import) for part in spec.split("+"))
    if any(stage.learned_secret for stage in stages[:-1]):
        raise ConfigError(f"expected a learned function last in a chain, as in 'gaussian-filter+dpf', found {spec!r}.")
    if len(stages) > 1 and any(stage.draws_rows for stage in stages):
        raise ConfigError(f"a function that draws rows stands alone, found {spec!r}. Take the others out of the chain.")
    return Chain(spec, stages)


def _build_stage(text: str, features: FeatureSpec, allow_import: bool) -> PoisoningFunction:
    name, colon, rest = text.partition(":")
    if name not in FUNCTIONS and rest and "=" not in rest.partition(":")[0]:  # package.module:Class
        attribute, colon, rest = rest.partition(":")
        name = f"{name}:{attribute}"
    cls = FUNCTIONS.get(name) or import_function(name, allow_import)
    if colon and not rest:
        raise ConfigError(f"expected parameters as in 'recombine:k=20,patch=2', found {text!r}.")
    return cls(features, **parse_parameters(name, rest, cls.parameters))


def draws_rows(spec: str) -> bool:
    """Whether a function of this name draws rows, and so needs Q; of those from outside it is not known."""
    known = FUNCTIONS.get(spec.partition(":")[0].strip())
    return known is not None and known.draws_rows


def fit_chain(
    chain: Chain,
    material: Material,
    known: Mapping[str, list[Plan]] | None = None,
    planned: Callable[[Plans], Plans] = lambda plans: plans,
) -> tuple[Plans, dict[str, float], dict[str, Any]]:
    """Fits and plans each stage in turn, on the rows as those before it leave them.

    Args:
        chain: whose networks were drawn from secret randomness.
        material: what it is fitted from.
        known: plans of the first stages, of a run that was cut off.
        planned: told of all plans so far, after each stage, which has learned by then; says which count (of several
            ranks, the first's).

    Returns:
        The plans of `train` and `val`; what the last stage that learned anything says; the histories of all trainings.

    Raises:
        ConfigError: a function that cannot be fitted on these rows; it says why.
    """
    splits: dict[SplitName, Split] = {"train": material.train, "val": material.val}
    plans: Plans = {name: list((known or {}).get(name, [])) for name in splits}
    facts: dict[str, float] = {}
    histories: dict[str, Any] = {}
    for network in chain.networks():
        network.to(material.device)
    for number, stage in enumerate(chain.stages):
        if stage.draws_rows and "train" in plans and len(plans["train"]) > number:
            continue  # what it learned was written before they were: it is loaded, and nothing is spent again
        rows = {name: _fit_rows(chain, split, plans[name], number) for name, split in splits.items()}
        secret = chain.stage_secret(material.secret, number)
        context = FitContext(material, number, rows["train"], rows["val"], secret)
        facts = stage.fit(context) or facts
        histories |= context.histories
        for network in stage.networks():
            network.eval().requires_grad_(False)
        for name, of_split in rows.items():
            if len(plans[name]) == number:
                if stage.draws_rows:
                    plans[name].append(stage.draw(name, secret))
                else:
                    plans[name].append(stage.plan(of_split.inputs, material.phi_2, secret))
        plans = planned(plans)
    return plans, facts, histories


def _fit_rows(chain: Chain, split: Split, plans: list[Plan], stages: int) -> FitRows:
    mixing = chain.mixing_stages(stages)
    inputs = chain.on(split.rows, plans, stages)
    goal = inputs if mixing == stages else chain.on(split.rows, plans, mixing)
    return FitRows(inputs, goal, lambda rows: chain.contributors(rows, plans, stages), split.images)


def known_functions(trust_code: bool = False) -> dict[str, type[PoisoningFunction]]:
    """All functions that have a name: ours; where their code is trusted, also those of installed packages."""
    return FUNCTIONS | ({name: import_function(name) for name in installed(ENTRY_POINTS)} if trust_code else {})


def import_function(name: str, allow_import: bool = True) -> type[PoisoningFunction]:
    """A class from outside this package, by its entry point's name or as `package.module:Class`.

    Raises:
        ConfigError: there is none, or nothing may be imported.
    """
    entries = installed(ENTRY_POINTS)
    known = ", ".join(sorted({*FUNCTIONS, *entries}))
    expected = f"expected a poisoning function, one of {known} or package.module:Class, found {name!r}."
    if name not in entries and not {".", ":"} & set(name):
        raise ConfigError(expected)
    if not allow_import:
        raise ConfigError(f"the poisoning function {name!r} is somebody's own code: say --trust-code to run it")
    try:
        found = entries[name].load() if name in entries else imported(name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the poisoning function {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, PoisoningFunction)):
        raise ConfigError(expected)
    if "name" not in vars(found):  # that of a parent would stand for another function
        found.name = name
    return found


def _varied(stage: PoisoningFunction, generator: np.random.Generator) -> str:
    """A stage's name with other parameters; with its own where the class refuses the others."""
    own = {parameter.name: getattr(stage, parameter.name) for parameter in stage.parameters}
    others = {parameter.name: parameter.vary(own[parameter.name], generator) for parameter in stage.parameters}
    try:
        type(stage)(stage.features, **others)
    except ConfigError:
        others = own
    return stage.name + ":" * bool(others) + ",".join(f"{name}={value}" for name, value in others.items())


def table_rows(trust_code: bool = False) -> list[tuple[str, ...]]:
    """One row a function, and one for each of its parameters: name, parameter, default, bounds, help."""
    rows: list[tuple[str, ...]] = []
    for name, cls in sorted(known_functions(trust_code).items()):
        summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        rows.append((name, "", "", "", "", summary))
        for parameter in cls.parameters:
            numbers = (f"{number:g}" for number in (parameter.default, parameter.low, parameter.high))
            rows.append((name, parameter.name, *numbers, parameter.help))
    return rows


def markdown() -> str:
    """The same as a Markdown table, for docs/functions.md."""
    named = [(f"`{name}`", *rest) for name, *rest in table_rows()]
    lines: list[tuple[str, ...]] = [TABLE_HEADER, ("---",) * len(TABLE_HEADER), *named]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"
