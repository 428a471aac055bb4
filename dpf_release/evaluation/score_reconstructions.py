"""Answers in pictures: what they are worth, and what someone without the bank would answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from dpf_release.attacks.interface import Reconstructions
from dpf_release.attacks.threat_models import BATCH, ReleaseView, batches
from dpf_release.core.arrays import Rows
from dpf_release.evaluation.gallery import pictures_of
from dpf_release.evaluation.scoring import References, RowScores, leakages_of, score_pictures, way_of
from dpf_release.evaluation.targets import LEAST_POOL, Target, Truth
from dpf_release.evaluation.verdicts import Criterion, Scored, re_identification_limit
from dpf_release.evaluation.views import Setting
from dpf_release.release.attack_report import Interval, Way

MEAN_OF = 20 * BATCH  # pictures of Q


def baselines(view: ReleaseView, truth: Truth) -> dict[str, Callable[[Rows], Tensor]]:
    """What someone without the bank would answer.

    The mean picture of Q; for each label (of regression, each bin) the mean of Q's pictures that φ2 gives it; grey.
    """
    labels = np.concatenate([np.full(len(pool.rows), pool.label) for pool in truth.pools])
    bins = int(truth.bins.max()) + 1
    sums, counts = torch.zeros(bins, *view.public.read(np.arange(1)).shape[1:]), torch.zeros(bins)
    edges: list[float] = []
    if view.task == "regression":
        edges = [float(view.bank.targets[truth.bins == label][:, 0].max()) for label in range(bins - 1)]
    for chosen in batches(np.arange(min(len(view.public), MEAN_OF))):
        pictures = view.public.read(chosen)
        answers = view.answers(view.features(pictures)).cpu()
        given = torch.bucketize(answers[:, 0], torch.tensor(edges)) if edges else answers.argmax(1)
        given = given.clamp_max(bins - 1)
        sums.index_add_(0, given, pictures.float() / 255)
        counts.index_add_(0, given, torch.ones(len(given)))
    mean = (sums.sum(0) / counts.sum())[None]
    by_label = torch.where(counts[:, None, None, None] > 0, sums / counts.clamp_min(1)[:, None, None, None], 0.5)
    return {
        "mean of Q": lambda positions: mean.expand(len(positions), *mean.shape[1:]),
        "mean of Q by label": lambda positions: by_label[torch.from_numpy(labels[positions])],
        "grey": lambda positions: torch.full((len(positions), *mean.shape[1:]), 0.5),
    }


def score_reconstructions(
    answer: Reconstructions, target: Target, setting: Setting, references: Callable[[], References]
) -> Scored:
    """Every decoder against its rows' pictures; the one with the most leakage stands for the attack."""
    limits, scores = setting.workbench.limits, score_decoders(answer, target, setting.truth)
    places, truth = _answered(answer, setting.truth)
    clean, between = references().clean, references().at(places)
    ways = {name: way_of(of, between, truth.sizes, setting.seed) for name, of in scores.items()}
    leakages = {name: way.leakage.value if way.leakage else 0.0 for name, way in ways.items()}
    best = max(scores, key=lambda name: (leakages[name], float(scores[name].primary.mean())))
    found = [way.measures.get("re_identification") for way in ways.values()]
    highest = max((value for value in found if value is not None), key=lambda value: value.value, default=None)
    of_somebody = any(of.guess.any() for of in scores.values())  # else no match is right, and none wrong
    own = re_identification_limit(truth.sizes, limits["re_identification"], scores[best].guess)
    return Scored(
        ways=ways,
        best=best,
        baseline=float(between.baseline.primary.mean()),
        ceiling=float(between.ceiling.primary.mean()),
        leakage=ways[best].leakage,
        re_identification=highest,
        among=truth.among if of_somebody else 0,
        criteria=(
            *(Criterion("leakage", one, limits["leakage"]) for way in ways.values() for one in leakages_of(way)),
            *(Criterion("re-identification", one, own) for one in found if of_somebody),
        ),
        series=_series(answer, ways),
        pictures=pictures_of(truth, scores[best], lambda at: answer.decoders[best](places[at]), clean) if clean else {},
        rows=len(truth.asked),
        judged=int((truth.sizes >= LEAST_POOL).sum()),
        lacks=answer.lacks,
    )


def score_decoders(answer: Reconstructions, target: Target, truth: Truth) -> dict[str, RowScores]:
    """Scores of each decoder, of the rows that it answers for."""
    places, part = _answered(answer, truth)

    def score_of(pictures: Callable[[Rows], Tensor]) -> RowScores:
        return score_pictures(part, target.shown, lambda positions: pictures(places[positions]))

    return {name: score_of(pictures) for name, pictures in answer.decoders.items()}


def _answered(answer: Reconstructions, truth: Truth) -> tuple[Rows, Truth]:
    """Positions that there is an answer for, and the truth of those."""
    places = np.arange(len(truth.asked)) if answer.answered is None else answer.answered
    return places, truth.at(places)


def _series(answer: Reconstructions, ways: Mapping[str, Way]) -> dict[str, dict[str, Interval]]:
    """The leakage of the best way for each number of each series."""
    series: dict[str, dict[str, Interval]] = {}
    for way, (name, number) in answer.series.items():
        leakage, known = ways[way].leakage, series.setdefault(name, {})
        if leakage is not None and (str(number) not in known or known[str(number)].value < leakage.value):
            known[str(number)] = leakage
    return series
