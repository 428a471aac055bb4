"""How hard the battery tries, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dpf_release.attacks.interface import Attack, registered
from dpf_release.attacks.threat_models import Budget, ReleaseView
from dpf_release.attacks.toolkit.decoder import decoder_loss, disturb
from dpf_release.attacks.toolkit.trained import TRAINING_BATCH
from dpf_release.models.reconstructors import Reconstructor
from dpf_release.models.training import uses_bf16
from dpf_release.release.attack_report import PROFILE_ORDER, ProfileName

PLANTED_SHARE = 0.5  # of a training's pictures, on a planted function: an attack that breaks it so, breaks it


@dataclass(frozen=True)
class Profile:
    """One of `quick`, `standard`, `full`."""

    name: ProfileName
    rows: int  # that are asked for, where the bank has them
    least_rows: int  # below which a result is no evidence
    budget: Budget  # of each attack; a result with less is no evidence

    def attacks(self) -> list[Attack]:
        """Those that the profile has."""
        return [attack for attack in registered() if self.runs(attack)]

    def runs(self, attack: Attack) -> bool:
        """Whether the profile has this attack."""
        return PROFILE_ORDER.index(attack.profile) <= PROFILE_ORDER.index(self.name)


PROFILES: dict[str, Profile] = {
    "quick": Profile("quick", 1000, 200, Budget(images=40_000, decoders=1, shadows=0)),
    "standard": Profile("standard", 5000, 1000, Budget(images=100_000, decoders=3, shadows=4)),
    "full": Profile("full", 5000, 1000, Budget(images=1_000_000, decoders=6, shadows=16, deep=True)),
}


def rate(step: Callable[[], None], things: int, device: torch.device, seconds: float = 1.0) -> float:
    """Things a second that steps of so many go through here; a short trial."""
    started, done = 0.0, -things  # the first step is slower than all others
    while done <= 0 or time.monotonic() - started < seconds:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += things
        started = started if done else time.monotonic()
    return done / (time.monotonic() - started)


def decoder_rate(view: ReleaseView) -> float:
    """Pictures a second that a decoder is shown in training here."""
    bf16 = uses_bf16(view.bf16, view.device)
    chosen = np.arange(min(TRAINING_BATCH, len(view.public)))
    batch = view.public.read(chosen)
    network = Reconstructor("rx2s2-c", view.feature_shape, (batch.shape[-2], batch.shape[-1])).to(view.device)
    network.to(memory_format=torch.channels_last)
    generator = np.random.default_rng(0)

    def step() -> None:
        features = disturb(view.features_of(view.public, chosen), generator)
        with torch.autocast(view.device.type, torch.bfloat16, enabled=bf16):
            decoder_loss(network(features).float(), batch.to(view.device).float() / 255, "ssim").backward()

    return rate(step, len(batch), view.device)


def minutes(attacks: Sequence[Attack], budget: Budget, rate: float) -> float:
    """What the trainings of these attacks take, with those on planted functions."""
    planted = replace(budget, share=PLANTED_SHARE)
    shown = sum(
        attack.trainings(budget) * budget.images
        + (attack.trainings(planted) * planted.bank_images * len(attack.planted) if attack.of_bank else 0)
        for attack in attacks
    )
    return shown / rate / 60


def within(attacks: Sequence[Attack], budget: Budget, rate: float, limit: float | None) -> Budget:
    """The budget, or what of it these attacks can do in `limit` minutes, where they can.

    A half, a quarter, an eighth ...: a machine is never twice as fast, and what was trained under one budget is kept.
    """
    while limit is not None and budget.images > 1 and minutes(attacks, budget, rate) > limit:
        budget = replace(budget, images=budget.images // 2)
    return budget
