"""A stranger's release: each kind of bad one is refused with a typed error, and harms nobody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import bad_files  # noqa: F401 - fills KINDS
import bad_weights  # noqa: F401
from bad_records import CONFIGS
from bad_shards import bomb, in_shard, with_chunk
from commands import run_cli
from corpus import FIRST, KINDS, PLANTED, SECRET, good_release, resign, write_features
from dpf_release import Release
from dpf_release.bank.hdf5_check import read_layout
from dpf_release.bank.reader import FeatureBank
from dpf_release.errors import BankError, ConfigError, VerificationError
from dpf_release.release import contents as structure
from dpf_release.release.child_process import run_limited
from dpf_release.release.release import Level
from dpf_release.release.verify import verify

BATTERY = Path(__file__).with_name("hostile_suite.py")
MOST_BYTES, MOST_SECONDS = 2**30, 10.0


class Battery:
    """The process that opens what is bad; a new one where it dies."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.most = {"bytes": 0.0, "seconds": 0.0, "child_bytes": 0.0}

    def run(self, folder: Path, entries: list[str], alone: bool = False) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, str(BATTERY), SECRET.hex()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"folder": str(folder), "entries": entries, "alone": alone}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process that opens it died: {self.process.wait(10)}"
        found: dict[str, Any] = json.loads(answer)
        self.most = {key: max(value, found[key]) for key, value in self.most.items()}
        return found

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.fixture(scope="session")
def battery() -> Iterator[Battery]:
    found = Battery()
    yield found
    found.close()
    print(f"hostile kinds: most {found.most}")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that nothing is wrong with; read-only."""
    return good_release(tmp_path_factory.mktemp("good") / "release")


@pytest.fixture
def release(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may change, beside a secret."""
    (tmp_path / "secret").write_bytes(SECRET * 100)
    return Path(shutil.copytree(good, tmp_path / "release"))


def _check_harmless(found: dict[str, Any], folder: Path) -> None:
    for entry, result in found["results"].items():
        assert result["typed"], (entry, result)
        assert SECRET.decode() not in result["text"], entry
        assert "SECRET READ" not in result["text"], entry
    assert not (folder.parent / "marker").exists()
    assert found["bytes"] < MOST_BYTES
    assert found["child_bytes"] < MOST_BYTES + 2**28  # Python and its libraries
    assert found["seconds"] < MOST_SECONDS


def test_the_corpus_has_more_than_sixty_kinds() -> None:
    assert len({name.removesuffix(", re-signed") for name in KINDS}) + len(CONFIGS) >= 60


@pytest.mark.parametrize("alone", [False, True])
def test_the_untouched_release_is_let_in_by_every_entry(release: Path, battery: Battery, alone: bool) -> None:
    found = battery.run(release, ["verify", "deep", "open", "network", "bank"], alone)
    for result in found["results"].values():
        assert result == {"raised": "", "typed": True, "kinds": [], "text": ""}


def test_a_card_of_a_megabyte_of_words_is_let_in_and_costs_little(release: Path, battery: Battery) -> None:
    (release / "README.md").write_text(" ".join(f"{number:x}" for number in range(150_000)))
    resign(release)
    found = battery.run(release, ["verify", "deep", "open"])
    for result in found["results"].values():
        assert result == {"raised": "", "typed": True, "kinds": [], "text": ""}
    _check_harmless(found, release)


