"""What P minimises: equal outputs of φ2 and nothing of the picture, with everything but P left as it was."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.models.metrics import ssim
from dpf_release.models.probes import AttributeClassifier
from dpf_release.models.reconstructors import Reconstructor
from dpf_release.models.training import Recipe, fit
from dpf_release.models.weights import freeze
from dpf_release.owner.train import TargetTask
from dpf_release.poisoning.deep import DeepPoisoningFunction
from dpf_release.poisoning.objective import Adversaries, AttributeAttacker, Objective
from dpf_release.poisoning.plan import FeatureSpec
from network_digests import state_bytes

SHAPE = (3, 16, 16)  # features that are pictures: ψ can be the identity, or its negative
UNCHANGED = nn.Identity()


class Negative(nn.Module):
    """The picture's photographic negative."""

    def forward(self, features: Tensor) -> Tensor:
        return 1 - features


class Doubled(nn.Module):
    """A P that changes what φ2 answers."""

    def forward(self, features: Tensor) -> Tensor:
        return 2 * features


def task(kind: str) -> TargetTask:
    """The task of made-up targets; regression targets have the deviations 1 and 100."""
    labels = np.arange(8) % 4
    yaw = np.stack([labels % 2 * 2.0, labels // 2 * 200.0], axis=1).astype(np.float32)
    regression = kind == "regression"
    images = SimpleNamespace(
        table=SimpleNamespace(targets=yaw if regression else labels), rows=lambda split: np.arange(8)
    )
    return TargetTask(images, regression)


@pytest.fixture
def phi_2() -> nn.Module:
    """A classifier (or head) with four outputs, two of them for regression."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    last = nn.Linear(16, 4)
    nn.init.normal_(last.weight)
    return freeze(nn.Sequential(*layers, last))


@pytest.fixture
def batch() -> tuple[Tensor, ...]:
    """Four rows that are their own pictures, each its only contributor."""
    draw = torch.Generator().manual_seed(1)
    pictures = (torch.rand(4, *SHAPE, generator=draw) * 255).round().byte()
    features = pictures.float() / 255
    return features, features, torch.arange(4), torch.arange(4), pictures


def objective(phi_2: nn.Module, kind: str = "equivalence", **given: Any) -> Objective:
    reconstructors = given.get("reconstructors", {"same": nn.Identity()})
    return Objective(
        phi_2,
        given.get("task", task("classification")),
        Adversaries(reconstructors, given.get("classifiers", {})),
        kind == "equivalence",
        given.get("lambda_", 1.0),
    )


# --------------------------------------------------------------------------------------------- the task's term


def test_equivalence_is_nothing_for_the_identity_and_grows_with_what_changes(
    phi_2: nn.Module, batch: tuple[Tensor, ...]
) -> None:
    measure = objective(phi_2)
    start = DeepPoisoningFunction(FeatureSpec(SHAPE, True)).network
    assert measure(UNCHANGED, batch)["task"] == 0
    assert measure(start, batch)["task"] == 0
    assert measure(Doubled(), batch)["task"] > 1e-3
    assert objective(phi_2, "paper")(UNCHANGED, batch)["task"] > 0.1


def test_equivalence_is_the_divergence_of_the_clean_answers_from_the_poisoned(
    phi_2: nn.Module, batch: tuple[Tensor, ...]
) -> None:
    clean, poisoned = phi_2(batch[0]).softmax(1), phi_2(2 * batch[0]).softmax(1)
    by_hand = (clean * (clean / poisoned).log()).sum(1).mean()
    other_way = (poisoned * (poisoned / clean).log()).sum(1).mean()
    found = float(objective(phi_2)(Doubled(), batch)["task"])
    assert found == pytest.approx(float(by_hand), rel=1e-4)
    assert found != pytest.approx(float(other_way), rel=1e-4)


def test_equivalence_is_to_what_phi_2_should_see_and_the_paper_s_term_to_the_targets(
    phi_2: nn.Module, batch: tuple[Tensor, ...]
) -> None:
    features, seen, targets, *rest = batch
    other_seen, other_targets = (
        (features, seen.flip(0), targets, *rest),
        (features, seen, targets.flip(0), *rest),
    )
    for kind, moved, still in (
        ("equivalence", other_seen, other_targets),
        ("paper", other_targets, other_seen),
    ):
        measure = objective(phi_2, kind)
        base = measure(UNCHANGED, batch)["task"]
        assert measure(UNCHANGED, still)["task"] == base
        assert measure(UNCHANGED, moved)["task"] != base
    assert objective(phi_2, "paper")(UNCHANGED, batch)["task"] == F.cross_entropy(phi_2(features), targets)


def test_regression_compares_outputs_in_deviations_of_each_target(phi_2: nn.Module, batch: tuple[Tensor, ...]) -> None:
    head, scale = nn.Sequential(phi_2, nn.Linear(4, 2)).requires_grad_(False), torch.tensor([1.0, 100.0])
    targets = torch.tensor([[0.0, 200.0]] * 4)
    batch = (*batch[:2], targets, *batch[3:])
    clean, poisoned = head(batch[0]), head(2 * batch[0])
    ours, paper = (objective(head, kind, task=task("regression")) for kind in ("equivalence", "paper"))
    assert ours(UNCHANGED, batch)["task"] == 0
    difference = ((clean - poisoned) / scale).square()
    assert float(ours(Doubled(), batch)["task"]) == pytest.approx(float(difference.mean()), rel=1e-4)
    assert float(difference.mean()) != pytest.approx(float((clean - poisoned).square().mean()), rel=0.1)
    wanted = F.smooth_l1_loss(poisoned / scale, targets / scale)
    assert float(paper(Doubled(), batch)["task"]) == pytest.approx(float(wanted), rel=1e-4)


# --------------------------------------------------------------------------------------------- the attackers' terms


def test_only_the_paper_rewards_a_negative(phi_2: nn.Module, batch: tuple[Tensor, ...]) -> None:
    for psi, sign in ((nn.Identity(), 1), (Negative(), -1)):
        paper, ours = (
            objective(phi_2, kind, reconstructors={"psi": psi})(UNCHANGED, batch)["ssim psi"]
            for kind in ("paper", "equivalence")
        )
        assert float(paper) * sign > 0.5
        assert float(ours) == pytest.approx(abs(float(paper)))


def test_equivalence_takes_the_magnitude_of_each_picture_not_of_their_mean(
    phi_2: nn.Module, batch: tuple[Tensor, ...]
) -> None:
    class HalfNegative(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return torch.cat([features[:2], 1 - features[2:]])

    terms = [
        float(objective(phi_2, kind, reconstructors={"psi": HalfNegative()})(UNCHANGED, batch)["ssim psi"])
        for kind in ("paper", "equivalence")
    ]
    assert abs(terms[0]) < 0.2
    assert terms[1] > 0.8


@pytest.mark.parametrize("kind", ["equivalence", "paper"])
def test_lambda_weighs_the_mean_of_the_attackers(phi_2: nn.Module, batch: tuple[Tensor, ...], kind: str) -> None:
    attackers = {"same": nn.Identity(), "negative": Negative(), "grey": nn.AvgPool2d(5, 1, 2)}
    for lambda_ in (0.0, 0.5, 3.0):
        facts = objective(phi_2, kind, reconstructors=attackers, lambda_=lambda_)(Doubled(), batch)
        terms = [facts[f"ssim {name}"] for name in attackers]
        assert len(set(map(float, terms))) == 3
        assert float(facts["loss"]) == pytest.approx(float(facts["task"] + lambda_ * sum(terms) / 3))
        assert (float(facts["loss"]) == float(facts["task"])) == (lambda_ == 0)


def test_every_contributor_s_picture_counts(phi_2: nn.Module, batch: tuple[Tensor, ...]) -> None:
    features, seen, targets, _, pictures = batch
    positions, members = torch.tensor([0, 1, 1, 3, 2]), torch.tensor([0, 1, 3, 3, 0])
    mixed = (features, seen, targets, positions, pictures[members])
    likeness = ssim(features[positions], features[members]).abs()
    found = objective(phi_2)(UNCHANGED, mixed)["ssim same"]
    assert float(found) == pytest.approx(float(likeness.mean()), rel=1e-5)
    assert float(found) < 0.8 < float(objective(phi_2)(UNCHANGED, batch)["ssim same"])


def attribute_attacker() -> AttributeAttacker:
    torch.manual_seed(3)
    return AttributeAttacker(freeze(AttributeClassifier(SHAPE, 5)), tuple("abcde"))


def test_an_attribute_classifier_is_led_to_labels_drawn_anew_at_each_step(
    phi_2: nn.Module, batch: tuple[Tensor, ...]
) -> None:
    attacker = attribute_attacker()
    nn.init.normal_(attacker.network.layers[-1].weight, std=5)
    measure = objective(phi_2, classifiers={"who": attacker})
    steps = [measure(UNCHANGED, batch) for _ in range(4)]
    assert len({float(facts["confusion who"]) for facts in steps}) > 1
    assert len({float(facts["ssim same"]) for facts in steps}) == 1
    assert float(steps[0]["loss"] - steps[0]["task"]) == pytest.approx(
        float(steps[0]["confusion who"] + steps[0]["ssim same"]) / 2, rel=1e-5
    )


def test_an_attribute_classifier_alone_is_enough_and_best_confused_when_it_cannot_tell(
    phi_2: nn.Module, batch: tuple[Tensor, ...]
) -> None:
    sure, unsure = attribute_attacker(), attribute_attacker()
    nn.init.normal_(sure.network.layers[-1].weight, std=20)
    nn.init.zeros_(unsure.network.layers[-1].weight)
    nn.init.zeros_(unsure.network.layers[-1].bias)
    means = []
    for attacker in (unsure, sure):
        measure = objective(phi_2, reconstructors={}, classifiers={"who": attacker}, lambda_=2.0)
        facts = [measure(UNCHANGED, batch) for _ in range(10)]
        assert set(facts[0]) == {"loss", "task", "confusion who"}
        means.append(sum(float(fact["loss"]) for fact in facts) / 10)
    assert means[0] == pytest.approx(2 * math.log(5), rel=1e-4)
    assert means[1] > means[0] + 0.1


# --------------------------------------------------------------------------------------------- training P


@pytest.mark.parametrize("kind", ["equivalence", "paper"])
def test_training_p_leaves_the_classifier_and_the_attackers_byte_equal(
    phi_2: nn.Module, batch: tuple[Tensor, ...], kind: str
) -> None:
    psi, who = freeze(Reconstructor("px1s2", SHAPE, SHAPE[1:], width=8)), attribute_attacker()
    measure = objective(phi_2, kind, reconstructors={"same": nn.Identity(), "psi": psi}, classifiers={"who": who})
    others = [phi_2, psi, who.network]
    p = DeepPoisoningFunction(FeatureSpec(SHAPE, True), depth=1, width=8).network
    before, started = [state_bytes(network) for network in others], state_bytes(p)

    def train() -> list[dict[str, float]]:
        recipe = Recipe(20, 4, 0.05, bf16="off")
        read: Any = lambda rows, _: batch  # noqa: E731
        device = torch.device("cpu")
        return fit(p, 4, read, measure, recipe, title="P", device=device).epochs

    epochs = train()
    assert [state_bytes(network) for network in others] == before
    assert all(parameter.grad is None for network in others for parameter in network.parameters())
    assert state_bytes(p) != started
    assert epochs[-1]["ssim same"] < 0.8 < 0.99 < epochs[0]["ssim same"]
    phi_2.train()  # the control: without evaluation mode, buffers move
    train()
    assert state_bytes(phi_2) != before[0]
