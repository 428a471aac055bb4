"""A0, A3 and A6: with P, with shadows of it, with pairs, an attacker undoes what straw men cannot."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dpf_release.evaluation.targets as truth_module
from attackers import Memory
from dpf_release.attacks import a00_leaked_vault as leaked_vault
from dpf_release.attacks import a01_clean_decoders as straw_men
from dpf_release.attacks import a03_shadow as shadow
from dpf_release.attacks import a06_known_pairs as known_pairs
from dpf_release.attacks.interface import Reconstructions
from dpf_release.attacks.threat_models import Budget, HeldPictures, HeldRows, KnownPairs, LeakedVault, ReleaseView
from dpf_release.attacks.toolkit import decoder, poisoned_public, shadows, trained
from dpf_release.attacks.toolkit.decoder import clean_decoder
from dpf_release.errors import ConfigError, NotGrantedError
from dpf_release.evaluation.controls import planted_target
from dpf_release.evaluation.harness import Harness
from dpf_release.evaluation.score_reconstructions import _series
from dpf_release.evaluation.scoring import References, score_pictures
from dpf_release.evaluation.suite import _Run
from dpf_release.evaluation.targets import Target, candidate_target, draw_truth
from dpf_release.evaluation.verdicts import judge
from dpf_release.evaluation.views import Setting, grant
from dpf_release.models.metrics import ssim
from dpf_release.owner.project import Project
from dpf_release.owner.workbench import open_candidate, workbench_of
from dpf_release.poisoning.plan import Contributors, FeatureSpec, Plan
from dpf_release.poisoning.recombine import Recombine
from dpf_release.release.attack_report import AttackResult, Interval, Power, Way

BUDGET = Budget(images=6000, decoders=1, shadows=2)


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project.open(shutil.copytree(finished, tmp_path_factory.mktemp("attacked") / "shapes") / "dpf.toml")


@pytest.fixture(scope="module")
def setting(project: Project) -> Iterator[Setting]:
    """Twenty rows of each class are asked for, of about fifty."""
    workbench = replace(workbench_of(project), kept=Memory())  # type: ignore[arg-type]
    target = candidate_target(workbench, open_candidate(project, "default"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truth_module, "POOL", 20)
        truth = draw_truth(workbench, target, 40, seed=0)
        # What learns fast on few pictures.
        for module in (decoder, shadows, straw_men):
            patch.setattr(module, "DECODERS", (("px1s2, L1", "px1s2", "l1", False),))
        patch.setattr(trained, "TRAINING_BATCH", 16)
        patch.setattr(leaked_vault, "LOSSES", (("l1", 1.0),))
        patch.setattr(truth_module, "POOL", 200)
        yield Setting(workbench, truth, BUDGET, 0)


def target_of(setting: Setting, name: str) -> Target:
    return planted_target(setting.workbench, name, 0)


def reached(setting: Setting, target: Target, answer: Reconstructions) -> float:
    """Affine-fit SSIM of the best way."""
    scores = [score_pictures(setting.truth, target.contributors, way) for way in answer.decoders.values()]
    return max(float(of.primary.mean()) for of in scores)


# --------------------------------------------------------------------------------------------- known pairs


def test_known_pairs_are_a_row_with_its_picture_and_none_that_is_asked_for(setting: Setting) -> None:
    target = target_of(setting, "clean")
    view = grant(KnownPairs, target, setting)
    assert isinstance(view, KnownPairs)
    numbers = np.arange(len(view.pair_rows))
    own = view.features(view.pictures.read(numbers)) - view.rows(view.pair_rows)
    others = view.features(view.pictures.read(numbers)) - view.rows(np.roll(view.pair_rows, 1))
    assert len(numbers) > 50
    assert not np.isin(view.pair_rows, view.asked).any()
    assert float(own.abs().max()) < 0.05 < float(others.abs().amax(dim=(1, 2, 3)).min())
    with pytest.raises(NotGrantedError, match="none left"):
        grant(KnownPairs, target, replace(setting, truth=draw_truth(setting.workbench, target, 1000, seed=0)))


def test_of_rows_that_are_mixed_the_picture_with_the_most_pieces_is_known(setting: Setting) -> None:
    function, rows = Recombine(FeatureSpec((1, 4, 4), True)), np.arange(4)
    plan = Plan(b"", {"pieces": np.array([[5, 5, 5, 0], [7, 1, 7, 1], [3, 2, 2, 3], [9, 8, 9, 3]])})
    assert function.contributors(rows, plan).foremost(rows).tolist() == [5, 1, 2, 9]
    assert Contributors.themselves(np.array([4, 2])).foremost(np.array([4, 2])).tolist() == [4, 2]
    assert Contributors.nobody().foremost(np.array([4, 2])).tolist() == [4, 2]
    target = target_of(setting, "recombine-2")
    view = grant(KnownPairs, target, setting)
    assert isinstance(view, KnownPairs)
    chosen = target.foremost(view.pair_rows)
    assert not np.isin(chosen, setting.truth.asked).any()
    assert (chosen != view.pair_rows).any()
    positions, members, _ = target.contributors(view.pair_rows)
    assert all(member in members[positions == place] for place, member in enumerate(chosen))
    seen = view.features(view.pictures.read(np.arange(len(chosen))))
    clean = torch.from_numpy(np.asarray(target_of(setting, "clean").rows.read(chosen), np.float32))
    assert float((seen - clean).abs().max()) < 0.05


@pytest.mark.parametrize("name", ["channel-affine", "channel-permutation", "random-convolution"])
def test_pairs_give_away_any_linear_map_of_channels(setting: Setting, name: str) -> None:
    view = grant(KnownPairs, target_of(setting, name), setting)
    assert isinstance(view, KnownPairs)
    clean = torch.from_numpy(np.asarray(target_of(setting, "clean").rows.read(view.asked), np.float32))

    def left(m: int) -> float:
        return float((known_pairs.fit_inverse(view, m)(view.rows(view.asked)) - clean).square().mean() / clean.var())

    assert left(len(view.pair_rows)) < 0.01
    assert left(len(view.pair_rows)) < left(1) < 1.0
    assert float((view.rows(view.asked) - clean).square().mean() / clean.var()) > 0.2  # the control: as they are


def test_more_pairs_hold_the_fewer_and_each_way_says_how_many_it_has(setting: Setting) -> None:
    view = grant(KnownPairs, target_of(setting, "channel-permutation"), setting)
    assert isinstance(view, KnownPairs)
    read: list[int] = []

    def pictures(numbers: np.ndarray) -> Tensor:
        read.append(int(numbers.max()))
        return view.pictures.read(numbers)

    known_pairs.fit_inverse(replace(view, pictures=HeldPictures(len(view.pictures), pictures)), 10)
    assert max(read) == 9
    answer = known_pairs.KnownPlaintext().run(view)
    assert set(answer.series) == set(answer.decoders)
    assert {number for _, number in answer.series.values()} == {1, 10, len(view.pair_rows)}
    target = target_of(setting, "channel-permutation")
    alone = reached(setting, target, Reconstructions({"A1": lambda at: clean_decoder(view)(view.rows(view.asked[at]))}))
    assert reached(setting, target, answer) > alone + 0.1


def test_a_decoder_learns_from_pairs_what_no_linear_map_undoes(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_pairs, "FEWEST_TO_TRAIN", 50)
    monkeypatch.setattr(known_pairs, "LEAST_PICTURES", 1000)
    clean = target_of(setting, "clean")

    def folded(rows: np.ndarray) -> np.ndarray:
        features = np.asarray(clean.rows.read(rows), np.float32)
        return np.abs(features - 0.5)[:, ::-1].copy()

    target = replace(clean, rows=HeldRows(clean.rows.targets, folded), subject="folded")
    view = grant(KnownPairs, target, setting)
    assert isinstance(view, KnownPairs)
    answer = known_pairs.KnownPlaintext().run(view)
    m = len(view.pair_rows)
    ways = {
        name: Reconstructions({name: answer.decoders[name]}) for name in (f"{m} pairs, linear", f"{m} pairs, trained")
    }
    linear, trained = (reached(setting, target, way) for way in ways.values())
    assert trained > linear


# --------------------------------------------------------------------------------------------- leaked vault


def test_public_pictures_get_p_itself_and_keep_their_own_picture(setting: Setting) -> None:
    view = grant(LeakedVault, target_of(setting, "channel-permutation"), setting)
    assert isinstance(view, LeakedVault)
    poisoned_q = poisoned_public.poisoned_public(view, view.poison)
    stored, foremost = poisoned_q.rows, poisoned_q.foremost
    assert len(stored) == len(view.public) + len(view.public_val)
    assert np.array_equal(foremost, np.arange(len(stored)))
    numbers = np.array([0, 3, 17])
    clean = view.features(view.public.read(numbers))
    poisoned = view.poison(HeldRows(np.zeros(3, np.int64), lambda rows: clean.numpy()[rows]))[0].read(np.arange(3))
    assert np.allclose(stored[numbers], poisoned, rtol=0.01, atol=0.01)  # as float16
    assert np.abs(stored[numbers] - clean.numpy()).mean() > 0.1
    last = view.features(view.public_val.read(np.array([len(view.public_val) - 1]))).numpy()
    assert np.allclose(np.sort(stored[-1].ravel()), np.sort(last.ravel()), rtol=0.01, atol=0.01)


def test_large_stores_lie_in_a_file_without_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(poisoned_public, "IN_MEMORY", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = poisoned_public.room(9, (2, 3, 4))
    store[:] = 7
    assert isinstance(store, np.memmap)
    assert store.shape == (9, 2, 3, 4)
    assert float(store.sum()) == 7 * 9 * 24
    assert list(tmp_path.iterdir()) == []
    assert not isinstance(poisoned_public.room(1, (2, 3, 4)), np.memmap)


def test_classes_too_small_for_p_join_what_is_next_until_p_takes_them(setting: Setting) -> None:
    view = grant(LeakedVault, target_of(setting, "recombine-2"), setting)
    assert isinstance(view, LeakedVault)
    answers = np.zeros((100, 3), np.float32)
    answers[:60, 0], answers[60:95, 1], answers[95:, 2], answers[95:, 1] = 1, 1, 2, 1
    clean = np.random.default_rng(0).random((100, *view.feature_shape)).astype(np.float16)
    given: list[np.ndarray] = []

    def choosy(needs: int) -> poisoned_public.Poison:
        def poison(rows: HeldRows) -> tuple[HeldRows, np.ndarray]:
            counts = np.bincount(rows.targets)
            if counts[counts > 0].min() < needs:
                raise ConfigError("too few")
            given.append(rows.targets)
            return rows, np.arange(len(rows))

        return poison

    for needs, counts in ((2, [60, 40, 0]), (50, [100, 0, 0])):
        poisoned_public._poisoned_bank(view, choosy(needs), clean, answers)
        assert np.bincount(given.pop(), minlength=3).tolist() == counts
    with pytest.raises(NotGrantedError, match="too few"):
        poisoned_public._poisoned_bank(view, choosy(101), clean, answers)
    poisoned_q = poisoned_public.poisoned_public(view, view.poison)  # P that mixes rows, in earnest
    stored, foremost = poisoned_q.rows, poisoned_q.foremost
    most = (foremost[:50] == np.arange(50)).mean()  # of two, a row has the most pieces of either
    assert 0.3 < most < 0.9
    public = view.features(view.public.read(np.arange(50))).numpy()
    same = np.isclose(stored[:50], public, rtol=0.01, atol=0.01).all(
        axis=1
    )  # (rows, h, w): which places are a row's own
    assert 0.2 < same.mean() < 0.9


def test_whoever_has_p_undoes_it_where_a_straw_man_does_not(setting: Setting) -> None:
    target = target_of(setting, "channel-permutation")
    view = grant(LeakedVault, target, setting)
    answer = leaked_vault.LeakedP().run(view)
    alone = Reconstructions({"A1": lambda at: clean_decoder(view)(view.rows(view.asked[at]))})
    assert reached(setting, target, answer) > reached(setting, target, alone) + 0.1


# --------------------------------------------------------------------------------------------- shadow functions


def test_a_shadow_function_does_on_public_pictures_what_p_does_on_private_ones(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = grant(ReleaseView, target_of(setting, "clean"), setting)
    network, psi = shadow.shadow(view, 0), clean_decoder(view)
    pictures = view.public_val.read(np.arange(len(view.public_val)))
    features, originals = view.features(pictures), pictures.float() / 255
    likeness = [float(ssim(psi(seen), originals).abs().mean()) for seen in (network(features), features)]
    agreement = (view.answers(network(features)).argmax(1) == view.answers(features).argmax(1)).float().mean()
    assert likeness[0] < likeness[1] / 2
    assert float(agreement) > 0.8
    assert not any(parameter.requires_grad for parameter in network.parameters())
    monkeypatch.setattr(shadows, "fit_chain", None)
    again = shadow.shadow(view, 0)  # kept: nothing is trained
    assert torch.equal(again(features), network(features))
    with pytest.raises(TypeError):
        shadow.shadow(view, 1)


def test_no_two_shadow_functions_are_alike_and_both_objectives_come_up() -> None:
    recipes = [shadow.shadow_recipe(number, 3, seed=0) for number in range(16)]
    assert len({recipe.seed for recipe in recipes}) == 16
    assert {recipe.objective for recipe in recipes[:2]} == {"equivalence", "paper"}
    assert len({(recipe.lambda_, recipe.straw_man, recipe.objective, recipe.function) for recipe in recipes}) >= 8
    assert shadow.shadow_recipe(0, 3, seed=1) != recipes[0]
    assert [shadow._counts(most) for most in (0, 1, 4, 5, 16)] == [[], [1], [1, 2, 4], [1, 2, 4, 5], [1, 2, 4, 8, 16]]


def test_a_decoder_sees_every_function_of_the_union_and_their_pictures_in_order(setting: Setting) -> None:
    view = grant(ReleaseView, target_of(setting, "clean"), setting)

    class Sign(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return -features - 1

    clean = view.features_of(view.public, np.arange(120))
    seen = shadow.union(view, [Sign()])(view.public, np.arange(120), np.random.default_rng(0))
    own = (seen == clean).flatten(1).all(1)
    turned = (seen == -clean - 1).flatten(1).all(1)
    assert 10 < int(own.sum()) < 60
    assert 10 < int(turned.sum()) < 60
    assert int((~own & ~turned).sum()) > 30
    likeness = [
        float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs())
        for one, other in zip(seen, clean, strict=True)
    ]
    assert min(likeness) > 0.3  # each is made of its own picture
    inputs = shadow.union(view, [])
    assert torch.equal(inputs(view.public_val, np.arange(9), None), inputs(view.public_val, np.arange(9), None))


def test_matched_moments_take_any_channel_affine_map_away(setting: Setting) -> None:
    rows = []
    for name in ("clean", "channel-affine", "channel-permutation"):
        view = grant(ReleaseView, target_of(setting, name), setting)
        rows.append(shadow.with_moments_of_q(view)(view.asked))
    assert torch.allclose(rows[0], rows[1], atol=0.02)
    assert not torch.allclose(rows[0], rows[2], atol=0.2)


# --------------------------------------------------------------------------------------------- in the report


def test_a_series_has_the_best_way_of_each_number() -> None:
    ways = {
        name: Way(measures={}, leakage=leakage and Interval(value=leakage, low=leakage, high=leakage))
        for name, leakage in (("a", 0.02), ("b", 0.3), ("c", 0.2), ("d", None))
    }
    answer = Reconstructions(
        {}, series={"a": ("pairs", 1), "b": ("pairs", 100), "c": ("pairs", 100), "d": ("pairs", 1000)}
    )
    series = _series(answer, ways)
    assert {number: found.value for number, found in series["pairs"].items()} == {"1": 0.02, "100": 0.3}
    result = AttackResult(
        code="A6", title="", version=1, claim=None, granted="", rows=1, images=1, seconds=0, ways=ways, baseline=None,
        ceiling=None, leakage=None, re_identification=None, among=1, power=Power(passed=None), verdict="reported",
        series=series,
    )  # fmt: skip
    assert result.smallest_above("pairs", 0.1) == 100
    assert result.smallest_above("pairs", 0.5) is None
    assert result.smallest_above("shadows", 0.1) is None


def test_the_attack_is_tried_on_its_own_shadow_functions(
    project: Project, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _Run.begin(project, "default", "quick", (), None, None, 0)
    budget = Budget(images=64, decoders=1, shadows=1)
    assert replace(budget, share=0.5).bank_images == 32
    run = replace(run, setting=replace(run.setting, truth=setting.truth, budget=budget))
    monkeypatch.setattr(Harness, "references", lambda harness, target, setting: between(setting, harness.clean))
    result, _ = run._attack(shadow.ShadowFunctions())
    assert isinstance(result, AttackResult)
    assert set(result.ways) == {"1 shadows", "1 shadows, moments"}
    assert result.series["shadows"]["1"] == result.ways["1 shadows"].leakage
    assert set(result.power.planted) == {"weak-noise", "channel-affine", "shadow 1"}
    assert result.power.passed is False  # 64 pictures teach nobody
    broken = any(way.leakage is not None and way.leakage.low >= 0.1 for way in result.ways.values())
    assert result.verdict == ("fail" if broken else "inconclusive")  # how P was drawn decides which
    assert result.granted == "ReleaseView"


def test_a_function_of_another_kind_is_imitated_by_functions_of_that_kind(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = grant(ReleaseView, target_of(setting, "clean"), setting)
    few = replace(view, budget=Budget(images=64, decoders=1, shadows=2), function="recombine:k=2,patch=1")
    assert shadow.of_its_own_kind(replace(few, function="dpf")) is None
    assert shadow.of_its_own_kind(replace(few, function="")) is None
    own_kind = shadow.of_its_own_kind(few)
    assert own_kind is not None
    rows = np.arange(8)
    wide, inputs, _ = own_kind
    seen, clean = inputs(few.public, rows, np.random.default_rng(0)), few.features_of(few.public, rows)
    assert seen.shape == clean.shape
    assert not torch.allclose(seen, clean, atol=0.05)
    # Each place of a row comes from a picture of Q, and more of them from its own than a stranger's would.
    own, strange = (np.isclose(seen, of, atol=0.01).all(axis=1).mean() for of in (clean, clean.roll(1, dims=0)))
    assert own > strange + 0.2
    answer = shadow.ShadowFunctions().run(few)
    assert isinstance(answer, Reconstructions)
    assert "2 shadows of its own kind" in answer.decoders
    # Where not all of Q has room, a decoder is shown the pictures that have: beyond them, rows are of other pictures.
    monkeypatch.setattr(poisoned_public, "ON_DISK", 1)
    monkeypatch.setattr(poisoned_public, "BATCH", 20)
    tight = shadow.of_its_own_kind(few)
    assert tight is not None
    few_pictures, inputs, _ = tight
    assert len(few_pictures.public) == 20 < len(wide.public)
    assert inputs(few_pictures.public_val, rows, None).shape == clean.shape
    assert answer.lacks == ""


def test_a_kind_that_cannot_be_fitted_on_q_is_lacking_and_never_passed_over(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    view = grant(ReleaseView, target_of(setting, "clean"), setting)
    few = replace(view, budget=Budget(images=64, decoders=1, shadows=1))
    for function, words in (
        ("recombine:k=9999", "P refuses all of Q"),
        ("no_such_module:Function", "cannot be imported"),
    ):
        answer = shadow.ShadowFunctions().run(replace(few, function=function))
        assert isinstance(answer, Reconstructions)
        assert answer.lacks == shadow.LACKS  # in public reasons: no word of the function's own
        assert words in capsys.readouterr().err
        assert set(answer.decoders) == {"1 shadows", "1 shadows, moments"}
    verdict, reasons = judge([], Power(passed=True), [answer.lacks])
    assert (verdict, reasons) == ("inconclusive", (answer.lacks,))
    assert judge([], Power(passed=True), [])[0] == "pass"  # the control: it is that alone which keeps it from passing


def between(setting: Setting, clean: Target) -> References:
    """Grey, and the pictures themselves."""
    truth = setting.truth
    perfect = score_pictures(truth, clean.contributors, lambda at: truth.read(truth.asked[at]).float() / 255)
    grey = score_pictures(truth, clean.contributors, lambda at: torch.full((len(at), 3, 32, 32), 0.5))
    return References(grey, perfect)
