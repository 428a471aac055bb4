"""`fit-poison`: the byproduct attackers on Q, then P on S."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from dpf_release.bank import FeatureBank, SplitName
from dpf_release.errors import ConfigError, ImageError, VaultError
from dpf_release.metrics import l1, ssim
from dpf_release.models.functions import Chain, FeatureSpec, Plan, RowSource, build_chain
from dpf_release.models.probes import AttributeClassifier
from dpf_release.models.reconstructors import Reconstructor, build_reconstructor
from dpf_release.models.weights import load_state, save_state
from dpf_release.pipeline.network import TargetTask
from dpf_release.pipeline.project import Project
from dpf_release.storage import make_folder, replacing, sha256_of, write_json
from dpf_release.training import Recipe, fit
from dpf_release.vault import RELEASED_SPLITS, read_record

Rows = NDArray[np.int64]
VALIDATION_ROWS = 2000  # enough for the third digit of a loss; more would cost a share of each epoch
# The identity classifier of the paper's section 4.4 is trained on people with enough pictures, none overrepresented.
ATTRIBUTE_MIN_ROWS, ATTRIBUTE_MAX_ROWS = 10, 30


# ------------------------------------------------------------------------------------- byproduct attackers


def straw_man(project: Project, name: str) -> Reconstructor:
    """ψ of that name, frozen, for this featurizer; trained on Q with L1 (section 3.1.2) and kept where missing."""
    cut, vault = project.cut, project.vault
    network = build_reconstructor(name, cut.record.feature_shape, project.config.model.size)
    path = vault.reconstructors / f"{name}.safetensors"
    if not _made_for(path, cut.featurizer_sha256):
        make_folder(vault.reconstructors)
        scores = _fit_straw_man(project, network, name)
        _keep_attacker(path, network, cut.featurizer_sha256, scores)
    network.load_state_dict(load_state(path))
    project.frozen(network)
    return network


def _fit_straw_man(project: Project, network: Reconstructor, name: str) -> dict[str, Any]:
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

    def loss(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
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
        validate=lambda: scores()["l1"],
        checkpoint=project.vault.reconstructors / f"{name}.checkpoint.safetensors",
    )
    with torch.inference_mode():
        return {"public_val": scores(), "history": asdict(history)}


@dataclass(frozen=True, eq=False)
class AttributeAttacker:
    """A classifier of an attribute from features, and which rows it can be asked about.

    Attributes:
        network: frozen; features → scores of `values`.
        values: the attribute's values that it knows.
    """

    network: AttributeClassifier
    values: tuple[str, ...]


def attribute_classifier(project: Project, column: str) -> AttributeAttacker:
    """The byproduct attacker of section 4.4, trained on φ1(S train) and kept in the vault where missing.

    It knows the values of an attribute column with at least 10 rows, and learns from at most 30 of each.

    Raises:
        ImageError: the private images have no such column, or it has fewer than two such values.
    """
    table, cut = project.private_images.table, project.cut
    if column not in table.attributes:
        raise ImageError(
            f"expected an attribute column {column!r} (confuse), found {sorted(table.attributes) or 'none'}."
        )
    bank = FeatureBank(project.vault.features, "train")
    labels = attribute_of_rows(project, column, "train")
    values, counts = np.unique(labels, return_counts=True)
    values = values[(counts >= ATTRIBUTE_MIN_ROWS) & (values != "")]
    if len(values) < 2:
        raise ImageError(
            f"expected two values of {column!r} with {ATTRIBUTE_MIN_ROWS} train images, found {len(values)}."
        )
    network = AttributeClassifier(cut.record.feature_shape, len(values))
    path = project.vault.reconstructors / f"attribute-{column}.safetensors"
    if not _made_for(path, cut.featurizer_sha256):
        make_folder(project.vault.reconstructors)
        scores = _fit_attribute_classifier(project, network, bank, labels, values)
        _keep_attacker(path, network, cut.featurizer_sha256, scores)
    network.load_state_dict(load_state(path))
    project.frozen(network)
    return AttributeAttacker(network, tuple(values))


def _fit_attribute_classifier(
    project: Project,
    network: nn.Module,
    bank: FeatureBank,
    labels: NDArray[np.str_],
    values: NDArray[np.str_],
) -> dict[str, Any]:
    # The bank's order is random, so the first rows of a person are a random choice of them.
    rows = np.concatenate([np.flatnonzero(labels == value)[:ATTRIBUTE_MAX_ROWS] for value in values])
    classes = np.searchsorted(values, labels[rows])

    def read_batch(chosen: Rows, generator: np.random.Generator) -> tuple[Tensor, ...]:
        return torch.from_numpy(bank.read(rows[chosen])), torch.from_numpy(classes[chosen])

    def loss(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        scores = network(batch[0].float()).float()
        return {
            "loss": F.cross_entropy(scores, batch[1]),
            "top1": (scores.argmax(1) == batch[1]).float().mean(),
        }

    section = project.config.reconstructor
    batch_size = min(section.batch_size, len(rows))
    recipe = Recipe(
        3 * section.epochs,
        batch_size,
        section.learning_rate,
        weight_decay=1e-4,
        bf16=project.config.compute.bf16,
    )
    history = fit(
        network,
        len(rows),
        read_batch,
        loss,
        recipe,
        title="Training the attribute classifier",
        device=project.device,
    )
    return {"values": len(values), "rows": len(rows), "history": asdict(history)}


def attribute_of_rows(project: Project, column: str, split: str) -> NDArray[np.str_]:
    """The attribute of each bank row of a split, (N,) texts."""
    rows, _ = project.bank_order
    values = project.private_images.table.attributes[column]
    return np.array([values[row] for row in rows[split]])


def _made_for(path: Any, featurizer_sha256: str) -> bool:
    record = path.with_suffix(".json")
    return (
        path.is_file() and record.is_file() and json.loads(record.read_text())["featurizer_sha256"] == featurizer_sha256
    )


def _keep_attacker(path: Any, network: nn.Module, featurizer_sha256: str, facts: dict[str, Any]) -> None:
    with replacing(path) as partial:
        save_state(partial, network.state_dict())
    write_json(path.with_suffix(".json"), {"featurizer_sha256": featurizer_sha256, **facts})
    path.with_suffix(".checkpoint.safetensors").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- poisoning functions


@dataclass(frozen=True, eq=False)
class FittedFunction:
    """P as the vault keeps it.

    Attributes:
        chain: its stages, the learned one with its weights.
        plans: for each split, one plan a stage.
        digest: changes with anything that changes a poisoned row.
    """

    chain: Chain
    plans: dict[str, list[Plan]]
    digest: str

    def poisoned(self, split: SplitName, bank: RowSource) -> RowSource:
        """A split's bank as P leaves it."""
        return self.chain.on(bank, self.plans[split])


