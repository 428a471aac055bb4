"""What the harness hands to an attack: the view that it declares, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import load, save
from torch import Tensor

from dpf_release.attacks.threat_models import (
    Budget,
    Candidates,
    HeldPictures,
    HeldRows,
    Kept,
    KnownPairs,
    LabelledRows,
    LeakedVault,
    ReleaseView,
    Remembered,
    TwoReleases,
)
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.query_images import draw_labelled, draw_suspects, public_rows
from dpf_release.evaluation.targets import Target
from dpf_release.evaluation.truth import Truth
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import Vault

KNOWN_PAIRS = 1000  # that A6 holds


@dataclass(frozen=True, eq=False)
class Setting:
    """What all attacks of a run have in common.

    Attributes:
        project: the owner's.
        truth: the pools; only pictures that a view grants leave it.
        budget: of each attack.
        seed: of all that is drawn.
        kept: where attackers keep what they train.
        remembered: φ1(Q), of each split.
    """

    project: Project
    truth: Truth
    budget: Budget
    seed: int
    kept: Kept
    remembered: Mapping[str, Remembered] = field(default_factory=lambda: {"train": Remembered(), "val": Remembered()})


def grant(view: type[ReleaseView], target: Target, setting: Setting) -> ReleaseView:
    """A view of one target.

    Raises:
        NotGrantedError: this project has not what the view holds (attributes, a second release).
    """
    project, images = setting.project, setting.project.public_images
    cut = project.cut
    fields: dict[str, Any] = {
        "phi_1": project.frozen(cut.split.featurizer),
        "phi_2": target.classifier or project.frozen(cut.split.classifier),
        "preprocess": project.preprocess,
        "non_negative": cut.split.non_negative,
        "task": project.config.task.kind,
        "bank": target.rows,
        "asked": setting.truth.asked,
        "public": _held_pictures(setting, "train"),
        "public_val": _held_pictures(setting, "val"),
        "budget": setting.budget,
        "seed": setting.seed,
        "device": project.device,
        "bf16": project.config.compute.bf16,
        "subject": {
            "featurizer_sha256": cut.featurizer_sha256,
            "classifier_sha256": target.subject
            if target.classifier
            else hashlib.sha256(cut.classifier_file).hexdigest(),
            "public_images_sha256": images.digest,
            "public_order": setting.seed,
        },
        "bank_subject": target.subject,
        "kept": setting.kept,
        "function": target.function,
    }
    more = GRANTS[view](target, setting) if view in GRANTS else {}
    return view(**{**fields, **more})


def _held_pictures(setting: Setting, split: Literal["train", "val"]) -> HeldPictures:
    """Q."""
    rows, read = public_rows(setting.project, split, setting.seed), setting.project.public_images.pictures.read
    return HeldPictures(len(rows), lambda numbers: read(rows[numbers]), setting.remembered[split])


def _leaked_vault(target: Target, setting: Setting) -> dict[str, Any]:
    return {"poison": target.poison}


def _candidates(target: Target, setting: Setting) -> dict[str, Any]:
    suspects = draw_suspects(setting.project, target, setting.truth, setting.seed)
    return {
        "candidates": HeldPictures(len(suspects.labels), suspects.read),
        "labels": suspects.labels,
        "bins": setting.truth.bins,
        "pools": suspects.pools,
        "persons": suspects.persons,
    }


def _labelled_rows(target: Target, setting: Setting) -> dict[str, Any]:
    labelled = draw_labelled(setting.project, target, setting.truth, setting.seed)
    return {
        "values": labelled.values,
        "public_values": labelled.public_values,
        "known_rows": labelled.known_rows,
        "known_values": labelled.known_values,
        "bins": setting.truth.bins,
        "asked": labelled.asked,
    }


def _known_pairs(target: Target, setting: Setting) -> dict[str, Any]:
    """Rows that are not asked for, with the picture that each has the most of; none of these is to be found either."""
    truth = setting.truth
    rows = np.setdiff1d(np.arange(len(target.rows)), truth.asked)
    own = target.foremost(rows)
    rows = rows[~np.isin(own, np.concatenate([pool.pictures for pool in truth.pools]))]
    if not len(rows):
        raise NotGrantedError("all rows are asked for: the bank has none left of which the picture could be known")
    rows = np.random.default_rng([setting.seed, 6]).permutation(rows)[:KNOWN_PAIRS]
    own = target.foremost(rows)
    return {"pictures": HeldPictures(len(rows), lambda numbers: truth.read(own[numbers])), "pair_rows": rows}


def _two_releases(target: Target, setting: Setting) -> dict[str, Any]:
    """Another release of the same pictures, its rows in an order that says nothing."""
    other, _ = target.second(setting.project)
    order = np.random.default_rng([setting.seed, 9]).permutation(len(other))
    return {"other": HeldRows(other.targets[order], lambda rows: other.read(order[rows]))}


# What a view holds beyond a release: view → (target, setting) → its fields, in the place of a release's.
GRANTS: dict[type[ReleaseView], Callable[[Target, Setting], dict[str, Any]]] = {
    Candidates: _candidates,
    LabelledRows: _labelled_rows,
    KnownPairs: _known_pairs,
    LeakedVault: _leaked_vault,
    TwoReleases: _two_releases,
}


def kept_in(vault: Vault) -> Kept:
    """What attackers have trained, in the vault; one file for each name and subject.

    Three functions and no vault: an attack holds them, and is to hold nothing of the owner's.
    """

    def path_of(name: str, subject: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps([name, subject], sort_keys=True).encode()).hexdigest()
        return vault.root / "attackers" / f"{name.split(' ', 1)[0]}-{digest[:32]}.safetensors"

    def path_to_write(name: str, subject: Mapping[str, Any]) -> Path:
        path = path_of(name, subject)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return path

    def load_kept(name: str, subject: Mapping[str, Any]) -> dict[str, Tensor] | None:
        path = path_of(name, subject)
        return load(vault.read_bytes(path, "attack")) if vault.holds(path) else None

    def save_kept(name: str, subject: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        path = path_to_write(name, subject)
        vault.write_bytes(path, save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}))
        vault.remove(path.with_suffix(".checkpoint"))

    def checkpoint(name: str, subject: Mapping[str, Any]) -> Path | None:
        return vault.checkpoint(path_to_write(name, subject).with_suffix(".checkpoint"))

    return Kept(load_kept, save_kept, checkpoint)
