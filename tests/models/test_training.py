"""The one fit loop: it learns, goes on where it was cut off, and leaves nothing else changed."""

import itertools
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpf_release.bank.dataset import BLOCK_BYTES, block_shuffle
from dpf_release.core.ranks import Ranks
from dpf_release.errors import ConfigError
from dpf_release.models import training
from dpf_release.models.training import History, Recipe, fit, uses_bf16
from network_digests import state_bytes

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=0.02, bf16="off")
ROWS = 18  # four steps an epoch, and two rows left out


class Toy:
    """A small network with everything that has a state, its rows, and what was asked of it."""

    def __init__(self, seed: int = 0, rows: int = ROWS) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Flatten(),
                nn.Linear(16, 1),
            )
        draw = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(rows, 3, 4, 4, generator=draw)
        self.wanted = self.inputs.mean(dim=(1, 2, 3))[:, None] * 5
        self.read: list[list[int]] = []
        self.fail_at = -1
        self.at_loss: Callable[[], None] = lambda: None

    def read_batch(self, rows: Any, generator: np.random.Generator) -> tuple[Tensor, ...]:
        if len(self.read) == self.fail_at:
            raise ConnectionResetError("the disk is gone")
        self.read.append(rows.tolist())
        shift = torch.from_numpy(generator.normal(0, 0.01, (len(rows), 1, 1, 1))).float()
        return self.inputs[rows] + shift, self.wanted[rows]

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        self.at_loss()
        return {"loss": F.mse_loss(network(batch[0]).float(), batch[1])}

    def error(self) -> float:
        with torch.no_grad():
            return float(F.mse_loss(self.network(self.inputs), self.wanted))

    def fit(self, recipe: Recipe = RECIPE, **options: Any) -> History:
        return fit(
            self.network,
            len(self.inputs),
            self.read_batch,
            self.loss,
            recipe,
            title="Training a toy",
            device=CPU,
            **options,
        )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fit_lowers_the_loss(optimizer: Any) -> None:
    toy, stays = Toy(), Toy()
    toy.network.eval()
    before = toy.error()
    recipe = replace(RECIPE, epochs=60, optimizer=optimizer)
    history = toy.fit(recipe)
    stays.fit(replace(recipe, learning_rate=0.0))
    assert not toy.network.training
    assert toy.error() < 0.5 * before < 0.6 * stays.error()
    assert history.epochs[-1]["loss"] < 0.5 * history.epochs[0]["loss"]


