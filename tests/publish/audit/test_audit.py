"""An audit lists every file, runs every check, opens nothing that failed one, and keeps the vault's names to itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rich.console import Console

from commands import run_cli
from dpf_release.bank.format import read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import BankWriter, SplitRows
from dpf_release.core.files import sha256_of, write_json
from dpf_release.core.locks import LOCK
from dpf_release.errors import ConfigError, SigningError, VaultError
from dpf_release.owner.project import Project
from dpf_release.owner.vault.age import load_pyrage
from dpf_release.owner.vault.contents import OPENED, SEALS
from dpf_release.owner.vault.sealing import seal
from dpf_release.owner.vault.vault import Vault
from dpf_release.publish.audit import checks
from dpf_release.publish.audit.audit import Audit, audit, project_of
from dpf_release.publish.audit.checks import CHECKS
from dpf_release.publish.audit.page import page, write_page
from dpf_release.publish.audit.terminal import print_audit
from dpf_release.publish.inspect import inspect
from dpf_release.release.manifest import MANIFEST, SUMS
from dpf_release.release.signing import new_key
from dpf_release.release.verify import Problem
from in_process import _structure_in_process  # noqa: F401  # for all tests here
from places import ROOT
from small_releases import HOSTILE, list_anew

SHARD = "features/train/shard-00000.h5"
OF_RELEASE = {"files", "bound", "signature", "structure", "agreement", "poisoned"}


@pytest.fixture(scope="module")
def public(finished: Path) -> Audit:
    """Of the good release, without its vault."""
    return audit(finished / "release")


@pytest.fixture(scope="module")
def with_vault(finished: Path) -> Audit:
    return audit(finished / "release", project_of(finished / "vault"))


def statuses(found: Audit) -> dict[str, str]:
    return {result.check.name: result.status for result in found.results}


def findings(found: Audit) -> set[tuple[str, str, str]]:
    return {(r.check.name, finding.kind, finding.path) for r in found.results for finding in r.findings}


def failed(found: Audit) -> set[str]:
    return {name for name, status in statuses(found).items() if status == "failed"}


def audited(folder: Path) -> Audit:
    return audit(folder / "release", project_of(folder / "vault"))


# ------------------------------------------------------------------------------------------ a good release


def test_every_file_of_a_release_is_listed_with_what_it_holds(finished: Path, public: Audit) -> None:
    release = finished / "release"
    artefacts = {artefact.path: artefact for artefact in public.artefacts}
    files = {path.relative_to(release).as_posix(): path for path in release.rglob("*") if path.is_file()}
    assert set(artefacts) == set(files)
    for name, path in files.items():
        found = artefacts[name]
        assert (found.side, found.bytes, found.sha256) == ("public", path.stat().st_size, sha256_of(path))
        assert found.mode == "0644"
        assert found.holds
        assert found.failed == ()
        assert "files" in found.passed
    index = read_index(release / "features")
    shard = index.splits["train"][0]
    shape = " x ".join(map(str, index.feature_shape))
    assert artefacts[SHARD].holds == f"{shard.rows} rows of {shape} float16, split train, poisoned: yes"
    assert artefacts[SHARD].passed == ("files", "structure", "agreement", "poisoned")
    assert artefacts[SHARD].role == "shard"
    assert "disc, square" in artefacts["model/model.json"].holds
    assert re.fullmatch(r"weights of φ1: \d+ tensors, [\d,]+ values", artefacts["model/featurizer.safetensors"].holds)
    assert artefacts[MANIFEST].role == "manifest"
    assert artefacts[SUMS].holds.startswith(f"{len(files) - 1} SHA-256")


def test_a_good_release_passes_and_what_was_not_looked_at_is_said(public: Audit, with_vault: Audit) -> None:
    assert public.findings == with_vault.findings == ()
    assert {name for name, status in statuses(public).items() if status == "passed"} == OF_RELEASE - {"signature"}
    reasons = {result.reason for result in public.results if result.reason and result.check.name != "signature"}
    assert reasons == {"no vault was given (--vault)"}
    assert "takes its owner's vault" in public.verdict
    assert (public.headline, with_vault.headline) == ("No finding in what was looked at", "No finding")
    assert {name for name, status in statuses(with_vault).items() if status != "passed"} == {"signature"}
    assert "nothing private was found" in with_vault.verdict


def test_the_private_side_is_listed_with_the_release_that_it_belongs_to(finished: Path, with_vault: Audit) -> None:
    vault = finished / "vault"
    artefacts = {artefact.path: artefact for artefact in with_vault.of("private")}
    assert set(artefacts) == {path.relative_to(vault).as_posix() for path in vault.rglob("*") if path.is_file()}
    assert all(artefact.mode == "0600" and artefact.passed == ("vault",) for artefact in artefacts.values())
    assert not [artefact.path for artefact in artefacts.values() if artefact.role == "unknown" or not artefact.holds]
    for name in ("functions/default/state.safetensors", "features/plan.json", "ids.csv"):
        assert artefacts[name].releases == ("shapes 1.0.0",)
    assert artefacts[".gitignore"].releases == ()
    assert "not poisoned" in artefacts["features/train/shard-00000.h5"].holds


def test_a_function_fitted_anew_no_longer_belongs_to_the_release(project_folder: Path) -> None:
    vault = project_folder / "vault"
    record = vault / "functions" / "default" / "function.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"secret": "00" * 32}))
    shutil.copy(vault / "ids.csv", vault / "ids.csv.age")
    (vault / "notes.txt").touch(0o600)
    artefacts = {artefact.path: artefact for artefact in audited(project_folder).of("private")}
    assert artefacts["functions/default/state.safetensors"].releases == ()
    assert (artefacts["ids.csv.age"].at_rest, artefacts["ids.csv"].at_rest) == ("sealed", "in the clear")
    assert artefacts["ids.csv.age"].holds == artefacts["ids.csv"].holds
    assert artefacts["notes.txt"].role == "unknown"


@pytest.fixture
def sealed(project_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A finished project whose vault is sealed, and the identity file that opens it."""
    identity, key = load_pyrage().x25519.Identity.generate(), tmp_path / "key.txt"
    key.write_text(f"{identity}\n")
    seal(Vault(project_folder / "vault"), [str(identity.to_public())])
    return project_folder, key


