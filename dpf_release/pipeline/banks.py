"""`featurize` and the writing half of `poison`: φ1(S) and P(φ1(S)), on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank import ID_BYTES, INDEX, BankIndex, SplitName, read_index
from dpf_release.bank_drop import BEFORE
from dpf_release.bank_writer import BankWriter, Span, SplitRows
from dpf_release.config import parse_size
from dpf_release.errors import BankError, DPFReleaseError, ImageError, VaultError
from dpf_release.image_table import ImageTable, read_table
from dpf_release.pictures import BadImage, Pictures, refuse_bad
from dpf_release.pipeline.fitting import CANDIDATE, FittedFunction, load_function
from dpf_release.pipeline.network import import_network
from dpf_release.pipeline.project import Project, changed_facts, survey_together
from dpf_release.pipeline.writing import Compute, machine_facts, write_bank
from dpf_release.ranks import Ranks
from dpf_release.record import ModelRecord
from dpf_release.release import Release
from dpf_release.storage import PARTIAL, make_folder, refuse_small_disk, sha256_of, write_json
from dpf_release.training import pick_device
from dpf_release.vault import BANK, RELEASED_SPLITS, SPLITS, Vault

Rows = NDArray[np.int64]
NEW_PLAN = ".plan.json"  # of a downstream user's bank, while it is written


def featurize(project: Project, restart: bool = False) -> BankIndex:
    """Splits Φ and writes the private bank φ1(S), all three splits, rows in a secret random order.

    What the bank depends on is drawn and written before row 0; a run that was cut off goes on under that plan. Under
    `torchrun` the shards are divided among the ranks.

    Raises:
        VaultError: the folder holds a bank, or half of one, made under another plan, and `restart` is not set.
        StorageError: another run works in the vault, or the disk has not enough room.
    """
    with project.working():
        project.ranks.once(lambda: import_network(project, restart))
        cut, images, vault = project.cut, project.private_images, project.vault
        facts = project.source_facts | _bank_facts(project)
        project.ranks.once(lambda: _draw_plan(project, facts, restart))
        project.forget("bank_order")
        known = project.bank_plan
        changed = changed_facts(known, facts) + ["ids.csv"] * (vault.sha256(vault.ids) != known["ids_sha256"])
        anew = "start anew with --restart (new ids; functions fitted on the old bank are void)"
        _refuse_other_plan(str(vault.features), changed, anew)
        if project.rows_were_retracted and vault.holds(vault.features / INDEX):
            # Whole; its shards are not those that would be written now, after it was forgotten.
            return read_index(vault.opened(vault.features, INDEX))
        rows_of, ids_of = project.bank_order
        rows = {name: SplitRows(images.table.targets[rows_of[name]], ids_of[name]) for name in SPLITS}
        compute = _featurized(project.frozen(cut.split.featurizer), images.pictures, rows_of, project.device)
        with vault.changing(vault.features, *BANK) as folder:
            writer = _writer(project, folder, poisoned=False)
            return write_bank(writer, rows, compute, project.ranks, "Writing features", "images")


def _bank_facts(project: Project) -> dict[str, Any]:
    """How a bank is written, as its plan keeps it."""
    section = project.config.bank
    written = section.model_dump() | {"shard_size": parse_size(section.shard_size)}
    return written | machine_facts(project.device, section.compression)


def _refuse_other_plan(what: str, changed: Sequence[str], anew: str, error: type[DPFReleaseError] = VaultError) -> None:
    if changed:
        raise error(
            f"{what} was begun under another plan; changed since: {', '.join(changed)}. Put that back to go on, or "
            f"{anew}."
        )


def _writer(project: Project, folder: Path, poisoned: bool) -> BankWriter:
    cut, section = project.cut, project.config.bank
    header = BankIndex(
        compression=section.compression,
        poisoned=poisoned,
        featurizer_sha256=cut.featurizer_sha256,
        feature_shape=cut.record.feature_shape,
        targets=cut.record.target_columns,
    )
    return BankWriter(folder, header, parse_size(section.shard_size), section.batch_size)


def _refuse_small_disk(project: Project, folder: Path, rows: Sequence[int]) -> None:
    """That a bank has room when the one that is there is gone: before it is given up."""
    there = sum(path.stat().st_size for path in folder.glob("*/*.h5*"))
    wanted = _writer(project, folder, poisoned=False).bytes_of([Span("train", 0, count) for count in rows])
    refuse_small_disk(project.vault.root, wanted - there)


def _draw_plan(project: Project, facts: dict[str, Any], restart: bool) -> None:
    """The secret order and the random ids, from the operating system's randomness, and what goes with them."""
    vault, images = project.vault, project.private_images
    if vault.holds(vault.plan) and not restart:
        return
    _refuse_small_disk(project, vault.features, [len(images.rows(name)) for name in SPLITS])
    remove_bank(vault, vault.features)
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
    vault.write_ids(
        lines,
        [key for key in images.table.attributes if key not in {"id", "split", "row", "source"}],
    )
    vault.write_json(vault.plan, {**facts, "ids_sha256": vault.sha256(vault.ids)})


