"""Feature banks, format 1: what is written, that it is whole, and that hostile shards are refused."""

import hashlib
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from dpf_release.bank.format import BankIndex, read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.errors import BankError
from places import ROOT
from small_banks import ROW_BYTES, SHAPE, features_of, fill, ids_of, write_bank, writer

GOLDEN = ROOT / "tests" / "golden" / "bank-1"
FIRST = "train/shard-00000.h5"


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """A bank of ten rows in three shards of 4, 4 and 2."""
    write_bank(tmp_path / "bank")
    return tmp_path / "bank"


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Layout.


def _check_layout(folder: Path, shard_rows: list[int]) -> None:
    """Holds a bank of classes against format 1, with h5py alone."""
    for number, rows in enumerate(shard_rows):
        path = folder / f"train/shard-{number:05d}.h5"
        with h5py.File(path, "r") as shard:
            members = {name: (shard[name].dtype.str, shard[name].shape) for name in shard}
            assert members == {
                "features": ("<f2", (rows, *SHAPE)),
                "label": ("<i8", (rows,)),
                "id": ("|u1", (rows, 16)),
            }
            assert dict(shard.attrs) == {
                "format": "dpf-release-bank",
                "version": 1,
                "split": "train",
                "poisoned": False,
                "encoding": "float16",
                "featurizer_sha256": "a" * 64,
            }
            features = shard["features"]
            assert features.chunks == (1, *SHAPE)
            assert not any(shard[name].id.get_create_plist().get_nfilters() for name in shard)
            assert not any(len(shard[name].attrs) for name in shard)
            # The rows lie one behind the other in the file, without anything between.
            offset = features.id.get_chunk_info(0).byte_offset
            raw = np.fromfile(path, "<f2", rows * ROW_BYTES // 2, offset=offset).reshape(features.shape)
            assert np.array_equal(raw, features[:])
            assert rows == len(np.unique(raw, axis=0))


def test_a_bank_is_format_1_to_bare_h5py(bank: Path) -> None:
    _check_layout(bank, [4, 4, 2])


def test_the_index_lists_every_shard_with_its_digest(bank: Path) -> None:
    tree = json.loads((bank / "index.json").read_bytes())
    assert set(_digests(bank)) == {"index.json", *(shard["file"] for shard in tree["splits"]["train"])}
    assert tree.pop("splits") == {
        "train": [
            {
                "file": f"train/shard-{number:05d}.h5",
                "rows": rows,
                "bytes": (bank / f"train/shard-{number:05d}.h5").stat().st_size,
                "sha256": _digests(bank)[f"train/shard-{number:05d}.h5"],
            }
            for number, rows in enumerate([4, 4, 2])
        ]
    }
    assert tree == {
        "compression": "none",
        "format": "dpf-release-bank",
        "version": 1,
        "encoding": "float16",
        "poisoned": False,
        "featurizer_sha256": "a" * 64,
        "feature_shape": [2, 3, 4],
        "targets": 0,
    }


# Which bytes HDF5 writes around the data differs between its releases (1.14 and 2.0 do), so no digest of a written
# shard is held here: a committed bank must stay readable, and what is written today must have the same layout.
def test_the_golden_bank_is_read_and_has_the_layout_of_what_is_written_today(tmp_path: Path) -> None:
    golden = FeatureBank(GOLDEN, "train")
    assert np.array_equal(golden.read(range(5)), features_of(5).astype(np.float16))
    assert np.array_equal(golden.ids, ids_of(5))
    assert golden.targets.tolist() == [0, 1, 2, 0, 1]
    write_bank(tmp_path, rows=5)
    for folder in (GOLDEN, tmp_path):
        _check_layout(folder, [4, 1])
    without_digests = {"sha256": True, "bytes": True}
    trees = [
        read_index(folder).model_dump(exclude={"splits": {"train": {"__all__": without_digests}}})
        for folder in (GOLDEN, tmp_path)
    ]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_bank_is_its_owners_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_bank(tmp_path / "bank")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {
        "bank": 0o700,
        "train": 0o700,
        "index.json": 0o600,
        **{f"shard-{number:05d}.h5": 0o600 for number in range(3)},
    }


# Reading.


@pytest.mark.parametrize("rows", [range(10), [9, 0, 4, 3], [5, 5, 5, 0, 9, 5], [6, 4], [7], [], np.arange(10)[::-1]])
def test_read_gives_the_rows_asked_for_in_that_order(bank: Path, rows: Any) -> None:
    found, written = FeatureBank(bank, "train"), features_of(10).astype(np.float16)
    expected = written[np.asarray(rows, np.int64)]
    assert np.array_equal(found.read(rows), expected)
    assert found.read(rows).dtype == np.float16
    assert not np.array_equal(written, features_of(10))  # float16 did round
    assert len({row.tobytes() for row in written}) == 10


def test_targets_ids_and_batches_are_in_bank_order(bank: Path) -> None:
    found = FeatureBank(bank, "train")
    assert len(found) == 10
    assert found.shape == SHAPE
    assert found.targets.tolist() == [row % 3 for row in range(10)]
    assert np.array_equal(found.ids, ids_of(10))
    batches = list(found.batches(4))
    assert [rows.tolist() for rows, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert np.array_equal(np.concatenate([part for _, part in batches]), found.read(range(10)))


@pytest.mark.parametrize("rows", [[10], [-1], [0, 10], [3, -11]])
def test_rows_that_do_not_exist_are_an_index_error(bank: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError, match="rows 0 to 9 exist"):
        FeatureBank(bank, "train").read(rows)
    assert FeatureBank(bank, "train").read([9]).shape == (1, *SHAPE)


def test_regression_targets_are_kept_as_float32_columns(tmp_path: Path) -> None:
    targets = np.random.default_rng(3).normal(size=(10, 2)).astype(np.float32)
    write_bank(tmp_path, targets=targets)
    found = FeatureBank(tmp_path, "train")
    assert np.array_equal(found.targets, targets)
    assert found.targets.dtype == np.float32
    with h5py.File(tmp_path / FIRST, "r") as shard:
        assert set(shard) == {"features", "target", "id"}


def test_a_pickled_bank_holds_no_rows_and_reads_the_same(bank: Path) -> None:
    found = FeatureBank(bank, "train")
    before = len(pickle.dumps(found))
    rows, targets = found.read(range(10)), found.targets
    copy = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) == before
    assert np.array_equal(copy.read(range(10)), rows)
    assert np.array_equal(copy.targets, targets)


# In a process of its own: this one has threads, with which a fork may warn.
FORKED = """
import os, sys
from pathlib import Path
import h5py
from dpf_release.bank.reader import FeatureBank
opened, whole = set(), h5py.File.__init__
def noting(self, name, *args, **options):
    opened.add((os.getpid(), str(name)))
    whole(self, name, *args, **options)
h5py.File.__init__ = noting
bank = FeatureBank(Path(sys.argv[1]), "train")
first = bank.read([0]).tobytes()
child = os.fork()
right = bank.read([0]).tobytes() == first != bank.read([1]).tobytes()
anew = (os.getpid(), str(bank.folder / "train/shard-00000.h5")) in opened
if child == 0:
    os._exit(0 if right and anew and bank.ids.shape == (10, 16) else 1)
print(os.waitpid(child, 0)[1], right and anew)
"""


def test_a_forked_process_opens_a_shard_anew(bank: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED, str(bank)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True"]


@pytest.mark.parametrize(
    "rows", [[0, 0], np.array([], np.int64), slice(2, 9, 3), slice(None, None, -1), slice(-3, None)]
)
def test_slices_and_lists_give_features_with_their_targets(bank: Path, rows: Any) -> None:
    found, written = FeatureBank(bank, "train"), features_of(10).astype(np.float16)
    features, targets = found[rows]
    assert np.array_equal(features, written[rows])
    assert np.array_equal(targets, (np.arange(10) % 3)[rows])


@pytest.mark.parametrize("row", [0, 4, 9, -1, -10, np.int64(3), np.int32(-2)])
def test_a_number_gives_one_row_and_counts_from_the_end_below_zero(bank: Path, row: Any) -> None:
    features, target = FeatureBank(bank, "train")[row]
    assert features.shape == SHAPE
    assert np.array_equal(features, features_of(10).astype(np.float16)[row])
    assert target == (np.arange(10) % 3)[row]


@pytest.mark.parametrize("row", [10, -11, [10], [-1]])
def test_a_number_beyond_the_rows_is_an_index_error(bank: Path, row: Any) -> None:
    with pytest.raises(IndexError):
        FeatureBank(bank, "train")[row]


def test_a_mask_or_a_fraction_is_not_taken_for_row_numbers(bank: Path) -> None:
    found = FeatureBank(bank, "train")
    for rows in (found.targets == 1, [0.5, 1.7]):
        with pytest.raises((IndexError, TypeError)):
            found[rows]
        with pytest.raises((IndexError, TypeError)):
            found.read(rows)


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("rows", [[2, 0, 3], [9, 0, 4, 4]], ids=["one shard", "all shards"])
def test_rows_are_read_to_where_they_are_wanted(tmp_path: Path, compression: Any, rows: list[int]) -> None:
    write_bank(tmp_path, compression=compression)
    found, written = FeatureBank(tmp_path, "train"), features_of(10).astype(np.float16)
    whole = np.full((2 * len(rows), *SHAPE), 7, np.float16)
    for out in (whole[: len(rows)], whole[::2]):
        whole[:] = 7
        assert found.read(rows, out=out) is out
        assert np.array_equal(out, written[rows])
        assert (whole == 7).all(axis=(1, 2, 3)).sum() == len(rows)  # the rest is as it was


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_more_shards_than_may_be_open_are_read_right_with_few_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Any
) -> None:
    write_bank(tmp_path, rows=80, compression=compression)  # in 20 shards
    written, order = features_of(80).astype(np.float16), np.random.default_rng(0).permutation(80)
    most = {}
    for limit in (2, 100):
        monkeypatch.setattr("dpf_release.bank.reader.MAX_OPEN_SHARDS", limit)
        before = len(list(Path("/proc/self/fd").iterdir()))
        found, most[limit] = FeatureBank(tmp_path, "train"), 0
        for start in range(0, 80, 10):
            rows = order[start : start + 10]
            assert np.array_equal(found.read(rows), written[rows])
            most[limit] = max(most[limit], len(list(Path("/proc/self/fd").iterdir())) - before)
        assert found.targets.tolist() == [row % 3 for row in range(80)]
        assert np.array_equal(found.ids, ids_of(80))
        del found
    assert most[2] <= 2
    assert most[100] >= 20


# Compression.


@pytest.mark.parametrize("rows", [range(10), [9, 0, 4, 3], [5, 5, 5, 0, 9, 5], [7], [], np.arange(10)[::-1]])
def test_compressed_rows_are_the_uncompressed_ones(bank: Path, tmp_path: Path, rows: Any) -> None:
    write_bank(tmp_path / "packed", compression="gzip")
    plain, packed = FeatureBank(bank, "train"), FeatureBank(tmp_path / "packed", "train")
    assert np.array_equal(packed.read(rows), plain.read(rows))
    assert np.array_equal(packed.targets, plain.targets)
    assert np.array_equal(packed.ids, plain.ids)
    again = pickle.loads(pickle.dumps(packed))
    assert np.array_equal(again[2:9][0], plain[2:9][0])
    with pytest.raises(IndexError):
        packed.read([10])


FILTERS = {"none": [], "gzip": [2, 1]}


@pytest.mark.parametrize("compression", FILTERS)
def test_the_filters_are_those_that_the_index_names_and_the_bytes_repeat(tmp_path: Path, compression: Any) -> None:
    for name in ("bank", "again"):
        write_bank(tmp_path / name, compression=compression)
    write_bank(tmp_path / "other", compression=compression, seed=1)
    assert _digests(tmp_path / "bank") == _digests(tmp_path / "again") != _digests(tmp_path / "other")
    assert json.loads((tmp_path / "bank" / "index.json").read_bytes())["compression"] == compression
    with h5py.File(tmp_path / "bank" / FIRST) as shard:
        for name in shard:
            create = shard[name].id.get_create_plist()
            found = [create.get_filter(number)[0] for number in range(create.get_nfilters())]
            assert found == (FILTERS[compression] if name == "features" else [])
        assert shard["features"].chunks == (1, *SHAPE)


@pytest.mark.parametrize("written", FILTERS)
@pytest.mark.parametrize("declared", FILTERS)
def test_a_shard_with_other_filters_than_the_index_names_is_refused(
    tmp_path: Path, written: Any, declared: Any
) -> None:
    write_bank(tmp_path, compression=written)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"compression": declared}))
    found = FeatureBank(tmp_path, "train")
    if written == declared:
        assert np.array_equal(found.read([4]), features_of(10).astype(np.float16)[[4]])
        return
    for read in (lambda: found.read([4]), lambda: found.ids, lambda: found.targets):
        with pytest.raises(BankError, match=f"/features has the filters .*, not those of '{declared}'"):
            read()


