"""`train`: Φ, fitted on S or brought along by the owner."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder, sha256_of
from dpf_release.errors import ConfigError, VaultError
from dpf_release.images.dataset import BadImage
from dpf_release.images.survey import ImageSet
from dpf_release.models.hooks import split
from dpf_release.models.metrics import mean_absolute_error, topk_correct
from dpf_release.models.training import Recipe, fit
from dpf_release.models.weights import load_weights
from dpf_release.owner.cut_network import new_network, save_network
from dpf_release.owner.project import Project
from dpf_release.poisoning.objective import TaskLoss

IMPORTED = "imported.json"  # beside an imported network: the digest of the weights file it came from


@dataclass(frozen=True)
class TrainResult:
    """A trained Φ, and the images of S that it was trained without.

    `scores` are those on `val` and `test`: accuracy (0 to 1) or mean absolute error in the target's unit; of several
    ranks only the first knows them.
    """

    scores: dict[str, float]
    unreadable: tuple[BadImage, ...]


def train(
    project: Project, *, epochs: int | None = None, device: str | None = None, restart: bool = False
) -> TrainResult:
    """Trains Φ on S train, or on Q where [network] train_on says so; `val` chooses the epoch.

    Weights named under [network] are where it starts.

    Under `torchrun` the ranks share each batch. What is not given is as the configuration says.

    Args:
        project: the owner's.
        epochs: passes over S train.
        device: where it is trained, as `"cuda:1"`.
        restart: train anew; the network that is there is lost.

    Raises:
        VaultError: the vault has a network already, and `restart` is not set.
        StorageError: another run works in the vault.

    Example:
        >>> from dpf_release import Project, train
        >>> project = Project.open("my-release/dpf.toml")
        >>> sorted(train(project, epochs=1, restart=True).scores)
        ['test', 'val']
    """
    project.forget("cut")
    project = project.with_options({"train.epochs": epochs, "compute.device": device})
    public = project.config.network.train_on == "public"
    with project.working(public=public):
        images = project.public_images if public else project.private_images
        return TrainResult(_train(project, images, restart), images.bad)


def _train(project: Project, images: ImageSet, restart: bool) -> dict[str, float]:
    vault, section, model = project.vault, project.config.train, project.config.network
    if vault.holds(vault.network / "network.json") and not restart:
        raise VaultError(f"{vault.network} holds a network already. Use it, or train anew with --restart.")
    project.ranks.refuse_uneven(train=section.batch_size)
    public = model.train_on == "public"
    if public and len(images.table.classes) < 2:
        raise ConfigError(
            'expected public images in two or more classes to train on, found none ([network] train_on = "public"). '
            "Put them in a folder for each class under [images.public], or bring weights that never saw the private "
            "images."
        )
    network, rows = _first_network(project, project.network_names), images.rows("train")
    task = TargetTask(images, regression=not public and project.config.task.kind == "regression")

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        pictures = augment(images.pictures.read(rows[chosen]), generator, section.flip, section.shift)
        return pictures, torch.from_numpy(images.table.targets[rows[chosen]])

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"loss": task.loss(network(project.preprocess.normalise(batch[0])).float(), batch[1])}

    checkpoint = make_folder(vault.network) / "checkpoint.safetensors"
    project.ranks.once(lambda: vault.remove(checkpoint) if restart else None)
    split(network, model.hook, model.size)  # a wrong hook point is refused now, not after hours of training
    rate, decay, bf16 = section.learning_rate, section.weight_decay, project.config.compute.bf16
    history = fit(
        network,
        len(rows),
        read_batch,
        loss,
        Recipe(section.epochs, section.batch_size, rate, "sgd", decay, bf16=bf16),
        title="Training the network",
        device=project.device,
        ranks=project.ranks,
        validate=(lambda: _judged(project, network, images, "val", task.error)) if len(images.rows("val")) else None,
        checkpoint=vault.checkpoint(checkpoint),
        subject=json.dumps([images.digest, section.model_dump(), model.model_dump(mode="json")]),
    )
    scores = {}
    if project.ranks.is_first:
        judges = [name for name in ("val", "test") if len(images.rows(name))]
        scores = {name: _judged(project, network, images, name, task.score) for name in judges}
        network = network.to(memory_format=torch.contiguous_format)
        if public:  # whose φ2 answers the classes of Q
            network = _with_featurizer_of(project, network)
        save_network(network, project.output_names, project.config, vault)
        kept = {"epochs": history.epochs, "bf16": history.bf16, "scores": scores, "trained_on": model.train_on}
        vault.write_json(vault.network / "history.json", kept)
        vault.remove(checkpoint, vault.network / IMPORTED)
    project.ranks.wait()
    return scores


def _first_network(project: Project, names: tuple[str, ...]) -> nn.Module:
    """Φ where its training starts: random, or with the weights that the configuration names."""
    model = project.config.network
    network = new_network(model, len(names), project.trusts_code)
    if model.weights:
        only = None
        if model.classifier == "from-bank":  # whatever the weights' own φ2 answers
            only = split(network, model.hook, model.size).featurizer.state_dict().keys()
        load_weights(network, project.config.locate(model.weights), only)
    return network


def _with_featurizer_of(project: Project, trained: nn.Module) -> nn.Module:
    """A new Φ for the outputs of S with the φ1 of a network that answers something else."""
    model = project.config.network
    network = new_network(model, len(project.output_names), project.trusts_code)
    network.load_state_dict(split(trained, model.hook, model.size).featurizer.state_dict(), strict=False)
    return network


def _judged(
    project: Project, network: nn.Module, images: ImageSet, split_name: str, judge: Callable[[Tensor, Rows], float]
) -> float:
    """What `judge` makes of Φ's answers, (n, outputs), on a split."""
    normalise = project.preprocess.normalise
    rows = images.rows(split_name)
    network.eval()
    with torch.inference_mode():
        batches = (images.pictures.read(rows[start : start + 256]) for start in range(0, len(rows), 256))
        answers = [network(normalise(batch.to(project.device))).float().cpu() for batch in batches]
    return judge(torch.cat(answers), rows)


