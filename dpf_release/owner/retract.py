"""`retract`: images out of S, and their rows out of everything that the vault holds and will publish."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dpf_release.bank.drop_rows import BEFORE, drop_rows
from dpf_release.bank.format import INDEX, RELEASED_SPLITS, SPLITS, SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import RowSource
from dpf_release.core.arrays import Rows
from dpf_release.core.files import PARTIAL, sha256_of, write_json
from dpf_release.errors import BankError, ConfigError, VaultError
from dpf_release.images.table import ImageTable
from dpf_release.owner.banks import remove_bank
from dpf_release.owner.fitted import CANDIDATE, PLAN, FittedFunction, load_function, write_plans
from dpf_release.owner.poison import forget_measurements
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.retractions import Retracted, Retraction, digest_of_name, next_version, write_retracted
from dpf_release.owner.vault.vault import Vault

RowsOfSplit = dict[SplitName, Rows]
Line = dict[str, str]  # of ids.csv


@dataclass(frozen=True)
class RetractionReport:
    """What a retraction did.

    Attributes:
        rows: how many rows went, by split; empty where all that was asked for had gone before.
        version: the version that `package` will publish.
        rebuilt: for each candidate without these rows, how many of its rows are made of other images now.
        lost: candidates that were half written, or of another bank, and are removed.
    """

    rows: dict[SplitName, int]
    version: str
    rebuilt: dict[str, int]
    lost: tuple[str, ...]

    @property
    def released_rows(self) -> int:
        """How many of the rows were in a split that is released."""
        return sum(count for split, count in self.rows.items() if split in RELEASED_SPLITS)


@dataclass(frozen=True)
class KeptRows:
    """A row source without the rows that go; those that are left are numbered anew."""

    source: RowSource
    kept: Rows

    @cached_property
    def ids(self) -> NDArray[np.uint8]:
        """(N, 16) bytes."""
        return self.source.ids[self.kept]

    @cached_property
    def targets(self) -> NDArray[Any]:
        """(N,) class indices or (N, K) regression targets."""
        return self.source.targets[self.kept]

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, rows: Rows) -> NDArray[Any]:
        """Rows by number, (n, C, H, W)."""
        return self.source.read(self.kept[rows])


def retract(project: Project, ids: Sequence[str] = (), sources: Sequence[str] = ()) -> RetractionReport:
    """Takes images out of S: their rows out of φ1(S), the id map, every function's plan and every candidate.

    Each P stays the same. Rows that are mixed of several images are made anew where one of these was among them. All
    others keep their bytes and their order, and shards that hold neither stay as they are. `package` publishes.

    A run that was cut off is finished by the next, which needs no names for it. An encrypted vault changes as a whole,
    or not at all.

    Args:
        project: the owner's.
        ids: of rows, 32 hexadecimal digits.
        sources: images as `ids.csv` names them, or by file name where only one has it; the files may be gone already.

    Raises:
        ConfigError: ids or names that no row has, all of them; a class with too few rows left for a function that mixes
            rows; a split that would have none left. Nothing is changed then.
        VaultError: φ1(S) is not of today's images and network, or the vault does not open.
        StorageError: another run works in the vault, or the disk takes no more.
        RankError: there are several ranks.
    """
    project.forget("retracted", "private_images", "source_facts", "bank_order")
    with project.working(together=False, retracting=True), project.vault.changing(project.vault.root) as root:
        project = replace(
            project, vault=Vault(root)
        )  # a copy, where it is encrypted: shards and plans are read by paths
        report = None if project.retracted.unfinished is None else _finish(project)
        if ids or sources:
            lines = _asked_for(project, ids, sources)
            if lines:
                _begin(project, lines, sources)
                report = _finish(project)
            report = report or RetractionReport({}, _version(project), {}, ())
        if report is None:
            raise ConfigError("expected ids or sources of what to retract, found none, and no retraction to finish.")
        return report


def read_names(path: Path) -> list[str]:
    """The names in a text file, one a line.

    Raises:
        ConfigError: there is no such file, or it is no UTF-8 text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a text file with a name a line at {path}, found: {error}.") from error
    return [line.strip() for line in lines if line.strip()]


