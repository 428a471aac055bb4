"""The owner's private folder: where everything lies in it, and that it is the owner's alone."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpf_release.bank.format import INDEX, SPLITS
from dpf_release.core.files import PRIVATE_FOLDER, json_text, make_folder, write_text
from dpf_release.errors import VaultError
from dpf_release.owner.vault.contents import SEALS
from dpf_release.owner.vault.permissions import refuse_others, refuse_tracked
from dpf_release.owner.vault.staging import remove_unpublished
from dpf_release.owner.vault.storage import EncryptedStorage, PlainStorage

BANK = (INDEX, *SPLITS)  # what a bank has in its folder; beside it may lie what is never opened to the disk
ID_COLUMNS = ("id", "split", "row", "source")  # of the id map; attributes follow


@dataclass(frozen=True)
class Vault:
    """Everything private: folders 0700, files 0600. How a member lies there is its storage's concern.

    Attributes:
        root: the folder.
        identity: the file of the secret key that opens what is sealed.
    """

    root: Path
    identity: Path | None = None

    @classmethod
    def create(cls, root: Path) -> Vault:
        """A new vault, or the one that is there; git is told to ignore all of it."""
        make_folder(root)
        root.chmod(PRIVATE_FOLDER)
        vault = cls(root)
        vault.be_ignored()
        return vault

    @classmethod
    def open(cls, root: Path, identity: Path | None = None, *, fix_permissions: bool = False) -> Vault:
        """The vault beside a configuration.

        Args:
            root: its folder.
            identity: the age identity file that opens it, where it is sealed.
            fix_permissions: take away the rights of others, in the place of a refusal.

        Raises:
            VaultError: there is none, others have a right in it, it holds links or files of others, or git tracks it.
        """
        if not root.is_dir():
            raise VaultError(f"expected a vault at {root}, found none. Run `dpf-release init DIR` first.")
        refuse_others(root, fix=fix_permissions)
        refuse_tracked(root)
        return cls(root, identity)

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

    # ------------------------------------------------------------------------------------------ members

    @property
    def storage(self) -> PlainStorage:
        """How members lie here: encrypted once the vault is sealed."""
        kind = EncryptedStorage if (self.root / SEALS).exists() else PlainStorage
        return kind(self.root, self.identity)

    def members(self, below: Path | None = None) -> list[Path]:
        """All files below a folder of the vault, by their paths in the clear, ascending.

        Not among them is what the vault keeps for itself, and what is half written.
        """
        return self.storage.members(below or self.root)

    def holds(self, path: Path) -> bool:
        """Whether there is such a member."""
        return self.storage.file_of(path).is_file()

    def _open(self, path: Path, made_by: str) -> io.BufferedReader | io.BytesIO:
        if not self.holds(path):
            raise VaultError(f"expected {path}, found none. Run `dpf-release {made_by}` first.")
        return self.storage.open(path)

    def read_bytes(self, path: Path, made_by: str) -> bytes:
        """A small member; nothing of it comes to the disk.

        Args:
            path: in the clear.
            made_by: the command that makes it, for the message.

        Raises:
            VaultError: it is not there, or does not open.
        """
        with self._open(path, made_by) as file:
            return file.read()

    def read_record(self, path: Path, made_by: str) -> Any:
        """A JSON member; as `read_bytes`.

        Raises:
            VaultError: also where it is not JSON.
        """
        try:
            return json.loads(self.read_bytes(path, made_by))
        except ValueError as error:
            raise VaultError(f"{path} is not JSON: {error}. Run `dpf-release {made_by}` again.") from error

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a member's bytes as they are in the clear, hexadecimal."""
        with self._open(path, "featurize") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write_bytes(self, path: Path, data: bytes) -> None:
        """A small member, whole or not at all."""
        with self.storage.writing(path) as file:
            file.write(data)

    def write_json(self, path: Path, tree: Any) -> None:
        """A JSON member, as `core.files.write_json` writes it."""
        self.write_bytes(path, json_text(tree).encode())

    def remove(self, *paths: Path) -> None:
        """Removes members, in this order, where they are there."""
        self.storage.remove(paths)

    def checkpoint(self, path: Path) -> Path | None:
        """Where a training keeps what it goes on from; None where nothing may lie there in the clear."""
        return self.storage.checkpoint(path)

    def write_ids(self, rows: Iterable[Mapping[str, Any]], attributes: Sequence[str]) -> None:
        """The id map: `id, split, row, source` and the attribute columns, one line a bank row, in bank order."""
        with self.storage.writing(self.ids) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            table = csv.DictWriter(text, [*ID_COLUMNS, *attributes], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            text.detach()

    def read_ids(self) -> Iterator[dict[str, str]]:
        """The id map, row by row.

        Raises:
            VaultError: there is none.
        """
        with io.TextIOWrapper(self._open(self.ids, "featurize"), "utf-8", newline="") as text:
            yield from csv.DictReader(text)

    def drop_ids(self, gone: Set[bytes]) -> None:
        """Takes the lines of rows, by their ids (16 bytes), out of the id map, and numbers the others anew."""
        numbers = dict.fromkeys(map(str, SPLITS), 0)

        def lines() -> Iterator[dict[str, str]]:
            for line in self.read_ids():
                if bytes.fromhex(line["id"]) not in gone:
                    yield line | {"row": str(numbers[line["split"]])}
                    numbers[line["split"]] += 1

        self.write_ids(lines(), [key for key in next(self.read_ids()) if key not in ID_COLUMNS])

    # ------------------------------------------------------------------------------------------ banks, and runs

    def run(self) -> AbstractContextManager[None]:
        """One run, which holds the vault's lock: what it opens goes at its end, what a killed one left before."""
        return self.storage.run()

    def begin_run(self) -> None:
        """What the first process of each run does when it has the vault's lock.

        Git ignores the vault then, members lie there as they should, and no release that was not published lies beside
        its place.

        Raises:
            VaultError: the vault holds what no command of ours wrote, and what may not lie there.
            StorageError: what a killed run left could not be removed.
        """
        self.be_ignored()
        remove_unpublished(self.root)
        self.storage.begin_run()

    def opened(self, folder: Path, *parts: str) -> Path:
        """A folder of the vault as it can be read by paths until the run ends: itself, or a copy in the clear.

        Args:
            folder: in the vault, or the vault's own.
            parts: the files and folders of it that are wanted; all of it where none is named.

        Raises:
            VaultError: something of it does not open, or it was asked for outside of `run`.
            StorageError: the disk has not the room.
        """
        return self.storage.opened(folder, *parts)

    def changing(self, folder: Path, *parts: str) -> AbstractContextManager[Path]:
        """A folder to write to by paths: itself, or a copy in the clear, of which is kept what changed.

        A copy takes its place as a whole when the block ends well: cut off, the vault is as it was before, or as it is
        after.

        Args:
            folder: as for `opened`.
            parts: as for `opened`.
        """
        return self.storage.changing(folder, *parts)

    def be_ignored(self) -> None:
        """Tells git to ignore the vault, where it is not told yet."""
        path = self.root / ".gitignore"
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != "*\n":
            write_text(path, "*\n")


def checked_name(name: str) -> str:
    """The name of a fitted function, where it can be a folder's.

    Raises:
        VaultError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise VaultError(f"expected a name of letters, digits, '.', '_' and '-' (64 at most, --name), found {name!r}.")
    return name
