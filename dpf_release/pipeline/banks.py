"""`featurize` and the writing half of `poison`: φ1(S) and P(φ1(S)), on disk."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank import ID_BYTES, BankIndex, BankWriter, FeatureSource, ShardRecord, SplitName
from dpf_release.config import parse_size
from dpf_release.errors import ImageError, VaultError
from dpf_release.image_table import ImageTable, read_table
from dpf_release.images import BadImage, Pictures, Preprocess, refuse_bad, survey
from dpf_release.models.functions import RowSource
from dpf_release.pipeline.fitting import FittedFunction, load_function
from dpf_release.pipeline.network import import_network
from dpf_release.pipeline.project import Project
from dpf_release.progress import Progress
from dpf_release.record import ModelRecord
from dpf_release.release import Release
from dpf_release.storage import make_folder, replacing, sha256_of, write_json
from dpf_release.vault import RELEASED_SPLITS, SPLITS, write_ids

Rows = NDArray[np.int64]
CANDIDATE = "candidate.json"  # beside a function: what its candidate was made from


def featurize(project: Project, restart: bool = False) -> BankIndex:
    """Splits Φ and writes the private bank φ1(S), all three splits, rows in a secret random order.

    What the bank depends on is drawn and written before row 0; a run that was cut off goes on under that plan.

    Raises:
        VaultError: the folder holds a bank, or half of one, made under another plan, and `restart` is not set.
    """
    import_network(project, restart)
    cut, images, vault = project.cut, project.private_images, project.vault
    facts = _facts(project)
    if restart or not vault.plan.is_file():
        _draw_plan(project, facts)
    known = json.loads(vault.plan.read_text(encoding="utf-8"))
    changed = [key for key in facts if known.get(key) != facts[key]]
    if changed or sha256_of(vault.ids) != known["ids_sha256"]:
        raise VaultError(
            f"{vault.features} was begun under another plan; changed since: {', '.join(changed) or 'ids.csv'}. "
            "Put that back to go on, or start anew with --restart (new ids; functions fitted on the old bank are void)."
        )
    header = BankIndex(
        poisoned=False,
        featurizer_sha256=cut.featurizer_sha256,
        feature_shape=cut.record.feature_shape,
        targets=cut.record.target_columns,
    )
    writer = BankWriter(
        vault.features, header, parse_size(project.config.bank.shard_size), project.config.bank.batch_size
    )
    phi_1 = project.frozen(cut.split.featurizer)
    splits: dict[SplitName, tuple[ShardRecord, ...]] = {}
    rows_of, ids_of = project.bank_order
    with Progress("Writing features", sum(len(rows) for rows in rows_of.values())) as progress:
        for name in SPLITS:
            features = _featurized(phi_1, project.preprocess, images.pictures, rows_of[name], project.device)
            targets = images.table.targets[rows_of[name]]
            if len(targets):
                splits[name] = writer.write_split(name, targets, ids_of[name], features, progress.advance)
    return writer.finish(splits)


def _facts(project: Project) -> dict[str, Any]:
    """What the bytes of the bank depend on beside the ids; a resume under other facts is refused."""
    return project.source_facts | {
        "shard_size": project.config.bank.shard_size,
        "batch_size": project.config.bank.batch_size,
        "device": project.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "h5py": h5py.__version__,
        },
    }


def _draw_plan(project: Project, facts: dict[str, Any]) -> None:
    """The secret order and the random ids, from the operating system's randomness, and what goes with them."""
    vault, images = project.vault, project.private_images
    _remove_bank(vault.features)
    make_folder(vault.features)
    generator = np.random.default_rng(secrets.randbits(256))
    lines = []
    for name in SPLITS:
        for row, source in enumerate(generator.permutation(images.rows(name))):
            attributes = {key: values[source] for key, values in images.table.attributes.items()}
            fixed = {
                "id": secrets.token_hex(ID_BYTES),
                "split": name,
                "row": row,
                "source": images.table.paths[source],
            }
            lines.append(attributes | fixed)
    write_ids(
        vault.ids,
        lines,
        [key for key in images.table.attributes if key not in {"id", "split", "row", "source"}],
    )
    write_json(vault.plan, {**facts, "ids_sha256": sha256_of(vault.ids)})
    project.forget("bank_order")


def _remove_bank(folder: Path) -> None:
    for path in [folder / "plan.json", folder / "index.json", *folder.glob("*/shard-*.h5")]:
        path.unlink(missing_ok=True)


def _featurized(
    phi_1: nn.Module, preprocess: Preprocess, pictures: Pictures, rows: Rows, device: torch.device
) -> FeatureSource:
    """A feature source: (start, stop) of `rows` → φ1 of those pictures."""

    def features(start: int, stop: int) -> NDArray[np.float32]:
        batch = preprocess.normalise(pictures.read(rows[start:stop]).to(device))
        with torch.inference_mode():
            computed = phi_1(batch.contiguous(memory_format=torch.channels_last))
        read: NDArray[np.float32] = computed.float().cpu().contiguous().numpy()
        return read

    return features


