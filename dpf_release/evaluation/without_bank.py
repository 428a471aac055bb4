"""What the owner could publish in the place of a bank, and what a user makes of public images with it.

φ2, where it is not trained on the bank. Else, where the bank has a privacy bound, two classifiers under the same bound:
the linear discriminant of the very statistics that rows are drawn from, and a linear classifier trained on φ1(S) by
DP-SGD (Abadi et al. 2016, by Opacus). Each answers for itself, and labels φ1(Q) for a new classifier.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpf_release.bank.reader import FeatureBank
from dpf_release.core.privacy import Mechanism
from dpf_release.core.progress import announce
from dpf_release.owner.workbench import Candidate, Workbench
from dpf_release.poisoning.mixture import Mixture
from dpf_release.poisoning.moments import clip
from dpf_release.poisoning.noisy_classes import NoisyClasses

# Of DP-SGD: the best of a few recipes on public images that stood for S, at epsilon 1 and 4.
EPOCHS, STEPS_OF_EPOCH, RATE = 20, 12, 1.0


@dataclass(frozen=True, eq=False)
class Answerer:
    """Something public that answers for a row: a class, or regression targets."""

    name: str
    of_bank: Callable[[FeatureBank], NDArray[np.generic]]  # targets of all rows


def answerers(workbench: Workbench, candidate: Candidate) -> Sequence[Answerer]:
    """What the owner could publish in the place of this candidate; nothing, where only own images are left."""
    if not workbench.classifier_from_bank:
        return [Answerer("φ2", lambda bank: _answers(workbench, bank))]
    stage = candidate.function.chain.stages[0]
    mechanism = stage.mechanism("person" if workbench.group else "image")
    if mechanism is None or workbench.task != "classification" or not isinstance(stage, Mixture):
        return []
    found = [Answerer("a private discriminant", lambda bank: _discriminant(stage, _coordinates(stage, bank)))]
    if workbench.group:
        announce("No classifier by DP-SGD to compare with: it protects images, and the unit here is a person.")
    else:
        found.append(Answerer("DP-SGD", lambda bank: _by_dp_sgd(workbench, stage, mechanism, bank)))
    return found


@torch.inference_mode()
def _answers(workbench: Workbench, bank: FeatureBank) -> NDArray[np.generic]:
    found = []
    for _, features in bank.batches(256):
        outputs = workbench.phi_2(torch.from_numpy(features).float().to(workbench.device)).float().cpu()
        found.append((outputs if workbench.task == "regression" else outputs.argmax(1)).numpy())
    return np.concatenate(found)


def _coordinates(stage: Mixture, bank: FeatureBank) -> NDArray[np.float64]:
    return stage.space.coordinates(bank.before_relu().read, len(bank))


def _discriminant(stage: Mixture, coordinates: NDArray[np.float64]) -> NDArray[np.int64]:
    """The class that each row most likely has, if rows were as they are drawn."""
    assert isinstance(stage.statistics, NoisyClasses)
    parts, counts = list(stage.gaussians()), stage.statistics.count.sum(1)
    inverse = np.linalg.pinv(parts[0][3], hermitian=True)  # one for all classes
    scores = np.full((len(coordinates), len(counts)), -np.inf)
    for label, share, mean, _ in parts:
        prior = np.log(max(share, 1e-12) * max(counts[label], 1))
        score = coordinates @ (inverse @ mean) - 0.5 * mean @ inverse @ mean + prior
        scores[:, label] = np.logaddexp(scores[:, label], score)
    return scores.argmax(1).astype(np.int64)


def _by_dp_sgd(workbench: Workbench, stage: Mixture, mechanism: Mechanism, bank: FeatureBank) -> NDArray[np.int64]:
    assert isinstance(stage.statistics, NoisyClasses)
    scale, private = stage.statistics.scale, workbench.private_bank("train")

    def rows(of: FeatureBank) -> Tensor:
        return torch.from_numpy(clip(_coordinates(stage, of) * scale)).float()

    subject = {
        "rows": [shard.sha256 for shard in private.index.splits["train"]],
        "components": len(scale),
        "bound": [mechanism.epsilon, mechanism.delta],
        "recipe": [EPOCHS, STEPS_OF_EPOCH, RATE],
    }
    kept = workbench.kept.load("private classifier", subject)
    if kept is None:
        targets = torch.from_numpy(np.asarray(private.targets, np.int64))
        kept = dict(private_classifier(rows(private), targets, mechanism.epsilon, mechanism.delta).state_dict())
        workbench.kept.save("private classifier", subject, kept)
    answers: NDArray[np.int64] = F.linear(rows(bank), kept["weight"], kept["bias"]).argmax(1).numpy()
    return answers


def private_classifier(rows: Tensor, targets: Tensor, epsilon: float, delta: float) -> nn.Linear:
    """A linear classifier trained by DP-SGD: (ε, δ)-private for adding or removing one row.

    Args:
        rows: (n, K) of norm 1 at the most.
        targets: (n,) classes.
        epsilon: of the bound.
        delta: likewise.
    """
    from opacus import PrivacyEngine  # seconds to import

    network = nn.Linear(rows.shape[1], int(targets.max()) + 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    loader = DataLoader(TensorDataset(rows, targets), batch_size=max(1, len(rows) // STEPS_OF_EPOCH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own: hooks, and no secure source, which a number in a report needs not
        private, optimizer, batches = PrivacyEngine().make_private_with_epsilon(
            module=network,
            optimizer=torch.optim.SGD(network.parameters(), RATE, momentum=0.9),
            data_loader=loader,
            target_epsilon=epsilon,
            target_delta=delta,
            epochs=EPOCHS,
            max_grad_norm=1.0,
        )
        for _ in range(EPOCHS):
            for some, wanted in batches:
                optimizer.zero_grad()
                F.cross_entropy(private(some), wanted).backward()
                optimizer.step()
    found = nn.Linear(rows.shape[1], network.out_features)
    found.load_state_dict({name.removeprefix("_module."): value for name, value in private.state_dict().items()})
    return found.requires_grad_(False)
