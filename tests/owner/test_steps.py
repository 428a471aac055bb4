"""From images to a release, on a tiny project."""

from __future__ import annotations

import csv
import json
import stat
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from dpf_release import Release, concat
from dpf_release.bank.dataset import BankDataset
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.files import sha256_of
from dpf_release.core.progress import announce
from dpf_release.errors import BankError, ConfigError, ImageError, VaultError
from dpf_release.images.decode import decode
from dpf_release.models.weights import load_state
from dpf_release.owner.adversaries import straw_man
from dpf_release.owner.cut_network import CutNetwork
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.fitted import load_function
from dpf_release.owner.init import init
from dpf_release.owner.measure import measure
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.train import train
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.interface import FUNCTIONS
from dpf_release.release.featurize import featurize_new
from network_digests import state_bytes
from tiny_project import new_project, write_shapes


def measurements(folder: Path, name: str = "default") -> dict:
    return json.loads((folder / "vault" / "reports" / name / "measurements.json").read_text())


def open_project(folder: Path, **overrides: object) -> Project:
    return Project.open(folder / "dpf.toml", {key.replace("__", "."): value for key, value in overrides.items()})


def test_the_learned_function_ruins_the_reconstruction_and_identity_does_not(project_folder: Path) -> None:
    learned = measurements(project_folder)["val"]["reconstruction"]["px2s4"]
    project = open_project(project_folder, poison__function="identity")
    fit_poison(project, name="control")
    write_candidate(project, "control")
    control = measure(project, "control")["val"]["reconstruction"]["px2s4"]
    assert learned["abs_ssim_poisoned"] < learned["abs_ssim_clean"] / 3
    assert learned["l1_poisoned"] > 1.3 * learned["l1_clean"]
    assert control["ssim_poisoned"] == pytest.approx(control["ssim_clean"])


def test_the_classifier_answers_on_poisoned_rows_as_on_clean_ones(finished: Path) -> None:
    task = measurements(finished)["val"]["task"]
    assert task["top1_clean"] > 0.8
    assert task["top1_poisoned"] > task["top1_clean"] - 0.2
    low, high = task["top1_difference_95"]
    assert low <= task["top1_difference"] <= high


def test_every_readable_image_has_one_row_and_the_others_are_reported(finished: Path) -> None:
    project = open_project(finished)
    bad = project.private_images.bad
    assert [image.name for image in bad] == ["disc/disc-portrait-007.png"]
    lines = list(project.vault.read_ids())
    rows = sum(len(FeatureBank(project.vault.features, split)) for split in ("train", "val", "test"))
    assert rows == len(lines) == len(project.private_images.table) - len(bad)
    assert len({line["source"] for line in lines}) == rows
    assert json.loads(project.vault.plan.read_text())["undecodable"][0]["name"] == bad[0].name


def test_the_bank_holds_the_features_of_the_images_that_the_id_map_names(finished: Path) -> None:
    project = open_project(finished)
    bank = project.private_bank("train")
    lines = [line for line in project.vault.read_ids() if line["split"] == "train"]
    row = 5
    assert bank.ids[row].tobytes().hex() == lines[row]["id"]
    picture = decode(finished / "images" / "private" / lines[row]["source"], project.preprocess)
    features = project.cut.split.featurizer.eval()(project.preprocess.normalise(torch.from_numpy(picture)[None]))
    np.testing.assert_allclose(bank.read([row])[0], features[0].detach().numpy(), atol=2e-2)
    assert project.private_images.table.classes[bank.targets[row]] == lines[row]["source"].split("/")[0]
    assert [line["row"] for line in lines] == [str(number) for number in range(len(lines))]


def test_row_order_tells_nothing_of_the_source_order(finished: Path) -> None:
    lines = [line["source"] for line in Vault(finished / "vault").read_ids() if line["split"] == "train"]
    assert lines != sorted(lines)
    assert len({source.split("/")[0] for source in lines[:20]}) == 2


