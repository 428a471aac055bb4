"""A φ1 that never sees the private images: trained on the public ones, or brought along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpf_release.errors import ConfigError
from dpf_release.models.weights import load_state
from dpf_release.owner.init import init
from dpf_release.owner.project import Project
from dpf_release.owner.train import train
from tiny_project import new_project

PUBLIC = {"network.train_on": "public", "network.classifier": "from-bank", "train.epochs": 1}


def test_a_network_that_is_trained_on_public_images_does_not_depend_on_the_private_ones(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "other"):
        config = new_project(tmp_path / name)
        if name == "other":  # fewer private images: only φ1 trained on them would be another
            for path in sorted((config.parent / "images" / "private" / "disc").glob("*.png"))[:3]:
                path.unlink()
        project = Project.open(config, PUBLIC)
        assert set(train(project).scores) == {"val"}  # of Q, which has no test images
        assert json.loads((project.vault.network / "history.json").read_text())["trained_on"] == "public"
        assert not project.networks_saw_images
        weights.append(load_state(project.vault.network / "phi.safetensors"))
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    control = Project.open(tmp_path / "one" / "dpf.toml", {"train.epochs": 1})
    train(control, restart=True)
    assert control.networks_saw_images
    assert any(
        (weights[0][name] != tensor).any()
        for name, tensor in load_state(control.vault.network / "phi.safetensors").items()
    )


def test_a_phi_2_that_was_trained_on_the_images_leaves_no_bound(tmp_path: Path) -> None:
    config = new_project(tmp_path / "project")
    project = Project.open(config, PUBLIC | {"network.classifier": "trained"})
    train(project)
    assert project.networks_saw_images


def test_public_images_without_classes_cannot_be_trained_on(tmp_path: Path) -> None:
    config = new_project(tmp_path / "project")
    public = config.parent / "images" / "public"
    for path in sorted(public.rglob("*.png")):
        path.rename(public / path.name)
    with pytest.raises(ConfigError, match="public images in two or more classes"):
        train(Project.open(config, PUBLIC))


def test_init_says_what_is_lost_where_no_network_can_stay_away_from_the_private_images(tmp_path: Path) -> None:
    public = tmp_path / "public"
    new_project(tmp_path / "project")
    (tmp_path / "project" / "images" / "public").rename(public)
    assert init(tmp_path / "labelled", public=public).warning == ""
    for path in sorted(public.rglob("*.png")):
        path.rename(public / path.name)
    made = init(tmp_path / "bare", public=public)
    assert "no privacy bound" in made.warning
    read = Project.open(made.config).config
    assert (read.network.train_on, read.network.classifier, read.claims.bound) == ("private", "trained", False)
    weights = init(tmp_path / "brought", weights=tmp_path / "phi.pt", never_saw_private=True)
    assert weights.warning == ""
    assert Project.open(weights.config).config.network.never_saw_private
    assert "no privacy bound" in init(tmp_path / "unknown", weights=tmp_path / "phi.pt").warning
