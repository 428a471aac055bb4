"""`verify` finds every difference between a release and its manifest, each of its kind, and nothing in a good one."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpf_release.core.files import digest_of
from dpf_release.release import tree as tree_module
from dpf_release.release import verify as verification
from dpf_release.release.manifest import Manifest, describe_files, write_manifest
from dpf_release.release.signing import new_key, read_private_key, write_signature
from dpf_release.release.verify import Kind, Problem, parse_manifest, read_manifest, verify
from places import ROOT
from small_releases import FILES, SHARD, edit_manifest, flip_bit, write_release

SUMS_CHANGED = ("changed", "SHA256SUMS")
VAL_SHARD = "features/val/shard-00000.h5"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release")


@pytest.fixture
def public_key(release: Path) -> Path:
    """The key that `release` is signed with."""
    public, _ = new_key(release.with_name("owner-key"))
    write_signature(release, read_private_key(release.with_name("owner-key")))
    return public


def found_in(folder: Path, public_key: Path | None = None) -> set[tuple[str, str]]:
    return {(problem.kind, problem.path) for problem in verify(folder, public_key)}


def _link(release: Path, name: str) -> None:
    """Moves a file or folder out of the release and leaves a link to it."""
    outside = release.with_name("outside")
    (release / name).rename(outside)
    (release / name).symlink_to(outside)


def _socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    place = os.open(path.parent, os.O_RDONLY)  # the path of a socket is short, that of a test's folder is not
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{place}/{path.name}")
    os.close(place)


def _add(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"private")


def _describe_again(folder: Path) -> None:
    """Writes the manifest anew, over the files as they are now."""
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest)
    write_manifest(folder, manifest.model_copy(update={"files": describe_files(folder)}))


def _nest(folder: Path, depth: int) -> None:
    for _ in range(depth):
        folder.mkdir()
        folder = folder / "d"


def test_nothing_is_found_in_a_whole_release(release: Path, public_key: Path) -> None:
    assert verify(release) == []
    assert verify(release, public_key) == []
    for name in ("manifest.sig", "signer.pub.pem"):
        (release / name).unlink()
    assert verify(release) == []


TAMPERING: dict[str, tuple[Callable[[Path], Any], set[tuple[str, str]]]] = {
    "flipped bit": (lambda r: flip_bit(r / SHARD), {("changed", SHARD)}),
    "truncated": (lambda r: (r / SHARD).write_bytes((r / SHARD).read_bytes()[:-1]), {("changed", SHARD)}),
    "emptied": (lambda r: (r / SHARD).write_bytes(b""), {("changed", SHARD)}),
    "deleted": (lambda r: (r / "README.md").unlink(), {("missing", "README.md")}),
    "added": (lambda r: _add(r / "model/dpf.safetensors"), {("unexpected", "model/dpf.safetensors")}),
    "added, with a role": (
        lambda r: _add(r / "features/train/shard-00001.h5"),
        {("unexpected", "features/train/shard-00001.h5")},
    ),
    "added folder": (lambda r: _add(r / "vault/ids.csv"), {("unexpected", "vault"), ("unexpected", "vault/ids.csv")}),
    "renamed": (
        lambda r: (r / SHARD).rename(r / "features/train/shard-00009.h5"),
        {("missing", SHARD), ("unexpected", "features/train/shard-00009.h5")},
    ),
    "swapped": (
        lambda r: [
            (r / name).write_bytes(f"content of {other}".encode())
            for name, other in [(SHARD, VAL_SHARD), (VAL_SHARD, SHARD)]
        ],
        {("changed", SHARD), ("changed", VAL_SHARD)},
    ),
    "link in place of a file": (lambda r: _link(r, SHARD), {("link", SHARD)}),
    "link in place of a folder": (lambda r: _link(r, "features/train"), {("link", "features/train")}),
    "link to another file of the release": (
        lambda r: ((r / SHARD).unlink(), (r / SHARD).symlink_to("../val/shard-00000.h5")),
        {("link", SHARD)},
    ),
    "added link to nowhere": (lambda r: (r / "more").symlink_to("nowhere"), {("link", "more")}),
    "added links in a circle": (
        lambda r: ((r / "a").symlink_to("b"), (r / "b").symlink_to("a")),
        {("link", "a"), ("link", "b")},
    ),
    "added link to the folder above": (lambda r: (r / "up").symlink_to(".."), {("link", "up")}),
    "hard link out": (lambda r: (r.parent / "other").hardlink_to(r / SHARD), {("hard link", SHARD)}),
    "hard link out, of the sums": (
        lambda r: (r.parent / "other").hardlink_to(r / "SHA256SUMS"),
        {("hard link", "SHA256SUMS")},
    ),
    "folder in place of a file": (
        lambda r: ((r / SHARD).unlink(), _add(r / SHARD / "x")),
        {("missing", SHARD), ("unexpected", SHARD), ("unexpected", f"{SHARD}/x")},
    ),
    "pipe in place of a file": (lambda r: ((r / SHARD).unlink(), os.mkfifo(r / SHARD)), {("special file", SHARD)}),
    "added pipe": (lambda r: os.mkfifo(r / "pipe"), {("special file", "pipe")}),
    "socket in place of a file": (lambda r: _socket(r / SHARD), {("special file", SHARD)}),
    "pipe in place of the manifest": (
        lambda r: ((r / "manifest.json").unlink(), os.mkfifo(r / "manifest.json")),
        {("special file", "manifest.json"), ("missing", "manifest.json")},
    ),
    "pipe in place of the sums": (
        lambda r: ((r / "SHA256SUMS").unlink(), os.mkfifo(r / "SHA256SUMS")),
        {("special file", "SHA256SUMS"), ("missing", "SHA256SUMS")},
    ),
    "emptied folder": (
        lambda r: (r / SHARD).unlink(),
        {("missing", SHARD), ("empty folder", "features/train")},
    ),
    "other case": (lambda r: _add(r / "readme.md"), {("collision", "readme.md")}),
    "other case of a folder": (
        lambda r: _add(r / "Features" / "train" / "shard-00000.h5"),
        {("collision", name) for name in ("Features", "Features/train", "Features/train/shard-00000.h5")},
    ),
    "two strangers that differ in Unicode form": (
        lambda r: [_add(r / unicodedata.normalize(form, "\u00e9")) for form in ("NFC", "NFD")],
        {("unexpected", "e\u0301"), ("collision", "\u00e9")},
    ),
    "a name that is no text": (
        lambda r: Path(os.fsdecode(os.fsencode(r) + b"/\xff")).touch(),
        {("unexpected", "\udcff")},
    ),
    "too many folders in each other": (
        lambda r: _nest(r / "d", 30),
        {("unexpected", "/".join("d" * depth)) for depth in range(1, tree_module.MAX_DEPTH + 1)},
    ),
    "manifest says another licence": (
        lambda r: edit_manifest(r, lambda tree: tree.update(licence="mit")),
        {SUMS_CHANGED},
    ),
    "manifest forgets a file": (
        lambda r: edit_manifest(r, lambda tree: tree["files"].pop(0)),
        {SUMS_CHANGED, ("unexpected", "README.md")},
    ),
    "manifest lists a file twice": (
        lambda r: edit_manifest(r, lambda tree: tree["files"].append(tree["files"][0])),
        {SUMS_CHANGED, ("duplicate", "README.md")},
    ),
    "manifest has a key twice": (
        lambda r: (r / "manifest.json").write_text(
            (r / "manifest.json").read_text().replace('"licence": ', '"licence": "mit", "licence": ')
        ),
        {("duplicate", "manifest.json")},
    ),
    "sums edited": (lambda r: (r / "SHA256SUMS").write_text((r / "SHA256SUMS").read_text() + "\n"), {SUMS_CHANGED}),
    "sums missing": (lambda r: (r / "SHA256SUMS").unlink(), {("missing", "SHA256SUMS")}),
    "sums linked": (lambda r: _link(r, "SHA256SUMS"), {("link", "SHA256SUMS"), ("missing", "SHA256SUMS")}),
    "manifest missing": (lambda r: (r / "manifest.json").unlink(), {("missing", "manifest.json")}),
    "manifest linked": (
        lambda r: _link(r, "manifest.json"),
        {("link", "manifest.json"), ("missing", "manifest.json")},
    ),
    "manifest not JSON": (lambda r: (r / "manifest.json").write_bytes(b"\xff{"), {("schema", "manifest.json")}),
    "manifest and strangers": (
        lambda r: ((r / "manifest.json").write_text("[]"), os.mkfifo(r / "pipe"), _add(r / ".git/config")),
        {
            ("schema", "manifest.json"),
            ("special file", "pipe"),
            ("hidden file", ".git"),
            ("hidden file", ".git/config"),
        },
    ),
    "no folder": (lambda r: shutil.rmtree(r), {("missing", "manifest.json")}),
    "a file in the place of the folder": (
        lambda r: (shutil.rmtree(r), r.touch()),
        {("missing", "manifest.json")},
    ),
    "a signature without its key": (
        lambda r: (r / "manifest.sig").write_bytes(b"0" * 64),
        {("missing", "signer.pub.pem")},
    ),
    "everything at once": (
        lambda r: (
            flip_bit(r / SHARD),
            (r / "README.md").unlink(),
            (r / "x").symlink_to("y"),
            _add(r / "vault/ids.csv"),
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
    assert found_in(release) == set()
    tamper(release)
    assert found_in(release) == expected


# What comparable tools let pass: model-signing 1.1.1 of sigstore, and tools for BagIt.


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (".git/dpf.pt", {("hidden file", ".git"), ("hidden file", ".git/dpf.pt")}),
        (".gitignore", {("hidden file", ".gitignore")}),
        (".gitattributes", {("hidden file", ".gitattributes")}),
        (".github/dpf.pt", {("hidden file", ".github"), ("hidden file", ".github/dpf.pt")}),
        ("empty/", {("empty folder", "empty")}),
        ("features/.ids.csv", {("hidden file", "features/.ids.csv")}),
    ],
)
def test_what_model_signing_1_1_1_lets_be_added_to_a_signed_folder_is_found(
    release: Path, public_key: Path, added: str, expected: set[tuple[str, str]]
) -> None:
    assert verify(release, public_key) == []
    if added.endswith("/"):
        (release / added).mkdir()
    else:
        _add(release / added)
    assert found_in(release, public_key) == expected


def test_extra_files_in_the_root_which_bagit_tools_permit_are_found(release: Path) -> None:
    assert verify(release) == []
    for name in ("bag-info.txt", "notes.txt", "dpf.safetensors"):
        _add(release / name)
    assert found_in(release) == {("unexpected", name) for name in ("bag-info.txt", "notes.txt", "dpf.safetensors")}


def test_a_folder_behind_a_link_which_bagit_tools_ignore_is_found(release: Path) -> None:
    private = release.with_name("private")
    _add(private / "ids.csv")
    assert verify(release) == []
    (release / "data").symlink_to(private)
    (release / "features" / "more").symlink_to(private)
    assert found_in(release) == {("link", "data"), ("link", "features/more")}


def test_a_release_may_be_reached_through_a_link(release: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(release)
    assert verify(tmp_path / "link") == []
    flip_bit(release / SHARD)
    assert found_in(tmp_path / "link") == {("changed", SHARD)}


def test_two_names_of_one_file_inside_a_release_are_no_finding(release: Path) -> None:
    (release / VAL_SHARD).unlink()
    (release / VAL_SHARD).hardlink_to(release / SHARD)
    _describe_again(release)
    assert verify(release) == []
    (release.parent / "third").hardlink_to(release / SHARD)
    assert found_in(release) == {("hard link", SHARD), ("hard link", VAL_SHARD)}


# --------------------------------------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree["files"][0].update(path="../secret"), ("path escape", "../secret")),
        (lambda tree: tree["files"][0].update(path="features/../../secret"), ("path escape", "features/../../secret")),
        (lambda tree: tree["files"][0].update(path=".."), ("path escape", "..")),
        (lambda tree: tree["files"][0].update(path="/etc/passwd"), ("path escape", "/etc/passwd")),
        (lambda tree: tree["files"][0].update(path="..\\secret"), ("path escape", "..\\secret")),
        (lambda tree: tree["files"][0].update(path="C:secret"), ("path escape", "C:secret")),
        (lambda tree: tree["files"][0].update(path="README.md\0.h5"), ("path escape", "README.md\0.h5")),
        (lambda tree: tree["files"].append(tree["files"][0] | {"path": "readme.md"}), ("collision", "readme.md")),
        (
            lambda tree: tree["files"].extend(tree["files"][0] | {"path": path} for path in ("\u00e9", "e\u0301")),
            ("collision", "e\u0301"),
        ),
        (lambda tree: tree.update(format_version=2), ("unknown version", "manifest.json")),
        (lambda tree: tree.update(format_version="1"), ("unknown version", "manifest.json")),
        (lambda tree: tree.update(format_version=None), ("unknown version", "manifest.json")),
        (lambda tree: tree.update(format_version=[[2]]), ("unknown version", "manifest.json")),
        (lambda tree: tree["files"][0].update(path="README.md\n"), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(path="features/test/shard-00000.h5"), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(path="vault/ids.csv"), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(path="..." + "x" * 1000), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(path=1), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(path="\ud800"), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(role="secret"), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(role="shard"), ("schema", "manifest.json")),  # of README.md
        (lambda tree: tree["files"][0].update(sha256="0"), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(bytes=-1), ("schema", "manifest.json")),
        (lambda tree: tree["files"][0].update(bytes="20"), ("schema", "manifest.json")),
        (lambda tree: tree["files"].append([]), ("schema", "manifest.json")),
        (lambda tree: tree.update(files={"path": "README.md"}), ("schema", "manifest.json")),
        (lambda tree: tree.update(format="bagit"), ("schema", "manifest.json")),
        (lambda tree: tree.update(owner="me"), ("schema", "manifest.json")),
        (lambda tree: tree["splits"].update(test=3), ("schema", "manifest.json")),
    ],
)
def test_a_manifest_of_another_format_is_a_finding_of_its_kind(
    release: Path, change: Callable[[Any], Any], expected: tuple[str, str]
) -> None:
    edit_manifest(release, lambda tree: None)
    assert found_in(release) == set()
    edit_manifest(release, change)
    assert expected in found_in(release)
    assert found_in(release) <= {expected, ("schema", "manifest.json")}


def test_one_fault_is_told_once_and_several_all_at_once(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"][0].update(path="/etc/passwd"))
    assert found_in(release) == {("path escape", "/etc/passwd")}
    edit_manifest(release, lambda tree: tree["files"][1].update(path="../secret", bytes=-1))
    (release / "pipe").symlink_to("x")
    assert found_in(release) == {
        ("path escape", "/etc/passwd"),
        ("path escape", "../secret"),
        ("schema", "manifest.json"),
        ("link", "pipe"),
    }


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**6,
        b"[" * 10**5 + b"]" * 10**5,
        b'{"files":' * 10**5,
        b'{"files": [' + b"[]," * 10**6 + b"[]]}",
        b'{"classes": "' + b"x" * verification.MAX_BYTES + b'"}',
        b'{"files": ' + b"9" * 10**6 + b"}",
        b"",
        b"null",
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"format_version": 1' + b"0" * 5000 + b"}",
    ],
    ids=[
        "deep",
        "deep, closed",
        "deep objects",
        "many",
        "long",
        "digits",
        "empty",
        "null",
        "mark",
        "utf-16",
        "version",
    ],
)
def test_a_manifest_that_attacks_its_reader_is_a_finding(release: Path, content: bytes) -> None:
    (release / "manifest.json").write_bytes(content)
    assert found_in(release) == {("schema", "manifest.json")}
    assert isinstance(read_manifest(release), Problem)


DEAREST = """
import re
from pathlib import Path
from dpf_release.release import verify as verification
from dpf_release.core.bounded_json import MAX_BYTES, MAX_VALUES, bounded_json
from dpf_release.release.verify import parse_manifest

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

