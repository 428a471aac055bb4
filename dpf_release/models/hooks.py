"""Cutting a network Φ in two at a hook point: Φ(x) = φ2(φ1(x)).

A network that is a `nn.Sequential` is cut by the order of its modules. Any other is traced with
`torch.fx`, and cut where all of the forward pass goes through one tensor. Either way the halves keep
the module names of Φ, so that their state dicts are the two parts of Φ's.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dpf_release.errors import HookError
from dpf_release.models.zoo import CifarResNet

_RESNETS = (torchvision.models.ResNet, CifarResNet)
_TOKEN_MIXERS = (nn.MultiheadAttention, ShiftedWindowAttention, RelativePositionalMultiHeadAttention)
_IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# What a forward pass raises on symbols, where its code asks for values or for modules that are not its own.
_UNTRACEABLE = (
    fx.proxy.TraceError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class HookPoint:
    """A place where a network can be cut.

    Attributes:
        path: module path, such as `layer3.0`; the features are this module's output.
        name: the paper's name on ResNets (`conv4_1`), else the path.
        shape: (C, H, W) of one row of features.
    """

    path: str
    name: str
    shape: tuple[int, int, int]

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row of features in float16."""
        return 2 * math.prod(self.shape)


@dataclass(frozen=True)
class Split:
    """A network cut in two.

    Attributes:
        featurizer: φ1, images (N, 3, H, W) to features (N, *hook.shape).
        classifier: φ2, features to what the network returns.
        hook: where it was cut.
        non_negative: no feature of the probe batch is below 0, as where φ1 ends in a ReLU.
    """

    featurizer: nn.Module
    classifier: nn.Module
    hook: HookPoint
    non_negative: bool


def resolve(network: nn.Module, hook: str) -> str:
    """Return the module path of a hook: on ResNets `conv{k}_{i}` is `layer{k-1}.{i-1}`, else as given."""
    paper = re.fullmatch(r"conv(\d+)_(\d+)", hook)
    if paper is None or not isinstance(network, _RESNETS):
        return hook
    return f"layer{int(paper[1]) - 1}.{int(paper[2]) - 1}"


def hook_points(network: nn.Module, image_size: tuple[int, int]) -> list[HookPoint]:
    """Return every place where `network` can be cut, in forward order.

    A container and its last module are two names of one place; both are listed.

    Args:
        network: maps images (N, 3, H, W) to one tensor; it is left as it is.
        image_size: (H, W) in pixels.

    Raises:
        HookError: the network is a vision transformer, cannot be traced, or rejects images of this size.
    """
    reference, probe, _ = _probed(network, image_size)
    try:
        trace = _trace(reference)
    except HookError:
        if not _is_sequential(reference):
            raise
        with torch.no_grad():
            values = list(_run_in_order(reference, probe.clone()))
        # A cut needs something to come after it.
        found = [
            (path, value.shape)
            for path, value in values
            if isinstance(value, Tensor) and _tail(reference, path)
        ]
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
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(["Valid hook points:", *lines])