def test_everything_in_the_vault_is_for_the_owner_only(finished: Path) -> None:
    for path in [finished / "vault", *(finished / "vault").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((finished / "release" / "manifest.json").stat().st_mode) == 0o644  # the control


def test_networks_stay_byte_equal_while_the_function_is_fitted(project_folder: Path) -> None:
    project = open_project(project_folder, poison__epochs=1)
    frozen = {
        "φ1": project.cut.split.featurizer,
        "φ2": project.cut.split.classifier,
        "ψ": straw_man(project, "px2s4"),
    }
    before = {name: state_bytes(network) for name, network in frozen.items()}
    saved = sha256_of(project.vault.reconstructors / "px2s4.safetensors")
    fit_poison(project, name="again")
    assert {name: state_bytes(network) for name, network in frozen.items()} == before
    assert sha256_of(project.vault.reconstructors / "px2s4.safetensors") == saved
    weights = [load_state(project.vault.function(name) / "state.safetensors") for name in ("default", "again")]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])  # the control: P was trained


@pytest.mark.parametrize("spec", ["gaussian-noise", "gaussian-filter", "mean-filter", "recombine:k=3"])
def test_stationary_functions_make_candidates_side_by_side(project_folder: Path, spec: str) -> None:
    project = open_project(project_folder, poison__function=spec)
    fit_poison(project, name="other")
    index = write_candidate(project, "other")
    assert index.poisoned
    report = measure(project, "other")
    assert (
        report["val"]["reconstruction"]["px2s4"]["ssim_poisoned"]
        < report["val"]["reconstruction"]["px2s4"]["ssim_clean"]
    )
    clean, poisoned = (
        FeatureBank(folder, "val") for folder in (project.vault.features, project.vault.candidate("other") / "features")
    )
    assert np.array_equal(clean.ids, poisoned.ids)
    assert np.array_equal(clean.targets, poisoned.targets)
    assert not np.array_equal(clean.read(np.arange(3)), poisoned.read(np.arange(3)))
    assert (project.vault.candidate("default") / "features" / "index.json").is_file()
    assert spec.split(":")[0] in FUNCTIONS


def test_a_learned_function_after_recombine_is_penalised_for_every_contributor(project_folder: Path) -> None:
    project = open_project(project_folder, poison__function="recombine:k=3+dpf", poison__epochs=1)
    fit_poison(project, name="chain")
    function = load_function(project, "chain")
    bank = project.private_bank("train")
    positions, members, _ = function.chain.contributors(np.arange(4), function.plans["train"])
    assert set(positions) == {0, 1, 2, 3}
    assert len(members) > 4
    assert np.array_equal(bank.targets[members], bank.targets[positions])  # contributors are of the row's class
    assert write_candidate(project, "chain").poisoned


def test_a_fit_that_was_cut_off_goes_on_and_a_finished_one_is_not_overwritten(project_folder: Path) -> None:
    project = open_project(project_folder, poison__epochs=2)
    fit_poison(project, restart=True)
    with pytest.raises(VaultError, match="is fitted already"):
        fit_poison(project)
    record = project.vault.function("default") / "function.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fitted": False}))
    with pytest.raises(VaultError, match="was begun with other settings"):
        fit_poison(open_project(project_folder, **{"poison__epochs": 2, "poison__lambda": 3.0}))
    with pytest.raises(VaultError, match="not fitted to the end"):
        write_candidate(project)
    before = json.loads(record.read_text())["secret"]
    fit_poison(project)
    assert json.loads(record.read_text())["secret"] == before
    fit_poison(open_project(project_folder, poison__epochs=1), restart=True)
    assert json.loads(record.read_text())["secret"] != before


def test_a_function_whose_weights_are_lost_is_refused_and_not_taken_for_the_identity(project_folder: Path) -> None:
    project = open_project(project_folder)
    assert load_function(project, "default").chain.learned_secret
    (project.vault.function("default") / "state.safetensors").unlink()
    with pytest.raises(VaultError, match=r"state\.safetensors, found none"):
        load_function(project, "default")


def test_features_cut_off_midway_are_gone_on_with_to_the_same_bytes(project_folder: Path) -> None:
    project = open_project(project_folder)
    features = project.vault.features
    shards = {path: sha256_of(path) for path in features.glob("*/*.h5")}
    assert len(shards) > 5
    for path in [features / "index.json", features / "train" / "shard-00001.h5", features / "test" / "shard-00000.h5"]:
        path.unlink()
    (features / "train" / "shard-00001.h5.partial").write_bytes(b"half")
    featurize(project)
    assert {path: sha256_of(path) for path in features.glob("*/*.h5")} == shards
    assert not list(features.rglob("*.partial"))
    featurize(open_project(project_folder), restart=True)
    assert {path: sha256_of(path) for path in features.glob("*/*.h5")} != shards  # new order, new ids


