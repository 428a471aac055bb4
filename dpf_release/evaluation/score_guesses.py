"""The scorers of what is guessed: whose row is it, which pictures are in S, which value has an attribute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpf_release.attacks.interface import Attributes, Likeness, Links
from dpf_release.core.arrays import Rows
from dpf_release.core.privacy import highest_auc, highest_tpr
from dpf_release.evaluation.scoring import DRAWS, References, interval_over, share_interval, wilson
from dpf_release.evaluation.targets import LEAST_POOL, QueryTruth, Target, Units
from dpf_release.evaluation.verdicts import GROUPS, PRIVACY, Criterion, Scored, re_identification_limit
from dpf_release.evaluation.views import Labelled, Setting, draw_labelled, draw_queries
from dpf_release.release.attack_report import Interval, Way

Alike = NDArray[np.float32]
Counts = NDArray[np.int64]
LINK_DRAWS = 500  # of members and non-members, for each way
LEAST_NON_MEMBERS = 1000  # for a false positive rate of 0.1 %


def score_links(answer: Links, target: Target, setting: Setting, references: Callable[[], References]) -> Scored:
    """Every way counts, in each measure. Leakage is reckoned by top-1, else by AUC: between a guess and certainty."""
    queries = draw_queries(target, setting)
    links = any(way.pools is not None for way in answer.ways.values())
    # What links no rows looks at the network alone, which has not learnt from all that is in the bank: `val` is, too.
    # Rows that are drawn are drawn of all members.
    inside = (
        queries.members if links or answer.drawn or queries.trained_on is None else queries.members & queries.trained_on
    )
    ways = {name: Way(measures=measure_links(way, queries, inside, setting.seed)) for name, way in answer.ways.items()}
    if answer.drawn and queries.units is not None:
        ways |= measure_persons(answer.ways, queries.units, setting.seed)
    among = queries.pools.shape[1] if links and (queries.own >= 0).any() else 0  # drawn rows may be of no picture
    primary = "top1" if among else "auc"
    having = [name for name in ways if primary in ways[name].measures]
    best = max(having, key=lambda name: ways[name].measures[primary].value, default=next(iter(ways)))
    return Scored(
        ways=ways,
        best=best,
        baseline=1 / among if among else 0.5,
        ceiling=1.0,
        re_identification=ways[best].measures.get("top1") if among >= LEAST_POOL else None,
        among=among,
        criteria=(
            *_criteria(ways, among, setting.workbench.limits),
            *(_criteria_of_groups(ways, target.groups / among) if among and target.groups else ()),
            *(_criteria_of_bound(ways, target.bound_mu) if answer.drawn and target.bound_mu is not None else ()),
        ),
        primary=primary,
        told=_membership_told(ways)[: 1 if target.by_auc else None],
        rows=int(inside.sum()),
    )


def _criteria(ways: Mapping[str, Way], among: int, limits: Mapping[str, float]) -> tuple[Criterion, ...]:
    """Of membership, and where rows are linked (among some) of the match; what no way measures is open."""
    limit_of = {"auc": ("AUC", limits["auc"]), "tpr_at_1_percent": ("TPR at 1 % FPR", limits["tpr"])}
    if among:
        limit_of["top1"] = ("top-1", re_identification_limit(np.array([among]), limits["top1"]))
    criteria: list[Criterion] = []
    for name, (what, limit) in limit_of.items():
        found = [way.measures[name] for way in ways.values() if name in way.measures]
        told = found and (name != "top1" or among >= LEAST_POOL)
        criteria += [Criterion(what, one, limit) for one in found] if told else [Criterion(what, None, limit)]
    return tuple(criteria)


def _criteria_of_bound(ways: Mapping[str, Way], mu: float) -> tuple[Criterion, ...]:
    """Of each way what an attacker could reach at the most, where rows are under a privacy bound of μ."""
    limit_of = {"auc": ("AUC", highest_auc(mu)), "tpr_at_1_percent": ("TPR at 1 % FPR", highest_tpr(mu, 0.01))}
    return tuple(
        Criterion(f"with a bound, {what}", way.measures[name], limit, PRIVACY)
        for name, (what, limit) in limit_of.items()
        for way in ways.values()
        if name in way.measures
    )


def _criteria_of_groups(ways: Mapping[str, Way], limit: float) -> tuple[Criterion, ...]:
    """Of each way that links rows: one of the images of its group stands for a drawn row, and any of them could.

    So whoever knew the groups would name the right row of a pool once in as many times as it has rows of the group; on
    average over the pool's rows that is groups / rows.
    """
    found = [way.measures["top1"] for way in ways.values() if "top1" in way.measures]
    return tuple(Criterion("top-1 of drawn rows", one, min(1.0, limit), GROUPS) for one in found)


def measure_persons(ways: Mapping[str, Likeness], units: Units, seed: int) -> dict[str, Way]:
    """Membership by person, of each way: by the mean and by the highest of the scores of a person's query images.

    A member is whoever has an image in S train, if it is another one too.
    """
    _, number, counts = np.unique(units.of, return_inverse=True, return_counts=True)
    members = np.zeros(len(counts), np.bool_)
    members[number] = units.members
    if not members.any() or members.all():
        return {}
    found = {}
    for name, way in ways.items():
        highest = np.full(len(counts), -np.inf)
        np.maximum.at(highest, number, way.membership)
        of_persons = {"mean": np.bincount(number, way.membership) / counts, "highest": highest}
        for by, scores in of_persons.items():
            scores = scores.astype(np.float32)
            measures = membership_measures(scores[members], scores[~members], seed)
            found[f"{name}, by person ({by})"] = Way(measures=measures)
    return found


def measure_links(way: Likeness, queries: QueryTruth, inside: NDArray[np.bool_], seed: int) -> dict[str, Interval]:
    """What one way of looking found; `inside` (n,) are to be told from those that are not in the bank.

    Returns:
        `top1`, `top5`: share of members whose own row is the most alike of its pool, or among the five most. `persons`:
        share of the persons with a member of whom at least one picture is found so. `auc`, `tpr_at_1_percent`,
        `tpr_at_0.1_percent`: membership; the last with 1,000 non-members or more.
    """
    members, measures = queries.members, {}
    linked = queries.own >= 0
    if way.pools is not None and linked.any():
        rank = ranks(way.pools[linked], queries.pools[linked], queries.own[linked])
        measures["top1"] = share_interval(rank < 1)
        measures["top5"] = share_interval(rank < 5)
        if queries.persons is not None:
            persons, number = np.unique(queries.persons[linked], return_inverse=True)
            found = np.zeros(len(persons), np.bool_)
            np.logical_or.at(found, number, rank < 1)
            measures["persons"] = share_interval(found)
    if inside.any() and not members.all():
        measures |= membership_measures(way.membership[inside], way.membership[~members], seed)
    return measures


def ranks(likeness: Alike, pools: Rows, own: Rows) -> NDArray[np.float64]:
    """How many rows of its pool are more alike than its own, (n,); of those just as alike, half."""
    mine = likeness[pools == own[:, None]][:, None]  # each pool has its own once
    more, same = (likeness > mine).sum(axis=1), (likeness == mine).sum(axis=1) - 1
    # A likeness that is not a number finds nothing.
    return np.where(np.isfinite(mine[:, 0]), more + same / 2, likeness.shape[1])


def membership_measures(members: Alike, others: Alike, seed: int) -> dict[str, Interval]:
    """AUC, and the share of members found where at most 1 % (0.1 %) of others are taken for one. Bootstrap of both."""
    drawn_members, drawn_others = _drawn(len(members), len(others), seed)
    out = {"auc": _auc(members, others, drawn_members, drawn_others)}
    for name, rate, least in (("tpr_at_1_percent", 0.01, 0), ("tpr_at_0.1_percent", 0.001, LEAST_NON_MEMBERS)):
        if len(others) >= least:
            out[name] = _tpr(members, others, rate, drawn_members, drawn_others)
    return out


@lru_cache(maxsize=1)  # all ways of an attack are measured by the same draws
def _drawn(members: int, others: int, seed: int) -> tuple[Counts, Counts]:
    """(draws, n) how often each of so many members, and of so many others, was drawn."""
    generator = np.random.default_rng([seed, 7])
    found = [generator.multinomial(count, np.full(count, 1 / count), LINK_DRAWS) for count in (members, others)]
    for drawn in found:
        drawn.flags.writeable = False
    return found[0], found[1]


def _auc(members: Alike, others: Alike, drawn_members: Counts, drawn_others: Counts) -> Interval:
    ordered = np.sort(others)
    below, up_to = (np.searchsorted(ordered, members, side=side) for side in ("left", "right"))
    value = float((below + up_to).mean() / 2 / len(others))
    # The number of drawn others below a member, for each draw: a running sum over the ordered others.
    running = np.pad(np.cumsum(drawn_others[:, np.argsort(others)], axis=1), ((0, 0), (1, 0)))  # (draws, others + 1)
    wins = (running[:, below] + running[:, up_to]) / 2
    return interval_over((drawn_members * wins).sum(axis=1) / len(members) / len(others), value)


def _tpr(members: Alike, others: Alike, rate: float, drawn_members: Counts, drawn_others: Counts) -> Interval:
    """Of members and others just at the threshold, as many are taken, in the same proportion, as may be."""
    allowed = int(rate * len(others))
    falling, sinking = np.argsort(-others), np.argsort(-members)
    # Of each draw, the first of the others, from the top, at which more than are allowed were taken for members.
    alarms = np.cumsum(np.concatenate([np.ones((1, len(others)), np.int64), drawn_others])[:, falling], axis=1)
    edges = others[falling[(alarms > allowed).argmax(axis=1)]]
    hits = np.cumsum(np.concatenate([np.ones((1, len(members)), np.int64), drawn_members])[:, sinking], axis=1)
    above, level = _above_and_at(others[falling], alarms, edges)
    found_above, found_at = _above_and_at(members[sinking], hits, edges)
    shares = (found_above + (allowed - above) / level * found_at) / len(members)
    value, drawn = float(shares[0]), shares[1:]
    found = interval_over(drawn, value)
    # Few are found, or none: the bootstrap alone would be too sure.
    low, high = wilson(round(value * len(members)), len(members))
    return Interval(value=value, low=min(found.low, low), high=max(found.high, high))


def _above_and_at(falling: Alike, running: Counts, edges: Alike) -> tuple[Counts, Counts]:
    """Of each draw how many scores are above its edge, and how many are just there; `running` is up to each score."""
    draws, running = np.arange(len(edges)), np.pad(running, ((0, 0), (1, 0)))
    first, last = (np.searchsorted(-falling, -edges, side=side) for side in ("left", "right"))
    return running[draws, first], running[draws, last] - running[draws, first]


def _membership_told(ways: Mapping[str, Way]) -> tuple[Interval, ...]:
    """2 AUC - 1, from 0, a coin, to 1; and the members that are found among few false ones. Each by its best way."""
    told = [way.measures for way in ways.values() if "auc" in way.measures]
    if not told:
        return ()
    auc, tpr = (max((of[name] for of in told), key=lambda one: one.value) for name in ("auc", "tpr_at_1_percent"))
    return Interval(value=2 * auc.value - 1, low=2 * auc.low - 1, high=2 * auc.high - 1), tpr


# --------------------------------------------------------------------------------------------- attributes


def score_attributes(
    answer: Attributes, target: Target, setting: Setting, references: Callable[[], References]
) -> Scored:
    """Balanced accuracy of each probe, and its gain over the best guess from the label alone."""
    limit = setting.workbench.limits["attribute"]
    labelled = draw_labelled(target, setting)
    right = from_the_label(labelled, setting.truth.bins)
    ways = {
        name: Way(measures=measure_attribute(predicted, right, labelled.asked_values, setting.seed))
        for name, predicted in answer.probes.items()
    }
    best = max(ways, key=lambda name: ways[name].measures["gain"].value)
    return Scored(
        ways=ways,
        best=best,
        baseline=float(np.average(right, weights=_weights(labelled.asked_values))),
        criteria=tuple(Criterion("gain over the label", way.measures["gain"], limit) for way in ways.values()),
        primary="accuracy",
        rows=len(labelled.asked),
    )


def from_the_label(labelled: Labelled, bins: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which asked rows are guessed right by someone who has the label and the rows that are known, and no features.

    The better of two guesses: the commonest value of the class (or bin), and the one that is commoner there than it is
    elsewhere, which is the best that can be done for balanced accuracy.
    """
    counts = np.zeros((int(bins.max()) + 1, len(labelled.values)))
    np.add.at(counts, (bins[labelled.known_rows], labelled.known_values), 1)
    relative = counts / np.maximum(counts.sum(axis=0), 1)
    guesses = [table.argmax(axis=1)[bins[labelled.asked]] == labelled.asked_values for table in (counts, relative)]
    weights = _weights(labelled.asked_values)
    return max(guesses, key=lambda right: float(np.average(right, weights=weights)))


