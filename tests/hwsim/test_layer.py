"""Layers: geometry against loops over positions, type maps, refinement, the integer matrix, bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsim.errors import InputError
from hwsim.layer import (
    DENSE,
    PRUNED,
    UNIFIED,
    Layer,
    LayerShape,
    QuantizedWeights,
    check_types,
    random_layers,
    random_types,
    type_counts,
)
from tests.hwsim.reference import geometry
from tests.hwsim.strategies import layer_shapes, random_weights


def linear(outputs: int, inputs: int, name: str = "fc") -> LayerShape:
    return LayerShape(name, "linear", in_channels=inputs, out_channels=outputs)


def conv(**changes: Any) -> LayerShape:
    fields: dict[str, Any] = {
        "name": "conv",
        "kind": "conv",
        "in_channels": 4,
        "out_channels": 6,
        "input_size": (8, 8),
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "dilation": (1, 1),
    }
    return LayerShape(**(fields | changes))


# ---------------------------------------------------------------- geometry


@settings(deadline=None, max_examples=150)
@given(layer_shapes())
def test_gemm_follows_the_page(shape: LayerShape) -> None:
    geo = geometry(shape)
    assert (shape.m, shape.k, shape.groups) == (geo.m, geo.k, geo.groups)
    assert shape.n == len(geo.reached) * geo.width
    assert shape.weight_count == geo.groups * geo.m * geo.k
    assert shape.macs == shape.weight_count * shape.n


@pytest.mark.parametrize(
    ("shape", "output_size"),
    [
        (conv(), (8, 8)),
        (conv(stride=(2, 2)), (4, 4)),
        (conv(input_size=(7, 9), stride=(2, 3), padding=((0, 0), (0, 1))), (3, 3)),
        (conv(dilation=(3, 1), padding=((0, 0), (0, 0))), (2, 6)),
        (conv(input_size=(3, 3), padding=((0, 0), (0, 0))), (1, 1)),
        (LayerShape("fc", "linear", 3, 5, input_size=(7, 2), batch=4), (7, 2)),
    ],
)
def test_output_size(shape: LayerShape, output_size: tuple[int, ...]) -> None:
    assert shape.output_size == output_size


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": -1}, "out_channels"),
        ({"batch": 0}, "batch"),
        ({"groups": 0}, "groups"),
        ({"groups": 4}, "groups"),  # divides 4, not 6
        ({"kernel": (3,)}, "input_size"),
        ({"kernel": ()}, "kernel"),
        ({"kernel": (3, 0)}, "kernel"),
        ({"stride": (0, 1)}, "stride"),
        ({"stride": (1,)}, "stride"),
        ({"dilation": (1, 0)}, "dilation"),
        ({"padding": ((1, 1),)}, "padding"),
        ({"input_size": (8, 0)}, "input_size"),
        ({"input_size": (8, 8, 8)}, "input_size"),
        ({"input_size": (2, 8), "padding": ((0, 0), (0, 0))}, "input_size"),  # smaller than the kernel
        ({"kind": "linear"}, "kernel"),
    ],
)
def test_a_shape_that_is_none_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match="layer conv") as caught:
        conv(**changes)
    assert field in [problem.field for problem in caught.value.problems]


def test_every_problem_of_a_shape_is_named() -> None:
    with pytest.raises(InputError) as caught:
        conv(in_channels=0, batch=-1, stride=(0, 1))
    assert {problem.field for problem in caught.value.problems} == {"in_channels", "batch", "stride"}


def test_blocks_cover_the_matrix() -> None:
    assert linear(9, 8).blocks((4, 4)) == (3, 2)
    assert linear(8, 8).blocks((4, 4)) == (2, 2)
    assert linear(1, 1).blocks((16, 16)) == (1, 1)


# ---------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("types", "complaint"),
    [
        (np.full((1, 2, 2), 3, np.uint8), r"code 3 at \[0, 0, 0\]; allowed: 0 PRUNED, 1 UNIFIED, 2 DENSE"),
        (np.array([[[0, 1], [2, 255]]], np.uint8), r"code 255 at \[0, 1, 1\]"),
        (np.zeros((1, 2, 2)), "float64, must be uint8"),
        (np.zeros((1, 2, 2), np.int8), "int8, must be uint8"),
        (np.zeros((1, 2, 2), bool), "bool, must be uint8"),
        (np.zeros((2, 2), np.uint8), r"shape \(2, 2\), expected \(1, 2, 2\)"),
        (np.zeros((1, 2, 3), np.uint8), r"expected \(1, 2, 2\) for blocks \(4, 4\)"),
        (np.zeros((1, 0, 2), np.uint8), "expected"),
        ([[[0, 0], [0, 0]]], "list"),
        (None, "NoneType"),
    ],
)
def test_an_array_that_is_none_of_types_is_refused(types: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        Layer(linear(8, 8), (4, 4), types)


def test_an_empty_array_is_no_type_array() -> None:
    with pytest.raises(InputError, match=r"empty array of shape \(0, 3\)"):
        check_types(np.zeros((0, 3), np.uint8), "file.npy")


@pytest.mark.parametrize(
    ("blocks", "p", "u", "counts"),
    [
        (10, 0.3, 0.7, (3, 7)),  # p + u = 1 in decimal, though not in binary
        (10, 0.1, 0.2, (1, 2)),
        (100, 0.29, 0.0, (29, 0)),  # 0.29 * 100 is 28.999… in binary
        (7, 0.5, 0.5, (3, 4)),
        (7, 0.5, 0.4, (3, 2)),
        (3, 0.0, 0.0, (0, 0)),
        (3, 1.0, 0.0, (3, 0)),
        (3, 0.0, 1.0, (0, 3)),
        (1, 0.99, 0.0, (0, 0)),
    ],
)
def test_type_counts_are_decimal(blocks: int, p: float, u: float, counts: tuple[int, int]) -> None:
    assert type_counts(blocks, p, u) == counts


@pytest.mark.parametrize(
    ("p", "u", "field"),
    [
        (0.6, 0.5, "pruned + unified"),
        (0.5, 0.5000001, "pruned + unified"),
        (-0.1, 0.5, "pruned"),
        (0.5, 1.1, "unified"),
        (float("nan"), 0.5, "pruned"),
        (float("inf"), 0.0, "pruned"),
    ],
)
def test_ratios_outside_their_range_are_refused(p: float, u: float, field: str) -> None:
    with pytest.raises(InputError) as caught:
        type_counts(10, p, u)
    assert [problem.field for problem in caught.value.problems] == [field]


@settings(deadline=None, max_examples=60)
@given(layer_shapes(), st.sampled_from([(1, 1), (4, 4), (2, 3)]), st.integers(0, 9))
def test_random_types_have_exact_counts(shape: LayerShape, block: tuple[int, int], seed: int) -> None:
    types = random_types(shape, block, 0.4, 0.3, np.random.default_rng(seed))
    assert types.shape == (shape.groups, *shape.blocks(block))
    pruned, unified = type_counts(types.size, 0.4, 0.3)
    assert [int((types == code).sum()) for code in (PRUNED, UNIFIED)] == [pruned, unified]
    np.testing.assert_array_equal(types, random_types(shape, block, 0.4, 0.3, np.random.default_rng(seed)))


def test_random_layers_keep_a_map_whatever_stands_beside_it() -> None:
    shapes = [linear(40, 40, name) for name in "abcd"]
    all_four = random_layers(shapes, (4, 4), 0.5, 0.5, seed=3)
    assert (all_four[0].types == DENSE).all()
    assert (all_four[-1].types == DENSE).all()
    assert not (all_four[1].types == all_four[2].types).all()
    longer = random_layers([*shapes, linear(8, 8, "e")], (4, 4), 0.5, 0.5, seed=3)
    np.testing.assert_array_equal(all_four[1].types, longer[1].types)
    everything = random_layers(shapes, (4, 4), 0.5, 0.5, seed=3, exempt_first_last=False)
    assert not any((layer.types == DENSE).any() for layer in everything)


# ---------------------------------------------------------------- refinement and integers


@settings(deadline=None, max_examples=60)
@given(layer_shapes(), st.integers(0, 2**32 - 1), st.sampled_from([(2, 2), (1, 4), (4, 1), (4, 4), (2, 4)]))
def test_refinement_keeps_every_weight(shape: LayerShape, seed: int, native: tuple[int, int]) -> None:
    types = random_types(shape, (4, 4), 0.3, 0.4, np.random.default_rng(seed))
    coarse = random_weights(Layer(shape, (4, 4), types), seed)
    fine = coarse.at_native_block(native)
    assert fine.block == native
    assert fine.types.shape == (shape.groups, *shape.blocks(native))
    np.testing.assert_array_equal(fine.integer_matrix(), coarse.integer_matrix())


def test_refined_blocks_outside_the_matrix_do_not_exist() -> None:
    """5 x 9 in 8 x 8 blocks is 1 x 2 blocks; in 4 x 4 blocks 2 x 3, the fourth column would lie outside."""
    types = np.array([[[UNIFIED, DENSE]]], np.uint8)
    fine = Layer(linear(5, 9), (8, 8), types).at_native_block((4, 4))
    np.testing.assert_array_equal(fine.types, [[[1, 1, 2], [1, 1, 2]]])


@pytest.mark.parametrize("native", [(3, 4), (4, 3), (8, 4), (4, 8), (16, 16)])
def test_blocks_that_the_native_one_does_not_divide_are_refused(native: tuple[int, int]) -> None:
    layer = Layer(linear(8, 8), (4, 4), np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(
        InputError, match=f"blocks 4x4, which the machine's native block {native[0]}x{native[1]}"
    ):
        layer.at_native_block(native)


def test_the_integer_matrix_by_hand() -> None:
    weights = QuantizedWeights(
        dense=np.array([[[1, -2, 99, 99, 0], [3, -128, 99, 99, 0]]], np.int16),
        signs=np.array([[[1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]], np.uint8),
        magnitudes=np.array([[[7, 255, 4]]], np.uint16),
        weight_bits=8,
        magnitude_bits=8,
        step_size=0.5,
    )
    layer = Layer(linear(2, 5), (2, 2), np.array([[[DENSE, UNIFIED, UNIFIED]]], np.uint8), weights)
    np.testing.assert_array_equal(layer.integer_matrix(), [[[1, -2, 255, -255, 4], [3, -128, -255, 255, -4]]])
    pruned = replace(layer, types=np.zeros((1, 1, 3), np.uint8))
    assert not pruned.integer_matrix().any()


def test_a_layer_without_weights_has_no_integers() -> None:
    with pytest.raises(InputError, match="only block types are at hand"):
        Layer(linear(2, 2), (2, 2), np.zeros((1, 1, 1), np.uint8)).integer_matrix()
