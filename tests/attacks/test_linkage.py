"""Linkage, membership and attributes: what is found in rows as they are, and not in rows that say nothing."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attackers import Memory
from dpf_release.attacks.a05_linkage import patches
from dpf_release.attacks.a08_attribute import Attribute
from dpf_release.attacks.a10_membership import log_odds
from dpf_release.attacks.interface import Attack, Attributes, Likeness, Links, registered
from dpf_release.attacks.threat_models import (
    Budget,
    HeldRows,
    KnownPairs,
    LabelledRows,
    LeakedVault,
    QueryImages,
    ReleaseView,
    TwoReleases,
)
from dpf_release.attacks.toolkit import trained
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation import controls
from dpf_release.evaluation.controls import memorising_target, planted_target
from dpf_release.evaluation.harness import score_answer
from dpf_release.evaluation.score_guesses import (
    from_the_label,
    measure_attribute,
    measure_links,
    membership_measures,
    ranks,
)
from dpf_release.evaluation.scoring import References
from dpf_release.evaluation.targets import QueryTruth, Target, Truth, bin_of, draw_truth
from dpf_release.evaluation.verdicts import Scored
from dpf_release.evaluation.views import Labelled, Setting, draw_labelled, draw_queries, grant
from dpf_release.owner.featurize import featurize
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import Vault
from dpf_release.owner.workbench import Workbench, kept_in, workbench_of
from dpf_release.release.attack_report import Interval

BUDGET = Budget(images=3000, decoders=1, shadows=0)
SPLIT_OF = ("test", "val", "train", "train")
NOTHING: References = None  # type: ignore[assignment]  # linkage and attributes are not compared with reconstructions


@pytest.fixture(scope="module")
def owner(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The shapes as a table that says of each on which side the shape is."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("linked") / "shapes"))
    rows = []
    for path in sorted((folder / "images" / "private").rglob("*.png")):
        if "007" in path.name and "disc" in path.name:
            continue
        with Image.open(path) as picture:
            _, places = np.nonzero(np.asarray(picture).min(axis=2) > 130)  # the shape is bright, its ground is not
        row = {"path": path.relative_to(folder).as_posix(), "label": path.parent.name}
        rows.append(
            row | {"side": "left" if places.mean() < 15 else "right", "split": SPLIT_OF[int(path.stem[-3:]) % 4]}
        )
    with (folder / "private.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    text = (folder / "dpf.toml").read_text().replace('path = "images/private"', 'path = "private.csv"')
    (folder / "dpf.toml").write_text(text.replace("[claims]\n", '[claims]\nattribute = "side"\n'))
    featurize(Project.open(folder / "dpf.toml"), restart=True)
    project = Project.open(folder / "dpf.toml")
    with project.working(public=True):
        yield project


@pytest.fixture(scope="module")
def setting(owner: Project) -> Setting:
    workbench = replace(workbench_of(owner), kept=Memory())  # type: ignore[arg-type]
    truth = draw_truth(workbench, planted_target(workbench, "clean", 0), 1000, seed=0)
    return Setting(workbench, truth, BUDGET, 0)


@cache
def planted(owner: Project, name: str) -> Target:
    return planted_target(workbench_of(owner), name, 0)


def saying_nothing(owner: Project) -> Target:
    """Each row is the same noise around the mean row of its class."""
    target = planted(owner, "clean")
    clean, targets = target.rows.read(np.arange(len(target.rows))), target.rows.targets
    noise = np.random.default_rng(4).normal(size=clean.shape).astype(np.float32)
    rows = np.stack([clean[targets == label].mean(0) for label in targets]) + clean.std() * noise
    return replace(target, name="nothing", rows=HeldRows(targets, lambda at: rows[at]), subject="nothing")


def attacked(code: str, target: Target, setting: Setting) -> Scored:
    attack = next(attack for attack in registered() if attack.code == code)
    return score_answer(attack.run(grant(attack.view, target, setting)), target, setting, NOTHING)


def test_a_picture_is_linked_to_its_row_where_rows_say_what_they_are_and_else_by_chance(
    owner: Project, setting: Setting
) -> None:
    clean = attacked("A5", planted(owner, "clean"), setting)
    noisy = attacked("A5", planted(owner, "weak-noise"), setting)
    nothing = attacked("A5", saying_nothing(owner), setting)
    reached = clean.reached()
    assert reached is not None
    assert reached.value == 1.0
    for name in ("features", "channels", "patches", "all together"):
        assert clean.ways[name].measures["top1"].value == 1.0
        assert noisy.ways[name].measures["top1"].value > 0.9
        assert nothing.ways[name].measures["top1"].value < 0.25
    assert clean.ways["features"].measures["auc"].value > 0.9 > 0.75 > nothing.ways["features"].measures["auc"].value
    leakage = noisy.against(reached).leakage
    assert leakage is not None
    assert leakage.low > 0.5  # it has power
    assert noisy.among == clean.among == setting.truth.among
    assert {one.what: one.limit for one in clean.criteria}["AUC"] == 0.6
    assert set(clean.ways["features"].measures) >= {"top1", "top5", "persons", "auc", "tpr_at_1_percent"}
    assert "tpr_at_0.1_percent" not in clean.ways["features"].measures  # that wants 1,000 non-members


def test_a_negative_and_channels_of_either_sign_hide_nobody(owner: Project, setting: Setting) -> None:
    clean = planted(owner, "clean")
    rows, targets = clean.rows.read(np.arange(len(clean.rows))), clean.rows.targets
    means = np.stack([rows[targets == label].mean(0) for label in targets])
    signs = np.random.default_rng(2).choice([-1, 1], size=(1, rows.shape[1], 1, 1)).astype(np.float32)
    for sign, seen, hidden in ((-1, "features, either sign", "features"), (signs, "channels, either sign", "")):
        turned = means + sign * (rows - means)
        target = replace(clean, rows=HeldRows(targets, lambda at, turned=turned: turned[at]), subject=seen)
        found = attacked("A5", target, setting)
        assert found.ways[seen].measures["top1"].value > 0.9
        if hidden:
            assert found.ways[hidden].measures["top1"].value < 0.1
    nothing = attacked("A5", saying_nothing(owner), setting)
    for name in ("features, either sign", "channels, either sign"):
        assert nothing.ways[name].measures["top1"].value < 0.25


def test_a_row_of_borrowed_pieces_is_told_by_the_copies_in_it(owner: Project, setting: Setting) -> None:
    found = attacked("A5", planted(owner, "recombine-2"), setting)
    assert found.ways["patches"].measures["top1"].value > 0.9
    assert found.ways["patches, the nearest of each"].measures["auc"].value > 0.8
    assert found.ways["patches"].measures["top1"].value > found.ways["channels"].measures["top1"].value


def test_a_member_has_exactly_one_row_in_its_pool_and_others_none(owner: Project, setting: Setting) -> None:
    for name in ("clean", "recombine-2"):
        target = planted(owner, name)
        queries = draw_queries(target, setting)
        positions, members, _ = target.contributors(np.arange(len(target.rows)))
        made_of: dict[int, set[int]] = {}
        for position, member in zip(positions.tolist(), members.tolist(), strict=True):
            made_of.setdefault(position, set()).add(member)
        pictures = owner.private_images.pictures
        assert 0 < queries.members.sum() < len(queries.labels)
        assert (np.diff(queries.pools, axis=1) > 0).all()  # where a row stands says nothing
        assert (setting.truth.bins[queries.pools] == queries.labels[:, None]).all()
        for number in np.flatnonzero(queries.members)[:8]:
            picture = queries.read(np.array([number]))
            rows = np.arange(len(target.rows))
            same = [row for row in rows if torch.equal(setting.truth.read(np.array([row])), picture)]
            holding = [row for row in queries.pools[number].tolist() if made_of[row] & set(same)]
            assert holding == [queries.own[number]]
        assert (queries.own[~queries.members] == -1).all()
        test = pictures.read(owner.private_images.rows("test"))
        outside = queries.read(np.flatnonzero(~queries.members))
        assert all((test == picture).flatten(1).all(1).any() for picture in outside)


def test_the_weights_give_away_what_was_learnt_by_heart_and_not_what_was_never_seen(
    owner: Project, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "PICTURES", 200)
    target = memorising_target(setting.workbench, 0)
    broken = attacked("A10", target, setting)
    reached = broken.reached()
    assert reached is not None
    assert reached.low > 0.75
    assert target.queries is not None
    half = np.flatnonzero(~target.queries.members)
    unseen = np.where(np.arange(len(half)) % 2, 0, -1)  # none of them was: who is called a member is chance
    strangers = QueryTruth(
        lambda numbers: target.queries.read(half[numbers]),  # type: ignore[union-attr]
        target.queries.labels[half],
        target.queries.pools[half],
        unseen,
    )
    control = attacked("A10", replace(target, queries=strangers), setting)
    assert control.ways["loss"].measures["auc"].low < 0.5 < control.ways["loss"].measures["auc"].high
    assert list(dict.fromkeys(one.what for one in broken.criteria)) == ["AUC", "TPR at 1 % FPR"]
    student = replace(setting, budget=Budget(images=500, decoders=1, shadows=0, deep=True))
    assert "loss against a student's" in attacked("A10", target, student).ways


def test_members_are_found_also_where_the_network_is_sure_of_all() -> None:
    answers = torch.zeros(400, 3)
    members = np.arange(400) < 200
    answers[:, 1] = 30 + 5 * torch.rand(400, generator=torch.Generator().manual_seed(0)) + 6 * torch.from_numpy(members)
    classes = torch.ones(400, dtype=torch.int64)

    def found(likeness: torch.Tensor) -> dict[str, Interval]:
        values = likeness.numpy().astype(np.float32)
        return membership_measures(values[members], values[~members], seed=0)

    odds, entropy = log_odds(answers, classes), -torch.nn.functional.cross_entropy(answers, classes, reduction="none")
    assert found(odds)["auc"].value == found(odds)["tpr_at_1_percent"].value == 1.0
    assert float(entropy.abs().max()) == 0.0  # which says nothing of anybody
    assert found(entropy)["auc"].value == 0.5
    assert found(entropy)["tpr_at_1_percent"].value == pytest.approx(0.01)  # and not nothing at all
    mild = answers / 30
    expected = mild.softmax(1)[:, 1]
    assert torch.allclose(log_odds(mild, classes), (expected / (1 - expected)).log(), atol=1e-4)


@pytest.mark.slow
def test_where_q_has_the_attribute_it_is_learnt_there_too_and_under_shadow_functions(
    owner: Project, setting: Setting
) -> None:
    target, rich = planted(owner, "clean"), replace(setting, budget=Budget(images=1000, decoders=1, shadows=1))
    view = grant(LabelledRows, target, rich)
    assert isinstance(view, LabelledRows)
    assert {name for name in Attribute().run(view).probes if "Q" in name} == set()  # Q's table has no such column
    pictures = view.public.read(np.arange(len(view.public))).numpy().min(axis=1)  # (n, H, W)
    right = np.array([np.nonzero(picture > 130)[1].mean() >= 15 for picture in pictures]).astype(np.int64)
    asked = draw_labelled(target, setting).asked_values
    shares = {}
    for learnt, values in (("sides", right), ("the other way round", 1 - right)):
        probes = Attribute().run(replace(view, public_values=values)).probes
        shares[learnt] = {name: float((found == asked).mean()) for name, found in probes.items() if "Q" in name}
    assert shares["sides"].keys() == shares["the other way round"].keys()
    assert len(shares["sides"]) == 6  # three probes, on φ1(Q) and on P'(φ1(Q))
    for probe in ("linear, from Q", "linear, from Q under shadow functions"):
        assert shares["sides"][probe] > 0.7 > 0.3 > shares["the other way round"][probe]


def test_of_the_network_only_what_it_was_trained_on_is_a_member_and_of_the_bank_all_that_is_in_it(
    owner: Project, setting: Setting
) -> None:
    target = planted(owner, "clean")
    queries = draw_queries(target, setting)
    assert queries.trained_on is not None
    trained_on = int((queries.members & queries.trained_on).sum())
    assert trained_on < queries.members.sum()  # `val` is in the bank too
    assert not (queries.trained_on & ~queries.members).any()
    assert attacked("A10", target, setting).rows == trained_on
    assert attacked("A5", target, setting).rows == queries.members.sum()


def reachable(thing: Any, depth: int = 5) -> Iterator[Any]:
    """What can be had of a thing by attributes and items alone."""
    yield thing
    if depth == 0 or isinstance(thing, (str, bytes, np.ndarray, torch.Tensor, torch.nn.Module, type)):
        return
    parts = list(thing.values()) if isinstance(thing, dict) else list(getattr(thing, "__dict__", {}).values())
    parts += list(thing) if isinstance(thing, (list, tuple)) else []
    for part in parts:
        yield from reachable(part, depth - 1)


@pytest.mark.parametrize("view", [ReleaseView, QueryImages, KnownPairs, LeakedVault, LabelledRows, TwoReleases])
def test_a_view_is_of_the_type_that_is_declared_and_nothing_of_the_owners_hangs_on_it(
    owner: Project, setting: Setting, view: type[ReleaseView]
) -> None:
    if view is KnownPairs:  # of rows that are not asked for
        pool = setting.truth.pools[0]
        few = replace(pool, rows=pool.rows[:20], pictures=pool.rows[:20])
        setting = replace(setting, truth=replace(setting.truth, pools=(few,)))
    granted = grant(view, planted(owner, "weak-noise"), setting)
    assert type(granted) is view
    private = (Project, Vault, Workbench, Target, Setting, Truth, QueryTruth, Path)
    assert [part for part in reachable(granted) if isinstance(part, private)] == []
    assert [part for part in reachable([setting]) if isinstance(part, private)]  # where it hangs, it is found


@pytest.mark.slow
def test_an_attribute_is_read_from_clean_rows_and_not_from_rows_that_say_nothing(
    owner: Project, setting: Setting
) -> None:
    setting = replace(setting, budget=Budget(images=1000, decoders=1, shadows=0))
    clean, nothing = (attacked("A8", target, setting) for target in (planted(owner, "clean"), saying_nothing(owner)))
    for scored in (clean, nothing):
        assert [one.found for one in scored.criteria] == [way.measures["gain"] for way in scored.ways.values()]
    gain, none = (scored.ways[scored.best].measures["gain"] for scored in (clean, nothing))
    assert gain.low > 0  # of some 40 rows, in an order that is drawn anew each time
    assert none.value < gain.value - 0.1
    reached = clean.reached()
    assert reached is not None
    noisy = attacked("A8", planted(owner, "weak-noise"), setting).against(reached)
    assert noisy.leakage is not None
    assert noisy.leakage.value > 0.5


def test_half_of_the_rows_of_each_value_are_told_and_none_of_those_is_asked(owner: Project, setting: Setting) -> None:
    labelled = draw_labelled(planted(owner, "clean"), setting)
    assert set(labelled.values) == {"left", "right"}
    assert not np.intersect1d(labelled.asked, labelled.known_rows).size
    assert abs(len(labelled.asked) - len(labelled.known_rows)) <= len(labelled.values)
    assert (labelled.public_values == -1).all()  # Q says nothing of it here
    view = grant(LabelledRows, planted(owner, "clean"), setting)
    assert np.array_equal(view.asked, labelled.asked)
    no_claim = replace(setting.workbench, attribute=None)
    with pytest.raises(NotGrantedError, match="no attribute"):
        draw_labelled(planted(owner, "clean"), replace(setting, workbench=no_claim))


def test_probes_are_kept_and_one_of_another_bank_is_not_taken(
    owner: Project, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_vault = replace(setting.workbench, kept=kept_in(owner.vault))
    setting = replace(setting, budget=Budget(images=400, decoders=1, shadows=0), workbench=in_vault)
    attack = next(attack for attack in registered() if attack.code == "A8")
    kept = _answers(attack, planted(owner, "clean"), setting).probes
    other = _answers(attack, saying_nothing(owner), setting).probes
    assert any(not np.array_equal(kept[name], other[name]) for name in kept)
    monkeypatch.setattr(trained, "fit", None)
    again = _answers(attack, planted(owner, "clean"), setting).probes
    assert all(np.array_equal(kept[name], again[name]) for name in kept)
    with pytest.raises(TypeError, match="NoneType"):  # the control: of another budget there is none
        _answers(attack, planted(owner, "clean"), replace(setting, budget=Budget(images=200, decoders=1, shadows=0)))


def _answers(attack: Attack, target: Target, setting: Setting) -> Attributes:
    answer = attack.run(grant(attack.view, target, setting))
    assert isinstance(answer, Attributes)
    return answer


# --------------------------------------------------------------------------------------------- with the matcher


def test_the_learned_matcher_finds_disturbed_rows(owner: Project, setting: Setting) -> None:
    harder = replace(setting, budget=Budget(images=3000, decoders=2, shadows=0))
    found = attacked("A5", planted(owner, "channel-affine"), harder).ways
    assert found["learned matcher"].measures["top1"].value > 5 / setting.truth.among
    hardly = replace(setting, budget=Budget(images=1, decoders=2, shadows=0))
    control = attacked("A5", planted(owner, "channel-affine"), hardly).ways
    assert found["learned matcher"].measures["top1"].low > control["learned matcher"].measures["top1"].value
    assert "learned matcher" not in attacked("A5", saying_nothing(owner), setting).ways


# --------------------------------------------------------------------------------------------- known answers


def test_linkage_is_scored_by_rank_and_persons_by_their_best_picture() -> None:
    pools = np.tile(np.arange(10), (4, 1))
    own = np.array([0, 1, 2, -1])
    likeness = np.zeros((4, 10), np.float32)
    likeness[0, 0], likeness[1, 5], likeness[1, 1] = 1, 2, 1
    queries = QueryTruth(lambda numbers: torch.zeros(0), np.zeros(4, np.int64), pools, own, np.array([7, 7, 8, 9]))
    assert ranks(likeness[:3], pools[:3], own[:3]).tolist() == [0, 1, 4.5]  # all alike: in the middle
    found = measure_links(Likeness(likeness, np.array([3, 2, 1, 0], np.float32)), queries, queries.members, seed=0)
    assert found["top1"].value == pytest.approx(1 / 3)
    assert found["top5"].value == 1.0
    assert found["persons"].value == 0.5
    assert found["auc"].value == 1.0
    likeness[:] = np.nan
    assert (
        measure_links(Likeness(likeness, np.zeros(4, np.float32)), queries, queries.members, seed=0)["top5"].value
        == 0.0
    )


def test_membership_measures_have_their_known_values() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.normal(1, 1, 600).astype(np.float32), generator.normal(0, 1, 1200).astype(np.float32)
    found = membership_measures(members, others, seed=0)
    assert found["auc"].low < 0.760 < found["auc"].high  # Φ(1/√2)
    assert found["tpr_at_1_percent"].low < 0.092 < found["tpr_at_1_percent"].high  # 1 - Φ(2.326 - 1)
    assert "tpr_at_0.1_percent" in found
    same = membership_measures(others[:600], others[600:], seed=0)
    assert same["auc"].low < 0.5 < same["auc"].high
    assert "tpr_at_0.1_percent" not in same
    flat = membership_measures(np.zeros(50, np.float32), np.zeros(50, np.float32), seed=0)
    assert flat["auc"].value == flat["auc"].high == 0.5
    assert flat["tpr_at_1_percent"].value == 0.0 < flat["tpr_at_1_percent"].high


def test_the_label_alone_is_worth_what_it_tells() -> None:
    values = np.array([0, 0, 0, 1, 1, 1])
    bins = np.array([0, 0, 0, 1, 1, 1] * 2)
    known, asked = np.arange(6), np.arange(6, 12)
    labelled = Labelled(("a", "b"), np.empty(0, np.int64), asked, values, known, values)
    assert from_the_label(labelled, bins).mean() == 1.0
    assert from_the_label(replace(labelled, known_values=values[[0, 1, 3, 0, 1, 3]]), bins).mean() == 0.5
    right = from_the_label(labelled, bins)
    assert measure_attribute(values, right, values, seed=0)["gain"].value == 0.0
    nothing_by_label = np.zeros(6, np.bool_)
    assert measure_attribute(values, nothing_by_label, values, seed=0)["gain"].value == 1.0
    none_right = measure_attribute(1 - values, nothing_by_label, values, seed=0)["gain"]
    assert none_right.value == 0.0 < 0.2 < none_right.high


def test_regression_targets_fall_into_the_bins_of_the_bank() -> None:
    assert bin_of(np.array([[0.1], [0.5], [0.6], [9.0]]), [0.5, 0.9, 1.0]).tolist() == [0, 0, 1, 2]
    assert bin_of(np.array([3, 1]), []).tolist() == [3, 1]


def test_patches_are_all_of_a_row_each_number_once() -> None:
    features = torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4).float()
    pieces = patches(features)
    assert [piece.shape[1] for piece in pieces] == [12, 12, 12, 12, 6, 6]
    assert torch.equal(torch.cat(pieces, dim=1).sort(dim=1).values, features.flatten(1))


def test_candidates_are_what_the_attack_is_shown(owner: Project, setting: Setting) -> None:
    view = grant(QueryImages, planted(owner, "clean"), setting)
    assert isinstance(view, QueryImages)
    assert not hasattr(view, "own")
    assert len(view.pictures) == len(view.labels) == len(view.pools)
    assert isinstance(next(a for a in registered() if a.code == "A5").run(view), Links)