def _asked_for(project: Project, ids: Sequence[str], sources: Sequence[str]) -> list[Line]:
    """The lines of `ids.csv` that ids and names stand for; none for what was retracted before."""
    before = project.retracted
    wanted = {row_id.lower() for row_id in ids}
    named: dict[str, list[Line]] = {name: [] for name in sources}
    found: dict[str, Line] = {}
    for line in project.vault.read_ids():
        if line["id"] in wanted:
            found[line["id"]] = line
        for name in {line["source"], PurePosixPath(line["source"]).name} & named.keys():
            named[name].append(line)
    gone = {row_id for retraction in before.retractions for row_id in retraction.ids}
    gone_names = {digest for retraction in before.retractions for digest in retraction.asked} | {*before.sources}
    problems = [f"no row has the id {row_id}" for row_id in sorted(wanted - found.keys() - gone)]
    for name, lines in named.items():
        chosen = [line for line in lines if line["source"] == name] or lines
        if len(chosen) == 1:
            found[chosen[0]["id"]] = chosen[0]
        elif chosen:
            shown = " and ".join(line["source"] for line in chosen[:2])
            problems.append(f"{len(chosen)} images have the file name {name} ({shown}): name the path")
        elif digest_of_name(name) not in gone_names:
            problems.append(f"no row is of an image {name}")
    if problems:
        raise ConfigError(
            f"expected ids and sources that {project.vault.ids.name} has: {'; '.join(problems)}. Nothing was retracted."
        )
    return list(found.values())


# --------------------------------------------------------------------------------------------- before anything changes


def _begin(project: Project, lines: Sequence[Line], asked: Sequence[str]) -> None:
    """Looks at all that can be refused, then notes the retraction: from there on it is gone through with."""
    vault, before = project.vault, project.retracted
    gone = {split: sorted(int(line["row"]) for line in lines if line["split"] == split) for split in SPLITS}
    made = releases(vault)
    published = tuple(dict.fromkeys(release["version"] for release in made))
    retraction = Retraction(
        ids=tuple(sorted(line["id"] for line in lines)),
        asked=tuple(sorted(map(digest_of_name, asked))),
        rows={split: len(rows) for split, rows in gone.items()},
        published=published,
        published_index=made[-1].get("index_sha256") if made else None,
        version=next_version(_version(project), published),
    )
    names = tuple(project.bank_plan["names"])
    after = Retracted(
        retractions=(*before.retractions, retraction),
        sources=tuple(sorted({*before.sources, *(digest_of_name(line["source"]) for line in lines)})),
        classes=() if project.config.task.targets else names,
        splitting=project.splitting,
        bank=project.bank_id,
        unfinished={split: tuple(rows) for split, rows in gone.items()},
    )
    kept = _kept(vault, after)
    table = _table_after(project, after, lines, kept)
    for name in _fitted(project):
        _replan(project, name, kept, len(after.retractions))
    _keep_survey(project, table)
    (vault.features / BEFORE).unlink(missing_ok=True)  # of an earlier one that ended with this line undone
    write_retracted(vault, after.model_copy(update={"facts": {"source_sha256": table.digest()}}))
    project.forget("retracted", "private_table", "private_images", "source_facts", "bank_order")


def _version(project: Project) -> str:
    """The version that `package` publishes under."""
    return project.retracted.version_after(project.config.release.version)


