"""Weights in and out: safetensors, and state dicts that hold nothing but tensors."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor, nn
from torchvision.models import DenseNet, GoogLeNet, Inception3

from dpf_release.errors import WeightsError

Module = TypeVar("Module", bound=nn.Module)

_STATE_DICT_SUFFIXES = (".pt", ".pth", ".bin")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# torchvision's own DenseNet files are older than its module names: norm.1 became norm1.
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")
# What torch.load raises on files that are not whole, or hold objects.
_UNREADABLE = (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)
_SHOWN = 5


def load_weights(network: nn.Module, path: Path, only: Collection[str] | None = None) -> None:
    """Load all weights of `network` from a file, or `only` some; on failure the network is left as it was.

    Read are `.safetensors`, and `.pt`, `.pth` or `.bin` files of a `state_dict`, with `weights_only=True`. A dict
    wrapped under `state_dict` or `model`, names that all begin with `module.`, names of torchvision's old DenseNet
    files, and the auxiliary classifiers of GoogLeNet and Inception are understood.

    Raises:
        WeightsError: the file is missing, of another format, holds more than tensors, or its names and shapes are not
            the network's.
    """
    tensors = load_state(path) if path.suffix == ".safetensors" else _load_state_dict(path)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if isinstance(network, (GoogLeNet, Inception3)) and not network.aux_logits:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_AUXILIARY)}
    if isinstance(network, DenseNet):
        tensors = {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}

    if only is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if name in only}
    # Copied by hand: `load_state_dict` reads format versions that safetensors files do not carry.
    state = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    state = state if only is None else {name: state[name] for name in only}
    problems = _mismatches(state, tensors)
    if problems:
        raise WeightsError(
            f"{path} does not hold the weights of this network: {'; '.join(problems)}. "
            "Check that arch, its arguments and the number of classes are those of the file"
        )
    with torch.no_grad():
        for name in state.keys() & tensors.keys():
            state[name].copy_(tensors[name])


def _load_state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix not in _STATE_DICT_SUFFIXES:
        raise WeightsError(
            f"{path}: expected .safetensors, or a state dict as {', '.join(_STATE_DICT_SUFFIXES)}, "
            f"found {path.suffix or 'no suffix'!r}"
        )
    _require_file(path)
    try:
        with warnings.catch_warnings():
            # A TorchScript archive is refused below; torch's warning beforehand says nothing more.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}). Nothing but tensors is "
            "unpickled, because unpickling an object runs code that the file names. If you trust the file, "
            "load it yourself and write safetensors.torch.save_file(network.state_dict(), 'w.safetensors')"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a dict from names to tensors, found {type(content).__name__}")
    wrapped = (content.get(wrapper) for wrapper in ("state_dict", "model"))
    content = next((inner for inner in wrapped if isinstance(inner, Mapping)), content)
    foreign = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if foreign:
        others = _first(map(repr, foreign))
        raise WeightsError(
            f"{path}: expected a dict from names to tensors, found others: {others}; save network.state_dict()"
        )
    return dict(content)


def _mismatches(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    # BatchNorm's step counter came with torch 0.4.1; older files lack it, and no output depends on it.
    missing = [n for n in state if n not in tensors and not n.endswith(".num_batches_tracked")]
    unexpected = [name for name in tensors if name not in state]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(state[name].shape)}"
        for name in state
        if name in tensors and tensors[name].shape != state[name].shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    return [f"{len(names)} {what}: {_first(names)}" for what, names in groups.items() if names]


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f"{path}: expected a weights file, found {'a folder' if path.is_dir() else 'nothing'}")


def state_file(tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None) -> bytes:
    """Return tensors as a safetensors file; equal ones make equal bytes, whatever their order, device and memory.

    A record becomes one sorted JSON string in its header.
    """
    copies = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    # One key: safetensors writes several in a random order.
    metadata = {"record": json.dumps(record, sort_keys=True)} if record else {"format": "pt"}
    return save(copies, metadata=metadata)


def load_state(path: Path, content: bytes | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU; of its content, where that was read already.

    Raises:
        WeightsError: the file is missing or is not safetensors.
    """
    if content is None:
        _require_file(path)
    try:
        return load_file(path, device="cpu") if content is None else load(content)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): copy or write it again") from error


def freeze(module: Module) -> Module:
    """Put `module` into eval mode (without, BatchNorm's buffers still move) and stop its gradients, and return it."""
    return module.eval().requires_grad_(False)
