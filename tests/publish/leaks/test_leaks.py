"""What only the vault can tell is found in a release, wherever it was put, and nothing is found in a good one."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpf_release.bank.format import BankIndex
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import BankWriter
from dpf_release.core.files import sha256_of
from dpf_release.errors import BankError, RefusedError
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.fitted import load_function
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import Vault
from dpf_release.publish.audit.audit import audit, project_of
from dpf_release.publish.leaks import drawn, near_rows
from dpf_release.publish.leaks.drawn import (
    CHANCE,
    _chance_of_bits,
    _commonest_step,
    _deviations,
    _from_texts,
    _scores,
    _unlikely_times,
    source_order,
    telling_ids,
)
from dpf_release.publish.leaks.findings import Sources, public_banks
from dpf_release.publish.leaks.near_rows import find_near_rows
from dpf_release.publish.leaks.private_facts import private_facts, private_rows
from dpf_release.publish.leaks.tensors import private_tensors
from dpf_release.publish.leaks.text import private_words
from dpf_release.publish.package import package
from dpf_release.release.verify import Problem
from in_process import _structure_in_process  # noqa: F401  # for all tests here
from small_banks import fill
from small_releases import list_anew
from tiny_project import write_shapes

FILTER = {"poison.function": "gaussian-filter"}  # nothing to train


def said(folder: Path) -> list[str]:
    """Findings in the texts of a project's release."""
    return [str(problem) for problem in private_words(folder / "release", Project.open(folder / "dpf.toml"))]


def sources_of(project: Project) -> Sources:
    return Sources.of(project.vault, project.private_table)


def tensors_told(release: Path, project: Project) -> list[Problem]:
    return private_tensors(release, project.vault, public_banks(release))


def write_card(folder: Path, text: str) -> None:
    (folder / "release" / "README.md").write_text(text, encoding="utf-8")


def test_a_release_as_it_is_made_tells_nothing(finished: Path) -> None:
    assert private_facts(finished / "release", Project.open(finished / "dpf.toml"), "default") == []


# --------------------------------------------------------------------------------------------- texts

LEAKS = [
    "disc/disc-portrait-012.png",
    "(disc-portrait-012.png)",
    "As DISC-PORTRAIT-012 shows",
    "mask_disc-portrait-012_2",
    "not decoded: disc-portrait-007.png",
    "see vault/functions/default/function.json",
    "see vault/public_features/plan.json",
    "see vault/attackers/A5-0.safetensors",
    "see vault/retracted.json",
]
HARMLESS = [
    "disc-portrait",
    "xdisc-portrait-012",
    "disc-portrait-0123",
    "disc portrait 012",
    "discs and squares",
    "a vault is not published; vault/ stays at home",
]


@pytest.mark.parametrize("text", LEAKS)
def test_a_text_that_names_a_source_file_or_a_file_of_the_vault_is_found(project_folder: Path, text: str) -> None:
    write_card(project_folder, text)
    assert [finding.split(":")[:2] for finding in said(project_folder)] == [["private text", " README.md"]]


def test_a_text_that_only_looks_like_it_is_not(project_folder: Path) -> None:
    write_card(project_folder, "\n".join(HARMLESS))
    assert said(project_folder) == []


def test_a_release_whose_description_names_a_source_file_is_refused(project_folder: Path) -> None:
    before = sha256_of(project_folder / "release" / "manifest.json")
    leaky = {"release.description": "Discs, as disc-portrait-012, and squares.", "release.version": "2.0.0"}
    with pytest.raises(RefusedError) as caught:
        package(Project.open(project_folder / "dpf.toml", leaky))
    for file in ("README.md", "croissant.json"):
        assert f"private text: {file}: says 'disc-portrait-012', a source file's name" in str(caught.value)
    assert sha256_of(project_folder / "release" / "manifest.json") == before
    assert not list(project_folder.glob(".release*"))
    harmless = leaky | {"release.description": "Discs, as disc-portrait-888, and squares."}
    assert package(Project.open(project_folder / "dpf.toml", harmless)).version == "2.0.0"


def test_paths_of_the_owner_are_found(project_folder: Path) -> None:
    for place in (project_folder / "vault", project_folder, project_folder / "images" / "private", Path.home()):
        write_card(project_folder, f"made in {place}/.")
        assert any(repr(str(place).lower()) in finding for finding in said(project_folder)), place
    write_card(project_folder, f"made in {project_folder}2 and /somewhere/else")
    assert not any(repr(str(project_folder).lower()) in finding for finding in said(project_folder))


