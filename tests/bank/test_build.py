"""A bank is written ahead, shard by shard, under a lock, on a disk that may be full: whole, or to be gone on with."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bare_banks import digests, leftovers, without_shards
from commands import run_cli, run_warm
from dpf_release import Release
from dpf_release.bank.format import read_index
from dpf_release.bank.reader import FeatureBank
from dpf_release.core.files import make_folder, refuse_small_disk, write_text
from dpf_release.core.locks import LOCK, belongs_to_run, locked
from dpf_release.core.read_ahead import ahead
from dpf_release.errors import BankError, ImageError, StorageError, VaultError
from dpf_release.images.dataset import Pictures
from dpf_release.owner.featurize import featurize
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.release.featurize import featurize_new
from small_banks import features_of, fill, ids_of, writer
from tiny_project import write_shapes

Usage = namedtuple("Usage", "total used free")


def open_project(folder: Path, **overrides: Any) -> Project:
    return Project.open(folder / "dpf.toml", {key.replace("__", "."): value for key, value in overrides.items()})


# Reading ahead.


def test_items_come_in_order_and_some_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    items = ahead(make(), depth=2)
    assert made == []  # nothing before the first is asked for
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one is taken, two wait, one is in the maker's hand
    assert list(items) == list(range(1, 9))
    assert list(ahead(iter([]))) == []


def test_an_error_of_the_maker_comes_after_the_items_before_it() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("gone")

    items = ahead(make())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="gone"):
        next(items)


def test_closing_early_ends_the_thread_and_the_maker_in_its_own_thread() -> None:
    seen = []

    def make() -> Iterator[int]:
        try:
            while True:
                seen.append(threading.current_thread())
                yield 1
        finally:
            seen.append(threading.current_thread())

    before = threading.active_count()
    items = ahead(make())
    next(items)
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before
    assert set(seen) == {seen[0]} != {threading.current_thread()}


# The lock.

HOLD = """
import sys, time
from pathlib import Path
from dpf_release.core.locks import locked
with locked(Path(sys.argv[1]), "run-of-the-other"):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_process_and_the_second_is_told_by_whom(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    try:
        with pytest.raises(StorageError, match="another run works in") as caught, locked(tmp_path):
            pass
        assert f'"pid": {process.pid}' in str(caught.value)
        assert '"argv": ["' in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert belongs_to_run(tmp_path, "run-of-the-other")
        assert not belongs_to_run(tmp_path, "mine")
    finally:
        process.kill()  # as hard as can be: nothing is tidied up
        process.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "mine"):
        assert belongs_to_run(tmp_path, "mine")
    assert list(tmp_path.iterdir()) == []
    assert not belongs_to_run(tmp_path, "mine")


def test_a_folder_is_let_go_of_after_an_error_and_is_held_once_in_a_process(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):  # noqa: PT012
        with pytest.raises(StorageError, match=f'"pid": {os.getpid()}'), locked(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1}', b"\xff"])
def test_a_lock_that_says_nothing_belongs_to_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert not belongs_to_run(tmp_path, "mine")
    (tmp_path / LOCK).write_bytes(b'{"run": "mine"}')
    assert belongs_to_run(tmp_path, "mine")


def test_a_full_disk_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left on device"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_a_vault_is_refused_and_changes_nothing(project_folder: Path) -> None:
    without_shards(project_folder / "vault" / "features", keep=3)
    before = digests(project_folder)
    with locked(project_folder / "vault"):
        for command in ("featurize", "poison"):
            done = run_cli(command, folder=project_folder)
            assert done.returncode == 1
            assert "another run works in" in done.stderr
            assert f'"pid": {os.getpid()}' in done.stderr
            assert "Traceback" not in done.stderr
            assert done.stdout == ""
        (project_folder / "vault" / LOCK).rename(project_folder / "lock")
        assert digests(project_folder).items() - before.items() == {("lock", digests(project_folder)["lock"])}
        (project_folder / "lock").rename(project_folder / "vault" / LOCK)
    assert digests(project_folder) == before
    featurize(open_project(project_folder))
    assert digests(project_folder) != before


