"""What an attack is: one class, one file; and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.attacks.threat_models import Budget, ReleaseView
from dpf_release.core.arrays import Rows
from dpf_release.core.own_code import imported, installed
from dpf_release.errors import ConfigError
from dpf_release.release.attack_report import Claim, ProfileName


@dataclass(frozen=True)
class Reconstructions:
    """Pictures of the asked rows, by each decoder that the attacker ended with. Which is the best, they cannot know."""

    # name → positions in `view.asked` → pictures (n, 3, H, W), floats in [0, 1]
    decoders: Mapping[str, Callable[[Rows], Tensor]]
    # the positions that there is an answer for, ascending; None: for all. No others are asked for then
    answered: Rows | None = None
    # name of a decoder → what it depends on, and how much of it there was: ("pairs", 100)
    series: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    lacks: str = ""  # what the attacker should have tried and could not; then a failure to reconstruct proves nothing


@dataclass(frozen=True)
class Likeness:
    """How alike query images and rows are, in one way of looking."""

    # (n, M) of each query and each row of its pool; None for an attack that links no rows
    pools: NDArray[np.float32] | None
    membership: NDArray[np.float32]  # (n,) higher: rather in S


@dataclass(frozen=True)
class Links:
    """What linkage found, for each way of looking."""

    ways: Mapping[str, Likeness]
    # whether it asks of drawn rows from which images they were: by person too, and by what a privacy bound allows
    drawn: bool = False


@dataclass(frozen=True)
class Attributes:
    """Predicted values of the asked rows, (n,) indices of `view.values`, for each probe."""

    probes: Mapping[str, NDArray[np.int64]]


Result = Reconstructions | Links | Attributes


class Attack:
    """One attack.

    Attributes:
        code: as in docs/attacks.md, and the order of the table: "A1".
        title: a few words.
        version: raised whenever the same release would be attacked otherwise.
        claim: what it speaks against; None: reported, never gated.
        profile: the smallest that runs it.
        view: what it needs to hold.
        answers: of what type its answer is.
        planted: weak functions that it must break, or it proves nothing (`evaluation.controls`).
        surpasses: code of an attack that it must surely do better than on those: without its own idea it would be that.
        of_bank: whether it trains anew for each bank, a planted one too.
        sets_ceiling: whether what it reaches on clean rows counts for the ceiling.
        rows: for how many rows it answers, where each costs it much; None: for all. They are evidence enough.

    Example:
        >>> from dpf_release import Attack, register_attack
        >>> @register_attack
        ... class Blank(Attack):
        ...     code, title, profile = "X9", "a grey picture", "quick"
        ...
        ...     def run(self, view):
        ...         raise NotImplementedError("see examples/own_attack.py")
        >>> Blank().trainings(None)
        0.0
    """

    code: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int] = 1
    claim: ClassVar[Claim | None] = "reconstruction"
    profile: ClassVar[ProfileName] = "standard"
    view: ClassVar[type[ReleaseView]] = ReleaseView
    answers: ClassVar[type[Result]] = Reconstructions
    planted: ClassVar[tuple[str, ...]] = ("weak-noise",)
    surpasses: ClassVar[str | None] = None
    of_bank: ClassVar[bool] = False
    sets_ceiling: ClassVar[bool] = False
    rows: ClassVar[int | None] = None

    def trainings(self, budget: Budget) -> float:
        """How many decoders it trains, in all: what the cost is reckoned by."""
        return 0.0

    def members(self, view: ReleaseView) -> Mapping[str, nn.Module]:
        """Functions of features that it learned by, and must break too, on pictures that it did not see."""
        return {}

    def refuse(self, view: ReleaseView) -> None:
        """Raises `NotGrantedError` where it has nothing to learn from; asked before anything is trained."""

    def run(self, view: ReleaseView) -> Result:
        """Attacks; `view` is of the type that `self.view` names."""
        raise NotImplementedError


ENTRY_POINTS = "dpf_release.attacks"
ATTACKS: dict[str, type[Attack]] = {}


def register(attack: type[Attack]) -> type[Attack]:
    """Class decorator: the battery knows it from then on, in the order of codes.

    Example:
        >>> from dpf_release import Attack, register_attack
        >>> @register_attack
        ... class Blank(Attack):
        ...     code, title = "X9", "a grey picture"
        >>> Blank.version
        1
    """
    known, ours = ATTACKS.get(attack.code, attack), attack.__module__.startswith("dpf_release.")
    if (known.__module__, known.__qualname__) != (attack.__module__, attack.__qualname__):
        raise ConfigError(f"{known.__qualname__} has the code {attack.code} already. Give your attack another.")
    if attack.sets_ceiling and not ours:  # what leakage is measured by is not for others to move
        raise ConfigError(f"{attack.code} sets the ceiling, which only attacks of this package do. Leave that out.")
    ATTACKS[attack.code] = attack
    return attack


def registered() -> list[Attack]:
    """One of each that is known, A1 before A10."""
    return [ATTACKS[code]() for code in sorted(ATTACKS, key=lambda code: (code.rstrip("0123456789"), len(code), code))]


@cache
def load_attack(name: str) -> type[Attack]:
    """An attack from outside this package, known to the suite from then on. Its code is imported: ask before.

    It goes by `package.module:Class`, or by an entry point `dpf_release.attacks` of an installed package.

    Raises:
        ConfigError: there is none.
    """
    entries = installed(ENTRY_POINTS)
    try:
        found = entries[name].load() if name in entries else imported(name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the attack {name!r} cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Attack)):
        raise ConfigError(f"expected an attack, package.module:Class, found {name!r}.")
    return register(found)
