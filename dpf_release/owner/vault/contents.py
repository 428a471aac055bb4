"""What a vault holds: its own few files, all that commands write into it, and what of that is sealed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpf_release.core.files import write_json
from dpf_release.core.locks import LOCK
from dpf_release.errors import VaultError
from dpf_release.owner.vault.age import SEALED, is_sealed_form
from dpf_release.owner.vault.staging import UNPUBLISHED, unpublished_folder

SEALS = "sealed.json"  # in the clear: for whom the vault is sealed, and the names of its sealed members
OPENED = ".opened"  # what of a sealed vault a run that holds its lock reads or writes by paths, in the clear
STAGED = ".staged"  # what such a run has changed, sealed; with a `sealed.json` it is all there, and takes its place
CLEAR = {".gitignore", LOCK, SEALS, UNPUBLISHED}  # what a vault keeps for itself; nothing of S or P is in it
SHOWN = 5

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SHARD = r"(train|val|test)/shard-[0-9]{5}\.h5"
BANK_FILE_NAME = rf"(index(-before)?\.json|{_SHARD})"
BANK_FILE = re.compile(rf"features/{BANK_FILE_NAME}")
_MODEL_FILE = r"model/((featurizer|classifier)\.safetensors|model\.json)"
_CHECKPOINT = rf"(network/|functions/{_NAME}/|reconstructors/[^/]+\.)checkpoint[-0-9A-Za-z_]*\.safetensors"

# Pattern, role, words. From each of these S or P, or a part of them, could be had.
_MEMBERS: tuple[tuple[str, str, str], ...] = (
    (_CHECKPOINT, "checkpoint", "a training that was cut off, to go on from"),
    (r"network/phi\.safetensors", "network", "Φ, all its weights, as trained or imported"),
    (r"network/network\.json", "network", "what rebuilds Φ: architecture, hook point, preprocessing, classes"),
    (r"network/(history|imported)\.json", "network", "how Φ was trained, or the digest of the file that it came from"),
    (r"survey-(private|public)\.json", "survey", "which images could not be read: names of source files"),
    (r"features/plan\.json", "plan", "what φ1(S) was made from, and what was drawn before its first row"),
    (r"features/index\.json", "private-bank", "the index of φ1(S)"),
    (r"features/index-before\.json", "private-bank", "the index of φ1(S) as it was before a retraction"),
    (rf"features/{_SHARD}", "private-bank", "rows of φ1(S), not poisoned: worth as much as the pictures"),
    (rf"public_features/({BANK_FILE_NAME}|plan\.json)", "public-bank", "φ1(Q), rows of public images"),
    (r"ids\.csv", "id-map", "which id is which source file, with its attributes"),
    (r"reconstructors/[^/]+\.safetensors", "attacker", "a reconstructor ψ or an attribute classifier"),
    (r"reconstructors/[^/]+\.json", "attacker", "what an attacker was trained for, and how it went"),
    (rf"functions/{_NAME}/function\.json", "function", "P: its recipe and its secret"),
    (rf"functions/{_NAME}/state\.safetensors", "function", "P: what it learned"),
    (rf"functions/{_NAME}/plan\.safetensors", "function", "P: what it drew before it saw a row"),
    (rf"functions/{_NAME}/history\.json", "function", "P: how its training went"),
    (rf"functions/{_NAME}/candidate\.json", "function", "what the candidate was made from"),
    (rf"candidates/{_NAME}/({BANK_FILE.pattern}|{_MODEL_FILE})", "candidate", "a file as `package` publishes it"),
    (
        r"attackers/[^/]+\.(safetensors|checkpoint)",
        "attacker",
        "what attacks have trained or made, to go on from; worth no less than a reconstructor",
    ),
    (rf"reports/{_NAME}/measurements\.json", "report", "what was measured on a candidate"),
    (rf"reports/{_NAME}/.*\.png", "report", "pictures of S and their reconstructions"),
    (rf"reports/{_NAME}/attack-.*\.json", "report", "what attackers got out of a candidate, in numbers"),
    (rf"reports/{_NAME}/failed\.json", "report", "which attacks failed a claim of a candidate, in numbers"),
    (rf"reports/{_NAME}/attack\.html", "report", "what attackers got out of a candidate, with pictures of S"),
    (rf"reports/{_NAME}/pictures\.safetensors", "report", "pictures of S and what attackers made of their rows"),
    (rf"reports/{_NAME}/.+", "report", "of a candidate, and not a file that this version writes: look at it"),
    (r"reports/frontier\.(json|svg|png)", "report", "what several candidates protect, and what they leave to use"),
    (r"ledger\.json", "ledger", "the releases made from this vault"),
    (r"privacy\.json", "ledger", "which noisy statistics were fitted, which are published, and so what was spent"),
    (r"retracted\.json", "retractions", "which rows were retracted, and digests of the names of their images"),
)
_OTHERS: tuple[tuple[str, str, str], ...] = (
    (r"\.gitignore", "marker", "tells git to take nothing from here"),
    (r"\.lock", "marker", "a run works here, or was cut off"),
    (r"sealed\.json", "marker", "for whom the vault is sealed, and the names of what is"),
    (r"\.unpublished\.json", "marker", "where a release was being built when its run was cut off"),
    (r".*\.partial", "left-over", "a file half written by a run that was cut off; what it becomes is private"),
)
MEMBERS = re.compile("|".join(pattern for pattern, _, _ in _MEMBERS))  # every file that a command writes into a vault


def plain_name(path: str) -> str:
    """The name of a member in the clear, from that of the file it lies in."""
    return path.removesuffix(SEALED)


def role_in_vault(path: str) -> tuple[str, str]:
    """The role of a file of a vault, sealed or not, and what it holds, in words."""
    known = ((role, words) for pattern, role, words in (*_OTHERS, *_MEMBERS) if re.fullmatch(pattern, plain_name(path)))
    return next(known, ("unknown", "not a file that this version writes: look at it"))


def at_rest(path: str) -> Literal["sealed", "in the clear"]:
    """How a file lies on the disk, by its name."""
    return "sealed" if path.endswith(SEALED) else "in the clear"


class Seals(BaseModel):
    """`sealed.json`: a vault that has one is sealed. Names only: a digest would tell whether a guess is right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["dpf-release-seals"] = "dpf-release-seals"
    version: Literal[1] = 1
    recipients: Annotated[tuple[str, ...], Field(min_length=1)]
    members: tuple[str, ...] = ()

    def of(self, members: Set[str]) -> Seals:
        """For the same recipients, with other members."""
        return self.model_copy(update={"members": tuple(sorted(members))})

    def write(self, folder: Path) -> None:
        """Puts it into the vault, or to what is staged for it."""
        write_json(folder / SEALS, self.model_dump(mode="json"))