# The disk.


def _disk_with(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


def test_a_disk_without_room_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _disk_with(3 * 2**20, monkeypatch)
    refuse_small_disk(tmp_path, 3 * 2**20)
    with pytest.raises(StorageError, match=r"expected 3 MiB of free space at .*, found 3 MiB\. Nothing was written"):
        refuse_small_disk(tmp_path, 3 * 2**20 + 1)


def test_featurize_refuses_a_small_disk_before_it_writes_a_shard(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vault = project_folder / "vault"
    whole = without_shards(vault / "features", keep=1)
    before = digests(project_folder)
    rows, shards = 119 - 12, 5  # those of test are kept
    wanted = rows * (2048 + 16 + 8 + 512) + shards * 16_384
    with monkeypatch.context() as patch:
        _disk_with(wanted - 1, patch)
        with pytest.raises(StorageError, match=r"expected 35\d KiB of free space at .*features"):
            featurize(open_project(project_folder))
        assert digests(project_folder) == before
        assert "To write" not in capsys.readouterr().err
        _disk_with(wanted, patch)
        featurize(open_project(project_folder))
    assert "To write: 107 rows in 5 of 6 shards, at most 350 KiB, about " in capsys.readouterr().err
    assert digests(vault / "features") == whole
    featurize(open_project(project_folder))
    assert "To write" not in capsys.readouterr().err  # nothing is missing
    assert digests(vault / "features") == whole


@pytest.mark.parametrize("step", [featurize, write_candidate])
def test_a_small_disk_with_restart_costs_nothing(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch, step: Any
) -> None:
    before = digests(project_folder / "vault")
    _disk_with(1000, monkeypatch)
    with pytest.raises(StorageError, match="Nothing was written"):
        step(open_project(project_folder), restart=True)
    assert digests(project_folder / "vault") == before


# As a disk that is full in the middle of a shard: no file may grow beyond so many bytes.
LIMITED = """\
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
"""


# In the metadata, in the middle of the rows, in the last bytes.
@pytest.mark.parametrize("limit", [2000, 30_000, 55_500])
def test_a_disk_that_fills_up_in_a_shard_ends_the_run_in_words_and_the_next_goes_on(
    project_folder: Path, limit: int
) -> None:
    features = project_folder / "vault" / "features"
    whole = without_shards(features, keep=1)
    kept = digests(features)
    ((status, _, _, told),) = run_warm(("featurize",), project_folder, LIMITED.format(limit=limit))
    assert digests(features) == kept  # no index, no half of a shard
    assert leftovers(project_folder) == []
    assert "train/shard-00000.h5 could not be written: " in told
    assert "Make room, or make the folder writable, and run the same command again." in told
    assert "Traceback" not in told
    assert status == 1
    featurize(open_project(project_folder))
    assert digests(features) == whole


def _read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As a file system that is mounted read-only."""

    def refuse(path: Any) -> None:
        if Path(path).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    open_, mkdir = os.open, Path.mkdir

    def opening(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return open_(path, flags, *more, **options)

    def making(self: Path, *more: Any, **options: Any) -> None:
        refuse(self)
        mkdir(self, *more, **options)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(Path, "mkdir", making)


def test_a_folder_that_cannot_be_written_to_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    with monkeypatch.context() as patch:
        _read_only(patch, tmp_path)
        for write, name in (
            (lambda: write_text(tmp_path / "file", "new"), "file"),
            (lambda: make_folder(tmp_path / "new"), "new"),
            (lambda: locked(tmp_path).__enter__(), LOCK),
            (lambda: fill(writer(tmp_path), np.arange(4), ids_of(4), lambda a, b: features_of(4)[a:b]), "train"),
        ):
            with pytest.raises(StorageError, match=rf"{name} could not be written: Read-only file system\. Nothing"):
                write()
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_vault_that_cannot_be_written_to_is_told_as_that(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(project_folder)
    with monkeypatch.context() as patch:
        _read_only(patch, project_folder)
        for step in (featurize, write_candidate):
            with pytest.raises(StorageError, match=r"vault/\.lock could not be written: Read-only file system"):
                step(open_project(project_folder))
    assert digests(project_folder) == before


# What is written fails to come.


@pytest.mark.parametrize("error", [OSError(errno.EIO, "the disk with the images is gone"), ValueError("gone")])
def test_a_source_that_fails_in_a_shard_leaves_whole_shards_and_its_own_words(tmp_path: Path, error: Exception) -> None:
    def source(start: int, stop: int) -> Any:
        if start == 7:  # in the middle of the second shard
            raise error
        return features_of(10)[start:stop]

    with pytest.raises(BankError if isinstance(error, OSError) else ValueError, match="gone"):
        fill(writer(tmp_path), np.arange(10), ids_of(10), source)
    assert set(digests(tmp_path)) == {"train/shard-00000.h5"}


def test_a_picture_that_breaks_after_the_survey_is_named_and_the_run_can_go_on(project_folder: Path) -> None:
    features = project_folder / "vault" / "features"
    whole = without_shards(features)
    for line in (project_folder / "vault" / "ids.csv").read_text().splitlines():
        if ",train,60," in line:
            name = line.split(",")[3]
    path = project_folder / "images" / "private" / name
    content, times, project = path.read_bytes(), path.stat(), open_project(project_folder)
    with project.working():
        pass  # surveyed
    path.write_bytes(content[:60])
    with pytest.raises(ImageError, match=rf"^{re.escape(name)}: .*Put the file back with the time of its last change"):
        featurize(project)
    kept = {name for name in digests(features) if name.endswith(".h5")}
    assert {"train/shard-00000.h5", "train/shard-00001.h5"} <= kept  # row 60 is in the third
    assert len(kept) == 2
    assert leftovers(project_folder) == []
    path.write_bytes(content)
    with pytest.raises(VaultError, match="changed since: source_sha256"):
        featurize(open_project(project_folder))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as it was, its time too
    featurize(open_project(project_folder))
    assert digests(features) == whole


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_shard_that_was_damaged_since_is_written_anew(project_folder: Path, damage: str) -> None:
    features = project_folder / "vault" / "features"
    whole = digests(features)
    path = features / "train" / "shard-00003.h5"
    path.write_bytes(path.read_bytes()[:-500] if damage == "cut" else b"not HDF5")
    (features / "index.json").unlink()
    featurize(open_project(project_folder))
    assert digests(features) == whole


# How a bank is divided and decoded.


def test_decoding_in_processes_gives_the_bytes_of_decoding_in_threads(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, used = project_folder / "vault" / "features", []
    whole = without_shards(features)
    in_processes = Pictures._in_processes

    def noting(self: Pictures, batches: Any, workers: int) -> Any:
        used.append(workers)
        return in_processes(self, batches, workers)

    monkeypatch.setattr(Pictures, "_in_processes", noting)
    for workers in (2, 0):
        featurize(open_project(project_folder, compute__workers=workers))
        assert digests(features) == whole
        without_shards(features)
    assert used == [2]
    featurize(open_project(project_folder), restart=True)
    assert set(digests(features).values()).isdisjoint(whole.values())


def test_shard_size_bounds_the_files(project_folder: Path, tmp_path: Path) -> None:
    release, images = project_folder / "release", project_folder / "images" / "private"
    options = ("--release", str(release), "--images", str(images), "--max-bad", "0.1", "--shard-size", "10 kB")
    done = run_cli("featurize", *options, "--out", "small", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "119 rows in 30 of 30 shards, at most " in done.stderr
    featurize_new(Release.open(release), images, tmp_path / "large", shard_size="50 kB", max_bad=0.1, device="cpu")
    for name, rows, limit in (("small", 4, 10_000), ("large", 24, 50_000)):
        shards = read_index(tmp_path / name).splits["train"]
        assert {shard.rows for shard in shards[:-1]} == {rows}
        assert sum(shard.rows for shard in shards) == 119
        assert max(path.stat().st_size for path in (tmp_path / name).glob("*/*.h5")) < limit + 8000


# Downstream.


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Twelve pictures of a downstream user."""
    write_shapes(tmp_path / "mine", ("disc", "square"), 6, seed=9)
    return tmp_path / "mine"


def test_a_downstream_bank_cut_off_goes_on_under_its_plan(
    finished: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, out = Release.open(finished / "release"), tmp_path / "bank"
    options: dict[str, Any] = {"shard_size": "10 kB", "batch_size": 2, "device": "cpu"}
    stream, given = Pictures.stream, []

    def failing(self: Pictures, batches: Any) -> Any:
        for item in stream(self, batches):
            if len(given) == 12:  # the survey takes one, the estimate two
                raise KeyboardInterrupt
            given.append(1)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "stream", failing)
        with pytest.raises(KeyboardInterrupt):
            featurize_new(release, mine, out, **(options | {"batch_size": 1}))
    first = digests(out)
    assert 0 < len([name for name in first if name.endswith(".h5")]) < 3
    assert ".plan.json" in first
    assert "index.json" not in first
    assert leftovers(out) == []
    with pytest.raises(BankError, match="changed since: batch_size"):
        featurize_new(release, mine, out, **options)
    assert digests(out) == first
    index, _ = featurize_new(release, mine, out, **(options | {"batch_size": 1}))
    second = digests(out)
    assert {name: second[name] for name in first if name.endswith(".h5")}.items() <= first.items()
    assert set(second) == {"index.json", *(shard.file for shard in index.splits["train"])}
    bank = FeatureBank(out, "train")
    assert len(bank) == 12
    assert len(np.unique(bank.ids, axis=0)) == 12
    featurize_new(release, mine, tmp_path / "again", **options)
    again = FeatureBank(tmp_path / "again", "train")
    np.testing.assert_allclose(again.read(range(12)), bank.read(range(12)), atol=2e-2)
    assert not np.array_equal(again.ids, bank.ids)


def test_two_runs_into_one_folder_are_refused(finished: Path, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "bank"
    out.mkdir()
    arguments = ("featurize", "--release", str(finished / "release"), "--images", str(mine), "--out", str(out))
    with locked(out):
        done = run_cli(*arguments, folder=tmp_path)
        assert done.returncode == 1
        assert "another run works in" in done.stderr
        assert [path.name for path in out.iterdir()] == [LOCK]
    featurize_new(Release.open(finished / "release"), mine, out, device="cpu")
    assert set(digests(out)) == {"index.json", "train/shard-00000.h5"}


# The candidate.


def test_a_candidate_under_another_plan_is_refused_by_name_and_restart_passes(project_folder: Path) -> None:
    features = project_folder / "vault" / "candidates" / "default" / "features"
    whole = without_shards(features, keep=2)
    before = digests(project_folder)
    with pytest.raises(
        VaultError, match=r"candidate 'default' was begun under another plan; changed since: shard_size"
    ):
        write_candidate(open_project(project_folder, bank__shard_size="80 kB"))
    try:
        torch.set_num_threads(2)
        with pytest.raises(VaultError, match=r"changed since: threads\. Put that back .* --name default --restart"):
            write_candidate(open_project(project_folder))
    finally:
        torch.set_num_threads(1)
    assert digests(project_folder) == before
    write_candidate(open_project(project_folder))
    assert digests(features) == whole
    write_candidate(open_project(project_folder, bank__shard_size="80 kB"), restart=True)
    after = digests(features)
    assert len(after) < len(whole)
    banks = FeatureBank(project_folder / "vault" / "features", "val"), FeatureBank(features, "val")
    assert np.array_equal(banks[0].ids, banks[1].ids)
    assert not np.array_equal(banks[0].read([0]), banks[1].read([0]))