def fit_poison(project: Project, name: str = "default", restart: bool = False) -> dict[str, Any]:
    """Fits the configured poisoning function and keeps it in the vault under a name.

    The straw men, and the attribute classifiers of `confuse`, are trained first where the vault has none. A stationary
    function is only planned. A run that was cut off goes on from its checkpoint.

    Returns:
        The last entry of the training's history; empty for a stationary function.

    Raises:
        VaultError: a function of that name is fitted already and `restart` is not set, or there is no φ1(S).
        ConfigError: no such function, parameter or reconstructor.
    """
    section, cut = project.config.poison, project.cut
    folder = project.vault.function(name)
    banks = {split: private_bank(project, split) for split in RELEASED_SPLITS}
    spec = FeatureSpec(cut.record.feature_shape, cut.split.non_negative)
    wanted = section.model_dump(by_alias=True, mode="json") | {"featurizer_sha256": cut.featurizer_sha256}
    secret = _secret(folder, wanted, restart)
    seed = int.from_bytes(hashlib.sha256(secret + b"training").digest()[:8]) >> 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the start of P is as secret as P
        chain = build_chain(section.function, spec)
    for straw in section.straw_men:
        straw_man(project, straw)
    phi_2 = project.frozen(cut.split.classifier)
    plans = {split: chain.plan(bank, phi_2, secret) for split, bank in banks.items()}
    last: dict[str, Any] = {}
    if chain.learned is not None:
        last = _fit_learned(project, chain, plans, banks, seed, folder)
        with replacing(folder / "dpf.safetensors") as partial:
            save_state(partial, chain.learned.state_dict())
    arrays = {
        f"{split}/{stage}/{key}": array
        for split, made in plans.items()
        for stage, plan in enumerate(made)
        for key, array in (plan.arrays | ({} if plan.pieces is None else {"pieces": plan.pieces})).items()
    }
    with replacing(folder / "plan.safetensors") as partial:
        save_file(arrays, partial)
    record = json.loads((folder / "function.json").read_text(encoding="utf-8"))
    write_json(folder / "function.json", record | {"fitted": True})
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    return last


