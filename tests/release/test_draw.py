"""Rows of a user's own, put through the procedure of a release with drawn rows, so that they combine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from commands import run_cli
from dpf_release.bank.dataset import BankDataset, concat
from dpf_release.bank.procedure_format import TENSORS
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import ComputedRows
from dpf_release.errors import BankError, ConfigError
from dpf_release.owner.project import Project
from dpf_release.poisoning.mixture import Draw, drawn_anew
from dpf_release.poisoning.noisy_classes import NoisyClasses
from dpf_release.poisoning.procedure import Procedure
from dpf_release.publish.leaks.tensors import private_tensors
from dpf_release.publish.package import package
from dpf_release.release.contents import check_structure
from dpf_release.release.manifest import PROCEDURE, Manifest, describe_files, write_manifest
from dpf_release.release.release import Release
from dpf_release.release.verify import read_manifest, verify
from in_process import _structure_in_process  # noqa: F401  # for all tests here


@pytest.fixture(scope="module")
def published(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose drawn rows are released; read-only."""
    folder = Path(shutil.copytree(drawn, tmp_path_factory.mktemp("published") / "drawn"))
    package(Project.open(folder / "dpf.toml"))
    return folder


def signed_anew(release: Path) -> None:
    manifest = read_manifest(release)
    assert isinstance(manifest, Manifest)
    write_manifest(release, manifest.model_copy(update={"files": describe_files(release)}))


# --------------------------------------------------------------------------------------------- what is published


def test_what_rows_are_drawn_with_is_released_and_is_made_of_public_images_alone(published: Path) -> None:
    project, release = Project.open(published / "dpf.toml"), published / "release"
    tensors = load_file(release / PROCEDURE)
    assert tensors.keys() == set(TENSORS)
    assert verify(release) == []
    state = load_file(project.vault.function("default") / "state.safetensors")
    private = {name for name in state if "/public " not in name}
    assert private == {f"0/{name}" for name in ("scale", "count", "share", "centre", "root", "ranges")}
    with project.working(together=False):
        public = project.vault.opened(project.vault.root / "public_features", "index.json", "train")
        rows = FeatureBank(public, "train").before_relu()
        found = rows.read(np.arange(len(rows))).reshape(len(rows), -1).astype(np.float64)
    np.testing.assert_allclose(tensors["mean"], found.mean(0), atol=1e-3)
    assert tensors["prior_count"].sum() == len(rows)


def test_what_a_function_keeps_of_public_images_is_no_leak_and_all_else_is(published: Path, tmp_path: Path) -> None:
    release = Path(shutil.copytree(published / "release", tmp_path / "release"))
    vault = Project.open(published / "dpf.toml").vault
    attackers = vault.root / "attackers"  # who find the same components in the same public images
    attackers.mkdir(exist_ok=True)
    save_file({"axes": load_file(release / PROCEDURE)["axes"]}, attackers / "A13-0.safetensors")
    assert private_tensors(release, vault, []) == []
    state = load_file(vault.function("default") / "state.safetensors")
    (release / PROCEDURE).chmod(0o644)
    save_file(load_file(release / PROCEDURE) | {"axes": state["0/root"]}, release / PROCEDURE)
    assert [problem.path for problem in private_tensors(release, vault, [])] == [PROCEDURE]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mean": np.zeros(3, np.float32)}, "wrong shape: mean"),
        ({"more": np.zeros(3, np.float32)}, "expected the tensors"),
        ({"prior_square": np.zeros((3, 3))}, "moments of 3 numbers"),
        ({"cells": np.zeros((2000, 64), np.float32)}, "2000 groups"),
        ({"axes": np.zeros((0, 4096), np.float32)}, "none or too many"),
        ({"axes": np.array(0, np.float32)}, "wrong shape: axes"),
    ],
)
def test_a_procedure_of_other_tensors_is_refused(
    published: Path, tmp_path: Path, change: dict[str, np.ndarray], told: str
) -> None:
    release = Path(shutil.copytree(published / "release", tmp_path / "release"))
    path = release / PROCEDURE
    path.chmod(0o644)
    save_file(load_file(path) | change, path, {"format": "pt"})
    signed_anew(release)
    assert any(told in problem.detail for problem in check_structure(release))
    with pytest.raises(Exception, match=told):
        Procedure.of_tensors(
            {name: torch.from_numpy(value) for name, value in load_file(path).items()},
            Release.open(published / "release").record.feature_shape,
        )


def test_what_rows_are_drawn_with_beside_rows_that_were_not_is_refused(
    published: Path, finished: Path, tmp_path: Path
) -> None:
    release = Path(shutil.copytree(finished / "release", tmp_path / "release"))
    shutil.copy(published / "release" / PROCEDURE, release / PROCEDURE)
    signed_anew(release)
    assert any("were not drawn" in problem.detail for problem in check_structure(release))


# --------------------------------------------------------------------------------------------- one's own rows


