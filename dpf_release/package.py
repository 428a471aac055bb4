"""`package`: the only place that writes public files. Checks the candidate, builds the release beside, swaps it in."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from dpf_release.bank import BankIndex, FeatureBank, read_index
from dpf_release.card import write_card
from dpf_release.config import Config
from dpf_release.errors import RefusedError, VaultError
from dpf_release.manifest import (
    MANIFEST,
    Manifest,
    describe_files,
    read_manifest,
    role_of,
    write_manifest,
)
from dpf_release.near_rows import SAME_ROW_COSINE, count_near_rows
from dpf_release.pipeline.banks import candidate_origin
from dpf_release.pipeline.fitting import CANDIDATE, FittedFunction, load_function
from dpf_release.pipeline.project import Project
from dpf_release.record import ModelRecord, read_model_record
from dpf_release.release import Release
from dpf_release.storage import PUBLIC_FILE, PUBLIC_FOLDER, flush_to_disk, make_folder, replacing, sha256_of
from dpf_release.vault import BANK, remember_release


def package(project: Project, name: str = "default", out: Path | None = None) -> Manifest:
    """Publishes a candidate into a folder, whole or not at all; a release of the same name that is there is replaced.

    Args:
        project: the owner's.
        name: which fitted function's candidate.
        out: the release folder; by default `release` beside the configuration.

    Raises:
        VaultError: the candidate is unfinished, or `out` is no place for a release.
        RefusedError: the candidate holds what has no place in a release, was made from something else than today's
            function, features and network, is not poisoned, or has rows of φ1(S).
        StorageError: another run works in the vault, or the disk does not take the release.
        RankError: there are several ranks.
    """
    with project.working(together=False):
        return _package(project, name, (out or project.config.folder / "release").resolve())


def _package(project: Project, name: str, out: Path) -> Manifest:
    _recover(out)
    _refuse_place(out, project)
    candidate = project.vault.opened(project.vault.candidate(name))
    index = read_index(candidate / "features")
    function = load_function(project, name)
    _refuse_strangers(candidate, index)
    _refuse_other_origin(project, candidate, name, function)
    _refuse_unpoisoned(project, candidate, index, poisons=function.chain.poisons)

    staging = out.with_name(f".{out.name}.dpf-staging")
    shutil.rmtree(staging, ignore_errors=True)
    make_folder(staging, PUBLIC_FOLDER)
    try:
        _copy_public(candidate, staging)
        record = project.cut.public_record
        write_card(staging / "README.md", project.config, record, index, _scores(project, candidate, name))
        manifest = _manifest(project.config, record, index, staging, out)
        write_manifest(staging, manifest)
        Release.open(staging)  # what its reader will check: digests, and that its parts belong together
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    remember_release(
        project.vault,
        {
            "name": manifest.name,
            "version": manifest.version,
            "function": name,
            "function_digest": function.digest,
            "manifest_sha256": sha256_of(staging / MANIFEST),
        },
    )
    swap(staging, out)
    return manifest


def _refuse_place(out: Path, project: Project) -> None:
    config, vault = project.config, project.vault.root.resolve()
    inputs = {
        "the vault": vault,
        "the private images": config.locate(config.images.private.path),
        "the public images": config.locate(config.images.public.path),
    }
    for what, path in inputs.items():
        folder = path if path.is_dir() else path.parent
        if out.is_relative_to(vault) or folder.is_relative_to(out):
            raise VaultError(f"{out} is no place for a release: {what} ({path}) and it must not lie in each other.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    there = read_manifest(out)
    if not isinstance(there, Manifest) or there.name != config.release.name:
        raise VaultError(
            f"{out} is there and is not a release named {config.release.name!r}; it would be replaced. "
            "Name another place with --out."
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
    made = project.vault.read_record(project.vault.function(name) / CANDIDATE, f"poison --name {name}")
    model, features = candidate / "model", candidate / "features"
    weights = (model / "featurizer.safetensors").read_bytes() + (model / "classifier.safetensors").read_bytes()
    today = candidate_origin(project, function)
    problems = [f"another {key} than today's" for key in today if made["origin"].get(key) != today[key]]
    if made["index_sha256"] != sha256_of(features / "index.json"):
        problems.append("features/index.json changed since")
    if today["model"] != hashlib.sha256(weights).hexdigest():
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


# --------------------------------------------------------------------------------------------- is it poisoned?


def _refuse_unpoisoned(project: Project, candidate: Path, index: BankIndex, *, poisons: bool) -> None:
    if not (index.poisoned and poisons):
        raise RefusedError(
            "this bank is not poisoned: its function changes nothing, and a reconstructor shows the pictures in it. "
            "Nothing was published. Fit a function with `dpf-release fit-poison`."
        )
    public = [FeatureBank(candidate / "features", split) for split in index.splits]
    features = project.vault.opened(project.vault.features, *BANK)
    private = [FeatureBank(features, split) for split in read_index(features).splits]
    near, rows = count_near_rows(public, private)
    if near:
        raise RefusedError(
            f"{near} of {rows} rows are, but for a cosine of {SAME_ROW_COSINE}, rows of φ1(S): whoever has them "
            "has the pictures. Nothing was published. Fit with more epochs or a larger lambda, and poison again."
        )


# --------------------------------------------------------------------------------------------- publishing


def _copy_public(candidate: Path, staging: Path) -> None:
    for path in sorted(candidate.rglob("*")):
        if path.is_file():
            target = staging / path.relative_to(candidate)
            make_folder(target.parent, PUBLIC_FOLDER)
            with replacing(target, PUBLIC_FILE) as partial:
                shutil.copyfile(path, partial)


def _manifest(config: Config, record: ModelRecord, index: BankIndex, staging: Path, out: Path) -> Manifest:
    before = read_manifest(out) if out.exists() else None
    previous = None
    if isinstance(before, Manifest):
        # The same version again has the same predecessor: packaging twice gives the same bytes.
        same = before.version == config.release.version
        previous = before.previous if same else sha256_of(out / MANIFEST)
    return Manifest(
        name=config.release.name,
        version=config.release.version,
        previous=previous,
        licence=config.release.licence,
        task=record.task,
        classes=record.classes,
        targets=record.targets,
        splits={split: sum(shard.rows for shard in shards) for split, shards in index.splits.items()},
        files=describe_files(staging),
    )


def swap(staging: Path, out: Path) -> None:
    """Puts `staging` in the place of `out`: whoever looks finds the old folder or the new one, whole.

    Linux exchanges the two in one step. Elsewhere two renames are needed; after a crash between them the next `package`
    puts the old release back first.
    """
    flush_to_disk(staging)
    if not out.exists():
        staging.replace(out)
    elif _exchange(staging, out):
        shutil.rmtree(staging)
    else:
        out.replace(_set_aside(out))
        staging.replace(out)
        shutil.rmtree(_set_aside(out))
    flush_to_disk(out.parent)


def _set_aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.dpf-old")


def _recover(out: Path) -> None:
    """After a crash between two renames: the old release back in its place, or out of the way of the new one."""
    old = _set_aside(out)
    if old.is_dir() and out.exists():
        shutil.rmtree(old)
    elif old.is_dir():
        old.replace(out)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths in one step (Linux's `renameat2`); False where the system cannot."""
    at_cwd, exchange = -100, 2
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0
