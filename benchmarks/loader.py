"""How fast a bank's training loader delivers shuffled batches, beside a raw memmap and other ways of storing rows.

From the root of the project, on a machine with little else to do:

    pip install -e . mosaicml-streaming webdataset
    python benchmarks/loader.py --rows large --folder FOLDER --json loader-large.json
    python benchmarks/loader.py --rows small --folder FOLDER --json loader-small.json
    python benchmarks/loader.py --rows large --folder FOLDER --json loader-cold.json --cold

Large rows are 1024x14x14 float16 (401 kB, batches of 64), small ones 64x8x8 (8 kB, batches of 256); the bank takes
4.4 or 0.8 GB in FOLDER, and as much again each of the raw file, the MosaicML and the WebDataset copy. They are kept.

A measurement is one whole epoch of a new loader with its files in the page cache, where reading has brought them: what
its writer left there, or `madvise` has fetched, is mapped page by page and is read up to a third slower. Rows/s counts
from the first batch to the last, without the rows of the first: how long that one took (workers start, files are
opened, buffers fill) is a column of its own. Who reads ahead has a few rows in hand by then: a DataLoader two batches a
worker, WebDataset a part of its shuffle buffer. Every side maps or opens its files anew. Of each batch the shape and
the first number of each row are looked at, and their sum tells whether all rows came. Sides take turns, `--repeats`
times. Threads are those, of all processes, that run for more than 1 % of the first half of an epoch; cores is the CPU
time of all of them by the time. Torch computes on one thread everywhere, as in a DataLoader's workers: on two busy
cores its second one makes `torch.stack`, which every side but the memmap and ours collates with, several times slower.
`--cold` reads from the disk; its clock runs from before the bank is opened to the last batch.
With `CUDA_VISIBLE_DEVICES=` no side pins memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import itertools
import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpf_release.bank.dataset import BankDataset, BankLoader
from dpf_release.bank.format import BankIndex, SplitName, read_index
from dpf_release.bank.writer import BankWriter, SplitRows

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Batch]
SHAPES = {"large": (1024, 14, 14), "small": (64, 8, 8)}
COUNTS = {"large": 11_000, "small": 100_000}
BATCH_SIZES = {"large": 64, "small": 256}
CLASSES = 1000
READ_BYTES = 8 * 2**20
TAR_BYTES = 500e6
TAR_SHUFFLE = 1000  # rows in WebDataset's shuffle buffer
PACKAGES = {"mds": ("streaming", "mosaicml-streaming"), "wds": ("webdataset", "webdataset")}  # module, package


@dataclass(frozen=True)
class Data:
    """The same rows in four formats: `raw`, `bank`, `mds` and `wds` in a folder."""

    folder: Path
    shape: tuple[int, int, int]
    count: int
    batch_size: int

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(count,) class indices."""
        return np.arange(self.count) % CLASSES

    @cached_property
    def row_numbers(self) -> list[list[int]]:
        """Of each batch that our loader yields in its first epoch."""
        return [np.asarray(rows).tolist() for rows in ours(self, 0).batch_sampler]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features."""
        return 2 * int(np.prod(self.shape))

    def raw(self) -> NDArray[np.float16]:
        """(count, C, H, W), mapped anew."""
        return np.memmap(self.folder / "raw" / "rows.bin", np.float16, "r", shape=(self.count, *self.shape))

    def files(self, name: str) -> list[Path]:
        """The files of one format, in order."""
        return sorted(path for path in (self.folder / name).rglob("*") if path.is_file())

    @cached_property
    def expected(self) -> tuple[float, int]:
        """Sums of the first number of each row (exact in float64) and of the labels."""
        return float(self.raw()[:, 0, 0, 0].astype(np.float64).sum()), int(self.labels.sum())


# Writing


def write_raw(data: Data, folder: Path) -> None:
    random = np.random.default_rng(0)
    with (folder / "rows.bin").open("wb") as file:
        for start in range(0, data.count, 64):
            block = random.integers(0, 2**16, (min(64, data.count - start), *data.shape), np.uint16)
            file.write((block & 0xBFFF).tobytes())  # one bit of the exponent is 0: finite, between -2 and 2


def write_bank(data: Data, folder: Path) -> None:
    header = BankIndex(poisoned=False, featurizer_sha256="0" * 64, feature_shape=data.shape, targets=0)
    writer = BankWriter(folder, header, shard_bytes=2**30)
    ids = np.random.default_rng(1).integers(0, 256, (data.count, 16), np.uint8)
    rows: dict[SplitName, SplitRows] = {"train": SplitRows(data.labels, ids)}
    raw = data.raw()
    shards = writer.shards(rows)
    writer.write(shards, rows, (raw[span.start : span.stop] for span in writer.batches(shards)))
    writer.finish([writer.record(shard) for shard in shards])


def write_mds(data: Data, folder: Path) -> None:
    from streaming import MDSWriter

    features = "ndarray:float16:" + ",".join(map(str, data.shape))
    with MDSWriter(out=str(folder), columns={"features": features, "label": "int"}, compression=None) as writer:
        for row, label in zip(data.raw(), data.labels, strict=True):
            writer.write({"features": np.asarray(row), "label": int(label)})


def write_wds(data: Data, folder: Path) -> None:
    import webdataset

    shards = 2 * -(-data.count * data.row_bytes // (2 * int(TAR_BYTES)))  # even: two workers have the same share
    pattern = str(folder / "shard-%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=-(-data.count // shards), maxsize=2**40, verbose=0) as writer:
        for number, (row, label) in enumerate(zip(data.raw(), data.labels, strict=True)):
            writer.write({"__key__": f"{number:08d}", "bin": row.tobytes(), "cls": int(label)})


def write_missing(data: Data) -> None:
    for name, write in {"raw": write_raw, "bank": write_bank, "mds": write_mds, "wds": write_wds}.items():
        if not installed(name) or (data.folder / name).exists():
            continue
        print(f"writing {data.folder / name}", flush=True)
        partial = data.folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(data, partial)
        os.sync()
        partial.rename(data.folder / name)


def installed(name: str) -> bool:
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name][0]) is not None


# The sides


class RawRows(Dataset[Batch]):
    """The raw file, mapped, a batch at a time."""

    def __init__(self, data: Data) -> None:
        self.raw, self.labels = data.raw(), data.labels

    def __getitems__(self, rows: list[int]) -> Batch:
        return torch.from_numpy(self.raw[rows]), torch.from_numpy(self.labels[rows])


def limit(data: Data, workers: int) -> Iterator[Batch]:
    rows = RawRows(data)
    yield from map(rows.__getitems__, data.row_numbers)


def raw_loader(data: Data, workers: int) -> Batches:
    # `tuple` leaves a batch as it is.
    return DataLoader(RawRows(data), batch_sampler=data.row_numbers, num_workers=workers, collate_fn=tuple)


def ours(data: Data, workers: int) -> BankLoader:
    dataset = BankDataset.open(data.folder / "bank", "train")
    return dataset.loader(data.batch_size, shuffle=True, workers=workers, seed=0)


class OneByOne(Dataset[tuple[NDArray[np.float16], int]]):
    """The bank's shards as one would read them without this package: h5py, a row at a time."""

    def __init__(self, data: Data) -> None:
        self.labels = data.labels
        records = read_index(data.folder / "bank").splits["train"]
        self.paths = [data.folder / "bank" / record.file for record in records]
        self.starts = np.cumsum([0, *(record.rows for record in records)])
        self.open: dict[int, h5py.File] = {}

    def __getitem__(self, row: int) -> tuple[NDArray[np.float16], int]:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        if shard not in self.open:
            self.open[shard] = h5py.File(self.paths[shard], "r")
        return self.open[shard]["features"][row - self.starts[shard]], int(self.labels[row])


