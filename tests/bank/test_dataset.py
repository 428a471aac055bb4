"""A bank as a torch data set: what a batch holds, in which order, on which rank; and banks as one."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dpf_release.bank.dataset import BankDataset, block_shuffle, concat
from dpf_release.errors import BankError
from small_banks import SHAPE, features_of, write_bank


@pytest.fixture
def dataset(tmp_path: Path) -> BankDataset:
    """Ten rows in three shards; row i has the label i, so that a target names its row."""
    write_bank(tmp_path / "bank", targets=np.arange(10))
    return BankDataset.open(tmp_path / "bank", "train", [f"class {row}" for row in range(10)])


def _rows_of(batches: Any) -> list[list[int]]:
    """Row numbers of each batch, after holding every batch's features against its targets."""
    written = torch.from_numpy(features_of(10)).half()
    rows = []
    for features, targets in batches:
        assert features.dtype == torch.float16
        assert torch.equal(features, written[targets])
        rows.append(targets.tolist())
    return rows


@pytest.mark.parametrize("row", [0, 4, 9, -1, np.int64(3)])
def test_an_item_is_a_row_and_its_target(dataset: BankDataset, row: int) -> None:
    features, target = dataset[row]
    assert features.shape == SHAPE
    assert target.dtype == torch.int64
    assert target == row % 10
    assert torch.equal(features, torch.from_numpy(features_of(10)[row]).half())
    with pytest.raises(IndexError):
        dataset[10]


def test_a_batch_is_read_in_the_order_asked_for(dataset: BankDataset) -> None:
    assert len(dataset) == 10
    assert _rows_of([dataset.read([9, 0, 5, 5]), dataset.read([1])]) == [[9, 0, 5, 5], [1]]


def test_without_shuffling_rows_come_in_order_and_the_last_batch_is_short(dataset: BankDataset) -> None:
    loader = dataset.loader(batch_size=4)
    assert len(loader) == 3
    assert _rows_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert _rows_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_workers(dataset: BankDataset) -> None:
    def epochs(workers: int, seed: int) -> list[list[list[int]]]:
        loader = dataset.loader(batch_size=4, shuffle=True, workers=workers, seed=seed)
        return [_rows_of(loader), _rows_of(loader)]

    here = epochs(workers=0, seed=1)
    assert epochs(workers=2, seed=1) == here
    assert here[0] != here[1]
    assert epochs(workers=0, seed=2)[0] != here[0]
    for epoch in here:
        assert sorted(sum(epoch, [])) == list(range(10))
        assert sum(epoch, []) != list(range(10))


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_threads_and_processes_give_the_order_of_one(tmp_path: Path, compression: str) -> None:
    write_bank(tmp_path, targets=np.arange(10), compression=compression)
    dataset = BankDataset.open(tmp_path, "train", [f"class {row}" for row in range(10)])
    here = _rows_of(dataset.loader(3, shuffle=True, seed=1))
    assert _rows_of(dataset.loader(3, shuffle=True, seed=1, workers=2)) == here
    assert _rows_of(dataset.loader(3, shuffle=True, seed=2, workers=2)) != here


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1), ("forkserver", 1)])
def test_a_bank_goes_into_worker_processes_however_they_start(dataset: BankDataset, method: str, workers: int) -> None:
    dataset.read([0])  # a file is open here
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork")  # Python 3.12 and newer warn of any fork
        loader = DataLoader(dataset, 4, num_workers=workers, multiprocessing_context=method)  # torch's own collation
        batches = list(loader)
    assert _rows_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_slices_and_arrays(dataset: BankDataset) -> None:
    features, targets = dataset[2:8:3]
    assert _rows_of([(features, targets)]) == [[2, 5]]
    arrays = dataset.numpy(slice(2, 8, 3))
    assert isinstance(arrays[0], np.ndarray)
    assert np.array_equal(arrays[0], features.numpy())
    assert np.array_equal(dataset.numpy([5, 2])[1], [5, 2])
    assert len(dataset[10:][1]) == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [0, 1, 3, 4])
