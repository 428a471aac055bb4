"""What an artefact holds, in words, read from the artefact itself. Only for files that passed their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from dpf_release.bank.format import open_shard, read_index
from dpf_release.release.attack_report import read_attack_report
from dpf_release.release.manifest import SIGNER, Manifest, role_in_release
from dpf_release.release.model_record import read_model_record
from dpf_release.release.safetensors_check import read_tensor_file


def public_contents(release: Path, path: str, manifest: Manifest) -> str:
    """What a public file holds, in one line."""
    role, file = role_in_release(path), release / path
    if role == "manifest":
        title = f"{manifest.name} {manifest.version}, licence {manifest.licence}"
        return f"{title}: the list of {len(manifest.files)} files and their SHA-256"
    return _PUBLIC[role](file) if role in _PUBLIC else ""


def _card(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    title = next((line.removeprefix("# ") for line in lines if line.startswith("# ")), "no title")
    return f"the data set's card, {len(lines)} lines: {title}"


def _model(file: Path) -> str:
    record = read_model_record(file)
    arguments = "".join(f" {key}={value}" for key, value in record.arguments.items())
    names = record.classes or record.targets
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"what rebuilds φ1 and φ2: {record.arch}{arguments}, cut at {record.hook}, features "
        f"{_extents(record.feature_shape)}, {record.task} of {len(names)}: {shown}"
    )


def _weights(file: Path) -> str:
    tensors = read_tensor_file(file).tensors
    what = {"featurizer": "weights of φ1", "classifier": "weights of φ2"}.get(file.stem, "what rows are drawn with")
    return f"{what}: {len(tensors)} tensors, {sum(math.prod(tensor.shape) for tensor in tensors):,} values"


def _bank_index(file: Path) -> str:
    index = read_index(file.parent)
    splits = [f"{split}: {rows:,} rows in {len(index.splits[split])} shards" for split, rows in index.rows.items()]
    return f"{', '.join(splits)}; {_extents(index.feature_shape)} {index.encoding}, poisoned: {_yes(index.poisoned)}"


def _attack_report(file: Path) -> str:
    report = read_attack_report(file)
    verdicts = ", ".join(f"{result.code} {result.verdict}" for result in report.attacks) or "no attack"
    return f"what attacks of profile {report.profile} reach, in numbers: {verdicts}"


def _shard(file: Path) -> str:
    with open_shard(file) as shard:
        features, facts = shard["features"], shard.attrs
        return (
            f"{features.shape[0]:,} rows of {_extents(features.shape[1:])} {features.dtype}, split {facts['split']}, "
            f"poisoned: {_yes(bool(facts['poisoned']))}"
        )


_PUBLIC: dict[str, Callable[[Path], str]] = {
    "checksums": lambda file: f"{len(file.read_bytes().splitlines())} SHA-256 digests, for `sha256sum -c`",
    "signature": lambda file: "the signer's public key" if file.name == SIGNER else "Ed25519, over manifest.json",
    "croissant": lambda file: "the data files, for tools that read Croissant",
    "card": _card,
    "model-record": _model,
    "featurizer": _weights,
    "classifier": _weights,
    "procedure": _weights,
    "bank-index": _bank_index,
    "attack-report": _attack_report,
    "shard": _shard,
}


def _extents(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
