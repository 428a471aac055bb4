"""A fitted poisoning function, as the vault keeps it: weights and plans."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from dpf_release.bank.format import RELEASED_SPLITS, SplitName
from dpf_release.bank.rows import RowSource
from dpf_release.errors import ConfigError, VaultError
from dpf_release.models.weights import load_state
from dpf_release.owner.banks import Removal, RowsOfSplit
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.chain import Chain, build_chain
from dpf_release.poisoning.plan import Plan

CANDIDATE = "candidate.json"  # beside a function: the plan that its candidate is written under
PLAN = "plan.safetensors"
STATE = "state.safetensors"  # what it learned; not there where it learned nothing


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
    plans: Mapping[str, list[Plan]]
    digest: str
    plan_sha256: str

    def poisoned(self, split: SplitName, bank: RowSource) -> RowSource:
        """A split's bank as P leaves it."""
        return self.chain.on(bank, self.plans[split])


def write_plans(
    vault: Vault, folder: Path, plans: Mapping[str, Sequence[Plan]], more: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """A function's plans, for each split one a stage, into the vault; with what else is to be known of them."""
    arrays = {
        f"{split}/{stage}/{key}": array
        for split, stages in plans.items()
        for stage, plan in enumerate(stages)
        for key, array in plan.arrays.items()
    }
    stages = {f"{split}/stages": np.array(len(of)) for split, of in plans.items()}
    vault.write_bytes(folder / PLAN, save(arrays | stages | dict(more or {})))


def read_plans(vault: Vault, chain: Chain, secret: bytes, folder: Path) -> dict[str, list[Plan]]:
    """For each released split, one plan a stage; fewer where a run was cut off."""
    arrays = load(vault.read_bytes(folder / PLAN, "fit-poison"))
    plans: dict[str, list[Plan]] = {}
    for split in RELEASED_SPLITS:
        plans[split] = []
        for stage in range(int(arrays[f"{split}/stages"])):
            prefix = f"{split}/{stage}/"
            mine = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            plans[split].append(Plan(chain.stage_secret(secret, stage), mine))
    return plans


def load_function(project: Project, name: str) -> FittedFunction:
    """A fitted function from the vault; a `VaultError` where it is not there, or was fitted for another featurizer."""
    vault, folder, cut = project.vault, project.vault.function(name), project.cut
    record = vault.read_record(folder / "function.json", f"fit-poison --name {name}")
    if not record.get("fitted"):
        raise VaultError(f"the function {name!r} is not fitted to the end. Run `dpf-release fit-poison --name {name}`.")
    if record["for"] != {"featurizer_sha256": cut.featurizer_sha256, "bank": project.bank_id}:
        raise VaultError(
            f"the function {name!r} was fitted for another featurizer or hook point, or for features since "
            f"written anew. Fit it again: `dpf-release fit-poison --name {name} --restart`."
        )
    chain = build_chain(record["recipe"]["function"], cut.features, allow_import=project.trusts_code)
    if record["learned"]:  # without its state it would be another function: the first weights of dpf are the identity
        chain.load(load_state(folder / STATE, vault.read_bytes(folder / STATE, f"fit-poison --name {name}")))
    for network in chain.networks():
        project.frozen(network)
    plans = read_plans(vault, chain, bytes.fromhex(record["secret"]), folder)
    learned = [vault.sha256(folder / STATE)] if record["learned"] else []
    plan_sha256 = vault.sha256(folder / PLAN)
    parts = [*learned, record.get("fitted_plan_sha256", plan_sha256)]
    digest = hashlib.sha256("".join([record["secret"], json.dumps([record["recipe"], record["for"]]), *parts]).encode())
    return FittedFunction(chain, plans, digest.hexdigest(), plan_sha256)


def checkpoints(vault: Vault, folder: Path) -> list[Path]:
    """What trainings of a function have kept to go on from."""
    return [path for path in vault.members(folder) if path.name.startswith("checkpoint")]


def is_fitted(project: Project, name: str) -> bool:
    """Whether there is a function of that name, fitted to the end for today's bank."""
    vault, path = project.vault, project.vault.function(name) / "function.json"
    record: dict[str, Any] = vault.read_record(path, "fit-poison") if vault.holds(path) else {}
    return bool(record.get("fitted") and record["for"]["bank"] == project.bank_id)


def without_rows(removal: Removal, name: str) -> tuple[FittedFunction, RowsOfSplit]:
    """A function with the plans of the rows that stay, and the numbers of those that come out otherwise by them.

    The draw is the function's secret's and the retraction's number's: a run that was cut off draws the same. A
    `ConfigError`, where too few rows of a class would be left for it.
    """
    project, vault = removal.project, removal.project.vault
    function, folder = load_function(project, name), vault.function(name)
    known = load(vault.read_bytes(folder / PLAN, "fit-poison"))
    if removal.number in known.get("retraction", ()):
        return function, {split: known[f"rebuilt/{split}"] for split in RELEASED_SPLITS}
    secret = bytes.fromhex(vault.read_record(folder / "function.json", "fit-poison")["secret"])
    secret = hashlib.sha256(secret + b"retraction" + removal.number.to_bytes(4)).digest()
    phi_2 = project.frozen(project.cut.split.classifier)
    plans: dict[str, list[Plan]] = {}
    rebuilt: RowsOfSplit = {}
    for split in RELEASED_SPLITS:
        try:
            plans[split], rebuilt[split] = function.chain.drop_rows(
                function.plans[split], removal.kept[split], removal.bank(split), phi_2, secret
            )
        except ConfigError as error:
            raise ConfigError(f"the function {name!r}, in {split}: {error} Nothing was retracted.") from error
    return replace(function, plans=plans), rebuilt


def draws_rows(project: Project, name: str) -> bool:
    """Whether a function is fitted, and its rows belong to no image: a retraction fits it anew."""
    return is_fitted(project, name) and load_function(project, name).chain.draws_rows


def to_draw_again(vault: Vault, name: str) -> bool:
    """Whether a retraction has begun a function anew, and its rows are not all drawn yet."""
    path, candidate = vault.function(name) / "function.json", vault.function(name) / CANDIDATE
    record = vault.read_record(path, "fit-poison") if vault.holds(path) else {}
    written = vault.holds(candidate) and vault.read_record(candidate, "poison")["index_sha256"]
    return "redrawn_for" in record and not (record["fitted"] and written)


def _begin_anew(removal: Removal, name: str) -> None:
    """A function as it is before its first fit, with a new secret; the record first: what is beside it is nobody's."""
    vault, folder = removal.project.vault, removal.project.vault.function(name)
    record = vault.read_record(folder / "function.json", "fit-poison")
    kept = {key: record[key] for key in ("recipe", "for")}
    anew = {"secret": os.urandom(32).hex(), "fitted": False, "redrawn_for": removal.number}
    vault.write_json(folder / "function.json", kept | anew)
    vault.remove(*checkpoints(vault, folder), folder / PLAN, folder / STATE, folder / "history.json")


def drop_rows(removal: Removal, name: str) -> None:
    """Takes rows out of a function's plans; of one that is not fitted to its end goes what it has drawn and learned.

    So it does of one that draws rows, which belong to no image: it is to be fitted again.
    """
    vault, folder = removal.project.vault, removal.project.vault.function(name)
    if not is_fitted(removal.project, name):
        vault.remove(*checkpoints(vault, folder), folder / PLAN, folder / STATE, folder / "history.json")
        return
    if load_function(removal.project, name).chain.draws_rows:
        _begin_anew(removal, name)
        return
    function, rebuilt = without_rows(removal, name)
    planned = any(plan.arrays for plans in function.plans.values() for plan in plans)
    if not planned or removal.number in load(vault.read_bytes(folder / PLAN, "fit-poison")).get("retraction", ()):
        return
    record = vault.read_record(folder / "function.json", "fit-poison")
    if "fitted_plan_sha256" not in record:  # which P this is stays what it was when it was fitted
        vault.write_json(folder / "function.json", record | {"fitted_plan_sha256": function.plan_sha256})
    more = {f"rebuilt/{split}": rows for split, rows in rebuilt.items()}
    write_plans(vault, folder, function.plans, more | {"retraction": np.array([removal.number])})
