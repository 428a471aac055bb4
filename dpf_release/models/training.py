"""The one training loop. The trainings (Φ, ψ, P, a probe) differ in their batches and their loss, nothing else."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpf_release.bank.dataset import block_shuffle
from dpf_release.core.arrays import Rows
from dpf_release.core.files import replacing
from dpf_release.core.memory import keeping_large_blocks
from dpf_release.core.progress import Progress
from dpf_release.core.ranks import Ranks, together
from dpf_release.core.read_ahead import ahead
from dpf_release.errors import ConfigError, TrainingError

Batch = tuple[Tensor, ...]
# Row numbers and a generator (for augmentation) -> tensors
ReadBatch = Callable[[Rows, np.random.Generator], Batch]
# Network and batch, on the device -> {"loss": ..., other facts to show}
Loss = Callable[[nn.Module, Batch], dict[str, Tensor]]
CHECKPOINT_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """How a network is fitted.

    Attributes:
        epochs: passes over the rows.
        batch_size: rows a step, of all ranks together; a shorter last batch is left out (other rows each epoch).
        learning_rate: peak of the one-cycle schedule.
        optimizer: SGD with Nesterov momentum 0.9, or Adam.
        weight_decay: decoupled from nothing: as the optimizer defines it.
        seed: of the order of rows and of what the batches draw. For P it comes from the vault's secret.
        bf16: autocast to bfloat16; `auto`: where the device has instructions for it.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["sgd", "adam"] = "adam"
    weight_decay: float = 0.0
    seed: int = 0
    bf16: Literal["auto", "on", "off"] = "auto"


@dataclass
class History:
    """What a training did: one entry an epoch, and how it ran."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    bf16: bool = False
    device: str = "cpu"
    seconds: float = 0.0


def pick_device(wanted: str = "auto") -> torch.device:
    """`auto`: a GPU where there is one.

    Raises:
        ConfigError: the device that was asked for is not there.
    """
    if wanted == "cuda" and torch.cuda.is_available():
        wanted = "auto"  # which of them is torchrun's word
    if wanted != "auto":
        device = torch.device(wanted)
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= there[device.type]:
            raise ConfigError(
                f"expected a device that is there, found {wanted!r}. Name another with --device, or auto."
            )
        return device
    if torch.cuda.is_available():  # under torchrun each process of a machine takes its own
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def uses_bf16(wanted: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether a training on a device autocasts to bfloat16: always the same on the same machine.

    `auto` is on where the device has instructions for it, which make it faster: a GPU of 2020 or later, a CPU with
    AVX-512 BF16 or AMX. Where torch does not say (older ones do not of a CPU), it is off.
    """
    if wanted != "auto":
        return wanted == "on"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def fit(
    network: nn.Module,
    rows: int,
    read_batch: ReadBatch,
    loss: Loss,
    recipe: Recipe,
    *,
    title: str,
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008, immutable
    validate: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    subject: str = "",
    row_bytes: int = 0,
) -> History:
    """Fits `network` in place and leaves it in evaluation mode on `device`, at its best epoch.

    Several ranks train as DistributedDataParallel: each takes an equal part of every batch, with the batch statistics
    of its own part. What the first rank ends with is the result; it alone validates and writes checkpoints.

    Args:
        network: what is trained; everything else that `loss` uses must be frozen by the caller.
        rows: how many training rows there are.
        read_batch: row numbers and a generator (for augmentation) → tensors; runs one step ahead, in a thread.
        loss: network and batch → `{"loss": ..., other facts to show}`, means over the batch; runs under autocast where
            that is on.
        recipe: how.
        title: for the progress line.
        device: where.
        ranks: who takes part.
        validate: a score after each epoch, lower is better, asked in evaluation mode; without it the last epoch stays.
        checkpoint: written every minute and after each epoch; a run with the same recipe goes on from it.
        subject: what else the training depends on (digests of data and frozen networks); a checkpoint of another is not
            gone on from.
        row_bytes: size of a row on disk, where neighbours are best read together: `loader.block_shuffle` draws the
            order then.

    Raises:
        ConfigError: the ranks cannot share a batch equally, or there are fewer rows than ranks.
        TrainingError: the loss is no longer finite.
        RankError: a rank has ended.
    """
    ranks.refuse_uneven(**{title: recipe.batch_size})
    if rows < ranks.world_size:
        raise ConfigError(f"{title}: expected a row for each of {ranks.world_size} ranks, found {rows}. Start fewer.")
    network.to(device).to(memory_format=torch.channels_last)
    steps = max(1, rows // recipe.batch_size)
    state = _State(network, recipe, steps, {**asdict(recipe), "rows": rows, "subject": subject})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        done = state.load(checkpoint) if checkpoint else 0  # steps of earlier runs
        if not ranks.is_first:
            torch.manual_seed(_seed_of(recipe.seed, done, ranks.rank))  # a checkpoint has the first rank's state alone
        history = state.history
        history.device, started, saved = str(device), time.monotonic() - history.seconds, time.monotonic()
        if done == 0:
            history.bf16 = bool(ranks.from_first(np.array([uses_bf16(recipe.bf16, device)]))[0])
        run = _Run(title, state, _shared(network, ranks, device), loss, device, ranks)
        with (
            keeping_large_blocks(),
            Progress(title, recipe.epochs * steps * recipe.batch_size, shown=ranks.is_first) as progress,
            contextlib.closing(ahead(_batches(rows, row_bytes, steps, recipe, done, read_batch, ranks))) as batches,
        ):
            progress.skip(done * recipe.batch_size)
            for step, batch in enumerate(batches, start=done):
                shown = run.step(batch)
                progress.advance(recipe.batch_size, epoch=step // steps + 1, **shown)
                last_of_epoch = (step + 1) % steps == 0
                if last_of_epoch:
                    state.end_epoch(validate if ranks.is_first else None)
                    _refuse_divergence(title, history.epochs[-1].get("validation", 0.0))
                history.seconds = time.monotonic() - started
                late = time.monotonic() - saved > CHECKPOINT_EVERY_SECONDS
                if checkpoint and ranks.is_first and (last_of_epoch or late):
                    state.save(checkpoint, step + 1)
                    saved = time.monotonic()
    state.take_best()
    network.eval()
    return history


@dataclass(frozen=True)
class _Run:
    """The steps of one rank.

    Attributes:
        title: of the training.
        state: what each step changes.
        trained: what the loss runs, as `_shared` says.
        loss: as for `fit`.
        device: where.
        ranks: who takes part.
    """

    title: str
    state: _State
    trained: nn.Module
    loss: Loss
    device: torch.device
    ranks: Ranks

    def step(self, batch: Batch) -> dict[str, float]:
        """One update of the network; returns what the loss says, means over all ranks."""
        state = self.state
        batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
        state.network.train()
        state.optimizer.zero_grad(set_to_none=True)
        with together():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=state.history.bf16):
                facts = self.loss(self.trained, batch)
            shown = self.ranks.mean({name: float(value.detach()) for name, value in facts.items()})
            _refuse_divergence(self.title, shown["loss"])
            facts["loss"].backward()
        state.optimizer.step()
        state.schedule.step()
        state.add(shown)
        return shown


def _shared(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """What the loss runs: the network itself, or with several ranks the wrapper that averages their gradients."""
    if ranks.world_size == 1:
        return network
    with together():
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids)


def _seed_of(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**63))


