"""The checks of an audit: what each proves, what it cannot see, and what does it.

One more check is one more entry of `CHECKS`. They run in that order; no check opens a file that failed one before it.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from safetensors import SafetensorError

from dpf_release.audit.contents import tensor_shapes
from dpf_release.bank import (
    INDEX,
    BankIndex,
    FeatureBank,
    ShardRecord,
    check_shard,
    load_blosc2,
    open_shard,
    read_index,
)
from dpf_release.errors import (
    BankError,
    ConfigError,
    DPFReleaseError,
    HookError,
    ImageError,
    VaultError,
    VerificationError,
    WeightsError,
)
from dpf_release.manifest import MANIFEST, MAX_BYTES, FileRecord, Manifest, verify
from dpf_release.near_rows import SAME_ROW_COSINE, count_near_rows
from dpf_release.pipeline.project import Project
from dpf_release.record import read_model_record
from dpf_release.release import Release
from dpf_release.storage import LOCK
from dpf_release.vault import read_record

Side = Literal["public", "private"]
Status = Literal["passed", "failed", "not run"]
LONGEST_DETAIL = 1000
BANK = ("bank-index", "shard")
WEIGHTS = ("featurizer", "classifier")


class NotRunError(DPFReleaseError):
    """A check has nothing to look at; the message says what it lacks."""


# Errors of the owner's side: those of a stranger's files are findings.
VAULT_LACKS = (NotRunError, VaultError, ConfigError, ImageError, HookError, WeightsError)


class FoundProblem(Protocol):
    """What a check gives back: a `manifest.Problem`, or a `Finding`."""

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def path(self) -> str: ...  # noqa: D102

    @property
    def detail(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Finding:
    """Something that must not be.

    Attributes:
        kind: in a word or two.
        path: of the file or folder, inside the release (or the vault, for a check of the vault).
        detail: what was expected and found.
    """

    kind: str
    path: str
    detail: str


@dataclass(frozen=True)
class Subject:
    """What is audited, and what is known of it so far.

    Attributes:
        release: the folder, resolved.
        manifest: of the release; None where it cannot be read.
        project: of the vault, where one was given.
        public_key: of the signer, where one was given.
        unsound: paths in the release that failed a check.
    """

    release: Path
    manifest: Manifest | None
    project: Project | None = None
    public_key: Path | None = None
    unsound: frozenset[str] = frozenset()

    def after(self, result: Result) -> Subject:
        """The subject as the next check finds it."""
        return replace(self, unsound=self.unsound | (result.paths if result.check.side == "public" else set()))

    def is_sound(self, path: str) -> bool:
        """Whether a file is listed, and neither it nor a folder above it failed a check."""
        return path in self.files and self.unsound.isdisjoint(lineage(path))

    @cached_property
    def files(self) -> dict[str, FileRecord]:
        """The files that the manifest lists, by path."""
        return {record.path: record for record in self.manifest.files} if self.manifest else {}

    @property
    def owners(self) -> Project:
        """The project of the vault.

        Raises:
            NotRunError: none was given.
        """
        if self.project is None:
            raise NotRunError("no vault was given (--vault)")
        return self.project

    def refuse_gaps(self, paths: Iterable[str]) -> None:
        """That all of these can be opened.

        Raises:
            NotRunError: there is no manifest, one of them is missing, or failed a check.
        """
        if self.manifest is None:
            raise NotRunError("the release has no manifest that can be read")
        unsound = next((path for path in paths if not self.is_sound(path)), None)
        if unsound:
            raise NotRunError(f"{unsound} is missing or failed a check before this one, and is not opened")

    @property
    def bank(self) -> BankIndex:
        """The index of the public bank, all of whose files can be opened.

        Raises:
            NotRunError: one of them failed a check, or the manifest lists others.
        """
        shards = {path for path, record in self.files.items() if record.role == "shard"}
        self.refuse_gaps([f"features/{INDEX}", *sorted(shards)])
        index = read_index(self.release / "features")
        if {f"features/{shard.file}" for part in index.splits.values() for shard in part} != shards:
            raise NotRunError("the bank's index lists other shards than the manifest")
        return index

    def without_folders(self, text: str) -> str:
        """A message without the places of release, vault and project on this machine, in one line of bounded length."""
        text = text.replace(str(self.release), "the release")
        if self.project is not None:
            text = text.replace(str(self.project.vault.root), "the vault")
            text = text.replace(str(self.project.config.folder), "the project")
        text = " ".join(text.split())
        return text if len(text) <= LONGEST_DETAIL else text[:LONGEST_DETAIL] + " ..."


@dataclass(frozen=True)
class Check:
    """One line of the table of checks.

    Attributes:
        name: in one word; stable, as it is in the JSON.
        proves: what is so where the check passes; one sentence.
        cannot_see: what may be wrong all the same; one sentence.
        advice: what to do where it finds something.
        run: all problems of a subject. Raises `NotRunError` where it has nothing to look at.
        roles: of the files that it looks at; empty: at none, or at the vault's.
        side: where the paths of its findings lie.
    """

    name: str
    proves: str
    cannot_see: str
    advice: str
    run: Callable[[Subject], Iterable[FoundProblem]]
    roles: tuple[str, ...] = ()
    side: Side = "public"


@dataclass(frozen=True)
class Result:
    """What a check gave.

    Attributes:
        check: which.
        findings: in the order in which they were found.
        reason: why it was not run; empty where it was.
    """

    check: Check
    findings: tuple[Finding, ...] = ()
    reason: str = ""

    @cached_property
    def paths(self) -> frozenset[str]:
        """Of the findings."""
        return frozenset(finding.path for finding in self.findings)

    @property
    def status(self) -> Status:
        """Passed, failed or not run."""
        if self.reason:
            return "not run"
        return "failed" if self.findings else "passed"


def run_check(check: Check, subject: Subject) -> Result:
    """The result of one check: what it lacks is a reason, what is wrong with the release a finding."""
    try:
        problems = list(check.run(subject))
    except VAULT_LACKS as error:
        return Result(check, reason=subject.without_folders(str(error)))
    except DPFReleaseError as error:
        problems = [Finding("unreadable", ".", str(error))]
    return Result(
        check,
        tuple(Finding(problem.kind, problem.path, subject.without_folders(problem.detail)) for problem in problems),
    )


def lineage(path: str) -> list[str]:
    """A path, and the folders above it: a finding about any of them is one about the file."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


