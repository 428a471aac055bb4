"""The owner's private folder: where everything lies, that it is the owner's alone, and how it is read when sealed."""

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

from dpf_release.bank.format import INDEX, SPLITS
from dpf_release.core.files import (
    PARTIAL,
    PRIVATE_FOLDER,
    flush_to_disk,
    json_text,
    make_folder,
    refuse_small_disk,
    remove_folder,
    replacing,
    sha256_of,
    write_json,
    write_text,
)
from dpf_release.errors import VaultError
from dpf_release.owner.vault.age import (
    SEALED,
    decrypt,
    decrypt_file,
    encrypt,
    encrypt_file,
    is_sealed_form,
    sealed_form,
)
from dpf_release.owner.vault.permissions import refuse_others, refuse_tracked

BANK = (INDEX, *SPLITS)  # what a bank has in its folder; beside it may lie what is never opened to the disk
SEALS = "sealed.json"  # in the clear: for whom the vault is sealed, and the names of its sealed members
OPENED = ".opened"  # what of a sealed vault a run that holds its lock reads or writes by paths, in the clear
STAGED = ".staged"  # what such a run has changed, sealed; with a `sealed.json` it is all there, and takes its place
UNPUBLISHED = ".unpublished.json"  # in the clear: where a release is built that is not in its place yet (`staging`)


