"""`fit-poison`: P, fitted on S against the byproduct attackers, and as the vault keeps it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpf_release.bank.format import RELEASED_SPLITS, SplitName
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.files import make_folder
from dpf_release.errors import ConfigError, VaultError
from dpf_release.images.dataset import BadImage
from dpf_release.models.training import Recipe, fit
from dpf_release.models.weights import state_file
from dpf_release.owner.adversaries import (
    VALIDATION_ROWS,
    attribute_classifier,
    attribute_of_rows,
    new_straw_man,
    straw_man,
)
from dpf_release.owner.fitted import CANDIDATE, PLAN, read_plans, write_plans
from dpf_release.owner.project import Project
from dpf_release.owner.train import TargetTask
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.chain import Chain, build_chain
from dpf_release.poisoning.interface import FeatureSpec, Plan
from dpf_release.poisoning.objective import Objective


@dataclass(frozen=True)
class FitPoisonResult:
    """A fitted poisoning function.

    Attributes:
        last: the entry of the training's history that was kept; empty for a stationary function.
        unreadable: images of Q that the straw men were trained without.
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
    section, cut, vault = project.config.poison, project.cut, project.vault
    folder = vault.function(name)
    banks = {split: project.private_bank(split) for split in RELEASED_SPLITS}
    spec = FeatureSpec(cut.record.feature_shape, cut.split.non_negative)
    _refuse_mistakes(project, spec)  # before anything that is there is given up
    wanted = section.model_dump(by_alias=True, mode="json")
    subject = {"featurizer_sha256": cut.featurizer_sha256, "bank": project.bank_id}
    project.ranks.once(lambda: _begin(vault, folder, wanted, subject, restart))
    secret = bytes.fromhex(vault.read_record(folder / "function.json", "fit-poison")["secret"])
    seed = int.from_bytes(hashlib.sha256(secret + b"training").digest()[:8]) >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the start of P is as secret as P
        chain = build_chain(section.function, spec)
    for straw in section.straw_men:
        straw_man(project, straw)
    phi_2 = project.frozen(cut.split.classifier)
    project.ranks.once(lambda: _draw_plans(vault, chain, banks, phi_2, secret, folder))
    plans = read_plans(vault, chain, secret, folder)
    last: dict[str, Any] = {}
    if chain.learned is not None:
        last = _fit_learned(project, chain, plans, banks, seed, folder)
    project.ranks.once(lambda: _finish(vault, chain, folder))
    return last


def _finish(vault: Vault, chain: Chain, folder: Path) -> None:
    if chain.learned is not None:
        vault.write_bytes(folder / "dpf.safetensors", state_file(chain.learned.state_dict()))
    record = vault.read_record(folder / "function.json", "fit-poison")
    vault.write_json(folder / "function.json", record | {"fitted": True})
    vault.remove(folder / "checkpoint.safetensors")


def _draw_plans(
    vault: Vault, chain: Chain, banks: Mapping[SplitName, RowSource], phi_2: nn.Module, secret: bytes, folder: Path
) -> None:
    """What the function draws before it sees a row, into the vault; a resume goes on under it."""
    if not vault.holds(folder / PLAN):
        write_plans(vault, folder, {split: chain.plan(bank, phi_2, secret) for split, bank in banks.items()})


def _refuse_mistakes(project: Project, spec: FeatureSpec) -> None:
    section = project.config.poison
    project.ranks.refuse_uneven(poison=section.batch_size, reconstructor=project.config.reconstructor.batch_size)
    chain = build_chain(section.function, spec)
    for name in section.straw_men:
        new_straw_man(project, name)
    for column in section.confuse:
        attribute_of_rows(project, column, "train")
    if chain.learned is not None and not section.straw_men and not section.confuse:
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
    names = ("function.json", "checkpoint.safetensors", "dpf.safetensors", PLAN, CANDIDATE)
    vault.remove(*[folder / name for name in names])
    vault.write_json(path, {"recipe": recipe, "for": subject, "secret": os.urandom(32).hex(), "fitted": False})


def _fit_learned(
    project: Project,
    chain: Chain,
    plans: dict[SplitName, list[Plan]],
    banks: dict[SplitName, FeatureBank],
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    section = project.config.poison
    network = chain.learned
    assert network is not None
    read = {split: batch_reader(project, chain, plans[split], split, bank) for split, bank in banks.items()}
    objective = configured_objective(project)
    val = np.arange(min(len(banks["val"]), VALIDATION_ROWS))

    def validate() -> float:
        total = 0.0
        for start in range(0, len(val), 256):
            rows = val[start : start + 256]
            batch = tuple(tensor.to(project.device) for tensor in read["val"](rows))
            total += float(objective(network, batch)["loss"]) * len(rows)
        return total / len(val)

    recipe = Recipe(
        section.epochs, section.batch_size, section.learning_rate, seed=seed, bf16=project.config.compute.bf16
    )
    history = fit(
        network,
        len(banks["train"]),
        lambda rows, _: read["train"](rows),
        objective,
        recipe,
        title=f"Training the poisoning function {folder.name}",
        device=project.device,
        ranks=project.ranks,
        validate=validate if len(val) else None,
        checkpoint=project.vault.checkpoint(folder / "checkpoint.safetensors"),
        subject=project.vault.read_bytes(folder / "function.json", "fit-poison").decode(),
        row_bytes=banks["train"].index.row_bytes,
    )
    project.ranks.once(lambda: project.vault.write_json(folder / "history.json", asdict(history)))
    return history.epochs[history.best_epoch]


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
