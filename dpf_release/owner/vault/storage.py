"""How members of a vault lie on the disk: as they are, or each encrypted. Above this nobody asks which.

A member is known by its path in the clear, inside the vault.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from dpf_release.core.files import (
    PARTIAL,
    flush_to_disk,
    json_text,
    make_folder,
    refuse_small_disk,
    remove_folder,
    replacing,
)
from dpf_release.core.locks import locked
from dpf_release.core.progress import Progress
from dpf_release.errors import VaultError
from dpf_release.owner.vault import age
from dpf_release.owner.vault.age import SEALED, is_sealed_form, sealed_form
from dpf_release.owner.vault.contents import CLEAR, MEMBERS, OPENED, SEALS, STAGED, Seals, listed, look_at, read_seals


@dataclass(frozen=True)
class Storage:
    """Members, each a file under its own name; or, where the vault is sealed, of its name and `.age`.

    `sealed.json` says for whom, and which there are. Small members are opened in memory; a folder that is wanted by
    paths (banks; for a retraction: all) in a private folder that goes with the run. Until a run that was cut off is put
    right, a member may lie in the clear, or in both forms; it counts as it is there.

    Attributes:
        root: the vault.
        identity: the file of the secret key that opens what is sealed.
    """

    root: Path
    identity: Path | None = None

    @property
    def is_sealed(self) -> bool:
        """Whether what is written is encrypted."""
        return (self.root / SEALS).exists()

    @property
    def unreadable(self) -> str:
        """Why members cannot be read; empty where they can."""
        return "the vault is sealed: give --identity" if self.is_sealed and not self.identity else ""

    def identity_for(self, path: Path) -> Path:
        """The identity file that opens a member; a `VaultError` where none was named."""
        if self.identity is None:
            raise VaultError(
                f"{path} is sealed. Name the age identity file that opens it: --identity FILE, or the environment's "
                "DPF_RELEASE_IDENTITY."
            )
        return self.identity

    def _seals(self) -> Seals:
        seals = read_seals(self.root)
        if seals is None:
            raise VaultError(f"{self.root / SEALS} is gone. Fetch it from a backup, or `dpf-release vault open` first.")
        return seals

    # ------------------------------------------------------------------------------------------ members

    def members(self, below: Path | None = None) -> list[Path]:
        """All files below a folder of the vault, by their paths in the clear, ascending.

        Not among them is what the vault keeps for itself, and what is half written.
        """
        found = set()
        for path in (below or self.root).rglob("*"):
            hidden = any(part.startswith(".") for part in path.relative_to(self.root).parts)
            if not hidden and path.is_file() and path != self.root / SEALS and not path.name.endswith(PARTIAL):
                found.add(path.with_suffix("") if is_sealed_form(path) else path)
        return sorted(found)

    def file_of(self, member: Path) -> Path:
        """The file that a member lies in, or would if it were there."""
        return sealed_form(member) if self.is_sealed and not member.is_file() else member

    def holds(self, member: Path) -> bool:
        """Whether there is such a member."""
        return self.file_of(member).is_file()

    def _open(self, member: Path, made_by: str) -> BufferedReader | BytesIO:
        if member.is_file():
            return member.open("rb")
        if not self.holds(member):
            raise VaultError(f"expected {member}, found none. Run `dpf-release {made_by}` first.")
        return BytesIO(age.decrypt(sealed_form(member), self.identity_for(member)))

    def read_bytes(self, member: Path, made_by: str) -> bytes:
        """A small member, in memory; a `VaultError` where it does not open, or was not `made_by` that command yet."""
        with self._open(member, made_by) as file:
            return file.read()

    def read_record(self, member: Path, made_by: str) -> Any:
        """A JSON member; as `read_bytes`, and a `VaultError` where it is not JSON."""
        try:
            return json.loads(self.read_bytes(member, made_by))
        except ValueError as error:
            raise VaultError(f"{member} is not JSON: {error}. Run `dpf-release {made_by}` again.") from error

    def sha256(self, member: Path) -> str:
        """The SHA-256 of a member's bytes as they are in the clear, hexadecimal."""
        with self._open(member, "featurize") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextlib.contextmanager
    def writing(self, member: Path) -> Iterator[BinaryIO]:
        """A member to be written, whole or not at all; nothing of it comes to the disk in another form."""
        if not self.is_sealed:
            with replacing(member) as partial, partial.open("wb") as file:
                yield file
            return
        data = BytesIO()
        yield data
        with replacing(sealed_form(member)) as partial:
            partial.write_bytes(age.encrypt(data.getvalue(), self._seals().recipients))
        member.unlink(missing_ok=True)
        self._note({self._name(member)})

    def write_bytes(self, member: Path, data: bytes) -> None:
        """A small member, whole or not at all."""
        with self.writing(member) as file:
            file.write(data)

    def write_json(self, member: Path, tree: Any) -> None:
        """A JSON member, as `core.files.write_json` writes it."""
        self.write_bytes(member, json_text(tree).encode())

    def remove(self, *members: Path) -> None:
        """Removes members, in this order and in either form, where they are there."""
        if self.is_sealed:
            self._note(gone=set(map(self._name, members)))  # their names are forgotten first
        for member in members:
            member.unlink(missing_ok=True)
            sealed_form(member).unlink(missing_ok=True)

    def checkpoint(self, member: Path) -> Path | None:
        """Where a training keeps what it goes on from; None where that would lie in the clear and may not."""
        return None if self.is_sealed else member

    # ------------------------------------------------------------------------------------------ runs

    @contextlib.contextmanager
    def run(self, sealed: bool | None = None) -> Iterator[None]:
        """One run, which holds the vault's lock: what it opens goes at its end, what a killed one left before.

        `sealed`: whether the vault counts as sealed; by default, whether it is.
        """
        if not (self.is_sealed if sealed is None else sealed):
            yield
            return
        self._settle()
        try:
            make_folder(self.root / OPENED)
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        remove_folder(self.root / OPENED)
        self._take_in()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For who only reads, and holds nothing yet: held is what must be opened for that. Nothing else is written."""
        if not self.is_sealed or self.identity is None:
            yield
            return
        age.refuse_other_identity(self.identity, self._seals().recipients)
        with locked(self.root), self.run():
            yield

    # ------------------------------------------------------------------------------------------ folders by paths

    def opened(self, folder: Path, *parts: str) -> Path:
        """A folder of the vault as it can be read by paths until the run ends: itself, or a copy in the clear.

        Of it `parts` are wanted, files and folders; all of it where none is named.

        Raises:
            VaultError: something of it does not open, or it was asked for outside of `run`.
            StorageError: the disk has not the room.
        """
        if not self.is_sealed:
            return folder
        if not (self.root / OPENED).is_dir():
            raise VaultError(f"{folder} is sealed: it is opened for a run that holds the vault, as Project.working().")
        wanted = [
            member
            for place in ([folder / part for part in parts] or [folder])
            for member in (self.members(place) if place.is_dir() else [place] if self.file_of(place).is_file() else [])
            if not self._copy_of(member).exists()
        ]
        refuse_small_disk(self.root, sum(sealed_form(member).stat().st_size for member in wanted))
        for member in wanted:
            make_folder(self._copy_of(member).parent)
            age.decrypt_file(sealed_form(member), self._copy_of(member), self.identity_for(member))
        return self._copy_of(folder)

    @contextlib.contextmanager
    def changing(self, folder: Path, *parts: str) -> Iterator[Path]:
        """A folder, as `opened` has it, to write to by paths; of a copy is sealed what changed.

        That takes its place as a whole when the block ends well: cut off, the vault is as it was before, or after.
        """
        if not self.is_sealed:
            yield folder
            return
        place, copies, staged = make_folder(self.opened(folder, *parts)), self.root / OPENED, self.root / STAGED
        before = _stamps(place)
        yield place
        after, seals = _stamps(place), self._seals()  # with what the block itself has sealed
        changed = [path.relative_to(copies) for path, stamp in after.items() if before.get(path) != stamp]
        for name in changed:
            make_folder((staged / name).parent)
            age.encrypt_file(copies / name, sealed_form(staged / name), seals.recipients)
        flush_folders(self.root, (staged / name for name in changed))
        gone = {path.relative_to(copies).as_posix() for path in before.keys() - after.keys()}
        seals.of({*seals.members, *map(Path.as_posix, changed)} - gone).write(make_folder(staged))
        self._take_in()

    def _take_in(self) -> None:
        """What is staged takes its place if all of it is there, and goes if not; each step may be done twice."""
        staged = self.root / STAGED
        if (after := read_seals(staged)) is not None:
            taken = [self.root / path.relative_to(staged) for path in staged.rglob(f"*{SEALED}")]
            for path in taken:
                make_folder(path.parent)
                (staged / path.relative_to(self.root)).replace(path)
            before = read_seals(self.root)
            gone = [self.root / name for name in set(before.members if before else ()) - set(after.members)]
            for path in gone:
                sealed_form(path).unlink(missing_ok=True)
            flush_folders(self.root, [*taken, *gone])
            (staged / SEALS).replace(self.root / SEALS)  # last: without it there is nothing to take in
            flush_to_disk(self.root)
        remove_folder(staged)

    def _copy_of(self, path: Path) -> Path:
        return self.root / OPENED / path.relative_to(self.root)

    # ------------------------------------------------------------------------------------------ sealing what is clear

    def remove_unfinished(self) -> None:
        """Removes what a killed run left half written, in the clear or sealed."""
        for path in self.root.rglob(f"*{PARTIAL}"):
            name = path.relative_to(self.root).as_posix().removesuffix(PARTIAL)
            if name in CLEAR or MEMBERS.fullmatch(name.removesuffix(SEALED)):
                path.unlink()

    def refuse_strangers(self) -> None:
        """That the vault holds nothing but what a command of ours wrote; or a `VaultError`."""
        if strangers := look_at(self.root).strangers:
            raise VaultError(
                f"expected only what dpf-release writes in {self.root}, found also {listed(strangers)}. They would "
                "stay readable in a sealed vault: move or remove them. Nothing was sealed."
            )

    def seal_the_rest(self) -> None:
        """Seals the members that are in the clear; each goes when its sealed form is on the disk, and opens."""
        seals, members = self._seals(), [self.root / name for name in look_at(self.root).clear]
        refuse_small_disk(self.root, 2 * max((member.stat().st_size for member in members), default=0))
        with Progress("Sealing", len(members), "files", shown=bool(members)) as progress:
            for member in members:
                age.encrypt_file(member, sealed_form(member), seals.recipients)
                member.unlink()
                flush_to_disk(member.parent)
                progress.advance(1)
        left = look_at(self.root)
        self._note(set(left.sealed))
        if left.clear or left.strangers:
            raise VaultError(
                f"these files of {self.root} are still in the clear: {listed((*left.clear, *left.strangers))}. "
                "Something wrote them meanwhile; end it, and seal again."
            )

    def _note(self, sealed: Set[str] = frozenset(), gone: Set[str] = frozenset()) -> None:
        """Keeps the names in `sealed.json`, after members are sealed, and before they go."""
        seals = self._seals()
        members = {*seals.members, *sealed} - gone
        if members != set(seals.members):
            seals.of(members).write(self.root)

    def _name(self, member: Path) -> str:
        return member.relative_to(self.root).as_posix()


def flush_folders(root: Path, members: Iterable[Path]) -> None:
    """Has the folders of members, up to the vault's own, name on the disk what they hold."""
    for folder in {folder for member in members for folder in member.parents if folder.is_relative_to(root)}:
        if folder.is_dir():
            flush_to_disk(folder)


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells a file below a folder from the one that was there before: files are replaced, never written into."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}
