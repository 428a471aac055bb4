"""`package`: the only place that writes public files. Checks the candidate, builds the release beside, swaps it in."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from dpf_release.attacks.threat_models import LeakedVault, TwoReleases
from dpf_release.bank.format import BankIndex, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.files import (
    PUBLIC_FILE,
    PUBLIC_FOLDER,
    make_folder,
    remove_folder,
    replacing,
    sha256_of,
    write_json,
)
from dpf_release.core.privacy import Mechanism
from dpf_release.errors import RefusedError, VaultError
from dpf_release.owner.config import Config, ReleaseSection
from dpf_release.owner.fitted import CANDIDATE, FittedFunction, load_function
from dpf_release.owner.poison import changed_since_poison
from dpf_release.owner.privacy import Fit, as_published, book, fit_of, refuse_overspending
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import forget_release, releases, remember_release
from dpf_release.owner.vault.staging import build_beside, remove_unpublished, removed_manifest
from dpf_release.owner.vault.vault import Vault
from dpf_release.publish.bound import against_bound, not_covered
from dpf_release.publish.card import retractions_section, write_card
from dpf_release.publish.card_text import NO_DESCRIPTION
from dpf_release.publish.gate import Passage, pass_gate
from dpf_release.publish.leaks.private_facts import private_facts
from dpf_release.publish.swap import nested_with, recover, swap
from dpf_release.release.attack_report import text_without_sizes, without_sizes
from dpf_release.release.contents import shards_of, verify_deep
from dpf_release.release.croissant import CROISSANT, croissant
from dpf_release.release.manifest import (
    ATTACK_REPORT,
    BANK_INDEX,
    CLASSIFIER,
    FEATURIZER,
    MANIFEST,
    MODEL,
    PROCEDURE,
    UNLISTED,
    FileRecord,
    Manifest,
    describe_file,
    describe_files,
    role_of,
    write_manifest,
)
from dpf_release.release.model_record import read_model_record
from dpf_release.release.signing import read_private_key, write_signature
from dpf_release.release.verify import Problem, read_manifest

REDRAWN = "Images were retracted, and the rows were drawn again without them."
IS_UNSOUND = "Run `dpf-release poison --restart`, and report it where that does not help."
TELLS = (
    "Texts: change [release] in dpf.toml, or the reason that was given. Rows of φ1(S): fit with more epochs or a "
    "larger lambda, and poison again. Order, ids and tensors are ours to get right: run `dpf-release poison "
    "--restart`, and report it where that does not help."
)


def package(
    project: Project,
    name: str = "default",
    out: Path | None = None,
    sign: Path | None = None,
    second_function: str = "",
    accept_risk: str = "",
    without_report: bool = False,
) -> Manifest:
    """Publishes a candidate into a folder, whole or not at all; a release of the same name that is there is replaced.

    Args:
        project: the owner's.
        name: which fitted function's candidate.
        out: the release folder; by default `release` beside the configuration.
        sign: a private key; the release then holds a signature over its manifest, and the public key.
        second_function: why the same images are published once more, under another function than before; public, on the
            card.
        accept_risk: why to publish although attacks do not bear out what `[claims]` promises; public, on the card, and
            the claims that did not pass are not made.
        without_report: publish none of the numbers that were measured on the images, which no privacy bound covers;
            claims rest on the report in the vault, and are the owner's word.

    Raises:
        VaultError: the candidate is unfinished; `out` is no place for a release, or holds more than one; or there is a
            release that the vault's ledger does not know.
        RefusedError: the candidate holds what has no place in a release, was made from something else than today's
            function, features and network, is not poisoned, or tells a private fact; or another function's release was
            published from this vault, or a claim does not pass the gate, and no reason was given; or an attack found
            more than a privacy bound allows; or `without_report` is asked for where no bound is there to be kept.
        ConfigError: what is published and this fit together exceed the budget of `[privacy]`.
        SigningError: others can read the private key, or it lies where the release or the candidate does.
        StorageError: another run works in the vault, or the disk does not take the release.
        RankError: there are several ranks.

    Example:
        >>> from pathlib import Path
        >>> from dpf_release import Project, package
        >>> project = Project.open("my-release/dpf.toml", {"release.version": "1.1.0"})
        >>> package(project, out=Path("published")).version
        '1.1.0'
    """
    with project.working(together=False):
        vault, config = project.vault, project.config
        out = (out or config.folder / "release").resolve()
        recover(out)
        _settle_ledger(vault, config.folder)
        # First of all: a key in the release's folder is also a file that has no place there, and is named as a key.
        key = None if sign is None else read_private_key(sign, outside=(out, vault.candidate(name)))
        _refuse_place(out, project)
        _refuse_unknown_releases(out, vault, config)
        candidate = _checked_candidate(project, name)
        privacy = _privacy_of(project, candidate, without_report)
        reason = _reason_for_function(vault, candidate.function, second_function or _redrawn(vault, name))
        passage = _ask_gate(project, candidate, accept_risk, privacy)
        if candidate.function.chain.draws_rows:
            passage = _without_sizes(passage, without_report)

        staging = build_beside(vault.root, out)
        try:
            manifest = _build(staging, project, candidate, passage, reason, privacy)
            if key is not None:
                write_signature(staging, key)
            # As any reader can, in a limited child; only then are its files opened here, for what only the owner sees.
            _refuse(verify_deep(staging), "hold files that are not what they should be", IS_UNSOUND)
            _refuse(private_facts(staging, project, name), "tell what is private", TELLS)
        except BaseException:
            remove_folder(staging)
            remove_unpublished(vault.root)
            raise
        entry = {
            "name": manifest.name,
            "version": manifest.version,
            "function": name,
            "function_digest": candidate.function.digest,
            "bank": project.bank_id,
            "second_function": reason,
            "accepted_risk": passage.accepted_risk,
            "index_sha256": candidate.index_sha256,
            "manifest_sha256": sha256_of(staging / MANIFEST),
            "classifier_sha256": sha256_of(staging / CLASSIFIER),
            "drawn": candidate.function.chain.draws_rows,
            "place": os.path.relpath(out, config.folder),
        }
        if candidate.fit is not None and privacy is not None:  # spent before anybody can see it
            book(vault, candidate.fit, f"{manifest.name} {manifest.version}")
            entry |= {"fit": candidate.fit.id, "networks_saw_images": privacy.networks_saw_images}
        remember_release(vault, entry | {"published": False})  # so that nothing is public that the ledger does not know
        staging.chmod(PUBLIC_FOLDER)
        swap(staging, out)
        remember_release(vault, entry | {"published": True})
        remove_unpublished(vault.root)
        return manifest


@dataclass(frozen=True, eq=False)
class Candidate:
    """A bank and a network that may be published, as they lie in the vault; in `folder` in the clear.

    `retractions` are those by which rows were taken out of it, the first first; `fit` is the ledger's line of its
    statistics, None where they have no bound.
    """

    name: str
    folder: Path
    index: BankIndex
    index_sha256: str
    function: FittedFunction
    retractions: list[dict[str, Any]]
    fit: Fit | None


def _checked_candidate(project: Project, name: str) -> Candidate:
    """A candidate that is whole, of today, poisoned, and has no retracted row."""
    vault = project.vault
    folder = vault.opened(vault.candidate(name))
    index, function = read_index(folder / "features"), load_function(project, name)
    made = vault.read_record(vault.function(name) / CANDIDATE, f"poison --name {name}")
    digest = sha256_of(folder / BANK_INDEX)
    fit = fit_of(vault, name, function)
    candidate = Candidate(name, folder, index, digest, function, made.get("retracted", []), fit)
    _refuse_strangers(candidate)
    _refuse_other_origin(project, candidate)
    if not (index.poisoned and function.chain.poisons):
        raise RefusedError(
            "this bank is not poisoned: its function changes nothing, and a reconstructor shows the pictures in it. "
            "Nothing was published. Fit a function with `dpf-release fit-poison`."
        )
    if gone := project.retracted.ids:
        banks = [FeatureBank(folder / "features", split) for split in index.splits]
        if any(row_id.tobytes() in gone for bank in banks for row_id in bank.ids):
            raise RefusedError(
                "the candidate has rows that were retracted. Nothing was published. Write it anew: `dpf-release poison "
                f"--name {name} --restart`."
            )
    return candidate


def _privacy_of(project: Project, candidate: Candidate, without_report: bool) -> Mechanism | None:
    """What the ledger says of the candidate's mechanism, beside all that is published; within the budget."""
    fit = candidate.fit
    refuse_overspending(project, fit.mechanism if fit else None, fit.id if fit else "")
    if fit is None and without_report:
        raise RefusedError(
            "expected a function with a privacy bound for --without-report, found none: where nothing is bounded, "
            "claims rest on numbers that anyone can see. Nothing was published."
        )
    return as_published(project, fit) if fit else None