@pytest.mark.parametrize("name", KINDS)
def test_a_bad_release_is_refused_and_does_no_harm(release: Path, battery: Battery, name: str) -> None:
    kind = KINDS[name]
    kind.make(release)
    entries = ["verify", "open"] if kind.verify else ["verify", "deep", "open", "bank"]
    found = battery.run(release, [*entries, *(["network"] if kind.network else [])], kind.alone)
    results = found["results"]
    _check_harmless(found, release)
    # Where digests do not fit, `verify` says so; where the attacker made them fit, `--deep` does.
    told = results["verify" if kind.verify else "deep"]
    assert bool(set(told["kinds"]) & (kind.verify or kind.deep)) != kind.network, told
    if not kind.verify:
        assert results["verify"]["kinds"] == []
        assert bool(results["bank"]["raised"]) != kind.reads or kind.reads is None, results["bank"]
    assert bool(results["open"]["raised"]) != kind.opens, results["open"]
    assert not kind.network or results["network"]["raised"], results["network"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_configuration_is_refused(tmp_path: Path, battery: Battery, name: str) -> None:
    (tmp_path / "dpf.toml").write_bytes(b"[train]\nepochs = 3\n")
    assert battery.run(tmp_path, ["config"])["results"]["config"]["raised"] == ""
    (tmp_path / "dpf.toml").write_bytes(CONFIGS[name])
    found = battery.run(tmp_path, ["config"])
    assert found["results"]["config"]["raised"] == ConfigError.__name__, found
    _check_harmless(found, tmp_path / "release")


def test_a_configuration_that_is_no_small_file_is_refused(tmp_path: Path, battery: Battery) -> None:
    path = tmp_path / "dpf.toml"
    path.touch()
    os.truncate(path, 2**30)
    found = battery.run(tmp_path, ["config"])
    assert "larger than 1 MiB" in found["results"]["config"]["text"]
    _check_harmless(found, tmp_path / "release")


# The known holes of comparable tools, by name.


def test_h5py_follows_external_storage_to_any_file_of_the_host_and_we_do_not(release: Path) -> None:
    KINDS["external storage"].make(release)
    with h5py.File(release / FIRST, "r") as shard:
        assert SECRET in shard["id"][:].tobytes()
    with pytest.raises(BankError, match="storage outside the file"):
        FeatureBank(release / "features", "train").read([0])
    resign(release)
    assert verify(release) == []
    with pytest.raises(VerificationError, match="structure: .*storage outside the file"):
        Release.open(release)


LIBRARY = """
import sys, h5py
def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
before = most()
with h5py.File(sys.argv[1], "r") as shard:
    try:
        shard["features"][0]
    except OSError:
        pass
print(most() - before)
"""
OURS = """
import sys
from pathlib import Path
from dpf_release.bank.reader import FeatureBank
from dpf_release.errors import BankError
def most():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
before = most()
try:
    FeatureBank(Path(sys.argv[1]).parents[1], "train").read([0])
except BankError:
    print(most() - before)
"""


def test_a_400_kb_hdf5_file_makes_the_library_take_400_mb_and_not_us(release: Path) -> None:
    with_chunk(release, bomb(400 * 2**20))
    assert (release / FIRST).stat().st_size < 500_000
    taken = [
        int(subprocess.run([sys.executable, "-c", code, str(release / FIRST)], capture_output=True, check=True).stdout)
        for code in (LIBRARY, OURS)
    ]
    assert taken[0] > 350
    assert taken[1] < 20


def test_data_deleted_from_an_hdf5_file_stay_readable_in_its_bytes_and_are_found(release: Path) -> None:
    KINDS["deleted data set"].make(release)
    assert PLANTED in (release / FIRST).read_bytes()
    resign(release)
    assert verify(release) == []
    with pytest.raises(VerificationError, match="belongs to nothing and is not zero"):
        Release.open(release)


@pytest.mark.parametrize("behind", ["a layout", "a type", "the name of a filter", "a text"])
def test_a_text_that_hdf5_reads_over_is_found(release: Path, good: Path, behind: str) -> None:
    KINDS[f"text behind {behind}"].make(release)
    assert PLANTED in (release / FIRST).read_bytes()
    with h5py.File(good / FIRST, "r") as before, h5py.File(release / FIRST, "r") as after:
        assert dict(before.attrs) == dict(after.attrs)  # to HDF5 nothing is there
        for member in before:
            np.testing.assert_array_equal(before[member][:], after[member][:])
    with pytest.raises(BankError, match="is not a shard of format 1"):
        read_layout(release / FIRST)


@pytest.mark.parametrize(("other", "then"), [(b"split#planted", b"split\0planted"), (b"splat", b"split")])
def test_an_attribute_has_one_name_that_ends_where_it_says(release: Path, other: bytes, then: bytes) -> None:
    with h5py.File(release / FIRST, "r+", libver=("v110", "v110")) as shard:
        shard.attrs[other.decode()] = 1
    content = (release / FIRST).read_bytes()
    read_layout(release / FIRST)  # which attributes there are, `check_shard` looks at
    (release / FIRST).write_bytes(content.replace(other, then))
    with pytest.raises(BankError, match="an attribute has a name that is none, or that of another"):
        read_layout(release / FIRST)


# What `Release.open` checks, and how often.


@pytest.mark.parametrize(
    ("level", "lets_in"),
    [("full", set()), ("sizes", {"bit flipped"}), ("none", {"bit flipped", "bytes in a gap", "empty folder added"})],
)
def test_each_level_of_open_checks_what_it_says(
    release: Path, tmp_path: Path, level: Level, lets_in: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        structure, "run_limited", lambda module, request, seconds: (list(structure.answers_to(request)), "")
    )
    Release.open(release, verify=level)
    for name in ("bit flipped", "bytes in a gap", "empty folder added"):
        bad = Path(shutil.copytree(release, tmp_path / name))
        if name == "bit flipped":  # in a value, not in a structure
            with h5py.File(bad / FIRST, "r+") as shard:
                shard["features"][0, 0, 0, 0] += 1
        else:
            KINDS[name].make(bad)
        if name in lets_in:
            assert Release.open(bad, verify=level).classes == ("cat", "dog", "owl")
        else:
            with pytest.raises(VerificationError):
                Release.open(bad, verify=level)


def test_none_still_reads_records_with_bounds_and_compares_them(release: Path) -> None:
    KINDS["model of another shape"].make(release)
    with pytest.raises(VerificationError, match="another shape"):
        Release.open(release, verify="none")


def test_a_structure_that_was_found_right_is_not_checked_again(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("dpf_release.release.checked_files.SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(structure, "run_limited", lambda *request: (calls.append("") or [], ""))
    for _ in range(3):
        Release.open(release)
    assert len(calls) == 1
    Release.open(release, verify="sizes")
    assert len(calls) == 1
    shutil.copy(release / "README.md", release / "card")
    (release / "card").replace(release / "README.md")  # the same bytes, another file
    Release.open(release)
    assert len(calls) == 2


# The child.


@pytest.mark.parametrize("name", ["memory", "time", "crash", "noise", "much"])
def test_a_child_that_dies_is_a_problem_and_not_an_error(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    doing = {
        "memory": "print(len(bytearray(3 * 2**30)))",
        "time": "while True: pass",
        "crash": "os.kill(os.getpid(), 11)",
        "noise": "raise SystemExit('no answer \\x1b[2J')",
        "much": "while True: print('\"' + 'x' * 10000 + '\"', flush=True)",
    }
    (tmp_path / f"dying_{name}.py").write_text(
        "import os, sys\nfrom dpf_release.release.child_process import confine\nconfine(1)\n"
        "print('\"features\"', flush=True)\n" + doing[name]
    )
    monkeypatch.syspath_prepend(tmp_path)
    problems = structure.problems_of(*run_limited(f"dying_{name}", {}, 1))
    assert [(problem.kind, problem.path[:8]) for problem in problems] == [
        ("limit", "xxxxxxxx" if name == "much" else "features")
    ]
    assert "\x1b" not in problems[0].detail


CHILD = """
import json, os, resource, sys
from dpf_release.release.child_process import confine
confine(5)
import h5py
handles = sorted(int(name) for name in os.listdir("/proc/self/fd"))
writes = True
try:
    with open(json.load(sys.stdin)["file"], "wb") as file:
        file.write(b"1" * 100)
except OSError:
    writes = False
print(json.dumps({"handles": handles, "environment": sorted(os.environ), "here": os.getcwd(), "writes": writes,
    "core": resource.getrlimit(resource.RLIMIT_CORE)[0], "plugins": os.environ["HDF5_PLUGIN_PRELOAD"]}))
"""


def test_the_child_inherits_nothing_and_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "telling.py").write_text(CHILD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("A_SECRET_TOKEN", "4711")
    with (tmp_path / "open").open("wb") as mine:
        os.set_inheritable(mine.fileno(), True)
        (told,), died_of = run_limited("telling", {"file": str(tmp_path / "new")}, 5)
    assert died_of == ""
    assert told["handles"] == [0, 1, 2, 3]  # 3: the folder that is being listed
    assert "A_SECRET_TOKEN" not in told["environment"]
    assert "HOME" not in told["environment"]
    assert (told["here"], told["writes"], told["core"], told["plugins"]) == ("/", False, 0, "::")
    assert not (tmp_path / "new").exists() or (tmp_path / "new").stat().st_size == 0


MAPPING = """
import json, mmap, sys
from dpf_release.release.child_process import confine
confine(5)
with open(json.load(sys.stdin)["file"], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(json.dumps(len(mapped)), flush=True)
bytearray(2**30 + 2**27)
"""


def test_a_large_file_may_be_mapped_by_the_child_which_can_write_to_no_more_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mapping.py").write_text(MAPPING)
    monkeypatch.syspath_prepend(tmp_path)
    with (tmp_path / "shard").open("wb") as file:
        file.truncate(2**31)  # no room on disk
    answers, died_of = run_limited("mapping", {"file": str(tmp_path / "shard")}, 5)
    assert answers == [2**31]
    assert "MemoryError" in died_of


def test_a_module_in_the_release_is_not_imported_by_the_child(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (release / "h5py.py").write_text(f"open({str(release.parent / 'marker')!r}, 'w')\n")
    monkeypatch.chdir(release)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert structure.check_structure(release) == []
    assert not (release.parent / "marker").exists()


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_a_release_of_each_compression_passes_every_check(release: Path, compression: str) -> None:
    write_features(release, compression)
    resign(release)
    assert structure.verify_deep(release) == []
    in_shard(_not_a_number)(release)
    resign(release)
    assert ("values", FIRST) in {(problem.kind, problem.path) for problem in structure.verify_deep(release)}


def _not_a_number(shard: h5py.File, release: Path) -> None:
    shard["features"][2, 1, 2, 3] = np.nan


# The command line.


@pytest.mark.slow
def test_deep_is_an_option_of_verify_and_exits_with_3(release: Path) -> None:
    good = run_cli("verify", "release", "--deep", folder=release.parent)
    assert good.returncode == 0, good.stderr
    assert "every row can be read" in good.stdout
    KINDS["features that are not numbers, re-signed"].make(release)
    assert run_cli("verify", "release", folder=release.parent).returncode == 0
    bad = run_cli("verify", "release", "--deep", folder=release.parent)
    assert bad.returncode == 3
    assert f"values: {FIRST}: row 2 holds values that are infinite or not numbers" in " ".join(bad.stderr.split())


def test_inspect_does_not_follow_a_shard_out_of_its_file(release: Path) -> None:
    assert run_cli("inspect", f"release/{FIRST}", folder=release.parent).returncode == 0
    KINDS["external link"].make(release)
    refused = run_cli("inspect", f"release/{FIRST}", folder=release.parent)
    assert refused.returncode == 1
    assert "/id is a link" in refused.stderr
