"""A function or an attack of one's own is one file beside `dpf.toml`: fitted, attacked and published as all others."""

from __future__ import annotations

import shutil
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from commands import run_cli
from dpf_release import verify
from dpf_release.attacks import interface
from dpf_release.errors import ConfigError
from dpf_release.owner.fitted import load_function
from dpf_release.owner.project import Project
from dpf_release.release.attack_report import AttackReport
from places import ROOT


def report_of(folder: Path, name: str, profile: str) -> AttackReport:
    return AttackReport.model_validate_json((folder / "vault/reports" / name / f"attack-{profile}.json").read_text())


@pytest.mark.slow
def test_a_function_of_two_networks_goes_to_a_release_and_is_attacked_by_functions_of_its_kind(
    project_folder: Path,
) -> None:
    shutil.copy(ROOT / "examples" / "own_function.py", project_folder)
    commands = (
        ("fit-poison", "--name", "own", "--function", "own_function:Squeezed:channels=2", "--epochs", "3"),
        ("poison", "--name", "own"),
        ("attack", "--name", "own", "--profile", "standard", "--only", "A3", "--images", "64"),
        ("package", "--name", "own", "--out", "other", "--second-function", "A test."),
    )
    for command in commands:
        done = run_cli(*command, folder=project_folder)
        assert done.returncode == 0, done.stderr
    (result,) = report_of(project_folder, "own", "standard").attacks
    assert result.code == "A3"
    assert "4 shadows of its own kind" in result.ways
    assert result.verdict != "pass"  # with hardly any training it proves nothing
    assert verify(project_folder / "other") == []
    assert "squeezed through 2 channels" in " ".join((project_folder / "other" / "README.md").read_text().split())
    project = Project.open(project_folder / "dpf.toml")
    learned = load_function(project, "own").chain.state()
    assert {name.split(".")[0] for name in learned} == {"0/squeeze", "0/restore"}
    assert sorted(path.name for path in (project_folder / "vault/functions/own").glob("*.safetensors")) == [
        "plan.safetensors",
        "state.safetensors",
    ]
    assert "own kind" not in " ".join(report_of(project_folder, "own", "standard").attacks[0].reasons)


@pytest.mark.slow
def test_an_attack_of_ones_own_is_run_and_scored_as_the_others_where_its_code_is_trusted(project_folder: Path) -> None:
    shutil.copy(ROOT / "examples" / "own_attack.py", project_folder)
    command = ("attack", "--attack", "own_attack:ScaleBlind", "--only", "A1,X1", "--profile", "quick", "--images", "64")
    refused = run_cli(*command, folder=project_folder)
    assert refused.returncode == 2
    assert "--trust-code" in refused.stderr
    done = run_cli(*command, "--trust-code", folder=project_folder)
    assert done.returncode == 0, done.stderr
    assert "X1 scale-blind" in done.stdout
    first, own = report_of(project_folder, "default", "quick").attacks
    assert (own.code, own.claim, own.granted) == ("X1", "reconstruction", "ReleaseView")
    assert list(own.ways) == ["decoder"]
    assert (own.ceiling, own.images) == (first.ceiling, first.images)
    assert own.verdict == "inconclusive"  # with hardly any training it breaks nothing, and that is no pass
    assert any(reason.startswith("no power") for reason in own.reasons)


def test_an_installed_package_names_attacks_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("linkage", "dpf_release.attacks.a05_linkage:Linkage", interface.ENTRY_POINTS)
    monkeypatch.setattr(interface, "ATTACKS", {"A1": interface.ATTACKS["A1"]})
    assert [attack.code for attack in interface.registered()] == ["A1"]
    monkeypatch.setattr(interface, "installed", lambda group: {entry.name: entry})
    interface.load_attack.cache_clear()
    assert [attack.code for attack in interface.registered()] == ["A1"]  # nothing is imported before it is asked for
    interface.load_attack("linkage")
    assert [attack.code for attack in interface.registered()] == ["A1", "A5"]
    for name, words in (
        ("dpf_release.errors:ConfigError", "expected an attack"),
        ("no_such:Thing", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=words):
            interface.load_attack(name)
    interface.load_attack.cache_clear()


def test_no_attack_from_outside_takes_the_place_of_one_of_ours_or_moves_the_ceiling() -> None:
    class Mild(interface.Attack):
        code, title = "A3", "looks away"

    class Generous(interface.Attack):
        code, title, sets_ceiling = "X9", "sets the ceiling", True

    for attack, words in ((Mild, "has the code A3 already"), (Generous, "sets the ceiling")):
        with pytest.raises(ConfigError, match=words):
            interface.register(attack)
    assert interface.ATTACKS["A3"] is not Mild
    assert "X9" not in interface.ATTACKS
