"""The reconstructor ψ: features → image, the byproduct attacker's network (paper, sections 3.2 and 4)."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.errors import ConfigError

PAPER_RECONSTRUCTORS = ("px2s2", "px4s2", "rx2s2", "rx4s2", "rx4s4", "rx2s2-c")
_NAME = re.compile(r"(?P<kind>[pr])x(?P<blocks>[1-9]\d?)s(?P<scale>[1-9]\d?)(?P<clamp>-c)?", re.ASCII)
_MAX_BLOCKS, _MAX_SCALE = 16, 16
_WIDEST, _NARROWEST = 256, 32


class InverseBottleneck(nn.Module):
    """1×1, BN, 3×3 of 2C channels, BN, 1×1, ReLU: ResNet's bottleneck reversed. (N, C, H, W) → the same.

    Where it is residual the input is added before the ReLU.
    """

    def __init__(self, width: int, residual: bool) -> None:
        super().__init__()
        inner = 2 * width
        self.residual = residual
        self.layers = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Returns (N, C, H, W), not negative."""
        update = self.layers(features)
        return F.relu(features + update if self.residual else update)


class Reconstructor(nn.Module):
    """ψ: features (N, C, h, w) → images (N, 3, H, W) in [0, 1].

    A stack is BLOCKS inverse bottleneck blocks, then a transposed convolution whose kernel and stride are the upscaling
    factor: a learned upsampling, equal to a 1×1 convolution with a pixel shuffle. (After a fixed interpolation the 1×1
    convolutions that follow could not draw finer detail.) Every stack upscales by SCALE but the last, which takes the
    factor that remains (also 1). Then 1×1, BN, ReLU, 1×1. Images that are no multiple of the features are interpolated
    bilinearly at the end.

    The first stack's width is the features' C, at most 256; each further stack has half, at least 32. Features of
    another width than the first stack's pass a 1×1 convolution first.

    The output is normalised per image to [0, 1] by its minimum and maximum over all channels and pixels; with `-c` it
    is clamped. The paper names neither widths, nor the upsampling operator, nor the axis of min-max.

    Args:
        name: such as `px2s2`, `rx4s4` or `rx2s2-c`: `p` (plain) or `r` (blocks add their input), `x` BLOCKS, `s` SCALE,
            and `-c` for clamp.
        feature_shape: (C, h, w) of φ1's output.
        image_size: (H, W) of the images.
        width: channels of the first stack; None for the default.

    Raises:
        ConfigError: the name does not follow the grammar, or a number is out of its bounds.
    """

    def __init__(
        self, name: str, feature_shape: tuple[int, int, int], image_size: tuple[int, int], width: int | None = None
    ) -> None:
        parts = _NAME.fullmatch(name)
        blocks, scale = (int(parts["blocks"]), int(parts["scale"])) if parts else (0, 0)
        if parts is None or blocks > _MAX_BLOCKS or not 2 <= scale <= _MAX_SCALE:
            raise ConfigError(
                "expected a reconstructor name pxBLOCKSsSCALE or rxBLOCKSsSCALE, perhaps with -c behind it, of 1 "
                f"to {_MAX_BLOCKS} blocks and a scale of 2 to {_MAX_SCALE}, found {name!r}. "
                f"The paper's are {', '.join(PAPER_RECONSTRUCTORS)}."
            )
        lengths = (*feature_shape, *image_size, 1 if width is None else width)
        if len(feature_shape) != 3 or len(image_size) != 2 or min(lengths) < 1:
            raise ConfigError(
                "a reconstructor needs a feature shape (C, h, w), an image size (H, W) and a width, all "
                f"positive, found {feature_shape}, {image_size}, {width}. Hook the network at a feature map."
            )
        super().__init__()
        channels, height, width_in = feature_shape
        self.clamp, self.image_size = parts["clamp"] is not None, image_size
        factors = _factors(max(image_size[0] / height, image_size[1] / width_in), scale)
        current = width or min(channels, _WIDEST)
        self.entry = nn.Conv2d(channels, current, 1) if current != channels else nn.Identity()
        self.stacks = nn.ModuleList()
        for factor in factors:
            # A given width below the floor stays as it is.
            following = max(current // 2, min(_NARROWEST, current))
            stack = [InverseBottleneck(current, residual=parts["kind"] == "r") for _ in range(blocks)]
            self.stacks.append(nn.Sequential(*stack, nn.ConvTranspose2d(current, following, factor, factor)))
            current = following
        last = nn.Conv2d(current, 3, 1)
        self.head = nn.Sequential(nn.Conv2d(current, current, 1, bias=False), nn.BatchNorm2d(current), nn.ReLU(), last)
        if self.clamp and last.bias is not None:
            # Around 0 half of the pixels would start where the clamp has no gradient.
            nn.init.constant_(last.bias, 0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Returns images (N, 3, H, W), float32, in [0, 1]."""
        hidden = self.entry(features)
        for stack in self.stacks:
            hidden = stack(hidden)  # (N, K, h, w) -> (N, K/2, h·factor, w·factor)
        images = self.head(hidden)  # -> (N, 3, H, W), or larger
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if images.shape[-2:] != self.image_size:
                images = F.interpolate(images, self.image_size, mode="bilinear", align_corners=False)
            return images.clamp(0, 1) if self.clamp else _min_max(images)


def _factors(ratio: float, scale: int) -> list[int]:
    """Returns the upscaling factor of each stack: `scale`, and in the last what remains of the ratio."""
    factors = []
    while ratio > scale:  # not by logarithms: log(125, 5) comes out above 3
        factors.append(scale)
        ratio /= scale
    return [*factors, max(1, math.ceil(ratio))]


def _min_max(images: Tensor) -> Tensor:
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp_min(1e-6)
