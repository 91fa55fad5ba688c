"""The integer model against arithmetic on Python integers, and against the float network that it stands for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress import zoo
from compress.any_network import compress_network
from compress.artifact import MAX_SHIFT, integer_weight
from compress.fit import compress
from compress.integer import arithmetic as module
from compress.integer.arithmetic import make_requantizer
from compress.integer.calibration import quantize_activations
from compress.integer.model import IntegerModel
from compress.layers import CompressedLayer
from compress.rebuild import rebuild, rebuild_integer
from compress.rules import CompressionConfig, Recipe
from hwsim.errors import InputError
from hwsim.layer import Requantizer, accumulator_bits_needed


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose normalisations are not trivial and some of whose gains are negative."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().eval()
        for part in model.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.weight.data = torch.randn(part.num_features)
                part.bias.data = torch.randn(part.num_features)
                part.running_mean = torch.randn(part.num_features)
                part.running_var = torch.rand(part.num_features) + 0.5
    return model


def projected(model: nn.Module, **config: object) -> dict[str, CompressedLayer]:
    """The layers of a network compressed in one shot, without training; the network gets the same weights."""
    settings = {"block": (2, 3), "pruned": 0.25, "unified": 0.5, "exempt_first_last": False} | config
    data = [(torch.zeros(1), torch.zeros(1))]
    return compress(
        model, CompressionConfig(**settings), data, Recipe(epochs_admm=0, epochs_retrain=0)
    ).layers


def images(count: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


# --- the slow reference: integers of Python, one output at a time


def wrap(value: int, bits: int) -> int:
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


def requantized(accumulator: int, channel: int, requantizer: Requantizer, bits: int) -> int:
    product = (accumulator + int(requantizer.bias[channel])) * int(requantizer.scale[channel])
    rounded = math.floor(Fraction(product, 2 ** int(requantizer.shift[channel])) + Fraction(1, 2))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    clamped = min(max(rounded, low), high)
    return max(clamped, 0) if requantizer.relu else clamped


def slow_accumulators(values: np.ndarray, weight: np.ndarray, layer: nn.Module) -> np.ndarray:
    """``[n, out, …]``: what a convolution or linear layer sums up."""
    if isinstance(layer, nn.Linear):
        rows = values.reshape(-1, values.shape[-1])
        sums = [
            [sum(int(a) * int(b) for a, b in zip(row, line, strict=True)) for line in weight] for row in rows
        ]
        return np.array(sums).reshape(*values.shape[:-1], len(weight))
    padded = np.pad(values, [(0, 0), (0, 0), *((side, side) for side in layer.padding)])
    reach = [step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    sizes = [
        (size - far - 1) // step + 1
        for size, far, step in zip(padded.shape[2:], reach, layer.stride, strict=True)
    ]
    result = np.zeros((len(values), layer.out_channels, *sizes), np.int64)
    per_group = layer.out_channels // layer.groups
    for place in itertools.product(*(range(size) for size in result.shape)):
        image, out, *at = place
        total = 0
        for channel in range(weight.shape[1]):
            source = padded[image, out // per_group * weight.shape[1] + channel]
            for tap in itertools.product(*(range(size) for size in layer.kernel_size)):
                where = tuple(
                    a * step + t * gap
                    for a, step, t, gap in zip(at, layer.stride, tap, layer.dilation, strict=True)
                )
                total += int(weight[(out, channel, *tap)]) * int(source[where])
        result[place] = total
    return result


def check_trace(model: nn.Module, integer_model: IntegerModel, inputs: torch.Tensor) -> None:
    """Every layer of a trace is what the reference makes of its input."""
    modules = dict(model.named_modules())
    trace = integer_model.layer_trace(inputs)
    assert trace
    for name, read, accumulators, written in trace:
        layer = modules[name]
        weight = integer_weight(integer_model.layers[name], tuple(layer.weight.shape))
        expected = slow_accumulators(read, weight, layer)
        bits = integer_model.accumulator_bits
        expected = np.vectorize(lambda value, bits=bits: wrap(int(value), bits))(expected)
        assert np.array_equal(accumulators, expected), name
        axis = -1 if isinstance(layer, nn.Linear) else 1
        requantizer = integer_model.requantizers[name]
        for place in np.ndindex(expected.shape):
            channel = place[axis]
            bits = integer_model.activation_bits
            assert written[place] == requantized(int(expected[place]), channel, requantizer, bits), (
                name,
                place,
            )


@st.composite
def single_layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(draw(st.integers(0, 9)))
    if draw(st.booleans()):
        return nn.Linear(draw(st.integers(1, 7)), draw(st.integers(1, 5))), ()
    rank, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    convolution = {1: nn.Conv1d, 2: nn.Conv2d}[rank]
    some = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(rank))  # noqa: E731
    layer = convolution(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        some(1, 3),
        stride=some(1, 2),
        padding=some(0, 2),
        dilation=some(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
    )
    reach = [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    return layer, tuple(size + draw(st.integers(0, 2)) for size in reach)


@given(
    single_layers(),
    st.sampled_from([(1, 1), (2, 3), (4, 4)]),
    st.sampled_from([(0, 0), (0, 1), (0.25, 0.5), (0.5, 0.5)]),
    st.integers(2, 8),
    st.integers(2, 8),
    st.sampled_from([8, 12, 32]),
    st.sampled_from(["tap_major", "channel_major"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_layer_is_exact(
    case: tuple[nn.Module, tuple[int, ...]],
    block: tuple[int, int],
    ratios: tuple[float, float],
    weight_bits: int,
    activation_bits: int,
    accumulator_bits: int,
    order: str,
    relu: bool,
) -> None:
    layer, size = case
    model = nn.Sequential(layer, nn.ReLU()) if relu else nn.Sequential(layer)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    pruned, unified = ratios
    layers = projected(
        model, block=block, pruned=pruned, unified=unified, weight_bits=weight_bits, column_order=order
    )
    integer_model = quantize_activations(
        model,
        layers,
        images(8, channels, *size),
        activation_bits=activation_bits,
        accumulator_bits=accumulator_bits,
    )
    check_trace(model, integer_model, images(2, channels, *size, seed=2))


@pytest.mark.parametrize("exact_in_float32", [True, False])
def test_a_whole_network_is_exact(monkeypatch: pytest.MonkeyPatch, exact_in_float32: bool) -> None:
    if not exact_in_float32:
        monkeypatch.setattr(module, "FLOAT32_EXACT", 0)

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5), nn.Linear(5, 3),
        )  # fmt: skip

    model = seeded(make)
    integer_model = quantize_activations(model, projected(model), images(32, 1, 8, 8))
    dtypes = {layer.weight.dtype for layer in integer_model._array.values()}
    assert dtypes == {torch.float32 if exact_in_float32 else torch.float64}
    check_trace(model, integer_model, images(3, 1, 8, 8, seed=2))


def test_sums_that_float32_cannot_hold_are_exact() -> None:
    """2^24 + 1 is the first integer that float32 misses; K · 127 · 127 passes it from K = 1,041 on."""
    model = nn.Sequential(nn.Linear(1100, 1))
    model[0].weight.data.fill_(1.0)
    model[0].weight.data[0, 0] = 2 / 127
    layers = projected(model, block=(1, 1), pruned=0, unified=0)
    integer_model = quantize_activations(model, layers, torch.ones(4, 1100))
    (trace,) = integer_model.layer_trace(torch.ones(1, 1100))
    expected = 1099 * 127 * 127 + 2 * 127
    assert float(np.float32(expected)) != expected  # or the test shows nothing
    assert trace.accumulator.item() == expected


# --- the requantiser


def one(scale: int, shift: int, bias: int = 0, relu: bool = False) -> Requantizer:
    return Requantizer(
        np.array([bias], np.int32), np.array([scale], np.int16), np.array([shift], np.uint8), relu
    )


@pytest.mark.parametrize(
    ("accumulator", "scale", "shift", "relu", "expected"),
    [
        (1, 1, 1, False, 1),  # 0.5 rounds up
        (-1, 1, 1, False, 0),  # −0.5 rounds up too
        (-3, 1, 1, False, -1),
        (3, 1, 1, False, 2),
        (127, 1, 0, False, 127),
        (128, 1, 0, False, 127),
        (-128, 1, 0, False, -128),
        (-129, 1, 0, False, -128),
        (255, 1, 1, False, 127),  # 127.5 rounds to 128 and is clamped
        (5, -1, 0, False, -5),
        (5, -1, 0, True, 0),
        (-5, -1, 0, True, 5),
    ],
)
def test_rounding_and_clamping(accumulator: int, scale: int, shift: int, relu: bool, expected: int) -> None:
    requantizer = one(scale, shift, relu=relu)
    assert requantized(accumulator, 0, requantizer, 8) == expected
    model = nn.Sequential(nn.Linear(1, 1, bias=False), *([nn.ReLU()] if relu else []))
    model[0].weight.data.fill_(1.0)
    layers = projected(model, block=(1, 1), pruned=0, unified=0)
    built = quantize_activations(model, layers, torch.ones(2, 1), activation_bits=8)
    # The weight is 127 steps: drive the accumulator to the wanted value through the bias instead.
    weights = replace(
        layers["0"].weights, requantizer=replace(requantizer, bias=np.array([accumulator], np.int32))
    )
    fixed = IntegerModel(model, {"0": replace(layers["0"], weights=weights)}, built.activations)
    assert fixed.forward(torch.zeros(1, 1)).integers.item() == expected


REAL = st.floats(1e-12, 1e6).flatmap(lambda size: st.sampled_from([size, -size]))


@given(REAL, st.one_of(st.just(0.0), REAL), st.floats(1e-6, 1e3), st.integers(-(2**24), 2**24), st.booleans())
def test_the_requantiser_computes_the_affine_map(
    gain: float, offset: float, output_scale: float, accumulator: int, relu: bool
) -> None:
    """Within the clamp, the integers are off by rounding, by 15 bits of scale and by a half unit of bias at most."""
    found = make_requantizer(np.array([gain]), np.array([offset]), output_scale, relu)
    assert found.shift[0] <= MAX_SHIFT
    exact = (Fraction(gain) * accumulator + Fraction(offset)) / Fraction(output_scale)
    low, high = (0 if relu else -128), 127
    expected = min(max(exact, low), high)
    value = requantized(accumulator, 0, found, 8)
    slope = abs(Fraction(gain) / Fraction(output_scale))
    lost_bias = abs(offset) > abs(gain) * (2**31 - 1)
    tolerance = Fraction(1, 2) + abs(exact) / 2**14 + slope / 2 + Fraction(1, 2**20)
    tolerance += abs(accumulator) * Fraction(1, 2**MAX_SHIFT)  # scale cut off below the last shift
    if lost_bias:
        tolerance += abs(Fraction(offset) / Fraction(output_scale)) * abs(accumulator) / 2**30
    assert abs(value - expected) <= tolerance


@pytest.mark.parametrize("gain", [0.0, 1e-30, -1e-30])
@pytest.mark.parametrize("offset", [0.0, 3.25, -3.25])
def test_a_channel_without_gain_keeps_its_constant(gain: float, offset: float) -> None:
    found = make_requantizer(np.array([gain]), np.array([offset]), 0.05, relu=False)
    for accumulator in (-(2**20), 0, 2**20):
        assert requantized(accumulator, 0, found, 8) == round(offset / 0.05)


def test_gains_at_the_ends_of_the_range() -> None:
    for exponent in range(-70, 40):
        for gain in (2.0**exponent, -(2.0**exponent), 2.0**exponent * (1 - 2**-17)):
            found = make_requantizer(np.array([gain]), np.array([0.0]), 1.0, relu=False)
            value = requantized(1, 0, found, 8)
            expected = min(max(math.floor(gain + 0.5), -128), 127)
            assert abs(value - expected) <= 1, gain
            assert -(2**15) <= int(found.scale[0]) < 2**15


# --- overflow


@given(
    st.lists(st.lists(st.integers(-255, 255), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(2, 8),
)
def test_no_input_overflows_the_bits_that_are_said(rows: list[list[int]], activation_bits: int) -> None:
    bits = accumulator_bits_needed(np.array(rows), activation_bits)
    extremes = (-(1 << (activation_bits - 1)), (1 << (activation_bits - 1)) - 1)
    sums = [
        sum(a * b for a, b in zip(row, inputs, strict=True))
        for row in rows
        for inputs in itertools.product(extremes, repeat=3)
    ]
    assert all(wrap(value, bits) == value for value in sums)
    worst = max(sum(map(abs, row)) for row in rows) << (activation_bits - 1)
    assert bits == 1 or worst >= 1 << (bits - 2)  # one bit less would not hold the bound


def test_the_simulator_says_the_same() -> None:
    from compress.rebuild import make_artifact
    from hwsim.simulator import layer_accumulator_bits as simulated

    model = zoo.build("lenet5")
    layers = projected(model, block=(4, 4))
    integer_model = quantize_activations(model, layers, images(4, 1, 28, 28))
    on_hardware = make_artifact(model, layers, (1, 28, 28), 10).layers()
    assert integer_model.accumulator_bits_needed == {layer.name: simulated(layer, 8) for layer in on_hardware}


def test_accumulators_that_can_overflow_are_named() -> None:
    model = nn.Sequential(nn.Linear(40, 3))
    inputs = images(16, 40)
    layers = projected(model)
    roomy = quantize_activations(model, layers, inputs)
    assert roomy.notes == ()
    (needed,) = roomy.accumulator_bits_needed.values()
    assert quantize_activations(model, layers, inputs, accumulator_bits=needed).notes == ()
    (note,) = quantize_activations(model, layers, inputs, accumulator_bits=needed - 1).notes
    assert f"needs {needed} accumulator bits, the machine has {needed - 1}" in note


# --- whole networks


def agreement(model: nn.Module, integer_model: IntegerModel, inputs: torch.Tensor) -> float:
    """Root mean square error of the outputs against their deviation."""
    with torch.no_grad():
        expected = model(inputs)
    return float((integer_model(inputs) - expected).square().mean().sqrt() / expected.std())


def test_lenet5_runs_in_integers_from_end_to_end() -> None:
    model = zoo.build("lenet5")
    inputs = images(64, 1, 28, 28)
    integer_model = quantize_activations(model, projected(model, block=(4, 4)), inputs)
    assert integer_model.float_operations == ()
    assert integer_model.notes == ()
    around = integer_model.activations
    assert [around[name].producer for name in ("conv1", "conv2", "fc1", "fc2")] == [
        "",
        "conv1",
        "conv2",
        "fc1",
    ]
    assert [around[name].nonlinearity for name in around] == ["relu", "relu", "relu", "none"]
    conv1, conv2, fc1, fc2 = integer_model.layer_trace(inputs[:3])
    pooled = nn.functional.max_pool2d(torch.from_numpy(conv1.output).float(), 2).numpy()
    assert np.array_equal(conv2.input, pooled)
    assert np.array_equal(
        fc1.input, nn.functional.max_pool2d(torch.from_numpy(conv2.output).float(), 2).flatten(1)
    )
    assert np.array_equal(fc2.input, fc1.output)
    output = integer_model.forward(inputs[:3])
    assert np.array_equal(output.integers, fc2.output)
    assert torch.equal(
        output.values, output.integers * torch.tensor(around["fc2"].output_scale, dtype=torch.float32)
    )
    assert agreement(model, integer_model, inputs) < 0.05


def test_more_bits_come_closer_to_the_float_network() -> None:
    model = seeded(lambda: zoo.build("lenet5"))
    inputs = images(64, 1, 28, 28)
    layers = projected(model, block=(4, 4))
    errors = [
        agreement(model, quantize_activations(model, layers, inputs, activation_bits=bits), inputs)
        for bits in (3, 4, 6, 8, 12)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def test_normalisation_lives_in_the_requantiser() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())

    model = seeded(make)
    layers = projected(model)
    weight = model[0].weight.clone()
    inputs = images(64, 2, 6, 6)
    integer_model = quantize_activations(model, layers, inputs)
    assert integer_model.activations["0"].norm == "1"
    assert integer_model.requantizers["0"].relu
    assert integer_model.float_operations == ()
    assert torch.equal(model[0].weight, weight)
    assert integer_model.layers["0"].weights.magnitudes is layers["0"].weights.magnitudes
    signs = np.sign(integer_model.requantizers["0"].scale)
    assert np.array_equal(signs, np.sign(model[1].weight.detach().numpy()))
    assert -1 in signs  # the seed gives a negative gain, or the test shows nothing
    assert agreement(model, integer_model, inputs) < 0.02


def test_what_runs_outside_the_array_is_said() -> None:
    model = seeded(lambda: zoo.build("resnet20"))
    inputs = images(16, 1, 28, 28)
    integer_model = quantize_activations(model, projected(model, block=(4, 4)), inputs)
    assert len(integer_model.activations) == 22
    # Nine additions with the ReLU behind each, and the mean; every normalisation is in a requantiser.
    assert sum(name.startswith("add") for name in integer_model.float_operations) == 9
    assert not any("bn" in name for name in integer_model.float_operations)
    assert "avgpool" in integer_model.float_operations
    assert {around.norm != "" for name, around in integer_model.activations.items() if name != "fc"} == {True}
    assert agreement(model, integer_model, inputs) < 0.15


def test_a_clamp_at_six_is_the_clamp_of_the_requantiser() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 3))
    layers = projected(model)
    inputs = 40 * images(64, 4)
    integer_model = quantize_activations(model, layers, inputs)
    around = integer_model.activations["0"]
    assert around.nonlinearity == "relu6"
    assert around.output_scale <= 6 / 127
    assert agreement(model, integer_model, inputs) < 0.05
    gentle = quantize_activations(model, layers, inputs / 100)
    assert gentle.activations["0"].output_scale < around.output_scale


class Functional(nn.Module):
    """The same chain in functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        x = nn.functional.dropout(x.view(x.size(0), -1), 0.5, self.training)
        return self.fc(x)