def test_another_plan_is_refused_and_named(project_folder: Path) -> None:
    write_shapes(project_folder / "images" / "private" / "more", ("disc",), 0, seed=3)
    (project_folder / "images" / "private" / "more").rename(project_folder / "more")
    Image.new("RGB", (32, 32)).save(project_folder / "images" / "private" / "disc" / "new.png")
    with pytest.raises(VaultError, match="source_sha256"):
        featurize(open_project(project_folder))
    with pytest.raises(VaultError, match="batch_size"):
        featurize(open_project(project_folder, bank__batch_size=5))


def test_another_hook_point_voids_features_and_functions(project_folder: Path) -> None:
    project = open_project(project_folder, network__hook="conv3_1")
    with pytest.raises(VaultError, match="featurizer_sha256"):
        fit_poison(project, name="other")
    with pytest.raises(VaultError, match="another featurizer or hook point"):
        load_function(project, "default")


def test_a_hook_point_of_equal_weights_and_shape_is_another_featurizer(finished: Path) -> None:
    # layer3.0.bn2 is followed by an addition and a ReLU: layer3.0 has the same weights and the same shape.
    shas = set()
    for preprocess in ({}, {"network__mean": [0.4, 0.4, 0.4]}):
        project = open_project(finished, **preprocess)
        try:
            shas.add(project.cut.featurizer_sha256)
        except VaultError as error:
            shas.add(str(error))
    assert len(shas) == 2
    project = open_project(finished)
    same = CutNetwork(project.cut.record, project.cut.split)
    other = CutNetwork(
        project.cut.record, replace(project.cut.split, hook=replace(project.cut.split.hook, path="layer3.0.bn2"))
    )
    assert same.featurizer_sha256 == project.cut.featurizer_sha256 != other.featurizer_sha256


def test_classes_in_another_order_than_the_networks_are_refused(project_folder: Path) -> None:
    project = open_project(project_folder, images__private__classes=["square", "disc"])
    with pytest.raises(VaultError, match=r"answers \['disc', 'square'\], in this order"):
        featurize(project, restart=True)
    featurize(open_project(project_folder, images__private__classes=["disc", "square"]), restart=True)


def test_one_project_sees_what_its_own_steps_replace(project_folder: Path) -> None:
    project = open_project(project_folder, train__epochs=1)
    before, phi_1 = project.bank_order[1]["train"].copy(), project.cut.featurizer_sha256
    train(project, restart=True)
    assert project.cut.featurizer_sha256 != phi_1
    featurize(project, restart=True)
    ids = [line["id"] for line in project.vault.read_ids() if line["split"] == "train"]
    assert [row_id.tobytes().hex() for row_id in project.private_bank("train").ids] == ids
    assert not np.array_equal(project.bank_order[1]["train"], before)


def test_features_written_anew_void_the_functions_fitted_before(project_folder: Path) -> None:
    project = open_project(project_folder, poison__function="recombine:k=3")
    fit_poison(project, name="groups")
    write_candidate(project, "groups")
    featurize(open_project(project_folder), restart=True)
    with pytest.raises(VaultError, match="since written anew"):
        write_candidate(open_project(project_folder), "groups")
    fit_poison(open_project(project_folder, poison__function="recombine:k=3"), name="groups", restart=True)
    write_candidate(open_project(project_folder), "groups")


def test_a_mistake_with_restart_costs_nothing(project_folder: Path) -> None:
    function = project_folder / "vault" / "functions" / "default"
    before = {path.name: sha256_of(path) for path in function.iterdir()}
    for wrong in (
        {"poison__function": "dfp"},
        {"poison__straw_men": ["px2"]},
        {"poison__straw_men": []},
        {"poison__confuse": ["person"]},
    ):
        with pytest.raises((ConfigError, ImageError)):
            fit_poison(open_project(project_folder, **wrong), restart=True)
    assert {path.name: sha256_of(path) for path in function.iterdir()} == before


