"""Publishing again: the same bytes, the same function, or a reason; and what `croissant.json` says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import run_cli
from dpf_release.core.files import sha256_of
from dpf_release.errors import RefusedError, VaultError
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.publish import package as package_module
from dpf_release.publish.package import package
from dpf_release.release.verify import verify
from in_process import _structure_in_process  # noqa: F401  # for all tests here

REASON = "The first function broke; all copies of its release were destroyed."


def opened(folder: Path, **overrides: str) -> Project:
    return Project.open(folder / "dpf.toml", {key.replace("__", "."): value for key, value in overrides.items()})


def with_second_function(folder: Path) -> Project:
    """The project, with another function and its candidate under the name `other`."""
    project = opened(folder, poison__function="gaussian-filter")
    fit_poison(project, name="other")
    write_candidate(project, "other")
    return project


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ledger(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((folder / "vault" / "ledger.json").read_text())
    return entries


def test_packaging_twice_gives_the_same_bytes_file_by_file(project_folder: Path) -> None:
    before, entries = contents(project_folder / "release"), ledger(project_folder)
    package(opened(project_folder))
    package(opened(project_folder), out=project_folder / "elsewhere")
    for place in ("release", "elsewhere"):
        after = contents(project_folder / place)
        assert sorted(after) == sorted(before)
        assert [name for name in before if after[name] != before[name]] == []
    assert ledger(project_folder) == entries
    package(opened(project_folder, release__version="1.0.1"), out=project_folder / "elsewhere")  # the control
    changed = contents(project_folder / "elsewhere")
    assert {name for name in before if changed[name] != before[name]} == {
        "README.md",
        "SHA256SUMS",
        "croissant.json",
        "manifest.json",
    }


def test_a_later_version_has_the_same_predecessor_wherever_it_is_packaged(project_folder: Path) -> None:
    first = sha256_of(project_folder / "release" / "manifest.json")
    package(opened(project_folder, release__version="2.0.0"))
    assert package(opened(project_folder, release__version="2.0.0"), out=project_folder / "new").previous == first
    second = contents(project_folder / "release")
    assert contents(project_folder / "new") == second
    shutil.rmtree(project_folder / "release")
    third = package(opened(project_folder, release__version="3.0.0"), out=project_folder / "other")
    assert third.previous == sha256_of(project_folder / "new" / "manifest.json") != first  # the control
    assert package(opened(project_folder), out=project_folder / "other").previous is None


def test_a_second_function_of_the_same_images_wants_a_reason(project_folder: Path) -> None:
    project, before = with_second_function(project_folder), contents(project_folder / "release")
    with pytest.raises(RefusedError, match="a second view of the same images helps an attacker"):
        package(project, "other")
    with pytest.raises(RefusedError, match="--second-function"):
        package(project, "other", second_function="  \n ")
    assert contents(project_folder / "release") == before
    assert len(ledger(project_folder)) == 1

    package(opened(project_folder), "default", out=project_folder / "again")  # the same function needs none
    assert contents(project_folder / "again") == before
    package(project, "other", out=project_folder / "second", second_function=REASON)
    card = (project_folder / "second" / "README.md").read_text(encoding="utf-8")
    assert f"The owner's reason: {REASON}" in card
    assert "second function" not in before["README.md"].decode()
    assert [entry["second_function"] for entry in ledger(project_folder)] == ["", REASON]

    # From here on both are known: neither is asked for a reason again, and the card keeps its own.
    package(project, "other", out=project_folder / "third")
    assert contents(project_folder / "third") == contents(project_folder / "second")
    package(opened(project_folder), "default", out=project_folder / "again", second_function="not needed")
    assert contents(project_folder / "again") == before


def test_a_reason_is_public_text_like_any_other(project_folder: Path) -> None:
    project = with_second_function(project_folder)
    with pytest.raises(RefusedError, match=r"private text: README\.md: says 'disc-portrait-012'"):
        package(project, "other", second_function="disc-portrait-012 was taken out")


def test_a_vault_of_its_own_knows_of_no_other_function(project_folder: Path) -> None:
    project = with_second_function(project_folder)
    (project_folder / "vault" / "ledger.json").unlink()
    shutil.rmtree(project_folder / "release")
    package(project, "other", out=project_folder / "new")
    assert verify(project_folder / "new") == []


def test_a_release_that_the_ledger_does_not_know_is_not_taken_for_none(project_folder: Path) -> None:
    project, path, release = with_second_function(project_folder), project_folder / "vault/ledger.json", "release"
    known, before = path.read_bytes(), contents(project_folder / release)
    path.unlink()
    for place in (release, "new"):
        with pytest.raises(VaultError, match=r"release is a release named 'shapes' that .*ledger\.json does not know"):
            package(project, "other", out=project_folder / place, second_function=REASON)
    assert contents(project_folder / release) == before
    assert not (project_folder / "new").exists()
    path.write_bytes(known)
    package(project, "other", second_function=REASON)


@pytest.mark.parametrize("step", ["before the swap", "before the swap, with another run since", "after the swap"])
def test_a_crash_around_the_swap_leaves_the_ledger_right(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    project = with_second_function(project_folder)
    (project_folder / "vault" / "ledger.json").unlink()
    shutil.rmtree(project_folder / "release")
    swap = package_module.swap

    def crash(staging: Path, out: Path) -> None:
        if step == "after the swap":
            swap(staging, out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(package_module, "swap", crash)
        with pytest.raises(KeyboardInterrupt):
            package(opened(project_folder))
    assert [entry["published"] for entry in ledger(project_folder)] == [False]
    if step.endswith("since"):
        featurize(opened(project_folder))
        assert not list(project_folder.glob(".release*"))
    if step.startswith("before"):  # nobody ever saw it
        package(project, "other")
        assert [entry["function"] for entry in ledger(project_folder)] == ["other"]
    else:
        with pytest.raises(RefusedError, match="another poisoning function was published"):
            package(project, "other")
        package(opened(project_folder))
    assert [entry["published"] for entry in ledger(project_folder)] == [True]


def test_a_release_taken_away_after_a_crash_counts_as_published(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = with_second_function(project_folder)
    entry = ledger(project_folder)[0]
    unsettled = entry | {"published": False, "place": str(project_folder / "release")}
    (project_folder / "vault" / "ledger.json").write_text(json.dumps([unsettled]))
    shutil.move(project_folder / "release", project_folder / "uploaded")
    with pytest.raises(RefusedError, match="another poisoning function was published"):
        package(project, "other")


def test_a_refused_release_is_in_no_ledger(project_folder: Path) -> None:
    before = ledger(project_folder)
    with pytest.raises(RefusedError):
        package(opened(project_folder, release__description="disc-portrait-012"))
    assert ledger(project_folder) == before


def test_the_command_line_takes_a_reason(project_folder: Path) -> None:
    with_second_function(project_folder)
    refused = run_cli("package", "--name", "other", folder=project_folder)
    assert refused.returncode == 3
    assert "--second-function" in refused.stderr
    done = run_cli("package", "--name", "other", "--second-function", REASON, folder=project_folder)
    assert done.returncode == 0, done.stderr
    assert REASON in (project_folder / "release" / "README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------- croissant.json


def test_croissant_lists_the_data_with_their_digests(finished: Path) -> None:
    release = finished / "release"
    tree = json.loads((release / "croissant.json").read_text(encoding="utf-8"))
    assert (tree["name"], tree["version"], tree["license"]) == ("shapes", "1.0.0", "cc0-1.0")
    assert tree["description"] == "Generated shapes."
    listed = {entry["contentUrl"]: entry for entry in tree["distribution"]}
    assert set(listed) == set(contents(release)) - {"README.md", "SHA256SUMS", "manifest.json", "croissant.json"}
    for path, entry in listed.items():
        assert entry["sha256"] == sha256_of(release / path)
        assert entry["contentSize"] == f"{(release / path).stat().st_size} B"
    manifest = json.loads((release / "manifest.json").read_text())
    assert "croissant.json" in {entry["path"] for entry in manifest["files"]}
    assert not {"url", "datePublished", "dateModified", "dateCreated"} & set(tree)
    addresses = {value for value in tree["@context"].values() if isinstance(value, str) and "://" in value}
    text = (release / "croissant.json").read_text(encoding="utf-8")
    for address in [*addresses, tree["conformsTo"]]:
        text = text.replace(address, "")
    assert "://" not in text


def test_croissant_is_valid_for_mlcroissant(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlcroissant", reason="mlcroissant is not installed (it is among the test extras)")

    def validate(path: Path) -> subprocess.CompletedProcess[str]:
        code = "import sys, mlcroissant; print(len(mlcroissant.Dataset(jsonld=sys.argv[1]).metadata.distribution))"
        return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)

    path = finished / "release" / "croissant.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    done = validate(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(tree["distribution"]))]
    del tree["distribution"][0]["contentUrl"]
    (tmp_path / "croissant.json").write_text(json.dumps(tree))
    assert validate(tmp_path / "croissant.json").returncode != 0


def test_the_card_says_what_an_owner_must_tell(finished: Path) -> None:
    card = " ".join((finished / "release" / "README.md").read_text(encoding="utf-8").split())
    for text in (
        "| licence | cc0-1.0 |",
        "| task | classification |",
        "train: ",
        "φ2 on val: top-1",
        "Claims made: **none**",
        "not claimed (`linkage`)",
        "Attacks measured: **none**",
        "The protection is empirical",
        "cannot be recalled",
        "US 2021/0141926",
    ):
        assert text in card, text
