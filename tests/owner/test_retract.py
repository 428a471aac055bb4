"""What is retracted is in no later version; all else is as it was, to the byte; and a run that is cut off goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bare_banks import digests, files_with, leftovers, without_shards
from commands import killed, run_cli
from dpf_release import Release
from dpf_release.bank.drop_rows import BEFORE, drop_rows
from dpf_release.bank.format import SplitName, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.bank.rows import Select
from dpf_release.core.files import sha256_of
from dpf_release.core.ranks import Ranks
from dpf_release.errors import BankError, ConfigError, RankError, RefusedError, VaultError
from dpf_release.images.read import Earlier, read_table
from dpf_release.owner.featurize import featurize
from dpf_release.owner.fit_poison import fit_poison
from dpf_release.owner.fitted import load_function
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.owner.retract import retract
from dpf_release.owner.vault.retractions import RETRACTED, next_version
from dpf_release.owner.vault.vault import Vault
from dpf_release.poisoning.interface import FUNCTIONS
from dpf_release.publish.package import package
from dpf_release.release.verify import verify
from rows_in_memory import PHI_2, SECRET, Recorder, planned, rows_of
from small_banks import SHAPE, write_bank

Rows = NDArray[np.int64]


def open_project(folder: Path, **overrides: Any) -> Project:
    return Project.open(folder / "dpf.toml", {key.replace("__", "."): value for key, value in overrides.items()})


def lines_of(folder: Path, split: str = "train") -> list[dict[str, str]]:
    return [line for line in Vault(folder / "vault").read_ids() if line["split"] == split]


def rows_in(features: Path, split: SplitName) -> dict[str, bytes]:
    """Returns id → the bytes of the row as it is stored, in the order of the bank."""
    bank = FeatureBank(features, split).before_relu()
    return {row_id.tobytes().hex(): row.tobytes() for row_id, row in zip(bank.ids, bank[:][0], strict=True)}


def shards_with(features: Path, ids: set[str]) -> set[str]:
    """Returns the shards that hold one of these rows, with their split."""
    shards = set()
    for split in read_index(features).splits:
        names, bank = list(rows_in(features, split)), FeatureBank(features, split)
        starts = np.cumsum([0, *(record.rows for record in bank.index.splits[split])])
        for record, start, stop in zip(bank.index.splits[split], starts[:-1], starts[1:], strict=True):
            if ids & set(names[start:stop]):
                shards.add(record.file)
    return shards


def assert_same_but_for(before: dict[str, bytes], after: dict[str, bytes], gone: set[str]) -> None:
    kept = {row_id: row for row_id, row in before.items() if row_id not in gone}
    assert list(after) == list(kept)
    assert after == kept


# ------------------------------------------------------------------------------------------ rows that are only dropped


def to_retract(folder: Path) -> list[dict[str, str]]:
    """Two rows of train and one of val."""
    return [lines_of(folder)[3], lines_of(folder)[40], lines_of(folder, "val")[0]]


@pytest.fixture(scope="module")
def without_three(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared project after `to_retract` was retracted and the next version published; nobody may change it."""
    project_folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("retracted") / "shapes"))
    release, gone = project_folder / "release", to_retract(project_folder)
    report = retract(open_project(project_folder), [gone[0]["id"].upper()], [line["source"] for line in gone[1:]])
    assert (report.rows, report.version) == ({"train": 2, "val": 1, "test": 0}, "1.0.1")
    assert (report.rebuilt, report.lost) == ({"default": 0}, ())
    assert json.loads((release / "manifest.json").read_text())["version"] == "1.0.0"  # `package` alone publishes
    package(open_project(project_folder))
    return project_folder


