"""How alike two images are, and how good a prediction is: a number an image, so that means have intervals.

Images are floats in [0, 1], (N, 3, H, W); all that compare two batches raise `ValueError` where the shapes differ.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K1 L)² and (K2 L)² for a data range L of 1


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Returns the structural similarity of each pair of images, (N,), at most 1; differentiable.

    As in Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004): an 11×11
    Gaussian window of σ 1.5, K1 0.01, K2 0.03, here with a data range of 1. The mean is over channels and over the
    places where the whole window lies inside the image. Equal to scikit-image's `structural_similarity` with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`; torchmetrics pads by reflection, and
    differs on small images.

    Args:
        a: images (N, C, H, W), H and W at least 11.
        b: images of the same shape.

    Raises:
        ValueError: the shapes differ, or an image is smaller than the window.
    """
    _require_same_images(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels, found {tuple(a.shape)}")
    # Variances are differences of nearly equal numbers: no half precision here, whatever the training uses.
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        # (N, 4C, H, W) -> (N, 4C, H - 10, W - 10)
        local = _gaussian_mean(torch.cat([a, b, a * a + b * b, a * b], dim=1))
        mean_a, mean_b, squares, product = local.chunk(4, dim=1)
        means, mean_squares = mean_a * mean_b, mean_a * mean_a + mean_b * mean_b
        covariance, variances = product - means, squares - mean_squares
        luminance = (2 * means + _C1) / (mean_squares + _C1)
        structure = (2 * covariance + _C2) / (variances + _C2)
        return (luminance * structure).flatten(1).mean(dim=1)


def _gaussian_mean(images: Tensor) -> Tensor:
    """Returns (N, C, H - 10, W - 10): Gaussian means where the window fits.

    The separable filter is two products with banded matrices: on a CPU up to twice as fast as depthwise convolutions.
    """
    height, width = images.shape[-2:]
    return _band(height, images) @ (images @ _band(width, images).T)


def _band(length: int, like: Tensor) -> Tensor:
    """Returns (length - 10, length): the window's weights, one row a place."""
    places = torch.arange(WINDOW, device=like.device, dtype=like.dtype) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * _SIGMA**2))
    band = like.new_zeros(length - WINDOW + 1, length)
    rows = torch.arange(len(band), device=like.device)[:, None]
    band[rows, rows + torch.arange(WINDOW, device=like.device)] = weights / weights.sum()
    return band


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Returns the mean absolute difference of each pair of images, (N,), 0 to 1; the paper's L1 distance."""
    _require_same_images(a, b)
    return (a - b).abs().flatten(1).mean(dim=1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each pair of images, (N,), in dB for a peak of 1; infinite if equal."""
    _require_same_images(a, b)
    return -10 * torch.log10((a - b).square().flatten(1).mean(dim=1))


def _require_same_images(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"expected two batches (N, C, H, W) of one shape, found {tuple(a.shape)} and {tuple(b.shape)}")


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Returns whether each row's label is among its k highest logits (N, classes), (N,) bool; its mean is the accuracy.

    Where there are no more classes than k, every row is correct.
    """
    highest = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (N, k)
    return (highest == labels[:, None]).any(dim=1)


def mean_absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the absolute error of each row and target, (N, K), in the targets' unit; its mean is the MAE."""
    if outputs.shape != targets.shape:  # which broadcasting would hide
        shapes = f"{tuple(outputs.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"expected outputs and targets of one shape, found {shapes}")
    return (outputs - targets).abs()


def bootstrap_interval(values: ArrayLike, seed: int = 0, level: float = 0.95, draws: int = 2000) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean of (N,) values, one an image, in their unit.

    Of so many draws with replacement, a share of `level` have means that lie inside.

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"expected finite values, at least one, found {numbers.size} values")
    rng = np.random.default_rng(seed)
    chunk = max(1, 2**21 // numbers.size)  # draws at a time: 16 MB of indices
    shapes = [(min(chunk, draws - start), numbers.size) for start in range(0, draws, chunk)]
    means = np.concatenate([numbers[rng.integers(numbers.size, size=shape)].mean(axis=1) for shape in shapes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