def _kept(vault: Vault, retracted: Retracted) -> RowsOfSplit:
    """The rows that stay, by the numbers that they have had.

    Raises:
        ConfigError: a released split would have none.
        BankError: a shard is missing or damaged.
    """
    kept = {}
    for split in read_index(vault.features).splits:
        bank = FeatureBank(vault.features, split)
        kept[split] = np.setdiff1d(np.arange(len(bank.ids)), (retracted.unfinished or {}).get(split, ()))
    empty = [split for split in RELEASED_SPLITS if not len(kept.get(split, ()))]
    if empty:
        raise ConfigError(
            f"expected rows that stay in train and val, found none in {' and '.join(empty)}. Nothing was retracted. "
            "Delete the images, and make the features anew: `dpf-release featurize --restart`."
        )
    return kept


def _table_after(project: Project, after: Retracted, lines: Sequence[Line], kept: RowsOfSplit) -> ImageTable:
    """S without these images.

    Raises:
        VaultError: φ1(S) was made of something else than S is today.
    """
    plan, vault = project.bank_plan, project.vault
    table, _ = project.table_without(after)
    if all((table.root / line["source"]).is_file() for line in lines):
        same = project.table_without(project.retracted)[0].digest() == plan["source_sha256"]
    else:  # deleted before they were retracted: all others are there as they were, as far as can be seen without them
        same = _has_rows(project, table, {line["id"] for line in lines}, kept)
    changed = ["the images or their labels"] * (not same)
    changed += ["the network or its hook point"] * (project.cut.featurizer_sha256 != plan["featurizer_sha256"])
    changed += ["ids.csv"] * (sha256_of(vault.ids) != plan["ids_sha256"])
    if changed:
        raise VaultError(
            f"the features were made from something else; changed since: {', '.join(changed)}. "
            "Nothing was retracted. Put back all but the images that go, or run `dpf-release featurize --restart`."
        )
    return table


def _has_rows(project: Project, table: ImageTable, gone: Set[str], kept: RowsOfSplit) -> bool:
    """Whether a table's images are those of the rows that stay, in the same splits and with the same targets."""
    row_of = {source: row for row, source in enumerate(table.paths)}
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for line in project.vault.read_ids():
        if line["id"] in gone:
            continue
        row = row_of.pop(line["source"], None)
        if row is None or table.splits[row] != line["split"]:
            return False
        rows[line["split"]].append(row)
    banks = {split: FeatureBank(project.vault.features, split) for split in kept}
    return set(row_of) <= {bad["name"] for bad in project.bank_plan["undecodable"]} and all(
        np.array_equal(table.targets[rows[split]], bank.targets[kept[split]]) for split, bank in banks.items()
    )


def _keep_survey(project: Project, table: ImageTable) -> None:
    """Which of the images that stay cannot be read is known: they need not be looked at again."""
    path = project.vault.survey("private")
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if known.get("digest") == project.bank_plan["source_sha256"]:
        there = set(table.paths)
        write_json(path, {"digest": table.digest(), "bad": [bad for bad in known["bad"] if bad["name"] in there]})


# --------------------------------------------------------------------------------------------- rows that mix images


def _fitted(project: Project) -> Iterator[str]:
    """The names of all functions that are fitted for this bank."""
    for path in sorted(project.vault.root.glob("functions/*/function.json")):
        record = project.vault.read_record(path, "fit-poison")
        if record["fitted"] and record["for"]["bank"] == project.bank_id:
            yield path.parent.name