def _features_after_a_relu(rows: int) -> Any:
    return np.maximum(np.random.default_rng(0).normal(-3, 1, (rows, 8, 16, 16)), 0)


def test_features_after_a_relu_take_less_room_compressed_and_come_back(tmp_path: Path) -> None:
    features, sizes, header = _features_after_a_relu(12), {}, {"feature_shape": (8, 16, 16)}
    for name in ("none", "gzip"):
        bank = writer(tmp_path / name, compression=name, **header)
        bank.finish(fill(bank, np.arange(12), ids_of(12), lambda a, b: features[a:b]))
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name).glob("train/*.h5"))
        assert np.array_equal(FeatureBank(tmp_path / name, "train").read(range(12)), features.astype(np.float16))
    assert sizes["gzip"] < 0.75 * sizes["none"]


@pytest.mark.parametrize("compression", FILTERS)
def test_what_is_written_can_be_read_also_where_a_layer_is_dead(tmp_path: Path, compression: Any) -> None:
    bank = replace(writer(tmp_path, compression=compression, feature_shape=(256, 56, 56)), shard_bytes=2**30)
    bank.finish(fill(bank, np.arange(12), ids_of(12), lambda a, b: np.zeros((b - a, 256, 56, 56), np.float32)))
    assert not FeatureBank(tmp_path, "train").read([0, 8]).any()


