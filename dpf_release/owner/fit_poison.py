"""`fit-poison`: P, fitted on S against its adversaries, and as the vault keeps it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpf_release.bank.format import RELEASED_SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.files import make_folder
from dpf_release.errors import ConfigError, VaultError
from dpf_release.images.dataset import BadImage
from dpf_release.models.training import Recipe
from dpf_release.models.weights import state_file
from dpf_release.owner.adversaries import adversaries_of, attribute_of_rows, new_straw_man, public_features, straw_man
from dpf_release.owner.fitted import CANDIDATE, PLAN, STATE, checkpoints, read_plans, write_plans
from dpf_release.owner.project import Project
from dpf_release.owner.train import TargetTask
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.chain import Chain, Plans, build_chain, fit_chain
from dpf_release.poisoning.context import Material, Split


@dataclass(frozen=True)
class FitPoisonResult:
    """A fitted poisoning function.

    `last` is the entry of the training's history that was kept, empty for a stationary function; `unreadable` are the
    images of Q that the straw men were trained without.
    """

    last: dict[str, Any]
    unreadable: tuple[BadImage, ...]


def fit_poison(
    project: Project,
    *,
    name: str = "default",
    function: str | None = None,
    objective: str | None = None,
    lambda_: float | None = None,
    epochs: int | None = None,
    device: str | None = None,
    restart: bool = False,
) -> FitPoisonResult:
    """Fits the configured poisoning function and keeps it in the vault under a name.

    The straw men, and the attribute classifiers of `confuse`, are trained first where the vault has none. A stationary
    function is only planned. A run that was cut off goes on from its checkpoint.

    Under `torchrun` the ranks share each batch.

    Args:
        project: the owner's.
        name: under which the vault keeps it; several live side by side.
        function: and the next four, in the place of what the configuration says: as `"recombine:k=20"`.
        objective: `"equivalence"` or `"paper"`.
        lambda_: weight of the byproduct attackers' term.
        epochs: passes over φ1(S train).
        device: where it is trained, as `"cuda:1"`.
        restart: fit it anew; the function of that name is lost.

    Raises:
        VaultError: a function of that name is fitted already and `restart` is not set, or there is no φ1(S).
        ConfigError: no such function, parameter or reconstructor.
        StorageError: another run works in the vault.

    Example:
        >>> from dpf_release import Project, fit_poison
        >>> project = Project.open("my-release/dpf.toml")
        >>> fit_poison(project, name="mixed", function="recombine:k=4").last
        {}
    """
    settings = {"function": function, "objective": objective, "lambda": lambda_, "epochs": epochs}
    options = {f"poison.{key}": value for key, value in settings.items()}
    project = project.with_options(options | {"compute.device": device})
    public = bool(project.config.poison.straw_men)
    with project.working(public=public):
        return FitPoisonResult(_fit_poison(project, name, restart), project.public_images.bad if public else ())


def _fit_poison(project: Project, name: str, restart: bool) -> dict[str, Any]:
    section, vault = project.config.poison, project.vault
    folder = vault.function(name)
    banks = {split: project.private_bank(split) for split in RELEASED_SPLITS}
    _refuse_mistakes(project)  # before anything that is there is given up
    wanted = section.model_dump(by_alias=True, mode="json")
    subject = {"featurizer_sha256": project.cut.featurizer_sha256, "bank": project.bank_id}
    project.ranks.once(lambda: _begin(vault, folder, wanted, subject, restart))
    secret = bytes.fromhex(vault.read_record(folder / "function.json", "fit-poison")["secret"])
    seed = int.from_bytes(hashlib.sha256(secret + b"training").digest()[:8]) >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the start of P is as secret as P
        chain = build_chain(section.function, project.cut.features)

    for straw in section.straw_men:  # also where the function has no use for them: `poison` measures with them
        straw_man(project, straw)

    def planned(plans: Plans) -> Plans:
        project.ranks.once(lambda: write_plans(vault, folder, plans))
        return read_plans(vault, chain, secret, folder)

    known = read_plans(vault, chain, secret, folder) if vault.holds(folder / PLAN) else {}
    _, facts, histories = fit_chain(chain, _material(project, banks, secret, seed, folder), known, planned)
    project.ranks.once(lambda: _finish(vault, chain, folder, histories))
    return facts


def _material(
    project: Project, banks: dict[SplitName, FeatureBank], secret: bytes, seed: int, folder: Path
) -> Material:
    """What P is fitted from: φ1(S), its images, and Q."""
    section, vault = project.config.poison, project.vault
    rows_of, _ = project.bank_order
    images = project.private_images.pictures

    def split(name: SplitName) -> Split:
        return Split(banks[name], lambda rows: images.read(rows_of[name][rows]))

    def checkpoint(training: str) -> Path | None:
        return vault.checkpoint(folder / f"checkpoint-{training}.safetensors")

    bf16 = project.config.compute.bf16
    return Material(
        features=project.cut.features,
        phi_1=project.frozen(project.cut.split.featurizer),
        phi_2=project.frozen(project.cut.split.classifier),
        task=TargetTask.of(project),
        train=split("train"),
        val=split("val"),
        public=public_features(project) if section.straw_men else None,
        adversaries=lambda: adversaries_of(project),
        objective=section.objective,
        lambda_=section.lambda_,
        recipe=Recipe(section.epochs, section.batch_size, section.learning_rate, seed=seed, bf16=bf16),
        secret=secret,
        device=project.device,
        title=f"Training the poisoning function {folder.name}",
        subject=vault.read_bytes(folder / "function.json", "fit-poison").decode(),
        ranks=project.ranks,
        checkpoint=checkpoint,
        row_bytes=banks["train"].index.row_bytes,
    )


def _refuse_mistakes(project: Project) -> None:
    section = project.config.poison
    project.ranks.refuse_uneven(poison=section.batch_size, reconstructor=project.config.reconstructor.batch_size)
    chain = build_chain(section.function, project.cut.features)
    for name in section.straw_men:
        new_straw_man(project, name)
    for column in section.confuse:
        attribute_of_rows(project, column, "train")
    if chain.needs_adversaries and not section.straw_men and not section.confuse:
        raise ConfigError(
            f"expected a byproduct attacker under [poison] straw_men or confuse, that {section.function} is trained "
            "against, found none."
        )


def _begin(vault: Vault, folder: Path, recipe: dict[str, Any], subject: dict[str, str], restart: bool) -> None:
    """The function's 32 secret bytes: drawn from the operating system at its first fitting, kept for its resumes."""
    path = folder / "function.json"
    if vault.holds(path) and not restart:
        known = vault.read_record(path, "fit-poison")
        if known["recipe"] == recipe and known["for"] == subject and not known["fitted"]:
            return
        state = "is fitted already" if known["fitted"] else "was begun with other settings or features"
        raise VaultError(
            f"the function {folder.name!r} {state}. Give another --name, or fit it anew with --restart (it is lost)."
        )
    make_folder(folder)
    # The record first: what lies beside no record is nobody's, also after a crash between these lines.
    vault.remove(path, *checkpoints(vault, folder), *(folder / name for name in (STATE, PLAN, CANDIDATE)))
    vault.write_json(path, {"recipe": recipe, "for": subject, "secret": os.urandom(32).hex(), "fitted": False})


def _finish(vault: Vault, chain: Chain, folder: Path, histories: dict[str, Any]) -> None:
    state, record = chain.state(), folder / "function.json"
    if state:
        vault.write_bytes(folder / STATE, state_file(state))
    vault.write_json(folder / "history.json", histories)
    learned = {"fitted": True, "learned": bool(state), "statement": chain.statement()}
    vault.write_json(record, vault.read_record(record, "fit-poison") | learned)
    vault.remove(*checkpoints(vault, folder))
