"""What a number means for a claim: pass, fail, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpf_release.attack_report import Interval, Power, Verdict
from dpf_release.battery.truth import LEAST_POOL, POOL


@dataclass(frozen=True)
class Limit:
    """One measure of one way, and what it must stay under.

    Attributes:
        what: for the reason.
        found: the measure; None: it could not be measured.
        limit: of the claim.
    """

    what: str
    found: Interval | None
    limit: float

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.what} was not measured"
        found = self.found
        return f"{self.what} {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], limit {self.limit:g}"


def judge(limits: Sequence[Limit], power: Power, shortage: Sequence[str]) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on an attack, and the reasons where it is no pass.

    `fail` where a lower bound is above its limit, whatever else; `pass` where every upper bound is below, the attack
    has power, and nothing was short; else `inconclusive`.
    """
    broken = [str(limit) for limit in limits if limit.found is not None and limit.found.low >= limit.limit]
    if broken:
        return "fail", tuple(broken)
    open_questions = [str(limit) for limit in limits if limit.found is None or limit.found.high >= limit.limit]
    if power.passed is not True:
        broke = ", ".join(f"{name} {found.value:.2f} [{found.low:.2f}, ...]" for name, found in power.planted.items())
        open_questions.append(f"no power: it does not break what it must ({broke or 'nothing to try it on'})")
    open_questions += shortage
    return ("inconclusive", tuple(open_questions)) if open_questions else ("pass", ())


def re_identification_limit(among: int, limit: float) -> float:
    """5 %, or ten times chance where the match is sought among fewer than 200."""
    return limit if among >= POOL else 10 / max(among, LEAST_POOL)
