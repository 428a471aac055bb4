"""The age format (age-encryption.org/v1), through pyrage: the ordinary `age` program opens what is sealed here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dpf_release.core.files import replacing, sha256_of
from dpf_release.errors import VaultError

SEALED = ".age"  # after the name of a file: its sealed form
HEADER = b"age-encryption.org/v1\n"
MAX_IDENTITY_BYTES = 2**20


def sealed_form(path: Path) -> Path:
    """Where a file lies when it is sealed."""
    return path.with_name(path.name + SEALED)


def is_sealed_form(path: Path) -> bool:
    """Whether a file is one of the age format, and not only named like one."""
    if path.suffix != SEALED:
        return False
    with path.open("rb") as file:
        return file.read(len(HEADER)) == HEADER


def load_pyrage() -> Any:
    """The package that reads and writes the age format; a `VaultError` where it is not installed."""
    try:
        import pyrage
    except ImportError as error:
        raise VaultError(
            "expected the package pyrage, which seals and opens a vault, found none. Install dpf-release[seal]."
        ) from error
    return pyrage


def read_recipients(recipients: Sequence[str]) -> list[Any]:
    """Public keys from their texts, `age1...`; a `VaultError` where one is none, or there are none."""
    pyrage = load_pyrage()
    if not recipients:
        raise VaultError("expected a recipient to seal for (--recipient age1...), found none.")
    try:
        return [pyrage.x25519.Recipient.from_str(text) for text in recipients]
    except pyrage.RecipientError as error:
        raise VaultError(
            f"expected recipients age1... as `age-keygen` prints them, found {', '.join(map(_shortened, recipients))}: "
            f"{error}. Nothing was sealed."
        ) from error


def _shortened(text: str) -> str:
    """Enough of a key to know it by; who gives the secret one by mistake does not find it in a log."""
    return f"{text[:12]}..." if text.startswith("age1") else "something else"


def read_identity(path: Path) -> list[Any]:
    """Secret keys from a file as `age-keygen` writes it: one a line, comments after `#`; or a `VaultError`."""
    pyrage = load_pyrage()
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_IDENTITY_BYTES).decode().splitlines()
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        identities = [pyrage.x25519.Identity.from_str(key) for key in keys]
    except (OSError, UnicodeDecodeError, pyrage.IdentityError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        raise VaultError(
            f"expected lines AGE-SECRET-KEY-1... in the identity file {path}, as `age-keygen` writes them, found "
            f"something else ({reason}). A file that is itself encrypted must be decrypted first, with `age -d`."
        ) from error
    if not identities:
        raise VaultError(f"expected a line AGE-SECRET-KEY-1... in the identity file {path}, found none.")
    return identities


def refuse_other_identity(path: Path, recipients: Sequence[str]) -> None:
    """That an identity file opens what is sealed for these recipients; or a `VaultError`."""
    own, expected = ([str(key.to_public()) for key in read_identity(path)], list(map(str, read_recipients(recipients))))
    if set(own).isdisjoint(expected):
        raise VaultError(
            f"expected the secret key of {' or '.join(expected)} in the identity file {path}, found that of "
            f"{', '.join(own)}. Name the file of a key that the vault is sealed for: --identity FILE."
        )


def encrypt(data: bytes, recipients: Sequence[str]) -> bytes:
    """The sealed form of a few bytes."""
    return bytes(load_pyrage().encrypt(data, read_recipients(recipients)))


def decrypt(path: Path, identity: Path) -> bytes:
    """What a sealed file holds, in memory; a `VaultError` where the key is another, or the file cut off or changed."""
    pyrage, identities = load_pyrage(), read_identity(identity)
    try:
        return bytes(pyrage.decrypt(path.read_bytes(), identities))
    except (pyrage.DecryptError, OSError) as error:
        raise _not_opened(path, identity, error) from error


def encrypt_file(path: Path, sealed: Path, recipients: Sequence[str]) -> None:
    """Writes the sealed form of a file, in little memory, and sees that it can be opened again, or a `VaultError`.

    The secret keys are not here. So it is sealed for a key of this call too, read back with that, and that forgotten:
    pyrage does not tell where the last bytes found no room, and the plain file is about to go.
    """
    pyrage = load_pyrage()
    witness, digest = pyrage.x25519.Identity.generate(), hashlib.sha256()
    keys = [*read_recipients(recipients), witness.to_public()]
    with replacing(sealed) as partial:
        try:
            with path.open("rb") as plain, partial.open("wb") as file:
                _convert(pyrage.encrypt_io, plain, file.write, keys)
            with partial.open("rb") as again:
                _convert(pyrage.decrypt_io, again, digest.update, [witness])
            whole = digest.hexdigest() == sha256_of(path)
        except ValueError:
            whole = False
        if not whole:
            raise VaultError(f"{path} could not be sealed: what was written does not open to it. It stays as it was.")


def decrypt_file(sealed: Path, target: Path, identity: Path) -> None:
    """As `decrypt`, written whole or not at all, in little memory; a `StorageError` where the disk does not take it."""
    identities = read_identity(identity)
    with replacing(target) as partial, sealed.open("rb") as file, partial.open("wb") as plain:
        try:
            _convert(load_pyrage().decrypt_io, file, plain.write, identities)
        except ValueError as error:
            raise _not_opened(sealed, identity, error) from error


def _not_opened(sealed: Path, identity: Path, error: Exception) -> VaultError:
    return VaultError(
        f"{sealed} does not open with {identity} ({error}). Either that is another key, or the file is cut off or "
        "changed: then fetch it from a backup. Nothing was written or removed."
    )


def _convert(convert: Callable[..., None], source: BinaryIO, take: Callable[[bytes], object], keys: list[Any]) -> None:
    """Reads a file to its end through pyrage; a `ValueError` where it does not open."""
    pyrage, taker = load_pyrage(), _Taker(take)
    try:
        convert(source, taker, keys)
    except (pyrage.EncryptError, pyrage.DecryptError, OSError) as error:
        if taker.error is None:
            raise ValueError(str(error)) from error
    if taker.error is not None:
        raise taker.error


class _Taker:
    """A file to write to, as pyrage wants one. pyrage is silent about the error of its last write; it is kept here."""

    def __init__(self, take: Callable[[bytes], object]) -> None:
        self._take = take
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._take(data)
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""
