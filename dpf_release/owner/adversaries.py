"""The byproduct attackers that P is trained against: straw men on Q, attribute classifiers in the vault on S."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpf_release.bank.format import SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder
from dpf_release.errors import ConfigError, ImageError
from dpf_release.models.metrics import WINDOW, l1, ssim
from dpf_release.models.probes import AttributeClassifier
from dpf_release.models.reconstructors import Reconstructor
from dpf_release.models.training import Recipe, fit
from dpf_release.models.weights import load_state, state_file
from dpf_release.owner.project import Project
from dpf_release.poisoning.context import VALIDATION_ROWS
from dpf_release.poisoning.objective import Adversaries, AttributeAttacker

# The identity classifier of the paper's section 4.4 is trained on people with enough pictures, none overrepresented.
ATTRIBUTE_MIN_ROWS, ATTRIBUTE_MAX_ROWS = 10, 30


def adversaries_of(project: Project) -> Adversaries:
    """Whom `[poison]` names; trained where the vault has none."""
    section = project.config.poison
    return Adversaries(
        {name: straw_man(project, name) for name in section.straw_men},
        {column: attribute_classifier(project, column) for column in section.confuse},
    )


def straw_man(project: Project, name: str) -> Reconstructor:
    """ψ of that name, frozen; trained on Q with L1 (section 3.1.2) where the vault has none for this φ1 and Q.

    Raises:
        ConfigError: no such name, or the pictures are too small for SSIM.
        ImageError: an image of Q is one of S.
    """
    network = new_straw_man(project, name)
    _refuse_shared_images(project)
    subject = {
        "featurizer_sha256": project.cut.featurizer_sha256,
        "public_images_sha256": project.public_images.digest,
        "recipe": project.config.reconstructor.model_dump(),
    }
    _trained(project, name, network, subject, lambda: _fit_straw_man(project, network, name, subject))
    return network


def new_straw_man(project: Project, name: str) -> Reconstructor:
    """ψ of that name, untrained; the same errors as `straw_man`."""
    size = project.config.network.size
    if min(size) < WINDOW:
        raise ConfigError(f"expected pictures of {WINDOW} px or more for SSIM ([network] size), found {list(size)}.")
    return Reconstructor(name, project.cut.record.feature_shape, size)


def _refuse_shared_images(project: Project) -> None:
    """An attacker has no image of S: one trained on them would say nothing."""
    private, public = (
        {images.table.root.resolve() / images.table.paths[row] for split in SPLITS for row in images.rows(split)}
        for images in (project.private_images, project.public_images)
    )
    if shared := sorted(private & public):
        raise ImageError(
            f"expected public images that are not private, found {len(shared)} in both, {shared[0].name} for one. "
            "Name other [images.public], or other classes of them."
        )


def _fit_straw_man(project: Project, network: Reconstructor, name: str, subject: dict[str, Any]) -> dict[str, Any]:
    section, images = project.config.reconstructor, project.public_images
    phi_1 = project.frozen(project.cut.split.featurizer)
    train, val = images.rows("train"), images.rows("val")[:VALIDATION_ROWS]

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return (images.pictures.read(train[chosen]),)

    def features(pictures: Tensor) -> Tensor:
        # In float32, as the bank is made: an attacker has the exact features.
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            inputs = project.preprocess.normalise(pictures).contiguous(memory_format=torch.channels_last)
            out: Tensor = phi_1(inputs)
        return out

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        reconstruction = network(features(batch[0])).float()
        return {"loss": F.l1_loss(reconstruction, batch[0].float() / 255)}

    def scores() -> dict[str, float]:
        parts = []
        for start in range(0, len(val), 256):
            pictures = images.pictures.read(val[start : start + 256]).to(project.device)
            reconstruction, pictures = network(features(pictures)).float(), pictures.float() / 255
            parts.append(torch.stack([l1(reconstruction, pictures), ssim(reconstruction, pictures)]))
        mean = torch.cat(parts, dim=1).mean(dim=1)
        return {"l1": float(mean[0]), "ssim": float(mean[1])}

    recipe = Recipe(section.epochs, section.batch_size, section.learning_rate, bf16=project.config.compute.bf16)
    history = fit(
        network,
        len(train),
        read_batch,
        loss,
        recipe,
        title=f"Training the straw man {name}",
        device=project.device,
        ranks=project.ranks,
        validate=lambda: scores()["l1"],
        checkpoint=project.vault.checkpoint(project.vault.reconstructors / f"{name}.checkpoint.safetensors"),
        subject=json.dumps(subject, sort_keys=True),
    )
    with torch.inference_mode():
        return {"public_val": scores(), "history": asdict(history)}


def attribute_classifier(project: Project, column: str) -> AttributeAttacker:
    """The byproduct attacker of section 4.4, trained on φ1(S train) and kept in the vault where missing.

    It knows the values of an attribute column with at least 10 rows, and learns from at most 30 of each. An
    `ImageError`, where the private images have no such column, or it has fewer than two such values.
    """
    bank = project.private_bank("train")
    labels = attribute_of_rows(project, column, "train")
    values, counts = np.unique(labels, return_counts=True)
    values = values[(counts >= ATTRIBUTE_MIN_ROWS) & (values != "")]
    if len(values) < 2:
        raise ImageError(
            f"expected two values of {column!r} with {ATTRIBUTE_MIN_ROWS} train images, found {len(values)}."
        )
    network = AttributeClassifier(project.cut.record.feature_shape, len(values))
    subject = {"bank": project.bank_id, "values": values.tolist(), "recipe": project.config.reconstructor.model_dump()}
    _trained(
        project,
        f"attribute-{column}",
        network,
        subject,
        lambda: _fit_attribute_classifier(project, network, bank, labels, values),
    )
    return AttributeAttacker(network, tuple(values.tolist()))


def _fit_attribute_classifier(
    project: Project, network: nn.Module, bank: FeatureBank, labels: NDArray[np.str_], values: NDArray[np.str_]
) -> dict[str, Any]:
    # The bank's order is random, so the first rows of a person are a random choice of them.
    rows = np.concatenate([np.flatnonzero(labels == value)[:ATTRIBUTE_MAX_ROWS] for value in values])
    classes = np.searchsorted(values, labels[rows])

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return torch.from_numpy(bank.read(rows[chosen])), torch.from_numpy(classes[chosen])

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        scores = network(batch[0].float()).float()
        return {"loss": F.cross_entropy(scores, batch[1]), "top1": (scores.argmax(1) == batch[1]).float().mean()}

    section, ranks, bf16 = project.config.reconstructor, project.ranks, project.config.compute.bf16
    batch_size = min(section.batch_size, len(rows) // ranks.world_size * ranks.world_size)
    recipe = Recipe(3 * section.epochs, batch_size, section.learning_rate, weight_decay=1e-4, bf16=bf16)
    title = "Training the attribute classifier"
    history = fit(network, len(rows), read_batch, loss, recipe, title=title, device=project.device, ranks=ranks)
    return {"values": len(values), "rows": len(rows), "history": asdict(history)}


def attribute_of_rows(project: Project, column: str, split: SplitName) -> NDArray[np.str_]:
    """The attribute of each bank row of a split, (N,) texts; an `ImageError` where there is no such column."""
    attributes = project.private_table.attributes
    if column not in attributes:
        raise ImageError(f"expected an attribute column {column!r} (confuse), found {sorted(attributes) or 'none'}.")
    rows, _ = project.bank_order
    return np.array([attributes[column][row] for row in rows[split]])


def _trained(
    project: Project, name: str, network: nn.Module, subject: dict[str, Any], train: Callable[[], dict[str, Any]]
) -> None:
    """The network as the vault has it for exactly this subject, frozen; trained where it has none."""
    vault, path = project.vault, project.vault.reconstructors / f"{name}.safetensors"
    record = path.with_suffix(".json")
    there = vault.holds(path) and vault.holds(record) and vault.read_record(record, "fit-poison")["for"] == subject
    if not project.ranks.from_first(np.array([there]))[0]:
        make_folder(vault.reconstructors)
        facts = train()

        def keep() -> None:
            vault.remove(record)  # weights without a record are trained again
            vault.write_bytes(path, state_file(network.state_dict()))
            vault.write_json(record, {"for": subject, **facts})
            vault.remove(path.with_suffix(".checkpoint.safetensors"))

        project.ranks.once(keep)
    network.load_state_dict(load_state(path, vault.read_bytes(path, "fit-poison")))
    project.frozen(network)
