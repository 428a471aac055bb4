"""What it costs to open a release: the structure in its limited child, again when nothing changed, and every row.

From the root of the project, on a machine with little else to do:

    pip install -e .
    python benchmarks/open.py RELEASE --json open.json

`RELEASE` is any release that `dpf-release verify` accepts; SHA-256 of its files is what to compare with.
Each line: median, smallest and largest of `--repeats` runs; "first" begins with an empty memory of checked files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dpf_release import Release
from dpf_release.core.files import sha256_of
from dpf_release.core.sizes import readable_size
from dpf_release.release.contents import check_structure
from dpf_release.release.manifest import MANIFEST, FileRecord


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        Release.open(options.release)
        files = [options.release / MANIFEST, *(options.release / f.path for f in _files(options.release))]
        found = {}
        for name, step in steps(options.release, files, Path(cache)).items():
            seconds = [_seconds(step) for _ in range(options.repeats)]
            found[name] = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    size = readable_size(sum(file.stat().st_size for file in files))
    print(f"{len(files)} files, {size}\n\n| step | seconds |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {values['median']:.3f}, {values['least']:.3f} to {values['most']:.3f} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def steps(release: Path, files: list[Path], cache: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""

    def first() -> None:
        for path in sorted(cache.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        Release.open(release)

    return {
        "SHA-256 of every file": lambda: [sha256_of(path) for path in files],
        "structure, in its child": lambda: check_structure(release),
        "structure and every row, in its child": lambda: check_structure(release, deep=True),
        "`Release.open`, first": first,
        "`Release.open`, again": lambda: Release.open(release),
        '`Release.open(verify="none")`': lambda: Release.open(release, verify="none"),
    }


def _files(release: Path) -> tuple[FileRecord, ...]:
    return Release.open(release).manifest.files


def _seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