def _without_sizes(passage: Passage, without_report: bool) -> Passage:
    """What attacks found on drawn rows, without what would say how many images there are; or nothing of it."""
    objections = tuple(map(text_without_sizes, passage.objections))
    report = None if without_report or passage.report is None else without_sizes(passage.report)
    return replace(passage, report=report, objections=objections, report_kept=without_report)


def _redrawn(vault: Vault, name: str) -> str:
    """Why a function that a retraction fitted anew is another than before; empty for all others."""
    record = vault.read_record(vault.function(name) / "function.json", f"fit-poison --name {name}")
    return REDRAWN if "redrawn_for" in record else ""


def _ask_gate(project: Project, candidate: Candidate, accept_risk: str, privacy: Mechanism | None) -> Passage:
    """Attacks count here that want a leaked P, or the last release of each other function on these features beside."""
    function = candidate.function
    mine = [entry for entry in releases(project.vault) if entry["bank"] == project.bank_id]
    last = {entry["function_digest"]: entry["index_sha256"] for entry in mine}
    beside = [index for digest, index in last.items() if digest != function.digest]
    views = {LeakedVault: not function.chain.learned_secret, TwoReleases: bool(beside)}
    required = [view for view, applies in views.items() if applies]
    index_sha256, retractions = candidate.index_sha256, candidate.retractions
    by_ledger = against_bound(project, privacy)
    return pass_gate(project, candidate.name, index_sha256, retractions, accept_risk, required, beside, by_ledger)


