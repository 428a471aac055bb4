"""`fit-poison`: P, fitted on S against the byproduct attackers, and as the vault keeps it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save
from torch import nn

from dpf_release.bank import FeatureBank, SplitName
from dpf_release.errors import ConfigError, VaultError
from dpf_release.models.functions import Chain, FeatureSpec, Plan, RowSource, build_chain
from dpf_release.models.weights import parse_state, state_file
from dpf_release.pipeline.attackers import VALIDATION_ROWS, attribute_of_rows, new_straw_man, straw_man
from dpf_release.pipeline.objective import batch_reader, configured_objective
from dpf_release.pipeline.project import Project
from dpf_release.storage import make_folder
from dpf_release.training import Recipe, fit
from dpf_release.vault import RELEASED_SPLITS, Vault

CANDIDATE = "candidate.json"  # beside a function: the plan that its candidate is written under
PLAN = "plan.safetensors"


@dataclass(frozen=True, eq=False)
class FittedFunction:
    """P as the vault keeps it.

    Attributes:
        chain: its stages, the learned one with its weights.
        plans: for each split, one plan a stage.
        digest: of P as it was fitted; another P has another. A retraction does not change it.
        plan_sha256: of the plans as they are.
    """

    chain: Chain
    plans: dict[SplitName, list[Plan]]
    digest: str
    plan_sha256: str

    def poisoned(self, split: SplitName, bank: RowSource) -> RowSource:
        """A split's bank as P leaves it."""
        return self.chain.on(bank, self.plans[split])


def fit_poison(project: Project, name: str = "default", restart: bool = False) -> dict[str, Any]:
    """Fits the configured poisoning function and keeps it in the vault under a name.

    The straw men, and the attribute classifiers of `confuse`, are trained first where the vault has none. A stationary
    function is only planned. A run that was cut off goes on from its checkpoint.

    Under `torchrun` the ranks share each batch.

    Returns:
        The last entry of the training's history; empty for a stationary function.

    Raises:
        VaultError: a function of that name is fitted already and `restart` is not set, or there is no φ1(S).
        ConfigError: no such function, parameter or reconstructor.
        StorageError: another run works in the vault.
    """
    with project.working(public=bool(project.config.poison.straw_men)):
        return _fit_poison(project, name, restart)


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
    plans = _read_plans(vault, chain, secret, folder)
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


def write_plans(
    vault: Vault,
    folder: Path,
    plans: Mapping[SplitName, Sequence[Plan]],
    more: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """A function's plans, for each split one a stage, into the vault; with what else is to be known of them."""
    arrays = {
        f"{split}/{stage}/{key}": array
        for split, stages in plans.items()
        for stage, plan in enumerate(stages)
        for key, array in (plan.arrays | ({} if plan.pieces is None else {"pieces": plan.pieces})).items()
    }
    vault.write_bytes(folder / PLAN, save(arrays | dict(more or {})))


def _read_plans(vault: Vault, chain: Chain, secret: bytes, folder: Path) -> dict[SplitName, list[Plan]]:
    arrays = load(vault.read_bytes(folder / PLAN, "fit-poison"))
    plans: dict[SplitName, list[Plan]] = {}
    for split in RELEASED_SPLITS:
        plans[split] = []
        for stage in range(len(chain.stages)):
            prefix = f"{split}/{stage}/"
            mine = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            plans[split].append(Plan(chain.stage_secret(secret, stage), mine.pop("pieces", None), mine))
    return plans


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


def load_function(project: Project, name: str) -> FittedFunction:
    """A fitted function from the vault.

    Raises:
        VaultError: there is none of that name, or it was fitted for another featurizer.
    """
    vault, folder, cut = project.vault, project.vault.function(name), project.cut
    record = vault.read_record(folder / "function.json", f"fit-poison --name {name}")
    if not record.get("fitted"):
        raise VaultError(f"the function {name!r} is not fitted to the end. Run `dpf-release fit-poison --name {name}`.")
    if record["for"] != {"featurizer_sha256": cut.featurizer_sha256, "bank": project.bank_id}:
        raise VaultError(
            f"the function {name!r} was fitted for another featurizer or hook point, or for features since "
            f"written anew. Fit it again: `dpf-release fit-poison --name {name} --restart`."
        )
    spec = FeatureSpec(cut.record.feature_shape, cut.split.non_negative)
    chain = build_chain(record["recipe"]["function"], spec, allow_import=project.trusts_code)
    if chain.learned is not None:
        weights = folder / "dpf.safetensors"
        chain.learned.load_state_dict(parse_state(vault.read_bytes(weights, f"fit-poison --name {name}"), weights))
        project.frozen(chain.learned)
    plans = _read_plans(vault, chain, bytes.fromhex(record["secret"]), folder)
    learned = [vault.sha256(folder / "dpf.safetensors")] if chain.learned is not None else []
    plan_sha256 = vault.sha256(folder / PLAN)
    parts = [*learned, record.get("fitted_plan_sha256", plan_sha256)]
    digest = hashlib.sha256("".join([record["secret"], json.dumps([record["recipe"], record["for"]]), *parts]).encode())
    return FittedFunction(chain, plans, digest.hexdigest(), plan_sha256)


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