def test_a_loader_goes_on_in_mid_epoch_with_exactly_the_rows_that_remain(
    dataset: BankDataset, seen: int, workers: int
) -> None:
    whole = dataset.loader(3, shuffle=True, seed=5)
    epochs = [_rows_of(whole), _rows_of(whole), _rows_of(whole)]
    loader = dataset.loader(3, shuffle=True, seed=5, workers=workers)
    _rows_of(loader)
    begun = _rows_of(itertools.islice(loader, seen))
    state = json.loads(json.dumps(loader.state_dict()))
    other = dataset.loader(3, shuffle=True, seed=5, workers=workers)
    other.load_state_dict(state)
    if seen < 4:
        assert begun + _rows_of(other) == epochs[1]
        assert len(begun) == seen
    assert _rows_of(other) == epochs[2]
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_that_is_left_early_is_not_taken_up_again_unasked(dataset: BankDataset) -> None:
    loader, whole = dataset.loader(3, shuffle=True), dataset.loader(3, shuffle=True)
    _rows_of(itertools.islice(loader, 2))
    epochs = [_rows_of(whole), _rows_of(whole)]
    assert _rows_of(loader) == epochs[1]
    loader.epoch = 0
    assert _rows_of(loader) == epochs[0]


@pytest.mark.parametrize("options", [{"seed": 2}, {"batch_size": 4}, {"world_size": 2, "rank": 0}, {"shuffle": False}])
def test_the_state_of_another_order_is_refused(dataset: BankDataset, options: dict[str, Any]) -> None:
    same: dict[str, Any] = {"batch_size": 3, "shuffle": True, "seed": 1}
    state = dataset.loader(**same).state_dict()
    with pytest.raises(ValueError, match="expected the state of a loader with"):
        dataset.loader(**same | options).load_state_dict(state)
    dataset.loader(**same).load_state_dict(state)


def test_the_state_of_another_bank_is_refused(dataset: BankDataset, tmp_path: Path) -> None:
    write_bank(tmp_path / "other", targets=np.arange(10), seed=1)  # as many rows, other features
    state = dataset.loader(3).state_dict()
    with pytest.raises(ValueError, match="expected the state of a loader with"):
        BankDataset.open(tmp_path / "other", "train").loader(3).load_state_dict(state)
    BankDataset.open(tmp_path / "bank", "train").loader(3).load_state_dict(state)


def test_a_block_shuffle_reads_in_runs_and_sends_rows_anywhere() -> None:
    rows, row_bytes = 100_000, 8192  # blocks of 1,024 rows, windows of 32 blocks and fewer
    windows = block_shuffle(rows, row_bytes, np.random.default_rng(0))
    order = np.concatenate(windows)
    assert np.array_equal(np.sort(order), np.arange(rows))
    assert len(windows) == 4
    for window in windows:
        runs = np.flatnonzero(np.diff(np.sort(window)) > 1)
        assert len(runs) < 32  # neighbouring blocks make one run
    place = np.empty(rows)
    place[order] = np.arange(rows)
    travelled = np.abs(place - np.arange(rows)).mean()
    assert 0.2 < travelled / rows < 0.45  # a full shuffle: one third
    company = np.abs(np.diff(place))
    assert np.quantile(company, 0.99) < len(windows[0])  # neighbours stay within a window, but at a block's border
    assert not np.array_equal(order, np.concatenate(block_shuffle(rows, row_bytes, np.random.default_rng(1))))
    (small,) = block_shuffle(1000, row_bytes, np.random.default_rng(0))
    assert len(small) == 1000


