"""What was retracted: `retracted.json` in the vault, by which rows and images stay out of whatever is made later.

It holds no file name: a retracted image is known by the digest of its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import Field, ValidationError

from dpf_release.bank.format import RELEASED_SPLITS, Digest, SplitName
from dpf_release.core.bounded_json import Record
from dpf_release.errors import VaultError
from dpf_release.owner.vault.vault import Vault

RETRACTED = "retracted.json"
RowId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Retraction(Record):
    """One retraction.

    Attributes:
        ids: of the rows that went, hexadecimal.
        asked: digests of the ids and names by which they were asked for.
        rows: how many of them each split had.
        published: the versions there were, which hold them.
        published_index: digest of the bank's index in the last of them.
        version: the first that does not.
    """

    ids: tuple[RowId, ...]
    asked: tuple[Digest, ...]
    rows: dict[SplitName, int]
    published: tuple[str, ...]
    published_index: Digest | None
    version: str

    @property
    def released_rows(self) -> int:
        """How many of the rows were in a split that is released."""
        return sum(self.rows.get(split, 0) for split in RELEASED_SPLITS)


class Retracted(Record):
    """All retractions of a vault, and what S and φ1(S) are since.

    Attributes:
        retractions: the first first.
        sources: digests of the names of the images that are no longer of S.
        classes: of S when the last was made: one that has no image left keeps its number.
        splitting: how missing splits were made then; as long as that stays, each image keeps its split.
        bank: which φ1(S) `facts` are of.
        facts: what that φ1(S) is made from, where its plan says otherwise.
        unfinished: of a retraction that was cut off: the numbers that its rows had, by split.
    """

    retractions: tuple[Retraction, ...] = ()
    sources: tuple[Digest, ...] = ()
    classes: tuple[str, ...] = ()
    splitting: dict[str, Any] = {}
    bank: Digest | None = None
    facts: dict[str, Digest] = {}
    unfinished: dict[SplitName, tuple[int, ...]] | None = None

    @property
    def ids(self) -> set[bytes]:
        """Of all rows that were retracted, 16 bytes each."""
        return {bytes.fromhex(row_id) for retraction in self.retractions for row_id in retraction.ids}

    def version_after(self, version: str) -> str:
        """The version itself; or, where it was published with rows that have gone since, the first without them."""
        released = [retraction for retraction in self.retractions if retraction.released_rows]
        superseded = any(version in retraction.published for retraction in released)
        return released[-1].version if superseded else version


def read_retracted(vault: Vault) -> Retracted:
    """What was retracted in a vault; nothing where nothing was; a `VaultError` where the record is not one of ours."""
    path = vault.root / RETRACTED
    if not vault.holds(path):
        return Retracted()
    try:
        return Retracted.model_validate_json(vault.read_bytes(path, "retract"))
    except ValidationError as error:
        raise VaultError(f"{path} is not a record of retractions: {error}. Restore it from a copy.") from error


def write_retracted(vault: Vault, retracted: Retracted) -> None:
    """Puts the record in the place of the one before."""
    vault.write_json(vault.root / RETRACTED, retracted.model_dump(mode="json"))


def digest_of_name(name: str) -> str:
    """What `retracted.json` knows an image by."""
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def next_version(version: str, published: Collection[str]) -> str:
    """The version, its last number raised until it is none of those: 1.0.0 becomes 1.0.1."""
    while version in published:
        found = re.search(r"[0-9]+$", version)
        number = found.group() if found else ""
        raised = f"{int(number) + 1:0{len(number)}d}" if found else ".1"
        version = version.removesuffix(number) + raised
    return version
