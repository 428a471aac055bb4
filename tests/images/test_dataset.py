"""Pictures by row: read, streamed from threads and processes, surveyed. No image is dropped silently."""

from __future__ import annotations

import contextlib
import csv
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from bare_banks import digests, leftovers, without_shards
from commands import run_warm
from dpf_release.errors import ImageError
from dpf_release.images.dataset import BadImage, Pictures
from dpf_release.images.decode import Preprocess, decode
from dpf_release.images.read import read_table
from dpf_release.images.survey import refuse_bad, survey
from dpf_release.images.table import ImageTable
from dpf_release.owner.featurize import featurize
from dpf_release.owner.project import Project

PLAIN = Preprocess(size=(16, 16), resize=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
BATCHES = [np.array(rows) for rows in ([5, 0, 3], [11, 5], [], [7], [1, 2, 4, 6], [8], [9, 10], [3, 7], [0], [1])]


def _write(path: Path, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((24, 20), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def some(tmp_path: Path) -> ImageTable:
    """Twelve different images; rows 3 and 7 cannot be decoded."""
    for number in range(12):
        _write(tmp_path / f"{number:02}.png", number)
    (tmp_path / "03.png").write_bytes(b"broken")
    (tmp_path / "07.png").unlink()
    with (tmp_path / "s.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["path", "label"], *([f"{n:02}.png", "ab"[n % 2]] for n in range(12))])
    return read_table(tmp_path / "s.csv", task="classification", val_fraction=0, test_fraction=0)


def _children() -> set[int]:
    """Processes that this one started, and those that they started."""
    parents = {}
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if path.name.isdigit():
                parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found, new = set[int](), {os.getpid()}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


def _of_session(session: int) -> set[int]:
    """Processes of a session that have not ended."""
    found = set[int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(of) == session and state not in "ZX":
                found.add(int(path.parent.name))
    return found


def _expected(table: ImageTable, rows: np.ndarray) -> dict[int, Tensor]:
    """Place in the batch → picture, of the good ones."""
    return {
        at: torch.from_numpy(decode(table.root / table.paths[row], PLAIN))
        for at, row in enumerate(rows)
        if row not in (3, 7)
    }


# Reading.


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_pictures_are_read_by_row_in_order_and_again(some: ImageTable, memory_limit: int) -> None:
    pictures = Pictures(some, PLAIN, workers=2, memory_limit=memory_limit)
    rows = np.array([5, 0, 11, 5])
    expected = torch.stack([torch.from_numpy(decode(some.root / some.paths[row], PLAIN)) for row in rows])
    assert torch.equal(pictures.read(rows), expected)
    assert torch.equal(pictures.read(rows[::-1].copy()), expected.flip(0))
    assert not torch.equal(expected[0], expected[1])
    assert pictures.read([]).shape == (0, 3, 16, 16)
    assert len(pictures) == 12
    with pytest.raises(ImageError, match=r"^03\.png: not a JPEG"):
        pictures.read([2, 3])
    pictures.close()


def test_pictures_are_decoded_once_where_they_fit_in_memory(some: ImageTable) -> None:
    kept, anew = Pictures(some, PLAIN), Pictures(some, PLAIN, memory_limit=100)
    for pictures in (kept, anew):
        assert pictures.read([5]).any()
    (some.root / "05.png").unlink()
    assert kept.read([5]).any()
    with pytest.raises(ImageError, match="no such file"):
        anew.read([5])
    kept.close()
    anew.close()


# Streaming.


@pytest.mark.parametrize("workers", [0, 1, 2, None])
def test_a_stream_gives_each_batch_in_turn_with_its_bad_images_by_row(some: ImageTable, workers: int | None) -> None:
    pictures = Pictures(some, PLAIN, workers=workers)
    streamed = list(pictures.stream(BATCHES))
    assert len(streamed) == len(BATCHES)
    for rows, (batch, bad) in zip(BATCHES, streamed, strict=True):
        assert (batch.shape, batch.dtype) == ((len(rows), 3, 16, 16), torch.uint8)
        expected = _expected(some, rows)
        assert all(torch.equal(batch[at], picture) for at, picture in expected.items())
        good = [int(rows[at]) for at in expected]
        assert torch.equal(batch[list(expected)], pictures.read(good))
        assert [(image.row, image.name) for image in bad] == [(r, f"{r:02}.png") for r in rows if r in (3, 7)]
    bad = {image.row: image.reason for _, found in streamed for image in found}
    assert "not a JPEG" in bad[3]
    assert bad[7] == "there is no such file"
    assert list(pictures.stream([])) == []
    pictures.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_keeps_no_picture(some: ImageTable, workers: int) -> None:
    pictures = Pictures(some, PLAIN, workers=workers)
    batches = [np.array([5, 6])] * 3
    first = [batch for batch, _ in pictures.stream(batches)]
    (some.root / "05.png").unlink()
    _write(some.root / "06.png", seed=99)
    for batch, bad in pictures.stream(batches):
        assert [image.row for image in bad] == [5]
        assert not torch.equal(batch[1], first[0][1])
    assert not pictures._is_kept.any()
    pictures.read([8])
    assert pictures._is_kept.sum() == 1  # the control: reading keeps
    pictures.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_closed_early_ends_its_threads_and_processes(some: ImageTable, workers: int) -> None:
    pictures = Pictures(some, PLAIN, workers=workers)
    list(pictures.stream(BATCHES))  # what stays for later streams: the pool, the server that processes come from
    gc.collect()
    threads, processes = set(threading.enumerate()), _children()
    stream = pictures.stream(BATCHES * 50)
    next(stream)
    # A thread that reads ahead; or the processes.
    assert len(set(threading.enumerate()) - threads) + len(_children() - processes) >= max(1, workers)
    started = _children() - processes
    assert len(started) == workers
    stream.close()
    deadline = time.monotonic() + 10
    while started & _children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not started & _children()
    assert not {thread for thread in threading.enumerate() if thread not in threads and thread.is_alive()}
    pictures.close()


def test_one_batch_and_few_pictures_start_no_process(some: ImageTable) -> None:
    one, few, many = (Pictures(some, PLAIN, workers=workers) for workers in (2, None, 2))
    before = _children()
    for pictures, batches in ((one, BATCHES[:1]), (few, BATCHES)):
        stream = pictures.stream(batches)
        next(stream)
        assert _children() == before
        stream.close()
    stream = many.stream(BATCHES)
    next(stream)
    assert _children() != before
    stream.close()
    for pictures in (one, few, many):
        pictures.close()


# Surveying.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_survey_names_every_bad_image_and_goes_on(some: ImageTable, workers: int) -> None:
    pictures, progress = Pictures(some, PLAIN, workers=workers), list[int]()
    bad = survey(pictures, progress.append, batch_size=5)
    assert [(image.row, image.name) for image in bad] == [(3, "03.png"), (7, "07.png")]
    assert ["JPEG" in bad[0].reason, bad[1].reason] == [True, "there is no such file"]
    assert progress == [5, 5, 2]
    assert survey(pictures, rows=np.array([7, 0])) == [BadImage(7, "07.png", "there is no such file")]
    assert survey(pictures, rows=np.array([0, 1])) == survey(pictures, rows=np.array([], np.int64)) == []
    pictures.close()
    refuse_bad(bad, total=12, max_bad=0.2)
    refuse_bad(bad, total=2000)
    with pytest.raises(ImageError, match=r"max_bad = 0.1\), found 2 of 12:\n  03.png \(not a .*\n  07.png \(there"):
        refuse_bad(bad, total=12, max_bad=0.1)


def test_a_long_list_of_bad_images_is_cut_and_counted(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        for number in range(3):
            _write(tmp_path / "s" / kind / f"{number}.png", number)
    for number in range(30):
        (tmp_path / "s" / "cat" / f"scan{number:02}.bmp").write_bytes(b"BM")
    table = read_table(tmp_path / "s", task="classification")
    assert len(table) == 36  # images of other formats are rows too
    pictures = Pictures(table, PLAIN)
    bad = survey(pictures)
    pictures.close()
    with pytest.raises(ImageError, match=r"found 30 of 36:[\s\S]*scan19\.bmp[\s\S]*and 10 more") as caught:
        refuse_bad(bad, len(table))
    assert "scan20" not in str(caught.value)


# A process that decodes is killed.

KILLED = r"a process that decodes images ended: .*run again to go on; an owner may set \[compute\] workers = 0"


def _kill_one(before: set[int]) -> None:
    os.kill(max(_children() - before), signal.SIGKILL)  # the last: a server that starts them may be the first


def test_a_killed_decoding_process_ends_the_stream_in_words_soon(some: ImageTable) -> None:
    pictures = Pictures(some, PLAIN, workers=2)
    list(pictures.stream(BATCHES))
    before, given = _children(), list[int]()
    stream = pictures.stream(BATCHES * 100)
    next(stream)
    started = time.monotonic()
    _kill_one(before)
    with pytest.raises(ImageError, match=KILLED):
        given.extend(len(batch) for batch, _ in stream)
    assert time.monotonic() - started < 12
    assert len(given) < 999
    pictures.close()


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError, FileNotFoundError, EOFError])
def test_whatever_shows_that_a_decoding_process_ended_is_told_as_that(
    some: ImageTable, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def loader(*arguments: object, **options: object) -> Iterator[None]:
        raise error("gone")
        yield None

    monkeypatch.setattr("dpf_release.images.dataset.DataLoader", loader)
    pictures = Pictures(some, PLAIN, workers=2)
    with pytest.raises(ImageError, match=KILLED):
        list(pictures.stream(BATCHES))
    pictures.close()


@pytest.fixture
def _noticed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a process died is noticed after half a second; above after the five that torch waits."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))


@pytest.mark.usefixtures("_noticed_soon")
def test_a_survey_whose_process_is_killed_says_so_wherever_it_is_noticed(some: ImageTable) -> None:
    pictures, before = Pictures(some, PLAIN, workers=2), _children()

    def on_progress(count: int) -> None:
        if not killed:
            killed.append(1)
            _kill_one(before)
            time.sleep(0.5)  # the news must not come as a bare error in here

    killed: list[int] = []
    list(pictures.stream(BATCHES))
    before |= _children()
    with pytest.raises(ImageError, match=KILLED):
        survey(pictures, on_progress, rows=np.array([0, 1, 2] * 200), batch_size=2)
    pictures.close()


@pytest.mark.usefixtures("_noticed_soon")
def test_features_whose_decoding_process_is_killed_are_gone_on_with(
    project_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = project_folder / "vault" / "features"
    whole = without_shards(features)
    stream, killed = Pictures.stream, []

    def killing(self: Pictures, batches: list[np.ndarray]) -> object:
        before = _children()
        for number, item in enumerate(stream(self, batches)):
            if number == 14:
                _kill_one(before)
                killed.append(time.monotonic())
            if number > 14:
                time.sleep(0.2)  # a slow network: what waits is used up
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(Pictures, "stream", killing)
        with pytest.raises(ImageError, match=KILLED):
            featurize(Project.open(project_folder / "dpf.toml", {"compute.workers": 2}))
    assert time.monotonic() - killed[0] < 20
    kept = {name: digest for name, digest in digests(features).items() if name.endswith(".h5")}
    assert 2 <= len(kept) < 6
    assert kept.items() < whole.items()
    assert leftovers(project_folder) == []
    assert not (features / "index.json").exists()
    featurize(Project.open(project_folder / "dpf.toml"))
    assert digests(features) == whole


STREAMING = """
import contextlib, os, signal
from pathlib import Path
import numpy as np
from dpf_release.images.read import read_public
from dpf_release.images.decode import Preprocess
from dpf_release.images.dataset import Pictures

pictures = Pictures(read_public(Path("q")), Preprocess((16, 16), 16, (0.5,) * 3, (0.5,) * 3), workers=2)
stream = pictures.stream([np.arange(2)] * 500)
next(stream)
for path in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(ProcessLookupError):
        if os.getsid(int(path.name)) == os.getpid() != int(path.name):
            print(path.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_decoding_processes_end_with_a_killed_run(tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path / "q" / f"{number}.png", number)
    ((status, session, out, err),) = run_warm((), tmp_path, STREAMING)
    assert status == -signal.SIGKILL, err
    started = out.split()
    deadline = time.monotonic() + 8
    while _of_session(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = _of_session(session)
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert len(started) >= 3  # two that decode, and what starts them
    assert left == set()