@pytest.mark.parametrize("compression", FILTERS)
def test_no_rows_are_read_from_a_bank_of_one_shard(tmp_path: Path, compression: Any) -> None:
    write_bank(tmp_path, rows=4, compression=compression)
    found = FeatureBank(tmp_path, "train")
    assert found.read([]).shape == found[2:2][0].shape == (0, *SHAPE)
    assert found.read([3, 3, 0]).shape == (3, *SHAPE)


def test_a_gzip_bank_needs_h5py_alone(tmp_path: Path) -> None:
    write_bank(tmp_path, compression="gzip")
    with h5py.File(tmp_path / FIRST) as shard:
        assert shard["features"][:].tobytes() == FeatureBank(tmp_path, "train").read(range(4)).tobytes()


def test_a_bank_of_blosc2_is_refused_with_what_to_do(bank: Path) -> None:
    path = bank / "index.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"compression": "blosc2"}))
    with pytest.raises(BankError, match="an earlier version wrote, is not read any more. Write the bank again"):
        FeatureBank(bank, "train")


def test_a_compressed_bank_cut_off_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    write_bank(tmp_path, compression="gzip")
    whole, bank = _digests(tmp_path), writer(tmp_path, compression="gzip")
    (tmp_path / "train/shard-00001.h5").unlink()
    bank.finish(fill(bank, np.arange(10) % 3, ids_of(10), lambda a, b: features_of(10)[a:b]))
    assert _digests(tmp_path) == whole


