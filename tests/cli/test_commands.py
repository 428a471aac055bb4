"""The real command line: what it prints, its exit codes, and that it makes what it says."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

from commands import run_cli
from tiny_project import new_project, write_shapes

COMMANDS = [
    *("init", "train", "featurize", "fit-poison", "poison", "package", "retract", "attack", "compare"),
    *("vault", "key", "verify", "audit", "inspect", "demo"),
]
VAULT_COMMANDS = ["vault seal", "vault open", "vault forget", "vault check"]


def test_help_lists_every_command_in_less_than_half_a_second(tmp_path: Path) -> None:
    run_cli("--help", folder=tmp_path)  # bytecode is compiled once
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_cli("--help", folder=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert all(command in result.stdout for command in COMMANDS)
    # Of the processor: the clock on the wall also counts what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", COMMANDS + VAULT_COMMANDS)
def test_every_command_has_help_with_an_example(command: str, tmp_path: Path) -> None:
    result = run_cli(*command.split(), "--help", folder=tmp_path)
    assert result.returncode == 0
    assert f"Example: dpf-release {command}" in result.stdout


@pytest.mark.slow
def test_an_owner_goes_from_images_to_a_release(tmp_path: Path) -> None:
    config = new_project(tmp_path / "shapes")
    folder = config.parent
    text = config.read_text().replace("epochs = 12", "epochs = 2").replace("epochs = 6", "epochs = 2")
    config.write_text(text)  # it is the words that are asked for
    broken = folder / "images" / "private" / "disc" / "disc-portrait-003.png"
    broken.write_bytes(b"")
    for arguments, says in (
        (["train"], "left out, unreadable: disc/disc-portrait-003.png"),
        (["featurize"], "bytes a row"),
        (["fit-poison", "--name", "a", "--epochs", "12", "--lambda", "2"], "Next: dpf-release poison --name a"),
        (["poison", "--name", "a"], "px2s4 abs_ssim"),
        (["package", "--name", "a"], "Claims not made: reconstruction, linkage, attribute"),
        (["verify", "release"], "every file is as its manifest says"),
    ):
        result = run_cli(*arguments, folder=folder)
        assert result.returncode == 0, (arguments, result.stderr)
        assert says in result.stdout, (arguments, result.stdout)


def test_a_downstream_user_featurizes_images_of_their_own(finished: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "mine", ("disc", "square"), 5, seed=11)
    release = str(finished / "release")
    result = run_cli("featurize", "--release", release, "--images", "mine", "--out", "bank", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "{'train': 10}" in result.stdout
    assert run_cli("featurize", "--release", release, folder=tmp_path).returncode == 2  # bad usage


def test_a_mistake_is_one_paragraph_without_a_traceback(tmp_path: Path) -> None:
    result = run_cli("featurize", folder=tmp_path)
    assert result.returncode == 1
    assert "expected a configuration" in result.stderr
    assert "Traceback" not in result.stderr
    assert run_cli("featurize", "--nonsense", folder=tmp_path).returncode == 2


def test_restart_is_not_passed_over_in_silence_with_a_release(finished: Path, tmp_path: Path) -> None:
    downstream = ["featurize", "--release", str(finished / "release"), "--images", str(tmp_path), "--out", "bank"]
    refused = run_cli(*downstream, "--restart", folder=tmp_path)
    assert refused.returncode == 2
    assert "--restart is the owner's" in " ".join(refused.stderr.split())
    assert "--restart" not in run_cli(*downstream, folder=tmp_path).stderr  # an empty folder: another mistake


def test_a_verification_that_fails_exits_with_3(project_folder: Path) -> None:
    (project_folder / "release" / "README.md").write_text("changed")
    result = run_cli("verify", "release", folder=project_folder)
    assert result.returncode == 3
    assert "changed: README.md" in result.stderr
    assert run_cli("verify", str(project_folder / "vault"), folder=project_folder).returncode == 3


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("release", "poisoned"),
        ("vault", "NOT poisoned: private"),
        ("vault/features", "NOT poisoned: private"),
        ("release/features/val/shard-00000.h5", "@featurizer_sha256"),
        ("dpf.toml", "conv4_1"),
    ],
)
def test_inspect_says_what_a_path_holds(finished: Path, path: str, says: str) -> None:
    result = run_cli("inspect", path, folder=finished)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout


def test_inspect_lists_the_hook_points_of_an_architecture(tmp_path: Path) -> None:
    result = run_cli("inspect", "resnet18", "--size", "64", folder=tmp_path)
    assert re.search(r"conv4_1 .*layer3\.0 .*256 x 4 x 4 .*8192", result.stdout)
    assert run_cli("inspect", "no-such-thing", folder=tmp_path).returncode == 1
    refused = run_cli("inspect", "vit_b_16", folder=tmp_path)
    assert refused.returncode == 1
    assert "(N, C, H, W)" in refused.stderr


def test_an_owners_own_network_is_found_beside_the_configuration(tmp_path: Path) -> None:
    config = new_project(tmp_path / "shapes")
    (config.parent / "own_networks.py").write_text(
        "from dpf_release.models.zoo import CifarResNet\n\n"
        "def tiny(outputs):\n    return CifarResNet(3, outputs, width=4)\n"
    )
    text = config.read_text().replace("arguments = { width = 4 }\n", "")
    config.write_text(text.replace('"resnet20_cifar"', '"own_networks:tiny"'))
    assert "--trust-code" in run_cli("inspect", str(config), folder=tmp_path).stderr
    result = run_cli("inspect", str(config), "--trust-code", folder=tmp_path)  # run from elsewhere
    assert result.returncode == 0, result.stderr
    assert "conv4_1" in result.stdout
    config.write_text(text.replace('"resnet20_cifar"', '"not_there:tiny"'))
    assert run_cli("inspect", str(config), "--trust-code", folder=tmp_path).returncode == 1
