import copy
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpf_release.errors import HookError
from dpf_release.models.hooks import HookPoint, hook_points, hook_table, resolve, split
from dpf_release.models.weights import freeze
from dpf_release.models.zoo import CifarResNet, build_network, network_on_paper
from network_digests import state_bytes

# Shapes for 64 px. Most cuts are at the end of a stage; the others say what they are.
CUTS = [
    ("resnet18", "conv4_1", (256, 4, 4)),
    ("resnet50", "conv3_1", (512, 8, 8)),
    ("resnet101", "layer2.0", (512, 8, 8)),
    ("mobilenet_v2", "features.14", (160, 2, 2)),
    ("mobilenet_v2", "features.1.conv.1", (16, 32, 32)),  # a projection, whose BatchNorm has no ReLU after it
    ("densenet121", "features.transition1", (128, 8, 8)),
    ("densenet121", "features.norm0", (64, 32, 32)),
    ("efficientnet_b0", "features.3", (40, 8, 8)),
    ("regnet_y_400mf", "trunk_output.block2", (104, 8, 8)),
    ("convnext_tiny", "features.3", (192, 8, 8)),
    ("shufflenet_v2_x0_5", "stage2", (48, 8, 8)),
    ("resnet20_cifar", "conv4_1", (64, 16, 16)),
    ("vgg16_bn", "features.41", (512, 4, 4)),  # a BatchNorm, whose ReLU is in place
    ("vgg16_bn", "features.23", (256, 8, 8)),
]


@lru_cache(maxsize=1)
def built(arch: str) -> nn.Module:
    if not arch.startswith("vgg"):
        return build_network(arch, 7)
    with torch.device("meta"):
        network = build_network(arch, 7)
        network.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 32), nn.ReLU(inplace=True), nn.Linear(32, 7))
    network.to_empty(device="cpu")  # of its 134 million weights, those of the layers that no cut is in take seconds
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
    return network


def images(size: int = 64, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Small batches gain nothing from threads, and test processes side by side lose much by them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(blocks=2, outputs=5, width=4)


@pytest.mark.parametrize(("arch", "hook", "shape"), CUTS)
@torch.no_grad()
def test_the_halves_are_the_network_bit_for_bit(arch: str, hook: str, shape: tuple[int, int, int]) -> None:
    network = built(arch)
    cut = split(network, hook, (64, 64))
    network.eval()
    freeze(cut.featurizer)
    freeze(cut.classifier)
    assert cut.hook.shape == shape

    features = cut.featurizer(images())
    assert features.shape == (3, *shape)
    kept = features.clone()
    logits = cut.classifier(features)
    assert torch.equal(logits, network(images()))
    assert torch.equal(features, kept)
    assert not torch.equal(cut.classifier(features.roll(1, dims=0)), logits)

    state, first, second = network.state_dict(), cut.featurizer.state_dict(), cut.classifier.state_dict()
    assert first
    assert second
    assert not first.keys() & second.keys()
    assert (first | second).keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in (first | second).items())


@pytest.mark.parametrize(
    ("arch", "hook", "ends_in_relu"),
    [
        ("vgg16_bn", "features.42", True),
        ("vgg16_bn", "features.41", False),  # its BatchNorm
        ("resnet20_cifar", "conv4_1", True),
        ("resnet18", "conv4_1", True),
        ("mobilenet_v2", "features.13", False),  # a linear bottleneck
        ("convnext_tiny", "features.3", False),
    ],
)
@torch.no_grad()
def test_a_featurizer_that_ends_in_a_relu_can_be_had_without_it(arch: str, hook: str, ends_in_relu: bool) -> None:
    cut = split(built(arch), hook, (64, 64))
    freeze(cut.featurizer)
    assert (cut.before_relu is not None) == ends_in_relu
    if cut.before_relu is not None:
        before, features = cut.before_relu.eval()(images()), cut.featurizer(images())
        assert (before < 0).any()
        assert torch.equal(before.relu(), features)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet101"])