def _build(
    staging: Path,
    project: Project,
    candidate: Candidate,
    passage: Passage,
    reason: str,
    privacy: Mechanism | None,
) -> Manifest:
    """All files of the release but a signature, in a folder that nobody sees yet."""
    record, release = project.cut.public_record, project.config.release
    release = release.model_copy(update={"version": project.retracted.version_after(release.version)})
    _copy_public(candidate.folder, staging)
    scores = {} if passage.report_kept else _scores(project.vault, candidate)
    if privacy is not None and candidate.fit is not None:
        left_out = not_covered(project, candidate.fit, privacy, passage, bool(scores))
        privacy = Mechanism.model_validate(privacy.model_dump() | {"not_covered": left_out})
    retractions = retractions_section(project.retracted, candidate.retractions, candidate.function.chain.draws_rows)
    statement = candidate.function.chain.statement()
    write_card(
        staging / "README.md",
        release,
        record,
        candidate.index,
        scores,
        passage,
        statement,
        reason,
        retractions,
        privacy,
        candidate.function.chain.draws_rows,
    )
    if passage.report is not None:
        report = passage.report.model_copy(update={"not_covered": privacy.not_covered if privacy else ()})
        make_folder((staging / ATTACK_REPORT).parent, PUBLIC_FOLDER)
        write_json(staging / ATTACK_REPORT, report.model_dump(mode="json"), PUBLIC_FILE)
    manifest = Manifest(
        name=release.name,
        version=release.version,
        previous=_previous(project.vault, release),
        licence=release.licence,
        task=record.task,
        classes=record.classes,
        targets=record.targets,
        splits=candidate.index.rows,
        claims=passage.claims,
        privacy=privacy,
        files=_describe(staging, release),
    )
    write_manifest(staging, manifest)
    return manifest


def _refuse(problems: Sequence[Problem], what: str, advice: str) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise RefusedError(f"the release would {what}. Nothing was published.\n{listed}\n{advice}")