def _replan(project: Project, name: str, kept: RowsOfSplit, number: int) -> tuple[FittedFunction, RowsOfSplit]:
    """A function with the plans of the rows that stay, and the numbers of those that come out otherwise by them.

    The draw is the function's secret's and the retraction's number's: a run that was cut off draws the same.
    """
    function, folder = load_function(project, name), project.vault.function(name)
    known = load_file(folder / PLAN)
    if number in known.get("retraction", ()):
        return function, {split: known[f"rebuilt/{split}"] for split in RELEASED_SPLITS}
    secret = bytes.fromhex(project.vault.read_record(folder / "function.json", "fit-poison")["secret"])
    secret = hashlib.sha256(secret + b"retraction" + number.to_bytes(4)).digest()
    phi_2 = project.frozen(project.cut.split.classifier)
    plans, rebuilt = {}, {}
    for split in RELEASED_SPLITS:
        source = KeptRows(FeatureBank(project.vault.features, split), kept[split])
        try:
            plans[split], rebuilt[split] = function.chain.replan(
                function.plans[split], kept[split], source, phi_2, secret
            )
        except ConfigError as error:
            raise ConfigError(f"the function {name!r}, in {split}: {error} Nothing was retracted.") from error
    return replace(function, plans=plans), rebuilt


def _keep_plans(project: Project, name: str, function: FittedFunction, rebuilt: RowsOfSplit, number: int) -> None:
    folder = project.vault.function(name)
    planned = any(plan.pieces is not None or plan.arrays for plans in function.plans.values() for plan in plans)
    if not planned or number in load_file(folder / PLAN).get("retraction", ()):
        return
    record = project.vault.read_record(folder / "function.json", "fit-poison")
    if "fitted_plan_sha256" not in record:  # which P this is stays what it was when it was fitted
        write_json(folder / "function.json", record | {"fitted_plan_sha256": function.plan_sha256})
    more = {f"rebuilt/{split}": rows for split, rows in rebuilt.items()}
    write_plans(project.vault, folder, function.plans, more | {"retraction": np.array([number])})


# --------------------------------------------------------------------------------------------- what then changes


def _finish(project: Project) -> RetractionReport:
    """All that the last retraction leaves to do; what is done already is found so, or done again. φ1(S) goes last."""
    vault, retracted = project.vault, project.retracted
    lost: list[str] = []
    if not (vault.features / BEFORE).exists():
        _drop_ids(vault, retracted.ids)
        # What attackers have trained on a bank, and the pictures that they made, may show who is to go.
        vault.remove(*vault.members(vault.root / "attackers"), *(vault.root / "attackers").glob(f"*{PARTIAL}"))
        kept, fitted = _kept(vault, retracted), set(_fitted(project))
        for name in _names(vault):
            forget_measurements(vault, name)
            if name in fitted:
                lost += _drop_from_function(project, name, kept)
            else:
                lost += _forget_candidate(vault, name)
                _forget_half_a_function(vault, name)
    drop_rows(vault.features, retracted.ids, project.config.bank.batch_size)
    facts = retracted.facts | {"ids_sha256": sha256_of(vault.ids)}
    write_retracted(vault, retracted.model_copy(update={"facts": facts, "unfinished": None}))
    (vault.features / BEFORE).unlink()
    project.forget("retracted", "private_table", "private_images", "source_facts", "bank_order")
    rebuilt = _rebuilt(vault, len(retracted.retractions))
    rows = {split: retracted.retractions[-1].rows[split] for split in SPLITS}
    return RetractionReport(rows, _version(project), rebuilt, tuple(lost))


def _drop_ids(vault: Vault, gone: Set[bytes]) -> None:
    """Takes the lines of rows out of `ids.csv`, and numbers the others anew."""
    numbers = dict.fromkeys(map(str, SPLITS), 0)

    def lines() -> Iterator[Line]:
        for line in vault.read_ids():
            if bytes.fromhex(line["id"]) not in gone:
                yield line | {"row": str(numbers[line["split"]])}
                numbers[line["split"]] += 1

    attributes = [key for key in next(vault.read_ids()) if key not in {"id", "split", "row", "source"}]
    vault.write_ids(lines(), attributes)


def _names(vault: Vault) -> list[str]:
    """Of everything that there is a function, a candidate or a report of."""
    folders = ("functions", "candidates", "reports")
    return sorted({path.name for folder in folders for path in vault.root.glob(f"{folder}/*") if path.is_dir()})


