"""Reconstructors ψ fit any features and images, and can learn; so can the attribute classifier."""

import pytest
import torch
from torch import nn

from dpf_release.errors import ConfigError
from dpf_release.models.metrics import l1
from dpf_release.models.probes import AttributeClassifier
from dpf_release.models.reconstructors import (
    PAPER_RECONSTRUCTORS,
    InverseBottleneck,
    Reconstructor,
)


@pytest.mark.parametrize("name", PAPER_RECONSTRUCTORS)
@pytest.mark.parametrize(
    ("feature_shape", "image_size"),
    [
        ((64, 8, 8), (32, 32)),
        ((16, 32, 32), (32, 32)),
        ((24, 7, 7), (96, 96)),
        ((300, 4, 4), (64, 64)),
        ((8, 6, 4), (48, 64)),
        ((5, 40, 40), (32, 32)),
    ],
)
def test_every_reconstructor_makes_images_of_any_size(
    name: str, feature_shape: tuple[int, int, int], image_size: tuple[int, int]
) -> None:
    images = Reconstructor(name, feature_shape, image_size, width=8)(torch.randn(2, *feature_shape))
    assert images.shape == (2, 3, *image_size)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(
    ("scale", "small", "large", "factors"),
    [
        (2, 14, 224, [2, 2, 2, 2]),
        (4, 14, 224, [4, 4]),
        (2, 8, 32, [2, 2]),
        (4, 8, 32, [4]),
        (2, 32, 32, [1]),
        (2, 7, 96, [2, 2, 2, 2]),
        (4, 4, 32, [4, 2]),
        (2, 4, 32, [2, 2, 2]),
        (3, 1, 243, [3, 3, 3, 3, 3]),
        (2, 56, 32, [1]),
    ],
)
def test_there_is_a_stack_a_factor_and_the_last_takes_what_remains(
    scale: int, small: int, large: int, factors: list[int]
) -> None:
    reconstructor = Reconstructor(f"px1s{scale}", (4, small, small), (large, large))
    upscalings = [module for module in reconstructor.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert [module.stride[0] for module in upscalings] == factors
    assert len(reconstructor.stacks) == len(factors)


def test_the_paper_s_size_works() -> None:
    reconstructor = Reconstructor("rx4s4", (1024, 14, 14), (224, 224), width=16).eval()
    with torch.no_grad():
        assert reconstructor(torch.randn(1, 1024, 14, 14)).shape == (1, 3, 224, 224)


def test_blocks_stand_in_every_stack_and_widths_halve_to_the_floor() -> None:
    reconstructor = Reconstructor("rx4s2", (512, 4, 4), (64, 64))
    for stack in reconstructor.stacks:
        assert sum(isinstance(module, InverseBottleneck) for module in stack.modules()) == 4
    widths = [m.in_channels for m in reconstructor.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [256, 128, 64, 32]
    assert isinstance(Reconstructor("px2s2", (64, 8, 8), (32, 32)).entry, nn.Identity)


def test_a_block_is_an_inverse_bottleneck_and_residual_ones_add_their_input() -> None:
    kinds = [type(layer) for layer in InverseBottleneck(8, residual=False).layers]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    features = torch.rand(2, 8, 5, 5)
    for residual in (True, False):
        block = InverseBottleneck(8, residual)
        for parameter in block.layers[-1].parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(block(features), features if residual else torch.zeros_like(features))


@pytest.mark.parametrize(("letter", "residual"), [("p", False), ("r", True)])
def test_the_letter_of_the_name_chooses_the_block(letter: str, residual: bool) -> None:
    reconstructor = Reconstructor(f"{letter}x2s2", (8, 8, 8), (16, 16))
    blocks = [module for module in reconstructor.modules() if isinstance(module, InverseBottleneck)]
    assert len(blocks) == 2
    assert all(block.residual is residual for block in blocks)


def test_min_max_spans_each_image_and_clamp_does_not() -> None:
    features = torch.randn(3, 8, 8, 8)
    spanned = Reconstructor("px2s2", (8, 8, 8), (32, 32))(features).detach().flatten(1)
    assert spanned.amin(dim=1).tolist() == [0, 0, 0]
    assert spanned.amax(dim=1).tolist() == pytest.approx([1, 1, 1])
    clamped = Reconstructor("px2s2-c", (8, 8, 8), (32, 32))
    with torch.no_grad():
        list(clamped.head.parameters())[-2].mul_(0.01)  # the last layer's weight; its bias stays
        images = clamped(features)
    assert images.mean() == pytest.approx(0.5, abs=0.1)
    assert images.max() < 1


def test_a_flat_image_is_finite() -> None:
    reconstructor = Reconstructor("px1s2", (4, 4, 4), (8, 8)).eval()
    for parameter in list(reconstructor.head.parameters())[-2:]:
        nn.init.zeros_(parameter)
    assert torch.isfinite(reconstructor(torch.zeros(1, 4, 4, 4))).all()


def test_the_output_is_float32_under_autocast() -> None:
    reconstructor = Reconstructor("px1s2", (4, 4, 4), (8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = reconstructor(torch.randn(2, 4, 4, 4))
    assert images.dtype == torch.float32
    assert images.max() <= 1


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x2s2",
        "px2",
        "px0s2",
        "px17s2",
        "px2s1",
        "px2s17",
        "px02s2",
        "PX2S2",
        "px2s2-d",
        "px2s2-c\n",
        "p2s2",
    ],
)
def test_other_names_are_refused_with_the_grammar_and_the_paper_s_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"pxBLOCKSsSCALE.*rx2s2-c"):
        Reconstructor(name, (8, 8, 8), (32, 32))


@pytest.mark.parametrize("shape", [(8, 0, 8), (8,)])
def test_features_without_places_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="feature shape"):
        Reconstructor("px2s2", shape, (32, 32))


