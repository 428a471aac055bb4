"""What a bank is good for, what several are between privacy and use, and an attack from outside the package."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import run_cli
from dpf_release.attacks import interface
from dpf_release.attacks.interface import Attack, Reconstructions
from dpf_release.attacks.threat_models import Budget, ReleaseView
from dpf_release.bank.rows import Select
from dpf_release.errors import ConfigError, VaultError
from dpf_release.evaluation import classifiers, utility
from dpf_release.evaluation.classifiers import EFFORTS, Effort, PickedRows, Training
from dpf_release.evaluation.frontier import compare
from dpf_release.evaluation.profiles import PROFILES
from dpf_release.evaluation.report import frontier_points
from dpf_release.evaluation.report.frontier_points import (
    Frontier,
    FrontierPoint,
    frontier_plots,
    plot,
    point_of,
)
from dpf_release.evaluation.report.headline import usefulness, verdict_in_words
from dpf_release.evaluation.suite import attack
from dpf_release.evaluation.utility import Comparison, measure_utility
from dpf_release.models.training import History
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.measure import measure_task
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.workbench import open_candidate, workbench_of
from dpf_release.release.attack_report import GAIN, GAIN_OF_CLEAN, AttackReport, Interval, Power, Utility
from dpf_release.release.train import fit_classifier
from rows_in_memory import PHI_2, SECRET, planned, poisoned, rows_of

LITTLE = Effort(2, (2, 4, 100), rows=600, epochs=12, least_rows=200)

# --------------------------------------------------------------------------------------------- class-gaussian


def test_rows_of_class_gaussian_have_the_moments_of_their_class_and_nothing_of_their_row() -> None:
    labels = np.tile([0, 1], 300)
    source = rows_of(labels, (3, 6, 6))
    source.features[labels == 1] = 2 + source.features[labels == 1] ** 2
    out = poisoned("class-gaussian", source)
    for label in (0, 1):
        mine, clean = out[labels == label], source.features[labels == label]
        if label == 1:  # of the other, what is below zero is cut off
            assert np.allclose(mine.mean(axis=(0, 2, 3)), clean.mean(axis=(0, 2, 3)), atol=0.02)
            assert np.allclose(mine.std(axis=(0, 2, 3)), clean.std(axis=(0, 2, 3)), atol=0.02)
        alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(mine, clean, strict=True)]
        noisy = poisoned("gaussian-noise", source)[labels == label]
        control = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(noisy, clean, strict=True)]
        assert abs(np.mean(alike)) < 0.03 < 0.3 < np.mean(control)
    assert out.min() == 0
    assert not np.array_equal(out, poisoned("class-gaussian", source, bytes([1] * 32)))
    assert np.array_equal(out, poisoned("class-gaussian", source))


def test_of_regression_targets_the_bins_are_the_classes() -> None:
    targets = np.linspace(0, 1, 400)[:, None].astype(np.float32)
    source = rows_of(targets)
    source.features[:] += 10 * targets[:, :, None, None]
    means = poisoned("class-gaussian:bins=4", source).mean(axis=(1, 2, 3))
    by_bin = means.reshape(4, 100)
    assert (np.diff(by_bin.mean(axis=1)) > 2).all()
    assert abs(np.corrcoef(by_bin[0], targets[:100, 0])[0, 1]) < 0.3 < 0.8 < np.corrcoef(means, targets[:, 0])[0, 1]


def test_when_a_row_has_gone_moments_and_draws_are_new_and_no_difference_of_versions_shows_its_moments() -> None:
    source, kept = rows_of(np.zeros(40), (3, 6, 6)), np.arange(1, 40)
    source.features[:] += 3  # none is cut off
    chain, plans = planned("class-gaussian", source)
    left = Select(source, kept)
    replanned, rebuilt = chain.drop_rows(plans, kept, left, PHI_2, bytes([7] * 32))
    assert rebuilt.tolist() == list(range(39))
    assert np.allclose(replanned[0].arrays["mean"][0], source.features[1:].mean(axis=(0, 2, 3)), atol=1e-5)
    old, new = chain.on(source, plans).read(kept), chain.on(left, replanned).read(np.arange(39))
    drawn_as_before = replace(replanned[0], arrays=replanned[0].arrays | {"draw": plans[0].arrays["draw"]})
    control = chain.on(left, [drawn_as_before]).read(np.arange(39))
    assert (control - old).std() < 0.1 < 0.3 < (new - old).std()
    everyone = np.arange(40)
    same, none = chain.drop_rows(plans, everyone, Select(source, everyone), PHI_2, bytes([7] * 32))
    assert none.tolist() == []
    assert same[0] is plans[0]


def test_a_class_of_a_few_rows_has_no_moments_of_its_own() -> None:
    source = rows_of(np.repeat([0, 1], [10, 4]))
    with pytest.raises(ConfigError, match=r"at least k = 5 rows of each class .* found fewer in class 1: 4"):
        planned("class-gaussian", source)
    chain, plans = planned("class-gaussian:k=4", source)
    kept = np.arange(1, 14)
    assert len(chain.drop_rows(plans, kept, Select(source, kept), PHI_2, SECRET)[1]) == 13
    with pytest.raises(ConfigError, match="class 1: 3"):
        chain.drop_rows(plans, kept[:-1], Select(source, kept[:-1]), PHI_2, SECRET)
    positions, members, _ = chain.contributors(np.array([3, 5]), plans)
    assert (positions.tolist(), members.tolist()) == ([0, 1], [3, 5])  # the row with the same id


# --------------------------------------------------------------------------------------------- utility


@pytest.fixture(scope="module")
def compared(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an untouched candidate, one of mere noise, and the fitted one."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("compared") / "shapes"))
    for name, function in (("clean", "identity"), ("noise", "gaussian-noise:scale=1000")):
        project = Project.open(folder / "dpf.toml", {"poison.function": function})
        fit_poison(project, name=name)
        write_candidate(project, name)
    return folder


def utility_of(project: Project, name: str, **options: Any) -> dict[str, Utility]:
    return measure_utility(workbench_of(project), open_candidate(project, name), "quick", **options)


@pytest.fixture(scope="module")
def found(compared: Path) -> dict[str, dict[str, Utility]]:
    """The utilities of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", LITTLE)
        project = Project.open(compared / "dpf.toml")
        with project.working(together=False):
            return {name: utility_of(project, name) for name in ("clean", "noise")}


