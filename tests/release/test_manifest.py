"""Which files have a place in a release, and how the manifest describes them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dpf_release.release.manifest import UNLISTED, describe_files, role_of
from small_releases import FILES, SHARD, flip_bit, write_release


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


def test_every_file_is_described_but_the_manifest_its_sums_and_signature(release: Path) -> None:
    for name in ("manifest.sig", "signer.pub.pem"):
        (release / name).touch()
    assert {path.name for path in release.iterdir() if path.is_file()} == {"README.md", "croissant.json", *UNLISTED}
    assert {record.path: record.role for record in describe_files(release)} == FILES
    assert [record.path for record in describe_files(release)] == sorted(FILES)


def test_sha256sum_agrees_with_verify(release: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("no sha256sum on this system")
    check = [program, "--check", "--strict", "SHA256SUMS"]
    good = subprocess.run(check, cwd=release, capture_output=True, text=True, check=False)
    assert good.returncode == 0
    assert {line.removesuffix(": OK") for line in good.stdout.splitlines()} == {*FILES, "manifest.json"}
    flip_bit(release / SHARD)
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