def _refuse_divergence(title: str, value: float) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"{title}: expected a finite loss, found {value}: it diverged. Lower its learning_rate, and run the "
            "command again with --restart."
        )


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, recipe.learning_rate, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        )
    return torch.optim.Adam(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    """One cycle over all steps."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=total + 1,
        pct_start=0.2 if total != 4 else 0.25,  # a rise that ends at its first step divides by zero
        cycle_momentum=False,
    )


def _batches(
    rows: int,
    row_bytes: int,
    steps: int,
    recipe: Recipe,
    done: int,
    read_batch: ReadBatch,
    ranks: Ranks,
) -> Iterator[Batch]:
    """This rank's part of each batch from step `done` on.

    Rows and draws depend on seed, step and rank alone, so a resume repeats them.
    """
    size = min(recipe.batch_size, rows) // ranks.world_size
    for epoch in range(done // steps, recipe.epochs):
        generator = np.random.default_rng([recipe.seed, epoch])
        windows = block_shuffle(rows, row_bytes, generator) if row_bytes else [generator.permutation(rows)]
        order = np.concatenate(windows)
        for step in range(done - epoch * steps if epoch == done // steps else 0, steps):
            first = step * recipe.batch_size + ranks.rank * size  # of a step's rows, each rank has its run
            draws = [recipe.seed, epoch, step] + [ranks.rank] * (not ranks.is_first)
            yield read_batch(order[first : first + size], np.random.default_rng(draws))


class _State:
    """All that a resumed training needs; on disk as safetensors, so that nothing is unpickled."""

    def __init__(self, network: nn.Module, recipe: Recipe, steps: int, facts: dict[str, Any]) -> None:
        self.network, self.optimizer = network, _optimizer(network, recipe)
        self.schedule = _schedule(self.optimizer, recipe, recipe.epochs * steps)
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        self.fingerprint = facts | {"shapes": shapes}  # a checkpoint of anything else is not gone on from
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, facts: dict[str, float]) -> None:
        for name, value in facts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def end_epoch(self, validate: Callable[[], float] | None) -> None:
        entry = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        if validate is not None:
            self.network.eval()
            with torch.inference_mode():
                entry["validation"] = validate()
            scores = [epoch["validation"] for epoch in self.history.epochs]
            if not scores or entry["validation"] < scores[self.history.best_epoch]:
                self.history.best_epoch = len(scores)
                self.best = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.history.epochs.append(entry)

    def take_best(self) -> None:
        if self.best:
            self.network.load_state_dict(self.best)
        else:
            self.history.best_epoch = len(self.history.epochs) - 1

    def save(self, path: Path, step: int) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {
            f"optimizer.{number}.{key}": value
            for number, values in optimizer["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        tensors["rng"] = torch.get_rng_state()
        if self.history.device.startswith("cuda"):
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.history.device)
        record = {
            "step": step,
            "fingerprint": self.fingerprint,
            "history": asdict(self.history),
            "groups": optimizer["param_groups"],
            "schedule": {
                key: value for key, value in self.schedule.state_dict().items() if isinstance(value, (int, float, list))
            },
            "sums": self.sums,
            "count": self.count,
        }
        with replacing(path) as partial:
            ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(ready, partial, {"record": json.dumps(record)})

    def load(self, path: Path) -> int:
        """Steps done by an earlier run of the same training; 0 where there was none, or its checkpoint is damaged."""
        try:
            with safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {}).get("record", "{}"))
                if record.get("fingerprint") != self.fingerprint:
                    return 0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        except (FileNotFoundError, SafetensorError):
            return 0
        self.network.load_state_dict(_under("network.", tensors))
        self.best = _under("best.", tensors)
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            number, key = name.split(".", 1)
            state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": record["groups"]})
        self.schedule.load_state_dict(record["schedule"])
        torch.set_rng_state(tensors["rng"])
        self.history = History(**record["history"])
        if "rng_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng_cuda"], self.history.device)
        self.sums, self.count = record["sums"], record["count"]
        return int(record["step"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