# Writing.


def test_a_batch_never_crosses_a_shard(tmp_path: Path) -> None:
    calls, features, done = [], features_of(10), []

    def source(start: int, stop: int) -> Any:
        calls.append((start, stop))
        return features[start:stop]

    fill(writer(tmp_path), np.arange(10), ids_of(10), source, done.append)
    assert calls == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 10)]
    assert sum(done) == 10


def test_the_same_rows_give_the_same_bytes(bank: Path, tmp_path: Path) -> None:
    write_bank(tmp_path / "again")
    write_bank(tmp_path / "other", seed=1)
    assert _digests(tmp_path / "again") == _digests(bank)
    other = _digests(tmp_path / "other")
    assert all(other[name] != digest for name, digest in _digests(bank).items())


def test_after_a_crash_there_is_no_index_and_a_second_run_completes_to_the_same_bytes(
    bank: Path, tmp_path: Path
) -> None:
    features, calls, crashed = features_of(10), [], tmp_path / "crashed"

    def source(start: int, stop: int) -> Any:
        calls.append(start)
        if calls == [0, 3, 4, 7]:  # in the middle of the second shard
            raise KeyboardInterrupt
        return features[start:stop]

    arguments: Any = (np.arange(10) % 3, ids_of(10), source)
    with pytest.raises(KeyboardInterrupt):
        fill(writer(crashed), *arguments)
    assert set(_digests(crashed)) == {FIRST}
    with pytest.raises(BankError, match="expected a finished feature bank"):
        FeatureBank(crashed, "train")

    calls.clear()
    again = writer(crashed)
    again.finish(fill(again, *arguments))
    assert calls == [4, 7, 8]  # the whole shard was kept
    assert _digests(crashed) == _digests(bank)


