"""The block view against plain loops over indices."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.blocks import (
    block_sums,
    blocks_to_matrix,
    expand_blocks,
    matrix_to_blocks,
    matrix_to_weight,
    real_entries,
    weight_to_matrix,
)

BLOCKS = st.tuples(st.integers(1, 5), st.integers(1, 5))
SIZES = st.integers(1, 9)


@st.composite
def weights(draw):
    """A weight of distinct numbers with its groups: Linear, Conv1d/2d/3d, grouped and depthwise."""
    groups = draw(st.integers(1, 3))
    rank = draw(st.integers(0, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * rank))
    shape = (groups * draw(st.integers(1, 4)), draw(st.integers(1, 4)), *kernel)
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape), groups


@given(weights())
@settings(deadline=None)
def test_tap_major_puts_the_input_channel_fastest(case):
    weight, groups = case
    matrix = weight_to_matrix(weight, groups, "tap_major")
    out_channels, in_channels, *kernel = weight.shape
    m = out_channels // groups
    for o, c in itertools.product(range(out_channels), range(in_channels)):
        for tap, position in enumerate(itertools.product(*map(range, kernel))):
            assert matrix[o // m, o % m, tap * in_channels + c] == weight[(o, c, *position)]


@given(weights())
@settings(deadline=None)
def test_channel_major_keeps_the_order_of_the_weight(case):
    weight, groups = case
    matrix = weight_to_matrix(weight, groups, "channel_major")
    assert torch.equal(matrix.flatten(), weight.flatten())
    assert matrix.shape[0] == groups


@given(weights(), st.sampled_from(["tap_major", "channel_major"]))
@settings(deadline=None)
def test_matrix_and_weight_are_inverse(case, order):
    weight, groups = case
    back = matrix_to_weight(weight_to_matrix(weight, groups, order), tuple(weight.shape), order)
    assert torch.equal(back, weight)
    assert back.is_contiguous()


@given(st.integers(1, 3), SIZES, SIZES, BLOCKS)
@settings(deadline=None)
def test_blocks_hold_the_real_entries_and_zeros(groups, m, k, block):
    matrix = torch.arange(1.0, 1 + groups * m * k).reshape(groups, m, k)
    blocks = matrix_to_blocks(matrix, block)
    m_blocks, k_blocks = -(-m // block[0]), -(-k // block[1])
    assert blocks.shape == (groups, m_blocks, block[0], k_blocks, block[1])
    for g, i, o, j, c in itertools.product(*map(range, blocks.shape)):
        row, column = i * block[0] + o, j * block[1] + c
        assert blocks[g, i, o, j, c] == (matrix[g, row, column] if row < m and column < k else 0)
    assert torch.equal(blocks_to_matrix(blocks, m, k), matrix)


@given(SIZES, SIZES, BLOCKS)
@settings(deadline=None)
def test_counts_of_real_entries_are_sums_of_ones(m, k, block):
    counts = real_entries(m, k, block)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.double(), block_sums(torch.ones(1, m, k, dtype=torch.float64), block)[0])
    assert int(counts.sum()) == m * k
    assert int(counts.min()) >= 1


@given(st.integers(1, 2), SIZES, SIZES, BLOCKS)
@settings(deadline=None)
def test_expanding_and_summing_multiply_by_the_real_entries(groups, m, k, block):
    shape = (groups, -(-m // block[0]), -(-k // block[1]))
    values = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    expanded = expand_blocks(values, block, m, k)
    assert expanded.shape == (groups, m, k)
    assert torch.equal(block_sums(expanded, block), values * real_entries(m, k, block))


@pytest.mark.parametrize(("m", "expected"), [(7, 2), (8, 2), (9, 3)])
def test_a_block_row_begins_right_after_the_last_full_one(m, expected):
    assert matrix_to_blocks(torch.zeros(1, m, 4), (4, 4)).shape[1] == expected


def test_a_block_does_not_mix_taps_where_the_channels_fill_it():
    weight = torch.zeros(4, 8, 3, 3)
    weight[:, :, 1, 2] = 1
    sums = block_sums(weight_to_matrix(weight, 1, "tap_major"), (4, 4))
    assert sorted(sums.flatten().tolist()) == [0.0] * 16 + [16.0] * 2
