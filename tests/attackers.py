"""What attackers of the tests keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Memory:
    """What an attacker keeps, for as long as a test takes."""

    held: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)

    def load(self, name: str, subject: Mapping[str, Any]) -> dict[str, Tensor] | None:
        return self.held.get((name, repr(subject)))

    def save(self, name: str, subject: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.held[name, repr(subject)] = {key: tensor.clone() for key, tensor in tensors.items()}

    def checkpoint(self, name: str, subject: Mapping[str, Any]) -> Path | None:
        return None
