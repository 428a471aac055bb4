"""`poison`: the candidate, P(φ1(S)) and the public weights, exactly as `package` will publish them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpf_release.bank import drop_rows as bank_rows
from dpf_release.bank.build import changed_facts, refuse_other_plan, write_bank
from dpf_release.bank.dataset import BankDataset
from dpf_release.bank.drop_rows import BEFORE
from dpf_release.bank.format import INDEX, RELEASED_SPLITS, BankIndex, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.writer import Span, SplitRows
from dpf_release.core.files import make_folder, sha256_of
from dpf_release.errors import BankError
from dpf_release.images.dataset import BadImage
from dpf_release.models.weights import state_file
from dpf_release.owner.banks import Removal, bank_facts, bank_writer, refuse_small_disk_for_bank, remove_bank
from dpf_release.owner.fitted import CANDIDATE, PLAN, FittedFunction, is_fitted, load_function, without_rows
from dpf_release.owner.measure import classifier_file, measure
from dpf_release.owner.project import Project
from dpf_release.owner.vault.vault import BANK, Vault
from dpf_release.poisoning.procedure import Procedure
from dpf_release.release.manifest import CLASSIFIER
from dpf_release.release.train import fit_classifier, score


@dataclass(frozen=True)
class PoisonResult:
    """P(φ1(S)): its index, its folder in the vault, and the images of S that have no row.

    `measurements` are what `measure` returns; of several ranks only the first has them. `pictures`, originals and
    reconstructions side by side, are private; None where there are none in the clear.
    """

    index: BankIndex
    folder: Path
    unreadable: tuple[BadImage, ...]
    measurements: dict[str, Any]
    pictures: Path | None


def poison(
    project: Project,
    *,
    name: str = "default",
    device: str | None = None,
    shard_size: str | None = None,
    restart: bool = False,
) -> PoisonResult:
    """Writes the candidate P(φ1(S)) into the vault, as `package` will publish it, and measures it.

    A run that was cut off goes on. Under `torchrun` the shards are divided among the ranks.

    Args:
        project: the owner's.
        name: which fitted function.
        device: where P computes, as `"cuda:1"`; by default as the configuration says.
        shard_size: of the bank's files at the most, as `"500 MB"`; by default as the configuration says.
        restart: write it anew; the candidate that is there is lost.

    Raises:
        VaultError: no function of that name is fitted, or it was fitted for another bank or featurizer; or the folder
            holds a candidate, or half of one, made under another plan, and `restart` is not set.
        StorageError: another run works in the vault, or the disk has not enough room.

    Example:
        >>> from dpf_release import Project, poison
        >>> candidate = poison(Project.open("my-release/dpf.toml"), name="default")
        >>> candidate.index.poisoned, candidate.measurements["val"]["task"]["top1_clean"] > 0.5
        (True, True)
    """
    project = project.with_options({"compute.device": device, "bank.shard_size": shard_size})
    index = write_candidate(project, name, restart)
    measurements = measure(project, name)
    pictures = project.vault.reports(name) / "reconstructions.png"
    shown = pictures if pictures.is_file() else None
    return PoisonResult(index, project.vault.candidate(name), project.private_images.bad, measurements, shown)


def write_candidate(project: Project, name: str = "default", restart: bool = False) -> BankIndex:
    """The first half of `poison`: the candidate, not measured."""
    with project.working():
        function = load_function(project, name)
        banks = {split: project.private_bank(split) for split in RELEASED_SPLITS}
        vault, record = project.vault, project.vault.function(name) / CANDIDATE
        plan = {"origin": candidate_origin(project, function), "bank": bank_facts(project)}
        if not restart and (index := _after_retraction(project, name, plan)):
            return index
        project.ranks.once(lambda: _begin_candidate(project, name, plan, function.chain.procedure, restart))
        sources = {split: function.poisoned(split, bank) for split, bank in banks.items()}
        rows = {split: SplitRows(source.targets, source.ids) for split, source in sources.items()}

        def compute(spans: Sequence[Span]) -> Iterator[NDArray[np.floating[Any]]]:
            for span in spans:
                yield sources[span.split].read(np.arange(span.start, span.stop))

        with vault.changing(vault.candidate(name) / "features", *BANK) as folder:
            chain = function.chain
            writer = bank_writer(project, folder, poisoned=chain.poisons, drawn=chain.draws_rows)
            index = write_bank(writer, rows, compute, project.ranks, "Poisoning", "rows")
            finished = plan | {"index_sha256": sha256_of(folder / INDEX)}
        project.ranks.once(lambda: vault.write_json(record, finished | _with_classifier(project, name)))
        return index


def _with_classifier(project: Project, name: str) -> dict[str, str]:
    """The digest of the candidate's φ2, which is trained on its rows where [network] says so."""
    if project.config.network.classifier == "from-bank":
        _train_classifier(project, name)
    return {"classifier_sha256": hashlib.sha256(classifier_file(project, name)).hexdigest()}