def test_the_next_version_has_all_rows_but_the_retracted_ones_and_every_other_shard_byte_for_byte(
    finished: Path, without_three: Path
) -> None:
    release, features = without_three / "release", without_three / "release" / "features"
    ids = {line["id"] for line in to_retract(finished)}
    before = {split: rows_in(finished / "release" / "features", split) for split in ("train", "val")}
    files, touched = digests(finished / "release" / "features"), shards_with(finished / "release" / "features", ids)
    private_files = digests(finished / "vault" / "features")
    private_touched = shards_with(finished / "vault" / "features", ids)

    manifest = Release.open(release).manifest
    assert (manifest.version, manifest.previous) == ("1.0.1", sha256_of(finished / "release" / "manifest.json"))
    assert verify(release) == []
    for split in ("train", "val"):
        assert_same_but_for(before[split], rows_in(features, split), ids)
    now = digests(features)
    assert {name for name in files if now.get(name) != files[name]} == {*touched, "index.json"}
    assert len(touched) == 3
    now = digests(without_three / "vault" / "features")
    assert {name for name in private_files if now.get(name) != private_files[name]} == {*private_touched, "index.json"}
    assert len(lines_of(without_three)) == len(before["train"]) - 2
    assert [int(line["row"]) for line in lines_of(without_three)] == list(range(len(before["train"]) - 2))
    assert leftovers(without_three) == []


def test_no_byte_of_a_retracted_row_is_left_and_an_innocent_one_is(finished: Path, without_three: Path) -> None:
    vault, release = without_three / "vault", without_three / "release"
    gone, innocent = to_retract(finished)[0], lines_of(finished)[6]
    public = rows_in(finished / "release" / "features", "train")
    private = rows_in(finished / "vault" / "features", "train")

    def where(line: dict[str, str]) -> dict[str, list[str]]:
        (vault / RETRACTED).rename(without_three / RETRACTED)  # it alone may know the id
        found = {
            "id": files_with(vault, bytes.fromhex(line["id"])) + files_with(release, bytes.fromhex(line["id"])),
            "hex": files_with(vault, line["id"].encode()),
            "name": files_with(vault, line["source"].encode()),
            "public": files_with(vault, public[line["id"]]) + files_with(release, public[line["id"]]),
            "private": files_with(vault, private[line["id"]]),
        }
        (without_three / RETRACTED).rename(vault / RETRACTED)
        return found

    assert where(gone) == {"id": [], "hex": [], "name": [], "public": [], "private": []}
    assert all(where(innocent).values())
    assert gone["source"] not in (vault / RETRACTED).read_text()


def test_a_shard_without_rows_goes_and_the_others_keep_their_numbers(project_folder: Path) -> None:
    features = project_folder / "release" / "features"
    bank, before, files = FeatureBank(features, "train"), rows_in(features, "train"), digests(features)
    first, second = (record.rows for record in bank.index.splits["train"][:2])
    ids = list(before)[first : first + second]
    retract(open_project(project_folder), ids)
    package(open_project(project_folder))
    assert "train/shard-00001.h5" not in digests(features)
    assert not (project_folder / "vault" / "candidates" / "default" / "features" / "train" / "shard-00001.h5").exists()
    assert files.items() - digests(features).items() == {
        ("index.json", files["index.json"]),
        ("train/shard-00001.h5", files["train/shard-00001.h5"]),
    }
    assert_same_but_for(before, rows_in(features, "train"), set(ids))
    dataset = Release.open(project_folder / "release").bank("train")
    assert len(dataset) == len(before) - second
    assert dataset[first][0].numpy().astype("<f2").tobytes() == list(before.values())[first + second]


@pytest.mark.slow
def test_no_version_is_published_twice_and_the_card_says_what_was_retracted_and_what_comparing_shows(
    project_folder: Path,
) -> None:
    card, train = project_folder / "release" / "README.md", lines_of(project_folder)
    assert package(open_project(project_folder)).version == "1.0.0"  # the control: the same rows, the same version
    assert "etracted" not in card.read_text()
    assert retract(open_project(project_folder), [train[0]["id"]]).version == "1.0.1"
    assert retract(open_project(project_folder), [train[1]["id"]]).version == "1.0.1"  # 1.0.1 is not out yet
    assert package(open_project(project_folder)).version == "1.0.1"
    text = " ".join(card.read_text().split())
    assert "not in this one: 2 retracted since 1.0.0." in text
    assert "All other rows are, bit for bit, those of 1.0.0; rows were only dropped, and what attacks on 1.0.0" in text
    assert "Comparing two versions shows which rows were retracted." in text
    published = digests(project_folder / "release")
    assert package(open_project(project_folder)).version == "1.0.1"
    assert digests(project_folder / "release") == published
    assert retract(open_project(project_folder), [train[2]["id"]]).version == "1.0.2"
    assert package(open_project(project_folder, release__version="1.0.1")).version == "1.0.2"
    text = " ".join(card.read_text().split())
    assert "not in this one: 2 retracted since 1.0.0, 1 retracted since 1.0.1." in text
    assert "bit for bit, those of 1.0.1" in text
    assert package(open_project(project_folder, release__version="2.0.0")).version == "2.0.0"


