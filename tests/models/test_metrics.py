"""The metrics equal scikit-image's and torchmetrics', image by image."""

import numpy as np
import pytest
import torch
from skimage.data import astronaut, camera, coffee
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from dpf_release.models import metrics


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Three crops of photographs, (3, 3, 72, 96), in [0, 1]."""
    grey = np.repeat(camera()[..., None], 3, axis=2)
    crops = [image[100:172, 120:216] for image in (astronaut(), coffee(), grey)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def noisy(photographs: Tensor) -> Tensor:
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.02, 0.1, 0.3]).view(3, 1, 1, 1)
    return (photographs + strength * noise).clamp(0, 1)


def _skimage_ssim(a: Tensor, b: Tensor) -> np.ndarray:
    settings = {
        "channel_axis": 0,
        "data_range": 1,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }
    return np.array([structural_similarity(x.numpy(), y.numpy(), **settings) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("size", [(72, 96), (32, 32), (11, 11), (11, 40)])
def test_ssim_equals_scikit_image(photographs: Tensor, noisy: Tensor, size: tuple[int, int]) -> None:
    a, b = photographs[..., : size[0], : size[1]], noisy[..., : size[0], : size[1]]
    ours = metrics.ssim(a, b).numpy()
    assert ours == pytest.approx(_skimage_ssim(a, b), abs=1e-4)
    assert (metrics.ssim(a, (a + b) / 2).numpy() > ours).all()  # half the noise is more alike


def test_ssim_of_equal_images_is_one_and_of_negatives_is_not(photographs: Tensor) -> None:
    assert metrics.ssim(photographs, photographs).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert metrics.ssim(photographs, 1 - photographs).max() < 0.5


def test_ssim_of_flat_images_is_finite_with_finite_gradients() -> None:
    flat = torch.zeros(2, 3, 16, 16, requires_grad=True)
    value = metrics.ssim(flat, torch.ones(2, 3, 16, 16))
    (gradient,) = torch.autograd.grad(value.sum(), flat)
    assert value.tolist() == pytest.approx([1e-4, 1e-4], rel=1e-2)
    assert torch.isfinite(gradient).all()


def test_ssim_gradient_is_that_of_the_value(photographs: Tensor, noisy: Tensor) -> None:
    a = photographs[:1, :, :12, :13].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: metrics.ssim(x, noisy[:1, :, :12, :13].double()), a)


def test_ssim_stays_float32_under_autocast(photographs: Tensor, noisy: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = metrics.ssim(photographs, noisy)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, metrics.ssim(photographs, noisy))


@pytest.mark.parametrize("shapes", [((1, 3, 10, 32), (1, 3, 10, 32)), ((1, 3, 32, 32), (2, 3, 32, 32))])
def test_ssim_refuses_images_it_is_not_defined_on(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="at least 11|of one shape"):
        metrics.ssim(torch.rand(shapes[0]), torch.rand(shapes[1]))


def test_psnr_equals_scikit_image_and_torchmetrics(photographs: Tensor, noisy: Tensor) -> None:
    ours = metrics.psnr(photographs, noisy).numpy()
    theirs = [
        peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1) for a, b in zip(photographs, noisy, strict=True)
    ]
    assert ours == pytest.approx(theirs, abs=1e-4)
    whole = torchmetrics_psnr(noisy, photographs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert ours == pytest.approx(whole.numpy(), abs=1e-4)
    assert ours[0] > ours[2] + 10
    assert torch.isinf(metrics.psnr(photographs, photographs)).all()


def test_l1_is_the_mean_difference_of_each_image(photographs: Tensor, noisy: Tensor) -> None:
    theirs = np.abs(photographs.numpy() - noisy.numpy()).mean(axis=(1, 2, 3))
    assert metrics.l1(photographs, noisy).numpy() == pytest.approx(theirs, abs=1e-6)
    assert not metrics.l1(photographs, photographs).any()


@pytest.mark.parametrize("k", [1, 5])
def test_topk_equals_torchmetrics(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 20, generator=generator), torch.randint(20, (200,), generator=generator)
    theirs = multiclass_accuracy(logits, labels, num_classes=20, top_k=k, average="micro")
    assert metrics.topk_correct(logits, labels, k).float().mean() == pytest.approx(float(theirs))
    labels = logits.argmin(dim=1)
    assert not metrics.topk_correct(logits, labels, k).any()


def test_topk_of_fewer_classes_than_k_is_always_correct() -> None:
    assert metrics.topk_correct(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), 5).all()


def test_mean_absolute_error_is_per_target_and_refuses_broadcasting() -> None:
    error = metrics.mean_absolute_error(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.zeros(2, 2))
    assert error.mean(dim=0).tolist() == [2, 1]
    with pytest.raises(ValueError, match="of one shape"):
        metrics.mean_absolute_error(torch.zeros(2, 1), torch.zeros(2))


def test_bootstrap_interval_holds_the_mean_at_its_level() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(5, 2, size=(200, 60))
    intervals = [metrics.bootstrap_interval(sample, draws=400) for sample in samples]
    assert 0.88 < np.mean([low <= 5 <= high for low, high in intervals]) < 0.99
    narrow = [metrics.bootstrap_interval(sample, level=0.5, draws=400) for sample in samples]
    assert 0.38 < np.mean([low <= 5 <= high for low, high in narrow]) < 0.62


def test_bootstrap_interval_repeats_by_seed_and_does_not_depend_on_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).random(3000)
    first = metrics.bootstrap_interval(values, seed=3)
    assert first == metrics.bootstrap_interval(values, seed=3)
    assert first != metrics.bootstrap_interval(values, seed=4)
    low, high = metrics.bootstrap_interval(values > 0.5)
    assert high - low == pytest.approx(4 * 0.5 / 3000**0.5, rel=0.1)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bootstrap_interval_refuses_values_without_a_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        metrics.bootstrap_interval(values)
