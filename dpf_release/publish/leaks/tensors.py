"""Whether a public tensor is one of the vault's: P's or ψ's weights in the place of φ1's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dpf_release.bank.procedure_format import TENSORS
from dpf_release.bank.reader import FeatureBank
from dpf_release.errors import WeightsError
from dpf_release.models.weights import load_state
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.interface import PUBLIC
from dpf_release.publish.leaks.findings import public_files, shard_of
from dpf_release.release.manifest import PROCEDURE
from dpf_release.release.verify import Problem

LEAST_VALUES = 1024


def private_tensors(release: Path, vault: Vault, banks: Sequence[FeatureBank]) -> list[Problem]:
    """Public tensors that equal one of the vault's, Φ's own excepted, and public rows that do.

    Excepted is also, in its own place in the release, what rows were drawn with: a function keeps it, and attackers
    compute the same from Q.
    Equal: as canonical float16, flattened, so in whatever shape and type. Tensors of fewer than 1,024 values, and
    constant ones, tell nothing and are passed over, and so are files that the manifest does not list.

    Raises:
        VerificationError: the release has no manifest.
        WeightsError: a safetensors file, public or private, is damaged.
        VaultError: the vault does not open.
    """
    members = [path for path in vault.members() if path.suffix == ".safetensors"]
    own = {digest for _, digest, _ in _private_digests(vault, vault.network / "phi.safetensors")}
    procedures = {
        digest
        for path in members
        if path.is_relative_to(vault.root / "functions")
        for key, digest, _ in _private_digests(vault, path)
        if key.partition("/")[2] in {f"{PUBLIC}{name}" for name in TENSORS}
    }
    private: dict[bytes, str] = {}
    sizes = set()
    for path in members:
        if not path.is_relative_to(vault.root / "candidates"):  # which are published
            for key, digest, size in _private_digests(vault, path):
                if digest not in own:
                    private[digest] = f"{path.relative_to(vault.root)}, {key}"
                    sizes.add(size)
    with public_files(release) as (_, files):
        problems = [
            Problem("private tensor", path, f"{key} is the private {private[digest]}")
            for path in files
            if path.endswith(".safetensors")
            for key, digest, _ in _digests(release / path)
            if digest in private and not (path == PROCEDURE and digest in procedures)
        ]
    for bank in banks:
        if int(np.prod(bank.shape)) in sizes:
            for rows, features in bank.batches(64):
                for row, values in zip(rows, torch.from_numpy(features), strict=True):
                    if (found := _digest(values)) in private:
                        ((shard, place),) = shard_of(bank.index, bank.split, np.array([row])).items()
                        detail = f"row {place[0]} is the private {private[found]}"
                        problems.append(Problem("private tensor", shard, detail))
    return problems


def _private_digests(vault: Vault, path: Path) -> Iterator[tuple[str, bytes, int]]:
    """As `_digests`, of a member; what does not lie in the clear is opened in memory."""
    if path.is_file():
        return _digests(path)
    state = load_state(path, vault.read_bytes(path, "fit-poison"))
    return _telling(sorted(state.items()))


def _digests(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """Name, digest and number of values of each telling tensor of a file; one at a time is in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            yield from _telling((key, file.get_tensor(key)) for key in sorted(file.keys()))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): copy or write it again") from error


def _telling(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, bytes, int]]:
    for key, values in tensors:
        if (digest := _digest(values)) is not None:
            yield key, digest, values.numel()


def _digest(values: Tensor) -> bytes | None:
    """SHA-256 of the values as float16, -0 as 0; `None` where they are few, or all the same."""
    if values.numel() < LEAST_VALUES:
        return None
    canonical = values.flatten().to(torch.float16) + 0.0  # -0 + 0 is 0
    if bool((canonical == canonical[0]).all()):
        return None
    return hashlib.sha256(canonical.numpy().tobytes()).digest()