def remove_bank(vault: Vault, folder: Path) -> None:
    """Removes a bank, or what there is of one."""
    shards = [path for path in vault.members(folder) if path.suffix == ".h5"]
    vault.remove(folder / "plan.json", folder / INDEX, folder / BEFORE, *shards)
    for half_written in folder.glob(f"*/shard-*{PARTIAL}"):
        half_written.unlink()


def _featurized(phi_1: nn.Module, pictures: Pictures, rows: Mapping[SplitName, Rows], device: torch.device) -> Compute:
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


def write_candidate(project: Project, name: str = "default", restart: bool = False) -> BankIndex:
    """P(φ1(S)) of `train` and `val`, and the public weights, exactly as `package` will publish them.

    A run that was cut off goes on. Under `torchrun` the shards are divided among the ranks.

    Raises:
        VaultError: no function of that name is fitted, or it was fitted for another bank or featurizer; or the folder
            holds a candidate, or half of one, made under another plan, and `restart` is not set.
        StorageError: another run works in the vault, or the disk has not enough room.
    """
    with project.working():
        function = load_function(project, name)
        banks = {split: project.private_bank(split) for split in RELEASED_SPLITS}
        vault, record = project.vault, project.vault.function(name) / CANDIDATE
        plan = {"origin": candidate_origin(project, function), "bank": _bank_facts(project)}
        if not restart and (index := _after_retraction(project, name, plan)):
            return index
        project.ranks.once(lambda: _begin_candidate(project, name, plan, restart))
        rows = {split: SplitRows(bank.targets, bank.ids) for split, bank in banks.items()}
        sources = {split: function.poisoned(split, bank) for split, bank in banks.items()}

        def compute(spans: Sequence[Span]) -> Iterator[NDArray[np.floating[Any]]]:
            for span in spans:
                yield sources[span.split].read(np.arange(span.start, span.stop))

        with vault.changing(vault.candidate(name) / "features", *BANK) as folder:
            writer = _writer(project, folder, poisoned=function.chain.poisons)
            index = write_bank(writer, rows, compute, project.ranks, "Poisoning", "rows")
            finished = plan | {"index_sha256": sha256_of(folder / INDEX)}
        project.ranks.once(lambda: vault.write_json(record, finished))
        return index


def _after_retraction(project: Project, name: str, plan: dict[str, Any]) -> BankIndex | None:
    """The index of a candidate from which rows were retracted: whole, and its shards not those of one written now."""
    vault, record = project.vault, project.vault.function(name) / CANDIDATE
    features = vault.candidate(name) / "features"
    known = vault.read_record(record, "poison") if vault.holds(record) else {}
    if not (known.get("retracted") and vault.holds(features / INDEX)):  # one that was forgotten is written again
        return None
    _refuse_other_candidate(name, changed_facts(known["origin"], plan["origin"]))
    return read_index(vault.opened(features, INDEX))


def _refuse_other_candidate(name: str, changed: Sequence[str]) -> None:
    anew = f"start anew with `dpf-release poison --name {name} --restart`"
    _refuse_other_plan(f"the candidate {name!r}", changed, anew)


def _begin_candidate(project: Project, name: str, plan: dict[str, Any], restart: bool) -> None:
    vault = project.vault
    folder, record = vault.candidate(name), vault.function(name) / CANDIDATE
    known = vault.read_record(record, "poison") if vault.holds(record) else None
    if known is None or restart:
        rows = [len(project.private_bank(split)) for split in RELEASED_SPLITS]
        _refuse_small_disk(project, folder / "features", rows)
        remove_bank(vault, folder / "features")
    else:
        changed = [key for part in ("origin", "bank") for key in changed_facts(known.get(part, {}), plan[part])]
        _refuse_other_candidate(name, changed)
    forget_measurements(vault, name)  # of the candidate before
    vault.write_json(record, plan | {"index_sha256": None})
    _write_public_model(project, folder / "model")


def forget_measurements(vault: Vault, name: str) -> None:
    """Removes what `measure` found for a candidate."""
    vault.remove(*[vault.reports(name) / file for file in ("measurements.json", "reconstructions.png")])


