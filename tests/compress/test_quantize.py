"""Step size, straight-through rounding, and integers that mean exactly what training saw."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.blocks import expand_blocks
from compress.layers import CompressedLayer
from compress.quantize import choose_step_size, dequantize, fake_quantize, quantize_blocks, weight_range
from hwsim.layer import DENSE, PRUNED, UNIFIED, Layer, LayerShape

BLOCK = (2, 3)


def case(seed, m=5, k=7, groups=2):
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, -(-m // BLOCK[0]), -(-k // BLOCK[1]))
    types = torch.randint(0, 3, shape, generator=generator, dtype=torch.uint8)
    dense = torch.randn(groups, m, k, generator=generator)
    magnitudes = torch.rand(shape, generator=generator)
    return dense, torch.rand(groups, m, k, generator=generator) < 0.5, magnitudes, types


@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(2, 8))
@settings(deadline=None, max_examples=40)
def test_integers_are_in_range_unused_entries_zero_and_equal_to_what_training_saw(
    seed, weight_bits, magnitude_bits
):
    dense, negative, magnitudes, types = case(seed)
    step = choose_step_size(dense, magnitudes, types, BLOCK, weight_bits, magnitude_bits)
    integers = quantize_blocks(dense, negative, magnitudes, types, BLOCK, step, weight_bits, magnitude_bits)
    assert (integers.dense.dtype, integers.signs.dtype, integers.magnitudes.dtype) == (
        "int16",
        "uint8",
        "uint16",
    )
    per_weight = expand_blocks(types, BLOCK, 5, 7).numpy()
    assert not integers.dense[per_weight != DENSE].any()
    assert not integers.signs[per_weight != UNIFIED].any()
    assert not integers.magnitudes[types.numpy() != UNIFIED].any()
    low, high = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    assert integers.dense.min() >= low
    assert integers.dense.max() <= high
    assert integers.magnitudes.max() < 2**magnitude_bits
    scale = torch.tensor(step)
    shared = expand_blocks(fake_quantize(magnitudes, scale, 0, 2**magnitude_bits - 1), BLOCK, 5, 7)
    shared = torch.where(negative, -shared, shared)
    expected = torch.where(torch.from_numpy(per_weight == UNIFIED), shared, torch.zeros(()))
    expected = torch.where(
        torch.from_numpy(per_weight == DENSE), fake_quantize(dense, scale, low, high), expected
    )
    layer = CompressedLayer("layer", BLOCK, "channel_major", types.numpy(), integers)
    assert torch.equal(dequantize(layer, (10, 7)).reshape(2, 5, 7), expected)


def test_dequantised_weights_are_the_hardware_integers_times_the_step():
    dense, negative, magnitudes, types = case(1, m=4, k=18)
    integers = quantize_blocks(dense, negative, magnitudes, types, BLOCK, 0.1, 8, 8)
    layer = CompressedLayer("conv", BLOCK, "tap_major", types.numpy(), integers)
    weight = dequantize(layer, (8, 2, 3, 3))
    shape = LayerShape("conv", "conv", 4, 8, (5, 5), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), groups=2)
    matrix = layer.on_hardware(shape).integer_matrix()
    assert isinstance(layer.on_hardware(shape), Layer)
    as_weight = matrix.reshape(2, 4, 9, 2).transpose(0, 1, 3, 2).reshape(8, 2, 3, 3)
    assert np.array_equal(weight.numpy(), as_weight.astype(np.float32) * np.float32(0.1))


def test_a_magnitude_that_rounds_to_zero_stays_unified_with_its_signs():
    types = torch.tensor([[[UNIFIED, UNIFIED]]], dtype=torch.uint8)
    negative = torch.tensor([[[True, False, True, True]]])
    integers = quantize_blocks(
        torch.zeros(1, 1, 4), negative, torch.tensor([[[0.04, 1.0]]]), types, (1, 2), 0.1, 8, 8
    )
    assert integers.magnitudes.tolist() == [[[0, 10]]]
    assert integers.signs.tolist() == [[[1, 0, 1, 1]]]
    layer = CompressedLayer("layer", (1, 2), "tap_major", types.numpy(), integers)
    weight = dequantize(layer, (1, 4))
    assert weight.tolist() == [[0.0, 0.0, -1.0, -1.0]]
    assert not torch.signbit(weight[0, :2]).any()


def test_gradients_pass_straight_through_and_rounding_is_half_to_even():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, 300.0, -300.0], requires_grad=True)
    quantized = fake_quantize(values, torch.tensor(1.0), -128, 127)
    assert quantized.tolist() == [0.0, 2.0, 2.0, 0.0, 127.0, -128.0]
    quantized.backward(torch.arange(6.0))
    assert values.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(("bits", "expected"), [(2, (-2, 1)), (8, (-128, 127))])
def test_ranges_are_those_of_twos_complement(bits, expected):
    assert weight_range(bits) == expected


def squared_error(dense, magnitudes, types, step, bits):
    low, high = weight_range(bits)
    per_weight = expand_blocks(types, BLOCK, dense.shape[1], dense.shape[2])
    shared = expand_blocks(magnitudes, BLOCK, dense.shape[1], dense.shape[2])
    on_dense = dense - (dense / step).round().clamp(low, high) * step
    on_shared = shared - (shared / step).round().clamp(0, 2**bits - 1) * step
    return float(
        on_dense[per_weight == DENSE].square().sum() + on_shared[per_weight == UNIFIED].square().sum()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_step_is_never_worse_than_fitting_the_range_and_near_the_best(bits):
    dense, _, magnitudes, types = case(5, m=40, k=60)
    types[:] = torch.where(types == PRUNED, UNIFIED, types)
    step = choose_step_size(dense, magnitudes, types, BLOCK, bits, bits)
    per_weight = expand_blocks(types, BLOCK, 40, 60)
    fitted = float(
        max(
            dense[per_weight == DENSE].abs().max() / (2 ** (bits - 1) - 1),
            magnitudes[types == UNIFIED].max() / (2**bits - 1),
        )
    )
    error = squared_error(dense, magnitudes, types, step, bits)
    assert error <= squared_error(dense, magnitudes, types, fitted, bits) * (1 + 1e-6)
    best = min(
        squared_error(dense, magnitudes, types, fitted * s, bits) for s in np.linspace(0.03, 1.2, 1000)
    )
    assert error <= best * 1.1
    if bits == 2:
        assert error < 0.7 * squared_error(dense, magnitudes, types, fitted, bits)


def test_large_layers_are_sampled_and_get_about_the_same_step():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 400, 300, generator=generator)
    types = torch.full((1, 200, 100), DENSE, dtype=torch.uint8)
    step = choose_step_size(dense, torch.zeros(1, 200, 100), types, BLOCK, 4, 8)
    assert step == pytest.approx(0.335, rel=0.08)  # the best 16-level uniform step of a normal variable


@pytest.mark.parametrize("code", [PRUNED, UNIFIED, DENSE])
def test_a_layer_of_zeros_has_a_step_of_one(code):
    types = torch.full((1, 1, 1), code, dtype=torch.uint8)
    assert choose_step_size(torch.zeros(1, 2, 3), torch.zeros(1, 1, 1), types, BLOCK, 8, 8) == 1.0


def test_the_step_is_a_normal_float32_even_for_the_smallest_weights():
    types = torch.full((1, 1, 1), DENSE, dtype=torch.uint8)
    step = choose_step_size(torch.full((1, 2, 3), 1e-40), torch.zeros(1, 1, 1), types, BLOCK, 8, 8)
    assert step == float(np.float32(step)) >= np.finfo(np.float32).tiny


def test_entries_of_other_types_do_not_move_the_step():
    dense, _, magnitudes, types = case(2)
    step = choose_step_size(dense, magnitudes, types, BLOCK, 8, 8)
    per_weight = expand_blocks(types, BLOCK, 5, 7)
    dense = torch.where(per_weight == DENSE, dense, 1e6)
    magnitudes = torch.where(types == UNIFIED, magnitudes, 1e6)
    assert choose_step_size(dense, magnitudes, types, BLOCK, 8, 8) == step