def test_functions_are_seen_as_well_as_modules() -> None:
    model = Functional().eval()
    inputs = images(32, 1, 8, 8)
    integer_model = quantize_activations(model, projected(model), inputs)
    assert integer_model.activations["conv"].nonlinearity == "relu"
    assert integer_model.activations["fc"].producer == "conv"
    check_trace(model, integer_model, inputs[:1])


class Branching(nn.Module):
    """Cannot be traced: what it computes depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            x = -x
        return self.second(torch.relu(x))


def test_a_network_that_cannot_be_traced_runs_without_fusion() -> None:
    model = Branching()
    inputs = images(64, 6)
    integer_model = quantize_activations(model, projected(model), inputs)
    assert "no fusion: torch.fx cannot trace the network" in integer_model.notes[0]
    assert integer_model.float_operations == ("everything but the array layers",)
    assert integer_model.forward(inputs).integers is None
    check_trace(model, integer_model, inputs[:2])
    assert agreement(model, integer_model, inputs) < 0.05


def test_a_module_that_runs_twice_has_one_requantiser() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), shared, nn.ReLU(), shared)
    inputs = images(64, 4)
    integer_model = quantize_activations(model, projected(model), inputs)
    around = integer_model.activations["2"]
    assert (around.nonlinearity, around.producer) == ("none", "")
    assert [name for name, *_ in integer_model.layer_trace(inputs[:1])] == ["0", "2", "2"]
    check_trace(model, integer_model, inputs[:2])
    assert agreement(model, integer_model, inputs) < 0.1


def test_a_value_with_two_readers_is_not_swallowed() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(torch.relu(x)) + x[:, :2]

    model = Fork()
    inputs = images(64, 4)
    integer_model = quantize_activations(model, projected(model), inputs)
    assert integer_model.activations["a"].nonlinearity == "none"
    assert integer_model.activations["b"].producer == "a"  # the ReLU acts on the integers
    assert agreement(model, integer_model, inputs) < 0.05


def test_the_network_given_is_left_alone() -> None:
    model = seeded(lambda: zoo.build("lenet5")).train()
    layers = projected(model, block=(4, 4))
    before = {name: values.clone() for name, values in model.state_dict().items()}
    integer_model = quantize_activations(model, layers, images(8, 1, 28, 28))
    assert model.training
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert layers["conv1"].weights.requantizer is None
    inputs = images(4, 1, 28, 28)
    expected = integer_model(inputs)
    with torch.no_grad():
        model.fc2.weight.zero_()
    assert torch.equal(integer_model(inputs), expected)


def test_calibration_repeats() -> None:
    model = zoo.build("lenet5")
    layers = projected(model, block=(4, 4))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (quantize_activations(model, layers, images(100, 1, 28, 28)) for _ in range(2))
    assert first.activations == second.activations
    assert torch.equal(torch.get_rng_state(), state)


def test_hidden_scales_clip_an_outlier_and_the_output_scale_never_does() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 4))
    inputs = images(512, 8)
    layers = projected(model)
    inputs[0] *= 10
    found = quantize_activations(model, layers, inputs, activation_bits=4).activations
    with torch.no_grad():
        hidden = model[0](inputs)
        largest_hidden, largest_output = (float(values.abs().max()) for values in (hidden, model[1](hidden)))
    assert found["0"].output_scale < 0.8 * largest_hidden / 7
    assert found["1"].output_scale == pytest.approx(largest_output / 7, rel=1e-6)


def test_dead_inputs_do_not_divide_by_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    for layer in (model[0], model[2]):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    integer_model = quantize_activations(model, projected(model), torch.zeros(4, 3))
    assert integer_model.forward(images(2, 3)).integers.tolist() == [[0, 0], [0, 0]]


def test_a_normalisation_of_another_dimension_is_refused() -> None:
    """BatchNorm1d normalises dimension 1, which is not the output of a linear layer on ``[n, 4, 4]``."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    integer_model = quantize_activations(model, projected(model), images(8, 4))
    with pytest.raises(InputError, match="normalises another dimension"):
        integer_model(images(2, 4, 4))


