"""`package`: the only place that writes public files. Checks the candidate, builds the release beside, swaps it in."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from dpf_release.attacks.threat_models import LeakedVault, ReleaseView, TwoReleases
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
from dpf_release.errors import RefusedError, VaultError
from dpf_release.owner.config import Config
from dpf_release.owner.fitted import CANDIDATE, FittedFunction, load_function
from dpf_release.owner.poison import candidate_origin, changed_since_poison
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import forget_release, releases, remember_release
from dpf_release.owner.vault.staging import build_beside, remove_unpublished, removed_manifest
from dpf_release.owner.vault.vault import Vault
from dpf_release.publish.card import describe_retractions, write_card
from dpf_release.publish.card_text import NO_DESCRIPTION
from dpf_release.publish.gate import pass_gate
from dpf_release.publish.leaks.private_facts import private_facts
from dpf_release.publish.swap import recover, swap
from dpf_release.release.contents import verify_deep
from dpf_release.release.croissant import CROISSANT, croissant
from dpf_release.release.manifest import (
    ATTACK_REPORT,
    MANIFEST,
    UNLISTED,
    Claims,
    FileRecord,
    Manifest,
    describe_file,
    describe_files,
    role_of,
    write_manifest,
)
from dpf_release.release.model_record import read_model_record
from dpf_release.release.signing import read_private_key, write_signature
from dpf_release.release.verify import read_manifest


def package(
    project: Project,
    name: str = "default",
    out: Path | None = None,
    sign: Path | None = None,
    second_function: str = "",
    accept_risk: str = "",
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

    Raises:
        VaultError: the candidate is unfinished; `out` is no place for a release, or holds more than one; or there is a
            release that the vault's ledger does not know.
        RefusedError: the candidate holds what has no place in a release, was made from something else than today's
            function, features and network, is not poisoned, or tells a private fact; or another function's release was
            published from this vault, or a claim does not pass the gate, and no reason was given.
        SigningError: others can read the private key, or it lies where the release or the candidate does.
        StorageError: another run works in the vault, or the disk does not take the release.
        RankError: there are several ranks.
    """
    with project.working(together=False):
        out = (out or project.config.folder / "release").resolve()
        return _package(project, name, out, sign, second_function, accept_risk)


def _package(
    project: Project, name: str, out: Path, sign: Path | None, second_function: str, accept_risk: str
) -> Manifest:
    recover(out)
    _settle_ledger(project)
    # First of all: a key in the release's folder is also a file that has no place there, and has to be named as a key.
    key = None if sign is None else read_private_key(sign, outside=(out, project.vault.candidate(name)))
    _refuse_place(out, project)
    _refuse_unknown_releases(out, project)
    candidate = project.vault.opened(project.vault.candidate(name))
    index = read_index(candidate / "features")
    function = load_function(project, name)
    _refuse_strangers(candidate, index)
    _refuse_other_origin(project, candidate, name, function)
    _refuse_unpoisoned(index, poisons=function.chain.poisons)
    _refuse_retracted(project, candidate, index)
    reason = _reason_for_function(project.vault, function, second_function)
    digest, steps = sha256_of(candidate / "features" / "index.json"), _retraction_steps(project, name)
    beside = _released_beside(project, function)
    passage = pass_gate(project, name, digest, steps, accept_risk, _views_that_apply(function, beside), beside)
    config = _next_version(project)

    staging = build_beside(project.vault.root, out)
    try:
        _copy_public(candidate, staging)
        record = project.cut.public_record
        card = staging / "README.md"
        scores = _scores(project, candidate, name)
        retractions = describe_retractions(project.retracted, steps)
        write_card(card, config, record, index, scores, passage, reason, retractions)
        if passage.report is not None:
            make_folder((staging / ATTACK_REPORT).parent, PUBLIC_FOLDER)
            write_json(staging / ATTACK_REPORT, passage.report.model_dump(mode="json"), PUBLIC_FILE)
        manifest = _manifest(project, config, index, passage.claims, _describe(staging, config))
        write_manifest(staging, manifest)
        if key is not None:
            write_signature(staging, key)
        # As any reader can, in a limited child; only then are its files opened here, for what only the owner can see.
        _refuse_unsound(staging)
        _refuse_private_facts(staging, project, name)
    except BaseException:
        remove_folder(staging)
        remove_unpublished(project.vault.root)
        raise
    entry = {
        "name": manifest.name,
        "version": manifest.version,
        "function": name,
        "function_digest": function.digest,
        "bank": project.bank_id,
        "second_function": reason,
        "accepted_risk": passage.accepted_risk,
        "index_sha256": digest,
        "manifest_sha256": sha256_of(staging / MANIFEST),
        "place": os.path.relpath(out, project.config.folder),
    }
    # Before the swap, so that nothing is public that the ledger does not know; `published` only when it is.
    remember_release(project.vault, entry | {"published": False})
    staging.chmod(PUBLIC_FOLDER)
    swap(staging, out)
    remember_release(project.vault, entry | {"published": True})
    remove_unpublished(project.vault.root)
    return manifest


