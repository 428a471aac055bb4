"""`verify` finds every difference between a release and its manifest, and nothing in a good one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpf_release.manifest import Manifest, describe_files, role_of, verify, write_manifest

FILES = {
    "README.md": "card",
    "croissant.json": "croissant",
    "model/model.json": "model-record",
    "model/featurizer.safetensors": "featurizer",
    "model/classifier.safetensors": "classifier",
    "features/index.json": "bank-index",
    "features/train/shard-00000.h5": "shard",
    "features/val/shard-00000.h5": "shard",
}
SHARD = "features/train/shard-00000.h5"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder with a file of every role; `verify` looks at bytes, not at what they mean."""
    folder = tmp_path / "release"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"content of {name}".encode())
    manifest = Manifest(
        name="small",
        version="1.0.0",
        licence="cc0-1.0",
        task="classification",
        classes=("cat", "dog"),
        splits={"train": 8, "val": 2},
        files=describe_files(folder),
    )
    write_manifest(folder, manifest)
    return folder


def _found(folder: Path) -> set[tuple[str, str]]:
    return {(problem.kind, problem.path) for problem in verify(folder)}


def _flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _link(release: Path, name: str) -> None:
    """Moves a file or folder out of the release and leaves a link to it."""
    outside = release.with_name("outside")
    (release / name).rename(outside)
    (release / name).symlink_to(outside)


def _edit_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_bytes())
    change(tree)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")


def test_nothing_is_found_in_a_whole_release(release: Path) -> None:
    assert verify(release) == []
    assert {record.path: record.role for record in describe_files(release)} == FILES
    assert [record.path for record in describe_files(release)] == sorted(FILES)


TAMPERING: dict[str, tuple[Callable[[Path], Any], set[tuple[str, str]]]] = {
    "flipped bit": (lambda r: _flip_bit(r / SHARD), {("changed", SHARD)}),
    "truncated": (lambda r: (r / SHARD).write_bytes((r / SHARD).read_bytes()[:-1]), {("changed", SHARD)}),
    "emptied": (lambda r: (r / SHARD).write_bytes(b""), {("changed", SHARD)}),
    "deleted": (lambda r: (r / "README.md").unlink(), {("missing", "README.md")}),
    "added": (lambda r: (r / "model/dpf.safetensors").touch(), {("unexpected", "model/dpf.safetensors")}),
    "added, with a role": (
        lambda r: (r / "features/train/shard-00001.h5").touch(),
        {("unexpected", "features/train/shard-00001.h5")},
    ),
    "added, hidden": (lambda r: (r / ".ids.csv").touch(), {("unexpected", ".ids.csv")}),
    "added empty folder": (lambda r: (r / "features/test").mkdir(), {("unexpected", "features/test")}),
    "renamed": (
        lambda r: (r / SHARD).rename(r / "features/train/shard-00009.h5"),
        {("missing", SHARD), ("unexpected", "features/train/shard-00009.h5")},
    ),
    "swapped": (
        lambda r: [
            (r / name).write_bytes(f"content of {other}".encode())
            for name, other in [(SHARD, "features/val/shard-00000.h5"), ("features/val/shard-00000.h5", SHARD)]
        ],
        {("changed", SHARD), ("changed", "features/val/shard-00000.h5")},
    ),
    "link in place of a file": (lambda r: _link(r, SHARD), {("link", SHARD)}),
    "link in place of a folder": (lambda r: _link(r, "features/train"), {("link", "features/train")}),
    "added link to nowhere": (lambda r: (r / "more").symlink_to("nowhere"), {("link", "more")}),
    "folder in place of a file": (
        lambda r: ((r / SHARD).unlink(), (r / SHARD).mkdir()),
        {("missing", SHARD), ("unexpected", SHARD)},
    ),
    "pipe in place of a file": (
        lambda r: ((r / SHARD).unlink(), os.mkfifo(r / SHARD)),
        {("missing", SHARD)},
    ),
    "manifest says another licence": (
        lambda r: _edit_manifest(r, lambda tree: tree.update(licence="mit")),
        {("changed", "SHA256SUMS")},
    ),
    "manifest forgets a file": (
        lambda r: _edit_manifest(r, lambda tree: tree["files"].pop(0)),
        {("changed", "SHA256SUMS"), ("unexpected", "README.md")},
    ),
    "manifest lists a file twice": (
        lambda r: _edit_manifest(r, lambda tree: tree["files"].append(tree["files"][0])),
        {("changed", "SHA256SUMS"), ("schema", "manifest.json")},
    ),
    "sums edited": (
        lambda r: (r / "SHA256SUMS").write_text((r / "SHA256SUMS").read_text() + "\n"),
        {("changed", "SHA256SUMS")},
    ),
    "sums missing": (lambda r: (r / "SHA256SUMS").unlink(), {("missing", "SHA256SUMS")}),
    "sums linked": (
        lambda r: _link(r, "SHA256SUMS"),
        {("link", "SHA256SUMS"), ("missing", "SHA256SUMS")},
    ),
    "manifest missing": (lambda r: (r / "manifest.json").unlink(), {("missing", "manifest.json")}),
    "manifest linked": (lambda r: _link(r, "manifest.json"), {("missing", "manifest.json")}),
    "manifest not JSON": (
        lambda r: (r / "manifest.json").write_bytes(b"\xff{"),
        {("schema", "manifest.json")},
    ),
    "no folder": (lambda r: shutil.rmtree(r), {("missing", "manifest.json")}),
    "everything at once": (
        lambda r: (
            _flip_bit(r / SHARD),
            (r / "README.md").unlink(),
            (r / "x").symlink_to("y"),
            (r / "vault").mkdir(),
            (r / "vault/ids.csv").touch(),
            (r / "SHA256SUMS").unlink(),
        ),
        {
            ("changed", SHARD),
            ("missing", "README.md"),
            ("link", "x"),
            ("unexpected", "vault"),
            ("unexpected", "vault/ids.csv"),
            ("missing", "SHA256SUMS"),
        },
    ),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_found_and_nothing_else(release: Path, name: str) -> None:
    tamper, expected = TAMPERING[name]
    tamper(release)
    assert _found(release) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["files"][0].update(path="../secret"),
        lambda tree: tree["files"][0].update(path="/etc/passwd"),
        lambda tree: tree["files"][0].update(path="README.md\n"),
        lambda tree: tree["files"][0].update(path="features/test/shard-00000.h5"),
        lambda tree: tree["files"][0].update(path="vault/ids.csv"),
        lambda tree: tree["files"][0].update(role="secret"),
        lambda tree: tree["files"][0].update(role="shard"),  # of README.md
        lambda tree: tree["files"][0].update(sha256="0"),
        lambda tree: tree["files"][0].update(bytes=-1),
        lambda tree: tree.update(format_version=2),
        lambda tree: tree.update(owner="me"),
        lambda tree: tree["splits"].update(test=3),
    ],
)
def test_a_manifest_of_another_format_is_a_finding(release: Path, change: Callable[[Any], Any]) -> None:
    _edit_manifest(release, lambda tree: None)
    assert _found(release) == set()
    _edit_manifest(release, change)
    assert _found(release) == {("schema", "manifest.json")}