def write_candidate(project: Project, name: str = "default") -> BankIndex:
    """P(φ1(S)) of `train` and `val`, and the public weights, exactly as `package` will publish them.

    Raises:
        VaultError: no function of that name is fitted, or it was fitted for another bank or featurizer.
    """
    function, cut = load_function(project, name), project.cut
    banks = {split: project.private_bank(split) for split in RELEASED_SPLITS}
    folder = make_folder(project.vault.candidate(name))
    (folder / "features" / "index.json").unlink(missing_ok=True)
    for measured in ("measurements.json", "reconstructions.png"):  # of the candidate before
        (project.vault.reports(name) / measured).unlink(missing_ok=True)
    origin = candidate_origin(project, function)
    record = project.vault.function(name) / CANDIDATE
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8"))["origin"] != origin:
        _remove_bank(folder / "features")  # shards of something else are not gone on with
    write_json(record, {"origin": origin, "index_sha256": None})
    _write_public_model(project, folder / "model")
    header = BankIndex(
        poisoned=function.chain.poisons,
        featurizer_sha256=cut.featurizer_sha256,
        feature_shape=cut.record.feature_shape,
        targets=cut.record.target_columns,
    )
    section = project.config.bank
    writer = BankWriter(folder / "features", header, parse_size(section.shard_size), section.batch_size)
    splits: dict[SplitName, tuple[ShardRecord, ...]] = {}
    with Progress("Poisoning", sum(len(bank) for bank in banks.values()), "rows") as progress:
        for split, bank in banks.items():
            source = _rows_of(function.poisoned(split, bank))
            splits[split] = writer.write_split(split, bank.targets, bank.ids, source, progress.advance)
    written = {folder / "features" / shard.file for shards in splits.values() for shard in shards}
    for path in set((folder / "features").glob("*/*")) - written:  # of a run with other shard sizes
        path.unlink()
    index = writer.finish(splits)
    write_json(record, {"origin": origin, "index_sha256": sha256_of(folder / "features" / "index.json")})
    return index


def candidate_origin(project: Project, function: FittedFunction) -> dict[str, str]:
    """What a candidate is made from; `package` publishes no candidate of another origin than today's."""
    return {
        "function": function.digest,
        "bank": project.bank_id,
        "model": hashlib.sha256(project.cut.featurizer_file + project.cut.classifier_file).hexdigest(),
        "record": project.cut.public_record.model_dump_json(),
    }


def _rows_of(source: RowSource) -> FeatureSource:
    return lambda start, stop: source.read(np.arange(start, stop))


def _write_public_model(project: Project, folder: Path) -> None:
    make_folder(folder)
    cut = project.cut
    for name, data in (("featurizer", cut.featurizer_file), ("classifier", cut.classifier_file)):
        with replacing(folder / f"{name}.safetensors") as partial:
            partial.write_bytes(data)
    write_json(folder / "model.json", cut.public_record.model_dump(mode="json"))


def featurize_new(
    release: Release, images: Path, out: Path, batch_size: int = 128, max_bad: float = 0.001
) -> tuple[BankIndex, list[BadImage]]:
    """A downstream user's own bank φ1(T), unpoisoned and theirs to keep, in the layout of a release's banks.

    Args:
        release: whose φ1.
        images: T, an ImageFolder tree or a CSV table; its classes are among the release's, its targets are the same.
        out: folder of the new bank; must not hold one.
        batch_size: images a step.
        max_bad: share of unreadable images above which nothing is written.

    Returns:
        The index, and the images that could not be read and have no row.

    Raises:
        ImageError: the folder holds a bank already, a class of T is not one of the release's, or too many images are
            unreadable.
    """
    if (out / "index.json").exists():
        raise ImageError(f"{out} holds a bank already. Name another folder with --out, or remove it.")
    record = release.record
    table = _own_splits(images, record)
    pictures = Pictures(table, release.preprocess)
    with Progress("Reading images", len(table)) as progress:
        bad = survey(pictures, progress.advance)
    refuse_bad(bad, len(table), max_bad)
    header = BankIndex(
        poisoned=False,
        featurizer_sha256=release.index.featurizer_sha256,
        feature_shape=record.feature_shape,
        targets=record.target_columns,
    )
    writer = BankWriter(out, header, batch_size=batch_size)
    phi_1, device = release.featurizer(), torch.device("cpu")
    splits: dict[SplitName, tuple[ShardRecord, ...]] = {}
    with Progress("Writing features", len(table) - len(bad)) as progress:
        for name in SPLITS:
            rows = np.setdiff1d(table.rows_of(name), [image.row for image in bad])
            ids = np.frombuffer(secrets.token_bytes(ID_BYTES * len(rows)), np.uint8).reshape(-1, ID_BYTES)
            if len(rows):
                source = _featurized(phi_1, release.preprocess, pictures, rows, device)
                splits[name] = writer.write_split(name, table.targets[rows], ids, source, progress.advance)
    return writer.finish(splits), bad


def _own_splits(images: Path, record: ModelRecord) -> ImageTable:
    """T as it is split already (all of it `train` where it is not), its labels by the release's numbers."""
    table = read_table(images, task=record.task, target_columns=record.targets, val_fraction=0.0, test_fraction=0.0)
    unknown = sorted(set(table.classes) - set(record.classes))
    if unknown:
        raise ImageError(
            f"expected images of the release's classes {', '.join(record.classes)}, found also {', '.join(unknown)}. "
            "Rename or remove those."
        )
    if record.task == "regression":
        return table
    number = np.array([record.classes.index(name) for name in table.classes], np.int64)
    return replace(table, targets=number[table.targets], classes=record.classes)
