"""Opens bad releases one after the other, as a reader would, under a memory limit: a line in, a line out.

A request names a folder and the entry points to try; the answer says of each what was raised or found. What the limited
child would do is done here, where the kind is harmless enough: starting one takes half a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpf_release.bank.format import read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.errors import DPFReleaseError
from dpf_release.owner.config import read_config
from dpf_release.release import contents as structure
from dpf_release.release.release import Release
from dpf_release.release.verify import verify

MEMORY_BYTES = 2**30
REAL_CHILD = structure.run_limited


def in_process(module: str, request: Any, seconds: int) -> tuple[list[Any], str]:
    return json.loads(json.dumps(list(structure.answers_to(request)))), ""


def _rows(bank: Any) -> bytes:
    """Everything that a bank gives: features, targets, ids."""
    parts = (bank.targets, bank.ids, bank.read(range(len(bank))))
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def _open(folder: Path) -> bytes:
    release = Release.open(folder)
    return b"".join(_rows(bank) for split in release.manifest.splits for bank in release.bank(split).banks)


def _network(folder: Path) -> bytes:
    release = Release.open(folder)
    release.featurizer()
    release.classifier()
    return b""


def _bank(folder: Path) -> bytes:
    features = folder / "features"
    return b"".join(_rows(FeatureBank(features, split)) for split in read_index(features).splits)


def _config(folder: Path) -> bytes:
    return repr(read_config(folder / "dpf.toml")).encode()


ENTRIES: dict[str, Callable[[Path], Any]] = {
    "verify": verify,
    "deep": structure.verify_deep,
    "open": _open,
    "network": _network,
    "bank": _bank,
    "config": _config,
}


def attempt(entry: str, folder: Path, secret: bytes) -> dict[str, Any]:
    """What an entry point raises, and what it finds."""
    try:
        result = ENTRIES[entry](folder)
    except DPFReleaseError as error:
        return {"raised": type(error).__name__, "typed": True, "kinds": [], "text": str(error)}
    except BaseException as error:  # noqa: B036 - what is not ours is what is looked for
        return {"raised": type(error).__name__, "typed": False, "kinds": [], "text": repr(error)[:1000]}
    if isinstance(result, bytes):
        return {"raised": "", "typed": True, "kinds": [], "text": "SECRET READ" if secret in result else ""}
    text = "\n".join(map(str, result))
    return {"raised": "", "typed": True, "kinds": sorted({problem.kind for problem in result}), "text": text}


@contextlib.contextmanager
def measured(found: dict[str, Any]) -> Iterator[None]:
    """Processor seconds and most memory of a block, the latter beside what is in use before it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, started = _memory("VmRSS"), _seconds()
    yield
    found["seconds"] = _seconds() - started
    found["bytes"] = max(0, _memory("VmHWM") - before)
    found["child_bytes"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    secret = bytes.fromhex(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        structure.run_limited = REAL_CHILD if request["alone"] else in_process
        found: dict[str, Any] = {}
        with measured(found):
            results = {entry: attempt(entry, Path(request["folder"]), secret) for entry in request["entries"]}
        print(json.dumps(found | {"results": results}), flush=True)


if __name__ == "__main__":
    os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"
    main()