def many(opening, values, closing):
    return (opening + ",".join(values) + closing).encode()

half, whole = range(MAX_VALUES // 2 - 10), range(MAX_VALUES - 10)
before = peak()
for content in (
    many('{"files":[', ("[]" for _ in half), "]}"),
    many('{"files":[', ("{}" for _ in half), "]}"),
    many('{"classes":[', ("0" for _ in whole), "]}"),
    many("{", (f'"{n}":0' for n in whole), "}"),
    many('{"splits":{', (f'"{n}":0' for n in whole), "}}"),
    many('{"classes":[', (f'"{n:050}"' for n in whole), "]}"),
    many('{"name":"', ["\\\\u00e9" * (MAX_BYTES // 6 - 10)], '"}'),
):
    assert len(content) <= MAX_BYTES
    manifest, problems = parse_manifest(content)
    assert manifest is None and problems[0].kind == "schema" and "values" not in problems[0].detail
    assert len(str(problems[0])) < 5000
print(peak() - before)
verification.bounded_json = lambda content: bounded_json(content, 5 * MAX_VALUES)  # the control
parse_manifest(many('{"files":[', ("[]" for _ in range(MAX_VALUES * 5 // 2 - 10)), "]}"))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks of memory are read from Linux's /proc")
def test_the_dearest_manifests_that_are_parsed_take_less_than_512_mib(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DEAREST], capture_output=True, text=True, check=True, cwd=tmp_path)
    bounded, unbounded = map(int, done.stdout.split())
    print(f"{bounded} MiB; with five times as many values {unbounded} MiB")
    assert 16 < bounded < 512 < unbounded


def test_a_manifest_of_fifty_thousand_files_is_read(tmp_path: Path) -> None:
    record = {"sha256": "a" * 64, "bytes": 2**30, "role": "shard"}
    manifest = {
        "name": "large",
        "version": "1.0.0",
        "licence": "cc0-1.0",
        "task": "classification",
        "splits": {"train": 1},
        "files": [record | {"path": f"features/train/shard-{number:05d}.h5"} for number in range(50_000)],
    }
    content = json.dumps(manifest, indent=2, sort_keys=True).encode()
    read, problems = parse_manifest(content)
    assert problems == []
    assert read is not None
    assert len(read.files) == 50_000


# --------------------------------------------------------------------------------------------- the folder


def test_a_folder_of_very_many_entries_is_bounded(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MAX_ENTRIES", 40)
    assert verify(release) == []
    for number in range(100):
        (release / f"z{number}").touch()
    problems = verify(release)
    assert ("unexpected", ".") in {(problem.kind, problem.path) for problem in problems}
    assert len(problems) < 50


def test_a_deep_tree_is_not_followed_to_its_end(release: Path) -> None:
    place = os.open(release, os.O_RDONLY)
    for _ in range(2000):  # deeper than a path or a recursion can be
        os.mkdir("d", dir_fd=place)
        inner = os.open("d", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    assert len(verify(release)) == tree_module.MAX_DEPTH
    subprocess.run(["rm", "-rf", str(release / "d")], check=True)  # as pytest's own removal would not end
    assert verify(release) == []


@pytest.mark.parametrize("by", ["another file", "a link", "a pipe", "a folder behind a link", "a write"])
def test_what_is_exchanged_between_look_and_read_is_noticed(release: Path, by: str) -> None:
    (release.parent / "secret").write_bytes((release / SHARD).read_bytes())  # the same bytes: no digest tells

    def exchange() -> None:
        shard = release / SHARD
        if by == "a write":
            flip_bit(shard)
            flip_bit(shard)
        elif by == "a folder behind a link":
            shard.parent.rename(release.parent / "moved")
            shard.parent.symlink_to(release.parent / "moved")
        else:
            shard.unlink()
            if by == "another file":
                shutil.copy(release.parent / "secret", shard)
            elif by == "a link":
                shard.symlink_to(release.parent / "secret")
            else:
                os.mkfifo(shard)

    os.utime(release / SHARD, (1, 1))  # so that a write is seen, however coarse the clock of the disk
    waiting = [exchange]

    def digest(file: Any) -> str:
        while waiting:
            waiting.pop()()
        return digest_of(file)

    problems = verify(release, digest=digest)  # README.md is digested first
    assert [(problem.kind, problem.path) for problem in problems] == [("changed", SHARD)]
    assert not waiting


def test_a_file_that_is_written_to_while_it_is_read_is_noticed(release: Path) -> None:
    os.utime(release / SHARD, (1, 1))

    def digest(file: Any) -> str:
        found = digest_of(file)
        if file.name == "shard-00000.h5" and os.fstat(file.fileno()).st_ino == (release / SHARD).stat().st_ino:
            flip_bit(release / SHARD)
        return found

    assert [(p.kind, p.path) for p in verify(release, digest=digest)] == [("changed", SHARD)]


def test_sizes_alone_are_compared_where_no_digest_is_wanted(release: Path) -> None:
    flip_bit(release / SHARD)
    assert verify(release, digest=None) == []
    (release / SHARD).write_bytes(b"short")
    assert [problem.kind for problem in verify(release, digest=None)] == ["changed"]


def test_a_file_that_cannot_be_read_is_a_finding(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, parent: int | None = None) -> Any:
        if path == "README.md":
            raise PermissionError(13, "Permission denied")
        return tree_open(path, parent)

    tree_open = tree_module.open_plain
    monkeypatch.setattr(tree_module, "open_plain", refuse)
    assert [str(problem) for problem in verify(release)] == ["changed: README.md: cannot be read: Permission denied"]


def test_a_problem_is_shown_without_what_moves_a_terminal(release: Path) -> None:
    for name in ("\x1b[2Jgone", "two\nlines", "right\u202eleft"):
        (release / name).touch()
    shown = "\n".join(map(str, verify(release)))
    assert len(shown.splitlines()) == 3
    assert all(text in shown for text in ("\\x1b[2Jgone", "two\\nlines", "right\\u202eleft"))
    (release / "plain é").touch()
    assert "unexpected: plain é: " in "\n".join(map(str, verify(release)))


# --------------------------------------------------------------------------------------------- signatures


def test_a_signature_that_is_not_the_given_keys_is_bad(release: Path, public_key: Path, tmp_path: Path) -> None:
    other, _ = new_key(tmp_path / "other-key")
    bad = {("bad signature", "manifest.sig")}
    assert found_in(release, public_key) == set()
    assert found_in(release, other) == bad

    edit_manifest(release, lambda tree: tree.update(licence="mit"))
    assert found_in(release, public_key) == {*bad, SUMS_CHANGED}
    edit_manifest(release, lambda tree: tree.update(licence="cc0-1.0"))
    assert found_in(release, public_key) == set()

    # A stranger changes a file, describes it and signs it with a key of their own: a whole release, of someone else.
    flip_bit(release / SHARD)
    _describe_again(release)
    write_signature(release, read_private_key(tmp_path / "other-key"))
    assert found_in(release) == set()
    assert found_in(release, public_key) == bad

    for name in ("manifest.sig", "signer.pub.pem"):
        (release / name).unlink()
    assert found_in(release) == set()
    assert found_in(release, public_key) == bad


@pytest.mark.parametrize(
    ("damage", "unasked", "asked"),
    [
        (lambda r: (r / "manifest.sig").unlink(), {("missing", "manifest.sig")}, True),
        (lambda r: (r / "signer.pub.pem").unlink(), {("missing", "signer.pub.pem")}, False),
        (lambda r: (r / "manifest.sig").write_bytes(b""), {("bad signature", "manifest.sig")}, True),
        (lambda r: (r / "manifest.sig").write_bytes(b"0" * 65), {("bad signature", "manifest.sig")}, True),
        (lambda r: (r / "manifest.sig").write_bytes(b"0" * 10**6), {("schema", "manifest.sig")}, True),
        (lambda r: (r / "signer.pub.pem").write_text("no key"), {("bad signature", "signer.pub.pem")}, False),
        (
            lambda r: (r / "signer.pub.pem").write_text("\n" + (r / "signer.pub.pem").read_text()),
            {("bad signature", "signer.pub.pem")},
            False,
        ),
        (lambda r: _link(r, "manifest.sig"), {("link", "manifest.sig"), ("missing", "manifest.sig")}, True),
    ],
)
def test_signature_and_key_are_checked_against_each_other_whoever_asks(
    release: Path, public_key: Path, damage: Callable[[Path], Any], unasked: set[tuple[str, str]], asked: bool
) -> None:
    damage(release)
    assert found_in(release) == unasked
    assert found_in(release, public_key) == unasked | ({("bad signature", "manifest.sig")} if asked else set())


# --------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("with_key", [True, False], ids=["public key given", "no public key"])
def test_one_flipped_bit_in_each_of_1000_copies_is_detected(release: Path, public_key: Path, with_key: bool) -> None:
    """Flipped in place, and back. Files are drawn alike, so that the small ones are hit too."""
    names = [*FILES, "manifest.json", "SHA256SUMS", "manifest.sig", "signer.pub.pem"]
    draw = random.Random(2026)
    given = public_key if with_key else None
    detected: Counter[str] = Counter()
    flipped: Counter[str] = Counter()
    for _ in range(1000):
        name = draw.choice(names)
        bit = draw.randrange((release / name).stat().st_size * 8)
        flip_bit(release / name, bit)
        flipped[name] += 1
        detected[name] += bool(verify(release, given))
        flip_bit(release / name, bit)
    assert verify(release, given) == []  # the control: nothing is found where nothing is flipped
    print(f"{detected.total()} of {flipped.total()} flipped bits detected; by file: {dict(flipped)}")
    assert len(flipped) == len(names)
    assert detected == flipped
    assert detected.total() == 1000


@pytest.mark.parametrize("name", ["manifest.sig", "signer.pub.pem"])
def test_every_bit_of_signature_and_key_counts(release: Path, public_key: Path, name: str) -> None:
    bits = (release / name).stat().st_size * 8
    silent = []
    for bit in range(bits):
        flip_bit(release / name, bit)
        silent += [bit] * (not verify(release))
        flip_bit(release / name, bit)
    assert bits > 500
    assert silent == []


# --------------------------------------------------------------------------------------------- all of it


def test_every_kind_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    kinds = typing.get_args(Kind)
    assert len(kinds) >= 14
    assert [kind for kind in kinds if f"| {kind} |" not in text] == []


def test_verification_needs_no_torch(release: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dpf_release.release.verify import verify; "
        "print(len(verify(Path(sys.argv[1]))), 'pydantic' in sys.modules, 'torch' in sys.modules)"
    )
    (release / "README.md").unlink()
    done = subprocess.run([sys.executable, "-c", code, str(release)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True", "False"]