def _train_classifier(project: Project, name: str) -> None:
    """φ2 from the candidate's rows, `val` of it chooses the epoch: it depends on S by these alone."""
    folder, section = project.vault.candidate(name), project.config.train
    features = project.vault.opened(folder / "features", INDEX, *RELEASED_SPLITS)
    train, val = (BankDataset.open(features, split, project.output_names) for split in RELEASED_SPLITS)
    network = project.new_classifier(seed=0)
    fit_classifier(
        network,
        train,
        epochs=section.classifier_epochs,
        batch_size=section.batch_size,
        learning_rate=section.classifier_learning_rate,
        device=project.config.compute.device,
        title="Training the classifier on the released rows",
        validate=lambda: score(network, val) if val.banks[0].index.targets else 1 - score(network, val),
    )
    project.vault.write_bytes(folder / CLASSIFIER, state_file(network.cpu().state_dict()))


def _after_retraction(project: Project, name: str, plan: dict[str, Any]) -> BankIndex | None:
    """The index of a candidate from which rows were retracted: whole, and its shards not those of one written now."""
    vault, record = project.vault, project.vault.function(name) / CANDIDATE
    features = vault.candidate(name) / "features"
    known = vault.read_record(record, "poison") if vault.holds(record) else {}
    if not (known.get("retracted") and vault.holds(features / INDEX)):  # one that was forgotten is written again
        return None
    _refuse_other_candidate(name, changed_facts(known["origin"], plan["origin"]))
    return read_index(vault.opened(features, INDEX))


def _refuse_other_candidate(name: str, changed: Sequence[str]) -> None:
    anew = f"start anew with `dpf-release poison --name {name} --restart`"
    refuse_other_plan(f"the candidate {name!r}", changed, anew)


def _begin_candidate(
    project: Project, name: str, plan: dict[str, Any], procedure: Procedure | None, restart: bool
) -> None:
    vault = project.vault
    folder, record = vault.candidate(name), vault.function(name) / CANDIDATE
    known = vault.read_record(record, "poison") if vault.holds(record) else None
    if known is None or restart:
        rows = [len(project.private_bank(split)) for split in RELEASED_SPLITS]
        refuse_small_disk_for_bank(project, folder / "features", rows)
        remove_bank(vault, folder / "features")
    else:
        changed = [key for part in ("origin", "bank") for key in changed_facts(known.get(part, {}), plan[part])]
        _refuse_other_candidate(name, changed)
    forget_measurements(vault, name)  # of the candidate before
    vault.write_json(record, plan | {"index_sha256": None})
    model, cut = make_folder(folder / "model"), project.cut
    vault.write_bytes(model / "featurizer.safetensors", cut.featurizer_file)
    if project.config.network.classifier == "trained":
        vault.write_bytes(model / "classifier.safetensors", cut.classifier_file)
    if procedure is not None:
        vault.write_bytes(model / "procedure.safetensors", procedure.file())
    vault.write_json(model / "model.json", cut.public_record.model_dump(mode="json"))


def forget_measurements(vault: Vault, name: str) -> None:
    """Removes what `measure` found for a candidate."""
    vault.remove(*[vault.reports(name) / file for file in ("measurements.json", "reconstructions.png")])