def import_network(project: Project, restart: bool = False) -> None:
    """Φ from the weights that [network] names, into the vault, where there is none.

    A `VaultError`, where neither has a network, or the weights file is no longer the one that the vault's network came
    from, and `restart` is not set; a `WeightsError`, where they do not fit, or are not in a safe format.
    """
    vault, weights = project.vault, project.config.network.weights
    there, came_from = vault.holds(vault.network / "network.json"), vault.network / IMPORTED
    if weights is None:
        if not there:
            raise VaultError(
                "expected a network. Run `dpf-release train`, or name its weights under [network] weights."
            )
        return
    path = project.config.locate(weights)
    if there and not vault.holds(came_from):
        return  # trained here; the weights were where the training began
    digest = {"sha256": sha256_of(path)} if path.is_file() else {}
    if there and vault.read_record(came_from, "featurize --restart") == digest:
        return
    if there and not restart:
        raise VaultError(
            f"{path} is not the file that the vault's network came from. Put that back, or take over the new one with "
            "`dpf-release featurize --restart`."
        )
    save_network(_first_network(project, project.output_names), project.output_names, project.config, vault)
    vault.write_json(came_from, digest)


class TargetTask(TaskLoss):
    """What Φ is for: its loss and its scores; regression targets in standard deviations of S train."""

    def __init__(self, images: ImageSet, regression: bool) -> None:
        self._targets = images.table.targets
        train = self._targets[images.rows("train")]
        super().__init__(torch.from_numpy(train.std(axis=0) + 1e-6) if regression else None)

    @classmethod
    def of(cls, project: Project) -> TargetTask:
        """The task of a project."""
        return cls(project.private_images, project.config.task.kind == "regression")

    def score(self, outputs: Tensor, rows: Rows) -> float:
        """Top-1 (0 to 1), or mean absolute error in the target's unit."""
        targets = torch.from_numpy(self._targets[rows])
        if self.scale is None:
            return float(topk_correct(outputs, targets, 1).float().mean())
        return float(mean_absolute_error(outputs, targets).mean())

    def error(self, outputs: Tensor, rows: Rows) -> float:
        """The score as something to be made small."""
        return 1.0 - self.score(outputs, rows) if self.scale is None else self.score(outputs, rows)


def augment(pictures: Tensor, generator: np.random.Generator, flip: bool, shift: int) -> Tensor:
    """Random horizontal flips and random shifts by up to `shift` pixels (black comes in), (N, 3, H, W) uint8."""
    if flip:
        mirrored = torch.from_numpy(generator.random(len(pictures)) < 0.5)
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    if shift:
        height, width = pictures.shape[2:]
        padded = F.pad(pictures, (shift,) * 4)
        corners = generator.integers(0, 2 * shift + 1, size=(len(pictures), 2))
        pictures = torch.stack(
            [picture[:, y : y + height, x : x + width] for picture, (y, x) in zip(padded, corners, strict=True)]
        )
    return pictures
