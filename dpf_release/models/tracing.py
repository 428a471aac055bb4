"""The graph of a forward pass: where it can be cut, and its halves without operations in place."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn.utils.parametrize import is_parametrized

from dpf_release.errors import HookError

_IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# What a forward pass raises on symbols, where its code asks for values or for modules that are not its own.
_UNTRACEABLE = (AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


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


@dataclass(frozen=True)
class Trace:
    """The graph of a network in eval mode, and the nodes that each module path returned, one a call."""

    network: nn.Module
    graph: fx.Graph
    calls: dict[str, list[fx.Node | None]]

    def shapes(self, probe: Tensor) -> dict[fx.Node, torch.Size]:
        """Return the shape of every tensor in the graph, for a batch of images (N, 3, H, W)."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            ShapeProp(fx.GraphModule(self.network, self.graph)).propagate(probe.clone())
        found = {node: node.meta.get("tensor_meta") for node in self.graph.nodes}
        return {node: meta.shape for node, meta in found.items() if isinstance(meta, TensorMetadata)}

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
            return f"one tensor must cross the cut, found {len(crossing)} ({names}), as inside a residual block"
        if self._weights(before) & self._weights(after):
            return "weights are used on both sides of the cut"
        return None

    def cut(self, path: str) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Return φ1 and φ2, which share the network's modules and their names; `HookError`: there is an obstacle."""
        if (obstacle := self.obstacle(path)) is not None:
            raise HookError(obstacle)
        (node,) = self.calls[path]
        assert node is not None
        before, after = self._sides(node)
        featurizer, classifier = fx.Graph(), fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for n in filter(before.__contains__, self.graph.nodes):
            copies[n] = featurizer.node_copy(n, copies.__getitem__)
        featurizer.output(copies[node])
        copies[node] = classifier.placeholder("features")
        for n in filter(after.__contains__, self.graph.nodes):
            copies[n] = classifier.node_copy(n, copies.__getitem__)
        halves = {"Featurizer": featurizer, "Classifier": classifier}
        phi_1, phi_2 = (fx.GraphModule(self.network, graph, name) for name, graph in halves.items())
        return phi_1, phi_2

    def _sides(self, node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """Return what makes `node`, itself included, and what else the network's output needs."""
        before = _with_inputs(node)
        return before, _with_inputs(self.graph.output_node()) - before

    def _weights(self, nodes: Iterable[fx.Node]) -> set[int]:
        modules = {str(n.target) for n in nodes if n.op == "call_module"}
        return {id(t) for path in modules for t in tensors_of(self.network.get_submodule(path))}


def trace_network(reference: nn.Module) -> Trace:
    """Trace the forward pass of a network in eval mode; `HookError` where torch.fx cannot follow its Python code."""
    tracer = _Tracer()
    try:
        graph = tracer.trace(reference)
    except _UNTRACEABLE as error:
        raise HookError(
            f"{type(reference).__name__} cannot be cut: torch.fx cannot trace its forward ({error}), and "
            "it is not a nn.Sequential. Write it as one, or without decisions on the values of tensors"
        ) from error
    return Trace(reference, graph, tracer.calls)


def before_last_relu(featurizer: nn.Module) -> fx.GraphModule | None:
    """φ1 without the ReLU that it ends in, sharing its modules; None where it ends in something else."""
    try:
        whole = featurizer.graph if isinstance(featurizer, fx.GraphModule) else trace_network(featurizer).graph
    except HookError:
        return None
    (last,) = whole.output_node().all_input_nodes
    if last.op == "call_module":
        is_relu = type(featurizer.get_submodule(str(last.target))) is nn.ReLU
    else:
        is_relu = last.target in (F.relu, torch.relu, torch.relu_, "relu", "relu_")
    if not is_relu:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    before = _with_inputs(last.all_input_nodes[0])
    for node in filter(before.__contains__, whole.nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[last.all_input_nodes[0]])
    return fx.GraphModule(featurizer, graph, "BeforeReLU")


def _with_inputs(node: fx.Node) -> set[fx.Node]:
    seen, waiting = {node}, [node]
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n not in seen]
        seen.update(new)
        waiting.extend(new)
    return seen


def make_out_of_place(half: nn.Module) -> None:
    """Make operations of modules and of graphs write new tensors, where they would overwrite their input."""
    for module in half.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 - typed as a tensor or a module
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_method":
                    plain = node.target.removesuffix("_")  # x.mul_(y) -> x.mul(y)
                    node.target = plain if callable(getattr(Tensor, plain, None)) else node.target
                elif node.op == "call_function":
                    node.target = _out_of_place_function(node.target)
                    _unset_inplace(node)
            module.recompile()


def _out_of_place_function(function: Callable[..., Any]) -> Callable[..., Any]:
    plain = getattr(function, "__name__", "").removesuffix("_")
    for home in (torch, F):
        if function is getattr(home, f"{plain}_", None):  # torch.relu_(x) -> torch.relu(x)
            return getattr(home, plain)
    return _IN_PLACE_OPERATORS.get(function, function)


def _unset_inplace(node: fx.Node) -> None:
    assert callable(node.target)
    try:
        call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a builtin without a signature has no `inplace` either
        return
    if call.arguments.get("inplace") is True:
        call.arguments["inplace"] = False  # F.relu(x, True) -> F.relu(x, False)
        node.args, node.kwargs = call.args, call.kwargs


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Return the parameters, then the buffers, of a module."""
    yield from module.parameters()
    yield from module.buffers()