@pytest.mark.parametrize(
    ("version", "published", "expected"),
    [
        ("1.0.0", ["1.0.0"], "1.0.1"),
        ("1.0.0", ["1.0.0", "1.0.1", "1.0.2"], "1.0.3"),
        ("1.0.9", ["1.0.9"], "1.0.10"),
        ("2024-09", ["2024-09"], "2024-10"),
        ("first", ["first"], "first.1"),
        ("1.1.0", ["1.0.0"], "1.1.0"),
    ],
)
def test_the_next_version_raises_the_last_number(version: str, published: list[str], expected: str) -> None:
    assert next_version(version, published) == expected


def test_rows_of_test_go_from_the_vault_and_no_version_changes(project_folder: Path) -> None:
    before = digests(project_folder / "release" / "features")
    gone = lines_of(project_folder, "test")[0]
    report = retract(open_project(project_folder), [gone["id"]])
    assert (report.rows["test"], report.released_rows, report.version) == (1, 0, "1.0.0")
    assert gone["id"] not in rows_in(project_folder / "vault" / "features", "test")
    assert package(open_project(project_folder)).version == "1.0.0"
    assert digests(project_folder / "release" / "features") == before
    assert "etracted" not in (project_folder / "release" / "README.md").read_text()


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("targets", [None, np.arange(20).reshape(10, 2) / 8])
def test_rows_are_dropped_and_made_anew_in_any_bank_that_can_be_written(
    tmp_path: Path, compression: str, targets: NDArray[Any] | None
) -> None:
    write_bank(tmp_path / "bank", 10, targets, compression=compression)  # four rows a shard
    before, files = FeatureBank(tmp_path / "bank", "train"), digests(tmp_path / "bank")
    features, labels, ids = before[:][0], before.targets, before.ids
    with pytest.raises(BankError, match="do not fit float16"):
        drop_rows(tmp_path / "bank", set(), 3, {ids[9].tobytes()}, lambda split, ids: np.full((len(ids), *SHAPE), 1e6))
    assert not (tmp_path / "bank" / "index.json").exists()

    def remake(split: SplitName, wanted: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert (split, wanted.tobytes()) == ("train", ids[9].tobytes())
        return np.full((1, *SHAPE), 0.5, np.float32)

    index = drop_rows(tmp_path / "bank", {ids[1].tobytes(), ids[2].tobytes()}, 3, {ids[9].tobytes()}, remake)
    assert index == read_index(tmp_path / "bank")
    assert [record.rows for record in index.splits["train"]] == [2, 4, 2]
    assert digests(tmp_path / "bank")["train/shard-00001.h5"] == files["train/shard-00001.h5"]
    assert {record.file: record.sha256 for record in index.splits["train"]}.items() <= digests(
        tmp_path / "bank"
    ).items()
    kept, after = [0, 3, 4, 5, 6, 7, 8, 9], FeatureBank(tmp_path / "bank", "train")
    features[9] = 0.5
    assert np.array_equal(after[:][0], features[kept])
    assert np.array_equal(after.targets, labels[kept])
    assert np.array_equal(after.ids, ids[kept])


# --------------------------------------------------------------------------------------------- what is refused


def test_all_unknown_ids_and_names_are_told_at_once_and_nothing_is_done(project_folder: Path) -> None:
    ids = project_folder / "vault" / "ids.csv"
    known = lines_of(project_folder)[0]
    twice = "elsewhere/" + known["source"].split("/")[1]
    ids.write_text(ids.read_text() + f"{'0' * 32},train,999,{twice}\n")
    before = digests(project_folder)
    name = known["source"].split("/")[1]
    with pytest.raises(ConfigError) as caught:
        retract(open_project(project_folder), ["f" * 32, known["id"]], ["nobody.png", name])
    for problem in (f"the id {'f' * 32}", "no row is of an image nobody.png", f"2 images have the file name {name}"):
        assert problem in str(caught.value)
    assert known["id"] not in str(caught.value)
    with pytest.raises(VaultError, match=r"changed since: ids\.csv"):  # by its whole path it is one image
        retract(open_project(project_folder), [], [known["source"]])
    assert digests(project_folder) == before


def test_what_was_retracted_before_is_no_mistake_and_changes_nothing(project_folder: Path) -> None:
    gone = lines_of(project_folder)[0]
    name = gone["source"].split("/")[1]
    assert retract(open_project(project_folder), [], [name]).rows["train"] == 1
    before = digests(project_folder)
    for arguments in (([gone["id"]], []), ([], [gone["source"]]), ([], [name])):
        report = retract(open_project(project_folder), *arguments)
        assert (report.rows, report.version) == ({}, "1.0.1")
    with pytest.raises(ConfigError, match="expected ids or sources"):
        retract(open_project(project_folder))
    assert digests(project_folder) == before


def test_a_split_that_would_be_empty_is_refused(project_folder: Path) -> None:
    before, val = digests(project_folder), [line["id"] for line in lines_of(project_folder, "val")]
    with pytest.raises(ConfigError, match="found none in val"):
        retract(open_project(project_folder), val)
    assert digests(project_folder) == before
    assert retract(open_project(project_folder), val[1:]).rows["val"] == len(val) - 1


def test_several_ranks_are_refused(project_folder: Path) -> None:
    project = replace(open_project(project_folder), ranks=Ranks(0, 2))
    with pytest.raises(RankError, match="one process"):
        retract(project, [lines_of(project_folder)[0]["id"]])


# --------------------------------------------------------------------------------------------- S, before and after


def _others(folder: Path, gone: dict[str, str]) -> dict[str, str]:
    return {line["source"]: line["split"] for line in Vault(folder / "vault").read_ids() if line != gone}


@pytest.mark.parametrize("first", ["the image", "the row"])
def test_the_image_may_be_deleted_before_or_after(project_folder: Path, first: str) -> None:
    gone = lines_of(project_folder)[0]
    image, splits = project_folder / "images" / "private" / gone["source"], _others(project_folder, gone)
    if first == "the image":
        image.unlink()
    retract(open_project(project_folder), [], [gone["source"]])
    image.unlink(missing_ok=True)
    assert {line["source"]: line["split"] for line in Vault(project_folder / "vault").read_ids()} == splits
    table = open_project(project_folder).private_images.table
    assert {path: str(split) for path, split in zip(table.paths, table.splits, strict=True) if path in splits} == splits
    write_candidate(open_project(project_folder))
    assert package(open_project(project_folder)).version == "1.0.1"
    assert retract(open_project(project_folder), [lines_of(project_folder)[0]["id"]]).rows["train"] == 1


@pytest.mark.parametrize("deleted_before", [True, False])
def test_a_retraction_does_not_hide_that_other_images_changed(project_folder: Path, deleted_before: bool) -> None:
    gone, other = lines_of(project_folder)[:2]
    private = project_folder / "images" / "private"
    if deleted_before:
        (private / gone["source"]).unlink()
    (private / other["source"]).rename(project_folder / "aside.png")
    with pytest.raises(VaultError, match="changed since: the images or their labels"):
        retract(open_project(project_folder), [gone["id"]])
    assert not (project_folder / "vault" / RETRACTED).exists()
    (project_folder / "aside.png").rename(private / other["source"])
    assert retract(open_project(project_folder), [gone["id"]]).rows["train"] == 1


def test_features_and_candidates_made_anew_leave_out_what_was_retracted(
    project_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = lines_of(project_folder)[0]
    splits = _others(project_folder, gone)
    retract(open_project(project_folder), [gone["id"]])
    whole = digests(project_folder / "vault" / "candidates")
    write_candidate(open_project(project_folder))  # whole already, though its shards are not those of a new one
    featurize(open_project(project_folder))
    assert digests(project_folder / "vault" / "candidates") == whole
    assert "left out, retracted: 1 images" in capsys.readouterr().err
    write_candidate(open_project(project_folder), restart=True)
    package(open_project(project_folder))
    assert gone["id"] not in rows_in(project_folder / "release" / "features", "train")
    assert "Its bank was written anew" in (project_folder / "release" / "README.md").read_text()
    featurize(open_project(project_folder), restart=True)
    assert {line["source"]: line["split"] for line in Vault(project_folder / "vault").read_ids()} == splits
    assert open_project(project_folder).private_bank("train")  # also in the next run
    (project_folder / "vault" / RETRACTED).unlink()
    with pytest.raises(VaultError, match="made from something else"):  # the control
        open_project(project_folder).private_bank("train")


def test_a_candidate_from_a_backup_is_not_published(project_folder: Path) -> None:
    vault = project_folder / "vault"
    parts = [Path("candidates/default/features"), Path("functions/default")]
    for part in parts:
        shutil.copytree(vault / part, project_folder / "backup" / part)
    retract(open_project(project_folder), [lines_of(project_folder)[0]["id"]])
    record = vault / "functions" / "default" / "candidate.json"
    origin = json.loads(record.read_text())["origin"]
    for part in parts:
        shutil.rmtree(vault / part)
        shutil.copytree(project_folder / "backup" / part, vault / part)
    with pytest.raises(RefusedError, match="another rows than today's"):
        package(open_project(project_folder))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"origin": origin}))
    with pytest.raises(RefusedError, match="has rows that were retracted"):
        package(open_project(project_folder))