def test_an_attacker_is_trained_anew_where_its_images_or_its_featurizer_changed(project_folder: Path) -> None:
    straw = project_folder / "vault" / "reconstructors" / "px2s4.safetensors"
    before = sha256_of(straw)
    straw_man(open_project(project_folder, reconstructor__epochs=12), "px2s4")
    assert sha256_of(straw) == before
    for path in sorted((project_folder / "images" / "public").rglob("*.png"))[20:]:
        path.unlink()
    straw_man(open_project(project_folder), "px2s4")
    assert sha256_of(straw) != before


def test_an_attacker_never_sees_a_private_image(project_folder: Path) -> None:
    project = open_project(project_folder, images__public__path="images/private", images__public__max_bad=0.1)
    with pytest.raises(ImageError, match="not private, found 119 in both"):
        straw_man(project, "px2s4")


def test_new_weights_are_taken_over_when_asked_and_refused_otherwise(project_folder: Path, tmp_path: Path) -> None:
    phi = load_state(project_folder / "vault" / "network" / "phi.safetensors")
    weights = tmp_path / "weights.pt"
    torch.save(phi, weights)
    own = {"network__weights": str(weights)}
    featurize(open_project(project_folder, **own))  # the network was trained here: it stays
    for path in (project_folder / "vault" / "network").iterdir():
        path.unlink()
    featurize(open_project(project_folder, **own), restart=True)
    torch.save(phi | {"fc.bias": phi["fc.bias"] + 1}, weights)
    with pytest.raises(VaultError, match="is not the file that the vault's network came from"):
        featurize(open_project(project_folder, **own))
    featurize(open_project(project_folder, **own), restart=True)
    taken = load_state(project_folder / "vault" / "network" / "phi.safetensors")
    assert torch.equal(taken["fc.bias"], phi["fc.bias"] + 1)


def test_a_device_that_is_not_there_is_a_users_mistake(project_folder: Path) -> None:
    missing = "cuda:7"
    with pytest.raises(ConfigError, match="expected a device that is there"):
        featurize(open_project(project_folder, compute__device=missing))


def test_another_architecture_than_the_vaults_is_refused(project_folder: Path) -> None:
    with pytest.raises(VaultError, match="the vault's network is"):
        featurize(open_project(project_folder, network__arguments={"width": 8}))
    with pytest.raises(VaultError, match="holds a network already"):
        train(open_project(project_folder))


