"""The manifest of a release, and the check of a folder against it. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpf_release.schema import read_json
from dpf_release.storage import PUBLIC_FILE, sha256_of, write_json, write_text

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
MAX_BYTES = 16 * 2**20

Role = Literal["card", "model-record", "featurizer", "classifier", "bank-index", "shard"]
# What a finding is; the last three are of what a file holds (`structure`).
Kind = Literal["missing", "unexpected", "changed", "link", "schema", "structure", "values", "limit"]
# The whole of what a release may hold: a path that fits none of these is never published.
ROLES: dict[str, Role] = {
    r"README\.md": "card",
    r"model/model\.json": "model-record",
    r"model/featurizer\.safetensors": "featurizer",
    r"model/classifier\.safetensors": "classifier",
    r"features/index\.json": "bank-index",
    r"features/(train|val)/shard-[0-9]{5}\.h5": "shard",
}
ReleasePath = Annotated[str, Field(pattern=r"^(?:" + "|".join(ROLES) + r")$")]


def role_of(path: str) -> Role | None:
    """The role of a path inside a release, `None` for one that has no place there."""
    return next((role for pattern, role in ROLES.items() if re.fullmatch(pattern, path)), None)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """One public file."""

    path: ReleasePath
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]
    role: Role

    @model_validator(mode="after")
    def _has_the_role_of_its_path(self) -> FileRecord:
        if self.role != role_of(self.path):
            raise ValueError(f"{self.path} has the role {role_of(self.path)}, not {self.role}")
        return self


class Claims(_Record):
    """What a release promises, and what it does not; made claims have passed the gate."""

    made: tuple[str, ...] = ()
    not_made: tuple[str, ...] = ("reconstruction", "linkage", "attribute")


class Manifest(_Record):
    """`manifest.json`: every other file but `SHA256SUMS`, and what the release is."""

    format: Literal["dpf-release"] = "dpf-release"
    format_version: Literal[1] = 1
    name: str
    version: str
    previous: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    licence: str
    task: Literal["classification", "regression"]
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    splits: dict[Literal["train", "val"], int]
    claims: Claims = Claims()
    files: tuple[FileRecord, ...]


def describe_files(folder: Path) -> tuple[FileRecord, ...]:
    """Every file below a folder but the manifest and its sums, sorted by path.

    Raises:
        ValueError: a file has no role in a release.
    """
    records = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name in {MANIFEST, SUMS}:
            continue
        role = role_of(name)
        if role is None:
            raise ValueError(f"{name} has no role in a release")
        records.append(FileRecord(path=name, sha256=sha256_of(path), bytes=path.stat().st_size, role=role))
    return tuple(records)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """`manifest.json`, and `SHA256SUMS` over it and every file it lists."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"), PUBLIC_FILE)
    write_text(folder / SUMS, _sums(manifest, sha256_of(folder / MANIFEST)), PUBLIC_FILE)


def _sums(manifest: Manifest, manifest_sha256: str) -> str:
    digests = {record.path: record.sha256 for record in manifest.files} | {MANIFEST: manifest_sha256}
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))


@dataclass(frozen=True)
class Problem:
    """One finding of `verify`."""

    kind: Kind
    path: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}: {self.detail}"


def read_manifest(folder: Path) -> Manifest | Problem:
    """The manifest of a release, or what is wrong with it."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        return Problem("missing", MANIFEST, f"{folder} is not a release, or not a whole one")
    try:
        return read_json(path, Manifest)
    except (OSError, ValueError) as error:
        return Problem("schema", MANIFEST, str(error))


def verify(folder: Path, digest: Callable[[Path], str] | None = sha256_of) -> list[Problem]:
    """All differences between a release folder and its manifest; none: the files are those that were published.

    Integrity only: who published them is not checked.

    Args:
        folder: the release.
        digest: of a file; by default its bytes are read. None: sizes are compared only.
    """
    manifest = read_manifest(folder)
    if isinstance(manifest, Problem):
        return [manifest]
    problems: list[Problem] = []
    listed = {record.path: record for record in manifest.files}
    if len(listed) != len(manifest.files):
        problems.append(Problem("schema", MANIFEST, "lists a path twice"))
    folders = {parent.as_posix() for path in listed for parent in Path(path).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            problems.append(Problem("link", name, "a release holds no links"))
        elif path.is_dir():
            if name not in folders:
                problems.append(Problem("unexpected", name, "a folder that the manifest does not know"))
        elif name not in listed and name not in {MANIFEST, SUMS}:
            problems.append(Problem("unexpected", name, "not in the manifest"))
    for name, record in listed.items():
        problems += _compare(folder / name, record, digest)
    sums = folder / SUMS
    if sums.is_symlink() or not sums.is_file():
        problems.append(Problem("missing", SUMS, "listed files cannot be checked with sha256sum"))
    elif sums.stat().st_size > MAX_BYTES or sums.read_bytes() != _sums(manifest, sha256_of(folder / MANIFEST)).encode():
        problems.append(Problem("changed", SUMS, "does not say what the manifest says"))
    return problems


def _compare(path: Path, record: FileRecord, digest: Callable[[Path], str] | None) -> list[Problem]:
    if path.is_symlink():
        return []  # reported as a link; never followed
    if not path.is_file():
        return [Problem("missing", record.path, "listed in the manifest, not in the folder")]
    size = path.stat().st_size
    if size != record.bytes:
        return [Problem("changed", record.path, f"expected {record.bytes} bytes, found {size}")]
    if digest is not None and digest(path) != record.sha256:
        return [Problem("changed", record.path, "expected another SHA-256")]
    return []
