"""What a number means for a claim: pass, fail, or neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.core.arrays import Rows
from dpf_release.evaluation.scoring import LEAST_GAP
from dpf_release.evaluation.targets import LEAST_POOL, POOL
from dpf_release.release.attack_report import Interval, Power, Verdict, Way

PRIVACY, GROUPS = "the privacy bound", "the size of groups"  # what a limit can be proved by


@dataclass(frozen=True)
class Criterion:
    """One measure of one way, and what it must stay under. Every way counts."""

    what: str
    found: Interval | None  # None: it could not be measured
    limit: float
    # what allows any attack just as much as the limit, and no more: `PRIVACY`, `GROUPS`. Such a criterion can fail, and
    # is never an open question: it is proved, and an attack that gets past it shows that something is wrong
    allowed_by: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether what was found is beyond the limit for sure."""
        return self.found is not None and self.found.low >= self.limit

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.what} was not measured"
        found = self.found
        if self.allowed_by:
            return (
                f"{self.what} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], and {self.allowed_by} allows "
                f"{self.limit:.3f}: this shows a bug in the mechanism, or networks that remember their images"
            )
        return f"{self.what} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], limit {self.limit:.3g}"


@dataclass(frozen=True)
class Scored:
    """What the harness makes of an attack's answer; what an `AttackResult` has too is described there."""

    ways: dict[str, Way]
    best: str  # the name of the way that tells the most
    baseline: float | None
    criteria: tuple[Criterion, ...]
    rows: int
    ceiling: float | None = None  # None: what the same attack reaches on clean rows (`against`)
    leakage: Interval | None = None
    re_identification: Interval | None = None
    among: int = 0  # 0: nothing is matched
    series: dict[str, dict[str, Interval]] = field(default_factory=dict)
    primary: str = ""  # what leakage is reckoned by, where it is not paired with reconstructions of clean rows
    told: tuple[Interval, ...] = ()  # what else the best way tells, from 0, a guess, to 1: power is wanted in all of it
    judged: int | None = None  # of how many it was told whether they are found; None: of all
    pictures: Mapping[str, Tensor] = field(default_factory=dict)  # `gallery.pictures_of`
    lacks: str = ""  # what the attacker could not try; see `Reconstructions`

    @property
    def exceeds_bound(self) -> bool:
        """Whether an attack got past what a privacy bound allows any attack."""
        return any(one.allowed_by == PRIVACY and one.is_broken for one in self.criteria)

    @property
    def re_identification_limit(self) -> float | None:
        """The limit that a match with one's own was held against."""
        return next((one.limit for one in self.criteria if one.what in ("re-identification", "top-1")), None)

    def reached(self) -> Interval | None:
        """What the best way has of the measure that counts; None where it was not measured."""
        return self.ways[self.best].measures.get(self.primary)

    def power(self) -> Interval | None:
        """What is held against `POWER_LEAKAGE` where the bank is a planted one: the weaker of what it must tell."""
        return min((self.leakage, *self.told), key=lambda found: found.low if found else -1.0)

    def against(self, ceiling: Interval) -> Scored:
        """With leakage, of every way, between the baseline and what is reached on clean rows."""
        base = self.baseline or 0.0

        def leakage(way: Way) -> Interval | None:
            found = way.measures.get(self.primary)
            if found is None or ceiling.value - base < LEAST_GAP:
                return None
            share = lambda value, of: (value - base) / max(of - base, 1e-9)  # noqa: E731
            low, high = share(found.low, ceiling.high), share(found.high, ceiling.low)
            return Interval(value=share(found.value, ceiling.value), low=min(low, high), high=max(low, high))

        ways = {name: way.model_copy(update={"leakage": leakage(way)}) for name, way in self.ways.items()}
        return replace(self, ways=ways, ceiling=ceiling.value, leakage=ways[self.best].leakage)


def judge(criteria: Sequence[Criterion], power: Power, shortage: Sequence[str]) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on an attack, and the reasons where it is no pass.

    `fail` where a lower bound is above its limit, whatever else; `pass` where every upper bound is below, the attack
    has power, and nothing was short; else `inconclusive`.
    """
    if broken := [one for one in criteria if one.is_broken]:
        return "fail", _worst_of_each(broken)
    criteria = [one for one in criteria if not one.allowed_by]
    open_questions = [
        *_worst_of_each([one for one in criteria if one.found is not None and one.found.high >= one.limit]),
        *dict.fromkeys(str(one) for one in criteria if one.found is None),
    ]
    if power.passed is not True:
        broke = ", ".join(f"{name} {found.value:.2f} [{found.low:.2f}, ...]" for name, found in power.planted.items())
        open_questions.append(f"no power: it does not break what it must ({broke[:300] or 'nothing to try it on'})")
    open_questions += shortage
    return ("inconclusive", tuple(open_questions)) if open_questions else ("pass", ())


def _worst_of_each(criteria: Sequence[Criterion]) -> tuple[str, ...]:
    """Of each measure the way that went furthest beyond."""
    worst = {one.what: one for one in sorted(criteria, key=lambda one: one.found.high if one.found else 0.0)}
    return tuple(str(worst[what]) for what in dict.fromkeys(one.what for one in criteria))


def re_identification_limit(sizes: Rows, limit: float, guess: NDArray[np.float64] | None = None) -> float:
    """The limit among 200 (5 % is ten times chance); among fewer as many times chance. Each row counts by its own pool.

    Those whose own is sought among fewer than 50 are not judged. A row of several pictures is found by any of them:
    what a guess (n,) finds of those beyond the first is added; times chance as the first is, rows of 20 pictures could
    all be recognised.
    """
    judged = sizes >= LEAST_POOL
    if not judged.any():
        return limit
    among = sizes[judged]
    others = 0.0 if guess is None else np.maximum(guess[judged] - 1 / among, 0)
    return min(1.0, float(np.mean(limit * POOL / np.minimum(among, POOL) + others)))
