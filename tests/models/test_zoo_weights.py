import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dpf_release.errors import ConfigError, WeightsError
from dpf_release.models.hooks import split
from dpf_release.models.weights import freeze, load_state, load_weights, state_file
from dpf_release.models.zoo import (
    CifarResNet,
    build_network,
    is_public_architecture,
    network_on_paper,
    public_architectures,
)
from network_digests import state_bytes


def tiny(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, outputs))


@pytest.mark.parametrize(("arch", "blocks"), [("resnet20_cifar", 3), ("resnet56_cifar", 9)])
def test_a_cifar_resnet_has_6n_plus_2_layers_and_shortcuts_without_parameters(arch: str, blocks: int) -> None:
    network = build_network(arch, 10)
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 6 * blocks + 2
    assert all(layer.kernel_size == (3, 3) for layer in layers if isinstance(layer, nn.Conv2d))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_resnet20_has_the_parameters_of_the_paper() -> None:
    # He et al. 2016, Table 6: 0.27 M for 20 layers, 0.85 M for 56.
    count = {
        arch: sum(p.numel() for p in build_network(arch, 10).parameters())
        for arch in ("resnet20_cifar", "resnet56_cifar")
    }
    assert round(count["resnet20_cifar"] / 1e6, 2) == 0.27
    assert round(count["resnet56_cifar"] / 1e6, 2) in (0.85, 0.86)