def test_a_sealed_vault_is_audited_with_its_key_as_an_open_one(sealed: tuple[Path, Path], with_vault: Audit) -> None:
    folder, key = sealed
    vault, release = folder / "vault", folder / "release"
    without, opened = audit(release, project_of(vault)), audit(release, project_of(vault, key))
    reasons = {result.check.name: result.reason for result in without.results if result.status == "not run"}
    assert reasons.pop("signature")
    assert set(reasons) == {"ledger", "network", "rows", "words", "tensors", "ids", "order", "spending"}
    assert set(reasons.values()) == {"the vault is sealed: give --identity"}
    assert "Not all of shapes 1.0.0 could be compared with the vault" in without.verdict
    assert without.findings == opened.findings == ()
    assert statuses(opened) == statuses(with_vault)
    assert not (vault / OPENED).exists()
    for found in (without, opened):
        artefacts = {artefact.path: artefact for artefact in found.of("private")}
        assert not [path for path in artefacts if path.startswith(OPENED)]
        clear = {path for path, artefact in artefacts.items() if artefact.at_rest == "in the clear"}
        assert clear - {LOCK} == {".gitignore", SEALS}
        assert not [artefact.path for artefact in artefacts.values() if artefact.role == "unknown"]
    assert artefacts["ids.csv.age"].releases == ("shapes 1.0.0",)
    told = run_cli("audit", "release", "--vault", "vault", "--identity", str(key), folder=folder)
    assert told.returncode == 0, told.stderr


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Mode, time of change and bytes of everything below a folder; of folders the names stand for the bytes."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b"/".join(sorted(map(os.fsencode, path.iterdir())))
        found[path.relative_to(folder).as_posix()] = (status.st_mode, status.st_mtime_ns, content)
    return found


def _add_image(folder: Path) -> None:
    images = folder / "images" / "private" / "disc"
    shutil.copy(images / "disc-portrait-001.png", images / "disc-portrait-777.png")


def _change_image(folder: Path) -> None:
    (folder / "images" / "private" / "disc" / "disc-portrait-001.png").write_bytes(b"no picture any more")


