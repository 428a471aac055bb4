"""A bank as a torch data set: what a batch holds, in which order, on which rank; and banks as one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_banks import SHAPE, features_of, write_bank
from torch import Tensor

from dpf_release.errors import BankError
from dpf_release.loader import BankDataset, concat


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
    assert _rows_of([dataset.read([9, 0, 5, 5]), dataset.__getitems__([1])]) == [[9, 0, 5, 5], [1]]


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
        ({"classes": ("cat", "dog", "fox")}, r"bank 1 has other classes .*'owl'\], found \['cat', 'dog', 'fox'\]"),
        ({"classes": ("cat", "dog")}, "labels beyond its 2 classes"),
        ({"classes": ()}, "bank 1 has other classes"),
        ({"targets": np.zeros((10, 2), np.float32)}, "bank 1 has other classes or targets"),
    ],
)
def test_banks_that_do_not_mix_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    classes = ("cat", "dog", "owl")
    first = _open(tmp_path / "a", classes)
    with pytest.raises(BankError, match=message):
        concat([first, _open(tmp_path / "b", **{"classes": classes} | other)])
    assert len(concat([first, _open(tmp_path / "c", classes)])) == 20


def test_no_bank_at_all_is_refused() -> None:
    with pytest.raises(BankError, match="expected at least one bank"):
        concat([])