def candidate_origin(project: Project, function: FittedFunction) -> dict[str, str]:
    """What a candidate is made from; `package` publishes no candidate of another origin than today's."""
    return {
        "function": function.digest,
        "plan": function.plan_sha256,
        "bank": project.bank_id,
        "rows": project.vault.sha256(project.vault.ids),
        "model": hashlib.sha256(project.cut.featurizer_file + project.cut.classifier_file).hexdigest(),
        "record": project.cut.public_record.model_dump_json(),
    }


def changed_since_poison(project: Project, name: str, function: FittedFunction, index: Path) -> list[str]:
    """In what a candidate's bank is not what today's function makes of today's features and network, in words.

    Args:
        project: the owner's.
        name: of the function.
        function: as it is today.
        index: its `features/index.json`, in the clear.
    """
    made = project.vault.read_record(project.vault.function(name) / CANDIDATE, f"poison --name {name}")
    today = candidate_origin(project, function)
    problems = [f"another {key} than today's" for key in today if made["origin"].get(key) != today[key]]
    return problems + ["features/index.json changed since"] * (made["index_sha256"] != sha256_of(index))


def _write_public_model(project: Project, folder: Path) -> None:
    make_folder(folder)
    cut = project.cut
    for name, data in (("featurizer", cut.featurizer_file), ("classifier", cut.classifier_file)):
        project.vault.write_bytes(folder / f"{name}.safetensors", data)
    project.vault.write_json(folder / "model.json", cut.public_record.model_dump(mode="json"))


def featurize_new(
    release: Release,
    images: Path,
    out: Path,
    shard_size: str = "1 GiB",
    batch_size: int = 128,
    max_bad: float = 0.001,
    device: str = "auto",
) -> tuple[BankIndex, list[BadImage]]:
    """A downstream user's own bank φ1(T), unpoisoned and theirs to keep, in the layout of a release's banks.

    A run that was cut off goes on. Under `torchrun` the shards are divided among the ranks.

    Args:
        release: whose φ1.
        images: T, an ImageFolder tree or a CSV table; its classes are among the release's, its targets are the same.
        out: folder of the new bank; must not hold one.
        shard_size: of the bank's files at the most, as `"1 GiB"`.
        batch_size: images a step.
        max_bad: share of unreadable images above which nothing is written.
        device: where φ1 computes.

    Returns:
        The index, and the images that could not be read and have no row.

    Raises:
        ImageError: a class of T is not one of the release's, or too many images are unreadable.
        BankError: the folder holds a bank already, or half of one that was made from something else.
        StorageError: another run works in the folder, or the disk has not enough room.
    """
    ranks, where = Ranks.of_torchrun(), pick_device(device)
    plan = out / NEW_PLAN
    table = _own_splits(images, release.record)
    make_folder(out)
    with ranks.holding(out):
        if (out / INDEX).exists() and not plan.exists():
            raise BankError(f"{out} holds a bank already. Name another folder with --out, or remove it.")
        pictures = Pictures(table, release.preprocess)
        bad = survey_together(pictures, ranks, "Reading images")
        refuse_bad(bad, len(table), max_bad)
        facts = {
            "source_sha256": table.digest(),
            "featurizer_sha256": release.index.featurizer_sha256,
            "undecodable": [image.row for image in bad],
            "shard_size": parse_size(shard_size),
            "batch_size": batch_size,
            **machine_facts(where, "none"),
        }
        new = facts | {"ids": secrets.token_hex(32)}
        ranks.once(lambda: None if plan.exists() else write_json(plan, new))
        known = json.loads(plan.read_text(encoding="utf-8"))
        _refuse_other_plan(f"the bank in {out}", changed_facts(known, facts), "remove the folder", BankError)
        generator = np.random.default_rng(list(bytes.fromhex(known["ids"])))
        rows_of = {name: np.setdiff1d(table.rows_of(name), [image.row for image in bad]) for name in SPLITS}
        rows = {
            name: SplitRows(table.targets[rows], generator.integers(0, 256, (len(rows), ID_BYTES), np.uint8))
            for name, rows in rows_of.items()
        }
        header = BankIndex(
            poisoned=False,
            featurizer_sha256=release.index.featurizer_sha256,
            feature_shape=release.record.feature_shape,
            targets=release.record.target_columns,
        )
        writer = BankWriter(out, header, parse_size(shard_size), batch_size)
        phi_1 = release.featurizer().to(where).to(memory_format=torch.channels_last)
        index = write_bank(
            writer, rows, _featurized(phi_1, pictures, rows_of, where), ranks, "Writing features", "images"
        )
        ranks.once(plan.unlink)  # its ids are in the bank now, and nobody else's business
    return index, bad


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
