"""What an artefact holds, in words, read from the artefact itself. Only for files that passed their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from dpf_release.bank.format import open_shard, read_index
from dpf_release.owner.vault.age import SEALED
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


def _checksums(file: Path) -> str:
    return f"{len(file.read_bytes().splitlines())} SHA-256 digests, for `sha256sum -c`"


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


def _weights(part: str) -> Callable[[Path], str]:
    def describe(file: Path) -> str:
        tensors = read_tensor_file(file).tensors
        values = sum(math.prod(tensor.shape) for tensor in tensors)
        return f"weights of {part}: {len(tensors)} tensors, {values:,} values"

    return describe


def _bank_index(file: Path) -> str:
    index = read_index(file.parent)
    splits = ", ".join(
        f"{split}: {rows:,} rows in {len(index.splits[split])} shards" for split, rows in index.rows.items()
    )
    return f"{splits}; {_extents(index.feature_shape)} {index.encoding}, poisoned: {_yes(index.poisoned)}"


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
    "checksums": _checksums,
    "signature": lambda file: "the signer's public key" if file.name == SIGNER else "Ed25519, over manifest.json",
    "croissant": lambda file: "the data files, for tools that read Croissant",
    "card": _card,
    "model-record": _model,
    "featurizer": _weights("φ1"),
    "classifier": _weights("φ2"),
    "bank-index": _bank_index,
    "attack-report": _attack_report,
    "shard": _shard,
}


def _extents(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# --------------------------------------------------------------------------------------------- the vault

_HOLDINGS: tuple[tuple[str, str, str], ...] = (
    (r"\.gitignore", "marker", "tells git to take nothing from here"),
    (r"\.lock", "marker", "a run works here, or was cut off"),
    (r"sealed\.json", "marker", "for whom the vault is sealed, and the names of what is"),
    (r"\.unpublished\.json", "marker", "where a release was being built when its run was cut off"),
    (r".*\.partial", "left-over", "a file half written by a run that was cut off; what it becomes is private"),
    (r".*checkpoint\.safetensors", "checkpoint", "a training that was cut off, to go on from"),
    (r"network/phi\.safetensors", "network", "Φ, all its weights, as trained or imported"),
    (r"network/network\.json", "network", "what rebuilds Φ: architecture, hook point, preprocessing, classes"),
    (r"network/.*\.json", "network", "how Φ was trained, or the digest of the file that it came from"),
    (r"survey-.*\.json", "survey", "which images could not be read: names of source files"),
    (r"features/plan\.json", "plan", "what φ1(S) was made from, and what was drawn before its first row"),
    (r"features/index\.json", "private-bank", "the index of φ1(S)"),
    (r"features/index-before\.json", "private-bank", "the index of φ1(S) as it was before a retraction"),
    (r"features/.*\.h5", "private-bank", "rows of φ1(S), not poisoned: worth as much as the pictures"),
    (r"ids\.csv", "id-map", "which id is which source file, with its attributes"),
    (r"reconstructors/.*\.safetensors", "attacker", "a reconstructor ψ or an attribute classifier"),
    (r"reconstructors/.*\.json", "attacker", "what an attacker was trained for, and how it went"),
    (r"functions/[^/]*/function\.json", "function", "P: its recipe and its secret"),
    (r"functions/[^/]*/dpf\.safetensors", "function", "P: its learned weights"),
    (r"functions/[^/]*/plan\.safetensors", "function", "P: what it drew before it saw a row"),
    (r"functions/[^/]*/history\.json", "function", "P: how its training went"),
    (r"functions/[^/]*/candidate\.json", "function", "what the candidate was made from"),
    (r"candidates/[^/]*/.*", "candidate", "a file as `package` publishes it"),
    (r"reports/[^/]*/measurements\.json", "report", "what was measured on a candidate"),
    (
        r"attackers/.*",
        "attacker",
        "what attacks have trained or made, to go on from; worth no less than a reconstructor",
    ),
    (r"reports/[^/]*/.*\.png", "report", "pictures of S and their reconstructions"),
    (r"reports/[^/]*/attack-.*\.json", "report", "what attackers got out of a candidate, in numbers"),
    (r"reports/[^/]*/failed\.json", "report", "which attacks failed a claim of a candidate, in numbers"),
    (r"reports/[^/]*/attack\.html", "report", "what attackers got out of a candidate, with pictures of S"),
    (r"reports/[^/]*/pictures\.safetensors", "report", "pictures of S and what attackers made of their rows"),
    (r"reports/frontier\.(json|svg|png)", "report", "what several candidates protect, and what they leave to use"),
    (r"ledger\.json", "ledger", "the releases made from this vault"),
    (r"retracted\.json", "retractions", "which rows were retracted, and digests of the names of their images"),
)


def role_in_vault(path: str) -> tuple[str, str]:
    """The role of a private path, sealed or not, and what it holds, in words."""
    plain = path.removesuffix(SEALED)
    known = ((role, words) for pattern, role, words in _HOLDINGS if re.fullmatch(pattern, plain))
    return next(known, ("unknown", "not a file that this version writes: look at it"))