def load_function(project: Project, name: str) -> FittedFunction:
    """A fitted function from the vault.

    Raises:
        VaultError: there is none of that name, or it was fitted for another featurizer.
    """
    folder, cut = project.vault.function(name), project.cut
    record = read_record(folder / "function.json", f"fit-poison --name {name}")
    if not record.get("fitted"):
        raise VaultError(f"the function {name!r} is not fitted to the end. Run `dpf-release fit-poison --name {name}`.")
    if record["recipe"]["featurizer_sha256"] != cut.featurizer_sha256:
        raise VaultError(
            f"the function {name!r} was fitted for another featurizer or hook point. Fit it again: "
            f"`dpf-release fit-poison --name {name} --restart`."
        )
    chain = build_chain(record["recipe"]["function"], FeatureSpec(cut.record.feature_shape, cut.split.non_negative))
    if chain.learned is not None:
        chain.learned.load_state_dict(load_state(folder / "dpf.safetensors"))
        project.frozen(chain.learned)
    arrays = load_file(folder / "plan.safetensors")
    secret = bytes.fromhex(record["secret"])
    plans: dict[str, list[Plan]] = {}
    for split in RELEASED_SPLITS:
        plans[split] = []
        for stage in range(len(chain.stages)):
            prefix = f"{split}/{stage}/"
            mine = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            plans[split].append(Plan(chain.stage_secret(secret, stage), mine.pop("pieces", None), mine))
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.stem in {"dpf", "plan"}]
    digest = hashlib.sha256("".join([record["secret"], json.dumps(record["recipe"]), *map(sha256_of, files)]).encode())
    return FittedFunction(chain, plans, digest.hexdigest())


def private_bank(project: Project, split: SplitName) -> FeatureBank:
    """One split of φ1(S).

    Raises:
        VaultError: it was made by another featurizer.
    """
    bank = FeatureBank(project.vault.features, split)
    if bank.index.featurizer_sha256 != project.cut.featurizer_sha256:
        raise VaultError(
            f"{project.vault.features} was made by another network or at another hook point. "
            "Run `dpf-release featurize --restart`."
        )
    return bank