def test_sha256sum_agrees_with_verify(release: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("no sha256sum on this system")
    check = [program, "--check", "--strict", "SHA256SUMS"]
    good = subprocess.run(check, cwd=release, capture_output=True, text=True, check=False)
    assert good.returncode == 0
    assert {line.removesuffix(": OK") for line in good.stdout.splitlines()} == {*FILES, "manifest.json"}
    _flip_bit(release / SHARD)
    bad = subprocess.run(check, cwd=release, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert [line for line in bad.stdout.splitlines() if not line.endswith("OK")] == [f"{SHARD}: FAILED"]


@pytest.mark.parametrize(
    ("path", "role"),
    [
        *FILES.items(),
        ("features/val/shard-99999.h5", "shard"),
        ("features/test/shard-00000.h5", None),
        ("features/train/shard-00000.h5.partial", None),
        ("features/train/shard-0.h5", None),
        ("features/shard-00000.h5", None),
        ("model/dpf.safetensors", None),
        ("model/featurizer-safetensors", None),
        ("README.md\n", None),
        ("readme.md", None),
        ("docs/README.md", None),
        ("../README.md", None),
        ("ids.csv", None),
        ("manifest.json", None),
        ("", None),
    ],
)
def test_only_listed_paths_have_a_role(path: str, role: str | None) -> None:
    assert role_of(path) == role


def test_a_file_without_a_role_is_never_described(release: Path) -> None:
    (release / "ids.csv").touch()
    with pytest.raises(ValueError, match=r"ids\.csv has no role"):
        describe_files(release)


def test_verification_needs_no_torch(release: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dpf_release.manifest import verify; "
        "print(len(verify(Path(sys.argv[1]))), 'pydantic' in sys.modules, 'torch' in sys.modules)"
    )
    (release / "README.md").unlink()
    done = subprocess.run([sys.executable, "-c", code, str(release)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True", "False"]
