"""Networks of the zoo against their published definitions."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import nn

from compress.zoo import NETWORKS, build, network
from hwsim.errors import InputError

# Parameters; SHA-256 of the names and shapes of the state dict in order.
# Source: torchvision 0.29.2 (vgg16, resnet18, resnet50, mobilenet_v2), `digest` below run on its models; on seeded weights
# copied over, the outputs of both were equal to the last bit.
TORCHVISION = {
    "vgg16": (138_357_544, "ddabf5fcf9721839ddf10bbe41a87b858f6f5df49e5f7f5d400b4db5837383ec"),
    "resnet18": (11_689_512, "ce88913d6e5bbfc8e89996766700cb45115f439632c9fdc01ffe426ea25387a9"),
    "resnet50": (25_557_032, "218340f9d3037deac0e029064817e2434f9a638034693f6134277670d9fbfddf"),
    "mobilenetv2": (3_504_872, "50b76b5e43373535abcddf82c788baac0af741b325466ea138f5b0f507a5d82b"),
}
SMALL = [name for name, entry in NETWORKS.items() if entry.input_shape == (1, 28, 28)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def digest(model: nn.Module) -> str:
    names = [[name, list(values.shape)] for name, values in model.state_dict().items()]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


@pytest.mark.parametrize("name", TORCHVISION)
def test_imagenet_networks_take_torchvisions_weights(name: str) -> None:
    model = build(name, device="meta")
    assert (parameters(model), digest(model)) == TORCHVISION[name]


def test_lenets_have_the_weights_of_the_literature() -> None:
    weights = {
        name: sum(values.numel() for values in build(name).parameters() if values.dim() > 1)
        for name in ("lenet5", "lenet300")
    }
    # 20·25 + 50·500 + 500·800 + 10·500, and 300·784 + 100·300 + 10·100 (Han et al., NIPS 2015, tables 3 and 4)
    assert weights == {"lenet5": 430_500, "lenet300": 266_200}


def test_resnet20_has_the_size_of_its_paper() -> None:
    # He et al., CVPR 2016, table 6: 0.27 M parameters
    assert parameters(build("resnet20")) == pytest.approx(0.27e6, rel=0.02)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_run(name: str) -> None:
    model = build(name, num_classes=7).eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_takes_its_input(name: str) -> None:
    entry = NETWORKS[name]
    with torch.device("meta"):
        dtype = getattr(torch, entry.input_dtype)
        outputs = build(name, device="meta").eval()(torch.zeros(2, *entry.input_shape, dtype=dtype))
    assert outputs.shape == (2, entry.num_classes)


def test_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (build("lenet5", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_wrong_names_and_classes_are_refused() -> None:
    with pytest.raises(InputError, match='did you mean "resnet18"'):
        build("resnet8")
    with pytest.raises(InputError, match='did you mean "lenet5"'):
        network("lenet_5")
    with pytest.raises(InputError, match="num_classes: 0"):
        build("lenet5", num_classes=0)
