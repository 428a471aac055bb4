"""Cutting a network Φ in two at a hook point: Φ(x) = φ2(φ1(x)).

A network that is a `nn.Sequential` is cut by the order of its modules. Any other is traced with `torch.fx`, and cut
where all of the forward pass goes through one tensor. Either way the halves keep the module names of Φ, so that their
state dicts are the two parts of Φ's.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dpf_release.errors import HookError
from dpf_release.models.tracing import before_last_relu, make_out_of_place, tensors_of, trace_network
from dpf_release.models.zoo import CifarResNet

_RESNETS = (torchvision.models.ResNet, CifarResNet)
_TOKEN_MIXERS = (nn.MultiheadAttention, ShiftedWindowAttention, RelativePositionalMultiHeadAttention)


@dataclass(frozen=True)
class HookPoint:
    """A place where a network can be cut."""

    path: str  # of a module, such as `layer3.0`; the features are its output
    name: str  # the paper's on ResNets (`conv4_1`), else the path
    shape: tuple[int, int, int]  # (C, H, W) of one row of features

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row of features in float16."""
        return 2 * math.prod(self.shape)


@dataclass(frozen=True)
class Split:
    """A network cut in two at `hook`."""

    featurizer: nn.Module  # φ1, images (N, 3, H, W) to features (N, *hook.shape)
    classifier: nn.Module  # φ2, features to what the network returns
    hook: HookPoint
    before_relu: nn.Module | None  # φ1 without the ReLU that it ends in; None where it ends in something else
    non_negative: bool  # of the probe batch's features, as where φ1 ends in a ReLU; False on the meta device


def resolve(network: nn.Module, hook: str) -> str:
    """Return the module path of a hook: on ResNets `conv{k}_{i}` is `layer{k-1}.{i-1}`, else as given."""
    paper = re.fullmatch(r"conv(\d+)_(\d+)", hook)
    if paper is None or not isinstance(network, _RESNETS):
        return hook
    return f"layer{int(paper[1]) - 1}.{int(paper[2]) - 1}"


def hook_points(network: nn.Module, image_size: tuple[int, int]) -> list[HookPoint]:
    """Return every place where `network` can be cut, in forward order.

    A container and its last module are two names of one place; both are listed. The network maps images (N, 3, H, W) to
    one tensor; it is left as it is. `image_size` is (H, W) in pixels.

    Raises:
        HookError: the network is a vision transformer, cannot be traced, or rejects images of this size.
    """
    reference, probe, _ = _probed(network, image_size)
    try:
        trace = trace_network(reference)
    except HookError:
        if not _is_sequential(reference):
            raise
        with torch.no_grad():
            values = list(_run_in_order(reference, probe.clone()))
        rest = {path: halves[1] for path, _ in values if (halves := _slices(reference, path)) is not None}
        found = [(path, v.shape) for path, v in values if isinstance(v, Tensor) and len(rest[path])]
    else:
        shapes = trace.shapes(probe)
        nodes = [(path, trace.calls[path][0]) for path in trace.calls if trace.obstacle(path) is None]
        found = [(path, shapes[node]) for path, node in nodes if node in shapes]
    return [_hook_point(network, path, shape) for path, shape in found if _is_feature_map(shape)]


def hook_table(points: Sequence[HookPoint]) -> str:
    """Return hook points as a table for people: hook, path, shape, bytes a row in float16."""
    if not points:
        return "This network has no valid hook point."
    rows = [("hook", "path", "shape (C, H, W)", "bytes a row")]
    rows += [(p.name, p.path, " x ".join(map(str, p.shape)), f"{p.bytes_per_row:,}") for p in points]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["Valid hook points:", *lines])


def split(network: nn.Module, hook: str, image_size: tuple[int, int]) -> Split:
    """Cut `network` at `hook` into φ1 and φ2, and check φ2(φ1(x)) = Φ(x) on a probe batch, bit for bit.

    The halves own copies of the weights, on the network's device, each module in the mode (train or eval) that it has
    there. Together their state dicts have the names of Φ's that its forward pass uses. Operations that would overwrite
    their input are made out of place. Where the cut needs `torch.fx`, Python code of a forward pass that asks for
    `self.training` keeps what it does in eval mode. A network on torch's meta device is cut by its shapes alone.

    Args:
        network: maps images (N, 3, H, W) to one tensor; it is left as it is, and the random state too.
        hook: the paper's name on ResNets (`conv4_1`), or a module path (`layer3.0`, `features.14`).
        image_size: (H, W) in pixels, of the probe batch and of the hook's shape.

    Raises:
        HookError: the network cannot be cut there; the message lists where it can.
    """
    reference, probe, expected = _probed(network, image_size)
    path = resolve(network, hook)
    try:
        featurizer, classifier, features = _cut(reference, path, probe, expected)
    except HookError as error:
        table = hook_table(hook_points(network, image_size))
        raise HookError(f"the network cannot be cut at {hook!r}: {error}.\n{table}") from None
    if {id(m) for m in featurizer.modules()} & {id(m) for m in classifier.modules()}:
        # One module without weights in both halves, such as a Dropout that Φ calls twice.
        featurizer = copy.deepcopy(featurizer)
    before = before_last_relu(featurizer)
    if before is not None:
        with torch.no_grad():
            if not _same_bits(before(probe.clone()).relu(), features):
                before = None
    return Split(
        featurizer=_placed_as(network, featurizer),
        before_relu=before,
        classifier=_placed_as(network, classifier),
        hook=_hook_point(network, path, features.shape),
        non_negative=not features.is_meta and bool((features >= 0).all()),
    )


