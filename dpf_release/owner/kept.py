"""What attackers have trained, in the vault: one file for each name and subject."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from dpf_release.attacks.threat_models import Kept
from dpf_release.owner.vault.vault import Vault


def kept_in(vault: Vault) -> Kept:
    """Where attackers keep what they train.

    Three functions and no vault: an attack holds them, and is to hold nothing of the owner's.
    """

    def path_of(name: str, subject: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps([name, subject], sort_keys=True).encode()).hexdigest()
        return vault.root / "attackers" / f"{name.split(' ', 1)[0]}-{digest[:32]}.safetensors"

    def path_to_write(name: str, subject: Mapping[str, Any]) -> Path:
        path = path_of(name, subject)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return path

    def load_kept(name: str, subject: Mapping[str, Any]) -> dict[str, Tensor] | None:
        path = path_of(name, subject)
        return load(vault.read_bytes(path, "attack")) if vault.holds(path) else None

    def save_kept(name: str, subject: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        path = path_to_write(name, subject)
        vault.write_bytes(path, save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}))
        vault.remove(path.with_suffix(".checkpoint"))

    def checkpoint(name: str, subject: Mapping[str, Any]) -> Path | None:
        return vault.checkpoint(path_to_write(name, subject).with_suffix(".checkpoint"))

    return Kept(load_kept, save_kept, checkpoint)
