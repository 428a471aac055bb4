"""`verify`: a release folder against its manifest, byte by byte, without trusting either. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import ValidationError

from dpf_release.core.bounded_json import MAX_BYTES, RepeatedKeyError, bounded_json, faults
from dpf_release.core.files import digest_of
from dpf_release.errors import SigningError
from dpf_release.release.manifest import MANIFEST, SIGNATURE, SIGNER, SUMS, UNLISTED, Manifest, sums_of
from dpf_release.release.signing import MAX_KEY_BYTES, is_signed, parse_public_key, public_pem, read_public_key
from dpf_release.release.tree import Tree, open_plain

MAX_NAME = 255
MAX_FAULTS = 10_000

Kind = Literal[
    Literal["missing", "unexpected", "changed", "link", "hard link", "special file", "path escape", "collision"],
    Literal["duplicate", "bad signature", "unknown version", "schema", "hidden file", "empty folder"],
    Literal["structure", "values", "limit"],  # of what a file holds (`contents`)
    # What `leaks` finds, which compares a release with the vault that it came from.
    Literal["private text", "private tensor", "private row", "source order", "telling id"],
]
Digest = Callable[[io.FileIO], str]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Problem:
    """One finding of `verify`, or of `leaks`; its text shows a stranger's words escaped."""

    kind: Kind  # `docs/verification.md` says what each means
    path: str  # inside the release, as it was found
    detail: str  # what was expected, and what was found

    def __str__(self) -> str:
        # A name may hold what moves a terminal's cursor, or bytes that are no text.
        text = f"{self.kind}: {self.path}: {self.detail}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def verify(folder: Path, public_key: Path | None = None, digest: Digest | None = digest_of) -> list[Problem]:
    """All differences between a release folder and its manifest; none: the files are those that were published.

    Every file is read once, none is followed to somewhere else. Without a public key this is integrity only: who
    published the files is unknown, whatever key the release itself brings.

    Args:
        folder: the release; it may be reached through a link.
        public_key: the owner's, as PEM, from where the owner is trusted; the manifest must be signed with it.
        digest: SHA-256 of an open file, hexadecimal; by default its bytes are read. None: sizes are compared only.

    Raises:
        SigningError: `public_key` is no Ed25519 key, or lies in the release.

    Example:
        >>> from pathlib import Path
        >>> from dpf_release import verify
        >>> verify(Path("my-release/release"))
        []
    """
    trusted = None if public_key is None else read_public_key(public_key, folder)
    with contextlib.ExitStack() as stack:
        try:
            tree = stack.enter_context(Tree.open(folder))
        except OSError as error:
            return [Problem("missing", MANIFEST, f"{folder} is not a folder that can be read: {error.strerror}")]
        check = _Check(tree)
        if MANIFEST in tree.entries:
            check.names()
            check.contents(digest)
            check.sums()
            check.signature(trusted)
        return check.problems


def read_manifest(folder: Path) -> Manifest | Problem:
    """The manifest of a release, or what is wrong with it; no other file is looked at."""
    try:
        with open_plain(folder / MANIFEST) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        return Problem("missing", MANIFEST, f"{folder} is not a release, or not a whole one: {error.strerror}")
    manifest, problems = parse_manifest(content)
    return manifest or problems[0]


# --------------------------------------------------------------------------------------------- what the manifest says


def parse_manifest(content: bytes) -> tuple[Manifest | None, list[Problem]]:
    """The manifest that the bytes of `manifest.json` hold, None where they hold none, and all that is wrong with it."""
    try:
        tree = bounded_json(content)
    except RepeatedKeyError as error:
        return None, [Problem("duplicate", MANIFEST, f"{error}: {error.key[:MAX_NAME]}; no file was compared")]
    except ValueError as error:
        return None, [Problem("schema", MANIFEST, str(error))]
    fields = tree if isinstance(tree, dict) else {}
    version = fields.get("format_version", 1)
    if version != 1:
        shown = str(version)[:20] if isinstance(version, int | float | str) else "something else"
        detail = f"expected format_version 1, found {shown}; a newer dpf-release may read it"
        return None, [Problem("unknown version", MANIFEST, detail)]
    paths = _path_problems(fields.get("files"))
    try:
        return Manifest.model_validate_json(content, strict=True), list(paths.values())
    except ValidationError as error:
        if error.error_count() > MAX_FAULTS:  # each takes a kilobyte to tell
            told = f"{error.error_count()} faults"
        else:
            told = faults(error, {("files", number, "path") for number in paths})
        schema = [Problem("schema", MANIFEST, f"{told}; no file was compared")] if told else []
        return None, [*paths.values(), *schema]


def _path_problems(files: Any) -> dict[int, Problem]:
    """Listed paths that are dangerous, by their place in the list; that each has a role is asked of the rest only."""
    found: dict[int, Problem] = {}
    seen: dict[str, str] = {}
    for number, record in enumerate(files if isinstance(files, list) else []):
        path = record.get("path") if isinstance(record, dict) else None
        if not isinstance(path, str):
            continue
        if re.search(r"^/|^[A-Za-z]:|\\|(^|/)\.\.(/|\Z)|\0", path):
            found[number] = Problem("path escape", path[:MAX_NAME], "the manifest lists a path that leaves the release")
        elif len(path) <= MAX_NAME:  # normalising takes quadratic time; longer ones have no role anyway
            other = seen.get(_caseless(path))
            if other == path:
                found[number] = Problem("duplicate", path, "the manifest lists it twice")
            elif other is not None:
                found[number] = Problem("collision", path, f"the manifest lists {other} too: one file on some systems")
            seen.setdefault(_caseless(path), path)
    return found


# --------------------------------------------------------------------------------------------- what the folder holds


