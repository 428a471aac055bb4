"""Runs that are killed with SIGKILL at a chosen step, and run again: the same bytes, and never half a release."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import killed
from dpf_release.errors import BankError, RefusedError
from dpf_release.owner.featurize import featurize
from dpf_release.owner.measure import measure
from dpf_release.owner.poison import write_candidate
from dpf_release.owner.project import Project
from dpf_release.publish.package import package
from dpf_release.release.manifest import Manifest
from dpf_release.release.verify import read_manifest
from places import ROOT

_spec = importlib.util.spec_from_file_location("kill", ROOT / "benchmarks" / "kill.py")
assert _spec
assert _spec.loader
kill = importlib.util.module_from_spec(_spec)
sys.modules["kill"] = kill  # where its dataclasses look for their annotations
_spec.loader.exec_module(kill)

RUNS: dict[str, Callable[[Project], Any]] = {
    "featurize": featurize,
    "poison": lambda project: (write_candidate(project), measure(project)),
    "package": package,
}


def run(project: Path, command: str) -> dict[str, str]:
    """Runs a command to its end, in this process; the digests then."""
    RUNS[command](Project.open(project / "dpf.toml"))
    return kill.digests(project)


def one_byte_altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_features_killed_after_some_shards_are_gone_on_with_to_the_same_bytes(project_folder: Path) -> None:
    expected = kill.digests(project_folder)
    before = kill.digests(kill.without_shards(project_folder))
    for number in (3, 4):  # before the third shard takes its name; and before the fourth that the second run writes
        killed(project_folder, "os.rename", ".h5.partial", number, "featurize")
        found = kill.digests(project_folder)
        assert "vault/features/index.json" not in found
        assert kill.leftovers(project_folder)
        assert not kill.half_files(found, before, expected)
    assert len(list(project_folder.glob("vault/features/*/*.h5"))) == 2 + 3
    assert run(project_folder, "featurize") == expected
    assert not kill.leftovers(project_folder)

    shard = project_folder / "vault/features/train/shard-00001.h5"
    one_byte_altered(shard)
    assert kill.differences(kill.digests(project_folder), expected) == ["differs: vault/features/train/shard-00001.h5"]
    assert kill.half_files(kill.digests(project_folder), before, expected) == [
        "half a file: vault/features/train/shard-00001.h5"
    ]


def test_features_killed_before_their_plan_take_a_new_one_and_depend_on_nothing_else(project_folder: Path) -> None:
    other_plan = kill.digests(project_folder)
    shutil.rmtree(project_folder / "vault/features")
    (project_folder / "vault/ids.csv").unlink()
    killed(project_folder, "os.rename", "plan.json.partial", 1, "featurize")
    assert (project_folder / "vault/ids.csv").is_file()  # those of a plan that was never made
    found = run(project_folder, "featurize")
    assert not kill.leftovers(project_folder)
    assert run(kill.without_shards(project_folder), "featurize") == found
    assert "differs: vault/features/train/shard-00000.h5" in kill.differences(found, other_plan)


def test_orphaned_decoding_processes_let_the_next_run_begin_and_end_by_themselves(project_folder: Path) -> None:
    expected = kill.digests(project_folder)
    kill.without_shards(project_folder)
    (project_folder / "dpf.toml").write_text((project_folder / "dpf.toml").read_text() + "workers = 2\n")
    session = killed(project_folder, "os.rename", ".h5.partial", 2, "featurize")
    assert kill.living(session)  # the fork server and what it started
    kill.edit(project_folder, "workers = 2", "workers = 0")  # they are the first run's: the next one needs none
    assert run(project_folder, "featurize") == expected
    assert not kill.orphans(session, time.monotonic() + kill.ORPHANS_END_WITHIN)


@pytest.mark.parametrize(("ending", "number"), [(".h5.partial", 3), ("candidate.json.partial", 2)])
def test_a_candidate_killed_midway_is_gone_on_with_to_the_same_bytes(
    project_folder: Path, ending: str, number: int
) -> None:
    expected = kill.digests(project_folder)
    for path in ("vault/candidates/default", "vault/reports/default"):
        shutil.rmtree(project_folder / path)
    (project_folder / "vault/functions/default/candidate.json").unlink()
    before = kill.digests(project_folder)
    killed(project_folder, "os.rename", ending, number, "poison")
    found = kill.digests(project_folder)
    assert kill.differences(found, expected)
    assert not kill.half_files(found, before, expected)
    with pytest.raises((BankError, RefusedError)):
        package(Project.open(project_folder / "dpf.toml"))
    assert run(project_folder, "poison") == expected
    assert not kill.leftovers(project_folder)


# Before the sums of the new release are whole, before it takes its place, and before the old one is thrown away.
STEPS = [
    ("os.rename", "SHA256SUMS.partial", 1, "old"),
    ("os.rename", ".dpf-staging", 1, "none"),
    ("shutil.rmtree", ".dpf-staging", 2, "new"),
]


@pytest.mark.parametrize(("event", "ending", "number", "there"), STEPS)
def test_a_release_killed_midway_is_the_old_one_or_the_new_one_whole(
    project_folder: Path, tmp_path: Path, event: str, ending: str, number: int, there: str
) -> None:
    release = project_folder / "release"
    if there == "none":
        shutil.rmtree(release)
    kill.edit(project_folder, 'name = "shapes"', 'name = "shapes"\nversion = "2.0.0"')
    before = kill.digests(project_folder)
    expected = run(Path(shutil.copytree(project_folder, tmp_path / "alone")), "package")
    assert kill.differences(before, expected)

    killed(project_folder, event, ending, number, "package")
    assert kill.leftovers(project_folder)
    assert not kill.wrong_release(release, before, expected)
    found = read_manifest(release)
    assert (found.version if isinstance(found, Manifest) else "none") == {"old": "1.0.0", "new": "2.0.0"}.get(
        there, there
    )
    assert run(project_folder, "package") == expected
    assert not kill.leftovers(project_folder)

    one_byte_altered(release / "features/train/shard-00000.h5")
    assert kill.wrong_release(release, before, expected)