def _secret(folder: Any, recipe: dict[str, Any], restart: bool) -> bytes:
    """The function's 32 secret bytes: drawn from the operating system at its first fitting, kept for its resumes."""
    path = folder / "function.json"
    if path.is_file() and not restart:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["recipe"] == recipe and not known["fitted"]:
            return bytes.fromhex(known["secret"])
        state = "is fitted already" if known["fitted"] else "was begun with other settings"
        raise VaultError(
            f"the function {folder.name!r} {state}. Give another --name, or fit it anew with --restart (it is lost)."
        )
    make_folder(folder)
    for name in ("checkpoint", "dpf", "plan"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    secret = os.urandom(32)
    write_json(path, {"recipe": recipe, "secret": secret.hex(), "fitted": False})
    return secret


def _fit_learned(
    project: Project,
    chain: Chain,
    plans: dict[SplitName, list[Plan]],
    banks: dict[SplitName, FeatureBank],
    seed: int,
    folder: Any,
) -> dict[str, Any]:
    section = project.config.poison
    network = chain.learned
    assert network is not None
    read = {split: _batch_reader(project, chain, plans[split], split, bank) for split, bank in banks.items()}
    objective = Objective.of(project)
    val = np.arange(min(len(banks["val"]), VALIDATION_ROWS))

    def loss(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return objective(network, batch)

    def validate() -> float:
        total = 0.0
        for start in range(0, len(val), 256):
            rows = val[start : start + 256]
            batch = tuple(tensor.to(project.device) for tensor in read["val"](rows))
            total += float(loss(batch)["loss"]) * len(rows)
        return total / len(val)

    recipe = Recipe(
        section.epochs, section.batch_size, section.learning_rate, seed=seed, bf16=project.config.compute.bf16
    )
    history = fit(
        network,
        len(banks["train"]),
        lambda rows, _: read["train"](rows),
        loss,
        recipe,
        title=f"Training the poisoning function {folder.name}",
        device=project.device,
        validate=validate if len(val) else None,
        checkpoint=folder / "checkpoint.safetensors",
    )
    write_json(folder / "history.json", asdict(history))
    return history.epochs[history.best_epoch]


def _batch_reader(
    project: Project, chain: Chain, plans: list[Plan], split: str, bank: FeatureBank
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


class Objective:
    """What P minimises: its task term, and λ times the mean of the byproduct attackers' terms.

    `paper` (Eq. 7): the task loss on the true targets, and SSIM(ψ(P(f)), x). `equivalence`, the default:
    KL(φ2(f) ‖ φ2(P(f))), for regression their squared difference, and |SSIM|, whose least value is a picture that has
    nothing of x, not its negative. An attribute classifier's term is the cross entropy towards labels drawn anew at
    each step (section 4.4), for both.
    """

    def __init__(
        self,
        phi_2: nn.Module,
        task: TargetTask,
        reconstructors: dict[str, Reconstructor],
        classifiers: dict[str, AttributeAttacker],
        equivalence: bool,
        lambda_: float,
    ) -> None:
        self.phi_2, self.task, self.reconstructors, self.classifiers = (
            phi_2,
            task,
            reconstructors,
            classifiers,
        )
        self.equivalence, self.lambda_ = equivalence, lambda_

    @classmethod
    def of(cls, project: Project) -> Objective:
        """The configured objective.

        Raises:
            ConfigError: no byproduct attacker is named.
        """
        section = project.config.poison
        if not section.straw_men and not section.confuse:
            raise ConfigError("expected a byproduct attacker under [poison] straw_men or confuse, found none.")
        return cls(
            project.frozen(project.cut.split.classifier),
            TargetTask.of(project),
            {name: straw_man(project, name) for name in section.straw_men},
            {column: attribute_classifier(project, column) for column in section.confuse},
            section.objective == "equivalence",
            section.lambda_,
        )

    def __call__(self, network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The loss of a batch of `_batch_reader`, with its parts."""
        features, seen, targets, positions, pictures = batch
        poisoned = network(features.contiguous(memory_format=torch.channels_last))
        outputs = self.phi_2(poisoned).float()
        task = self._task_term(outputs, seen, targets)
        terms = dict(self._byproduct_terms(poisoned, positions, pictures))
        byproduct = torch.stack(list(terms.values())).mean()
        return {"loss": task + self.lambda_ * byproduct, "task": task, **terms}

    def _task_term(self, outputs: Tensor, seen: Tensor, targets: Tensor) -> Tensor:
        if not self.equivalence:
            return self.task.loss(outputs, targets)
        with torch.no_grad():
            wanted = self.phi_2(seen.contiguous(memory_format=torch.channels_last)).float()
        if self.task.scale is None:
            return F.kl_div(outputs.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
        scale = self.task.scale.to(outputs.device)
        return F.mse_loss(outputs / scale, wanted / scale)

    def _byproduct_terms(self, poisoned: Tensor, positions: Tensor, pictures: Tensor) -> Iterator[tuple[str, Tensor]]:
        originals = pictures.float() / 255
        for name, reconstructor in self.reconstructors.items():
            likeness = ssim(reconstructor(poisoned).float()[positions], originals)  # one for each contributor
            yield f"ssim {name}", likeness.abs().mean() if self.equivalence else likeness.mean()
        for column, attacker in self.classifiers.items():
            scores = attacker.network(poisoned).float()
            random = torch.randint(len(attacker.values), (len(scores),), device=scores.device)
            yield f"confusion {column}", F.cross_entropy(scores, random)
