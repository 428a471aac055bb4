"""The owner's private folder: where everything lies in it, and that it is the owner's alone."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from dpf_release.bank.format import INDEX, SPLITS
from dpf_release.core.files import PRIVATE_FOLDER, make_folder, write_text
from dpf_release.errors import VaultError
from dpf_release.owner.vault.permissions import refuse_others, refuse_tracked
from dpf_release.owner.vault.staging import remove_unpublished
from dpf_release.owner.vault.storage import Storage

BANK = (INDEX, *SPLITS)  # what a bank has in its folder; beside it may lie what is never opened to the disk
ID_COLUMNS = ("id", "split", "row", "source")  # of the id map; attributes follow


class Vault(Storage):
    """Everything private: folders 0700, files 0600. How a member lies there is its storage's concern."""

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
        """The vault beside a configuration; `fix_permissions`: take away the rights of others, and do not refuse.

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
    def public_features(self) -> Path:
        """φ1(Q)."""
        return self.root / "public_features"

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

    def write_ids(self, rows: Iterable[Mapping[str, Any]], attributes: Sequence[str]) -> None:
        """The id map: `id, split, row, source` and the attribute columns, one line a bank row, in bank order."""
        with self.writing(self.ids) as file:
            text = io.TextIOWrapper(file, "utf-8", newline="")
            table = csv.DictWriter(text, [*ID_COLUMNS, *attributes], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            text.detach()

    def read_ids(self) -> Iterator[dict[str, str]]:
        """The id map, row by row; a `VaultError` where there is none."""
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

    def begin_run(self) -> None:
        """What the first process of each run does when it has the vault's lock.

        Git ignores the vault then, members lie there as they should, and no release that was not published lies beside
        its place.
        """
        self.be_ignored()
        remove_unpublished(self.root)
        if self.is_sealed:  # what is half written in the clear is replaced when it is written again
            self.remove_unfinished()
            self.refuse_strangers()
            self.seal_the_rest()

    def be_ignored(self) -> None:
        """Tells git to ignore the vault, where it is not told yet."""
        path = self.root / ".gitignore"
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != "*\n":
            write_text(path, "*\n")


def checked_name(name: str) -> str:
    """The name of a fitted function, where it can be a folder's; or a `VaultError`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise VaultError(f"expected a name of letters, digits, '.', '_' and '-' (64 at most, --name), found {name!r}.")
    return name
