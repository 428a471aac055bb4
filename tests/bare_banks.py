"""Banks of a project without their shards, their plans kept: what a run that was cut off at once leaves."""

import hashlib
from pathlib import Path


def digests(folder: Path) -> dict[str, str]:
    """Returns path → SHA-256 of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_shards(features: Path, keep: int = 0) -> dict[str, str]:
    """Removes the index and all shards but the first `keep`; returns what they were, as `digests`."""
    before = digests(features)
    (features / "index.json").unlink()
    for path in sorted(features.glob("*/shard-*.h5"))[keep:]:
        path.unlink()
    return before


def leftovers(folder: Path) -> list[str]:
    """Returns half-written files and locks."""
    return sorted(path.name for path in folder.rglob("*") if path.name.endswith(".partial") or path.name == ".lock")


def files_with(folder: Path, needle: bytes) -> list[str]:
    """Returns the names of the files that hold these bytes."""
    return [path.name for path in sorted(folder.rglob("*")) if path.is_file() and needle in path.read_bytes()]