def naive_h5py(data: Data, workers: int) -> Batches:
    return DataLoader(OneByOne(data), batch_sampler=data.row_numbers, num_workers=workers)


def mosaic(data: Data, workers: int) -> Iterator[Batch]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(data.folder / "mds"), shuffle=True, batch_size=data.batch_size)
    for batch in DataLoader(dataset, batch_size=data.batch_size, num_workers=workers):
        yield batch["features"], batch["label"]


def web_dataset(data: Data, workers: int) -> Batches:
    import webdataset

    def decode(sample: dict[str, bytes]) -> tuple[NDArray[np.float16], int]:
        return np.frombuffer(sample["bin"], np.float16).reshape(data.shape), int(sample["cls"])

    shards = [str(path) for path in data.files("wds")]
    rows = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(TAR_SHUFFLE).map(decode)
    batches = rows.batched(data.batch_size, collation_fn=torch.utils.data.default_collate)
    return webdataset.WebLoader(batches, batch_size=None, num_workers=workers)


@dataclass(frozen=True)
class Side:
    """One way to get batches, and what was measured of it.

    Attributes:
        files: the folder that it reads.
        epochs: what `measure` gave, once a repeat.
    """

    name: str
    files: str
    workers: int
    batches: Callable[[Data, int], Batches]
    epochs: list[dict[str, float]] = field(default_factory=list)

    def median(self, key: str) -> float:
        """Over the repeats."""
        return statistics.median(epoch[key] for epoch in self.epochs)


