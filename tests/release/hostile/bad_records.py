"""Kinds of bad record: the bank's index, the model, the card, `dpf.toml`."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from corpus import (
    FEATURIZER,
    INDEX,
    MODEL,
    PLANTED,
    VAL,
    change_header,
    edit,
    edit_manifest,
    made,
    signed,
    sparse,
    write_features,
)
from dpf_release.models.weights import state_file
from dpf_release.release.croissant import CROISSANT


@made("schema", reads=False)
def _index_lists_a_path_outside(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"][0].update(file="../../secret"))


@made("schema", reads=False)
def _index_of_2_to_the_60_rows(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"][0].update(rows=2**60))


@made("structure", reads=False)
def _index_of_2_to_the_40_rows(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"][0].update(rows=2**40))


@made("schema", reads=False)
def _index_with_rows_of_2_to_the_72_values(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree.update(feature_shape=[2**24] * 3))


@made("structure", reads=False)
def _index_with_a_million_targets(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree.update(targets=2**20))


@made("schema", reads=False)
def _index_lists_a_shard_twice(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"].append(tree["splits"]["train"][0]))


@made("schema", reads=None)
def _index_forgets_a_shard(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"]["train"].pop())


@made("schema", reads=False)
def _index_lists_shards_of_another_split(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree["splits"].update(train=tree["splits"]["val"]))


@made("schema", reads=None)
def _index_of_another_featurizer(release: Path) -> None:
    edit(release / INDEX, lambda tree: tree.update(featurizer_sha256="0" * 64))


@made("schema", reads=False)
def _index_of_a_million_levels(release: Path) -> None:
    (release / INDEX).write_bytes(b'{"splits":' + b"[" * 10**6)


def hide(path: Path, key: str) -> None:
    """A text under a key that comes again: readers take the last, and `strings` shows both."""
    path.write_text(path.read_text().replace("{", f'{{"{key}": "{PLANTED.decode()}",', 1))


@made("schema", reads=False)
def _index_with_a_key_twice(release: Path) -> None:
    hide(release / INDEX, "format")


@made("schema")
def _model_with_a_key_twice(release: Path) -> None:
    hide(release / MODEL, "arch")


@made("structure")
def _croissant_with_a_key_twice(release: Path) -> None:
    hide(release / CROISSANT, "name")


@made("structure")
def _record_of_weights_with_a_key_twice(release: Path) -> None:
    def change(tree: dict[str, dict[str, str]]) -> None:
        said = tree["__metadata__"]
        said["record"] = said["record"].replace("{", f'{{"arch": "{PLANTED.decode()}",', 1)

    change_header(release / FEATURIZER, change)
    write_features(release)


# --------------------------------------------------------------------------------------------- what is not there


@signed("structure")
def _no_files(release: Path) -> None:
    for path in [path for path in release.rglob("*") if path.is_file() and path.parent != release]:
        path.unlink()
    for folder in ("features/train", "features/val", "features", "model"):
        (release / folder).rmdir()
    (release / "README.md").unlink()
    (release / CROISSANT).unlink()


@signed("structure", reads=True)
def _no_card(release: Path) -> None:
    (release / "README.md").unlink()


@signed("structure", reads=True)
def _split_of_no_shards(release: Path) -> None:
    (release / VAL).unlink()
    (release / VAL).parent.rmdir()
    edit(release / INDEX, lambda tree: tree["splits"].update(val=[]))
    edit_manifest(release, lambda tree: tree["splits"].update(val=0))


@made("schema", reads=False)
def _index_of_64_mebibytes(release: Path) -> None:
    sparse(release / INDEX, 2**26)


@made("schema", reads=False)
def _index_of_millions_of_values(release: Path) -> None:
    (release / INDEX).write_text('{"splits": {"train": [' + ",".join(["{}"] * 4_000_000) + "]}}")


# --------------------------------------------------------------------------------------------- model record and card


@made(opens=True, network=True)
def _model_names_an_import(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="os:getcwd"))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _model_names_a_path(release: Path) -> None:
    (release.parent / "evil.py").write_text("raise SystemExit('ran')\n")
    edit(release / MODEL, lambda tree: tree.update(arch="../evil:function"))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _network_of_a_thousand_million_parameters(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="resnet56_cifar", arguments={"width": 1024}))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _regnet_of_600_million_parameters(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="regnet_y_128gf", arguments={}, hook="trunk_output.block1"))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _images_of_16_million_pixels(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree["preprocess"].update(size=[4096, 4096]))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _network_of_much_work(release: Path) -> None:
    """Weights of 40 MB and tensors below 256 MiB each; together they took minutes and gigabytes."""

    def change(tree: dict[str, Any]) -> None:
        tree.update(arch="densenet201", arguments={}, hook="features.denseblock1")
        tree["preprocess"].update(size=[1400, 1400])

    edit(release / MODEL, change)
    (release / FEATURIZER).write_bytes(state_file({"x": torch.zeros(10_000_000)}))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _hook_that_is_not_there(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(hook="conv" + "9" * 190 + "_1"))


@made(opens=True, network=True)
def _network_of_other_weights(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arguments={"width": 3}))
    _say_in_the_featurizer(release)


@made(opens=True, network=True)
def _unknown_argument(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arguments={"blocks": 10_000}))
    _say_in_the_featurizer(release)


def _say_in_the_featurizer(release: Path) -> None:
    """The metadata of the weights say what model.json says, and the bank is of these weights."""
    record = json.loads((release / MODEL).read_bytes())
    said = {key: record[key] for key in ("arch", "arguments", "preprocess")} | {"hook": record["hook"]}
    change_header(
        release / FEATURIZER, lambda tree: tree.update(__metadata__={"record": json.dumps(said, sort_keys=True)})
    )
    write_features(release)


@made("structure")
def _weights_that_say_another_network(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(arch="resnet18", arguments={}))


@made("schema")
def _model_of_another_version(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(version=2))


@made("schema")
def _model_with_a_builder(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(builder="os.system"))


@made("schema")
def _model_with_a_mean_that_is_no_number(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree["preprocess"].update(mean=[float("nan"), 0, 0]))


@made("schema")
def _model_with_infinite_deviation(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree["preprocess"].update(std=[float("inf"), 1, 1]))


@made("schema")
def _model_of_other_classes(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(classes=["a", "b", "c"]))


@made("schema")
def _model_of_another_shape(release: Path) -> None:
    edit(release / MODEL, lambda tree: tree.update(feature_shape=[8, 8, 9]))


@made("schema")
def _model_of_a_million_levels(release: Path) -> None:
    (release / MODEL).write_bytes(b'{"arguments":' * 10**6)


@made("schema")
def _model_of_a_gibibyte(release: Path) -> None:
    sparse(release / MODEL)


@made("schema")
def _model_of_millions_of_classes(release: Path) -> None:
    (release / MODEL).write_text('{"classes": [' + ",".join(["0"] * 7_000_000) + "]}")


@made("structure")
def _card_that_is_no_text(release: Path) -> None:
    (release / "README.md").write_bytes(b"\xff\xfe")


@made("structure")
def _card_of_64_mebibytes(release: Path) -> None:
    sparse(release / "README.md", 2**26)


@made("structure")
def _card_with_terminal_commands(release: Path) -> None:
    (release / "README.md").write_text("\x1b]0;owned\x07\x1b[2J")


# --------------------------------------------------------------------------------------------- dpf.toml

CONFIGS: dict[str, bytes] = {
    "a text for a number": b'[train]\nepochs = "many"',
    "a number for a text": b"[release]\nname = 1",
    "a table for a number": b"[train.epochs]\nx = 1",
    "an array for a table": b"train = [1, 2]",
    "a date for a path": b"[images.private]\npath = 2020-01-01",
    "a truth value for a number": b"[train]\nepochs = true",
    "a fraction for a number": b"[train]\nepochs = 1.5",
    "not a number": b"[poison]\nlambda = nan",
    "infinite": b"[train]\nlearning_rate = inf",
    "too large": b"[train]\nepochs = 1" + b"0" * 4000,
    "too large to be written": b"[train]\nepochs = 0x" + b"f" * 100_000,
    "below zero": b"[train]\nepochs = -1",
    "an unknown key": b"[train]\nepoch = 1",
    "an unknown section": b"[vault]\npath = 1",
    "the folder": b'folder = "/"',
    "a key twice": b"[train]\nepochs = 1\nepochs = 2",
    "a name with a path": b'[release]\nname = "../up"',
    "arrays of a million levels": b"a = " + b"[" * 10**5,
    "tables of many levels": b"a = " + b"{a = " * 10**5,
    "a key of many parts": b"a." * 100_000 + b"b = 1",
    "a table of many parts": b"[" + b'"a" . ' * 100_000 + b"b]",
    "no text": b"\xff\xfe",
    "a zero byte": b'[release]\nname = "a\x00b"',
    "not TOML": b"{}",
    "a size beyond all numbers": b'[bank]\nshard_size = "' + b"9" * 400 + b' GiB"',
    "a pickle": pickle.dumps({"train": 1}),
}