def _refuse_place(out: Path, project: Project) -> None:
    config = project.config
    if nested := project.nested_with(out):
        raise VaultError(f"{out} is no place for a release: {'; '.join(nested)}. Name another place with --out.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    there = read_manifest(out)
    if not isinstance(there, Manifest) or there.name != config.release.name:
        raise VaultError(
            f"{out} is there and is not a release named {config.release.name!r}; it would be replaced. "
            "Name another place with --out."
        )
    listed = UNLISTED | {record.path for record in there.files}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if foreign := sorted(found - listed):
        raise VaultError(
            f"{out} holds what its manifest does not list: {', '.join(foreign[:10])}{' ...' if foreign[10:] else ''}. "
            "It would be gone with the release that is replaced. Move it elsewhere. Nothing was changed."
        )


def _refuse_unknown_releases(out: Path, project: Project) -> None:
    """That the ledger knows the releases that stand here: where it was lost, any function would pass for the first."""
    name, known = project.config.release.name, {entry["manifest_sha256"] for entry in releases(project.vault)}
    for place in (out, project.config.folder / "release"):
        there = read_manifest(place)
        if isinstance(there, Manifest) and there.name == name and _manifest_digest(place) not in known:
            raise VaultError(
                f"{place} is a release named {name!r} that {project.vault.ledger} does not know: which function made "
                "it cannot be told. Bring back the ledger, or the vault that it was made from. If that is lost, move "
                "the release away, and package its function before any other. Nothing was published."
            )


def _refuse_strangers(candidate: Path, index: BankIndex) -> None:
    """That the candidate holds the files of a release, each of them, and nothing else."""
    expected = {f"model/{name}" for name in ("model.json", "featurizer.safetensors", "classifier.safetensors")}
    expected |= {"features/index.json"}
    expected |= {f"features/{shard.file}" for shards in index.splits.values() for shard in shards}
    found = {
        path.relative_to(candidate).as_posix(): path.is_file() and not path.is_symlink()
        for path in candidate.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    strangers = sorted({name for name, plain in found.items() if not plain} | (set(found) - expected))
    strangers += sorted(name for name in expected if role_of(name) is None)
    missing = sorted(expected - set(found))
    if strangers or missing:
        raise RefusedError(
            f"the candidate is not what a release holds. No place in a release: {', '.join(strangers[:10]) or 'none'}. "
            f"Missing: {', '.join(missing[:10]) or 'none'}. Nothing was published. Look at {candidate}, and run "
            "`dpf-release poison` again."
        )


def _refuse_other_origin(project: Project, candidate: Path, name: str, function: FittedFunction) -> None:
    """That the candidate was made by today's function from today's features and network, and is as it was made."""
    model = candidate / "model"
    weights = (model / "featurizer.safetensors").read_bytes() + (model / "classifier.safetensors").read_bytes()
    problems = changed_since_poison(project, name, function, candidate / "features" / "index.json")
    if candidate_origin(project, function)["model"] != hashlib.sha256(weights).hexdigest():
        problems.append("weights changed since")
    if read_model_record(model / "model.json") != project.cut.public_record:
        problems.append("model/model.json changed since")
    if problems:
        raise RefusedError(
            f"the candidate {name!r} is not of today: {'; '.join(problems)}. Nothing was published. Run "
            f"`dpf-release poison --name {name}` again."
        )


def _scores(project: Project, candidate: Path, name: str) -> dict[str, Any]:
    """What `measure` found for exactly this candidate: the `task` part of `val` and `test`; empty where it did not."""
    vault, path = project.vault, project.vault.reports(name) / "measurements.json"
    report = vault.read_record(path, f"poison --name {name}") if vault.holds(path) else {}
    if report.get("index_sha256") != sha256_of(candidate / "features" / "index.json"):
        return {}
    return {split: report[split]["task"] for split in ("val", "test") if "task" in report[split]}


def _next_version(project: Project) -> Config:
    """The configuration; with the next version where the one that it says was published with rows since retracted."""
    release = project.config.release
    version = project.retracted.version_after(release.version)
    return project.config.model_copy(update={"release": release.model_copy(update={"version": version})})


def _refuse_retracted(project: Project, candidate: Path, index: BankIndex) -> None:
    gone = project.retracted.ids
    if gone and any(
        row_id.tobytes() in gone for split in index.splits for row_id in FeatureBank(candidate / "features", split).ids
    ):
        raise RefusedError(
            "the candidate has rows that were retracted. Nothing was published. Write it anew: `dpf-release poison "
            f"--name {candidate.name} --restart`."
        )


def _retraction_steps(project: Project, name: str) -> list[dict[str, Any]]:
    """By which retractions rows were taken out of the candidate, the first first."""
    made = project.vault.read_record(project.vault.function(name) / CANDIDATE, f"poison --name {name}")
    steps: list[dict[str, Any]] = made.get("retracted", [])
    return steps


# --------------------------------------------------------------------------------------------- the ledger


def _settle_ledger(project: Project) -> None:
    """After a crash around the swap: a release that stands in its place is published, one removed before it is not.

    One that is in neither stays, unsettled, and counts as published: it may have been taken elsewhere.
    """
    vault = project.vault
    for entry in releases(vault):
        if not entry.get("published", True):
            place = project.config.folder / entry["place"]
            if _manifest_digest(place) == entry["manifest_sha256"]:
                remember_release(vault, entry | {"published": True})
            elif removed_manifest(vault.root) == entry["manifest_sha256"]:
                forget_release(vault, entry)


def _manifest_digest(folder: Path) -> str | None:
    return sha256_of(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def _released_beside(project: Project, function: FittedFunction) -> tuple[str, ...]:
    """Digests of the indexes of the last release of each other function on these features."""
    mine = [entry for entry in releases(project.vault) if entry["bank"] == project.bank_id]
    others = {entry["function_digest"]: entry["index_sha256"] for entry in mine}
    return tuple(index for digest, index in others.items() if digest != function.digest)


def _views_that_apply(function: FittedFunction, beside: Sequence[str]) -> list[type[ReleaseView]]:
    """What an attacker of this release holds, although the attack that wants it is not always one on a release."""
    held: list[type[ReleaseView]] = [LeakedVault] if function.chain.known_by_name else []
    return [*held, TwoReleases] if beside else held


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


# --------------------------------------------------------------------------------------------- is anything private?


def _refuse_unpoisoned(index: BankIndex, *, poisons: bool) -> None:
    if not (index.poisoned and poisons):
        raise RefusedError(
            "this bank is not poisoned: its function changes nothing, and a reconstructor shows the pictures in it. "
            "Nothing was published. Fit a function with `dpf-release fit-poison`."
        )


def _refuse_unsound(staging: Path) -> None:
    """That the digests are right, each file is what its role says, the records agree, and every row is finite."""
    if problems := verify_deep(staging):
        raise RefusedError(
            "the release would hold files that are not what they should be. Nothing was published.\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nRun `dpf-release poison --restart`, and report it where that does not help."
        )


def _refuse_private_facts(staging: Path, project: Project, name: str) -> None:
    if problems := private_facts(staging, project, name):
        raise RefusedError(
            "the release would tell what is private. Nothing was published.\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nTexts: change [release] in dpf.toml, or the reason that was given. Rows of φ1(S): fit "
            "with more epochs or a larger lambda, and poison again. Order, ids and tensors are ours to get right: run "
            "`dpf-release poison --restart`, and report it where that does not help."
        )


# --------------------------------------------------------------------------------------------- publishing


def _copy_public(candidate: Path, staging: Path) -> None:
    for path in sorted(candidate.rglob("*")):
        if path.is_file():
            target = staging / path.relative_to(candidate)
            make_folder(target.parent, PUBLIC_FOLDER)
            with replacing(target, PUBLIC_FILE) as partial:
                shutil.copyfile(path, partial)


def _describe(staging: Path, config: Config) -> tuple[FileRecord, ...]:
    """All files, with a `croissant.json` that lists the data among them, for the manifest to list; each read once."""
    files = describe_files(staging)
    release = config.release
    description = release.description.strip() or NO_DESCRIPTION
    tree = croissant(release.name, release.version, release.licence, description, files)
    write_json(staging / CROISSANT, tree, PUBLIC_FILE)
    return tuple(sorted((*files, describe_file(staging, CROISSANT)), key=lambda record: record.path))


def _manifest(
    project: Project, config: Config, index: BankIndex, claims: Claims, files: tuple[FileRecord, ...]
) -> Manifest:
    record = project.cut.public_record
    return Manifest(
        name=config.release.name,
        version=config.release.version,
        previous=_previous(project.vault, config),
        licence=config.release.licence,
        task=record.task,
        classes=record.classes,
        targets=record.targets,
        splits={split: sum(shard.rows for shard in shards) for split, shards in index.splits.items()},
        claims=claims,
        files=files,
    )


def _previous(vault: Vault, config: Config) -> str | None:
    """The release before the first of this version: packaged again, wherever to, it has the same predecessor."""
    made = [entry for entry in releases(vault) if entry["name"] == config.release.name]
    before = list(takewhile(lambda entry: entry["version"] != config.release.version, made))
    return str(before[-1]["manifest_sha256"]) if before else None