def test_history_has_the_mean_of_every_fact_of_an_epoch() -> None:
    toy, losses = Toy(), []

    def loss(network: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        losses.append(float(len(losses)))
        return toy.loss(network, batch) | {"step": torch.tensor(losses[-1])}

    history = fit(
        toy.network,
        ROWS,
        toy.read_batch,
        loss,
        RECIPE,
        title="t",
        device=CPU,
        validate=lambda: -float(len(losses)),
    )
    assert [sorted(entry) for entry in history.epochs] == [["loss", "step", "validation"]] * 3
    assert [entry["step"] for entry in history.epochs] == [1.5, 5.5, 9.5]
    assert [entry["validation"] for entry in history.epochs] == [-4, -8, -12]
    assert (history.best_epoch, history.device) == (2, "cpu")
    assert 0 < history.seconds < 60
    assert "validation" not in Toy().fit().epochs[0]


# --------------------------------------------------------------------------------------------- rows


def test_an_epoch_reads_whole_batches_of_different_rows_in_another_order_each() -> None:
    toy = Toy()
    toy.fit(replace(RECIPE, epochs=12))
    assert {len(rows) for rows in toy.read} == {4}
    epochs = [list(itertools.chain(*toy.read[start : start + 4])) for start in range(0, 48, 4)]
    assert all(len(set(rows)) == 16 for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 12
    assert set(itertools.chain(*epochs)) == set(range(ROWS))  # those left out are others each time


def test_rows_that_lie_on_a_disk_are_drawn_window_by_window() -> None:
    def rows_in_order(row_bytes: int) -> list[int]:
        toy = Toy(rows=128)
        toy.fit(replace(RECIPE, epochs=1), row_bytes=row_bytes)
        return list(itertools.chain(*toy.read))

    windows = block_shuffle(128, BLOCK_BYTES, np.random.default_rng([RECIPE.seed, 0]))  # one row a block
    assert len(windows) > 1
    assert rows_in_order(BLOCK_BYTES) == np.concatenate(windows).tolist()
    assert rows_in_order(0) != rows_in_order(BLOCK_BYTES)


def test_a_rank_without_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="a row for each of 4 ranks, found 3"):
        Toy(rows=3).fit(ranks=Ranks(0, 4))


def test_fewer_rows_than_a_batch_are_used_all_the_same() -> None:
    toy = Toy(rows=3)
    before = state_bytes(toy.network)
    toy.fit()
    assert [sorted(rows) for rows in toy.read] == [[0, 1, 2]] * 3
    assert state_bytes(toy.network) != before


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_training_of_four_steps_is_one_too(epochs: int) -> None:
    toy = Toy()
    before = state_bytes(toy.network)
    toy.fit(replace(RECIPE, epochs=epochs))
    assert len(toy.read) == 4 * epochs
    assert state_bytes(toy.network) != before


def test_an_error_of_the_reading_thread_reaches_the_caller() -> None:
    toy = Toy()
    toy.fail_at = 6
    with pytest.raises(ConnectionResetError, match="the disk is gone"):
        toy.fit()
    assert len(toy.read) == 6


# --------------------------------------------------------------------------------------------- repeating


def test_the_recipe_alone_decides_and_the_callers_random_numbers_stay() -> None:
    digests = []
    for caller, recipe in ((1, RECIPE), (2, RECIPE), (1, replace(RECIPE, seed=5))):
        toy = Toy()
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        toy.fit(recipe)
        assert torch.equal(torch.get_rng_state(), before)
        digests.append(state_bytes(toy.network))
    assert digests[0] == digests[1] != digests[2]


def scripted(scores: list[float]) -> Callable[[], float]:
    """A validation that gives these scores, then ever worse ones."""
    remaining = iter([*scores, *range(100, 200)])
    return lambda: float(next(remaining))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("fail_at", [1, 4, 6, 11])
@pytest.mark.parametrize("validated", [False, True])
def test_a_run_cut_off_and_resumed_ends_as_one_that_was_not(
    optimizer: Any, fail_at: int, validated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_SECONDS", -1.0)
    recipe, path = (
        replace(RECIPE, optimizer=optimizer, weight_decay=1e-3),
        tmp_path / "checkpoint.safetensors",
    )

    def validate(toy: Toy) -> dict[str, Any]:
        return {"validate": toy.error} if validated else {}

    whole, broken, resumed = (
        Toy(),
        Toy(),
        Toy(seed=7),
    )  # the resumed starts elsewhere: all comes from the file
    expected = whole.fit(recipe, **validate(whole))
    broken.fail_at = fail_at
    with pytest.raises(ConnectionResetError):
        broken.fit(recipe, checkpoint=path, **validate(broken))
    assert state_bytes(broken.network) != state_bytes(whole.network)
    history = resumed.fit(recipe, checkpoint=path, **validate(resumed))
    assert resumed.read == whole.read[fail_at:]
    assert state_bytes(resumed.network) == state_bytes(whole.network)
    assert (history.epochs, history.best_epoch) == (expected.epochs, expected.best_epoch)


def test_a_finished_run_resumed_is_finished(tmp_path: Path) -> None:
    path, done, again = tmp_path / "checkpoint.safetensors", Toy(), Toy(seed=7)
    done.fit(checkpoint=path, validate=scripted([2, 1, 3]))
    history = again.fit(checkpoint=path)
    assert again.read == []
    assert state_bytes(again.network) == state_bytes(done.network)
    assert history.best_epoch == 1


@pytest.mark.parametrize("changed", [{"seed": 3}, {"epochs": 4}, {"learning_rate": 0.01}, {"optimizer": "sgd"}])
def test_a_checkpoint_of_another_recipe_is_not_gone_on_from(changed: dict[str, Any], tmp_path: Path) -> None:
    path, recipe = tmp_path / "checkpoint.safetensors", replace(RECIPE, **changed)
    Toy(seed=7).fit(checkpoint=path)
    fresh, beside = Toy(), Toy()
    fresh.fit(recipe)
    beside.fit(recipe, checkpoint=path)
    assert beside.read == fresh.read
    assert state_bytes(beside.network) == state_bytes(fresh.network)


def test_a_checkpoint_is_a_private_safetensors_file(tmp_path: Path) -> None:
    path, toy = tmp_path / "checkpoint.safetensors", Toy()
    umask = os.umask(0)
    try:
        toy.fit(checkpoint=path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["record"])["step"] == 12
        assert "network.0.weight" in set(file.keys())
    torch.save(toy.network.state_dict(), path)  # a pickle does not pass for one
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")


# --------------------------------------------------------------------------------------------- best epoch


@pytest.mark.parametrize(("scores", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 1.0, 1.0], 0), ([3.0, 2.0, 1.0], 2)])
def test_the_weights_of_the_best_epoch_are_returned(scores: list[float], best: int) -> None:
    toy, script, digests = Toy(), scripted(scores), []

    def validate() -> float:
        assert not toy.network.training
        digests.append(state_bytes(toy.network))
        return script()

    history = toy.fit(validate=validate)
    last = Toy()
    assert last.fit().best_epoch == 2
    assert history.best_epoch == best
    assert state_bytes(toy.network) == digests[best]
    assert len(set(digests)) == 3
    assert digests[2] == state_bytes(last.network)  # validating changes nothing in training


# --------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize(("bf16", "used"), [("on", True), ("off", False)])
def test_bf16_is_used_and_recorded_as_asked(bf16: Any, used: bool) -> None:
    toy, seen = Toy(), set()
    toy.at_loss = lambda: seen.add(torch.is_autocast_enabled("cpu"))
    assert toy.fit(replace(RECIPE, bf16=bf16)).bf16 is used
    assert seen == {used}
    assert {parameter.dtype for parameter in toy.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("has", "used"),
    [({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_auto_goes_by_the_instructions_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], used: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    toy, seen = Toy(), []
    toy.at_loss = lambda: seen.append(torch.is_autocast_enabled("cpu"))
    assert toy.fit(replace(RECIPE, bf16="auto")).bf16 is used
    assert seen == [used] * RECIPE.epochs * (ROWS // RECIPE.batch_size)  # and nothing is tried beforehand


def test_auto_is_off_where_torch_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert uses_bf16("auto", CPU) is False
    assert uses_bf16("auto", torch.device("mps")) is False
    assert uses_bf16("on", CPU) is True


@pytest.mark.parametrize("native", [True, False])
def test_auto_goes_by_the_instructions_of_the_gpu_not_by_what_it_emulates(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert uses_bf16("auto", torch.device("cuda")) is native