def test_the_papers_hook_names_have_the_papers_shapes_at_224_px(arch: str) -> None:
    points = {point.name: point for point in hook_points(network_on_paper(arch, 2, {}), (224, 224))}
    sides = {name: points[name].shape[1:] for name in ("conv2_1", "conv2_2", "conv3_1", "conv4_1")}
    assert sides == {"conv2_1": (56, 56), "conv2_2": (56, 56), "conv3_1": (28, 28), "conv4_1": (14, 14)}
    assert points["conv4_1"].path == "layer3.0"
    assert ("conv2_3" in points) == (arch != "resnet18")
    if "conv2_3" in points:
        assert points["conv2_3"].shape[1:] == (56, 56)


def test_hook_names_on_cifar_resnets_run_from_conv2_1_to_conv4_n() -> None:
    points = hook_points(CifarResNet(blocks=3, outputs=10), (32, 32))
    names = [point.name for point in points if point.name.startswith("conv") and "_" in point.name]
    assert names == [f"conv{k}_{i}" for k in (2, 3, 4) for i in (1, 2, 3)]
    assert {p.name: p.shape for p in points}["conv4_1"] == (64, 8, 8)


def test_the_papers_name_is_a_path_of_its_own_off_resnets(small: CifarResNet) -> None:
    assert resolve(small, "conv4_1") == "layer3.0"
    assert resolve(small, "layer3.0") == "layer3.0"
    assert resolve(nn.Sequential(nn.Conv2d(3, 4, 1)), "conv4_1") == "conv4_1"


@pytest.mark.parametrize("arch", ["resnet20_cifar", "squeezenet1_1"])
def test_every_listed_hook_point_can_be_cut(arch: str) -> None:
    network = build_network(arch, 3)
    points = hook_points(network, (32, 32))
    assert len(points) > 10
    for point in points:
        assert split(network, point.path, (32, 32)).hook == point


def test_bytes_a_row_are_those_of_float16() -> None:
    assert HookPoint("layer3.0", "conv4_1", (256, 14, 14)).bytes_per_row == 2 * 256 * 14 * 14


def test_a_relu_in_place_after_the_cut_does_not_overwrite_the_features() -> None:
    network = built("vgg11_bn").eval()
    cut = split(network, "features.12", (64, 64))
    assert not cut.non_negative
    with torch.no_grad():
        features = cut.featurizer(images())
        cut.classifier(features)
        assert features.min() < 0
        network.features[13](features)  # the same modules without the rewrite
        assert features.min() == 0


