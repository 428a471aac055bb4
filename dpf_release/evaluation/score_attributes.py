"""The scorer of attributes: how much better than from the label alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from dpf_release.attacks.interface import Attributes
from dpf_release.evaluation.query_images import Labelled, draw_labelled
from dpf_release.evaluation.scoring import DRAWS, References, share_interval
from dpf_release.evaluation.targets import Target
from dpf_release.evaluation.verdicts import Criterion, Scored
from dpf_release.evaluation.views import Setting
from dpf_release.release.attack_report import Interval, Way


def score_attributes(
    answer: Attributes, target: Target, setting: Setting, references: Callable[[], References]
) -> Scored:
    """Balanced accuracy of each probe, and its gain over the best guess from the label alone."""
    limit = setting.workbench.limits["attribute"]
    labelled = draw_labelled(setting.workbench, target, setting.truth, setting.seed)
    right = from_the_label(labelled, setting.truth.bins)
    ways = {
        name: Way(measures=measure(predicted, right, labelled.asked_values, setting.seed))
        for name, predicted in answer.probes.items()
    }
    best = max(ways, key=lambda name: ways[name].measures["gain"].value)
    return Scored(
        ways=ways,
        best=best,
        baseline=float(np.average(right, weights=_weights(labelled.asked_values))),
        ceiling=None,
        leakage=None,
        found=None,
        among=0,
        criteria=tuple(Criterion("gain over the label", way.measures["gain"], limit) for way in ways.values()),
        series={},
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


def measure(
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
    low, high = np.quantile(accuracies, [0.025, 0.975])
    # Where almost none or almost all are right, the bootstrap alone would be too sure.
    effective = max(1, round(weights.sum() ** 2 / np.square(weights).sum()))
    wilson = binomtest(round(accuracy * effective), effective).proportion_ci(0.95, "wilson")
    gain_low, gain_high = np.quantile(gains, [0.025, 0.975])
    wider = (min(0.0, float(wilson.low) - float(low)), max(0.0, float(wilson.high) - float(high)))
    return {
        "accuracy": Interval(value=accuracy, low=float(low) + wider[0], high=float(high) + wider[1]),
        "rank1": share_interval(right),
        "gain": Interval(value=gain, low=float(gain_low) + wider[0], high=float(gain_high) + wider[1]),
    }


def _weights(values: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of rows, so that each value weighs the same."""
    weights: NDArray[np.float64] = 1 / np.bincount(values)[values]
    return weights
