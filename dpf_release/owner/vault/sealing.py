"""What is done to a vault as a whole: sealed, opened for good, made to forget what can be made again, and looked at."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpf_release.bank.format import INDEX
from dpf_release.core.files import PARTIAL, flush_to_disk, refuse_small_disk, write_json
from dpf_release.core.locks import LOCK, locked
from dpf_release.core.progress import Progress
from dpf_release.errors import VaultError
from dpf_release.owner.vault.age import (
    SEALED,
    decrypt_file,
    encrypt_file,
    is_sealed_form,
    read_identity,
    read_recipients,
    sealed_form,
)
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.retractions import read_retracted
from dpf_release.owner.vault.staging import remove_unpublished, unpublished_folder
from dpf_release.owner.vault.vault import OPENED, SEALS, STAGED, UNPUBLISHED, Seals, Vault

FORGETTABLE = ("features", "candidates", "figures")
DELETION = (
    "Deleted is not erased. The names are gone and the room is free; the bytes may stay: in blocks that an SSD has put "
    "aside, in the file system's journal, in snapshots and copy-on-write copies, in backups and whatever syncs this "
    "folder. Overwriting would not reach those either. Bytes that are only ever written to an encrypted disk go with "
    "its key; remove old snapshots and backups yourself."
)
SHOWN = 5
# What a vault keeps for itself; nothing of S or P is in it.
CLEAR = {".gitignore", LOCK, SEALS, UNPUBLISHED}
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_BANK = r"features/(index(-before)?\.json|(train|val|test)/shard-[0-9]{5}\.h5)"
# Every file that a command writes into a vault: from each of them S or P, or a part of them, could be had.
MEMBERS = re.compile(
    "|".join(
        [
            r"network/((phi|checkpoint)\.safetensors|(network|history|imported)\.json)",
            r"survey-(private|public)\.json",
            r"features/plan\.json",
            _BANK,
            r"ids\.csv",
            r"(ledger|retracted)\.json",
            r"reconstructors/[^/]+\.(safetensors|json)",
            rf"functions/{_NAME}/((state|plan|checkpoint[-0-9a-z]*)\.safetensors|(function|history|candidate)\.json)",
            rf"candidates/{_NAME}/({_BANK}|model/((featurizer|classifier)\.safetensors|model\.json))",
            rf"reports/{_NAME}/.+",
            r"attackers/[^/]+\.(safetensors|checkpoint)",
        ]
    )
)


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


@dataclass(frozen=True)
class Forgotten:
    """What was removed.

    Attributes:
        files: how many.
        bytes: their sizes.
    """

    files: int
    bytes: int


def look_at(vault: Vault) -> VaultState:
    """What is in a vault: sealed, in the clear, unknown, missing."""
    found = {path.relative_to(vault.root).as_posix(): path for path in vault.root.rglob("*") if not path.is_dir()}
    names = {name: path for name, path in found.items() if not name.startswith((f"{OPENED}/", f"{STAGED}/"))}
    sealed = {name.removesuffix(SEALED) for name, path in names.items() if is_sealed_form(path)}
    clear = {name for name, path in names.items() if name not in CLEAR and not is_sealed_form(path)}
    known = {name for name in clear if MEMBERS.fullmatch(name)}
    strangers = (clear - known) | {name + SEALED for name in sealed if not MEMBERS.fullmatch(name)}
    seals = vault.seals
    missing = set(seals.members if seals else ()) - sealed - clear
    places = [folder for folder in (vault.root / OPENED, unpublished_folder(vault)) if folder]
    left = {os.path.relpath(path, vault.root) for place in places for path in place.rglob("*") if not path.is_dir()}
    parts = (sealed, known | left, strangers, missing)
    return VaultState(seals, *(tuple(sorted(part)) for part in parts))


def seal(vault: Vault, recipients: Sequence[str] = (), forgotten: Collection[str] = ()) -> VaultState:
    """Seals every member of a vault, for whoever has the secret key of one of the recipients.

    A run that was cut off is gone on with by the next run of any command; until then a member is there in the clear,
    sealed, or both.

    Args:
        vault: which no run works in.
        recipients: public keys, `age1...`; may be left out where the vault is sealed already.
        forgotten: what is removed instead, of `features`, `candidates` and `figures`; it can be made again from S.

    Raises:
        VaultError: nobody to seal for, the vault is sealed for others, it holds what no command of ours wrote, or a
            retraction was cut off.
        StorageError: another run works in it, or the disk has not the room.
    """
    if unknown := sorted(set(forgotten) - set(FORGETTABLE)):
        raise VaultError(f"expected {', '.join(FORGETTABLE)} to forget, found {', '.join(unknown)}.")
    with locked(vault.root), vault.run():
        known = vault.seals
        if known and recipients and set(known.recipients) != set(recipients):
            raise VaultError(
                f"{vault.root} is sealed for {', '.join(known.recipients)}. Open it first (`dpf-release vault open "
                "--identity FILE`), then seal it for others: members that are sealed stay as they are."
            )
        read_recipients(recipients or (known.recipients if known else ()))
        remove_unpublished(vault)
        _remove_unfinished(vault)
        _refuse_strangers(vault)
        if not known:
            _refuse_unfinished_retraction(vault)  # which may have half a file, or want what is forgotten
            seals = Seals(recipients=tuple(dict.fromkeys(recipients)))
            write_json(vault.root / SEALS, seals.model_dump(mode="json"))
        _forget(vault, forgotten)
        _seal_the_rest(vault)
    return look_at(vault)


def _refuse_unfinished_retraction(vault: Vault) -> None:
    if read_retracted(vault).unfinished is not None:
        raise VaultError(
            f"a retraction in {vault.root} was cut off. Run `dpf-release retract` to finish it, then this command "
            "again. Nothing was changed."
        )


def begin_run(vault: Vault) -> None:
    """What the first rank of each run does when it has the vault's lock.

    Git ignores the vault then, what is sealed is sealed, and no release that was not published lies beside its place.

    Raises:
        VaultError: a sealed vault holds what no command of ours wrote.
        StorageError: what a killed run left could not be removed.
    """
    vault.be_ignored()
    remove_unpublished(vault)
    if vault.seals:
        _remove_unfinished(vault)
        _refuse_strangers(vault)
        _seal_the_rest(vault)


def _remove_unfinished(vault: Vault) -> None:
    """What a killed run left half written, in the clear or sealed."""
    for path in vault.root.rglob(f"*{PARTIAL}"):
        name = path.relative_to(vault.root).as_posix().removesuffix(PARTIAL)
        if name in CLEAR or MEMBERS.fullmatch(name.removesuffix(SEALED)):
            path.unlink()


def _refuse_strangers(vault: Vault) -> None:
    if strangers := look_at(vault).strangers:
        raise VaultError(
            f"expected only what dpf-release writes in {vault.root}, found also {_listed(strangers)}. They would stay "
            "readable in a sealed vault: move or remove them. Nothing was sealed."
        )


def _seal_the_rest(vault: Vault) -> None:
    """Seals the members that are in the clear; each goes when its sealed form is on the disk, and opens."""
    seals, members = vault.seals, [vault.root / name for name in look_at(vault).clear]
    if seals is None:
        return
    refuse_small_disk(vault.root, 2 * max((member.stat().st_size for member in members), default=0))
    with Progress("Sealing", len(members), "files", shown=bool(members)) as progress:
        for member in members:
            encrypt_file(member, sealed_form(member), seals.recipients)
            member.unlink()
            flush_to_disk(member.parent)
            progress.advance(1)
    left = look_at(vault)
    vault.note_sealed(vault.root / name for name in left.sealed)
    if left.clear or left.strangers:
        raise VaultError(
            f"these files of {vault.root} are still in the clear: {_listed([*left.clear, *left.strangers])}. Something "
            "wrote them meanwhile; end it, and seal again."
        )


def unseal(vault: Vault) -> VaultState:
    """Opens every member for good; the vault is then as it was before it was sealed.

    Raises:
        VaultError: members do not open (another key, cut off, changed). They stay sealed, and so does what is noted.
        StorageError: another run works in the vault, or the disk has not the room.
    """
    with locked(vault.root), vault.run():
        sealed = [vault.root / name for name in look_at(vault).sealed]
        if vault.seals is None and not sealed:
            raise VaultError(f"{vault.root} is not sealed. There is nothing to open.")
        read_identity(vault.identity_for(vault.root))  # said once, before the first member is tried
        remove_unpublished(vault)
        _remove_unfinished(vault)
        problems = []
        with Progress("Opening", len(sealed), "files") as progress:
            for member in sealed:
                try:
                    _open_for_good(vault, member)
                except VaultError as error:
                    problems.append(str(error))
                progress.advance(1)
        if problems:
            raise VaultError(
                f"{len(problems)} of {len(sealed)} members did not open; they are as they were, and the vault counts "
                "as sealed.\n  " + "\n  ".join(problems[:SHOWN])
            )
        (vault.root / SEALS).unlink(missing_ok=True)
        flush_to_disk(vault.root)
    return look_at(vault)


def _open_for_good(vault: Vault, member: Path) -> None:
    if not member.is_file():  # one that is there in both forms was opened, or not yet sealed, when a run was cut off
        refuse_small_disk(vault.root, sealed_form(member).stat().st_size)
        decrypt_file(sealed_form(member), member, vault.identity_for(member))
    sealed_form(member).unlink()
    flush_to_disk(member.parent)


def forget(vault: Vault) -> Forgotten:
    """Removes φ1(S), the candidates and the figures: after a release they are only a risk, and can be made again.

    Plan and id map stay, so that `featurize` and `poison` write the same rows again; they refuse where S changed.

    Raises:
        VaultError: no release was made yet, or a retraction was cut off.
        StorageError: another run works in the vault.
    """
    with locked(vault.root), vault.run():
        begin_run(vault)
        _refuse_unfinished_retraction(vault)
        if not any(entry.get("published", True) for entry in releases(vault)):
            raise VaultError(
                f"no release was made from {vault.root} yet: what would be forgotten is still wanted. Run `dpf-release "
                "package` first, or `dpf-release vault seal --forget features ...`."
            )
        return _forget(vault, FORGETTABLE)


def _forget(vault: Vault, kinds: Collection[str]) -> Forgotten:
    chosen = [member for member in vault.members() if _kind_of(member.relative_to(vault.root)) in kinds]
    files = [path for member in chosen for path in (member, sealed_form(member)) if path.is_file()]
    forgotten = Forgotten(len(chosen), sum(path.stat().st_size for path in files))
    # The index first: a bank without one is unfinished.
    vault.remove(*sorted(chosen, key=lambda member: (member.name != INDEX, member)))
    vault.flush_folders(chosen)
    return forgotten


def _kind_of(member: Path) -> str | None:
    name = member.as_posix()
    if name.startswith("candidates/"):
        return "candidates"
    if re.fullmatch(_BANK, name):
        return "features"
    return "figures" if name.startswith("reports/") and member.suffix != ".json" else None


def check(vault: Vault) -> VaultState:
    """What is in a vault, where all of a sealed one is sealed and there.

    Raises:
        VaultError: a sealed vault has members in the clear, has lost some, or holds what no command of ours wrote; or a
            run was cut off while what it had changed took its place.
    """
    if (vault.root / STAGED / SEALS).exists():
        raise VaultError(f"a run in {vault.root} was cut off. Run `dpf-release vault seal` to end it; it wants no key.")
    state = look_at(vault)
    problems = [
        f"{what}: {_listed(names)}"
        for what, names in (("in the clear", state.clear), ("unknown", state.strangers), ("missing", state.missing))
        if names
    ]
    if state.seals and problems:
        raise VaultError(
            f"{vault.root} is not sealed as a whole. {'; '.join(problems)}. Fetch what is missing from a backup, "
            "remove what is unknown, and run `dpf-release vault seal`."
        )
    return state


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
