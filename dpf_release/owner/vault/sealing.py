"""What is done to a vault as a whole: sealed, opened for good, made to forget what can be made again, and looked at."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dpf_release.bank.format import INDEX
from dpf_release.core.files import flush_to_disk, refuse_small_disk
from dpf_release.core.locks import locked
from dpf_release.core.progress import Progress
from dpf_release.errors import VaultError
from dpf_release.owner.vault.age import decrypt_file, read_identity, read_recipients, sealed_form
from dpf_release.owner.vault.contents import BANK_FILE, SEALS, STAGED, Seals, VaultState, listed, look_at, read_seals
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.retractions import read_retracted
from dpf_release.owner.vault.staging import remove_unpublished
from dpf_release.owner.vault.storage import flush_folders
from dpf_release.owner.vault.vault import Vault

SHOWN = 5
FORGETTABLE = ("features", "candidates", "figures")
DELETION = (
    "Deleted is not erased. The names are gone and the room is free; the bytes may stay: in blocks that an SSD has put "
    "aside, in the file system's journal, in snapshots and copy-on-write copies, in backups and whatever syncs this "
    "folder. Overwriting would not reach those either. Bytes that are only ever written to an encrypted disk go with "
    "its key; remove old snapshots and backups yourself."
)


class Forgotten(NamedTuple):
    """How many files were removed, and their size."""

    files: int
    bytes: int


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
        known = read_seals(vault.root)
        if known and recipients and set(known.recipients) != set(recipients):
            raise VaultError(
                f"{vault.root} is sealed for {', '.join(known.recipients)}. Open it first (`dpf-release vault open "
                "--identity FILE`), then seal it for others: members that are sealed stay as they are."
            )
        read_recipients(recipients or (known.recipients if known else ()))
        remove_unpublished(vault.root)
        vault.remove_unfinished()
        vault.refuse_strangers()
        if not known:
            _refuse_unfinished_retraction(vault)  # which may have half a file, or want what is forgotten
            Seals(recipients=tuple(dict.fromkeys(recipients))).write(vault.root)
        _forget(vault, forgotten)
        vault.seal_the_rest()
    return look_at(vault.root)


def _refuse_unfinished_retraction(vault: Vault) -> None:
    if read_retracted(vault).unfinished is not None:
        raise VaultError(
            f"a retraction in {vault.root} was cut off. Run `dpf-release retract` to finish it, then this command "
            "again. Nothing was changed."
        )


def unseal(vault: Vault) -> VaultState:
    """Opens every member for good; the vault is then as it was before it was sealed.

    Raises:
        VaultError: members do not open (another key, cut off, changed). They stay sealed, and so does what is noted.
    """
    with locked(vault.root), vault.run(sealed=True):
        sealed = [vault.root / name for name in look_at(vault.root).sealed]
        if read_seals(vault.root) is None and not sealed:
            raise VaultError(f"{vault.root} is not sealed. There is nothing to open.")
        identity = vault.identity_for(vault.root)
        read_identity(identity)  # said once, before the first member is tried
        remove_unpublished(vault.root)
        vault.remove_unfinished()
        problems = []
        with Progress("Opening", len(sealed), "files") as progress:
            for member in sealed:
                try:
                    _open_for_good(vault.root, member, identity)
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
    return look_at(vault.root)


def _open_for_good(root: Path, member: Path, identity: Path) -> None:
    if not member.is_file():  # one that is there in both forms was opened, or not yet sealed, when a run was cut off
        refuse_small_disk(root, sealed_form(member).stat().st_size)
        decrypt_file(sealed_form(member), member, identity)
    sealed_form(member).unlink()
    flush_to_disk(member.parent)


def forget(vault: Vault) -> Forgotten:
    """Removes φ1(S), the candidates and the figures: after a release they are only a risk, and can be made again.

    Plan and id map stay, so that `featurize` and `poison` write the same rows again; they refuse where S changed.

    Raises:
        VaultError: no release was made yet, or a retraction was cut off.
    """
    with locked(vault.root), vault.run():
        vault.begin_run()
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
    flush_folders(vault.root, chosen)
    return forgotten


def _kind_of(member: Path) -> str | None:
    name = member.as_posix()
    if name.startswith("candidates/"):
        return "candidates"
    if BANK_FILE.fullmatch(name.removeprefix("public_")):
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
    state = look_at(vault.root)
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (("in the clear", state.clear), ("unknown", state.strangers), ("missing", state.missing))
        if names
    ]
    if state.seals and problems:
        raise VaultError(
            f"{vault.root} is not sealed as a whole. {'; '.join(problems)}. Fetch what is missing from a backup, "
            "remove what is unknown, and run `dpf-release vault seal`."
        )
    return state