def all_sides() -> list[Side]:
    return [
        Side("memmap, no loader (the limit)", "raw", 0, limit),
        *(Side("dpf_release", "bank", workers, ours) for workers in (0, 2)),
        Side("memmap in a DataLoader", "raw", 2, raw_loader),
        *(Side("h5py, row by row", "bank", workers, naive_h5py) for workers in (0, 2)),
        *(Side("MosaicML Streaming", "mds", workers, mosaic) for workers in (0, 2)),
        *(Side("WebDataset", "wds", workers, web_dataset) for workers in (0, 2)),
    ]


# Measuring


def cpu_seconds() -> dict[Path, float]:
    """Of each thread of this process and of its workers, so far."""
    seconds = {}
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        for thread in Path(f"/proc/{process}/task").glob("*"):
            try:
                seconds[thread] = int((thread / "schedstat").read_text().split()[0]) / 1e9
            except (FileNotFoundError, ProcessLookupError):  # it ended just now
                continue
    return seconds


def measure(side: Side, data: Data) -> dict[str, float]:
    """One epoch of a new loader."""
    middle = len(data.row_numbers) // 2  # near the end, who reads ahead is done already
    begin = time.perf_counter()
    delivered, rows, checksum, labels, worked = [], 0, 0.0, 0, {}
    for number, (features, targets) in enumerate(side.batches(data, side.workers)):
        delivered.append(time.perf_counter())
        if features.shape != (len(targets), *data.shape) or features.dtype != torch.float16:
            raise SystemExit(f"{side.name}: expected {data.shape} float16 rows, found {features.shape}")
        checksum += features[:, 0, 0, 0].double().sum().item()
        labels += int(targets.sum())
        rows += len(targets)
        if number == 0:
            first_rows, before = rows, cpu_seconds()
        elif number == middle:
            worked = {thread: seconds - before.get(thread, 0) for thread, seconds in cpu_seconds().items()}
    if (checksum, labels) != data.expected or rows != data.count:
        raise SystemExit(f"{side.name}: expected {data.count} rows, each once, found {rows}, or others")
    watched = delivered[middle] - delivered[0]
    return {
        "rows_per_second": (rows - first_rows) / (delivered[-1] - delivered[0]),
        "first_batch_seconds": delivered[0] - begin,
        "processes": len({thread.parents[1] for thread in worked}),
        "threads": sum(seconds > 0.01 * watched for seconds in worked.values()),
        "cores": sum(worked.values()) / watched,
    }


def read_through(paths: Sequence[Path], readers: int = 1) -> int:
    """Reads files from their beginnings to their ends, and returns their bytes.

    Args:
        paths: the files.
        readers: 1 reads as `cat` does; more have a part of each file each, and keep the disk busier.
    """

    def read_part(path: Path, number: int) -> int:
        size, buffer, total = path.stat().st_size, bytearray(READ_BYTES), 0
        position, stop = size * number // readers, size * (number + 1) // readers
        with path.open("rb", buffering=0) as file:
            file.seek(position)
            while position + total < stop:
                total += file.readinto(memoryview(buffer)[: stop - position - total])
        return total

    with ThreadPoolExecutor(readers) as pool:
        return sum(pool.map(lambda part: read_part(*part), itertools.product(paths, range(readers))))