def _overfit(reconstructor: Reconstructor, features: torch.Tensor, images: torch.Tensor) -> tuple[float, float]:
    optimiser = torch.optim.Adam(reconstructor.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = l1(reconstructor(features), images).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


@pytest.mark.parametrize("name", ["px2s2", "rx2s2", "rx2s2-c"])
def test_a_reconstructor_learns_images_from_their_features_but_not_from_none(name: str) -> None:
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.rand(4, 3, 4, 4), (16, 16), mode="bilinear")
    images -= images.amin(dim=(1, 2, 3), keepdim=True)
    images /= images.amax(dim=(1, 2, 3), keepdim=True)  # what min-max can reach
    features = nn.functional.pixel_unshuffle(images, 4)  # (4, 48, 4, 4): all that is in the images
    first, last = _overfit(Reconstructor(name, (48, 4, 4), (16, 16)), features, images)
    _, blind = _overfit(Reconstructor(name, (48, 4, 4), (16, 16)), torch.zeros_like(features), images)
    assert last < 0.6 * first
    assert last < 0.6 * blind


@pytest.mark.parametrize("shape", [(6, 32, 32), (6, 8, 8), (6, 1, 1), (6, 16, 5)])
def test_the_attribute_classifier_takes_any_features(shape: tuple[int, int, int]) -> None:
    assert AttributeClassifier(shape, 7)(torch.randn(3, *shape)).shape == (3, 7)


def test_the_attribute_classifier_learns_what_is_there() -> None:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(16)
    features = torch.randn(48, 6, 8, 8)
    features[torch.arange(48), labels] += 1  # a channel an attribute
    classifier = AttributeClassifier((6, 8, 8), 3)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(15):
        optimiser.zero_grad()
        nn.functional.cross_entropy(classifier(features[:36]), labels[:36]).backward()
        optimiser.step()
    classifier.eval()
    held_out = classifier(features[36:]).argmax(dim=1)
    assert (held_out == labels[36:]).float().mean() > 0.8
    assert (classifier(torch.randn(12, 6, 8, 8)).argmax(dim=1) == labels[36:]).float().mean() < 0.8
