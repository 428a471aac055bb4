"""Keys that others cannot read, signatures that are published with the release, and what checks them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from commands import run_cli
from dpf_release.core.files import sha256_of
from dpf_release.errors import SigningError, StorageError
from dpf_release.owner.project import Project
from dpf_release.publish import package as package_module
from dpf_release.publish.package import package
from dpf_release.release.manifest import MANIFEST, SUMS, Manifest, describe_files, sums_of
from dpf_release.release.signing import new_key, read_private_key, read_public_key, write_signature
from dpf_release.release.verify import read_manifest, verify
from places import ROOT
from small_releases import SHARD, flip_bit, write_release

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A small signed release; the keys lie beside it."""
    new_key(tmp_path / "owner-key")
    release = write_release(tmp_path / "release")
    write_signature(release, read_private_key(tmp_path / "owner-key"))
    return release


# --------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_private_key_is_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        public, _ = new_key(tmp_path / "owner-key")
    finally:
        os.umask(before)
    assert (tmp_path / "owner-key").stat().st_mode & 0o777 == 0o600
    assert public.stat().st_mode & 0o777 == 0o644
    assert public == tmp_path / "owner-key.pub.pem"
    assert (tmp_path / "owner-key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert public.read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----\n")
    read_private_key(tmp_path / "owner-key")
    read_public_key(public, tmp_path / "release")


def test_two_keys_differ(tmp_path: Path) -> None:
    assert new_key(tmp_path / "a")[1] != new_key(tmp_path / "b")[1]


@pytest.mark.parametrize("name", ["owner-key", "owner-key.pub.pem"])
def test_a_key_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("nowhere")  # not even one that a link only names
    with pytest.raises(SigningError, match="never overwritten"):
        new_key(tmp_path / "owner-key")
    (tmp_path / name).unlink()
    new_key(tmp_path / "owner-key")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(SigningError, match="never overwritten"):
        new_key(tmp_path / "owner-key")
    assert (tmp_path / name).read_bytes() == before


def test_a_key_is_not_made_where_it_would_be_published_or_cannot_be_written(signed: Path) -> None:
    for place in (signed / "owner-key", signed / "model" / "owner-key"):
        with pytest.raises(SigningError, match="lies in a release"):
            new_key(place)
    with pytest.raises(SigningError, match="cannot be written"):
        new_key(signed.parent / "no-such-folder" / "owner-key")
    assert verify(signed) == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_private_key_that_others_can_read_is_refused(signed: Path, mode: int) -> None:
    key = signed.parent / "owner-key"
    key.chmod(mode)
    with pytest.raises(SigningError, match=f"mode {mode:o}, expected 600"):
        read_private_key(key)
    key.chmod(0o400)
    read_private_key(key)


