"""The vault is its owner's alone; sealed, nothing of it is in the clear and nothing lost; forgotten, it comes back."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
from safetensors.numpy import load_file, save_file
from typer.main import get_command

from bare_banks import files_with
from commands import killed, run_cli
from dpf_release.bank.reader import FeatureBank
from dpf_release.cli import main as cli
from dpf_release.core.files import sha256_of
from dpf_release.core.locks import locked
from dpf_release.errors import ConfigError, DPFReleaseError, StorageError, VaultError
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.measure import measure
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.retract import retract
from dpf_release.owner.vault import age, sealing
from dpf_release.owner.vault.age import HEADER, SEALED
from dpf_release.owner.vault.contents import CLEAR, MEMBERS, OPENED, SEALS, STAGED, look_at, read_seals
from dpf_release.owner.vault.retractions import RETRACTED, Retracted, write_retracted
from dpf_release.owner.vault.sealing import check, forget, seal, unseal
from dpf_release.owner.vault.staging import UNPUBLISHED
from dpf_release.owner.vault.vault import Vault
from dpf_release.publish.inspect import inspect
from dpf_release.publish.leaks.private_facts import private_facts
from dpf_release.publish.package import package
from dpf_release.release.verify import verify
from in_process import _structure_in_process  # noqa: F401  # for all tests here
from places import ROOT

pyrage = age.load_pyrage()


def private(vault: Path) -> dict[str, str]:
    """Digest of every file of a vault but those that it keeps for itself, by name."""
    files = {path.relative_to(vault).as_posix(): path for path in vault.rglob("*") if path.is_file()}
    return {name: sha256_of(path) for name, path in files.items() if name not in CLEAR}


def in_the_clear(vault: Path) -> list[str]:
    """Files that are not sealed, looked for by their bytes, and not among the three that may be."""
    return [name for name in private(vault) if not (vault / name).read_bytes().startswith(HEADER)]


def wrong_modes(vault: Path) -> list[str]:
    expected = {True: 0o700, False: 0o600}
    return [str(path) for path in vault.rglob("*") if stat.S_IMODE(path.lstat().st_mode) != expected[path.is_dir()]]


def opened(folder: Path, identity: Path | None = None, /, **overrides: Any) -> Project:
    return Project.open(folder / "dpf.toml", overrides, identity)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """An identity file, as age-keygen writes it."""
    return new_key(tmp_path / "key.txt")


def new_key(path: Path) -> Path:
    identity = pyrage.x25519.Identity.generate()
    path.write_text(f"# created: today\n# public key: {identity.to_public()}\n{identity}\n")
    return path


def recipient(key: Path) -> str:
    return key.read_text().split("public key: ")[1].split("\n")[0]


@pytest.fixture
def sealed_folder(project_folder: Path, key: Path) -> Path:
    """A copy of the finished project, its vault sealed."""
    seal(Vault(project_folder / "vault"), [recipient(key)])
    return project_folder


# Modes, links, git, places.


@pytest.fixture
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_no_umask")
def test_whatever_the_umask_no_one_else_has_a_right(project_folder: Path, key: Path) -> None:
    project = opened(project_folder, **{"poison.function": "gaussian-noise"})
    fit_poison(project, name="noise")
    write_candidate(project, "noise")
    measure(project, "noise")
    assert wrong_modes(project_folder / "vault") == []
    seal(project.vault, [recipient(key)])
    assert wrong_modes(project_folder / "vault") == []
    (project_folder / "vault" / "notes").touch()
    assert wrong_modes(project_folder / "vault") != []


def test_what_others_can_read_is_refused_counted_and_put_right_on_request(project_folder: Path) -> None:
    vault = project_folder / "vault"
    for path in vault.glob("features/*/*.h5"):
        path.chmod(0o640)
    (vault / "functions").chmod(0o750)
    count = 1 + len(list(vault.glob("features/*/*.h5")))
    assert count > 6
    with pytest.raises(VaultError, match=rf"Found {count}: .*mode 640, expected 600.* and {count - 5} more.*--fix-"):
        Vault.open(vault)
    refused = run_cli("vault", "check", folder=project_folder)
    assert refused.returncode == 1
    assert "is not its owner's alone" in refused.stderr
    fixed = run_cli("vault", "check", "--fix-permissions", folder=project_folder)
    assert fixed.returncode == 0, fixed.stderr
    assert "Not sealed" in fixed.stdout
    assert wrong_modes(vault) == []
    assert Vault.open(vault).root == vault


@pytest.mark.parametrize("bits", [0o601, 0o602, 0o604, 0o610, 0o620, 0o640])
def test_any_right_of_others_is_one_too_many(tmp_path: Path, bits: int) -> None:
    vault = Vault.create(tmp_path / "vault")
    vault.ledger.touch(0o600)
    Vault.open(vault.root)
    vault.ledger.chmod(bits)
    with pytest.raises(VaultError, match=f"ledger.json has mode {bits:o}"):
        Vault.open(vault.root)
    Vault.open(vault.root, fix_permissions=True)
    assert stat.S_IMODE(vault.ledger.stat().st_mode) == 0o600


def test_links_and_special_files_are_refused_and_never_followed(tmp_path: Path) -> None:
    vault, elsewhere = Vault.create(tmp_path / "vault"), tmp_path / "elsewhere"
    elsewhere.mkdir(0o755)
    (elsewhere / "file").touch(0o644)
    elsewhere.chmod(0o755)
    for make in (
        lambda path: path.symlink_to(elsewhere),
        lambda path: path.symlink_to(elsewhere / "file"),
        lambda path: path.symlink_to(tmp_path / "nowhere"),
        lambda path: os.mkfifo(path, 0o600),
    ):
        make(vault.root / "reports")
        with pytest.raises(VaultError, match="vault/reports is (a link|no file)"):
            Vault.open(vault.root, fix_permissions=True)
        (vault.root / "reports").unlink()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755
    Vault.open(vault.root)


def test_what_is_another_users_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = Vault.create(tmp_path / "vault")
    Vault.open(vault.root)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(VaultError, match=f"vault is of user {mine}, not yours"):
        Vault.open(vault.root)


def test_git_is_told_to_ignore_the_vault_again_by_the_next_run(project_folder: Path) -> None:
    ignore = project_folder / "vault" / ".gitignore"
    ignore.unlink()
    package(opened(project_folder))
    assert ignore.read_text() == "*\n"


def git(folder: Path, *arguments: str) -> str:
    call = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(call, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_vault_that_git_has_a_file_of_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init")
    vault = Vault.create(tmp_path / "project" / "vault")
    vault.write_json(vault.ledger, [])
    git(tmp_path, "add", ".")
    assert git(tmp_path, "ls-files") == ""  # it is ignored
    assert Vault.open(vault.root) == vault
    git(tmp_path, "add", "--force", "project/vault/ledger.json")
    git(tmp_path, "commit", "-m", "all")
    with pytest.raises(VaultError, match=r"git tracks 1 files of .*ledger\.json.*git rm -r --cached .*history keeps"):
        Vault.open(vault.root)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))  # no git there
        assert Vault.open(vault.root) == vault
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))  # as inside a hook of another repository
    with pytest.raises(VaultError, match="git tracks"):
        Vault.open(vault.root)
    monkeypatch.delenv("GIT_DIR")
    git(tmp_path, "rm", "-r", "--cached", "project/vault")
    assert Vault.open(vault.root) == vault


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_vault_that_git_does_not_answer_for_is_refused(tmp_path: Path) -> None:
    vault = Vault.create(tmp_path / "project" / "vault")
    assert Vault.open(vault.root) == vault  # the control: no repository
    git(tmp_path, "init")
    vault.write_json(vault.ledger, [])
    git(tmp_path, "add", "--force", "project/vault/ledger.json")
    config = tmp_path / ".git" / "config"
    whole = config.read_text()
    config.write_text("no configuration")
    with pytest.raises(VaultError, match=r"git does not say .*bad config line 1 .*\.git/config.*Let git read it"):
        Vault.open(vault.root)
    config.write_text(whole)
    if os.geteuid() == 0:
        os.chown(tmp_path, 1000, 1000)
        with pytest.raises(VaultError, match=r"git does not say .*dubious ownership"):
            Vault.open(vault.root)
        os.chown(tmp_path, 0, 0)
    shutil.move(tmp_path / ".git", tmp_path / "gone")
    (tmp_path / ".git").write_text("gitdir: /nowhere")
    with pytest.raises(VaultError, match=r"git does not say .*not a git repository: /nowhere"):
        Vault.open(vault.root)
    (tmp_path / ".git").unlink()
    assert Vault.open(vault.root) == vault


def move_and_link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("what", ["vault", "images/private", "images/public", "images"])
def test_what_is_private_is_found_inside_a_release_behind_links(project_folder: Path, what: str) -> None:
    move_and_link(project_folder / what, project_folder / "release" / "inside")
    with pytest.raises(VaultError, match="no place for a release"):
        package(opened(project_folder))
    (project_folder / "release").rename(project_folder / "other")
    (project_folder / what).unlink()
    (project_folder / what).symlink_to(project_folder / "other" / "inside")
    package(opened(project_folder))


@pytest.mark.parametrize("beneath", ["", "reports"])
def test_a_release_is_not_written_into_the_vault_through_a_link(project_folder: Path, beneath: str) -> None:
    (project_folder / "public").symlink_to(project_folder / "vault" / beneath)
    with pytest.raises(VaultError, match="no place for a release"):
        package(opened(project_folder), out=project_folder / "public" / "release")
    (project_folder / "public").unlink()
    (project_folder / "public").symlink_to(project_folder / "images")
    package(opened(project_folder), out=project_folder / "public" / "release")


# Sealed and opened.


def test_every_member_is_sealed_and_comes_back_to_the_byte(project_folder: Path, key: Path) -> None:
    vault = Vault(project_folder / "vault", key)
    before = private(vault.root)
    assert all(MEMBERS.fullmatch(name) for name in before)  # the allowlist knows all that the commands write
    assert set(in_the_clear(vault.root)) == set(before)
    state = seal(vault, [recipient(key)])
    assert set(state.sealed) == set(before)
    assert in_the_clear(vault.root) == []
    assert {name.removesuffix(SEALED) for name in private(vault.root)} == set(before)
    assert wrong_modes(vault.root) == []
    seals = read_seals(vault.root)
    assert seals is not None
    assert set(seals.members) == set(before)
    assert check(vault) == state == seal(vault)  # sealed again: nothing to do
    assert set(unseal(vault).clear) == set(before)
    assert private(vault.root) == before
    assert wrong_modes(vault.root) == []
    assert not (vault.root / SEALS).exists()


def test_what_is_sealed_is_an_age_file_for_each_recipient(project_folder: Path, tmp_path: Path) -> None:
    keys = [new_key(tmp_path / name) for name in ("one", "two")]
    vault = Vault(project_folder / "vault")
    ids = vault.ids.read_bytes()
    seal(vault, [recipient(key) for key in keys])
    sealed = age.sealed_form(vault.ids)
    assert sealed.read_bytes().startswith(b"age-encryption.org/v1\n-> X25519 ")
    for key in keys:
        assert age.decrypt(sealed, key) == ids
        if shutil.which("age"):
            told = subprocess.run(["age", "-d", "-i", key, sealed], check=True, capture_output=True)
            assert told.stdout == ids


def test_a_file_that_no_command_wrote_is_named_and_nothing_is_sealed(project_folder: Path, key: Path) -> None:
    vault = Vault(project_folder / "vault")
    before = private(vault.root)
    for name in ("notes.txt", "functions/default/dpf.bak", ".DS_Store", "ids.csv.age", "features/x/ids.csv"):
        stranger = vault.root / name
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_bytes(b"S")
        with pytest.raises(VaultError, match=rf"found also {name}\. They would stay"):
            seal(vault, [recipient(key)])
        stranger.unlink()
        assert private(vault.root) == before
        assert not (vault.root / SEALS).exists()
    seal(vault, [recipient(key)])
    (vault.root / "notes.txt").write_bytes(b"S")
    with pytest.raises(VaultError, match="unknown: notes.txt"):
        check(vault)
    with pytest.raises(VaultError, match=r"notes\.txt\. They would stay"):
        package(opened(project_folder, key))


def test_bad_recipients_are_refused_and_a_secret_key_is_not_repeated(project_folder: Path, key: Path) -> None:
    vault = Vault(project_folder / "vault")
    secret = key.read_text().splitlines()[-1]
    for wrong in ([], ["age1qqq"], [recipient(key)[:-1] + "q"], [secret]):
        with pytest.raises(VaultError, match="expected (a recipient|recipients)") as caught:
            seal(vault, wrong)
        assert secret[:20] not in str(caught.value)
    with pytest.raises(VaultError, match="expected features, candidates, figures to forget, found ids"):
        seal(vault, [recipient(key)], ["ids"])
    assert not (vault.root / SEALS).exists()
    seal(vault, [recipient(key)])
    with pytest.raises(VaultError, match="is sealed for age1.*Open it first"):
        seal(vault, [recipient(new_key(key.with_name("other")))])


def test_a_sealed_vault_is_measured_and_packaged_and_nothing_clear_stays(sealed_folder: Path, key: Path) -> None:
    vault, release = sealed_folder / "vault", sealed_folder / "release"
    before = private(release)
    with pytest.raises(VaultError, match=r"is sealed\. Name the age identity file .*--identity FILE"):
        package(opened(sealed_folder))
    assert in_the_clear(vault) == []
    report = measure(opened(sealed_folder, key))
    assert report["val"]["rows"] > 0
    shutil.rmtree(release)
    package(opened(sealed_folder, key))
    assert private(release) == before
    assert verify(release) == []
    assert in_the_clear(vault) == []
    assert not (vault / OPENED).exists()
    check(Vault(vault))
    unseal(Vault(vault, key))
    assert (vault / "ledger.json").is_file()
    assert measure(opened(sealed_folder)) == report


def test_on_the_command_line_a_sealed_vault_asks_for_its_key(
    sealed_folder: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = run_cli("package", folder=sealed_folder)
    assert refused.returncode == 1
    assert "--identity FILE, or the environment's DPF_RELEASE_IDENTITY" in refused.stderr
    monkeypatch.setenv("DPF_RELEASE_IDENTITY", str(key))
    assert run_cli("package", folder=sealed_folder).returncode == 0
    assert in_the_clear(sealed_folder / "vault") == []
    (*_, holdings) = inspect(str(sealed_folder / "vault"))
    assert {state for *_, state in holdings.rows} == {"sealed"}


def test_every_owners_command_takes_a_key_and_puts_modes_right() -> None:
    commands: dict[str, Any] = getattr(get_command(cli.app), "commands")  # noqa: B009, typer's own type has no such name
    options = {name: {option for p in command.params for option in p.opts} for name, command in commands.items()}
    for name in ("train", "featurize", "fit-poison", "poison", "package", "retract"):
        assert {"--identity", "--fix-permissions"} <= options[name]
    assert "--identity" in options["audit"]
    assert "--identity" not in options["verify"]


@pytest.mark.slow
def test_the_vault_commands_do_what_their_help_says(project_folder: Path, key: Path) -> None:
    before = private(project_folder / "vault")
    for arguments, says in (
        (["seal", "--recipient", recipient(key), "--forget", "figures"], "Deleted is not erased"),
        (["check"], "Sealed for age1"),
        (["open", "--identity", str(key)], "lie in the clear again"),
        (["check"], "Not sealed"),
        (["forget"], "make the same rows again"),
    ):
        result = run_cli("vault", *arguments, folder=project_folder)
        assert result.returncode == 0, result.stderr
        assert says in result.stdout
    kept = private(project_folder / "vault")
    assert kept.items() < before.items()
    assert {"ids.csv", "features/plan.json", "functions/default/state.safetensors"} < set(kept)


def test_new_things_are_made_in_a_sealed_vault_as_in_an_open_one(sealed_folder: Path, key: Path) -> None:
    noise = {"poison.function": "gaussian-noise:scale=2"}
    project = opened(sealed_folder, key, **noise)
    fit_poison(project, name="noise")
    write_candidate(project, "noise")
    assert in_the_clear(sealed_folder / "vault") == []
    write_candidate(opened(sealed_folder, key, **noise), "noise")  # all there: nothing to write
    with pytest.raises(VaultError, match="changed since: shard_size"):
        write_candidate(opened(sealed_folder, key, **noise, **{"bank.shard_size": "1 MB"}), "noise")
    write_candidate(opened(sealed_folder, key, **noise, **{"bank.shard_size": "1 MB"}), "noise", restart=True)
    state = check(Vault(sealed_folder / "vault"))
    assert sum(name.startswith("candidates/noise/features/train/") for name in state.sealed) == 1
    package(opened(sealed_folder, key), "noise", sealed_folder / "noise", second_function="noise alone")
    unseal(project.vault)
    features = sealed_folder / "vault" / "candidates" / "noise" / "features"
    public = FeatureBank(sealed_folder / "noise" / "features", "val")
    assert (FeatureBank(features, "val").read([0, 1]) == public.read([0, 1])).all()


def test_a_network_is_trained_and_features_are_made_anew_in_a_sealed_vault(sealed_folder: Path, key: Path) -> None:
    from dpf_release.owner.train import train

    before = private(sealed_folder / "vault")
    project = opened(sealed_folder, key, **{"train.epochs": 1})
    train(project, restart=True)
    featurize(project, restart=True)
    after = private(sealed_folder / "vault")
    assert in_the_clear(sealed_folder / "vault") == []
    assert before["network/phi.safetensors.age"] != after["network/phi.safetensors.age"]
    assert before["features/plan.json.age"] != after["features/plan.json.age"]
    check(project.vault)


# What goes wrong.


@pytest.mark.parametrize(
    ("event", "ending", "number"),
    [
        ("os.rename", "sealed.json.partial", 1),  # before the first member
        ("os.rename", ".age.partial", 4),  # a member is written, and has not taken its name
        ("os.remove", ".h5", 3),  # a member is there in both forms
        ("os.rename", "sealed.json.partial", 2),  # all are sealed; their names are not noted
    ],
)
def test_a_seal_killed_midway_loses_nothing_and_the_next_run_ends_it(
    project_folder: Path, key: Path, event: str, ending: str, number: int
) -> None:
    vault = Vault(project_folder / "vault", key)
    before = private(vault.root)
    killed(project_folder, event, ending, number, "vault", "seal", "--recipient", recipient(key))
    there = {name.removesuffix(".partial").removesuffix(SEALED) for name in private(vault.root)}
    assert there - CLEAR == set(before)
    copy = Path(shutil.copytree(project_folder, project_folder.with_name("copy")))
    package(opened(project_folder, key))
    if (ending, number) == ("sealed.json.partial", 1):
        assert private(vault.root).items() >= before.items()  # it had not begun
        return
    assert in_the_clear(vault.root) == []
    state = check(vault)
    assert set(state.sealed) == set(before)
    assert state.seals is not None
    assert set(state.seals.members) == set(before)
    for folder in (project_folder, copy):  # opened after the next run, or at once
        unseal(Vault(folder / "vault", key))
        assert private(folder / "vault") == before


@pytest.mark.parametrize(("event", "ending"), [("os.rename", ".h5.partial"), ("os.remove", ".h5.age")])
def test_an_opening_killed_midway_loses_nothing_and_is_gone_on_with(
    sealed_folder: Path, finished: Path, key: Path, event: str, ending: str
) -> None:
    killed(sealed_folder, event, ending, 3, "vault", "open", "--identity", str(key))
    vault = Vault(sealed_folder / "vault", key)
    assert in_the_clear(vault.root)
    copy = Path(shutil.copytree(sealed_folder, sealed_folder.with_name("copy")))
    unseal(vault)
    assert private(vault.root) == private(finished / "vault")
    package(opened(copy, key))  # or the next run seals it again
    assert in_the_clear(copy / "vault") == []
    check(Vault(copy / "vault"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "event", "ending", "number"),
    [
        (["package"], "os.rename", "SHA256SUMS.partial", 1),
        (["poison", "--restart"], "os.rename", ".h5.partial", 12),
        (["poison", "--restart"], "os.rename", "index.json.age.partial", 1),
        (["poison", "--restart"], "os.rename", ".age", 3),
    ],
)
def test_what_a_killed_run_had_opened_goes_at_the_next_start(
    sealed_folder: Path, key: Path, command: list[str], event: str, ending: str, number: int
) -> None:
    vault, release = sealed_folder / "vault", private(sealed_folder / "release")
    killed(sealed_folder, event, ending, number, *command, "--identity", str(key))
    assert any(name.startswith(OPENED) for name in in_the_clear(vault))
    with pytest.raises(VaultError, match="is sealed"):
        package(opened(sealed_folder))  # it does not even need the key
    assert in_the_clear(vault) == []
    project = opened(sealed_folder, key)
    write_candidate(project)
    measure(project)
    package(project)
    assert private(sealed_folder / "release") == release
    assert in_the_clear(vault) == []


@pytest.mark.parametrize("next_run", ["seal", "forget", "featurize", "package"])
def test_a_release_that_was_being_checked_is_its_owners_alone_and_goes_at_the_next_start(
    project_folder: Path, key: Path, next_run: str
) -> None:
    vault, staging = Vault(project_folder / "vault"), project_folder / ".release.dpf-staging"
    killed(project_folder, "os.rename", "SHA256SUMS.partial", 1, "package")
    shards = [f"../{path.relative_to(project_folder)}" for path in staging.rglob("*.h5")]
    assert shards
    assert set(shards) < set(look_at(vault.root).clear)
    assert stat.S_IMODE(staging.stat().st_mode) == 0o700
    {
        "seal": lambda: seal(vault, [recipient(key)]),
        "forget": lambda: forget(vault),
        "featurize": lambda: featurize(opened(project_folder)),
        "package": lambda: package(opened(project_folder), out=project_folder / "elsewhere"),
    }[next_run]()
    assert not staging.exists()
    assert not any(name.startswith(".") for name in look_at(vault.root).clear)
    assert (vault.root / UNPUBLISHED).is_file() == (next_run != "package")  # which settles the ledger first
    assert stat.S_IMODE((project_folder / "release").stat().st_mode) == 0o755  # the control


def test_what_was_opened_and_cannot_be_removed_is_named(
    sealed_folder: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = Vault(sealed_folder / "vault")
    killed(sealed_folder, "os.rename", "SHA256SUMS.partial", 1, "package", "--identity", str(key))
    shard = next((vault.root / OPENED).rglob("shard-00000.h5")).relative_to(vault.root).as_posix()
    with pytest.raises(VaultError, match=r"in the clear: \.\./\.release\.dpf-staging/README\.md, "):
        check(vault)
    assert shard in look_at(vault.root).clear
    unlink = os.unlink

    def kept(path: Any, *arguments: Any, **named: Any) -> None:
        if str(path).endswith("shard-00000.h5"):
            raise PermissionError(13, "Permission denied", path)
        unlink(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", kept)
        with pytest.raises(StorageError, match=rf"could not be removed, and lie in the clear: .*{shard}"):
            seal(vault)
    assert shard in look_at(vault.root).clear
    seal(vault)
    check(vault)


def cut_off(data: bytes) -> bytes:
    return data[:-1]


def flipped(data: bytes) -> bytes:
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]


def header_flipped(data: bytes) -> bytes:
    return data[:60] + bytes([data[60] ^ 1]) + data[61:]


DAMAGED = ["ids.csv", "functions/default/state.safetensors", "features/train/shard-00001.h5", "features/plan.json"]


def test_a_damaged_member_is_named_and_nothing_else_is_lost(sealed_folder: Path, finished: Path, key: Path) -> None:
    vault = Vault(sealed_folder / "vault", key)
    whole = {path: path.read_bytes() for path in (age.sealed_form(vault.root / name) for name in DAMAGED)}
    for path, data in whole.items():
        for damage in (cut_off, flipped, header_flipped):
            path.write_bytes(damage(data))
            before = private(vault.root)
            with pytest.raises(
                VaultError, match=rf"{path.name} does not open with .*another key, or the file is cut off"
            ):
                write_candidate(opened(sealed_folder, key))
            assert private(vault.root) == before
        path.write_bytes(data)
    for path, data in whole.items():
        path.write_bytes(flipped(data))
    with pytest.raises(VaultError, match=rf"{len(whole)} of {len(before)} members did not open.*"):
        unseal(vault)
    assert {path: path.read_bytes() for path in whole} == {path: flipped(data) for path, data in whole.items()}
    for path, data in whole.items():
        path.write_bytes(data)
    unseal(vault)
    assert private(vault.root) == private(finished / "vault")


def test_a_file_that_only_bears_the_name_of_a_sealed_one_is_a_stranger(sealed_folder: Path, key: Path) -> None:
    sealed = sealed_folder / "vault" / "ids.csv.age"
    sealed.write_bytes(b"")
    with pytest.raises(VaultError, match=r"unknown: ids\.csv\.age; missing: ids\.csv"):
        check(Vault(sealed_folder / "vault"))
    sealed.unlink()
    with pytest.raises(VaultError, match=r"missing: ids\.csv\."):
        check(Vault(sealed_folder / "vault"))


def test_another_key_opens_nothing_and_changes_nothing(sealed_folder: Path, key: Path, tmp_path: Path) -> None:
    before = private(sealed_folder / "vault")
    other = new_key(tmp_path / "other.txt")
    for run in (lambda: package(opened(sealed_folder, other)), lambda: unseal(Vault(sealed_folder / "vault", other))):
        with pytest.raises(VaultError, match="does not open with .*other.txt"):
            run()
    for content in ("", "# nothing\n", "AGE-SECRET-KEY-1QQQ", "age1qqq", "\x00\xff"):
        other.write_text(content)
        with pytest.raises(VaultError, match="expected (a line|lines) AGE-SECRET-KEY-1"):
            unseal(Vault(sealed_folder / "vault", other))
    with pytest.raises(VaultError, match="No such file"):
        unseal(Vault(sealed_folder / "vault", tmp_path / "missing"))
    with pytest.raises(VaultError, match="Name the age identity file"):
        unseal(Vault(sealed_folder / "vault"))
    assert private(sealed_folder / "vault") == before
    unseal(Vault(sealed_folder / "vault", key))


def test_a_member_that_did_not_find_room_stays_in_the_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, plain = new_key(tmp_path / "key"), tmp_path / "plain"
    plain.write_bytes(bytes(300_000))

    class Forgetful:
        """pyrage as it is where the disk is full: silent about the last bytes."""

        def __getattr__(self, name: str) -> Any:
            return getattr(pyrage, name)

        def encrypt_io(self, source: Any, taker: Any, keys: list[Any]) -> None:
            sealed = pyrage.encrypt(source.read(), keys)
            taker.write(sealed[:-100])

    with monkeypatch.context() as patch:
        patch.setattr(age, "load_pyrage", Forgetful)
        with pytest.raises(VaultError, match="what was written does not open to it"):
            age.encrypt_file(plain, age.sealed_form(plain), [recipient(key)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "plain"]

    def full(data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with plain.open("rb") as file, pytest.raises(OSError, match="No space left"):
        age._convert(pyrage.encrypt_io, file, full, age.read_recipients([recipient(key)]))
    age.encrypt_file(plain, age.sealed_form(plain), [recipient(key)])
    with age.sealed_form(plain).open("rb") as file, pytest.raises(OSError, match="No space left"):
        age._convert(pyrage.decrypt_io, file, full, age.read_identity(key))
    age.decrypt_file(age.sealed_form(plain), tmp_path / "again", key)
    assert (tmp_path / "again").read_bytes() == plain.read_bytes()


def test_a_vault_that_another_run_holds_is_left_alone(project_folder: Path, key: Path) -> None:
    vault = Vault(project_folder / "vault", key)
    before = private(vault.root)
    for work in (lambda: seal(vault, [recipient(key)]), lambda: unseal(vault), lambda: forget(vault)):
        with locked(vault.root), pytest.raises(StorageError, match="another run works in"):
            work()
    assert private(vault.root) == before


def test_a_bank_is_not_opened_outside_of_a_run(sealed_folder: Path, key: Path) -> None:
    project = opened(sealed_folder, key)
    with pytest.raises(VaultError, match=r"opened for a run that holds the vault"):
        project.private_bank("train")
    with project.working():
        assert len(project.private_bank("train")) > 0
        assert [path.name for path in (sealed_folder / "vault" / OPENED).iterdir()] == ["features"]  # no plan, no ids
        assert not list((sealed_folder / "vault" / OPENED).rglob("*.json"))[1:]
    assert in_the_clear(sealed_folder / "vault") == []


def test_without_pyrage_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, project_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyrage", None)
    with pytest.raises(VaultError, match=r"Install dpf-release\[seal\]"):
        seal(Vault(project_folder / "vault"), ["age1qqq"])
    package(opened(project_folder))  # a vault that is not sealed does not need it


# What compares with the vault, and what changes it.


def test_private_facts_are_found_in_a_sealed_vault_as_in_an_open_one(project_folder: Path, key: Path) -> None:
    vault, release = Vault(project_folder / "vault", key), project_folder / "release"
    weights, shard = release / "model" / "featurizer.safetensors", release / "features" / "val" / "shard-00000.h5"
    good = private_facts(release, opened(project_folder), "default")
    assert good == []
    save_file(load_file(weights) | {"more": largest(vault.function("default") / "state.safetensors")}, weights)
    with h5py.File(shard, "r+") as file:
        file["features"][0] = FeatureBank(vault.features, "val").read([0])[0]
        file["id"][1] = 7
    card = release / "README.md"
    card.write_text(card.read_text() + "\nOf disc-portrait-001.png.\n")
    found = private_facts(release, opened(project_folder), "default")
    assert {problem.kind for problem in found} == {"private text", "private tensor", "private row", "telling id"}
    seal(vault, [recipient(key)])
    project = opened(project_folder, key)
    with project.working():
        assert private_facts(release, project, "default") == found
    assert in_the_clear(vault.root) == []


def largest(path: Path) -> Any:
    return max(load_file(path).values(), key=lambda tensor: tensor.size)


def some_train_row(vault: Vault) -> str:
    return next(line["id"] for line in vault.read_ids() if line["split"] == "train")


@pytest.mark.slow
def test_a_retraction_in_a_sealed_vault_writes_what_it_writes_in_an_open_one(
    project_folder: Path, key: Path, tmp_path: Path
) -> None:
    project = opened(project_folder, **{"poison.function": "recombine:k=3"})
    fit_poison(project, name="mixed")
    write_candidate(project, "mixed")
    vault, row = Vault(project_folder / "vault", key), some_train_row(project.vault)
    never_sealed = Path(shutil.copytree(project_folder, tmp_path / "open"))
    clear_before = private(vault.root)
    report = retract(opened(never_sealed), [row])
    clear_after = private(never_sealed / "vault")
    seal(vault, [recipient(key)])
    before = private(vault.root)
    with pytest.raises(VaultError, match=r"is sealed\. Name the age identity file .*--identity FILE"):
        retract(opened(project_folder), [row])
    with pytest.raises(ConfigError, match=r"ids\.csv has: no row has the id xyz\. Nothing was retracted"):
        retract(opened(project_folder, key), [row, "xyz"])
    assert private(vault.root) == before

    project = opened(project_folder, key)
    assert retract(project, [row]) == report
    assert project.retracted.ids == {bytes.fromhex(row)}
    assert retract(opened(project_folder, key), [row]).rows == {}  # gone before
    assert_nothing_clear(vault.root)
    assert not files_with(vault.root, row.encode())
    assert files_with(never_sealed / "vault", row.encode()) == [RETRACTED]
    after = private(vault.root)
    changed = {name for name in clear_before if clear_after.get(name) != clear_before[name]}
    assert {name.removesuffix(SEALED) for name in before if after.get(name) != before[name]} == changed
    check(vault)
    with pytest.raises(VaultError, match="is sealed"):
        package(opened(project_folder))
    assert package(opened(project_folder, key)).version == "1.0.1"
    bank = FeatureBank(project_folder / "release" / "features", "train")
    assert bytes.fromhex(row) not in {row_id.tobytes() for row_id in bank.ids}
    featurize(opened(project_folder, key))  # there already
    write_candidate(opened(project_folder, key))
    unseal(vault)
    package(opened(never_sealed))
    assert private(vault.root) == private(never_sealed / "vault")


def assert_nothing_clear(vault: Path) -> None:
    assert in_the_clear(vault) == []
    assert [path.name for path in vault.iterdir() if path.name.startswith(".")] == [".gitignore"]
    assert wrong_modes(vault) == []


KILLED_IN_A_RETRACTION = [  # the step before which it is killed, and whether all is done then
    (("os.rename", ".h5.partial", 8), False),  # the vault is being opened, or a shard written
    (("os.rename", ".age.partial", 2), False),  # what changed is being sealed
    (("os.rename", ".staged/sealed.json.partial", 1), False),  # all is sealed, and that is not noted
    (("os.rename", ".age", 1), True),  # it is noted
    (("os.rename", ".age", 5), True),  # a part of it is in its place
    (("os.remove", "vault/reports/default/measurements.json.age", 1), True),  # all of it; what goes is still there
    (("os.rename", ".staged/sealed.json", 1), True),  # that has gone too; the names are those of before
]


@pytest.mark.slow
def test_a_retraction_killed_in_a_sealed_vault_has_changed_nothing_or_all(
    project_folder: Path, key: Path, tmp_path: Path
) -> None:
    row = some_train_row(Vault(project_folder / "vault"))
    sealed = Path(shutil.copytree(project_folder, tmp_path / "sealed"))
    seal(Vault(sealed / "vault"), [recipient(key)])
    before = private(project_folder / "vault")
    retract(opened(project_folder), [row])
    after = private(project_folder / "vault")
    for number, (step, done) in enumerate(KILLED_IN_A_RETRACTION):
        folder = Path(shutil.copytree(sealed, tmp_path / f"killed-{number}"))
        vault = Vault(folder / "vault", key)
        killed(folder, *step, "retract", "--id", row, "--identity", str(key))
        left = {name.removesuffix(".partial") for name in in_the_clear(vault.root)} - {f"{STAGED}/{SEALS}"}
        assert left
        assert all(name.startswith(f"{OPENED}/") for name in left), step
        if done:
            with pytest.raises(VaultError, match=r"was cut off\. Run `dpf-release vault seal`"):
                check(vault)
        next_run = Path(shutil.copytree(folder, tmp_path / f"next-{number}"))
        seal(Vault(next_run / "vault"))  # any that holds the vault; it needs no key
        assert_nothing_clear(next_run / "vault")
        check(Vault(next_run / "vault"))
        for place in (folder, next_run):
            unseal(Vault(place / "vault", key))
            assert private(place / "vault") == (after if done else before), step
    assert before != after


def test_a_retraction_that_was_cut_off_is_finished_before_anything_is_sealed_or_forgotten(
    project_folder: Path, key: Path
) -> None:
    vault = Vault(project_folder / "vault", key)
    write_retracted(vault, Retracted(unfinished={"train": (0,)}))
    before = private(vault.root)
    for work in (lambda: seal(vault, [recipient(key)]), lambda: forget(vault)):
        with pytest.raises(VaultError, match=r"was cut off\. Run `dpf-release retract`"):
            work()
    assert private(vault.root) == before
    assert read_seals(vault.root) is None
    write_retracted(vault, Retracted())
    seal(vault, [recipient(key)])
    assert forget(vault).files > 0


def test_what_is_forgotten_after_a_retraction_is_made_again_row_by_row(project_folder: Path) -> None:
    vault = Vault(project_folder / "vault")
    retract(opened(project_folder), ids=[some_train_row(vault)])
    places = (vault.features, vault.candidate("default") / "features")
    before = [FeatureBank(place, "train") for place in places]
    rows = [(bank.ids.copy(), bank[:][0].copy()) for bank in before]
    forget(vault)
    featurize(opened(project_folder))
    write_candidate(opened(project_folder))
    for place, (ids, features) in zip(places, rows, strict=True):
        again = FeatureBank(place, "train")
        assert (again.ids == ids).all()
        assert (abs(again[:][0].astype(float) - features) < 1e-2).all()  # other batches: the last bits may differ
    assert package(opened(project_folder)).version == "1.0.1"


# Forgotten.


def test_what_is_forgotten_is_made_again_to_the_byte(project_folder: Path) -> None:
    vault = Vault(project_folder / "vault")
    before, release = private(vault.root), private(project_folder / "release")
    forgotten = forget(vault)
    left = private(vault.root)
    gone = set(before) - set(left)
    assert forgotten.files == len(gone)
    assert {name.split("/")[0] for name in gone} == {"features", "candidates", "reports"}
    assert "features/plan.json" in left
    assert "reports/default/measurements.json" in left
    assert not [name for name in left if name.endswith((".h5", ".png"))]
    with pytest.raises(DPFReleaseError, match="expected a finished feature bank"):
        package(opened(project_folder))
    assert private(project_folder / "release") == release
    featurize(opened(project_folder))
    write_candidate(opened(project_folder))
    measure(opened(project_folder))
    assert private(vault.root) == before
    package(opened(project_folder))
    assert private(project_folder / "release") == release


def test_forgotten_features_are_not_made_from_other_images(project_folder: Path) -> None:
    forget(Vault(project_folder / "vault"))
    picture = project_folder / "images" / "private" / "disc" / "disc-portrait-001.png"
    picture.write_bytes(picture.with_name("disc-portrait-002.png").read_bytes())
    with pytest.raises(VaultError, match="changed since: source_sha256"):
        featurize(opened(project_folder))


def test_nothing_is_forgotten_before_a_release(project_folder: Path) -> None:
    vault = Vault(project_folder / "vault")
    ledger = vault.ledger.read_bytes()
    for unpublished in ([], [json.loads(ledger)[0] | {"published": False}]):
        vault.write_json(vault.ledger, unpublished)
        before = private(vault.root)
        with pytest.raises(VaultError, match="no release was made"):
            forget(vault)
        assert private(vault.root) == before
    vault.ledger.write_bytes(ledger)
    assert forget(vault).files > 0


def test_a_sealed_vault_forgets_too_and_sealing_can_forget(project_folder: Path, key: Path, finished: Path) -> None:
    vault = Vault(project_folder / "vault", key)
    seal(vault, [recipient(key)], ["features"])
    assert not [name for name in look_at(vault.root).sealed if name.startswith("features/") and name.endswith(".h5")]
    assert [name for name in look_at(vault.root).sealed if name.startswith("candidates/") and name.endswith(".h5")]
    forget(vault)
    state = check(vault)
    assert not [name for name in state.sealed if name.startswith("candidates/") or name.endswith(".png")]
    featurize(opened(project_folder, key))
    write_candidate(opened(project_folder, key))
    measure(opened(project_folder, key))
    assert in_the_clear(vault.root) == []
    unseal(vault)
    assert private(vault.root) == private(finished / "vault")


def test_the_words_about_deletion_name_what_it_does_not_reach() -> None:
    words = sealing.DELETION + (ROOT / "docs" / "vault.md").read_text()
    for place in ("SSD", "snapshots", "backups", "journal", "copy-on-write"):
        assert place in sealing.DELETION
        assert words.count(place) > 1
