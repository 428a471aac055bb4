"""A bank, written by all ranks: what it will take, and each rank's shards, computed while others are written."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import PIL
import torch

from dpf_release.bank.format import BankIndex, ShardRecord, SplitName, read_index
from dpf_release.bank.writer import BankWriter, Features, Shard, Span, SplitRows
from dpf_release.core.files import PARTIAL, make_folder, refuse_small_disk
from dpf_release.core.progress import Progress, announce
from dpf_release.core.ranks import Ranks
from dpf_release.core.read_ahead import ahead
from dpf_release.core.sizes import readable_size
from dpf_release.errors import DPFReleaseError, VaultError


def refuse_other_plan(what: str, changed: Sequence[str], anew: str, error: type[DPFReleaseError] = VaultError) -> None:
    """Raises where a bank was begun under another plan: what changed, and what to do about it."""
    if changed:
        raise error(
            f"{what} was begun under another plan; changed since: {', '.join(changed)}. Put that back to go on, or "
            f"{anew}."
        )


def changed_facts(known: Mapping[str, Any], today: Mapping[str, Any]) -> list[str]:
    """The names of today's facts that a plan knows otherwise."""
    return [name for name, value in today.items() if known.get(name) != value]


Compute = Callable[[Sequence[Span]], Features]  # of the batches of a bank, in order
CALIBRATION_ROWS = 16


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What the bytes of a bank depend on beside what it is made from: a resume under other facts is refused."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pillow": PIL.__version__}
    versions |= {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else platform.machine()
    return {"device": f"{device.type} {name}", "threads": torch.get_num_threads(), "versions": versions}


def write_bank(
    writer: BankWriter, rows: Mapping[SplitName, SplitRows], compute: Compute, ranks: Ranks, title: str, unit: str
) -> BankIndex:
    """Writes the shards that are missing, each rank its share, and then the index; title and unit are for progress.

    Raises:
        BankError: features that do not fit the header, or float16.
        StorageError: the disk has not enough room; nothing was written. Or it took no more.
        RankError: another rank has ended.
    """
    make_folder(writer.folder)
    shards = writer.shards(rows)
    mine = shards[ranks.share(len(shards))]
    missing = [shard for shard in mine if not writer.holds(shard, rows)]
    for shard in missing:  # what a killed run left would count against the room that there is
        (writer.folder / (shard.file + PARTIAL)).unlink(missing_ok=True)
    wanted = int(ranks.total(np.array(writer.bytes_of(missing))))
    ranks.once(lambda: refuse_small_disk(writer.folder, wanted))
    if missing:
        if ranks.is_first:
            _announce(writer, missing, len(mine), compute, ranks.world_size)
        with (
            Progress(title, sum(map(len, mine)), unit, shown=ranks.is_first) as progress,
            contextlib.closing(ahead(compute(writer.batches(missing)))) as features,
        ):
            progress.skip(sum(map(len, mine)) - sum(map(len, missing)))
            writer.write(missing, rows, features, progress.advance)
    records = _records(writer, shards, ranks)
    ranks.once(lambda: writer.finish(records))
    return read_index(writer.folder)


def _announce(writer: BankWriter, missing: Sequence[Shard], share: int, compute: Compute, world_size: int) -> None:
    """Says what is to come; the time from a few rows, the first of which warm up."""
    count = sum(map(len, missing))
    first = writer.batches(missing[:1])[0]
    trial = [Span(first.split, first.start, min(first.start + CALIBRATION_ROWS, first.stop))]
    seconds = 0.0
    if count > 4 * len(trial[0]):
        for _ in range(2):
            started = time.monotonic()
            for _ in compute(trial):
                seconds = (time.monotonic() - started) * count / len(trial[0])
    whose = f" (rank 0 of {world_size})" if world_size > 1 else ""
    announce(
        f"To write{whose}: {count} rows in {len(missing)} of {share} shards, at most "
        f"{readable_size(writer.bytes_of(missing))}, about {_readable_time(seconds)}"
    )


def _readable_time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _records(writer: BankWriter, shards: Sequence[Shard], ranks: Ranks) -> list[ShardRecord]:
    """All shards as the index lists them, each digested by the rank whose it is."""
    sizes, digests = np.zeros(len(shards), np.int64), np.zeros((len(shards), 32), np.uint8)
    for number in range(len(shards))[ranks.share(len(shards))]:
        record = writer.record(shards[number])
        sizes[number], digests[number] = record.bytes, list(bytes.fromhex(record.sha256))
    return [
        ShardRecord(file=shard.file, rows=len(shard), bytes=int(size), sha256=digest.tobytes().hex())
        for shard, size, digest in zip(shards, ranks.total(sizes), ranks.total(digests), strict=True)
    ]
