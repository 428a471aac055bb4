"""`dpf.toml`: what is written is what is meant, and every mistake is named."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dpf_release.core.sizes import parse_size
from dpf_release.errors import ConfigError
from dpf_release.owner.config import Config, parse_config, read_config
from dpf_release.owner.init import init


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """The `dpf.toml` that `init` writes."""
    init(tmp_path / "faces")
    return tmp_path / "faces" / "dpf.toml"


def test_the_template_says_the_defaults_and_the_folder_s_name(template: Path) -> None:
    assert template.read_text("utf-8").count("\n[") == 12  # of thirteen sections [compute] is left to the machine
    found = read_config(template)
    chosen = {  # what `init` writes for drawn rows under a bound; a file without these keys means the paper's method
        "network": {"train_on": "public", "classifier": "from-bank"},
        "poison": {"function": "mixture"},
        "claims": {"bound": True},
    }
    assert found == parse_config({"release": {"name": "faces"}, **chosen}, template.parent)
    assert found != parse_config({}, template.parent)


def test_every_key_that_the_template_comments_out_is_one(template: Path) -> None:
    text = re.sub(r"(?m)^# (\w+ = )", r"\1", template.read_text("utf-8"))
    text = text.replace('kind = "classification"', 'kind = "regression"')
    found = parse_config(tomllib.loads(text), template.parent)
    assert found.task.targets == ("yaw_deg",)
    assert found.images.private.group == "person"
    assert found.network.weights == Path("phi.safetensors")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {"epochs": 3}}, r"trian: Extra inputs"),
        ({"train": {"epoch": 3}}, r"train\.epoch: Extra inputs"),
        ({"train": {"epochs": "three"}}, r"train\.epochs: .*integer.* \(found 'three'\)"),
        ({"train": {"epochs": 0}}, r"train\.epochs: .*greater than or equal to 1 \(found 0\)"),
        ({"train": 3}, r"train: .*\(found 3\)"),
        ({"poison": {"objective": "eq7"}}, r"poison\.objective: .*'equivalence' or 'paper' \(found 'eq7'\)"),
        ({"poison": {"lambda": float("nan")}}, r"poison\.lambda: "),
        ({"network": {"mean": [0.5, 0.5]}}, r"network\.mean\.2: Field required"),
        ({"images": {"private": {"val_fraction": 1.0}}}, r"images\.private\.val_fraction: .*less than 1"),
        ({"bank": {"shard_size": "1 GiBi"}}, r"bank\.shard_size: .*'1 GiB' or '500 MB', found '1 GiBi'"),
        ({"release": {"name": "../x"}}, r"release\.name: "),
        ({"compute": {"device": "gpu"}}, r"compute\.device: "),
        ({"task": {"kind": "regression"}}, r"task: .*`targets` lists the target columns"),
        ({"task": {"targets": ["age"]}}, r"task: .*`targets` lists the target columns"),
        ({"folder": "/"}, r"`folder` is not a key"),
    ],
)
def test_a_key_that_does_not_fit_is_named(tmp_path: Path, tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tree, tmp_path)


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        parse_config({"trian": {}, "train": {"epochs": -1, "flip": "left"}, "network": {"hook": 4}}, tmp_path)
    lines = str(found.value).splitlines()
    assert lines[0] == "dpf.toml does not fit:"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "trian",
        "train.epochs",
        "train.flip",
        "network.hook",
    }


def test_what_fits_is_taken(tmp_path: Path) -> None:
    tree = {"task": {"kind": "regression", "targets": ["yaw", "pitch"]}, "poison": {"lambda": 0.5}}
    found = parse_config(tree, tmp_path)
    assert found.task.targets == ("yaw", "pitch")
    assert found.poison.lambda_ == 0.5
    assert Config().poison.lambda_ == 1.0


@pytest.mark.parametrize(
    ("text", "size"),
    [("1 GiB", 2**30), ("500 MB", 500 * 10**6), ("4096", 4096), ("1.5kib", 1536), (" 2 B ", 2), ("0", 1)],
)
def test_a_size_is_read_in_bytes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1 GiB", "1 GB/s", "1e9", "1,5 GiB", "1 TiBs", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)


def test_options_win_over_the_file_and_none_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "dpf.toml"
    path.write_text("[poison]\nepochs = 3\nlambda = 2.0\n")
    overrides = {"poison.epochs": 7, "poison.lambda": None, "images.private.seed": 5}
    found = read_config(path, overrides)
    assert (found.poison.epochs, found.poison.lambda_, found.images.private.seed) == (7, 2.0, 5)
    assert read_config(path).poison.epochs == 3
    with pytest.raises(ConfigError, match=r"poison\.epochs: .*found 0"):
        read_config(path, {"poison.epochs": 0})


def test_options_laid_over_later_are_those_laid_over_at_once(tmp_path: Path) -> None:
    path = tmp_path / "dpf.toml"
    path.write_text(
        '[poison]\nlambda = 2.0\nconfuse = ["person"]\n[network]\nweights = "phi.pt"\n[claims]\nattribute = "person"\n'
    )
    options = {"poison.epochs": 7, "poison.lambda": None, "compute.device": "cpu"}
    found = read_config(path).with_options(options)
    assert found == read_config(path, options) != read_config(path)
    assert found.folder == tmp_path.resolve()
    with pytest.raises(ConfigError, match=r"dpf\.toml does not fit:\n  poison\.epochs: .*found 0"):
        found.with_options({"poison.epochs": 0})


def test_an_option_does_not_fit_a_section_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "dpf.toml"
    path.write_text("poison = 3\n")
    with pytest.raises(ConfigError, match=r"`poison\.epochs` is given, but .*no section \[poison\]"):
        read_config(path, {"poison.epochs": 7})


@pytest.mark.parametrize("content", [b"[train\n", b"epochs = \n", b"name = '\xff'\n"])
def test_what_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dpf.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"dpf\.toml is not TOML"):
        read_config(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dpf\.toml, found none\. Run `dpf-release init DIR`.*--config"):
        read_config(tmp_path / "dpf.toml")


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "dpf.toml").write_text('[images.public]\npath = "../q"\n')
    monkeypatch.chdir(tmp_path)
    found = read_config(Path("owner/dpf.toml"))
    assert found.locate(found.images.private.path) == tmp_path / "owner" / "images" / "private"
    assert found.locate(found.images.public.path) == tmp_path / "q"
    assert found.locate(Path("/images")) == Path("/images")
