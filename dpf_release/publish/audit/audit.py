"""`audit`: the table of every artefact, public and private, with what was found."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dpf_release.core.bounded_json import MAX_BYTES
from dpf_release.core.files import sha256_of
from dpf_release.errors import DPFReleaseError, VaultError
from dpf_release.owner.config import CONFIG_NAME, read_config
from dpf_release.owner.cut_network import import_from
from dpf_release.owner.fitted import load_function
from dpf_release.owner.project import Project
from dpf_release.owner.vault.contents import at_rest, plain_name, role_in_vault
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.vault import Vault
from dpf_release.publish.audit.checks import CHECKS, vault_entries
from dpf_release.publish.audit.describe import public_contents
from dpf_release.publish.audit.engine import Finding, Result, Side, Status, Subject, lineage, run_check
from dpf_release.release.manifest import MANIFEST, Claims, Manifest, role_in_release
from dpf_release.release.tree import Tree
from dpf_release.release.verify import read_manifest

FORMAT, FORMAT_VERSION = "dpf-release-audit", 1


@dataclass(frozen=True)
class Artefact:
    """One file of a release or of its vault.

    Attributes:
        path: inside the release, or inside the vault.
        role: of the manifest; in a vault, what it belongs to.
        sha256: hexadecimal; None where it was not read: a link, no plain file, or a large one that nobody lists.
        holds: one line in words; empty where it failed a check and was not opened.
        mode: permissions, octal.
        passed: the checks that looked at it and found nothing; none after the first that did.
        releases: names and versions of those that it belongs to, by the ledger (private side).
    """

    path: str
    side: Side
    role: str
    bytes: int
    sha256: str | None
    holds: str
    mode: str
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    at_rest: Literal["sealed", "in the clear"] = "in the clear"
    releases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        manifest: of the release; None where it cannot be read.
        private: whether a vault was given: then all of this is the owner's.
        results: of each check, in their order.
        artefacts: every file, the public ones first, by path.
    """

    manifest: Manifest | None
    manifest_sha256: str | None
    private: bool
    results: tuple[Result, ...]
    artefacts: tuple[Artefact, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all checks."""
        return tuple(finding for result in self.results for finding in result.findings)

    @property
    def title(self) -> str:
        """Name and version of the release."""
        return f"{self.manifest.name} {self.manifest.version}" if self.manifest else "a folder without a manifest"

    @property
    def claims(self) -> Claims:
        """What the release promises, and what not."""
        return self.manifest.claims if self.manifest else Claims(not_made=())

    def of(self, side: Side) -> tuple[Artefact, ...]:
        """The artefacts of one side."""
        return tuple(artefact for artefact in self.artefacts if artefact.side == side)

    @property
    def headline(self) -> str:
        """The number of findings."""
        if self.findings:
            return f"{len(self.findings)} finding{'s' if len(self.findings) > 1 else ''}"
        return "No finding" if self.complete else "No finding in what was looked at"

    @property
    def complete(self) -> bool:
        """Whether every check was run, but for the signature's, which says nothing of what the files hold."""
        return {*self._not_run} <= {"signature"}

    @property
    def _not_run(self) -> list[str]:
        return [result.check.name for result in self.results if result.reason]

    @property
    def status(self) -> Status:
        """As of a check: of all of them together."""
        return "failed" if self.findings else "passed" if self.complete else "not run"

    @property
    def verdict(self) -> str:
        """What it comes to, for someone who reads nothing else; goes with the headline."""
        failed = [result.check for result in self.results if result.findings]
        if any(check.side == "public" for check in failed):
            return f"{self.title} must not be used, passed on or published before this is cleared up."
        if failed:
            order = "put the vault in order before anything else"
            return f"Nothing was found in {self.title} itself, but others may have what undoes it: {order}."
        listed = f"The files of {self.title} are those that its manifest lists"
        if not self.private:
            said = f"{listed}. Whether anything private is in them was not looked for: that takes its owner's vault."
        elif self.complete:
            said = f"{listed}, and nothing private was found in them."
        else:
            said = f"Not all of {self.title} could be compared with the vault."
        not_run = f"; not run: {', '.join(self._not_run)}." if self._not_run else "."
        passed = sum(result.status == "passed" for result in self.results)
        return f"{said} {passed} of {len(self.results)} checks passed{not_run}"

    def as_json(self) -> str:
        """The whole of it, as docs/audit.md describes; sorted keys, ASCII."""
        artefacts = [asdict(artefact) for artefact in self.artefacts]
        fields = {"name", "version", "previous", "licence", "task", "classes", "targets", "splits"}
        tree: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "private": self.private,
            "passed": not self.findings,
            "headline": self.headline,
            "verdict": self.verdict,
            "release": self.manifest
            and self.manifest.model_dump(mode="json", include=fields) | {"manifest_sha256": self.manifest_sha256},
            "checks": [
                {key: getattr(result.check, key) for key in ("name", "proves", "cannot_see", "advice")}
                | {"status": result.status, "reason": result.reason}
                for result in self.results
            ],
            "findings": [
                {"check": result.check.name, "side": result.check.side, **asdict(finding)}
                for result in self.results
                for finding in result.findings
            ],
            "artefacts": [of | {"sealed": of.pop("at_rest") == "sealed"} for of in artefacts],
            "claims": self.claims.model_dump(mode="json"),
        }
        return json.dumps(tree, indent=2, sort_keys=True)


