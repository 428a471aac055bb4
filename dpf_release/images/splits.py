"""Which rows of a table are `val` and `test`, where its source does not say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dpf_release.errors import ImageError
from dpf_release.images.table import ImageTable, first_of


def complete_splits(
    source: Path,
    table: ImageTable,
    groups: np.ndarray | None,
    fractions: Mapping[str, float],
    seed: int,
    known: Mapping[str, str],
) -> np.ndarray:
    """Returns the (N,) splits, with those that have no row yet carved from `train`, or as they are `known`."""
    if any(fraction < 0 for fraction in fractions.values()) or sum(fractions.values()) >= 1:
        raise ValueError(f"fractions must be at least 0 and sum to less than 1, found {dict(fractions)}")
    if not len(table):
        raise ImageError(f"{source}: expected JPEG, PNG or WebP images, found none. Check the path.")
    splits, pool = table.splits.copy(), table.rows_of("train")
    if not len(pool):
        raise ImageError(
            f"{source}: expected images in the split train, found only {', '.join(sorted(set(splits)))}. "
            "Add a split train, or remove the splits to have them made."
        )
    missing = [split for split, fraction in fractions.items() if fraction and split not in splits]
    wanted = {split: max(1, round(fractions[split] * len(pool))) for split in missing}
    rng = np.random.default_rng(seed)
    if wanted and known:
        splits[pool] = _as_before(table, pool, groups, wanted, known)
    elif wanted:
        carve, of = (_carve_rows, _strata(table)) if groups is None else (_carve_groups, groups)
        carved = carve(pool, of[pool], wanted, rng)
        if any(not len(carved[split]) for split in wanted):
            unit, made = "images" if groups is None else "groups", " and ".join(missing)
            raise ImageError(
                f"{source}: expected enough {unit} in train to make {made}, found {len(pool)} "
                f"images that leave none over. Add {unit}, or name the splits yourself."
            )
        for split, rows in carved.items():
            splits[rows] = split
    if groups is not None:
        _refuse_shared_groups(source, groups, splits)
    return splits


def _as_before(
    table: ImageTable, pool: np.ndarray, groups: np.ndarray | None, wanted: Mapping[str, int], known: Mapping[str, str]
) -> list[str]:
    """Returns the splits of the rows of `pool` as they are known; a new row goes with its group, or to `train`."""
    before = [known.get(table.paths[row]) for row in pool]
    names = pool if groups is None else groups[pool]
    of_group = {name: split for name, split in zip(names, before, strict=True) if split}
    splits = [split or of_group.get(name) for name, split in zip(names, before, strict=True)]
    return [split if split and split in wanted else "train" for split in splits]


def _strata(table: ImageTable) -> np.ndarray:
    """Returns (N,) integers: the class, or the decile of the first target."""
    if not table.target_names:
        return table.targets
    first = table.targets[:, 0]
    return np.searchsorted(np.quantile(first, np.arange(0.1, 0.95, 0.1)), first)


def _carve_rows(
    pool: np.ndarray, strata: np.ndarray, wanted: Mapping[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns rows of `pool` for each split, every stratum in proportion, to within a row or so."""
    order = rng.permutation(len(pool))
    order = order[np.argsort(strata[order], kind="stable")]
    # One row of each stratum stays: a class that training never sees cannot be judged.
    free = np.delete(order, np.unique(strata[order], return_index=True)[1])
    chosen = pool[_even(free, sum(wanted.values()), rng)]
    carved = {}
    for split, count in wanted.items():
        carved[split] = _even(chosen, count, rng)
        chosen = chosen[~np.isin(chosen, carved[split])]
    return carved


def _even(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `count` of the values at even distances from a random start; none where there are too few."""
    if count > len(values):
        return values[:0]
    return values[((np.arange(count) + rng.random()) * len(values) / count).astype(np.int64)]


def _carve_groups(
    pool: np.ndarray, groups: np.ndarray, wanted: Mapping[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns rows of `pool` for each split, in whole groups, not more than wanted where that can be."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    left = list(rng.permutation(len(names)))
    carved = {}
    for split, count in wanted.items():
        taken: list[int] = []
        for group in left:
            if len(taken) + 1 < len(left) and sizes[taken].sum() + sizes[group] <= count:
                taken.append(group)
        if not taken and len(left) > 1:  # every group is larger than the split should be
            taken = [min(left, key=sizes.__getitem__)]
        left = [group for group in left if group not in taken]
        carved[split] = pool[np.isin(inverse, np.array(taken, dtype=np.int64))]
    return carved


def _refuse_shared_groups(source: Path, groups: np.ndarray, splits: np.ndarray) -> None:
    homes: dict[str, list[str]] = {}
    for group, split in sorted(set(zip(groups.tolist(), splits.tolist(), strict=True))):
        homes.setdefault(group, []).append(split)
    shared = [f"{group} ({', '.join(found)})" for group, found in homes.items() if len(found) > 1]
    if shared:
        raise ImageError(
            f"{source}: expected each group in one split, found {len(shared)} in several: {first_of(shared)}. "
            "Correct the column split, or remove it to have the splits made."
        )
