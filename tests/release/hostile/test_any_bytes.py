"""Whatever a file holds, what reads it says so in the package's own errors."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus import CLASSIFIER, FIRST, INDEX, MODEL, good_release
from dpf_release.bank.format import read_index
from dpf_release.bank.hdf5_check import read_layout
from dpf_release.bank.reader import FeatureBank
from dpf_release.errors import DPFReleaseError
from dpf_release.owner.config import parse_config, read_config
from dpf_release.release.manifest import MANIFEST, Manifest
from dpf_release.release.model_record import ModelRecord, read_model_record
from dpf_release.release.safetensors_check import read_tensor_file
from dpf_release.release.verify import Problem, read_manifest, verify

few = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_release(tmp_path_factory.mktemp("good") / "release")


@pytest.fixture(scope="module")
def release(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("any") / "release"))


def _is_typed(read: Callable[[], Any]) -> None:
    with contextlib.suppress(DPFReleaseError):
        read()


def _rows(release: Path) -> None:
    bank = FeatureBank(release / "features", "train")
    assert bank.read([0]).shape == (1, *bank.shape)
    assert len(bank.targets) == len(bank.ids) == len(bank)


READERS: dict[str, Callable[[Path], Any]] = {
    MANIFEST: verify,
    MODEL: lambda release: read_model_record(release / MODEL),
    INDEX: lambda release: (read_index(release / "features"), _rows(release)),
    FIRST: _rows,
    CLASSIFIER: lambda release: read_tensor_file(release / CLASSIFIER),
    "dpf.toml": lambda release: read_config(release / "dpf.toml"),
}


def _with(release: Path, name: str, content: bytes, original: bytes) -> None:
    path = release / name
    path.write_bytes(content)
    try:
        _is_typed(lambda: READERS[name](release))
    finally:
        path.write_bytes(original)


def _original(release: Path, name: str) -> bytes:
    return (release / name).read_bytes() if name != "dpf.toml" else b"[train]\nepochs = 3\n"


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused_in_our_words(release: Path, name: str) -> None:
    original = _original(release, name)

    @few
    @given(st.binary(max_size=300))
    def check(content: bytes) -> None:
        _with(release, name, content, original)

    check()


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_with_bytes_changed_is_read_or_refused_in_our_words(release: Path, name: str) -> None:
    original = _original(release, name)
    near = st.integers(0, min(len(original), 4000) - 1)  # where the structures are

    @few
    @given(st.lists(st.tuples(near, st.integers(0, 255)), min_size=1, max_size=8), st.integers(1, len(original)))
    def check(changes: list[tuple[int, int]], length: int) -> None:
        content = bytearray(original)
        for place, value in changes:
            content[place] = value
        _with(release, name, bytes(content[:length] if length % 4 == 0 else content), original)

    check()
    _with(release, name, original, original)


@pytest.mark.parametrize(("name", "schema"), [(MANIFEST, Manifest), (MODEL, ModelRecord)])
def test_the_right_keys_with_any_values_are_read_or_refused_in_our_words(
    release: Path, name: str, schema: type[Manifest] | type[ModelRecord]
) -> None:
    original = _original(release, name)
    good = json.loads(original)

    @few
    @given(st.dictionaries(st.sampled_from(sorted(schema.model_fields)), values, max_size=4))
    def check(changes: dict[str, Any]) -> None:
        _with(release, name, json.dumps(good | changes).encode(), original)

    check()
    manifest = read_manifest(release)
    assert not isinstance(manifest, Problem)


def test_a_configuration_of_the_right_sections_is_read_or_refused_in_our_words(tmp_path: Path) -> None:
    sections = ["release", "task", "images", "network", "train", "reconstructor", "poison", "bank", "compute", "folder"]

    @few
    @given(
        st.dictionaries(
            st.sampled_from(sections),
            values
            | st.dictionaries(
                st.sampled_from(
                    [
                        "epochs",
                        "name",
                        "path",
                        "arguments",
                        "private",
                        "size",
                        "lambda",
                        "shard_size",
                        "kind",
                        "targets",
                    ]
                ),
                values,
                max_size=3,
            ),
            max_size=3,
        )
    )
    def check(tree: dict[str, Any]) -> None:
        _is_typed(lambda: parse_config(tree, tmp_path))

    check()
    assert parse_config({"train": {"epochs": 3}}, tmp_path).train.epochs == 3


def test_any_bytes_behind_a_superblock_are_refused_without_hdf5(release: Path, tmp_path: Path) -> None:
    original = (release / FIRST).read_bytes()

    @few
    @given(st.binary(min_size=20, max_size=2000))
    def check(content: bytes) -> None:
        path = tmp_path / "shard.h5"
        path.write_bytes(original[:48] + b"OHDR\x02" + content.ljust(len(original) - 53, content[-1:]))
        _is_typed(lambda: read_layout(path))

    check()