def test_a_finished_bank_that_is_written_over_is_unfinished_until_it_is_whole_again(bank: Path) -> None:
    def source(start: int, stop: int) -> Any:
        raise KeyboardInterrupt

    assert len(FeatureBank(bank, "train")) == 10
    with pytest.raises(KeyboardInterrupt):
        fill(writer(bank), np.arange(10), ids_of(10, seed=2), source)
    with pytest.raises(BankError, match="expected a finished feature bank"):
        FeatureBank(bank, "train")


def test_a_shard_of_other_rows_or_of_another_bank_is_written_anew(bank: Path) -> None:
    before, calls = _digests(bank), []

    def source(start: int, stop: int) -> Any:
        calls.append(start)
        return features_of(10)[start:stop]

    ids = ids_of(10)
    ids[5, 0] ^= 1
    fill(writer(bank), np.arange(10) % 3, ids, source)
    assert calls == [4, 7]
    assert {name for name, digest in _digests(bank).items() if digest != before[name]} == {"train/shard-00001.h5"}
    calls.clear()
    fill(writer(bank, featurizer_sha256="b" * 64), np.arange(10) % 3, ids, source)
    assert calls == [0, 3, 4, 7, 8]


@pytest.mark.parametrize("value", [1e5, -1e5, np.nan, np.inf])
def test_what_float16_cannot_hold_is_refused_and_leaves_no_file(tmp_path: Path, value: float) -> None:
    features = features_of(4)
    features[3, 1, 2, 3] = value
    with pytest.raises(BankError, match="rows 3 to 4 of train do not fit float16"):
        fill(writer(tmp_path), np.arange(4), ids_of(4), lambda a, b: features[a:b])
    assert _digests(tmp_path) == {}
    features[3, 1, 2, 3] = 65504
    fill(writer(tmp_path), np.arange(4), ids_of(4), lambda a, b: features[a:b])
    assert set(_digests(tmp_path)) == {FIRST}


def test_a_source_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"expected rows of shape \(3, 2, 3, 4\), found \(3, 4, 2, 3\)"):
        fill(writer(tmp_path), np.arange(4), ids_of(4), lambda a, b: features_of(4)[a:b].mT.T)
    assert _digests(tmp_path) == {}