@pytest.mark.parametrize("change", [lambda folder: None, _add_image, _change_image], ids=["", "added", "changed"])
def test_an_audit_changes_nothing_whatever_became_of_the_images(
    project_folder: Path, change: Callable[[Path], None]
) -> None:
    change(project_folder)
    before = state(project_folder)
    assert audited(project_folder).findings == ()
    assert state(project_folder) == before
    with Project.open(project_folder / "dpf.toml").working():  # the control: what any other command of the owner's does
        pass
    changed = {path for path, what in state(project_folder).items() if what != before[path]}
    assert changed == {"vault"} | ({"vault/survey-private.json"} if change in {_add_image, _change_image} else set())


def test_an_audit_of_a_sealed_vault_leaves_every_file_as_it_was(sealed: tuple[Path, Path]) -> None:
    folder, key = sealed
    _add_image(folder)
    before = state(folder)
    assert audit(folder / "release", project_of(folder / "vault", key)).findings == ()
    after = state(folder)
    assert after.pop("vault")[::2] == before.pop("vault")[::2]  # a lock, and banks in the clear, came and went
    assert after == before
    with Project.open(folder / "dpf.toml", identity=key).working():  # the control
        pass
    assert state(folder)["vault/survey-private.json.age"] != before["vault/survey-private.json.age"]