class InPlace(nn.Module):
    """Overwrites its input; every way to say so comes first in turn."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "method":
            return self.bn(x.add_(1).relu_())
        if self.way == "keyword":
            return self.bn(F.relu(x, inplace=True))
        if self.way == "positional":
            return self.bn(F.hardtanh(x, -1.0, 1.0, True))
        if self.way == "function":
            return self.bn(F.leaky_relu_(torch.sigmoid_(x)))
        x += 1
        return self.bn(x)


@pytest.mark.parametrize("way", ["method", "keyword", "positional", "function", "operator"])
def test_operations_in_place_in_code_are_made_out_of_place(way: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), InPlace(way), nn.Flatten(), nn.LazyLinear(2)).eval()
    network(images(8))
    cut = split(network, "0", (8, 8))
    with torch.no_grad():
        features = cut.featurizer(images(8))
        kept = features.clone()
        assert torch.equal(cut.classifier(features), network(images(8)))
        assert torch.equal(features, kept)
        network[1](features)
        assert not torch.equal(features, kept)


class Undecided(nn.Module):
    """Decides on a tensor's value, which no trace can follow."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.child = nn.Identity()  # a module without children is not traced into
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return -x
        return x.mul_(2) if self.in_place else x * 2


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def untraceable(in_place: bool = False) -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), Undecided())
    return nn.Sequential(stem, Undecided(in_place), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("hook", ["0", "0.0", "0.1", "0.2", "1"])
def test_a_sequence_is_cut_by_order_even_where_it_cannot_be_traced(hook: str) -> None:
    network = untraceable().eval()
    cut = split(network, hook, (8, 8))
    with torch.no_grad():
        assert torch.equal(cut.classifier(cut.featurizer(images(8))), network(images(8)))
    states = [cut.featurizer.state_dict(), cut.classifier.state_dict()]
    assert (states[0] | states[1]).keys() == network.state_dict().keys()
    assert hook in [point.path for point in hook_points(network, (8, 8))]


def test_a_network_that_can_be_neither_ordered_nor_traced_is_refused() -> None:
    with pytest.raises(HookError, match="cannot trace"):
        split(Wrapped(untraceable()), "body.1", (8, 8))
    assert split(Wrapped(untraceable()).body, "1", (8, 8)).hook.path == "1"


def test_code_in_place_that_cannot_be_rewritten_is_refused() -> None:
    with pytest.raises(HookError, match="in place overwrites"):
        split(untraceable(in_place=True), "0", (8, 8))
    assert split(untraceable(in_place=True), "1", (8, 8)).hook.path == "1"


def test_a_cut_that_more_than_one_tensor_crosses_is_refused_with_the_valid_hook_points(
    small: CifarResNet,
) -> None:
    with pytest.raises(HookError, match="one tensor must cross the cut, found 2") as refusal:
        split(small, "layer3.0.conv1", (32, 32))
    assert hook_table(hook_points(small, (32, 32))) in str(refusal.value)
    line = next(line for line in str(refusal.value).splitlines() if line.startswith("conv4_1 "))
    assert line.split() == ["conv4_1", "layer3.0", "16", "x", "8", "x", "8", f"{2 * 16 * 8 * 8:,}"]
    assert "layer3.0.conv1" not in [point.path for point in hook_points(small, (32, 32))]


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ("layer3.0.relu", "calls it 2 times"),
        ("layer9.0", "no module 'layer9.0'; did you mean"),
        ("conv4_7", "no module 'layer3.6'"),
        ("", "no module ''"),
        ("avgpool", r"after the last feature map.*found \(N, 16, 1, 1\)"),
        ("fc", "after the last feature map"),
    ],
)
def test_a_hook_that_is_no_single_feature_map_is_refused(small: CifarResNet, hook: str, reason: str) -> None:
    with pytest.raises(HookError, match=reason) as refusal:
        split(small, hook, (32, 32))
    assert "Valid hook points" in str(refusal.value)
    assert split(small, "conv4_2", (32, 32)).hook.path == "layer3.1"


def test_the_end_of_a_sequence_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    with pytest.raises(HookError, match="after the last feature map: nothing"):
        split(network, "1", (8, 8))
    assert split(network, "0", (8, 8)).hook.shape == (4, 6, 6)


def test_inside_a_dense_block_is_refused_and_at_its_end_is_not() -> None:
    network = network_on_paper("densenet121", 3, {})
    with pytest.raises(HookError, match="one tensor must cross"):
        split(network, "features.denseblock1.denselayer2", (32, 32))
    assert split(network, "features.denseblock1", (32, 32)).hook.shape == (256, 8, 8)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.step = nn.Conv2d(4, 4, 1)
        self.between = nn.ReLU()
        self.after = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.step(self.stem(x)))
        return self.after(self.step(x)).mean((2, 3))


def test_weights_used_on_both_sides_are_refused() -> None:
    with pytest.raises(HookError, match="both sides"):
        split(Repeated(), "between", (8, 8))
    assert [point.path for point in hook_points(Repeated(), (8, 8))] == ["stem", "after"]


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x).mean((2, 3)) * self.calls


