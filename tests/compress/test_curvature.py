"""Curvature against gradients of one sample at a time, and against the inputs unfolded."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.curvature import curvature, diagonal_fisher, diagonal_hessian
from compress.rules import CompressionConfig, plan_layers
from hwsim.errors import InputError


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 2, groups=2, dilation=2),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(24, 3),
        )


def batches(count=7, parts=(4, 3)):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 2, 8, 8, generator=generator)
    targets = torch.randint(0, 3, (count,), generator=generator)
    return list(zip(inputs.split(parts), targets.split(parts), strict=True))


def planned(model):
    return plan_layers(model, CompressionConfig(block=(2, 2), exempt_first_last=False)).layers


@pytest.mark.parametrize("inplace", [False, True])
def test_fisher_is_the_mean_square_of_single_gradients(inplace):
    model = network()
    model[2] = nn.ReLU(inplace=inplace)
    model[1] = nn.Identity() if inplace else model[1]
    layers = planned(model)
    found = diagonal_fisher(model, layers, batches())
    expected = {layer.name: torch.zeros(layer.weight_shape) for layer in layers}
    model.eval()
    for inputs, targets in batches():
        for one, target in zip(inputs, targets, strict=True):
            model.zero_grad()
            functional.cross_entropy(model(one[None]), target[None]).backward()
            for layer in layers:
                expected[layer.name] += layer.module.weight.grad.square() / 7
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_a_network_that_reads_values_falls_back_to_single_samples():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, inputs):
            scale = 2.0 if float(inputs.detach().abs().max()) > 0 else 1.0
            return self.body(inputs) * scale

    model = Reads()
    found = diagonal_fisher(model, planned(model), batches())
    assert all((values >= 0).all() and values.sum() > 0 for values in found.values())


def test_hessian_is_the_mean_square_of_what_a_weight_multiplies():
    model = network()
    layers = planned(model)
    found = diagonal_hessian(model, layers, (inputs for inputs, _ in batches()))
    seen = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, arguments, name=layer.name: seen.setdefault(name, []).append(arguments[0].detach())
        )
        for layer in layers
    ]
    model.eval()
    with torch.no_grad():
        for inputs, _ in batches():
            model(inputs)
    for handle in handles:
        handle.remove()
    first = torch.cat(seen["0"])
    columns = functional.unfold(first, 3, stride=2, padding=1)  # [n, 2·9, positions], channels outside
    torch.testing.assert_close(found["0"][1].flatten(), columns.square().sum(dim=(0, 2)) / 7)
    second = functional.unfold(torch.cat(seen["3"]), 2, dilation=2).reshape(7, 2, 8, -1)
    by_group = second.square().sum(dim=(0, 3)) / 7
    for channel in range(6):
        torch.testing.assert_close(found["3"][channel].flatten(), by_group[channel // 3])
    torch.testing.assert_close(found["6"], torch.cat(seen["6"]).square().mean(dim=0).expand(3, 24))


def test_other_paddings_are_seen_too():
    model = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(16, 2)
    )
    inputs = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = diagonal_hessian(model, planned(model), [inputs])["0"]
    padded = functional.pad(inputs, (1, 1, 1, 1), mode="reflect")
    expected = functional.unfold(padded, 3).square().sum(dim=(0, 2)) / 2
    torch.testing.assert_close(found.flatten(), expected)


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_the_network_is_left_as_it_was(kind):
    model = network().train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    found = curvature(kind, model, planned(model), batches())
    assert model.training
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        layer.name: layer.weight_shape for layer in planned(model)
    }


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_bad_calibration_is_refused(kind):
    model = network()
    with pytest.raises(InputError, match="no samples"):
        curvature(kind, model, planned(model), [])
    inputs, targets = batches()[0]
    inputs[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        curvature(kind, model, planned(model), [(inputs, targets)])


def test_a_layer_that_never_runs_has_no_curvature():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, inputs):
            return self.used(inputs)

    model = Spare()
    found = diagonal_hessian(model, planned(model), [torch.ones(2, 4)])
    assert not found["spare"].any()
    assert (found["used"] == 1).all()


def test_a_forward_pass_without_gradients_is_refused() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Switched()
    layers = plan_layers(model, CompressionConfig(exempt_first_last=False)).layers
    with pytest.raises(InputError, match="no derivative"):
        diagonal_fisher(model, layers, [(torch.randn(2, 4), torch.tensor([0, 1]))])
