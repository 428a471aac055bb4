"""Whether the order of public rows tells the order of the source: it was drawn at random, and must look so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpf_release.leaks.findings import Problem, Rows, Sources, public_banks
from dpf_release.pipeline.project import Project

CHANCE = 1e-6  # how often a bank in truly random order may be refused
# Neighbours of the source that are neighbours in a bank number about two, whatever its size (Poisson): this many in one
# of 10^8 banks.
MOST_NEIGHBOURS = 15


def source_order(release: Path, project: Project) -> list[Problem]:
    """Splits whose rows stand in an order that goes with the order of the image table, as a whole or in a class.

    Spearman's rank correlation ρ of n rows in random order has the mean 0 and the variance 1 / (n - 1); its tail is
    lighter than the normal one that its probability is taken from. Rows that were shuffled in blocks have no
    correlation, but too many neighbours from the source.
    """
    sources, problems = Sources.of(project), []
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
        if (neighbours := _neighbours(rows[known])) >= MOST_NEIGHBOURS:
            problems.append(
                Problem("source order", path, f"{neighbours} neighbours are neighbours in the source; by chance: 2")
            )
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


def _neighbours(rows: Rows) -> int:
    ranks = np.argsort(np.argsort(rows))
    return int((np.abs(np.diff(ranks)) == 1).sum())