# --------------------------------------------------------------------------------------------- the release alone


def _structure(subject: Subject) -> list[Finding]:
    readers: dict[str, Callable[[Subject, str], object]] = {
        "model-record": lambda s, path: read_model_record(s.release / path),
        "featurizer": lambda s, path: tensor_shapes(s.release / path),
        "classifier": lambda s, path: tensor_shapes(s.release / path),
        "bank-index": lambda s, path: _read_small_index(s),
        "shard": _read_shard,
    }
    found = []
    paths = [path for path, record in subject.files.items() if record.role in readers]
    for path in filter(subject.is_sound, paths):
        try:
            readers[subject.files[path].role](subject, path)
        except (DPFReleaseError, SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
            found.append(Finding("structure", path, str(error)))
    if not found:
        subject.refuse_gaps(paths)  # what was not looked at has not passed
    return found


def _read_small_index(subject: Subject) -> BankIndex:
    if (subject.release / "features" / INDEX).stat().st_size > MAX_BYTES:
        raise BankError(f"larger than {MAX_BYTES >> 20} MiB")
    return read_index(subject.release / "features")


def _read_shard(subject: Subject, path: str) -> None:
    index = _read_small_index(subject)
    split, _, _ = path.removeprefix("features/").partition("/")
    shards: tuple[ShardRecord, ...] = index.splits.get(split, ())  # type: ignore[call-overload]
    rows = next((shard.rows for shard in shards if f"features/{shard.file}" == path), None)
    if rows is None:
        raise BankError("the bank's index does not list it")
    if index.compression == "blosc2":
        load_blosc2()
    with open_shard(subject.release / path) as file:
        check_shard(file, subject.release / path, index, split, rows)


def _agreement(subject: Subject) -> Iterable[Finding]:
    if subject.unsound:
        raise NotRunError("files of the release failed a check before this one; it is not opened as a whole")
    try:
        Release.open(subject.release)
    except VerificationError as error:
        for problem in error.problems or [str(error)]:
            yield Finding("contradiction", MANIFEST, problem)


def _poisoned(subject: Subject) -> Iterable[Finding]:
    if not subject.bank.poisoned:
        yield Finding("not poisoned", "features", "the bank says of itself that its rows are φ1(S), as they are")


def _signature(subject: Subject) -> Iterable[Finding]:
    if subject.public_key is None:
        raise NotRunError("no public key was given (--public-key): who published the files is unknown")
    yield Finding("bad signature", MANIFEST, "expected one by the given public key, found none: none is signed yet")


# --------------------------------------------------------------------------------------------- with the vault


def _ledger(subject: Subject) -> Iterable[Finding]:
    ledger = subject.owners.vault.ledger
    if not ledger.exists() and ledger.with_name(f"{ledger.name}.age").exists():
        raise NotRunError("the ledger is sealed")
    manifest = subject.release / MANIFEST
    subject.refuse_gaps([])
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    entries = read_record(ledger, "package") if ledger.exists() else []
    if digest not in [entry["manifest_sha256"] for entry in entries]:
        known = ", ".join(f"{entry['name']} {entry['version']}" for entry in entries) or "none"
        detail = f"the vault's ledger has no release with this manifest; it has: {known}"
        yield Finding("unknown release", MANIFEST, detail)


def _network(subject: Subject) -> list[Finding]:
    cut, record = subject.owners.cut, "model/model.json"
    expected = {
        "model/featurizer.safetensors": cut.featurizer_sha256,
        "model/classifier.safetensors": hashlib.sha256(cut.classifier_file).hexdigest(),
    }
    detail = "not the bytes that the vault's network gives at its hook point"
    found = [
        Finding("foreign weights", path, detail)
        for path, digest in expected.items()
        if subject.is_sound(path) and subject.files[path].sha256 != digest
    ]
    if subject.is_sound(record) and read_model_record(subject.release / record) != cut.public_record:
        found.append(Finding("foreign record", record, "does not say what the vault's network is"))
    if not found:
        subject.refuse_gaps([*expected, record])
    return found


def _rows(subject: Subject) -> Iterable[Finding]:
    private = subject.owners.vault.features
    index = subject.bank
    if not (private / INDEX).is_file():
        raise NotRunError("the vault has no φ1(S) to compare with: it was never written, was forgotten, or is sealed")
    theirs = read_index(private)
    if (theirs.featurizer_sha256, theirs.feature_shape) != (index.featurizer_sha256, index.feature_shape):
        raise NotRunError("the vault's φ1(S) is of another featurizer: comparing with it would say nothing")
    near, rows = count_near_rows(
        [FeatureBank(subject.release / "features", split) for split in index.splits],
        [FeatureBank(private, split) for split in theirs.splits],
    )
    if near:
        detail = f"{near} of {rows} public rows are rows of φ1(S) (mean-centred cosine above {SAME_ROW_COSINE})"
        yield Finding("private row", "features", f"{detail}: whoever has them has the pictures")


def _place(subject: Subject) -> Iterable[Finding]:
    config, vault = subject.owners.config, subject.owners.vault.root.resolve()
    if subject.release.is_relative_to(vault):
        yield Finding("place", ".", "the release lies inside the vault: who copies one copies the other")
    inside = {
        "the vault": vault,
        "the private images": config.locate(config.images.private.path),
        "the public images": config.locate(config.images.public.path),
    }
    for what, path in inside.items():
        if path.is_relative_to(subject.release):
            yield Finding("place", ".", f"{what} lie inside the release folder: who uploads it uploads them")


def _vault(subject: Subject) -> Iterable[Finding]:
    root = subject.owners.vault.root
    for path in (root, *sorted(root.rglob("*"))):
        name, status = path.relative_to(root).as_posix(), path.lstat()
        if stat.S_ISLNK(status.st_mode):
            yield Finding("link", name, "what it leads to lies outside the vault, and is not looked at")
        elif status.st_mode & 0o077 and name != LOCK:
            expected = "0700" if path.is_dir() else "0600"
            found = stat.S_IMODE(status.st_mode)
            yield Finding("readable", name, f"others than its owner may use it: expected {expected}, found {found:04o}")
    ignore = root / ".gitignore"
    if not ignore.is_file() or "*" not in ignore.read_text(encoding="utf-8", errors="replace").splitlines():
        yield Finding("git", ".gitignore", "expected a line `*`, so that git takes nothing from the vault")


# --------------------------------------------------------------------------------------------- all of them

CHECKS: tuple[Check, ...] = (
    Check(
        "files",
        "Each file is, byte for byte, the one that manifest.json lists, and the folder holds nothing else.",
        "Who wrote the manifest: who changes a file can change the list too.",
        "Fetch the release again from where you trust it. Its owner: take out what does not belong, find out how it "
        "came there, and run `dpf-release package` again.",
        lambda subject: verify(subject.release),
        ("manifest", "checksums", "card", "model-record", *WEIGHTS, *BANK),
    ),
    Check(
        "signature",
        "The manifest was signed with the key whose public half was given.",
        "Whether that key is its owner's: the key that lies in a release proves nothing about who made it.",
        "Take neither release nor key from there. Ask the owner for both.",
        _signature,
        ("manifest",),
    ),
    Check(
        "structure",
        "Records fit their schemas, weights are plain safetensors, and each shard has the members, types, shapes and "
        "attributes of bank format 1, without links or data outside the file.",
        "Meaning: a row of the right form may hold anything.",
        "Open none of these files with other programs. Ask the publisher for a whole release.",
        _structure,
        ("model-record", *WEIGHTS, *BANK),
    ),
    Check(
        "agreement",
        "Manifest, model record, weights and bank speak of the same featurizer, shapes, classes and shards.",
        "Whether what they agree on is true.",
        "Do not use the release: its parts are of different origin. Its owner: run `dpf-release package` again.",
        _agreement,
        ("manifest", "model-record", "featurizer", *BANK),
    ),
    Check(
        "poisoned",
        "Every shard of the bank says of itself that it is poisoned.",
        "A flag that lies. With the vault, `rows` compares the rows themselves.",
        "Take the release down: a reconstructor shows the pictures in unpoisoned features.",
        _poisoned,
        BANK,
    ),
    Check(
        "ledger",
        "The vault's ledger lists exactly this manifest: the release was packaged from this vault.",
        "Releases made from a copy of the vault.",
        "Give the vault that made this release. If it is this one, somebody else packaged what you hold.",
        _ledger,
        ("manifest",),
    ),
    Check(
        "network",
        "φ1, φ2 and their record are, byte for byte, what the vault's network gives at its hook point; the weights "
        "files hold nothing more.",
        "What Φ itself remembers of the images that it was trained on.",
        "Take the release down, and find out where these weights come from before you package again.",
        _network,
        ("model-record", *WEIGHTS),
    ),
    Check(
        "rows",
        f"No public row is as good as equal to a row of φ1(S) (mean-centred cosine above {SAME_ROW_COSINE}).",
        "What a trained attacker gets out of a row: only equality, up to scale, is looked for.",
        "Take the release down. What was downloaded cannot be called back: tell the people in the pictures.",
        _rows,
        BANK,
    ),
    Check(
        "place",
        "Neither the vault nor the images S and Q lie in the release folder, nor the release in the vault.",
        "Copies elsewhere: backups, synchronised folders, mail.",
        "Move them apart before anything is copied or uploaded.",
        _place,
    ),
    Check(
        "vault",
        "Only the owner of the vault can read its files (0600, folders 0700), it has no links, and git ignores it.",
        "Access lists, backups, and whoever administers the machine.",
        "Run `chmod -R go-rwx` on the vault. Who could read it so far may have what undoes the release.",
        _vault,
        side="private",
    ),
)