def audit(release: Path, project: Project | None = None, public_key: Path | None = None) -> Audit:
    """Looks at every artefact of a release as it is now, and runs every check on it. No file is changed.

    Nothing that fails a check is opened afterwards. With the project of a vault the vault is looked at too, and the
    release is compared with it; then what comes back is private.

    Args:
        release: the folder; a copy that was downloaded will do.
        project: of the vault that made it, if there is one; see `project_of`.
        public_key: of the signer, if there is one.

    Raises:
        VaultError: a name in the vault's ledger cannot be a function's, or the identity does not open the vault.
        StorageError: the vault must be opened for that, and another run works in it.

    Example:
        >>> from pathlib import Path
        >>> from dpf_release import audit
        >>> audit(Path("my-release/release")).findings
        ()
    """
    release = release.resolve()
    with project.vault.reading() if project else contextlib.nullcontext():
        manifest = read_manifest(release)
        subject = Subject(release, manifest if isinstance(manifest, Manifest) else None, project, public_key)
        results: list[Result] = []
        for check in CHECKS:
            results.append(run_check(check, subject))
            subject = subject.after(results[-1])
        artefacts = [*_public_artefacts(subject, results)]
        if project is not None:
            artefacts += _private_artefacts(project, results)
        digest = next((artefact.sha256 for artefact in artefacts if artefact.path == MANIFEST), None)
        return Audit(subject.manifest, digest, project is not None, tuple(results), tuple(artefacts))


def project_of(vault: Path, identity: Path | None = None, *, trust_code: bool = False) -> Project:
    """The project that a vault belongs to: its `dpf.toml` lies beside it.

    A vault that others can read is not refused: the audit reports it.

    Args:
        vault: its folder.
        identity: the file of the secret key that opens it, where it is encrypted.
        trust_code: import and run networks and functions that the configuration or the vault name, from its folder too;
            without it the checks that need them are not run.

    Raises:
        VaultError: there is no such folder.
        ConfigError: no configuration beside it, or one that does not fit.
    """
    vault = vault.resolve()
    if not vault.is_dir():
        raise VaultError(
            f"expected a vault at {vault}, found none. It is the folder that holds ids.csv and ledger.json."
        )
    config = read_config(vault.parent / CONFIG_NAME)
    if trust_code:
        import_from(config.folder)
    return Project(config, Vault(vault, identity), trusts_code=trust_code)


def _public_artefacts(subject: Subject, results: Sequence[Result]) -> Iterator[Artefact]:
    try:
        with Tree.open(subject.release) as tree:
            entries = tree.entries
    except OSError:  # no folder that can be read, as `files` says
        return
    for name, status in entries.items():
        if stat.S_ISDIR(status.st_mode):
            continue
        role = role_in_release(name)
        passed, failed = _judged("public", name, role, results)
        if subject.manifest is None:
            passed = ()  # nothing is known of a file that no manifest lists
        needed = {check.name for check in CHECKS if check.name in {"files", "structure"} and role in check.roles}
        whole = bool(needed) and needed <= set(passed) and not failed
        known = subject.files[name].sha256 if name in subject.files and "files" in passed else ""
        digest = known or _digest(subject.release / name, status, MAX_BYTES)
        holds = public_contents(subject.release, name, subject.manifest) if whole and subject.manifest else ""
        yield Artefact(name, "public", role, status.st_size, digest, holds, _mode(status), passed, failed)


def _private_artefacts(project: Project, results: Sequence[Result]) -> Iterator[Artefact]:
    root, made = project.vault.root, _releases(project)
    for name, status in vault_entries(root)[0].items():
        if stat.S_ISDIR(status.st_mode):
            continue
        (role, holds), digest = role_in_vault(name), _digest(root / name, status)
        judged, of = _judged("private", name, role, results), _releases_of(name, made)
        yield Artefact(name, "private", role, status.st_size, digest, holds, _mode(status), *judged, at_rest(name), of)


def _judged(side: Side, path: str, role: str, results: Sequence[Result]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the checks that passed a file, until the first that did not, and of those that did not."""
    passed: list[str] = []
    failed: list[str] = []
    for result in results:
        check = result.check
        if check.side == side and not result.paths.isdisjoint(lineage(path)):
            failed.append(check.name)
        elif result.looked_at_all and not failed and check.side == side and (side == "private" or role in check.roles):
            passed.append(check.name)
    return tuple(passed), tuple(failed)


def _digest(path: Path, status: os.stat_result, limit: float = math.inf) -> str | None:
    return sha256_of(path) if stat.S_ISREG(status.st_mode) and status.st_size <= limit else None


def _mode(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):04o}"


def _releases(project: Project) -> dict[str, tuple[str, ...]]:
    """By function, the releases in the ledger that today's function of that name made."""
    made: dict[str, tuple[str, ...]] = {}
    for entry in [] if project.vault.unreadable else releases(project.vault):
        name = entry["function"]
        with contextlib.suppress(DPFReleaseError):  # forgotten, or fitted for another network
            if load_function(project, name).digest == entry["function_digest"]:
                made[name] = (*made.get(name, ()), f"{entry['name']} {entry['version']}")
    return made


def _releases_of(path: str, releases: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Of a function's own files its releases; of what all functions share those of all of them."""
    folder, _, rest = path.partition("/")
    if folder in {"functions", "candidates", "reports"}:
        return releases.get(rest.split("/")[0], ())
    if folder in {"network", "features"} or plain_name(path) in {"ids.csv", "ledger.json"}:
        return tuple(dict.fromkeys(name for names in releases.values() for name in names))
    return ()
