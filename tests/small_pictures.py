"""Small pictures, a view of rows that are made of them, and what a reconstruction shows of them: no project."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from attackers import Memory
from dpf_release.attacks.threat_models import Budget, HeldPictures, HeldRows, ReleaseView
from dpf_release.evaluation.scoring import affine_fit
from dpf_release.images.decode import Preprocess
from dpf_release.models.metrics import ssim

SIZE = 16


def pictures(count: int, seed: int) -> Tensor:
    """Smooth random pictures, (count, 3, 16, 16) uint8."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1) * 255).byte()


def held(pixels: Tensor) -> HeldPictures:
    return HeldPictures(len(pixels), lambda rows: pixels[torch.from_numpy(rows)])


def view_of(phi_1: nn.Module, phi_2: nn.Module, bank: Tensor, budget: Budget) -> ReleaseView:
    """A view of a bank of rows, Q from the same pictures' distribution."""
    return ReleaseView(
        phi_1=phi_1.eval().requires_grad_(False),
        phi_2=phi_2.eval().requires_grad_(False),
        preprocess=Preprocess((SIZE, SIZE), None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        non_negative=False,
        task="classification",
        bank=HeldRows(np.zeros(len(bank), np.int64), lambda rows: bank[torch.from_numpy(rows)].numpy()),
        asked=np.arange(len(bank)),
        public=held(pictures(256, seed=5)),
        public_val=held(pictures(32, seed=6)),
        budget=budget,
        seed=0,
        device=torch.device("cpu"),
        bf16="off",
        subject={},
        bank_subject=f"{float(bank.sum())}",
        kept=Memory(),
    )


def likeness(found: Tensor, originals: Tensor) -> float:
    return float(ssim(affine_fit(found, originals), originals).mean())