def measure_attribute(
    predicted: NDArray[np.int64], by_label: NDArray[np.bool_], values: NDArray[np.int64], seed: int
) -> dict[str, Interval]:
    """What a probe found.

    Returns:
        `accuracy`: mean over values of the share of their rows that are right. `rank1`: share of rows that are right.
        `gain`: accuracy above that of the label alone, over the same bootstrap draws.
    """
    right, weights = predicted == values, _weights(values)
    drawn = np.random.default_rng([seed, 9]).multinomial(len(values), np.full(len(values), 1 / len(values)), DRAWS)
    total = drawn @ weights
    accuracy = float(np.average(right, weights=weights))
    accuracies = drawn @ (weights * right) / total
    gain = accuracy - float(np.average(by_label, weights=weights))
    gains = accuracies - drawn @ (weights * by_label) / total
    found = {"accuracy": interval_over(accuracies, accuracy), "gain": interval_over(gains, gain)}
    # Where almost none or almost all are right, the bootstrap alone would be too sure.
    effective = max(1, round(weights.sum() ** 2 / np.square(weights).sum()))
    low, high = wilson(round(accuracy * effective), effective)
    below, above = min(0.0, low - found["accuracy"].low), max(0.0, high - found["accuracy"].high)
    wider = {key: Interval(value=of.value, low=of.low + below, high=of.high + above) for key, of in found.items()}
    return {"accuracy": wider["accuracy"], "rank1": share_interval(right), "gain": wider["gain"]}


def _weights(values: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of rows, so that each value weighs the same."""
    weights: NDArray[np.float64] = 1 / np.bincount(values)[values]
    return weights