def test_an_identity_of_another_key_is_told_before_anything_is_done(sealed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, key = sealed
    wrong, theirs = tmp_path / "wrong.txt", load_pyrage().x25519.Identity.generate()
    wrong.write_text(f"{theirs}\n")
    before = state(folder)
    refused = run_cli("audit", "release", "--vault", "vault", "--identity", str(wrong), folder=folder)
    assert f"found that of {theirs.to_public()}. Name the file of a key that the vault is sealed for" in refused.stderr
    with pytest.raises(VaultError, match="expected lines AGE-SECRET-KEY-1"):
        audit(folder / "release", project_of(folder / "vault", tmp_path / "none.txt"))
    assert state(folder) == before
    other = run_cli("package", "--identity", str(wrong), folder=folder)
    assert (refused.stdout, refused.returncode) == (other.stdout, other.returncode) == ("", 1)
    assert audit(folder / "release", project_of(folder / "vault", key)).findings == ()


# ------------------------------------------------------------------------------------------ bad ones


def _leak(folder: Path) -> None:
    """A row of φ1(S) in the place of a public one, and everything listed anew."""
    row, _ = FeatureBank(folder / "vault" / "features", "val")[3]
    with h5py.File(folder / "release" / SHARD, "r+") as shard:
        shard["features"][1] = row
    list_anew(folder / "release")


def _other_row(folder: Path) -> None:
    """The control of `_leak`: another row in that place."""
    with h5py.File(folder / "release" / SHARD, "r+") as shard:
        shard["features"][1] = np.random.default_rng(0).standard_normal(shard["features"].shape[1:])
    list_anew(folder / "release")


def _foreign_weights(folder: Path) -> None:
    path = folder / "release" / "model" / "classifier.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    list_anew(folder / "release")


def _external_link(folder: Path) -> None:
    with h5py.File(folder / "release" / SHARD, "r+") as shard:
        del shard["label"]
        shard["label"] = h5py.ExternalLink("/etc/passwd", "/label")
    list_anew(folder / "release")


def _unpoisoned_flag(folder: Path) -> None:
    features = folder / "release" / "features"
    index = read_index(features)
    banks = {split: FeatureBank(features, split) for split in index.splits}
    rows = {split: SplitRows(bank.targets, bank.ids) for split, bank in banks.items()}
    read = {split: bank.read(np.arange(len(bank))) for split, bank in banks.items()}
    shard_bytes = index.splits["train"][0].rows * index.row_bytes
    writer = BankWriter(features, index.model_copy(update={"poisoned": False, "splits": {}}), shard_bytes)
    shutil.rmtree(features)
    shards = writer.shards(rows)
    writer.write(shards, rows, (read[span.split][span.start : span.stop] for span in writer.batches(shards)))
    writer.finish([writer.record(shard) for shard in shards])
    list_anew(folder / "release")


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _track(folder: Path, name: str) -> None:
    for arguments in (["init", "-q"], ["add", "-f", name]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)


UNKNOWN = ("ledger", "unknown release", MANIFEST)
BAD: dict[str, tuple[Callable[[Path], Any], set[tuple[str, str, str]]]] = {
    "a stranger": (lambda f: (f / "release" / "ids.csv").touch(), {("files", "unexpected", "ids.csv")}),
    "a changed shard": (lambda f: _append(f / "release" / SHARD), {("files", "changed", SHARD)}),
    "a link": (lambda f: (f / "release" / "more").symlink_to("/etc"), {("files", "link", "more")}),
    "an unpoisoned row": (_leak, {UNKNOWN, ("rows", "private row", SHARD)}),
    "another row": (_other_row, {UNKNOWN}),
    "other weights": (_foreign_weights, {UNKNOWN, ("network", "foreign weights", "model/classifier.safetensors")}),
    "a link in a shard": (_external_link, {UNKNOWN, ("structure", "structure", SHARD)}),
    "an unpoisoned flag": (_unpoisoned_flag, {UNKNOWN, ("poisoned", "not poisoned", "features")}),
    "a readable file": (lambda f: (f / "vault" / "ids.csv").chmod(0o640), {("vault", "readable", "ids.csv")}),
    "a readable vault": (lambda f: (f / "vault").chmod(0o755), {("vault", "readable", ".")}),
    "a link in the vault": (lambda f: (f / "vault" / "x").symlink_to("/etc"), {("vault", "link", "x")}),
    "a .gitignore with exceptions": (
        lambda f: (f / "vault" / ".gitignore").write_text("*\n!ids.csv\n"),
        {("vault", "git", ".gitignore")},
    ),
    "a tracked file": (lambda f: _track(f, "vault/ids.csv"), {("vault", "git", ".")}),
    "a pipe in the vault": (lambda f: os.mkfifo(f / "vault" / "x", 0o600), {("vault", "special file", "x")}),
    "no .gitignore": (lambda f: (f / "vault" / ".gitignore").unlink(), {("vault", "git", ".gitignore")}),
    "another ledger": (lambda f: (f / "vault" / "ledger.json").unlink(), {UNKNOWN}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_found_and_nothing_else(project_folder: Path, name: str) -> None:
    spoil, expected = BAD[name]
    spoil(project_folder)
    found = audited(project_folder)
    assert findings(found) == expected
    assert found.headline.startswith(str(len(expected)))
    assert ("must not be used" in found.verdict) == (failed(found) != {"vault"})


def test_without_the_vault_a_leak_is_not_seen_and_not_denied(project_folder: Path) -> None:
    _leak(project_folder)
    found = audit(project_folder / "release")
    assert found.findings == ()
    assert statuses(found)["rows"] == "not run"


def test_what_failed_a_check_is_not_opened(project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = h5py.File

    def noted(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real(path, *arguments, **options)

    release = project_folder / "release"
    os.mkfifo(release / "pipe")
    monkeypatch.setattr(h5py, "File", noted)
    found = audited(project_folder)
    assert {statuses(found)[name] for name in ("structure", "agreement", "poisoned", "rows")} == {"passed"}
    assert str(release / SHARD) in opened  # the control: whole ones are, beside a stranger too
    opened.clear()
    _append(release / SHARD)
    found = audited(project_folder)
    assert {statuses(found)[name] for name in ("structure", "agreement", "poisoned", "rows")} == {"not run"}
    assert statuses(found)["network"] == "passed"
    assert not [path for path in opened if path.startswith(str(release))]
    artefacts = {artefact.path: artefact for artefact in found.of("public")}
    assert (artefacts[SHARD].holds, artefacts[SHARD].passed, artefacts[SHARD].failed) == ("", (), ("files",))
    assert artefacts["pipe"].sha256 is None


@pytest.mark.parametrize("stray", [True, False])
def test_a_shard_that_leads_elsewhere_is_not_followed_beside_a_stray_file(project_folder: Path, stray: bool) -> None:
    release, outside = project_folder / "release", project_folder / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["x"] = np.zeros((77, 3), "i4")
    with h5py.File(release / SHARD, "r+") as shard:
        del shard["features"]
        shard["features"] = h5py.ExternalLink(str(outside), "/x")
    list_anew(release)
    if stray:
        (release / "stray.txt").touch()
    found = audit(release)
    (artefact,) = [artefact for artefact in found.artefacts if artefact.path == SHARD]
    assert (artefact.holds, artefact.failed) == ("", ("structure",))
    assert statuses(found)["poisoned"] == "not run"
    assert failed(found) == {"structure"} | ({"files"} if stray else set())


def test_a_check_that_met_a_limit_passes_no_file(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [Problem("limit", SHARD, "could not be checked within limits")]
    monkeypatch.setattr(checks, "check_structure", lambda folder, deep: limit)
    found = audit(finished / "release")
    assert all("structure" not in artefact.passed for artefact in found.artefacts)
    assert {artefact.holds for artefact in found.artefacts if artefact.role == "shard"} == {""}
    assert statuses(found)["poisoned"] == "not run"


def test_a_folder_of_many_folders_in_each_other_is_audited(finished: Path, tmp_path: Path) -> None:
    release = shutil.copytree(finished / "release", tmp_path / "release")
    way = [os.open(release, os.O_RDONLY)]
    for _ in range(1500):
        os.mkdir("deep", dir_fd=way[-1])  # noqa: PTH102
        way.append(os.open("deep", os.O_RDONLY, dir_fd=way.pop()))
    os.close(way.pop())
    try:
        found = audit(release)
    finally:
        subprocess.run(["rm", "-rf", release / "deep"], check=True)  # deeper than Python's own removes
    assert failed(found) == {"files"}
    assert {artefact.path for artefact in found.artefacts} == {
        path.relative_to(finished / "release").as_posix()
        for path in (finished / "release").rglob("*")
        if path.is_file()
    }


def test_a_folder_without_a_manifest_passes_nothing(project_folder: Path) -> None:
    (project_folder / "release" / MANIFEST).write_text("{")
    found = audited(project_folder)
    assert failed(found) == {"files"}
    assert {name for name, status in statuses(found).items() if status == "passed"} == {"place", "vault"}
    assert all(artefact.passed == () for artefact in found.of("public"))
    assert audit(project_folder / "no-such-folder").findings


def test_a_vault_of_another_network_is_not_compared_with(project_folder: Path) -> None:
    index = project_folder / "vault" / "features" / "index.json"
    index.write_text(index.read_text().replace(read_index(index.parent).featurizer_sha256, "0" * 64))
    assert statuses(audited(project_folder))["rows"] == "not run"
    index.unlink()
    found = audited(project_folder)
    assert statuses(found)["rows"] == "not run"
    assert "Not all of shapes 1.0.0 could be compared" in found.verdict


def test_a_vault_of_another_user_is_found(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = project_of(finished / "vault").vault.root.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    found = {(kind, path) for check, kind, path in findings(audited(finished)) if check == "vault"}
    assert {("owner", "."), ("owner", "ids.csv")} <= found


CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from dpf_release.poisoning.interface import PoisoningFunction
from dpf_release.models.zoo import build_network
def make(outputs):
    return build_network("resnet20_cifar", outputs, {"width": 4})
class Own(PoisoningFunction):
    pass
"""


def test_code_beside_a_vault_is_not_run_unless_it_is_trusted(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project_folder / "handed_over.py").write_text(CODE)
    config, network = project_folder / "dpf.toml", project_folder / "vault" / "network" / "network.json"
    before = config.read_text(), network.read_text()
    config.write_text(
        before[0].replace('"resnet20_cifar"', '"handed_over:make"').replace("arguments = { width = 4 }", "")
    )
    network.write_text(json.dumps(json.loads(before[1]) | {"arch": "handed_over:make", "arguments": {}}))
    assert _untrusted(project_folder) == {"ids", "network", "rows", "words"}
    with pytest.raises(ConfigError, match="--trust-code"):
        inspect(str(config))
    assert not (project_folder / "ran").exists()
    inspect(str(config), trust_code=True)
    assert (project_folder / "ran").exists()  # the control
    config.write_text(before[0])
    network.write_text(before[1])
    record = project_folder / "vault" / "functions" / "default" / "function.json"
    tree = json.loads(record.read_text())
    record.write_text(json.dumps(tree | {"recipe": tree["recipe"] | {"function": "handed_over.Own"}}))
    monkeypatch.delitem(sys.modules, "handed_over")
    (project_folder / "ran").unlink()
    assert _untrusted(project_folder) == {
        "ids",
        "rows",
    }  # whether it draws rows, whose ids are no image's, is not known
    assert not (project_folder / "ran").exists()
    audit(project_folder / "release", project_of(project_folder / "vault", trust_code=True))
    assert (project_folder / "ran").exists()


def _untrusted(folder: Path) -> set[str]:
    """The checks that say that they were not run for want of trust."""
    return {result.check.name for result in audited(folder).results if "--trust-code" in result.reason}


def test_release_and_vault_in_each_other_are_found(project_folder: Path) -> None:
    shutil.copytree(project_folder / "release", project_folder / "vault" / "release")
    found = audit(project_folder / "vault" / "release", project_of(project_folder / "vault"))
    assert ("place", "place", ".") in findings(found)
    images = (project_folder / "dpf.toml").read_text().replace("images/private", "release/images")
    (project_folder / "dpf.toml").write_text(images)
    assert ("place", "place", ".") in findings(audited(project_folder))


def test_a_vault_without_its_configuration_is_a_mistake(project_folder: Path) -> None:
    with pytest.raises(VaultError, match="expected a vault"):
        project_of(project_folder / "no-such-folder")
    (project_folder / "dpf.toml").unlink()
    with pytest.raises(ConfigError, match="expected a configuration"):
        project_of(project_folder / "vault")


# ------------------------------------------------------------------------------------------ what it prints


def test_the_command_exits_with_0_or_3_and_prints_one_json(project_folder: Path) -> None:
    (project_folder / "audit.html").write_text("before")
    _add_image(project_folder)
    before = [state(project_folder / name) for name in ("release", "vault", "images")]
    arguments = ["audit", "release", "--vault", "vault", "--json", "--html", "audit.html"]
    good = run_cli(*arguments, folder=project_folder)
    assert good.returncode == 0, good.stderr
    assert [state(project_folder / name) for name in ("release", "vault", "images")] == before
    tree = json.loads(good.stdout)
    assert (tree["format"], tree["version"], tree["passed"], tree["private"]) == ("dpf-release-audit", 1, True, True)
    assert good.stdout.strip() == json.dumps(tree, indent=2, sort_keys=True)
    assert stat.S_IMODE((project_folder / "audit.html").stat().st_mode) == 0o600
    (project_folder / "release" / "ids.csv").touch()
    (project_folder / "vault").chmod(0o755)
    bad = run_cli("audit", "release", "--config", "dpf.toml", folder=project_folder)
    assert bad.returncode == 3
    assert "unexpected: ids.csv" in bad.stdout
    assert "readable: vault/.: " in bad.stdout
    assert "2 findings" in bad.stderr
    wrong = run_cli("audit", "release", "--config", "dpf.toml", "--vault", "vault", folder=project_folder)
    assert wrong.returncode == 2


def test_a_public_key_that_no_signature_fits_is_a_finding(finished: Path, tmp_path: Path) -> None:
    public_key, _ = new_key(tmp_path / "key")
    assert failed(audit(finished / "release", public_key=public_key)) == {"signature"}
    public_key.write_text("")
    with pytest.raises(SigningError):
        audit(finished / "release", public_key=public_key)


def test_the_docs_name_every_check_and_every_key(with_vault: Audit) -> None:
    text = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    assert [check.name for check in CHECKS if f"| `{check.name}` |" not in text] == []
    tree = json.loads(with_vault.as_json())
    keys = set(tree) | {key for part in ("checks", "artefacts") for key in tree[part][0]} | set(tree["release"])
    keys |= set(tree["claims"]) | {"check", "side", "kind", "path", "detail"}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


@pytest.mark.parametrize("width", [80, 160])
def test_the_tables_fit_the_terminal(with_vault: Audit, width: int) -> None:
    out = StringIO()
    print_audit(with_vault, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for word in (*statuses(with_vault), "featurizer.safetensors", "plan.json", "shapes 1.0.0", "Claims not made"):
        assert word in out.getvalue()
    assert len(lines) < 6 * len(with_vault.artefacts) + 100


@pytest.fixture
def hostile(project_folder: Path) -> Path:
    """A release whose every name attacks the one who reads it."""
    release = project_folder / "release"
    model = json.loads((release / "model" / "model.json").read_text())
    write_json(release / "model" / "model.json", model | {"classes": [HOSTILE, '"><img src=x onerror=alert(1)>']})
    list_anew(release, name=f"[red]{HOSTILE}", licence="\x1b[2J{{ 7 * 7 }}")
    (release / "<img src=x onerror=alert(1)>").touch()
    (release / "\x1b]0;owned\x07\u202e.txt").touch()
    (release / os.fsdecode(b"\xff.h5")).touch()
    return release


def test_a_stranger_s_names_come_out_as_text(hostile: Path) -> None:
    found = audit(hostile)
    html = page(found)
    assert "&lt;script&gt;" in html
    assert "&lt;img src=x onerror" in html
    assert "{{ 7 * 7 }}" in html
    tags = {tag for tag, _ in _tags(html)}
    assert not tags & {"script", "img", "iframe", "link", "object", "form", "svg"}
    out = StringIO()
    print_audit(found, Console(file=out, width=160, force_terminal=True))
    shown = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # colours are ours
    for text in (html, shown, found.as_json()):
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
        text.encode("utf-8")
    assert "[red]" in shown
    assert r"\x1b]0;owned" in shown


# ------------------------------------------------------------------------------------------ the page


def _tags(html: str) -> list[tuple[str, dict[str, str | None]]]:
    found: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attributes)))

    Reader().feed(html)
    return found


def test_a_page_without_the_vault_names_nothing_of_it(finished: Path, public: Audit, with_vault: Audit) -> None:
    private = {path.name for path in (finished / "vault").rglob("*") if path.is_file()}
    private -= {path.name for path in (finished / "release").rglob("*")}
    needles = sorted(private) + [str(finished), str(Path.home()), "portrait"]
    assert [needle for needle in needles if needle in page(public) or needle in public.as_json()] == []
    with_names = page(with_vault)
    assert all(needle in with_names for needle in private)  # the control
    assert str(finished) not in with_names
    assert "Private. This page was made with the vault" in with_names
    assert "Private. This page" not in page(public)


def test_a_page_lies_outside_the_release_and_is_its_owner_s(
    finished: Path, public: Audit, with_vault: Audit, tmp_path: Path
) -> None:
    for found, mode in ((public, 0o644), (with_vault, 0o600)):
        write_page(found, tmp_path / "audit.html", finished / "release")
        assert stat.S_IMODE((tmp_path / "audit.html").stat().st_mode) == mode
    with pytest.raises(ConfigError, match="outside the release"):
        write_page(public, finished / "release" / "audit.html", finished / "release")
    assert not (finished / "release" / "audit.html").exists()


def test_a_page_loads_nothing_and_can_be_read_aloud(with_vault: Audit) -> None:
    html = page(with_vault)
    tags = _tags(html)
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert not [attributes for _, attributes in tags if {"src", "href", "style", "onclick"} & set(attributes)]
    assert not re.search(r"https?://|url\(|@import|@font-face", html)
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert ("html", {"lang": "en"}) in tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    names = [tag for tag, _ in tags]
    assert names.count("table") == names.count("caption") == 3
    assert all(attributes.get("scope") in {"col", "row"} for tag, attributes in tags if tag == "th")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_colours_of_text_are_readable_on_their_grounds(public: Audit) -> None:
    schemes = re.findall(r":root \{([^}]*--paper[^}]*)\}", page(public))
    assert len(schemes) == 2
    for scheme in schemes:
        colour = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", scheme))
        pairs = [(ink, ground) for ink in ("ink", "soft", "link") for ground in ("paper", "card")]
        pairs += [(name, f"{name}-ground") for name in ("good", "bad", "open")]
        pairs += [("ink", f"{name}-ground") for name in ("good", "bad", "open")]
        pairs += [("open", "paper"), ("open", "card"), ("bad", "paper")]
        assert {pair: ratio for pair in pairs if (ratio := _contrast(*(colour[name] for name in pair))) < 4.5} == {}
    assert _contrast("#777777", "#ffffff") < 4.5  # the control


def _contrast(one: str, other: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
