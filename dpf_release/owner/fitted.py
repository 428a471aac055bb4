"""A fitted poisoning function, as the vault keeps it: weights and plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from dpf_release.bank.format import RELEASED_SPLITS, SplitName
from dpf_release.bank.rows import RowSource
from dpf_release.errors import VaultError
from dpf_release.models.weights import parse_state
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.chain import Chain, build_chain
from dpf_release.poisoning.plan import FeatureSpec, Plan

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
    vault: Vault,
    folder: Path,
    plans: Mapping[str, Sequence[Plan]],
    more: Mapping[str, NDArray[Any]] | None = None,
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
    if vault.holds(folder / STATE):
        chain.load(parse_state(vault.read_bytes(folder / STATE, f"fit-poison --name {name}"), folder / STATE))
    for network in chain.networks():
        project.frozen(network)
    plans = read_plans(vault, chain, bytes.fromhex(record["secret"]), folder)
    learned = [vault.sha256(folder / STATE)] if vault.holds(folder / STATE) else []
    plan_sha256 = vault.sha256(folder / PLAN)
    parts = [*learned, record.get("fitted_plan_sha256", plan_sha256)]
    digest = hashlib.sha256("".join([record["secret"], json.dumps([record["recipe"], record["for"]]), *parts]).encode())
    return FittedFunction(chain, plans, digest.hexdigest(), plan_sha256)
