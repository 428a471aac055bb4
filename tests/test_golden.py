"""What was published stays readable, and the same secrets and seeds give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpf_release import Release
from dpf_release.bank.reader import FeatureBank
from dpf_release.owner.project import Project
from dpf_release.release.contents import verify_deep
from dpf_release.release.verify import verify
from golden_release import (
    BYTES,
    FUNCTIONS,
    KEY,
    PUBLISHED,
    digests,
    features_of,
    golden_project,
    learned_weights,
    this_machine,
)
from places import GOLDEN
from small_releases import flip_bit

SIGNED, UNSIGNED = GOLDEN / "release-1-signed", GOLDEN / "release-1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The golden project, made by today's code."""
    return golden_project(tmp_path_factory.mktemp("golden") / "shapes")


def test_the_golden_release_is_verified_signed_and_unsigned(tmp_path: Path) -> None:
    assert verify(UNSIGNED) == []
    assert verify(SIGNED, public_key=KEY) == []
    assert [problem.kind for problem in verify(UNSIGNED, public_key=KEY)] == ["bad signature"]
    assert verify_deep(SIGNED) == verify_deep(UNSIGNED) == []


@pytest.mark.parametrize("name", ["manifest.json", "features/train/shard-00000.h5", "reports/attack.json"])
def test_a_bit_of_the_golden_release_that_changes_is_noticed(tmp_path: Path, name: str) -> None:
    for path in SIGNED.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(SIGNED)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(SIGNED)).write_bytes(path.read_bytes())
    assert verify(tmp_path, public_key=KEY) == []
    flip_bit(tmp_path / name)
    assert verify(tmp_path, public_key=KEY) != []


def test_the_golden_release_is_opened_and_its_rows_get_the_answers_that_they_had() -> None:
    release = Release.open(UNSIGNED)
    rows = features_of(release)
    with torch.inference_mode():
        answers = release.classifier()(rows)
        features = release.featurizer()(torch.zeros(1, 3, 32, 32))
    assert rows.shape[1:] == features.shape[1:] == (16, 8, 8)
    expected = json.loads((GOLDEN / "answers.json").read_text())
    assert torch.allclose(answers[:4], torch.tensor(expected["answers"]), atol=1e-4)
    assert torch.allclose(features.mean(), torch.tensor(expected["mean_of_features"]), atol=1e-5)
    assert not torch.allclose(answers[4:8], torch.tensor(expected["answers"]), atol=1e-4)


def test_the_same_secrets_and_seeds_give_the_same_bytes(made: Project) -> None:
    known = json.loads(BYTES.read_text())
    if known["machine"] != this_machine():
        pytest.skip("the bytes were noted on another machine, or with other versions of torch, NumPy or HDF5")
    found = digests(made)
    assert found == known["sha256"]
    assert len(set(found.values())) > len(FUNCTIONS)  # the control: another function is another bank


def test_the_golden_release_is_what_is_made_today_up_to_rounding(made: Project) -> None:
    """On any machine; what is the same to the bit on one machine is so only there."""
    golden, today = FeatureBank(UNSIGNED / "features", "train"), made.vault.candidate(PUBLISHED) / "features"
    bank = FeatureBank(today, "train")
    assert np.array_equal(golden.ids, bank.ids)
    assert np.array_equal(golden.targets, bank.targets)
    everything = np.arange(len(bank))
    difference = np.abs(golden.read(everything).astype(np.float32) - bank.read(everything).astype(np.float32))
    assert difference.mean() < 0.02 * np.abs(golden.read(everything).astype(np.float32)).mean()
    other = FeatureBank(made.vault.candidate("default") / "features", "train").read(everything).astype(np.float32)
    assert np.abs(golden.read(everything) - other).mean() > 0.1 * np.abs(other).mean()
    assert learned_weights(made, "default").keys() != learned_weights(made, "paper").keys()