def test_a_forward_pass_that_depends_on_more_than_its_input_is_refused() -> None:
    with pytest.raises(HookError, match="depends on more than x"):
        split(Forgetful(), "conv", (8, 8))


@pytest.mark.parametrize("arch", ["vit_b_32", "swin_t", "swin_v2_t", "maxvit_t"])
def test_a_vision_transformer_is_refused_because_its_features_are_tokens(arch: str) -> None:
    network = network_on_paper(arch, 2, {})
    for refused in (lambda: hook_points(network, (224, 224)), lambda: split(network, "features", (224, 224))):
        with pytest.raises(HookError, match=r"tokens.*\(N, C, H, W\)"):
            refused()


def test_images_that_the_network_does_not_take_are_refused() -> None:
    with pytest.raises(HookError, match="8 x 8 pixels"):
        hook_points(build_network("alexnet", 2), (8, 8))


def test_the_network_and_the_random_state_are_left_as_they_were(small: CifarResNet) -> None:
    network = nn.Sequential(small.conv1, nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten())
    network[1].eval()
    weights, random_state = state_bytes(network), torch.get_rng_state()
    cut = split(network, "1", (16, 16))
    hook_points(network, (16, 16))
    assert state_bytes(network) == weights
    assert torch.equal(torch.get_rng_state(), random_state)
    assert network[2].inplace
    assert [module.training for module in network] == [True, False, True, True, True]
    assert [module.training for module in cut.featurizer] == [True, False]
    assert all(module.training for module in cut.classifier)

    network.train()(images(16))
    assert state_bytes(network) != weights
    assert not torch.equal(torch.get_rng_state(), random_state)


def test_the_halves_own_their_weights(small: CifarResNet) -> None:
    before = state_bytes(small)
    cut = split(small, "conv3_1", (32, 32))
    with torch.no_grad():
        for parameter in [*cut.featurizer.parameters(), *cut.classifier.parameters()]:
            parameter.add_(1)
    assert state_bytes(small) == before
    assert cut.non_negative


def test_a_frozen_featurizer_stays_byte_equal_while_the_classifier_trains() -> None:
    network = build_network("efficientnet_b0", 2)
    cut = split(network, "features.3", (32, 32))
    featurizer, classifier = freeze(cut.featurizer), cut.classifier.train()
    before = state_bytes(featurizer), state_bytes(classifier)
    x = images(32, batch=4)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    classifier(featurizer(x)).square().sum().backward()
    optimizer.step()
    assert state_bytes(featurizer) == before[0]
    assert state_bytes(classifier) != before[1]

    # Dropout and StochasticDepth stay random in train mode, and only there.
    features = featurizer(x)
    with torch.no_grad():
        assert not torch.equal(classifier(features), classifier(features))
        classifier.eval()
        assert torch.equal(classifier(features), classifier(features))


def test_one_dropout_called_twice_is_one_in_each_half() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.drop = nn.Dropout()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.relu(self.drop(self.conv(x))).mean((2, 3)))

    cut = split(Twice(), "relu", (8, 8))
    freeze(cut.featurizer)
    cut.classifier.train()
    assert torch.equal(cut.featurizer(images(8)), cut.featurizer(images(8)))


def test_the_halves_are_ordinary_modules(small: CifarResNet) -> None:
    cut = split(small.eval(), "conv3_1", (32, 32))
    x = images(32, batch=5)
    with torch.no_grad():
        features = cut.featurizer(x)
        copied = copy.deepcopy(cut)
        assert torch.equal(copied.classifier(copied.featurizer(x)), small(x))
        assert cut.classifier(cut.featurizer(x[:1])).shape == (1, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert cut.featurizer(x).dtype == torch.bfloat16
        last = copy.deepcopy(cut.featurizer).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), features)
        double = copy.deepcopy(cut.featurizer).double()
        assert double(x.double()).dtype == torch.float64
