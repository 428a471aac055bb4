"""The battery as a whole: cut off and gone on with, run again from one seed, and what it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import killed, run_cli

from dpf_release.battery.grants import kept_in
from dpf_release.pipeline import Project

COMMAND = ("attack", "--profile", "quick", "--only", "A1,A2", "--images", "300")


def found_by(folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """What a run that ends found."""
    done = run_cli(*COMMAND, "--seed", str(seed), folder=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "vault" / "reports" / "default" / "attack-quick.json").read_text())
    return {result["code"]: {**result, "seconds": None} for result in report["attacks"]}


def trained(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("vault/attackers/*.safetensors")}


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
