"""What `package` publishes, what it refuses, and that it does so whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dpf_release import Release
from dpf_release.bank.format import BankIndex, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import BankWriter
from dpf_release.core.files import sha256_of
from dpf_release.errors import BankError, RefusedError, VaultError, VerificationError
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.publish import package as package_module
from dpf_release.publish import swap as swap_module
from dpf_release.publish.leaks.near_rows import find_near_rows
from dpf_release.publish.package import package
from dpf_release.release import contents as structure
from dpf_release.release.child_process import run_limited
from dpf_release.release.manifest import Manifest, describe_files, write_manifest
from dpf_release.release.verify import read_manifest, verify
from in_process import _structure_in_process  # noqa: F401  # for all tests here
from small_banks import fill
from small_releases import list_anew

PUBLIC = {
    "README.md": "card",
    "croissant.json": "croissant",
    "features/index.json": "bank-index",
    "model/classifier.safetensors": "classifier",
    "model/featurizer.safetensors": "featurizer",
    "model/model.json": "model-record",
}


def digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def test_a_release_holds_the_allowlist_and_nothing_else(finished: Path) -> None:
    release = finished / "release"
    names = set(digests(release)) - set(PUBLIC) - {"manifest.json", "SHA256SUMS"}
    assert names
    assert all(name.startswith(("features/train/shard-", "features/val/shard-")) for name in names)
    listed = {file["path"]: file["role"] for file in json.loads((release / "manifest.json").read_text())["files"]}
    assert {path: role for path, role in listed.items() if role != "shard"} == PUBLIC
    assert verify(release) == []


def test_no_public_byte_names_a_source_file_or_a_folder_of_the_owner(finished: Path) -> None:
    needles = [b"portrait", str(finished).encode(), str(Path.home()).encode(), b"vault"]
    private = b"".join(path.read_bytes() for path in (finished / "vault").rglob("*.*") if path.is_file())
    assert needles[0] in private  # the control: the vault does name them
    for path in (finished / "release").rglob("*"):
        if path.is_file():
            found = [needle for needle in needles if needle in path.read_bytes()]
            assert not found, (path, found)


def test_every_public_shard_says_that_it_is_poisoned(finished: Path) -> None:
    for public, private in (("release", "vault"),):
        for path in (finished / public / "features").rglob("*.h5"):
            with h5py.File(path) as shard:
                assert shard.attrs["poisoned"]
        with h5py.File(finished / private / "features" / "train" / "shard-00000.h5") as shard:
            assert not shard.attrs["poisoned"]


def test_packaging_twice_gives_the_same_bytes(project_folder: Path) -> None:
    before = digests(project_folder / "release")
    package(Project.open(project_folder / "dpf.toml"))
    assert digests(project_folder / "release") == before
    package(Project.open(project_folder / "dpf.toml", {"release.version": "1.1.0"}))
    manifest = json.loads((project_folder / "release" / "manifest.json").read_text())
    assert manifest["previous"] == before["manifest.json"]
    assert len(json.loads((project_folder / "vault" / "ledger.json").read_text())) == 2


def test_an_unpoisoned_candidate_is_refused_by_its_flag(project_folder: Path) -> None:
    project = Project.open(project_folder / "dpf.toml", {"poison.function": "identity"})
    fit_poison(project, name="control")
    write_candidate(project, "control")
    with pytest.raises(RefusedError, match="is not poisoned"):
        package(project, "control")
    assert package(project, "default").name == "shapes"


def test_private_rows_are_refused_even_where_the_flag_says_poisoned(project_folder: Path) -> None:
    project = Project.open(project_folder / "dpf.toml", {"poison.function": "gaussian-noise:scale=0.001"})
    fit_poison(project, name="weak")
    assert write_candidate(project, "weak").poisoned
    before = digests(project_folder / "release")
    with pytest.raises(RefusedError, match=r"rows of φ1\(S\)"):
        package(project, "weak", second_function="for a test")
    assert digests(project_folder / "release") == before


def _bank(folder: Path, rows: np.ndarray, seed: int) -> FeatureBank:
    header = BankIndex(poisoned=True, featurizer_sha256="0" * 64, feature_shape=rows.shape[1:], targets=0)
    ids = np.random.default_rng(seed).integers(0, 256, (len(rows), 16), dtype=np.uint8)
    writer = BankWriter(folder, header)
    writer.finish(fill(writer, np.zeros(len(rows), np.int64), ids, lambda start, stop: rows[start:stop]))
    return FeatureBank(folder, "train")


def test_a_private_row_is_found_under_another_id_and_scale(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    private = generator.standard_normal((300, 8, 4, 4)).astype(np.float32)
    public = generator.standard_normal((300, 8, 4, 4)).astype(np.float32)
    banks = [_bank(tmp_path / "private", private, 1)], [_bank(tmp_path / "public", public, 2)]
    assert [rows.tolist() for rows in find_near_rows(banks[1], banks[0])] == [[]]
    mean = private.mean(axis=0)
    public[17] = mean + 0.5 * (private[250] - mean)
    public[99] = private[3]
    leaky = [_bank(tmp_path / "leaky", public, 3)]
    assert [rows.tolist() for rows in find_near_rows(leaky, banks[0])] == [[17, 99]]


@pytest.mark.parametrize(
    "name", ["features/notes.txt", "model/phi.safetensors", "ids.csv", "features/test/shard-00000.h5"]
)
def test_what_has_no_role_is_refused_and_never_copied(project_folder: Path, name: str) -> None:
    stranger = project_folder / "vault" / "candidates" / "default" / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"private")
    before = digests(project_folder / "release")
    with pytest.raises(RefusedError, match="No place in a release"):
        package(Project.open(project_folder / "dpf.toml"))
    assert digests(project_folder / "release") == before


def test_a_shard_that_no_index_lists_is_refused(project_folder: Path) -> None:
    vault = project_folder / "vault"
    private, public = (folder / "features" / "train" for folder in (vault, vault / "candidates" / "default"))
    shutil.copy(private / "shard-00000.h5", public / "shard-00099.h5")
    with pytest.raises(RefusedError, match="shard-00099"):
        package(Project.open(project_folder / "dpf.toml"))


@pytest.mark.parametrize(
    "target", ["features/train/shard-00000.h5", "model/classifier.safetensors", "model/model.json"]
)
def test_a_private_file_in_the_place_of_a_public_one_is_refused(project_folder: Path, target: str) -> None:
    vault = project_folder / "vault"
    source = {
        "features/train/shard-00000.h5": vault / "features" / "train" / "shard-00000.h5",
        "model/classifier.safetensors": vault / "functions" / "default" / "state.safetensors",
        "model/model.json": vault / "functions" / "default" / "function.json",
    }[target]
    before = digests(project_folder / "release")
    shutil.copy(source, vault / "candidates" / "default" / target)
    with pytest.raises((RefusedError, VerificationError, BankError)):
        package(Project.open(project_folder / "dpf.toml"))
    assert digests(project_folder / "release") == before


def _spoil(release: Path, what: str) -> None:
    """Something wrong with a release that no check of its candidate could see; "nothing" is the control."""
    shard, manifest = release / "features" / "val" / "shard-00000.h5", read_manifest(release)
    assert isinstance(manifest, Manifest)
    if what == "changed":
        shard.write_bytes(shard.read_bytes() + b"\0")
    elif what == "unexpected":
        (release / "notes.txt").touch()
    elif what == "schema":
        write_manifest(release, manifest.model_copy(update={"splits": manifest.splits | {"val": 1}}))
    elif what == "values":
        with h5py.File(shard, "r+") as file:
            file["features"][0] = np.nan
        list_anew(release)


@pytest.mark.parametrize("what", ["nothing", "changed", "unexpected", "schema", "values"])
def test_a_release_is_checked_as_its_reader_will_find_it_in_one_child(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before, deep = digests(project_folder / "release"), []

    def spoilt(release: Path, manifest: Manifest) -> None:
        write_manifest(release, manifest)
        _spoil(release, what)

    def counted(module: str, request: Any, seconds: int) -> Any:
        deep.append(request["deep"])
        return run_limited(module, request, seconds)

    monkeypatch.setattr(package_module, "write_manifest", spoilt)
    monkeypatch.setattr(structure, "run_limited", counted)
    project = Project.open(project_folder / "dpf.toml", {"release.version": "2.0.0"})
    if what == "nothing":
        assert package(project).version == "2.0.0"
    else:
        with pytest.raises(RefusedError, match=rf"Nothing was published\.\n  {what}: "):
            package(project)
        assert digests(project_folder / "release") == before
    assert deep == ([True] if what in {"nothing", "schema", "values"} else [])  # no file of a wrong digest is parsed


def test_a_candidate_of_another_function_or_bank_is_refused(project_folder: Path) -> None:
    noise = {"poison.function": "gaussian-noise"}
    fit_poison(Project.open(project_folder / "dpf.toml", noise), restart=True)
    with pytest.raises(VaultError, match="Run `dpf-release poison"):  # a function fitted anew has no candidate
        package(Project.open(project_folder / "dpf.toml"))
    write_candidate(Project.open(project_folder / "dpf.toml"))
    record = project_folder / "vault" / "functions" / "default" / "candidate.json"
    made = json.loads(record.read_text())
    record.write_text(json.dumps(made | {"origin": made["origin"] | {"function": "0" * 64}}))
    with pytest.raises(RefusedError, match="another function than today's"):
        package(Project.open(project_folder / "dpf.toml"))
    record.write_text(json.dumps(made))
    package(Project.open(project_folder / "dpf.toml"), second_function="for a test")
    featurize(Project.open(project_folder / "dpf.toml"), restart=True)
    with pytest.raises(VaultError, match="since written anew"):
        package(Project.open(project_folder / "dpf.toml"))


def test_shards_of_a_larger_bank_do_not_stay_behind(project_folder: Path) -> None:
    project = Project.open(project_folder / "dpf.toml", {"bank.shard_size": "1 MB"})
    candidate = project.vault.candidate("default") / "features"
    before = len(list(candidate.rglob("*.h5")))
    with pytest.raises(VaultError, match="changed since: shard_size"):
        write_candidate(project)
    assert len(list(candidate.rglob("*.h5"))) == before
    index = write_candidate(project, restart=True)
    assert len(list(candidate.rglob("*.h5"))) == sum(map(len, index.splits.values())) < before
    package(project)


def test_the_card_shows_the_scores_of_this_candidate_only(project_folder: Path) -> None:
    project = Project.open(project_folder / "dpf.toml")
    assert "φ2 on val: top-1" in (project_folder / "release" / "README.md").read_text()
    fit_poison(Project.open(project_folder / "dpf.toml", {"poison.function": "mean-filter"}), restart=True)
    write_candidate(project)
    package(project, second_function="for a test")
    assert "not measured" in (project_folder / "release" / "README.md").read_text()


def test_a_link_in_the_candidate_is_refused(project_folder: Path) -> None:
    model = project_folder / "vault" / "candidates" / "default" / "model" / "model.json"
    model.rename(project_folder / "elsewhere.json")
    model.symlink_to(project_folder / "elsewhere.json")
    with pytest.raises(VaultError, match="is a link"):
        package(Project.open(project_folder / "dpf.toml"))


@pytest.mark.parametrize("place", ["vault/release", "images", ".", "images/private/release/.."])
def test_a_release_and_private_things_never_lie_in_each_other(project_folder: Path, place: str) -> None:
    with pytest.raises(VaultError, match="no place for a release"):
        package(Project.open(project_folder / "dpf.toml"), out=project_folder / place)


def test_a_folder_that_is_no_release_is_never_replaced(project_folder: Path) -> None:
    (project_folder / "thesis").mkdir()
    (project_folder / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(VaultError, match="is not a release named"):
        package(Project.open(project_folder / "dpf.toml"), out=project_folder / "thesis")
    assert (project_folder / "thesis" / "chapter1.tex").read_text() == "years of work"
    package(Project.open(project_folder / "dpf.toml"), out=project_folder / "new")
    assert verify(project_folder / "new") == []


@pytest.mark.parametrize("name", ["notes.txt", "features/train/.DS_Store", "model/link"])
def test_what_others_put_into_a_release_is_never_thrown_away(project_folder: Path, name: str) -> None:
    foreign, project = project_folder / "release" / name, Project.open(project_folder / "dpf.toml")
    foreign.symlink_to(project_folder / "images") if name.endswith("link") else foreign.write_text("years of work")
    before = digests(project_folder / "release")
    with pytest.raises(VaultError, match=rf"its manifest does not list: {name}\. .*Nothing was changed"):
        package(project)
    assert digests(project_folder / "release") == before
    assert foreign.exists()
    foreign.unlink()
    package(project)


@pytest.mark.parametrize("moment", ["write_card", "describe_files", "remember_release", "swap"])
def test_a_crash_while_packaging_leaves_the_old_release(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = digests(project_folder / "release")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    project = Project.open(project_folder / "dpf.toml", {"release.version": "2.0.0"})
    with monkeypatch.context() as patch:
        patch.setattr(package_module, moment, crash)
        with pytest.raises(KeyboardInterrupt):
            package(project)
    assert digests(project_folder / "release") == before
    package(project)
    assert verify(project_folder / "release") == []
    assert digests(project_folder / "release") != before
    assert sorted(path.name for path in project_folder.glob("*release*")) == ["release"]


def test_the_swap_works_where_the_system_cannot_exchange(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_module, "_exchange", lambda one, other: False)
    package(Project.open(project_folder / "dpf.toml", {"release.version": "2.0.0"}))
    assert verify(project_folder / "release") == []
    assert sorted(path.name for path in project_folder.glob("*release*")) == ["release"]


def test_a_crash_between_two_renames_is_put_right(project_folder: Path) -> None:
    before = digests(project_folder / "release")
    (project_folder / "release").rename(project_folder / ".release.dpf-old")
    (project_folder / "vault" / "candidates" / "default" / "features" / "index.json").unlink()
    with pytest.raises(BankError):
        package(Project.open(project_folder / "dpf.toml"))
    assert digests(project_folder / "release") == before


def test_an_owners_own_folders_beside_the_release_stay(project_folder: Path) -> None:
    for name in ("release.old", "release.staging"):
        (project_folder / name).mkdir()
        (project_folder / name / "backup").write_text("mine")
    package(Project.open(project_folder / "dpf.toml", {"release.version": "3.0.0"}))
    assert (project_folder / "release.old" / "backup").read_text() == "mine"
    assert (project_folder / "release.staging" / "backup").read_text() == "mine"
    with pytest.raises(VaultError, match="named 'other'"):
        package(Project.open(project_folder / "dpf.toml", {"release.name": "other"}))


def test_a_candidate_half_written_is_not_published(project_folder: Path) -> None:
    (project_folder / "vault" / "candidates" / "default" / "features" / "index.json").unlink()
    with pytest.raises(Exception, match="expected a finished feature bank"):
        package(Project.open(project_folder / "dpf.toml"))


def test_a_changed_release_does_not_open_and_a_whole_one_does(project_folder: Path) -> None:
    release = project_folder / "release"
    assert Release.open(release).manifest.version == "1.0.0"
    shard = next((release / "features" / "train").glob("*.h5"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (release / "note.txt").write_text("hello")
    with pytest.raises(VerificationError) as caught:
        Release.open(release)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {"changed", "unexpected"}


def test_a_release_that_contradicts_itself_does_not_open(project_folder: Path) -> None:
    release = project_folder / "release"
    index = release / "features" / "index.json"
    index.write_text(index.read_text().replace(read_index(release / "features").featurizer_sha256, "0" * 64))
    manifest = read_manifest(release)
    assert not hasattr(manifest, "kind")
    write_manifest(release, manifest.model_copy(update={"files": describe_files(release)}))
    assert verify(release) == []  # its digests are right; what they are digests of is not
    with pytest.raises(VerificationError, match="made by another featurizer"):
        Release.open(release)


def test_an_owners_own_network_is_named_custom_and_opens_with_a_builder(
    project_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks.py").write_text(
        "from dpf_release.models.zoo import CifarResNet\n\n"
        "def tiny(outputs):\n    return CifarResNet(3, outputs, width=4)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(project_folder / "vault" / "network" / "phi.safetensors", tmp_path / "phi.safetensors")
    shutil.rmtree(project_folder / "vault" / "network")
    own = {
        "network.arch": "my_networks:tiny",
        "network.arguments": {},
        "network.weights": str(tmp_path / "phi.safetensors"),
    }
    own |= {"poison.function": "recombine:k=3", "reconstructor.epochs": 1}
    project = Project.open(project_folder / "dpf.toml", own)
    featurize(project, restart=True)  # a featurizer of another name is another featurizer
    fit_poison(project, restart=True)
    write_candidate(project)
    package(project, second_function="for a test")
    text = (project_folder / "release" / "model" / "model.json").read_text()
    assert "my_networks" not in text
    release = Release.open(project_folder / "release")
    with pytest.raises(VerificationError, match="build=my_function"):
        release.featurizer()
    from my_networks import tiny

    assert release.featurizer(build=tiny) is not None
