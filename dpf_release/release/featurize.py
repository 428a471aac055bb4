"""A downstream user's own images T as a bank φ1(T), in the layout of a release's banks."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.build import Compute, changed_facts, machine_facts, refuse_other_plan, write_bank
from dpf_release.bank.format import ID_BYTES, INDEX, SPLITS, BankIndex, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import BankWriter, Span, SplitRows
from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder, write_json
from dpf_release.core.progress import announce
from dpf_release.core.ranks import Ranks
from dpf_release.core.sizes import parse_size
from dpf_release.errors import BankError, ConfigError, ImageError
from dpf_release.images.dataset import BadImage, Pictures
from dpf_release.images.read import read_table
from dpf_release.images.survey import refuse_bad, survey_together
from dpf_release.images.table import ImageTable
from dpf_release.models.training import pick_device
from dpf_release.poisoning.mixture import Draw, drawn_anew
from dpf_release.release.model_record import ModelRecord
from dpf_release.release.release import Release

NEW_PLAN = ".plan.json"  # of a downstream user's bank, while it is written
UNDRAWN, DRAWN = ".undrawn", "drawn"  # in the folder of a bank of drawn rows, until it is whole


def featurized(phi_1: nn.Module, pictures: Pictures, rows: Mapping[SplitName, Rows], device: torch.device) -> Compute:
    """φ1 of the pictures at `rows` of the table, which are decoded ahead."""

    def compute(spans: Sequence[Span]) -> Iterator[NDArray[np.floating[Any]]]:
        decoded = pictures.stream([rows[span.split][span.start : span.stop] for span in spans])
        with contextlib.closing(decoded):
            for batch, bad in decoded:
                if bad:
                    raise ImageError(
                        f"{bad[0].name}: {bad[0].reason}. It could be read before. Put the file back with the time of "
                        "its last change, and run again to go on; or begin anew with --restart."
                    )
                batch = pictures.preprocess.normalise(batch.to(device, non_blocking=True))
                # The same bytes at each run: no choice of algorithms by a stopwatch.
                with torch.inference_mode(), torch.backends.cudnn.flags(benchmark=False, deterministic=True):
                    computed = phi_1(batch.contiguous(memory_format=torch.channels_last)).contiguous().cpu()
                yield computed.numpy()

    return compute


def featurize_new(
    release: Release,
    images: Path,
    out: Path,
    shard_size: str = "1 GiB",
    batch_size: int = 128,
    max_bad: float = 0.001,
    device: str = "auto",
    own_classes: bool = False,
    draw: Draw | None = None,
) -> tuple[BankIndex, list[BadImage]]:
    """A downstream user's own bank φ1(T), unpoisoned and theirs to keep, in the layout of a release's banks.

    A run that was cut off goes on. Under `torchrun` the shards are divided among the ranks. T is an ImageFolder tree or
    a CSV table; its classes are among the release's, its targets are the same. A larger share of unreadable images than
    `max_bad`, and nothing is written.

    With `own_classes` T's classes need not be the release's: they are numbered by name, in alphabetical order. With
    `draw` the bank has rows drawn by the release's procedure from the statistics of T's `train` in the place of φ1(T),
    which combine with the release's drawn rows of other classes.

    Returns:
        The index, and the images that could not be read and have no row.

    Raises:
        ImageError: a class of T is not one of the release's, or too many images are unreadable.
        BankError: the folder holds a bank already, or half of one that was made from something else.
        ConfigError: rows are to be drawn, and those of the release were not.
        StorageError: another run works in the folder, or the disk has not enough room.
    """
    ranks, where = Ranks.of_torchrun(), pick_device(device)
    table = _own_splits(images, release.record, own_classes)
    make_folder(out)
    with ranks.holding(out):
        undrawn = out / UNDRAWN if draw else out
        if (out / INDEX).exists() and not (out / NEW_PLAN).exists():
            ranks.once(lambda: shutil.rmtree(out / UNDRAWN, ignore_errors=True))  # of a run that was cut off at its end
            raise BankError(f"{out} holds a bank already. Name another folder with --out, or remove it.")
        if draw:
            _refuse_draw(release, table, out, draw, ranks)
            make_folder(undrawn)
        pictures = Pictures(table, release.preprocess)
        bad = survey_together(pictures, ranks, "Reading images")
        refuse_bad(bad, len(table), max_bad)
        undecodable = [image.row for image in bad]
        facts = {
            "source_sha256": table.digest(),
            "featurizer_sha256": release.index.featurizer_sha256,
            "undecodable": undecodable,
            "shard_size": parse_size(shard_size),
            "batch_size": batch_size,
            **({"draw": [draw.seed, draw.epsilon, draw.delta]} if draw else {}),
            **machine_facts(where),
        }
        generator = np.random.default_rng(_planned_ids(undrawn, facts, ranks))
        rows_of = {
            name: np.setdiff1d(table.rows_of(name), undecodable) for name in SPLITS if name == "train" or not draw
        }
        rows = {
            name: SplitRows(table.targets[rows], generator.integers(0, 256, (len(rows), ID_BYTES), np.uint8))
            for name, rows in rows_of.items()
        }
        header = BankIndex(
            poisoned=False,
            encoding="float16 before ReLU" if draw and release.ends_in_relu else "float16",
            featurizer_sha256=release.index.featurizer_sha256,
            feature_shape=release.record.feature_shape,
            targets=release.record.target_columns,
        )
        writer = BankWriter(undrawn, header, parse_size(shard_size), batch_size)
        phi_1 = release.featurizer(before_relu=draw is not None).to(where).to(memory_format=torch.channels_last)
        compute = featurized(phi_1, pictures, rows_of, where)
        index = write_bank(writer, rows, compute, ranks, "Writing features", "images")
        if draw:
            index = _draw(release, replace(writer, folder=out), draw, np.unique(table.targets), ranks)
        else:
            ranks.once((out / NEW_PLAN).unlink)  # its ids are in the bank now, and nobody else's business
    if own_classes:
        announce("Classes by number: " + ", ".join(f"{number} {name}" for number, name in enumerate(table.classes)))
    return index, bad


def _refuse_draw(release: Release, table: ImageTable, out: Path, draw: Draw, ranks: Ranks) -> None:
    """What speaks against drawing rows of these images into that folder, before anything is computed."""
    if ranks.world_size > 1:
        raise ConfigError("rows are drawn by one process. Run this without torchrun.")
    targets = table.targets[table.rows_of("train")]
    if table.targets.ndim > 1 or not len(targets):
        raise ConfigError("expected images with classes in train, found none: rows are drawn for classes.")
    draw.refuse(release.procedure, np.unique(targets, return_counts=True)[1])
    ours = {UNDRAWN} | ({"train"} if (out / UNDRAWN / DRAWN / INDEX).exists() else set())
    if others := sorted(
        path.name for path in out.iterdir() if path.name not in ours and not path.name.startswith(".lock")
    ):
        raise BankError(
            f"expected an empty folder for drawn rows, found {', '.join(others[:5])} in {out}. Name another with --out."
        )


def _draw(release: Release, writer: BankWriter, draw: Draw, classes: Rows, ranks: Ranks) -> BankIndex:
    """A bank of drawn rows from one of real ones, which goes.

    It is made beside those, and takes its place when it is whole; where it was cut off it is begun anew, as noise is.
    """
    out = writer.folder
    made = out / UNDRAWN / DRAWN
    if not (made / INDEX).exists():
        shutil.rmtree(made, ignore_errors=True)
        own = FeatureBank(out / UNDRAWN, "train").before_relu()
        told = () if draw.epsilon is None else classes.tolist()
        source = drawn_anew(release.procedure, release.record.feature_shape, own, draw, told)

        def compute(spans: Sequence[Span]) -> Iterator[NDArray[np.floating[Any]]]:
            for span in spans:
                yield source.read(np.arange(span.start, span.stop))

        header = writer.header.model_copy(update={"drawn": True, "encoding": "float16"})
        rows: dict[SplitName, SplitRows] = {"train": SplitRows(source.targets, source.ids)}
        write_bank(replace(writer, folder=made, header=header), rows, compute, ranks, "Drawing rows", "rows")
    for part in ("train", INDEX):
        if (made / part).exists():
            (made / part).rename(out / part)
    shutil.rmtree(out / UNDRAWN)
    return read_index(out)


def _planned_ids(out: Path, facts: dict[str, Any], ranks: Ranks) -> list[int]:
    """The seed of the new bank's ids, kept in its plan until it is written; `BankError`: a plan of something else."""
    plan = out / NEW_PLAN
    new = facts | {"ids": secrets.token_hex(32)}
    ranks.once(lambda: None if plan.exists() else write_json(plan, new))
    known = json.loads(plan.read_text(encoding="utf-8"))
    refuse_other_plan(f"the bank in {out}", changed_facts(known, facts), "remove the folder", BankError)
    return list(bytes.fromhex(known["ids"]))


def _own_splits(images: Path, record: ModelRecord, own_classes: bool) -> ImageTable:
    """T as it is split already (all of it `train` where it is not), its labels by the release's numbers, or its own."""
    table = read_table(images, task=record.task, target_columns=record.targets, val_fraction=0.0, test_fraction=0.0)
    if own_classes:
        return table
    unknown = sorted(set(table.classes) - set(record.classes))
    if unknown:
        raise ImageError(
            f"expected images of the release's classes {', '.join(record.classes)}, found also {', '.join(unknown)}. "
            "Rename or remove those, or say with --own-classes that they are your own."
        )
    if record.task == "regression":
        return table
    number = np.array([record.classes.index(name) for name in table.classes], np.int64)
    return replace(table, targets=number[table.targets], classes=record.classes)