def read_seals(root: Path) -> Seals | None:
    """For whom a vault is sealed; None where it is not; a `VaultError` where the record is damaged."""
    try:
        return Seals.model_validate_json((root / SEALS).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise VaultError(
            f"{root / SEALS} is not what `dpf-release vault seal` wrote ({error}). Remove it, "
            "open the vault with `dpf-release vault open --identity FILE`, and seal it again."
        ) from error


@dataclass(frozen=True)
class VaultState:
    """What is in a vault.

    Attributes:
        seals: for whom it is sealed; None where it is not.
        sealed: members that are sealed.
        clear: members that are not; and files that a run has opened, or has not published yet, or left so when it was
            killed.
        strangers: files that no command of ours writes.
        missing: members that were sealed, and are not there any more.
    """

    seals: Seals | None
    sealed: tuple[str, ...]
    clear: tuple[str, ...]
    strangers: tuple[str, ...]
    missing: tuple[str, ...]


def look_at(root: Path) -> VaultState:
    """What is in a vault: sealed, in the clear, unknown, missing."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if not path.is_dir()}
    names = {name: path for name, path in found.items() if not name.startswith((f"{OPENED}/", f"{STAGED}/"))}
    sealed = {plain_name(name) for name, path in names.items() if is_sealed_form(path)}
    clear = {name for name, path in names.items() if name not in CLEAR and not is_sealed_form(path)}
    known = {name for name in clear if MEMBERS.fullmatch(name)}
    strangers = (clear - known) | {name + SEALED for name in sealed if not MEMBERS.fullmatch(name)}
    seals = read_seals(root)
    missing = set(seals.members if seals else ()) - sealed - clear
    places = [folder for folder in (root / OPENED, unpublished_folder(root)) if folder]
    left = {os.path.relpath(path, root) for place in places for path in place.rglob("*") if not path.is_dir()}
    parts = (sealed, known | left, strangers, missing)
    return VaultState(seals, *(tuple(sorted(part)) for part in parts))


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first few of many names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
