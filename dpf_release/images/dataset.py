"""A table's pictures by row, decoded in this process or in others, and which of them cannot be.

A file that cannot be decoded stays a row of its table: it is reported with its name and reason (`survey`),
counted, and too many of them stop the run (`refuse_bad`). No image is dropped silently.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpf_release.core.arrays import Rows
from dpf_release.core.memory import return_large_blocks
from dpf_release.core.read_ahead import ahead
from dpf_release.errors import ImageError
from dpf_release.images.decode import Preprocess, picture_or_reason, strict_pillow
from dpf_release.images.table import ImageTable

# Starting processes takes as long as decoding some thousand small pictures in threads.
WORTH_PROCESSES = 4096
BATCHES_AHEAD = 2  # of each process


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be decoded: its row in the table, its path there, and why."""

    row: int
    name: str
    reason: str


class Pictures:
    """The decoded pictures of a table, by row.

    `read` decodes in threads (Pillow works outside Python's lock) and keeps what it decoded in memory where that fits:
    for trainings, which come back to each picture. `stream` decodes in worker processes, ahead of its consumer, and
    keeps nothing: for one pass over any number of pictures. An instance belongs to one process.

    Args:
        table: the images.
        preprocess: size of the pictures.
        workers: decoding processes of `stream`; 0: none, threads of this process. By default one a core (of
            this rank), 16 at most, for 4,096 pictures and more.
        memory_limit: bytes of pictures that may be kept. Larger tables are decoded anew at each read.
    """

    def __init__(
        self, table: ImageTable, preprocess: Preprocess, workers: int | None = None, memory_limit: int = 2 * 2**30
    ) -> None:
        self.table, self.preprocess, self.workers = table, preprocess, workers
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        shape = (len(table), 3, *preprocess.size)
        self._kept: Tensor | None = None
        if math.prod(shape) <= memory_limit:
            self._kept = torch.empty(shape, dtype=torch.uint8)  # the system gives the memory as it is filled
        self._is_kept = np.zeros(len(table), dtype=bool)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, rows: Sequence[int] | Rows) -> Tensor:
        """Returns the pictures of these rows, (n, 3, H, W) uint8.

        Raises:
            ImageError: `PATH: reason` of the first that cannot be decoded.
        """
        rows = np.asarray(rows, dtype=np.int64)
        wanted, places = np.unique(rows, return_inverse=True)
        missing = np.flatnonzero(~self._is_kept[wanted])
        pictures = torch.empty((len(wanted), 3, *self.preprocess.size), dtype=torch.uint8)
        if self._kept is not None and len(missing) < len(wanted):
            pictures.copy_(self._kept[torch.from_numpy(wanted)])
        decoded = self._decode_in_threads(wanted[missing])
        for place, found in zip(missing, decoded, strict=True):
            row = int(wanted[place])
            if isinstance(found, str):
                raise ImageError(f"{self.table.paths[row]}: {found}")
            pictures[place] = torch.from_numpy(found)
            if self._kept is not None:
                self._kept[row] = pictures[place]
                self._is_kept[row] = True
        return pictures[torch.from_numpy(places)]

    def stream(self, batches: Sequence[Rows]) -> Generator[tuple[Tensor, list[BadImage]], None, None]:
        """Returns the pictures of each batch in turn, (n, 3, H, W) uint8, undefined at the bad images, and these.

        Raises:
            ImageError: a decoding process ended.
        """
        count, workers = sum(map(len, batches)), self.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's ranks share them
            workers = min(16, max(1, cores)) if count >= WORTH_PROCESSES else 0
        decoded = self._in_processes(batches, workers) if workers and len(batches) > 1 else self._in_threads(batches)
        with contextlib.closing(decoded):
            for rows, (pictures, reasons) in zip(batches, decoded, strict=True):
                yield pictures, [BadImage(int(rows[at]), self.table.paths[rows[at]], why) for at, why in reasons]

    def close(self) -> None:
        """Ends the threads and frees the pictures."""
        self._pool.shutdown(cancel_futures=True)
        self._kept = None

    def _files(self, rows: Rows) -> list[Path]:
        return [self.table.root / self.table.paths[row] for row in rows]

    def _decode_in_threads(self, rows: Rows) -> list[NDArray[np.uint8] | str]:
        with strict_pillow():
            return list(self._pool.map(picture_or_reason, self._files(rows), [self.preprocess] * len(rows)))

    def _in_threads(self, batches: Iterable[Rows]) -> Generator[_Decoded, None, None]:
        return ahead(_stacked(self._decode_in_threads(rows), len(rows), self.preprocess) for rows in batches)

    def _in_processes(self, batches: Iterable[Rows], workers: int) -> Generator[_Decoded, None, None]:
        # Files, not rows, go to the workers: they need not know the table. Not a fork: this process has threads.
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dpf_release.images.dataset"])
        loader = DataLoader(
            _Decoder(self.preprocess),
            batch_size=None,
            sampler=([str(file) for file in self._files(rows)] for rows in batches),
            num_workers=workers,
            prefetch_factor=BATCHES_AHEAD,
            worker_init_fn=_begin_worker,
            multiprocessing_context=context,
        )
        try:
            yield from loader
        except (RuntimeError, OSError, EOFError) as error:  # as a worker's death shows itself, by its moment
            raise ImageError(
                f"a process that decodes images ended: {error}. Out of memory, a picture that crashes the decoder, or "
                'a script that starts processes without `if __name__ == "__main__":`. What is written stays; run again '
                "to go on; an owner may set [compute] workers = 0, to decode in one process."
            ) from error


_Decoded = tuple[Tensor, list[tuple[int, str]]]  # pictures, and where in the batch there is none, and why


class _Decoder(Dataset[Any]):
    """What a worker process does."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def __getitem__(self, files: Sequence[str]) -> _Decoded:
        with strict_pillow():
            found = (picture_or_reason(Path(file), self.preprocess) for file in files)
            return _stacked(found, len(files), self.preprocess)


def _begin_worker(_: int) -> None:
    """A worker does not outlive a run that was killed: neither torch nor the fork server sees to that."""
    return_large_blocks()

    def watch(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, args=[multiprocessing.parent_process()], daemon=True).start()


def _stacked(found: Iterable[NDArray[np.uint8] | str], count: int, preprocess: Preprocess) -> _Decoded:
    pictures = torch.empty((count, 3, *preprocess.size), dtype=torch.uint8)
    reasons = []
    for at, picture in enumerate(found):
        if isinstance(picture, str):
            reasons.append((at, picture))
        else:
            pictures[at] = torch.from_numpy(picture)
    return pictures, reasons
