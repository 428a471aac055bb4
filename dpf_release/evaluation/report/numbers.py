"""How numbers are written on the page and in plots: digits, intervals, shares."""

from __future__ import annotations

from collections.abc import Mapping

from dpf_release.release.attack_report import AttackResult, Interval


def number(value: float | None) -> str:
    """Two digits behind the point, or a dash."""
    return "–" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def interval(found: Interval | None) -> str:
    """A number with its interval."""
    return "–" if found is None else f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def share(found: Interval | None) -> str:
    """A share in percent, with its interval."""
    if found is None:
        return "–"
    low, high = 100 * found.low, 100 * found.high
    digits = 1 if high < 9.95 else 0
    return f"{100 * found.value:.{digits}f} % [{low:.{digits}f}, {high:.{digits}f}]"


def power(result: AttackResult) -> str:
    """Whether an attack breaks what it must, and the least that it gets out of that."""
    if result.power.passed is None:
        return "not tried"
    lows = [found.low for found in result.power.planted.values()]
    least = f", ≥ {number(min(lows))}" if lows else ""
    return ("yes" if result.power.passed else "no") + least


def planted(found: Mapping[str, Interval]) -> str:
    """What came out of each planted function."""
    return "; ".join(f"{name} {interval(one)}" for name, one in found.items())
