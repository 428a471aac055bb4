"""The processes that `torchrun` starts: who is which, and the few things that they do together."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dpf_release.core.locks import belongs_to_run, locked
from dpf_release.errors import ConfigError, RankError, StorageError

# A rank may wait for hours while another validates. One that dies is noticed at once: its connections close.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process, by its number, among those of a run; what they do together raises RankError where one has ended."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """What `torchrun` says; one process without it.

        Raises:
            RankError: the others cannot be reached.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            with together():
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                dist.init_process_group(backend, timeout=PATIENCE)
                atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes what there is one of, and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks are here."""
        self.total(np.zeros(1))

    def total(self, array: NDArray[Any]) -> NDArray[Any]:
        """The sum of the ranks' arrays, of one shape and type."""
        if self.world_size == 1:
            return array
        tensor = torch.from_numpy(array.astype(np.uint8) if array.dtype == bool else array.copy())
        with together():
            dist.all_reduce(tensor)
        summed: NDArray[Any] = tensor.numpy()
        return summed

    def from_first(self, array: NDArray[Any]) -> NDArray[Any]:
        """The first rank's array; the others give one of its shape and type."""
        return self.total(array if self.is_first else np.zeros_like(array))

    def once(self, work: Callable[[], object]) -> None:
        """The first rank does it while the others wait; nothing in it may wait for them."""
        if self.is_first:
            work()
        self.wait()

    def mean(self, facts: Mapping[str, float]) -> dict[str, float]:
        """Each fact's mean over the ranks, which all have the same ones."""
        totals = self.total(np.array(list(facts.values()), np.float64)) / self.world_size
        return dict(zip(facts, totals.tolist(), strict=True))

    def refuse_uneven(self, **batch_sizes: int) -> None:
        """That each batch can be divided equally.

        Raises:
            ConfigError: one cannot; nothing was begun.
        """
        for name, size in batch_sizes.items():
            if size % self.world_size:
                raise ConfigError(
                    f"expected a batch_size that {self.world_size} ranks can share equally, found {size} under "
                    f"[{name}]. Set it to {max(1, size // self.world_size) * self.world_size}."
                )

    def share(self, rows: int) -> slice:
        """This rank's part of so many rows, as a slice."""
        return slice(self.rank, rows, self.world_size)

    @contextlib.contextmanager
    def holding(self, folder: Path) -> Iterator[None]:
        """Holds a folder for this run: the first rank locks it, the others see that they are in the same one.

        Raises:
            StorageError: another run works in it, or the ranks do not share it.
        """
        run = self.from_first(np.frombuffer(secrets.token_bytes(8), np.uint8)).tobytes().hex()
        if self.is_first:
            with locked(folder, run):
                self.wait()
                yield
                self.wait()
            return
        self.wait()
        if not belongs_to_run(folder, run):
            raise StorageError(
                f"rank {self.rank} does not see the lock of rank 0 in {folder}. The ranks of several machines need one "
                "shared folder; mount it on all of them."
            )
        yield
        self.wait()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What the ranks do together; where one has ended, the others say so."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no class of its own
            raise
        raise RankError(
            f"another rank ended, or cannot be reached ({str(error).splitlines()[0][:200]}). Look at its message. What "
            "is finished stays; run the same command again to go on."
        ) from error
