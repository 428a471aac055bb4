"""What the files of a release hold, whatever their digests say: checked in a limited child. No torch.

Right digests say that a file is the one that its publisher made, and nothing about the publisher. A checker for each
role looks at what a file is before anything of the package reads it; "deep", it decodes every row and looks at every
value. That weights have exactly the names and shapes of the network needs torch: `Release` checks it when it loads
them.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from dpf_release.bank.format import (
    ID_BYTES,
    MOST_COMPRESSED,
    BankIndex,
    ShardRecord,
    SplitName,
    check_shard,
    not_finite_rows,
    open_shard,
    read_index,
)
from dpf_release.bank.hdf5_check import read_layout
from dpf_release.bank.procedure_format import malformed
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.bounded_json import MAX_BYTES, MAX_VALUES, bounded_json
from dpf_release.core.files import read_at_most
from dpf_release.errors import BankError, DPFReleaseError
from dpf_release.release.attack_report import AttackReport, public_report, read_attack_report
from dpf_release.release.child_process import confine, run_limited
from dpf_release.release.croissant import croissant
from dpf_release.release.manifest import (
    ATTACK_REPORT,
    BANK_INDEX,
    CLASSIFIER,
    FEATURIZER,
    MANIFEST,
    PROCEDURE,
    ROLE_ORDER,
    Manifest,
    Role,
)
from dpf_release.release.model_record import ModelRecord, read_model_record
from dpf_release.release.safetensors_check import not_finite, read_tensor_file
from dpf_release.release.verify import Kind, Problem, read_manifest, verify

VERSION = 4  # of these checks: what another version found is not remembered
MAX_CARD_BYTES = 2**20
BLOCK_BYTES = 2**24
MAX_PROBLEMS, MAX_DETAIL = 1000, 500
# Characters that move a terminal's cursor, or turn the direction of a text.
UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Processor time: a start and the structures of a small release; bytes to decode in a second, at the least.
SECONDS, BYTES_A_SECOND, SHARDS_A_SECOND = 8, 10_000_000, 20

Finding = tuple[Kind, str]


def verify_deep(folder: Path, public_key: Path | None = None) -> list[Problem]:
    """All that `verify` finds; where it finds nothing, what the files hold, every row and every value of them."""
    return verify(folder, public_key) or check_structure(folder, deep=True)


def check_structure(folder: Path, *, deep: bool = False) -> list[Problem]:
    """What the files are of a release in which `verify` found nothing, checked in a child with little memory and time.

    "Deep" every row is decoded, and every value looked at; without it no data are read. Problems are of the kinds
    "schema", "structure", "values", and "limit", where the child was ended by its limits.
    """
    manifest = read_manifest(folder)
    if isinstance(manifest, Problem):
        return [manifest]
    work = _bytes_to_decode(folder, manifest) // BYTES_A_SECOND if deep else 0
    seconds = SECONDS + work + len(manifest.files) // SHARDS_A_SECOND
    request = {"folder": str(folder.resolve()), "deep": deep}
    return problems_of(*run_limited("dpf_release.release.contents", request, seconds))


def _bytes_to_decode(folder: Path, manifest: Manifest) -> int:
    """Of all rows and weights; no more than files of these sizes can hold."""
    stored = sum(file.bytes for file in manifest.files)
    try:
        index = read_index(folder / "features")
    except BankError:
        return stored
    return stored + min(sum(index.rows.values()) * index.row_bytes, stored * MOST_COMPRESSED[index.compression])


def problems_of(answers: list[Any], died_of: str) -> list[Problem]:
    """What the child told, and where it was when it died."""
    problems, place = [], MANIFEST
    for answer in answers:
        if isinstance(answer, str):
            place = answer
        else:
            problems.append(Problem(*answer))
    if died_of:
        problems.append(Problem("limit", place, f"could not be checked within limits: {died_of}"))
    return problems


def main() -> None:
    """The child: limits first, then the request, then an answer a line."""
    confine(int(sys.argv[1]))
    request = json.loads(sys.stdin.buffer.read())
    for answer in answers_to(request):
        print(json.dumps(answer), flush=True)


def answers_to(request: dict[str, Any]) -> Iterator[str | tuple[str, str, str]]:
    """Each file's path before it is looked at, and what is found in it: kind, path, detail."""
    folder = Path(request["folder"])
    manifest = read_manifest(folder)
    if isinstance(manifest, Problem):
        yield manifest.kind, manifest.path, manifest.detail
        return
    for text in _absences(manifest):
        yield "structure", MANIFEST, text
    release = _Release(folder, manifest, request["deep"])
    found = 0
    for record in manifest.of_role().values():
        yield record.path
        for kind, detail in _checked(release, record.role, record.path):
            yield kind, record.path, UNSEEN.sub("?", detail[:MAX_DETAIL])
            found += 1
            if found == MAX_PROBLEMS:
                yield "limit", record.path, f"{found} problems; the rest was not looked at"
                return
    yield MANIFEST
    told = contradictions(manifest, release.model, release.index) if release.model and release.index else []
    for text in told + _unfounded_claims(manifest, release.report):
        yield "schema", MANIFEST, text
    rows = sum(map(len, release.ids))
    repeated = rows - len(np.unique(np.concatenate(release.ids))) if rows else 0
    if repeated:
        yield "values", MANIFEST, f"{repeated} rows have the id of another row"


