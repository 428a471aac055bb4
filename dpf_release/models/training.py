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
    """How a network is fitted."""

    epochs: int  # passes over the rows
    batch_size: int  # rows a step, of all ranks together; a shorter last batch is left out (other rows each epoch)
    learning_rate: float  # peak of the one-cycle schedule
    optimizer: Literal["sgd", "adam"] = "adam"  # SGD with Nesterov momentum 0.9
    weight_decay: float = 0.0  # as the optimizer defines it
    seed: int = 0  # of the order of rows and of what the batches draw. For P it comes from the vault's secret
    bf16: Literal["auto", "on", "off"] = "auto"  # autocast to it; `auto`: where the device has instructions for it


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
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cuda": cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    device = torch.device(wanted if wanted != "auto" else next(kind for kind, count in there.items() if count))
    if (device.index or 0) >= there[device.type]:
        raise ConfigError(f"expected a device that is there, found {wanted!r}. Name another with --device, or auto.")
    if device == torch.device("cuda"):  # under torchrun each process of a machine takes its own
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % cuda)
    return device


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
        read_batch: runs one step ahead, in a thread.
        loss: means over the batch; runs under autocast where that is on.
        recipe: how.
        title: for the progress line.
        device: where.
        ranks: who takes part.
        validate: a score after each epoch, lower is better, asked in evaluation mode; without it the last epoch stays.
        checkpoint: written every minute and after each epoch; a run with the same recipe goes on from it.
        subject: what else the training depends on (digests of data and frozen networks); a checkpoint of another is not
            gone on from.
        row_bytes: size of a row on disk, where neighbours are best read together: `block_shuffle` draws the order then.

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
    state = _State(network, recipe, steps, title, {"rows": rows, "subject": subject})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        done = state.load(checkpoint) if checkpoint else 0  # steps of earlier runs
        if not ranks.is_first:
            # A checkpoint has the first rank's state alone.
            torch.manual_seed(int(np.random.default_rng([recipe.seed, done, ranks.rank]).integers(2**63)))
        history = state.history
        history.device, started, saved = str(device), time.monotonic() - history.seconds, time.monotonic()
        if done == 0:
            history.bf16 = bool(ranks.from_first(np.array([uses_bf16(recipe.bf16, device)]))[0])
        trained = network
        if ranks.world_size > 1:
            with together():  # what averages the ranks' gradients
                ids = [device.index] if device.type == "cuda" else None
                trained = DistributedDataParallel(network, device_ids=ids)
        with (
            keeping_large_blocks(),
            Progress(title, recipe.epochs * steps * recipe.batch_size, shown=ranks.is_first) as progress,
            contextlib.closing(ahead(_batches(rows, row_bytes, steps, recipe, done, read_batch, ranks))) as batches,
        ):
            progress.skip(done * recipe.batch_size)
            for step, batch in enumerate(batches, start=done):
                batch = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
                shown = state.step(trained, loss, batch, ranks)
                progress.advance(recipe.batch_size, epoch=step // steps + 1, **shown)
                last_of_epoch = (step + 1) % steps == 0
                if last_of_epoch:
                    state.end_epoch(validate if ranks.is_first else None)
                    state.refuse_divergence(history.epochs[-1].get("validation", 0.0))
                history.seconds = time.monotonic() - started
                late = time.monotonic() - saved > CHECKPOINT_EVERY_SECONDS
                if checkpoint and ranks.is_first and (last_of_epoch or late):
                    state.save(checkpoint, step + 1)
                    saved = time.monotonic()
    if state.best:
        network.load_state_dict(state.best)
    else:
        history.best_epoch = len(history.epochs) - 1
    network.eval()
    return history


def _batches(
    rows: int, row_bytes: int, steps: int, recipe: Recipe, done: int, read_batch: ReadBatch, ranks: Ranks
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

    def __init__(
        self, network: nn.Module, recipe: Recipe, steps: int, title: str, depends_on: dict[str, int | str]
    ) -> None:
        self.network, self.title = network, title
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        rate, decay = recipe.learning_rate, recipe.weight_decay
        self.optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=decay)
        else:
            self.optimizer = torch.optim.Adam(parameters, rate, weight_decay=decay)
        total = recipe.epochs * steps
        rise = 0.2 if total != 4 else 0.25  # one that ends at its first step divides by zero
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=total + 1, pct_start=rise, cycle_momentum=False
        )
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        # A checkpoint of anything else is not gone on from.
        self.fingerprint = asdict(recipe) | depends_on | {"shapes": shapes}
        self.history = History()
        self.best: dict[str, Tensor] = {}
        self.sums: dict[str, float] = {}
        self.count = 0

    def step(self, trained: nn.Module, loss: Loss, batch: Batch, ranks: Ranks) -> dict[str, float]:
        """One update of the network, which `trained` is or wraps; returns the facts' means over all ranks."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with together():
            with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=self.history.bf16):
                facts = loss(trained, batch)
            shown = ranks.mean({name: float(value.detach()) for name, value in facts.items()})
            self.refuse_divergence(shown["loss"])
            facts["loss"].backward()
        self.optimizer.step()
        self.schedule.step()
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in shown.items()}
        self.count += 1
        return shown

    def refuse_divergence(self, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{self.title}: expected a finite loss, found {value}: it diverged. Lower its learning_rate, and run "
                "the command again with --restart."
            )

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

    def save(self, path: Path, step: int) -> None:
        optimizer = self.optimizer.state_dict()
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, values in optimizer["state"].items():
            tensors |= {f"optimizer.{number}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
        tensors["rng"] = torch.get_rng_state()
        if self.history.device.startswith("cuda"):
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.history.device)
        record = {
            "step": step,
            "fingerprint": self.fingerprint,
            "history": asdict(self.history),
            "groups": optimizer["param_groups"],
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))},
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