class Seals(BaseModel):
    """`sealed.json`: a vault that has one is sealed. Names only: a digest would tell whether a guess is right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["dpf-release-seals"] = "dpf-release-seals"
    version: Literal[1] = 1
    recipients: Annotated[tuple[str, ...], Field(min_length=1)]
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vault:
    """Paths inside a vault (layout: `docs/layout.md`), and its members, read and written by them, sealed or not.

    A member has one path, the one that it has in the clear; sealed it lies in `PATH.age` beside it. Small members are
    sealed and opened in memory, banks (for a retraction: all) in a private folder that goes with the run. Folders are
    0700, files 0600.

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
    def seals(self) -> Seals | None:
        """For whom the vault is sealed; None where it is not.

        Raises:
            VaultError: the record is damaged.
        """
        try:
            return Seals.model_validate_json((self.root / SEALS).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise VaultError(
                f"{self.root / SEALS} is not what `dpf-release vault seal` wrote ({error}). Remove it, "
                "open the vault with `dpf-release vault open --identity FILE`, and seal it again."
            ) from error

    def members(self, below: Path | None = None) -> list[Path]:
        """All files below a folder of the vault, sealed or not, by their paths in the clear, ascending.

        Not among them is what the vault keeps for itself, in hidden files and `sealed.json`, and what is half written.
        """
        found = set()
        for path in (below or self.root).rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(self.root).parts)
            if hidden or not path.is_file() or path == self.root / SEALS or path.name.endswith(PARTIAL):
                continue
            found.add(path.with_suffix("") if is_sealed_form(path) else path)
        return sorted(found)

    def holds(self, path: Path) -> bool:
        """Whether there is such a member, sealed or not."""
        return path.is_file() or sealed_form(path).is_file()

    def read_bytes(self, path: Path, made_by: str) -> bytes:
        """A small member; where it is sealed, it is opened in memory only.

        Args:
            path: in the clear.
            made_by: the command that makes it, for the message.

        Raises:
            VaultError: it is not there, or is sealed and does not open.
        """
        if path.is_file():
            return path.read_bytes()
        if not sealed_form(path).is_file():
            raise VaultError(f"expected {path}, found none. Run `dpf-release {made_by}` first.")
        return decrypt(sealed_form(path), self.identity_for(path))

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
        return sha256_of(path) if path.is_file() else hashlib.sha256(self.read_bytes(path, "featurize")).hexdigest()

    def write_bytes(self, path: Path, data: bytes) -> None:
        """A small member, whole or not at all; in a sealed vault it is sealed before it comes to the disk."""
        seals = self.seals
        with replacing(sealed_form(path) if seals else path) as partial:
            partial.write_bytes(encrypt(data, seals.recipients) if seals else data)
        if seals:
            path.unlink(missing_ok=True)
            self.note_sealed([path])

    def write_json(self, path: Path, tree: Any) -> None:
        """A JSON member, as `storage.write_json` writes it."""
        self.write_bytes(path, json_text(tree).encode())

    def remove(self, *paths: Path) -> None:
        """Removes members, in this order, sealed or not, where they are there."""
        if seals := self.seals:
            gone = {self._name(path) for path in paths}
            self._write_seals(seals, set(seals.members) - gone)
        for path in paths:
            path.unlink(missing_ok=True)
            sealed_form(path).unlink(missing_ok=True)

    def checkpoint(self, path: Path) -> Path | None:
        """Where a training keeps what it goes on from; nowhere in a sealed vault, where it would lie in the clear."""
        return None if self.seals else path

    def write_ids(self, rows: Iterable[Mapping[str, Any]], attributes: Sequence[str]) -> None:
        """The id map: `id, split, row, source` and the attribute columns, one line a bank row, in bank order."""
        columns = ["id", "split", "row", "source", *attributes]
        if self.seals:
            text = io.StringIO(newline="")
            _write_table(text, columns, rows)
            self.write_bytes(self.ids, text.getvalue().encode())
            return
        with replacing(self.ids) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            _write_table(file, columns, rows)

    def read_ids(self) -> Iterator[dict[str, str]]:
        """The id map, row by row.

        Raises:
            VaultError: there is none.
        """
        if self.ids.is_file():
            with self.ids.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)
        else:
            yield from csv.DictReader(io.StringIO(self.read_bytes(self.ids, "featurize").decode(), newline=""))

    # ------------------------------------------------------------------------------------------ banks, and runs

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """One run, which holds the vault's lock: what it opens goes at its end, what a killed one left before."""
        self._settle()
        try:
            if self.seals:
                make_folder(self.root / OPENED)
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Removes what is opened, and takes in what is staged."""
        remove_folder(self.root / OPENED)
        self._take_in()

    def opened(self, folder: Path, *parts: str) -> Path:
        """A folder of the vault as it can be read, until the run ends: itself, or a copy in the clear.

        Args:
            folder: in the vault, or the vault's own.
            parts: the files and folders of it that are wanted; all of it where none is named.

        Raises:
            VaultError: something of it does not open, or it was asked for outside of `run`.
            StorageError: the disk has not the room.
        """
        if self.seals is None:
            return folder
        if not (self.root / OPENED).is_dir():
            raise VaultError(f"{folder} is sealed: it is opened for a run that holds the vault, as Project.working().")
        wanted = [
            member
            for place in ([folder / part for part in parts] or [folder])
            for member in (self.members(place) if place.is_dir() else [place] if self.holds(place) else [])
            if not self._copy_of(member).exists()
        ]
        refuse_small_disk(self.root, sum(sealed_form(member).stat().st_size for member in wanted))
        for member in wanted:
            make_folder(self._copy_of(member).parent)
            decrypt_file(sealed_form(member), self._copy_of(member), self.identity_for(member))
        return self._copy_of(folder)

    @contextlib.contextmanager
    def changing(self, folder: Path, *parts: str) -> Iterator[Path]:
        """A folder to write to: itself, or a copy in the clear; what changed is sealed when the block ends well.

        It takes its place as a whole: cut off, a sealed vault is as it was before, or as it is after.

        Args:
            folder: as for `opened`.
            parts: as for `opened`.
        """
        seals = self.seals
        if seals is None:
            yield folder
            return
        place, copies, staged = make_folder(self.opened(folder, *parts)), self.root / OPENED, self.root / STAGED
        before = _stamps(place)
        yield place
        after, seals = _stamps(place), self.seals or seals  # with what the block itself has sealed
        changed = [path.relative_to(copies) for path, stamp in after.items() if before.get(path) != stamp]
        for name in changed:
            make_folder((staged / name).parent)
            encrypt_file(copies / name, sealed_form(staged / name), seals.recipients)
        self.flush_folders(staged / name for name in changed)
        gone = {path.relative_to(copies).as_posix() for path in before.keys() - after.keys()}
        self._write_seals(seals, {*seals.members, *map(Path.as_posix, changed)} - gone, make_folder(staged))
        self._take_in()

    def _take_in(self) -> None:
        """What is staged takes its place if all of it is there, and goes if not; each step may be done twice."""
        staged = self.root / STAGED
        if (after := Vault(staged).seals) is not None:
            taken = [self.root / path.relative_to(staged) for path in staged.rglob(f"*{SEALED}")]
            for path in taken:
                make_folder(path.parent)
                (staged / path.relative_to(self.root)).replace(path)
            before = self.seals
            gone = [self.root / name for name in set(before.members if before else ()) - set(after.members)]
            for path in gone:
                sealed_form(path).unlink(missing_ok=True)
            self.flush_folders([*taken, *gone])
            (staged / SEALS).replace(self.root / SEALS)  # last: without it there is nothing to take in
            flush_to_disk(self.root)
        remove_folder(staged)

    def flush_folders(self, members: Iterable[Path]) -> None:
        """Has the folders of members, up to the vault's own, name on the disk what they hold."""
        for folder in {folder for member in members for folder in member.parents if folder.is_relative_to(self.root)}:
            if folder.is_dir():
                flush_to_disk(folder)

    def be_ignored(self) -> None:
        """Tells git to ignore the vault, where it is not told yet."""
        path = self.root / ".gitignore"
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != "*\n":
            write_text(path, "*\n")

    def note_sealed(self, members: Iterable[Path]) -> None:
        """Adds members to the names in `sealed.json`, after they are sealed."""
        if seals := self.seals:
            self._write_seals(seals, {*seals.members, *map(self._name, members)})

    def _write_seals(self, seals: Seals, members: set[str], folder: Path | None = None) -> None:
        if folder or members != set(seals.members):
            tree = seals.model_dump(mode="json") | {"members": sorted(members)}
            write_json((folder or self.root) / SEALS, tree)

    def _name(self, member: Path) -> str:
        return member.relative_to(self.root).as_posix()

    def _copy_of(self, path: Path) -> Path:
        return self.root / OPENED / path.relative_to(self.root)

    def identity_for(self, path: Path) -> Path:
        """The identity file that opens a member.

        Raises:
            VaultError: none was named.
        """
        if self.identity is None:
            raise VaultError(
                f"{path} is sealed. Name the age identity file that opens it: --identity FILE, or the environment's "
                "DPF_RELEASE_IDENTITY."
            )
        return self.identity


def checked_name(name: str) -> str:
    """The name of a fitted function, where it can be a folder's.

    Raises:
        VaultError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise VaultError(f"expected a name of letters, digits, '.', '_' and '-' (64 at most, --name), found {name!r}.")
    return name


def _write_table(file: TextIO, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    table = csv.DictWriter(file, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells a file below a folder from the one that was there before: files are replaced, never written into."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}
