"""The ledger: each release that was made from the vault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