def _probed(network: nn.Module, image_size: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a copy of Φ in eval mode, on the CPU or on paper, a probe batch (2, 3, H, W), and Φ's output on it."""
    if any(isinstance(module, _TOKEN_MIXERS) for module in network.modules()):
        raise HookError(
            f"{type(network).__name__} is a vision transformer: its features are tokens, and a feature bank "
            "holds feature maps (N, C, H, W). Choose a convolutional network, such as resnet50"
        )
    on_paper = any(t.is_meta for t in tensors_of(network))
    reference = (copy.deepcopy(network) if on_paper else copy.deepcopy(network).cpu()).eval()
    dtype = next((t.dtype for t in tensors_of(reference) if t.is_floating_point()), torch.float32)
    probe = torch.empty(2, 3, *image_size, device="meta", dtype=dtype)
    if not on_paper:
        probe = torch.randn(probe.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = reference(probe.clone())
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        height, width = image_size
        raise HookError(f"the network does not take RGB images of {height} x {width} pixels: {error}") from error
    if not isinstance(output, Tensor):
        raise HookError(f"the network must return one tensor (N, outputs), found {type(output).__name__}")
    return reference, probe, output


def _cut(reference: nn.Module, path: str, probe: Tensor, expected: Tensor) -> tuple[nn.Module, nn.Module, Tensor]:
    paths = [name for name, _ in reference.named_modules(remove_duplicate=False) if name]
    if path not in paths:
        close = difflib.get_close_matches(path, paths, n=3)
        raise HookError(f"there is no module {path!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    problems = []
    for cut in (_cut_by_order, _cut_by_graph):
        try:
            halves = cut(reference, path)
            if halves is not None:
                return *halves, _features(*halves, probe, expected)
        except HookError as error:
            problems.append(error)
    raise problems[0]


def _features(featurizer: nn.Module, classifier: nn.Module, probe: Tensor, expected: Tensor) -> Tensor:
    """Return the features (N, C, H, W) of the probe batch, once all that a split promises holds on it."""
    if {id(t) for t in tensors_of(featurizer)} & {id(t) for t in tensors_of(classifier)}:
        raise HookError("weights are used on both sides of the cut")
    make_out_of_place(featurizer)
    make_out_of_place(classifier)
    images = probe.clone()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        features = featurizer(images)
        if not isinstance(features, Tensor):
            raise HookError(f"expected one tensor (N, C, H, W) there, found {type(features).__name__}")
        if not _is_feature_map(features.shape):
            found = ", ".join(["N", *map(str, features.shape[1:])])
            raise HookError(f"it is after the last feature map: expected (N, C, H, W) with H W > 1, found ({found})")
        kept = features.clone()
        output = classifier(features)
    if not _same_bits(images, probe) or not _same_bits(features, kept):
        raise HookError("an operation in place overwrites the images or the features, and cannot be rewritten")
    if not _same_bits(output, expected):
        raise HookError("φ2(φ1(x)) is not Φ(x): the forward pass depends on more than x, or reuses overwritten values")
    return features


def _is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    # A subclass with a forward of its own may do more than run its modules in turn.
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _run_in_order(sequence: nn.Sequential, value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, module in zip(sequence._modules, sequence, strict=True):  # `named_children` leaves out repeated ones
        if _is_sequential(module):
            for path, inner in _run_in_order(module, value, f"{prefix}{name}."):
                value = inner
                yield path, inner
        else:
            value = module(value)
        yield prefix + name, value


def _slices(sequence: nn.Module, path: str) -> tuple[nn.Sequential, nn.Sequential] | None:
    """Return the modules up to and with `path`, and those after it; None where order alone cannot tell."""
    name, _, inner = path.partition(".")
    if not _is_sequential(sequence) or name not in sequence._modules:
        return None
    children = list(zip(sequence._modules, sequence, strict=True))
    position = list(sequence._modules).index(name)
    before, after = OrderedDict(children[: position + 1]), OrderedDict(children[position + 1 :])
    if inner:
        slices = _slices(before[name], inner)
        if slices is None:
            return None
        before[name] = slices[0]
        if len(slices[1]):
            after = OrderedDict([(name, slices[1]), *after.items()])
    return nn.Sequential(before), nn.Sequential(after)


def _cut_by_order(reference: nn.Module, path: str) -> tuple[nn.Module, nn.Module] | None:
    slices = _slices(reference, path)
    if slices is not None and not len(slices[1]):
        raise HookError("it is after the last feature map: nothing comes after it")
    return slices


def _cut_by_graph(reference: nn.Module, path: str) -> tuple[nn.Module, nn.Module]:
    return trace_network(reference).cut(path)


def _hook_point(network: nn.Module, path: str, shape: Sequence[int]) -> HookPoint:
    block = re.fullmatch(r"layer(\d+)\.(\d+)", path) if isinstance(network, _RESNETS) else None
    name = f"conv{int(block[1]) + 1}_{int(block[2]) + 1}" if block else path
    _, channels, height, width = shape
    return HookPoint(path, name, (channels, height, width))


def _is_feature_map(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[2] * shape[3] > 1


def _placed_as(network: nn.Module, half: nn.Module) -> nn.Module:
    """Put a half on the network's device, and each of its modules in the mode of the one it is a copy of."""
    for path, module in half.named_modules():
        module.training = network.get_submodule(path).training
    device = next((tensor.device for tensor in tensors_of(network)), torch.device("cpu"))
    return half.to(device)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # Bytes and not values: an untrained network may overflow, and NaN differs from itself.
    if a.shape != b.shape or a.is_meta:
        return a.shape == b.shape
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))
