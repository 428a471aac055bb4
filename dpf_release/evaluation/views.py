"""What the harness hands to an attack: the view that it declares, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dpf_release.attacks.threat_models import (
    Budget,
    HeldPictures,
    HeldRows,
    KnownPairs,
    LabelledRows,
    LeakedVault,
    QueryImages,
    ReleaseView,
    Remembered,
    TwoReleases,
)
from dpf_release.errors import NotGrantedError
from dpf_release.evaluation.query_images import draw_labelled, draw_queries, public_rows
from dpf_release.evaluation.targets import Target
from dpf_release.evaluation.truth import Truth
from dpf_release.owner.workbench import Workbench

KNOWN_PAIRS = 1000  # that A6 holds


@dataclass(frozen=True, eq=False)
class Setting:
    """What all attacks of a run have in common.

    Attributes:
        workbench: networks, Q and what else it takes.
        truth: the pools; only pictures that a view grants leave it.
        budget: of each attack.
        seed: of all that is drawn.
        remembered: φ1(Q), of each split.
    """

    workbench: Workbench
    truth: Truth
    budget: Budget
    seed: int
    remembered: Mapping[str, Remembered] = field(default_factory=lambda: {"train": Remembered(), "val": Remembered()})


def grant(view: type[ReleaseView], target: Target, setting: Setting) -> ReleaseView:
    """A view of one target.

    Raises:
        NotGrantedError: this project has not what the view holds (attributes, a second release).
    """
    workbench = setting.workbench
    fields: dict[str, Any] = {
        "phi_1": workbench.phi_1,
        "phi_2": target.classifier or workbench.phi_2,
        "preprocess": workbench.preprocess,
        "non_negative": workbench.features.non_negative,
        "task": workbench.task,
        "bank": target.rows,
        "asked": setting.truth.asked,
        "public": _held_pictures(setting, "train"),
        "public_val": _held_pictures(setting, "val"),
        "budget": setting.budget,
        "seed": setting.seed,
        "device": workbench.device,
        "bf16": workbench.bf16,
        "subject": {
            "featurizer_sha256": workbench.featurizer_sha256,
            "classifier_sha256": target.subject if target.classifier else workbench.classifier_sha256,
            "public_images_sha256": workbench.public.digest,
            "public_order": setting.seed,
        },
        "bank_subject": target.subject,
        "kept": workbench.kept,
    }
    more = GRANTS[view](target, setting) if view in GRANTS else {}
    return view(**{**fields, **more})


def _held_pictures(setting: Setting, split: Literal["train", "val"]) -> HeldPictures:
    """Q."""
    images = setting.workbench.public
    rows, read = public_rows(images, split, setting.seed), images.pictures.read
    return HeldPictures(len(rows), lambda numbers: read(rows[numbers]), setting.remembered[split])


def _leaked_vault(target: Target, setting: Setting) -> dict[str, Any]:
    return {"poison": target.poison}


def _query_images(target: Target, setting: Setting) -> dict[str, Any]:
    queries = draw_queries(setting.workbench, target, setting.truth, setting.seed)
    return {
        "pictures": HeldPictures(len(queries.labels), queries.read),
        "labels": queries.labels,
        "bins": setting.truth.bins,
        "pools": queries.pools,
        "persons": queries.persons,
    }


def _labelled_rows(target: Target, setting: Setting) -> dict[str, Any]:
    labelled = draw_labelled(setting.workbench, target, setting.truth, setting.seed)
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
    other, _ = target.second()
    order = np.random.default_rng([setting.seed, 9]).permutation(len(other))
    return {"other": HeldRows(other.targets[order], lambda rows: other.read(order[rows]))}


# What a view holds beyond a release: view → (target, setting) → its fields, in the place of a release's.
GRANTS: dict[type[ReleaseView], Callable[[Target, Setting], dict[str, Any]]] = {
    QueryImages: _query_images,
    LabelledRows: _labelled_rows,
    KnownPairs: _known_pairs,
    LeakedVault: _leaked_vault,
    TwoReleases: _two_releases,
}