def test_an_owners_weights_take_the_place_of_training(finished: Path, tmp_path: Path) -> None:
    config = new_project(tmp_path / "own")
    with pytest.raises(VaultError, match="expected a network"):
        featurize(Project.open(config))
    weights = tmp_path / "weights.pt"
    torch.save(load_state(finished / "vault" / "network" / "phi.safetensors"), weights)
    featurize(Project.open(config, {"network.weights": str(weights)}))
    mine, theirs = (
        load_state(folder / "vault" / "network" / "phi.safetensors") for folder in (config.parent, finished)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_too_many_broken_images_stop_the_run_with_their_list(tmp_path: Path) -> None:
    config = new_project(tmp_path / "broken")
    broken = tmp_path / "broken" / "images" / "private" / "disc" / "disc-portrait-001.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ImageError, match=r"disc-portrait-001\.png"):
        train(Project.open(config, {"images.private.max_bad": 0.001}))
    assert Project.open(config).private_images.bad[0].name.endswith("disc-portrait-001.png")  # 10 % allowed


def test_an_unknown_function_or_objective_is_refused_before_anything_is_trained(project_folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a poisoning function"):
        fit_poison(open_project(project_folder, poison__function="nonsense"), name="x")
    with pytest.raises(ConfigError, match="objective"):
        open_project(project_folder, poison__objective="nonsense")
    with pytest.raises(ConfigError, match="byproduct attacker"):
        fit_poison(open_project(project_folder, poison__straw_men=[]), name="y")
    # What learns nothing has nobody to be trained against.
    unopposed = open_project(project_folder, poison__straw_men=[], poison__function="recombine:k=3")
    fit_poison(unopposed, name="y")
    write_candidate(unopposed, "y")
    measure(unopposed, "y")


# ----------------------------------------------------------------------------------------- downstream


def test_a_release_opens_and_its_parts_fit_together(finished: Path) -> None:
    release = Release.open(finished / "release")
    project = open_project(finished)
    assert release.classes == ("disc", "square")
    phi_1, phi_2 = release.featurizer(), release.classifier()
    assert state_bytes(phi_1) == state_bytes(project.cut.split.featurizer)
    assert not any(parameter.requires_grad for parameter in phi_1.parameters())
    features, labels = next(iter(release.bank("train").loader(batch_size=64)))
    assert features.shape[1:] == release.record.feature_shape
    assert (phi_2(features.float()).argmax(1) == labels).float().mean() > 0.7
    picture = finished / "images" / "private" / "disc" / "disc-portrait-001.png"
    assert phi_1(release.preprocess([picture])).shape == (1, *release.record.feature_shape)


def test_own_images_join_a_release_through_its_featurizer(finished: Path, tmp_path: Path) -> None:
    release = Release.open(finished / "release")
    write_shapes(tmp_path / "mine", ("disc", "square"), 6, seed=9)
    (tmp_path / "mine" / "disc" / "empty.png").write_bytes(b"")
    index, bad = featurize_new(release, tmp_path / "mine", tmp_path / "bank", max_bad=0.1)
    assert not index.poisoned
    assert [image.name for image in bad] == ["disc/empty.png"]
    own = BankDataset.open(tmp_path / "bank", "train", release.names)
    joined = concat([release.bank("train"), own])
    assert len(joined) == len(release.bank("train")) + 12
    with pytest.raises(BankError, match="holds a bank already"):
        featurize_new(release, tmp_path / "mine", tmp_path / "bank")
    (tmp_path / "mine" / "disc" / "empty.png").unlink()
    (tmp_path / "mine" / "disc").rename(tmp_path / "mine" / "circle")
    with pytest.raises(ImageError, match="found also circle"):
        featurize_new(release, tmp_path / "mine", tmp_path / "other")
    (tmp_path / "mine" / "circle").rename(tmp_path / "circle")
    featurize_new(release, tmp_path / "mine", tmp_path / "other")  # squares alone are fine
    assert set(BankDataset.open(tmp_path / "other", "train", release.names).targets) == {1}


def test_a_second_owner_shares_the_network_of_a_release(finished: Path, tmp_path: Path) -> None:
    init(tmp_path / "second", from_release=finished / "release")
    write_shapes(tmp_path / "second" / "images" / "private", ("disc", "square"), 20, seed=5)
    project = Project.open(tmp_path / "second" / "dpf.toml")
    index = featurize(project).index
    assert index.featurizer_sha256 == Release.open(finished / "release").index.featurizer_sha256
    assert project.cut.record.classes == ("disc", "square")
    with pytest.raises(ConfigError, match="is there already"):
        init(tmp_path / "second")


@pytest.mark.slow
def test_a_regression_project_hides_who_it_is_and_keeps_its_answer(tmp_path: Path) -> None:
    task = '[task]\nkind = "regression"\ntargets = ["shift"]\nunit = "px"\n'
    config = new_project(tmp_path / "yaw", task, private="people.csv")
    generator = np.random.default_rng(0)
    with (config.parent / "people.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "person", "shift"])
        (config.parent / "people").mkdir()
        for number in range(120):
            person, shift = number % 4, int(generator.integers(0, 16))
            pixels = np.full((32, 32, 3), 40, np.uint8)
            pixels[8:24, shift : shift + 16, person % 3] = 255 if person < 3 else 160
            Image.fromarray(pixels).save(config.parent / "people" / f"{number}.png")
            table.writerow([f"people/{number}.png", f"person {person}", shift])
    project = Project.open(
        config,
        {
            "poison.confuse": ["person"],
            "poison.lambda": 2.0,
            "train.flip": False,
            "poison.epochs": 10,
            "poison.straw_men": [],  # what stands of a picture is not asked here
            "reconstructor.epochs": 2,
        },
    )
    train(project)
    featurize(project)
    fit_poison(project)
    write_candidate(project)
    report = measure(project)["val"]
    assert report["task"]["mae_clean"] < 3.5  # guessing the mean is 4.3 off
    assert report["attributes"]["person"]["top1_clean"] > report["attributes"]["person"]["top1_poisoned"] + 0.2
    with h5py.File(project.vault.candidate("default") / "features" / "val" / "shard-00000.h5") as shard:
        assert shard["target"].dtype == np.float32
        assert shard["target"].shape[1] == 1


def test_what_stands_in_brackets_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    announce("[claims] attribute is None; see [gate]")
    assert capsys.readouterr().err == "[claims] attribute is None; see [gate]\n"