def test_u1_is_what_poison_measured(compared: Path, found: dict[str, dict[str, Utility]]) -> None:
    project = Project.open(compared / "dpf.toml")
    with project.working(together=False):
        task = measure_task(project, "noise")
    u1 = found["noise"]["U1"].measures
    assert u1["top1"].value == task["top1_poisoned"] < task["top1_clean"] == u1["top1 on clean rows"].value
    lost = u1["clean - poisoned"]
    assert [lost.low, lost.high] == task["top1_difference_95"]
    assert u1["KL of the outputs"].value > 0.1
    same = found["clean"]["U1"].measures
    assert (same["clean - poisoned"].high, same["KL of the outputs"].high) == (0, 0)


def test_a_bank_as_good_as_clean_rows_trains_as_well_and_one_of_noise_does_not(
    found: dict[str, dict[str, Utility]],
) -> None:
    clean, noise = found["clean"]["U2"].measures, found["noise"]["U2"].measures
    assert clean["top1"].value == clean["top1, clean rows"].value > 0.8  # the same rows, the same seeds
    assert noise["top1, clean rows"] == clean["top1, clean rows"]
    assert noise["top1"].value < 0.75
    assert clean["top1"].low <= clean["top1"].value <= clean["top1"].high


def test_u3_joins_the_bank_with_m_own_images_and_says_what_it_adds(found: dict[str, dict[str, Utility]]) -> None:
    clean, noise = found["clean"]["U3"].measures, found["noise"]["U3"].measures
    assert {name.split(", ")[1] for name in clean} == {"m = 2"}  # a half of test has not four of each class
    assert clean["top1, m = 2"].value == clean["top1, m = 2, clean rows"].value
    assert clean["top1, m = 2, own images alone"] == noise["top1, m = 2, own images alone"]
    best = found["clean"]["U3"].best["m = 2"]
    gain, of_clean = clean["gain over the best without the bank, m = 2"], clean[f"{GAIN_OF_CLEAN}, m = 2"]
    assert gain.value == pytest.approx(clean["top1, m = 2"].value - clean[f"top1, m = 2, {best}"].value)
    assert gain == of_clean
    assert noise["gain over the best without the bank, m = 2"].value < gain.value


