"""The one training loop. The trainings (Φ, ψ, P, a probe) differ in their batches and their loss, nothing else."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dpf_release.errors import ConfigError, TrainingError
from dpf_release.progress import Progress
from dpf_release.storage import replacing

Rows = NDArray[np.int64]
Batch = tuple[Tensor, ...]
CHECKPOINT_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Recipe:
    """How a network is fitted.

    Attributes:
        epochs: passes over the rows.
        batch_size: rows a step; a shorter last batch is left out (other rows each epoch).
        learning_rate: peak of the one-cycle schedule.
        optimizer: SGD with Nesterov momentum 0.9, or Adam.
        weight_decay: decoupled from nothing: as the optimizer defines it.
        seed: of the order of rows and of what the batches draw. For P it comes from the vault's secret.
        bf16: autocast to bfloat16: `auto` measures on the first batch and takes the faster.
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
    if wanted != "auto":
        device = torch.device(wanted)
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= there[device.type]:
            raise ConfigError(
                f"expected a device that is there, found {wanted!r}. Name another with --device, or auto."
            )
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fit(
    network: nn.Module,
    rows: int,
    read_batch: Callable[[Rows, np.random.Generator], Batch],
    loss: Callable[[Batch], dict[str, Tensor]],
    recipe: Recipe,
    *,
    title: str,
    device: torch.device,
    validate: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
    subject: str = "",
) -> History:
    """Fits `network` in place and leaves it in evaluation mode on `device`, at its best epoch.

    Args:
        network: what is trained; everything else that `loss` uses must be frozen by the caller.
        rows: how many training rows there are.
        read_batch: row numbers and a generator (for augmentation) → tensors; runs one step ahead, in a thread.
        loss: batch on `device` → `{"loss": ..., other facts to show}`; runs under autocast where that is on.
        recipe: how.
        title: for the progress line.
        device: where.
        validate: a score after each epoch, lower is better, asked in evaluation mode; without it the last epoch stays.
        checkpoint: written every minute and after each epoch; a run with the same recipe goes on from it.
        subject: what else the training depends on (digests of data and frozen networks); a checkpoint of another is not
            gone on from.
    """
    network.to(device).to(memory_format=torch.channels_last)
    optimizer = _optimizer(network, recipe)
    steps = max(1, rows // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=recipe.epochs * steps + 1,
        pct_start=0.2,
        cycle_momentum=False,
    )
    state = _State(network, optimizer, schedule, {**asdict(recipe), "rows": rows, "subject": subject})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        done = state.load(checkpoint) if checkpoint else 0  # steps of earlier runs
        history = state.history
        history.device, started, saved = str(device), time.monotonic() - history.seconds, time.monotonic()
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        with (
            Progress(title, recipe.epochs * steps * recipe.batch_size) as progress,
            contextlib.closing(_ahead(_batches(rows, steps, recipe, done, read_batch))) as batches,
        ):
            progress.skip(done * recipe.batch_size)
            for step, batch in enumerate(batches, start=done):
                batch = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
                if step == done:
                    history.bf16 = _use_bf16(recipe, network, loss, batch, device) if done == 0 else history.bf16
                    autocast = torch.autocast(device.type, torch.bfloat16, enabled=history.bf16)
                network.train()
                optimizer.zero_grad(set_to_none=True)
                with autocast:
                    facts = loss(batch)
                _refuse_divergence(title, float(facts["loss"].detach()))
                facts["loss"].backward()
                optimizer.step()
                schedule.step()
                shown = {name: float(value.detach()) for name, value in facts.items()}
                state.add(shown)
                progress.advance(recipe.batch_size, epoch=step // steps + 1, **shown)
                last_of_epoch = (step + 1) % steps == 0
                if last_of_epoch:
                    state.end_epoch(validate)
                    _refuse_divergence(title, history.epochs[-1].get("validation", 0.0))
                history.seconds = time.monotonic() - started
                if checkpoint and (last_of_epoch or time.monotonic() - saved > CHECKPOINT_EVERY_SECONDS):
                    state.save(checkpoint, step + 1)
                    saved = time.monotonic()
    state.take_best()
    network.eval()
    return history


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


def _batches(
    rows: int, steps: int, recipe: Recipe, done: int, read_batch: Callable[[Rows, np.random.Generator], Batch]
) -> Iterator[Batch]:
    """Batches from step `done` on; its rows and draws depend on seed and step alone, so a resume repeats them."""
    for epoch in range(done // steps, recipe.epochs):
        order = np.random.default_rng([recipe.seed, epoch]).permutation(rows)
        for step in range(done - epoch * steps if epoch == done // steps else 0, steps):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            yield read_batch(chosen, np.random.default_rng([recipe.seed, epoch, step]))


def _ahead(batches: Iterator[Batch], depth: int = 2) -> Generator[Batch, None, None]:
    """The same batches, read in a thread while the network computes."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # whatever it is, it belongs to the consumer's thread
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _use_bf16(
    recipe: Recipe,
    network: nn.Module,
    loss: Callable[[Batch], dict[str, Tensor]],
    batch: Batch,
    device: torch.device,
) -> bool:
    if recipe.bf16 != "auto":
        return recipe.bf16 == "on"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for bf16 in (False, True) * 4:
        started = time.monotonic()
        network.train()
        network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            result = loss(batch)
        result["loss"].backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[bf16].append(time.monotonic() - started)
    network.load_state_dict(before)  # batch statistics moved
    return min(seconds[True]) < 0.9 * min(seconds[False])  # the best of each: other work on the machine only adds


class _State:
    """All that a resumed training needs; on disk as safetensors, so that nothing is unpickled."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        facts: dict[str, Any],
    ) -> None:
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
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
