"""What every test runs under, and a tiny project that has been through all of the owner's steps.

Whatever loads torch is imported by the fixtures: the process that only hands out tests starts ten seconds sooner.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from browsing import browser  # noqa: F401  # a fixture for all
from commands import WARM

# Test processes share the cores: more threads would only get in each other's way. Of the commands that they start, too.
os.environ["OMP_NUM_THREADS"] = "1"

# Whichever test starts the fork server: its processes would else each take seconds to import torch.
multiprocessing.set_forkserver_preload(["dpf_release.images.dataset"])

UNLOCKED = shutil.ignore_patterns(".lock")  # of a copy: another process may be at work in what is copied

MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 * 2**30:
    # What tests write, 2 GB at the most, waits for no disk. Of the commands and test processes that are started, too.
    tempfile.tempdir = os.environ["TMPDIR"] = str(MEMORY)

os.umask(0o077)  # what a test puts into a vault by hand is private: a vault that others can read is refused


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first: one that is begun last keeps one process busy while the others have nothing to do."""
    seconds = defaultdict[Path, float](float)
    for item in items:
        seconds[item.path] += 7.0 if item.get_closest_marker("slow") else 0.2
    items.sort(key=lambda item: seconds[item.path], reverse=True)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first test process to ask for it makes and all of them read: nobody may change it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            half = Path(tempfile.mkdtemp(dir=folder.parent))
            make(half / name)
            (half / name).rename(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project from images to `release/`, with one broken image; read-only, copy it to change it."""
    from tiny_project import finish

    return made_once(tmp_path_factory, "shapes", finish)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose φ1 never saw S, with rows drawn under a bound in its candidate; not packaged, read-only."""
    from tiny_project import draw

    return made_once(tmp_path_factory, "drawn", draw)


@pytest.fixture
def drawn_folder(drawn: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "drawn", ignore=UNLOCKED))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def project_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "shapes", ignore=UNLOCKED))


@pytest.fixture(scope="session", autouse=True)
def _warm_cli_ends() -> Iterator[None]:
    yield
    while WARM:
        WARM.pop().close()