def test_what_phi_2_labels_needs_no_row_of_the_bank(found: dict[str, dict[str, Utility]]) -> None:
    """φ2 of these projects is trained on S and public: a user may label public images with it."""
    for code, m in (("U2", ""), ("U3", ", m = 2")):
        clean, noise = found["clean"][code].measures, found["noise"][code].measures
        for name in (f"top1{m}, public images labelled by φ2", f"top1{m}, φ2 alone"):
            assert clean[name] == noise[name]
        assert clean[f"top1{m}, φ2 alone"].value > 0.8 > noise[f"top1{m}"].value
        assert noise[f"{GAIN}{m}"].high < 0  # worth less than nothing, and the report says so


def test_own_images_and_those_that_judge_are_not_the_same_and_a_larger_m_has_the_smaller(compared: Path) -> None:
    project = Project.open(compared / "dpf.toml")
    with project.working(together=False):
        bench = utility._Bench.of(workbench_of(project), open_candidate(project, "clean"), LITTLE, 0)
        own, more = (set(bench._own(m, 0).parts[0].rows) for m in (1, 2))
        judge = set(np.concatenate(bench._halves[1]))
        assert own < more
        assert not more & judge
        assert bench._own(1, 1).digest != bench._own(1, 0).digest != bench._own(2, 0).digest
        joined = bench.bank + bench._own(2, 0)
        numbers = np.array([len(bench.bank) + 1, 0, len(bench.bank)])
        features, targets = joined.read(numbers)
        assert np.array_equal(targets.numpy(), joined.targets[numbers])
        assert np.array_equal(features[1].numpy(), bench.bank.read(np.array([0]))[0][0].numpy())
        assert isinstance(joined, PickedRows)


