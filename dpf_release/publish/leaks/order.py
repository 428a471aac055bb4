"""Whether the order of public rows tells the order of the source: it was drawn at random, and must look so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpf_release.core.arrays import Rows
from dpf_release.publish.leaks.findings import Sources, public_banks
from dpf_release.release.verify import Problem

CHANCE = 1e-6  # how often a bank in truly random order may be refused


def source_order(release: Path, sources: Sources) -> list[Problem]:
    """Splits whose rows stand in an order that goes with the order of the image table, as a whole or in a class.

    Spearman's rank correlation ρ of n rows in random order has the mean 0 and the variance 1 / (n - 1); its tail is
    lighter than the normal one that its probability is taken from. Rows that were shuffled in blocks have no
    correlation, nor have rows that were dealt out in turn or by i·k mod n; but from one row to the next they take the
    same step of the source too often.
    """
    problems = []
    for bank in public_banks(release):
        rows = sources.table_rows(bank)
        known = np.flatnonzero(rows >= 0)
        targets = bank.targets[known]
        scores = list(_scores(rows[known], targets if targets.ndim == 1 else np.zeros(len(known), np.int64)))
        path = f"features/{bank.split}"
        for what, score in scores:
            chance = math.erfc(abs(score) / math.sqrt(2))
            if chance * len(scores) < CHANCE:
                problems.append(
                    Problem("source order", path, f"{what} go with the order of the source (by chance: {chance:.0e})")
                )
        step, times = _commonest_step(rows[known])
        if times >= (limit := _unlikely_times(len(known))):
            told = f"{times} times the next row is the one {step:+d} further in the source; by chance: below {limit}"
            problems.append(Problem("source order", path, told))
    return problems


def _scores(rows: Rows, targets: NDArray[np.int64]) -> Iterator[tuple[str, float]]:
    """What is looked at, and its rank correlation in standard deviations."""
    if len(rows) < 2:
        return
    yield "all its rows", _deviations(rows)
    names = np.unique(targets)
    classes = [(name, rows[targets == name]) for name in names if (targets == name).sum() > 1] if len(names) > 1 else []
    each = [_deviations(members) for _, members in classes]
    yield from ((f"rows of class {name}", score) for (name, _), score in zip(classes, each, strict=True))
    if each:  # many classes with few rows each
        yield "rows within their classes", sum(each) / math.sqrt(len(each))


def _deviations(rows: Rows) -> float:
    """Spearman's ρ of the places in the bank and in the source, over its standard deviation 1 / sqrt(n - 1)."""
    count = len(rows)
    distance = np.arange(count) - np.argsort(np.argsort(rows))
    rho = 1 - 6 * float(np.square(distance, dtype=np.float64).sum()) / (count * (count**2 - 1))
    return rho * math.sqrt(count - 1)


def _commonest_step(rows: Rows) -> tuple[int, int]:
    """From one row to the next: by how many rows of the source, most often, and how often."""
    steps, times = np.unique(np.diff(np.argsort(np.argsort(rows))), return_counts=True)
    return (int(steps[times.argmax()]), int(times.max())) if len(steps) else (0, 0)


@cache
def _unlikely_times(count: int) -> int:
    """How often the commonest step comes in less than one of a million random orders; above `count` where no number is.

    The chance that one step comes m times is at most the expected number of ways to choose m places that all take it.
    Such places lie in c chains, in C(m - 1, c - 1)·C(n - m, c) ways; they fix m + c rows, of which the first of each
    chain can be any: n^c of the n!/(n - m - c)! ways. There are 2(n - 1) steps.
    """

    def chance(times: int) -> float:
        chains = range(1, min(times, count - times) + 1)
        ways = [math.comb(times - 1, c - 1) * math.comb(count - times, c) * count**c for c in chains]
        return sum(2 * (count - 1) * way / math.perm(count, times + c) for c, way in zip(chains, ways, strict=True))

    return next((times for times in range(1, count) if chance(times) < CHANCE), count + 1)