def test_users_hosts_and_addresses_are_found(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q"], cwd=project_folder, check=True)
    subprocess.run(["git", "config", "user.email", "Ada@example.org"], cwd=project_folder, check=True)
    monkeypatch.setenv("LOGNAME", "adalove")
    monkeypatch.setattr(platform, "node", lambda: "engine-7.lab.example")
    subprocess.run(["git", "config", "author.email", "author@example.org"], cwd=project_folder, check=True)
    subprocess.run(["git", "config", "committer.email", "committer@example.org"], cwd=project_folder, check=True)
    write_card(project_folder, "author@example.org, committer@example.org")
    assert len(said(project_folder)) == 2
    write_card(project_folder, "By adalove.\nOn Engine-7.\nMail ada@example.org.\n")
    found = said(project_folder)
    assert len(found) == 3
    assert all(
        any(text in finding for finding in found)
        for text in ("'adalove', a user's name", "'engine-7', the name of this host", "'ada@example.org', an e-mail")
    )
    write_card(project_folder, "By adaloved and lovelace, on engine-77, other@example.org.\n")
    assert said(project_folder) == []


@pytest.mark.parametrize(("user", "host"), [("train", "model"), ("root", "localhost"), ("bo", "data"), ("1000", "7")])
def test_a_user_or_host_of_a_common_name_can_publish(
    finished: Path, monkeypatch: pytest.MonkeyPatch, user: str, host: str
) -> None:
    public = "".join(path.read_text(encoding="utf-8") for path in (finished / "release").glob("*.*"))
    assert all(word in public for word in ("train", "model", "data"))
    monkeypatch.setenv("LOGNAME", user)
    monkeypatch.setattr(platform, "node", lambda: host)
    assert said(finished) == []
    monkeypatch.setenv("LOGNAME", "generated")  # the control: "Generated shapes." is the description
    assert {finding.split(":")[1].strip() for finding in said(finished)} == {"README.md", "croissant.json"}


def test_a_release_that_is_named_after_its_owner_is_refused(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "adalove")
    named = {"release.name": "adalove"}
    with pytest.raises(RefusedError, match="says 'adalove', a user's name"):
        package(Project.open(project_folder / "dpf.toml", named), out=project_folder / "new")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    package(Project.open(project_folder / "dpf.toml", named), out=project_folder / "new")


def test_names_that_are_released_on_purpose_may_be_said(project_folder: Path) -> None:
    private = project_folder / "images" / "private"
    portrait = private / "disc" / "disc-portrait-000.png"
    for name in (
        "square/square.png",
        "disc/resnet20_cifar.png",
        "disc/classifier.png",
        "disc/layer3.0.conv1.weight.png",
    ):
        shutil.copy(portrait, private / name)
    assert said(project_folder) == []
    shutil.copy(portrait, private / "disc" / "shapes.png")  # no class: the name of this release
    assert any("says 'shapes', a source file's name" in finding for finding in said(project_folder))


def test_a_number_is_a_count_unless_it_is_written_as_a_name(project_folder: Path) -> None:
    private = project_folder / "images" / "private" / "disc"
    for name in ("100000.png", "000123.png"):
        shutil.copy(private / "disc-portrait-000.png", private / name)
    write_card(project_folder, "100000 rows")
    assert said(project_folder) == []
    for text in ("100000.png", "number 000123"):
        write_card(project_folder, text)
        assert len(said(project_folder)) == 1, text


def test_a_name_beyond_ascii_is_found_however_it_is_composed(project_folder: Path) -> None:
    private = project_folder / "images" / "private" / "disc"
    shutil.copy(private / "disc-portrait-000.png", private / "Zo\u00eb-im-Garten.png")
    write_card(project_folder, "ZOE\u0308-IM-GARTEN")
    assert len(said(project_folder)) == 1
    write_card(project_folder, "Zoe-im-Garten")
    assert said(project_folder) == []


def test_names_are_found_in_every_kind_of_file(project_folder: Path) -> None:
    release, name = project_folder / "release", "disc-portrait-012"
    weights = release / "model" / "classifier.safetensors"
    save_file(tensors_of(weights), weights, metadata={"record": json.dumps({"made of": [{"deep": name}]})})
    index = release / "features" / "index.json"
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in name)
    index.write_text(index.read_text().replace('{\n  "', f'{{\n  "{escaped}": 1,\n  "', 1))
    (release / f"{name}.txt").write_text("harmless")
    places = {finding.split(": ")[1] for finding in said(project_folder)}
    shown = {path.relative_to(release).as_posix() for path in (weights, index)}
    assert places == shown | {f"{name}.txt"}


NAME = "disc-portrait-012"
IN_A_SHARD: dict[str, Callable[[h5py.File], Any]] = {
    "an attribute": lambda shard: shard.attrs.create("note", NAME),
    "the name of an attribute": lambda shard: shard.attrs.create(NAME, 1),
    "an attribute that is there": lambda shard: shard.attrs.modify("encoding", NAME),
    "an attribute of a member": lambda shard: shard["features"].attrs.create("note", NAME),
    "a member": lambda shard: shard.create_dataset(NAME, data=np.zeros(4)),
    "a group": lambda shard: shard.create_group(NAME),
    "a link": lambda shard: shard.__setitem__(NAME, h5py.SoftLink("/id")),
    "texts": lambda shard: shard.create_dataset("note", data=[NAME]),
}