# Hostile shards.


def _replace(shard: h5py.File, member: str, data: Any = None, **options: Any) -> None:
    values = shard[member][:] if data is None else data
    del shard[member]
    shard.create_dataset(member, data=values, **options)


def _external_storage(shard: h5py.File, secret: Path) -> None:
    del shard["id"]
    shard.create_dataset("id", (4, 16), "u1", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def _external_link(shard: h5py.File, secret: Path) -> None:
    del shard["id"]
    shard["id"] = h5py.ExternalLink("shard-00001.h5", "/id")


def _soft_link(shard: h5py.File, secret: Path) -> None:
    del shard["id"]
    shard["id"] = h5py.SoftLink("/features")


def _dangling_link(shard: h5py.File, secret: Path) -> None:
    del shard["id"]
    shard["id"] = h5py.SoftLink("/nothing")


def _virtual(shard: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((4, 16), "u1")
    layout[:] = h5py.VirtualSource("shard-00001.h5", "id", (4, 16))
    del shard["id"]
    shard.create_virtual_dataset("id", layout)


def _group(shard: h5py.File, secret: Path) -> None:
    del shard["id"]
    shard.create_group("id")


def _missing(shard: h5py.File, secret: Path) -> None:
    del shard["id"]


HOSTILE: dict[str, tuple[Callable[[h5py.File, Path], Any], str]] = {
    "external storage": (_external_storage, "/id is not a data set stored in this file"),
    "external link": (_external_link, "/id is a link"),
    "soft link": (_soft_link, "/id is a link"),
    "dangling link": (_dangling_link, "/id is a link"),
    "virtual": (_virtual, "/id is not a data set stored in this file"),
    "group": (_group, "/id is not a data set"),
    "missing member": (_missing, r"found \['features', 'label'\]"),
    "extra member": (lambda s, _: s.create_dataset("source", data=[1]), "found .*'source'"),
    "wrong type": (lambda s, _: _replace(s, "label", dtype="<i4"), "/label holds no plain numbers of format 1"),
    "big-endian": (lambda s, _: _replace(s, "features", dtype=">f2", chunks=(1, *SHAPE)), "/features holds no plain"),
    "fewer rows": (lambda s, _: _replace(s, "label", [0, 1, 2]), r"/label: expected int64 \(4,\)"),
    "short ids": (lambda s, _: _replace(s, "id", s["id"][:, :8]), r"/id: expected uint8 \(4, 16\)"),
    "chunks": (lambda s, _: _replace(s, "features", chunks=(2, *SHAPE)), "one row a chunk"),
    "no chunks": (lambda s, _: _replace(s, "features"), "one row a chunk"),
    "gzip": (
        lambda s, _: _replace(s, "features", chunks=(1, *SHAPE), compression="gzip"),
        "/features has filters that are not those of format 1",
    ),
    "gzip, which the index does not name": (
        lambda s, _: _replace(s, "features", chunks=(1, *SHAPE), compression="gzip", shuffle=True),
        "/features has the filters",
    ),
    "filter on ids": (lambda s, _: _replace(s, "id", chunks=(4, 16), shuffle=True), "/id has filters"),
    "not allocated": (
        lambda s, _: (s.pop("features"), s.create_dataset("features", (4, *SHAPE), "<f2", chunks=(1, *SHAPE))),
        "do not lie one behind the other",
    ),
    "extra attribute": (lambda s, _: s.attrs.update(source="face.jpg"), "face.jpg"),
    "attribute of a member": (lambda s, _: s["features"].attrs.update(source="face.jpg"), "attribute"),
    "lost attribute": (lambda s, _: s.attrs.__delitem__("poisoned"), "expected the attributes"),
    "changed attribute": (lambda s, _: s.attrs.modify("poisoned", True), "'poisoned': True"),
    "array attribute": (lambda s, _: s.attrs.update(poisoned=[False, True]), "or more than that"),
    "attribute of another type": (lambda s, _: s.attrs.update(poisoned=0), "expected the attributes"),
    "other version": (lambda s, _: s.attrs.modify("version", 2), "'version': 2"),
    "other split": (lambda s, _: s.attrs.modify("split", "val"), "'split': 'val'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_shard_is_refused_and_its_neighbour_is_read(bank: Path, tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    secret = tmp_path / "secret"
    secret.write_bytes(b"private" * 10)
    with h5py.File(bank / FIRST, "r+", libver=("v110", "v110")) as shard:
        change(shard, secret)
    found = FeatureBank(bank, "train")
    for read in (lambda: found.read([0]), lambda: found.ids, lambda: found.targets):
        with pytest.raises(BankError, match=message):
            read()
    assert np.array_equal(found.read([4, 9]), features_of(10)[[4, 9]].astype(np.float16))


def test_a_small_shard_that_claims_much_memory_is_refused(bank: Path) -> None:
    rows = 10**10
    tree = json.loads((bank / "index.json").read_bytes())
    tree["splits"]["train"][0]["rows"] = rows
    (bank / "index.json").write_text(json.dumps(tree))
    with h5py.File(bank / FIRST, "w", libver="latest") as shard:
        shard.create_dataset("features", (rows, *SHAPE), "<f2", chunks=(1, *SHAPE))
        shard.create_dataset("label", (rows,), "<i8", chunks=(2**16,))
        shard.create_dataset("id", (rows, 16), "u1", chunks=(2**16, 16))
    for read in ((found := FeatureBank(bank, "train")).read, lambda _: found.ids, lambda _: found.targets):
        with pytest.raises(BankError, match="/label claims 80000000000 bytes"):
            read([0])


@pytest.mark.parametrize("content", [b"no HDF5 " * 900, None, "cut"], ids=["garbage", "missing", "truncated"])
def test_a_shard_that_is_no_whole_hdf5_file_is_a_bank_error(bank: Path, content: bytes | str | None) -> None:
    path = bank / FIRST
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else whole[:-100])
    with pytest.raises(BankError, match=r"shard-00000\.h5"):
        FeatureBank(bank, "train").read([0])
    path.write_bytes(whole)
    assert FeatureBank(bank, "train").read([0]).shape == (1, *SHAPE)


# The index.


def _shard(tree: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = tree["splits"]["train"][0]
    return shard


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(version=2),
        lambda tree: tree.update(format="other"),
        lambda tree: tree.update(encoding="int8"),
        lambda tree: tree.update(source="face.jpg"),
        lambda tree: tree.pop("poisoned"),
        lambda tree: tree.update(feature_shape=[2, 3]),
        lambda tree: tree.update(featurizer_sha256="A" * 64),
        lambda tree: tree["splits"].update(secret=[]),
        lambda tree: _shard(tree).update(file="../x.h5"),
        lambda tree: _shard(tree).update(file="train/../../shard-00000.h5"),
        lambda tree: _shard(tree).update(file="/train/shard-00000.h5"),
        lambda tree: _shard(tree).update(file="train/shard-00000.h5\n"),
        lambda tree: _shard(tree).update(rows=0),
        lambda tree: _shard(tree).update(rows=2**62),
        lambda tree: _shard(tree).update(source="face.jpg"),
    ],
)
def test_an_index_of_another_format_is_refused(bank: Path, change: Callable[[Any], Any]) -> None:
    path = bank / "index.json"
    tree = json.loads(path.read_bytes())
    path.write_text(json.dumps(tree))
    assert isinstance(read_index(bank), BankIndex)
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(BankError, match="not an index of bank format 1"):
        read_index(bank)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
def test_an_index_that_is_not_json_is_refused(bank: Path, content: bytes) -> None:
    (bank / "index.json").write_bytes(content)
    with pytest.raises(BankError, match="not an index of bank format 1"):
        FeatureBank(bank, "train")


def test_a_split_that_is_not_there_is_named_with_those_that_are(bank: Path) -> None:
    with pytest.raises(BankError, match=r"expected a split 'val' .* found \['train'\]"):
        FeatureBank(bank, "val")
