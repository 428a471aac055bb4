"""A release is read through once on a machine, and again where a file changed."""

import json
import os
from pathlib import Path

import pytest

from dpf_release import Release
from dpf_release.errors import VerificationError
from dpf_release.release import checked_files as digests
from dpf_release.release.checked_files import CheckedDigests


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names of the files that are read through, in a machine of its own whose files are old enough."""
    names: list[str] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)
    digest_of = digests.digest_of
    monkeypatch.setattr(digests, "digest_of", lambda file: names.append(Path(file.name).name) or digest_of(file))
    return names


def test_a_release_is_read_through_once_on_a_machine(project_folder: Path, read: list[str]) -> None:
    files = len(Release.open(project_folder / "release").manifest.files)
    assert len(read) == files > 5
    Release.open(project_folder / "release")
    assert len(read) == files


def test_a_file_that_changed_is_read_again_whatever_its_times_say(project_folder: Path, read: list[str]) -> None:
    shard = project_folder / "release" / "features" / "train" / "shard-00000.h5"
    Release.open(project_folder / "release")
    read.clear()
    times, content = shard.stat(), bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(VerificationError, match=r"changed: features/train/shard-00000\.h5"):
        Release.open(project_folder / "release")
    assert read == ["shard-00000.h5"]


def test_a_file_that_is_hardly_written_is_not_remembered(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"features")
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 60.0)
    for _ in range(2):
        with CheckedDigests.open(tmp_path) as checked, path.open("rb", buffering=0) as file:
            checked.sha256(file)
    assert read == ["file"] * 2
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)
    for _ in range(2):
        with CheckedDigests.open(tmp_path) as checked, path.open("rb", buffering=0) as file:
            checked.sha256(file)
    assert read == ["file"] * 3


def test_what_is_remembered_names_no_file_and_is_the_owners_alone(project_folder: Path, read: list[str]) -> None:
    Release.open(project_folder / "release")
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "dpf-release").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    known = json.loads(kept.read_text())
    assert len(known) == len(read) + 1  # each file, and that all of them are what a release holds
    assert not any(character.isalpha() for key in known for character in key)


@pytest.mark.parametrize("damage", ["cut", "other", "no folder", "another user's"])
def test_without_a_memory_every_file_is_read(
    project_folder: Path, read: list[str], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Release.open(project_folder / "release")
    files = len(read)
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "dpf-release").iterdir()
    if damage == "no folder":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nothing")
    elif damage == "another user's":
        kept.chmod(0o666)
    else:
        kept.write_text('{"1": "a' if damage == "cut" else "[1]")
    Release.open(project_folder / "release")
    assert len(read) == 2 * files
