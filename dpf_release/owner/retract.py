"""`retract`: images out of S, and their rows out of everything that the vault holds and will publish."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from dpf_release.bank.drop_rows import BEFORE, drop_rows
from dpf_release.bank.format import RELEASED_SPLITS, SPLITS, SplitName
from dpf_release.core.files import PARTIAL
from dpf_release.core.privacy import composed, epsilon_of
from dpf_release.core.progress import announce
from dpf_release.errors import ConfigError, VaultError
from dpf_release.images.table import ImageTable
from dpf_release.owner import fitted, poison
from dpf_release.owner.banks import Removal
from dpf_release.owner.fit_poison import fit_poison, unit_of
from dpf_release.owner.fitted import draws_rows, is_fitted, load_function, to_draw_again, without_rows
from dpf_release.owner.privacy import fits_of, refuse_overspending
from dpf_release.owner.private_images import drop_from_survey, splitting, table_without
from dpf_release.owner.project import Project
from dpf_release.owner.vault.ledger import releases
from dpf_release.owner.vault.retractions import Retracted, Retraction, digest_of_name, next_version, write_retracted
from dpf_release.owner.vault.vault import Vault

Line = dict[str, str]  # of ids.csv


@dataclass(frozen=True)
class RetractionReport:
    """What a retraction did.

    Attributes:
        rows: how many rows went, by split; empty where all that was asked for had gone before.
        version: the version that `package` will publish.
        rebuilt: for each candidate without these rows, how many of its rows are made of other images now.
        lost: candidates that were half written, of another bank, or with a φ2 trained on these rows, and are removed.
        redrawn: functions whose rows belong to no image: fitted again, and their rows drawn again.
    """

    rows: dict[SplitName, int]
    version: str
    rebuilt: dict[str, int]
    lost: tuple[str, ...]
    redrawn: tuple[str, ...] = ()

    @property
    def released_rows(self) -> int:
        """How many of the rows were in a split that is released."""
        return sum(count for split, count in self.rows.items() if split in RELEASED_SPLITS)


def retract(project: Project, ids: Sequence[str] = (), sources: Sequence[str] = ()) -> RetractionReport:
    """Takes images out of S: their rows out of φ1(S), the id map, every function's plan and every candidate.

    Each P stays the same. Rows that are mixed of several images are made anew where one of these was among them. All
    others keep their bytes and their order, and shards that hold neither stay as they are. `package` publishes.

    A function that draws rows is fitted again without these images, and its rows are drawn again. With a privacy bound
    that spends more of it once it is published, which is said before anything is changed; earlier versions stay public.

    A run that was cut off is finished by the next, which needs no names for it. An encrypted vault changes as a whole,
    or not at all.

    Args:
        project: the owner's.
        ids: of rows, 32 hexadecimal digits.
        sources: images as `ids.csv` names them, or by file name where only one has it; the files may be gone already.

    Raises:
        ConfigError: ids or names that no row has, all of them; a class with too few rows left for a function that mixes
            rows; a split that would have none left; a function with a bound that cannot be fitted once more within
            `[privacy]`. Nothing is changed then.
        VaultError: φ1(S) is not of today's images and network, or the vault does not open.
        StorageError: another run works in the vault, or the disk takes no more.
        RankError: there are several ranks.

    Example:
        >>> from dpf_release import Project, retract
        >>> report = retract(Project.open("my-release/dpf.toml"), sources=["disc-portrait-000.png"])
        >>> sum(report.rows.values()), report.version
        (1, '1.0.1')
    """
    project.forget("retracted", "private_images", "bank_order")
    with project.working(together=False, retracting=True), project.vault.changing(project.vault.root) as root:
        report = _retract(replace(project, vault=Vault(root)), ids, sources)  # perhaps a copy: it is read by paths
    project.forget("retracted", "private_table", "private_images", "bank_order")
    redrawn = tuple(name for name in _names(project.vault) if to_draw_again(project.vault, name))
    for name in redrawn:
        _draw_again(project, name)
    return replace(report, redrawn=redrawn)


def _retract(project: Project, ids: Sequence[str], sources: Sequence[str]) -> RetractionReport:
    """All but what is drawn again."""
    report = None if project.retracted.unfinished is None else _finish(project)
    lines = _asked_for(project, ids, sources) if ids or sources else []
    if lines:
        _begin(project, lines, sources)
        report = _finish(project)
    to_draw = any(to_draw_again(project.vault, name) for name in _names(project.vault))
    if report is None and not (ids or sources or to_draw):
        raise ConfigError("expected ids or sources of what to retract, found none, and no retraction to finish.")
    return report or RetractionReport({}, _version(project), {}, ())


def _draw_again(project: Project, name: str) -> None:
    """Fits a function and writes its candidate, by the recipe that it had; each goes on where it was cut off."""
    recipe = project.vault.read_record(project.vault.function(name) / "function.json", "fit-poison")["recipe"]
    fitting = project.with_options({f"poison.{key}": value for key, value in recipe.items()})
    if not is_fitted(project, name):
        fit_poison(fitting, name=name)
    poison.write_candidate(fitting, name)


def _refuse_overspending(project: Project, names: Sequence[str]) -> None:
    """That functions with a bound can be fitted once more; says what that will have spent."""
    for name in names:
        mechanism = load_function(project, name).chain.mechanism(unit_of(project))
        if mechanism is None:
            told = "it has no privacy bound"
        else:
            refuse_overspending(project, mechanism)
            mus = [fit.mechanism.mu for fit in fits_of(project.vault) if fit.published]
            before, after = (epsilon_of(composed(of), mechanism.delta) for of in (mus, [*mus, mechanism.mu]))
            told = (
                f"that spends privacy: published fits have epsilon = {before:.3g}, with this one they will have "
                f"{after:.3g} (delta = {mechanism.delta:g})"
            )
        announce(
            f"{name}: its rows belong to no image. It is fitted and drawn again without the retracted images; {told}. "
            "Earlier versions stay public."
        )


def read_names(path: Path) -> list[str]:
    """The names in a text file, one a line; a `ConfigError` where there is no such file, or it is no UTF-8 text."""
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


def _begin(project: Project, lines: Sequence[Line], asked: Sequence[str]) -> None:
    """Looks at all that can be refused, then notes the retraction: from there on it is gone through with."""
    after = _planned(project, lines, asked)
    removal = Removal.of(project, after)
    table = _table_after(project, lines, removal)
    fitted_ones = [name for name in _names(project.vault) if is_fitted(project, name)]
    drawn = [name for name in fitted_ones if draws_rows(project, name)]
    _refuse_overspending(project, drawn)
    for name in fitted_ones:
        if name not in drawn:
            without_rows(removal, name)
    drop_from_survey(project.vault, table, project.bank_plan["source_sha256"])
    (project.vault.features / BEFORE).unlink(missing_ok=True)  # of an earlier one that ended with this line undone
    write_retracted(project.vault, after.model_copy(update={"facts": {"source_sha256": table.digest()}}))
    project.forget("retracted", "private_table", "private_images", "bank_order")


def _planned(project: Project, lines: Sequence[Line], asked: Sequence[str]) -> Retracted:
    """The record of the retraction as it will be noted, unfinished."""
    before, made = project.retracted, releases(project.vault)
    gone = {split: sorted(int(line["row"]) for line in lines if line["split"] == split) for split in SPLITS}
    published = tuple(dict.fromkeys(release["version"] for release in made))
    retraction = Retraction(
        ids=tuple(sorted(line["id"] for line in lines)),
        asked=tuple(sorted(map(digest_of_name, asked))),
        rows={split: len(rows) for split, rows in gone.items()},
        published=published,
        published_index=made[-1].get("index_sha256") if made else None,
        version=next_version(_version(project), published),
    )
    return Retracted(
        retractions=(*before.retractions, retraction),
        sources=tuple(sorted({*before.sources, *(digest_of_name(line["source"]) for line in lines)})),
        classes=() if project.config.task.targets else tuple(project.bank_plan["names"]),
        splitting=splitting(project.config),
        bank=project.bank_id,
        unfinished={split: tuple(rows) for split, rows in gone.items()},
    )


def _version(project: Project) -> str:
    """The version that `package` publishes under."""
    return project.retracted.version_after(project.config.release.version)


def _table_after(project: Project, lines: Sequence[Line], removal: Removal) -> ImageTable:
    """S without these images; a `VaultError` where φ1(S) was made of something else than S is today."""
    plan, vault = project.bank_plan, project.vault
    table, _ = table_without(project.config, vault, removal.retracted)
    if all((table.root / line["source"]).is_file() for line in lines):
        same = table_without(project.config, vault, project.retracted)[0].digest() == plan["source_sha256"]
    else:  # deleted before they were retracted: all others are there as they were, as far as can be seen without them
        same = _has_rows(project, table, {line["id"] for line in lines}, removal)
    changed = ["the images or their labels"] * (not same)
    changed += ["the network or its hook point"] * (project.cut.featurizer_sha256 != plan["featurizer_sha256"])
    changed += ["ids.csv"] * (vault.sha256(vault.ids) != plan["ids_sha256"])
    if changed:
        raise VaultError(
            f"the features were made from something else; changed since: {', '.join(changed)}. "
            "Nothing was retracted. Put back all but the images that go, or run `dpf-release featurize --restart`."
        )
    return table


def _has_rows(project: Project, table: ImageTable, gone: Set[str], removal: Removal) -> bool:
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
    return set(row_of) <= {bad["name"] for bad in project.bank_plan["undecodable"]} and all(
        np.array_equal(table.targets[rows[split]], removal.bank(split).targets) for split in removal.kept
    )


def _finish(project: Project) -> RetractionReport:
    """All that the last retraction leaves to do; what is done already is found so, or done again."""
    vault, retracted = project.vault, project.retracted
    lost = [] if (vault.features / BEFORE).exists() else _drop_from_all_but_features(project)
    drop_rows(vault.features, retracted.ids, project.config.bank.batch_size)
    facts = retracted.facts | {"ids_sha256": vault.sha256(vault.ids)}
    write_retracted(vault, retracted.model_copy(update={"facts": facts, "unfinished": None}))
    (vault.features / BEFORE).unlink()
    project.forget("retracted", "private_table", "private_images", "bank_order")
    rows = {split: retracted.retractions[-1].rows[split] for split in SPLITS}
    rebuilt = poison.rebuilt_rows(vault, len(retracted.retractions))
    return RetractionReport(rows, _version(project), rebuilt, tuple(lost))


def _drop_from_all_but_features(project: Project) -> list[str]:
    """Every kind of member does without the rows, φ1(S) last: rows are made anew from it; which candidates are lost."""
    vault, removal = project.vault, Removal.of(project, project.retracted)
    vault.drop_ids(project.retracted.ids)
    # What attackers have trained on a bank, and the pictures that they made, may show who is to go.
    vault.remove(*vault.members(vault.root / "attackers"), *(vault.root / "attackers").glob(f"*{PARTIAL}"))
    lost = []
    for name in _names(vault):
        poison.forget_measurements(vault, name)
        fitted.drop_rows(removal, name)
        lost += [name] * (poison.drop_rows(removal, name) and not to_draw_again(vault, name))
    return lost


def _names(vault: Vault) -> list[str]:
    """Of everything that there is a function, a candidate or a report of."""
    folders = ("functions", "candidates", "reports")
    return sorted({path.name for folder in folders for path in vault.root.glob(f"{folder}/*") if path.is_dir()})
