"""Whether two networks hold the same weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def state_bytes(module: nn.Module) -> str:
    """The SHA-256 of all parameters and buffers, bit for bit; train mode and gradients do not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