@dataclass
class _Release:
    """What is known so far: what records say once they are read; (rows,) ids of each shard, only when deep."""

    folder: Path
    manifest: Manifest
    deep: bool
    model: ModelRecord | None = None
    index: BankIndex | None = None
    shards: dict[str, tuple[SplitName, ShardRecord]] = field(default_factory=dict)
    report: AttackReport | None = None
    ids: list[NDArray[np.void]] = field(default_factory=list)


def _checked(release: _Release, role: Role, path: str) -> Iterator[Finding]:
    """What the checker of a role finds in a file."""
    try:
        yield from CHECKERS[role](release, path) or ()
    except DPFReleaseError as error:
        yield "schema" if role in {"model-record", "bank-index", "attack-report"} else "structure", str(error)
    except MemoryError:
        yield "limit", "it takes more memory than a file of a release may"
    # What h5py and numpy raise on files that are no shards.
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        yield "structure", f"it cannot be read: {type(error).__name__}: {str(error)[:200]}"


def _absences(manifest: Manifest) -> list[str]:
    """What a release needs and its manifest does not list."""
    optional = {"attack-report", "procedure"}  # where no attack was run there is no claim; not all rows are drawn
    needed = [role for role in ROLE_ORDER if role not in optional]
    lacks = [f"a file of the role {role}" for role in needed if not manifest.of_role(role)]
    filled = {path.split("/")[1] for path in manifest.of_role("shard")}
    lacks += [f"a shard of {split}" for split in manifest.splits if split not in filled]
    return [f"expected {what}, found none" for what in lacks]


def shards_of(index: BankIndex) -> dict[str, tuple[SplitName, ShardRecord]]:
    """Split and record of each shard of a bank, by its path in the release."""
    return {f"features/{shard.file}": (split, shard) for split, shards in index.splits.items() for shard in shards}


def contradictions(manifest: Manifest, model: ModelRecord, index: BankIndex) -> list[str]:
    """What manifest, model and bank say of each other that is not so."""
    digests = {file.path: file.sha256 for file in manifest.files}
    listed = {path: digests[path] for path in manifest.of_role("shard")}
    checks = {
        "the bank was made by another featurizer": index.featurizer_sha256 == digests.get(FEATURIZER),
        "the bank's rows have another shape than the model's features": index.feature_shape == model.feature_shape,
        "bank and model differ in their targets": index.targets == model.target_columns,
        "manifest and model differ in their classes": manifest.classes == model.classes,
        "manifest and model differ in their task": (manifest.task, manifest.targets) == (model.task, model.targets),
        "manifest and bank differ in their rows": manifest.splits == index.rows,
        "there is what rows were drawn with, and the bank's were not drawn": index.drawn or PROCEDURE not in digests,
        "the bank lists other shards than the manifest": listed
        == {path: shard.sha256 for path, (_, shard) in shards_of(index).items()},
    }
    return [text for text, holds in checks.items() if not holds]