def test_a_name_in_a_shard_has_no_place_to_be(project_folder: Path) -> None:
    release, candidate = project_folder / "release", project_folder / "vault" / "candidates" / "default"
    project, owners = Project.open(project_folder / "dpf.toml"), project_of(project_folder / "vault")
    _change(candidate, lambda shard: None)  # the control: written to, and nothing more in it
    package(project)
    assert audit(release, owners).findings == ()
    places = (candidate, release, project.vault.function("default"))
    good = [Path(shutil.copytree(place, project_folder / f"good-{n}")) for n, place in enumerate(places)]
    for where, put in IN_A_SHARD.items():
        for place, copy in zip(places, good, strict=True):
            shutil.rmtree(place)
            shutil.copytree(copy, place)
        _change(candidate, put)
        with pytest.raises(RefusedError, match=r"\n  structure: features/train/shard-00000\.h5: "):
            package(project)
        with h5py.File(release / "features" / "train" / "shard-00000.h5", "r+") as shard:
            put(shard)
        with pytest.raises(BankError):  # whoever does not look at the structure first
            private_facts(release, project, "default")
        list_anew(release)
        found = {(finding.kind, finding.path) for finding in audit(release, owners).findings}
        assert ("structure", "features/train/shard-00000.h5") in found, where
        (release / "notes.txt").touch()
        found = {finding.kind for finding in audit(release, owners).findings}
        assert found == {"unexpected", "unknown release", "structure"}, where


def test_a_source_that_is_no_longer_there_is_still_not_named(project_folder: Path) -> None:
    write_card(project_folder, "without disc-portrait-012")
    (project_folder / "images" / "private" / "disc" / "disc-portrait-012.png").unlink()
    assert len(said(project_folder)) == 1


def test_a_name_is_found_in_a_long_text_as_fast_as_in_a_short_one(project_folder: Path) -> None:
    words = np.random.default_rng(0).integers(0, 36**4, 200_000)
    text = " ".join(np.base_repr(word, 36) for word in words)  # 1 MB
    write_card(project_folder, text)
    start = time.process_time()
    assert said(project_folder) == []
    write_card(project_folder, f"{text} disc-portrait-012 {text}")
    assert len(said(project_folder)) == 1
    assert time.process_time() - start < 30  # of which most is φ


def test_secrets_of_p_and_digests_of_private_files_are_not_said(project_folder: Path) -> None:
    vault = project_folder / "vault"
    function = json.loads((vault / "functions" / "default" / "function.json").read_text())
    plan = json.loads((vault / "features" / "plan.json").read_text())
    origin = json.loads((vault / "functions" / "default" / "candidate.json").read_text())["origin"]
    (entry,) = json.loads((vault / "ledger.json").read_text())
    private = {
        function["secret"]: "secret of the private functions/default/function.json",
        plan["source_sha256"]: "source_sha256 of the private features/plan.json",
        plan["ids_sha256"]: "of the private",  # several say it
        origin["function"]: "of the private",
    }
    for digits, what in private.items():
        for text in (f"seed {digits}", f"seed{digits}9", digits.upper()):
            write_card(project_folder, text)
            (found,) = said(project_folder)
            assert what in found
            assert digits not in found
    public = [
        plan["featurizer_sha256"],
        entry["index_sha256"],
        entry["manifest_sha256"],
        origin["classifier_sha256"],
        "0" * 64,
    ]
    write_card(project_folder, f"{public} {function['secret'][:-1]}")
    assert said(project_folder) == []


STRAYS: dict[str, Callable[[Path, Path], Any]] = {
    "a pipe": lambda path, _: os.mkfifo(path),
    "a link to private weights": lambda path, private: path.symlink_to(private),
    "6 GiB of nothing": lambda path, _: [path.touch(), os.truncate(path, 6 * 2**30)],
}


@pytest.mark.parametrize("what", STRAYS)
@pytest.mark.parametrize("name", ["disc-portrait-012.txt", "model/more.safetensors"])
def test_a_stray_file_is_a_finding_and_is_not_opened(project_folder: Path, what: str, name: str) -> None:
    release, vault = project_folder / "release", project_folder / "vault"
    function = vault / "functions" / "default" / "state.safetensors"
    STRAYS[what](release / name, function)
    project = Project.open(project_folder / "dpf.toml")
    kinds = [(problem.kind, problem.path) for problem in private_facts(release, project, "default")]
    assert kinds == ([("private text", name)] if "disc" in name else [])
    found = {(finding.path) for finding in audit(release, project_of(vault)).findings}
    assert found == {name}
    (release / name).unlink()
    weights = release / "model" / "classifier.safetensors"  # the control: what the manifest lists is read
    weights.write_bytes(function.read_bytes())
    assert {problem.kind for problem in tensors_told(release, project)} == {"private tensor"}


