"""The battery as a whole: cut off and gone on with, run again from one seed, and what it keeps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import killed, run_cli
from dpf_release.attacks.interface import ATTACKS, Attack, Reconstructions
from dpf_release.attacks.threat_models import ReleaseView
from dpf_release.errors import ConfigError, VaultError
from dpf_release.evaluation.harness import Harness
from dpf_release.evaluation.report.headline import verdict_in_words
from dpf_release.evaluation.score_reconstructions import score_decoders
from dpf_release.evaluation.scoring import RowScores
from dpf_release.evaluation.suite import _Run, attack
from dpf_release.evaluation.targets import Target
from dpf_release.evaluation.views import Setting, grant
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.workbench import kept_in
from dpf_release.release.attack_report import Interval

COMMAND = ("attack", "--profile", "quick", "--only", "A1,A2", "--images", "100")


@pytest.fixture
def reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a run without the trials that it is reckoned by."""
    monkeypatch.setattr("dpf_release.evaluation.suite.decoder_rate", lambda view: 500.0)
    monkeypatch.setattr("dpf_release.evaluation.suite.utility_minutes", lambda *_: 0.0)


def found_by(folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """What a run that ends found."""
    done = run_cli(*COMMAND, "--seed", str(seed), folder=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "vault" / "reports" / "default" / "attack-quick.json").read_text())
    return {result["code"]: {**result, "seconds": None} for result in report["attacks"]}


def trained(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("vault/attackers/*.safetensors")}


@pytest.mark.slow
def test_a_battery_that_was_killed_twice_ends_as_one_that_was_not(project_folder: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(project_folder, tmp_path / "whole"))
    killed(project_folder, "os.rename", ".safetensors.partial", 2, *COMMAND)  # as A1's decoder is kept, A2's is not
    assert len(trained(project_folder)) == 1
    assert not list(project_folder.glob("vault/reports/default/attack-quick.json"))
    killed(project_folder, "os.rename", "attack-quick.json.partial", 2, *COMMAND)  # A1 is told of, A2 is not
    assert found_by(project_folder) == found_by(whole)
    assert trained(project_folder) == trained(whole)
    assert not list(project_folder.glob("vault/attackers/*.checkpoint"))
    assert found_by(whole, seed=1) != found_by(project_folder)  # the control: another seed