def _drop_from_function(project: Project, name: str, kept: RowsOfSplit) -> list[str]:
    """Takes the rows out of a function's plans and its candidate; its name where it had only half a candidate."""
    number = len(project.retracted.retractions)
    function, rebuilt = _replan(project, name, kept, number)
    _keep_plans(project, name, function, rebuilt, number)
    if not _is_whole(project.vault, name):
        return _forget_candidate(project.vault, name)
    _drop_from_candidate(project, name, function, rebuilt, kept)
    return []


def _is_whole(vault: Vault, name: str) -> bool:
    """Whether a candidate was written to its end, and is whole or what a retraction that was cut off left of it."""
    record, features = vault.function(name) / CANDIDATE, vault.candidate(name) / "features"
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    indexes = [path for path in (features / BEFORE, features / INDEX) if path.is_file()]
    if known.get("index_sha256") not in {sha256_of(path) for path in indexes}:
        return False
    if (features / BEFORE).is_file():
        return True  # its shards were well before it was begun with
    try:
        return all(len(FeatureBank(features, split).ids) for split in read_index(features).splits)
    except BankError:
        return False


def _drop_from_candidate(
    project: Project, name: str, function: FittedFunction, rebuilt: RowsOfSplit, kept: RowsOfSplit
) -> None:
    vault, retracted = project.vault, project.retracted
    features, record = vault.candidate(name) / "features", vault.function(name) / CANDIDATE
    known, number = vault.read_record(record, f"poison --name {name}"), len(retracted.retractions)
    steps = known.get("retracted", [])
    if not steps or steps[-1]["number"] != number:
        banks = {split: KeptRows(FeatureBank(vault.features, split), kept[split]) for split in RELEASED_SPLITS}
        poisoned = {split: function.poisoned(split, bank) for split, bank in banks.items()}
        row_of = {bank.ids[row].tobytes(): row for split, bank in banks.items() for row in rebuilt[split]}

        def remake(split: SplitName, ids: NDArray[np.uint8]) -> NDArray[Any]:
            return poisoned[split].read(np.array([row_of[row_id.tobytes()] for row_id in ids]))

        drop_rows(features, retracted.ids, project.config.bank.batch_size, row_of.keys(), remake)
        step = {
            "number": number,
            "dropped_from": sha256_of(features / BEFORE),
            "dropped": retracted.retractions[-1].released_rows,
            "rebuilt": len(row_of),
        }
        changed = {"plan": sha256_of(vault.function(name) / PLAN), "rows": sha256_of(vault.ids)}
        update = {
            "origin": known["origin"] | changed,
            "index_sha256": sha256_of(features / INDEX),
            "retracted": [*steps, step],
        }
        write_json(record, known | update)
    (features / BEFORE).unlink(missing_ok=True)


def _forget_candidate(vault: Vault, name: str) -> list[str]:
    """Removes a candidate that cannot be published; its name, if there was one."""
    features = vault.candidate(name) / "features"
    there = any(features.glob("*/shard-*.h5*"))
    (vault.function(name) / CANDIDATE).unlink(missing_ok=True)
    remove_bank(vault, features)
    return [name] if there else []


def _forget_half_a_function(vault: Vault, name: str) -> None:
    """Removes what a function that is not fitted has drawn and learned until now: the rows that it was about go."""
    for half in ("checkpoint.safetensors", PLAN):
        (vault.function(name) / half).unlink(missing_ok=True)


def _rebuilt(vault: Vault, number: int) -> dict[str, int]:
    """For each candidate that this retraction changed, how many of its rows it rebuilt."""
    paths = vault.root.glob(f"functions/*/{CANDIDATE}")
    records = {path.parent.name: vault.read_record(path, "poison") for path in paths}
    steps = {name: record.get("retracted", []) for name, record in sorted(records.items())}
    return {name: of[-1]["rebuilt"] for name, of in steps.items() if of and of[-1]["number"] == number}
