"""Ed25519 keys, and the signature of a release: over the bytes of its manifest. No torch."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from dpf_release.core.files import PRIVATE_FILE, PUBLIC_FILE, flush_to_disk, read_at_most, replacing
from dpf_release.errors import SigningError
from dpf_release.release.manifest import MANIFEST, SIGNATURE, SIGNER, SUMS

MAX_KEY_BYTES = 4096
PUBLIC_SUFFIX = ".pub.pem"


def new_key(out: Path) -> tuple[Path, str]:
    """Writes a new private key, not encrypted and readable by its owner alone, and the public one, `OUT.pub.pem`.

    Returns:
        The public key's file, and its fingerprint.

    Raises:
        SigningError: either file is there, `out` lies in a release, or cannot be written.
        StorageError: the public key cannot be written.
    """
    public = out.with_name(out.name + PUBLIC_SUFFIX)
    for path in (out, public):
        if os.path.lexists(path):
            raise SigningError(f"{path} is there, and a key is never overwritten. Name another file with --out.")
    if any((folder / MANIFEST).is_file() and (folder / SUMS).is_file() for folder in out.resolve().parents):
        raise SigningError(f"{out} lies in a release, which is public. Name a private place with --out.")
    key = Ed25519PrivateKey.generate()
    try:
        handle = os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE)
    except OSError as error:
        raise SigningError(f"{out} cannot be written: {error.strerror}. Name another file with --out.") from error
    with io.FileIO(handle, "w") as file:
        os.fchmod(handle, PRIVATE_FILE)  # whatever the umask
        file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        os.fsync(handle)
    flush_to_disk(out.resolve().parent)
    _write(public, public_pem(key.public_key()))
    return public, fingerprint(key.public_key())


def read_private_key(path: Path, outside: Sequence[Path] = ()) -> Ed25519PrivateKey:
    """The owner's key, from PKCS8 PEM without a passphrase.

    Raises:
        SigningError: it does not lie outside of those folders, others can read it, or it is no such key.
    """
    for folder in outside:
        if _is_in(path, folder):
            raise SigningError(
                f"the private key {path} lies in {folder}, which is published. Move it to a private place."
            )
    content, mode = _read(path), path.stat().st_mode
    if mode & 0o077:
        raise SigningError(
            f"the private key {path} can be read by others (mode {mode & 0o777:o}, expected 600): whoever has it "
            f"signs in your name. Run `chmod 600 {path}`, or make a new one where others may have read it."
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a passphrase
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(
            f"expected an Ed25519 private key (PKCS8 PEM, no passphrase) in {path}, found something else. "
            "Make one with `dpf-release key new --out FILE`."
        )
    return key


def read_public_key(path: Path, outside: Path) -> Ed25519PublicKey:
    """The key that a release is to be signed with, from SubjectPublicKeyInfo PEM.

    Raises:
        SigningError: it lies in the release, where it proves nothing about who made it, or is no such key.
    """
    if _is_in(path, outside):
        raise SigningError(
            f"the public key {path} lies in the release itself: whoever made the release chose it, so that it proves "
            "nothing about who that was. Take the key from where you trust its owner."
        )
    content = _read(path)
    try:
        return parse_public_key(content)
    except SigningError as error:
        raise SigningError(f"{path}: {error} `dpf-release key new` writes one beside the private key.") from error


def parse_public_key(content: bytes) -> Ed25519PublicKey:
    """The key that a PEM text holds; `SigningError` where it is not an Ed25519 public key."""
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SigningError("expected an Ed25519 public key (SubjectPublicKeyInfo PEM), found something else.")
    return key


def public_pem(key: Ed25519PublicKey) -> bytes:
    """SubjectPublicKeyInfo PEM: the same key gives the same bytes."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: Ed25519PublicKey) -> str:
    """The SHA-256 of a public key (of its DER form), hexadecimal: what an owner can print where it is trusted."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def write_signature(folder: Path, key: Ed25519PrivateKey) -> None:
    """`manifest.sig`, 64 bytes over those of `manifest.json`, and the public key; the same each time."""
    _write(folder / SIGNATURE, key.sign((folder / MANIFEST).read_bytes()))
    _write(folder / SIGNER, public_pem(key.public_key()))


def is_signed(content: bytes | None, signature: bytes | None, key: Ed25519PublicKey) -> bool:
    """Whether a signature is there, and is the key's over this content."""
    if content is None or signature is None:
        return False
    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    with replacing(path, PUBLIC_FILE) as partial:
        partial.write_bytes(content)


def _is_in(path: Path, folder: Path) -> bool:
    # Not Path.resolve, which raises on links in a circle.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _read(path: Path) -> bytes:
    """A key's file; through a link too, as secrets are often mounted."""
    try:
        return read_at_most(path, MAX_KEY_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            return b""  # which is no key either
        raise SigningError(f"expected a key in {path}, which cannot be read: {error.strerror}.") from error
