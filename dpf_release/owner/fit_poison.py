"""`fit-poison`: P, fitted on S against its adversaries, and as the vault keeps it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpf_release.bank.format import RELEASED_SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder, sha256_of
from dpf_release.core.privacy import Unit
from dpf_release.errors import ConfigError, ImageError, VaultError
from dpf_release.images.dataset import BadImage
from dpf_release.images.table import ImageTable
from dpf_release.models.training import Recipe
from dpf_release.models.weights import load_state, state_file
from dpf_release.owner.adversaries import adversaries_of, attribute_of_rows, new_straw_man, straw_man
from dpf_release.owner.featurize import public_bank, public_features
from dpf_release.owner.fitted import CANDIDATE, PLAN, STATE, checkpoints, read_plans, write_plans
from dpf_release.owner.privacy import Fit, note_fit, refuse_overspending
from dpf_release.owner.project import Project
from dpf_release.owner.train import TargetTask
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.chain import Chain, Plans, build_chain, draws_rows, fit_chain
from dpf_release.poisoning.context import Material, Split
from dpf_release.poisoning.groups import CANDIDATES
from dpf_release.poisoning.mixture import Mixture


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
        ConfigError: no such function, parameter or reconstructor; it needs a φ2 that is trained on the bank; or what is
            published and this fit together exceed the budget of `[privacy]`.
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
    section = project.config.poison
    public = bool(section.straw_men) or draws_rows(section.function)
    with project.working(public=public):
        last = _fit_poison(project, name, restart, public)
        return FitPoisonResult(last, project.public_images.bad if public else ())


def _fit_poison(project: Project, name: str, restart: bool, with_public: bool) -> dict[str, Any]:
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

    for straw in () if chain.draws_rows else section.straw_men:
        straw_man(project, straw)  # also where the function has no use for them: `poison` measures with them

    def keep(plans: Plans) -> None:
        if state := chain.state():  # first: what was drawn from it must not outlive it
            content, mechanism = state_file(state), chain.mechanism(unit_of(project))
            if mechanism is not None:
                digest = hashlib.sha256(content).hexdigest()
                note_fit(vault, Fit(id=digest, name=name, function=section.function, mechanism=mechanism))
            vault.write_bytes(folder / STATE, content)
        write_plans(vault, folder, plans)

    def planned(plans: Plans) -> Plans:
        project.ranks.once(lambda: keep(plans))
        return read_plans(vault, chain, secret, folder)

    known = read_plans(vault, chain, secret, folder) if vault.holds(folder / PLAN) else {}
    if known and chain.draws_rows:
        chain.load(load_state(folder / STATE, vault.read_bytes(folder / STATE, "fit-poison")))
    _, facts, histories = fit_chain(chain, _material(project, banks, secret, seed, folder, with_public), known, planned)
    project.ranks.once(lambda: _finish(project, chain, folder, histories or facts))
    return facts


def unit_of(project: Project) -> Unit:
    """What a privacy bound protects: a person, where the table says who is in an image."""
    return "person" if project.config.images.private.group else "image"


def units_of(project: Project, rows: Rows) -> Rows:
    """Whose each image of S is, by rows of its table: a number for each person, else for each different file.

    An image of which nobody says whom it shows is a unit of its own. One that is in Q too, on which the mechanism's
    public numbers depend, is an `ImageError`.
    """
    private, public = project.private_images.table, project.public_images.table
    column = project.config.images.private.group

    def names_in(table: ImageTable, rows: Rows) -> list[str]:
        cells = table.attributes.get(column or "", ("",) * len(table))
        return [cells[row] or sha256_of(table.root / table.paths[row]) for row in rows]

    names, others = names_in(private, rows), names_in(public, np.arange(len(public)))
    if shared := set(names) & set(others):
        raise ImageError(
            f"expected public images of no {unit_of(project)} that is private, found {len(shared)} in both. Take them "
            "out of [images.public]."
        )
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _material(
    project: Project, banks: dict[SplitName, FeatureBank], secret: bytes, seed: int, folder: Path, with_public: bool
) -> Material:
    """What P is fitted from: φ1(S), its images, and Q."""
    section, vault = project.config.poison, project.vault
    rows_of, _ = project.bank_order
    images = project.private_images.pictures

    def split(name: SplitName) -> Split:
        bank, rows = banks[name], rows_of[name]
        return Split(
            bank, lambda chosen: images.read(rows[chosen]), bank.before_relu(), lambda: units_of(project, rows)
        )

    def public() -> Split:
        of_public = project.public_images
        rows = of_public.rows("train")
        read = lambda chosen: of_public.pictures.read(rows[chosen])  # noqa: E731
        if not draws_rows(section.function):  # which few look at: computed as it is read
            return Split(public_features(project), read)
        bank = public_bank(project)
        return Split(bank, read, bank.before_relu())

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
        public=public() if with_public else None,
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
        outputs=len(project.output_names),
        ranges=np.array(project.config.task.ranges) if project.config.task.ranges else None,
        unit=unit_of(project),
        row_bytes=banks["train"].index.row_bytes,
    )


def _refuse_mistakes(project: Project) -> None:
    section = project.config.poison
    project.ranks.refuse_uneven(poison=section.batch_size, reconstructor=project.config.reconstructor.batch_size)
    chain = build_chain(section.function, project.cut.features)
    for name in () if chain.draws_rows else section.straw_men:
        new_straw_man(project, name)
    for column in section.confuse:
        attribute_of_rows(project, column, "train")
    if chain.needs_adversaries and not section.straw_men and not section.confuse:
        raise ConfigError(
            f"expected a byproduct attacker under [poison] straw_men or confuse, that {section.function} is trained "
            "against, found none."
        )
    if chain.uses_classifier and project.config.network.classifier == "from-bank":
        raise ConfigError(
            f'{section.function} needs φ2 to be fitted, and [network] classifier = "from-bank" trains that on the rows '
            'which it makes. Choose a function that draws rows, or set classifier = "trained".'
        )
    _refuse_linkable(project, chain)
    refuse_overspending(project, chain.mechanism(unit_of(project)))


def _refuse_linkable(project: Project, chain: Chain) -> None:
    """Where rows of so many groups may not pass the gate, it is said before they are drawn."""
    stage, limit = chain.stages[0], project.config.gate.top1
    if project.config.claims.linkage and isinstance(stage, Mixture) and stage.linkage() > limit:
        raise ConfigError(
            f"{project.config.poison.function}: whoever knows the groups may name the image of a row, among "
            f"{CANDIDATES} of its class, in {stage.linkage():.1%} of cases on average; [gate] top1 = {limit:g} is the "
            f"limit of the claim linkage. Take at most {max(1, int(limit * CANDIDATES))} groups, set epsilon, or do "
            "not claim linkage."
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


def _finish(project: Project, chain: Chain, folder: Path, histories: dict[str, Any]) -> None:
    vault, record, mechanism = project.vault, folder / "function.json", chain.mechanism(unit_of(project))
    vault.write_json(folder / "history.json", histories)
    learned = {"fitted": True, "learned": vault.holds(folder / STATE), "statement": chain.statement()}
    if mechanism is not None:
        learned["privacy"] = mechanism.model_dump(mode="json")
    vault.write_json(record, vault.read_record(record, "fit-poison") | learned)
    vault.remove(*checkpoints(vault, folder))