@pytest.mark.parametrize("make", [lambda y: (y, 2 * y), lambda y: {"y": y}])
def test_outputs_of_several_tensors_are_floats(make: Callable[[torch.Tensor], object]) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> object:
            return make(self.fc(x))

    model = Several()
    inputs = images(32, 4)
    output = quantize_activations(model, projected(model), inputs).forward(inputs)
    assert output.integers is None
    with torch.no_grad():
        expected = model(inputs)
    for key in range(2) if isinstance(expected, tuple) else expected:
        assert torch.allclose(output.values[key], expected[key], atol=0.05)


# --- bad input


def test_wrong_settings_are_refused_together() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    layers = projected(model)
    with pytest.raises(InputError) as caught:
        quantize_activations(model, layers, torch.zeros(0, 3), activation_bits=1, accumulator_bits=63)
    assert [problem.field for problem in caught.value.problems] == [
        "activation_bits",
        "accumulator_bits",
        "images",
    ]
    for wrong in (torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.uint8)):
        with pytest.raises(InputError, match="must be finite floats"):
            quantize_activations(model, layers, wrong)


def test_weights_must_be_what_the_integers_say() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    layers = projected(model)
    model[0].weight.data[0, 0] += 1e-3
    with pytest.raises(InputError, match="weights are off integer × step size by up to"):
        quantize_activations(model, layers, images(4, 3))
    with pytest.raises(InputError, match="no such module"):
        quantize_activations(model, {"1": layers["0"]}, images(4, 3))


def test_a_network_with_other_surroundings_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    integer_model = quantize_activations(model, projected(model), images(8, 3))
    other = nn.Sequential(model[0], nn.Tanh(), model[2])
    with pytest.raises(
        InputError, match=r'0\.nonlinearity: requantisers made for "relu", the network has "none"'
    ):
        IntegerModel(other, integer_model.layers, integer_model.activations)
    fewer = {"0": integer_model.activations["0"]}
    with pytest.raises(InputError, match="2: has no activation scales"):
        IntegerModel(model, integer_model.layers, fewer)
    with pytest.raises(InputError, match="requantizer: missing"):
        IntegerModel(model, projected(model), integer_model.activations)


class WithDefault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.layer(x)
        return torch.relu(hidden) if mask is None else hidden * mask


@pytest.mark.filterwarnings("ignore:.*one-shot")
def test_arguments_with_a_default_have_that_value():
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    artifact = compress_network(
        WithDefault().eval(), inputs, CompressionConfig(block=(2, 2), exempt_first_last=False)
    )
    outputs = rebuild_integer(artifact, WithDefault)(inputs)
    assert outputs.min() >= 0
    torch.testing.assert_close(outputs, rebuild(artifact, WithDefault)(inputs), atol=0.1, rtol=0)
