"""Kinds of bad weights file: the header of a safetensors file, pickles, values."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from corpus import CLASSIFIER, FIRST, PLANTED, Payload, change_header, made, poke, sparse
from dpf_release.models.weights import state_file


def tensors(tree: dict[str, Any]) -> list[Any]:
    return [entry for key, entry in tree.items() if key != "__metadata__"]


def bad_weights(change: Callable[[dict[str, Any]], Any]) -> Any:
    """A change of the header of φ2's file, which `--deep` and `Release.open` find as its structure."""

    def make(release: Path) -> None:
        change_header(release / CLASSIFIER, change)

    make.__name__ = change.__name__
    return made("structure")(make)


@bad_weights
def _overlapping_tensors(tree: dict[str, Any]) -> None:
    tensors(tree)[1]["data_offsets"] = tensors(tree)[0]["data_offsets"]


@bad_weights
def _tensors_beyond_the_end(tree: dict[str, Any]) -> None:
    tensors(tree)[-1]["data_offsets"][1] = 2**62


@bad_weights
def _tensor_of_2_to_the_62_values(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[2**31, 2**31])


@bad_weights
def _tensor_of_a_shape_that_overflows(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[2**32, 2**32, 2**32])


@bad_weights
def _tensor_of_an_unknown_type(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(dtype="OBJECT")


@bad_weights
def _tensor_of_a_negative_shape(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[-1])


@bad_weights
def _tensor_of_a_shape_of_truth_values(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(shape=[True])


@bad_weights
def _tensor_of_a_type_that_weights_do_not_have(tree: dict[str, Any]) -> None:
    eight_bytes = next(entry for entry in tensors(tree) if entry["dtype"] == "I64")
    eight_bytes.update(dtype="F8_E4M3", shape=[8])  # in which `--deep` knows no values that are not numbers


@bad_weights
def _field_of_a_tensor_that_safetensors_does_not_know(tree: dict[str, Any]) -> None:
    tensors(tree)[0].update(source=PLANTED.decode())


@bad_weights
def _hole_between_tensors(tree: dict[str, Any]) -> None:
    name = [key for key in tree if key != "__metadata__"][1]
    del tree[name]


@bad_weights
def _metadata_of_more(tree: dict[str, Any]) -> None:
    tree["__metadata__"] = {"format": "pt", "source": PLANTED.decode()}


@bad_weights
def _metadata_that_are_no_texts(tree: dict[str, Any]) -> None:
    tree["__metadata__"] = {"format": ["pt"]}


@made("structure")
def _blanks_in_a_header(release: Path) -> None:
    change_header(release / CLASSIFIER, lambda tree: None, lambda text: text.replace(b",", b", " + b" " * 7))


@made("structure")
def _header_with_a_key_twice(release: Path) -> None:
    change_header(release / CLASSIFIER, lambda tree: None, lambda text: b'{"fc.bias":{},' + text[1:])


@made("structure")
def _header_with_metadata_twice(release: Path) -> None:
    def twice(text: bytes) -> bytes:
        return text.replace(b'"__metadata__":{"format":"pt"}', b'"__metadata__":{"format":"pt","format":"pt"}')

    change_header(release / CLASSIFIER, lambda tree: None, twice)


@made("structure")
def _header_longer_than_the_file(release: Path) -> None:
    poke(release / CLASSIFIER, 0, struct.pack("<Q", 2**63))


@made("structure", alone=True)
def _header_of_a_million_levels(release: Path) -> None:
    text = b'{"a":' * 10**6
    (release / CLASSIFIER).write_bytes(len(text).to_bytes(8, "little") + text)


@made("structure")
def _header_of_millions_of_values(release: Path) -> None:
    text = b"[" + b",".join([b"[]"] * 5_000_000) + b"]"
    (release / CLASSIFIER).write_bytes(len(text).to_bytes(8, "little") + text)


@made("structure")
def _header_of_64_mebibytes(release: Path) -> None:
    sparse(release / CLASSIFIER, 2**26)
    poke(release / CLASSIFIER, 0, struct.pack("<Q", 2**26 - 8))


@made("structure")
def _header_that_is_no_object(release: Path) -> None:
    (release / CLASSIFIER).write_bytes(b"\x08" + bytes(7) + b"[1]     ")


@made("structure")
def _bytes_after_the_tensors(release: Path) -> None:
    with (release / CLASSIFIER).open("ab") as file:
        file.write(PLANTED)


@made("structure")
def _pickle_named_as_weights(release: Path) -> None:
    (release / CLASSIFIER).write_bytes(pickle.dumps(Payload(release.parent / "marker")))


@made("structure")
def _torch_file_named_as_weights(release: Path) -> None:
    torch.save({"fc.weight": Payload(release.parent / "marker")}, release / CLASSIFIER)


@made("structure")
def _pickle_named_as_a_shard(release: Path) -> None:
    (release / FIRST).write_bytes(pickle.dumps(Payload(release.parent / "marker")))


@made("values", opens=True)
def _weights_that_are_not_numbers(release: Path) -> None:
    path = release / CLASSIFIER
    poke(path, path.stat().st_size - 4, struct.pack("<f", float("nan")))


def _without(release: Path, names: slice) -> None:
    """φ2's file without some tensors, whole otherwise."""
    state = load_file(release / CLASSIFIER)
    (release / CLASSIFIER).write_bytes(state_file({key: state[key] for key in sorted(state)[names]}))


@made(opens=True, network=True)
def _tensor_missing(release: Path) -> None:
    _without(release, slice(1, None))


@made(opens=True, network=True)
def _tensor_added(release: Path) -> None:
    state = load_file(release / CLASSIFIER)
    (release / CLASSIFIER).write_bytes(
        state_file(state | {"source": torch.frombuffer(bytearray(PLANTED), dtype=torch.uint8)})
    )


@made(opens=True, network=True)
def _tensor_of_another_type(release: Path) -> None:
    state = load_file(release / CLASSIFIER)
    (release / CLASSIFIER).write_bytes(state_file({key: value.double() for key, value in state.items()}))
