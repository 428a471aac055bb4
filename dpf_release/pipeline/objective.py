"""What P is trained on and what it minimises."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank import FeatureBank, SplitName
from dpf_release.metrics import ssim
from dpf_release.models.functions import Chain, Plan
from dpf_release.models.reconstructors import Reconstructor
from dpf_release.pipeline.attackers import AttributeAttacker, attribute_classifier, straw_man
from dpf_release.pipeline.network import TargetTask
from dpf_release.pipeline.project import Project

Rows = NDArray[np.int64]


def batch_reader(
    project: Project, chain: Chain, plans: list[Plan], split: SplitName, bank: FeatureBank
) -> Callable[[Rows], tuple[Tensor, ...]]:
    """Rows → (input of P, what φ2 should see, targets, positions, pictures of all contributors).

    What φ2 should see is the row after the last stage that mixes rows: it *is* that other picture. An SPF before P is a
    disturbance, which P learns to live with.
    """
    table_rows = project.bank_order[0][split]
    pictures = project.private_images.pictures
    inputs = chain.on(bank, plans, len(chain.stages) - 1)
    goal = chain.on(bank, plans, chain.mixing_stages)
    same = chain.mixing_stages == len(chain.stages) - 1

    def read(rows: Rows) -> tuple[Tensor, ...]:
        into = torch.from_numpy(np.asarray(inputs.read(rows), np.float32))
        seen = into if same else torch.from_numpy(np.asarray(goal.read(rows), np.float32))
        positions, members = chain.contributors(rows, plans)
        return (
            into,
            seen,
            torch.from_numpy(bank.targets[rows]),
            torch.from_numpy(positions),
            pictures.read(table_rows[members]),
        )

    return read


class Objective:
    """What P minimises: its task term, and λ times the mean of the byproduct attackers' terms.

    `paper` (Eq. 7): the task loss on the true targets, and SSIM(ψ(P(f)), x). `equivalence`, the default:
    KL(φ2(f) ‖ φ2(P(f))), for regression their squared difference, and |SSIM|, whose least value is a picture that has
    nothing of x, not its negative. An attribute classifier's term is the cross entropy towards labels drawn anew at
    each step (section 4.4), for both.
    """

    def __init__(
        self,
        phi_2: nn.Module,
        task: TargetTask,
        reconstructors: dict[str, Reconstructor],
        classifiers: dict[str, AttributeAttacker],
        equivalence: bool,
        lambda_: float,
    ) -> None:
        self.phi_2, self.task, self.reconstructors, self.classifiers = (
            phi_2,
            task,
            reconstructors,
            classifiers,
        )
        self.equivalence, self.lambda_ = equivalence, lambda_

    @classmethod
    def of(cls, project: Project) -> Objective:
        """The configured objective."""
        section = project.config.poison
        return cls(
            project.frozen(project.cut.split.classifier),
            TargetTask.of(project),
            {name: straw_man(project, name) for name in section.straw_men},
            {column: attribute_classifier(project, column) for column in section.confuse},
            section.objective == "equivalence",
            section.lambda_,
        )

    def __call__(self, network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The loss of a batch of `batch_reader`, with its parts."""
        features, seen, targets, positions, pictures = batch
        poisoned = network(features.contiguous(memory_format=torch.channels_last))
        outputs = self.phi_2(poisoned).float()
        task = self._task_term(outputs, seen, targets)
        terms = dict(self._byproduct_terms(poisoned, positions, pictures))
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

    def _byproduct_terms(self, poisoned: Tensor, positions: Tensor, pictures: Tensor) -> Iterator[tuple[str, Tensor]]:
        originals = pictures.float() / 255
        for name, reconstructor in self.reconstructors.items():
            likeness = ssim(reconstructor(poisoned).float()[positions], originals)  # one for each contributor
            yield f"ssim {name}", likeness.abs().mean() if self.equivalence else likeness.mean()
        for column, attacker in self.classifiers.items():
            scores = attacker.network(poisoned).float()
            random = torch.randint(len(attacker.values), (len(scores),), device=scores.device)
            yield f"confusion {column}", F.cross_entropy(scores, random)
