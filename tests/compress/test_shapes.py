"""Shapes of layers against the convolutions themselves and against published totals."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.shapes import evaluation_mode, layer_shapes, module_name
from compress.zoo import NETWORKS, build
from hwsim.errors import InputError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# Layers, multiply-accumulates of one image, weights.
# Source: the papers' and torchvision's GMAC figures (15.47, 1.814, 4.089, 0.301), here to the last digit; LeNets by hand.
TOTALS = {
    "lenet5": (4, 20 * 25 * 576 + 50 * 500 * 64 + 400_000 + 5_000, 430_500),
    "lenet300": (3, 266_200, 266_200),
    "vgg16": (16, 15_470_264_320, 138_344_128),
    "resnet18": (21, 1_814_073_344, 11_678_912),
    "resnet50": (54, 4_089_184_256, 25_502_912),
    "mobilenetv2": (53, 300_774_272, 3_469_760),
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals_of_the_zoo(name: str) -> None:
    shapes = layer_shapes(build(name, device="meta"), NETWORKS[name].input_shape)
    found = (len(shapes), sum(shape.macs for shape in shapes), sum(shape.weight_count for shape in shapes))
    assert found == TOTALS[name]


def test_layers_come_in_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    assert [shape.name for shape in layer_shapes(Backwards(), (4,))] == ["first", "last"]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    per_dimension = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(rank))  # noqa: E731
    kernel, dilation = per_dimension(1, 4), per_dimension(1, 3)
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * rank if padding == "same" else per_dimension(1, 3)
    with torch.device("meta"):
        module = CONVOLUTIONS[rank](
            groups * draw(st.integers(1, 3)),
            groups * draw(st.integers(1, 3)),
            kernel,
            stride=stride,
            padding=per_dimension(0, 3) if padding == "numbers" else padding,
            dilation=dilation,
            groups=groups,
        )
    reach = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    return module, tuple(size + draw(st.integers(0, 5)) for size in reach)


@given(convolutions(), st.integers(1, 3))
@settings(deadline=None)
def test_geometry_is_that_of_the_convolution(case: tuple[nn.Module, tuple[int, ...]], batch: int) -> None:
    module, size = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on even kernels with padding="same": it copies the input
        (shape,) = layer_shapes(nn.Sequential(module), (module.in_channels, *size), batch)
        outputs = module(torch.empty(batch, module.in_channels, *size, device="meta"))
    assert shape.output_size == tuple(outputs.shape[2:])
    assert shape.n == outputs.numel() // module.out_channels
    assert (shape.groups, shape.m) == (module.groups, module.out_channels // module.groups)
    assert shape.k == module.weight[0].numel()
    assert shape.batch == batch


@given(convolutions())
@settings(deadline=None, max_examples=40)
def test_padding_is_the_padding(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    """Padding by hand with the two sides that the shape states gives what the module gives."""
    meta, size = case
    module = meta.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    values = torch.randn(1, module.in_channels, *size, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (shape,) = layer_shapes(nn.Sequential(module), tuple(values.shape[1:]))
        expected = module(values)
    sides = [side for pair in reversed(shape.padding) for side in pair]
    padded = nn.functional.pad(values, sides)
    convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(size)]
    found = convolve(padded, module.weight, module.bias, shape.stride, 0, shape.dilation, shape.groups)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "batch", "leading", "n"), [((5,), 2, (), 2), ((7, 5), 2, (7,), 14), ((3, 7, 5), 1, (3, 7), 21)]
)
def test_leading_dimensions_of_a_linear_layer(
    shape: tuple[int, ...], batch: int, leading: tuple[int, ...], n: int
) -> None:
    (found,) = layer_shapes(nn.Sequential(nn.Linear(5, 4)), shape, batch)
    assert (found.input_size, found.batch, found.n, found.m, found.k) == (leading, batch, n, 4, 5)


def test_a_layer_that_gets_no_batch_has_one() -> None:
    class PerImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x[0]).flatten())

    conv, fc = layer_shapes(PerImage(), (1, 4, 4))
    assert (conv.batch, conv.n, fc.batch, fc.n) == (1, 4, 1, 1)


def test_a_module_that_runs_twice_appears_twice() -> None:
    shared = nn.Conv2d(2, 2, 3, padding=1)
    shapes = layer_shapes(nn.Sequential(shared, nn.MaxPool2d(2), shared), (2, 8, 8))
    assert [(shape.name, shape.n) for shape in shapes] == [("0", 64), ("0#2", 16)]
    assert [module_name(shape.name) for shape in shapes] == ["0", "0"]


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(8, 2))
    model[2].eval()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layer_shapes(model, (1, 4, 4))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert next(model.parameters()).device.type == "cpu"


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), evaluation_mode(model):
        model(torch.zeros(3))
    assert model[0].training


def test_a_network_that_reads_values_runs_for_real() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x if x.sum().item() == 0 else x[:1])

    (shape,) = layer_shapes(Branches(), (3,), batch=4)
    assert (shape.name, shape.n) == ("fc", 4)


def test_tensors_made_in_forward_do_not_disturb() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x + torch.arange(3))

    assert len(layer_shapes(Positions(), (3,))) == 1


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
            (1, 4, 4),
            'padding_mode: "reflect"',
        ),
        (nn.Sequential(nn.Linear(3, 2)), (4,), r"input_shape: no forward pass with an input of \(1, 4\)"),
        (nn.Sequential(nn.ReLU()), (4,), "nothing to list"),
        (nn.Sequential(nn.Linear(3, 2)), (0,), r"input_shape\[0\]: 0"),
    ],
)
def test_what_cannot_be_listed_is_refused(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer_shapes(model, shape)


def test_work_that_is_not_listed_is_warned_of() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
            self.up = nn.ConvTranspose1d(1, 1, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.used(x)[:, None])

    with pytest.warns(
        UserWarning, match=r"up.weight \(in conv_transpose1d\), unused \(never run as a module\)"
    ):
        assert len(layer_shapes(Partly(), (4,))) == 1
