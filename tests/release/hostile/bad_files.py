"""Kinds of bad release: files and names, the manifest, the sums."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from corpus import CLASSIFIER, FIRST, PLANTED, SECOND, edit_manifest, poke, secret, sparse, tampered, write_sums
from dpf_release.release.manifest import MANIFEST, SUMS


def _card_missing(release: Path) -> None:
    (release / "README.md").unlink()


@tampered("missing")
def _shard_missing(release: Path) -> None:
    (release / FIRST).unlink()


@tampered("missing")
def _shard_renamed(release: Path) -> None:
    (release / FIRST).rename(release / "features/train/shard-00009.h5")


@tampered("unexpected")
def _file_added(release: Path) -> None:
    (release / "model/dpf.safetensors").write_bytes(PLANTED)


@tampered("unexpected")
def _shard_added(release: Path) -> None:
    shutil.copy(release / FIRST, release / "features/train/shard-00002.h5")


@tampered("unexpected", "hidden file")
def _gitignore_added(release: Path) -> None:
    (release / ".gitignore").write_text("*\n")


@tampered("unexpected", "hidden file")
def _poisoning_function_in_dot_git(release: Path) -> None:
    (release / ".git").mkdir()
    (release / ".git/dpf.pt").write_bytes(PLANTED)


@tampered("unexpected", "empty folder")
def _empty_folder_added(release: Path) -> None:
    (release / "features/test").mkdir()


@tampered("changed")
def _bit_flipped(release: Path) -> None:
    poke(release / FIRST, 3000, b"\x01")


@tampered("changed")
def _file_emptied(release: Path) -> None:
    (release / CLASSIFIER).write_bytes(b"")


@tampered("link")
def _link_to_a_file_inside(release: Path) -> None:
    (release / SECOND).unlink()
    (release / SECOND).symlink_to("shard-00000.h5")


@tampered("link")
def _link_to_a_secret(release: Path) -> None:
    (release / "README.md").unlink()
    (release / "README.md").symlink_to(secret(release))


@tampered("link")
def _linked_folder(release: Path) -> None:
    (release / "features").rename(release.parent / "elsewhere")
    (release / "features").symlink_to(release.parent / "elsewhere")


@tampered("link")
def _links_in_a_circle(release: Path) -> None:
    (release / "a").symlink_to("b")
    (release / "b").symlink_to("a")


@tampered("link", "missing")
def _manifest_linked(release: Path) -> None:
    (release / MANIFEST).rename(release.parent / "manifest")
    (release / MANIFEST).symlink_to(release.parent / "manifest")


@tampered("hard link")
def _hard_link_out(release: Path) -> None:
    os.link(release / FIRST, release.parent / "outside")


@tampered("missing", "special file")
def _pipe_for_a_shard(release: Path) -> None:
    (release / FIRST).unlink()
    os.mkfifo(release / FIRST)


@tampered("missing", "special file")
def _pipe_for_the_manifest(release: Path) -> None:
    (release / MANIFEST).unlink()
    os.mkfifo(release / MANIFEST)


@tampered("unexpected", "special file")
def _socket_added(release: Path) -> None:
    folder = os.open(release, os.O_RDONLY)
    try:  # a socket's own path must be short
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(f"/proc/self/fd/{folder}/s")
    finally:
        os.close(folder)


@tampered("missing", "unexpected")
def _folder_for_a_shard(release: Path) -> None:
    (release / FIRST).unlink()
    (release / FIRST).mkdir()


@tampered("unexpected", "collision")
def _same_name_in_another_case(release: Path) -> None:
    (release / "readme.MD").write_text("# Another card\n")


@tampered("unexpected", "collision")
def _same_name_in_another_unicode_form(release: Path) -> None:
    (release / "caf\u00e9").touch()
    (release / "cafe\u0301").touch()


@tampered("unexpected")
def _name_that_is_no_text(release: Path) -> None:
    Path(os.fsdecode(os.fsencode(release) + b"/\xff\x1b[2J")).touch()


# --------------------------------------------------------------------------------------------- manifest and sums


@tampered("missing")
def _manifest_missing(release: Path) -> None:
    (release / MANIFEST).unlink()


@tampered("schema")
def _manifest_is_not_json(release: Path) -> None:
    (release / MANIFEST).write_bytes(b"\xff{")


@tampered("schema")
def _manifest_of_a_million_levels(release: Path) -> None:
    (release / MANIFEST).write_bytes(b"[" * 10**6 + b"]" * 10**6)


@tampered("schema")
def _manifest_of_a_hundred_thousand_levels(release: Path) -> None:
    (release / MANIFEST).write_bytes(b'{"a":' * 10**5 + b"1" + b"}" * 10**5)


@tampered("schema")
def _manifest_of_a_gibibyte(release: Path) -> None:
    sparse(release / MANIFEST)


@tampered("schema")
def _manifest_of_millions_of_values(release: Path) -> None:
    (release / MANIFEST).write_text('{"classes": [' + ",".join(["1"] * 7_000_000) + "]}")


@tampered("schema", "unknown version")
def _manifest_with_a_huge_number(release: Path) -> None:
    text = (release / MANIFEST).read_text()
    (release / MANIFEST).write_text(text.replace('"format_version": 1', '"format_version": 1' + "0" * 100_000))


@tampered("schema", "path escape")
def _manifest_lists_a_path_outside(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"][0].update(path="../secret"))


@tampered("schema", "path escape")
def _manifest_lists_an_absolute_path(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"][0].update(path=str(secret(release))))


@tampered("schema")
def _manifest_gives_a_file_another_role(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"][0].update(role="shard"))


@tampered("schema", "duplicate")
def _manifest_lists_a_file_twice(release: Path) -> None:
    edit_manifest(release, lambda tree: tree["files"].append(tree["files"][0]))


@tampered("duplicate")
def _manifest_with_a_key_twice(release: Path) -> None:
    text = (release / MANIFEST).read_text()
    (release / MANIFEST).write_text(text.replace('"licence": ', '"licence": "mit", "licence": '))
    write_sums(release)


@tampered("schema", "unknown version")
def _manifest_of_another_version(release: Path) -> None:
    edit_manifest(release, lambda tree: tree.update(format_version=2))


@tampered("changed")
def _sums_edited(release: Path) -> None:
    (release / SUMS).write_text((release / SUMS).read_text() + "\n")


@tampered("missing")
def _sums_missing(release: Path) -> None:
    (release / SUMS).unlink()


@tampered("changed", "schema")
def _sums_of_a_gibibyte(release: Path) -> None:
    sparse(release / SUMS)
