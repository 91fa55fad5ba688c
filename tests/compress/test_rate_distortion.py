"""Coarser integers: chosen by loss and rate, within their bits, never touching the types."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.codec import encode_network
from compress.curvature import Curvature, curvatures
from compress.fit import compress
from compress.layers import CompressedLayer
from compress.quantize import dequantize
from compress.rate_distortion import (
    coarsen,
    coarsen_network,
    coarsen_within,
    refit_biases,
    round_biases,
    round_to_step,
)
from compress.rules import CompressionConfig, Recipe
from hwsim.errors import InputError
from hwsim.layer import DENSE, PRUNED, UNIFIED
from tests.compress.random_layers import make_layer


def weights_of(layer: CompressedLayer) -> np.ndarray:
    groups, m, k = layer.weights.dense.shape
    return dequantize(layer, (groups * m, k)).numpy().reshape(groups, m, k)


def random_curvature(layer: CompressedLayer, seed: int) -> Curvature:
    groups, m, k = layer.weights.dense.shape
    random = np.random.default_rng(seed)
    return Curvature(
        np.exp(random.normal(size=(groups, m, 1))), np.exp(random.normal(size=(groups, 1, k))), 0.1
    )


LAYERS = st.builds(
    make_layer,
    st.just("fc"),
    st.integers(1, 2),
    st.integers(1, 30),
    st.integers(1, 30),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.3, 0.3, 0.4)]),
    st.integers(0, 2**32 - 1),
    weight_bits=st.just(12),
    magnitude_bits=st.just(12),
    spread=st.sampled_from([0.0, 3.0, 300.0]),
)


@settings(deadline=None, max_examples=60)
@given(LAYERS, st.integers(-12, 0), st.integers(2, 8), st.integers(2, 8))
def test_types_stay_and_integers_fit(
    layer: CompressedLayer, decades: int, weight_bits: int, magnitude_bits: int
) -> None:
    curvature = random_curvature(layer, 1)
    coarse = coarsen(layer, curvature, 10.0**decades, weight_bits=weight_bits, magnitude_bits=magnitude_bits)
    assert np.array_equal(coarse.types, layer.types)
    weights, (_, m, k), (g_o, g_k) = coarse.weights, layer.weights.dense.shape, layer.block
    per_weight = np.repeat(np.repeat(layer.types, g_o, 1), g_k, 2)[:, :m, :k]
    assert not weights.dense[per_weight != DENSE].any()
    assert not weights.magnitudes[layer.types != UNIFIED].any()
    assert -(1 << (weight_bits - 1)) <= weights.dense.min() <= weights.dense.max() < 1 << (weight_bits - 1)
    assert weights.magnitudes.max() < 1 << magnitude_bits
    assert weights.step_size == np.float32(weights.step_size) > 0
    large = np.repeat(np.repeat(weights.magnitudes > 0, g_o, 1), g_k, 2)[:, :m, :k]
    assert np.array_equal(weights.signs, layer.weights.signs * large)
    assert not weights_of(coarse)[per_weight == PRUNED].any()


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([(0, 1, 0), (0.5, 0.5, 0), (0, 0, 1), (0.5, 0.25, 0.25)]), st.integers(0, 1000))
def test_a_dearer_bit_makes_a_smaller_file_with_more_loss(
    shares: tuple[float, float, float], seed: int
) -> None:
    layer = make_layer("fc", 1, 64, 80, (4, 4), shares, seed, weight_bits=14, magnitude_bits=14, spread=200)
    curvature = random_curvature(layer, seed)
    sizes, losses = [], []
    for multiplier in (1e-4, 1e-2, 1.0):
        coarse = coarsen(layer, curvature, multiplier, weight_bits=8, magnitude_bits=8)
        sizes.append(len(encode_network({"fc": coarse}, {"fc": (64, 80)}, {})))
        losses.append(float((curvature.full() * (weights_of(coarse) - weights_of(layer)) ** 2).sum()))
    # At the first two the 8 bits may bind, and nothing but the tables differs.
    assert sizes[2] < sizes[1] <= 1.02 * sizes[0]
    assert losses[0] <= 1.05 * losses[1] < losses[2]


def test_high_rate_error_is_that_of_a_uniform_grid() -> None:
    """At high rate the mean squared error is λ / (h ln 2) where the best step may be taken, so 8 bits in 4 decades of λ."""
    layer = make_layer("fc", 1, 300, 300, (4, 4), (0, 0, 1), 0, weight_bits=16, spread=400)
    for multiplier, h in itertools.product((1e-2, 1e-1), (1.0, 5.0)):
        coarse = coarsen(layer, Curvature.constant(1, 300, 300, h), multiplier, weight_bits=16)
        error = float(((weights_of(coarse) - weights_of(layer)) ** 2).mean())
        assert error == pytest.approx(multiplier / (h * np.log(2)), rel=0.6)


def test_precision_goes_where_the_loss_is_curved() -> None:
    layer = make_layer("fc", 1, 64, 64, (4, 4), (0, 0, 1), 4, weight_bits=14, spread=300)
    columns = np.where(np.arange(64) < 32, 100.0, 0.01)[None, None]
    curvature = Curvature(np.ones((1, 64, 1)), columns, 1e-6)
    error = (weights_of(coarsen(layer, curvature, 0.3, weight_bits=8)) - weights_of(layer)) ** 2
    assert error[:, :, :32].mean() < error[:, :, 32:].mean() / 10


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("nan"), float("inf")])
def test_a_multiplier_must_be_positive(multiplier: float) -> None:
    layer = make_layer("fc", 1, 4, 4, (4, 4), (0, 0, 1), 0)
    with pytest.raises(InputError, match="multiplier"):
        coarsen(layer, Curvature.constant(1, 4, 4), multiplier)


@settings(deadline=None, max_examples=40)
@given(LAYERS, st.floats(1e-6, 10), st.integers(2, 8), st.integers(2, 8))
def test_rounding_to_a_step_is_nearest_and_never_clips(
    layer: CompressedLayer, factor: float, weight_bits: int, magnitude_bits: int
) -> None:
    asked = factor * layer.weights.step_size
    found = round_to_step(layer, asked, weight_bits=weight_bits, magnitude_bits=magnitude_bits)
    step, exact = found.weights.step_size, weights_of(layer)
    assert step >= np.float32(asked)
    assert np.array_equal(found.types, layer.types)
    assert (np.abs(weights_of(found) - exact) <= 0.5 * step * (1 + 1e-5) + 1e-6 * np.abs(exact)).all()
    # A larger step than asked for is the smallest at which the largest value fits its bits.
    highs = ((1 << (weight_bits - 1)) - 1, (1 << magnitude_bits) - 1)
    tops = np.abs(found.weights.dense).max(initial=0), found.weights.magnitudes.max(initial=0)
    if step > np.float32(asked):
        assert any(top == high for top, high in zip(tops, highs, strict=True))


def test_a_step_must_be_positive() -> None:
    layer = make_layer("fc", 1, 4, 4, (4, 4), (0, 0, 1), 0)
    for step in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="step"):
            round_to_step(layer, step)


# --- networks


def trained() -> tuple[nn.Module, dict[str, CompressedLayer], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 8
    inputs = torch.eye(8)[labels] * 2 + 0.5 * torch.randn(512, 8, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        config = CompressionConfig(block=(2, 2), pruned=0.4, unified=0.4, exempt_first_last=False)
        result = compress(model, config, (inputs, labels), Recipe(epochs_admm=2, epochs_retrain=4))
    return model.eval(), result.layers, inputs, labels


def loss_of(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(inputs), labels))


def test_curvature_of_a_softmax_is_its_closed_form() -> None:
    """One linear layer: the diagonal at (o, i) is the mean of x_i² p_o (1 − p_o); equal inputs make it rank one."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 4)).eval()
    layer = make_layer("0", 1, 4, 5, (2, 2), (0, 0, 1), 0)
    inputs = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0]]).repeat(8_000, 1)
    found = curvatures(model, {"0": layer}, inputs, batch_size=4)["0"]
    shares = model(inputs[:1]).softmax(1)[0].detach().double()
    exact = (shares * (1 - shares))[:, None].numpy() * (inputs[0].double() ** 2).numpy()
    assert np.allclose(found.full()[0] - found.floor, exact, rtol=0.12, atol=1e-6)


