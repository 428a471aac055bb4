"""Networks by name: torchvision's classification networks, and CIFAR-sized ResNets."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpf_release.core.own_code import imported
from dpf_release.errors import ConfigError

MAX_OUTPUTS = 1_000_000
MAX_WIDTH = 1024

_CIFAR_BLOCKS = {"resnet20_cifar": 3, "resnet56_cifar": 9}
# Auxiliary classifiers feed a training loss only; torchvision warns where `init_weights` is unsaid.
_WITHOUT_AUXILIARY = dict.fromkeys(("googlenet", "inception_v3"), {"aux_logits": False, "init_weights": True})


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2016, option A).

    Where the resolution halves, the shortcut takes every second pixel and pads the new channels with zeros.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = channels_out - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features, (N, channels_out, H / stride, W / stride)."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]  # (N, C, H, W) -> (N, C, H/2, W/2)
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))  # (N, 2C, H/2, W/2)
        return self.relu(residual + x)


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers for images of about 32 x 32 pixels (He et al. 2016, section 4.2).

    A stage has n residual blocks: 3 make ResNet-20, 9 make ResNet-56. The stages have width, 2 width and 4 width
    channels at full, half and quarter resolution.
    """

    def __init__(self, blocks: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, outputs)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, outputs)."""
        x = self.relu(self.bn1(self.conv1(x)))  # (N, width, H, W)
        x = self.layer1(x)
        x = self.layer2(x)  # (N, 2 width, H/2, W/2)
        x = self.layer3(x)  # (N, 4 width, H/4, W/4)
        x = torch.flatten(self.avgpool(x), 1)  # (N, 4 width)
        return self.fc(x)


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = CifarBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(CifarBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def public_architectures() -> list[str]:
    """Return the names that anyone can build without running somebody's own code, sorted."""
    return sorted([*_CIFAR_BLOCKS, *torchvision.models.list_models(module=torchvision.models)])


def is_public_architecture(arch: str) -> bool:
    """Tell whether `arch` is on the allow list, so that a release may name it."""
    return arch in public_architectures()


def build_network(
    arch: str,
    outputs: int,
    arguments: Mapping[str, int] | None = None,
    *,
    allow_import: bool = False,
    builder: Callable[..., nn.Module] | None = None,
) -> nn.Module:
    """Build Φ, images (N, 3, H, W) to (N, outputs), with random weights, in train mode; nothing is ever downloaded.

    Args:
        arch: `resnet20_cifar`, `resnet56_cifar`, a torchvision classification network, or, with `allow_import`, the
            owner's `package.module:function`, called as `function(outputs)`.
        outputs: classes, or regression targets; 1 to 1,000,000.
        arguments: `width` (1 to 1024, default 16) for the CIFAR ResNets; nothing for the others.
        allow_import: the caller is the owner, whose own code may be imported and run.
        builder: called as `builder(outputs)` in place of looking `arch` up.

    Raises:
        ConfigError: the name, an argument or the number of outputs is not one of these, or the owner's code cannot be
            imported or does not return a module.
    """
    if isinstance(outputs, bool) or not isinstance(outputs, int) or not 1 <= outputs <= MAX_OUTPUTS:
        raise ConfigError(f"a network needs 1 to {MAX_OUTPUTS} outputs, found {outputs!r}: give the number of classes")
    arguments = arguments or {}
    _refuse_arguments(arch, arguments, {"width"} if builder is None and arch in _CIFAR_BLOCKS else set())
    if builder is not None:
        return _called(builder, outputs, "the given builder")
    if arch in _CIFAR_BLOCKS:
        return CifarResNet(_CIFAR_BLOCKS[arch], outputs, **arguments)
    if is_public_architecture(arch):
        extra = _WITHOUT_AUXILIARY.get(arch, {})
        return torchvision.models.get_model(arch, weights=None, num_classes=outputs, **extra)
    if ":" in arch:
        return _called(_imported(arch, allow_import), outputs, f"arch {arch!r}")
    close = difflib.get_close_matches(arch, public_architectures(), n=4)
    raise ConfigError(
        f"arch {arch!r} is not known: expected {', '.join(_CIFAR_BLOCKS)}, a torchvision classification "
        "network (such as resnet18 or vgg16_bn), or package.module:function"
        + (f"; did you mean {' or '.join(close)}?" if close else "; see torchvision.models.list_models()")
    )


class _OnPaper(TorchFunctionMode):
    """Where modules make room for weights, there is none: shapes without memory (torch's meta device).

    `torch.device("meta")` does so for all tensors, and torchvision's RegNets compute their widths with some.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func in {torch.empty, torch.zeros, torch.ones}
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if made else {})})


def network_on_paper(arch: str, outputs: int, arguments: Mapping[str, int]) -> nn.Module:
    """As `build_network`, of the allow list, without room for the weights, which are on torch's meta device."""
    with _OnPaper(), torch.random.fork_rng(devices=[]):
        return build_network(arch, outputs, arguments).to("meta")


def _refuse_arguments(arch: str, arguments: Mapping[str, int], accepted: set[str]) -> None:
    expected = f"width, 1 to {MAX_WIDTH}" if accepted else "no arguments"
    problems = []
    for name, value in arguments.items():
        if name not in accepted:
            problems.append(f"unknown argument {name!r}: remove it")
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_WIDTH:
            problems.append(f"{name} = {value!r}: give a whole number from 1 to {MAX_WIDTH}")
    if problems:
        raise ConfigError(f"arch {arch!r} takes {expected}; found {'; '.join(problems)}")


def _imported(arch: str, allow_import: bool) -> Callable[..., nn.Module]:
    if not allow_import:
        raise ConfigError(
            f"arch {arch!r} names somebody's own code, which is run for its owner only: "
            "expected an allow-listed name; hand in the function that builds the network instead, or say --trust-code"
        )
    try:
        function = imported(arch)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"arch {arch!r} cannot be imported as package.module:function ({error}): install it or put its folder on "
            "PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"arch {arch!r}: expected a function, found {type(function).__name__}")
    return function


def _called(function: Callable[..., nn.Module], outputs: int, what: str) -> nn.Module:
    network = function(outputs)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{what} must return a torch.nn.Module, found {type(network).__name__}: return the network")
    return network