def test_rows_of_ones_own_come_out_with_the_moments_of_their_class(published: Path) -> None:
    release = Release.open(published / "release")
    shape = release.record.feature_shape
    procedure = Procedure.of_tensors(
        {name: torch.from_numpy(value) for name, value in load_file(published / "release" / PROCEDURE).items()}, shape
    )
    generator, labels = np.random.default_rng(0), np.repeat([3, 999], 400)
    kept = len(procedure.scale)
    z = generator.standard_normal((800, kept)) * np.sqrt(procedure.space.variances.numpy()) / 4
    z[labels == 999, 0] += 2 * np.sqrt(float(procedure.space.variances[0]))
    own = procedure.space.features(z).numpy().reshape(800, *shape)
    features, classes = release.draw(own, labels, seed=1)
    assert features.dtype == np.float16
    assert features.shape[1:] == shape
    assert np.unique(classes, return_counts=True)[0].tolist() == [3, 999]
    assert len(classes) == 800
    spread = procedure.space.of(torch.from_numpy(own[labels == 3])).std(0)[1:9]
    drawn = drawn_anew(procedure, shape, ComputedRows(labels, lambda rows: own[rows]), Draw(1))
    assert isinstance(drawn.function.statistics, NoisyClasses)
    (_, _, _, covariance), *_ = drawn.function.gaussians()
    ratio = np.sqrt(np.diag(covariance))[1:9] / spread.numpy()
    assert 0.8 < ratio.min() <= ratio.max() < 1.2  # whatever numbers classes have
    assert not np.isin(features.reshape(800, -1)[:, 0], own.reshape(800, -1)[:, 0]).all()
    assert features.min() >= 0 or not procedure.non_negative
    means = [features[classes == label].astype(np.float64).mean(0) for label in (3, 999)]
    theirs = [np.maximum(own, 0)[labels == label].mean(0) for label in (3, 999)]
    apart = np.linalg.norm(theirs[0] - theirs[1])
    assert np.linalg.norm(means[1] - means[0] - (theirs[1] - theirs[0])) < apart / 2
    again, other = (release.draw(own, labels, seed=seed)[0] for seed in (1, 2))
    assert np.array_equal(features, again)
    assert not np.array_equal(features, other)


def test_the_featurizer_without_its_relu_is_the_featurizer_but_for_that(published: Path) -> None:
    release = Release.open(published / "release")
    images = torch.randn(4, 3, *release.record.preprocess.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        after, before = release.featurizer()(images), release.featurizer(before_relu=True)(images)
    assert torch.equal(before.relu(), after)
    assert release.ends_in_relu == bool((before < 0).any())


@pytest.mark.slow
def test_own_images_of_other_classes_are_drawn_by_the_command_and_combine(published: Path, tmp_path: Path) -> None:
    release, images = published / "release", published / "images" / "public"
    out = {name: tmp_path / name for name in ("drawn", "real")}
    common = ("featurize", "--release", str(release), "--images", str(images), "--own-classes")
    assert run_cli(*common, "--out", str(out["real"]), folder=tmp_path).returncode == 0
    result = run_cli(*common, "--draw", "--out", str(out["drawn"]), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out["drawn"].iterdir() if not path.name.startswith(".lock")) == [
        "index.json",
        "train",
    ]
    names = sorted(path.name for path in images.iterdir())
    real, drawn = (BankDataset.open(folder, "train", names) for folder in (out["real"], out["drawn"]))
    assert len(drawn) == len(real)
    assert drawn.banks[0].index.drawn
    assert not real.banks[0].index.drawn
    bank = Release.open(release).bank("train")
    assert set(names) != set(bank.names)
    joined = concat([bank, drawn])
    assert joined.names == (*bank.names, *(name for name in names if name not in bank.names))
    with pytest.raises(BankError, match=r"are drawn and those of .* are not.*--draw"):
        concat([bank, real])
    assert len(concat([bank, real], allow_shortcut=True)) == len(bank) + len(real)
    in_use = run_cli(*common, "--draw", "--out", str(images), folder=tmp_path)
    assert "expected an empty folder" in in_use.stderr
    assert sorted(path.name for path in images.iterdir()) == names
    wide = run_cli(
        *common, "--draw", "--epsilon", "1", "--delta", "0.05", "--out", str(tmp_path / "x"), folder=tmp_path
    )
    assert "expected delta of at most" in wide.stderr
    refused = run_cli(*common, "--epsilon", "1", "--out", str(tmp_path / "more"), folder=tmp_path)
    assert refused.returncode != 0
    assert "--draw" in refused.stderr


def test_a_new_classifier_may_have_more_outputs_than_the_weights_of_the_release_have_room_for(published: Path) -> None:
    release = Release.open(published / "release")
    rows = release.bank("train").read(np.arange(2))[0].float()
    for outputs in (None, 50_000):
        classifier = release.untrained_classifier(outputs=outputs).eval()
        assert classifier(rows).shape == (2, outputs or release.record.outputs)


def test_rows_that_were_not_drawn_combine_as_they_are(finished: Path) -> None:
    release = Release.open(finished / "release")
    with pytest.raises(ConfigError, match="were not drawn"):
        release.draw(np.zeros((4, *release.record.feature_shape), np.float32), np.zeros(4, np.int64))
    assert not (finished / "release" / PROCEDURE).exists()
    assert not release.index.drawn