def _unfounded_claims(manifest: Manifest, report: AttackReport | None) -> list[str]:
    """What the manifest claims and no report of attacks on this bank says; and a report of something else."""
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    problems = []
    if report is not None:
        if report.featurizer_sha256 != digests.get(FEATURIZER):
            problems.append(f"{ATTACK_REPORT} is of another featurizer")
        if (report.index_sha256 == digests.get(BANK_INDEX)) == bool(report.dropped_since):
            problems.append(f"{ATTACK_REPORT} is of another bank")
        if report.claims_not_made != manifest.claims.not_made:
            problems.append(f"{ATTACK_REPORT} and the manifest differ in the claims that are not made")
        if report.not_covered != (manifest.privacy.not_covered if manifest.privacy else ()):
            problems.append(f"{ATTACK_REPORT} and the manifest differ in what no privacy bound covers")
    if "bound" in manifest.claims.made and (manifest.privacy is None or manifest.privacy.networks_saw_images):
        problems.append("the manifest claims 'bound', and has no mechanism whose networks never saw the images")
    if manifest.privacy is not None and report is None:
        return problems  # its owner keeps what was measured on the images (`package --without-report`)
    for claim in manifest.claims.made:
        verdicts = {attack.verdict for attack in report.attacks if attack.claim == claim} if report else set()
        if claim == "bound" and "fail" not in verdicts:
            continue  # it rests on the mechanism
        if "pass" not in verdicts or "fail" in verdicts:
            problems.append(f"the manifest claims {claim[:40]!r}, which no attack in {ATTACK_REPORT} bears out")
    return problems


# --------------------------------------------------------------------------------------------- one checker a role


def _card(release: _Release, path: str) -> Iterator[Finding]:
    content = read_at_most(release.folder / path, MAX_CARD_BYTES)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        yield "structure", "expected text in UTF-8"
        return
    if UNSEEN.search(text):
        yield "structure", "holds control characters, which a terminal obeys"


def _croissant(release: _Release, path: str) -> Iterator[Finding]:
    content, manifest = read_at_most(release.folder / path, MAX_BYTES), release.manifest
    tree = bounded_json(content, 4 * MAX_VALUES)
    description = str(tree["description"])
    if tree != croissant(manifest.name, manifest.version, manifest.licence, description, manifest.files):
        yield "structure", "expected what `package` writes for this manifest, found something else"
    if UNSEEN.search(description):
        yield "structure", "holds control characters, which a terminal obeys"


def _model_record(release: _Release, path: str) -> None:
    release.model = read_model_record(release.folder / path)


def _bank_index(release: _Release, path: str) -> None:
    release.index = read_index((release.folder / path).parent)
    release.shards = shards_of(release.index)


def _attack_report(release: _Release, path: str) -> Iterator[Finding]:
    report = read_attack_report(release.folder / path)
    if report != public_report(report):
        yield "structure", "expected numbers of four decimals, and no name of a function, time or digest of the owner's"
    release.report = report


def _weights(release: _Release, path: str) -> Iterator[Finding]:
    file = read_tensor_file(release.folder / path)
    if path == CLASSIFIER and file.metadata != {"format": "pt"}:
        yield "structure", 'expected no metadata but {"format": "pt"}'
    if path == FEATURIZER and release.model is not None:
        expected = release.model.model_dump(mode="json", include={"arch", "arguments", "preprocess"})
        said = _said_record(file.metadata)
        hook = said.pop("hook", None)
        if not isinstance(hook, str) or len(hook) > 200 or said != expected or set(file.metadata) != {"record"}:
            yield "structure", "expected no metadata but architecture, preprocessing and hook, as in model.json"
    if release.deep:
        for name in not_finite(release.folder / path, file.tensors):
            yield "values", f"{name[:200]!r} holds values that are infinite or not numbers"


