"""The owner's private folder: where everything lies, and that only the owner can read it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpf_release.bank import SplitName
from dpf_release.errors import VaultError
from dpf_release.storage import PRIVATE_FOLDER, make_folder, replacing, write_json, write_text

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
RELEASED_SPLITS: tuple[SplitName, ...] = ("train", "val")


@dataclass(frozen=True)
class Vault:
    """Paths inside a vault (layout: `docs/layout.md`); folders are 0700, files 0600."""

    root: Path

    @classmethod
    def create(cls, root: Path) -> Vault:
        """A new vault, or the one that is there; git is told to ignore all of it."""
        make_folder(root)
        root.chmod(PRIVATE_FOLDER)
        write_text(root / ".gitignore", "*\n")
        return cls(root)

    @classmethod
    def open(cls, root: Path) -> Vault:
        """The vault beside a configuration.

        Raises:
            VaultError: there is none, or others can read it.
        """
        if not root.is_dir():
            raise VaultError(f"expected a vault at {root}, found none. Run `dpf-release init DIR` first.")
        if root.stat().st_mode & 0o077:
            raise VaultError(
                f"the vault {root} can be read by others (mode {root.stat().st_mode & 0o777:o}, expected 700); "
                f"it holds what undoes every release. Run `chmod -R go-rwx {root}`."
            )
        return cls(root)

    @property
    def network(self) -> Path:
        """Φ: `phi.safetensors`, `network.json`."""
        return self.root / "network"

    @property
    def features(self) -> Path:
        """φ1(S), unpoisoned."""
        return self.root / "features"

    @property
    def plan(self) -> Path:
        """What `featurize` drew and saw before row 0."""
        return self.features / "plan.json"

    @property
    def ids(self) -> Path:
        """The map id → source file, in the order of the bank."""
        return self.root / "ids.csv"

    def survey(self, images: str) -> Path:
        """Which of the `private` or `public` images were read, and which could not be."""
        return self.root / f"survey-{checked_name(images)}.json"

    @property
    def reconstructors(self) -> Path:
        """ψ and other byproduct attackers."""
        return self.root / "reconstructors"

    @property
    def ledger(self) -> Path:
        """Releases made."""
        return self.root / "ledger.json"

    def function(self, name: str) -> Path:
        """The folder of one fitted poisoning function."""
        return self.root / "functions" / checked_name(name)

    def candidate(self, name: str) -> Path:
        """`model/` and `features/` exactly as `package` will publish them."""
        return self.root / "candidates" / checked_name(name)

    def reports(self, name: str) -> Path:
        """Measurements and figures of one candidate."""
        return self.root / "reports" / checked_name(name)


def checked_name(name: str) -> str:
    """The name of a fitted function, where it can be a folder's.

    Raises:
        VaultError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise VaultError(f"expected a name of letters, digits, '.', '_' and '-' (64 at most, --name), found {name!r}.")
    return name


def read_record(path: Path, made_by: str) -> Any:
    """A JSON file of the vault.

    Args:
        path: the file.
        made_by: the command that makes it, for the message.

    Raises:
        VaultError: the file is not there, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise VaultError(f"expected {path}, found none. Run `dpf-release {made_by}` first.") from None
    except ValueError as error:
        raise VaultError(f"{path} is not JSON: {error}. Run `dpf-release {made_by}` again.") from error


def write_ids(path: Path, rows: Iterable[Mapping[str, Any]], attributes: Sequence[str]) -> None:
    """The id map: `id, split, row, source` and the attribute columns, one line a bank row, in bank order."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["id", "split", "row", "source", *attributes], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_ids(path: Path) -> Iterator[dict[str, str]]:
    """The id map, row by row.

    Raises:
        VaultError: there is none.
    """
    if not path.is_file():
        raise VaultError(f"expected {path}, found none. Run `dpf-release featurize` first.")
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def releases(vault: Vault) -> list[dict[str, Any]]:
    """The ledger: each release made, with its function and the digests of each.

    An entry with `published` false was written by a run that ended before it could say whether the release took its
    place.
    """
    return json.loads(vault.ledger.read_text(encoding="utf-8")) if vault.ledger.is_file() else []


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
    write_json(vault.ledger, entries)


def forget_release(vault: Vault, entry: Mapping[str, Any]) -> None:
    """Takes an entry out of the ledger: its release never took its place."""
    write_json(vault.ledger, [known for known in releases(vault) if known != dict(entry)])