def test_the_list_of_ids_is_read_once(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Vault] = []
    real = Vault.read_ids
    monkeypatch.setattr(Vault, "read_ids", lambda vault: [reads.append(vault), real(vault)][1])
    project = Project.open(project_folder / "dpf.toml")
    assert private_facts(project_folder / "release", project, "default") == []
    assert len(reads) == 1
    assert (
        telling_ids(public_banks(project_folder / "release"), sources_of(project))
        == source_order(public_banks(project_folder / "release"), sources_of(project))
        == []
    )
    assert len(reads) == 3  # the control: alone, each reads them


# --------------------------------------------------------------------------------------------- tensors

WRAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as it is": lambda tensor: tensor,
    "in another shape": lambda tensor: tensor.flatten(),
    "in double precision": torch.Tensor.double,
    "in half precision": torch.Tensor.half,
    "zeros with a sign": lambda tensor: torch.where(tensor.half() == 0, torch.tensor(-0.0), tensor),
}


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """In memory, not in the file, which may be written over."""
    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def largest(path: Path) -> torch.Tensor:
    return max(tensors_of(path).values(), key=torch.Tensor.numel)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_private_tensor_among_the_public_weights_is_found(project_folder: Path, wrap: str) -> None:
    vault, weights = project_folder / "vault", project_folder / "release" / "model" / "featurizer.safetensors"
    project, public = Project.open(project_folder / "dpf.toml"), tensors_of(weights)
    (straw_man,) = (vault / "reconstructors").glob("*.safetensors")
    for source in ("functions/default/state.safetensors", f"reconstructors/{straw_man.name}"):
        tensor = largest(vault / source)
        assert tensor.numel() >= 1024
        save_file(public | {"bn1.extra": WRAPS[wrap](tensor).contiguous()}, weights)
        (problem,) = tensors_told(project_folder / "release", project)
        assert (problem.kind, problem.path) == ("private tensor", "model/featurizer.safetensors")
        assert source in problem.detail
        changed = tensor.clone()
        changed.view(-1)[0] += 1
        constant = torch.ones(5000)
        save_file(public | {"changed": changed, "constant": constant, "few": tensor.flatten()[:1000].clone()}, weights)
        more = {"constant": constant, "few": tensor.flatten()[:1000].clone()}
        save_file(more, vault / "network" / "more.safetensors")
        assert tensors_told(project_folder / "release", project) == []


def test_a_public_row_that_is_a_private_tensor_is_found(project_folder: Path) -> None:
    release, project = project_folder / "release", Project.open(project_folder / "dpf.toml")
    bank = FeatureBank(release / "features", "val")
    row = torch.from_numpy(bank.read([1])).float()
    assert row.numel() >= 1024
    save_file({"one": row + 1}, project_folder / "vault" / "functions" / "default" / "mask.safetensors")
    assert tensors_told(release, project) == []
    save_file({"one": row}, project_folder / "vault" / "functions" / "default" / "mask.safetensors")
    assert [problem.path for problem in tensors_told(release, project)] == ["features/val/shard-00000.h5"]


# --------------------------------------------------------------------------------------------- rows


def _change(candidate: Path, change: Callable[[h5py.File], Any]) -> None:
    """Changes the first shard of `train`, and has index and record say that it belongs there."""
    shard = candidate / "features" / "train" / "shard-00000.h5"
    with h5py.File(shard, "r+") as file:
        change(file)
    path = candidate / "features" / "index.json"
    index = json.loads(path.read_text())
    index["splits"]["train"][0] |= {"sha256": sha256_of(shard), "bytes": shard.stat().st_size}
    path.write_text(json.dumps(index))
    record = candidate.parent.parent / "functions" / "default" / "candidate.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"index_sha256": sha256_of(path)}))


def _overwrite(candidate: Path, row: np.ndarray) -> None:
    _change(candidate, lambda shard: shard["features"].__setitem__(2, row))


def test_a_release_with_one_row_of_the_private_bank_is_refused(project_folder: Path) -> None:
    vault = project_folder / "vault"
    row = FeatureBank(vault / "features", "test").read([0])[0]
    _overwrite(vault / "candidates" / "default", row + np.float16(0.5) * row[::-1])
    package(Project.open(project_folder / "dpf.toml"))
    _overwrite(vault / "candidates" / "default", row)
    with pytest.raises(RefusedError, match=r"private row: features/train/shard-00000\.h5: 1 rows .* φ1\(S\): 2\n"):
        package(Project.open(project_folder / "dpf.toml"))


