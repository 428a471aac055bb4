"""Files appear whole or not at all; the vault is its owner's alone."""

import os
import platform
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpf_release.core.files import make_folder, replacing, sha256_of, write_json, write_text
from dpf_release.errors import VaultError
from dpf_release.owner.vault.ledger import forget_release, releases, remember_release
from dpf_release.owner.vault.vault import Vault


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o077], ids=["umask 0", "umask 077"])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


# Storage.

FAULTS = """
import ctypes, resource
from dpf_release.core.memory import keeping_large_blocks, return_large_blocks

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        block = bytearray(8 * 2**20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keeping_large_blocks():
    pass
return_large_blocks()
returned = faults()
with keeping_large_blocks():
    faults()
    kept = faults()
    with keeping_large_blocks():
        pass
    still = faults()
print(returned, kept, still, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_large_blocks_stay_during_a_training_and_go_back_to_the_system_otherwise() -> None:
    out = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout
    returned, kept, still, after = map(int, out.split())
    assert max(kept, still) < min(returned, after) / 10


@pytest.mark.usefixtures("_umask")
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_appears_whole_with_its_mode_and_never_has_another(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    with replacing(path, mode) as partial:
        assert _mode(partial) == mode
        partial.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert _mode(path) == mode
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("_umask")
def test_a_library_that_replaces_the_partial_file_does_not_change_the_mode(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as partial:
        partial.unlink()
        partial.write_bytes(b"new")
        partial.chmod(0o666)
    assert _mode(tmp_path / "file") == 0o600


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_writer_that_fails_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == ({"file": old} if old else {})


def test_a_partial_file_left_by_a_crash_or_linked_elsewhere_is_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"keep")
    (tmp_path / "file.partial").symlink_to(elsewhere)
    write_text(tmp_path / "file", "new")
    assert elsewhere.read_bytes() == b"keep"
    assert (tmp_path / "file").read_bytes() == b"new"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.usefixtures("_umask")
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_folder_and_its_missing_parents_have_the_mode(tmp_path: Path, mode: int) -> None:
    there = tmp_path / "there"
    there.mkdir(mode=0o750)
    before = _mode(there)
    assert make_folder(there / "a" / "b", mode) == there / "a" / "b"
    assert [_mode(there / "a"), _mode(there / "a" / "b")] == [mode, mode]
    assert _mode(there) == before
    make_folder(there / "a" / "b", mode)


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": [1, 2.5], "a": {"é": None, "d": True}})
    write_json(tmp_path / "b", {"a": {"d": True, "é": None}, "b": (1, 2.5)})
    write_json(tmp_path / "c", {"a": {"d": True, "é": None}, "b": (2.5, 1)})
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b") != sha256_of(tmp_path / "c")
    assert (tmp_path / "a").read_text("utf-8") == (
        '{\n  "a": {\n    "d": true,\n    "é": null\n  },\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    )


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_that_of_the_standard(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


# The vault.


@pytest.mark.usefixtures("_umask")
def test_a_vault_is_private_and_git_ignores_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir(mode=0o777)
    for root in (tmp_path / "new", tmp_path / "old"):
        vault = Vault.create(root)
        assert _mode(root) == 0o700
        assert _mode(root / ".gitignore") == 0o600
        assert (root / ".gitignore").read_text() == "*\n"
        assert Vault.create(root) == Vault.open(root) == vault


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o720])
def test_a_vault_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    root = Vault.create(tmp_path / "vault").root
    root.chmod(mode)
    with pytest.raises(VaultError, match=f"mode {mode:o}, expected 700.*chmod -R go-rwx"):
        Vault.open(root)
    root.chmod(0o700)
    assert Vault.open(root).root == root


def test_a_missing_vault_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(VaultError, match=r"expected a vault at .*vault, found none\. Run `dpf-release init"):
        Vault.open(tmp_path / "vault")


@pytest.mark.parametrize("name", ["a/b", "..", "../x", ".", "", ".hidden", "-x", "/etc", "a b", "a\n", "x" * 65])
def test_a_name_that_could_leave_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    vault = Vault(tmp_path)
    for place in (vault.function, vault.candidate, vault.reports, vault.survey):
        with pytest.raises(VaultError, match="expected a name of letters"):
            place(name)
        assert "paper-1.0_b" in str(place("paper-1.0_b").relative_to(tmp_path))


def test_ids_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        {"id": "00ff", "split": "train", "row": 0, "source": 'cat/a "b", c.jpg', "person": "Zoë"},
        {"id": "01fe", "split": "val", "row": 0, "source": "new\nline.jpg", "person": ""},
    ]
    vault = Vault(tmp_path)
    path = vault.ids
    vault.write_ids(rows, ["person"])
    assert list(vault.read_ids()) == [{key: str(value) for key, value in row.items()} for row in rows]
    assert _mode(path) == 0o600
    assert path.read_text("utf-8").startswith("id,split,row,source,person\n00ff,")
    path.unlink()
    with pytest.raises(VaultError, match=r"ids\.csv, found none\. Run `dpf-release featurize` first"):
        next(vault.read_ids())


def test_a_record_is_read_and_one_that_is_missing_or_broken_says_which_command_makes_it(tmp_path: Path) -> None:
    vault, path = Vault(tmp_path), tmp_path / "plan.json"
    with pytest.raises(VaultError, match=r"plan\.json, found none\. Run `dpf-release poison` first"):
        vault.read_record(path, "poison")
    write_json(path, {"rows": 3})
    assert vault.read_record(path, "poison") == {"rows": 3}
    for broken in (b"{", b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(VaultError, match=r"plan\.json is not JSON: .*Run `dpf-release poison` again"):
            vault.read_record(path, "poison")


def test_the_ledger_holds_each_release_once(tmp_path: Path) -> None:
    vault = Vault.create(tmp_path / "vault")
    for manifest, published in (("1", True), ("2", False), ("2", True), ("1", False)):
        remember_release(vault, {"manifest_sha256": manifest, "published": published})
    both = [{"manifest_sha256": "1", "published": True}, {"manifest_sha256": "2", "published": True}]
    assert vault.read_record(vault.ledger, "package") == releases(vault) == both
    forget_release(vault, both[0])
    assert releases(vault) == both[1:]
