"""A10: whether a picture was among those that the network was trained on. The rows, and so P, have no part in it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.attacks.interface import Attack, Likeness, Links, register
from dpf_release.attacks.threat_models import Budget, QueryImages, ReleaseView, batches
from dpf_release.attacks.toolkit.trained import recipe_for, seeded, trained
from dpf_release.core.arrays import Rows
from dpf_release.models.probes import AttributeClassifier

SHIFTS = ((1, 0), (-1, 0), (0, 1), (0, -1))  # of a picture, in pixels
LEARNING_RATE = 3e-3  # of the student
Network = Callable[[Tensor], Tensor]  # pictures uint8 → outputs


@register
class Membership(Attack):
    """φ2∘φ1 on the query: how sure of it the network is, and how much less of the same picture a little changed.

    Reference networks, as the literature trains them, want pictures of the same classes, that S's owner alone has. What
    Q allows is a student of φ2∘φ1's answers: it knows of S what they say, and saw no picture of it (`full`).
    """

    code, title, claim, version = "A10", "membership by the weights", "linkage", 3
    view, answers = QueryImages, Links
    planted = ("memorising-network",)

    def trainings(self, budget: Budget) -> float:
        """A student, in `full`."""
        return 1.0 if budget.deep else 0.0

    def run(self, view: ReleaseView) -> Links:
        """Loss, confidence, both calibrated; no rows are linked."""
        assert isinstance(view, QueryImages)
        wrong, sure = _errors(view, lambda pictures: view.answers(view.features(pictures)))
        found = {
            "loss": -wrong[0],
            "loss against its class": -_against_class(wrong[0], view.labels),
            "loss over flip and shifts": -wrong.mean(0),
            "loss against flip and shifts": wrong[1:].mean(0) - wrong[0],
            "confidence": sure[0],
        }
        if view.budget.deep:
            found["loss against a student's"] = _errors(view, train_student(view))[0][0] - wrong[0]
        return Links({name: Likeness(None, values.astype(np.float32)) for name, values in found.items()})


def _errors(view: QueryImages, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Loss and confidence of each query: (6, n) as it is, mirrored, and shifted four ways.

    Of classes as log-odds (Carlini et al., "Membership inference attacks from first principles", 2022): the
    cross-entropy of a network that is sure of almost all pictures is 0 in float32 for members and others alike.
    """
    wrong, sure, wanted = [], [], _wanted(view)
    for chosen in batches(np.arange(len(view.pictures))):
        pictures = view.pictures.read(chosen)
        variants = [pictures, pictures.flip(3), *(torch.roll(pictures, shift, (2, 3)) for shift in SHIFTS)]
        answers = torch.stack([network(changed) for changed in variants])  # (6, n, K)
        target = wanted[chosen].to(answers.device)
        if view.task == "classification":
            wrong.append(-log_odds(answers, target.expand(len(answers), -1)))
            sure.append(log_odds(answers, answers.argmax(2)))
        else:
            wrong.append((answers - target).abs().mean(2))
            sure.append(-(answers - answers.mean(0)).abs().mean(2))  # the less it wavers, the surer it is
    return torch.cat(wrong, dim=1).cpu().numpy(), torch.cat(sure, dim=1).cpu().numpy()


def log_odds(answers: Tensor, classes: Tensor) -> Tensor:
    """log(p / (1 - p)) of a class each, (...), from logits (..., K)."""
    place = classes[..., None]
    others = answers.scatter(-1, place, -torch.inf)
    return answers.gather(-1, place)[..., 0] - others.logsumexp(-1)


def _wanted(view: QueryImages) -> Tensor:
    """What the network should answer: the class, (n,); of a bin, the mean of the released targets in it, (n, K)."""
    if view.task == "classification":
        return torch.from_numpy(view.labels)
    targets = np.asarray(view.bank.targets, np.float32)
    means = np.stack([targets[view.bins == label].mean(0) for label in range(int(view.bins.max()) + 1)])
    return torch.from_numpy(means[view.labels])


def _against_class(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Less the median of the queries of the same class."""
    out = values.copy()
    for label in np.unique(labels):
        out[labels == label] -= np.median(values[labels == label])
    return out


def train_student(view: ReleaseView) -> Network:
    """A small network that answers pictures of Q as φ2∘φ1 does."""
    one = view.public.read(np.arange(1))
    outputs = view.answers(view.features(one)).shape[1]
    with seeded(view.seed):
        network = AttributeClassifier((3, one.shape[2], one.shape[3]), outputs)

    def scaled(pictures: Tensor) -> Tensor:
        return view.preprocess.normalise(pictures.to(view.device))

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        pictures = view.public.read(chosen)
        return pictures, view.answers(view.features_of(view.public, chosen))

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        answers = network(scaled(batch[0])).float()
        if view.task == "regression":
            return {"loss": F.smooth_l1_loss(answers, batch[1])}
        return {"loss": F.cross_entropy(answers, batch[1].softmax(1))}

    recipe = recipe_for(view, view.budget.images, len(view.public), LEARNING_RATE)
    trained(view, "A10 student", network, read_batch, loss, *recipe, "Training the student")
    return lambda pictures: network(scaled(pictures)).float()
