"""What P minimises. The owner's `fit-poison` does on S, and an attacker's shadow functions do on Q."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.models.metrics import ssim
from dpf_release.models.probes import AttributeClassifier


class TaskLoss:
    """What φ2's answers are worth to its task.

    Attributes:
        scale: (K,) standard deviation of each regression target; `None` for classification.
    """

    def __init__(self, scale: Tensor | None = None) -> None:
        self.scale = scale

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy (Eq. 1), or smooth L1 in standard deviations of the target."""
        if self.scale is None:
            return F.cross_entropy(outputs, targets)
        scale = self.scale.to(outputs.device)
        return F.smooth_l1_loss(outputs / scale, targets / scale)


@dataclass(frozen=True, eq=False)
class AttributeAttacker:
    """A classifier of an attribute from features, and which rows it can be asked about."""

    network: AttributeClassifier  # frozen; features → scores of `values`
    values: tuple[str, ...]  # the attribute's values that it knows


@dataclass(frozen=True, eq=False)
class Adversaries:
    """Whom a function is trained against."""

    reconstructors: Mapping[str, nn.Module] = field(default_factory=dict)  # ψ, frozen, by name
    classifiers: Mapping[str, AttributeAttacker] = field(default_factory=dict)  # of attributes, by column

    def __bool__(self) -> bool:
        return bool(self.reconstructors or self.classifiers)


class PoisonBatch(NamedTuple):
    """What the objective looks at."""

    features: Tensor  # (n, C, H, W), what goes into P
    seen: Tensor  # (n, C, H, W), what φ2 should make of it
    targets: Tensor  # (n,) or (n, K)
    positions: Tensor  # (m,) of each pair of a row and an image that is in it, the row's place in the batch
    images: Tensor  # (m, 3, H, W) uint8, of each pair the image


class Objective:
    """What P minimises: its task term, and λ times the mean of the byproduct attackers' terms.

    `paper` (Eq. 7): the task loss on the true targets, and SSIM(ψ(P(f)), x). `equivalence`, the default:
    KL(φ2(f) ‖ φ2(P(f))), for regression their squared difference, and |SSIM|, whose least value is a picture that has
    nothing of x, not its negative. An attribute classifier's term is the cross entropy towards labels drawn anew at
    each step (section 4.4), for both.
    """

    def __init__(
        self, phi_2: nn.Module, task: TaskLoss, adversaries: Adversaries, equivalence: bool, lambda_: float
    ) -> None:
        self.phi_2, self.task, self.adversaries = phi_2, task, adversaries
        self.equivalence, self.lambda_ = equivalence, lambda_

    def __call__(self, poison: Callable[[Tensor], Tensor], batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The loss of a batch, a `PoisonBatch`, with its parts; `poison` is a network, or several in a row."""
        of = PoisonBatch._make(batch)
        poisoned = poison(of.features.contiguous(memory_format=torch.channels_last))
        outputs = self.phi_2(poisoned).float()
        task = self._task_term(outputs, of.seen, of.targets)
        terms = dict(self._adversaries_terms(poisoned, of.positions, of.images))
        byproduct = torch.stack(list(terms.values())).mean()
        return {"loss": task + self.lambda_ * byproduct, "task": task, **terms}

    def _task_term(self, outputs: Tensor, seen: Tensor, targets: Tensor) -> Tensor:
        if not self.equivalence:
            return self.task.loss(outputs, targets)
        with torch.no_grad():
            wanted = self.phi_2(seen.contiguous(memory_format=torch.channels_last)).float()
        if self.task.scale is None:
            return F.kl_div(outputs.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        scale = self.task.scale.to(outputs.device)
        return F.mse_loss(outputs / scale, wanted / scale)

    def _adversaries_terms(self, poisoned: Tensor, positions: Tensor, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        originals = images.float() / 255
        for name, reconstructor in self.adversaries.reconstructors.items():
            if not len(positions):  # rows that belong to no image have nothing to hide
                yield f"ssim {name}", poisoned.new_zeros(())
                continue
            likeness = ssim(reconstructor(poisoned).float()[positions], originals)  # one for each contributor
            yield f"ssim {name}", likeness.abs().mean() if self.equivalence else likeness.mean()
        for column, attacker in self.adversaries.classifiers.items():
            scores = attacker.network(poisoned).float()
            random = torch.randint(len(attacker.values), (len(scores),), device=scores.device)
            yield f"confusion {column}", F.cross_entropy(scores, random)