@pytest.mark.parametrize("width", [3, 16])
def test_width_sets_the_channels_of_the_stages(width: int) -> None:
    network = build_network("resnet20_cifar", 10, {"width": width}).eval()
    x = torch.zeros(2, 3, 32, 32)
    for stage, side in ((network.layer1, 32), (network.layer2, 16), (network.layer3, 8)):
        x = stage(network.conv1(x) if stage is network.layer1 else x)
        assert x.shape == (2, width * 32 // side, side, side)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros() -> None:
    block = CifarResNet(blocks=1, outputs=2, width=4).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # the residual is then zero
    x = torch.rand(1, 4, 8, 8)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y[:, :2].abs().max() == 0
    assert y[:, 6:].abs().max() == 0


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3", "squeezenet1_1", "densenet121", "mnasnet0_5"])
def test_torchvision_networks_are_built_for_any_number_of_outputs_without_a_warning(arch: str) -> None:
    network = build_network(arch, 7)
    size = 96 if arch == "inception_v3" else 64
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert not any(name.startswith(("aux", "Aux")) for name, _ in network.named_children())


@pytest.mark.parametrize("arch", ["resnet20_cifar", "resnet18", "densenet121", "regnet_y_400mf", "googlenet"])
def test_a_network_on_paper_has_the_shapes_of_the_built_one_and_no_room(arch: str) -> None:
    built, on_paper = build_network(arch, 7).state_dict(), network_on_paper(arch, 7, {}).state_dict()
    shapes = [{key: (value.shape, value.dtype) for key, value in state.items()} for state in (built, on_paper)]
    assert shapes[0] == shapes[1]
    assert all(value.is_meta for value in on_paper.values())
    assert not any(value.is_meta for value in built.values())


@pytest.mark.parametrize(("arch", "hook"), [("resnet20_cifar", "conv4_1"), ("googlenet", "maxpool3")])
def test_a_network_on_paper_is_cut_as_the_built_one_and_takes_its_weights(arch: str, hook: str) -> None:
    built, on_paper = (split(make(arch, 7, {}), hook, (64, 64)) for make in (build_network, network_on_paper))
    assert built.hook == on_paper.hook
    images = torch.rand(1, 3, 64, 64)
    features = built.featurizer.eval()(images)
    on_paper.featurizer.load_state_dict(built.featurizer.state_dict(), assign=True)
    assert torch.equal(on_paper.featurizer.eval()(images), features)
    assert on_paper.classifier(features.to("meta")).is_meta  # the control: it has none yet


def test_a_giant_on_paper_is_cut_without_room_for_it() -> None:
    before = torch.random.get_rng_state()
    network = network_on_paper("resnet56_cifar", 10, {"width": 1024})
    assert sum(value.nbytes for value in network.state_dict().values()) > 10 * 2**30
    parts = split(network, "conv3_1", (4096, 4096))  # its features would take 128 GiB
    assert parts.hook.shape == (2048, 2048, 2048)
    assert torch.equal(before, torch.random.get_rng_state())


def test_public_architectures_are_those_that_need_no_import() -> None:
    assert is_public_architecture("resnet18")
    assert is_public_architecture("resnet56_cifar")
    assert not is_public_architecture("os:getcwd")
    assert not is_public_architecture("fcn_resnet50")  # segmentation
    assert not is_public_architecture("quantized_resnet18")
    assert not any(":" in name for name in public_architectures())


@pytest.mark.parametrize("outputs", [0, -1, 1_000_001, True, 2.0, "3"])
def test_a_number_of_outputs_out_of_bounds_is_refused(outputs: object) -> None:
    with pytest.raises(ConfigError, match="1 to 1000000"):
        build_network("resnet20_cifar", outputs)
    assert build_network("resnet20_cifar", 1).fc.out_features == 1


@pytest.mark.parametrize(
    ("arch", "arguments", "reason"),
    [
        ("resnet20_cifar", {"width": 0}, "width = 0"),
        ("resnet20_cifar", {"width": 1025}, "width = 1025"),
        ("resnet20_cifar", {"width": True}, "width = True"),
        ("resnet20_cifar", {"depth": 3, "width": -1}, "unknown argument 'depth'.*width = -1"),
        ("resnet18", {"width": 8}, "takes no arguments"),
        ("resnet18", {"weights": 1}, "unknown argument 'weights'"),
    ],
)
def test_an_argument_that_is_not_known_or_bounded_is_refused(arch: str, arguments: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_network(arch, 2, arguments)


@pytest.mark.parametrize(("arch", "hint"), [("resnet19", "resnet18"), ("resnet20_cifer", "resnet20_cifar")])
def test_an_unknown_name_is_refused_with_names_close_to_it(arch: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"not known.*did you mean.*{hint}"):
        build_network(arch, 2)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "owners_network.py").write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        "Path(__file__).with_name('imported').touch()\n"
        "def build(outputs):\n    return nn.Linear(2, outputs)\n"
        "def wrong(outputs):\n    return outputs\n"
        "number = 3\n"
    )
    (tmp_path / "needs_another.py").write_text("import no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield "owners_network"
    sys.modules.pop("owners_network", None)


def test_the_owners_code_is_imported_for_the_owner_only(own_module: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for its owner only"):
        build_network(f"{own_module}:build", 4)
    assert not (tmp_path / "imported").exists()
    assert build_network(f"{own_module}:build", 4, allow_import=True).out_features == 4
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("owners_network:wrong", "must return a torch.nn.Module, found int"),
        ("owners_network:number", "owners_network:number'.*expected a function, found int"),
        ("owners_network:absent", "package.module:function.*has no attribute 'absent'"),
        ("no_such_module_here:build", "cannot be imported"),
        ("needs_another:build", "cannot be imported.*no_such_module_here"),
        (".relative:build", "package.module:function"),
        ("owners_network:build:x", "package.module:function.*has no attribute 'build:x'"),
    ],
)
def test_own_code_that_cannot_be_used_is_refused(own_module: str, arch: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_network(arch, 2, allow_import=True)


def test_a_given_builder_is_called_with_the_number_of_outputs() -> None:
    assert build_network("the owner's", 4, builder=tiny)[-1].out_features == 4
    with pytest.raises(ConfigError, match="given builder must return"):
        build_network("the owner's", 4, builder=lambda outputs: None)
    with pytest.raises(ConfigError, match="no arguments"):
        build_network("resnet20_cifar", 4, {"width": 4}, builder=tiny)


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "safetensors": lambda state, path: path.write_bytes(state_file(state)),
    "plain.pt": lambda state, path: torch.save(state, path),
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "wrapped.pth": lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    "model.bin": lambda state, path: torch.save({"model": state}, path),
    "parallel.pt": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "before_counters.pth": lambda state, path: torch.save(with_old_names(state), path),
}


@pytest.mark.parametrize("kind", SAVERS)
def test_weights_come_back_bit_for_bit_from_each_format(kind: str, tmp_path: Path) -> None:
    saved, loaded = tiny(), tiny()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else kind)
    SAVERS[kind](saved.state_dict(), path)
    assert state_bytes(loaded) != state_bytes(saved)
    load_weights(loaded, path)
    assert state_bytes(loaded) == state_bytes(saved)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_all_mismatches_are_named_and_the_network_is_left_alone(suffix: str, tmp_path: Path) -> None:
    state = dict(tiny(outputs=4).state_dict())
    del state["0.weight"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(9)}
    path = tmp_path / f"weights{suffix}"
    (path.write_bytes(state_file(state)) if suffix == ".safetensors" else torch.save(state, path))
    network = tiny(outputs=3)
    before = state_bytes(network)
    with pytest.raises(WeightsError) as refusal:
        load_weights(network, path)
    message = str(refusal.value)
    assert "1 missing: 0.weight" in message
    assert "9 unexpected: extra.0, extra.1" in message
    assert "and 4 more" in message
    assert "2 wrong shape: 3.weight (4, 4), expected (3, 4)" in message
    assert state_bytes(network) == before