def _bank(folder: Path, rows: np.ndarray, seed: int) -> FeatureBank:
    header = BankIndex(poisoned=True, featurizer_sha256="0" * 64, feature_shape=rows.shape[1:], targets=0)
    ids = np.random.default_rng(seed).integers(0, 256, (len(rows), 16), dtype=np.uint8)
    writer = BankWriter(folder, header, shard_bytes=100 * rows[0].size)
    writer.finish(fill(writer, np.zeros(len(rows), np.int64), ids, lambda start, stop: rows[start:stop]))
    return FeatureBank(folder, "train")


def _rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 8, 4, 4)).astype(np.float32)


def _found(public: FeatureBank, *private: FeatureBank, **options: Any) -> list[int]:
    (rows,) = find_near_rows([public], private, **options)
    return rows.tolist()


def test_what_is_compared_in_many_blocks_is_what_is_compared_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = _rows(120, 0), _rows(60, 1)
    public[[5, 44]] = private[[110, 2]]
    parts = {"public": public, "train": private[:50], "val": private[50:]}
    banks = [_bank(tmp_path / name, rows, seed) for seed, (name, rows) in enumerate(parts.items())]
    assert _found(*banks) == [5, 44]
    monkeypatch.setattr(near_rows, "BLOCK", 7)
    monkeypatch.setattr(near_rows, "BATCH_VALUES", 3 * 128)
    assert _found(*banks) == [5, 44]


def test_every_candidate_is_confirmed_not_only_the_likest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With so few dimensions the likest projection is as good as never the row that is meant.
    monkeypatch.setattr(near_rows, "PROJECTED_DIMENSIONS", 8)
    monkeypatch.setattr(near_rows, "PROJECTED_COSINE", 0.9)
    one, noise = _rows(1, 2)[0], _rows(200, 3)
    noise -= one * (noise * one).sum(axis=(1, 2, 3), keepdims=True) / np.square(one).sum()
    noise *= np.linalg.norm(one) / np.linalg.norm(noise.reshape(200, -1), axis=1)[:, None, None, None]

    def alike(cosine: float) -> np.ndarray:
        return one + noise * np.tan(np.arccos(cosine))

    private = np.concatenate([alike(0.9985), -alike(0.9985)])  # whose mean is nothing
    public = _bank(tmp_path / "public", one[None], 4)
    assert _found(public, _bank(tmp_path / "alike", private, 5)) == []
    private[130] = alike(0.9995)[130]
    assert _found(public, _bank(tmp_path / "same", private, 7)) == [0]


# Each hands out every private row as a·x + b: whoever knows φ1 of one image, or the mean, has all of them.
AFFINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "2 x": lambda rows: 2 * rows,
    "x + 20": lambda rows: rows + 20,
    "-x": lambda rows: -rows,
    "x less row 0": lambda rows: rows - rows[0],
    "3 - x / 2": lambda rows: 3 - rows / 2,
}


@pytest.mark.parametrize("what", AFFINE)
@pytest.mark.parametrize("ids", ["the same", "others"])
def test_a_bank_of_private_rows_scaled_and_shifted_is_found(tmp_path: Path, what: str, ids: str) -> None:
    private, noise = _rows(90, 0) + 3 * _rows(1, 5), _rows(90, 1)  # of a mean that is not nothing
    banks = [_bank(tmp_path / "train", private[:60], 1), _bank(tmp_path / "val", private[60:], 2)]
    seed = {"the same": 2, "others": 3}[ids]
    rows = private[60:] if ids == "the same" else np.roll(private, 7, axis=0)
    assert _found(_bank(tmp_path / "public", AFFINE[what](rows), seed), *banks) == list(range(len(rows)))
    assert _found(_bank(tmp_path / "control", rows + noise[: len(rows)], seed), *banks) == []