def test_what_was_trained_is_not_trained_again_and_clean_rows_serve_every_function(
    compared: Path, found: dict[str, dict[str, Utility]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EFFORTS, "quick", LITTLE)
    trained: list[str] = []

    def watched(*arguments: Any, **options: Any) -> History:
        trained.append(options["title"])
        return fit_classifier(*arguments, **options)

    monkeypatch.setattr(classifiers, "fit_classifier", watched)
    project = Project.open(compared / "dpf.toml")
    with project.working(together=False):
        assert utility_of(project, "noise") == found["noise"]
        assert trained == []
        utility_of(project, "default", only=["U2"])
    assert trained == ["Training a new classifier: U2 the bank"] * LITTLE.seeds


def test_few_rows_are_shown_often_enough_and_many_no_more_than_the_profile_says() -> None:
    effort = EFFORTS["standard"]
    epochs, batch, rate = effort.schedule(500)
    assert epochs * 500 >= effort.least_rows
    assert batch == 16
    assert rate < effort.schedule(22_500)[2]
    assert effort.schedule(22_500)[:2] == (4, 128)
    assert effort.schedule(10_000_000)[0] == 1
    assert effort.shared(0.5).schedule(22_500)[0] == 2


@pytest.mark.parametrize(("metric", "sign"), [("top1", 1), ("mae", -1)])
def test_a_gain_is_over_the_best_without_the_bank_and_of_paired_images(metric: str, sign: int) -> None:
    generator = np.random.default_rng(0)
    image = generator.random(400)  # some images are harder than others, for everyone
    scores = {"": image + 0.1, "clean rows": image + 0.2, "own images alone": image, "φ2 alone": image + 0.03}
    nobody = PickedRows(())
    trained = {name: Training(name, nobody, nobody, 0) for name in scores if "alone" not in name}
    of = Comparison("m = 5", {name: [one] for name, one in trained.items()}, {
        name: sign * scores[name] for name in scores if "alone" in name})  # fmt: skip
    found, best = of.measured({one: sign * scores[name] for name, one in trained.items()}, metric, 0)
    assert best == "φ2 alone"
    gain, clean = found[f"{GAIN}, m = 5"], found[f"{GAIN_OF_CLEAN}, m = 5"]
    assert (gain.value, clean.value) == (pytest.approx(0.07), pytest.approx(0.17))
    assert gain.high - gain.low < 1e-9 < 0.05 < found[f"{metric}, m = 5"].high - found[f"{metric}, m = 5"].low


# --------------------------------------------------------------------------------------------- safe and useless


def report_with(*gains: tuple[float, float]) -> AttackReport:
    measures = {f"{name}, m = {m}": Interval(value=(low + high) / 2, low=low, high=high)
                for m, (low, high) in enumerate(gains, 1) for name in (GAIN, GAIN_OF_CLEAN)}  # fmt: skip
    if gains:
        measures["top1, m = 1"] = Interval(value=0.5, low=0.5, high=0.5)
    best = {f"m = {m}": "own images alone" for m in range(1, len(gains) + 1)}
    passed = {
        "code": "A1", "title": "t", "version": 1, "claim": "reconstruction", "granted": "ReleaseView", "rows": 1000,
        "images": 1, "seconds": 0.0, "ways": {}, "baseline": 0.1, "ceiling": 0.5,
        "leakage": {"value": 0.0, "low": -0.01, "high": 0.01}, "re_identification": None, "among": 200,
        "power": Power(passed=True), "verdict": "pass",
    }  # fmt: skip
    return AttackReport.model_validate(
        {
            "index_sha256": "0" * 64, "featurizer_sha256": "0" * 64, "public_images_sha256": "0" * 64,
            "profile": "quick", "seed": 0, "function": "f", "attacks": [passed],
            "utility": {"U3": {"measures": measures, "best": best}} if measures else {},
        }
    )  # fmt: skip


def test_a_release_that_adds_nothing_to_what_is_there_without_it_is_called_safe_and_useless_and_another_is_not() -> (
    None
):
    assert verdict_in_words(report_with((-0.1, 0.02), (-0.3, -0.2))).headline.startswith("Safe and useless")
    assert verdict_in_words(report_with((-0.1, 0.02), (0.01, 0.02))).headline.startswith("No attack")
    assert verdict_in_words(report_with()).headline.startswith("No attack")
    assert report_with().adds_nothing is None


def test_what_the_bank_is_good_for_is_said_in_a_sentence_for_each_number_of_own_images() -> None:
    report = report_with((0.1, 0.2), (-0.3, -0.1))
    assert usefulness(report_with()) == []
    first, second = usefulness(report)
    assert first.startswith(
        "The bank adds 15.0 points [10.0, 20.0] to own images alone, the best that a user with 1 own"
    )
    assert first.endswith("has without it; clean features would add 15.0.")
    assert second.startswith("The bank is 20.0 points worse [-30.0, -10.0] than own images alone, the best that")


# --------------------------------------------------------------------------------------------- the frontier


class Grey(Attack):
    """Answers with grey pictures."""

    code, title, profile, planted, sets_ceiling = "A1", "grey", "quick", (), True

    def run(self, view: ReleaseView) -> Reconstructions:
        return Reconstructions({"grey": lambda at: torch.full((len(at), 3, 32, 32), 0.5)})


@pytest.mark.slow
def test_compare_puts_each_function_where_its_attacks_and_its_utility_are(
    compared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EFFORTS, "quick", LITTLE)
    short = replace(PROFILES["quick"], budget=Budget(images=64, decoders=1, shadows=0))
    monkeypatch.setitem(PROFILES, "quick", short)
    monkeypatch.setattr(
        "dpf_release.evaluation.profiles.registered", lambda: [interface.ATTACKS[code]() for code in ("A1", "A5")]
    )
    project = Project.open(compared / "dpf.toml")
    with pytest.raises(VaultError, match="found none of nobody"):
        compare(project, ["clean", "nobody"])
    found = compare(project, ["clean", "noise"])
    clean, noise = found.points
    assert (clean.name, clean.function, noise.function) == ("clean", "identity", "gaussian-noise:scale=1000")
    assert clean.gain is not None
    assert noise.gain is not None
    assert clean.gain.value > noise.gain.value
    assert (clean.m, clean.gain, clean.epsilon) == ("m = 2", clean.gain_of_clean, None)
    reports = compared / "vault" / "reports"
    assert Frontier.model_validate_json((reports / "frontier.json").read_text()) == found
    for name in ("clean", "noise"):
        assert b'id="frontier"' in (reports / name / "attack.html").read_bytes()
        assert set(json.loads((reports / name / "attack-quick.json").read_text())["utility"]) == {"U1", "U2", "U3"}
    assert (reports / "frontier.svg").read_bytes().startswith(b"<?xml")
    assert (reports / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stat().st_mode & 0o77 for path in reports.rglob("*") if path.is_file()} == {0}
    with pytest.raises(ConfigError, match="expected attacks of profile quick .*U3.*found"):
        attack(project, "clean", "quick", only=["A1", "U4"])


def test_a_point_is_the_worst_attack_and_the_fewest_own_images() -> None:
    report = report_with((0.0, 0.1))
    worse = report.attacks[0].model_copy(update={"code": "A2", "leakage": Interval(value=0.3, low=0.2, high=0.4)})
    other = worse.model_copy(update={"code": "A6", "claim": None, "leakage": Interval(value=0.9, low=0.9, high=0.9)})
    linked = worse.model_copy(
        update={"code": "A5", "claim": "linkage", "re_identification": Interval(value=0.5, low=0.4, high=0.6)}
    )
    full = report_with((0.1, 0.3), (0.0, 0.1)).model_copy(update={"attacks": (*report.attacks, worse, other, linked)})
    point = point_of("f", "mixture", 4.0, full)
    assert (point.privacy, point.linkage, point.epsilon) == (worse.leakage, linked.re_identification, 4)
    assert (point.m, point.gain) == ("m = 1", Interval(value=0.2, low=0.1, high=0.3))
    assert point_of("f", "dpf", None, report_with()).gain is None
    assert point_of("f", "dpf", None, report.model_copy(update={"attacks": ()})).privacy is None


def test_the_plot_has_a_panel_for_what_was_measured_and_the_same_bytes_for_the_same_points() -> None:
    some = Interval(value=0.5, low=0.4, high=0.6)
    frontier = Frontier(points=(FrontierPoint(name="a<b", function="dpf", privacy=some, gain=some),), profile="quick")
    assert [what for what, _ in frontier_plots(frontier)] == [
        f"{frontier_points.AXES['privacy']}; {frontier_points.AXES['gain']}"
    ]
    assert plot(frontier) == plot(frontier) != plot(frontier.model_copy(update={"points": frontier.points * 2}))
    assert plot(Frontier()).startswith(b"<?xml")
    assert plot(frontier, "png").startswith(b"\x89PNG")


def test_compare_refuses_names_that_have_no_candidate(finished: Path) -> None:
    result = run_cli("compare", "nobody", "nothing", folder=finished)
    assert result.returncode != 0
    assert "nobody, nothing" in result.stderr