def test_the_shards_open_with_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_bank(tmp_path / "bank")
    files = sorted(str(path) for path in (tmp_path / "bank").rglob("*.h5"))
    found = datasets.load_dataset("hdf5", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 10
    features = np.asarray(found.with_format("numpy")["features"][:], np.float16)
    assert np.array_equal(features.reshape(10, *SHAPE), features_of(10).astype(np.float16))
    assert found["label"][:] == [row % 3 for row in range(10)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_have_equally_many_batches_of_rows_that_no_other_has(dataset: BankDataset, shuffle: bool) -> None:
    loaders = [dataset.loader(2, shuffle, seed=3, rank=rank, world_size=3) for rank in range(3)]
    ranks = [_rows_of(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [2, 2, 2]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[2, 1]] * 3
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) == 9  # of ten rows one is left out, so that no rank waits for another


@pytest.mark.parametrize("options", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"batch_size": 0}])
def test_a_share_that_there_is_not_is_refused(dataset: BankDataset, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= rank < world_size"):
        dataset.loader(**{"batch_size": 2} | options)


def test_regression_targets_stay_with_their_rows(tmp_path: Path) -> None:
    targets = np.stack([np.arange(10), -np.arange(10)], axis=1).astype(np.float32)
    write_bank(tmp_path, targets=targets)
    dataset = BankDataset.open(tmp_path, "train")
    batch: tuple[Tensor, Tensor]
    for batch in dataset.loader(3, shuffle=True):
        assert batch[1].dtype == torch.float32
        assert torch.equal(batch[1][:, 1], -batch[1][:, 0])
        assert _rows_of([(batch[0], batch[1][:, 0].long())])
    assert torch.equal(concat([dataset, dataset]).read([3, 13])[1], torch.tensor([[3.0, -3.0]] * 2))


# Several banks.


def _open(folder: Path, classes: tuple[str, ...], seed: int = 0, **header: Any) -> BankDataset:
    write_bank(folder, seed=seed, **header)
    return BankDataset.open(folder, "train", classes)


def test_banks_are_combined_by_the_names_of_their_classes(tmp_path: Path) -> None:
    first = _open(tmp_path / "a", ("cat", "dog", "owl"))
    second = _open(tmp_path / "b", ("owl", "cat", "dog"), seed=1)
    both = concat([first, second])
    assert len(both) == 20
    assert both.names == ("cat", "dog", "owl")

    def names(dataset: BankDataset) -> list[str]:
        return [dataset.names[target] for target in dataset.targets]

    assert names(both) == names(first) + names(second)
    assert both.targets[:10].tolist() != both.targets[10:].tolist()  # the numbers are others
    assert second.targets.tolist() == first.targets.tolist()

    features, targets = both.read([13, 2, 19, 0])
    expected = [second.read([3]), first.read([2]), second.read([9]), first.read([0])]
    assert torch.equal(features, torch.cat([row for row, _ in expected]))
    assert targets.tolist() == [both.targets[row] for row in (13, 2, 19, 0)]
    assert len(concat([both, first])) == 30


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"featurizer_sha256": "b" * 64},
            r"bank 1 was made by another featurizer .*Expected aaaaaaaaaaaa…, found bbbb",
        ),
        ({"classes": ("cat", "dog")}, "labels beyond its 2 classes"),
        ({"classes": ()}, "bank 1 has no names of its classes"),
        ({"targets": np.zeros((10, 2), np.float32)}, "bank 1 has other targets"),
    ],
)
def test_banks_that_do_not_mix_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    classes = ("cat", "dog", "owl")
    first = _open(tmp_path / "a", classes)
    with pytest.raises(BankError, match=message):
        concat([first, _open(tmp_path / "b", **{"classes": classes} | other)])
    assert len(concat([first, _open(tmp_path / "c", classes)])) == 20


def test_other_classes_come_after_those_before(tmp_path: Path) -> None:
    first, second = (
        _open(tmp_path / name, classes)
        for name, classes in (("a", ("cat", "dog", "owl")), ("b", ("fox", "owl", "cat")))
    )
    joined = concat([first, second])
    assert joined.names == ("cat", "dog", "owl", "fox")
    wanted = [first.names[label] for label in first.targets] + [second.names[label] for label in second.targets]
    assert [joined.names[label] for label in joined.targets] == wanted


def test_no_bank_at_all_is_refused() -> None:
    with pytest.raises(BankError, match="expected at least one bank"):
        concat([])