def test_a_function_that_scales_is_refused_and_one_that_mixes_noise_in_is_not(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpf_release.core.parameters import Parameter
    from dpf_release.poisoning.interface import FUNCTIONS, PoisoningFunction

    class Times(PoisoningFunction):
        parameters = (Parameter("by", 2.0, 0, 9, "factor"), Parameter("noise", 0.0, 0, 9, "deviations"))
        by: float
        noise: float

        def apply(self, rows: Any, source: Any, plan: Any) -> np.ndarray:
            values = source.read(rows).astype(np.float32)
            noise = np.random.default_rng(0).standard_normal(values.shape, np.float32)
            return self.by * values + self.noise * values.std() * noise

    monkeypatch.setitem(FUNCTIONS, "times", Times)
    for name, parameters in (("double", "by=2"), ("noisy", "by=2,noise=1")):
        project = Project.open(project_folder / "dpf.toml", {"poison.function": f"times:{parameters}"})
        fit_poison(project, name=name)
        write_candidate(project, name)
    with pytest.raises(RefusedError, match=r"private row: features/train/shard-00000\.h5: \d+ rows are, but for"):
        package(project, "double", second_function="for a test")
    package(project, "noisy", second_function="for a test")


def test_a_contributor_is_compared_whatever_the_projection_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_rows, "PROJECTED_COSINE", 2.0)  # nothing is
    private, public = _rows(30, 0), _rows(30, 1)
    public[7], public[9] = private[20], private[9]
    banks = _bank(tmp_path / "public", public, 3), _bank(tmp_path / "private", private, 3)  # the same ids

    def contributors(split: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert split == "train"
        return np.repeat(np.arange(len(rows)), 2), np.stack([rows, (rows + 13) % 30], axis=1).ravel()

    assert _found(*banks) == [9]  # the control: its own row only
    assert _found(*banks, contributors=contributors) == [7, 9]


def test_a_recombined_release_is_compared_with_all_that_is_in_its_rows(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.open(project_folder / "dpf.toml", {"poison.function": "recombine:k=3"})
    fit_poison(project, name="mixed")
    write_candidate(project, "mixed")
    package(project, "mixed", second_function="for a test")
    monkeypatch.setattr(near_rows, "PROJECTED_COSINE", 2.0)
    release = project_folder / "release"
    assert private_rows(public_banks(release), project, load_function(project, "mixed")) == []
    # A row with all of a contributor's pieces in it is that contributor.
    pieces = load_file(project.vault.function("mixed") / "plan.safetensors")["val/0/pieces"].numpy()
    own = np.arange(len(pieces))
    row = int(np.flatnonzero((pieces != own[:, None]).any(axis=1))[0])
    other = int(next(piece for piece in pieces[row] if piece != row))
    shard = release / "features" / "val" / "shard-00000.h5"
    with h5py.File(shard, "r+") as file:
        assert row < len(file["features"])
        file["features"][row] = project.private_bank("val").read([other])[0]
    assert private_rows(public_banks(release), project) == []  # the control: without the function nobody knows
    assert [
        problem.path for problem in private_rows(public_banks(release), project, load_function(project, "mixed"))
    ] == ["features/val/shard-00000.h5"]


# --------------------------------------------------------------------------------------------- order and ids


def _new_bank(folder: Path) -> Project:
    project = Project.open(folder / "dpf.toml", FILTER)
    featurize(project, restart=True)
    fit_poison(project, restart=True)
    write_candidate(project)
    return project


def test_a_bank_in_the_order_of_its_source_is_refused(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpf_release.owner import featurize as banks

    project, sorted_rows = Project.open(project_folder / "dpf.toml"), SimpleNamespace(permutation=np.sort)
    assert project.private_images  # whose splits are drawn
    assert project.cut
    with monkeypatch.context() as patch:
        patch.setattr(banks.np.random, "default_rng", lambda seed: sorted_rows)
        banks._draw_plan(project, _facts(project_folder), restart=True)
    project = Project.open(project_folder / "dpf.toml", FILTER)
    featurize(project)
    fit_poison(project, restart=True)
    write_candidate(project)
    with pytest.raises(RefusedError, match="source order: features/train: all its rows go with the order"):
        package(project, second_function="for a test")
    package(_new_bank(project_folder), second_function="for a test")


def _facts(folder: Path) -> dict[str, Any]:
    """What the plan of the bank knows; a bank drawn anew under it is one that `featurize` goes on with."""
    plan = json.loads((folder / "vault" / "features" / "plan.json").read_text())
    return {key: value for key, value in plan.items() if key != "ids_sha256"}


def test_a_bank_whose_ids_are_digests_of_names_is_refused(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_ids(vault: Vault, rows: list[dict[str, Any]], attributes: Any) -> None:
        named = [row | {"id": hashlib.md5(row["source"].encode()).hexdigest()} for row in rows]
        written(vault, named, attributes)

    written = Vault.write_ids
    with monkeypatch.context() as patch:
        patch.setattr(Vault, "write_ids", write_ids)
        project = _new_bank(project_folder)
    with pytest.raises(RefusedError, match=r"telling id: features/train: \d+ ids are derived from their images"):
        package(project, second_function="for a test")


def _set_ids(folder: Path, ids: dict[str, np.ndarray]) -> None:
    """Writes ids into the shards of a release and into the vault's map."""
    lines = (folder / "vault" / "ids.csv").read_text().splitlines()
    replaced: dict[str, str] = {}
    for split, rows in ids.items():
        bank = FeatureBank(folder / "release" / "features", split)  # type: ignore[arg-type]
        before = bank.ids
        start = 0
        for record in bank.index.splits[split]:  # type: ignore[index]
            with h5py.File(folder / "release" / "features" / record.file, "r+") as shard:
                shard["id"][:] = rows[start : start + record.rows]
            start += record.rows
        replaced |= {old.tobytes().hex(): new.tobytes().hex() for old, new in zip(before, rows, strict=True)}
    changed = [",".join([replaced.get(line.split(",")[0], line.split(",")[0]), *line.split(",")[1:]]) for line in lines]
    (folder / "vault" / "ids.csv").write_text("\n".join(changed) + "\n")


def _derived(folder: Path, derive: Callable[[Path], bytes]) -> dict[str, np.ndarray]:
    private, ids = folder / "images" / "private", {}
    lines = [line.split(",") for line in (folder / "vault" / "ids.csv").read_text().splitlines()[1:]]
    for split in ("train", "val"):
        texts = [derive(private / source) for _, name, _, source in lines if name == split]
        ids[split] = np.array([np.frombuffer(text[:16], np.uint8) for text in texts])
    return ids


DERIVATIONS: dict[str, Callable[[Path], bytes]] = {
    "the SHA-1 of the name": lambda path: hashlib.sha1(path.name.encode()).digest(),
    "the SHA-256 of the whole path": lambda path: hashlib.sha256(str(path).encode()).digest(),
    "the SHA-512 of the stem": lambda path: hashlib.sha512(path.stem.encode()).digest(),
    "a UUID of the name": lambda path: uuid.uuid5(uuid.NAMESPACE_URL, path.name).bytes,
    "the MD5 of the file": lambda path: hashlib.md5(path.read_bytes()).digest(),
    "the BLAKE2 of the file": lambda path: hashlib.blake2b(path.read_bytes(), digest_size=16).digest(),
}


@pytest.mark.parametrize("what", DERIVATIONS)
def test_ids_that_can_be_had_from_an_image_are_found(project_folder: Path, what: str) -> None:
    ids = _derived(project_folder, DERIVATIONS[what])
    _set_ids(project_folder, ids)
    release, project = project_folder / "release", Project.open(project_folder / "dpf.toml")
    assert {problem.path for problem in telling_ids(public_banks(release), sources_of(project))} == {
        "features/train",
        "features/val",
    }
    counts = {split: len(rows) for split, rows in ids.items()}
    secret = np.random.default_rng()
    _set_ids(project_folder, {split: secret.integers(0, 256, (n, 16), np.uint8) for split, n in counts.items()})
    assert telling_ids(public_banks(release), sources_of(Project.open(project_folder / "dpf.toml"))) == []


def test_uuids_are_reckoned_as_the_library_does() -> None:
    found = _from_texts("a/b.png", "/s/a/b.png", "3")
    for space in (uuid.NAMESPACE_DNS, uuid.NAMESPACE_URL, uuid.NAMESPACE_OID, uuid.NAMESPACE_X500):
        assert {uuid.uuid3(space, "b.png").bytes, uuid.uuid5(space, "a/b.png").bytes} <= found
    assert uuid.uuid5(uuid.NAMESPACE_DNS, "c.png").bytes not in found
    assert b"b.png".ljust(16, b"\0") in found


def test_ids_of_another_plan_in_another_order_or_twice_are_found(project_folder: Path) -> None:
    release, project = project_folder / "release", Project.open(project_folder / "dpf.toml")
    shard = release / "features" / "train" / "shard-00000.h5"
    with h5py.File(shard) as file:
        ids = file["id"][:]
    for changed, text in (
        (ids[::-1], "another order"),
        (np.concatenate([ids[:1], ids[:-1]]), "the same id"),
        (np.concatenate([ids[:1] ^ 255, ids[1:]]), "1 ids are not of the plan"),
        (ids, ""),
    ):
        with h5py.File(shard, "r+") as file:
            file["id"][:] = changed
        found = [problem.detail for problem in telling_ids(public_banks(release), sources_of(project))]
        assert any(text in detail for detail in found) if text else found == []


def _bytes_of(numbers: Any) -> np.ndarray:
    return np.array([list(int(number).to_bytes(16)) for number in numbers], np.uint8)


def test_ids_that_are_not_random_are_told_from_random_ones() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 2, 12, 96, 1000):
        for _ in range(40):
            assert _chance_of_bits(generator.integers(0, 256, (count, 16), np.uint8)) > 1e-4
    assert _chance_of_bits(_bytes_of(range(12))) < 1e-6  # counted
    numbers = (uuid.UUID(bytes=generator.bytes(16), version=4).int for _ in range(200))
    assert _chance_of_bits(_bytes_of(numbers)) < 1e-6
    text = np.frombuffer(b"".join(f"disc-{i:011d}".encode() for i in range(96)), np.uint8).reshape(-1, 16)
    assert _chance_of_bits(text) < 1e-6


def test_an_order_that_tells_is_told_from_a_random_one() -> None:
    generator, targets = np.random.default_rng(0), np.repeat(np.arange(20), 30)  # the source, class by class

    def chances(order: np.ndarray, classes: np.ndarray) -> list[float]:
        scores = list(_scores(order, classes))
        return [math.erfc(abs(score) / math.sqrt(2)) * len(scores) for _, score in scores]

    for _ in range(200):
        order = generator.permutation(600)
        assert min(chances(order, targets[order])) > 1e-5
    in_order = np.arange(600)
    assert min(chances(in_order, targets)) < CHANCE
    assert min(chances(in_order[::-1], targets[::-1])) < CHANCE
    # Classes in random order, and of each class the rows in order: only within the classes is it seen.
    labels, inside = generator.permutation(targets), np.empty(600, np.int64)
    for name in range(20):
        inside[labels == name] = np.flatnonzero(targets == name)
    assert abs(_deviations(inside)) < 4
    assert min(chances(inside, labels)) < CHANCE


def _dealt(count: int, hands: int) -> np.ndarray:
    """As rank 0 of `hands`, then rank 1, ... have them where each takes every so many-th."""
    return np.concatenate([np.arange(hand, count, hands) for hand in range(hands)])


STEADY: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "108 rows dealt to 4": lambda _: _dealt(108, 4),
    "5000 rows dealt to 16": lambda _: _dealt(5000, 16),
    "108 rows in every 67th place": lambda _: np.arange(108) * 67 % 108,
    "5000 rows in every 3091st place, from the end": lambda _: (np.arange(5000) * 3091 % 5000)[::-1],
    "blocks of 4 at random": lambda generator: np.concatenate(
        [np.arange(start, start + 4) for start in 4 * generator.permutation(150)]
    ),
    "12 rows in order": lambda _: np.arange(12),
}


@pytest.mark.parametrize("what", STEADY)
def test_an_order_by_steady_steps_is_told_from_a_random_one(what: str) -> None:
    generator = np.random.default_rng(0)
    order = STEADY[what](generator)
    assert sorted(order) == list(range(len(order)))
    assert _commonest_step(order)[1] >= _unlikely_times(len(order))
    for _ in range(50):
        assert _commonest_step(generator.permutation(len(order)))[1] < _unlikely_times(len(order))


def test_a_random_order_has_its_commonest_step_as_seldom_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.array([_commonest_step(np.array(order))[1] for order in itertools.permutations(range(7))])
    for chance in (0.5, 0.1, 0.02):
        monkeypatch.setattr(drawn, "CHANCE", chance)
        limit = _unlikely_times.__wrapped__(7)
        assert (times >= limit).mean() < chance, (chance, limit)
    assert limit < 7  # the control: it is not always infinite
    monkeypatch.undo()
    limits = {count: _unlikely_times(count) for count in (1, 2, 11, 12, 13, 1000, 50_000, 10_000_000)}
    assert limits[11] > 11
    assert limits[50_000] == 15


def test_a_bank_that_is_dealt_out_in_turn_is_found(project_folder: Path) -> None:
    release, project = project_folder / "release", Project.open(project_folder / "dpf.toml")
    ids = FeatureBank(release / "features", "train").ids
    lines = [line.split(",") for line in (project_folder / "vault" / "ids.csv").read_text().splitlines()[1:]]
    source = {bytes.fromhex(row_id): name for row_id, _, _, name in lines}
    in_order = np.array(sorted(ids, key=lambda row_id: source[row_id.tobytes()]))
    for order, found in (
        (_dealt(len(ids), 4), {"features/train"}),
        (np.random.default_rng(1).permutation(len(ids)), set()),
    ):
        start = 0
        for record in FeatureBank(release / "features", "train").index.splits["train"]:
            with h5py.File(release / "features" / record.file, "r+") as shard:
                shard["id"][:] = in_order[order][start : start + record.rows]
            start += record.rows
        assert {problem.path for problem in source_order(public_banks(release), sources_of(project))} == found


def test_an_order_is_looked_at_in_each_split_of_a_release(finished: Path) -> None:
    assert source_order(public_banks(finished / "release"), sources_of(Project.open(finished / "dpf.toml"))) == []


def test_pictures_added_since_are_no_business_of_a_release(project_folder: Path) -> None:
    write_shapes(project_folder / "images" / "private" / "more", ("disc",), 2, seed=5)
    more = project_folder / "images" / "private" / "more" / "disc"
    for path in more.iterdir():
        path.rename(project_folder / "images" / "private" / "disc" / f"new-{path.name}")
    shutil.rmtree(more.parent)
    assert (
        telling_ids(public_banks(project_folder / "release"), sources_of(Project.open(project_folder / "dpf.toml")))
        == []
    )
