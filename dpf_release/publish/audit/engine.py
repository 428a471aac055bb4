"""How the checks of an audit are run: what each looks at, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from dpf_release.bank.format import BankIndex, read_index
from dpf_release.errors import (
    ConfigError,
    DPFReleaseError,
    HookError,
    ImageError,
    SigningError,
    VaultError,
    WeightsError,
)
from dpf_release.owner.project import Project
from dpf_release.release.contents import shards_of
from dpf_release.release.manifest import BANK_INDEX, FileRecord, Manifest
from dpf_release.release.verify import Problem

Side = Literal["public", "private"]
Status = Literal["passed", "failed", "not run"]
LONGEST_DETAIL = 1000


class NotRunError(DPFReleaseError):
    """A check has nothing to look at; the message says what it lacks."""


# Errors of the owner's side: those of a stranger's files are findings.
VAULT_LACKS = (NotRunError, VaultError, ConfigError, ImageError, HookError, WeightsError)


@dataclass(frozen=True)
class Finding:
    """Something that must not be; as a `Problem`, whose kinds are a closed list.

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
        unsound: paths in the release that failed a check.
        structured: whether `structure` looked at every file: only then the unpacked ones are opened in this process.
    """

    release: Path
    manifest: Manifest | None
    project: Project | None = None
    public_key: Path | None = None
    unsound: frozenset[str] = frozenset()
    structured: bool = False

    def after(self, result: Result) -> Subject:
        """The subject as the next check finds it."""
        return replace(
            self,
            unsound=self.unsound | (result.paths if result.check.side == "public" else set()),
            structured=self.structured or (result.check.name == "structure" and result.looked_at_all),
        )

    def is_sound(self, path: str) -> bool:
        """Whether a file is listed, and neither it nor a folder above it failed a check."""
        return path in self.files and self.unsound.isdisjoint(lineage(path))

    @cached_property
    def files(self) -> dict[str, FileRecord]:
        """The files that the manifest lists, by path."""
        return {record.path: record for record in self.manifest.files} if self.manifest else {}

    @property
    def owners(self) -> Project:
        """The project of the vault; NotRunError where none was given."""
        if self.project is None:
            raise NotRunError("no vault was given (--vault)")
        return self.project

    @property
    def opened(self) -> Project:
        """The project of a vault whose members can be read; NotRunError where it does not open without its key."""
        if reason := self.owners.vault.unreadable:
            raise NotRunError(reason)
        return self.owners

    def refuse_gaps(self, paths: Iterable[str]) -> None:
        """That all of these can be opened; NotRunError where one is missing or failed a check."""
        if self.manifest is None:
            raise NotRunError("the release has no manifest that can be read")
        unsound = next((path for path in paths if not self.is_sound(path)), None)
        if unsound:
            raise NotRunError(f"{unsound} is missing or failed a check before this one, and is not opened")

    @property
    def bank(self) -> BankIndex:
        """The index of the public bank; NotRunError where not all of its files can be opened."""
        if not self.structured:
            raise NotRunError("what the files hold was not looked at (structure), and the bank is not opened")
        shards = self.manifest.of_role("shard") if self.manifest else {}
        self.refuse_gaps([BANK_INDEX, *sorted(shards)])
        index = read_index(self.release / "features")
        if shards_of(index).keys() != shards.keys():
            raise NotRunError("the bank's index lists other shards than the manifest")
        return index

    @property
    def comparable(self) -> Project:
        """As `opened`, for a comparison with the whole release: all of it must have the structure that it should."""
        project, _ = self.opened, self.bank
        self.refuse_gaps(self.files)
        return project

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
        run: all problems of a subject; NotRunError where it has nothing to look at.
        roles: of the files that it looks at; empty: at none, or at the vault's.
        side: where the paths of its findings lie.
    """

    name: str
    proves: str
    cannot_see: str
    advice: str
    run: Callable[[Subject], Iterable[Problem | Finding]]
    roles: tuple[str, ...] = ()
    side: Side = "public"


@dataclass(frozen=True)
class Result:
    """What a check gave: its findings, and why it was not run; the reason is empty where it was."""

    check: Check
    findings: tuple[Finding, ...] = ()
    reason: str = ""

    @cached_property
    def paths(self) -> frozenset[str]:
        """Of the findings."""
        return frozenset(finding.path for finding in self.findings)

    @property
    def looked_at_all(self) -> bool:
        """Whether it was run, and to its end: one that met a limit says nothing of what it did not come to."""
        return not self.reason and all(finding.kind != "limit" for finding in self.findings)

    @property
    def status(self) -> Status:
        """Passed, failed or not run."""
        return "not run" if self.reason else "failed" if self.findings else "passed"


def run_check(check: Check, subject: Subject) -> Result:
    """The result of one check: what it lacks is a reason, what is wrong with the release a finding."""
    try:
        found: list[Problem | Finding] = [*check.run(subject)]
    except SigningError:
        raise  # the key that was given is the user's mistake, not the release's
    except VAULT_LACKS as error:
        return Result(check, reason=subject.without_folders(str(error)))
    except DPFReleaseError as error:
        found = [Finding("unreadable", ".", str(error))]
    return Result(check, tuple(Finding(one.kind, one.path, subject.without_folders(one.detail)) for one in found))


def lineage(path: str) -> list[str]:
    """A path, and the folders above it: a finding about any of them is one about the file."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]