def candidate_origin(project: Project, function: FittedFunction) -> dict[str, str]:
    """What a candidate is made from; `package` publishes no candidate of another origin than today's."""
    from_bank = project.config.network.classifier == "from-bank"
    return {
        "function": function.digest,
        "plan": function.plan_sha256,
        "bank": project.bank_id,
        "rows": project.vault.sha256(project.vault.ids),
        "featurizer_sha256": project.cut.featurizer_sha256,
        "classifier_sha256": "from-bank" if from_bank else hashlib.sha256(project.cut.classifier_file).hexdigest(),
        "record": project.cut.public_record.model_dump_json(),
    }


def changed_since_poison(project: Project, name: str, function: FittedFunction, index: Path) -> list[str]:
    """In what a candidate, whose `index` is in the clear, is not what today's function makes of today's features."""
    made = project.vault.read_record(project.vault.function(name) / CANDIDATE, f"poison --name {name}")
    today = candidate_origin(project, function)
    problems = [f"another {key} than today's" for key in changed_facts(made["origin"], today)]
    return problems + ["features/index.json changed since"] * (made["index_sha256"] != sha256_of(index))


def drop_rows(removal: Removal, name: str) -> bool:
    """Takes rows out of a candidate, and makes anew what it mixed of them; whether it is lost, and so removed.

    One whose φ2 was trained on its rows is written anew: φ2 has seen those that go.
    """
    vault, number = removal.project.vault, removal.number
    features, record = vault.candidate(name) / "features", vault.function(name) / CANDIDATE
    from_bank = removal.project.config.network.classifier == "from-bank"
    if from_bank or not (is_fitted(removal.project, name) and _is_whole(vault, name)):
        there = any(features.glob("*/shard-*.h5*"))
        vault.remove(record)
        remove_bank(vault, features)
        return there
    known = vault.read_record(record, f"poison --name {name}")
    steps = known.get("retracted", [])
    if not steps or steps[-1]["number"] != number:
        rebuilt = _drop_from_bank(removal, name)
        dropped = removal.retracted.retractions[-1].released_rows
        step = {"number": number, "rebuilt": rebuilt, "dropped_from": sha256_of(features / BEFORE), "dropped": dropped}
        changed = {"plan": vault.sha256(vault.function(name) / PLAN), "rows": vault.sha256(vault.ids)}
        update = {"origin": known["origin"] | changed, "index_sha256": sha256_of(features / INDEX)}
        vault.write_json(record, known | update | {"retracted": [*steps, step]})
    (features / BEFORE).unlink(missing_ok=True)
    return False


def _drop_from_bank(removal: Removal, name: str) -> int:
    """How many rows are made anew."""
    project, (function, rebuilt) = removal.project, without_rows(removal, name)
    banks = {split: removal.bank(split) for split in RELEASED_SPLITS}
    poisoned = {split: function.poisoned(split, bank) for split, bank in banks.items()}
    row_of = {bank.ids[row].tobytes(): row for split, bank in banks.items() for row in rebuilt[split]}

    def remake(split: SplitName, ids: NDArray[np.uint8]) -> NDArray[Any]:
        return poisoned[split].read(np.array([row_of[row_id.tobytes()] for row_id in ids]))

    features, batch_size = project.vault.candidate(name) / "features", project.config.bank.batch_size
    bank_rows.drop_rows(features, removal.retracted.ids, batch_size, row_of.keys(), remake)
    return len(row_of)


def _is_whole(vault: Vault, name: str) -> bool:
    """Whether a candidate was written to its end, and is whole or what a retraction that was cut off left of it."""
    record, features = vault.function(name) / CANDIDATE, vault.candidate(name) / "features"
    known = vault.read_record(record, "poison") if vault.holds(record) else {}
    indexes = (features / BEFORE, features / INDEX)
    if known.get("index_sha256") not in {sha256_of(path) for path in indexes if path.is_file()}:
        return False
    if (features / BEFORE).is_file():
        return True  # its shards were well before it was begun with
    try:
        return all(len(FeatureBank(features, split).ids) for split in read_index(features).splits)
    except BankError:
        return False


def rebuilt_rows(vault: Vault, number: int) -> dict[str, int]:
    """For each candidate that a retraction changed as its last, how many rows that made anew."""
    paths = vault.root.glob(f"functions/*/{CANDIDATE}")
    steps = {path.parent.name: vault.read_record(path, "poison").get("retracted", []) for path in sorted(paths)}
    return {name: of[-1]["rebuilt"] for name, of in steps.items() if of and of[-1]["number"] == number}
