"""The memory image: read back by the reference's own reader, by hand to the byte, sizes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwsim.errors import InputError
from hwsim.image import PARTS, ImageSizes, image_sizes, memory_image
from hwsim.layer import (
    DENSE,
    PRUNED,
    STREAMS,
    UNIFIED,
    Layer,
    LayerShape,
    QuantizedWeights,
    Requantizer,
    random_types,
)
from hwsim.lowering import effective_counts
from hwsim.machine import Machine, load_machine
from tests.hwsim import reference
from tests.hwsim.strategies import layers_on_machines, random_weights, small_machine


def sizes_of(layer: Layer, machine: Machine) -> ImageSizes:
    native = layer.at_native_block(machine.array.block)
    return image_sizes(effective_counts(native.types, machine), layer.shape.m, machine)


def read(image: bytes, layer: Layer, machine: Machine) -> reference.Decoded:
    """Read an image with what a loader knows of the layer: its geometry, its streams and the bits of a type code."""
    types = reference.converted(layer.types.tolist(), machine)
    code_bits = reference.type_bits(types, machine)
    bits = [reference.block_row_bits(row, code_bits, machine) for group in types for row in group]
    present = [name for stream, name in enumerate(STREAMS) if any(row[stream] for row in bits)]
    return reference.read_image(image, layer.shape, machine, present, code_bits)


def linear(outputs: int, inputs: int) -> LayerShape:
    return LayerShape("fc", "linear", in_channels=inputs, out_channels=outputs)


def tiny(
    types: list[list[int]], matrix: list[list[int]], requantizer: Requantizer | None = None
) -> tuple[Layer, np.ndarray]:
    """A linear layer in 2 x 2 blocks from its types and its integer matrix."""
    values = np.array([matrix])
    block_types = np.array([types], np.uint8)
    per_weight = np.repeat(np.repeat(block_types, 2, axis=1), 2, axis=2)[
        :, : values.shape[1], : values.shape[2]
    ]
    padded = np.zeros((1, 2 * len(types), 2 * len(types[0])), np.int64)
    padded[:, : values.shape[1], : values.shape[2]] = values
    blocks = np.abs(padded).reshape(1, len(types), 2, len(types[0]), 2).max(axis=(2, 4))
    weights = QuantizedWeights(
        dense=np.where(per_weight == DENSE, values, 0).astype(np.int16),
        signs=((per_weight == UNIFIED) & (values < 0)).astype(np.uint8),
        magnitudes=np.where(block_types == UNIFIED, blocks, 0).astype(np.uint16),
        weight_bits=8,
        magnitude_bits=8,
        step_size=1.0,
        requantizer=requantizer,
    )
    return Layer(linear(*values.shape[1:]), (2, 2), block_types, weights), values


# ---------------------------------------------------------------- read back


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(layers_on_machines(), st.integers(0, 2**32 - 1), st.booleans())
def test_an_image_reads_back_to_the_integers(
    case: tuple[Layer, Machine], seed: int, calibrated: bool
) -> None:
    bare, machine = case
    precision = machine.precision
    if not machine.features.unified_path:
        # A converted magnitude has to fit the dense format.
        precision = precision.model_copy(update={"magnitude_bits": precision.weight_bits - 1})
    layer = random_weights(
        bare,
        seed,
        weight_bits=precision.weight_bits,
        magnitude_bits=min(precision.magnitude_bits, machine.precision.magnitude_bits),
        requantizer=calibrated,
    )
    image = memory_image(layer, machine)
    decoded = read(image, layer, machine)
    sizes = sizes_of(layer, machine)
    assert len(image) == sizes.total_bytes == sum(sizes.part_bytes.values()) == decoded.size_bytes
    np.testing.assert_array_equal(decoded.weights, layer.integer_matrix())
    assert decoded.types == reference.converted(layer.types.tolist(), machine)
    assert decoded.padding_is_zero
    if machine.features.row_balance == "sorted":
        assert decoded.order == [reference.execution_order(group, machine) for group in decoded.types]
    else:
        assert decoded.order is None
    assert layer.weights is not None
    requantizer = layer.weights.requantizer
    channels = layer.shape.out_channels
    if requantizer is None:
        assert (decoded.bias, decoded.scale, decoded.shift) == (
            [0] * channels,
            [1] * channels,
            [0] * channels,
        )
    else:
        assert decoded.bias == requantizer.bias.tolist()
        assert decoded.scale == requantizer.scale.tolist()
        assert decoded.shift == requantizer.shift.tolist()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(layers_on_machines())
def test_sizes_follow_the_page(case: tuple[Layer, Machine]) -> None:
    layer, machine = case
    types = reference.converted(layer.types.tolist(), machine)
    code_bits = reference.type_bits(types, machine)
    bits = np.array([[reference.block_row_bits(row, code_bits, machine) for row in group] for group in types])
    sizes = sizes_of(layer, machine)
    assert sizes.stream_bits == dict(zip(STREAMS, bits.sum(axis=(0, 1)).tolist(), strict=True))
    np.testing.assert_array_equal(sizes.stream_bytes, -(-bits // 8))
    block_rows = layer.types.shape[0] * layer.types.shape[1]
    assert sizes.part_bytes["offset"] == 4 * block_rows * int((bits.sum(axis=(0, 1)) > 0).sum())
    assert sizes.part_bytes["order"] == (2 * block_rows if machine.features.row_balance == "sorted" else 0)
    assert sizes.part_bytes["channel"] == 7 * layer.shape.out_channels
    assert tuple(sizes.part_bytes) == PARTS


# ---------------------------------------------------------------- by hand


def test_an_image_by_hand() -> None:
    """Two block rows of two 2 x 2 blocks, every type once and one more UNIFIED block."""
    requantizer = Requantizer(
        bias=np.array([1, -1, 256, 0], np.int32),
        scale=np.array([1, -2, 3, 4], np.int16),
        shift=np.array([0, 5, 255, 7], np.uint8),
    )
    layer, _ = tiny(
        [[DENSE, UNIFIED], [PRUNED, UNIFIED]],
        [[1, -1, 9, -9], [-128, 127, -9, 9], [0, 0, -3, -3], [0, 0, 3, -3]],
        requantizer,
    )
    image = memory_image(layer, small_machine())
    offsets = [60, 62, 64, 66, 61, 63, 65, 70]  # type, sign, magnitude, dense of row 0, then of row 1
    channels = bytes.fromhex("01000000010000 fffffffffeff05 000100000300ff 00000000040007")
    streams = bytes(
        [
            0b0110,  # types of row 0: DENSE (2) in the low bits, then UNIFIED (1)
            0b0100,  # row 1: PRUNED, UNIFIED
            0b0110,  # signs of row 0: +, -, -, +, the first in bit 0
            0b1011,  # row 1: -, -, +, -
            9,
            3,
            *(1, 255, 128, 127),  # dense weights, two's complement
        ]
    )
    assert image == np.array(offsets, "<u4").tobytes() + channels + streams


def test_a_sorted_machine_stores_its_order_between_offsets_and_channels() -> None:
    layer, _ = tiny([[PRUNED], [DENSE]], [[0, 0], [0, 0], [1, 2], [3, 4]])
    image = memory_image(layer, small_machine(features__row_balance="sorted"))
    assert image[:16] == np.array([48, 50, 49, 50], "<u4").tobytes()
    assert image[16:20] == np.array([1, 0], "<u2").tobytes()
    assert image[20:48] == bytes([0, 0, 0, 0, 1, 0, 0]) * 4
    assert image[48:] == bytes([0, 2, 1, 2, 3, 4])


def test_types_take_one_bit_where_no_block_is_dense() -> None:
    layer, _ = tiny([[UNIFIED, PRUNED, UNIFIED]], [[5, 5, 0, 0, 1, 1], [5, 5, 0, 0, 1, 1]])
    image = memory_image(layer, small_machine())
    assert len(image) == 3 * 4 + 2 * 7 + 1 + 1 + 2
    assert image[-4:] == bytes([0b101, 0, 5, 1])


def test_a_dense_machine_stores_no_types() -> None:
    layer, _ = tiny([[UNIFIED, PRUNED]], [[5, -5, 0, 0], [-5, 5, 0, 0]])
    machine = small_machine(features__skip_pruned=False, features__unified_path=False)
    image = memory_image(layer, machine)
    assert image[:4] == np.array([18], "<u4").tobytes()
    assert image[18:] == bytes([5, 251, 251, 5, 0, 0, 0, 0])


def test_a_layer_without_blocks_is_all_type_codes() -> None:
    layer, _ = tiny([[PRUNED] * 9], [[0] * 17])
    image = memory_image(layer, small_machine())
    assert image == np.array([11], "<u4").tobytes() + bytes([0, 0, 0, 0, 1, 0, 0]) + bytes(2)


def test_ragged_positions_are_stored_as_zero() -> None:
    """A 1 x 3 matrix in 2 x 2 blocks: of each block half or three quarters are padding."""
    layer, _ = tiny([[DENSE, UNIFIED]], [[7, 8, -4]])
    image = memory_image(layer, small_machine())
    assert image[-7:] == bytes([0b0110, 0b0001, 4, 7, 8, 0, 0])


def test_bits_per_weight_of_the_closed_form() -> None:
    """4 x 4 blocks, half pruned and half unified, 8-bit magnitudes: 1/16 + (1 + 8/16) / 2 = 0.8125 bits a weight.

    Offsets, channel parameters and byte padding come on top: 1,024 rows of 256 blocks, so no stream but the magnitudes and
    signs' own sizes needs padding.
    """
    shape = linear(4096, 1024)
    machine = load_machine("msa-16x16")
    layer = Layer(shape, (4, 4), random_types(shape, (4, 4), 0.5, 0.5, np.random.default_rng(5)))
    sizes = sizes_of(layer, machine)
    stream_bytes = sum(sizes.part_bytes[name] for name in STREAMS)
    assert stream_bytes * 8 == 0.8125 * shape.weight_count
    assert sizes.total_bytes == stream_bytes + 1024 * 3 * 4 + 4096 * 7


# ---------------------------------------------------------------- refusals


def refused(layer: Layer, machine: Machine, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        memory_image(layer, machine)
    for word in words:
        assert word in str(caught.value)


def test_a_layer_without_weights_has_no_image() -> None:
    refused(
        Layer(linear(2, 2), (2, 2), np.zeros((1, 1, 1), np.uint8)), small_machine(), "layer fc", "weights"
    )


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_magnitude_one_too_large_is_refused(bits: int) -> None:
    top = 2**bits - 1
    machine = small_machine(precision__magnitude_bits=bits)
    fits, _ = tiny([[UNIFIED]], [[top, -top], [top, top]])
    memory_image(fits, machine)
    wide, _ = tiny([[UNIFIED]], [[top + 1, -top - 1], [top + 1, top + 1]])
    refused(
        wide, machine, "layer fc on machine small", f"{top + 1} needs more than", f"{bits} magnitude_bits"
    )


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_dense_weight_one_too_large_is_refused(bits: int, sign: int) -> None:
    top = 2 ** (bits - 1) - 1 if sign > 0 else 2 ** (bits - 1)
    machine = small_machine(precision__weight_bits=bits)
    fits, matrix = tiny([[DENSE]], [[0, sign * top], [0, 0]])
    assert read(memory_image(fits, machine), fits, machine).weights == matrix.tolist()
    wide, _ = tiny([[DENSE]], [[0, sign * (top + 1)], [0, 0]])
    refused(wide, machine, f"{sign * (top + 1)} is outside [{-(2 ** (bits - 1))}, {2 ** (bits - 1) - 1}]")


@pytest.mark.parametrize("skip_pruned", [True, False])
def test_a_converted_magnitude_has_to_fit_the_dense_format(skip_pruned: bool) -> None:
    machine = small_machine(features__unified_path=False, features__skip_pruned=skip_pruned)
    fits, matrix = tiny([[UNIFIED, PRUNED]], [[127, -127, 0, 0], [127, 127, 0, 0]])
    assert read(memory_image(fits, machine), fits, machine).weights == matrix.tolist()
    wide, _ = tiny([[UNIFIED, PRUNED]], [[128, 128, 0, 0], [128, 128, 0, 0]])
    refused(wide, machine, "128 is outside [-128, 127]", "unified_path on")
    # -128 fits: only what the block holds counts.
    negative, matrix = tiny([[UNIFIED, PRUNED]], [[-128, -128, 0, 0], [-128, -128, 0, 0]])
    assert read(memory_image(negative, machine), negative, machine).weights == matrix.tolist()


def test_both_range_problems_are_named_at_once() -> None:
    layer, _ = tiny([[UNIFIED, DENSE]], [[256, 256, 200, 0], [256, 256, 0, 0]])
    refused(layer, small_machine(), "2 problems", "256 needs more", "200 is outside")


def test_blocks_that_do_not_divide_are_refused() -> None:
    layer, _ = tiny([[UNIFIED]], [[1, 1], [1, 1]])
    refused(layer, small_machine(array__block=[4, 2]), "blocks 2x2", "4x2", "array.block")


def test_refined_blocks_carry_a_magnitude_each() -> None:
    """A 4 x 4 block on a 2 x 2 machine: four native blocks, the same magnitude in each."""
    types = np.array([[[UNIFIED]]], np.uint8)
    signs = np.eye(4, dtype=np.uint8)[None]
    weights = QuantizedWeights(np.zeros((1, 4, 4), np.int16), signs, np.array([[[6]]], np.uint16), 8, 8, 1.0)
    layer = Layer(linear(4, 4), (4, 4), types, weights)
    image = memory_image(layer, small_machine())
    fine = layer.at_native_block((2, 2))
    decoded = read(image, fine, small_machine())
    assert decoded.types == [[[UNIFIED, UNIFIED], [UNIFIED, UNIFIED]]]
    np.testing.assert_array_equal(decoded.weights[0], np.where(np.eye(4), -6, 6))
    assert image[-4:] == bytes([6] * 4)


def test_column_order_does_not_change_the_image() -> None:
    """A layer in channel_major order is stored with its columns in that order: the expander walks the input accordingly."""
    kwargs: dict[str, Any] = {"in_channels": 3, "out_channels": 2, "kernel": (2,), "input_size": (5,)}
    shape = LayerShape("conv", "conv", stride=(1,), padding=((0, 0),), dilation=(1,), **kwargs)
    types = np.array([[[DENSE, UNIFIED, PRUNED]]], np.uint8)
    layer = random_weights(Layer(shape, (2, 2), types), 3)
    other = replace(layer, column_order="channel_major")
    assert memory_image(layer, small_machine()) == memory_image(other, small_machine())