def split(network: nn.Module, hook: str, image_size: tuple[int, int]) -> Split:
    """Cut `network` at `hook` into φ1 and φ2, and check φ2(φ1(x)) = Φ(x) on a probe batch, bit for bit.

    The halves own copies of the weights, on the network's device, each module in the mode (train or
    eval) that it has there. Together their state dicts have the names of Φ's that its forward pass uses.
    Operations that would overwrite their input are made out of place. Where the cut needs `torch.fx`,
    Python code of a forward pass that asks for `self.training` keeps what it does in eval mode.

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
    return Split(
        # Copied: both halves may hold one module without weights, such as a Dropout that Φ calls twice.
        featurizer=_placed_as(network, copy.deepcopy(featurizer)),
        classifier=_placed_as(network, classifier),
        hook=_hook_point(network, path, features.shape),
        non_negative=bool((features >= 0).all()),
    )


def _probed(network: nn.Module, image_size: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a copy of Φ on the CPU in eval mode, a probe batch (2, 3, H, W), and Φ's output on it."""
    if any(isinstance(module, _TOKEN_MIXERS) for module in network.modules()):
        raise HookError(
            f"{type(network).__name__} is a vision transformer: its features are tokens, and a feature bank "
            "holds feature maps (N, C, H, W). Choose a convolutional network, such as resnet50 or convnext_tiny"
        )
    reference = copy.deepcopy(network).cpu().eval()
    dtype = next((t.dtype for t in _tensors(reference) if t.is_floating_point()), torch.float32)
    probe = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = reference(probe.clone())
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        height, width = image_size
        raise HookError(
            f"the network does not take RGB images of {height} x {width} pixels: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise HookError(f"the network must return one tensor (N, outputs), found {type(output).__name__}")
    return reference, probe, output


def _cut(
    reference: nn.Module, path: str, probe: Tensor, expected: Tensor
) -> tuple[nn.Module, nn.Module, Tensor]:
    paths = [name for name, _ in reference.named_modules(remove_duplicate=False) if name]
    if path not in paths:
        close = difflib.get_close_matches(path, paths, n=3)
        raise HookError(
            f"there is no module {path!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
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
    if {id(t) for t in _tensors(featurizer)} & {id(t) for t in _tensors(classifier)}:
        raise HookError("weights are used on both sides of the cut")
    _make_out_of_place(featurizer)
    _make_out_of_place(classifier)
    images = probe.clone()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        features = featurizer(images)
        if not isinstance(features, Tensor):
            raise HookError(f"expected one tensor (N, C, H, W) there, found {type(features).__name__}")
        if not _is_feature_map(features.shape):
            found = ", ".join(["N", *map(str, features.shape[1:])])
            raise HookError(
                f"it is after the last feature map: expected (N, C, H, W) with H W > 1, found ({found})"
            )
        kept = features.clone()
        output = classifier(features)
    if not _same_bits(images, probe) or not _same_bits(features, kept):
        raise HookError(
            "an operation in place overwrites the images or the features, and cannot be rewritten"
        )
    if not _same_bits(output, expected):
        raise HookError(
            "φ2(φ1(x)) is not Φ(x): the forward pass depends on more than x, or reuses overwritten values"
        )
    return features


def _is_sequential(module: nn.Module | None) -> bool:
    # A subclass with a forward of its own may do more than run its modules in turn.
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _run_in_order(sequence: nn.Module, value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, module in sequence._modules.items():
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
    children = list(sequence._modules.items())
    position = list(sequence._modules).index(name)
    before, after = dict(children[: position + 1]), dict(children[position + 1 :])
    if inner:
        slices = _slices(before[name], inner)
        if slices is None:
            return None
        before[name] = slices[0]
        if len(slices[1]):
            after = {name: slices[1], **after}
    return _sequence(before), _sequence(after)


def _sequence(children: dict[str, nn.Module]) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, child in children.items():
        sequence.add_module(name, child)
    return sequence


def _tail(reference: nn.Module, path: str) -> nn.Sequential | None:
    slices = _slices(reference, path)
    return slices[1] if slices and len(slices[1]) else None


def _cut_by_order(reference: nn.Module, path: str) -> tuple[nn.Module, nn.Module] | None:
    slices = _slices(reference, path)
    if slices is not None and not len(slices[1]):
        raise HookError("it is after the last feature map: nothing comes after it")
    return slices


def _cut_by_graph(reference: nn.Module, path: str) -> tuple[nn.Module, nn.Module]:
    trace = _trace(reference)
    obstacle = trace.obstacle(path)
    if obstacle is not None:
        raise HookError(obstacle)
    return trace.cut(path)


class _Tracer(fx.Tracer):
    """Traces down to modules without children, and keeps what each module, composite or not, returned.

    Random modules (Dropout, StochasticDepth) stay modules, so that train mode works in the halves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[fx.Node | None]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_parametrized(m) or next(m.children(), None) is None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        node = result.node if isinstance(result, fx.Proxy) else None
        self.calls.setdefault(self.path_of_module(m), []).append(node)
        return result


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shapes of its tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        return value


@dataclass(frozen=True)
class _Trace:
    """The graph of a network in eval mode, and the nodes that each module path returned, one a call."""

    network: nn.Module
    graph: fx.Graph
    calls: dict[str, list[fx.Node | None]]

    def shapes(self, probe: Tensor) -> dict[fx.Node | None, torch.Size]:
        module = fx.GraphModule(self.network, copy.deepcopy(self.graph))
        interpreter = _Shapes(module)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            interpreter.run(probe.clone())
        by_name = {node.name: shape for node, shape in interpreter.shapes.items()}
        return {node: by_name[node.name] for node in self.graph.nodes if node.name in by_name}

    def obstacle(self, path: str) -> str | None:
        """Say why the graph cannot be cut at the output of `path`; None where it can."""
        nodes = self.calls.get(path, [])
        if len(nodes) != 1:
            return f"the forward pass calls it {len(nodes)} times, and a hook is one place"
        node = nodes[0]
        if node is None:
            return "its output is not one tensor"
        if node in self.graph.output_node().all_input_nodes:
            return "it is after the last feature map: nothing comes after it"
        before, after = self._sides(node)
        crossing = [n for n in self.graph.nodes if n in before and any(user in after for user in n.users)]
        if crossing != [node]:
            names = ", ".join(n.name for n in crossing)
            return (
                f"one tensor must cross the cut, found {len(crossing)} ({names}), as inside a residual block"
            )
        if self._weights(before) & self._weights(after):
            return "weights are used on both sides of the cut"
        return None

    def cut(self, path: str) -> tuple[fx.GraphModule, fx.GraphModule]:
        (node,) = self.calls[path]
        assert node is not None
        before, after = self._sides(node)
        featurizer, classifier = fx.Graph(), fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for n in self.graph.nodes:
            if n in before:
                copies[n] = featurizer.node_copy(n, copies.__getitem__)
        featurizer.output(copies[node])
        copies[node] = classifier.placeholder("features")
        for n in self.graph.nodes:
            if n in after:
                copies[n] = classifier.node_copy(n, copies.__getitem__)
        return (
            fx.GraphModule(self.network, featurizer, "Featurizer"),
            fx.GraphModule(self.network, classifier, "Classifier"),
        )

    def _sides(self, node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """Return what makes `node`, itself included, and what else the network's output needs."""
        before = _with_inputs(node)
        return before, _with_inputs(self.graph.output_node()) - before

    def _weights(self, nodes: Iterable[fx.Node]) -> set[int]:
        modules = {str(n.target) for n in nodes if n.op == "call_module"}
        return {id(t) for path in modules for t in _tensors(self.network.get_submodule(path))}


def _trace(reference: nn.Module) -> _Trace:
    tracer = _Tracer()
    try:
        graph = tracer.trace(reference)
    except _UNTRACEABLE as error:
        raise HookError(
            f"{type(reference).__name__} cannot be cut: torch.fx cannot trace its forward pass ({error}), and it is "
            "not a nn.Sequential. Write it as a nn.Sequential of its stages, or without decisions on tensor values"
        ) from error
    return _Trace(reference, graph, tracer.calls)


def _with_inputs(node: fx.Node) -> set[fx.Node]:
    seen, waiting = {node}, [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in seen]
        seen.update(new)
        waiting.extend(new)
    return seen


def _make_out_of_place(half: nn.Module) -> None:
    for module in half.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                _make_node_out_of_place(node)
            module.recompile()


def _make_node_out_of_place(node: fx.Node) -> None:
    if node.op == "call_method" and re.fullmatch(r"[a-z]\w*[a-z\d]_", str(node.target)):
        plain = str(node.target).removesuffix("_")
        node.target = plain if hasattr(Tensor, plain) else node.target  # x.mul_(y) -> x.mul(y)
    elif node.op == "call_function" and callable(node.target):
        name = getattr(node.target, "__name__", "").removesuffix("_")
        if node.target in _IN_PLACE_OPERATORS:
            node.target = _IN_PLACE_OPERATORS[node.target]
        elif node.target is getattr(torch, f"{name}_", None):
            node.target = getattr(torch, name)  # torch.relu_(x) -> torch.relu(x)
        try:
            call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):  # a builtin tells no signature, and has no `inplace`
            return
        if call.arguments.get("inplace") is True:
            call.arguments["inplace"] = False  # F.relu(x, True) -> F.relu(x, False)
            node.args, node.kwargs = call.args, call.kwargs


def _hook_point(network: nn.Module, path: str, shape: Sequence[int]) -> HookPoint:
    block = re.fullmatch(r"layer(\d+)\.(\d+)", path)
    on_resnet = block is not None and isinstance(network, _RESNETS)
    name = f"conv{int(block[1]) + 1}_{int(block[2]) + 1}" if block and on_resnet else path
    _, channels, height, width = shape
    return HookPoint(path, name, (channels, height, width))


def _is_feature_map(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[2] * shape[3] > 1


def _placed_as(network: nn.Module, half: nn.Module) -> nn.Module:
    """Put a half on the network's device, and each of its modules in the mode of the one it is a copy of."""
    for path, module in half.named_modules():
        module.training = network.get_submodule(path).training
    device = next((tensor.device for tensor in _tensors(network)), torch.device("cpu"))
    return half.to(device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # Bytes and not values: an untrained network may overflow, and NaN differs from itself.
    return a.shape == b.shape and torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))