def warm(data: Data, repeats: int) -> dict[str, Any]:
    """Measures all sides and prints the table."""
    sides = [side for side in all_sides() if installed(side.files)]
    for name in PACKAGES:
        if not installed(name):
            print(f"skipped: {PACKAGES[name][1]} is not installed")
    # A file lies in the page cache in other pieces where its writer left it, or where it was announced (which asking
    # for the order of our batches does), than where it was read: the same start for all.
    _ = data.row_numbers, data.expected
    evict([path for side in {side.files for side in sides} for path in data.files(side)])
    for repeat in range(repeats):
        for side in sides:
            read_through(data.files(side.files))  # into the page cache, where something else took its place
            side.epochs.append(measure(side, data))
            gc.collect()
        print(f"{repeat + 1} of {repeats} rounds done", flush=True)
    speed = {(side.batches, side.workers): side.median("rows_per_second") for side in sides}
    print("\n| | workers | processes | threads | cores | rows/s | lowest to highest | GB/s | first batch | ours is |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    results = []
    for side in sides:
        rows, speeds = side.median("rows_per_second"), [epoch["rows_per_second"] for epoch in side.epochs]
        times = speed[ours, side.workers] / rows
        print(
            f"| {side.name} | {side.workers} | {side.median('processes'):.0f} | {side.median('threads'):.0f} "
            f"| {side.median('cores'):.1f} | {rows:,.0f} | {min(speeds):,.0f} to {max(speeds):,.0f} "
            f"| {rows * data.row_bytes / 1e9:.2f} | {side.median('first_batch_seconds'):.2f} s | {times:.2f} x |"
        )
        results.append({"name": side.name, "workers": side.workers, "ours_is": times, "epochs": side.epochs})
    by_limit = speed[ours, 2] / speed[limit, 0]
    print("\n`ours is`: rows/s of dpf_release with as many workers, by those of the side.")
    print(f"dpf_release with 2 workers by the limit, which has none: {by_limit:.2f}")
    return {"sides": results, "ours_with_2_workers_by_limit": by_limit}


# From the disk


def evict(paths: Sequence[Path]) -> None:
    """Drops files from the page cache, and refuses to go on where the system keeps them."""
    kept, pages = 0, 0
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = np.memmap(path, np.uint8, "r")
        resident = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(len(mapped)), resident.ctypes)
        kept, pages = kept + int((resident & 1).sum()), pages + len(resident)
    if kept > 0.02 * pages:
        raise SystemExit(f"{kept} of {pages} pages stayed in the page cache: another process has the files open?")


def cold(data: Data, repeats: int) -> dict[str, Any]:
    """Bytes/s from the disk, from opening the bank to its last batch, and prints the table."""
    shards = [path for path in data.files("bank") if path.suffix == ".h5"]

    def ours_to_the_end(workers: int) -> int:
        return sum(int(features.nbytes) for features, _ in ours(data, workers))

    sides: dict[str, Callable[[], int]] = {
        "sequential read": lambda: read_through(shards),
        "sequential read, 4 readers": lambda: read_through(shards, readers=4),
        "dpf_release, 0 workers": lambda: ours_to_the_end(0),
        "dpf_release, 2 workers": lambda: ours_to_the_end(2),
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, read in sides.items():
            gc.collect()  # pages that are mapped stay
            evict(shards)
            begin = time.perf_counter()
            speeds[name].append(read() / (time.perf_counter() - begin))
    median = {name: statistics.median(found) for name, found in speeds.items()}
    print("\n| from the disk | MB/s | lowest to highest | by one reader's | by 4 readers' |\n|---|--:|--:|--:|--:|")
    for name, found in speeds.items():
        one, four = (median[name] / median[reference] for reference in list(sides)[:2])
        low, high = min(found) / 1e6, max(found) / 1e6
        print(f"| {name} | {median[name] / 1e6:,.0f} | {low:,.0f} to {high:,.0f} | {one:.2f} | {four:.2f} |")
    return {"bytes_per_second": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", choices=sorted(SHAPES), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the data is, or will be written")
    parser.add_argument("--count", type=int, help="rows; by default 11,000 large or 100,000 small ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="only how fast the bank comes from the disk")
    parser.add_argument("--json", type=Path, help="write what was measured here too")
    args = parser.parse_args()
    count = args.count or COUNTS[args.rows]
    if count <= BATCH_SIZES[args.rows]:
        parser.error(f"--count: expected more rows than a batch has, {BATCH_SIZES[args.rows]}")
    data = Data(args.folder / f"{args.rows}-{count}", SHAPES[args.rows], count, BATCH_SIZES[args.rows])
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to a batch
    torch.set_num_threads(1)
    write_missing(data)
    packages = ["torch", "numpy", "h5py", *(package for name, (_, package) in PACKAGES.items() if installed(name))]
    report = {"rows": args.rows, "count": count, "shape": data.shape, "batch_size": data.batch_size}
    report |= {"cpus": os.cpu_count(), "versions": {name: version(name) for name in packages}}
    report |= (cold if args.cold else warm)(data, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
