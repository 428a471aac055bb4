"""What a user has without the bank, where φ2 comes from the bank: classifiers under the same privacy bound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dpf_release.evaluation.without_bank import answerers, private_classifier
from dpf_release.owner.project import Project
from dpf_release.owner.workbench import open_candidate, workbench_of


def two_classes(apart: float) -> tuple[Tensor, Tensor]:
    """(1000, 20) rows of norm 1 at the most, and their classes."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(1000) % 2
    rows = torch.randn(1000, 20, generator=generator) / 40
    rows[:, 0] += apart * (targets - 0.5)
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1), targets


def share_right(epsilon: float) -> float:
    rows, targets = two_classes(0.1)
    network = private_classifier(rows, targets, epsilon, 1e-5)
    return float((network(rows).argmax(1) == targets).float().mean())


@pytest.mark.slow
def test_dp_sgd_learns_under_a_wide_bound_and_hardly_under_a_narrow_one() -> None:
    assert share_right(8.0) > 0.95
    assert np.mean([share_right(0.01) for _ in range(5)]) < 0.85


@pytest.mark.slow
def test_drawn_rows_are_held_against_classifiers_under_the_same_bound(drawn_folder: Path) -> None:
    project = Project.open(drawn_folder / "dpf.toml")
    with project.working(together=False):
        workbench, candidate = workbench_of(project), open_candidate(project, "default")
        found = {one.name: one for one in answerers(workbench, candidate)}
        assert set(found) == {"a private discriminant", "DP-SGD"}
        bank = workbench.private_bank("test")
        answers = {name: one.of_bank(bank) for name, one in found.items()}
        again = {one.name: one.of_bank(bank) for one in answerers(workbench, candidate)}
    for name, of in answers.items():
        assert of.shape == (len(bank),)
        assert set(np.unique(of)) <= {0, 1}
        assert np.array_equal(of, again[name])  # DP-SGD is trained once, and kept


def test_where_phi_2_was_trained_on_s_it_is_what_a_user_has(project_folder: Path) -> None:
    project = Project.open(project_folder / "dpf.toml")
    with project.working(together=False):
        (phi_2,) = answerers(workbench_of(project), open_candidate(project, "default"))
        bank = project.private_bank("test")
        right = (phi_2.of_bank(bank) == bank.targets).mean()
    assert phi_2.name == "φ2"
    assert right > 0.8