def _refuse_place(out: Path, project: Project) -> None:
    config = project.config
    if nested := nested_with(out, config, project.vault.root):
        raise VaultError(f"{out} is no place for a release: {'; '.join(nested)}. Name another place with --out.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    there = read_manifest(out)
    if not isinstance(there, Manifest) or there.name != config.release.name:
        raise VaultError(
            f"{out} is there and is not a release named {config.release.name!r}; it would be replaced. "
            "Name another place with --out."
        )
    if foreign := sorted(set(_files_below(out)) - UNLISTED - {record.path for record in there.files}):
        raise VaultError(
            f"{out} holds what its manifest does not list: {', '.join(foreign[:10])}{' ...' if foreign[10:] else ''}. "
            "It would be gone with the release that is replaced. Move it elsewhere. Nothing was changed."
        )


def _refuse_unknown_releases(out: Path, vault: Vault, config: Config) -> None:
    """That the ledger knows the releases that stand here: where it was lost, any function would pass for the first."""
    name, known = config.release.name, {entry["manifest_sha256"] for entry in releases(vault)}
    for place in (out, config.folder / "release"):
        there = read_manifest(place)
        if isinstance(there, Manifest) and there.name == name and _manifest_digest(place) not in known:
            raise VaultError(
                f"{place} is a release named {name!r} that {vault.ledger} does not know: which function made "
                "it cannot be told. Bring back the ledger, or the vault that it was made from. If that is lost, move "
                "the release away, and package its function before any other. Nothing was published."
            )


def _files_below(folder: Path) -> dict[str, bool]:
    """All that is no folder below one, and whether it is a plain file."""
    return {
        path.relative_to(folder).as_posix(): path.is_file() and not path.is_symlink()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _refuse_strangers(candidate: Candidate) -> None:
    """That the candidate holds the files of a release, each of them, and nothing else."""
    expected = {MODEL, FEATURIZER, CLASSIFIER, BANK_INDEX, *shards_of(candidate.index)}
    if candidate.function.chain.procedure is not None:
        expected.add(PROCEDURE)
    found = _files_below(candidate.folder)
    strangers = sorted({name for name, plain in found.items() if not plain} | (set(found) - expected))
    strangers += sorted(name for name in expected if role_of(name) is None)
    missing = sorted(expected - set(found))
    if strangers or missing:
        raise RefusedError(
            f"the candidate is not what a release holds. No place in a release: {', '.join(strangers[:10]) or 'none'}. "
            f"Missing: {', '.join(missing[:10]) or 'none'}. Nothing was published. Look at {candidate.folder}, and run "
            "`dpf-release poison` again."
        )


def _refuse_other_origin(project: Project, candidate: Candidate) -> None:
    """That the candidate was made by today's function from today's features and network, and is as it was made."""
    name, folder, function = candidate.name, candidate.folder, candidate.function
    made = project.vault.read_record(project.vault.function(name) / CANDIDATE, f"poison --name {name}")
    expected = {FEATURIZER: project.cut.featurizer_sha256, CLASSIFIER: made.get("classifier_sha256")}
    if procedure := function.chain.procedure:
        expected[PROCEDURE] = hashlib.sha256(procedure.file()).hexdigest()
    problems = changed_since_poison(project, name, function, folder / BANK_INDEX)
    problems += [f"{path} changed since" for path, digest in expected.items() if sha256_of(folder / path) != digest]
    if read_model_record(folder / MODEL) != project.cut.public_record:
        problems.append(f"{MODEL} changed since")
    if problems:
        raise RefusedError(
            f"the candidate {name!r} is not of today: {'; '.join(problems)}. Nothing was published. Run "
            f"`dpf-release poison --name {name}` again."
        )


def _scores(vault: Vault, candidate: Candidate) -> dict[str, Any]:
    """What `measure` found for exactly this candidate: the `task` part of `val` and `test`; empty where it did not."""
    path = vault.reports(candidate.name) / "measurements.json"
    report = vault.read_record(path, f"poison --name {candidate.name}") if vault.holds(path) else {}
    if report.get("index_sha256") != candidate.index_sha256:
        return {}
    return {split: report[split]["task"] for split in ("val", "test") if "task" in report[split]}


def _settle_ledger(vault: Vault, folder: Path) -> None:
    """After a crash around the swap: a release that stands in its place is published, one removed before it is not.

    One that is in neither stays, unsettled, and counts as published: it may have been taken elsewhere.
    """
    for entry in releases(vault):
        if not entry.get("published", True):
            place = folder / entry["place"]
            if _manifest_digest(place) == entry["manifest_sha256"]:
                remember_release(vault, entry | {"published": True})
            elif removed_manifest(vault.root) == entry["manifest_sha256"]:
                forget_release(vault, entry)


def _manifest_digest(folder: Path) -> str | None:
    return sha256_of(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def _reason_for_function(vault: Vault, function: FittedFunction, given: str) -> str:
    """Why another function is published than the first of this vault; empty for the first itself."""
    reasons = {entry["function_digest"]: entry.get("second_function", "") for entry in releases(vault)}
    if function.digest in reasons:
        return str(reasons[function.digest])
    reason = " ".join(given.split())
    if reasons and not reason:
        raise RefusedError(
            "another poisoning function was published from this vault already, and a second view of the same images "
            "helps an attacker: what one function hides, the other may show. Nothing was published. Package the "
            'function of before, use a vault of its own for other images, or say why with --second-function "REASON" '
            "(it will be on the card)."
        )
    return reason if reasons else ""


def _copy_public(candidate: Path, staging: Path) -> None:
    for path in sorted(candidate.rglob("*")):
        if path.is_file():
            target = staging / path.relative_to(candidate)
            make_folder(target.parent, PUBLIC_FOLDER)
            with replacing(target, PUBLIC_FILE) as partial:
                shutil.copyfile(path, partial)


def _describe(staging: Path, release: ReleaseSection) -> tuple[FileRecord, ...]:
    """All files, with a `croissant.json` that lists the data among them, for the manifest to list; each read once."""
    files = describe_files(staging)
    description = release.description.strip() or NO_DESCRIPTION
    tree = croissant(release.name, release.version, release.licence, description, files)
    write_json(staging / CROISSANT, tree, PUBLIC_FILE)
    return tuple(sorted((*files, describe_file(staging, CROISSANT)), key=lambda record: record.path))


def _previous(vault: Vault, release: ReleaseSection) -> str | None:
    """The release before the first of this version: packaged again, wherever to, it has the same predecessor."""
    made = [entry for entry in releases(vault) if entry["name"] == release.name]
    before = list(takewhile(lambda entry: entry["version"] != release.version, made))
    return str(before[-1]["manifest_sha256"]) if before else None
