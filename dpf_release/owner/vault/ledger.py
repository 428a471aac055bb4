"""The ledger: each release that was made from the vault."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from dpf_release.owner.vault.age import SEALED
from dpf_release.owner.vault.age import decrypt
from dpf_release.owner.vault.age import decrypt_file
from dpf_release.owner.vault.age import encrypt
from dpf_release.owner.vault.age import encrypt_file
from dpf_release.owner.vault.age import is_sealed_form
from dpf_release.owner.vault.age import sealed_form
from dpf_release.bank.format import INDEX
from dpf_release.bank.format import SplitName
from dpf_release.errors import VaultError
from dpf_release.owner.vault.permissions import refuse_others
from dpf_release.owner.vault.permissions import refuse_tracked
from dpf_release.core.files import PARTIAL
from dpf_release.core.files import PRIVATE_FOLDER
from dpf_release.core.files import flush_to_disk
from dpf_release.core.files import json_text
from dpf_release.core.files import make_folder
from dpf_release.core.files import refuse_small_disk
from dpf_release.core.files import remove_folder
from dpf_release.core.files import replacing
from dpf_release.core.files import sha256_of
from dpf_release.core.files import write_json
from dpf_release.core.files import write_text
from dpf_release.owner.vault.vault import Vault




def releases(vault: Vault) -> list[dict[str, Any]]:
    """The ledger: each release made, with its function and the digests of each.

    An entry with `published` false was written by a run that ended before it could say whether the release took its
    place.
    """
    return vault.read_record(vault.ledger, "package") if vault.holds(vault.ledger) else []


def remember_release(vault: Vault, entry: Mapping[str, Any]) -> None:
    """An entry into the ledger, in the place of that of the same manifest; what was published stays so."""
    entries = releases(vault)
    same = [number for number, known in enumerate(entries) if known["manifest_sha256"] == entry["manifest_sha256"]]
    if not same:
        entries.append(dict(entry))
    elif entries[same[0]].get("published", True):
        return
    else:
        entries[same[0]] = dict(entry)
    vault.write_json(vault.ledger, entries)


def forget_release(vault: Vault, entry: Mapping[str, Any]) -> None:
    """Takes an entry out of the ledger: its release never took its place."""
    vault.write_json(vault.ledger, [known for known in releases(vault) if known != dict(entry)])
