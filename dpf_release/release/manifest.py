"""The manifest of a release: what it says, which files have a place, and how it is written. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from dpf_release.core.bounded_json import Record, Sha256
from dpf_release.core.files import PUBLIC_FILE, sha256_of, write_json, write_text
from dpf_release.core.privacy import Mechanism

ATTACK_REPORT, BANK_INDEX = "reports/attack.json", "features/index.json"
MODEL, FEATURIZER, CLASSIFIER = "model/model.json", "model/featurizer.safetensors", "model/classifier.safetensors"
PROCEDURE = "model/procedure.safetensors"  # what rows were drawn with, where they were: made from public images alone
MANIFEST, SUMS, SIGNATURE, SIGNER = "manifest.json", "SHA256SUMS", "manifest.sig", "signer.pub.pem"
UNLISTED = frozenset({MANIFEST, SUMS, SIGNATURE, SIGNER})  # by the manifest, whose bytes they depend on

# In the order in which files are looked at: records before what they describe.
Role = Literal[
    "card", "croissant", "model-record", "bank-index", "attack-report", "featurizer", "classifier", "procedure", "shard"
]
ROLE_ORDER: tuple[Role, ...] = get_args(Role)
# The whole of what a release may hold: a path that fits none of these is never published.
ROLES: dict[str, Role] = {
    r"README\.md": "card",
    r"croissant\.json": "croissant",
    r"model/model\.json": "model-record",
    r"model/featurizer\.safetensors": "featurizer",
    r"model/classifier\.safetensors": "classifier",
    r"model/procedure\.safetensors": "procedure",
    r"features/index\.json": "bank-index",
    r"reports/attack\.json": "attack-report",
    r"features/(train|val)/shard-[0-9]{5}\.h5": "shard",
}
ReleasePath = Annotated[str, Field(pattern=r"^(?:" + "|".join(ROLES) + r")$")]


def role_of(path: str) -> Role | None:
    """The role of a path inside a release, `None` for one that has no place there."""
    return next((role for pattern, role in ROLES.items() if re.fullmatch(pattern, path)), None)


def role_in_release(path: str) -> str:
    """As `role_of`, also for the files that the manifest does not list; `none` where a path has no place."""
    unlisted = {MANIFEST: "manifest", SUMS: "checksums", SIGNATURE: "signature", SIGNER: "signature"}
    return unlisted.get(path) or role_of(path) or "none"


class FileRecord(Record):
    """One public file."""

    path: ReleasePath
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]
    role: Role

    @model_validator(mode="after")
    def _has_the_role_of_its_path(self) -> FileRecord:
        if self.role != role_of(self.path):
            raise ValueError(f"{self.path} has the role {role_of(self.path)}, not {self.role}")
        return self


class Claims(Record):
    """What a release promises, and what it does not; made claims have passed the gate.

    `bound` is in neither where the function has no mechanism that could be one.
    """

    made: tuple[str, ...] = ()
    not_made: tuple[str, ...] = ("reconstruction", "linkage", "attribute")


class Manifest(Record):
    """`manifest.json`: every other file but its sums and signature, and what the release is.

    `privacy` is there where its rows were made with noise of a known privacy (docs/privacy.md).
    """

    format: Literal["dpf-release"] = "dpf-release"
    format_version: Literal[1] = 1
    name: str
    version: str
    previous: Sha256 | None = None
    licence: str
    task: Literal["classification", "regression"]
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    splits: dict[Literal["train", "val"], int]
    claims: Claims = Claims()
    privacy: Mechanism | None = None
    files: tuple[FileRecord, ...]

    def of_role(self, *roles: Role) -> dict[str, FileRecord]:
        """The files of these roles by path: role by role, as they are named here, by default all in `ROLE_ORDER`."""
        return {file.path: file for role in roles or ROLE_ORDER for file in self.files if file.role == role}


def describe_files(folder: Path) -> tuple[FileRecord, ...]:
    """Every file below a folder but the manifest, its sums and its signature, sorted by path; as `describe_file`."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return tuple(describe_file(folder, name) for name in names if name not in UNLISTED)


def describe_file(folder: Path, name: str) -> FileRecord:
    """One file of a release; `ValueError` where it has no role in one."""
    role, path = role_of(name), folder / name
    if role is None:
        raise ValueError(f"{name} has no role in a release")
    return FileRecord(path=name, sha256=sha256_of(path), bytes=path.stat().st_size, role=role)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """`manifest.json`, and `SHA256SUMS` over it and every file it lists."""
    left_out = None if manifest.privacy else {"privacy"}  # as it was before there were mechanisms
    write_json(folder / MANIFEST, manifest.model_dump(mode="json", exclude=left_out), PUBLIC_FILE)
    write_text(folder / SUMS, sums_of(manifest, sha256_of(folder / MANIFEST)), PUBLIC_FILE)


def sums_of(manifest: Manifest, manifest_sha256: str) -> str:
    """`SHA256SUMS`, as `sha256sum` reads it: the manifest and every file that it lists, sorted by path."""
    digests = {record.path: record.sha256 for record in manifest.files} | {MANIFEST: manifest_sha256}
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))