class Marker:
    """Harmless when unpickled by code that runs what a file names: it makes an empty folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("saver", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_nothing_but_tensors_is_unpickled(saver: Callable[[object, Path], None], tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pt", tmp_path / "executed"
    saver({**tiny().state_dict(), "x": Marker(marker)}, path)
    with pytest.raises(WeightsError, match="Nothing but tensors is unpickled.*save_file"):
        load_weights(tiny(), path)
    assert not marker.exists()
    if saver is torch.save:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(tiny(), tmp_path / "network.pt")
    with pytest.raises(WeightsError, match="Nothing but tensors"):
        load_weights(tiny(), tmp_path / "network.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.zeros(1)], "found list"),
        ({"a": 3}, "found others: 'a'"),
        ({3: torch.zeros(1)}, "found others: 3"),
    ],
)
def test_a_file_that_is_no_flat_dict_of_tensors_is_refused(content: object, reason: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match=reason):
        load_weights(tiny(), tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x02garbage"])
def test_a_damaged_file_is_refused(name: str, damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    SAVERS["safetensors" if path.suffix == ".safetensors" else "plain.pt"](tiny().state_dict(), path)
    load_weights(tiny(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=name):
        load_weights(tiny(), path)


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "weights.pkl", "weights", "weights.ckpt"])
def test_a_missing_file_or_another_format_is_refused(name: str, tmp_path: Path) -> None:
    if not name.startswith("absent"):
        torch.save(tiny().state_dict(), tmp_path / name)
    with pytest.raises(WeightsError, match="expected"):
        load_weights(tiny(), tmp_path / name)


def test_auxiliary_classifiers_of_a_checkpoint_are_left_out_on_googlenet_only(tmp_path: Path) -> None:
    network = build_network("googlenet", 2)
    torch.save({**network.state_dict(), "aux1.fc1.weight": torch.zeros(2)}, tmp_path / "googlenet.pth")
    load_weights(network, tmp_path / "googlenet.pth")
    torch.save({**tiny().state_dict(), "aux1.fc1.weight": torch.zeros(2)}, tmp_path / "tiny.pth")
    with pytest.raises(WeightsError, match="1 unexpected: aux1"):
        load_weights(tiny(), tmp_path / "tiny.pth")


def test_old_names_of_densenet_and_networks_with_versions_are_understood(tmp_path: Path) -> None:
    densenet = build_network("densenet121", 2)
    old = {
        k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in k else k: v
        for k, v in densenet.state_dict().items()
    }
    assert old.keys() != densenet.state_dict().keys()
    torch.save(old, tmp_path / "densenet.pth")
    load_weights(densenet, tmp_path / "densenet.pth")
    # MNASNet refuses a state dict that carries no format version, as none in safetensors does.
    mnasnet, other = build_network("mnasnet0_5", 2), build_network("mnasnet0_5", 2)
    (tmp_path / "mnasnet.safetensors").write_bytes(state_file(mnasnet.state_dict()))
    load_weights(other, tmp_path / "mnasnet.safetensors")
    assert state_bytes(other) == state_bytes(mnasnet)


def test_saved_bytes_depend_on_names_and_values_only(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    state = {"b": shared.T, "a": shared, "c": shared[0]}
    (tmp_path / "one").write_bytes(state_file(state))
    (tmp_path / "two").write_bytes(state_file({name: state[name].clone() for name in ("c", "a", "b")}))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_state(tmp_path / "one")
    assert list(loaded) == ["a", "b", "c"]
    assert all(torch.equal(loaded[name], state[name]) for name in state)

    (tmp_path / "three").write_bytes(state_file({**state, "a": shared + 1}))
    assert (tmp_path / "one").read_bytes() != (tmp_path / "three").read_bytes()


def test_the_digest_sees_parameters_and_buffers_and_nothing_else() -> None:
    network = tiny()
    before = state_bytes(network)
    freeze(network)
    assert state_bytes(network) == before
    network[1].running_mean[0] += 1
    moved = state_bytes(network)
    assert moved != before
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1
    assert state_bytes(network) not in (before, moved)


def test_frozen_means_eval_mode_and_no_gradients() -> None:
    network = tiny()
    x = torch.rand(4, 3, 3, 3)
    before = state_bytes(network)
    assert freeze(network) is network
    network(x)
    assert state_bytes(network) == before
    assert not any(parameter.requires_grad for parameter in network.parameters())
    network.train()(x)  # without eval mode BatchNorm's buffers move, gradients or not
    assert state_bytes(network) != before