class _Check:
    """A release that is looked at; each method adds what it finds to `problems`."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.problems: list[Problem] = []
        self.content = self._read(MANIFEST, MAX_BYTES)
        self.manifest: Manifest | None = None
        if self.content is not None:
            self.manifest, self.problems = parse_manifest(self.content)
        self.listed = {record.path for record in self.manifest.files} if self.manifest else set()
        if "." in tree.unseen:
            self._add("unexpected", ".", tree.unseen["."])

    def _add(self, kind: Kind, path: str, detail: str) -> None:
        self.problems.append(Problem(kind, path, detail))

    def names(self) -> None:
        """That everything in the folder is a plain file that belongs there, or a folder of such files."""
        entries, unseen = self.tree.entries, self.tree.unseen
        files = self.listed | UNLISTED
        folders = {folder for path in self.listed for folder in _folders_of(path)}
        filled = {path.rpartition("/")[0] for path in entries}
        inside = Counter((status.st_dev, status.st_ino) for status in entries.values())
        first = {_caseless(path): path for path in files | folders}
        for path, status in entries.items():
            other, mode = first.setdefault(_caseless(path), path), status.st_mode
            names = inside[status.st_dev, status.st_ino]
            if stat.S_ISLNK(mode):
                self._add("link", path, "a release holds no links; this one was not followed")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                self._add("special file", path, "a pipe, socket or device; it was not opened")
            elif path in unseen:
                self._add("unexpected", path, unseen[path])
            elif stat.S_ISDIR(mode) and path not in filled:
                self._add("empty folder", path, "a release holds no empty folders")
            elif path not in (folders if stat.S_ISDIR(mode) else files):
                self._stranger(path, other)
            if stat.S_ISREG(mode) and status.st_nlink > names:
                detail = f"has {status.st_nlink} names, {names} of them in the release: copy the file"
                self._add("hard link", path, detail)

    def _stranger(self, path: str, other: str) -> None:
        if other != path:
            detail = f"differs from {other} in case or Unicode form alone: one file on some systems"
            self._add("collision", path, detail)
        elif any(name.startswith(".") for name in path.split("/")):
            self._add("hidden file", path, "not in the manifest, and not shown by many programs")
        elif self.manifest is not None:
            self._add("unexpected", path, "not in the manifest")

    def contents(self, digest: Digest | None) -> None:
        """That every listed file is there, and is the one that was published."""
        entries = self.tree.entries
        plain = {path for path, status in entries.items() if stat.S_ISREG(status.st_mode)}
        blocked = set(self.tree.unseen) | {
            path for path, status in entries.items() if path not in plain and not stat.S_ISDIR(status.st_mode)
        }
        for record in self.manifest.files if self.manifest else ():
            path = record.path
            if path not in plain:
                # Where it, or a folder on the way to it, is a link or was not looked into, that is the finding.
                if path not in blocked and blocked.isdisjoint([".", *_folders_of(path)]):
                    self._add("missing", path, "listed in the manifest, not in the folder")
            elif entries[path].st_size != record.bytes:
                self._add("changed", path, f"expected {record.bytes} bytes, found {entries[path].st_size}")
            elif digest is not None and self._of_file(path, digest) not in {record.sha256, None}:
                self._add("changed", path, "expected another SHA-256")

    def _of_file(self, path: str, look: Callable[[io.FileIO], Found]) -> Found | None:
        """What is seen in a file that is there; None where it cannot be read, which is a finding."""
        try:
            with self.tree.file(path) as file:
                return look(file)
        except OSError as error:
            self._add("changed", path, f"cannot be read: {error.strerror}")
            return None

    def _read(self, name: str, limit: int) -> bytes | None:
        """What a small file of the release's root holds; None where that is a finding."""
        status = self.tree.entries.get(name)
        if status is None or not stat.S_ISREG(status.st_mode):
            self._add("missing", name, f"expected a file {name}, found none")
            return None
        if status.st_size > limit:
            self._add("schema", name, f"expected at most {limit} bytes, found {status.st_size}")
            return None
        return self._of_file(name, lambda file: file.read(limit))

    def sums(self) -> None:
        """That `SHA256SUMS` says what the manifest says, of the manifest too."""
        if self.content is None or self.manifest is None:
            return
        expected = sums_of(self.manifest, hashlib.sha256(self.content).hexdigest()).encode()
        if self._read(SUMS, MAX_BYTES) not in {expected, None}:
            self._add("changed", SUMS, "does not say what the manifest says")

    def signature(self, trusted: Ed25519PublicKey | None) -> None:
        """That signature and key are both there or both not, fit each other, and are those of the trusted key."""
        signature = signer = None
        if not self.tree.entries.keys().isdisjoint({SIGNATURE, SIGNER}):
            signature, signer = self._read(SIGNATURE, MAX_KEY_BYTES), self._read(SIGNER, MAX_KEY_BYTES)
        if trusted is not None and not is_signed(self.content, signature, trusted):
            found = "found none" if signature is None else "found another"
            self._add("bad signature", SIGNATURE, f"expected one of this manifest by the given public key, {found}")
        if signer is None:
            return
        try:
            key = parse_public_key(signer)
        except SigningError as error:
            self._add("bad signature", SIGNER, str(error))
            return
        if public_pem(key) != signer:
            self._add("bad signature", SIGNER, "not written as `package` writes a key")
        if signature is not None and not is_signed(self.content, signature, key):
            self._add("bad signature", SIGNATURE, f"not one of this manifest by the key in {SIGNER}")


def _folders_of(path: str) -> list[str]:
    """The folders that a path lies in."""
    return [str(folder) for folder in PurePosixPath(path).parents[:-1]]


def _caseless(path: str) -> str:
    """What names have in common that some file systems take for one: whatever their case, composed or not."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
