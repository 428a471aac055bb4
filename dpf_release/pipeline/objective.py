"""What P is trained on, and the configured objective."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpf_release.bank import FeatureBank, SplitName
from dpf_release.models.functions import Chain, Plan
from dpf_release.objective import Objective
from dpf_release.pipeline.attackers import attribute_classifier, straw_man
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


def configured_objective(project: Project) -> Objective:
    """What P minimises, as `[poison]` says; the byproduct attackers are trained where the vault has none."""
    section = project.config.poison
    return Objective(
        project.frozen(project.cut.split.classifier),
        TargetTask.of(project),
        {name: straw_man(project, name) for name in section.straw_men},
        {column: attribute_classifier(project, column) for column in section.confuse},
        section.objective == "equivalence",
        section.lambda_,
    )