def _procedure(release: _Release, path: str) -> Iterator[Finding]:
    file = read_tensor_file(release.folder / path)
    if file.metadata != {"format": "pt"}:
        yield "structure", 'expected no metadata but {"format": "pt"}'
    if not {tensor.dtype for tensor in file.tensors} <= {"F32", "F64", "I64"}:
        yield "structure", "expected numbers of 32 or 64 bits"
    if release.model is not None:
        shapes = {tensor.name: tensor.shape for tensor in file.tensors}
        if problem := malformed(shapes, math.prod(release.model.feature_shape)):
            yield "structure", problem
    if release.deep:
        for name in not_finite(release.folder / path, file.tensors):
            yield "values", f"{name[:200]!r} holds values that are infinite or not numbers"


def _said_record(metadata: dict[str, str]) -> dict[str, Any]:
    """The record in the metadata of a featurizer's file; empty where there is none."""
    try:
        record = bounded_json(metadata.get("record", "").encode())
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _shard(release: _Release, path: str) -> Iterator[Finding]:
    index = release.index
    if index is None:
        yield "structure", "without a right features/index.json it cannot be looked at"
        return
    if path not in release.shards:
        return  # told as a contradiction
    split, record = release.shards[path]
    file_path = release.folder / path
    layout = read_layout(file_path)
    with file_path.open("rb") as file:
        hidden = layout.hidden_bytes(file)
    if hidden is not None:
        yield "structure", f"byte {hidden} belongs to nothing and is not zero: deleted data, or hidden ones"
    with open_shard(file_path) as shard:
        check_shard(shard, file_path, index, split, record.rows)
        if not all(_stored_whole(shard[member]) for member in shard):
            yield "structure", "its data sets are not written whole"
        if release.deep:
            yield from _targets(shard, release)
    if release.deep:
        yield from _rows(release.folder, index, split, record)


def _stored_whole(dataset: h5py.Dataset) -> bool:
    storage = dataset.id.get_storage_size()
    return storage == dataset.nbytes or (dataset.id.get_create_plist().get_nfilters() > 0 and storage > 0)


def _targets(shard: h5py.File, release: _Release) -> Iterator[Finding]:
    """Of a shard whose shapes are right."""
    release.ids.append(shard["id"][:].view(f"V{ID_BYTES}")[:, 0])
    if "target" in shard and not np.isfinite(shard["target"][:]).all():
        yield "values", "targets are infinite or not numbers"
    if "label" in shard and release.model is not None:
        labels = shard["label"][:]
        low, high, most = labels.min(), labels.max(), len(release.model.classes) - 1
        if low < 0 or high > most:
            yield "values", f"labels from {low} to {high}, expected 0 to {most}"


def _rows(folder: Path, index: BankIndex, split: SplitName, record: ShardRecord) -> Iterator[Finding]:
    """Every row of a shard, decoded as a reader decodes it."""
    bank = FeatureBank(folder / "features", split, index.model_copy(update={"splits": {split: (record,)}}))
    for rows, features in bank.batches(max(1, BLOCK_BYTES // index.row_bytes)):
        bad = not_finite_rows(features)
        if bad.any():
            yield "values", f"row {rows[bad.argmax()]} holds values that are infinite or not numbers"
            return


CHECKERS: dict[Role, Callable[[_Release, str], Iterator[Finding] | None]] = {
    "card": _card,
    "croissant": _croissant,
    "model-record": _model_record,
    "bank-index": _bank_index,
    "attack-report": _attack_report,
    "featurizer": _weights,
    "classifier": _weights,
    "procedure": _procedure,
    "shard": _shard,
}
assert set(CHECKERS) == set(ROLE_ORDER)

if __name__ == "__main__":
    main()
