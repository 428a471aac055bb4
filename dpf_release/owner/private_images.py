"""S without what was retracted, and Q, both surveyed; what a survey finds is kept in the vault."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from dpf_release.core.ranks import Ranks
from dpf_release.images.dataset import BadImage, Pictures
from dpf_release.images.decode import Preprocess
from dpf_release.images.read import Earlier, read_table
from dpf_release.images.survey import ImageSet, refuse_bad, survey_together
from dpf_release.images.table import ImageTable
from dpf_release.owner.config import Config
from dpf_release.owner.vault.retractions import Retracted, digest_of_name
from dpf_release.owner.vault.vault import Vault


def table_without(config: Config, vault: Vault, retracted: Retracted) -> tuple[ImageTable, int]:
    """The files of S without those that were retracted, and how many of these are still there.

    None is decoded, and nothing is written. Where splits are made, each image keeps the one that the bank has it in:
    made anew, they would mix what Φ was trained on with what judges it.
    """
    task, section = config.task, config.images.private
    splits = {}
    if retracted.retractions and retracted.splitting == splitting(config) and vault.holds(vault.ids):
        splits = {line["source"]: line["split"] for line in vault.read_ids()}
    table = read_table(
        config.locate(section.path),
        task=task.kind,
        target_columns=task.targets,
        group_column=section.group,
        classes=section.classes,
        val_fraction=section.val_fraction,
        test_fraction=section.test_fraction,
        seed=section.seed,
        earlier=Earlier(retracted.classes, splits),
    )
    gone = set(retracted.sources)
    kept = [row for row, path in enumerate(table.paths) if not gone or digest_of_name(path) not in gone]
    return (table.select(kept) if gone else table), len(table) - len(kept)


def splitting(config: Config) -> dict[str, Any]:
    """By what missing splits of S are made."""
    return config.images.private.model_dump(mode="json", include={"group", "val_fraction", "test_fraction", "seed"})


def surveyed(
    name: Literal["private", "public"],
    table: ImageTable,
    preprocess: Preprocess,
    config: Config,
    vault: Vault,
    ranks: Ranks,
) -> ImageSet:
    """A set with its unreadable images found; the finding is kept in the vault while the files stay the same.

    An `ImageError`, where more of them are unreadable than `max_bad` allows.
    """
    pictures = Pictures(table, preprocess, config.compute.workers)
    path, digest = vault.survey(name), table.digest()
    known = vault.read_record(path, "featurize") if vault.holds(path) else {}
    # The first rank's word: another may come when it has written its finding already.
    if ranks.from_first(np.array([known.get("digest") == digest]))[0]:
        known = vault.read_record(path, "featurize")
        row_of = {source: row for row, source in enumerate(table.paths)}
        bad = [BadImage(row_of[entry["name"]], entry["name"], entry["reason"]) for entry in known["bad"]]
    else:
        bad = survey_together(pictures, ranks, f"Reading the {name} images")
        found = {"digest": digest, "bad": [{"name": b.name, "reason": b.reason} for b in bad]}
        ranks.once(lambda: vault.write_json(path, found))
    refuse_bad(bad, len(table), getattr(config.images, name).max_bad)
    return ImageSet(table, pictures, tuple(bad), digest)


def drop_from_survey(vault: Vault, table: ImageTable, before: str) -> None:
    """Keeps what is known of the images that stay in S, of digest `before` as it was: `table`, as it will be."""
    path = vault.survey("private")
    known = vault.read_record(path, "featurize") if vault.holds(path) else {}
    if known.get("digest") == before:
        there = set(table.paths)
        bad = [entry for entry in known["bad"] if entry["name"] in there]
        vault.write_json(path, {"digest": table.digest(), "bad": bad})
