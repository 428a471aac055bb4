"""The scorer against known answers: what a perfect, an empty, a negative and a shuffled attack score."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dpf_release.attacks
from dpf_release.attacks.interface import Reconstructions
from dpf_release.attacks.threat_models import HeldRows
from dpf_release.bank.rows import Concat
from dpf_release.core.arrays import Rows
from dpf_release.evaluation.score_reconstructions import score_reconstructions
from dpf_release.evaluation.scoring import (
    References,
    RowScores,
    affine_fit,
    leakages_of,
    ratio_interval,
    score_pictures,
    share_interval,
    way_of,
)
from dpf_release.evaluation.targets import Target, Truth, bins_of, draw_pools, groups_of, images_of_groups
from dpf_release.evaluation.verdicts import Criterion, judge, re_identification_limit
from dpf_release.models.metrics import ssim
from dpf_release.owner.config import GateSection
from dpf_release.poisoning.chain import build_chain
from dpf_release.poisoning.groups import Groups
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from dpf_release.release.attack_report import Interval, Power
from rows_in_memory import rows_of

POOL, CLASSES = 60, 2


def pictures(count: int, seed: int) -> Tensor:
    """Smooth random pictures, (count, 3, 24, 24) uint8: like photographs, no two alike."""
    draws = torch.Generator().manual_seed(seed)
    coarse = 0.7 * torch.rand(count, 1, 5, 5, generator=draws) + 0.3 * torch.rand(count, 3, 5, 5, generator=draws)
    return (torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic").clamp(0, 1) * 255).byte()


ORIGINALS = pictures(POOL * CLASSES, seed=1)
LABELS = np.repeat(np.arange(CLASSES), POOL)


def itself(rows: Rows) -> Contributors:
    return Contributors.themselves(rows)


def made_of(positions: Rows, members: Rows) -> Contributors:
    return Contributors(positions, members, np.ones(len(positions), np.int64))


TRUTH = Truth(draw_pools(LABELS, itself, len(LABELS), seed=0), lambda rows: ORIGINALS[torch.from_numpy(rows)], LABELS)


def perfect(positions: Rows) -> Tensor:
    return ORIGINALS[torch.from_numpy(TRUTH.asked[positions])].float() / 255


def mean_of_class(positions: Rows) -> Tensor:
    means = torch.stack([ORIGINALS[label == LABELS].float().mean(0) / 255 for label in range(CLASSES)])
    return means[torch.from_numpy(LABELS[TRUTH.asked[positions]])]


def scored(reconstruct: object) -> RowScores:
    return score_pictures(TRUTH, itself, reconstruct)  # type: ignore[arg-type]


REFERENCES = References(scored(mean_of_class), scored(perfect))


def test_a_perfect_reconstruction_leaks_all_and_the_class_mean_nothing() -> None:
    found = way_of(scored(perfect), REFERENCES, TRUTH.sizes, seed=0)
    nothing = way_of(scored(mean_of_class), REFERENCES, TRUTH.sizes, seed=0)
    assert found.leakage is not None
    assert found.leakage.value == pytest.approx(1.0)
    assert found.measures["re_identification"].value == 1.0
    assert nothing.leakage is not None
    assert abs(nothing.leakage.value) < 1e-9
    assert nothing.measures["re_identification"].value < 5 / POOL


def test_a_negative_and_false_colours_are_not_called_safe() -> None:
    def false_colours(positions: Rows) -> Tensor:
        return perfect(positions)[:, [2, 0, 1]] * 0.5 + 0.2

    for disguised in (lambda positions: 1 - perfect(positions), false_colours):
        way = way_of(scored(disguised), REFERENCES, TRUTH.sizes, seed=0)
        assert way.leakage is not None
        assert way.leakage.value > 0.95
        assert way.measures["ssim"].value < 0.8  # the plain measure would have been fooled
    negative = way_of(scored(lambda positions: 1 - perfect(positions)), REFERENCES, TRUTH.sizes, seed=0)
    assert negative.measures["re_identification"].value == 1.0
    assert negative.measures["abs_ssim"].value == pytest.approx(1.0)


def test_rows_shuffled_within_their_pools_score_as_before_and_rows_of_another_pool_do_not() -> None:
    generator = np.random.default_rng(3)
    place_of = {row: place for place, row in enumerate(TRUTH.asked)}
    within = np.concatenate([generator.permutation(pool.rows) for pool in TRUTH.pools])
    places = np.array([place_of[row] for row in within])
    noisy = lambda at: (perfect(at) + 0.1 * torch.sin(17 * perfect(at))).clamp(0, 1)  # noqa: E731
    plain, shuffled = scored(noisy), scored(lambda at: noisy(places[at]))
    across = scored(lambda at: noisy((at + POOL) % len(TRUTH.asked)))
    assert np.sort(shuffled.matched) == pytest.approx(np.sort(plain.matched), abs=1e-6)
    assert across.matched.mean() < plain.matched.mean() - 0.2
    assert shuffled.own.mean() < 0.2 < plain.own.mean()  # whose row it was is not taken on trust, nor forgotten
    leakages = [way_of(of, REFERENCES, TRUTH.sizes, seed=0).leakage for of in (plain, shuffled, across)]
    assert leakages[0].value == pytest.approx(leakages[1].value, abs=0.1)  # type: ignore[union-attr]
    assert leakages[2].value < 0.1  # type: ignore[union-attr]


def test_what_says_a_little_is_not_made_less_by_what_an_empty_answer_is_matched_with() -> None:
    others = pictures(POOL * CLASSES, seed=9).float() / 255
    scores = scored(lambda at: 0.3 * perfect(at) + 0.7 * others[torch.from_numpy(at)])
    baseline, ceiling = REFERENCES.baseline, REFERENCES.ceiling
    by_match = ratio_interval(scores.matched, baseline.matched, ceiling.matched, 0)
    leakage = way_of(scores, REFERENCES, TRUTH.sizes, seed=0).leakage
    assert leakage is not None
    assert by_match is not None
    assert baseline.matched.mean() > baseline.primary.mean() + 0.1  # the class mean, and the picture most like it
    assert leakage.low > by_match.high
    nothing = way_of(scored(lambda at: others[torch.from_numpy(at)]), REFERENCES, TRUTH.sizes, seed=0)
    assert nothing.leakage is not None
    assert nothing.leakage.high < 0.1


def test_where_one_of_the_two_leakages_is_not_defined_the_other_may_fail_and_never_pass() -> None:
    shuffle = np.random.default_rng(3).permutation(POOL)
    moved = np.concatenate([shuffle, shuffle + POOL])
    shuffled = scored(lambda at: perfect(moved[at]))  # all of it is seen, at other rows
    short = REFERENCES.baseline.measures | {"affine_ssim_matched": REFERENCES.ceiling.matched - 0.05}
    near = References(replace(REFERENCES.baseline, measures=short), REFERENCES.ceiling)
    way = way_of(shuffled, near, TRUTH.sizes, seed=0)
    assert way.leakage is None
    found = leakages_of(way)
    assert found[0] is None
    assert found[1] == way.measures["leakage_own"]
    assert found[1].high < 0.2  # alone it would have passed for a defence
    limits = [Criterion("leakage", one, 0.1) for one in found]
    assert judge(limits[:1], Power(passed=True), ())[0] == "inconclusive"
    assert (
        judge(
            [Criterion("leakage", one, 0.01) for one in leakages_of(way_of(scored(perfect), near, TRUTH.sizes, 0))],
            Power(passed=True),
            (),
        )[0]
        == "fail"
    )
    whole = way_of(shuffled, REFERENCES, TRUTH.sizes, seed=0)
    assert leakages_of(whole) == [whole.leakage]
    assert whole.leakage is not None
    assert whole.leakage.value > 0.9


HALVES = np.random.default_rng(0).permutation(POOL).reshape(-1, 2)
PARTNER = np.empty(POOL, np.int64)
PARTNER[HALVES[:, 0]], PARTNER[HALVES[:, 1]] = HALVES[:, 1], HALVES[:, 0]
PARTNER = np.concatenate([PARTNER, PARTNER + POOL])


def pairs(rows: Rows) -> Contributors:
    """Each row is made of its own picture and of another one."""
    members = np.sort(np.stack([rows, PARTNER[rows]], axis=1), axis=1)
    return made_of(np.repeat(np.arange(len(rows)), 2), members.ravel())


def test_any_of_the_pictures_that_a_row_is_made_of_counts_as_its_own() -> None:
    def partners(positions: Rows) -> Tensor:
        return ORIGINALS[torch.from_numpy(PARTNER[TRUTH.asked[positions]])].float() / 255

    assert score_pictures(TRUTH, pairs, partners).own.mean() == 1.0
    assert score_pictures(TRUTH, itself, partners).own.mean() == 0.0
    for contributors, pictures in ((pairs, 2), (itself, 1)):
        assert np.allclose(score_pictures(TRUTH, contributors, partners).guess * TRUTH.sizes, pictures)


@pytest.mark.parametrize("answered", [None, np.arange(0, 2 * POOL, 3)])
def test_the_limit_of_a_match_goes_with_what_the_answered_rows_are_made_of(answered: Rows | None) -> None:
    setting: Any = SimpleNamespace(truth=TRUTH, seed=0, workbench=SimpleNamespace(limits=GateSection().limits))
    rows = HeldRows(np.zeros(len(TRUTH.asked), np.int64), lambda rows: np.empty(0))
    for contributors, limit in ((itself, 10 / POOL), (pairs, 10 / POOL + 1 / POOL)):
        target = Target("", rows, lambda rows: rows, contributors, "")
        answer = Reconstructions({"perfect": perfect}, answered)
        found = score_reconstructions(answer, target, setting, lambda: REFERENCES)
        assert found.re_identification_limit == pytest.approx(limit)


def test_the_affine_fit_is_the_best_one_and_makes_a_constant_the_mean_colour() -> None:
    originals = ORIGINALS[:8].float() / 255
    grey = affine_fit(torch.full_like(originals, 0.5), originals)
    assert torch.allclose(grey, originals.mean(dim=(2, 3), keepdim=True).expand_as(grey), atol=1e-3)
    fitted = affine_fit(1 - originals, originals)
    assert float(ssim(fitted, originals).min()) > 0.999
    assert float(ssim(grey, originals).max()) < 0.9


# --------------------------------------------------------------------------------------------- pools


def test_pools_hold_the_pictures_of_their_rows_also_of_rows_that_are_made_of_many() -> None:
    labels = np.repeat([0, 1], 300)
    groups = np.random.default_rng(1).permutation(300).reshape(-1, 10)
    group_of = np.empty(300, np.int64)
    group_of[groups.ravel()] = np.repeat(np.arange(30), 10)
    members = np.concatenate([groups[group_of], groups[group_of] + 300])  # (600, 10)

    def mixed(rows: Rows) -> Contributors:
        return made_of(np.repeat(np.arange(len(rows)), 10), members[rows].ravel())

    def tangled(rows: Rows) -> Contributors:  # all rows of a class hang together
        near = np.stack([rows // 300 * 300 + (rows + step) % 300 for step in range(10)], axis=1)
        return made_of(np.repeat(np.arange(len(rows)), 10), near.ravel())

    def straddling(rows: Rows) -> Contributors:  # groups of both classes, as of bins that are not the scorer's
        both = np.concatenate([groups, groups + 300], axis=1)  # (30, 20)
        return made_of(np.repeat(np.arange(len(rows)), 20), both[group_of[rows % 300]].ravel())

    for contributors, count in ((itself, 2), (mixed, 2), (tangled, 4), (straddling, 4)):
        pools = draw_pools(labels, contributors, 400, seed=5)
        assert [len(pool.pictures) for pool in pools] == [200] * count
        assert sum(len(pool.rows) for pool in pools) == 400
        for pool in pools:
            assert set(labels[pool.rows]) == {pool.label}
            assert set(labels[pool.pictures]) == ({0, 1} if contributors is straddling else {pool.label})
            positions, own, _ = contributors(pool.rows)
            there = np.bincount(positions[np.isin(own, pool.pictures)], minlength=len(pool.rows))
            assert (there == len(own) // len(pool.rows)).all() or contributors is tangled
            assert there.min() >= 1
            assert np.isin(pool.rows, pool.pictures).all()  # clean rows are compared with these
    other = draw_pools(labels, itself, 400, seed=6)
    assert not np.array_equal(other[0].rows, draw_pools(labels, itself, 400, seed=5)[0].rows)
    assert np.array_equal(other[0].rows, draw_pools(labels, itself, 400, seed=6)[0].rows)


def test_a_group_is_in_one_pool_as_a_whole_and_the_pool_is_filled_up() -> None:
    sizes = np.random.default_rng(2).integers(5, 70, size=40)
    group_of = np.repeat(np.arange(40), sizes)
    members = {group: np.flatnonzero(group_of == group) for group in range(40)}

    def mixed(rows: Rows) -> Contributors:
        found = [members[group] for group in group_of[rows]]
        return made_of(np.repeat(np.arange(len(rows)), [len(of) for of in found]), np.concatenate(found))

    pools = draw_pools(np.zeros(len(group_of), np.int64), mixed, 800, seed=3)
    assert 800 <= sum(len(pool.rows) for pool in pools) <= 1000
    for pool in pools:
        assert len(pool.pictures) == 200
        assert 130 < len(pool.rows) <= 200
        assert set(mixed(pool.rows)[1].tolist()) <= set(pool.pictures.tolist())
    assert len(np.unique(np.concatenate([pool.rows for pool in pools]))) == sum(len(pool.rows) for pool in pools)


def test_of_many_classes_some_are_drawn_and_of_few_all() -> None:
    labels = np.repeat(np.arange(30), 250)
    some = {pool.label for pool in draw_pools(labels, itself, 1000, seed=0)}
    assert len(some) == 5
    assert some != {pool.label for pool in draw_pools(labels, itself, 1000, seed=1)}
    assert len({pool.label for pool in draw_pools(labels[:2000], itself, 1000, seed=0)}) == 8


def test_regression_targets_are_binned_so_that_each_bin_has_a_pool() -> None:
    targets = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    bins = bins_of(targets)
    assert np.bincount(bins).tolist() == [200] * 5
    assert targets[bins == 0, 0].max() <= targets[bins == 1, 0].min()
    assert bins_of(targets[:50]).max() == 0
    repeated = bins_of(np.repeat(np.arange(1.0, 4.0), 700)[:, None])
    assert np.unique(repeated).tolist() == list(range(repeated.max() + 1))  # none is empty
    assert np.array_equal(bins_of(np.array([3, 1])), [3, 1])


# --------------------------------------------------------------------------------------------- intervals, verdicts


def test_intervals_cover_the_truth_and_none_found_is_not_exactly_zero() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        attack, baseline, ceiling = (generator.normal(mean, 0.1, 100) for mean in (0.4, 0.2, 0.7))
        interval = ratio_interval(attack, baseline, ceiling, seed)
        assert interval is not None
        covered += interval.low <= 0.4 <= interval.high
    assert 180 <= covered <= 200
    none = share_interval(np.zeros(200, np.bool_))
    assert none.value == none.low == 0
    assert 0.01 < none.high < 0.03
    assert ratio_interval(np.full(9, 0.3), np.full(9, 0.2), np.full(9, 0.25), 0) is None


def _interval(value: float, half: float = 0.01) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def test_a_pass_wants_evidence_and_a_fail_does_not() -> None:
    strong, weak = Power(passed=True), Power(passed=False, planted={"weak-noise": _interval(0.3)})
    low, near, high = (Criterion("leakage", _interval(value), 0.1) for value in (0.05, 0.095, 0.2))
    assert judge([low], strong, []) == ("pass", ())
    assert judge([near], strong, [])[0] == "inconclusive"
    assert judge([high], strong, [])[0] == judge([high], weak, ["too few rows"])[0] == "fail"
    for power, shortage in ((weak, []), (Power(passed=None), []), (strong, ["too few rows"])):
        assert judge([low], power, shortage)[0] == "inconclusive"
    assert judge([low, Criterion("top-1", None, 0.05)], strong, [])[0] == "inconclusive"
    near_and_wide = [Criterion("AUC", _interval(0.59), 0.6), Criterion("AUC", _interval(0.585, 0.02), 0.6)]
    assert judge(near_and_wide[:1], strong, [])[0] == "inconclusive"
    verdict, reasons = judge([Criterion("AUC", _interval(0.58), 0.6), near_and_wide[1]], strong, [])
    assert (verdict, len(reasons)) == ("inconclusive", 1)  # every way counts, the widest too
    assert "0.605" in reasons[0]


def test_a_match_among_few_is_judged_by_as_many_times_chance_and_each_row_by_its_own_pool() -> None:
    assert re_identification_limit(np.array([200]), 0.05) == 0.05
    assert re_identification_limit(np.array([100]), 0.05) == 0.1
    assert re_identification_limit(np.array([100]), 0.01) == 0.02
    assert re_identification_limit(np.array([200] * 3 + [100]), 0.05) == pytest.approx(0.0625)
    assert re_identification_limit(np.array([200, 200, 30]), 0.05) == 0.05


def test_what_a_guess_finds_of_a_mixed_rows_other_pictures_is_added_to_the_limit() -> None:
    among, one, eleven = np.array([200]), np.array([1 / 200]), np.array([11 / 200])
    assert re_identification_limit(among, 0.05, one) == 0.05
    assert re_identification_limit(among, 0.05, eleven) == pytest.approx(0.05 + 10 / 200)
    assert re_identification_limit(np.array([50]), 0.05, np.array([0.5])) == pytest.approx(0.2 + 24 / 50)
    assert re_identification_limit(np.array([50]), 0.05, np.array([1.0])) == 1
    # Those that are not judged do not widen it.
    assert re_identification_limit(np.array([200, 30]), 0.05, np.array([1 / 200, 1.0])) == 0.05


# --------------------------------------------------------------------------------------------- what an attack may know


# Of the owner's side, all of it; and what would read banks or images by their paths.
PRIVATE = (
    "owner",
    "evaluation",
    "publish",
    "cli",
    "bank.build",
    "bank.dataset",
    "bank.reader",
    "bank.writer",
    "images.dataset",
    "images.read",
    "images.sources",
    "images.survey",
    "images.table",
    "owner",
    "evaluation",
    "publish",
    "cli",
)


def private_imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{name.name}" for name in node.names}
    return {name for name in names for part in PRIVATE if name.startswith(f"dpf_release.{part}")}


def test_no_attack_can_reach_what_its_view_does_not_hold() -> None:
    files = sorted(Path(dpf_release.attacks.__file__).parent.rglob("*.py"))
    assert {"a05_linkage.py", "shadows.py"} <= {path.name for path in files}
    assert {path.name: found for path in files if (found := private_imports(path.read_text(encoding="utf-8")))} == {}
    assert private_imports("from dpf_release.owner.project import Project") == {"dpf_release.owner.project.Project"}


def test_a_row_of_nobody_is_judged_by_its_match_and_recognised_as_no_one() -> None:
    of_nobody = score_pictures(TRUTH, lambda rows: Contributors.nobody(), perfect)
    of_themselves = score_pictures(TRUTH, itself, perfect)
    assert np.array_equal(of_nobody.primary, of_nobody.matched)
    assert np.allclose(of_nobody.matched, of_themselves.matched)
    assert not of_nobody.own.any()
    assert of_themselves.own.all()
    assert (of_nobody.guess == 0).all()


def test_of_a_row_from_a_group_any_image_of_the_group_counts_and_a_guess_finds_its_share() -> None:
    group, none = np.arange(POOL * CLASSES) // 15, np.empty((0, 0), np.float32)
    chain = build_chain("mixture:epsilon=inf", FeatureSpec((3, 2, 2), True))
    stage = chain.stages[0]
    assert isinstance(stage, Mixture)
    stage.statistics = Groups(none, none, none, none, none, np.arange(8) // 4, np.full(8, 15), group)  # type: ignore[arg-type]
    bank = Concat([rows_of(LABELS)])
    alike = images_of_groups(bank, chain, [[Plan(bytes(32), {"group": group})]])

    def neighbour(positions: Rows) -> Tensor:
        rows = TRUTH.asked[positions]
        return ORIGINALS[torch.from_numpy(rows // 15 * 15 + (rows + 1) % 15)].float() / 255

    assert groups_of(chain) == 4
    found = score_pictures(TRUTH, alike, neighbour)
    assert found.own.all()
    assert np.allclose(found.guess, 15 / POOL)
    limit = re_identification_limit(TRUTH.sizes, 0.05, found.guess)
    assert limit == pytest.approx(0.05 * 200 / POOL + 14 / POOL)
    assert not score_pictures(TRUTH, itself, neighbour).own.any()  # the control: it is another image
    stranger = score_pictures(TRUTH, alike, lambda positions: neighbour((positions + 15) % len(TRUTH.asked)))
    assert stranger.own.mean() < 0.5  # and a picture of another group does not count