@pytest.mark.usefixtures("reckoned")
def test_who_knows_the_label_alone_gets_nothing_out_of_rows_that_are_made_of_many_pictures(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The more pictures a row is made of, the more is any picture like one of them: also that of a class's mean."""

    class MeanPicture(Attack):
        code, title, profile, planted = "X1", "the mean of Q", "quick", ()

        def run(self, view: ReleaseView) -> Reconstructions:
            mean = (view.public.read(np.arange(len(view.public))).float() / 255).mean(0)
            return Reconstructions({"mean": lambda at: mean.expand(len(at), *mean.shape)})

    monkeypatch.setitem(ATTACKS, "X1", MeanPicture)
    alike = {name: 1.0 for name in ("affine_ssim", "affine_ssim_matched")}

    def perfect(harness: Harness, setting: Setting) -> tuple[RowScores, Any]:
        count = len(setting.truth.asked)
        measures = {name: np.full(count, value) for name, value in alike.items()}
        return RowScores(measures, np.ones(count, np.bool_), np.ones(count)), None

    monkeypatch.setattr(Harness, "_ceiling", perfect)
    project = Project.open(project_folder / "dpf.toml", {"poison.function": "recombine:k=5"})
    fit_poison(project, name="mixed")
    write_candidate(project, "mixed")
    report = attack(project, "mixed", "quick", only=["X1"])
    (result,) = report.attacks
    assert result.leakage is not None
    assert result.leakage.value < 0.01
    assert set(report.not_run) == {"A1", "A2", "A5"}
    assert "A1, A2, A5 not run" in verdict_in_words(report).detail
    passing = report.model_copy(update={"attacks": (result.model_copy(update={"verdict": "pass"}),)})
    assert "3 of 4 attacks of the profile quick were not run" in verdict_in_words(passing).headline
    assert verdict_in_words(passing).tone == "open"
    assert verdict_in_words(passing.model_copy(update={"not_run": ()})).tone == "good"

    with project.working(public=True):
        run = _Run.begin(project, "mixed", "quick", ["X1"], None, None, 0)
        mixed, alone = (
            run.harness.references(target, run.setting).baseline for target in (run.harness.target, run.harness.clean)
        )
        answer = MeanPicture().run(grant(ReleaseView, run.harness.target, run.setting))
        (scores,) = score_decoders(answer, run.harness.target, run.setting.truth).values()
    assert scores.primary.mean() > alone.primary.mean() + 0.01  # the control: against it the mean would seem to leak
    assert scores.primary.mean() <= mixed.primary.mean() + 1e-3


@pytest.mark.usefixtures("reckoned")
def test_an_attack_that_is_no_better_than_the_one_it_is_made_of_has_no_power(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Twice(Attack):
        code, title, profile, planted, surpasses = "X2", "one more", "quick", ("weak-noise",), "A1"

    got = {"A1": (0.6, 0.62), "X2": (0.63, 0.7)}
    monkeypatch.setitem(ATTACKS, "X2", Twice)
    monkeypatch.setattr(
        Harness,
        "_out_of",
        lambda harness, attack, *_: Interval(value=0.65, low=got[attack.code][0], high=got[attack.code][1]),
    )
    project = Project.open(project_folder / "dpf.toml")
    with project.working(public=True):
        run = _Run.begin(project, "default", "quick", ["X2"], None, None, 0)
        power = run.harness.power(Twice(), run.setting)
        assert power.passed
        assert power.surpassed["weak-noise"].high == 0.62
        got["A1"] = (0.6, 0.64)
        assert run.harness.power(Twice(), run.setting).passed is False
        monkeypatch.setattr(Twice, "surpasses", None)
        assert run.harness.power(Twice(), run.setting).passed
        monkeypatch.setattr(Twice, "planted", ("weak-noise", "recombine-2"))
        monkeypatch.setattr(Harness, "_planted", refusing(Harness._planted))
        without = run.harness.power(Twice(), run.setting)  # classes too small for a planted function end no battery
    assert without.passed is False
    assert set(without.planted) == {"weak-noise"}


def refusing(plant: Callable[..., Target]) -> Callable[..., Target]:
    def planted(harness: Harness, name: str, member: Any, setting: Setting) -> Target:
        if name == "recombine-2":
            raise ConfigError("class 2: 1")
        return plant(harness, name, member, setting)

    return planted


@pytest.mark.usefixtures("reckoned")
def test_a_candidate_of_another_function_than_todays_is_not_attacked(project_folder: Path) -> None:
    project = Project.open(project_folder / "dpf.toml", {"poison.function": "gaussian-noise"})
    record = project.vault.function("default") / "candidate.json"
    made = record.read_bytes()
    fit_poison(project, name="default", restart=True)
    with pytest.raises(VaultError, match="found none. Run `dpf-release poison --name default` first"):
        attack(project, "default", "quick", only=["A1"])
    record.write_bytes(made)
    with pytest.raises(VaultError, match="not of today: another function.*dpf-release poison --name default"):
        attack(project, "default", "quick", only=["A1"])
    write_candidate(project, "default", restart=True)
    with project.working(public=True):
        assert _Run.begin(project, "default", "quick", ["A1"], None, None, 0).harness.target.rows


@pytest.mark.usefixtures("reckoned")
def test_time_is_reckoned_for_attacks_that_apply(
    finished: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that belong to no image leave A3 nothing to learn: what it would train is in no estimate."""

    def minutes_of(folder: Path, code: str) -> float:
        project = Project.open(folder / "dpf.toml")
        with project.working(public=True):
            _Run.begin(project, "default", "standard", [code], None, 10_000, 0)
        (found,) = re.findall(r"about (\d+) minutes", capsys.readouterr().err)
        return float(found)

    assert minutes_of(finished, "A3") > minutes_of(finished, "A1")
    assert minutes_of(drawn, "A3") < minutes_of(drawn, "A1")


def test_what_is_kept_for_one_budget_does_not_take_the_place_of_anothers(project_folder: Path) -> None:
    kept = kept_in(Project.open(project_folder / "dpf.toml").vault)
    for images in (100, 200):
        kept.save("A1 decoder", {"images": images}, {"weights": torch.tensor([images])})
    for images in (100, 200):
        found = kept.load("A1 decoder", {"images": images})
        assert found is not None
        assert found["weights"].tolist() == [images]
    assert kept.load("A1 decoder", {"images": 300}) is None
    assert kept.load("A2 decoder", {"images": 100}) is None
