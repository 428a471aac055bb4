"""Membership of drawn rows: found where statistics are of few images or rows are copies, and not beyond a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import drawn_rows
from dpf_release.attacks import a03_shadow
from dpf_release.attacks.a13_drawn_rows import ClassAndGroup
from dpf_release.attacks.interface import Likeness, Links, Reconstructions, Result, registered
from dpf_release.attacks.threat_models import DrawnRows, HeldRows, LeakedFunction, LeakedVault, ReleaseView
from dpf_release.attacks.toolkit.coefficients import least_squares, space_of
from dpf_release.attacks.toolkit.densities import Gaussian, log_kernel_density, log_mixture, nearest
from dpf_release.core.privacy import gaussian_mu, highest_auc, highest_tpr
from dpf_release.errors import ConfigError, NotGrantedError
from dpf_release.evaluation import drawn_controls
from dpf_release.evaluation.drawn_controls import COPIES, PLAIN, SMALL, drawn_target
from dpf_release.evaluation.harness import score_answer
from dpf_release.evaluation.score_guesses import measure_persons
from dpf_release.evaluation.scoring import References
from dpf_release.evaluation.targets import Target, Units
from dpf_release.evaluation.verdicts import GROUPS, PRIVACY, Criterion, Scored, judge
from dpf_release.evaluation.views import draw_queries, grant
from dpf_release.owner.workbench import Workbench
from dpf_release.poisoning.chain import build_chain
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.plan import Contributors
from dpf_release.release.attack_report import Interval, Power

NOTHING: References = None  # type: ignore[assignment]  # membership is not compared with reconstructions
POWER = Power(passed=True)
Planted = Callable[[str], Target]
Answered = Callable[[str, str], Result]


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    return drawn_rows.workbench(each=240, public=640)


@pytest.fixture(scope="module")
def planted(workbench: Workbench) -> Planted:
    """The planted functions, with banks of 400 rows a class, each made once."""
    made: dict[str, Target] = {}

    def target(name: str) -> Target:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(drawn_controls, "DRAWN", 400)
                made[name] = drawn_target(workbench, name, 0)
        return made[name]

    return target


@pytest.fixture(scope="module")
def answered(workbench: Workbench, planted: Planted) -> Answered:
    """What each attack makes of each planted function, once."""
    return cache(lambda code, name: answer_of(code, planted(name), workbench))


def answer_of(code: str, target: Target, workbench: Workbench) -> Result:
    attack = next(attack for attack in registered() if attack.code == code)
    return attack.run(grant(attack.view, target, drawn_rows.setting_of(workbench, target)))


def score_of(answer: Result, target: Target, workbench: Workbench) -> Scored:
    return score_answer(answer, target, drawn_rows.setting_of(workbench, target), NOTHING)


def attacked(code: str, target: Target, workbench: Workbench) -> Scored:
    return score_of(answer_of(code, target, workbench), target, workbench)


def best(scored: Scored, measure: str = "auc") -> Interval:
    return max((way.measures[measure] for way in scored.ways.values()), key=lambda found: found.value)


# --------------------------------------------------------------------------------------------- coefficients


def test_coordinates_come_back_from_the_units_that_the_relu_left_where_there_are_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(512, 64, generator=generator)).Q.T
    mean = 0.3 * torch.randn(512, generator=generator)
    wanted = torch.randn(50, 64, generator=generator) * torch.linspace(3, 0.3, 64)

    def error(shift: float) -> float:
        rows = (mean + shift + wanted @ axes).relu().half().float()
        found = least_squares(rows - mean - shift, rows > 0, axes, 1e-6)
        return float((found - wanted).abs().max())

    assert error(0.0) < 0.01  # float16
    assert error(-1.5) > 0.1  # few units are positive: fewer than there are coordinates


def test_the_attackers_components_are_those_that_rows_were_drawn_in(workbench: Workbench, planted: Planted) -> None:
    target = planted(SMALL)
    view = grant(DrawnRows, target, drawn_rows.setting_of(workbench, target))
    space = space_of(view)
    mean, axes = target.learned["0/public mean"], target.learned["0/public axes"]
    rows = np.arange(40)
    found = space.components.features(space.of_rows(view.rows(rows)).numpy())
    inside = mean + (found - mean) @ axes.T @ axes  # were they others, part of the row would lie outside
    assert float((inside - found).square().mean() / (found - mean).square().mean()) < 1e-4
    assert torch.allclose(found.relu(), view.rows(rows).flatten(1), atol=0.02)
    units = space.components.axes[:, space.units[:100]]  # the control: too few units say too little
    narrow = replace(space, units=space.units[:100])
    assert units.shape[0] > 100
    there = space.components.features(narrow.of_rows(view.rows(rows)).numpy()).relu()
    assert not torch.allclose(there, view.rows(rows).flatten(1), atol=0.02)


def test_what_a_leaked_function_draws_from_has_the_moments_of_its_rows(workbench: Workbench, planted: Planted) -> None:
    for target in (planted(SMALL), drawn_rows.mixture_target(workbench, "mixture:epsilon=4,rows=2000")):
        function = build_chain(target.function, workbench.features)
        function.load(target.learned)
        stage = function.stages[0]
        assert isinstance(stage, Mixture)
        view = grant(DrawnRows, target, drawn_rows.setting_of(workbench, target))
        mean, axes = target.learned["0/public mean"], target.learned["0/public axes"]
        for label in (0, 1):
            rows = view.rows(np.flatnonzero(view.bins == label)).flatten(1)
            drawn = least_squares(rows - mean, rows > 0, axes, 1e-6).numpy()
            parts = [(share, centre) for of, share, centre, _ in stage.gaussians() if of == label]
            centre = np.sum([share * centre for share, centre in parts], axis=0)
            assert sum(share for share, _ in parts) == pytest.approx(1)
            assert np.corrcoef(centre, drawn.mean(0))[0, 1] > 0.9
            other = np.sum([share * centre for of, share, centre, _ in stage.gaussians() if of != label], axis=0)
            assert np.linalg.norm(other - drawn.mean(0)) > 2 * np.linalg.norm(centre - drawn.mean(0))
            total = sum(share * np.trace(covariance) for of, share, _, covariance in stage.gaussians() if of == label)
            assert total == pytest.approx(np.trace(np.cov(drawn.T)), rel=0.2)


# --------------------------------------------------------------------------------------------- membership


def test_members_of_an_overfitted_function_are_found_and_others_are_not(
    workbench: Workbench, planted: Planted, answered: Answered
) -> None:
    for name in (SMALL, PLAIN):
        target = planted(name)
        found = score_of(answered("A13", name), target, workbench)
        assert found.primary == "auc"
        assert best(found).low > 0.75  # power: 2 AUC - 1 of at least a half, for sure
        assert found.against(Interval(value=1, low=1, high=1)).power().low >= 0.5  # type: ignore[union-attr]
        assert target.drawn_of is not None
        strangers = np.setdiff1d(np.arange(480), target.drawn_of)  # S train too, and no part of the statistics
        control = attacked("A13", replace(target, drawn_of=strangers), workbench)
        assert all(way.measures["auc"].low < 0.55 for way in control.ways.values())


def test_copies_among_drawn_rows_are_found_for_sure(workbench: Workbench, planted: Planted) -> None:
    target = planted(COPIES)
    found = attacked("A13", target, workbench)
    assert found.rows == drawn_controls.LEAST_COPIED
    assert best(found, "tpr_at_1_percent").low >= drawn_controls.LEAST_POWER[COPIES]
    assert target.drawn_of is not None
    others = np.setdiff1d(np.arange(480), target.drawn_of)
    control = attacked("A13", replace(target, drawn_of=others), workbench)
    assert control.ways["nearest row"].measures["tpr_at_1_percent"].value < 0.3


def test_with_the_function_leaked_more_is_found_and_nothing_of_strangers(
    workbench: Workbench, planted: Planted, answered: Answered
) -> None:
    target = planted(SMALL)
    leaked, without = (score_of(answered(code, SMALL), target, workbench) for code in ("A13L", "A13"))
    assert best(leaked).value >= best(without).value - 0.01
    assert target.drawn_of is not None
    strangers = np.setdiff1d(np.arange(480), target.drawn_of)
    assert best(attacked("A13L", replace(target, drawn_of=strangers), workbench)).low < 0.55
    unknown = replace(target, function="theirs")
    with pytest.raises(NotGrantedError, match="from which distributions"):
        attacked("A13L", unknown, workbench)


def test_what_does_not_draw_rows_is_not_attacked_so(workbench: Workbench, planted: Planted) -> None:
    target = planted(SMALL)
    setting = drawn_rows.setting_of(workbench, target)
    for view in (DrawnRows, LeakedFunction):
        assert grant(view, target, setting).name == view.name
        with pytest.raises(NotGrantedError, match="not drawn"):
            grant(view, replace(target, draws_rows=False), setting)
    assert not any(attack.trainings(setting.budget) for attack in registered() if attack.code.startswith("A13"))


def test_small_classes_have_no_planted_function() -> None:
    with pytest.raises(ConfigError, match="100 rows of each class"):
        drawn_target(drawn_rows.workbench(each=90, public=200), SMALL, 0)


# --------------------------------------------------------------------------------------------- the bound


def test_a_bounded_function_stays_below_its_bound_and_an_overfitted_one_would_be_caught(
    workbench: Workbench, planted: Planted, answered: Answered, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same noise in each run: of twenty ways with so few queries, each with a 95% interval, one is over by chance
    # in some runs.
    monkeypatch.setattr("dpf_release.core.privacy.os.urandom", np.random.default_rng(0).bytes)
    bounded = drawn_rows.mixture_target(workbench, "mixture:epsilon=1,delta=1e-5,rows=400")
    assert bounded.bound_mu == pytest.approx(gaussian_mu(1, 1e-5), rel=1e-6)
    for code in ("A13", "A13L"):
        found = attacked(code, bounded, workbench)
        of_bound = [one for one in found.criteria if one.allowed_by == PRIVACY]
        assert {one.limit for one in of_bound} == {highest_auc(bounded.bound_mu), highest_tpr(bounded.bound_mu, 0.01)}
        assert not found.exceeds_bound
        assert judge(of_bound, POWER, []) == ("pass", ())
        broken = score_of(answered(code, SMALL), replace(planted(SMALL), bound_mu=bounded.bound_mu), workbench)
        assert broken.exceeds_bound
        verdict, reasons = judge([one for one in broken.criteria if one.allowed_by == PRIVACY], POWER, [])
        assert verdict == "fail"
        assert any("bug in the mechanism" in reason for reason in reasons)
    assert not any(one.allowed_by for one in score_of(answered("A13", SMALL), planted(SMALL), workbench).criteria)


def test_a_bound_can_fail_and_is_never_an_open_question() -> None:
    wide = Interval(value=0.55, low=0.5, high=0.7)
    assert judge([Criterion("AUC", wide, 0.6, allowed_by=PRIVACY)], POWER, [])[0] == "pass"
    assert judge([Criterion("AUC", wide, 0.6)], POWER, [])[0] == "inconclusive"
    assert judge([Criterion("AUC", wide, 0.49, allowed_by=PRIVACY)], POWER, [])[0] == "fail"


def test_linkage_looks_at_coefficients_and_finds_no_more_than_groups_allow(
    workbench: Workbench, planted: Planted
) -> None:
    target = planted(SMALL)
    assert target.drawn_of is not None
    generator, members, labels = np.random.default_rng(0), target.drawn_of, target.rows.targets
    of_member = workbench.private_bank("train").targets[members]
    stands = np.array([generator.choice(members[of_member == label]) for label in labels])  # any one of its class

    def made_of(rows: np.ndarray) -> Contributors:
        return Contributors(np.arange(len(rows)), stands[rows], np.ones(len(rows), np.int64))

    named = replace(target, contributors=made_of, groups=2)
    found = attacked("A5", named, workbench)
    assert {"coefficients", "coefficients, distance"} <= set(found.ways)
    of_groups = [one for one in found.criteria if one.allowed_by == GROUPS]
    assert {one.limit for one in of_groups} == {2 / found.among}
    assert judge(of_groups, POWER, [])[0] == "pass"
    images = workbench.private_bank("train")
    telling = replace(named, rows=HeldRows(labels, lambda rows: images.read(stands[rows])))
    broken = attacked("A5", telling, workbench)  # rows that are an image's own
    assert judge([one for one in broken.criteria if one.allowed_by == GROUPS], POWER, [])[0] == "fail"
    assert broken.ways["coefficients, distance"].measures["top1"].value > 0.5
    nobodys = attacked("A5", replace(target, groups=1), workbench)
    assert nobodys.primary == "auc"
    assert not any(one.what.startswith("top-1") for one in nobodys.criteria)


def test_class_and_group_alone_give_the_mean_of_near_public_images(workbench: Workbench, planted: Planted) -> None:
    target = planted(SMALL)
    view = grant(ReleaseView, target, drawn_rows.setting_of(workbench, target))
    images = ClassAndGroup().run(view).decoders["class and group"](np.arange(len(view.asked)))
    labels = torch.from_numpy(target.rows.targets[view.asked])
    shown = [{image.numpy().tobytes() for image in images[labels == label]} for label in (0, 1)]
    assert all(1 < len(of_class) <= 8 for of_class in shown)  # one image for each group of a class, not for each row
    assert 0 <= float(images.min()) < float(images.max()) <= 1


# --------------------------------------------------------------------------------------------- persons


def test_persons_are_members_by_any_image_and_scored_by_mean_and_highest() -> None:
    units = Units(np.array([0, 0, 1, 1, 2, 3]), np.array([True, True, False, False, True, False]))
    scores = np.array([5, 0, 1, 2, 3, -1], np.float32)  # means 2.5, 1.5, 3, -1; highest 5, 2, 3, -1
    found = measure_persons({"way": Likeness(None, scores)}, units, seed=0)
    assert {name: way.measures["auc"].value for name, way in found.items()} == {
        "way, by person (mean)": 1.0,
        "way, by person (highest)": 1.0,
    }
    turned = measure_persons({"way": Likeness(None, -scores)}, units, seed=0)
    assert turned["way, by person (mean)"].measures["auc"].value == 0.0
    assert measure_persons({"way": Likeness(None, scores)}, replace(units, members=np.ones(6, bool)), seed=0) == {}


def test_ways_are_also_by_person_where_a_column_names_them(planted: Planted) -> None:
    named = drawn_rows.workbench(each=240, group="person", public=640)
    target = drawn_rows.mixture_target(named, "mixture:epsilon=4,rows=200")
    setting = drawn_rows.setting_of(named, target)
    queries = draw_queries(target, setting)
    assert queries.units is not None
    assert np.array_equal(queries.units.members, queries.members)  # persons lie in one split each here
    answer = Links({"way": Likeness(None, queries.members.astype(np.float32))}, drawn=True)
    assert set(score_answer(answer, target, setting, NOTHING).ways) == {
        "way",
        "way, by person (mean)",
        "way, by person (highest)",
    }
    assert set(score_answer(replace(answer, drawn=False), target, setting, NOTHING).ways) == {"way"}
    without = replace(setting, workbench=drawn_rows.workbench(each=240, public=640))
    assert set(score_answer(answer, target, without, NOTHING).ways) == {"way"}


# --------------------------------------------------------------------------------------------- known answers


def test_densities_have_their_known_values() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 3, generator=generator).double()
    covariance = torch.tensor([[2.0, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 3]]).double()
    mean = torch.tensor([1.0, 2, 3]).double()
    known = torch.distributions.MultivariateNormal(mean, covariance)
    ours = Gaussian.of(mean, covariance)
    assert torch.allclose(ours.log_density(points), known.log_prob(points))
    first = torch.distributions.MultivariateNormal(mean[:2], covariance[:2, :2])
    assert torch.allclose(ours.leading(2).log_density(points[:, :2]), first.log_prob(points[:, :2]))
    half = replace(ours, share=0.5)
    assert torch.allclose(log_mixture([half, half], points), known.log_prob(points))
    fitted = Gaussian.fitted(points, covariance, 0)
    assert torch.allclose(fitted.root @ fitted.root.T, points.T.cov(correction=0))
    distances = torch.cdist(points[:20], points[20:])
    assert torch.allclose(nearest(points[:20], points[20:], 5), distances.sort(1).values[:, 4])
    near = log_kernel_density(torch.zeros(1, 3).double(), points)
    assert float(near) > float(log_kernel_density(torch.full((1, 3), 5.0).double(), points))


# --------------------------------------------------------------------------------------------- reconstruction


def test_shadow_functions_are_pairs_of_a_row_and_any_image_of_its_group_where_there_are_groups(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "mixture:epsilon=inf,components=16,rows=100,groups="
    attack = next(attack for attack in registered() if attack.code == "A3")
    one, two = (drawn_rows.mixture_target(workbench, f"{spec}{groups}") for groups in (1, 2))
    setting = drawn_rows.setting_of(workbench, one, 200)
    with pytest.raises(NotGrantedError, match="belong to no image"):
        attack.refuse(grant(attack.view, one, setting))
    with pytest.raises(NotGrantedError, match="belong to no image"):
        grant(LeakedVault, one, setting)
    setting = drawn_rows.setting_of(workbench, two, 200)
    setting = replace(setting, budget=replace(setting.budget, shadows=1))
    grant(LeakedVault, replace(two, groups=2), setting)
    view = grant(attack.view, two, setting)
    attack.refuse(view)
    answer = attack.run(view)
    assert isinstance(answer, Reconstructions)
    assert list(answer.decoders) == ["1 shadows of its own kind"]
    assert answer.decoders["1 shadows of its own kind"](np.arange(4)).shape == (4, 3, *drawn_rows.SIZE)
    assert not answer.lacks

    def refuse(view: ReleaseView) -> None:
        raise ConfigError("a class is too small")

    monkeypatch.setattr(a03_shadow, "of_its_own_kind", refuse)
    lacking = attack.run(view)
    assert isinstance(lacking, Reconstructions)
    assert lacking.lacks, "which leaves the attack inconclusive, and does not end the run"
    assert list(lacking.decoders) == ["clean features"]