def test_half_a_candidate_and_half_a_function_do_not_keep_the_rows(project_folder: Path) -> None:
    vault = project_folder / "vault"
    without_shards(vault / "candidates" / "default" / "features", keep=4)
    shutil.copytree(vault / "functions" / "default", vault / "functions" / "half")
    record = vault / "functions" / "half" / "function.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fitted": False}))
    (vault / "functions" / "half" / "checkpoint.safetensors").write_bytes(b"half")
    report = retract(open_project(project_folder), [lines_of(project_folder)[0]["id"]])
    assert (report.rebuilt, report.lost) == ({}, ("default",))
    assert not list((vault / "candidates" / "default" / "features").rglob("*.h5"))
    assert not (vault / "functions" / "half" / "checkpoint.safetensors").exists()
    assert not list((vault / "reports").rglob("*.*"))  # figures may show the person
    write_candidate(open_project(project_folder))
    assert package(open_project(project_folder)).version == "1.0.1"


def test_splits_and_classes_stay_when_their_images_go(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / "s" / ("a" if number < 37 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    before = read_table(tmp_path / "s", task="classification")
    known = {path: str(split) for path, split in zip(before.paths, before.splits, strict=True)}
    shutil.rmtree(tmp_path / "s" / "b")
    (tmp_path / "s" / "a" / "0.png").unlink()
    after = read_table(tmp_path / "s", task="classification", earlier=Earlier(("a", "b"), known))
    assert after.classes == ("a", "b")
    assert all(known[path] == split for path, split in zip(after.paths, after.splits, strict=True))
    anew = read_table(tmp_path / "s", task="classification")
    assert anew.classes == ("a",)
    assert any(known[path] != split for path, split in zip(anew.paths, anew.splits, strict=True))


def test_an_image_without_a_known_split_goes_with_its_group(tmp_path: Path) -> None:
    text = "path,label,person\n" + "".join(f"{n}.png,{'ab'[n % 2]},p{n // 4}\n" for n in range(40))
    (tmp_path / "s.csv").write_text(text)
    before = read_table(tmp_path / "s.csv", task="classification", group_column="person")
    splits = {path: str(split) for path, split in zip(before.paths, before.splits, strict=True)}
    unknown = next(path for path, split in splits.items() if split == "test")
    known = {path: split for path, split in splits.items() if path != unknown}
    after = read_table(
        tmp_path / "s.csv", task="classification", group_column="person", earlier=Earlier(("a", "b"), known)
    )
    assert np.array_equal(after.splits, before.splits)


# --------------------------------------------------------------------------------------------- rows that mix images


def mixed(folder: Path, spec: str) -> str:
    """Fits a function that mixes rows, writes its candidate and publishes it as the only release; its name."""
    shutil.rmtree(folder / "release")
    (folder / "vault" / "ledger.json").unlink()
    project = open_project(folder, poison__function=spec, poison__epochs=1, bank__shard_size="20 kB")
    fit_poison(project, name="mixed")
    write_candidate(project, "mixed")
    package(project, "mixed")
    return "mixed"


@pytest.mark.parametrize("spec", ["recombine:k=3", "recombine:k=3+dpf"])
def test_rows_that_a_retracted_one_contributed_to_are_rebuilt_and_no_others(project_folder: Path, spec: str) -> None:
    name = mixed(project_folder, spec)
    features = project_folder / "release" / "features"
    before, files = rows_in(features, "train"), digests(features)
    project = open_project(project_folder)
    pieces = load_function(project, name).plans["train"][0].arrays["pieces"]
    private = project.private_bank("train")[:][0]
    digest = load_function(project, name).digest
    assert pieces is not None
    row = next(number for number in range(len(pieces)) if (np.delete(pieces, number, axis=0) == number).any())
    wanted = {list(before)[j] for j in range(len(pieces)) if j != row and row in pieces[j]}
    gone = list(before)[row]
    touched = shards_with(features, {gone, *wanted})

    report = retract(project, [gone])
    assert report.rebuilt == {name: len(wanted), "default": 0}
    assert package(open_project(project_folder), name).version == "1.0.1"

    after = rows_in(features, "train")
    assert list(after) == [row_id for row_id in before if row_id != gone]
    assert {row_id for row_id in after if after[row_id] != before[row_id]} == wanted
    now = digests(features)
    assert {file for file in files if now.get(file) != files[file]} == {*touched, "index.json"}
    assert len(files) > len(touched) + 3  # some shards hold neither

    # The plan in the vault is that of the rows as they are now: P makes exactly them of φ1(S).
    project = open_project(project_folder)
    function, bank = load_function(project, name), project.private_bank("train")
    assert function.digest == digest  # the same P
    made = np.asarray(function.poisoned("train", bank).read(np.arange(len(bank))))
    found = FeatureBank(features, "train")[:][0]
    assert np.allclose(made, found, atol=2e-3, rtol=2e-3)
    plan = function.plans["train"][0]
    assert plan.arrays["pieces"].max() < len(bank)
    groups, counts = np.unique(plan.arrays["group"], return_counts=True)
    assert counts.min() >= 3
    assert all(len(set(bank.targets[plan.arrays["group"] == group])) == 1 for group in groups)
    if spec == "recombine:k=3":
        assert np.array_equal(made.astype(np.float16), found)
        for y, x in np.ndindex(4, 4):  # no window of the row is in any other, but for windows that others have too
            window = (slice(None), slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
            if (
                not (private[np.arange(len(private)) != row][(slice(None), *window)] == private[row][window])
                .all(axis=(1, 2, 3))
                .any()
            ):
                assert not (found[(slice(None), *window)] == private[row][window]).all(axis=(1, 2, 3)).any()
    text = " ".join((project_folder / "release" / "README.md").read_text().split())
    assert f"{len(wanted)} rows to which a retracted image had contributed are made of others now" in text
    assert "The rebuilt rows want a new attack run" in text
    assert "which rows were retracted, and which were rebuilt." in text
    again = retract(open_project(project_folder), [list(after)[0]])  # of a plan that was made anew once already
    assert again.rows["train"] == 1
    assert load_function(open_project(project_folder), name).digest == digest


def test_a_class_with_fewer_than_k_rows_left_is_refused_before_anything_changes(project_folder: Path) -> None:
    mixed(project_folder, "recombine:k=5")
    val = lines_of(project_folder, "val")
    discs = [line["id"] for line in val if line["source"].startswith("disc")]
    assert 5 <= len(discs) < 10
    few = discs[: len(discs) - 4]
    before = digests(project_folder)
    with pytest.raises(ConfigError, match=r"'mixed', in val: .* at least k = 5 .* found fewer in class 0: 4"):
        retract(open_project(project_folder), few)
    assert digests(project_folder) == before
    assert retract(open_project(project_folder), discs).rows["val"] == len(discs)  # all of the class may go


@pytest.mark.parametrize(
    "spec", ["recombine:k=3", "recombine:k=3+gaussian-noise", "recombine:k=2+mean-filter+recombine:k=3"]
)
def test_a_plan_made_anew_has_nothing_of_the_rows_that_have_gone_and_the_rest_of_the_old_one(spec: str) -> None:
    source = rows_of(np.repeat([0, 1], 15), (2, 4, 4))
    chain, plans = planned(spec, source)
    kept = np.setdiff1d(np.arange(30), [4, 20])
    left = Select(source, kept)
    replanned, rebuilt = chain.drop_rows(plans, kept, left, PHI_2, SECRET)
    old = np.asarray(chain.on(source, plans).read(kept))
    new = np.asarray(chain.on(left, replanned).read(np.arange(28)))
    changed = np.flatnonzero((old != new).any(axis=(1, 2, 3)))
    assert set(changed) <= set(rebuilt)
    positions, members, _ = chain.contributors(kept, plans)
    touched = set(positions[np.isin(members, [4, 20])])
    assert touched <= set(rebuilt)
    assert 0 < len(rebuilt) < 28
    for plan in replanned:
        if "pieces" in plan.arrays:
            assert 0 <= plan.arrays["pieces"].min() <= plan.arrays["pieces"].max() < 28
    again, _ = chain.drop_rows(plans, kept, left, PHI_2, SECRET)
    assert all(
        np.array_equal(one.arrays.get("pieces", 0), two.arrays.get("pieces", 0))
        for one, two in zip(replanned, again, strict=True)
    )


def test_a_rebuilt_row_is_drawn_anew_as_a_whole() -> None:
    source = rows_of(np.zeros(12), (1, 16, 16))
    chain, plans = planned("recombine:k=4", source)
    kept = np.arange(1, 12)
    (plan,), rebuilt = chain.drop_rows(plans, kept, Select(source, kept), PHI_2, SECRET)
    for row in rebuilt:
        was = plans[0].arrays["pieces"][kept[row]]
        stayed = (plan.arrays["pieces"][row] == was - 1)[was != 0].mean()
        assert stayed < 0.6  # by chance a quarter of them
    others = np.setdiff1d(np.arange(11), rebuilt)
    assert np.array_equal(plan.arrays["pieces"][others], plans[0].arrays["pieces"][kept[others]] - 1)


def test_a_function_of_ones_own_that_plans_with_rows_must_say_how_it_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FUNCTIONS, "recorder", Recorder)
    source, kept = rows_of(np.zeros(4)), np.arange(3)
    chain, plans = planned("recorder", source)
    with pytest.raises(ConfigError, match="Recorder plans with the rows of a bank, and has no `drop_rows`"):
        chain.drop_rows(plans, kept, Select(source, kept), PHI_2, SECRET)
    chain, plans = planned("gaussian-noise", source)
    assert chain.drop_rows(plans, kept, Select(source, kept), PHI_2, SECRET)[1].tolist() == []


# --------------------------------------------------------------------------------------------- cut off


def _interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> bool:
    """Runs until the step-th file takes its name; whether it came so far."""
    left, replace_file = step, Path.replace

    def crash(path: Path, target: Any) -> Path:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return replace_file(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        try:
            run()
        except KeyboardInterrupt:
            return True
    return False


def _as_kills_leave_it(
    folder: Path, to: Path, monkeypatch: pytest.MonkeyPatch, ids: list[str]
) -> tuple[Path, list[Path]]:
    """A project after a retraction; and as it was before each file took its name, with all that was half done."""
    whole, stops, replace_file = _with_the_same_images(folder, to / "whole"), list[Path](), Path.replace

    def keep(path: Path, target: Any) -> Path:
        stops.append(to / f"stop-{len(stops) + 1}")
        _with_the_same_images(whole, stops[-1])
        return replace_file(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", keep)
        retract(open_project(whole), ids)
    return whole, stops


def _with_the_same_images(folder: Path, copy: Path) -> Path:
    """Copies a project but for its images and its release."""
    shutil.copytree(folder / "vault", copy / "vault")
    shutil.copy(folder / "dpf.toml", copy)
    (copy / "images").symlink_to(folder / "images")
    return copy


@pytest.mark.slow
def test_a_retraction_cut_off_at_any_step_is_finished_with_the_same_bytes(
    project_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = open_project(project_folder, poison__function="recombine:k=3")
    fit_poison(project, name="mixed")
    write_candidate(project, "mixed")
    ids = [lines_of(project_folder)[20]["id"], lines_of(project_folder, "val")[2]["id"]]
    whole, stops = _as_kills_leave_it(project_folder, tmp_path, monkeypatch, ids)
    expected, refused = digests(whole / "vault"), []
    cut = _with_the_same_images(project_folder, tmp_path / "cut")
    assert _interrupted_at(6, monkeypatch, lambda: retract(open_project(cut), ids))  # which is tidied up after
    for step, folder in enumerate([cut, *stops]):
        record = folder / "vault" / RETRACTED
        if record.exists():  # from here on the others refuse, and no names are needed
            if not refused:
                with pytest.raises(VaultError, match="a retraction was cut off"):
                    package(open_project(folder), "mixed")
            refused.append(step)
            assert retract(open_project(folder)).rows == {"train": 1, "val": 1, "test": 0}
        else:
            retract(open_project(folder), ids)
        assert digests(folder / "vault") == expected, step
    assert refused == [0, *range(3, len(stops) + 1)]
    assert len(refused) > 15
    assert not list((whole / "vault").rglob(BEFORE))


def test_a_retraction_killed_in_a_shard_is_finished_by_the_same_command(project_folder: Path, tmp_path: Path) -> None:
    gone = lines_of(project_folder)[0]
    whole = Path(shutil.copytree(project_folder, tmp_path / "whole"))
    retract(open_project(whole), [gone["id"]])
    killed(project_folder, "os.rename", ".h5.partial", 2, "retract", "--id", gone["id"])
    assert leftovers(project_folder)
    assert retract(open_project(project_folder), [gone["id"]]).rows["train"] == 1
    assert digests(project_folder / "vault") == digests(whole / "vault")


# --------------------------------------------------------------------------------------------- the command


def test_an_owner_answers_a_takedown_request_on_the_command_line(project_folder: Path) -> None:
    first, second = lines_of(project_folder)[:2]
    (project_folder / "request.txt").write_text(f"{second['source']}\n\n")
    unknown = run_cli("retract", "--source", "nobody.png", "--id", "xyz", folder=project_folder)
    assert unknown.returncode == 1
    assert "no row has the id xyz; no row is of an image nobody.png" in " ".join(unknown.stderr.split())
    names = ["--source", first["source"], "--source-file", "request.txt"]
    done = run_cli("retract", *names, folder=project_folder)
    assert done.returncode == 0, done.stderr
    assert "Retracted 2 rows (train: 2, val: 0, test: 0)" in done.stdout
    assert "Next: dpf-release package --name default, as version 1.0.1" in done.stdout
    assert "φ2 top1" in done.stdout  # measured anew
    packaged = run_cli("package", folder=project_folder)
    assert "Published shapes 1.0.1" in packaged.stdout, packaged.stderr
    assert "not as 1.0.0, which was published with rows that are retracted since" in packaged.stdout
    assert "φ2 on val: top-1" in (project_folder / "release" / "README.md").read_text()
