"""A downstream user's classifier learns from a bank, and is scored in the task's unit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from dpf_release.bank.dataset import BankDataset
from dpf_release.bank.format import BankIndex
from dpf_release.bank.writer import BankWriter
from dpf_release.release.train import fit_classifier, score
from network_digests import state_bytes
from small_banks import fill

SHAPE = (4, 3, 3)


def bank(folder: Path, rows: int, kind: str, seed: int = 0) -> BankDataset:
    """A bank of two shards or more; channel means tell the target apart."""
    draw = np.random.default_rng(seed)
    features = draw.normal(0, 0.3, (rows, *SHAPE)).astype(np.float32)
    targets: NDArray[Any] = draw.integers(0, 3, rows)
    if kind == "classification":
        features[np.arange(rows), targets] += 1
    else:
        targets = draw.uniform(-1, 1, (rows, 2)).astype(np.float32)
        features[:, :2] += targets[:, :, None, None]
    header = BankIndex(
        poisoned=True,
        featurizer_sha256="0" * 64,
        feature_shape=SHAPE,
        targets=targets.shape[1] if targets.ndim == 2 else 0,
    )
    writer = BankWriter(folder, header, shard_bytes=header.row_bytes * 50)
    ids = draw.integers(0, 256, (rows, 16), dtype=np.uint8)
    writer.finish(fill(writer, targets, ids, lambda start, stop: features[start:stop]))
    return BankDataset.open(folder, "train", ("a", "b", "c") if targets.ndim == 1 else ())


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(SHAPE[0], outputs))


@pytest.mark.parametrize(("kind", "outputs"), [("classification", 3), ("regression", 2)])
def test_a_classifier_learns_a_bank_and_holds_on_rows_it_has_not_seen(kind: str, outputs: int, tmp_path: Path) -> None:
    train, unseen = bank(tmp_path / "train", 240, kind), bank(tmp_path / "unseen", 120, kind, seed=1)
    fitted, untrained = network(outputs), network(outputs)
    history = fit_classifier(fitted, train, epochs=8, batch_size=16, learning_rate=0.1, device="cpu")
    assert len(history.epochs) == 8
    assert history.epochs[-1]["loss"] < history.epochs[0]["loss"]
    if kind == "classification":
        assert score(untrained, unseen) < 0.7 < 0.95 < score(fitted, unseen)
    else:
        assert score(fitted, unseen) < 0.2 < score(untrained, unseen)


def test_the_seed_decides_the_order_and_a_bank_smaller_than_a_batch_is_used(tmp_path: Path) -> None:
    orders = []

    class Watched(BankDataset):
        def read(self, rows: Any) -> Any:
            orders[-1].append(tuple(rows))
            return super().read(rows)

    bank(tmp_path, 30, "classification")
    rows = Watched.open(tmp_path, "train")
    for settings in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "batch_size": 8}):
        orders.append([])
        fitted = network(3)
        before = state_bytes(fitted)
        fit_classifier(fitted, rows, epochs=2, device="cpu", **settings)
        assert state_bytes(fitted) != before
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert [[len(rows) for rows in order] for order in orders[2:]] == [[30] * 2, [8] * 6]


class Constant(nn.Module):
    """Gives every row the same answer."""

    def __init__(self, *answer: float) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.answer.expand(len(features), -1)


def test_score_is_the_share_of_right_answers(tmp_path: Path) -> None:
    rows = bank(tmp_path, 300, "classification")  # more than are read at once
    shares = [score(Constant(*np.eye(3, dtype=float)[label]), rows) for label in range(3)]
    assert shares == pytest.approx([(rows.targets == label).mean() for label in range(3)])
    assert len(set(shares)) > 1


def test_score_of_a_regression_is_the_mean_absolute_error_in_its_unit(tmp_path: Path) -> None:
    rows = bank(tmp_path, 300, "regression")
    for answer in ((0.0, 0.0), (10.0, -3.0)):
        assert score(Constant(*answer), rows) == pytest.approx(np.abs(rows.targets - answer).mean(), rel=1e-5)


def test_score_leaves_the_network_in_evaluation_mode_and_as_it_was(tmp_path: Path) -> None:
    rows = bank(tmp_path, 20, "classification")
    scored = nn.Sequential(nn.BatchNorm2d(SHAPE[0]), network(3)).train()
    before = state_bytes(scored)
    score(scored, rows)
    assert not scored.training
    assert state_bytes(scored) == before
    scored.train()(rows.read(np.arange(20))[0].float())
    assert state_bytes(scored) != before