def test_the_budget_is_kept_and_used() -> None:
    model, layers, inputs, labels = trained()
    round_biases(model, layers)
    before, sizes = loss_of(model, inputs, labels), []
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in layers}
    for budget in (0.002, 0.05):
        tried = copy.deepcopy(model)
        coarse, multiplier = coarsen_within(tried, layers, inputs, labels, budget)
        assert multiplier > 0
        assert loss_of(tried, inputs, labels) <= before + budget + 1e-6
        for name, layer in coarse.items():
            assert torch.equal(tried.get_submodule(name).weight, dequantize(layer, shapes[name]))
        sizes.append(len(encode_network(coarse, shapes, {})))
    assert sizes[1] < sizes[0] < len(encode_network(layers, shapes, {}))


def test_a_budget_must_be_positive() -> None:
    model, layers, inputs, labels = trained()
    with pytest.raises(InputError, match="max_loss"):
        coarsen_within(model, layers, inputs, labels, 0.0)


def test_refitted_biases_lower_the_loss_and_leave_the_weights() -> None:
    model, layers, inputs, labels = trained()
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in layers}
    curvature = curvatures(model, layers, inputs)
    coarse = coarsen_network(model, layers, curvature, 3e-3, inputs)
    before = loss_of(model, inputs, labels)
    refit_biases(model, coarse, inputs, labels, epochs=10, lr=0.02)
    assert loss_of(model, inputs, labels) < before
    for name, layer in coarse.items():
        assert torch.equal(model.get_submodule(name).weight, dequantize(layer, shapes[name]))
        bias = model.get_submodule(name).bias.detach() * 4096
        assert torch.equal(bias, bias.round())
        assert model.get_submodule(name).bias.grad is None


def test_layers_keep_their_bits_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer("fc", 1, 16, 16, (4, 4), (0.3, 0.3, 0.4), 0, weight_bits=5, magnitude_bits=6)
    coarse = coarsen(replace(layer, name="fc"), Curvature.constant(1, 16, 16), 1e-6)
    assert (coarse.weights.weight_bits, coarse.weights.magnitude_bits) == (5, 6)


@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_parts_of_a_curvature_are_those_of_the_whole(groups: int, m: int, k: int, g_o: int, g_k: int) -> None:
    random = np.random.default_rng(0)
    curvature = Curvature(random.random((groups, m, 1)), random.random((groups, 1, k)), 0.25)
    full, mask = curvature.full(), random.random((groups, m, k)) < 0.5
    assert np.allclose(curvature.at(mask), full[mask])
    sums, entries = curvature.of_blocks((g_o, g_k))
    for index in np.ndindex(sums.shape):
        group, row, column = index
        part = full[group, row * g_o : (row + 1) * g_o, column * g_k : (column + 1) * g_k]
        assert sums[index] == pytest.approx(part.sum())
        assert entries[index] == part.size