def _private(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def test_what_is_no_private_key_is_refused(signed: Path, tmp_path: Path) -> None:
    encrypted = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = (tmp_path / "owner-key.pub.pem").read_bytes()
    for content in (b"", b"\xff" * 10_000, encrypted, other, public):
        with pytest.raises(SigningError, match="expected an Ed25519 private key"):
            read_private_key(_private(tmp_path / "key", content))
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        with pytest.raises(SigningError, match="expected a key"):
            read_private_key(path)


def test_what_is_no_public_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = X25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for content in (b"", b"\xff" * 10_000, other, (tmp_path / "owner-key").read_bytes()):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(SigningError, match="expected an Ed25519 public key"):
            verify(signed, tmp_path / "key")
    with pytest.raises(SigningError, match="cannot be read"):
        verify(signed, tmp_path / "nothing")


def test_the_key_inside_a_release_is_not_taken_for_its_owners(signed: Path) -> None:
    (signed.parent / "link").symlink_to(signed)
    for path in (signed / "signer.pub.pem", signed.parent / "link" / "signer.pub.pem"):
        with pytest.raises(SigningError, match="proves nothing"):
            verify(signed, path)
    assert verify(signed, signed.parent / "owner-key.pub.pem") == []


# --------------------------------------------------------------------------------------------- packaging


def _files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def test_a_release_is_published_with_its_signature_or_not_at_all(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, _ = new_key(project_folder / "owner-key")
    project, release = Project.open(project_folder / "dpf.toml"), project_folder / "release"
    unsigned = _files(release)
    assert [problem.kind for problem in verify(release, public)] == ["bad signature"]

    def full(*_: object) -> None:
        raise StorageError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(package_module, "write_signature", full)
        with pytest.raises(StorageError):
            package(project, sign=project_folder / "owner-key")
    assert _files(release) == unsigned

    manifest = package(project, sign=project_folder / "owner-key")
    assert verify(release, public) == []
    signed = _files(release)
    assert {
        name: digest for name, digest in signed.items() if name not in {"manifest.sig", "signer.pub.pem"}
    } == unsigned
    assert (release / "manifest.sig").stat().st_size == 64
    assert (release / "signer.pub.pem").read_bytes() == public.read_bytes()
    assert {"manifest.sig", "signer.pub.pem"}.isdisjoint(record.path for record in manifest.files)
    assert b"signer" not in (release / SUMS).read_bytes()
    package(project, sign=project_folder / "owner-key")
    assert _files(release) == signed  # the same key and manifest, the same bytes
    package(project)
    assert _files(release) == unsigned


def test_a_key_inside_the_release_or_its_candidate_is_refused(project_folder: Path) -> None:
    new_key(project_folder / "owner-key")
    before = _files(project_folder / "release")
    project, link = Project.open(project_folder / "dpf.toml"), project_folder / "link"
    for place in ("release", "vault/candidates/default", "vault/candidates/default/model"):
        key = project_folder / place / "key"
        key.write_bytes((project_folder / "owner-key").read_bytes())
        key.chmod(0o600)
        link.symlink_to(key)
        for path in (key, link):
            with pytest.raises(SigningError, match="which is published"):
                package(project, sign=path)
        key.unlink()
        link.unlink()
        assert _files(project_folder / "release") == before
    package(project, sign=project_folder / "owner-key")


def test_a_key_that_others_can_read_signs_nothing(project_folder: Path) -> None:
    new_key(project_folder / "owner-key")
    (project_folder / "owner-key").chmod(0o644)
    before = _files(project_folder / "release")
    with pytest.raises(SigningError, match="can be read by others"):
        package(Project.open(project_folder / "dpf.toml"), sign=project_folder / "owner-key")
    assert _files(project_folder / "release") == before


# --------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_an_owner_makes_a_key_signs_and_a_user_checks_who_signed(project_folder: Path) -> None:
    made = run_cli("key", "new", "--out", "owner-key", folder=project_folder)
    assert made.returncode == 0, made.stderr
    fingerprint = re.search(r"Fingerprint of the public key: ([0-9a-f]{64})\n", made.stdout)
    assert fingerprint
    assert run_cli("key", "new", "--out", "owner-key", folder=project_folder).returncode == 1
    signed = run_cli("package", "--sign", "owner-key", folder=project_folder)
    assert signed.returncode == 0, signed.stderr

    unknown = run_cli("verify", "release", folder=project_folder)  # it has a key; that is no reason to trust it
    assert unknown.returncode == 0
    assert "every file is as its manifest says (integrity only, signer unknown" in unknown.stdout
    known = run_cli("verify", "release", "--public-key", "owner-key.pub.pem", folder=project_folder)
    assert known.returncode == 0
    assert f"signed by the key {fingerprint[1]}" in known.stdout
    assert "unknown" not in known.stdout
    inside = run_cli("verify", "release", "--public-key", "release/signer.pub.pem", folder=project_folder)
    assert inside.returncode == 1
    assert "proves nothing" in inside.stderr

    new_key(project_folder / "other-key")
    other = run_cli("verify", "release", "--public-key", "other-key.pub.pem", folder=project_folder)
    assert other.returncode == 3
    assert "bad signature: manifest.sig: " in other.stderr
    assert other.stdout == ""


def test_findings_are_json_where_it_is_asked_for(signed: Path) -> None:
    folder, key = signed.parent, ("--public-key", "owner-key.pub.pem")
    good = run_cli("verify", "release", "--json", *key, folder=folder)
    public = read_public_key(folder / "owner-key.pub.pem", signed)
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout) == {"release": "release", "signer": hashlib.sha256(der).hexdigest(), "problems": []}
    unknown = run_cli("verify", "release", "--json", folder=folder)
    assert json.loads(unknown.stdout) == {"release": "release", "signer": None, "problems": []}

    flip_bit(signed / SHARD)
    (signed / ".git").mkdir()
    (signed / os.fsdecode(b"\xff")).touch()
    bad = run_cli("verify", "release", "--json", *key, folder=folder)
    assert (bad.returncode, bad.stderr) == (3, "")
    report = json.loads(bad.stdout)
    assert report["signer"] is None
    assert {(problem["kind"], problem["path"]) for problem in report["problems"]} == {
        ("changed", SHARD),
        ("empty folder", ".git"),
        ("unexpected", "\udcff"),
    }
    assert all(set(problem) == {"kind", "path", "detail"} for problem in report["problems"])
    words = run_cli("verify", "release", folder=folder)
    assert words.returncode == 3
    assert all(f"  {kind}: " in words.stderr for kind in ("changed", "empty folder", "unexpected"))


# --------------------------------------------------------------------------------------------- without our code


def _by_hand(release: Path) -> list[bool]:
    """The README's lines without our code, run as they stand there, in the release: which of them are content."""
    (block,) = [text for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "openssl" in text]
    lines = block.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["sha256sum", "openssl", "awk"]
    for program in ("sha256sum", "openssl", "awk"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on this system")
    version = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True).stdout
    if not re.match(r"OpenSSL ([3-9]|\d\d)\.", version):
        pytest.skip(f"{version.strip()} cannot check Ed25519 signatures on the command line")
    return [
        subprocess.run(line, shell=True, cwd=release, capture_output=True, check=False).returncode == 0
        for line in lines
    ]


def test_openssl_and_sha256sum_alone_check_a_release_as_the_readme_says(signed: Path) -> None:
    assert _by_hand(signed) == [True, True, True]
    flip_bit(signed / SHARD)
    assert _by_hand(signed) == [False, True, False]
    flip_bit(signed / SHARD)
    flip_bit(signed / MANIFEST)
    assert _by_hand(signed)[:2] == [False, False]
    flip_bit(signed / MANIFEST)
    flip_bit(signed / "manifest.sig")
    assert _by_hand(signed) == [True, False, True]
    flip_bit(signed / "manifest.sig")
    assert _by_hand(signed) == [True, True, True]


def test_sums_that_were_rewritten_with_a_file_deceive_sha256sum_alone_but_not_the_readmes_lines(signed: Path) -> None:
    before = read_manifest(signed)
    assert isinstance(before, Manifest)
    flip_bit(signed / SHARD)
    forged = before.model_copy(update={"files": describe_files(signed)})
    (signed / SUMS).write_text(sums_of(forged, sha256_of(signed / MANIFEST)))
    assert _by_hand(signed) == [True, True, False]
    assert {problem.path for problem in verify(signed)} == {SHARD, SUMS}


def test_the_docs_show_the_lines_of_the_readme() -> None:
    docs = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "openssl" in text]
    assert all(line in docs for line in block.strip().splitlines())
    assert "proves nothing about who made it" in " ".join(README.split())
    assert "proves nothing about who made it" in " ".join(docs.split())
