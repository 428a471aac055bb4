"""How fast `verify` is beside `hashlib.sha256` alone, on the same files.

From the root of the project, on a machine with little else to do:

    pip install -e .
    python benchmarks/verify.py --json verify.json

Releases of random bytes are generated in a temporary folder (`--folder`: on another disk): a few large shards, many of
1 MiB, and very many small ones, as no owner would write them. Bytes are those of the files that the manifest lists.
`hashlib` opens each of them in turn, in the order of the manifest, and feeds it to SHA-256 with `hashlib.file_digest`;
`verify` is the whole function, manifest, folder and signature included, as the command and `Release.open` call it.
Both take turns, `--repeats` times, in one process; the files are in the page cache. Medians, smallest and largest; the
ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpf_release.core.sizes import readable_size
from dpf_release.release.manifest import Manifest, describe_files, write_manifest
from dpf_release.release.signing import new_key, read_private_key, write_signature
from dpf_release.release.verify import verify

MIB = 2**20
SIZES = {
    "8 shards of 64 MiB": (8, 64 * MIB),
    "256 shards of 1 MiB": (256, MIB),
    "2000 shards of 64 KiB": (2000, MIB // 16),
}


def write_release(folder: Path, shards: int, size: int) -> Manifest:
    """A signed release; the key lies beside it."""
    names = [f"features/train/shard-{number:05d}.h5" for number in range(shards)]
    for name in ["README.md", "model/model.json", "features/index.json", *names]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size if name in names else 1000))
    manifest = Manifest(
        name="random",
        version="1.0.0",
        licence="cc0-1.0",
        task="classification",
        splits={"train": shards},
        files=describe_files(folder),
    )
    write_manifest(folder, manifest)
    new_key(folder.with_name("owner-key"))
    write_signature(folder, read_private_key(folder.with_name("owner-key")))
    return manifest


def hash_alone(folder: Path, manifest: Manifest) -> None:
    for record in manifest.files:
        with (folder / record.path).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == record.sha256


def verify_all(folder: Path) -> None:
    assert verify(folder, folder.with_name("owner-key.pub.pem")) == []


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path, shards: int, size: int, repeats: int) -> dict[str, Any]:
    manifest = write_release(folder, shards, size)
    total = sum(record.bytes for record in manifest.files)
    works = {"hashlib": lambda: hash_alone(folder, manifest), "verify": lambda: verify_all(folder)}
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():  # warms up
        work()
    for turn in range(repeats):
        for name in sorted(works, reverse=bool(turn % 2)):
            times[name].append(seconds(works[name]))
    rates = {name: [total / second / MIB for second in found] for name, found in times.items()}
    return {
        "bytes": total,
        **{
            f"{name}_mib_per_s": {"median": statistics.median(found), "min": min(found), "max": max(found)}
            for name, found in rates.items()
        },
        "verify_over_hashlib": statistics.median(times["hashlib"]) / statistics.median(times["verify"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the releases are generated; a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "repeats": options.repeats}
    print("| release | bytes | hashlib, MiB/s | verify, MiB/s | verify / hashlib |\n|---|---|---|---|---|")
    for title, (shards, size) in SIZES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = report[title] = measure(Path(folder) / "release", shards, size, options.repeats)
        cells = [
            "{median:,.0f}, {min:,.0f} to {max:,.0f}".format(**found[f"{name}_mib_per_s"])
            for name in ("hashlib", "verify")
        ]
        print(
            f"| {title} | {readable_size(found['bytes'])} | {' | '.join(cells)} | {found['verify_over_hashlib']:.3f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
